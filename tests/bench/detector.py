"""`make bench`: compares unmodified transformers (float32, eager) with our detector, alternating in one process.

Models are the bundled checkpoint at its own image size, and one of real size with random weights on images of 1066x800.
Prints median seconds, ratios and the largest differences; on the CPU, which runs with one thread, also the time of each
stage and the peak memory of a process.
"""

import argparse
import copy
import io
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
from torch import Tensor
from transformers import GroundingDinoConfig, GroundingDinoForObjectDetection

from backend.demo.shapes import draw_scene
from backend.detection.acceleration import keep_freed_memory
from backend.detection.captions import Caption, build_caption
from backend.detection.checkpoints import load_checkpoint
from backend.detection.detector import Detector
from backend.detection.preprocess import ImageFormat
from backend.images.decoding import ImageLoader
from backend.images.sources import ImageFetcher
from backend.labelstudio.client import LabelStudioClient
from backend.labelstudio.labeling_config import Label
from backend.registry.checkpoint import DEMO_CHECKPOINT

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
    forward: Callable[[Tensor], tuple[Tensor, Tensor]]  # pixel values -> logits, encoder states
    keep_memory: bool
    seconds: list[float] = field(default_factory=list)
    outputs: tuple[Tensor, Tensor] = (Tensor(), Tensor())

    def run(self, pixels: Tensor) -> float:
        keep_freed_memory(self.keep_memory)
        clock = time.perf_counter if pixels.is_cuda else time.process_time
        pixels = pixels.clone()  # SharedBackbone would reuse its features for the same tensor
        start = clock()
        logits, states = self.forward(pixels)
        self.outputs = logits.float().cpu(), states.float().cpu()  # also waits for the GPU
        return clock() - start


def make_stock_forward(model: Any, caption: Caption) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    @torch.inference_mode()
    def forward(pixels: Tensor) -> tuple[Tensor, Tensor]:
        ids = torch.tensor([caption.input_ids] * len(pixels), device=pixels.device)
        output = model(pixel_values=pixels, input_ids=ids)
        return output.logits, output.encoder_last_hidden_state_vision

    return forward


def make_our_forward(detector: Detector, caption: Caption) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    states: list[Tensor] = []
    detector.model.model.encoder.register_forward_hook(lambda *args: states.append(args[2].last_hidden_state_vision))

    def forward(pixels: Tensor) -> tuple[Tensor, Tensor]:
        return detector._forward(pixels, caption)[0], states.pop()

    return forward


def compare(
    name: str, model: torch.nn.Module, tokenizer: object, shape: tuple[int, ...], runs: int, device: str
) -> None:
    """Prints rows of the table; the others are compared with the first implementation, unmodified transformers."""
    caption = build_caption(tokenizer, PHRASES)
    precision = torch.float16 if device == "cuda" else torch.float32
    stock = make_stock_forward(copy.deepcopy(model).to(device), caption)
    ours = make_our_forward(Detector(copy.deepcopy(model), tokenizer, ImageFormat(), device, precision), caption)
    implementations = [Implementation("transformers", stock, False), Implementation("ours", ours, True)]
    if device == "cpu":
        implementations.insert(1, Implementation("transformers, memory kept", stock, True))
    pixels = torch.randn(shape, device=device)
    for run in range(runs + 1):
        for implementation in implementations:
            seconds = implementation.run(pixels)
            if run > 0:  # the first run warms up
                implementation.seconds.append(seconds)
    for implementation in implementations:
        print(f"| {name} | {implementation.name} | {format_row(implementations[0], implementation)} |", flush=True)


def format_row(stock: Implementation, implementation: Implementation) -> str:
    ratios = [a / b for a, b in zip(stock.seconds, implementation.seconds, strict=True)]
    states = (stock.outputs[1] - implementation.outputs[1]).abs().max()
    scores = (
        (stock.outputs[0].sigmoid().sort(1).values - implementation.outputs[0].sigmoid().sort(1).values).abs().max()
    )
    return (
        f"{statistics.median(implementation.seconds):.3f} | {statistics.median(ratios):.2f} ({min(ratios):.2f} to "
        f"{max(ratios):.2f}) | {states:.0e} | {scores:.0e}"
    )


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
    for name, module in {"backbone": model.backbone, "text": model.text_backbone, "encoder": model.encoder,
                         "decoder": model.decoder}.items():  # fmt: skip
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
    add_time(times, "resize", detector.image_format.preprocess, loaded.image)
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
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="(default: %(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="timed runs of each implementation (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.peak:
        print_peak_memory()
        return
    torch.set_num_threads(1)
    model, tokenizer, image_format = load_checkpoint(str(DEMO_CHECKPOINT))
    print(
        "| model and image | implementation | s, median | transformers / this | encoder differs | probability differs |"
    )
    print("|---|---|---|---|---|---|")
    runs, device, batches = arguments.runs, arguments.device, (1,) if arguments.device == "cpu" else (1, 8, 16)
    for batch in batches:
        compare(f"bundled, {batch} of 128x96", model.eval(), tokenizer, (batch, 3, 96, 128), 5 * runs, device)
    real = make_real_size_model()
    for batch in batches:
        compare(f"real size, {batch} of 1066x800", real, tokenizer, (batch, 3, 800, 1066), runs, device)
    if device != "cpu":
        return
    keep_freed_memory()
    print("a 12-megapixel JPEG at real size: ", end="")
    print_stages(Detector(real, tokenizer, ImageFormat()), draw_photograph())
    print("the same with the bundled checkpoint: ", end="")
    print_stages(Detector(model, tokenizer, image_format), draw_photograph())
    subprocess.run([sys.executable, "-m", "tests.bench.detector", "--peak"], check=True)


if __name__ == "__main__":
    main()
