"""Device selection as on a machine with one GPU; torch's own checks of devices run, only the driver is replaced."""

import pytest
import torch

from backend.detection.checkpoints import load_checkpoint
from backend.detection.detector import Detector
from backend.detection.device import choose_device, choose_precision, is_device_error
from backend.errors import ImageError, SettingsError
from backend.registry.checkpoint import DEMO_CHECKPOINT
from backend.settings import Settings


@pytest.fixture
def selected_gpus(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One GPU as far as the driver says; returns the indices that `torch.cuda.set_device` passes to the driver."""
    selected: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", selected.append, raising=False)
    return selected


def test_the_error_names_a_device_that_does_not_exist() -> None:
    for device in ("cuda:7", "toaster"):
        with pytest.raises(SettingsError, match=f"DEVICE={device} cannot be used"):
            choose_device(Settings(model="demo", device=device))


def test_auto_is_the_cpu_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    settings = Settings(model="demo", device="auto")
    assert choose_device(settings) == "cpu"
    assert choose_precision(settings) is torch.float32


@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:0"])
def test_a_gpu_is_chosen_with_its_index(device: str, selected_gpus: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "zeros", lambda *size, device: None)  # the trial allocation succeeds
    settings = Settings(model="demo", device=device)
    assert choose_device(settings) == "cuda:0"
    assert choose_precision(settings) is torch.float16
    torch.cuda.set_device(torch.device(choose_device(settings)))  # raises ValueError without an index
    assert selected_gpus == [0]


def test_a_cpu_takes_no_float16() -> None:
    with pytest.raises(SettingsError, match="PRECISION=float16 needs a GPU"):
        choose_precision(Settings(model="demo", device="cpu", precision="float16"))


@pytest.mark.parametrize(
    ("capabilities", "is_taken"),
    [
        ({"avx512_bf16": True}, True),
        ({"avx512_bf16": False, "amx_bf16": True}, True),
        ({"avx512_bf16": False, "amx_bf16": False, "avx512_f": True}, False),
        ({}, False),
    ],
)
def test_a_cpu_takes_bfloat16_only_if_it_multiplies_in_it(
    capabilities: dict[str, bool], is_taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    settings = Settings(model="demo", device="cpu", precision="bfloat16")
    if is_taken:
        assert choose_precision(settings) is torch.bfloat16
    else:
        with pytest.raises(SettingsError, match="PRECISION=bfloat16 needs a processor with avx512_bf16 or amx_bf16"):
            choose_precision(settings)


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_a_detector_selects_its_gpu_by_index(
    device: str, selected_gpus: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = load_checkpoint(str(DEMO_CHECKPOINT))
    moved_to = []
    monkeypatch.setattr(checkpoint.model, "to", lambda target: moved_to.append(target) or checkpoint.model)
    detector = Detector(*checkpoint, device)
    assert moved_to == [detector.device] == [torch.device("cuda:0")]
    assert selected_gpus == [0]


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        torch.AcceleratorError("CUDA error: out of memory"),
        torch.AcceleratorError("no message that we know"),
        torch.cuda.CudaError.__new__(torch.cuda.CudaError),  # its constructor asks the driver for a message
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
        RuntimeError("CUDA driver error: unknown error"),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("HIP error: the operation cannot be performed in the present state"),
    ],
    ids=str,
)
def test_an_error_that_breaks_the_context_is_a_device_error(error: BaseException) -> None:
    assert is_device_error(error)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79 GiB"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
        RuntimeError("Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"),
        ImageError("https://host/CUDA error: no such image"),
        ValueError("CUDA error"),
        MemoryError(),
        KeyboardInterrupt(),
    ],
    ids=repr,
)
def test_an_error_that_leaves_the_context_intact_is_no_device_error(error: BaseException) -> None:
    assert not is_device_error(error)
