"""`latentize compare` and `build` on a folder that a conversion wrote: numbers in the report, gates, first blocks."""

import errno
import json
import shutil
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import small_moe
import torch
from command_line import call
from onnx_backends import graphs

import latentize
from latentize import artefact, report
from latentize.errors import LatentizeError, ResourceError
from latentize.exporters import onnxruntime_ops
from latentize.run_build import describe
from latentize.run_onnx import check_own
from latentize.ties import TieWatch

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

TWO = """
class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = Net(), Net()
    def forward(self, x):
        return self.b(self.a(x))
def build_model():
    torch.manual_seed(0)
    return Two().eval()
def batch(seed, rows=64):
    return (torch.randn(rows, 16, generator=torch.Generator().manual_seed(seed)),)
def example_inputs():
    return batch(1, 40)
def calibration_data():
    return (batch(seed) for seed in range(2, 4))
def evaluate(model):
    wanted = build_model()(*batch(99))
    return {"error": 1.0 + (model(*batch(99)) - wanted).norm().item() / wanted.norm().item()}
"""


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    from latentize import cli

    folder = tmp_path_factory.mktemp("converted")
    (folder / "net.py").write_text(Path(small_moe.__file__).read_text() + TWO)
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(folder / "net.py"), "-o", str(folder / "out"), "--latent-dim", "8", "--heal", "0", "--export",
                  "onnx", "-q"])  # fmt: skip
    assert not stopped.value.code
    return folder / "out"


@pytest.fixture
def out(converted, tmp_path):
    return shutil.copytree(converted, tmp_path / "out")


def test_everything_is_measured_printed_and_kept(out, capsys):
    code, shown, err = call(capsys, "compare", out)
    assert code == 0, err
    for words in ("Rewritten against original", "Backends against PyTorch", "Minimum required tolerance of onnxruntime",
                  "Blocks, rewritten against original", "Latency", "Memory of one call", "Files"):  # fmt: skip
        assert words in shown, words
    made = report.read(out).comparison
    assert made.backends == ("torch", *graphs())
    assert [row.tokens for row in made.lengths] == [1, 16, 64, 256]
    assert {(row.backend, row.model, row.tokens) for row in made.agreement} == {
        (graph, model, tokens)
        for graph in graphs() for model in ("original", "rewritten") for tokens in (1, 16, 64, 256)
    }  # fmt: skip
    assert made.required == {g: max(row.error for row in made.agreement if row.backend == g) for g in graphs()}
    assert all(0 < error < 1e-5 for error in made.required.values())
    assert made.evaluation.metric == "error"
    against, in_graph = made.blocks
    assert (list(against.errors), against.first_over, against.tolerance) == (["a.moe", "b.moe"], "", None)
    assert len(in_graph.errors) == 2
    assert in_graph.first_over == ""
    for rows in (made.latency, made.memory):
        assert {(row.backend, row.tokens) for row in rows} == {(b, t) for b in made.backends for t in (1, 16, 256)}
    assert made.files["model.onnx"] == (out / "model.onnx").stat().st_size
    assert all(gate.passed for gate in made.gates)
    page = (out / "report.html").read_text()
    assert "Minimum required tolerance of onnxruntime" in page
    assert "b.<wbr>moe" in page


@pytest.mark.parametrize("name", ["up", pytest.param("latent_up", marks=pytest.mark.slow)])
def test_a_graph_with_a_wrong_block_fails_and_the_block_is_named(out, capsys, name):
    graph = onnx.load(out / "model.onnx")
    weight = next(i for i in graph.graph.initializer if i.name == f"b.moe.experts.{name}")
    values = onnx.numpy_helper.to_array(weight).copy()
    values[:] *= 1.01
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(graph, out / "model.onnx")
    code, shown, err = call(capsys, "compare", out, "--backend", "ort", "--max-tokens", "4")
    assert code == 4
    assert "onnxruntime against PyTorch, rewritten, T = 1" in err
    assert "FAILED" in shown
    made = report.read(out).comparison
    assert made.backends == graphs()
    search = made.blocks[1]
    assert search.first_over == ("b.moe.experts" if name == "up" else "")  # a, before it, is right
    assert [error < 1e-5 for error in search.errors.values()] == [True, name != "up"]
    assert ("not in the routed experts" in search.note) == (name != "up")
    assert not list(out.glob(".model*"))


def graph_of(path, inputs, kind=onnx.TensorProto.FLOAT, width=16):
    """A graph that is of no model of ours: its first input, squared."""
    helper = onnx.helper
    names = [f"x{i}" for i in range(inputs)]
    read = [helper.make_tensor_value_info(name, kind, ["t", width]) for name in names]
    node = helper.make_node("Mul", [names[0]] * 2, ["y"])
    made = helper.make_graph([node], "g", read, [helper.make_tensor_value_info("y", kind, ["t", width])])
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda out: shutil.copy(out / "original.onnx", out / "model.onnx"), "it is another model's graph"),
        (lambda out: graph_of(out / "model.onnx", 1, width=24), "Expected: 24"),
        (lambda out: graph_of(out / "model.onnx", 2), "the exported graph reads 2 tensors (x0, x1)"),
        (lambda out: graph_of(out / "model.onnx", 1, onnx.TensorProto.INT64), "expected: (tensor(int64))"),
    ],
    ids=["original", "width", "number", "dtype"],
)
def test_the_graph_of_another_model_fails_its_gates(out, capsys, wrong, words):
    wrong(out)
    code, _, err = call(capsys, "compare", out, "--backend", "ort", "--max-tokens", "1", "-q")
    assert code == 4, err
    assert "onnxruntime against PyTorch, rewritten, T = 1 is " in err
    made = report.read(out).comparison
    assert words in " ".join([*made.notes, *(row.note for row in made.latency), made.blocks[1].note])
    assert made.blocks[1].errors == {}
    assert made.blocks[1].note
    assert {row.backend for row in made.latency} == set(graphs())


def test_a_disagreement_is_looked_at_for_ties_in_both_models_and_is_no_matter_of_compression(out, capsys, monkeypatch):
    routers = set()

    class Watch(TieWatch):
        def __init__(self, model):
            super().__init__(model)
            routers.update(tuple(id(router) for router in self._routers[:1]))

    monkeypatch.setattr("latentize.compare_outputs.TieWatch", Watch)
    code, _, err = call(capsys, "compare", out, "--backend", "ort", "--max-tokens", "1", "--tolerance", "1e-12", "-q")
    assert code == 4
    assert len(routers) == 2
    assert err.endswith("The comparison says at which lengths and from which block on; --tolerance allows more\n")


@pytest.mark.parametrize("command", ["compare", "bench"])
@pytest.mark.parametrize(
    ("hidden", "words"),
    [
        (("onnxruntime",), "running ONNX files needs the package 'onnxruntime'"),
        (("onnx", "onnx_ir"), "comparing a graph block by block needs the package 'onnx'"),
    ],
)
def test_packages_that_are_missing_leave_out_what_needs_them(out, capsys, monkeypatch, command, hidden, words):
    for name in hidden:
        monkeypatch.setitem(sys.modules, name, None)
    more = ("--max-tokens", "1") if command == "compare" else ()
    code, shown, err = call(capsys, command, out, *more)
    assert code == 0, err
    if command == "compare" or "onnxruntime" in hidden:
        assert words.replace(" ", "") in "".join(shown.split())


@pytest.mark.slow
def test_limits_that_are_asked_for_are_gates(out, capsys):
    code, _, err = call(capsys, "compare", out, "--backend", "torch", "--max-tokens", "1", "--max-block-error", "0.001",
                        "--max-loss", "0.0001", "-q")  # fmt: skip
    assert code == 4
    assert "error of block a.moe, rewritten against original" in err
    assert "relative rise of error" in err
    assert list(report.read(out).comparison.blocks[0].errors) == ["a.moe"]  # the search ends at the first one


@pytest.mark.slow
def test_without_a_report_it_is_only_printed(out, capsys):
    (out / "report.json").unlink()
    code, shown, _ = call(capsys, "compare", out, "--backend", "torch", "--max-tokens", "1")
    assert code == 0
    assert "only printed" in shown
    assert not (out / "report.json").exists()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--backend", "torch,cuda"), "--backend cuda: not known; choose from torch, ort, trt"),
        (("--backend", "trt"), "holds no engine; build one with latentize build"),
    ],
)
def test_a_backend_that_is_not_there_is_one_line(out, capsys, arguments, words):
    code, _, err = call(capsys, "compare", out, *arguments)
    assert code == 2
    assert words in err
    assert err.count("\n") == 1


def test_a_truncated_graph_is_refused_by_name(out, capsys):
    content = (out / "model.onnx").read_bytes()
    (out / "model.onnx").write_bytes(content[: len(content) // 2])
    code, _, err = call(capsys, "compare", out)
    assert code == 2
    assert "model.onnx: onnxruntime cannot load it" in err


@pytest.mark.parametrize("command", ["compare", "build"])
def test_a_damaged_report_is_said_before_the_work(out, capsys, monkeypatch, command):
    if command == "build":
        pytest.importorskip("tensorrt_rtx")
    content = (out / "report.json").read_text()
    (out / "report.json").write_text(content[: len(content) // 2])
    monkeypatch.setattr("latentize.compare_backends.available", lambda *_: pytest.fail("the work began"))
    monkeypatch.setattr("latentize.exporters.tensorrt.build", lambda *_, **__: pytest.fail("the work began"))
    code, _, err = call(capsys, command, out)
    assert code == 2
    assert "report.json: not JSON" in err


@pytest.mark.parametrize(
    "arguments", [("compare",), ("build",), ("build", "--dtype", "fp16"), ("build", "--target", "onnxruntime")]
)
def test_a_folder_that_cannot_be_written_is_said_before_the_work(out, capsys, monkeypatch, arguments):
    def read_only(**_where):
        raise OSError(errno.EROFS, "Read-only file system")

    if arguments[0] == "build":
        pytest.importorskip("tensorrt_rtx")
    for begun in ("compare_backends.available", "run_build._exported", "exporters.tensorrt.build",
                  "exporters.onnxruntime_ops.build"):  # fmt: skip
        monkeypatch.setattr(f"latentize.{begun}", lambda *_, **__: pytest.fail("the work began"))
    monkeypatch.setattr("latentize.staging.tempfile.TemporaryFile", read_only)
    command, *options = arguments
    code, _, err = call(capsys, command, out, *options)
    assert code == 2
    assert err == f"latentize: {out}: cannot be written (Read-only file system); make it writable, or use a copy\n"


@pytest.mark.parametrize(
    ("key", "other", "words"),
    [
        ("model", "original", "it is the original one"),
        ("recipe", {"seed": 1}, "seed of its recipe is 1, not 0"),
        ("evidence", {"a.moe": {"max_error": 0.0}}, "its blocks are a.moe, not a.moe, b.moe"),
        ("evidence", None, "its block a.moe was proved by another run"),
    ],
)
def test_another_conversions_graph_is_not_built_from(out, capsys, monkeypatch, key, other, words):
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr("latentize.exporters.tensorrt.build", lambda *_, **__: pytest.fail("the work began"))
    graph = onnx.load(out / "model.onnx")
    entry = next(entry for entry in graph.metadata_props if entry.key == f"latentize.{key}")
    if other is None:
        other = json.loads(entry.value)
        other["a.moe"]["max_error"] *= 2
    entry.value = other if isinstance(other, str) else json.dumps(other)
    onnx.save(graph, out / "model.onnx")
    code, _, err = call(capsys, "build", out)
    assert code == 2
    assert f"model.onnx: is not the graph of the model in {out}: {words}; put its own back" in err
    assert err.count("\n") == 1


def test_graphs_that_may_be_its_own_are_built_from(out):
    with_profiles(out, [{"batch": [1, 1, 1], "tokens": [1, 4, 32]}])  # other ones than the graph was made for
    recipe = artefact.read_manifest(out).recipe
    check_own(out, recipe)
    graph = onnx.load(out / "model.onnx")
    del graph.metadata_props[:]  # as one that was exported from Python
    onnx.save(graph, out / "model.onnx")
    check_own(out, {**recipe, "seed": 7})


def with_profiles(out, profiles):
    manifest = (out / "latentize.json").read_text()
    (out / "latentize.json").write_text(manifest.replace('"profiles": []', f'"profiles": {json.dumps(profiles)}'))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--profile", "1x1:4:64"), "--profile 1x1:4:64 contradicts the recipe, whose profiles are 1x1:4:32"),
        (("--profile", "4:2:1x1"), "--profile 4:2:1x1: batch 4:2:1 is not in order"),
        (("--profile", "many"), "--profile 'many': expected BATCHxTOKENS"),
        (("--target", "SM75"), "TensorRT target 'SM75' is not known: expected one of portable, SM80"),
        (("--target", "native"), "there is no NVIDIA GPU with a driver here"),
        (("--experts", "embedded"), "only the full tensorrt (10.9 or newer) embeds kernels"),
    ],
)
def test_what_cannot_be_built_is_one_line(out, capsys, monkeypatch, arguments, words):
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with_profiles(out, [{"batch": [1, 1, 1], "tokens": [1, 4, 32]}])
    code, _, err = call(capsys, "build", out, *arguments)
    assert code == 2
    assert words in err
    assert err.count("\n") == 1


def test_a_build_that_memory_has_no_room_for_is_not_begun(out, capsys, monkeypatch):
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr("latentize.exporters.tensorrt.free_memory", lambda: 1000)
    code, _, err = call(capsys, "build", out)
    assert code == 5
    assert "GiB of memory (3 copies of its weights)" in err


@pytest.mark.slow
def test_engines_are_built_from_the_recipe_in_another_dtype_and_reported(out, capsys):
    pytest.importorskip("tensorrt_rtx")
    with_profiles(out, [{"batch": [1, 1, 1], "tokens": [1, 4, 32]}])
    code, shown, err = call(capsys, "build", out, "--dtype", "fp16")
    assert code == 0, err
    (engine,) = report.read(out).engines
    assert (engine.file, engine.dtype, engine.experts) == ("model.portable.engine", "float16", "dense")
    assert list(engine.profiles[0].values()) == [((1, 16), (4, 16), (32, 16))]
    assert " ".join(describe(engine).split()) in " ".join(shown.split())
    assert "model.portable.engine" in (out / "report.html").read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--dtype", "fp16"), "--dtype: for engines alone, and --target onnxruntime makes a library"),
        (("--experts", "dense"), "--experts: for engines alone"),
        (("--experts", "plugin", "--dtype", "fp32", "--profile", "1x5"), "--experts and --dtype and --profile: for"),
    ],
)
def test_options_of_engines_are_refused_where_none_is_built(out, capsys, monkeypatch, options, words):
    monkeypatch.setattr(onnxruntime_ops, "build", lambda *_, **__: pytest.fail("the work began"))
    code, _, err = call(capsys, "build", out, "--target", "onnxruntime", *options)
    assert code == 2
    assert words in err
    assert err.count("\n") == 1


@pytest.fixture
def worker(monkeypatch):
    """Stands in for TensorRT's process: for each target, what it writes into the engine, or the error that it has."""
    pytest.importorskip("tensorrt_rtx")
    content, built = {}, []

    def answer(request, _work, _progress):
        built.append(request["target"])
        found = content.get(request["target"], b"an engine")
        if isinstance(found, BaseException):
            raise found
        Path(request["engine"]).write_bytes(found)
        return {"profiles": [], "layers": {}, "plugins": 0, "plan": None, "timed_before": False, "notes": [],
                "library": "tensorrt-rtx 0"}  # fmt: skip

    monkeypatch.setattr("latentize.exporters.tensorrt._ask_worker", answer)
    return types.SimpleNamespace(content=content, built=built)


def test_a_target_given_twice_is_built_once(out, capsys, worker):
    code, _, err = call(capsys, "build", out, "--target", "SM80", "--target", "SM86", "--target", "SM80")
    assert code == 0, err
    assert worker.built == ["SM80", "SM86"]
    assert [engine.file for engine in report.read(out).engines] == ["model.SM80.engine", "model.SM86.engine"]


@pytest.mark.parametrize(
    ("error", "code"), [(ResourceError("SM120 ran out of disk"), 5), (KeyboardInterrupt(), 130)]
)  # fmt: skip
def test_engines_before_one_that_fails_are_in_the_report(out, capsys, worker, error, code):
    assert call(capsys, "build", out, "--target", "SM80", "--target", "SM86")[0] == 0
    earlier = report.read(out)
    report.write(replace(earlier, engines=(*earlier.engines, earlier.engines[0])), out)  # one file, two entries
    worker.content.update({"SM80": b"another engine", "SM120": error})
    found, shown, _ = call(capsys, "build", out, *(f"--target={target}" for target in ("SM80", "SM120", "SM89")))
    assert found == code
    assert "model.SM80.engine: 14 bytes" in shown
    assert {engine.file: engine.bytes for engine in report.read(out).engines} == {
        "model.SM86.engine": 9, "model.SM80.engine": 14,
    }  # fmt: skip
    assert len(report.read(out).engines) == 2
    assert {file.name for file in out.glob("*.engine")} == {"model.SM86.engine", "model.SM80.engine"}


@pytest.mark.parametrize("room", [0, 1])
def test_a_report_without_room_never_describes_another_engine(out, capsys, worker, monkeypatch, room):
    """Room for none of the reports that are written, or for that of the engines that stay."""
    assert call(capsys, "build", out, "--target", "SM80")[0] == 0
    worker.content["SM80"] = b"another engine"
    write, written = report.write, []

    def full(made, folder):
        written.append(made)
        if len(written) > room:
            raise ResourceError("report.json: the disk is full")
        return write(made, folder)

    monkeypatch.setattr(report, "write", full)
    assert call(capsys, "build", out, "--target", "SM80")[0] == 5
    size = (out / "model.SM80.engine").stat().st_size
    assert [engine.bytes for engine in report.read(out).engines] == [size][room:]


@pytest.mark.slow
def test_a_conversion_builds_the_engines_of_its_recipe(converted, tmp_path, capsys):
    pytest.importorskip("tensorrt_rtx")
    (tmp_path / "r.yaml").write_text("latent_dim: 8\nheal_steps: 0\nprofiles:\n  - {tokens: [1, 2, 40]}\n")
    arguments = ("-o", tmp_path / "out", "--recipe", tmp_path / "r.yaml", "--export", "tensorrt")
    code, shown, err = call(capsys, converted.parent / "net.py", *arguments)
    assert code == 0, err
    (engine,) = report.read(tmp_path / "out").engines
    assert list(engine.profiles[0].values()) == [((1, 16), (2, 16), (40, 16))]
    assert (tmp_path / "out" / engine.file).stat().st_size == engine.bytes
    assert "model.portable.engine" in shown


def test_an_engine_that_cannot_be_built_fails_the_run_and_keeps_what_was_converted(
    converted, tmp_path, capsys, monkeypatch
):
    def refuse(folder, **_options):
        raise LatentizeError(f"{folder / 'model.onnx'}: TensorRT rejects node 7")

    monkeypatch.setattr("latentize.run_compare.require_tensorrt", lambda _: None)
    monkeypatch.setattr("latentize.exporters.tensorrt.build", refuse)
    out = tmp_path / "out"
    arguments = ("-o", out, "--latent-dim", "8", "--heal", "0", "--export", "tensorrt")
    code, shown, err = call(capsys, converted.parent / "net.py", *arguments)
    assert code == 4
    assert "gate failed: TensorRT engine: none. The report says why" in err
    words = " ".join(shown.split())
    assert "Gate TensorRT engine: none could be made: FAILED" in words
    assert "inf" not in words.partition("Gate TensorRT")[2].partition("Note")[0]
    said = f"{out / 'model.onnx'}: TensorRT rejects node 7"
    assert said.replace(" ", "") in shown.replace("\n", "").replace(" ", "")
    made = report.read(out)
    assert said in made.warnings
    assert [gate.made for gate in made.gates if gate.name == "TensorRT engine"] == [False]
    assert "Gate failed: TensorRT engine: none could be made." in (out / "report.html").read_text()
    assert latentize.load(out)(torch.randn(3, 16)).shape == (3, 16)


@pytest.mark.parametrize("target", ["onnxruntime", "onnxruntime-native"])
def test_the_library_for_onnxruntime_is_built_without_tensorrt_and_kept_in_the_report(out, capsys, target):
    if len(graphs()) == 1:
        pytest.skip("no C++ compiler here")
    code, shown, err = call(capsys, "build", out, "--target", target)
    assert code == 0, err
    assert f'register_custom_ops_library("{out / onnxruntime_ops.FILE}")' in "".join(shown.split())
    (library,) = report.read(out).libraries
    assert library.file == onnxruntime_ops.FILE
    assert library.bytes == (out / onnxruntime_ops.FILE).stat().st_size
    assert library.processor in shown
    assert onnxruntime_ops.FILE in (out / "report.html").read_text()


def test_the_library_for_onnxruntime_says_in_a_line_what_it_lacks(out, capsys, tmp_path, monkeypatch):
    code, _, err = call(capsys, "build", out, "--target", "onnxruntime", "--target", "onnxruntime-native")
    assert code == 2
    assert "both write latentize_onnxruntime.so; give one of them" in err
    with monkeypatch.context() as patched:
        for name, value in {"LATENTIZE_CACHE": str(tmp_path / "cache"), "CXX": "", "PATH": str(tmp_path)}.items():
            patched.setenv(name, value)
        code, _, err = call(capsys, "build", out, "--target", "onnxruntime")
    assert code == 2
    assert "no C++ compiler was found); install g++ or clang++" in err
    (out / "model.onnx").unlink()
    code, _, err = call(capsys, "build", out, "--target", "onnxruntime")
    assert code == 2
    assert "the library serves model.onnx, which is not there; convert with --export onnx" in err
