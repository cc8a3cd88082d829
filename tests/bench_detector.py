"""`make bench`: transformers as it comes against our detector, in turn in one process, on the CPU.

Real size with random weights on one picture of 800x1066, and the bundled checkpoint at its own size: seconds (median),
ratio, largest difference of probabilities; then where the time goes, and the peak memory of a process of its own.
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
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import GroundingDinoConfig, GroundingDinoForObjectDetection

from backend.captions import build_caption
from backend.checkpoints import load_checkpoint
from backend.demo.shapes import draw_scene
from backend.detector import Detector, ImageFormat
from backend.images import Images
from backend.labeling import Label
from backend.studio import Studio
from backend.versions import DEMO

PHRASES = [f"{colour} {shape}" for colour in ("red", "green", "blue") for shape in ("circle", "square")]


def random_real_size() -> GroundingDinoForObjectDetection:
    torch.manual_seed(0)
    model = GroundingDinoForObjectDetection(GroundingDinoConfig()).eval()
    for weight in model.parameters():
        if weight.dim() == 1:  # what starts at zero or one would hide differences
            weight.data += 0.1 * torch.randn_like(weight)
    return model


def compare(name: str, stock: torch.nn.Module, tokenizer: object, size: tuple[int, int], runs: int) -> None:
    fast = Detector(copy.deepcopy(stock), tokenizer, ImageFormat()).model
    caption = build_caption(tokenizer, PHRASES)
    inputs = {"pixel_values": torch.randn(1, 3, size[1], size[0]), "input_ids": torch.tensor([caption.input_ids])}
    times: dict[str, list[float]] = defaultdict(list)
    outputs = {}
    with torch.inference_mode():
        for number in range(runs + 1):
            for kind, model in (("stock", stock), ("fast", fast)):
                pixels = inputs["pixel_values"].clone()  # the same tensor again would be answered from SharedBackbone
                start = time.process_time()
                outputs[kind] = model(pixel_values=pixels, input_ids=inputs["input_ids"])
                if number:
                    times[kind].append(time.process_time() - start)
    ratios = [a / b for a, b in zip(times["stock"], times["fast"], strict=True)]
    encoder = [outputs[kind].encoder_last_hidden_state_vision for kind in ("stock", "fast")]
    scores = [outputs[kind].logits.sigmoid().sort(1).values for kind in ("stock", "fast")]
    print(
        f"| {name} | {statistics.median(times['stock']):.3f} | {statistics.median(times['fast']):.3f} "
        f"| {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) "
        f"| {(encoder[0] - encoder[1]).abs().max():.0e} | {(scores[0] - scores[1]).abs().max():.0e} |",
        flush=True,
    )


def timed(times: dict[str, float], name: str, function: Callable, *arguments: object) -> object:
    start = time.perf_counter()
    result = function(*arguments)
    times[name] += time.perf_counter() - start
    return result


def shares(detector: Detector, body: bytes) -> None:
    """Seconds of each stage for one JPEG, from its bytes to Detections."""
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
    loader = Images(Studio("", ""), 10**9, 10**9, detector.image_format.size)
    detector.detect([loader._decode(body, "").image], labels)  # warm
    times.clear()
    total: dict[str, float] = defaultdict(float)
    picture = timed(times, "decode", loader._decode, body, "")
    timed(times, "resize", detector.image_format.preprocess, picture.image)
    timed(total, "detect", lambda: detector.detect([picture.image], labels, sizes=[picture.size]))
    times["rest"] = total["detect"] - sum(times[name] for name in times if name != "decode")
    whole = total["detect"] + times["decode"]
    print(", ".join(f"{name} {seconds:.3f} s ({100 * seconds / whole:.1f}%)" for name, seconds in times.items()))


def photograph() -> bytes:
    """A 12-megapixel JPEG."""
    buffer = io.BytesIO()
    draw_scene(np.random.default_rng(0), 4032, 3024).image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def peak() -> None:
    _, tokenizer, _ = load_checkpoint(str(DEMO))
    detector = Detector(random_real_size(), tokenizer, ImageFormat())
    detector.detect([Image.new("RGB", (1066, 800))], [Label("a", ("red circle",), 0.3)])
    # getrusage would count the parent's peak too
    high_water = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
    print(f"peak memory of one picture at real size: {int(high_water) / 1e6:.2f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peak", action="store_true", help="only the peak memory")
    parser.add_argument("--runs", type=int, default=3, help="counted runs of each (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.peak:
        peak()
        return
    torch.set_num_threads(1)
    model, tokenizer, image_format = load_checkpoint(str(DEMO))
    print("| one thread | transformers, s | ours, s | ratio | encoder differs | probability differs |")
    print("|---|---|---|---|---|---|")
    compare("bundled, 128x96", model.eval(), tokenizer, (128, 96), 20)
    real = random_real_size()
    compare("real size, 1066x800", real, tokenizer, (1066, 800), arguments.runs)
    print("a 12-megapixel JPEG at real size: ", end="")
    shares(Detector(real, tokenizer, ImageFormat()), photograph())
    print("the same with the bundled checkpoint: ", end="")
    shares(Detector(model, tokenizer, image_format), photograph())
    subprocess.run([sys.executable, "-m", "tests.bench_detector", "--peak"], check=True)


if __name__ == "__main__":
    main()
