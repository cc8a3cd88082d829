"""The fast parts give the numbers of the parts that they stand in for."""

import copy
import logging

import pytest
import torch
from transformers import GroundingDinoConfig
from transformers.models.grounding_dino import modeling_grounding_dino as reference

from backend import speed
from backend.captions import build_caption
from backend.checkpoints import load_model
from backend.demo.train import build_tokenizer
from backend.speed import FoldedFusion, GatheredAttention, PackedLinear, gather_plan, speed_up
from backend.versions import DEMO


@pytest.mark.parametrize("padded", [False, True])
def test_folded_fusion(padded: bool) -> None:
    torch.manual_seed(0)
    attention = reference.GroundingDinoBiMultiHeadAttention(GroundingDinoConfig()).eval()
    for weight in attention.parameters():
        weight.data = 0.06 * torch.randn_like(weight)
    vision, text = torch.randn(2, 50, 256), torch.randn(2, 7, 256)
    masks = {}
    if padded:
        masks = {"vision_attention_mask": torch.zeros(2, 50).bool(), "text_attention_mask": torch.zeros(2, 7).bool()}
        masks["vision_attention_mask"][1, 40:] = True
        masks["text_attention_mask"][1, 5:] = True
    with torch.inference_mode():
        (expected_vision, _), (expected_text, _) = attention(vision, text, **masks)
        (found_vision, _), (found_text, _) = FoldedFusion(attention)(vision, text, **masks)
    assert (found_vision - expected_vision).abs().max() < 1e-5
    assert (found_text - expected_text).abs().max() < 1e-5


def test_gathered_attention_inside_and_outside_of_the_map() -> None:
    torch.manual_seed(0)
    shapes = [(13, 17), (7, 9), (1, 5)]
    tokens = sum(height * width for height, width in shapes)
    value, sizes = torch.randn(2, tokens, 4, 8), torch.tensor(shapes)
    starts = torch.cat([torch.zeros(1).long(), sizes.prod(1).cumsum(0)[:-1]])
    locations, weights = torch.rand(2, 11, 4, 3, 4, 2) * 1.6 - 0.3, torch.rand(2, 11, 4, 3, 4)
    locations[0, 0] = 1e6  # far outside
    arguments = value, sizes, shapes, starts, locations, weights, 64
    expected = reference.MultiScaleDeformableAttention()(*arguments)
    assert (GatheredAttention(gather_plan)(*arguments) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_packed_linear(activation: str) -> None:
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(64, 96), torch.randn(2, 50, 64)
    after = {"none": lambda y: y, "relu": torch.relu, "gelu": torch.nn.functional.gelu}[activation]
    with torch.inference_mode():
        assert (PackedLinear(linear, activation)(x) - after(linear(x))).abs().max() < 1e-5


@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while its compiler is imported
def test_the_whole_model_gives_the_same_detections() -> None:
    stock = load_model(str(DEMO)).eval()
    fast = copy.deepcopy(stock)
    speed_up(fast)
    kinds = [type(module) for module in fast.modules()]
    assert kinds.count(FoldedFusion) == 2
    assert kinds.count(GatheredAttention) == 5
    assert kinds.count(PackedLinear) > 30
    torch.manual_seed(0)
    caption = build_caption(build_tokenizer(), ["red circle", "blue object", "star"])
    inputs = {"pixel_values": torch.randn(2, 3, 96, 128), "input_ids": torch.tensor([caption.input_ids] * 2)}
    with torch.inference_mode():
        expected, found = stock(**inputs), fast(**inputs)
    assert (expected.logits.sigmoid() - found.logits.sigmoid()).abs().max() < 1e-4
    assert (expected.pred_boxes - found.pred_boxes).abs().max() < 1e-4


def test_without_a_compiler_it_goes_on_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: object, **kwargs: object) -> object:
        def fail(*args: object) -> None:
            raise RuntimeError("no g++")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    caplog.set_level(logging.WARNING)
    assert speed.compiled_gather_plan() is gather_plan
    assert caplog.text.count("no compiler that works") == 1


@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while its compiler is imported
def test_compiled_weights_are_the_same_at_any_size() -> None:
    compiled = speed.compiled_gather_plan()
    for height, width, batch in [(6, 8, 1), (4, 9, 3)]:
        example = speed._example(height, width, batch)
        for found, expected in zip(compiled(*example), gather_plan(*example), strict=True):
            assert (found - expected).abs().max() < 1e-5
