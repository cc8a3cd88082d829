"""Writes labeled images for training programs (YOLO, COCO), and as an import file for Label Studio."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from backend.boxes import Detection
from backend.datasets.image_files import ImageFile


@dataclass(frozen=True)
class LabeledImage:
    """An image with its detections.

    Attributes:
        file: the image file.
        width: in pixels, with the EXIF orientation applied.
        height: likewise.
        detections: the boxes that have a label.
        prediction: the same boxes, and those without a label, as Label Studio stores them.
    """

    file: ImageFile
    width: int
    height: int
    detections: tuple[Detection, ...]
    prediction: Mapping[str, Any]

    def get_split(self, validation_share: float) -> str:
        """Returns the name of the image's split, which is also its folder's: "train" or "val"."""
        return "val" if self.file.is_for_validation(validation_share) else "train"


def place_images(images: Sequence[LabeledImage], out: Path, validation_share: float) -> None:
    """Places the images in `images/train` and `images/val`: as hard links, or as copies where a link is impossible."""
    for image in images:
        path = out / "images" / image.get_split(validation_share) / image.file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        try:
            os.link(image.file.path.resolve(), path)
        except OSError:
            shutil.copyfile(image.file.path, path)


def write_yolo(images: Sequence[LabeledImage], labels: Sequence[str], out: Path, validation_share: float) -> None:
    """Writes `labels/train`, `labels/val` and `data.yaml`, as Ultralytics documents them.

    Each image has a text file with one line per box: class number, and centre and size relative to the image (0..1).
    The file of an image without boxes is empty: a negative.
    """
    for image in images:
        path = (out / "labels" / image.get_split(validation_share) / image.file.name).with_suffix(".txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = []
        for detection in image.detections:
            left, top, right, bottom = detection.box_xyxy
            x1, y1, x2, y2 = left / image.width, top / image.height, right / image.width, bottom / image.height
            cxcywh = ((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1)
            lines.append(f"{labels.index(detection.label)} {' '.join(f'{value:.6f}' for value in cxcywh)}\n")
        path.write_text("".join(lines))
    names = "".join(f"  {number}: {json.dumps(label, ensure_ascii=False)}\n" for number, label in enumerate(labels))
    root = json.dumps(str(out.resolve()), ensure_ascii=False)  # a JSON string is valid YAML
    (out / "data.yaml").write_text(f"path: {root}\ntrain: images/train\nval: images/val\nnames:\n{names}")


def write_coco(images: Sequence[LabeledImage], labels: Sequence[str], out: Path, validation_share: float) -> None:
    """Writes `annotations/train.json` and `annotations/val.json`; each annotation also has the `score` of its box.

    File names are relative to `images/train` and `images/val`.
    """
    categories = [{"id": number, "name": label, "supercategory": ""} for number, label in enumerate(labels, 1)]
    (out / "annotations").mkdir(exist_ok=True)
    for split in ("train", "val"):
        image_rows: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for image in images:
            if image.get_split(validation_share) != split:
                continue
            image_id = len(image_rows) + 1
            image_rows.append(
                {"id": image_id, "file_name": image.file.name, "width": image.width, "height": image.height}
            )
            for detection in image.detections:
                x1, y1, x2, y2 = detection.box_xyxy
                annotations.append(
                    {
                        "id": len(annotations) + 1, "image_id": image_id,
                        "category_id": labels.index(detection.label) + 1, "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "area": (x2 - x1) * (y2 - y1), "iscrowd": 0, "score": detection.score,
                    }
                )  # fmt: skip
        content = {"images": image_rows, "annotations": annotations, "categories": categories}
        (out / "annotations" / f"{split}.json").write_text(json.dumps(content))


def write_labelstudio(
    images: Sequence[LabeledImage], label_config: str, image_field: str, out: Path, validation_share: float
) -> None:
    """Writes `labelstudio.json`, tasks with predictions to import, and `labelstudio.xml`, their labeling config.

    The tasks refer to the images as local files: LOCAL_FILES_DOCUMENT_ROOT must be the folder that holds `out`.
    """
    tasks = []
    for image in images:
        path = f"{out.resolve().name}/images/{image.get_split(validation_share)}/{image.file.name}"
        data = {image_field: f"/data/local-files/?d={quote(path)}"}
        tasks.append({"data": data, "predictions": [dict(image.prediction)]})
    (out / "labelstudio.json").write_text(json.dumps(tasks))
    (out / "labelstudio.xml").write_text(label_config)
