"""The analysis of many experts and many layers stays within its seconds and its memory."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def scale() -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("scale", BENCHMARKS / "scale.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["scale"] = module
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "loop over 128 experts",
        "512 stacked experts",
        "48 layers of 128 experts",
        "48 layers of 128 experts on meta",
    ],
)
def test_inspect_scales(scale: ModuleType, name: str) -> None:
    row = scale.run(name)
    assert row["blocks"] == row["of"]
    assert row["CPU seconds"] <= row["allowed"]
    assert row["MiB beyond the model"] <= 2048
