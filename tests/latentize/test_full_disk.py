"""Whatever is written is whole or not there, with every amount of room that a disk may have left."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import small_disk
import torch

pytestmark = pytest.mark.skipif(not small_disk.available(), reason="no mounts of one's own here")

WRITES = ("save", "save again", "nemotron_h", "nemotron_h-hub", "nemotron_h again", "onnx", "onnx data",
          "onnx blocks", "report", "report again", "checkpoint")  # fmt: skip

#: Folders that may be left, empty.
EMPTY = {"report": ["out"], "checkpoint": [".out.work"]}


@pytest.fixture(scope="module")
def attempts(tmp_path_factory):
    pytest.importorskip("transformers")
    pytest.importorskip("onnxscript")
    pytest.importorskip("jinja2")
    return small_disk.run(__file__, tmp_path_factory.mktemp("full") / "disk")


@pytest.mark.parametrize("what", WRITES)
def test_a_full_disk_is_one_line_and_leaves_things_as_they_were(attempts, what):
    failed = attempts[what]
    assert len(failed) > 2
    assert all(code == 5 for code, _, _ in failed)
    assert all("\n" not in line for _, line, _ in failed)
    assert all("disk is full" in line or "No space left on device" in line for _, line, _ in failed), failed
    assert not any("partial" in line for _, line, _ in failed)
    assert all(changed in ([], EMPTY.get(what)) for _, _, changed in failed), failed


def test_finished_stages_stay_on_a_full_disk_and_no_half_of_one(attempts):
    failed = attempts["second checkpoint"]
    assert len(failed) > 3
    assert all(code == 5 and "what was finished is kept there" in line for code, line, _ in failed)
    assert {name for _, _, changed in failed for name in changed} <= {".out.work/second.safetensors"}


@pytest.mark.slow
def test_a_command_ends_in_one_line_and_can_be_resumed(tmp_path):
    pytest.importorskip("onnxscript")
    found = small_disk.run(__file__, tmp_path / "disk", "command")
    assert [code for code, _, _ in found[:-2]] == [5] * (len(found) - 2)
    for _, line, left in found[:-2]:
        assert "disk is full" in line or "No space left on device" in line
        assert ".partial" not in line
        assert line.endswith("; --resume goes on from where this stopped")
        assert {Path(name).parts[0] for name in left} <= {".out.work"}
        assert not any("partial" in name for name in left)
    assert [code for code, _, _ in found[-2:]] == [0, 0]  # with --resume, and from the beginning
    assert all({Path(name).parts[0] for name in left} == {"out"} for _, _, left in found[-2:])


def main(disk, *what):
    disk = small_disk.Disk(disk)
    torch.set_num_threads(1)
    return commands(disk) if what else writes(disk)


def writes(disk):
    """The attempts of every write, in one process, since starting it takes longest."""
    import onnx_ir
    from transformers import AutoModelForCausalLM, NemotronHConfig

    import latentize
    from latentize import report
    from latentize.checkpoints import Checkpoints
    from latentize.exporters import nemotron_h
    from latentize.exporters.onnx import export_onnx
    from latentize.exporters.onnx_blocks import block_errors
    from latentize.exporters.onnx_file import write_model
    from latentize.inputs import Inputs
    from latentize.report import Environment, Model, Report

    torch.manual_seed(0)
    config = NemotronHConfig(
        vocab_size=61, hidden_size=32, intermediate_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        layers_block_type=["moe", "full_attention", "moe"], n_routed_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=16, moe_shared_expert_intermediate_size=16, n_group=1, topk_group=1, mamba_num_heads=4,
        mamba_head_dim=16, n_groups=2, ssm_state_size=8, pad_token_id=0, chunk_size=8,
    )  # fmt: skip
    ids = {"input_ids": torch.randint(61, (2, 12))}
    model = AutoModelForCausalLM.from_config(config).eval()
    result = latentize.convert(model, kwargs=ids, recipe=latentize.Recipe(latent_dim=16, heal_steps=0))
    folder, out = disk.folder, disk.folder / "out"

    def computes(loaded):
        with torch.no_grad():
            return torch.allclose(loaded(**ids).logits, result.model(**ids).logits, atol=1e-4)

    def save():
        result.save(out)

    def saved():
        return computes(latentize.load(out))

    def checkpoint(per_expert):
        nemotron_h.write(out, result.model, result.rewritten, Inputs((), ids), per_expert=per_expert)

    def older():  # a sharded checkpoint, whose weights must not be read with or instead of the new ones
        out.mkdir()
        for name in ("config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"):
            (out / name).write_text(f"older {name}")

    def reopened():
        return AutoModelForCausalLM.from_pretrained(out).eval()

    found = {
        "save": disk.sweep(save, saved, step=3 * small_disk.PAGE),
        "save again": disk.sweep(save, saved, save, step=5 * small_disk.PAGE),
        "nemotron_h": disk.sweep(lambda: checkpoint(False), lambda: computes(reopened())),
        "nemotron_h-hub": disk.sweep(lambda: checkpoint(True), lambda: computes(reopened())),
        "nemotron_h again": disk.sweep(
            lambda: checkpoint(False), lambda: computes(reopened()) and "index" not in " ".join(disk.files()), older
        ),
    }

    disk.empty()
    export_onnx(torch.nn.Linear(64, 128), (torch.ones(2, 64),), {}, path := folder / "model.onnx")
    graph = onnx_ir.load(path)
    for name, above in (("onnx", 1 << 30), ("onnx data", 0)):
        found[name] = disk.sweep(lambda above=above: write_model(graph, path, above), lambda: bool(onnx_ir.load(path)))

    moe, x = next(iter(result.rewritten.values())), torch.randn(5, 32)
    export_onnx(moe, (x,), {}, whole := disk.folder.parent / "whole.onnx")
    found["onnx blocks"] = disk.sweep(
        lambda: block_errors(path, moe, Inputs((x,), {}), 1e-4), lambda: True, lambda: shutil.copy(whole, path)
    )

    first, second = (Report(version, Model("python", "net", "Net", 10, 12, 40, 48), Environment.here(), {}, ())
                     for version in ("1", "2"))  # fmt: skip
    kept = Checkpoints(out)
    found |= {
        "report": disk.sweep(lambda: report.write(first, out), lambda: report.read(out) == first),
        "report again": disk.sweep(
            lambda: report.write(second, out), lambda: report.read(out) == second, lambda: report.write(first, out)
        ),
        "checkpoint": disk.sweep(lambda: kept.open({"x": "y" * 20_000}, resume=False), lambda: True),
    }  # fmt: skip

    def stage(name):
        kept.stage(name, dict[str, torch.Tensor], lambda: {"x": torch.ones(5_000)})

    def finished():
        kept.open({}, resume=False)
        stage("first")

    found["second checkpoint"] = disk.sweep(lambda: stage("second"), lambda: True, finished)
    return found


def commands(disk):
    """(exit code, last line, files left) of conversions with ever more room; then resumed, and with room enough."""
    import contextlib
    import io
    import os

    import small_moe

    from latentize import cli, staging

    staging.check_space = lambda *_: None  # which would see it coming
    disk.empty()
    out = disk.folder / "out"
    os.chdir(disk.folder.parent)
    Path("net.py").write_text(Path(small_moe.__file__).read_text() + (
        "\ndef example_inputs():\n    return (torch.randn(40, 16),)\n"
        "def calibration_data():\n    return [(torch.randn(64, 16, generator=torch.Generator().manual_seed(s)),)"
        " for s in range(6)]\n"
    ))  # fmt: skip
    arguments = ["net.py", "-o", str(out), "--latent-dim", "8", "--heal", "2", "--export", "onnx"]

    def call(*more):
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            try:
                cli.main([*arguments, *more])
            except SystemExit as stopped:
                code = stopped.code or 0
        return code, (said.getvalue().strip().splitlines() or [""])[-1], sorted(disk.files())

    found = []
    for room in (8, 40, 100, 130, 170, 200, 240):
        disk.empty()
        disk.leave(room)
        found.append(call())
    disk.leave(4096)
    found.append(call("--resume"))
    disk.empty()
    found.append(call())
    return found


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
