import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import GroundingDinoImageProcessorPil

from backend.boxes import iou
from backend.demo.measure import TRAINING_SIZE, measure
from backend.demo.shapes import TRAINING_BACKGROUNDS
from backend.detection.acceleration import accelerate_on_gpu
from backend.detection.captions import build_caption, build_captions
from backend.detection.checkpoints import load_checkpoint
from backend.detection.deformable_attention import gather_plan, sample_rows
from backend.detection.detector import Detector, phrase_scores
from backend.detection.preprocess import ImageFormat
from backend.errors import CheckpointError, ImageError, LabelingConfigError
from backend.labelstudio.labeling_config import Label
from backend.registry.checkpoint import DEMO_CHECKPOINT
from tests.scenes import scenes


@pytest.fixture(scope="module")
def detector() -> Detector:
    return Detector(*load_checkpoint(str(DEMO_CHECKPOINT)))


def labels(*names: str, threshold: float = 0.3) -> list[Label]:
    return [Label(name, (name,), threshold) for name in names]


EVERYTHING = labels("red object", "blue object", "green object", "yellow object", "purple object", "white object")


def rounded(detections: list) -> list:
    return [
        (d.label, round(d.score, 4), *(round(v, 2) for v in d.box_xyxy))
        for d in sorted(detections, key=lambda d: d.box_xyxy)
    ]


def test_spans_name_the_tokens_of_each_phrase(detector: Detector) -> None:
    phrases = ["red circle", "zorp", "blue, big square"]
    caption = build_caption(detector.tokenizer, phrases)
    tokens = detector.tokenizer.convert_ids_to_tokens(caption.input_ids)
    words = ["".join(tokens[start:end]).replace("##", "") for start, end in caption.spans]
    assert words == [phrase.replace(" ", "") for phrase in phrases]
    assert caption.input_ids[-2:] == (1012, 102)


def test_a_phrase_scores_the_mean_over_its_span() -> None:
    logits = torch.tensor([[0.0, 10.0, -10.0, float("-inf")]])
    assert phrase_scores(logits, [(0, 1), (1, 3)])[0].tolist() == pytest.approx([0.5, 0.5])


def test_resizing_follows_transformers() -> None:
    ours = ImageFormat()
    theirs = GroundingDinoImageProcessorPil()
    for size in [(640, 480), (1600, 1200), (1333, 400), (333, 777)]:
        picture = Image.effect_noise(size, 80).convert("RGB")
        expected = theirs(picture, return_tensors="pt").pixel_values[0]
        found = ours.preprocess(picture)
        assert found.shape == expected.shape
        assert (found - expected).abs().max() < 0.02


def test_equal_sized_pictures_in_a_batch_equal_one_by_one(detector: Detector) -> None:
    pictures = [scene.image for scene in scenes(4)]
    together = detector.detect(pictures, EVERYTHING)
    assert sum(map(len, together)) >= 3
    assert [rounded(d) for d in together] == [rounded(detector.detect([p], EVERYTHING)[0]) for p in pictures]


def test_answers_keep_the_order_of_mixed_sizes(detector: Detector) -> None:
    pictures = [scenes(1, size, seed)[0].image for seed, size in enumerate([(320, 240), (240, 320), (320, 240)] * 2)]
    together = detector.detect(pictures, EVERYTHING)
    assert [rounded(d) for d in together] == [rounded(detector.detect([p], EVERYTHING)[0]) for p in pictures]


def test_label_order_changes_nothing(detector: Detector) -> None:
    pictures = [scene.image for scene in scenes(4)]
    forward, backward = detector.detect(pictures, EVERYTHING), detector.detect(pictures, EVERYTHING[::-1])
    assert [rounded(d) for d in forward] == [rounded(d) for d in backward]


def test_a_label_takes_the_best_of_its_phrases(detector: Detector) -> None:
    scene = next(s for s in scenes(40) if any(shape.colour == "red" for shape in s.shapes))
    both = detector.detect([scene.image], [Label("hot", ("red object", "orange object"), 0.3)])[0]
    assert both
    assert {d.label for d in both} == {"hot"}


def test_thresholds_are_kept_per_label(detector: Detector) -> None:
    pictures = [scene.image for scene in scenes(6)]
    low = [d for found in detector.detect(pictures, EVERYTHING) for d in found]
    strict = [Label(label.name, label.phrases, 0.9 if label.name == "red object" else 0.3) for label in EVERYTHING]
    kept = [d for found in detector.detect(pictures, strict) for d in found]
    assert rounded(kept) == rounded([d for d in low if d.score >= 0.9 or d.label != "red object"])


@pytest.mark.parametrize("size", [(1, 1), (2, 9), (3000, 40), (20_000, 50), (50, 20_000)])
def test_odd_shapes_do_not_crash(detector: Detector, size: tuple[int, int]) -> None:
    for detection in detector.detect([Image.new("RGB", size)], EVERYTHING)[0]:
        assert 0 <= detection.box_xyxy[0] <= detection.box_xyxy[2] <= size[0]


def test_no_picture_is_no_answer(detector: Detector) -> None:
    assert detector.detect([], EVERYTHING) == []


def test_a_folder_without_a_model_is_refused(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_checkpoint(str(tmp_path))


def test_without_the_hub_one_line_names_the_ways_out() -> None:
    code = "from backend.detection.checkpoints import load_checkpoint; load_checkpoint('owner/never-cached')"
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    last = run.stderr.strip().splitlines()[-1]
    assert "MODEL=owner/never-cached cannot be loaded" in last
    assert "give a hub id that this machine can reach or has cached, a folder, an original .pth file, or demo" in last


def test_another_kind_of_model_is_refused(tmp_path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match="'bert'; it must be one of"):
        load_checkpoint(str(tmp_path))


def test_damaged_weights_are_refused(tmp_path) -> None:
    for path in DEMO_CHECKPOINT.iterdir():
        body = path.read_bytes()
        (tmp_path / path.name).write_bytes(body[: len(body) // 2] if path.suffix == ".safetensors" else body)
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_checkpoint(str(tmp_path))


def test_a_phrase_that_no_caption_holds_is_refused_by_name(detector: Detector) -> None:
    with pytest.raises(LabelingConfigError, match=r"'zorp zorp.*makes 400 tokens"):
        detector.detect([Image.new("RGB", (96, 96))], labels("zorp " * 100))


def test_captions_hold_all_phrases_within_the_budget(detector: Detector) -> None:
    phrases = [f"zorp {number}" for number in range(500)]
    captions = build_captions(detector.tokenizer, phrases, 256)
    assert [phrase for caption in captions for phrase in caption.phrases] == phrases
    assert all(len(caption.input_ids) <= 256 for caption in captions)
    assert len(captions) < 20


@pytest.mark.parametrize("phrase", [".", "?", "[SEP]", "a . b ? c", "🙂", "猫", "", "[CLS] x [SEP]"])
def test_no_phrase_ends_another(detector: Detector, phrase: str) -> None:
    caption = build_caption(detector.tokenizer, ["red circle", phrase, "ring"])
    borders = [i for i, token in enumerate(caption.input_ids) if token in (101, 102, 1012, 1029)]
    assert borders == [0, *(end for _, end in caption.spans), len(caption.input_ids) - 1]


def test_500_labels_find_what_a_few_find_and_the_backbone_runs_once(detector: Detector) -> None:
    scene = scenes(1, (640, 480), seed=5)[0]
    asked = {f"{shape.colour} {shape.shape}" for shape in scene.shapes}
    many = labels(*sorted(asked), *(f"q{number}" for number in range(500)), threshold=0.1)  # long captions: low scores
    runs = []
    handle = detector.backbone.backbone.register_forward_hook(lambda *_: runs.append(1))
    found = detector.detect([scene.image], many, nms_iou=0.7)[0]
    handle.remove()
    assert asked <= {detection.label for detection in found}
    assert len(runs) == 1


def test_splitting_a_caption_keeps_every_box_that_both_see(detector: Detector) -> None:
    pictures = [scene.image for scene in scenes(6)]
    whole = detector.detect(pictures, EVERYTHING, nms_iou=0.7)
    halves = [detector.detect(pictures, part) for part in (EVERYTHING[:3], EVERYTHING[3:])]
    for i, found in enumerate(whole):
        sure = [d for d in found if d.score > 0.6]
        seen = [d for half in halves for d in half[i]]
        assert all(any(d.label == s.label and iou(d.box_xyxy, s.box_xyxy) > 0.7 for s in seen) for d in sure)


def test_negative_phrases_take_their_boxes_away(detector: Detector) -> None:
    scene = next(s for s in scenes(60) if {"circle", "square"} <= {shape.shape for shape in s.shapes})
    both = detector.detect([scene.image], [Label("thing", ("circle", "square"), 0.3)], nms_iou=0.7)[0]
    circles = detector.detect([scene.image], labels("circle"), negatives=["square"], nms_iou=0.7)[0]
    assert len(both) > len(circles) > 0
    assert {detection.label for detection in circles} == {"circle"}


def test_a_shared_phrase_counts_for_the_first_label(detector: Detector) -> None:
    scene = scenes(1)[0]
    phrase = f"{scene.shapes[0].colour} {scene.shapes[0].shape}"
    two = [Label("first", (phrase,), 0.3), Label("second", (phrase,), 0.3)]
    assert {d.label for d in detector.detect([scene.image], two)[0]} == {"first"}


def test_boxes_of_a_reduced_copy_are_in_pixels_of_the_original(detector: Detector) -> None:
    scene = scenes(1, (640, 480), seed=5)[0]
    small = scene.image.resize((320, 240), Image.Resampling.BOX)
    full = detector.detect([scene.image], EVERYTHING, nms_iou=0.7)[0]
    reduced = detector.detect_inputs([detector.prepare(small, (640, 480))], EVERYTHING, nms_iou=0.7)[0]
    assert isinstance(reduced, list)
    assert len(full) == len(reduced) > 0
    for a, b in zip(full, reduced, strict=True):
        assert a.label == b.label
        assert iou(a.box_xyxy, b.box_xyxy) > 0.9


def out_of_memory_above(detector: Detector, pictures: int) -> object:
    def refuse(module: object, arguments: tuple, kwargs: dict) -> None:
        if len(kwargs["pixel_values"]) > pictures:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    return detector.model.register_forward_pre_hook(refuse, with_kwargs=True)


def test_out_of_memory_halves_the_batch(detector: Detector, caplog: pytest.LogCaptureFixture) -> None:
    pictures = [scene.image for scene in scenes(5)]
    expected = detector.detect(pictures, EVERYTHING)
    handle = out_of_memory_above(detector, 2)
    found = detector.detect(pictures, EVERYTHING)
    handle.remove()
    assert [rounded(d) for d in found] == [rounded(d) for d in expected]
    assert "out of memory with 5 pictures; going on with half" in caplog.text


def test_a_picture_that_does_not_fit_fails_alone(detector: Detector) -> None:
    large = scenes(1, (160, 120))[0].image
    small = scenes(1, (96, 96))[0].image

    def refuse(module: object, arguments: tuple, kwargs: dict) -> None:
        if kwargs["pixel_values"].shape[-1] > 96:
            raise torch.OutOfMemoryError

    handle = detector.model.register_forward_pre_hook(refuse, with_kwargs=True)
    found = detector.detect_inputs([detector.prepare(large), detector.prepare(small)], EVERYTHING)
    handle.remove()
    assert isinstance(found[0], ImageError)
    assert "needs more memory than cpu has" in str(found[0])
    assert isinstance(found[1], list)


def test_the_batch_is_what_takes_a_second(detector: Detector) -> None:
    assert detector.find_batch_size() > 4
    handle = detector.model.register_forward_pre_hook(lambda *_: time.sleep(0.6))
    assert detector.find_batch_size() == 1
    handle.remove()


def half_precision(monkeypatch: pytest.MonkeyPatch) -> Detector:
    """The path for GPUs, on the CPU: its Triton kernel has a test of its own."""

    def sample(values: torch.Tensor, reference: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        offsets, logits, *levels = rest
        return sample_rows(gather_plan, values.float(), reference, offsets.float(), logits.float(), *levels).to(
            values.dtype
        )

    monkeypatch.setitem(sys.modules, "backend.detection.deformable_attention_triton", SimpleNamespace(sample=sample))
    model, tokenizer, image_format = load_checkpoint(str(DEMO_CHECKPOINT))
    accelerate_on_gpu(model)
    return Detector(model, tokenizer, image_format, precision=torch.float16)


def test_half_precision_finds_the_same(detector: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    half = half_precision(monkeypatch)
    expected, found = (measure(d, TRAINING_SIZE, TRAINING_BACKGROUNDS, 100).ap50 for d in (detector, half))
    assert abs(expected - found) <= 0.002
    assert half.precision is torch.float16
    pixels = torch.stack([detector.prepare(scene.image).pixels for scene in scenes(8)])
    caption = build_caption(detector.tokenizer, ["red object", "blue object", "green object"])
    scores = [phrase_scores(d._forward(pixels.clone(), caption)[0], caption.spans) for d in (detector, half)]
    difference = (scores[0].sort(1).values - scores[1].sort(1).values).abs()
    assert difference.max() <= 0.02
    assert difference.median() <= 0.001


def test_a_checkpoint_that_half_precision_cannot_hold_goes_on_in_full(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    half = half_precision(monkeypatch)
    layer = half.model.model.encoder.layers[0].deformable_layer
    layer.fc1.weight.data *= 1e5  # beyond 65,504, and taken back again behind it
    layer.fc1.bias.data *= 1e5
    layer.fc2.weight.data /= 1e5
    picture = scenes(1)[0].image
    expected = Detector(*load_checkpoint(str(DEMO_CHECKPOINT))).detect([picture], EVERYTHING)[0]
    found = half.detect([picture], EVERYTHING)[0]
    assert [d.label for d in found] == [d.label for d in expected]
    assert "leaves the range of torch.float16" in caplog.text
    assert half.precision is torch.float32
