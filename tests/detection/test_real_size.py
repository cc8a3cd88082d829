"""Models of the published sizes, with random weights and the faster modules, behave as the bundled one does."""

import copy
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    MMGroundingDinoConfig,
    MMGroundingDinoForObjectDetection,
    SwinConfig,
)

from backend.detection.acceleration import FoldedFusion, FusedAttention, PackedLinear
from backend.detection.captions import Caption, build_caption, build_captions
from backend.detection.checkpoints import load_checkpoint
from backend.detection.deformable_attention import GatheredAttention, SlicedLayer
from backend.detection.detector import Detector
from backend.detection.phrase_scores import make_span_matrix, phrase_scores
from backend.detection.preprocess import ImageFormat
from backend.labelstudio.labeling_config import Label
from backend.registry.checkpoint import DEMO_CHECKPOINT
from tests.boxes import iou
from tests.detection.forward import draw_noise, run_forward_pass, run_transformers

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch's own, while its compiler is imported
]

SWIN_B = {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32], "window_size": 12, "image_size": 384}
SMALL = ImageFormat(shortest_edge=320, longest_edge=427)  # a pass takes one second instead of ten
PHRASES = ["red circle", "blue square", "green star", "ring"]


def randomize(model: Any) -> Any:
    torch.manual_seed(0)
    for weight in model.parameters():
        if weight.dim() == 1:  # initial zeros and ones would hide differences
            weight.data += 0.1 * torch.randn_like(weight)
    return model.eval()


def make_swin_b_config(kind: Any) -> Any:
    return kind(backbone_config=SwinConfig(**SWIN_B, out_indices=[2, 3, 4]))


def assert_accelerated(model: Any) -> None:
    """Fails unless the faster modules for the CPU are in place; they are left out of small models."""
    replaced = {type(module) for module in model.modules()}
    assert {FoldedFusion, FusedAttention, GatheredAttention, PackedLinear, SlicedLayer} <= replaced


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_checkpoint(str(DEMO_CHECKPOINT)).tokenizer


@pytest.fixture(scope="module")
def detector(tokenizer: Any) -> Detector:
    torch.manual_seed(0)
    detector = Detector(randomize(GroundingDinoForObjectDetection(GroundingDinoConfig())), tokenizer, SMALL)
    assert_accelerated(detector.model)
    return detector


def score_phrases(detector: Detector, pixels: torch.Tensor, caption: Caption) -> torch.Tensor:
    """Returns scores (images, queries, phrases)."""
    logits = run_forward_pass(detector.forward_pass, pixels, caption).logits
    return phrase_scores(logits, make_span_matrix(caption.spans, logits.shape[-1]))


def compute_scores(detector: Detector, phrases: list[str], images: int = 1, seed: int = 1) -> torch.Tensor:
    """Returns scores (images, queries, phrases), sorted over the queries; the phrases in the order of PHRASES."""
    pixels, caption = draw_noise(images, 320, 427, seed), build_caption(detector.tokenizer, phrases)
    all_scores = score_phrases(detector, pixels, caption)
    return all_scores[..., [phrases.index(phrase) for phrase in PHRASES]].sort(1).values


def test_label_order_changes_nothing(detector: Detector) -> None:
    assert (compute_scores(detector, PHRASES) - compute_scores(detector, PHRASES[::-1])).abs().max() < 1e-4


def test_a_batch_equals_one_by_one(detector: Detector) -> None:
    together = compute_scores(detector, PHRASES, images=2)
    assert (together[:1] - together[1:]).abs().max() > 1e-4  # two different images
    pixels, caption = draw_noise(2, 320, 427), build_caption(detector.tokenizer, PHRASES)
    alone = [score_phrases(detector, pixels[i : i + 1], caption) for i in (0, 1)]
    assert (torch.cat(alone).sort(1).values - together).abs().max() < 1e-4


def test_splitting_a_caption_keeps_every_box_of_its_halves(detector: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.effect_noise((427, 320), 100).convert("RGB")
    labels = [Label(phrase, (phrase,), 0.0) for phrase in PHRASES]
    halves = [d for half in (labels[:2], labels[2:]) for d in detector.detect([image], half)[0]]
    monkeypatch.setattr(detector.model.config, "max_text_len", 8)
    assert len(build_captions(detector.tokenizer, PHRASES, 8)) == 2
    split = detector.detect([image], labels, nms_iou=0.7)[0]
    assert 0 < len(split) < len(halves) == 1800
    for box in sorted(halves, key=lambda d: -d.score)[:200]:
        assert any(kept.score >= box.score - 1e-4 and iou(kept.box_xyxy, box.box_xyxy) > 0.69 for kept in split)


@pytest.mark.parametrize(
    "build",
    [
        lambda: GroundingDinoForObjectDetection(make_swin_b_config(GroundingDinoConfig)),
        lambda: MMGroundingDinoForObjectDetection(MMGroundingDinoConfig()),
    ],
    ids=["Swin-B", "MM-Grounding-DINO"],
)
def test_other_architectures_give_the_numbers_of_transformers(build: Any, tokenizer: Any) -> None:
    stock = randomize(build())
    fast = Detector(copy.deepcopy(stock), tokenizer, SMALL)
    assert_accelerated(fast.model)
    caption, pixels = build_caption(tokenizer, PHRASES), draw_noise(1, 224, 320)
    expected = run_transformers(stock, SMALL, pixels, caption)
    actual = run_forward_pass(fast.forward_pass, pixels, caption)
    assert (expected.image_states - actual.image_states).abs().max() < 1e-4
    sorted_scores = [output.logits.sigmoid().sort(1).values for output in (expected, actual)]
    difference = (sorted_scores[0] - sorted_scores[1]).abs()
    assert difference.flatten().quantile(0.99) < 1e-4  # near ties: a few of the 900 queries may differ
