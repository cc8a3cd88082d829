"""The detectors of one worker: the checkpoint as it came, and those of learned versions that were used last."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence

from backend.detection.checkpoints import load_checkpoint, load_model, load_weights_into
from backend.detection.detector import Detector
from backend.detection.device import choose_device, choose_precision
from backend.registry.checkpoint import find_checkpoint
from backend.registry.versions import VersionStore
from backend.settings import Settings

log = logging.getLogger(__name__)

MAX_VERSIONS_LOADED = 2  # in memory beside the checkpoint as it came


class DetectorCache:
    """Makes detectors as the settings say; not thread-safe."""

    def __init__(self, settings: Settings) -> None:
        """Raises CheckpointError where the model cannot be loaded."""
        self._settings = settings
        self._source = find_checkpoint(settings.model).source
        self.plain = Detector(*load_checkpoint(self._source), choose_device(settings), choose_precision(settings))
        self._learned: OrderedDict[tuple[str, ...], Detector] = OrderedDict()

    def get(self, learned: Sequence[str] | None) -> Detector:
        """The detector of a version, as project and id; none is the checkpoint as it came.

        Raises:
            CheckpointError: there is no such version, or it is damaged.
        """
        if not learned:
            return self.plain
        key = tuple(learned)
        if key not in self._learned:
            while len(self._learned) >= MAX_VERSIONS_LOADED:  # before the next is loaded: memory may not hold one more
                self._learned.popitem(last=False)
            self._learned[key] = self._load(*key)
        self._learned.move_to_end(key)
        return self._learned[key]

    def _load(self, project: str, version: str) -> Detector:
        log.info("taking up version %s of project %s", version, project)
        versions = VersionStore(self._settings.model_dir, project)
        versions.get(version)  # refuses what is damaged
        model = load_weights_into(load_model(self._source), versions.weights_path(version))
        plain = self.plain
        detector = Detector(model, plain.tokenizer, plain.image_format, str(plain.device), plain.precision)
        detector.batch_size, detector.on_forward = plain.batch_size, plain.on_forward
        return detector
