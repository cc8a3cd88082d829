"""Phrases -> the token ids of a caption, with the token span of each phrase known by construction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from backend.errors import LabelingConfigError

CLS, SEP, STOP, QUESTION = 101, 102, 1012, 1029  # transformers' Grounding DINO splits a caption at these BERT ids
DELIMITERS = frozenset((CLS, SEP, STOP, QUESTION))


@dataclass(frozen=True)
class Caption:
    """The text input of one forward pass.

    Attributes:
        phrases: the phrases in their order.
        input_ids: the token ids, CLS and SEP included.
        spans: for each phrase, the half-open range [start, end) of its tokens in `input_ids`.
    """

    phrases: tuple[str, ...]
    input_ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _TokenizedPhrase:
    phrase: str
    tokens: list[int]

    @property
    def length(self) -> int:
        """Number of tokens that the phrase takes in a caption, its full stop included."""
        return len(self.tokens) + 1


def build_caption(tokenizer: Any, phrases: Sequence[str]) -> Caption:
    """Builds one caption of all phrases, of any length."""
    return _join(_tokenize(tokenizer, phrases))


def build_captions(tokenizer: Any, phrases: Sequence[str], max_tokens: int) -> list[Caption]:
    """Packs the phrases in their order into as few captions as possible, each of at most `max_tokens` tokens.

    Raises:
        LabelingConfigError: a phrase does not fit into a caption of its own.
    """
    capacity = max_tokens - 2  # without CLS and SEP
    captions: list[Caption] = []
    pending: list[_TokenizedPhrase] = []
    used = 0
    for entry in _tokenize(tokenizer, phrases):
        if entry.length > capacity:
            raise LabelingConfigError(
                f"the phrase {entry.phrase[:60]!r}… makes {len(entry.tokens)} tokens; at most {capacity - 1} fit"
            )
        if used + entry.length > capacity:
            captions.append(_join(pending))
            pending, used = [], 0
        pending.append(entry)
        used += entry.length
    return [*captions, _join(pending)] if pending else captions


def _tokenize(tokenizer: Any, phrases: Sequence[str]) -> list[_TokenizedPhrase]:
    """Tokenizes each phrase, without tokens that would end it; one unknown token where none is left."""
    tokenized = []
    for phrase in phrases:
        tokens = [t for t in tokenizer.encode(phrase, add_special_tokens=False) if t not in DELIMITERS]
        tokenized.append(_TokenizedPhrase(phrase, tokens or [tokenizer.unk_token_id]))
    return tokenized


def _join(tokenized: Sequence[_TokenizedPhrase]) -> Caption:
    """Joins phrases, each closed by a full stop: without the last one the last phrase could not attend to itself."""
    input_ids, spans = [CLS], []
    for entry in tokenized:
        spans.append((len(input_ids), len(input_ids) + len(entry.tokens)))
        input_ids += [*entry.tokens, STOP]
    return Caption(tuple(entry.phrase for entry in tokenized), (*input_ids, SEP), tuple(spans))
