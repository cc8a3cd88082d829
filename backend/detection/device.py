"""Which device and precision the settings mean."""

from __future__ import annotations

import torch

from backend.errors import SettingsError
from backend.settings import Settings


def choose_device(settings: Settings) -> str:
    """The torch device that the settings mean.

    Raises:
        SettingsError: there is no such device.
    """
    if settings.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=settings.device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        reason = str(error).splitlines()[0]
        raise SettingsError(f"DEVICE={settings.device} cannot be used ({reason}); try cpu, or auto") from None
    return settings.device


def choose_precision(settings: Settings) -> torch.dtype:
    """The precision of the parts that need not be exact."""
    name = settings.precision
    if name == "auto":
        name = "float16" if choose_device(settings).startswith("cuda") else "float32"
    found: torch.dtype = getattr(torch, name)
    return found
