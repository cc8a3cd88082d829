"""Our deformable attention gives the numbers of transformers."""

import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GroundingDinoConfig
from transformers.models.grounding_dino import modeling_grounding_dino as reference

from backend.detection import deformable_attention
from backend.detection.deformable_attention import GatheredAttention, SlicedLayer, locate_samples, sample_rows

SHAPES = [(13, 17), (7, 9), (1, 5), (1, 1)]
TOKENS = sum(height * width for height, width in SHAPES)


def sample_uncompiled(*arguments: Any) -> torch.Tensor:
    return sample_rows(locate_samples, *arguments)


def make_geometry(batch: int, queries: int, coordinates: int) -> dict[str, Any]:
    shapes = torch.tensor(SHAPES)
    return {
        "reference_points": torch.rand(batch, queries, len(SHAPES), coordinates) * 1.6 - 0.3,  # outside as well
        "spatial_shapes": shapes,
        "spatial_shapes_list": SHAPES,
        "level_start_index": torch.cat([torch.zeros(1).long(), shapes.prod(1).cumsum(0)[:-1]]),
    }


@pytest.fixture
def layer() -> torch.nn.Module:
    torch.manual_seed(0)
    config = GroundingDinoConfig(d_model=64, encoder_ffn_dim=96, encoder_attention_heads=4)
    layer = reference.GroundingDinoDeformableLayer(config).eval()
    for weight in layer.parameters():
        weight.data = 0.2 * torch.randn_like(weight)
    return layer


@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("padded", [False, True])
def test_gathered_attention_equals_transformers(layer: Any, coordinates: int, padded: bool) -> None:
    mask = torch.ones(2, TOKENS).bool()
    if padded:
        mask[1, 200:] = False
    arguments = {
        "hidden_states": torch.randn(2, 11, 64),
        "attention_mask": mask,
        "encoder_hidden_states": torch.randn(2, TOKENS, 64),
        "position_embeddings": torch.randn(2, 11, 64),
        **make_geometry(2, 11, coordinates),
    }
    arguments["reference_points"][0, 0] = 1e6  # far outside
    with torch.inference_mode():
        expected, _ = layer.self_attn(**arguments)
        actual, _ = GatheredAttention(layer.self_attn, sample_uncompiled)(**arguments)
    assert (actual - expected).abs().max() < 1e-5


@pytest.mark.parametrize("size", [7, 100, 10_000])
def test_a_sliced_layer_equals_transformers_at_any_slice_size(
    layer: Any, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deformable_attention, "QUERIES_PER_SLICE", size)
    arguments = {
        "hidden_states": torch.randn(2, TOKENS, 64),
        "attention_mask": torch.ones(2, TOKENS).bool(),
        "position_embeddings": torch.randn(2, TOKENS, 64),
        **make_geometry(2, TOKENS, 2),
    }
    with torch.inference_mode():
        expected, _ = layer(**arguments)
        layer.self_attn = GatheredAttention(layer.self_attn, sample_uncompiled)
        actual, _ = SlicedLayer(layer)(**arguments)
    assert (actual - expected).abs().max() < 1e-5


def test_without_a_compiler_sampling_falls_back_and_warns(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: object, **kwargs: object) -> object:
        def fail(*args: object) -> None:
            raise RuntimeError("no g++")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    caplog.set_level(logging.WARNING)
    assert deformable_attention.compile_locate_samples() is locate_samples
    assert caplog.text.count("torch.compile is unavailable (RuntimeError): predictions are about 10% slower") == 1


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="torch.compile needs a C++ compiler")
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while its compiler is imported
def test_compiled_weights_are_the_same_at_any_size() -> None:
    compiled = deformable_attention.compile_locate_samples()
    assert compiled is not locate_samples  # or it would be compared with itself
    for height, width, batch in [(6, 8, 1), (4, 9, 3)]:
        example = deformable_attention._example(height, width, batch)
        for actual, expected in zip(compiled(*example), locate_samples(*example), strict=True):
            assert (actual - expected).abs().max() < 1e-5


IN_THE_INTERPRETER = """
from tests.detection.test_deformable_attention import make_geometry, sample_uncompiled, torch
from backend.detection.deformable_attention_triton import sample
torch.manual_seed(0)
for levels in 1, 3, 4:  # 4, 12 and 16 samples: one is no power of two
    inputs = make_geometry(2, 37, 2)
    sizes, starts = inputs["spatial_shapes"][:levels], inputs["level_start_index"][:levels]
    values, offsets = torch.randn(2, int(sizes.prod(1).sum()), 64), 3 * torch.randn(2, 37, 4, levels, 4, 2)
    offsets[0, 0] = 1e6  # far outside
    reference, logits = inputs["reference_points"][:, :, :levels], torch.randn(2, 37, 4, levels * 4)
    expected = sample_uncompiled(values, reference, offsets, logits, sizes, starts)
    assert (sample(values, reference, offsets, logits, sizes, starts) - expected).abs().max() < 1e-5
    half = sample(values.half(), reference, offsets.half(), logits.half(), sizes, starts)
    assert half.dtype is torch.float16
    assert (half - expected).abs().max() < 3e-2
"""


def count_registers(compiled: Any, folder: Path) -> int:
    """Returns the registers of a thread, as the tools that come with Triton tell them."""
    from triton.backends import nvidia

    (folder / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    tool = Path(nvidia.__path__[0]) / "bin" / "cuobjdump"
    command = [str(tool), "--dump-resource-usage", str(folder / "kernel.cubin")]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+)", report)
    assert found, report
    return int(found[1])


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")  # of Triton 3.9, about a default of 3.10
def test_the_gpu_kernel_compiles_and_leaves_room_for_others(tmp_path: Path) -> None:
    """Compiles for a GPU of 2022 and one of 2018; with many registers a thread few programs would run at once."""
    triton = pytest.importorskip("triton", reason="Triton exists for Linux on x86-64 only")
    from triton.backends.compiler import GPUTarget

    kernel = pytest.importorskip("backend.detection.deformable_attention_triton")
    constants = {"HEADS": 8, "LEVELS": 4, "POINTS": 4, "SAMPLES": 16, "WIDTH": 32, "BLOCK": kernel.BLOCK}
    for capability, values in ((90, "*fp16"), (75, "*fp16"), (90, "*fp32")):
        types = [values, "*fp32", values, values, "*i64", "*i64", values, "i32", "i32"]
        names = kernel._sample.arg_names
        source = triton.compiler.ASTSource(
            kernel._sample,
            dict(zip(names, types, strict=False)) | dict.fromkeys(constants, "constexpr"),
            constexprs={(names.index(name),): value for name, value in constants.items()},
            attrs={(index,): [["tt.divisibility", 16]] for index in range(7)},
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert count_registers(compiled, tmp_path) <= 128


def test_the_gpu_kernel_is_compiled_once_for_all_sizes() -> None:
    kernel = pytest.importorskip("backend.detection.deformable_attention_triton")
    not_specialized = {p.name for p in kernel._sample.params if p.do_not_specialize}
    assert {"tokens", "queries"} <= not_specialized


def test_the_gpu_kernel_equals_the_cpu_in_tritons_interpreter() -> None:
    pytest.importorskip("triton", reason="the GPU's kernel needs Triton, which exists for Linux on x86-64 only")
    command = [sys.executable, "-c", IN_THE_INTERPRETER]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 0, done.stderr.decode()
