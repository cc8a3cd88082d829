"""Boxes in the forms that training programs read: YOLO and COCO files, and an import file of Label Studio."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from backend.datasets.image_files import ImageFile

Box = tuple[float, float, float, float]  # xyxy in pixels of the picture as it is shown


@dataclass(frozen=True)
class LabeledImage:
    """One picture with what was found in it: boxes with labels and scores; its size is in pixels as it is shown."""

    file: ImageFile
    width: int
    height: int
    boxes: tuple[tuple[str, float, Box], ...]
    prediction: Mapping[str, Any]  # as the worker answered

    def split(self, share: float) -> str:
        """The folder that it belongs into."""
        return "val" if self.file.is_for_validation(share) else "train"


def place_images(rows: Sequence[LabeledImage], out: Path, share: float) -> None:
    """`images/train`, `images/val`: links to the pictures, or copies where the disk is another; never re-encoded."""
    for row in rows:
        path = out / "images" / row.split(share) / row.file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        try:
            os.link(row.file.path.resolve(), path)
        except OSError:
            shutil.copyfile(row.file.path, path)


def write_yolo(rows: Sequence[LabeledImage], labels: Sequence[str], out: Path, share: float) -> None:
    """`labels/train`, `labels/val`, `data.yaml`: class, centre and size in 0..1; no boxes make an empty file."""
    for row in rows:
        path = (out / "labels" / row.split(share) / row.file.name).with_suffix(".txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{labels.index(label)} {_centred(box, row)}\n" for label, _, box in row.boxes))
    names = "".join(f"  {number}: {json.dumps(label, ensure_ascii=False)}\n" for number, label in enumerate(labels))
    root = json.dumps(str(out.resolve()), ensure_ascii=False)  # JSON's strings are YAML's as well
    (out / "data.yaml").write_text(f"path: {root}\ntrain: images/train\nval: images/val\nnames:\n{names}")


def _centred(box: Box, row: LabeledImage) -> str:
    x1, y1, x2, y2 = box[0] / row.width, box[1] / row.height, box[2] / row.width, box[3] / row.height
    return " ".join(f"{value:.6f}" for value in ((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1))


def write_coco(rows: Sequence[LabeledImage], labels: Sequence[str], out: Path, share: float) -> None:
    """`annotations/train.json`, `annotations/val.json`; file names are those below `images/train`, `images/val`."""
    categories = [{"id": number, "name": label, "supercategory": ""} for number, label in enumerate(labels, 1)]
    (out / "annotations").mkdir(exist_ok=True)
    for split in ("train", "val"):
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for row in rows:
            if row.split(share) != split:
                continue
            images.append({"id": len(images) + 1, "file_name": row.file.name, "width": row.width, "height": row.height})
            for label, score, (x1, y1, x2, y2) in row.boxes:
                annotations.append(
                    {
                        "id": len(annotations) + 1, "image_id": len(images), "category_id": labels.index(label) + 1,
                        "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": 0, "score": score,
                    }
                )  # fmt: skip
        whole = {"images": images, "annotations": annotations, "categories": categories}
        (out / "annotations" / f"{split}.json").write_text(json.dumps(whole))


def write_labelstudio(rows: Sequence[LabeledImage], out: Path, share: float, field: str) -> None:
    """`labelstudio.json`: tasks with predictions, the pictures as local files below the folder that `out` lies in."""
    tasks = []
    for row in rows:
        path = f"{out.resolve().name}/images/{row.split(share)}/{row.file.name}"
        data = {field: f"/data/local-files/?d={quote(path)}"}
        tasks.append({"data": data, "predictions": [dict(row.prediction)]})
    (out / "labelstudio.json").write_text(json.dumps(tasks))
