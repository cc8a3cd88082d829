"""A checkpoint folder or hub id -> model, tokenizer and picture format."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessorPil,
    MMGroundingDinoForObjectDetection,
)
from transformers.utils import logging

from backend.detector import ImageFormat
from backend.errors import CheckpointError

CLASSES = {
    "grounding-dino": GroundingDinoForObjectDetection,
    "mm-grounding-dino": MMGroundingDinoForObjectDetection,
}


def load_checkpoint(source: str) -> tuple[Any, Any, ImageFormat]:
    """The model in float32, its tokenizer and the picture format it was trained with.

    Raises:
        CheckpointError: nothing there, not of the Grounding DINO family, or damaged.
    """
    try:
        with _quiet():
            kind = AutoConfig.from_pretrained(source).model_type
            if kind not in CLASSES:
                raise CheckpointError(f"MODEL={source} is a {kind!r}; it must be one of {', '.join(CLASSES)}")
            model = CLASSES[kind].from_pretrained(source).float()
            return model, AutoTokenizer.from_pretrained(source), _image_format(source)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = str(error).split("\n")[0]
        raise CheckpointError(
            f"MODEL={source} cannot be loaded ({reason}); give a hub id that this machine can reach, a folder, or demo"
        ) from error


def _image_format(source: str) -> ImageFormat:
    wanted = GroundingDinoImageProcessorPil.from_pretrained(source)
    edges = wanted.size
    mean, std = tuple(wanted.image_mean), tuple(wanted.image_std)
    return ImageFormat(edges["shortest_edge"], edges["longest_edge"], mean, std)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Transformers draws a bar per file otherwise, in the middle of the log."""
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
