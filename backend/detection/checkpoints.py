"""Loads a checkpoint: a hub id, a folder or an original `.pth` file -> model, tokenizer and image format."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessorPil,
    MMGroundingDinoForObjectDetection,
)
from transformers.utils import logging

from backend.detection.convert_original import convert_state_dict, infer_config, read_state_dict
from backend.detection.preprocess import ImageFormat
from backend.errors import CheckpointError

ORIGINAL_TOKENIZER = "google-bert/bert-base-uncased"

MODEL_CLASSES = {  # by `model_type` in config.json
    "grounding-dino": GroundingDinoForObjectDetection,
    "mm-grounding-dino": MMGroundingDinoForObjectDetection,
}


class LoadedCheckpoint(NamedTuple):
    """The arguments with which a `Detector` begins: model in float32, tokenizer, and the format of its images."""

    model: Any
    tokenizer: Any
    image_format: ImageFormat


def load_checkpoint(source: str, size_divisor: int = 1) -> LoadedCheckpoint:
    """Loads a checkpoint from a hub id, a folder or an original `.pth` file.

    Args:
        source: the hub id or path.
        size_divisor: of the image format.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, or it is not of the Grounding DINO family.
    """
    with _loading(source):
        model = load_model(source)
        tokenizer = AutoTokenizer.from_pretrained(_find_tokenizer(source))
        image_format = dataclasses.replace(_load_image_format(source), size_divisor=size_divisor)
        return LoadedCheckpoint(model, tokenizer, image_format)


def load_model(source: str) -> Any:
    """Loads the model alone, in float32, from a hub id, a folder or an original `.pth` file.

    Raises:
        CheckpointError: as for `load_checkpoint`.
    """
    with _loading(source):
        if _is_original(source):
            return _convert_original(Path(source))
        model_type = AutoConfig.from_pretrained(source).model_type
        if model_type not in MODEL_CLASSES:
            raise CheckpointError(f"MODEL={source} is a {model_type!r}; it must be one of {', '.join(MODEL_CLASSES)}")
        return MODEL_CLASSES[model_type].from_pretrained(source).float()


def load_weights_into(model: Any, path: Path) -> Any:
    """Replaces the model's parameters with the tensors of the same names in a safetensors file; returns the model.

    Raises:
        CheckpointError: the file cannot be read or does not fit the model.
    """
    parameters = dict(model.named_parameters())
    try:
        with torch.no_grad():
            for name, tensor in load_file(path).items():
                parameters[name].copy_(tensor)
    except (OSError, KeyError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{path} does not fit the model ({type(error).__name__}: {error})") from None
    return model


def _is_original(source: str) -> bool:
    return source.endswith(".pth")


def _convert_original(path: Path) -> Any:
    state = read_state_dict(path)
    model, info = GroundingDinoForObjectDetection.from_pretrained(
        None, config=infer_config(state), state_dict=convert_state_dict(state), output_loading_info=True
    )
    mismatches = sorted({*info["missing_keys"], *info["unexpected_keys"], *map(str, info["mismatched_keys"])})
    if mismatches:
        raise CheckpointError(
            f"MODEL={path} does not fit the architecture: {len(mismatches)} tensors, such as {mismatches[0]}"
        )
    return model.float()


def _find_tokenizer(source: str) -> str:
    """Returns where to load the tokenizer from; an original file holds none, so from its folder or from BERT."""
    if not _is_original(source):
        return source
    folder = Path(source).parent
    has_vocabulary = any((folder / name).exists() for name in ("tokenizer.json", "vocab.txt"))
    return str(folder) if has_vocabulary else ORIGINAL_TOKENIZER


def _load_image_format(source: str) -> ImageFormat:
    if _is_original(source):
        return ImageFormat()
    processor = GroundingDinoImageProcessorPil.from_pretrained(source)
    edges = processor.size
    mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    return ImageFormat(edges["shortest_edge"], edges["longest_edge"], mean, std)


@contextlib.contextmanager
def _loading(source: str) -> Iterator[None]:
    """Silences the progress bars and tables of transformers; turns any failure into one line that says what to do."""
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = str(error).split("\n")[0]
        raise CheckpointError(
            f"MODEL={source} cannot be loaded ({reason}); give a hub id that this machine can reach or has cached, "
            "a folder, an original .pth file, or demo"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
