"""The bundled checkpoint, the generator of its images, and its training."""

from pathlib import Path

import numpy as np
import pytest
import torch

from backend.demo import shapes
from backend.demo import train as train_module
from backend.demo.measure import measure
from backend.demo.train import build_tokenizer, draw_batch
from backend.detection.checkpoints import load_checkpoint
from backend.detection.detector import Detector
from backend.registry.checkpoint import DEMO_CHECKPOINT
from tests.scenes import make_scenes

MB = 1024 * 1024


def test_the_bundled_checkpoint_is_small() -> None:
    assert sum(path.stat().st_size for path in DEMO_CHECKPOINT.iterdir()) < 3 * MB


@pytest.mark.timeout(400)
def test_the_bundled_checkpoint_detects_shapes_on_unseen_images() -> None:
    rows = measure(Detector(*load_checkpoint(str(DEMO_CHECKPOINT))), images=100)
    assert rows["training size"].ap50 >= 0.94
    assert rows["other sizes, unseen backgrounds"].ap50 >= 0.85


def test_boxes_are_tight() -> None:
    for scene in make_scenes(20):
        pixels = np.asarray(scene.image).astype(int)
        for shape in scene.shapes:
            left, top, right, bottom = map(int, shape.box_xyxy)
            edges = [pixels[top, left:right], pixels[bottom - 1, left:right], pixels[top:bottom, left]]
            for edge in edges:
                distance = np.abs(edge - np.array(shapes.COLOURS[shape.colour])).max(axis=-1)
                assert distance.min() <= shapes.COLOUR_JITTER


def test_the_same_seed_draws_the_same_image() -> None:
    first, second = make_scenes(2, seed=4), make_scenes(2, seed=4)
    assert [s.shapes for s in first] == [s.shapes for s in second]
    assert first[0].image.tobytes() == second[0].image.tobytes()


def test_no_two_phrases_name_the_same_shape() -> None:
    rng = np.random.default_rng(0)
    for scene in make_scenes(100):
        phrases = shapes.choose_phrases(rng, scene)
        assert 1 <= len(phrases) <= 6
        assert all(sum(shape.matches(phrase) for phrase in phrases) <= 1 for shape in scene.shapes)


def test_targets_are_the_true_boxes_normalised_by_the_size_of_the_image() -> None:
    batch = draw_batch(np.random.default_rng(1), build_tokenizer(), 4)
    assert batch.pixel_values.shape[:2] == (4, 3)
    for caption, target in zip(batch.captions, batch.targets, strict=True):
        assert target.boxes_cxcywh.shape == (len(target.phrases), 4)
        assert ((target.boxes_cxcywh > 0) & (target.boxes_cxcywh < 1)).all()
        assert (target.phrases < len(caption.spans)).all()


def test_a_trained_checkpoint_can_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_module, "STEPS_PER_EPOCH", 1)
    monkeypatch.setattr(train_module, "STEPS_PER_EVALUATION", 1)
    monkeypatch.setattr(train_module, "measure", lambda detector, images: {})
    model, tokenizer = train_module.train(steps=1, seed=0)
    train_module.save(model, tokenizer, tmp_path)
    loaded, _, image_format = load_checkpoint(str(tmp_path))
    assert image_format == train_module.IMAGE_FORMAT
    assert all(torch.equal(a.half(), b.half()) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
