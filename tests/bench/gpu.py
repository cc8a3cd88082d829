"""Measures the detector on a GPU: whether its outputs are right, how fast it is, where the time goes, and what fails.

    python -m tests.bench.gpu                        # on cuda:0, a few minutes
    python -m tests.bench.gpu --device cpu --tiny    # tests this script, in half a minute

The model has the published size and random weights; detections are those of the bundled model. Nothing is downloaded.
Each section stands alone: one that fails says why, and the next one runs. Results go to a JSON file as well.
"""

import argparse
import contextlib
import copy
import functools
import gc
import importlib.util
import itertools
import json
import logging
import os
import shutil
import statistics
import sys
import sysconfig
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from backend.demo.measure import TRAINING_SIZE, UNSEEN_SIZES, measure_scenes
from backend.demo.shapes import TRAINING_BACKGROUNDS, UNSEEN_BACKGROUNDS
from backend.detection.acceleration import accelerate_on_gpu
from backend.detection.captions import Caption, build_caption, build_captions
from backend.detection.checkpoints import LoadedCheckpoint, load_checkpoint
from backend.detection.cuda_graphs import CAPTURE_AT, Replay, TensorFunction, Tensors, make_cuda_capture
from backend.detection.deformable_attention import GatheredAttention, locate_samples, sample_rows
from backend.detection.detector import Detector
from backend.detection.device import choose_device
from backend.detection.forward_pass import TEXT_BUCKETS, ForwardPass
from backend.detection.preprocess import ImageFormat, ModelInput, normalize
from backend.errors import ImageError
from backend.labelstudio.labeling_config import Label
from backend.registry.checkpoint import DEMO_CHECKPOINT
from backend.settings import Settings
from backend.training.fine_tuning import choose_autocast_dtype, freeze
from backend.training.loop import train_one_epoch
from backend.training.loss import Batch, Target
from tests.bench.detector import PHRASES, make_real_size_model
from tests.detection.forward import draw_noise, make_forward_pass, run_forward_pass
from tests.scenes import make_scenes

STOCK, PLAIN, OURS = "transformers, float32", "ours without graphs", "ours"
GOALS = {1: 4, 16: 5}  # times as fast as transformers in float32, by images of a batch
MAX_AP50_LOSS, MAX_SCORE_DIFFERENCE = 0.002, 0.012  # that half precision may cause
MAX_ROUNDING = 1e-3  # between scores that differ by the rounding of floats alone
KERNEL_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 2e-2}  # relative to the largest value
LABELS = [Label(phrase, (phrase,), 0.3) for phrase in PHRASES]

Forward = Callable[[Tensor], Any]  # runs a model on uint8 pixels (images, height, width, 3); outputs stay on the device


@dataclass
class Bench:
    """What the sections share; `measured` and `failures` are those of the current section."""

    device: torch.device
    is_tiny: bool  # the bundled model and small images take the place of the model of published size
    batches: Sequence[int]
    runs: int  # timed runs of each measurement
    measured: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.is_cuda = self.device.type == "cuda"
        self.height, self.width = (96, 128) if self.is_tiny else (800, 1066)
        self.bundled = self.checkpoint = load_checkpoint(str(DEMO_CHECKPOINT))
        self.caption = build_caption(self.bundled.tokenizer, PHRASES)
        self.long_caption = build_captions(self.bundled.tokenizer, PHRASES * 30, 256)[0]
        if not self.is_tiny:
            self.checkpoint = LoadedCheckpoint(make_real_size_model(), self.bundled.tokenizer, ImageFormat())
            for name, weight in self.checkpoint.model.named_parameters():
                if name.endswith((".vision_param", ".text_param")):
                    weight.data.fill_(0.3)  # the initial gates would hide the fusion

    def note(self, name: str, value: Any) -> None:
        """Prints a measurement and keeps it."""
        self.measured[name] = value
        print(f"  {name}: {value}", flush=True)

    def check(self, name: str, is_passed: bool, value: str) -> None:
        """Notes a measurement that has to be in a range."""
        self.note(name, f"{value}: {'PASS' if is_passed else 'FAIL'}")
        self.failures += [] if is_passed else [name]

    def draw(self, images: int, seed: int = 1) -> Tensor:
        return draw_noise(images, self.height, self.width, seed).to(self.device)

    def copy_model(self) -> Any:
        """Copies the model to the device as it comes from transformers."""
        return copy.deepcopy(self.checkpoint.model).to(self.device).eval()

    def make_detector(self, checkpoint: LoadedCheckpoint, precision: torch.dtype = torch.float16) -> Detector:
        """Makes a detector as a worker does on a GPU; on a CPU likewise, without the Triton kernel."""
        model = copy.deepcopy(checkpoint.model)
        if not self.is_cuda:
            accelerate_on_gpu(model)
        detector = Detector(model, checkpoint.tokenizer, checkpoint.image_format, str(self.device), precision)
        detector.forward_pass = self.make_pass(detector, with_graphs=True)
        return detector

    def make_pass(self, detector: Detector, with_graphs: bool) -> ForwardPass:
        """Makes another forward pass of a detector, with graphs of its own or without."""
        forward_pass = make_forward_pass(detector.model, detector.image_format)
        forward_pass.text_buckets, forward_pass.batches_captions = TEXT_BUCKETS, True
        forward_pass._image_graphs = forward_pass._text_graphs = None
        if with_graphs:
            forward_pass.use_graphs(make_cuda_capture if self.is_cuda else lambda: emulate_capture)
        return forward_pass

    def free_memory(self) -> None:
        """Frees what is not in use, and forgets the peak."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def time_once(self, function: Callable[..., object], *arguments: Any) -> float:
        """Returns the milliseconds of one call, until the device is done."""
        start = time.perf_counter()
        function(*arguments)
        if self.is_cuda:
            torch.cuda.synchronize(self.device)
        return 1000 * (time.perf_counter() - start)

    def time(self, function: Callable[..., object], *arguments: Any) -> float:
        """Returns the median milliseconds; not of the first calls, of which the last captures graphs."""
        times = [self.time_once(function, *arguments) for _ in range(CAPTURE_AT + self.runs)]
        return round(statistics.median(times[CAPTURE_AT:]), 3)

    def measure_memory(self, function: Callable[..., object], *arguments: Any) -> float:
        """Calls a function as `time` does; returns the GiB that it needs at its peak, beyond those in use before."""
        self.free_memory()
        before = torch.cuda.memory_allocated(self.device) if self.is_cuda else 0
        self.time(function, *arguments)
        peak = torch.cuda.max_memory_allocated(self.device) if self.is_cuda else 0
        return round((peak - before) / 2**30, 2)


def emulate_capture(function: TensorFunction, arguments: Tensors) -> tuple[Tensors, Tensors, Replay]:
    """Takes the place of CUDA's capture on a CPU."""
    expected = function(*arguments)
    outputs = tuple(tensor.clone() for tensor in expected)
    return expected, outputs, lambda: [old.copy_(new) for old, new in zip(outputs, function(*arguments), strict=True)]


def autocast(device: torch.device, precision: torch.dtype, cache: bool = False) -> torch.autocast:
    return torch.autocast(device.type, precision, enabled=precision is not torch.float32, cache_enabled=cache)


@torch.inference_mode()
def run_ours(detector: Detector, forward_pass: ForwardPass, captions: Sequence[Caption], pixels: Tensor) -> Any:
    """Runs the pass as `Detector` does; returns logits (images, captions, queries, tokens) and boxes."""
    with autocast(detector.device, detector.precision):
        return forward_pass.detect(forward_pass.encode_images(pixels), forward_pass.encode_text(captions))


@torch.inference_mode()
def run_stock(bench: Bench, model: Any, precision: torch.dtype, pixels: Tensor) -> Any:
    """Runs the model as it comes from transformers."""
    image_format = bench.checkpoint.image_format
    mean, std = (torch.tensor(values, device=pixels.device) for values in (image_format.mean, image_format.std))
    ids = torch.tensor([bench.caption.input_ids] * len(pixels), device=pixels.device)
    with autocast(pixels.device, precision, cache=True):
        return model(pixel_values=normalize(pixels, mean, std), input_ids=ids)


def run_in_tf32(forward: Forward, pixels: Tensor) -> Any:
    """Runs a model with TF32 in matrix products of float32."""
    torch.set_float32_matmul_precision("high")
    output = forward(pixels)
    torch.set_float32_matmul_precision("highest")
    return output


def make_implementations(bench: Bench) -> list[tuple[str, Any, Forward]]:
    """Makes what is compared: name, model and forward pass."""
    bind = functools.partial
    stock, detector = bench.copy_model(), bench.make_detector(bench.checkpoint)
    plain, graphed, with_tf32 = (bench.make_pass(detector, with_graphs) for with_graphs in (False, True, True))
    short, long = [bench.caption], [bench.long_caption]
    return [
        (STOCK, stock, bind(run_stock, bench, stock, torch.float32)),
        ("transformers, TF32", stock, bind(run_in_tf32, bind(run_stock, bench, stock, torch.float32))),
        ("transformers, float16 autocast", stock, bind(run_stock, bench, stock, torch.float16)),
        (PLAIN, detector.model, bind(run_ours, detector, plain, short)),
        (OURS, detector.model, bind(run_ours, detector, graphed, short)),
        ("ours, fusion in TF32", detector.model, bind(run_in_tf32, bind(run_ours, detector, with_tf32, short))),
        (f"ours, {len(long[0].input_ids)} tokens", detector.model, bind(run_ours, detector, graphed, long)),
    ]


def make_runs(bench: Bench, *names: str) -> Iterator[tuple[str, int, Any, Callable[[], object]]]:
    """Yields a description, the size of the batch, a model and what runs it, warmed up: smallest and largest batch."""
    for batch in sorted({min(bench.batches), max(bench.batches)}):
        for name, model, forward in make_implementations(bench):
            if name in names:
                run = functools.partial(forward, bench.draw(batch))
                bench.time(run)
                yield f"{name}, batch {batch}", batch, model, run


def describe_machine(bench: Bench) -> None:
    bench.note("torch, CUDA", (torch.__version__, torch.version.cuda))
    bench.note("Triton", importlib.import_module("triton").__version__ if importlib.util.find_spec("triton") else None)
    bench.note("processors", os.cpu_count())
    bench.note("C compiler, which Triton needs", next(filter(None, map(shutil.which, ("gcc", "cc", "clang"))), None))
    bench.note("Python.h, likewise", Path(sysconfig.get_paths()["include"], "Python.h").exists())
    if bench.is_cuda:
        gpu = torch.cuda.get_device_properties(bench.device)
        bench.note("GPU", f"{gpu.name}, {gpu.multi_processor_count} SMs, {gpu.total_memory / 2**30:.0f} GiB")


def measure_start(bench: Bench) -> None:
    chosen = choose_device(Settings(device="auto"))
    bench.check("DEVICE=auto", not bench.is_cuda or torch.device(chosen).index is not None, chosen)
    start = time.perf_counter()
    detector = bench.make_detector(bench.checkpoint)
    bench.note("seconds to make a detector", round(time.perf_counter() - start, 2))
    has_kernel = any(isinstance(module, GatheredAttention) for module in detector.model.modules())
    bench.check("deformable attention", has_kernel or not bench.is_cuda, "ours" if has_kernel else "transformers'")
    moments: list[float] = []
    detector.on_forward = lambda: moments.append(time.perf_counter())
    for name in ("cold", "warm"):
        moments.clear()
        size = detector.find_batch_size()
        moments.append(time.perf_counter())
        passes = [round(1000 * (end - begin)) for begin, end in itertools.pairwise(moments)]
        bench.note(f"find_batch_size, {name}", f"{size}; ms of each pass {passes}, {sum(passes)} together")
    bench.note("ms of an image after that", bench.time(detector.detect, [make_scenes(1)[0].image], LABELS))


def measure_kernel(bench: Bench) -> None:
    if not bench.is_cuda:
        bench.note("skipped", "needs a GPU; a test runs the kernel in Triton's interpreter")
        return
    from backend.detection.deformable_attention_triton import sample

    half, single, bfloat16 = torch.float16, torch.float32, torch.bfloat16
    make = functools.partial(torch.randn, device=bench.device)
    for images, height, width, queries in ((2, 800, 1066, 0), (2, 800, 1333, 900), (3, 27, 1333, 37)):
        sizes = [(-(-height // stride), -(-width // stride)) for stride in (8, 16, 32, 64)]
        shapes = torch.tensor(sizes, device=bench.device)
        starts = torch.cat([shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]])
        tokens = int(shapes.prod(1).sum())
        size = images, queries or tokens
        values, logits, offsets = make(images, tokens, 256), make(*size, 8, 16), 4 * make(*size, 8, 4, 4, 2)
        reference = make(*size, 4, 2) * 0.4 + 0.5  # some of them outside the image
        offsets[0, 0] = 1e6  # infinite in float16
        for dtype, offset_dtype in ((half, half), (half, single), (single, single), (bfloat16, bfloat16)):
            inputs = values.to(dtype), reference, offsets.to(offset_dtype), logits.to(dtype), shapes, starts
            first, later = bench.time_once(sample, *inputs), bench.time(sample, *inputs)
            exact = inputs[0].float(), reference, inputs[2].float().clamp(-1e6, 1e6), inputs[3].float(), shapes, starts
            expected = sample_rows(locate_samples, *exact)
            difference = float((sample(*inputs).float() - expected).abs().max() / expected.abs().max())
            text = f"differs by {difference:.0e}, first call {first:.0f} ms, later {later / images:.3f} ms an image"
            name = f"{images} of {height}x{width}, {size[1]} queries, {dtype}, offsets {offset_dtype}"
            bench.check(name, difference <= KERNEL_TOLERANCE[dtype], text)


def compare(expected: Tensor, actual: Tensor, caption: Caption) -> tuple[bool, str]:
    """Compares token scores, sorted over the queries: of two that are nearly equal, rounding decides which is first."""
    length = len(caption.input_ids)
    scores = [logits[..., :length].float().sigmoid().sort(-2).values for logits in (expected, actual)]
    difference = (scores[0] - scores[1]).abs().flatten().cpu()
    most = float(difference.quantile(0.99))
    return most <= MAX_ROUNDING, f"scores differ by {difference.max():.1e}, 99% by {most:.1e}"


def check_outputs(bench: Bench) -> None:
    pixels = bench.draw(min(4, max(bench.batches)))
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        stock = run_stock(bench, bench.copy_model(), torch.float32, pixels)
        expected, states = stock.logits, stock.encoder_last_hidden_state_vision
        for precision, check_more in ((torch.float32, check_batches), (torch.float16, check_graphs)):
            detector = bench.make_detector(bench.checkpoint, precision)
            plain = bench.make_pass(detector, with_graphs=False)
            with autocast(bench.device, precision):
                outputs = run_forward_pass(plain, pixels, bench.caption)
            is_close, text = compare(expected, outputs.logits, bench.caption)
            error = float((outputs.image_states - states).norm() / states.norm())
            is_passed = (is_close or precision is torch.float16) and not outputs.logits.isnan().any()
            bench.check(f"{precision}", is_passed, f"encoder states differ by {error:.1e}, {text}")
            check_more(bench, detector, plain, pixels)


def check_batches(bench: Bench, detector: Detector, plain: ForwardPass, pixels: Tensor) -> None:
    """Checks that images and captions that share a pass give what they give alone."""
    captions = [bench.caption, build_caption(detector.tokenizer, PHRASES[:1]), bench.long_caption]
    together = run_ours(detector, plain, captions, pixels)[0]
    for index, caption in enumerate(captions):
        alone = torch.cat([run_ours(detector, plain, [caption], image[None])[0][:, 0] for image in pixels])
        name = f"images one by one, caption of {len(caption.input_ids)} tokens alone"
        bench.check(name, *compare(alone, together[:, index], caption))


def check_graphs(bench: Bench, detector: Detector, plain: ForwardPass, pixels: Tensor) -> None:
    """Checks that graphs give what the pass gives without them."""
    graphed = bench.make_pass(detector, with_graphs=True)
    names = [*(f"pass {number}" for number in range(1, CAPTURE_AT)), "pass that captures", "replay", "replay of others"]
    for number, name in enumerate(names):
        images = bench.draw(len(pixels), seed=2 if number > CAPTURE_AT else 1)
        actual, expected = (run_ours(detector, p, [bench.caption], images)[0] for p in (graphed, plain))
        bench.check(name, *compare(expected, actual, bench.caption))
    # The graph of two rows is older than that of one image: it must not write where the latter keeps its features.
    one, *others = (build_caption(detector.tokenizer, [phrase]) for phrase in PHRASES[:5])
    for _ in range(CAPTURE_AT):
        run_ours(detector, graphed, [one], bench.draw(2))
    with torch.inference_mode(), autocast(bench.device, detector.precision):
        for _ in range(CAPTURE_AT):
            features = graphed.encode_images(pixels[:1])
            for group in (others[:2], others[2:]):
                actual = graphed.detect(features, graphed.encode_text(group))[0]
    expected = run_ours(detector, plain, others[2:], pixels[:1])[0]
    bench.check("captions in two passes over one image", *compare(expected, actual, others[2]))
    is_enabled = all(graphs and graphs.is_enabled for graphs in (graphed._image_graphs, graphed._text_graphs))
    bench.check("graphs", is_enabled, "in use" if is_enabled else "given up, the log says why")


def check_detections(bench: Bench) -> None:
    count = 20 if bench.is_tiny else 100
    detectors = [bench.make_detector(bench.bundled, precision) for precision in (torch.float32, torch.float16)]
    for sizes, backgrounds in ((TRAINING_SIZE, TRAINING_BACKGROUNDS), (UNSEEN_SIZES, UNSEEN_BACKGROUNDS)):
        expected, actual = (measure_scenes(detector, sizes, backgrounds, count).ap50 for detector in detectors)
        is_passed = abs(expected - actual) <= MAX_AP50_LOSS
        bench.check(f"AP50 at {sizes}", is_passed, f"{expected:.4f} in float32, {actual:.4f} in float16")
    inputs = [detectors[0].prepare_image(scene.image) for scene in make_scenes(8)]
    caption = build_caption(bench.bundled.tokenizer, ["red object", "blue object", "green object"])
    scores = [detector._score(inputs, [caption])[0].scores.sort(1).values for detector in detectors]
    difference = float((scores[0] - scores[1]).abs().max())
    bench.check("scores of the same boxes", difference <= MAX_SCORE_DIFFERENCE, f"differ by {difference:.4f} at most")
    bench.check("precision", detectors[1].precision is torch.float16, f"{detectors[1].precision} at the end")


def measure_speed(bench: Bench) -> None:
    cells: dict[str, list[str]] = {}
    for column, batch in enumerate(bench.batches):
        pixels, forwards, gib = bench.draw(batch), {}, {}
        for name, _, forward in make_implementations(bench):
            cells.setdefault(name, []).append("out of memory")
            with contextlib.suppress(torch.OutOfMemoryError):
                gib[name] = bench.measure_memory(forward, pixels)
                forwards[name] = forward
        rounds = 1 + bench.runs * (max(1, 8 // batch) if bench.is_cuda else 1)  # the first one allocates memory
        times = [{name: bench.time_once(forwards[name], pixels) for name in forwards} for _ in range(rounds)]
        medians = {name: statistics.median(row[name] for row in times[1:]) / batch for name in forwards}
        ratios = {name: medians.get(STOCK, float("nan")) / median for name, median in medians.items()}
        for name, median in medians.items():
            row = {"ms an image": round(median, 2), "ratio": round(ratios[name], 2), "GiB": gib[name]}
            bench.note(f"{name}, batch {batch}", row)
            cells[name][column] = f"{median:.2f} ({ratios[name]:.2f})"
        if batch in GOALS:
            is_met = ratios.get(OURS, 0) >= GOALS[batch]
            text = f"{GOALS[batch]} times as fast as {STOCK}: {'met' if is_met else 'not met'}"
            bench.note(f"goal at batch {batch}", text)
    header = ["ms an image (ratio)", *(f"batch {batch}" for batch in bench.batches)]
    rows = [header, ["---"] * len(header), *([name, *row] for name, row in cells.items())]
    bench.measured["table"] = "\n".join(f"| {' | '.join(row)} |" for row in rows)


def measure_parts(bench: Bench) -> None:
    for name, batch, model, run in make_runs(bench, STOCK, PLAIN):  # a graph calls no hooks
        parts = time_parts(bench, model.model, run)
        bench.note(f"{name}, ms an image", {part: round(value / batch, 2) for part, value in parts.items()})


def time_parts(bench: Bench, model: Any, run: Callable[[], object]) -> dict[str, float]:
    """Returns the milliseconds of each part of a pass, on the device's own clock; leaves hooks in the model."""
    parts = {
        "whole": [],
        "backbone": [model.backbone.conv_encoder.model],
        "text backbone": [model.text_backbone],
        "fusion": [layer.fusion_layer for layer in model.encoder.layers],
        "text layers": [layer.text_enhancer_layer for layer in model.encoder.layers],
        "deformable layers": [layer.deformable_layer for layer in model.encoder.layers],
        "decoder layers": list(model.decoder.layers),
    }
    marks: dict[str, list[Any]] = {name: [] for name in parts}  # start, end, start, end, ...

    def mark(name: str, *_: object) -> None:
        if not bench.is_cuda:
            marks[name].append(time.perf_counter())
            return
        marks[name].append(torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
        marks[name][-1].record()

    for name, modules in parts.items():
        for module in modules:
            module.register_forward_pre_hook(functools.partial(mark, name))
            module.register_forward_hook(functools.partial(mark, name))
    mark("whole")
    run()
    bench.time_once(mark, "whole")
    elapsed = torch.cuda.Event.elapsed_time if bench.is_cuda else lambda start, end: 1000 * (end - start)
    return {name: sum(map(elapsed, row[::2], row[1::2])) for name, row in marks.items()}


def profile_kernels(bench: Bench) -> None:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.is_cuda else [])]
    for name, batch, _, run in make_runs(bench, STOCK, PLAIN, OURS):
        wall = bench.time(run)
        with profile(activities=activities) as profiler:
            bench.time_once(run)
        rows = [row for row in profiler.key_averages() if bench.is_cuda == str(row.device_type).endswith("CUDA")]
        times = {row.key: row.self_device_time_total if bench.is_cuda else row.self_cpu_time_total for row in rows}
        busy, count = sum(times.values()) / 1000, sum(row.count for row in rows)
        bench.note(name, f"{count} kernels and copies, busy {busy:.1f} of {wall:.1f} ms ({100 * busy / wall:.0f}%)")
        for kernel, microseconds in sorted(times.items(), key=lambda item: -item[1])[:12]:
            bench.note(f"{name}, ms an image in {kernel[:100]}", round(microseconds / 1000 / batch, 3))


def measure_surroundings(bench: Bench) -> None:
    detector = bench.make_detector(bench.checkpoint)
    image = Image.effect_noise((640, 480) if bench.is_tiny else (2016, 1512), 60).convert("RGB")
    bench.note(f"ms to resize an image of {image.size}", bench.time(detector.prepare_image, image))
    many = [Label(f"q{number}", (f"q{number}",), 0.3) for number in range(100 if bench.is_tiny else 500)]
    captions = len(detector._build_captions([label.name for label in many]))
    for batch in bench.batches:
        inputs = [detector.prepare_image(image)] * batch
        bench.note(f"ms to stack, pin and copy {batch}", bench.time(detector._stack_pixels, inputs))
        bench.note(f"ms of detect_inputs, batch {batch}", bench.time(detector.detect_inputs, inputs, LABELS))
        name = f"the same with {len(many)} labels in {captions} captions, batch {batch}"
        bench.note(name, bench.time(detector.detect_inputs, inputs, many))


def exhaust_memory(bench: Bench) -> None:
    if not bench.is_cuda:
        bench.note("skipped", "needs a GPU")
        return
    detector, total = bench.make_detector(bench.checkpoint), torch.cuda.get_device_properties(bench.device).total_memory
    detector.batch_size = max(bench.batches)

    def detect(inputs: Sequence[ModelInput], limit: float = float("inf")) -> tuple[int, int]:
        """Detects with limited memory; returns how many images were refused, and the bytes reserved at the peak."""
        detector._free_memory()
        bench.free_memory()
        torch.cuda.set_per_process_memory_fraction(min(limit / total, 1.0), bench.device)
        try:
            found = detector.detect_inputs(inputs, LABELS)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, bench.device)
        return sum(isinstance(row, ImageError) for row in found), torch.cuda.max_memory_reserved(bench.device)

    wide, square = (detector.prepare_image(Image.new("RGB", (width, 800))) for width in (1066, 800))
    batch = [wide] * detector.batch_size
    (_, for_wide), (_, for_square), (_, for_batch) = detect([wide]), detect([square]), detect(batch)
    detector._free_memory()
    kept = torch.cuda.memory_reserved(bench.device)
    for share, expected in ((0.6, 0), (0.0, len(batch)), (1.5, 0)):
        refused, _ = detect(batch, kept + share * (for_batch - kept) + 2**20)
        is_passed = refused == expected or len(batch) < 8
        bench.check(f"{100 * share:.0f}% of the memory needed", is_passed, f"{refused} of {len(batch)} images refused")
    refused, _ = detect([wide, square], (for_wide + for_square) / 2)
    bench.note("an image that fits, and one that does not or hardly", f"{refused} of 2 images refused")


def exceed_range(bench: Bench) -> None:
    model, images = copy.deepcopy(bench.bundled.model), [scene.image for scene in make_scenes(4)]
    layer = model.model.encoder.layers[0].deformable_layer
    for weight, factor in ((layer.fc1.weight, 1e5), (layer.fc1.bias, 1e5), (layer.fc2.weight, 1e-5)):
        weight.data *= factor  # activations beyond 65,504
    detector = bench.make_detector(bench.bundled._replace(model=model))
    expected = bench.make_detector(bench.bundled, torch.float32).detect(images, LABELS)
    actual = detector.detect(images, LABELS)
    bench.check("precision of such a checkpoint", detector.precision is torch.float32, f"{detector.precision}")
    flat = [[(row.label, round(row.score, 2)) for rows in found for row in rows] for found in (expected, actual)]
    bench.check("its detections", flat[0] == flat[1] and bool(flat[0]), f"{flat[1]}, in float32 {flat[0]}")
    stock, largest = bench.copy_model(), {}
    for name, module in stock.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_hook(lambda _, __, out, name=name: largest.update({name: float(out.abs().max())}))
    run_stock(bench, stock, torch.float32, bench.draw(1))
    bench.note("largest activations", dict(sorted(largest.items(), key=lambda item: -item[1])[:5]))


def measure_training(bench: Bench) -> None:
    dtype, image_format = choose_autocast_dtype(bench.device), bench.checkpoint.image_format
    bench.note("precision", str(dtype or torch.float32))
    pixels = draw_noise(4, 96, 160) if bench.is_tiny else draw_noise(4, 800, 1333)
    values = normalize(pixels, torch.tensor(image_format.mean), torch.tensor(image_format.std))
    target = Target(0.3 + 0.3 * torch.rand(len(PHRASES), 4), torch.arange(len(PHRASES)))
    for size in (1, 2, 4):
        model = bench.copy_model()
        freeze(model, "encoder")
        optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], 1e-6)
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
        batch = Batch(values[:size], [bench.caption] * size, [target] * size).to(bench.device)
        step = functools.partial(train_one_epoch, model, [batch], optimizer, scheduler, autocast_dtype=dtype)
        try:
            gib = bench.measure_memory(step)
            bench.note(f"batch {size}", f"{bench.time(step) / size:.1f} ms an image, {gib} GiB at the peak")
        except torch.OutOfMemoryError:
            bench.note(f"batch {size}", "out of memory")


SECTIONS = (
    describe_machine, measure_start, measure_kernel, check_outputs, check_detections, measure_speed, measure_parts,
    profile_kernels, measure_surroundings, exhaust_memory, exceed_range, measure_training,
)  # fmt: skip


def run_section(bench: Bench, run: Callable[[Bench], None]) -> dict[str, Any]:
    """Runs a section; returns what it measured and what failed."""
    bench.measured, bench.failures = {}, []
    try:
        run(bench)
    except Exception:
        bench.failures.append(traceback.format_exc())
        print("  FAILED: " + traceback.format_exc().strip().replace("\n", "\n  "), flush=True)
    with contextlib.suppress(RuntimeError):  # after an error that breaks CUDA every call fails
        bench.free_memory()
    return {"measured": bench.measured, "failures": bench.failures}


def main() -> int:
    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default="cuda:0", help="(default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="the bundled model and small images")
    parser.add_argument("--batches", type=numbers, help="images of a batch (default: 1,4,16; 1,2 with --tiny)")
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each measurement (default: %(default)s)")
    parser.add_argument("--only", type=numbers, default=range(len(SECTIONS)), help="sections to run (default: all)")
    parser.add_argument(
        "--limit", type=float, default=285, help="seconds after which none starts (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="(default: %(default)s)")
    arguments, start = parser.parse_args(), time.monotonic()
    if arguments.device.type == "cuda":
        torch.cuda.set_device(arguments.device)
        logging.basicConfig(format="  %(levelname)s %(message)s")
    batches = arguments.batches or ([1, 2] if arguments.tiny else [1, 4, 16])
    bench, report = Bench(arguments.device, arguments.tiny, batches, arguments.runs), {}
    for number in arguments.only:
        run, seconds = SECTIONS[number], time.monotonic() - start
        name = run.__name__.replace("_", " ")
        has_time = seconds <= arguments.limit
        print(f"\n{number} {name} ({seconds:.0f} s)" + ("" if has_time else ": no time left"), flush=True)
        report[name] = run_section(bench, run if has_time else lambda _: None)
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print("\n" + report.get("measure speed", {"measured": {}})["measured"].get("table", ""))
    failed = [name for name, section in report.items() if section["failures"]]
    print(f"\n{time.monotonic() - start:.0f} s; results are in {arguments.out}; failed: {', '.join(failed) or 'none'}")
    return int(bool(failed))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder  # kernels are compiled, as at the first start
        status = main()
    sys.exit(status)
