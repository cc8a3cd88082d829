import weakref
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from backend.detection.checkpoints import load_model
from backend.detection.detector_cache import MAX_VERSIONS_LOADED, DetectorCache
from backend.errors import CheckpointError
from backend.labelstudio.labeling_config import Label
from backend.registry.checkpoint import find_checkpoint
from backend.registry.versions import WEIGHTS, Version, VersionStore
from backend.settings import Settings
from tests.scenes import make_scenes

SCENE = make_scenes(1)[0]
LABELS = [Label(phrase, (phrase,), 0.3) for phrase in sorted({shape.shape for shape in SCENE.shapes})]
NAME = "model.encoder.layers.0.fusion_layer.vision_param"


@pytest.fixture(scope="module")
def detectors(tmp_path_factory: pytest.TempPathFactory) -> DetectorCache:
    return DetectorCache(Settings(model="demo", model_dir=tmp_path_factory.mktemp("data")))


def add_version(detectors: DetectorCache, number: int, scale: float) -> list[str]:
    """Stores a version with one tensor of the model scaled; returns project and version id."""
    tensor = dict(load_model(find_checkpoint("demo").source).named_parameters())[NAME]
    versions = VersionStore(detectors._settings.model_dir, "7")
    version = Version(f"v-{number:04}", "c", "", 1)
    versions.add(version, lambda path: save_file({NAME: (tensor * scale).detach().contiguous()}, path))
    return ["7", version.id]


def compute_scores(detectors: DetectorCache, version: list[str] | None) -> list[float]:
    return [d.score for d in detectors.get(version).detect([SCENE.image], LABELS)[0]]


def test_a_version_has_scores_of_its_own_and_leaves_the_base_alone(detectors: DetectorCache) -> None:
    base = compute_scores(detectors, None)
    assert compute_scores(detectors, add_version(detectors, 1, 1.0)) == pytest.approx(base, abs=1e-6)
    assert compute_scores(detectors, add_version(detectors, 2, 3.0)) != pytest.approx(base, abs=1e-3)
    assert compute_scores(detectors, None) == base


def test_only_the_last_used_versions_stay_in_memory(detectors: DetectorCache) -> None:
    versions = [add_version(detectors, number, 1.0) for number in range(10, 11 + MAX_VERSIONS_LOADED)]
    first = weakref.ref(detectors.get(versions[0]).model)
    for version in versions[1:]:
        detectors.get(version)
    assert first() is None
    assert torch.isfinite(torch.tensor(compute_scores(detectors, versions[0]))).all()  # it is loaded again


def test_the_settings_choose_the_sizes_of_images(tmp_path: Path) -> None:
    sizes = []
    for divisor in (1, 32):
        detectors = DetectorCache(Settings(model="demo", model_dir=tmp_path, size_divisor=divisor))
        sizes.append(tuple(detectors.base.prepare_image(Image.new("RGB", (130, 100))).pixels.shape[:2]))
    assert sizes == [(96, 124), (96, 128)]


def test_a_damaged_version_is_refused_and_the_base_still_works(detectors: DetectorCache) -> None:
    version = add_version(detectors, 30, 1.0)
    path: Path = VersionStore(detectors._settings.model_dir, "7").get_weights_path(version[1])
    assert path.name == WEIGHTS
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="damaged"):
        detectors.get(version)
    with pytest.raises(CheckpointError, match="every machine needs the same MODEL_DIR"):
        detectors.get(["7", "v-9999"])
    assert compute_scores(detectors, None)
