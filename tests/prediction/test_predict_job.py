"""The predict job with odd chunks and broken devices; test_served.py covers the whole way through HTTP."""

import json
import subprocess
import sys
from collections.abc import Sequence

import pytest
from redis import Redis

from backend.errors import MessageError
from backend.prediction.job_report import JobReport
from backend.prediction.predict_job import EXIT_BROKEN_DEVICE, ChunkRun, Predictor
from backend.queue.messages import Answer, ChunkTask, TaskError
from backend.queue.recovery import LostChunk
from backend.registry.project_model import ProjectModel
from backend.settings import Settings
from tests.chunks import make_chunk
from tests.scenes import make_labeling_config, make_scenes, to_data_uri
from tests.servers import ROOT

SETTINGS = Settings(model="demo")
SCENES = make_scenes(3)
CONFIG = make_labeling_config(SCENES)
PAGED = CONFIG.replace('value="$image"', 'valueList="$pages"', 1)

BREAKS_THE_DEVICE = """
import json, sys, torch
from backend.prediction.predict_job import Predictor
from backend.settings import Settings
predictor = Predictor(Settings(model="demo"))
def fail(*_):
    raise {error}
predictor.detectors.base.model.model.backbone.conv_encoder.model.register_forward_pre_hook(fail)
print(json.dumps(predictor.predict(json.loads(sys.stdin.read()))))
"""


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor(SETTINGS)


def make_chunk_of(config: str, *data: dict[str, object]):
    tasks = [{"id": number, "data": row} for number, row in enumerate(data, 1)]
    return ProjectModel(SETTINGS, config).make_chunks(tasks, len(tasks))[0]


def test_a_task_that_raises_fails_alone_in_the_second_attempt(
    predictor: Predictor, connection: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk = make_chunk_of(CONFIG, *({"image": to_data_uri(scene.image)} for scene in SCENES))
    run = ChunkRun(predictor, predictor.detectors.base, chunk.plan, "v", JobReport(predictor.thumbnails))
    original = ChunkRun.predict_tasks

    def raise_at_two(self: ChunkRun, tasks: Sequence[ChunkTask]) -> list[Answer]:
        if any(task.id == 2 for task in tasks):
            raise ValueError("odd")
        return original(self, tasks)

    monkeypatch.setattr(ChunkRun, "predict_tasks", raise_at_two)
    answers = run.predict_one_by_one(chunk.tasks, LostChunk(connection, chunk.id))
    codes = [answer.error.code if isinstance(answer, TaskError) else "" for answer in answers]
    assert codes == ["", "internal", ""]


def test_each_task_gets_the_regions_of_its_own_images(predictor: Predictor) -> None:
    uris = [to_data_uri(scene.image) for scene in SCENES]
    pages = [[uris[0], uris[1]], [], [uris[2]], ["data:,x", uris[0]], [uris[1], uris[1], uris[0]]]
    answers = predictor.predict(make_chunk_of(PAGED, *({"pages": uris} for uris in pages)).payload)["answers"]
    alone = {
        uri: predictor.predict(make_chunk_of(CONFIG, {"image": uri}).payload)["answers"][0]["result"] for uri in uris
    }
    for answer, uris_of_task in zip(answers, pages, strict=True):
        if not uris_of_task or "data:,x" in uris_of_task:
            assert answer["error"]["code"] == "image"
            continue
        for index, uri in enumerate(uris_of_task):
            boxes = [(r["score"], r["value"]["x"]) for r in answer["result"] if r["item_index"] == index]
            assert boxes == [
                (pytest.approx(r["score"], abs=2e-4), pytest.approx(r["value"]["x"], abs=0.01)) for r in alone[uri]
            ]


def test_a_chunk_of_another_checkpoint_is_refused_task_by_task(predictor: Predictor) -> None:
    answers = predictor.predict(make_chunk({"id": 1}, {"id": 2}, checkpoint="other").payload)["answers"]
    assert [answer["error"]["code"] for answer in answers] == ["checkpoint", "checkpoint"]


def test_a_chunk_of_another_version_of_the_backend_fails_as_a_whole(predictor: Predictor) -> None:
    with pytest.raises(MessageError, match="upgrade with an empty queue"):
        predictor.predict({"tasks": [], "plan": {"controls": []}})


@pytest.mark.parametrize(
    ("error", "status"),
    [
        ('torch.AcceleratorError("CUDA error: an illegal memory access was encountered")', EXIT_BROKEN_DEVICE),
        ('ValueError("of the model")', 1),
    ],
)  # fmt: skip
def test_an_error_of_the_device_ends_the_worker(error: str, status: int) -> None:
    chunk = make_chunk_of(CONFIG, {"image": to_data_uri(SCENES[0].image)})
    done = subprocess.run(
        [sys.executable, "-c", BREAKS_THE_DEVICE.format(error=error)],
        input=json.dumps(chunk.payload), cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    assert ("the worker ends" in done.stderr) == (status == EXIT_BROKEN_DEVICE)
