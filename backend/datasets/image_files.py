"""Image files in folders: which there are, their names in the dataset, and their split."""

from __future__ import annotations

import glob
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from backend.errors import SettingsError

SUFFIXES = frozenset([".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".ppm"])


@dataclass(frozen=True)
class ImageFile:
    """An image file.

    Attributes:
        path: where the file is.
        key: its path below the given folder, or as it was given; no other file of the run has it.
        name: its file name in the dataset; no other file of the run has it, even without the suffix.
    """

    path: Path
    key: str
    name: str

    def is_for_validation(self, validation_share: float) -> bool:
        """Returns whether the image is in the validation split, which gets this share of all images (0..1).

        The key alone decides, so that an image stays in its split when others are added.
        """
        digest = hashlib.sha256(self.key.encode(errors="replace")).digest()
        return int.from_bytes(digest[:4], "big") / 2**32 < validation_share


def find_images(arguments: Sequence[str], excluded_folders: Sequence[Path] = ()) -> list[ImageFile]:
    """Finds the images of files, folders (recursively) and glob patterns, each once.

    Args:
        arguments: the files, folders and patterns.
        excluded_folders: folders whose images are left out, such as those that the run itself writes.

    Returns:
        The images, sorted by name.

    Raises:
        SettingsError: one of the arguments leads to no image.
    """
    excluded = [folder.resolve() for folder in excluded_folders]
    keys: dict[Path, str] = {}  # by resolved path
    for argument in arguments:
        has_images = False
        for path, key in _list_images(argument, is_alone=len(arguments) == 1):
            resolved = path.resolve()
            if not any(resolved.is_relative_to(folder) for folder in excluded):
                has_images = True
                keys.setdefault(resolved, key)
        if not has_images:
            raise SettingsError(f"{argument}: no images there")
    return sorted(_assign_names(keys), key=lambda file: file.name)


def _list_images(argument: str, is_alone: bool = False) -> Iterator[tuple[Path, str]]:
    """Yields paths and keys; a key is relative to the folder where that is the only argument."""
    path = Path(argument)
    if path.is_dir():
        base = path if is_alone else Path()
        for child in path.rglob("*"):
            if child.is_file() and child.suffix.lower() in SUFFIXES:
                yield child, child.relative_to(base).as_posix().lstrip("/")
    elif path.is_file():
        yield path, path.as_posix().lstrip("/")
    else:
        for match in glob.glob(argument, recursive=True):
            yield from _list_images(match)


def _assign_names(keys: Mapping[Path, str]) -> Iterator[ImageFile]:
    """Yields the files with their names.

    All images of a split share one folder, because not every reader of YOLO datasets looks into subfolders. Each file
    keeps its name, except those whose label files would have the same name: these get their folders as a prefix, or
    else their suffix behind the stem.
    """
    stem_counts = Counter(Path(key).stem for key in keys.values())
    taken_stems: set[str] = set()
    for path, key in keys.items():
        name = path.name
        if stem_counts[path.stem] > 1:
            name = key.replace("/", "__")
        if Path(name).stem in taken_stems:
            name = f"{Path(name).stem}-{path.suffix[1:].lower()}{path.suffix}"
        taken_stems.add(Path(name).stem)
        yield ImageFile(path, key, name)
