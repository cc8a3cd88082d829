import random

import pytest

from backend.boxes import Detection
from backend.training.calibration import MIN_SCORE, calibrate, cross_calibrated
from backend.training.evaluation import EvalResult, evaluate
from backend.training.gate import passes_gate

BOX = (0.0, 0.0, 10.0, 10.0)
FAR = (50.0, 50.0, 60.0, 60.0)


def test_perfect_detections_score_one() -> None:
    metrics = evaluate([[Detection(BOX, 0.9, "a")], []], [[(BOX, "a")], []])
    assert (metrics.ap50, metrics.precision, metrics.recall, metrics.boxes, metrics.f1) == (1, 1, 1, 1, 1)


@pytest.mark.parametrize(
    "found",
    [[], [Detection(BOX, 0.9, "b")], [Detection(FAR, 0.9, "a")]],
    ids=["nothing", "wrong label", "wrong place"],
)
def test_wrong_detections_score_nothing(found: list[Detection]) -> None:
    assert evaluate([found], [[(BOX, "a")]]).ap50 == 0


def test_a_true_box_counts_once() -> None:
    twice = [Detection(BOX, 0.9, "a"), Detection(BOX, 0.8, "a")]
    metrics = evaluate([twice], [[(BOX, "a"), (FAR, "a")]])
    assert (metrics.ap50, metrics.precision, metrics.recall) == (0.5, 0.5, 0.5)


def test_average_precision_is_the_area_under_the_envelope() -> None:
    found = [Detection(FAR, 0.9, "a"), Detection(BOX, 0.8, "a")]  # a miss, then the hit: precision 1/2 at recall 1
    assert evaluate([found], [[(BOX, "a")]]).ap50 == pytest.approx(0.5)


def test_the_threshold_decides_precision_and_recall_only() -> None:
    found = [Detection(BOX, 0.2, "a")]
    metrics = evaluate([found], [[(BOX, "a")]], threshold=0.3)
    assert (metrics.ap50, metrics.precision, metrics.recall) == (1, 0, 0)


def pictures(right: list[float], wrong: list[float]) -> tuple[list, list]:
    """One picture for each score: a box that is there, or one that is not."""
    found = [[Detection(BOX, score, "a")] for score in [*right, *wrong]]
    return found, [[(BOX, "a")]] * len(right) + [[]] * len(wrong)


def test_a_threshold_lies_between_what_was_kept_and_what_was_deleted() -> None:
    threshold = calibrate(*pictures([0.8] * 200, [0.4] * 200), {"a": 0.3})["a"]
    assert 0.55 < threshold <= 0.6


def test_a_threshold_may_also_fall() -> None:
    assert calibrate(*pictures([0.2] * 200, [0.1] * 10), {"a": 0.3})["a"] < 0.2


def test_little_evidence_moves_a_threshold_a_little() -> None:
    thresholds = [calibrate(*pictures([0.8] * n, [0.4] * n), {"a": 0.3})["a"] for n in (1, 5, 50)]
    assert 0.3 < thresholds[0] < 0.36 < thresholds[1] < thresholds[2] < 0.6


def test_without_examples_or_without_gain_a_threshold_stays() -> None:
    assert calibrate([[]], [[]], {"a": 0.3}) == {"a": 0.3}
    assert calibrate(*pictures([], [0.9] * 50), {"a": 0.3}) == {"a": 0.3}
    assert calibrate(*pictures([0.9] * 50, []), {"a": 0.3}) == {"a": 0.3}


def test_no_threshold_is_below_the_floor() -> None:
    assert calibrate(*pictures([0.001] * 500, []), {"a": 0.3})["a"] >= MIN_SCORE


def test_crossed_thresholds_are_chosen_by_the_other_half() -> None:
    found, truth = pictures([0.8, 0.2] * 40, [])
    first, second = cross_calibrated(found, truth, {"a": 0.3})[:2]
    assert first["a"] < 0.3 == second["a"]  # those of the first have 0.8, those of the second 0.2


def judged(scores: list[float], right: list[bool]) -> EvalResult:
    found = [[Detection(BOX if hit else FAR, score, "a")] for score, hit in zip(scores, right, strict=True)]
    return EvalResult(found, [[(BOX, "a")]] * len(found), [{"a": 0.3}] * len(found))


def test_a_clear_gain_is_better_and_the_same_is_not() -> None:
    poor, good = judged([0.9] * 20, [False] * 18 + [True] * 2), judged([0.9] * 20, [True] * 20)
    assert passes_gate(poor, good)
    assert not passes_gate(good, good)
    assert not passes_gate(good, poor)


def test_chance_is_not_better() -> None:
    """Two models that are right equally often, on few pictures: one in twenty may pass, not more."""
    rng, passed = random.Random(0), 0
    for _ in range(100):
        one, two = ([rng.random() < 0.5 for _ in range(15)] for _ in range(2))
        passed += passes_gate(judged([0.9] * 15, one), judged([0.9] * 15, two))
    assert passed <= 10
