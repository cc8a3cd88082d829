"""The forward pass gives what transformers gives, and does no work twice."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from backend.detection import acceleration
from backend.detection.acceleration import accelerate_on_gpu
from backend.detection.captions import Caption, build_caption
from backend.detection.checkpoints import load_checkpoint
from backend.detection.forward_pass import TEXT_BUCKETS, ForwardPass, encode_positions
from backend.registry.checkpoint import DEMO_CHECKPOINT
from tests.detection.emulation import EmulatedCapture, EmulatedKernel
from tests.detection.forward import draw_noise, make_forward_pass, run_transformers

MODEL, TOKENIZER, IMAGE_FORMAT = load_checkpoint(str(DEMO_CHECKPOINT))
MODEL.eval()
LONG = build_caption(TOKENIZER, ["red circle", "blue object", "star"])
SHORT = build_caption(TOKENIZER, ["ring"])


@pytest.fixture
def forward_pass() -> ForwardPass:
    return make_forward_pass(MODEL, IMAGE_FORMAT)


@torch.inference_mode()
def detect(forward_pass: ForwardPass, pixels: torch.Tensor, *captions: Caption) -> tuple[torch.Tensor, torch.Tensor]:
    return forward_pass.detect(forward_pass.encode_images(pixels), forward_pass.encode_text(captions))


@pytest.fixture
def calls() -> Iterator[dict[str, list[Any]]]:
    """The arguments of each call of some modules, by name."""
    model, calls = MODEL.model, {}
    modules = {
        "backbone": model.backbone.conv_encoder.model,
        "text backbone": model.text_backbone,
        "box head of the encoder": model.encoder_output_bbox_embed,
        "position embedding": model.backbone.position_embedding,
    }
    handles = []
    for name, module in modules.items():
        calls[name] = rows = []
        handles.append(module.register_forward_pre_hook(lambda _, arguments, rows=rows: rows.append(arguments)))
    yield calls
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("size", [(96, 128), (75, 101)])
def test_it_gives_the_numbers_of_transformers(forward_pass: ForwardPass, size: tuple[int, int]) -> None:
    pixels = draw_noise(2, *size)
    logits, boxes = detect(forward_pass, pixels, LONG)
    expected = run_transformers(MODEL, IMAGE_FORMAT, pixels, LONG)
    assert (logits[:, 0].sigmoid() - expected.logits.sigmoid()).abs().max() < 1e-5
    assert (boxes[:, 0] - expected.boxes_cxcywh).abs().max() < 1e-5


@pytest.mark.parametrize("buckets", [(), TEXT_BUCKETS])
def test_captions_of_a_batch_equal_one_by_one(forward_pass: ForwardPass, buckets: tuple[int, ...]) -> None:
    forward_pass.text_buckets = buckets
    pixels = draw_noise(2, 96, 128)
    logits, boxes = detect(forward_pass, pixels, LONG, SHORT)
    assert logits.shape[:2] == (2, 2)
    assert logits.shape[-1] == (32 if buckets else len(LONG.input_ids))
    for index, caption in enumerate((LONG, SHORT)):
        expected = run_transformers(MODEL, IMAGE_FORMAT, pixels, caption)
        length = len(caption.input_ids)
        assert (logits[:, index, :, :length].sigmoid() - expected.logits.sigmoid()).abs().max() < 1e-5
        assert (boxes[:, index] - expected.boxes_cxcywh).abs().max() < 1e-5
        assert (logits[:, index, :, length:] == float("-inf")).all()


def test_nothing_is_computed_twice(forward_pass: ForwardPass, calls: dict[str, list[Any]]) -> None:
    for _ in range(2):
        for captions in ([LONG], [SHORT], [LONG, SHORT]):
            detect(forward_pass, draw_noise(1, 96, 128), *captions)
    assert len(calls["text backbone"]) == 3  # one for each group of captions
    assert len(calls["position embedding"]) == MODEL.config.num_feature_levels  # one size
    assert len(calls["backbone"]) == 6
    forward_pass.clear()
    detect(forward_pass, draw_noise(1, 96, 128), LONG)
    assert len(calls["text backbone"]) == 4


def test_the_box_head_sees_only_the_selected_queries(forward_pass: ForwardPass, calls: dict[str, list[Any]]) -> None:
    detect(forward_pass, draw_noise(1, 96, 128), LONG)
    ((hidden,),) = calls["box head of the encoder"]
    assert hidden.shape[1] == MODEL.config.num_queries < sum(-(-96 // s) * -(-128 // s) for s in forward_pass.strides)


class RecordedOperations(TorchDispatchMode):
    """Records the names of all operations of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


def test_nothing_in_the_pass_waits_for_the_device(kernel: EmulatedKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such operations are forbidden while a CUDA graph is captured. The modules are those for a GPU."""
    monkeypatch.setattr(acceleration, "_is_padded", lambda padding: padding is not None)  # as on a GPU
    model = load_checkpoint(str(DEMO_CHECKPOINT)).model.eval()
    accelerate_on_gpu(model)
    forward_pass, pixels = make_forward_pass(model, IMAGE_FORMAT), draw_noise(2, 96, 128)
    detect(forward_pass, pixels, LONG)  # what is kept from pass to pass is computed outside of graphs
    forward_pass.use_graphs(EmulatedCapture)
    with RecordedOperations() as recorded:
        detect(forward_pass, pixels, LONG)
    assert "topk" in recorded.names
    # A tensor made of numbers is copied to the device; `item` and `nonzero` need its answer.
    assert recorded.names & {"lift_fresh", "_local_scalar_dense", "nonzero", "equal", "is_nonzero"} == set()


def test_positions_are_encoded_as_in_transformers() -> None:
    grounding_dino = pytest.importorskip("transformers.models.grounding_dino.modeling_grounding_dino")
    encode = getattr(grounding_dino, "encode_sinusoidal_position_embedding", None)
    if not encode:
        pytest.skip("this version of transformers has no such function")
    for coordinates in (torch.rand(2, 7, 4), torch.rand(2, 7, 2), torch.arange(9.0)[None, :, None]):
        assert (encode_positions(coordinates, 64) - encode(coordinates, 64)).abs().max() < 1e-5
