import random

import pytest

from backend.boxes import Detection
from backend.training.calibration import MIN_SCORE, calibrate, cross_calibrate
from backend.training.evaluation import EvalResult, evaluate
from backend.training.gate import passes_gate

BOX = (0.0, 0.0, 10.0, 10.0)
FAR = (50.0, 50.0, 60.0, 60.0)


def test_perfect_detections_score_one() -> None:
    metrics = evaluate([[Detection(BOX, 0.9, "a")], []], [[(BOX, "a")], []])
    assert (metrics.ap50, metrics.precision, metrics.recall, metrics.boxes, metrics.f1) == (1, 1, 1, 1, 1)


@pytest.mark.parametrize(
    "detections",
    [[], [Detection(BOX, 0.9, "b")], [Detection(FAR, 0.9, "a")]],
    ids=["nothing", "wrong label", "wrong place"],
)
def test_wrong_detections_score_nothing(detections: list[Detection]) -> None:
    assert evaluate([detections], [[(BOX, "a")]]).ap50 == 0


def test_a_true_box_counts_once() -> None:
    twice = [Detection(BOX, 0.9, "a"), Detection(BOX, 0.8, "a")]
    metrics = evaluate([twice], [[(BOX, "a"), (FAR, "a")]])
    assert (metrics.ap50, metrics.precision, metrics.recall) == (0.5, 0.5, 0.5)


def test_average_precision_is_the_area_under_the_envelope() -> None:
    detections = [Detection(FAR, 0.9, "a"), Detection(BOX, 0.8, "a")]  # a miss, then the hit: precision 1/2 at recall 1
    assert evaluate([detections], [[(BOX, "a")]]).ap50 == pytest.approx(0.5)


def test_the_threshold_decides_precision_and_recall_only() -> None:
    detections = [Detection(BOX, 0.2, "a")]
    metrics = evaluate([detections], [[(BOX, "a")]], threshold=0.3)
    assert (metrics.ap50, metrics.precision, metrics.recall) == (1, 0, 0)


def make_images(correct: list[float], wrong: list[float]) -> tuple[list, list]:
    """Makes predictions and truth with one detection per image, of these scores."""
    predictions = [[Detection(BOX, score, "a")] for score in [*correct, *wrong]]
    return predictions, [[(BOX, "a")]] * len(correct) + [[]] * len(wrong)


def test_a_threshold_lies_between_correct_and_wrong_detections() -> None:
    threshold = calibrate(*make_images([0.8] * 200, [0.4] * 200), {"a": 0.3})["a"]
    assert 0.55 < threshold <= 0.6


def test_a_threshold_may_fall() -> None:
    assert calibrate(*make_images([0.2] * 200, [0.1] * 10), {"a": 0.3})["a"] < 0.2


def test_few_examples_move_a_threshold_a_little() -> None:
    thresholds = [calibrate(*make_images([0.8] * n, [0.4] * n), {"a": 0.3})["a"] for n in (1, 5, 50)]
    assert 0.3 < thresholds[0] < 0.36 < thresholds[1] < thresholds[2] < 0.6


def test_a_threshold_stays_without_examples_or_gain() -> None:
    assert calibrate([[]], [[]], {"a": 0.3}) == {"a": 0.3}
    assert calibrate(*make_images([], [0.9] * 50), {"a": 0.3}) == {"a": 0.3}
    assert calibrate(*make_images([0.9] * 50, []), {"a": 0.3}) == {"a": 0.3}


def test_no_threshold_is_below_the_minimum() -> None:
    assert calibrate(*make_images([0.001] * 500, []), {"a": 0.3})["a"] >= MIN_SCORE


def test_cross_calibration_chooses_thresholds_by_the_other_half() -> None:
    predictions, truth = make_images([0.8, 0.2] * 40, [])
    first, second = cross_calibrate(predictions, truth, {"a": 0.3})[:2]
    assert first["a"] < 0.3 == second["a"]  # chosen on images that score 0.2, and 0.8


def make_result(is_correct: list[bool]) -> EvalResult:
    """Makes a result with one true box and one detection per image."""
    predictions = [[Detection(BOX if hit else FAR, 0.9, "a")] for hit in is_correct]
    return EvalResult(predictions, [[(BOX, "a")]] * len(predictions), [{"a": 0.3}] * len(predictions))


def test_a_clear_gain_passes_the_gate_and_the_same_result_does_not() -> None:
    poor, good = make_result([False] * 18 + [True] * 2), make_result([True] * 20)
    assert passes_gate(poor, good)
    assert not passes_gate(good, good)
    assert not passes_gate(good, poor)


def test_chance_does_not_pass_the_gate() -> None:
    """Compares two models that are right equally often, on few images: one pair in twenty may pass."""
    rng, passed = random.Random(0), 0
    for _ in range(100):
        one, two = ([rng.random() < 0.5 for _ in range(15)] for _ in range(2))
        passed += passes_gate(make_result(one), make_result(two))
    assert passed <= 10
