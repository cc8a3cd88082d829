"""CUDA graphs: a pass of thousands of short kernels starts as one, instead of waiting for Python at each of them."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

MAX_GRAPHS = 16  # of one function; each keeps its input and output, the rest of their memory is shared
CAPTURE_AT = 3  # times that shapes have come; a capture takes as long as several passes
MAX_COUNTS = 1000  # keys whose calls are counted
NEVER = -(2**62)  # a count that stays below CAPTURE_AT
MAX_DIFFERENCE = 0.01  # between what a new graph gives and what the function gave, relative to the largest value

Tensors = tuple[Tensor, ...]
TensorFunction = Callable[..., Tensors]
Replay = Callable[[], object]
# Takes a function and its arguments; returns what it gave, what the graph gives, and the graph's replay.
Capture = Callable[[TensorFunction, Tensors], tuple[Tensors, Tensors, Replay]]


@dataclass(frozen=True)
class Graph:
    """A captured function: it reads `arguments` and writes `outputs`, always at the same addresses."""

    arguments: Tensors
    outputs: Tensors
    replay: Replay


class GraphCache:
    """Runs a function, always the same one, as CUDA graphs: one for each combination of constants and shapes.

    What does not come often runs without a graph: in a folder of many sizes most come once. So does what a graph has no
    memory for. A function whose graph fails, or gives other values than the function itself, runs without graphs from
    then on.

    The outputs of a graph are overwritten by its next replay.
    """

    def __init__(self, make_capture: Callable[[], Capture]) -> None:
        self._make_capture = make_capture
        self._capture = make_capture()
        self._graphs: OrderedDict[tuple[Any, ...], Graph] = OrderedDict()
        self._counts: OrderedDict[int, int] = OrderedDict()  # calls by the hash of their key, which holds no memory
        self._is_enabled = True

    @property
    def is_enabled(self) -> bool:
        """False once a graph has failed."""
        return self._is_enabled

    def __call__(self, function: TensorFunction, constants: Hashable, *arguments: Tensor) -> Tensors:
        """Returns what the function of constants and tensors returns; it may not wait for the device.

        The constants live as long as their graph.
        """
        function = functools.partial(function, constants)
        key = (constants, *((argument.shape, argument.dtype) for argument in arguments))
        if self._is_enabled and key not in self._graphs and self._count(key) >= CAPTURE_AT:
            self._make_graph(key, function, arguments)
        graph = self._graphs.get(key)
        if graph is None:
            return function(*arguments)
        self._graphs.move_to_end(key)
        for static, argument in zip(graph.arguments, arguments, strict=True):
            static.copy_(argument)
        graph.replay()
        return graph.outputs

    def clear(self) -> None:
        """Frees the memory of all graphs."""
        self._graphs.clear()
        self._counts.clear()
        self._capture = self._make_capture()  # nothing can be captured into memory whose graphs are all gone

    def _count(self, key: tuple[Any, ...]) -> int:
        self._counts[hash(key)] = count = self._counts.pop(hash(key), 0) + 1
        if len(self._counts) > MAX_COUNTS:
            self._counts.popitem(last=False)
        return count

    def _make_graph(self, key: tuple[Any, ...], function: TensorFunction, arguments: Tensors) -> None:
        static = tuple(argument.clone() for argument in arguments)
        try:
            expected, outputs, replay = self._capture(function, static)
            replay()
            difference = max(map(_compare, expected, outputs))
        except torch.OutOfMemoryError:
            log.info("no memory for a CUDA graph: running without it")
            self._counts[hash(key)] = NEVER
            return
        except RuntimeError as error:
            log.warning("CUDA graphs are unavailable (%s): small batches run slower", str(error).split("\n")[0])
            self._disable()
            return
        if not difference <= MAX_DIFFERENCE:
            log.warning("a CUDA graph differs by %.3g from what it captured: running without graphs", difference)
            self._disable()
            return
        self._graphs[key] = Graph(static, outputs, replay)
        if len(self._graphs) > MAX_GRAPHS:
            dropped, _ = self._graphs.popitem(last=False)
            self._counts.pop(hash(dropped), None)

    def _disable(self) -> None:
        self._is_enabled = False
        self.clear()


def _compare(expected: Tensor, actual: Tensor) -> float:
    """Returns the largest difference relative to the largest value; NaN and infinity equal themselves."""
    if not expected.is_floating_point():
        return 0.0 if torch.equal(expected, actual) else float("inf")
    is_finite = expected.isfinite()
    if not torch.equal(is_finite, actual.isfinite()):
        return float("inf")
    difference = (expected - actual).masked_fill(~is_finite, 0).abs().max()
    return float(difference / expected.masked_fill(~is_finite, 0).abs().max().clamp(min=1e-6))


def make_cuda_capture() -> Capture:
    """Returns a function that captures CUDA graphs.

    Its graphs share memory, so none may run while the outputs of another are still needed. Memory is shared within one
    pool and one stream only.
    """
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def capture(function: TensorFunction, arguments: Tensors) -> tuple[Tensors, Tensors, Replay]:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries allocate their workspaces in the first pass on a stream
            expected = function(*arguments)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # a graph cannot use what is cached for passes without one
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            graph.capture_begin(pool=pool)
            try:
                outputs = function(*arguments)
            except BaseException:
                with contextlib.suppress(RuntimeError):  # the first error says more
                    graph.capture_end()
                raise
            graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        return expected, outputs, graph.replay

    return capture
