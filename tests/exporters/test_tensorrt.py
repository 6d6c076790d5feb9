"""Engines are really built, without a GPU, from the ONNX files we write; what cannot be built is one line."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import latentize
from latentize.errors import LatentizeError, MissingExtraError
from latentize.exporters import tensorrt
from latentize.exporters.tensorrt import build
from latentize.exporters.tensorrt_profiles import Profile, choose, fixed_problem, shapes
from latentize.exporters.tensorrt_run import built_by, check_file
from latentize.moe import LatentMoE
from latentize.spec import ExpertsSpec, LatentSpec, MoESpec, RouterSpec

D, L, M, N, K = 16, 8, 16, 6, 2


def make_block(bypass: int = 0) -> LatentMoE:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    experts = ExpertsSpec(draw(N, M, L), draw(N, L, M), draw(N, M, L))
    router, projections = RouterSpec(draw(N, D), K, normalize="sum"), (draw(L, D), draw(D, L))
    around = (draw(bypass, D), draw(D, bypass)) if bypass else ()
    return LatentMoE(MoESpec(router, experts, LatentSpec(*projections, *around)))


def write_onnx(model: nn.Module, folder: Path, *args: torch.Tensor) -> None:
    pytest.importorskip("onnxscript")
    from latentize.exporters.onnx import export_onnx

    export_onnx(model, args, {}, folder / "model.onnx")


@pytest.mark.slow
@pytest.mark.parametrize(("target", "bypass"), [("portable", 0), ("SM80", 0), ("portable", 3)])
def test_engine_is_built_on_a_machine_without_a_gpu(target: str, bypass: int, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    write_onnx(make_block(bypass), tmp_path, torch.zeros(2, 5, D))
    steps = []
    profiles = (Profile((1, 1, 2), (1, 16, 32)), Profile((1, 1, 1), (1, 1, 1)))
    (engine,) = build(tmp_path, targets=(target,), profiles=profiles, progress=lambda *step: steps.append(step))
    assert engine.file == f"model.{target}.engine"
    assert engine.bytes == (tmp_path / engine.file).stat().st_size > 4 * N * M * L * 3  # the experts' weights are in it
    assert [list(one.values()) for one in engine.profiles] == [
        [((1, 1, D), (1, 16, D), (2, 32, D))], [((1, 1, D), (1, 1, D), (1, 1, D))],
    ]  # fmt: skip
    assert engine.library.startswith("tensorrt-rtx ")
    assert built_by(tmp_path / engine.file) == f"by {engine.library}, "
    assert (engine.dtype, engine.plugins, engine.plan) == ("float", 0, None)
    assert engine.layers["MATRIX_MULTIPLY"] >= 6 + 2 * bool(bypass)  # router, projections, three of the experts
    assert any(note.startswith(f"{target}: ") and done <= total for done, total, note in steps)
    assert {p.name for p in tmp_path.iterdir()} == {"model.onnx", engine.file}


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.moe = make_block()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.moe(x).unique()


@pytest.mark.slow
def test_operator_that_tensorrt_rejects_is_named(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    write_onnx(Unknown(), tmp_path, torch.zeros(2, 5, D))
    with pytest.raises(LatentizeError, match=r"cannot build it for portable: node .*[Uu]nique"):
        build(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"model.onnx"}


def test_missing_model_and_unknown_target_are_one_line(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(LatentizeError, match=r"holds no model\.onnx: convert with --export onnx first"):
        build(tmp_path)
    with pytest.raises(LatentizeError, match="target 'SM75' is not known: expected one of portable, SM80"):
        build(tmp_path, targets=("SM75",))


def test_broken_file_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    (tmp_path / "model.onnx").write_bytes(b"nothing of the kind")
    with pytest.raises(LatentizeError, match="not a readable ONNX file"):
        build(tmp_path)


@pytest.mark.parametrize("experts", ["dense", "plugin"])
@pytest.mark.parametrize("content", ["empty", "foreign"])
def test_a_graph_without_experts_is_one_line(tmp_path: Path, experts: Any, content: str) -> None:
    pytest.importorskip("tensorrt_rtx")
    onnx = pytest.importorskip("onnx")
    (tmp_path / "model.onnx").touch()
    if content == "foreign":
        info = onnx.helper.make_tensor_value_info
        values = [info(name, onnx.TensorProto.FLOAT, [2]) for name in "xy"]
        graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", values[:1], values[1:])
        onnx.save(onnx.helper.make_model(graph), tmp_path / "model.onnx")
    with pytest.raises(LatentizeError, match=r"model\.onnx: holds no latentize::LatentExperts node") as caught:
        build(tmp_path, experts=experts)
    assert caught.value.exit_code == 2
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def test_missing_library_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec

    def without(name: str, *rest: Any) -> Any:
        return None if name == "tensorrt_rtx" else found(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(MissingExtraError, match=r"'tensorrt-rtx', which is not installed: pip install 'latentize\[t"):
        build(tmp_path)


def test_files_that_are_no_engine_or_cut_short_are_refused_without_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "model.portable.engine"
    whole = b"vtrt" + bytes(12) + (64).to_bytes(8, "little") + bytes(40)
    path.write_bytes(b"something else")
    with pytest.raises(LatentizeError, match="is no TensorRT engine; build it with latentize build"):
        check_file(path)
    path.write_bytes(whole[:50])
    with pytest.raises(LatentizeError, match="cut short or damaged: 50 bytes where it names 64"):
        check_file(path)
    path.write_bytes(whole)
    check_file(path)
    assert built_by(path) == "by tensorrt-rtx 0.0.0.0, "
    path.write_bytes(b"ptrt" + whole[4:])
    assert built_by(path) == ""  # the full library's head is another


@pytest.mark.parametrize(
    ("asked", "recipe", "longest", "expected"),
    [
        ((), (), None, ["1:1:4x1:16:256"]),
        ((), (), 64, ["1:1:4x1:16:64"]),
        ((), ({"batch": (1, 1, 1), "tokens": (1, 8, 32)},), 64, ["1x1:8:32"]),
        (("1x4:4:16", "1x1"), ({"batch": (1, 1, 1), "tokens": (1, 8, 32)},), 64, ["1x4:4:16", "1x1"]),
    ],
)
def test_profiles_are_those_asked_for_or_the_recipes(asked: Any, recipe: Any, longest: Any, expected: Any) -> None:
    assert [str(p) for p in choose([Profile.parse(text) for text in asked], recipe, longest)] == expected


def test_profiles_that_contradict_the_model_or_the_graph_are_refused() -> None:
    with pytest.raises(LatentizeError, match="profile 1x1:8:65 asks for 65 tokens, and the model takes 64 at most"):
        choose([Profile.parse("1x1:8:65")], (), 64)
    problem = fixed_problem("ids", (-1, 5), False, Profile.parse("1:1:2x1:5:9"))
    assert "asks for tokens 1:5:9, and axis 1 of input 'ids' is always 5 in the graph" in problem
    assert fixed_problem("ids", (-1, 5), False, Profile.parse("1:1:2x5")) == ""
    assert fixed_problem("states", (-1, -1, 16), True, Profile.parse("1x1:5:9")) == ""


@pytest.mark.parametrize(
    ("status", "last", "words"),
    [(-9, "", "ran out of memory or disk"), (1, "cudaMalloc: out of memory", "ran out"), (134, "abort", "status 134"),
     (1, "OSError: [Errno 28] No space left on device", "disk")],
)
def test_a_worker_that_dies_is_one_line(
    status: int, last: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = "os.kill(os.getpid(), 9)" if status < 0 else f"sys.exit({status})"
    script = f"import os, sys; print({last!r}, file=sys.stderr); {end}"
    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda _command, **kwargs: real([sys.executable, "-c", script], **kwargs))
    with pytest.raises(LatentizeError, match=words) as error:
        tensorrt._ask_worker({}, tmp_path, tensorrt.silent)
    assert error.value.exit_code == (2 if status == 134 else 5)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_worker_ends_with_the_process_that_asked_it(tmp_path: Path, number: signal.Signals) -> None:
    library = "import os, pathlib, time; pathlib.Path('worker').write_text(str(os.getpid())); time.sleep(600)"
    (tmp_path / "sleeping.py").write_text(library)
    asks = (
        "import pathlib; from latentize.exporters import tensorrt\n"
        "tensorrt._ask_worker({'library': 'sleeping'}, pathlib.Path.cwd(), tensorrt.silent)"
    )
    root = Path(latentize.__file__).parents[1]
    path = os.pathsep.join([str(tmp_path), str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    parent = subprocess.Popen([sys.executable, "-c", asks], cwd=tmp_path, env={**os.environ, "PYTHONPATH": path})
    try:
        file = tmp_path / "worker"
        wait_until(lambda: (file.exists() and file.read_text() != "") or parent.poll() is not None)
        worker = int(file.read_text())
        parent.send_signal(number)
        assert parent.wait() == -number
        wait_until(lambda: gone(worker))
    finally:
        parent.kill()


def wait_until(condition: Callable[[], object]) -> None:
    ends = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.02)


def gone(process: int) -> bool:
    """Whether a process has ended, whoever reaps it."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def test_what_the_library_said_last_is_why_nothing_was_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much it said, and with nowhere on disk to keep it."""
    script = (
        "import json, sys; sys.stderr.write('a line\\n' * 50000 + 'Error 10: no tactic\\n\\n'); "
        "print(json.dumps({'error': 'the builder found no implementation', 'why': True}))"
    )
    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda _command, **kwargs: real([sys.executable, "-c", script], **kwargs))
    answer = tensorrt._ask_worker({}, tmp_path, tensorrt.silent)
    assert answer["error"] == "the builder found no implementation: Error 10: no tactic"
    assert [entry.name for entry in tmp_path.iterdir()] == ["lib"]


@pytest.mark.parametrize(
    ("shape", "floating", "expected"),
    [
        ((-1, -1), False, [[1, 1], [1, 16], [4, 64]]),  # ids
        ((-1, -1, 8), True, [[1, 1, 8], [1, 16, 8], [4, 64, 8]]),  # hidden states
        ((-1, 8), True, [[1, 8], [16, 8], [64, 8]]),  # hidden states without a batch
        ((3, 5), True, [[3, 5], [3, 5], [3, 5]]),
    ],
)
def test_profile_covers_one_token_to_the_largest(shape: tuple[int, ...], floating: bool, expected: list[Any]) -> None:
    assert shapes(shape, floating, Profile((1, 1, 4), (1, 16, 64))) == expected
