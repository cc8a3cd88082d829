"""Runs the forward pass on its own, with the states of the encoder, as tests and benchmarks compare them."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from backend.detection.captions import Caption
from backend.detection.forward_pass import ForwardPass, compute_strides
from backend.detection.preprocess import ImageFormat


class Outputs(NamedTuple):
    """Of one caption on a batch of images."""

    logits: Tensor  # (images, queries, tokens)
    boxes_cxcywh: Tensor  # (images, queries, 4)
    image_states: Tensor  # (images, N, d), after the encoder
    text_states: Tensor  # (images, tokens, d), likewise


def make_forward_pass(model: Any, image_format: ImageFormat | None = None) -> ForwardPass:
    return ForwardPass(model, image_format or ImageFormat(), compute_strides(model.config))


@torch.inference_mode()
def run_forward_pass(forward_pass: ForwardPass, pixels: Tensor, caption: Caption) -> Outputs:
    states: dict[str, Tensor] = {}
    layer = forward_pass.model.model.encoder.layers[-1]
    handles = [
        module.register_forward_hook(lambda _, __, output, name=name: states.update({name: output[0]}))
        for name, module in (("image", layer.deformable_layer), ("text", layer.text_enhancer_layer))
    ]
    images = forward_pass.encode_images(pixels)
    logits, boxes = forward_pass.detect(images, forward_pass.encode_text([caption]))
    for handle in handles:
        handle.remove()
    return Outputs(logits[:, 0], boxes[:, 0], states["image"], states["text"])


@torch.inference_mode()
def run_transformers(model: Any, image_format: ImageFormat, pixels: Tensor, caption: Caption) -> Outputs:
    """The same with the model as it comes from transformers."""
    values = ((pixels / 255 - torch.tensor(image_format.mean)) / torch.tensor(image_format.std)).permute(0, 3, 1, 2)
    output = model(pixel_values=values.contiguous(), input_ids=torch.tensor([caption.input_ids] * len(pixels)))
    return Outputs(
        output.logits[..., : len(caption.input_ids)],
        output.pred_boxes,
        output.encoder_last_hidden_state_vision,
        output.encoder_last_hidden_state_text,
    )


def draw_noise(images: int, height: int, width: int, seed: int = 1) -> Tensor:
    """Returns random pixels, uint8 (images, height, width, 3)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (images, height, width, 3), generator=generator, dtype=torch.uint8)
