"""Phrases -> the token ids that Grounding DINO reads, with each phrase's span known by construction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from backend.errors import LabelingConfigError

CLS, SEP, STOP, QUESTION = 101, 102, 1012, 1029  # transformers' Grounding DINO finds phrase borders by these BERT ids
BORDERS = frozenset((CLS, SEP, STOP, QUESTION))


@dataclass(frozen=True)
class Caption:
    """Token ids of some phrases and, per phrase, its span [start, end) in them."""

    phrases: tuple[str, ...]
    input_ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


def build_caption(tokenizer: Any, phrases: Sequence[str]) -> Caption:
    """One caption of all phrases, whatever its length."""
    return _join([(phrase, _tokens(tokenizer, phrase)) for phrase in phrases])


def build_captions(tokenizer: Any, phrases: Sequence[str], most_tokens: int) -> list[Caption]:
    """As few captions as hold all phrases in their order, each of at most `most_tokens`.

    Raises:
        LabelingConfigError: a phrase is too long for any caption.
    """
    return [_join(rows) for rows in _pack([(phrase, _tokens(tokenizer, phrase)) for phrase in phrases], most_tokens)]


Row = tuple[str, list[int]]


def _tokens(tokenizer: Any, phrase: str) -> list[int]:
    """A phrase's tokens without any that would end it; one unknown token where nothing is left."""
    tokens = [t for t in tokenizer.encode(phrase, add_special_tokens=False) if t not in BORDERS]
    return tokens or [tokenizer.unk_token_id]


def _pack(rows: Sequence[Row], most_tokens: int) -> Iterator[list[Row]]:
    room = most_tokens - 2  # CLS and SEP
    packed: list[Row] = []
    used = 0
    for phrase, tokens in rows:
        if len(tokens) + 1 > room:
            raise LabelingConfigError(f"the phrase {phrase[:60]!r}… makes {len(tokens)} tokens; at most {room - 1} fit")
        if used + len(tokens) + 1 > room:
            yield packed
            packed, used = [], 0
        packed.append((phrase, tokens))
        used += len(tokens) + 1
    if packed:
        yield packed


def _join(rows: Sequence[Row]) -> Caption:
    """Each phrase is closed by a full stop: without the last one the last phrase would not see itself."""
    input_ids, spans = [CLS], []
    for _, tokens in rows:
        spans.append((len(input_ids), len(input_ids) + len(tokens)))
        input_ids += [*tokens, STOP]
    return Caption(tuple(phrase for phrase, _ in rows), (*input_ids, SEP), tuple(spans))
