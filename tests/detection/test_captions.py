from typing import Any

import pytest

from backend.detection.captions import build_caption, build_captions
from backend.detection.checkpoints import load_checkpoint
from backend.errors import LabelingConfigError
from backend.registry.checkpoint import DEMO_CHECKPOINT


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_checkpoint(str(DEMO_CHECKPOINT)).tokenizer


def test_spans_cover_the_tokens_of_each_phrase(tokenizer: Any) -> None:
    phrases = ["red circle", "zorp", "blue, big square"]
    caption = build_caption(tokenizer, phrases)
    tokens = tokenizer.convert_ids_to_tokens(caption.input_ids)
    words = ["".join(tokens[start:end]).replace("##", "") for start, end in caption.spans]
    assert words == [phrase.replace(" ", "") for phrase in phrases]
    assert caption.input_ids[-2:] == (1012, 102)


def test_a_phrase_that_fits_in_no_caption_is_refused_by_name(tokenizer: Any) -> None:
    with pytest.raises(LabelingConfigError, match=r"'zorp zorp.*makes 400 tokens; at most 253 fit"):
        build_captions(tokenizer, ["red circle", "zorp " * 100], 256)


def test_captions_hold_all_phrases_within_the_token_limit(tokenizer: Any) -> None:
    phrases = [f"zorp {number}" for number in range(500)]
    captions = build_captions(tokenizer, phrases, 256)
    assert [phrase for caption in captions for phrase in caption.phrases] == phrases
    assert all(len(caption.input_ids) <= 256 for caption in captions)
    assert len(captions) < 20


def test_no_phrases_make_no_captions(tokenizer: Any) -> None:
    assert build_captions(tokenizer, [], 256) == []


@pytest.mark.parametrize("phrase", [".", "?", "[SEP]", "a . b ? c", "🙂", "猫", "", "[CLS] x [SEP]"])
def test_no_phrase_ends_another(tokenizer: Any, phrase: str) -> None:
    caption = build_caption(tokenizer, ["red circle", phrase, "ring"])
    delimiters = [i for i, token in enumerate(caption.input_ids) if token in (101, 102, 1012, 1029)]
    assert delimiters == [0, *(end for _, end in caption.spans), len(caption.input_ids) - 1]
