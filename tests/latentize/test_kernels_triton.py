from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from latentize import kernels_triton, ops
from latentize.activations import Activation
from latentize.kernels_torch import Experts
from latentize.kernels_triton_steps import (
    Config,
    Cut,
    Problem,
    Step,
    block_count,
    choose_form,
    fitting,
    fusing,
    steps,
    streaming,
    tiling,
    workspaces,
)
from latentize.kernels_triton_tune import ConfigRefusedError, Tuner

SILU = Activation("silu")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def problem(experts=64, k=8, width=1024, m=768, dtype=torch.bfloat16, gated=True) -> Problem:
    return Problem.contiguous(experts, k, width, m, dtype, SILU, gated=gated, biases=False)


@needs_triton
def test_kernels_in_the_interpreter():
    """The cases are in test_kernels_triton_interpreted.py."""
    cases = Path(__file__).with_name("test_kernels_triton_interpreted.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


def arguments(dtype=torch.float32) -> tuple[torch.Tensor, Experts]:
    up, down = torch.randn(4, 6, 3).to(dtype), torch.randn(4, 3, 6).to(dtype)
    return torch.randn(5, 3).to(dtype), Experts(None, up, down, None, None, None)


def test_cpu_tensors_are_left_to_other_kernels():
    assert not kernels_triton.serves(*arguments())


@pytest.mark.parametrize("obstacle", ["switch", "package", "dtype", "rows"])
def test_what_cannot_be_served_falls_back(monkeypatch, obstacle):
    """On a device all else would be served."""
    monkeypatch.setattr(kernels_triton, "_interpreted", lambda: True)
    monkeypatch.setattr(kernels_triton, "_installed", lambda: True)
    hidden, experts = arguments()
    assert kernels_triton.serves(hidden, experts)
    if obstacle == "switch":
        monkeypatch.setenv("LATENTIZE_TRITON", "0")
    elif obstacle == "package":
        monkeypatch.setattr(kernels_triton, "_installed", lambda: False)
    elif obstacle == "dtype":
        hidden, experts = arguments(torch.float64)
    else:
        experts = experts._replace(up=experts.up.transpose(1, 2).contiguous().transpose(1, 2))
    assert not kernels_triton.serves(hidden, experts)
    indices, weights = torch.zeros(5, 2, dtype=torch.int64), torch.ones(5, 2, dtype=hidden.dtype)
    assert torch.isfinite(ops.compute(hidden, indices, weights, *experts, SILU, False)).all()


def test_a_device_on_which_they_do_not_run_is_left_to_torch_with_one_line(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())

    def fails(_):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(kernels_triton, "_passes_values_through", fails)
    kernels_triton._launches.cache_clear()
    with caplog.at_level("INFO", logger="latentize.kernels_triton"):
        assert not kernels_triton._works(0)
        assert not kernels_triton._works(0)
    (line,) = (record.getMessage() for record in caplog.records)
    assert "plain torch is used: Failed to find C compiler" in line
    monkeypatch.setattr(kernels_triton, "_passes_values_through", lambda _: True)
    kernels_triton._launches.cache_clear()
    assert kernels_triton._works(0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    kernels_triton._launches.cache_clear()
    assert not kernels_triton._works(0)
    kernels_triton._launches.cache_clear()


def test_neither_the_operator_nor_running_it_on_cpu_imports_triton():
    script = (
        "import sys, torch\nfrom latentize import ops\nfrom latentize.activations import Activation\n"
        "t, i = torch.ones(1, 1, 1), torch.zeros(1, 1, dtype=torch.int64)\n"
        "ops.compute(t[0], i, t[0], None, t, t, None, None, None, Activation(), False)\n"
        "assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    "tokens, width, experts, k, form",
    [
        (1, 1024, 512, 22, "decode"),
        (4, 1024, 512, 22, "decode"),
        (64, 1024, 512, 22, "grouped"),
        (64, 256, 512, 22, "fused"),
        (1, 1024, 8, 8, "decode"),
        (2, 1024, 8, 8, "grouped"),
        (5, 64, 1, 1, "fused"),
    ],
)
def test_form_follows_how_many_pairs_share_an_expert(tokens, width, experts, k, form):
    assert choose_form(problem(experts, k, width), tokens) == form


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [5, 100, 256])
def test_configs_fit_the_sizes_and_the_smallest_devices(dtype, width):
    p = problem(width=width, m=30, dtype=dtype)
    for config in streaming(p, width):
        assert config.constants["INNER"] < 2 * max(16, width)
        assert config.constants["ROWS"] * config.constants["INNER"] * dtype.itemsize <= 4096 * 2
    largest = Cut.of(p, 10**6, "fused").block
    for configs in (streaming(p, width), tiling(p, 128, up=True), fusing(p, largest)):
        assert fitting(configs, 101376)[0].shared <= 101376
        assert fitting(configs, 0) == (min(configs, key=lambda config: config.shared),)


CONFIGS = tuple(Config({"ROWS": rows}) for rows in (1, 2, 4))
SECONDS = {1: 3.0, 2: 1.0, 4: 2.0}


class Clock:
    """A device on which a config takes the seconds of a table, and others cannot run."""

    def __init__(self, seconds):
        self.seconds, self.measured = seconds, []

    def __call__(self, attempt, config):
        rows = config.constants["ROWS"]
        self.measured.append(rows)
        if rows not in self.seconds:
            raise ConfigRefusedError("out of resource: shared memory")
        return self.seconds[rows]


def a_step(key="k") -> Step:
    return Step("name", None, {}, lambda *_: (1,), CONFIGS, key)


def test_tuner_takes_the_fastest_that_runs_and_measures_once():
    clock = Clock({2: 2.0, 4: 1.0})
    tuner = Tuner(None, clock)
    assert tuner.known(a_step()) is None
    with ThreadPoolExecutor(4) as pool:
        chosen = list(pool.map(lambda _: tuner.choose(a_step(), CONFIGS, lambda _: None), range(8)))
    assert set(map(id, chosen)) == {id(CONFIGS[2])}
    assert clock.measured == [1, 2, 4]
    assert tuner.known(a_step()) == CONFIGS[2]


def test_tuner_keeps_choices_in_a_file(tmp_path):
    path = tmp_path / "cache" / "choices.json"
    for key in ("k", "another"):
        Tuner(path, Clock(SECONDS)).choose(a_step(key), CONFIGS, lambda _: None)
    assert set(json.loads(path.read_text())) == {"k", "another"}
    again = Clock({})
    assert Tuner(path, again).choose(a_step(), CONFIGS, lambda _: None) == CONFIGS[1]
    assert again.measured == []


@pytest.mark.parametrize("content", ["", "[1]", '{"k": {"ROWS": 77}}'])
def test_tuner_measures_again_where_the_file_is_of_no_use(tmp_path, content):
    (tmp_path / "choices.json").write_text(content)
    tuner = Tuner(tmp_path / "choices.json", Clock(SECONDS))
    assert tuner.choose(a_step(), CONFIGS, lambda _: None) == CONFIGS[1]


def test_tuner_says_why_no_config_runs():
    with pytest.raises(RuntimeError, match="k: no configuration runs on this device: out of resource: shared memory"):
        Tuner(None, Clock({})).choose(a_step(), CONFIGS, lambda _: None)


@needs_triton
def test_a_step_knows_its_arguments_constants_and_grid():
    up, down = steps(problem(), Cut.of(problem(), 1))
    assert up.arguments == ("hidden", "indices", "weights", "gate", "up", "gate_bias", "up_bias", "activated")
    assert down.arguments[-1] == "combined"
    assert (up.constants["WIDTH"], up.constants["TOP_K"], up.constants["UP_STRIDE"]) == (1024, 8, 768 * 1024)
    assert up.grid(3, {"ROWS": 4}) == (24, 192)
    assert steps(problem(), Cut.of(problem(), 1)) is steps(problem(), Cut.of(problem(), 2))
    p = problem(width=128)
    cut = Cut.of(p, 64)
    count, place, fused, combine = steps(p, cut)
    assert [s.name for s in (count, place, fused, combine)] == ["count_pairs", "place_pairs", "fused", "combine"]
    assert fused.grid(64, {}) == (block_count(p, 512, cut.block) * cut.splits,)
    given = {"hidden", "indices", "weights", "gate", "up", "down", "gate_bias", "up_bias", "down_bias", "combined"}
    named = {name for step in (count, place, fused, combine) for name in step.arguments} - {"pairs", "blocks"}
    assert named - given == set(workspaces(p, 64, cut))
