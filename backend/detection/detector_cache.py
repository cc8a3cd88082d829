"""The detectors of one worker: one for the base checkpoint, and those of recently used fine-tuned versions."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence

import torch

from backend.detection.checkpoints import load_checkpoint, load_model, load_weights_into
from backend.detection.detector import Detector
from backend.detection.device import choose_device, choose_precision
from backend.registry.checkpoint import find_checkpoint
from backend.registry.versions import VersionStore
from backend.settings import Settings

log = logging.getLogger(__name__)

MAX_VERSIONS_LOADED = 2  # fine-tuned versions in memory, beside the base checkpoint


class DetectorCache:
    """Loads detectors on demand and keeps the most recently used ones in memory; not thread-safe.

    Attributes:
        base: the detector of the base checkpoint, always loaded.
    """

    def __init__(self, settings: Settings) -> None:
        """Loads the base checkpoint.

        Raises:
            CheckpointError: it cannot be loaded.
            SettingsError: DEVICE cannot be used.
        """
        self._settings = settings
        self._source = find_checkpoint(settings.model).source
        device, self._precision = choose_device(settings), choose_precision(settings)
        checkpoint = load_checkpoint(self._source, settings.size_divisor)
        self.base = Detector(*checkpoint, device, self._precision)
        self._fine_tuned: OrderedDict[tuple[str, str], Detector] = OrderedDict()
        self.base.on_out_of_memory = self.free_memory

    def get(self, version: Sequence[str] | None) -> Detector:
        """Returns the detector of a fine-tuned version, or of the base checkpoint if there is none.

        Args:
            version: project and version id.

        Raises:
            CheckpointError: the version does not exist, or its files are damaged.
        """
        if not version:
            return self.base
        project, version_id = version
        key = (project, version_id)
        if key not in self._fine_tuned:
            while len(self._fine_tuned) >= MAX_VERSIONS_LOADED:  # before loading: memory may not hold one more
                self._fine_tuned.popitem(last=False)
                self.free_memory()
            self._fine_tuned[key] = self._load(project, version_id)
        self._fine_tuned.move_to_end(key)
        return self._fine_tuned[key]

    def free_memory(self) -> None:
        """Drops what the detectors keep from pass to pass, CUDA graphs included; they make it again."""
        for detector in (self.base, *self._fine_tuned.values()):
            detector.forward_pass.clear()
        if self.base.device.type == "cuda":
            torch.cuda.empty_cache()

    def _load(self, project: str, version_id: str) -> Detector:
        log.info("project %s: loading fine-tuned version %s", project, version_id)
        versions = VersionStore(self._settings.model_dir, project)
        versions.get(version_id)  # raises where the files are damaged
        model = load_weights_into(load_model(self._source), versions.get_weights_path(version_id))
        base = self.base
        detector = Detector(model, base.tokenizer, base.image_format, str(base.device), self._precision)
        detector.batch_size, detector.on_forward = base.batch_size, base.on_forward
        detector.on_out_of_memory = self.free_memory
        return detector
