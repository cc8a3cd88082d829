"""Messages fail loudly: a field that is missing, unknown or of another format is refused."""

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest

from backend.errors import MessageError
from backend.labelstudio.labeling_config import read_plan
from backend.labelstudio.targets import Prompt
from backend.queue.messages import Chunk, ChunkAnswers, Message, TrainingRequest, VersionId, read_message
from tests.chunks import PREDICTION, make_answers, make_chunk, make_error

CONFIG = (
    '<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image" '
    'model_negative_values="shadow"><Label value="cat"/></RectangleLabels>'
    '<TextArea name="prompt" toName="image"/></View>'
)
CHUNK = make_chunk(
    {"id": 1, "data": {"image": "http://x/1.png"}, "prompt": Prompt(("cat",), 0.3)},
    plan=read_plan(CONFIG, 0.3, 0.7),
    version=VersionId(project="7", id="v-0001"),
)
MESSAGES: list[tuple[type[Message], dict[str, Any]]] = [
    (Chunk, json.loads(json.dumps(CHUNK.payload))),
    (ChunkAnswers, make_answers([PREDICTION, make_error("gone")])),
    (TrainingRequest, TrainingRequest(project="7", train="encoder", run="1").model_dump()),
]
FREE = ("data", "result")  # any content is allowed: it is the user's


def find_objects(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yields the paths of all objects in a message that have a fixed set of fields."""
    if isinstance(value, dict):
        yield path
        for key, inner in value.items():
            if key not in FREE:
                yield from find_objects(inner, (*path, key))
    if isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from find_objects(inner, (*path, index))


def get_at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


CASES = [(kind, payload, path) for kind, payload in MESSAGES for path in find_objects(payload)]


def test_the_cases_cover_every_level() -> None:
    names = {path[-1] if path else "" for _, _, path in CASES}
    assert {"", "plan", "version", "prompt", "error"} <= names
    assert any("labels" in path for _, _, path in CASES)


@pytest.mark.parametrize(("kind", "payload"), MESSAGES, ids=lambda value: getattr(value, "__name__", ""))
def test_a_message_survives_json(kind: type[Message], payload: dict[str, Any]) -> None:
    message = read_message(kind, payload)
    assert json.loads(json.dumps(message.model_dump())) == json.loads(json.dumps(payload))


@pytest.mark.parametrize(("kind", "payload", "path"), CASES)
def test_an_unknown_field_is_refused(kind: type[Message], payload: dict[str, Any], path: tuple[Any, ...]) -> None:
    changed = copy.deepcopy(payload)
    get_at(changed, path)["surprise"] = 1
    with pytest.raises(MessageError, match=r"surprise.*same version of the backend everywhere"):
        read_message(kind, changed)


@pytest.mark.parametrize(("kind", "payload", "path"), CASES)
def test_a_missing_field_is_refused(kind: type[Message], payload: dict[str, Any], path: tuple[Any, ...]) -> None:
    for field in get_at(payload, path):
        changed = copy.deepcopy(payload)
        del get_at(changed, path)[field]
        with pytest.raises(MessageError, match=kind.__name__):
            read_message(kind, changed)


@pytest.mark.parametrize("other", [0, 1, "2", None])
def test_another_format_is_refused(other: object) -> None:
    with pytest.raises(MessageError, match="format"):
        read_message(Chunk, {**CHUNK.payload, "format": other})


@pytest.mark.parametrize("other", [None, [], "chunk", 3])
def test_a_message_that_is_no_object_is_refused(other: object) -> None:
    with pytest.raises(MessageError):
        read_message(Chunk, other)


def test_only_equal_chunks_have_equal_ids() -> None:
    same = read_message(Chunk, json.loads(json.dumps(CHUNK.payload)))
    assert same.id == CHUNK.id
    assert make_chunk({"id": 1}).id != make_chunk({"id": 2}).id
