"""What only a GPU has, on the CPU: the Triton kernel, and CUDA's capture of a graph."""

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from backend.detection.cuda_graphs import Replay, TensorFunction, Tensors
from backend.detection.deformable_attention import locate_samples, sample_rows


class EmulatedKernel:
    """Replaces the Triton kernel, which has a test of its own, on the CPU; counts calls by the type of the values.

    The parameters have the kernel's names, because the trial run passes them by keyword.
    """

    def __init__(self) -> None:
        self.calls: Counter[torch.dtype] = Counter()

    def __call__(
        self,
        values: torch.Tensor,
        reference: torch.Tensor,
        offsets: torch.Tensor,
        logits: torch.Tensor,
        shapes: torch.Tensor,
        starts: torch.Tensor,
    ) -> torch.Tensor:
        self.calls[values.dtype] += 1
        output = sample_rows(locate_samples, values.float(), reference, offsets.float(), logits.float(), shapes, starts)
        return output.to(values.dtype)


class EmulatedCapture:
    """Counts captures and replays; `change` alters what replays write."""

    def __init__(self, change: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> None:
        self.captures, self.replays, self.change = 0, 0, change

    def __call__(self, function: TensorFunction, arguments: Tensors) -> tuple[Tensors, Tensors, Replay]:
        self.captures += 1
        expected = function(*arguments)
        outputs = tuple(tensor.clone() for tensor in expected)

        def replay() -> None:
            self.replays += 1
            for output, value in zip(outputs, function(*arguments), strict=True):
                output.copy_(self.change(value))

        return expected, outputs, replay
