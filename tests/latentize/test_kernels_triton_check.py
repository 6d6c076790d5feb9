"""benchmarks/gpu_check.py as far as a machine without a GPU can run it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_check.py"


@pytest.fixture(scope="module")
def gpu_check():
    specification = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_without_a_device_it_says_so_on_one_line():
    done = run()
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "no CUDA device" in done.stderr


def test_dry_run_checks_measures_and_writes(tmp_path):
    pytest.importorskip("triton")
    done = run("--dry-run", "--only", "CUDA graph", "TensorRT plugin", "--tokens", "2", "--output", str(tmp_path))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    record = json.loads((tmp_path / "gpu-cpu-interpreter.json").read_text())
    outcomes = [(c["check"], c["outcome"]) for c in record["checks"]]
    assert outcomes == [("CUDA graph", "skipped"), ("TensorRT plugin", "ok")]
    rows = {(r["block"], r["form"]): r for r in record["times"]}
    assert {block for block, _ in rows} == {"original", "acc, alpha 2"}
    forms = {form for _, form in rows}
    assert {"block ours", "block grouped_mm", "experts decode", "experts fused", "experts grouped"} <= forms
    for row in rows.values():
        assert row["us"] > 0
        assert (row["error"] is None) == (not row["form"].startswith("experts"))
        assert row["error"] is None or row["error"] < row["tolerance"]
    one = rows["acc, alpha 2", "experts ours"]
    assert one["bytes"] == one["experts_hit"] * 3 * 16 * 12 * 4
    assert one["flops"] == 2 * 2 * 4 * 3 * 16 * 12
    assert "against_grouped_mm" in (tmp_path / "gpu-cpu-interpreter.txt").read_text()


def test_a_failing_check_is_a_failing_run(gpu_check, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import gpu_correct

    def fails(where):
        raise AssertionError("0.5 is not 0.4")

    monkeypatch.setitem(gpu_correct.CHECKS, "fails", fails)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "device_name", lambda _: "none")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: True)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--only", "fails", "--no-times", "--no-keep"])
    assert gpu_check.main() == 1


def row(family, block, form, tokens, us, **more):
    return {
        "family": family,
        "block": block,
        "form": form,
        "tokens": tokens,
        "us": us,
        "bandwidth": 0.5,
        "gemm": 0.7,
    } | more


def test_requirements_are_read_off_the_rows(gpu_check):
    rows = [
        row("95BT-8BA", "original", "block ours", 16, 100.0),
        row("95BT-8BA", "acc, alpha 4", "block ours", 16, 107.0),
        row("95BT-8BA", "acc, alpha 4", "experts ours", 16, 50.0, copied=0.9, error=1e-3, tolerance=1e-2),
        row("95BT-8BA", "acc, alpha 4", "experts grouped_mm", 16, 100.0),
        row("95BT-8BA", "original", "experts ours", 1, 30.0),
        row("95BT-8BA", "eff, alpha 4", "experts ours", 1, 10.0),
    ]
    answers = {a["what"].partition(": ")[2]: (a["measured"], a["met"]) for a in gpu_check.requirements(rows)}
    assert answers == {
        "relative error against fp64": (1e-3, True),
        "experts' fraction of copy bandwidth": (0.5, False),
        "experts' fraction of the rate of a copy of as many bytes": (0.9, True),
        "experts, times as fast as grouped_mm": (2.0, True),
        "time of acc, alpha 4 over the original's": (pytest.approx(1.07), False),
        "eff, routed path, times as fast as the original's": (3.0, True),
    }


def test_runs_in_parts_add_up(gpu_check):
    old = [{"check": "a", "outcome": "failed"}, {"check": "b", "outcome": "ok"}]
    merged = gpu_check.merge(old, [{"check": "a", "outcome": "ok"}, {"check": "c", "outcome": "ok"}], ("check",))
    assert [(row["check"], row["outcome"]) for row in merged] == [("b", "ok"), ("a", "ok"), ("c", "ok")]


def test_ratios_set_latent_against_original_and_against_torch(gpu_check):
    rows = [
        row("f", "original", "block ours", 4, 90.0),
        row("f", "latent", "block ours", 4, 30.0),
        row("f", "latent", "block grouped_mm", 4, 60.0),
        row("g", "latent", "block ours", 4, 10.0),
        row("g", "latent", "block grouped_mm", 4, 5.0),
    ]
    first, second = gpu_check.ratios(rows)
    assert (first["speedup"], first["against_grouped_mm"]) == (3.0, 2.0)
    assert (second["speedup"], second["against_grouped_mm"]) == (None, 0.5)
