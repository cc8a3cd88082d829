"""A whole server against a Label Studio that misbehaves: every task that exists ends with exactly one prediction.

Each scenario measures its time to recover: from the end of the fault to the last prediction. `make chaos` prints the
times, runs the long forms, and the mixture of all faults for ten minutes.
"""

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import requests

from backend.delivery.outbox import Outbox
from backend.queue.redis import connect
from tests.label_studio_stand_in import LabelStudioStandIn
from tests.scenes import encode, make_labeling_config, make_scenes
from tests.servers import ServeProcess, list_descendants, wait_for

FULL = os.environ.get("CHAOS") == "full"
TASKS = 600 if FULL else 240
IMPORT_TIMEOUT = 12  # s
LIMIT = 120  # s to recover
CREATED_AT = 1_700_000_000
SCENE = make_scenes(1, (96, 96))[0]
CONFIG = make_labeling_config([SCENE])

pytestmark = pytest.mark.timeout(1500 if FULL else 400)


@dataclass
class Company:
    """A server, the stand-in for its Label Studio, and the projects that were made so far."""

    served: ServeProcess
    stand_in: LabelStudioStandIn
    projects: dict[int, set[int]] = field(default_factory=dict)  # the tasks of each

    def add_project(self, count: int = TASKS) -> int:
        """Adds a project whose images lie in Label Studio."""
        project = len(self.projects) + 1
        tasks = range(project * 10_000, project * 10_000 + count)
        data = {task: {"image": f"/data/upload/{project}/{task}.jpg"} for task in tasks}
        self.stand_in.add_project(project, CONFIG, CREATED_AT, data)
        self.projects[project] = set(tasks)
        return project

    def predict(self, project: int, tasks: Sequence[int] = ()) -> list[dict]:
        """Asks for predictions as Label Studio does, of all tasks or of these."""
        rows = [
            {"id": task, "data": {"image": f"/data/upload/{project}/{task}.jpg"}}
            for task in sorted(tasks or self.projects[project])
        ]
        body = {"tasks": rows, "label_config": CONFIG, "project": f"{project}.{CREATED_AT}", "params": {}}
        response = requests.post(f"{self.served.url}/predict", json=body, timeout=100)
        assert response.status_code == 200, response.text
        return response.json()["results"]

    def delete_tasks(self, project: int, tasks: Sequence[int]) -> None:
        self.stand_in.delete_tasks(project, tasks)
        self.projects[project] -= set(tasks)

    def count_missing(self, project: int) -> int:
        """Counts the tasks without a prediction."""
        return len(self.projects[project] - set(self.stand_in.count_by_task(project)))

    def wait_for_part(self, project: int, share: float = 0.1) -> None:
        """Waits until some of a project's predictions are stored."""
        part = len(self.projects[project]) * (1 - share)
        wait_for(lambda: self.count_missing(project) <= part, 60, "the first predictions")

    def wait_until_done(self, *projects: int, seconds: float = LIMIT) -> float:
        """Waits until each task has its prediction, and no more than one; returns how long it took."""
        start = time.monotonic()
        try:
            wait_for(lambda: not any(map(self.count_missing, projects)), seconds, "a prediction for every task")
        except AssertionError:
            for project in projects:
                print(
                    f"project {project} lacks {self.count_missing(project)}; pending: {self.describe_pending(project)}"
                )
            raise
        took = time.monotonic() - start
        wait_for(
            lambda: all(max(self.stand_in.count_by_task(project).values()) == 1 for project in projects),
            3 * IMPORT_TIMEOUT, "the end of the doubles",
        )  # fmt: skip
        connection = connect((self.served.model_dir / "redis.url").read_text())
        keys = [f"gdino:{kind}:{project}" for project in projects for kind in ("outbox", "rechecks")]
        wait_for(lambda: not connection.exists(*keys), 3 * IMPORT_TIMEOUT + 60, "the end of all deliveries")
        for project in projects:
            assert self.stand_in.count_by_task(project) == dict.fromkeys(self.projects[project], 1)
        status = self.get_status()
        assert not status["given_up"].keys() & set(map(str, projects)), status["given_up"]
        return took

    def describe_pending(self, project: int) -> list[str]:
        """Describes what is in a project's outbox, and when it is due."""
        connection = connect((self.served.model_dir / "redis.url").read_text())
        outbox, key = Outbox(connection), f"gdino:outbox:{project}"
        due = connection.zrange(key, 0, -1, withscores=True)
        now, entries = outbox.get_time(), outbox.load(str(project), [chunk_id.decode() for chunk_id, _ in due])
        return [
            f"{entry.task_ids} after {entry.attempts} attempts, due in {due_at - now:.0f} s: {entry.error}"
            for entry, (_, due_at) in zip(entries, due, strict=False)
        ]

    def get_status(self) -> dict:
        return requests.get(f"{self.served.url}/status", timeout=10).json()

    def find_process(self, *words: str) -> int:
        """Finds a process of the server by arguments of its command line."""
        for pid in list_descendants(self.served.process.pid):
            with contextlib.suppress(OSError):
                arguments = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
                if all(any(argument.endswith(word) for argument in arguments) for word in words):
                    return pid
        raise LookupError(words)

    def find_delivery_worker(self) -> int:
        return self.find_process("backend", "push")

    def find_predict_worker(self) -> int:
        return self.find_process("backend", "worker")


@pytest.fixture(scope="module")
def company(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Company]:
    with LabelStudioStandIn(image=encode(SCENE.image, "JPEG")) as stand_in:
        server = ServeProcess(
            tmp_path_factory.mktemp("company"),
            LABEL_STUDIO_URL=stand_in.url, LABEL_STUDIO_API_KEY="key", BATCH_SIZE="8",
            IMPORT_TIMEOUT=str(IMPORT_TIMEOUT), SHOW_PICTURES="false",
        )  # fmt: skip
        try:
            server.wait_until_ready()
            yield Company(server, stand_in)
        finally:
            server.stop(30)


Report = Callable[[str, float], None]


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Report:
    """Prints a time to recover, where `make chaos` collects it."""

    def write(what: str, seconds: float) -> None:
        line = f"{what}: {seconds:.1f} s"
        if path := os.environ.get("CHAOS_REPORT"):
            with Path(path).open("a") as file:
                file.write(line + "\n")
        print(line)

    return write


def test_label_studio_with_the_images_is_away_for_5_s(company: Company, report: Report) -> None:
    project = company.add_project(600)
    company.predict(project)
    company.wait_for_part(project, 0.01)
    company.stand_in.stop()
    reasons: dict[str, str] = {}  # by what pauses
    end = time.monotonic() + 5
    while time.monotonic() < end:
        reasons |= {pause["work"]: pause["reason"] for pause in company.get_status()["pauses"]}
        time.sleep(0.2)
    company.stand_in.start()
    report("Label Studio away for 5 s", company.wait_until_done(project))
    assert "could not be fetched" in reasons["bulk prediction"]
    log = company.served.read_log()
    assert f"project {project}: bulk work pauses for" in log
    assert f"project {project}: 8 tasks are tried again in" in log


def test_the_images_are_unavailable_and_interactive_work_goes_on(company: Company, report: Report) -> None:
    project, other = company.add_project(), company.add_project(1)
    company.stand_in.fail(project, 503, routes="images")
    company.predict(project)
    wait_for(lambda: any(p["project"] == str(project) for p in company.get_status()["pauses"]), 30, "a pause")
    start = time.monotonic()
    (answer,) = company.predict(other)
    assert "result" in answer
    assert time.monotonic() - start < 5
    chunks = company.served.read_log().count(f"project {project}: 8 tasks in")
    time.sleep(5)
    assert company.served.read_log().count(f"project {project}: 8 tasks in") - chunks < 12  # of 30: no race into errors
    company.stand_in.heal()
    report("storage away", company.wait_until_done(project))


@pytest.mark.parametrize("status", [403, 404, 429, 502, 504])
def test_one_project_refuses_and_the_others_go_on(company: Company, report: Report, status: int) -> None:
    refused, well = company.add_project(80), company.add_project(80)
    company.stand_in.fail(refused, status, routes="api|import")
    for project in (refused, well):
        company.predict(project)
    company.wait_until_done(well, seconds=40)
    pauses = company.get_status()["pauses"]
    assert {pause["project"] for pause in pauses} == {str(refused)}
    assert not company.stand_in.count_by_task(refused)
    company.stand_in.heal()
    report(f"HTTP {status} for one project", company.wait_until_done(refused))


def test_an_import_is_stored_after_a_504(company: Company, report: Report) -> None:
    project = company.add_project()
    company.stand_in.store_late(project, 4, status=504, times=2)
    company.predict(project)
    report("imports stored 4 s after a 504", company.wait_until_done(project))


def test_an_import_is_stored_later_than_it_may(company: Company, report: Report) -> None:
    project = company.add_project(80)
    company.stand_in.store_late(project, 2 * IMPORT_TIMEOUT, status=None)  # after it was imported again
    company.predict(project)
    report("an import stored after twice IMPORT_TIMEOUT", company.wait_until_done(project))
    wait_for(lambda: f"project {project}: deleted" in company.served.read_log(), 3 * IMPORT_TIMEOUT, "the deletion")
    assert max(company.stand_in.count_by_task(project).values()) == 1


def test_label_studio_stores_an_import_twice(company: Company, report: Report) -> None:
    project = company.add_project(80)
    company.stand_in.double_import(project, times=2)
    company.predict(project)
    wait_for(lambda: max(company.stand_in.count_by_task(project).values(), default=0) == 2, 60, "doubles")
    report("an import stored twice", company.wait_until_done(project))


def test_tasks_are_deleted_while_they_are_predicted(company: Company, report: Report) -> None:
    project = company.add_project()
    tasks = sorted(company.projects[project])
    company.predict(project)
    company.delete_tasks(project, tasks[:32])
    company.wait_for_part(project)
    company.delete_tasks(project, tasks[100:140])
    report("tasks deleted", company.wait_until_done(project))
    assert not company.get_status()["given_up"]


def test_a_task_is_predicted_by_a_request_that_is_not_stored(company: Company, report: Report) -> None:
    project = company.add_project(80)
    tasks = sorted(company.projects[project])
    company.stand_in.fail(project, 503, routes="import")  # so that the request comes first
    company.predict(project)
    (answer,) = company.predict(project, tasks[40:41])
    assert "result" in answer
    company.stand_in.heal()
    report('"Send test request" during a bulk', company.wait_until_done(project))


def test_the_delivery_worker_is_killed_during_an_import(company: Company, report: Report) -> None:
    project = company.add_project()
    company.stand_in.answer_late(project, 3)
    company.predict(project)
    wait_for(lambda: company.stand_in.count_by_task(project), 60, "an import")  # stored, and not answered
    os.kill(company.find_delivery_worker(), signal.SIGKILL)
    company.stand_in.heal()
    report("delivery worker killed during an import", company.wait_until_done(project))


def test_a_paused_delivery_worker_doubles_nothing(company: Company, report: Report) -> None:
    project = company.add_project()
    company.stand_in.answer_late(project, 2)
    company.predict(project)
    wait_for(lambda: any("import" in path for _, path in company.stand_in.requests), 60, "an import")
    paused = company.find_delivery_worker()
    os.kill(paused, signal.SIGSTOP)
    time.sleep(13)
    os.kill(paused, signal.SIGCONT)
    company.stand_in.heal()
    report("delivery worker paused for 13 s", company.wait_until_done(project))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_predict_worker_ends(company: Company, report: Report, number: signal.Signals) -> None:
    project = company.add_project()
    company.predict(project)
    company.wait_for_part(project)
    os.kill(company.find_predict_worker(), number)
    report(f"predict worker gets {number.name}", company.wait_until_done(project))


def test_redis_is_killed(company: Company, report: Report) -> None:
    project = company.add_project()
    company.predict(project)
    company.wait_for_part(project)
    time.sleep(1.1)  # its file is written every second
    os.kill(company.find_process("redis.sock"), signal.SIGKILL)
    time.sleep(1)
    report("Redis killed", company.wait_until_done(project))


class Mixture:
    """Random faults, one after the other; the same for the same seed, as far as the processes are."""

    def __init__(self, company: Company, projects: Sequence[int], seed: int) -> None:
        self._company, self._projects, self._random = company, projects, random.Random(seed)
        self.counts: dict[str, int] = {}

    def run(self, seconds: float) -> None:
        faults = [
            self.stop_label_studio, self.fail_project, self.fail_images, self.store_late, self.answer_late,
            self.double_import, self.delete_tasks, self.kill_predict_worker, self.stop_predict_worker,
            self.kill_delivery_worker, self.pause_delivery_worker, self.kill_redis, self.ask_and_drop, self.ask_again,
            self.heal,
        ]  # fmt: skip
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            fault = self._random.choice(faults)
            self.counts[fault.__name__] = self.counts.get(fault.__name__, 0) + 1
            with contextlib.suppress(LookupError, ProcessLookupError):  # it is starting again
                fault()
            time.sleep(self._random.uniform(0, 4))
        self._company.stand_in.heal()

    def _choose(self) -> int:
        return self._random.choice(self._projects)

    def stop_label_studio(self) -> None:
        self._company.stand_in.stop()
        time.sleep(self._random.uniform(0.5, 6))
        self._company.stand_in.start()

    def fail_project(self) -> None:
        status = self._random.choice([403, 404, 429, 500, 502, 504])
        self._company.stand_in.fail(self._choose(), status, times=self._random.randint(1, 6), routes="api|import")

    def heal(self) -> None:
        self._company.stand_in.heal(self._choose())

    def fail_images(self) -> None:
        project = self._choose()
        self._company.stand_in.fail(project, self._random.choice([429, 503]), times=20, routes="images")

    def store_late(self) -> None:
        seconds = self._random.uniform(1, IMPORT_TIMEOUT * 1.3)
        self._company.stand_in.store_late(self._choose(), seconds, status=self._random.choice([502, 504, None]))

    def answer_late(self) -> None:
        project = self._choose()
        self._company.stand_in.answer_late(project, self._random.uniform(0.5, 3))

    def double_import(self) -> None:
        self._company.stand_in.double_import(self._choose())

    def delete_tasks(self) -> None:
        project = self._choose()
        tasks = sorted(self._company.projects[project])
        start = self._random.randrange(max(len(tasks) - 20, 1))
        self._company.delete_tasks(project, tasks[start : start + self._random.randint(1, 12)])

    def kill_predict_worker(self) -> None:
        os.kill(self._company.find_predict_worker(), signal.SIGKILL)

    def stop_predict_worker(self) -> None:
        os.kill(self._company.find_predict_worker(), signal.SIGTERM)

    def kill_delivery_worker(self) -> None:
        os.kill(self._company.find_delivery_worker(), signal.SIGKILL)

    def pause_delivery_worker(self) -> None:
        pid = self._company.find_delivery_worker()
        os.kill(pid, signal.SIGSTOP)
        time.sleep(self._random.uniform(1, 13))
        os.kill(pid, signal.SIGCONT)

    def kill_redis(self) -> None:
        time.sleep(
            1.1
        )  # its file is written every second: a power failure may lose that much, a fault of this test not
        os.kill(self._company.find_process("redis.sock"), signal.SIGKILL)

    def ask_and_drop(self) -> None:
        """Asks for a task, as "Send test request" does, and stores nothing."""
        project = self._choose()
        with contextlib.suppress(requests.RequestException, AssertionError):
            self._company.predict(project, [self._random.choice(sorted(self._company.projects[project]))])

    def ask_again(self) -> None:
        with contextlib.suppress(requests.RequestException, AssertionError):
            self._company.predict(self._choose())


def test_a_mixture_of_all_faults_loses_and_doubles_nothing(company: Company, report: Report) -> None:
    projects = [company.add_project(1000 if FULL else 120) for _ in range(5 if FULL else 3)]
    for project in projects:
        company.predict(project)
    mixture = Mixture(company, projects, seed=int(os.environ.get("CHAOS_SEED", "15")))
    mixture.run(600 if FULL else 40)
    print(mixture.counts)
    report("after the mixture of all faults", company.wait_until_done(*projects, seconds=300))
    connection = connect((company.served.model_dir / "redis.url").read_text())
    assert not connection.keys("gdino:pending:*")
