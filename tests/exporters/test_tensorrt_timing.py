"""What a build of the full library measured serves the next one; what is not of this library and device never does."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorrt_stand_in import Builder, Trt

from latentize.exporters import tensorrt_library, tensorrt_worker
from latentize.exporters.tensorrt import Engine
from latentize.run_build import describe


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder of a machine with the full library and a GPU."""
    monkeypatch.setattr(tensorrt_library, "load", lambda module: Trt)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(Builder, "timed", [])
    return tmp_path / "cache"


def build(folder: Path, library: str = "tensorrt") -> dict[str, Any]:
    request = {
        "library": library, "plugin": False, "quick": [], "tokens": 16, "strict": True, "target": "native",
        "profiles": [[[1, 1, 4], [1, 16, 256]]], "source": "model.onnx", "cache": str(folder),
        "engine": str(folder.parent / "engine"),
    }  # fmt: skip
    return tensorrt_worker.main(request)


def only_file(folder: Path) -> Path:
    (file,) = folder.iterdir()
    return file


def test_the_second_build_measures_nothing_again(folder: Path) -> None:
    first, second = build(folder), build(folder)
    assert Builder.timed == [["gemm", "softmax"], []]
    assert [answer["timed_before"] for answer in (first, second)] == [False, True]
    assert first["notes"] == second["notes"] == []
    assert only_file(folder).name == "tensorrt-10.9.0-nvidia-h100-80gb-hbm3-9.0.timing"
    assert (first["layers"], first["plugins"]) == ({"MATRIX_MULTIPLY": 2, "PLUGIN_V3": 1}, 1)
    assert first["plan"] == ["gemm + softmax", "experts"]


def test_another_version_and_another_device_have_files_of_their_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(folder)
    monkeypatch.setattr(Trt, "__version__", "10.13.0")
    assert build(folder)["notes"] == []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert not build(folder)["timed_before"]
    assert len(list(folder.iterdir())) == 3
    assert Builder.timed == [["gemm", "softmax"]] * 3


def damage(stored: bytes, how: str) -> bytes:
    if how == "empty":
        return b""
    if how == "cut":
        return stored[:-5]
    if how == "turned":
        return stored[:-5] + bytes([stored[-5] ^ 1]) + stored[-4:]
    if how == "foreign":
        return b"\x00\xff" * 100
    return stored.replace(b"sha256", b"[[[[[[")


@pytest.mark.parametrize("how", ["empty", "cut", "turned", "foreign", "headless"])
def test_a_damaged_cache_is_said_not_used_and_made_anew(folder: Path, how: str) -> None:
    build(folder)
    file = only_file(folder)
    whole = file.read_bytes()
    file.write_bytes(damage(whole, how))
    answer = build(folder)
    assert answer["notes"] == [f"timing cache {file}: not used (cut short or damaged); made anew"]
    assert not answer["timed_before"]
    assert Builder.timed[1] == ["gemm", "softmax"]
    assert file.read_bytes() == whole
    assert build(folder)["timed_before"]


def test_a_cache_of_another_version_under_this_ones_name_is_not_used(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(folder)
    old = only_file(folder)
    monkeypatch.setattr(Trt, "__version__", "10.13.0")
    moved = old.with_name(old.name.replace("10.9.0", "10.13.0"))
    old.rename(moved)
    (note,) = build(folder)["notes"]
    assert note == f"timing cache {moved}: not used (is of tensorrt 10.9.0 on NVIDIA H100 80GB HBM3 9.0); made anew"
    assert build(folder)["timed_before"]


def test_a_cache_that_the_library_refuses_is_not_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(folder)
    monkeypatch.setattr(Builder, "device", "the same GPU with another driver")
    answer = build(folder)
    assert answer["notes"] == [f"timing cache {only_file(folder)}: not used (the library does not take it); made anew"]
    assert Builder.timed == [["gemm", "softmax"]] * 2
    assert build(folder)["timed_before"]


def test_a_full_disk_costs_the_cache_and_not_the_engine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(folder)
    before = only_file(folder).read_bytes()

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    answer = build(folder)
    assert "error" not in answer
    assert answer["notes"] == [f"timing cache {only_file(folder)}: not kept (No space left on device)"]
    assert only_file(folder).read_bytes() == before  # and nothing half-written beside it
    assert (folder.parent / "engine").read_bytes() == b"ptrt engine"


def test_a_cache_folder_that_is_a_file_costs_the_cache_and_not_the_engine(folder: Path) -> None:
    folder.write_text("")
    answer = build(folder)
    assert len(answer["notes"]) == 2
    assert all("Not a directory" in note or "File exists" in note for note in answer["notes"])
    assert (folder.parent / "engine").exists()


def test_what_happened_is_in_the_line_of_the_engine(folder: Path) -> None:
    build(folder)
    answer = json.loads(json.dumps(build(folder)))  # as it comes from the worker's process
    engine = Engine(
        "model.native.engine", "native", answer["library"], "dense", "float", (), answer["layers"], answer["plugins"],
        tuple(answer["plan"]), 11, 2.0, answer["timed_before"], ("timing cache x: not kept (full)",),
    )  # fmt: skip
    line = describe(engine)
    assert "by tensorrt 10.9.0 in 2.0 s, with the timings of an earlier build, 3 layers, 1 of them latentize's" in line
    assert ", of which 2 are left to run" in line
    assert line.endswith("; timing cache x: not kept (full)")
