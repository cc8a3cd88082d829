import json
from pathlib import Path

import pytest

from backend.errors import CheckpointError
from backend.labelstudio.labeling_config import read_plan
from backend.registry.versions import CURRENT, VERSION_FILE, WEIGHTS, Version, VersionStore

CONFIG = (
    '<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image">'
    '<Label value="cat"/><Label value="dog" model_score_threshold="0.6"/></RectangleLabels></View>'
)


@pytest.fixture
def versions(tmp_path: Path) -> VersionStore:
    return VersionStore(tmp_path, "7")


def make_version(number: int, parent: str = "", **more: object) -> Version:
    return Version(id=f"v-{number:04}", checkpoint="c", parent=parent, created=1, **more)


def add_and_promote(versions: VersionStore, number: int, parent: str = "") -> Version:
    version = versions.add(make_version(number, parent), lambda path: path.write_bytes(b"weights %d" % number))
    versions.promote(version.id)
    return version


def test_a_promoted_version_serves_and_rolling_back_goes_one_step(versions: VersionStore) -> None:
    assert versions.get_serving("c") is None
    first = add_and_promote(versions, 1)
    second = add_and_promote(versions, 2, first.id)
    assert versions.get_serving("c") == second
    assert first.weights != second.weights
    assert versions.roll_back() == first.id
    assert versions.get_serving("c") == first
    assert versions.roll_back() == ""
    assert versions.get_serving("c") is None
    with pytest.raises(CheckpointError, match="by the base checkpoint already"):
        versions.roll_back()
    assert [version.id for version in versions.list_versions()] == [first.id, second.id]


def test_rolling_back_leads_to_the_version_that_served_before(versions: VersionStore) -> None:
    first, second = add_and_promote(versions, 1), add_and_promote(versions, 2, "v-0001")
    versions.promote(first.id)
    assert versions.roll_back() == second.id
    versions.promote(first.id)
    versions.promote(second.id)
    (versions.folder / first.id / WEIGHTS).unlink()
    assert versions.roll_back() == ""  # past the damaged one


@pytest.mark.parametrize("damage", ["weights", "version file", "missing", "empty"])
def test_a_damaged_version_is_refused_and_the_one_before_serves(versions: VersionStore, damage: str) -> None:
    first = add_and_promote(versions, 1)
    second = add_and_promote(versions, 2, first.id)
    folder = versions.folder / second.id
    if damage == "weights":
        (folder / WEIGHTS).write_bytes(b"weights X")
    elif damage == "empty":
        (folder / WEIGHTS).write_bytes(b"")
    elif damage == "missing":
        (folder / WEIGHTS).unlink()
    else:
        row = json.loads((folder / VERSION_FILE).read_text())
        del row["thresholds"]
        (folder / VERSION_FILE).write_text(json.dumps(row))
    assert versions.get_serving("c") == first
    assert versions.list_versions() == [first]
    with pytest.raises(CheckpointError, match="damaged"):
        versions.promote(second.id)


def test_the_base_checkpoint_serves_if_the_current_file_is_damaged(versions: VersionStore) -> None:
    add_and_promote(versions, 1)
    (versions.folder / CURRENT).write_text("{")
    assert versions.get_serving("c") is None


def test_a_version_of_another_checkpoint_or_project_does_not_serve(versions: VersionStore) -> None:
    version = add_and_promote(versions, 1)
    assert versions.get_serving("other") is None
    assert versions.get_serving("c", created_at=2) is None
    assert versions.get_serving("c", created_at=1) == version


def test_a_full_disk_leaves_nothing_behind(versions: VersionStore) -> None:
    first = add_and_promote(versions, 1)

    def full(path: Path) -> None:
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        versions.add(make_version(2, first.id), full)
    assert sorted(path.name for path in versions.folder.iterdir()) == [CURRENT, first.id]
    assert versions.get_serving("c") == first


@pytest.mark.parametrize("name", ["../../etc", "/etc/passwd", "a/b", ".", "", "x" * 99, "A b"])
def test_names_that_are_paths_are_refused(versions: VersionStore, tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="not the name"):
        versions.get(name)
    with pytest.raises(CheckpointError, match="not the number"):
        VersionStore(tmp_path, name)


def test_trained_thresholds_replace_the_ones_they_were_trained_from() -> None:
    plan = read_plan(CONFIG, 0.3, 0.7)
    version = make_version(
        1, thresholds={"label": {"cat": (0.3, 0.42), "dog": (0.5, 0.1), "gone": (0.3, 0.9)}, "other": {}}
    )
    labels = version.apply_to(plan).controls[0].labels
    assert [label.threshold for label in labels] == [0.42, 0.6]  # the dog's was changed in the config since
