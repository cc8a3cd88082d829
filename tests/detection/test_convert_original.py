"""A converted original checkpoint gives the reference's numbers; tests/data/original_parity describes the data."""

import copy
import json
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import GroundingDinoForObjectDetection

from backend.detection.acceleration import FoldedFusion, FusedAttention, PackedLinear, accelerate_on_cpu
from backend.detection.captions import Caption
from backend.detection.checkpoints import load_model
from backend.detection.convert_original import read_state_dict
from backend.detection.deformable_attention import GatheredAttention, SlicedLayer
from backend.detection.phrase_scores import make_span_matrix, phrase_scores
from backend.detection.preprocess import ImageFormat
from backend.errors import CheckpointError
from tests.detection.forward import make_forward_pass, run_forward_pass, run_transformers

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch's own, while its compiler is imported
]

DATA = Path(__file__).parent.parent / "data" / "original_parity"
INPUT = json.loads((DATA / "input.json").read_text())
BRANCH = re.compile(r"(linear2|fc2|output\.dense|out_proj|output_proj|attn\.proj)\.weight$")


def generate(name: str, shape: list[int], prefix: str) -> np.ndarray:
    """Generates a parameter from its name alone; the rule is in the README of the data."""
    f = np.float32
    name = re.sub(r"^(transformer\.decoder\.)?bbox_embed\.\d+\.", "bbox_embed.0.", name)
    rng = np.random.RandomState(zlib.crc32((prefix + name).encode()))
    if name == "transformer.tgt_embed.weight":
        return np.repeat(rng.standard_normal((4, shape[1])).astype(f), shape[0] // 4, axis=0)
    z, last = rng.standard_normal(shape).astype(f), name.rsplit(".", 1)[-1]
    if last in ("gamma_v", "gamma_l"):
        return f(0.3) + f(0.05) * z
    if last == "level_embed":
        return z
    if name.endswith("sampling_offsets.bias"):
        return f(2) * z
    if last == "relative_position_bias_table":
        return f(0.5) * z
    if name.startswith("transformer.decoder.norm."):
        return f(0.15) * (z if last == "bias" else f(1) + f(0.1) * z)
    if "_embeddings." in name:
        return f(0.02) * z
    if len(shape) == 1:
        return f(1) + f(0.1) * z if last == "weight" else f(0.05) * z
    gain = 0.1 if re.search(r"bbox_embed.*layers\.2\.weight$", name) else 0.3 if BRANCH.search(name) else 1.0
    return z * f(gain / np.sqrt(np.prod(shape[1:])))


@pytest.fixture(scope="module")
def pth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes a checkpoint in the published form: under the key `model`, names with the prefix `module.`."""
    parameters = json.loads((DATA / "parameters.json").read_text())
    state = {
        f"module.{name}": torch.from_numpy(np.ascontiguousarray(generate(name, shape, INPUT["seed_prefix"])))
        for name, shape in parameters
    }
    state["module.backbone.0.layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.long)
    path = tmp_path_factory.mktemp("original") / "swint.pth"
    torch.save({"model": state, "epoch": 3}, path)
    return path


@pytest.fixture(scope="module")
def stock(pth: Path) -> GroundingDinoForObjectDetection:
    model = load_model(str(pth)).eval()
    assert isinstance(model, GroundingDinoForObjectDetection)
    return model


@pytest.fixture(scope="module", params=["stock", "fast"])
def actual(stock: GroundingDinoForObjectDetection, request: pytest.FixtureRequest) -> dict[str, np.ndarray]:
    image_format = ImageFormat(480, 640)
    pixels = image_format.resize(Image.open(DATA / INPUT["image"]).convert("RGB"))[None]
    spans = [tuple(label["span"]) for label in INPUT["labels"]]
    caption = Caption(tuple(map(str, spans)), tuple(INPUT["input_ids"]), tuple(spans))
    if request.param == "stock":
        output = run_transformers(stock, image_format, pixels, caption)
    else:
        model = copy.deepcopy(stock)
        accelerate_on_cpu(model)
        replaced = {type(module) for module in model.modules()}
        assert {FoldedFusion, FusedAttention, GatheredAttention, PackedLinear, SlicedLayer} <= replaced
        output = run_forward_pass(make_forward_pass(model, image_format), pixels, caption)
    scores = phrase_scores(output.logits[0], make_span_matrix(spans, len(caption.input_ids)))
    return {
        "pred_logits": output.logits[0].numpy(),
        "pred_boxes": output.boxes_cxcywh[0].numpy(),
        "label_scores": scores.numpy(),
        "encoder_text": output.text_states[0].numpy(),
        "encoder_vision": output.image_states[0].numpy(),
    }


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    with np.load(DATA / "expected.npz") as arrays:
        return dict(arrays)


def test_encoder_states_equal_the_references(actual: dict, expected: dict) -> None:
    assert np.abs(actual["encoder_text"] - expected["encoder_text"]).max() <= 1e-3
    rows = expected["encoder_vision_rows"]
    assert np.abs(actual["encoder_vision"][rows] - expected["encoder_vision"]).max() <= 1e-3


def test_sorted_scores_equal_the_references(actual: dict, expected: dict) -> None:
    difference = np.sort(actual["label_scores"], axis=0) - np.sort(expected["label_scores"], axis=0)
    assert np.abs(difference).max() <= 1e-4


def test_every_detection_of_the_reference_is_found(actual: dict, expected: dict) -> None:
    theirs = np.hstack([expected["pred_boxes"], expected["label_scores"]])
    ours = np.hstack([actual["pred_boxes"], actual["label_scores"]])
    for i, row in enumerate(theirs):  # near ties may change places with their neighbours
        assert np.abs(ours[max(i - 5, 0) : i + 6] - row).max(axis=1).min() <= 1e-4


def test_stable_queries_equal_the_references_by_index(actual: dict, expected: dict) -> None:
    stable = expected["stable"]
    for name, tolerance in [("pred_boxes", 1e-4), ("label_scores", 1e-4), ("pred_logits", 1e-3)]:
        assert np.abs(actual[name][stable] - expected[name][stable]).max() <= tolerance


class CodeInPickle:
    def __reduce__(self) -> tuple:
        return (print, ("pwned",))


def test_a_pickle_with_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.save({"model": CodeInPickle()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        read_state_dict(tmp_path / "evil.pth")
    assert "pwned" not in capsys.readouterr().out


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.zeros(1000)}}, tmp_path / "cut.pth")
    body = (tmp_path / "cut.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(body[: len(body) // 2])
    with pytest.raises(CheckpointError, match="damaged or not a checkpoint"):
        read_state_dict(tmp_path / "cut.pth")


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.zeros(3)}}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="is not a Grounding DINO checkpoint"):
        read_state_dict(tmp_path / "other.pth")


def get_swin_b_name_and_shape(name: str, shape: list[int]) -> tuple[str, list[int]]:
    """Returns a tensor's name and shape in SwinB_cogcoor: a third wider, windows of 12, 384 pixels."""
    if not name.startswith(("backbone.0.", "input_proj.")):
        return name, shape
    if name.endswith("relative_position_bias_table"):
        return name, [23 * 23, shape[1] * 4 // 3]
    narrow = {96 * 2**i * factor: 128 * 2**i * factor for i in range(4) for factor in (1, 3, 4, 9)}
    kept = (name.startswith("input_proj.") and (0,)) or ()  # the output width of a projection stays 256
    return name, [size if i in kept else narrow.get(size, size) for i, size in enumerate(shape)]


def test_swin_b_is_inferred_from_its_shapes(tmp_path: Path) -> None:
    parameters = json.loads((DATA / "parameters.json").read_text())
    state = {}
    for name, shape in (get_swin_b_name_and_shape(*row) for row in parameters):
        blocks = range(18) if name.startswith("backbone.0.layers.2.blocks.0.") else [None]
        for block in blocks:
            full = name if block is None else name.replace("blocks.0.", f"blocks.{block}.", 1)
            state[full] = torch.zeros(1).expand(shape)  # a single number on disk
    torch.save({"model": state}, tmp_path / "swinb.pth")
    swin = load_model(str(tmp_path / "swinb.pth")).config.backbone_config
    assert (swin.embed_dim, swin.window_size, swin.depths) == (128, 12, [2, 2, 18, 2])
    assert list(swin.num_heads) == [4, 8, 16, 32]


def test_an_original_of_another_width_is_refused(pth: Path, tmp_path: Path) -> None:
    state = torch.load(pth, weights_only=True)
    state["model"]["module.transformer.level_embed"] = torch.zeros(4, 128)
    torch.save(state, tmp_path / "narrow.pth")
    with pytest.raises(CheckpointError, match=r"narrow\.pth"):
        load_model(str(tmp_path / "narrow.pth"))


@pytest.mark.parametrize("content", [b"", b"hi\n", b"# a text file\n" * 50, b"PK\x03\x04broken"])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.pth is damaged or not a checkpoint"):
        read_state_dict(path)
