"""The operator library in onnxruntime: what it computes, what it refuses, and that files run without it too."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from random_blocks import random_experts

from latentize.activations import FUNCTIONS, Activation
from latentize.errors import LatentizeError
from latentize.reference import experts_forward
from latentize.routing import Routing
from latentize.spec import ExpertsSpec, MoESpec, RouterSpec

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper  # noqa: E402

from latentize.exporters import onnxruntime_ops  # noqa: E402
from latentize.exporters.onnx_bodies import DOMAIN, INPUTS, OP_TYPE, build_body  # noqa: E402
from latentize.exporters.onnx_check import open_session  # noqa: E402
from latentize.exporters.onnx_forms import NodeConfig  # noqa: E402
from latentize.exporters.onnx_fused import MICROSOFT  # noqa: E402

N, K, L, M = 6, 3, 9, 5
CLAMPED = Activation("silu", alpha=1.702, gate_max=0.7, up_min=-0.7, up_max=0.7, up_offset=1.0)
ELEMENTS = {
    torch.float32: TensorProto.FLOAT, torch.float64: TensorProto.DOUBLE, torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
}  # fmt: skip


@pytest.fixture(scope="module")
def library() -> Path:
    found = onnxruntime_ops.library()
    if found is None:
        pytest.skip("no C++ compiler here")
    return found


def make_experts(
    *, gated: bool = True, biases: bool = False, activation: Activation | None = None, m: int = M, latent: int = L
) -> ExpertsSpec:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * 0.6

    return random_experts(draw, latent, m, N, gated=gated, biases=biases, activation=activation)


def make_routing(tokens: int, *, missing: bool = False) -> Routing:
    """Distinct experts per token, weights of both signs; with `missing`, some indices name no expert."""
    generator = torch.Generator().manual_seed(tokens)
    order = torch.rand(tokens, N, generator=generator).argsort(-1)[:, :K]
    weights = torch.randn(tokens, K, generator=generator, dtype=torch.float64)
    if missing:
        order[:, 1] = N + 7
        order[0] = torch.arange(N, N + K)
    return Routing(torch.empty(0), weights, order)


def write_model(
    path: Path, experts: ExpertsSpec, *, on_input: bool = False, dtype: torch.dtype = torch.float32,
    constant: bool = False, **changed: object,
) -> Path:  # fmt: skip
    """One node and its body, its weights inputs of the graph or constant; `changed` replaces attributes of the node."""
    tensors = {name: getattr(experts, name) for name in INPUTS[3:]}
    attributes = {name: value for name, value in asdict(experts.activation).items() if value is not None}
    attributes["activation"] = attributes.pop("name")
    there = [name for name in INPUTS[3:] if tensors[name] is not None]
    node = helper.make_node(
        OP_TYPE, [*INPUTS[:3], *(name if name in there else "" for name in INPUTS[3:])], ["combined"], domain=DOMAIN,
        overload="only", **{"weights_on_input": int(on_input), **attributes, **changed},
    )  # fmt: skip
    element, info = ELEMENTS[dtype], helper.make_tensor_value_info
    inputs = [info(name, TensorProto.INT64 if name == "indices" else element, None) for name in (*INPUTS[:3], *there)]
    stored = {name: tensors[name].to(dtype) for name in there}
    weights = [
        helper.make_tensor(name, element, tensor.shape, tensor.view(torch.uint8).numpy().tobytes(), raw=True)
        for name, tensor in stored.items()
    ]
    outputs = [info("combined", element, None)]
    graph = helper.make_graph([node], "one", inputs[:3] if constant else inputs, outputs, weights if constant else [])
    n, m, latent = experts.up.shape
    optional = tuple(name for name in there if name not in ("up", "down"))
    config = NodeConfig(n, K, latent, m, element, experts.activation, optional, on_input)
    body = build_body("loop", config, 20, "only")
    imports = [helper.make_opsetid(domain, version) for domain, version in (("", 20), (DOMAIN, 1), (MICROSOFT, 1))]
    onnx.save(helper.make_model(graph, functions=[body], opset_imports=imports, ir_version=10), path)
    return path


def feeds(experts: ExpertsSpec, hidden: torch.Tensor, routing: Routing, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    stored = {name: getattr(experts, name) for name in INPUTS[3:]}
    floats = {"hidden": hidden, "weights": routing.weights, **{n: t for n, t in stored.items() if t is not None}}
    return {"indices": routing.indices, **{name: tensor.to(dtype) for name, tensor in floats.items()}}


def run(session: onnxruntime.InferenceSession, fed: dict[str, torch.Tensor]) -> torch.Tensor:
    def value(tensor: torch.Tensor) -> onnxruntime.OrtValue:
        if tensor.dtype == torch.bfloat16:  # numpy has no such type
            bits = tensor.contiguous().view(torch.uint16).numpy()
            return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, TensorProto.BFLOAT16)
        return onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy())

    taken = {graph_input.name for graph_input in session.get_inputs()}
    values = {name: value(tensor) for name, tensor in fed.items() if name in taken}
    outputs = session.run_with_ort_values(["combined"], values)
    return torch.utils.dlpack.from_dlpack(outputs[0])


def worst_error(
    session: onnxruntime.InferenceSession, experts: ExpertsSpec, *, tokens: tuple[int, ...] = (1, 7, 300),
    on_input: bool = False, dtype: torch.dtype = torch.float32, missing: bool = False,
) -> float:  # fmt: skip
    """Largest relative error against the fp64 reference on what the dtype makes of the same values."""
    router = RouterSpec(torch.empty(N, experts.up.shape[2]), K, applies_to="input" if on_input else "output")
    errors = []
    for count in tokens:
        routing = make_routing(count, missing=missing)
        generator = torch.Generator().manual_seed(count)
        hidden = torch.randn(count, experts.up.shape[2], generator=generator, dtype=torch.float64)
        fed = feeds(experts, hidden, routing, dtype)
        seen = {name: tensor.double() for name, tensor in fed.items() if name != "indices"}
        rounded = ExpertsSpec(*(seen.get(n) for n in ("up", "down", "gate", "gate_bias", "up_bias", "down_bias")),
                              experts.activation)  # fmt: skip
        routing = Routing(torch.empty(0), seen["weights"], routing.indices)
        expected = experts_forward(MoESpec(router, rounded), seen["hidden"], routing)
        actual = run(session, fed).double()
        assert actual.shape == expected.shape
        errors.append(((actual - expected).norm() / expected.norm().clamp_min(1e-12)).item())
    return max(errors)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("gated", [True, False])
def test_every_activation(name: str, gated: bool, library: Path, tmp_path: Path) -> None:
    experts = make_experts(gated=gated, activation=Activation(name))
    session = open_session(write_model(tmp_path / "m.onnx", experts), operator=library)
    assert worst_error(session, experts) < 1e-6


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("on_input", [True, False])
@pytest.mark.parametrize("missing", [True, False])
@pytest.mark.parametrize("constant", [True, False])
def test_every_layout(
    gated: bool, biases: bool, on_input: bool, missing: bool, constant: bool, library: Path, tmp_path: Path
) -> None:
    experts = make_experts(gated=gated, biases=biases, activation=CLAMPED if gated else None, m=70, latent=33)
    path = write_model(tmp_path / "m.onnx", experts, on_input=on_input, constant=constant)
    for operator in (library, None):  # the body of standard operators says the same
        session = open_session(path, operator=operator)
        assert worst_error(session, experts, on_input=on_input, missing=missing) < 1e-5


@pytest.mark.parametrize(
    # What rounds is the result: half a unit in its last place, and a little more where sums are cut to fp32.
    ("dtype", "limit"), [(torch.float64, 1e-14), (torch.float16, 2.0**-11), (torch.bfloat16, 2.0**-8)]
)  # fmt: skip
@pytest.mark.parametrize("constant", [True, False])
def test_other_dtypes_to_rounding(
    dtype: torch.dtype, limit: float, constant: bool, library: Path, tmp_path: Path
) -> None:
    experts = make_experts(biases=True)
    path = write_model(tmp_path / "m.onnx", experts, dtype=dtype, constant=constant)
    session = open_session(path, operator=library)
    assert worst_error(session, experts, dtype=dtype) < limit


def test_no_tokens_give_no_output(library: Path, tmp_path: Path) -> None:
    experts = make_experts()
    session = open_session(write_model(tmp_path / "m.onnx", experts), operator=library)
    fed = feeds(experts, torch.empty(0, L), make_routing(0), torch.float32)
    assert run(session, fed).shape == (0, L)


def test_the_registered_operator_runs_in_place_of_the_body(library: Path, tmp_path: Path) -> None:
    """The body of this file adds what no kernel adds, so that it can be told which of them ran."""
    experts = make_experts()
    path = write_model(tmp_path / "m.onnx", experts)
    model = onnx.load(path)
    last = model.functions[0].node[-1]
    one = helper.make_node("Constant", [], ["one"], value_float=1.0)
    changed = helper.make_node("Add", ["before", "one"], list(last.output))
    last.output[:] = ["before"]
    model.functions[0].node.extend([one, changed])
    onnx.save(model, path)
    fed = feeds(experts, torch.zeros(2, L), make_routing(2), torch.float32)
    assert torch.equal(run(open_session(path), fed), torch.ones(2, L))
    assert torch.equal(run(open_session(path, operator=library), fed), torch.zeros(2, L))


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("hidden", (4, L + 1), "expected shape"),
        ("indices", (3, K), "indices expected shape [4, 3, 0], found [3, 3, 0]"),
        ("weights", (4, K + 1), "weights expected shape"),
        ("gate", (N, M + 1, L), "gate expected shape [6, 5, 9], found [6, 6, 9]"),
        ("down", (N - 1, L, M), "down expected shape"),
        ("up", (M, L), "up expected 3 dimensions, found 2"),
        ("down_bias", (N, L, 1), "down_bias expected 2 dimensions, found 3"),
    ],
)
def test_wrong_shapes_are_an_error(
    name: str, shape: tuple[int, ...], words: str, library: Path, tmp_path: Path
) -> None:
    experts = make_experts(biases=True)
    session = open_session(write_model(tmp_path / "m.onnx", experts), operator=library)
    fed = feeds(experts, torch.zeros(4, L), make_routing(4), torch.float32)
    fed[name] = torch.zeros(shape, dtype=fed[name].dtype)
    with pytest.raises(Exception, match=r"LatentExperts: ") as raised:
        run(session, fed)
    assert words in str(raised.value)


def test_constant_weights_that_do_not_fit_are_an_error_of_the_call(library: Path, tmp_path: Path) -> None:
    experts = make_experts()
    path = write_model(tmp_path / "m.onnx", experts, constant=True)
    model = onnx.load(path)
    next(i for i in model.graph.initializer if i.name == "down").dims[:] = [N, M, L]
    onnx.save(model, path)
    session = open_session(path, operator=library)
    with pytest.raises(Exception, match=r"down expected shape \[6, 9, 5\], found \[6, 5, 9\]"):
        run(session, feeds(experts, torch.zeros(4, L), make_routing(4), torch.float32))


def test_a_negative_index_is_an_error(library: Path, tmp_path: Path) -> None:
    experts = make_experts()
    session = open_session(write_model(tmp_path / "m.onnx", experts), operator=library)
    fed = feeds(experts, torch.zeros(4, L), make_routing(4), torch.float32)
    fed["indices"][2, 1] = -1
    with pytest.raises(Exception, match="an index is negative"):
        run(session, fed)


@pytest.mark.parametrize("activation", ["swish", "x" * 100, ""])
def test_an_unknown_activation_is_refused_when_the_session_is_made(
    activation: str, library: Path, tmp_path: Path
) -> None:
    path = write_model(tmp_path / "m.onnx", make_experts(), activation=activation)
    with pytest.raises(LatentizeError, match=r"LatentExperts: (activation|its activation has a name of 10)"):
        open_session(path, operator=library)


def test_a_float64_node_with_a_scalar_that_float32_rounds_is_refused(library: Path, tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.onnx", make_experts(activation=CLAMPED), dtype=torch.float64)
    with pytest.raises(LatentizeError, match=r"the scalar 1\.702 of a float64 node was rounded"):
        open_session(path, operator=library)
    open_session(path)


def test_names_of_activations_are_ours_in_our_order() -> None:
    text = Path(onnxruntime_ops.__file__).with_suffix(".cpp").read_text()
    names = text.split("ACTIVATIONS[] = {")[1].split("}")[0].replace('"', "").split(",")
    assert tuple(name.strip() for name in names) == tuple(FUNCTIONS)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("constant", [True, False])
def test_sessions_run_side_by_side(threads: int, constant: bool, library: Path, tmp_path: Path) -> None:
    experts = make_experts(m=330, latent=144)
    path = write_model(tmp_path / "m.onnx", experts, constant=constant)
    sessions = [open_session(path, threads, operator=library) for _ in range(2)]
    errors: list[float] = []

    def work(session: onnxruntime.InferenceSession) -> None:
        errors.extend(worst_error(session, experts) for _ in range(5))

    running = [threading.Thread(target=work, args=(session,)) for session in sessions * 2]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert len(errors) == 20
    assert max(errors) < 1e-5


def test_without_a_library_the_body_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTIZE_NATIVE", "0")
    onnxruntime_ops._library.cache_clear()
    try:
        assert onnxruntime_ops.library() is None
        assert onnxruntime_ops.register(onnxruntime.SessionOptions()) is False
    finally:
        onnxruntime_ops._library.cache_clear()
    experts = make_experts()
    assert worst_error(open_session(write_model(tmp_path / "m.onnx", experts)), experts) < 1e-5


def test_options_that_it_was_registered_in_run_it(library: Path, tmp_path: Path) -> None:
    experts, options = make_experts(), onnxruntime.SessionOptions()
    assert onnxruntime_ops.register(options) is True
    path = write_model(tmp_path / "m.onnx", experts)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    fed = feeds(experts, torch.zeros(1, L), make_routing(1), torch.float32)
    fed["indices"][0, 0] = -1
    with pytest.raises(Exception, match="an index is negative"):
        run(session, fed)


def test_no_compiler_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    for name, value in {"LATENTIZE_CACHE": str(tmp_path), "CXX": "false", "PATH": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    onnxruntime_ops._library.cache_clear()
    try:
        with caplog.at_level(logging.INFO, logger="latentize.exporters.onnxruntime_ops"):
            assert onnxruntime_ops.library() is None
    finally:
        onnxruntime_ops._library.cache_clear()
    assert [r.message for r in caplog.records] == [
        "no operator library for onnxruntime, standard operators are used: no C++ compiler was found"
    ]
    with pytest.raises(LatentizeError, match=r"no C\+\+ compiler was found\); install g\+\+ or clang\+\+, or name one"):
        onnxruntime_ops.build(tmp_path)


@pytest.mark.parametrize(
    ("number", "code", "words"),
    [
        (errno.ENOSPC, 5, "the disk is full; an earlier one stays there"),
        (errno.EFBIG, 5, "a file grows larger than"),
        (errno.EROFS, 2, r"cannot be written \(Read-only file system\); make it writable, or use a copy"),
    ],
)
def test_a_place_that_takes_no_library_is_one_line_and_keeps_the_earlier_one(
    number: int, code: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    made, earlier = tmp_path / "made.so", tmp_path / onnxruntime_ops.FILE
    for file in (made, earlier):
        file.write_bytes(file.name.encode())
    for name in ("tempfile.mkstemp",) if number == errno.EROFS else ("os.fsync", "shutil.copyfile"):
        with monkeypatch.context() as patched:
            patched.setattr(name, refuse)
            with pytest.raises(LatentizeError, match=f"{onnxruntime_ops.FILE}: {words}") as caught:
                onnxruntime_ops._placed(made, tmp_path, "any")
        assert caught.value.exit_code == code
        assert earlier.read_bytes() == earlier.name.encode()
        assert sorted(tmp_path.iterdir()) == sorted([made, earlier])


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setenv("LATENTIZE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(onnxruntime_ops, "compiled", refuse)
    with pytest.raises(LatentizeError, match=r"cache: cannot be written .*; name another folder in LATENTIZE_CACHE"):
        onnxruntime_ops.build(tmp_path, native=True)


def test_a_library_that_is_none_is_refused(tmp_path: Path) -> None:
    experts = make_experts()
    path, other = write_model(tmp_path / "m.onnx", experts), tmp_path / "other.so"
    other.write_bytes(b"nothing of the kind")
    with pytest.raises(LatentizeError, match=r"other\.so: onnxruntime does not take this library"):
        open_session(path, operator=other)


def test_the_portable_library_serves_where_nothing_of_ours_is_loaded(library: Path, tmp_path: Path) -> None:
    if os.uname().machine not in onnxruntime_ops.PORTABLE:
        pytest.skip("no portable library for this architecture")
    made = onnxruntime_ops.build(tmp_path)
    assert (made.file, made.bytes) == (onnxruntime_ops.FILE, (tmp_path / made.file).stat().st_size)
    assert made.processor == onnxruntime_ops.PORTABLE[os.uname().machine][0]
    assert made.system.startswith("Linux")
    experts = make_experts()
    path = write_model(tmp_path / "m.onnx", experts)
    fed = feeds(experts, torch.randn(7, L, generator=torch.Generator().manual_seed(0)), make_routing(7), torch.float32)
    np.savez(tmp_path / "fed.npz", **{name: tensor.numpy() for name, tensor in fed.items()})
    code = (
        "import sys, numpy, onnxruntime\n"
        "options = onnxruntime.SessionOptions()\n"
        f"options.register_custom_ops_library({str(tmp_path / made.file)!r})\n"
        "session = onnxruntime.InferenceSession('m.onnx', options)\n"
        "numpy.save('out.npy', session.run(None, dict(numpy.load('fed.npz')))[0])\n"
        "assert not {'torch', 'latentize'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    expected = run(open_session(path), fed)
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "out.npy")), expected, rtol=1e-5, atol=1e-5)
