"""Graphs on the CPU: only CUDA's capture is replaced."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from backend.detection import cuda_graphs
from backend.detection.checkpoints import load_checkpoint
from backend.detection.cuda_graphs import CAPTURE_AT, GraphCache
from backend.detection.detector import Detector
from backend.labelstudio.labeling_config import Label
from backend.registry.checkpoint import DEMO_CHECKPOINT
from tests.detection.emulation import EmulatedCapture
from tests.scenes import make_scenes


class Constants:
    """Something that a function reads, such as tensors that belong to a size."""


def double(constants: object, values: Tensor) -> tuple[Tensor]:
    return (2 * values,)


def test_shapes_that_come_again_are_replayed() -> None:
    capture, constants = EmulatedCapture(), Constants()
    graphs = GraphCache(lambda: capture)
    for number in range(5):
        (output,) = graphs(double, constants, torch.full((3,), float(number)))
        assert output.tolist() == [2 * number] * 3
        assert capture.captures == (number + 1 >= CAPTURE_AT)
    assert capture.replays == 1 + 5 - (CAPTURE_AT - 1)  # a trial replay, and one for each call from the third on
    for _ in range(CAPTURE_AT - 1):
        graphs(double, constants, torch.zeros(4))
        graphs(double, Constants(), torch.zeros(3))
    assert capture.captures == 1  # other shapes, other constants


def test_what_a_graph_reads_lives_as_long_as_the_graph() -> None:
    graphs, constants, others = GraphCache(EmulatedCapture), Constants(), Constants()
    alive, alive_without_graph = weakref.ref(constants), weakref.ref(others)
    for _ in range(CAPTURE_AT):
        graphs(double, constants, torch.zeros(3))
    graphs(double, others, torch.zeros(3))
    del constants, others
    gc.collect()
    assert alive() is not None
    assert alive_without_graph() is None
    graphs.clear()
    gc.collect()
    assert alive() is None


def test_the_least_recently_used_graphs_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 2)
    capture, constants = EmulatedCapture(), Constants()
    graphs = GraphCache(lambda: capture)
    for size in (1, 1, 1, 2, 2, 2, 1, 3, 3, 3, 1):
        graphs(double, constants, torch.zeros(size))
    assert capture.captures == 3
    replays = capture.replays
    graphs(double, constants, torch.zeros(2))  # dropped for 3
    assert (capture.captures, capture.replays) == (3, replays)
    for _ in range(CAPTURE_AT - 1):
        graphs(double, constants, torch.zeros(2))
    assert capture.captures == 4


def test_a_graph_that_differs_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    graphs, constants = GraphCache(lambda: EmulatedCapture(lambda tensor: tensor * 1.1)), Constants()
    for _ in range(3):
        assert graphs(double, constants, torch.ones(3))[0].tolist() == [2, 2, 2]
    assert not graphs.is_enabled
    assert caplog.text.count("running without graphs") == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_graph_may_give_nan_where_the_function_does(value: float) -> None:
    capture = EmulatedCapture()
    graphs, constants = GraphCache(lambda: capture), Constants()
    for _ in range(CAPTURE_AT):
        graphs(double, constants, torch.tensor([1, value]))
    assert graphs.is_enabled
    assert capture.captures == 1
    capture.change = lambda tensor: tensor.nan_to_num()
    for _ in range(CAPTURE_AT):
        graphs(double, constants, torch.tensor([1, value, 1]))
    assert not graphs.is_enabled


def test_a_failed_capture_leaves_the_function(caplog: pytest.LogCaptureFixture) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    graphs, constants = GraphCache(lambda: fail), Constants()
    for _ in range(3):
        assert graphs(double, constants, torch.ones(1))[0].tolist() == [2]
    assert caplog.text.count("CUDA graphs are unavailable (CUDA error: operation not permitted when stream is") == 1


def test_what_has_no_memory_for_a_graph_runs_without() -> None:
    attempts = []

    def fail(*_: Any) -> Any:
        attempts.append(1)
        raise torch.OutOfMemoryError

    graphs, constants = GraphCache(lambda: fail), Constants()
    for _ in range(10):
        assert graphs(double, constants, torch.ones(2))[0].tolist() == [2, 2]
    assert graphs.is_enabled
    assert len(attempts) == 1


def test_memory_is_new_after_the_old_graphs_were_dropped() -> None:
    made: list[EmulatedCapture] = []

    def make_capture() -> EmulatedCapture:
        made.append(EmulatedCapture())
        return made[-1]

    graphs, constants = GraphCache(make_capture), Constants()
    for _ in range(2):
        for _ in range(CAPTURE_AT):
            graphs(double, constants, torch.ones(2))
        graphs.clear()
    assert [capture.captures for capture in made] == [1, 1, 0]


def test_a_detector_with_graphs_detects_the_same() -> None:
    checkpoint = load_checkpoint(str(DEMO_CHECKPOINT))
    labels = [Label(f"{colour} object", (f"{colour} object",), 0.3) for colour in ("red", "blue", "green")]
    plain, graphed, made = Detector(*checkpoint), Detector(*checkpoint), []

    def make_capture() -> EmulatedCapture:
        made.append(EmulatedCapture())
        return made[-1]

    graphed.forward_pass.use_graphs(make_capture)
    batches = [[scene.image for scene in make_scenes(2, seed=seed)] for seed in range(5)]
    found = 0
    for images in batches:
        expected, actual = plain.detect(images, labels), graphed.detect(images, labels)
        assert actual == expected
        found += sum(map(len, expected))
    assert found > 4
    # Images alone, and images with text. Both from one capture would share their memory.
    assert [(capture.captures, capture.replays) for capture in made] == [(1, 1 + 3), (1, 1 + 3)]
