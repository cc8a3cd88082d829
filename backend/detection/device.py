"""The device and precision to run on, and the errors after which a device can no longer be used."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from backend.errors import SettingsError
from backend.settings import Settings

# In the messages of plain RuntimeErrors that CUDA, its libraries and Triton cause; ROCm writes HIP in place of CUDA.
DEVICE_ERROR = re.compile(
    r"(CUDA|HIP)( driver)? error|(cuDNN|MIOpen) error|(CUBLAS|CUDNN|CUSOLVER|CUSPARSE|HIPBLAS)_STATUS_|Triton Error \[",
    re.IGNORECASE,
)


def choose_device(settings: Settings) -> str:
    """Returns the torch device that the settings choose; a GPU always with its index, such as `cuda:0`.

    Raises:
        SettingsError: the device does not exist or does not work.
    """
    if settings.device == "auto":
        return str(with_index("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        torch.zeros(1, device=settings.device)
    except (RuntimeError, AssertionError) as error:  # the latter if torch was built without CUDA
        reason = str(error).splitlines()[0]
        raise SettingsError(f"DEVICE={settings.device} cannot be used ({reason}); try cpu, or auto") from None
    return str(with_index(settings.device))


def with_index(device: str | torch.device) -> torch.device:
    """Returns the device; a plain `cuda` with the index of the current GPU.

    `torch.cuda.set_device` refuses a device without an index.
    """
    device = torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if str(device) == "cuda" else device


def choose_precision(settings: Settings) -> torch.dtype:
    """Returns the precision of those modules of the model that tolerate a reduced one.

    Raises:
        SettingsError: the device does not exist, or lacks the precision that the settings name.
    """
    name, is_on_gpu = settings.precision, choose_device(settings).startswith("cuda")
    if name == "auto":
        name = "float16" if is_on_gpu else "float32"
    if name == "float16" and not is_on_gpu:
        raise SettingsError("PRECISION=float16 needs a GPU; on a CPU use auto, or bfloat16 if the processor has it")
    if name == "bfloat16" and not is_on_gpu and not has_bfloat16(torch.cpu.get_capabilities()):
        raise SettingsError(
            "PRECISION=bfloat16 needs a processor with avx512_bf16 or amx_bf16, which this one lacks; use auto"
        )
    precision: torch.dtype = getattr(torch, name)
    return precision


def has_bfloat16(capabilities: Mapping[str, object]) -> bool:
    """Returns True if the processor multiplies in bfloat16; others emulate it, slower than float32."""
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def is_device_error(error: BaseException) -> bool:
    """Returns True if an error leaves this process unable to use the GPU, or may do so.

    After an illegal memory access or a hardware fault, CUDA fails every later call of the process with the same error.
    A worker that carried on would fail job after job within milliseconds. Only a new process gets a working context, so
    the caller has to end this one.

    `torch.OutOfMemoryError` is no device error: torch's allocator raises it before any kernel starts, and the context
    stays intact. A shortage of memory that surfaces elsewhere ("Triton Error [CUDA]: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED") is one, because it leaves the context in an unknown state.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return False
    if isinstance(error, (torch.AcceleratorError, torch.cuda.CudaError)):
        return True
    return isinstance(error, RuntimeError) and DEVICE_ERROR.search(str(error)) is not None
