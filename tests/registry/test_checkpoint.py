import pytest

from backend.errors import CheckpointError
from backend.labelstudio.labeling_config import read_plan
from backend.registry.checkpoint import find_checkpoint

CONFIG = (
    '<View><Image name="i" value="$i"/><RectangleLabels name="l" toName="i"><Label value="a"/></RectangleLabels></View>'
)


def test_the_demo_is_found_by_its_name() -> None:
    checkpoint = find_checkpoint("demo")
    assert checkpoint.make_model_version().startswith("demo-")


def test_weights_and_plan_change_the_version(tmp_path) -> None:
    (tmp_path / "weights").write_bytes(b"1")
    first = find_checkpoint(str(tmp_path))
    plans = [None, *(read_plan(CONFIG, threshold, nms) for threshold, nms in [(0.3, 0.7), (0.4, 0.7), (0.3, 0.8)])]
    versions = {first.make_model_version(plan) for plan in plans}
    assert versions == {find_checkpoint(str(tmp_path)).make_model_version(plan) for plan in plans}
    (tmp_path / "weights").write_bytes(b"2")
    versions |= {find_checkpoint(str(tmp_path)).make_model_version(plan) for plan in plans}
    assert len(versions) == 8


def test_an_original_file_is_named_after_itself(tmp_path) -> None:
    (tmp_path / "swint.pth").write_bytes(b"x")
    assert find_checkpoint(str(tmp_path / "swint.pth")).name == "swint"


def test_a_hub_id_is_taken_as_it_is() -> None:
    checkpoint = find_checkpoint("IDEA-Research/grounding-dino-tiny")
    assert (checkpoint.name, checkpoint.source) == ("grounding-dino-tiny", "IDEA-Research/grounding-dino-tiny")


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere", "nowhere", "a/b/c", "gone.pth", "owner/gone.pth", "~/x"])
def test_the_error_for_a_missing_path_names_the_alternatives(model: str) -> None:
    with pytest.raises(CheckpointError, match=r"a folder, an original \.pth file, a hub id"):
        find_checkpoint(model)
