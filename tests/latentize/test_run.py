"""The whole job on a tiny model: files, report, gates, dry run, interruption and resumption."""

import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import small_moe
import torch
from command_line import call
from onnx_backends import graphs

import latentize
from latentize import api, report
from latentize.errors import GateError
from latentize.inputs import Inputs
from latentize.run_onnx import redraw
from latentize.sources import Source, open_model

pytest.importorskip("onnxruntime")

MODEL = Path(small_moe.__file__).read_text() + """
def batch(seed, rows=64):
    return (torch.randn(rows, 16, generator=torch.Generator().manual_seed(seed)),)
def example_inputs():
    return batch(1, 40)
def calibration_data():
    return (batch(seed) for seed in range(2, 8))
def evaluate(model):
    wanted = build_model()(*batch(99))
    return {"error": 1.0 + (model(*batch(99)) - wanted).norm().item() / wanted.norm().item()}
"""


@pytest.fixture
def net(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(MODEL)
    return tmp_path


def names(folder):
    return sorted(file.name for file in folder.iterdir() if not file.name.startswith("__pycache__"))


def test_the_job_writes_everything_and_says_where(net, capsys):
    code, out, err = call(capsys, "net.py", "-o", "out", "--latent-dim", "8", "--heal", "4", "--export", "onnx")
    assert code == 0, err
    assert names(net) == ["net.py", "out"]
    wanted = {
        "latentize.json",
        "model.safetensors",
        "README.md",
        "net.py",
        "model.onnx",
        "original.onnx",
        "report.json",
        "report.html",
    }
    assert wanted <= set(names(net / "out"))
    for words in ("Blocks found", "Plan", "16 → 8", "4 → 8", "2 → 4", "Error per block", "Evaluation", "Latency",
                  "ONNX against PyTorch", "Files in out"):  # fmt: skip
        assert words in out, words
    assert "heal" in err
    assert "peak" in err

    made = report.read(net / "out")
    block = made.blocks[0]
    assert (block.name, block.status, block.plan.latent_dim) == ("moe", "moe", 8)
    assert block.evidence
    assert block.errors.initialised > 0
    assert block.errors.healed_end_to_end > 0
    assert block.load_before.tokens == block.load_after.tokens == 64  # the one batch that healing held out
    assert sum(block.load_after.counts) == 4 * block.load_after.tokens
    assert made.evaluation.metric == "error"
    assert made.evaluation.original["error"] == 1.0
    assert made.evaluation.rewritten["error"] <= made.evaluation.initialised["error"] * 1.01
    assert {(row.backend, row.tokens) for row in made.latency} == {
        (b, t) for b in ("torch", *graphs()) for t in (1, 16, 256)
    }
    assert all(row.passed for row in made.onnx)
    assert {(row.backend, row.model, row.tokens) for row in made.onnx} == {
        (b, m, t) for b in graphs() for m in ("original", "rewritten") for t in (1, 16, 256)
    }
    assert {"load", "inspect", "statistics", "plan", "initialise", "heal", "save", "export", "compare"} <= {
        s.name for s in made.stages
    }
    assert all(step.peak_memory_bytes > 0 for step in made.stages)

    source = open_model("net.py")
    loaded = latentize.load("out")
    x = torch.randn(5, 16)
    assert loaded(x).shape == (5, 16)
    assert not torch.equal(loaded(x), source.model(x))

    code, out, _ = call(capsys, "compare", "out", "-q")
    assert (code, out) == (0, "")
    code, out, _ = call(capsys, "bench", "out", "--fused")
    assert code == 0
    rows = [line.split("  ")[0] for line in out.splitlines()]
    timed = ("torch", *graphs(), "torch graph", "torch graph, fused")
    assert {row: rows.count(row) for row in timed} == dict.fromkeys(timed, 3)
    (net / "out" / "model.onnx").unlink()
    code, _, err = call(capsys, "build", "out")
    assert code == 2
    assert "latentize[tensorrt]" in err or "convert with --export onnx" in err
    code, out, _ = call(capsys, "inspect", "out", "--json")
    assert code == 0
    assert [block["status"] for block in json.loads(out)] == ["latent"]
    code, _, err = call(capsys, "out", "-o", "again")
    assert code == 3
    assert "latent already" in err


def test_a_dry_run_prints_the_plan_and_writes_nothing(net, capsys):
    code, out, err = call(capsys, "net.py", "-o", "out", "--latent-dim", "8", "--dry-run", "--max-loss", "0.1")
    assert code == 0, err
    assert "16 → 8" in out
    assert "would write out" in out
    assert names(net) == ["net.py"]


@pytest.mark.slow
def test_a_bypass_is_shown_with_its_cost_and_its_gain_and_goes_all_the_way(net, capsys):
    arguments = ["net.py", "-o", "out", "--latent-dim", "8", "--bypass", "3", "--heal", "4", "--export", "onnx"]
    code, out, err = call(capsys, *arguments, "--dry-run")
    assert code == 0, err
    table = out.partition("Bypass of the experts")[2]
    rank, taken, unit, without, error = next(line.split()[1:] for line in table.splitlines() if line.startswith("moe "))
    assert (rank, taken, unit) == ("3", str(2 * 3 * 16 * 4), "B")
    assert 0 < float(error) < float(without) < 1
    code, out, err = call(capsys, *arguments)
    assert code == 0, err
    kept = report.read(net / "out")
    plan = kept.blocks[0].plan
    assert (plan.bypass_rank, plan.bypass_bytes) == (3, 2 * 3 * 16 * 4)
    assert plan.predicted_error < plan.error_without_bypass
    assert kept.recipe["bypass"] == 3
    assert all(row.passed for row in kept.onnx)
    assert "rank 3</td>" in (net / "out" / "report.html").read_text()
    assert call(capsys, "compare", "out")[0] == 0
    code, out, _ = call(capsys, "inspect", "out", "--json")
    assert [block["status"] for block in json.loads(out)] == ["latent"]


def test_a_dry_run_finds_what_would_fail_at_the_end(net, capsys):
    (net / "out").mkdir()
    (net / "out" / "mine.txt").write_text("")
    assert call(capsys, "net.py", "-o", "out", "--dry-run")[0] == 2
    code, _, err = call(capsys, "net.py", "-o", "new", "--dry-run", "--latent-dim", "17")
    assert code == 2
    assert "moe: latent size 17" in err


def test_a_dry_run_finds_an_evaluation_that_would_fail(net, capsys):
    (net / "broken.py").write_text(MODEL + "def evaluate(model):\n    return {}['missing']\n")
    code, _, err = call(capsys, "broken.py", "-o", "out", "--dry-run", "--latent-dim", "8")
    assert code == 2
    assert "KeyError: 'missing' (in evaluate())" in err
    assert names(net) == ["broken.py", "net.py"]


def test_a_failed_gate_is_exit_code_4_after_the_report(net, capsys):
    code, out, err = call(capsys, "net.py", "-o", "out", "--latent-dim", "2", "--heal", "0", "--max-loss", "0.0001")
    assert code == 4
    assert "relative rise of error" in err
    assert "FAILED" in out
    made = report.read(net / "out")
    assert [gate.passed for gate in made.gates] == [False]
    assert made.evaluation.rise > 0.0001


def test_patterns_that_select_nothing_are_the_users_mistake(net, capsys):
    (net / "r.yaml").write_text("include: [layers.*]\n")
    code, _, err = call(capsys, "net.py", "--recipe", "r.yaml")
    assert code == 2
    assert "selects none of the 1 blocks: moe" in err


ARGUMENTS = ("net.py", "-o", "out", "--latent-dim", "8", "--heal", "4")


@pytest.mark.parametrize("where", ["heal_student", pytest.param("finish", marks=pytest.mark.slow)])
def test_an_interrupted_run_goes_on_where_it_was_and_ends_the_same(net, capsys, monkeypatch, where):
    assert call(capsys, *ARGUMENTS)[0] == 0
    wanted = latentize.load("out").state_dict()
    with monkeypatch.context() as patch:
        patch.setattr(api, where, _interrupt)
        code, _, err = call(capsys, *ARGUMENTS)
    assert code == 130
    assert "--resume" in err
    assert ".out.work" in names(net)

    with monkeypatch.context() as patch:
        patch.setattr("latentize.conversion.measure", pytest.fail)
        patch.setattr("latentize.conversion.begin", pytest.fail)
        code, _, err = call(capsys, *ARGUMENTS, "--resume")
    assert code == 0, err
    assert names(net) == ["net.py", "out"]
    found = latentize.load("out").state_dict()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def _heed_ctrl_c():
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("reached", ["evaluate ", pytest.param("Blocks found", marks=pytest.mark.slow)])
def test_the_signal_of_ctrl_c_ends_a_run_in_one_line_and_it_can_be_resumed(net, reached):
    arguments = [sys.executable, "-m", "latentize", "net.py", "-o", "out", "--latent-dim", "8", "--heal", "60"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    # A shell that starts the tests in its background has them ignore the signal, and what they start too.
    with subprocess.Popen(arguments, **pipes, preexec_fn=_heed_ctrl_c) as process:
        assert any(line.startswith(reached) for line in process.stdout)
        process.send_signal(signal.SIGINT)
        last = process.stdout.read().strip().splitlines()[-1]
    assert process.returncode == 130
    assert last == f"latentize: interrupted; continue with: latentize {shlex.join(arguments[3:])} --resume"
    assert "out" not in names(net)
    subprocess.run([*arguments, "--resume"], check=True, capture_output=True)
    assert names(net) == ["net.py", "out"]


def test_an_interrupted_run_of_another_recipe_is_refused_by_name(net, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(api, "heal_student", _interrupt)
        assert call(capsys, *ARGUMENTS)[0] == 130
    code, _, err = call(capsys, "net.py", "-o", "out", "--latent-dim", "4", "--heal", "4", "--resume")
    assert code == 2
    assert "recipe.latent_dim differs" in err


def test_a_bfloat16_graph_is_held_against_the_model_in_float32(net, capsys):
    (net / "r.yaml").write_text("dtype: bfloat16\nlatent_dim: 8\nheal_steps: 0\n")
    code, out, err = call(capsys, "net.py", "-o", "out", "--recipe", "r.yaml", "--export", "onnx")
    assert code == 0, err
    made = report.read(net / "out")
    rows = [row for row in made.onnx if row.model == "rewritten"]
    assert {row.tokens for row in rows} == {1, 16, 256}
    assert all(row.passed and row.relative_error < 1e-5 for row in rows)
    assert "model.onnx is bfloat16, for which onnxruntime has no CPU kernels" in out
    assert "it has no CPU kernels in the graph's dtype" in " ".join(out.split())
    code, out, err = call(capsys, "compare", "out", "--backend", "ort", "--max-tokens", "16")
    assert code == 0, err
    assert "model.onnx is bfloat16, for which onnxruntime has no CPU kernels" in out
    compared = report.read(net / "out").comparison
    assert {(row.model, row.tolerance) for row in compared.agreement} == {("original", 1e-5), ("rewritten", 1e-2)}
    assert all(row.passed and row.error < 1e-5 for row in compared.agreement)
    assert (len(compared.blocks[1].errors), compared.blocks[1].first_over) == (1, "")
    assert all(row.rewritten is None for row in (*compared.latency, *compared.memory))
    assert not list((net / "out").glob(".float32*"))


def test_a_graph_that_does_not_run_is_known_before_the_long_work(net, capsys, monkeypatch):
    from latentize.exporters import onnx_check

    def broken(path, *_args, **_options):
        raise GateError(f"{path}: onnxruntime cannot run it: expand shape")

    monkeypatch.setattr(onnx_check, "check_onnx", broken)
    code, _, err = call(capsys, "net.py", "-o", "out", "--latent-dim", "8", "--export", "onnx")
    assert code == 4
    assert "the original's graph: onnxruntime cannot run it: expand shape; the rewritten one's would too" in err
    assert "statistics" not in err
    assert not (net / "out").exists()


def test_a_form_that_cannot_be_made_is_known_before_the_long_work(net, capsys):
    assert call(capsys, "net.py", "-o", "out", "--onnx-form", "loop")[0] == 2
    code, _, err = call(capsys, "net.py", "-o", "out", "--export", "onnx", "--onnx-form", "spiral")
    assert code == 2
    assert "ONNX form 'spiral' is not known" in err


@pytest.mark.slow
def test_the_form_of_the_graph_is_the_one_asked_for(net, capsys):
    import onnx

    arguments = ("net.py", "-o", "out", "--latent-dim", "8", "--heal", "0", "--export", "onnx", "--onnx-form", "loop")
    code, _, err = call(capsys, *arguments)
    assert code == 0, err
    kept = {entry.key: entry.value for entry in onnx.load(net / "out/model.onnx").metadata_props}
    assert set(json.loads(kept["latentize.forms"]).values()) == {"loop"}


def test_the_form_can_be_what_is_fastest_here_for_both_graphs(net, capsys, monkeypatch):
    from latentize.exporters import onnx_timing

    timed, really = {}, onnx_timing.fastest

    def fastest(config, *rest):
        timed[config.latent_dim] = really(config, *rest)
        return timed[config.latent_dim]

    monkeypatch.setattr(onnx_timing, "SECONDS", 0.01)
    monkeypatch.setattr(onnx_timing, "fastest", fastest)
    arguments = ("net.py", "-o", "out", "--latent-dim", "8", "--heal", "0", "--export", "onnx")
    code, out, err = call(capsys, *arguments, "--onnx-form", "measured", "--profile", "1x64")
    assert code == 0, err
    assert set(timed) == {16, 8}
    (choice,) = report.read(net / "out").forms
    assert (choice.form, choice.how, choice.tokens) == (timed[8], "measured", (64,))
    assert "fastest of those timed on the exporting machine for 64 tokens in flight" in " ".join(out.split())


def test_the_graph_is_shaped_for_the_profile_and_agrees_at_other_lengths_too(net, capsys):
    import onnx

    arguments = ("net.py", "-o", "out", "--latent-dim", "8", "--heal", "0", "--export", "onnx")
    code, out, err = call(capsys, *arguments, "--profile", "1:1:4x1")
    assert code == 0, err
    made = report.read(net / "out")
    assert [(choice.block, choice.tokens) for choice in made.forms] == [("moe.experts", (1, 2, 4))]
    assert f"Graph of moe.experts by standard operators: {made.forms[0].describe()}" in out
    assert "chosen for 1 to 4 tokens in flight" in out
    assert made.forms[0].describe() in (net / "out" / "report.html").read_text()
    assert {row.tokens for row in made.onnx if row.passed} == {1, 16, 256}
    assert latentize.Recipe(**made.recipe).profiles[0].batch == (1, 1, 4)
    for graph in ("model", "original"):  # both are timed, so both are shaped alike
        kept = {entry.key: entry.value for entry in onnx.load(net / "out" / f"{graph}.onnx").metadata_props}
        assert kept["latentize.profiles"] == "1:1:4x1"


def test_a_profile_longer_than_the_model_takes_is_known_before_the_long_work(net, capsys):
    (net / "net.py").write_text(
        MODEL + "from types import SimpleNamespace\nNet.config = SimpleNamespace(max_position_embeddings=64)\n"
    )
    arguments = ("net.py", "-o", "out", "--latent-dim", "8", "--export", "onnx")
    code, _, err = call(capsys, *arguments, "--profile", "1x16:32:128")
    assert code == 2
    assert "profile 1x16:32:128 asks for 128 tokens, and the model takes 64 at most" in err
    assert "statistics" not in err
    assert not (net / "out").exists()


@pytest.mark.slow
def test_a_disagreeing_graph_is_a_failed_gate(net, capsys, monkeypatch):
    from latentize.exporters import onnx_check

    check = onnx_check.check_onnx

    def disagree(path, *args, **options):
        if path.name == "model.onnx":
            raise GateError("model.onnx: onnxruntime returns other shapes")
        return check(path, *args, **options)

    monkeypatch.setattr(onnx_check, "check_onnx", disagree)
    code, out, err = call(capsys, "net.py", "-o", "out", "--latent-dim", "8", "--heal", "0", "--export", "onnx")
    assert code == 4
    assert "ONNX against PyTorch, rewritten, T = 1 is inf" in err
    assert "returns other shapes" in out


def test_a_full_disk_is_exit_code_5_and_leaves_no_half_of_anything(net, capsys, monkeypatch):
    def full(*_arguments, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("latentize.tensors.save_file", full)
    code, _, err = call(capsys, "net.py", "-o", "out", "--latent-dim", "8", "--heal", "0")
    assert code == 5
    assert "disk is full" in err
    assert not (net / "out").exists()
    assert [name for name in names(net) if "partial" in name] == []


def test_fresh_values_keep_shapes_positions_and_masks():
    args = (
        torch.randint(3, 50, (2, 8)),
        torch.arange(8).expand(2, 8),
        torch.ones(2, 8, dtype=torch.int64),
        torch.randn(2, 8, 4),
    )
    source = Source("module", None, torch.nn.Identity(), args)
    drawn = redraw(Inputs(args), source, 1).args
    assert [t.shape for t in drawn] == [t.shape for t in args]
    assert not torch.equal(drawn[0], args[0])
    assert set(drawn[0].flatten().tolist()) <= set(args[0].flatten().tolist())
    assert torch.equal(drawn[1], args[1])
    assert torch.equal(drawn[2], args[2])
    assert not torch.equal(drawn[3], args[3])


def _interrupt(*_arguments, **_options):
    raise KeyboardInterrupt


def test_inspect_predicts_what_widths_cost_and_finds_the_knee(net, capsys):
    code, out, _ = call(capsys, "inspect", "net.py", "--calibrate", "--knee", "1e-6")
    assert code == 0
    for words in ("effective rank", "α 2", "ℓ 8: 0.", "predicted loss", "Knee: ℓ 16 is the smallest", "6 calibration"):
        assert words in out, words
    code, out, _ = call(capsys, "inspect", "net.py", "--calibrate", "--knee", "1e6", "--json")
    predicted = json.loads(out)[0]["predicted"]
    assert (predicted["knee"], predicted["latent_dims"][-1], predicted["errors"][-1]) == (1, 16, 0.0)
    assert predicted["errors"] == sorted(predicted["errors"], reverse=True)


def test_a_dry_run_of_auto_shows_the_plan_and_what_the_budget_bought(net, capsys):
    code, out, err = call(capsys, "net.py", "-o", "out", "--compression", "auto", "--budget", "bytes=0.5", "--dry-run")
    assert code == 0, err
    for words in ("16 → 8", "Budget bytes 0.5: 50.0 % of the original's expert bytes", "α 2"):
        assert words in out, words
    code, _, err = call(capsys, "net.py", "-o", "out", "--compression", "auto", "--budget", "flops=0.01", "--dry-run")
    assert code == 2
    assert "budget.flops = 0.01: the narrowest widths" in err
