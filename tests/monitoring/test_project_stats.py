import pytest
from redis import Redis

from backend.labelstudio.labeling_config import read_plan
from backend.monitoring.project_stats import (
    get_created_at,
    get_label_config,
    get_project_summaries,
    get_shown_model_versions,
    list_model_versions,
    save_summary,
)
from tests.scenes import make_labeling_config, make_scenes

CONFIG = make_labeling_config(make_scenes(1))


def test_a_saved_summary_is_read_back(connection: Redis) -> None:
    plan = read_plan(CONFIG, 0.3, 0.7)
    save_summary(connection, "7", "demo-1", plan, CONFIG, 1795334225)
    (summary,) = get_project_summaries(connection)
    assert [row["label"] for row in summary["labels"]] == [label.name for label in plan.controls[0].labels]
    assert (summary["project"], summary["version"], summary["of"]) == ("7", "demo-1", len(summary["labels"]))
    assert get_created_at(connection, "7") == 1795334225
    assert get_label_config(connection, "7") == CONFIG


def test_an_unknown_project_has_no_summary(connection: Redis) -> None:
    assert get_project_summaries(connection) == list_model_versions(connection) == []
    assert get_shown_model_versions(connection) == {}
    assert (get_created_at(connection, "7"), get_label_config(connection, "7")) == (None, "")


def test_summaries_beyond_the_maximum_are_dropped_oldest_first(
    connection: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backend.monitoring.project_stats.MAX_PROJECTS", 2)
    for project in ("1", "2", "3", "1"):
        save_summary(connection, project, f"version of {project}", None, "")
    assert [row["project"] for row in get_project_summaries(connection)] == ["1", "3"]
    assert get_shown_model_versions(connection) == {"1": "version of 1", "3": "version of 3"}
    assert list_model_versions(connection) == ["version of 1", "version of 3"]
