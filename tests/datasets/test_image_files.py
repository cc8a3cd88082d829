from pathlib import Path

import pytest

from backend.datasets.image_files import find_images
from backend.errors import SettingsError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("a/1.jpg", "b/1.jpg", "b/2.PNG", "b/deep/3.webp", "b/2.jpg", "b/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def list_keys(*arguments: str) -> list[str]:
    return sorted(file.key for file in find_images(arguments))


def test_images_of_folders_files_and_patterns_are_found_once(folder: Path) -> None:
    assert list_keys(".") == ["a/1.jpg", "b/1.jpg", "b/2.PNG", "b/2.jpg", "b/deep/3.webp"]
    assert list_keys("b") == ["1.jpg", "2.PNG", "2.jpg", "deep/3.webp"]
    assert list_keys("a", "b/2.jpg") == ["a/1.jpg", "b/2.jpg"]
    assert list_keys("*/1.jpg") == ["a/1.jpg", "b/1.jpg"]
    assert list_keys("a", "a/1.jpg", "*/1.jpg") == ["a/1.jpg", "b/1.jpg"]  # each once


def test_names_are_kept_where_they_can_be_and_never_shared(folder: Path) -> None:
    names = {file.key: file.name for file in find_images(["."])}
    assert names["b/deep/3.webp"] == "3.webp"
    assert (names["a/1.jpg"], names["b/1.jpg"]) == ("a__1.jpg", "b__1.jpg")
    stems = [Path(name).stem for name in names.values()]
    assert len(set(stems)) == len(stems)  # 2.jpg and 2.PNG would share a label file


def test_an_image_stays_in_its_split_when_others_are_added(folder: Path) -> None:
    before = {file.key: file.is_for_validation(0.4) for file in find_images(["b"])}
    for number in range(200):
        (folder / "b" / f"new{number}.jpg").write_bytes(b"x")
    after = {file.key: file.is_for_validation(0.4) for file in find_images(["b"])}
    assert {key: after[key] for key in before} == before
    assert 50 < sum(after.values()) < 110


def test_excluded_folders_are_left_out(folder: Path) -> None:
    files = find_images(["."], excluded_folders=[Path("b/deep"), folder / "a", Path("missing")])
    assert sorted(file.key for file in files) == ["b/1.jpg", "b/2.PNG", "b/2.jpg"]
    with pytest.raises(SettingsError, match="a: no images there"):
        find_images(["a", "b"], excluded_folders=[folder / "a"])


def test_an_argument_without_images_is_an_error(folder: Path) -> None:
    with pytest.raises(SettingsError, match="none: no images there"):
        find_images(["a", "none"])
