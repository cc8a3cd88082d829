import pytest
import torch
from PIL import Image
from transformers import GroundingDinoImageProcessorPil

from backend.checkpoints import load_checkpoint
from backend.detector import Detector, ImageFormat, build_caption, phrase_scores
from backend.errors import CheckpointError, LabelingConfigError
from backend.labeling import Label
from backend.versions import DEMO
from tests.pictures import scenes


@pytest.fixture(scope="module")
def detector() -> Detector:
    return Detector(*load_checkpoint(str(DEMO)))


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


@pytest.mark.parametrize("size", [(1, 1), (3000, 40), (40, 3000)])
def test_odd_shapes_do_not_crash(detector: Detector, size: tuple[int, int]) -> None:
    for detection in detector.detect([Image.new("RGB", size)], EVERYTHING)[0]:
        assert 0 <= detection.box_xyxy[0] <= detection.box_xyxy[2] <= size[0]


def test_no_picture_is_no_answer(detector: Detector) -> None:
    assert detector.detect([], EVERYTHING) == []


def test_a_folder_without_a_model_is_refused(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_checkpoint(str(tmp_path))


def test_another_kind_of_model_is_refused(tmp_path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match="'bert'; it must be one of"):
        load_checkpoint(str(tmp_path))


def test_damaged_weights_are_refused(tmp_path) -> None:
    for path in DEMO.iterdir():
        body = path.read_bytes()
        (tmp_path / path.name).write_bytes(body[: len(body) // 2] if path.suffix == ".safetensors" else body)
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_checkpoint(str(tmp_path))


def test_too_many_labels_are_refused_with_the_numbers(detector: Detector) -> None:
    many = labels(*(f"zorp {number}" for number in range(100)))
    with pytest.raises(LabelingConfigError, match=r"make \d+ tokens and the model reads 256"):
        detector.detect([Image.new("RGB", (96, 96))], many)
