"""Pictures in folders: which there are, what they are called, and which of them are for validation."""

from __future__ import annotations

import glob
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from backend.errors import SettingsError

SUFFIXES = frozenset([".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".ppm"])


@dataclass(frozen=True)
class ImageFile:
    """A picture: its path, its path below the folder that was asked for, and its name in what is written."""

    path: Path
    key: str
    name: str

    def is_for_validation(self, share: float) -> bool:
        """Told by the key alone, so that the same picture stays where it is when others come."""
        place = int.from_bytes(hashlib.sha256(self.key.encode(errors="replace")).digest()[:4], "big")
        return place / 2**32 < share


def find_images(words: Sequence[str]) -> list[ImageFile]:
    """The pictures of files, folders (with all below them) and patterns, each once, by name.

    Raises:
        SettingsError: one of them leads to nothing.
    """
    found: dict[Path, str] = {}
    for word in words:
        rows = list(_of(word, is_alone=len(words) == 1))
        if not rows:
            raise SettingsError(f"{word}: no pictures there")
        for path, key in rows:
            found.setdefault(path.resolve(), key)
    return sorted(_named(found), key=lambda file: file.name)


def _of(word: str, is_alone: bool = False) -> Iterator[tuple[Path, str]]:
    """Pictures and their keys: paths as they were asked for, or below the one folder that was."""
    path = Path(word)
    if path.is_dir():
        base = path if is_alone else Path()
        yield from ((p, p.relative_to(base).as_posix().lstrip("/")) for p in path.rglob("*") if _is_picture(p))
    elif path.is_file():
        yield path, path.as_posix().lstrip("/")
    else:
        for match in glob.glob(word, recursive=True):
            yield from _of(match)


def _is_picture(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in SUFFIXES


def _named(found: dict[Path, str]) -> Iterator[ImageFile]:
    """Each keeps its name; those whose labels would share a file get their folders in front, or the suffix behind.

    Everything lies in one folder, because not all that read YOLO look into folders below.
    """
    stems = Counter(Path(key).stem for key in found.values())
    taken: set[str] = set()
    for path, key in found.items():
        name = path.name
        if stems[path.stem] > 1:
            name = key.replace("/", "__")
        if Path(name).stem in taken:
            name = f"{Path(name).stem}-{path.suffix[1:].lower()}{path.suffix}"
        taken.add(Path(name).stem)
        yield ImageFile(path, key, name)
