"""The faster modules give the numbers of those that they replace."""

import copy
import platform
import subprocess
import sys
from collections import Counter

import pytest
import torch
from transformers import GroundingDinoConfig
from transformers.models.grounding_dino import modeling_grounding_dino as reference

from backend.demo.train import build_tokenizer
from backend.detection.acceleration import FoldedFusion, FusedAttention, PackedLinear, accelerate_on_cpu
from backend.detection.captions import build_caption
from backend.detection.checkpoints import load_model
from backend.detection.deformable_attention import GatheredAttention
from backend.detection.preprocess import ImageFormat
from backend.registry.checkpoint import DEMO_CHECKPOINT
from tests.detection.forward import draw_noise, make_forward_pass, run_forward_pass, run_transformers
from tests.servers import ROOT


@pytest.mark.parametrize("padded", [False, True])
def test_folded_fusion_equals_transformers(padded: bool) -> None:
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
        (actual_vision, _), (actual_text, _) = FoldedFusion(attention)(vision, text, **masks)
    assert (actual_vision - expected_vision).abs().max() < 1e-5
    assert (actual_text - expected_text).abs().max() < 1e-5


@pytest.mark.parametrize("masked", [False, True])
def test_fused_attention_equals_transformers(masked: bool) -> None:
    torch.manual_seed(0)
    attention = reference.GroundingDinoMultiheadAttention(GroundingDinoConfig(), num_attention_heads=8).eval()
    queries, keys, values = torch.randn(2, 30, 256), torch.randn(2, 9, 256), torch.randn(2, 9, 256)
    mask = torch.zeros(2, 8, 30, 9).masked_fill(torch.rand(2, 8, 30, 9) < 0.3, -1e9) if masked else None
    with torch.inference_mode():
        (expected,) = attention(queries, keys, values, mask)
        actual, _ = FusedAttention(attention)(queries, keys, values, mask)
    assert (actual - expected).abs().max() < 1e-5


@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_packed_linear_equals_linear(activation: str) -> None:
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(64, 96), torch.randn(2, 50, 64)
    after = {"none": lambda y: y, "relu": torch.relu, "gelu": torch.nn.functional.gelu}[activation]
    with torch.inference_mode():
        assert (PackedLinear(linear, activation)(x) - after(linear(x))).abs().max() < 1e-5


@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while its compiler is imported
def test_the_whole_model_gives_the_same_detections() -> None:
    stock = load_model(str(DEMO_CHECKPOINT)).eval()
    fast = copy.deepcopy(stock)
    accelerate_on_cpu(fast)
    count = Counter(type(module) for module in fast.modules())
    assert count[FoldedFusion] == 2
    assert count[GatheredAttention] == 5
    assert count[FusedAttention] == 6
    assert count[PackedLinear] > 30
    pixels, caption = draw_noise(2, 96, 128), build_caption(build_tokenizer(), ["red circle", "blue object", "star"])
    expected = run_transformers(stock, ImageFormat(), pixels, caption)
    actual = run_forward_pass(make_forward_pass(fast), pixels, caption)
    assert (expected.logits.sigmoid() - actual.logits.sigmoid()).abs().max() < 1e-4
    assert (expected.boxes_cxcywh - actual.boxes_cxcywh).abs().max() < 1e-4


PAGE_FAULTS = """
import resource, torch
from backend.detection.acceleration import keep_freed_memory

def count_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(64, 1024, 1024)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

count_faults()
default = count_faults()
keep_freed_memory()
for _ in range(15):  # until blocks of this size, alignment included, are reused
    count_faults()
print(default, count_faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_kept_memory_is_reused_without_page_faults() -> None:
    done = subprocess.run([sys.executable, "-c", PAGE_FAULTS], cwd=ROOT, capture_output=True, text=True, check=True)
    default, kept = map(int, done.stdout.split())
    assert kept < 100 < default
