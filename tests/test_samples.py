"""The samples hold the contract of a model.py, score what they say they score, and run as scripts."""

from __future__ import annotations

import importlib.util
import itertools
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SAMPLES = Path(__file__).resolve().parent.parent / "samples"


def sample(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"sample_{name}", SAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def stdlib_lm() -> ModuleType:
    pytest.importorskip("transformers")
    return sample("stdlib_lm")


@pytest.fixture(scope="module")
def plain_moe() -> ModuleType:
    return sample("plain_moe")


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_language_model_reads_its_example_inputs(stdlib_lm: ModuleType) -> None:
    model, inputs = stdlib_lm.build_model(), stdlib_lm.example_inputs()
    assert not model.training
    assert model(**inputs).logits.shape == (2, 128, 256)


def test_language_model_calibration_is_seeded_and_leaves_the_evaluation_text_alone(stdlib_lm: ModuleType) -> None:
    first, again, other = (list(stdlib_lm.calibration_data(seed)) for seed in (0, 0, 1))
    assert len(first) == 400
    assert all(batch["input_ids"].shape == (16, 128) and batch["use_cache"] is False for batch in first)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0]["input_ids"], other[0]["input_ids"])
    held_back = (stdlib_lm.DATA / "evaluation.bin").read_bytes()
    assert not any(bytes(row.tolist()) in held_back for row in first[0]["input_ids"])


def test_language_model_has_learned_its_text(stdlib_lm: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sixteenth of the evaluation: far from the 8 bits of a model that knows nothing."""
    monkeypatch.setattr(stdlib_lm, "EVALUATION_WINDOWS", 64)
    assert stdlib_lm.evaluate(stdlib_lm.build_model())["bits per byte"] < 2.5


@pytest.mark.slow
def test_language_model_scores_what_its_readme_says(stdlib_lm: ModuleType) -> None:
    assert "scores 1.8351 bits per byte" in (SAMPLES / "stdlib_lm" / "README.md").read_text()
    score = stdlib_lm.evaluate(stdlib_lm.build_model())["bits per byte"]
    assert score == pytest.approx(1.8351, abs=1e-4)  # the digits given; another machine's rounding stays below them


@pytest.mark.slow
def test_language_model_runs_as_a_script(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    assert "bits per byte 1.835" in run(str(SAMPLES / "stdlib_lm.py"), cwd=tmp_path)


def test_plain_model_holds_the_contract(plain_moe: ModuleType) -> None:
    model = plain_moe.build_model()
    assert model(*plain_moe.example_inputs()).shape == (256, 24)
    batches = list(plain_moe.calibration_data())
    assert len(batches) == 200
    assert all(states.shape == (512, 24) for (states,) in batches)


def test_plain_model_needs_its_routed_experts(plain_moe: ModuleType) -> None:
    """What makes the sample mean something: it solves its task, and not without the experts that get converted."""
    model = plain_moe.build_model()
    assert plain_moe.evaluate(model)["unexplained variance"] == pytest.approx(0.0359, abs=1e-3)
    with torch.no_grad():
        for layer, expert in itertools.product(model.layers, range(plain_moe.EXPERTS)):
            layer.experts[expert].down.weight.zero_()
    assert plain_moe.evaluate(model)["unexplained variance"] > 0.5


@pytest.mark.slow
def test_plain_model_trains_itself_where_its_weights_are_absent(
    plain_moe: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(plain_moe, "WEIGHTS", tmp_path / "absent.safetensors")
    state = torch.get_rng_state()
    model = plain_moe.build_model()
    assert torch.equal(torch.get_rng_state(), state)
    # Rounding differs between machines and training amplifies it: the same quality, not the same weights.
    assert plain_moe.evaluate(model)["unexplained variance"] < 0.05


def test_plain_model_runs_as_a_script(tmp_path: Path) -> None:
    assert run(str(SAMPLES / "plain_moe.py"), cwd=tmp_path) == "unexplained variance 0.0359\n"


@pytest.mark.slow
def test_pass_pipeline_converts_the_graph_and_leaves_nothing_of_the_old_experts(tmp_path: Path) -> None:
    """The replaced loops over experts are written in place: they must be gone, not merely unread."""
    printed = run(str(SAMPLES / "pass_pipeline.py"), cwd=tmp_path)
    assert "modified: True" in printed
    assert printed.count(": moe softmax → top-2") == 2
    before, after = (int(n) for n in re.search(r"graph: (\d+) -> (\d+) nodes", printed).groups())
    assert after < before / 4
    old, new = (float(v) for v in re.search(r"unexplained variance: (\S+) -> (\S+)", printed).groups())
    assert old < new < 0.06
