"""`make bench`: compares transformers (float32, eager) with our forward pass on one core of a CPU.

All implementations alternate in one process that is pinned to a core: transformers as it comes and with freed memory
kept, ours in float32 and, where the processor has it, in bfloat16. Models are the bundled checkpoint at its own image
size, and one of real size with random weights on images of 1066x800. Prints median CPU seconds, the median, minimum and
maximum of the ratios, the largest differences, the time that the matrix products alone would take, the time of each
stage and the peak memory of a process. `tests.bench.gpu` is the one for GPUs.
"""

import argparse
import copy
import functools
import io
import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import GroundingDinoConfig, GroundingDinoForObjectDetection

from backend.demo.shapes import draw_scene
from backend.detection.acceleration import PackedLinear, keep_freed_memory
from backend.detection.captions import build_caption
from backend.detection.checkpoints import load_checkpoint
from backend.detection.detector import Detector
from backend.detection.device import has_bfloat16
from backend.detection.preprocess import ImageFormat
from backend.images.decoding import ImageLoader
from backend.images.sources import ImageFetcher
from backend.labelstudio.client import LabelStudioClient
from backend.labelstudio.labeling_config import Label
from backend.registry.checkpoint import DEMO_CHECKPOINT
from tests.detection.forward import Outputs, draw_noise, run_forward_pass, run_transformers

AS_IT_COMES = "transformers, as it comes"
PHRASES = [f"{colour} {shape}" for colour in ("red", "green", "blue") for shape in ("circle", "square")]


def make_real_size_model() -> GroundingDinoForObjectDetection:
    torch.manual_seed(0)
    model = GroundingDinoForObjectDetection(GroundingDinoConfig()).eval()
    for weight in model.parameters():
        if weight.dim() == 1:  # initial zeros and ones would hide differences
            weight.data += 0.1 * torch.randn_like(weight)
    return model


@dataclass
class Implementation:
    """One of the implementations compared, with its timings and its last outputs."""

    name: str
    forward: Callable[[Tensor], Outputs]  # of pixels, uint8 (images, height, width, 3)
    keep_memory: bool
    seconds: list[float] = field(default_factory=list)
    outputs: Outputs | None = None

    def run(self, pixels: Tensor) -> float:
        keep_freed_memory(self.keep_memory)
        start = time.process_time()
        self.outputs = self.forward(pixels)
        return time.process_time() - start


def make_implementations(model: Any, tokenizer: Any, image_format: ImageFormat) -> list[Implementation]:
    caption = build_caption(tokenizer, PHRASES)
    stock = functools.partial(run_transformers, copy.deepcopy(model), image_format, caption=caption)

    def make_ours(precision: torch.dtype) -> Callable[[Tensor], Outputs]:
        detector = Detector(copy.deepcopy(model), tokenizer, image_format, precision=precision)
        return functools.partial(run_forward_pass, detector.forward_pass, caption=caption)

    implementations = [
        Implementation(AS_IT_COMES, stock, keep_memory=False),
        Implementation("transformers, memory kept", stock, keep_memory=True),
        Implementation("ours", make_ours(torch.float32), keep_memory=True),
    ]
    if has_bfloat16(torch.cpu.get_capabilities()):
        implementations.append(Implementation("ours, bfloat16", make_ours(torch.bfloat16), keep_memory=True))
    return implementations


def compare(name: str, implementations: list[Implementation], pixels: Tensor, rounds: int) -> None:
    """Prints rows of the table; in each round all run once, in an order of its own."""
    order = random.Random(0)
    for round_number in range(rounds + 1):
        for implementation in order.sample(implementations, len(implementations)):
            seconds = implementation.run(pixels)
            if round_number > 0:  # the first round warms up
                implementation.seconds.append(seconds)
    for implementation in implementations:
        print(f"| {name} | {implementation.name} | {format_row(implementations[0], implementation)} |", flush=True)


def format_row(stock: Implementation, implementation: Implementation) -> str:
    assert stock.outputs
    assert implementation.outputs
    ratios = [a / b for a, b in zip(stock.seconds, implementation.seconds, strict=True)]
    states = (stock.outputs.image_states - implementation.outputs.image_states).abs().max()
    # Sorted over the queries: with random weights many are nearly equal, and rounding decides which 900 are selected.
    scores = [outputs.logits.sigmoid().sort(1).values for outputs in (stock.outputs, implementation.outputs)]
    differences = (scores[0] - scores[1]).abs()
    return (
        f"{statistics.median(implementation.seconds):.3f} | {statistics.median(ratios):.2f} ({min(ratios):.2f} to "
        f"{max(ratios):.2f}) | {states:.0e} | {differences.flatten().quantile(0.99):.0e}, {differences.max():.0e}"
    )


def print_bound(ours: Implementation, pixels: Tensor) -> None:
    """Prints how far the exact implementation is from the time of its matrix products alone, on this core."""
    with FlopCounterMode(display=False, custom_mapping={torch.ops.mkldnn._linear_pointwise: count_linear}) as counter:
        ours.run(pixels)
    flops, seconds = counter.get_total_flops(), statistics.median(ours.seconds)
    rates = [measure_rate() for _ in range(9)]
    bound = flops / statistics.median(rates)
    print(
        f"bound: {flops / 1e9:.0f} GFLOP of matrix products at {statistics.median(rates) / 1e9:.0f} GFLOP/s "
        f"({min(rates) / 1e9:.0f} to {max(rates) / 1e9:.0f}) take {bound:.2f} s; "
        f"ours takes {seconds / bound:.2f} times that"
    )


def count_linear(x_shape: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    """Counts the operations of a packed linear layer."""
    return int(2 * math.prod(x_shape) * out_shape[-1])


def measure_rate() -> float:
    """Measures this core's rate of matrix products, in FLOP/s, with the layer that takes most of a pass."""
    layer, rows = PackedLinear(nn.Linear(256, 2048)), torch.randn(2048, 256)
    start = time.process_time()
    for _ in range(20):
        layer(rows)
    return 20 * 2 * 2048 * 256 * 2048 / (time.process_time() - start)


def add_time(times: dict[str, float], name: str, function: Callable, *arguments: object) -> Any:
    start = time.perf_counter()
    result = function(*arguments)
    times[name] += time.perf_counter() - start
    return result


def print_stages(detector: Detector, body: bytes) -> None:
    """Prints the seconds of each stage for one JPEG, from its bytes to detections."""
    times: dict[str, float] = defaultdict(float)
    starts: dict[str, float] = {}
    model = detector.model.model
    parts = {
        "backbone": [model.backbone.conv_encoder.model],
        "encoder": [part for layer in model.encoder.layers for part in layer.children()],
        "decoder": model.decoder.layers,
    }
    for name, module in ((name, module) for name, modules in parts.items() for module in modules):
        module.register_forward_pre_hook(lambda *_, name=name: starts.update({name: time.perf_counter()}))
        module.register_forward_hook(
            lambda *_, name=name: times.update({name: times[name] + time.perf_counter() - starts[name]})
        )
    labels = [Label(phrase, (phrase,), 0.3) for phrase in PHRASES]
    loader = ImageLoader(ImageFetcher(LabelStudioClient("", ""), 10**9), 10**9, detector.image_format.compute_size)
    detector.detect([loader._decode(body, "").image], labels)  # warms up
    times.clear()
    total: dict[str, float] = defaultdict(float)
    loaded = add_time(times, "decode", loader._decode, body, "")
    add_time(times, "resize", detector.image_format.resize, loaded.image)
    model_input = detector.prepare_image(loaded.image, loaded.size)
    add_time(total, "detect", lambda: detector.detect_inputs([model_input], labels))
    times["rest"] = total["detect"] - sum(times[name] for name in times if name not in ("decode", "resize"))
    whole = total["detect"] + times["decode"] + times["resize"]
    print(", ".join(f"{name} {seconds:.3f} s ({100 * seconds / whole:.1f}%)" for name, seconds in times.items()))


def draw_photograph() -> bytes:
    """Draws a 12-megapixel JPEG."""
    buffer = io.BytesIO()
    draw_scene(np.random.default_rng(0), 4032, 3024).image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def print_peak_memory() -> None:
    tokenizer = load_checkpoint(str(DEMO_CHECKPOINT)).tokenizer
    keep_freed_memory()
    detector = Detector(make_real_size_model(), tokenizer, ImageFormat())
    detector.detect([Image.new("RGB", (1066, 800))], [Label("a", ("red circle",), 0.3)])
    # getrusage would count the parent's peak too
    high_water = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
    print(f"peak memory of one image at real size: {int(high_water) / 1e6:.2f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peak", action="store_true", help="print only the peak memory")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds of all (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.peak:
        print_peak_memory()
        return
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    model, tokenizer, image_format = load_checkpoint(str(DEMO_CHECKPOINT))
    print("| model and image | implementation | s | as it comes / this | encoder differs | scores differ: 99%, all |")
    print("|---|---|---|---|---|---|")
    implementations = make_implementations(model.eval(), tokenizer, image_format)
    compare("bundled, 128x96", implementations, draw_noise(1, 96, 128), 5 * arguments.rounds)
    real, pixels = make_real_size_model(), draw_noise(1, 800, 1066)
    implementations = make_implementations(real, tokenizer, ImageFormat())
    compare("real size, 1066x800", implementations, pixels, arguments.rounds)
    print_bound(implementations[2], pixels)
    del implementations
    keep_freed_memory()
    print("a 12-megapixel JPEG at real size: ", end="")
    print_stages(Detector(real, tokenizer, ImageFormat()), draw_photograph())
    print("the same with the bundled checkpoint: ", end="", flush=True)
    print_stages(Detector(model, tokenizer, image_format), draw_photograph())
    subprocess.run([sys.executable, "-m", "tests.bench.detector", "--peak"], check=True)


if __name__ == "__main__":
    main()
