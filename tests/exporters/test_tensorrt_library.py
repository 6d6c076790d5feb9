"""The seam between the two flavours of TensorRT."""

from __future__ import annotations

import pytest

from latentize.errors import LatentizeError
from latentize.exporters.tensorrt_library import require_capability


def refused(module: str, capability: tuple[int, int]) -> bool:
    try:
        require_capability(module, capability, "a GPU")
    except LatentizeError:
        return True
    return False


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (12, 0), (12, 1)])
def test_tensorrt_rtx_runs_on_what_it_says(capability):
    assert not refused("tensorrt_rtx", capability)


@pytest.mark.parametrize("capability", [(7, 5), (9, 0), (10, 0)])
def test_tensorrt_rtx_runs_on_nothing_else_and_the_full_library_on_all(capability):
    where = rf"NVIDIA X has compute capability {capability[0]}\.{capability[1]}, on which tensorrt-rtx runs no engine"
    with pytest.raises(LatentizeError, match=where + r": it knows 8\.0, 8\.6, 8\.9 and 12\.0 or newer"):
        require_capability("tensorrt_rtx", capability, "NVIDIA X")
    assert not refused("tensorrt", capability)
