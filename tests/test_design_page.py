"""The tables of docs/design.md match the code: "to change X, open Y", and all Redis keys."""

import re

import requests
from redis import Redis

from backend.delivery.deliver_worker import enqueue_due
from backend.delivery.failures import Failure, Failures
from backend.delivery.imported_projects import record_import, save_cursor
from backend.delivery.outbox import Delivery, Outbox, OutboxEntry
from backend.monitoring.activity import BulkProgress, record_image
from backend.queue.backlogs import Place
from backend.queue.live_workers import FIT_READY_KEY, READY_KEY, describe_worker, save_heartbeat
from backend.queue.messages import Prediction
from backend.queue.pauses import PAUSED_BULK_KEY, PAUSED_DELIVERY_KEY, PAUSED_IMPORT_KEY, Pauses
from backend.queue.predict_queue import PredictQueue
from backend.queue.recovery import LostChunk
from backend.queue.redis import INDEX, connect
from backend.queue.training_queue import TrainingQueue
from backend.queue.worker_metrics import publish_metrics
from tests.chunks import CHECKPOINT, PREDICTION, make_chunk
from tests.scenes import make_labeling_config, make_scenes, to_data_uri
from tests.servers import ROOT, ServeProcess

DESIGN = (ROOT / "docs" / "design.md").read_text()
UNITS = {"s": 1, "min": 60, "h": 3600, "days": 24 * 3600}


def read_table(heading: str) -> list[list[str]]:
    """Reads the cells of the first table below a heading, without its head."""
    section = DESIGN.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line for line in section.split("\n") if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows[2:]]


def test_every_file_and_name_in_the_table_of_changes_exists() -> None:
    rows = read_table("To change X, open Y")
    assert len(rows) >= 25
    for what, places in rows:
        files = re.findall(r"`([\w/]+\.\w+)`(?::((?:,? ?`\w+`)+))?", places)
        assert files, what
        for path, names in files:
            text = (ROOT / path).read_text()
            for name in re.findall(r"\w+", names):
                assert re.search(rf"^\s*((async )?def|class) {name}\b|^{name}\b.*=", text, re.M), (what, path, name)


def test_every_package_names_all_its_modules() -> None:
    for package in sorted((ROOT / "backend").glob("*/__init__.py")):
        text = package.read_text()
        assert text.count('"""') == 2, package
        modules = {path.stem for path in package.parent.glob("*.py")} - {"__init__", "__main__"}
        missing = {module for module in modules if not re.search(rf"\b{module}\b", text)}
        assert not missing, (package, missing)


def leave_keys_of_the_web_front_and_a_worker(served: ServeProcess) -> None:
    scene = make_scenes(1)[0]
    config = make_labeling_config([scene])
    requests.post(f"{served.url}/setup", json={"project": "7.1", "schema": config}, timeout=10)
    tasks = [{"id": 1, "data": {"image": to_data_uri(scene.image)}}, {"id": 2, "data": {"image": "ftp://x"}}]
    body = {"tasks": tasks, "label_config": config, "project": "7.1", "params": {}}
    requests.post(f"{served.url}/predict", json=body, timeout=100)
    result = [{"value": {"rectanglelabels": ["red circle"]}, "origin": "manual"}]
    annotation = {"id": 1, "task": 1, "updated_at": "2026", "result": result}
    event = {"action": "ANNOTATION_CREATED", "annotation": annotation, "project": {"id": 7}}
    requests.post(f"{served.url}/webhook", json=event, timeout=10)


def leave_keys_of_the_rest(connection: Redis) -> None:
    """Calls directly what a run reaches only with a Label Studio, a command or a dead worker."""
    outbox, chunk = Outbox(connection), make_chunk({"id": 1})
    outbox.add([OutboxEntry.from_chunk("7", chunk, since=0)])
    outbox.claim(Delivery.PUSHING, "7", "v", {1: 0})
    outbox.recheck("7", "v", [1], 0)
    outbox.rest("7", 60)
    outbox.mark_failed("7", [chunk.id])
    outbox.mark_mismatched("8")
    Failures(connection).record("7", [Failure(1, "image", "damaged", 0, "v")])
    record_import(connection, "7")
    save_cursor(connection, "7", 1)
    enqueue_due(connection)
    for key in (PAUSED_BULK_KEY, PAUSED_DELIVERY_KEY, PAUSED_IMPORT_KEY):
        Pauses(connection, key).pause("7", "the storage is away")
    bulk = [make_chunk({"id": number}) for number in range(10)]
    PredictQueue(connection, CHECKPOINT).enqueue(bulk, Place.BACKLOG, "7")
    lost = LostChunk(connection, chunk.id)
    lost.save_answer(0, Prediction(**PREDICTION))
    TrainingQueue(connection).start("7", "encoder")
    BulkProgress(connection, "preannotate-7", "preannotate, project 7").report(1, 0, 2)
    record_image(connection, b"jpeg", [], project="7", task=1, model_version="v")
    for key in (READY_KEY, FIT_READY_KEY):
        save_heartbeat(connection, key, "worker", describe_worker("cpu", "demo", CHECKPOINT, 4))
    PredictQueue(connection, CHECKPOINT).get_batch_size()
    publish_metrics(connection, "worker")


def test_a_run_leaves_exactly_the_keys_of_the_table(served: ServeProcess, connection: Redis) -> None:
    rows = {key.split("`")[1]: (key, kind, module, ttl) for key, kind, module, ttl, _ in read_table("Redis keys")}
    for prefix, (_, _, module, _) in rows.items():
        assert f'"{prefix}"' in (ROOT / module.strip("`")).read_text(), prefix
    leave_keys_of_the_web_front_and_a_worker(served)
    leave_keys_of_the_rest(connection)
    prefixes = set()
    for redis in (connect((served.model_dir / "redis.url").read_text()), connection):
        for key in map(bytes.decode, redis.scan_iter("*")):
            if key.startswith("rq:"):
                continue
            if key.endswith(INDEX):
                assert f"`{key}`" in DESIGN, key
                continue
            prefix = max((p for p in rows if key == p or (p.endswith(":") and key.startswith(p))), key=len, default="")
            assert prefix, f"{key} is not in the table"
            _, kind, _, ttl = rows[prefix]
            left = redis.pttl(key) / 1000
            if left <= -0.002:
                continue  # it expired meanwhile
            assert {b"zset": "sorted set"}.get(redis.type(key), redis.type(key).decode()) == kind, key
            if ttl == "none":
                assert left < 0, key
            else:
                number, unit = ttl.split()
                assert 0 <= left <= float(number) * UNITS[unit], (key, left)
            prefixes.add(prefix)
    assert set(rows) - prefixes == set()
