"""The command line: arguments, exit codes, one clear line for every mistake, and nothing heavy before it is needed."""

import subprocess
import sys
from pathlib import Path

import pytest
from command_line import call

from latentize import cli
from latentize.errors import GateError, LatentizeError, NothingToRewriteError, ResourceError

PLAIN = """
import torch
def build_model(): return torch.nn.Linear(4, 4)
def example_inputs(): return (torch.randn(2, 4),)
"""


@pytest.fixture
def plain(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.py").write_text(PLAIN)
    return tmp_path / "plain.py"


@pytest.fixture
def stub(monkeypatch):
    """Replaces the job by one that records its options, or raises what it is told to."""
    from latentize import run

    class Stub:
        options = None
        error = None

    def convert(options):
        Stub.options = options
        if Stub.error is not None:
            raise Stub.error

    monkeypatch.setattr(run, "convert", convert)
    return Stub


def test_help_names_every_option_and_command(capsys):
    code, out, _ = call(capsys, "--help")
    assert code == 0
    for word in ("MODEL", "--output", "--compression", "--latent-dim", "--variant", "--bypass", "--heal",
                 "--export", "--recipe", "--dry-run", "--resume", "--max-loss",
                 "inspect", "compare", "bench", "build"):  # fmt: skip
        assert word in out


def test_help_and_version_import_nothing_heavy():
    code = (
        "import sys\nfrom latentize.cli import main\n"
        "try:\n    main([sys.argv[1]])\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "heavy = {'torch', 'pydantic', 'rich', 'numpy', 'yaml'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    for option in ("--help", "--version"):
        done = subprocess.run([sys.executable, "-c", code, option], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_the_default_command_converts_wherever_the_model_stands(capsys, stub):
    options = ["--compression", "4", "--variant", "fixed", "--heal", "0", "--bypass", "16"]
    assert call(capsys, "-o", "out", "model.py:tiny", *options)[0] == 0
    assert stub.options.model == "model.py:tiny"
    assert stub.options.out == Path("out")
    recipe = stub.options.recipe
    assert (recipe.compression, recipe.variant, recipe.heal_steps, recipe.bypass) == (4.0, "fixed", 0, 16)
    assert stub.options.exports == ()


def test_options_win_over_the_recipe_file(capsys, stub, tmp_path):
    (tmp_path / "r.yaml").write_text("compression: 4\nvariant: eff\nseed: 3\nlatent_dim: 8\n")
    call(
        capsys,
        "model.py",
        "--recipe",
        tmp_path / "r.yaml",
        "--compression",
        "8",
        "--export",
        "onnx,onnx",
        "--max-loss",
        "0.01",
    )
    recipe = stub.options.recipe
    assert (recipe.compression, recipe.latent_dim, recipe.variant, recipe.seed) == (8.0, None, "eff", 3)
    assert stub.options.exports == ("onnx",)
    assert stub.options.max_loss == 0.01


def test_a_budget_comes_from_the_command_line_or_the_recipe_file(capsys, stub, tmp_path):
    call(capsys, "model.py", "--compression", "auto", "--budget", "bytes=0.5")
    assert stub.options.recipe.budget.limit == ("bytes", 0.5)
    file = tmp_path / "r.yaml"
    file.write_text("compression: auto\nbudget: {flops: 0.5}\n")
    for arguments, limit in (((), ("flops", 0.5)), (("--budget", "max_loss=0.1"), ("max_loss", 0.1))):
        call(capsys, "model.py", "--recipe", file, *arguments)
        assert stub.options.recipe.budget.limit == limit
    for arguments in (("--compression", "4"), ("--latent-dim", "8")):
        call(capsys, "model.py", "--recipe", file, *arguments)
        assert stub.options.recipe.budget is None


def test_profiles_of_the_command_line_win_over_those_of_the_recipe_file(capsys, stub, tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("profiles: [{batch: 2, tokens: [1, 8, 32]}]\n")
    call(capsys, "model.py", "--recipe", file)
    assert [(p.batch, p.tokens) for p in stub.options.recipe.profiles] == [((2, 2, 2), (1, 8, 32))]
    call(capsys, "model.py", "--recipe", file, "--profile", "1:1:4x1", "--profile", "1x256:512:1024")
    found = [(p.batch, p.tokens) for p in stub.options.recipe.profiles]
    assert found == [((1, 1, 4), (1, 1, 1)), ((1, 1, 1), (256, 512, 1024))]
    call(capsys, "model.py")
    assert stub.options.recipe.profiles == ()


@pytest.mark.parametrize(
    ("model", "out"),
    [
        ("net.py", "net-latent"),
        ("a/net.py:small", "net-small-latent"),
        ("net.pt2", "net-latent"),
        ("weights", "weights-latent"),
    ],
)
def test_the_default_output_is_named_after_the_model(model, out):
    assert cli.default_out(model) == Path(out)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["absent.py"], "absent.py: no such file"),
        (["plain.py", "--compression", "0"], "compression = 0.0 is not accepted"),
        (["plain.py", "--compression", "nan"], "compression"),
        (["plain.py", "--compression", "auto"], "compression: auto needs a budget"),
        (["plain.py", "--compression", "aut"], "'aut' is not a valid float"),
        (["plain.py", "--budget", "bytes=0.5"], "budget is what compression: auto spends"),
        (["plain.py", "--compression", "auto", "--budget", "bytes"], "--budget bytes: give bytes=SHARE"),
        (["plain.py", "--compression", "auto", "--budget", "byte=0.5"], "did you mean 'bytes'"),
        (["plain.py", "--compression", "auto", "--budget", "bytes=x"], "budget.bytes = 'x' is not accepted"),
        (
            ["plain.py", "--compression", "auto", "--budget", "bytes=0.5", "--export", "nemotron_h"],
            "--export nemotron_h: its architecture has one latent size",
        ),
        (["inspect", "plain.py", "--knee", "0.1"], "--knee is read off what --calibrate predicts"),
        (["inspect", "plain.py", "--calibrate"], "--calibrate needs calibration_data()"),
        (["plain.py", "--latent-dim", "0"], "latent_dim = 0 is not accepted"),
        (["plain.py", "--compression", "2", "--latent-dim", "8"], "give one of them"),
        (["plain.py", "--variant", "best"], "'best' is not one of"),
        (["plain.py", "--heal", "-1"], "-1 is not in the range"),
        (["plain.py", "--bypass", "-1"], "-1 is not in the range"),
        (["plain.py", "--bypass", "4"], "bypass 4 is fitted to calibration data, which this model does not have"),
        (["plain.py", "--bypass", "4", "--export", "nemotron_h"], "its architecture has no place for a bypass"),
        (["plain.py", "--export", "onnx,coreml"], "--export coreml"),
        (["plain.py", "--recipe", "typo.yaml"], "did you mean 'compression'"),
        (["plain.py", "--recipe", "absent.yaml"], "absent.yaml: cannot be read"),
        (["plain.py", "--profile", "4"], "--profile '4': expected BATCHxTOKENS"),
        (["plain.py", "--profile", "1x0"], "--profile 1x0: tokens 0:0:0 is not in order"),
        (["plain.py", "--profile", "4:1:1x1"], "--profile 4:1:1x1: batch 4:1:1 is not in order"),
        (["plain.py", "--recipe", "profile.yaml"], "unknown field 'token' of profiles; did you mean 'tokens'"),
        (["plain.py", "--no-such-flag"], "No such option"),
        (["plain.py", "--profile", "1x9999999999"], "tokens 9999999999:9999999999:9999999999 is too large"),
        (["plain.py", "--max-loss", "nan"], "nan is not a number"),
        (["plain.py", "--max-loss", "x"], "'x' is not a valid float"),
        (["plain.py", "--max-loss", "0.1"], "--max-loss needs an evaluate"),
        (["plain.py", "-o", "plain.py"], "is a file"),
        (["plain.py", "--log-file", "absent/log"], "cannot be written"),
        (["inspect"], "Missing argument 'MODEL'"),
        (["compare", "absent"], "not a folder that latentize wrote"),
        (["bench", "."], "not a folder that latentize wrote"),
        (["build", "absent"], "not a folder that latentize wrote"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, plain, arguments, words):
    (plain.parent / "typo.yaml").write_text("compresion: 2\n")
    (plain.parent / "profile.yaml").write_text("profiles: [{tokens: 1, token: 2}]\n")
    code, _, err = call(capsys, *arguments)
    last = err.strip().splitlines()[-1]
    assert code == 2, err
    assert last.startswith("latentize: ")
    assert words in last
    assert "Traceback" not in err


def test_no_moe_is_exit_code_3_for_convert_and_inspect(capsys, plain):
    for arguments in (
        ["plain.py"],
        ["inspect", "plain.py"],
        ["inspect", "plain.py", "--json"],
        ["plain.py", "--dry-run"],
    ):
        code, out, err = call(capsys, *arguments)
        assert code == 3
        assert "no MoE block found" in err.splitlines()[-1]
        if "--json" in arguments:
            assert out.strip() == "[]"
    assert [file.name for file in plain.parent.iterdir() if file.suffix != ".py"] == []


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (LatentizeError("a\nb"), 2, "latentize: a b"),
        (NothingToRewriteError("none"), 3, "none"),
        (GateError("worse"), 4, "worse"),
        (ResourceError("full"), 5, "full"),
        (MemoryError(), 5, "out of memory"),
        (OSError(28, "No space left on device"), 5, "the disk is full"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 99 bytes"), 5, "out of memory"),
        (KeyboardInterrupt(), 130, "continue with: latentize model.py --heal 3 --resume"),
    ],
)
def test_every_kind_of_end_has_its_exit_code(capsys, stub, error, code, words):
    stub.error = error
    found, _, err = call(capsys, "model.py", "--heal", "3")
    assert found == code
    assert words in err
    assert len(err.strip().splitlines()) == 1


def test_a_bug_shows_its_traceback(stub):
    stub.error = ZeroDivisionError("ours")
    with pytest.raises(ZeroDivisionError):
        cli.main(["model.py"])


def test_interrupting_a_command_that_cannot_resume_just_says_so():
    assert cli._interrupted(["inspect", "m.py"]) == "interrupted"
    assert cli._interrupted(["m.py", "--dry-run"]) == "interrupted"
    full = OSError(28, "No space left on device")
    assert str(cli._resource_problem(full, "run again")).endswith("free some space, then run again")
    large = OSError(27, "File too large")
    found = str(cli._resource_problem(large, "run again"))
    assert found.startswith("a file grows larger than")
    assert "File too large" in found
    assert cli._interrupted(["m 1.py", "--resume"]) == "interrupted; continue with: latentize 'm 1.py' --resume"


def test_a_full_disk_of_a_conversion_says_that_it_can_go_on(capsys, stub):
    stub.error = ResourceError("out: the disk is full")
    assert call(capsys, "model.py")[2] == "latentize: out: the disk is full; --resume goes on from where this stopped\n"
    assert call(capsys, "model.py", "--dry-run")[2] == "latentize: out: the disk is full\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no disk that is always full")
def test_a_log_file_that_is_full_ends_in_one_line_and_the_command_goes_on(capsys, plain):
    code, out, err = call(capsys, "inspect", "plain.py", "--log-file", "/dev/full")
    assert code == 3  # as without
    assert "No MoE block found" in out
    assert "--log-file /dev/full: the log ends here (No space left on device)\n" in err
    assert err.count("/dev/full") == 1
    assert "Traceback" not in err


def test_quiet_says_nothing_and_a_log_file_has_everything(capsys, plain):
    code, out, err = call(capsys, "inspect", "plain.py", "--log-file", "run.log", "-q")
    assert (code, out) == (3, "")
    assert len(err.strip().splitlines()) == 1
    assert "load" in Path("run.log").read_text()


@pytest.mark.parametrize(("missing", "extra"), [("tensorrt_rtx", "tensorrt"), ("onnxruntime", "onnx")])
def test_a_missing_extra_is_named_before_the_model_loads(capsys, plain, monkeypatch, missing, extra):
    from importlib import util

    find = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == missing else find(name))
    monkeypatch.setattr("latentize.sources.open_model", pytest.fail)
    code, _, err = call(capsys, "plain.py", "--export", "tensorrt")
    assert code == 2
    assert f"latentize[{extra}]" in err


def test_several_processes_are_told_that_the_command_line_is_for_one(capsys, stub, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "2")
    code, _, err = call(capsys, "model.py")
    assert code == 2
    assert "4 processes" in err
    assert "latentize.convert" in err
