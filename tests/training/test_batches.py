"""Captions and targets that training draws from examples."""

import numpy as np
import pytest
import torch

from backend.boxes import Box
from backend.detection.captions import Caption
from backend.detection.preprocess import ImageFormat, ModelInput
from backend.labelstudio.labeling_config import Label
from backend.labelstudio.targets import DetectionQuery, ImageTarget
from backend.training.batches import sample_caption
from backend.training.dataset import Example
from backend.training.loss import Target

LABELS = {"cat": ("cat", "kitten"), "dog": ("dog",), "cow": ("cow",)}
BOX: Box = (0.25, 0.5, 0.75, 1.0)


class LetterTokenizer:
    """Makes one token of each letter."""

    unk_token_id = 3

    def encode(self, phrase: str, add_special_tokens: bool) -> list[int]:
        return [2000 + ord(letter) for letter in phrase]  # no special token


def make_example(*true_labels: str, labels: dict[str, tuple[str, ...]] = LABELS, negative: str = "statue") -> Example:
    query = DetectionQuery(tuple(Label(name, phrases, 0.3) for name, phrases in labels.items()), (negative,), 1.0)
    target = ImageTarget("label", "image", "", "a.png", None, query)
    return Example(1, target, tuple((BOX, label) for label in true_labels), "train")


def sample(example: Example, seed: int = 0, max_tokens: int = 256, padding: int = 0) -> tuple[Caption, Target]:
    image = ModelInput(torch.zeros(8, 8, 3, dtype=torch.uint8), (padding, 0), (100, 100), ImageFormat())
    return sample_caption(example, image, LetterTokenizer(), np.random.default_rng(seed), max_tokens)


def test_a_caption_has_one_phrase_of_each_label_and_the_negatives() -> None:
    drawn = set()
    for seed in range(20):
        caption, target = sample(make_example("cat"), seed)
        phrases = set(caption.phrases)
        assert phrases - {"cat", "kitten"} == {"dog", "cow", "statue"}
        assert len(caption.phrases) == 4
        drawn |= phrases
        assert caption.phrases[int(target.phrases[0])] in ("cat", "kitten")
    assert {"cat", "kitten"} < drawn


def test_phrases_with_boxes_come_first_into_a_short_caption() -> None:
    example = make_example("cow", "dog", labels={**LABELS, "cat": ("cat",)}, negative="owl")
    for seed in range(20):
        caption, target = sample(example, seed, max_tokens=10)  # two phrases of 3 tokens and a stop, CLS, SEP
        assert set(caption.phrases) == {"cow", "dog"}
        assert [caption.phrases[int(i)] for i in target.phrases] == ["cow", "dog"]


def test_a_box_whose_phrase_does_not_fit_is_not_in_the_target() -> None:
    caption, target = sample(
        make_example("cow", "dog", labels={"dog": ("dog",), "cow": ("cow",)}, negative="owl"), max_tokens=6
    )
    assert caption.phrases == ("cow",)
    assert target.phrases.tolist() == [0]


def test_a_shared_phrase_stands_for_the_first_label_with_boxes() -> None:
    labels = {"one": ("cat",), "two": ("cat",)}
    caption, target = sample(make_example("two", "one", "two", labels=labels, negative="cat"))
    assert caption.phrases == ("cat",)
    assert target.phrases.tolist() == [0, 0]  # the two boxes of "two"


def test_boxes_are_relative_to_the_padded_image() -> None:
    _, target = sample(make_example("cat"), padding=8)
    assert target.boxes_cxcywh.tolist() == [pytest.approx([0.25, 0.75, 0.25, 0.5])]


def test_an_example_without_boxes_has_an_empty_target() -> None:
    caption, target = sample(make_example())
    assert len(caption.phrases) == 4
    assert (target.boxes_cxcywh.shape, target.phrases.shape) == ((0, 4), (0,))
