"""A hub id, a folder or an original `.pth` file -> model, tokenizer and picture format."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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

CLASSES = {
    "grounding-dino": GroundingDinoForObjectDetection,
    "mm-grounding-dino": MMGroundingDinoForObjectDetection,
}


def load_checkpoint(source: str) -> tuple[Any, Any, ImageFormat]:
    """The model in float32, its tokenizer and the picture format it was trained with.

    Raises:
        CheckpointError: nothing there, not of the Grounding DINO family, or damaged.
    """
    with _loading(source):
        return load_model(source), AutoTokenizer.from_pretrained(_tokenizer_source(source)), _image_format(source)


def load_model(source: str) -> Any:
    """The model alone, in float32, from a hub id, a folder or an original `.pth` file.

    Raises:
        CheckpointError: as for `load_checkpoint`.
    """
    with _loading(source):
        if _is_original(source):
            return _convert_original(Path(source))
        kind = AutoConfig.from_pretrained(source).model_type
        if kind not in CLASSES:
            raise CheckpointError(f"MODEL={source} is a {kind!r}; it must be one of {', '.join(CLASSES)}")
        return CLASSES[kind].from_pretrained(source).float()


def load_weights_into(model: Any, path: Path) -> Any:
    """The model with the tensors of a safetensors file in place of its own of the same names.

    Raises:
        CheckpointError: the file does not fit the model.
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
    wrong = sorted({*info["missing_keys"], *info["unexpected_keys"], *map(str, info["mismatched_keys"])})
    if wrong:
        raise CheckpointError(f"MODEL={path} does not fit the architecture: {len(wrong)} tensors, such as {wrong[0]}")
    return model.float()


def _tokenizer_source(source: str) -> str:
    """An original file brings no vocabulary: it may lie beside it, and is that of BERT otherwise."""
    if not _is_original(source):
        return source
    folder = Path(source).parent
    beside = any((folder / name).exists() for name in ("tokenizer.json", "vocab.txt"))
    return str(folder) if beside else ORIGINAL_TOKENIZER


def _image_format(source: str) -> ImageFormat:
    if _is_original(source):
        return ImageFormat()
    wanted = GroundingDinoImageProcessorPil.from_pretrained(source)
    edges = wanted.size
    mean, std = tuple(wanted.image_mean), tuple(wanted.image_std)
    return ImageFormat(edges["shortest_edge"], edges["longest_edge"], mean, std)


@contextlib.contextmanager
def _loading(source: str) -> Iterator[None]:
    """Keeps transformers from drawing bars and tables; makes one line that says what to do of whatever goes wrong."""
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
