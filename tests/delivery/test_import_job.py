"""New tasks are predicted, of each project on its own."""

from collections.abc import Iterator

import pytest
from redis import Redis

from backend.delivery import import_job
from backend.delivery.deliver_worker import running_workers
from backend.delivery.import_job import ImportPredictor
from backend.delivery.imported_projects import get_cursor, list_imported, record_import, remove_imported, save_cursor
from backend.delivery.outbox import Outbox
from backend.labelstudio.client import LabelStudioClient
from tests.delivery.deliveries import CREATED_AT, make_settings, running_predict_worker
from tests.label_studio_stand_in import LabelStudioStandIn
from tests.scenes import make_labeling_config, make_scenes
from tests.servers import wait_for

pytestmark = pytest.mark.timeout(60)

CONFIG = make_labeling_config(make_scenes(1))
NO_IMAGE = '<View><Text name="t" value="$t"/></View>'


@pytest.fixture
def stand_in() -> Iterator[LabelStudioStandIn]:
    with LabelStudioStandIn() as server:
        for project, config in ((1, CONFIG), (2, CONFIG), (3, NO_IMAGE), (4, CONFIG)):
            tasks = {project * 100 + number: {"image": f"{number}.png"} for number in range(20)}
            server.add_project(project, config, CREATED_AT, tasks)
        yield server


def test_a_project_in_trouble_holds_up_no_other(
    connection: Redis, redis_url: str, stand_in: LabelStudioStandIn
) -> None:
    settings, label_studio = make_settings(redis_url, stand_in.url), LabelStudioClient(stand_in.url, "key")
    stand_in.fail(4, 403)
    for project in ("999999", "3", "4", "1", "2"):  # one that does not exist, one without images, one that refuses
        record_import(connection, project)
    with running_predict_worker(redis_url), running_workers(settings, label_studio):
        for project in (1, 2):
            wait_for(lambda project=project: len(stand_in.count_by_task(project)) == 20, 20, "its predictions")
        assert [project for project, _ in list_imported(connection)] == ["4"]
        stand_in.heal()
        wait_for(lambda: len(stand_in.count_by_task(4)) == 20, 20, "its predictions")
    assert {count for project in (1, 2, 4) for count in stand_in.count_by_task(project).values()} == {1}


def test_a_job_sends_no_more_than_may_wait_and_goes_on_later(
    connection: Redis, redis_url: str, stand_in: LabelStudioStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_job, "MAX_PENDING_CHUNKS", 2)
    monkeypatch.setattr("backend.labelstudio.client.LabelStudioClient.list_tasks_without_prediction", list_three)
    settings = make_settings(redis_url, stand_in.url, batch_size=1)
    predictor = ImportPredictor(settings, connection, LabelStudioClient(stand_in.url, "key"))
    record_import(connection, "1")
    predictor.predict({"project": "1"})
    predictor.predict({"project": "1"})
    assert (Outbox(connection).count("1"), get_cursor(connection, "1")) == (3, 3)
    connection.delete("gdino:outbox:1")  # they are delivered
    predictor.predict({"project": "1"})
    assert (Outbox(connection).count("1"), get_cursor(connection, "1")) == (3, 6)
    assert list_imported(connection) != []


def list_three(client: LabelStudioClient, project: str, version: str, after_id: int) -> list[dict]:
    return [{"id": after_id + n, "data": {"image": f"{after_id + n}.png"}, "annotations": []} for n in (1, 2, 3)]


def test_a_project_that_gets_more_tasks_meanwhile_stays_noted(connection: Redis) -> None:
    record_import(connection, "1")
    ((_, first),) = list_imported(connection)
    save_cursor(connection, "1", 7)
    wait_for(lambda: record_import(connection, "1") or list_imported(connection) != [("1", first)], 5, "a later import")
    remove_imported(connection, "1", first)
    ((_, second),) = list_imported(connection)
    assert get_cursor(connection, "1") == 0
    remove_imported(connection, "1", second)
    assert list_imported(connection) == []
