"""A labeling run: a folder of images through the queue; every answer is saved, so that the run can resume."""

from __future__ import annotations

import base64
import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

from PIL import Image
from redis import Redis

from backend.boxes import Box, Detection
from backend.datasets.formats import LabeledImage
from backend.datasets.image_files import ImageFile
from backend.errors import BackendError, SettingsError
from backend.images.decoding import read_oriented_size
from backend.labelstudio.labeling_config import Plan
from backend.labelstudio.regions import read_label
from backend.queue.backlogs import Place
from backend.queue.messages import Answer, Chunk, TaskError
from backend.queue.predict_queue import ChunkState, PredictQueue, delete_chunk, get_result
from backend.registry.project_model import ProjectModel
from backend.settings import Settings

CHUNKS_PER_WORKER, MAX_BYTES_IN_FLIGHT = 3, 64_000_000  # enqueued at a time; the images travel through Redis
POLL_INTERVAL = 0.02  # s
IMAGE_FIELD = "image"
ANSWERS_FILE = ".answers.jsonl"  # in the folder that is written: the model version, then one row per image

Row = dict[str, Any]  # key, and prediction or error

CHUNK_FAILED = TaskError.from_error(BackendError("the worker failed on this image; its log says why"))


def make_labeling_config(labels: Sequence[str]) -> str:
    """Makes the labeling config that detects these labels."""
    label_tags = "".join(f"<Label value={quoteattr(label)}/>" for label in labels)
    image = f'<Image name="image" value="${IMAGE_FIELD}"/>'
    return f'<View>{image}<RectangleLabels name="label" toName="image">{label_tags}</RectangleLabels></View>'


@dataclass(frozen=True)
class SentChunk:
    """An enqueued chunk, the file of each of its tasks, and the bytes of these files."""

    chunk: Chunk
    files: Sequence[ImageFile]
    size: int


class LabelingRun:
    """One run over some images."""

    def __init__(self, settings: Settings, connection: Redis, label_config: str, out: Path) -> None:
        """Reads the config; raises LabelingConfigError or SettingsError if it does not suit a folder."""
        self.project_model = ProjectModel(settings, label_config)
        self._settings, self._connection = settings, connection
        self._queue = PredictQueue(connection, self.project_model.checkpoint.fingerprint)
        self.label_config, self.field = label_config, _read_image_field(self.project_model.plan)
        self._answers_path = out / ANSWERS_FILE

    @property
    def labels(self) -> list[str]:
        """All labels in the order of the config; their indices are YOLO's class numbers."""
        names = [label.name for control in self.project_model.plan.controls for label in control.labels]
        return list(dict.fromkeys(names))

    def load_predictions(self) -> dict[str, Row]:
        """Loads the saved rows with a prediction by key; none of another model version. Failures are tried again."""
        if not self._answers_path.exists():
            return {}
        rows = list(_parse_rows(self._answers_path.read_text().splitlines()))
        if not rows or rows[0] != {"model_version": self.project_model.model_version}:
            return {}
        return {row["key"]: row for row in rows[1:] if "prediction" in row}

    def run(self, files: Sequence[ImageFile], on_answer: Callable[[Row], object]) -> None:
        """Labels the images that have no prediction yet; raises QueueUnavailable where Redis does not answer."""
        done = self.load_predictions()
        temporary = self._answers_path.with_suffix(".new")
        rows = [{"model_version": self.project_model.model_version}, *done.values()]
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))  # without a row that a kill cut off
        temporary.replace(self._answers_path)
        with self._answers_path.open("a") as file:
            for row in self._predict([file for file in files if file.key not in done]):
                file.write(json.dumps(row) + "\n")
                file.flush()
                on_answer(row)

    def _predict(self, files: Sequence[ImageFile]) -> Iterator[Row]:
        """Yields a row for each file; keeps the workers busy without filling Redis."""
        waiting, sent = deque(files), deque[SentChunk]()
        while waiting or sent:
            while waiting and self._has_room(sent):
                size = self._settings.batch_size or self._queue.get_batch_size()  # workers may still be starting
                yield from self._send([waiting.popleft() for _ in range(min(size, len(waiting)))], sent)
            if not sent:
                continue
            result = get_result(self._connection, sent[0].chunk.id)
            if result.state is ChunkState.WAITING:
                time.sleep(POLL_INTERVAL)
                continue
            first = sent.popleft()
            answers: Sequence[Answer] = result.answers or [CHUNK_FAILED] * len(first.files)
            for file, answer in zip(first.files, answers, strict=True):
                if isinstance(answer, TaskError):
                    yield {"key": file.key, "error": answer.error.detail}
                else:
                    yield {"key": file.key, "prediction": answer.model_dump()}
            delete_chunk(self._connection, first.chunk.id)

    def _has_room(self, sent: Sequence[SentChunk]) -> bool:
        if sum(chunk.size for chunk in sent) > MAX_BYTES_IN_FLIGHT:
            return False
        return len(sent) < CHUNKS_PER_WORKER * max(len(self._queue.get_ready_workers()), 1)

    def _send(self, files: Sequence[ImageFile], sent: deque[SentChunk]) -> Iterator[Row]:
        """Enqueues a chunk; yields an error row for each file that cannot be read."""
        readable, tasks, size = [], [], 0
        for file in files:
            try:
                body = file.path.read_bytes()
            except OSError as error:
                yield {"key": file.key, "error": f"the file cannot be read ({error.strerror})"}
                continue
            readable.append(file)
            size += len(body)
            uri = "data:;base64," + base64.b64encode(body).decode()
            tasks.append({"id": file.key, "data": {self.field: uri}})  # the key keeps equal images in jobs of their own
        for chunk in self.project_model.make_chunks(tasks, max(len(tasks), 1)):
            self._queue.enqueue([chunk], Place.BACKLOG)
            sent.append(SentChunk(chunk, readable, size))


def _parse_rows(lines: Sequence[str]) -> Iterator[Row]:
    """Parses the rows of a file whose last line may be cut off."""
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            return


def _read_image_field(plan: Plan) -> str:
    """Returns the task field of the one image of a plan; raises SettingsError where it is not that simple."""
    values = {control.image_value for control in plan.controls}
    if len(values) != 1 or any(control.is_multi_page or control.repeater_items for control in plan.controls):
        raise SettingsError("a folder can be labeled with a config of one Image whose value is a field of the task")
    (value,) = values
    if not value.startswith("$") or not value[1:].isidentifier():
        raise SettingsError(f"to label a folder, the Image must have a field such as $image as value, not {value!r}")
    return value[1:]


def to_labeled_image(file: ImageFile, row: Row) -> LabeledImage:
    """Converts a row with a prediction to boxes in pixels; reads the image's size from its file."""
    with Image.open(file.path) as image:
        width, height = read_oriented_size(image)
    detections = tuple(
        Detection(_to_pixels(region, width, height), region["score"], read_label(region))
        for region in row["prediction"]["result"]
        if read_label(region)
    )
    return LabeledImage(file, width, height, detections, row["prediction"])


def _to_pixels(region: Mapping[str, Any], width: int, height: int) -> Box:
    """Converts a region's box from percent to xyxy in pixels."""
    value = region["value"]
    x, y = value["x"] * width / 100, value["y"] * height / 100
    return x, y, x + value["width"] * width / 100, y + value["height"] * height / 100
