"""The command `failures`: what was given up, and another attempt at it."""

from collections.abc import Iterator

import pytest
from redis import Redis

from backend.cli.failures import drop_failures, list_failures, retry_failures
from backend.delivery.failures import Failure, Failures
from backend.delivery.outbox import Outbox
from backend.labelstudio.client import LabelStudioClient
from backend.registry.project_model import ProjectModel
from tests.delivery.deliveries import CREATED_AT, make_settings
from tests.label_studio_stand_in import LabelStudioStandIn
from tests.scenes import make_labeling_config, make_scenes

CONFIG = make_labeling_config(make_scenes(1))


@pytest.fixture
def stand_in() -> Iterator[LabelStudioStandIn]:
    with LabelStudioStandIn() as server:
        server.add_project(1, CONFIG, CREATED_AT, {number: {"image": f"{number}.png"} for number in range(1, 101)})
        yield server


@pytest.fixture
def failures(connection: Redis) -> Failures:
    failures = Failures(connection)
    failures.record("1", [Failure(n, "image", "the image is damaged", 0, "v") for n in range(1, 101)])
    return failures


def test_failures_are_listed_with_their_reasons(
    connection: Redis, redis_url: str, failures: Failures, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = make_settings(redis_url, "http://unused")
    assert list_failures(settings, "") == 1
    assert capsys.readouterr().out == "project 1: 100 tasks\n"
    assert list_failures(settings, "1") == 1
    first, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith("task 1: image: the image is damaged (attempt 1, ")
    assert list_failures(settings, "2") == 0


def test_failures_are_tried_again_all_of_them(
    connection: Redis, redis_url: str, stand_in: LabelStudioStandIn, failures: Failures
) -> None:
    stand_in.max_page_size = 20
    settings = make_settings(redis_url, stand_in.url, batch_size=8)
    version = ProjectModel(settings, CONFIG, "1", CREATED_AT).model_version
    row = {"task": 7, "result": [], "score": 0, "model_version": version}
    LabelStudioClient(stand_in.url, "key").import_predictions("1", [row])
    stand_in.delete_tasks(1, [8])
    assert retry_failures(settings, "1", []) == 0
    expected = set(range(1, 101)) - {7, 8}
    assert Outbox(connection).filter_pending("1", version, range(1, 101)) == expected
    assert failures.count("1") == 0


def test_some_failures_can_be_tried_again_or_dropped(
    connection: Redis, redis_url: str, stand_in: LabelStudioStandIn, failures: Failures
) -> None:
    settings = make_settings(redis_url, stand_in.url, batch_size=8)
    retry_failures(settings, "1", [1, 2, 500])
    assert failures.count("1") == 98
    drop_failures(settings, "1", [3])
    assert failures.count("1") == 97
    drop_failures(settings, "1", [])
    assert failures.count_by_project() == {}
