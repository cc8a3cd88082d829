import sys
from types import SimpleNamespace

import pytest

from tests.detection.emulation import EmulatedKernel


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> EmulatedKernel:
    kernel = EmulatedKernel()
    monkeypatch.setitem(sys.modules, "backend.detection.deformable_attention_triton", SimpleNamespace(sample=kernel))
    return kernel
