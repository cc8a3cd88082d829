import time
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from backend.boxes import Detection
from backend.demo.measure import TRAINING_SIZE, measure_scenes
from backend.demo.shapes import TRAINING_BACKGROUNDS
from backend.detection import detector as detector_module
from backend.detection.acceleration import PackedLinear, accelerate_on_gpu
from backend.detection.captions import build_caption, build_captions
from backend.detection.checkpoints import load_checkpoint
from backend.detection.deformable_attention import GatheredAttention
from backend.detection.detector import Detector
from backend.detection.device import has_bfloat16
from backend.detection.phrase_scores import make_span_matrix, phrase_scores
from backend.errors import ImageError, LabelingConfigError
from backend.labelstudio.labeling_config import Label
from backend.registry.checkpoint import DEMO_CHECKPOINT
from tests.boxes import iou
from tests.detection.emulation import EmulatedKernel
from tests.scenes import make_scenes


@pytest.fixture(scope="module")
def detector() -> Detector:
    return Detector(*load_checkpoint(str(DEMO_CHECKPOINT)))


def get_backbone(detector: Detector) -> torch.nn.Module:
    backbone: torch.nn.Module = detector.model.model.backbone.conv_encoder.model
    return backbone


def make_labels(*names: str, threshold: float = 0.3) -> list[Label]:
    return [Label(name, (name,), threshold) for name in names]


ALL_COLOURS = make_labels("red object", "blue object", "green object", "yellow object", "purple object", "white object")


def round_detections(detections: list[Detection]) -> list[tuple[str | float, ...]]:
    return [
        (d.label, round(d.score, 4), *(round(v, 2) for v in d.box_xyxy))
        for d in sorted(detections, key=lambda d: d.box_xyxy)
    ]


def assert_equal(actual: list[Detection], expected: list[Detection]) -> None:
    """Fails unless all is equal up to the rounding of float32."""
    assert [d.label for d in actual] == [d.label for d in expected]
    for a, b in zip(actual, expected, strict=True):
        assert a.score == pytest.approx(b.score, abs=1e-3)
        assert a.box_xyxy == pytest.approx(b.box_xyxy, abs=0.05)


def test_a_phrase_scores_the_mean_over_its_span() -> None:
    logits = torch.tensor([[0.0, 10.0, -10.0, float("-inf")]])
    assert phrase_scores(logits, make_span_matrix([(0, 1), (1, 3)], 4))[0].tolist() == pytest.approx([0.5, 0.5])


def test_equal_sized_images_in_a_batch_equal_one_by_one(detector: Detector) -> None:
    images = [scene.image for scene in make_scenes(4)]
    together = detector.detect(images, ALL_COLOURS)
    assert sum(map(len, together)) >= 3
    assert [round_detections(d) for d in together] == [
        round_detections(detector.detect([image], ALL_COLOURS)[0]) for image in images
    ]


def test_results_keep_the_order_of_mixed_sizes(detector: Detector) -> None:
    images = [make_scenes(1, size, seed)[0].image for seed, size in enumerate([(320, 240), (240, 320), (320, 240)] * 2)]
    together = detector.detect(images, ALL_COLOURS)
    assert [round_detections(d) for d in together] == [
        round_detections(detector.detect([image], ALL_COLOURS)[0]) for image in images
    ]


def test_label_order_changes_nothing(detector: Detector) -> None:
    images = [scene.image for scene in make_scenes(4)]
    forward, backward = detector.detect(images, ALL_COLOURS), detector.detect(images, ALL_COLOURS[::-1])
    assert [round_detections(d) for d in forward] == [round_detections(d) for d in backward]


def test_a_label_takes_the_best_of_its_phrases(detector: Detector) -> None:
    scene = next(s for s in make_scenes(40) if any(shape.colour == "red" for shape in s.shapes))
    both = detector.detect([scene.image], [Label("hot", ("red object", "orange object"), 0.3)])[0]
    assert both
    assert {d.label for d in both} == {"hot"}


def test_thresholds_are_kept_per_label(detector: Detector) -> None:
    images = [scene.image for scene in make_scenes(6)]
    low = [d for detections in detector.detect(images, ALL_COLOURS) for d in detections]
    strict = [Label(label.name, label.phrases, 0.9 if label.name == "red object" else 0.3) for label in ALL_COLOURS]
    kept = [d for detections in detector.detect(images, strict) for d in detections]
    assert round_detections(kept) == round_detections([d for d in low if d.score >= 0.9 or d.label != "red object"])


@pytest.mark.parametrize("size", [(1, 1), (2, 9), (3000, 40), (20_000, 50), (50, 20_000)])
def test_odd_shapes_do_not_crash(detector: Detector, size: tuple[int, int]) -> None:
    for detection in detector.detect([Image.new("RGB", size)], ALL_COLOURS)[0]:
        assert 0 <= detection.box_xyxy[0] <= detection.box_xyxy[2] <= size[0]


def test_no_images_give_no_results(detector: Detector) -> None:
    assert detector.detect([], ALL_COLOURS) == []


def test_a_phrase_that_fits_in_no_caption_is_refused_by_name(detector: Detector) -> None:
    with pytest.raises(LabelingConfigError, match=r"'zorp zorp.*makes 400 tokens"):
        detector.detect([Image.new("RGB", (96, 96))], make_labels("zorp " * 100))


def test_500_labels_detect_what_a_few_detect_and_the_backbone_runs_once(detector: Detector) -> None:
    scene = make_scenes(1, (640, 480), seed=5)[0]
    few = {f"{shape.colour} {shape.shape}" for shape in scene.shapes}
    names = [*sorted(few), *(f"q{number}" for number in range(500))]
    assert len(build_captions(detector.tokenizer, names, detector.model.config.max_text_len)) > 1
    runs = []
    handle = get_backbone(detector).register_forward_hook(lambda *_: runs.append(1))
    many = make_labels(*names, threshold=0.1)  # scores are low in long captions
    detections = detector.detect([scene.image], many, nms_iou=0.7)[0]
    handle.remove()
    assert few <= {detection.label for detection in detections}
    assert len(runs) == 1


def test_captions_as_a_batch_detect_the_same(detector: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [scene.image for scene in make_scenes(3)]
    labels = make_labels("red object", "blue object", *(f"q{number}" for number in range(400)), threshold=0.1)
    expected = detector.detect(images, labels, nms_iou=0.7)
    passes: list[int] = []
    layer = detector.model.model.encoder.layers[0].fusion_layer
    handle = layer.register_forward_pre_hook(lambda _, arguments: passes.append(len(arguments[0])))
    monkeypatch.setattr(detector, "batch_size", 6)
    monkeypatch.setattr(detector.forward_pass, "batches_captions", True)
    monkeypatch.setattr(detector.forward_pass, "text_buckets", (256,))
    batched = detector.detect(images, labels, nms_iou=0.7)
    handle.remove()
    assert max(passes) == 6  # two captions on three images
    assert sum(map(len, expected)) > 0
    for detections, expected_of_image in zip(batched, expected, strict=True):
        assert_equal(detections, expected_of_image)


def test_labels_in_two_calls_keep_every_sure_box_of_one_call(detector: Detector) -> None:
    images = [scene.image for scene in make_scenes(6)]
    whole = detector.detect(images, ALL_COLOURS, nms_iou=0.7)
    halves = [detector.detect(images, labels) for labels in (ALL_COLOURS[:3], ALL_COLOURS[3:])]
    for i, detections in enumerate(whole):
        sure = [d for d in detections if d.score > 0.6]
        separate = [d for half in halves for d in half[i]]
        assert all(any(d.label == s.label and iou(d.box_xyxy, s.box_xyxy) > 0.7 for s in separate) for d in sure)


def test_negative_phrases_remove_their_boxes(detector: Detector) -> None:
    scene = next(s for s in make_scenes(60) if {"circle", "square"} <= {shape.shape for shape in s.shapes})
    both = detector.detect([scene.image], [Label("thing", ("circle", "square"), 0.3)], nms_iou=0.7)[0]
    circles = detector.detect([scene.image], make_labels("circle"), negative_phrases=["square"], nms_iou=0.7)[0]
    assert len(both) > len(circles) > 0
    assert {detection.label for detection in circles} == {"circle"}


def test_a_negative_phrase_that_is_also_a_labels_counts_for_the_label(detector: Detector) -> None:
    scene = next(s for s in make_scenes(60) if {"circle", "square"} <= {shape.shape for shape in s.shapes})
    labels = make_labels("circle", "square")
    expected = detector.detect([scene.image], labels)[0]
    assert {detection.label for detection in expected} == {"circle", "square"}
    assert round_detections(detector.detect([scene.image], labels, negative_phrases=["square"])[0]) == round_detections(
        expected
    )


def test_a_shared_phrase_counts_for_the_first_label(detector: Detector) -> None:
    scene = make_scenes(1)[0]
    phrase = f"{scene.shapes[0].colour} {scene.shapes[0].shape}"
    two = [Label("first", (phrase,), 0.3), Label("second", (phrase,), 0.3)]
    assert {d.label for d in detector.detect([scene.image], two)[0]} == {"first"}


def test_boxes_of_a_reduced_copy_are_in_pixels_of_the_original(detector: Detector) -> None:
    scene = make_scenes(1, (640, 480), seed=5)[0]
    small = scene.image.resize((320, 240), Image.Resampling.BOX)
    full = detector.detect([scene.image], ALL_COLOURS, nms_iou=0.7)[0]
    reduced = detector.detect_inputs([detector.prepare_image(small, (640, 480))], ALL_COLOURS, nms_iou=0.7)[0]
    assert isinstance(reduced, list)
    assert len(full) == len(reduced) > 0
    for a, b in zip(full, reduced, strict=True):
        assert a.label == b.label
        assert iou(a.box_xyxy, b.box_xyxy) > 0.9


def test_out_of_memory_halves_the_batch(detector: Detector, caplog: pytest.LogCaptureFixture) -> None:
    images = [scene.image for scene in make_scenes(5)]
    expected = detector.detect(images, ALL_COLOURS)
    batch_sizes = []

    def fail_above_two(module: object, arguments: tuple) -> None:
        batch_sizes.append(len(arguments[0]))
        if batch_sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    handle = get_backbone(detector).register_forward_pre_hook(fail_above_two)
    detections = detector.detect(images, ALL_COLOURS)
    handle.remove()
    assert [round_detections(d) for d in detections] == [round_detections(d) for d in expected]
    assert batch_sizes == [5, 2, 3, 1, 2]
    assert "out of memory with a batch of 5 images; retrying with half" in caplog.text


def test_out_of_memory_with_one_image_halves_its_captions(
    detector: Detector, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    image = make_scenes(1)[0].image
    labels = make_labels("red object", "blue object", *(f"q{number}" for number in range(400)), threshold=0.1)
    expected = detector.detect([image], labels, nms_iou=0.7)
    captions = len(build_captions(detector.tokenizer, [label.name for label in labels], 256))
    assert captions > 4
    monkeypatch.setattr(detector, "batch_size", 16)
    monkeypatch.setattr(detector.forward_pass, "batches_captions", True)
    rows: list[int] = []

    def fail_above_two(module: object, arguments: tuple) -> None:
        rows.append(len(arguments[0]))
        if rows[-1] > 2:
            raise torch.OutOfMemoryError

    freed: list[int] = []
    monkeypatch.setattr(detector, "on_out_of_memory", lambda: freed.append(1))
    handle = detector.model.model.encoder.layers[0].fusion_layer.register_forward_pre_hook(fail_above_two)
    detections = detector.detect([image], labels, nms_iou=0.7)
    handle.remove()
    assert_equal(detections[0], expected[0])
    tried = [count for count in rows if count > 2]
    assert tried == sorted(set(tried), reverse=True)  # none twice
    assert len(freed) == len(tried)
    assert f"out of memory with an image and {captions} captions; retrying with half" in caplog.text


def test_an_image_that_does_not_fit_is_tried_once_where_captions_run_one_by_one(detector: Detector) -> None:
    labels = make_labels(*(f"q{number}" for number in range(400)))
    attempts: list[int] = []

    def fail(*_: object) -> None:
        attempts.append(1)
        raise torch.OutOfMemoryError

    handle = get_backbone(detector).register_forward_pre_hook(fail)
    (result,) = detector.detect_inputs([detector.prepare_image(make_scenes(1)[0].image)], labels)
    handle.remove()
    assert isinstance(result, ImageError)
    assert len(attempts) == 1


def test_an_image_that_does_not_fit_in_memory_fails_alone(detector: Detector) -> None:
    large = make_scenes(1, (160, 120))[0].image
    small = make_scenes(1, (96, 96))[0].image

    def fail_on_large(module: object, arguments: tuple) -> None:
        if arguments[0].shape[-1] > 96:
            raise torch.OutOfMemoryError

    handle = get_backbone(detector).register_forward_pre_hook(fail_on_large)
    results = detector.detect_inputs([detector.prepare_image(large), detector.prepare_image(small)], ALL_COLOURS)
    handle.remove()
    assert isinstance(results[0], ImageError)
    assert "needs more memory than cpu has" in str(results[0])
    assert isinstance(results[1], list)


def test_a_batch_takes_a_second_at_most(detector: Detector) -> None:
    assert detector.find_batch_size() > 4
    handle = get_backbone(detector).register_forward_pre_hook(lambda *_: time.sleep(0.6))
    assert detector.find_batch_size() == 1
    handle.remove()


@pytest.mark.parametrize("warm_up", [0.0, 1.25])
def test_a_slow_first_pass_does_not_change_the_batch_size(
    warm_up: float, detector: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=0.0, passes=0)

    def run_pass(*_: object) -> None:
        clock.now += 0.125 + (warm_up if clock.passes == 0 else 0.0)
        clock.passes += 1

    monkeypatch.setattr(detector_module, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    handle = get_backbone(detector).register_forward_pre_hook(run_pass)
    size = detector.find_batch_size()
    handle.remove()
    assert size == 8
    assert clock.passes > 1


@pytest.fixture
def half(kernel: EmulatedKernel) -> Detector:
    """A detector with the modules for a GPU, in float16 on the CPU."""
    model, tokenizer, image_format = load_checkpoint(str(DEMO_CHECKPOINT))
    accelerate_on_gpu(model)
    assert kernel.calls == {torch.float32: 1}  # the trial run
    replaced = [module for module in model.modules() if isinstance(module, GatheredAttention)]
    assert len(replaced) == len(model.model.encoder.layers) + len(model.model.decoder.layers) > 0
    kernel.calls.clear()
    return Detector(model, tokenizer, image_format, precision=torch.float16)


def test_half_precision_detects_the_same(detector: Detector, half: Detector, kernel: EmulatedKernel) -> None:
    expected, ap50 = (measure_scenes(d, TRAINING_SIZE, TRAINING_BACKGROUNDS, 100).ap50 for d in (detector, half))
    assert abs(expected - ap50) <= 0.002
    assert half.precision is torch.float16
    inputs = [detector.prepare_image(scene.image) for scene in make_scenes(8)]
    caption = build_caption(detector.tokenizer, ["red object", "blue object", "green object"])
    scores = [d._score(inputs, [caption])[0].scores.sort(1).values for d in (detector, half)]
    difference = (scores[0] - scores[1]).abs()
    assert difference.max() <= 0.012
    assert difference.median() <= 0.001
    assert set(kernel.calls) == {torch.float16}


def test_weights_are_converted_once_and_come_back_unchanged(half: Detector) -> None:
    original = load_checkpoint(str(DEMO_CHECKPOINT)).model
    layer = half.model.model.encoder.layers[0]
    assert layer.deformable_layer.fc1.weight.dtype is torch.float16
    assert half.model.model.text_backbone.encoder.layer[0].attention.self.query.weight.dtype is torch.float16
    for weight in (layer.fusion_layer.attn.module.vision_proj.weight, half.model.bbox_embed[0].module.layers[0].weight):
        assert weight.dtype is torch.float32
    caption = build_caption(half.tokenizer, ["red object"])
    half._score([half.prepare_image(make_scenes(1)[0].image)], [caption])
    half._fall_back_to_float32()
    with torch.inference_mode():
        assert half.forward_pass.encode_text([caption]).features.dtype is torch.float32  # what was kept is gone
    assert torch.equal(layer.deformable_layer.fc1.weight, original.model.encoder.layers[0].deformable_layer.fc1.weight)
    assert {weight.dtype for weight in half.model.parameters()} == {torch.float32}


@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while its compiler is imported
@pytest.mark.skipif(
    not has_bfloat16(torch.cpu.get_capabilities()), reason="the processor does not multiply in bfloat16"
)
def test_bfloat16_on_a_cpu_detects_the_same(detector: Detector) -> None:
    reduced = Detector(*load_checkpoint(str(DEMO_CHECKPOINT)), precision=torch.bfloat16)
    packed = Counter(module.precision for module in reduced.model.modules() if isinstance(module, PackedLinear))
    feed_forward = [layer.deformable_layer.layer for layer in reduced.model.model.encoder.layers]
    assert all(module.precision is torch.bfloat16 for layer in feed_forward for module in (layer.fc1, layer.fc2))
    assert packed[torch.bfloat16] > 2 * len(feed_forward) > 0  # and those of the image backbone
    assert packed[torch.float32] > 0
    expected, ap50 = (measure_scenes(d, TRAINING_SIZE, TRAINING_BACKGROUNDS, 100).ap50 for d in (detector, reduced))
    assert abs(expected - ap50) <= 0.001
    inputs = [detector.prepare_image(scene.image) for scene in make_scenes(8)]
    caption = build_caption(detector.tokenizer, ["red object", "blue object", "green object"])
    scores = [d._score(inputs, [caption])[0].scores.sort(1).values for d in (detector, reduced)]
    assert 0 < (scores[0] - scores[1]).abs().max() <= 0.012


def test_a_checkpoint_beyond_half_precision_falls_back_to_float32(
    half: Detector, kernel: EmulatedKernel, caplog: pytest.LogCaptureFixture
) -> None:
    layer = half.model.model.encoder.layers[0].deformable_layer
    layer.fc1.weight.data *= 1e5  # activations beyond 65,504, scaled back by fc2
    layer.fc1.bias.data *= 1e5
    layer.fc2.weight.data /= 1e5
    half._full_weights |= {
        f"model.encoder.layers.0.deformable_layer.{name}": parameter.data.float()
        for name, parameter in layer.named_parameters()
        if name.startswith("fc")
    }
    image = make_scenes(1)[0].image
    expected = Detector(*load_checkpoint(str(DEMO_CHECKPOINT))).detect([image], ALL_COLOURS)[0]
    detections = half.detect([image], ALL_COLOURS)[0]
    assert [d.label for d in detections] == [d.label for d in expected]
    assert "NaN in torch.float16; falling back to float32" in caplog.text
    assert half.precision is torch.float32
    assert kernel.calls[torch.float16] == kernel.calls[torch.float32] > 0
