"""A folder of pictures labelled through the queue; what is answered is kept as it comes, so that it can go on."""

from __future__ import annotations

import base64
import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

from PIL import Image
from redis import Redis

from backend.datasets.formats import LabeledImage
from backend.datasets.image_files import ImageFile
from backend.errors import SettingsError
from backend.images.decoding import read_oriented_size
from backend.labelstudio.labeling_config import Plan
from backend.labelstudio.regions import read_label
from backend.queue.predict_queue import PredictQueue
from backend.registry.project_model import ProjectModel
from backend.settings import Settings

CHUNKS_A_WORKER, MAX_BYTES_IN_FLIGHT = 3, 64_000_000  # on their way at a time; the pictures travel through Redis
POLL_INTERVAL = 0.02  # s between looks
IMAGE_FIELD = "image"
ANSWERS = ".answers.jsonl"  # in the folder that is written

Row = dict[str, Any]  # key, and prediction or error


def make_labeling_config(labels: Sequence[str]) -> str:
    """The labeling config that looks for these labels."""
    rows = "".join(f"<Label value={quoteattr(label)}/>" for label in labels)
    image = f'<Image name="image" value="${IMAGE_FIELD}"/>'
    return f'<View>{image}<RectangleLabels name="label" toName="image">{rows}</RectangleLabels></View>'


class LabelingRun:
    """One run over some pictures."""

    def __init__(self, settings: Settings, connection: Redis, label_config: str, out: Path) -> None:
        """Reads the config; raises LabelingConfigError or SettingsError where it cannot serve for a folder."""
        self._settings, self._queue = settings, PredictQueue(connection)
        self.project_model = ProjectModel(settings, label_config)
        self.label_config, self.field = label_config, _field_of(self.project_model.plan)
        self._kept = out / ANSWERS

    @property
    def labels(self) -> list[str]:
        """All labels in their order; their places are YOLO's class numbers."""
        rows = [label.name for control in self.project_model.plan.controls for label in control.labels]
        return list(dict.fromkeys(rows))

    def kept(self) -> dict[str, Row]:
        """What is answered already, by key; nothing of another version, and no failures: they are tried again."""
        if not self._kept.exists():
            return {}
        rows = list(_readable(self._kept.read_text().splitlines()))
        if not rows or rows[0] != {"model_version": self.project_model.model_version}:
            return {}
        return {row["key"]: row for row in rows[1:] if "prediction" in row}

    def run(self, files: Sequence[ImageFile], on_answer: Callable[[Row], object]) -> None:
        """Labels the pictures that are not yet; raises QueueUnavailable where Redis does not answer."""
        done = self.kept()
        aside = self._kept.with_suffix(".new")
        rows = [{"model_version": self.project_model.model_version}, *done.values()]
        aside.write_text("".join(json.dumps(row) + "\n" for row in rows))  # without what a kill cut off
        aside.replace(self._kept)
        with self._kept.open("a") as file:
            for row in self._answers([file for file in files if file.key not in done]):
                file.write(json.dumps(row) + "\n")
                file.flush()
                on_answer(row)

    def _answers(self, files: Sequence[ImageFile]) -> Iterator[Row]:
        waiting, open_ = deque(files), deque[tuple[list[ImageFile], dict[str, Any], int]]()
        while waiting or open_:
            while waiting and self._has_room(open_):
                size = self._settings.batch_size or self._queue.batch_size()  # workers may be starting yet
                piece = [waiting.popleft() for _ in range(min(size, len(waiting)))]
                yield from self._send(piece, open_)
            if open_ and (answers := self._answered(open_[0][1])) is not None:
                piece, payload, _ = open_.popleft()
                yield from ({"key": file.key, **_kept(answer)} for file, answer in zip(piece, answers, strict=True))
                self._queue.delete(payload)
            elif open_:
                time.sleep(POLL_INTERVAL)

    def _has_room(self, open_: Sequence[tuple[list[ImageFile], dict[str, Any], int]]) -> bool:
        if sum(size for *_, size in open_) > MAX_BYTES_IN_FLIGHT:
            return False
        return len(open_) < CHUNKS_A_WORKER * max(self._queue.count_ready_workers(), 1)

    def _send(self, files: Sequence[ImageFile], open_: deque[Any]) -> Iterator[Row]:
        """Puts a chunk on its way; the files that cannot be read are answered at once."""
        read, tasks, total = [], [], 0
        for file in files:
            try:
                body = file.path.read_bytes()
            except OSError as error:
                yield {"key": file.key, "error": f"the file cannot be read ({error.strerror})"}
                continue
            read.append(file)
            total += len(body)
            uri = "data:;base64," + base64.b64encode(body).decode()
            tasks.append({"id": file.key, "data": {self.field: uri}})  # the same picture twice is two jobs
        for payload in self.project_model.make_chunks(tasks, max(len(tasks), 1)):
            self._queue.enqueue([payload])
            open_.append((read, payload, total))

    def _answered(self, payload: Mapping[str, Any]) -> list[Any] | None:
        answers, state = self._queue.get_result(dict(payload))
        if state in ("failed", "gone"):
            failed = {"error": {"detail": "the worker failed on this picture; its log says why"}}
            return [failed] * len(payload["tasks"])
        return answers


def _readable(lines: Sequence[str]) -> Iterator[Row]:
    """The rows of a file whose last line may be cut off."""
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            return


def _kept(answer: Mapping[str, Any]) -> Row:
    return {"error": answer["error"]["detail"]} if "error" in answer else {"prediction": dict(answer)}


def _field_of(plan: Plan) -> str:
    values = {control.image for control in plan.controls}
    if len(values) != 1 or any(control.has_pages or control.repeat for control in plan.controls):
        raise SettingsError("a folder can be labelled with a config of one Image whose value is a field of the task")
    (value,) = values
    if not value.startswith("$") or not value[1:].isidentifier():
        raise SettingsError(f"to label a folder, the Image must have a field such as $image as value, not {value!r}")
    return value[1:]


def to_labeled_image(file: ImageFile, row: Row) -> LabeledImage:
    """A row that was answered, as it is written."""
    with Image.open(file.path) as image:
        width, height = read_oriented_size(image)
    regions = [region for region in row["prediction"]["result"] if read_label(region)]
    boxes = tuple((read_label(region), region["score"], _box(region, width, height)) for region in regions)
    return LabeledImage(file, width, height, boxes, row["prediction"])


def _box(region: Mapping[str, Any], width: int, height: int) -> tuple[float, float, float, float]:
    value = region["value"]
    x, y = value["x"] * width / 100, value["y"] * height / 100
    return x, y, x + value["width"] * width / 100, y + value["height"] * height / 100
