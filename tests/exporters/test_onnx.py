"""Whole models as ONNX files: they hold one node per block, run in plain onnxruntime, and agree with PyTorch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from latentize.errors import GateError, LatentizeError, ResourceError
from latentize.moe import LatentMoE
from latentize.spec import ExpertsSpec, LatentSpec, MoESpec, RouterSpec

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
onnx_ir = pytest.importorskip("onnx_ir")

from latentize.exporters import onnx_file  # noqa: E402
from latentize.exporters.onnx import EXTERNAL_ABOVE, export_onnx  # noqa: E402
from latentize.exporters.onnx_check import (  # noqa: E402
    NoKernelError,
    check_onnx,
    open_session,
    relative_error,
    run_session,
)
from latentize.exporters.onnx_widened import (  # noqa: E402
    TOLERANCE,
    holds_bfloat16,
    widen_graph,
    widen_inputs,
    widen_model,
)
from latentize.exporters.tensorrt_profiles import Profile  # noqa: E402
from latentize.inputs import Inputs  # noqa: E402

D, L, M, N, K, VOCAB = 16, 8, 12, 6, 2, 32


def make_spec(*, latent: bool = True, seed: int = 0, **router: Any) -> MoESpec:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    width = L if latent else D
    experts = ExpertsSpec(draw(N, M, width), draw(N, width, M), draw(N, M, width))
    projections = LatentSpec(draw(L, D), draw(D, L)) if latent else None
    return MoESpec(RouterSpec(draw(N, D) * 4, K, **{"normalize": "sum", **router}), experts, projections)


class Lm(nn.Module):
    """Embedding, two MoE blocks with a residual each, output head."""

    def __init__(self, *, latent: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, D)
        self.blocks = nn.ModuleList(LatentMoE(make_spec(latent=latent, seed=i)) for i in range(2))
        self.head = nn.Linear(D, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def fresh_ids(*shapes: tuple[int, int]) -> list[tuple[tuple[Tensor], dict[str, Any]]]:
    generator = torch.Generator().manual_seed(9)
    return [((torch.randint(VOCAB, shape, generator=generator),), {}) for shape in shapes]


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Lm, Path]:
    model, path = Lm(), tmp_path_factory.mktemp("lm") / "model.onnx"
    export = export_onnx(model, (torch.zeros(1, 4, dtype=torch.long),), {}, path, metadata={"recipe": "{}"})
    assert dict(export.forms) == dict.fromkeys(("blocks.0.experts", "blocks.1.experts"), "dense")
    return model, path


def test_whole_model_agrees_at_one_token_and_several_lengths_and_batches(lm: tuple[Lm, Path]) -> None:
    model, path = lm
    agreement = check_onnx(path, model, fresh_ids((1, 1), (1, 7), (3, 1), (2, 16), (1, 64)))
    assert agreement.error < 2e-6  # fp32 on both sides, sums in another order
    assert [c.shapes for c in agreement.comparisons][:2] == [((1, 1),), ((1, 7),)]


def test_a_bypass_goes_around_the_node(tmp_path: Path) -> None:
    model = Lm()
    for i, block in enumerate(model.blocks):
        spec, draw = block.spec, torch.Generator().manual_seed(20 + i)
        down, up = (0.3 * torch.randn(*shape, generator=draw) for shape in ((3, D), (D, 3)))
        around = replace(spec.latent, bypass_down=down, bypass_up=up)
        model.blocks[i] = LatentMoE(replace(spec, latent=around, output_scale=1.5))
    path = tmp_path / "model.onnx"
    export_onnx(model, (torch.zeros(1, 4, dtype=torch.long),), {}, path)
    nodes = [n for n in onnx.load(path).graph.node if n.op_type == "LatentExperts"]
    assert len(nodes) == 2
    agreement = check_onnx(path, model, fresh_ids((1, 1), (1, 7), (3, 1), (2, 16), (1, 64)))
    assert agreement.error < 2e-6  # fp32 on both sides, sums in another order
    with torch.no_grad():
        model.blocks[1].experts.bypass_up.zero_()
    with pytest.raises(GateError):
        check_onnx(path, model, fresh_ids((1, 7)))


def test_file_holds_one_node_per_block_and_passes_the_full_checker(lm: tuple[Lm, Path]) -> None:
    file = onnx.load(lm[1])
    nodes = [n for n in file.graph.node if (n.domain, n.op_type) == ("latentize", "LatentExperts")]
    assert len(nodes) == 2
    assert nodes[0].overload == nodes[1].overload == file.functions[0].overload  # equal blocks share one body
    assert len(file.functions) == 1
    assert {i.name for i in file.graph.initializer} >= {"blocks.0.experts.gate", "blocks.1.router.weight"}
    onnx.checker.check_model(file, full_check=True)


@pytest.mark.parametrize(
    ("use", "form", "words"),
    [
        ("1:1:4x1", "gather+dense", "gather up to 1 token, then dense; chosen for 1 to 4 tokens in flight"),
        ("1x256:256:512", "unrolled", "unrolled; chosen for 256 to 512 tokens in flight"),
    ],
)
def test_a_profile_chooses_the_form_and_any_number_of_tokens_still_agrees(
    use: str, form: str, words: str, tmp_path: Path
) -> None:
    block = LatentMoE(make_wide())
    x = torch.zeros(2, 5, 80)
    export = export_onnx(block, (x,), {}, tmp_path / "m.onnx", profiles=[Profile.parse(use)])
    assert dict(export.forms) == {"experts": form}
    assert [choice.describe() for choice in export.choices] == [words]
    assert export.problem == ""
    stored = {p.key: p.value for p in onnx.load(tmp_path / "m.onnx").metadata_props}
    assert stored["latentize.profiles"] == str(Profile.parse(use))
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(*shape, 80, generator=generator) for shape in ((1, 1), (3, 4), (1, 13), (2, 64), (1, 1000))]
    assert check_onnx(tmp_path / "m.onnx", block, [((x,), {}) for x in drawn]).error < 2e-6


def test_experts_too_large_to_be_timed_are_said_to_be_chosen_by_costs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from latentize.exporters import onnx_timing

    monkeypatch.setattr(onnx_timing, "_TIMED_BYTES", 1000)
    block, x = LatentMoE(make_wide()), torch.zeros(2, 5, 80)
    auto, measured = (export_onnx(block, (x,), {}, tmp_path / "m.onnx", form=form) for form in ("auto", "measured"))
    assert measured.choices == auto.choices
    assert measured.choices[0].how == "priced"


def make_wide() -> MoESpec:
    """Eight of 32 experts of a size at which every number of tokens has a form of its own: 80→64→64."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.1

    experts = ExpertsSpec(draw(32, 64, 64), draw(32, 64, 64), draw(32, 64, 64))
    return MoESpec(RouterSpec(draw(32, 80) * 4, 8, normalize="sum"), experts, LatentSpec(draw(64, 80), draw(80, 64)))


def test_without_a_profile_nothing_changes_and_one_the_graph_cannot_take_is_said(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = LatentMoE(make_spec())

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x.view(-1, 5, D))

    x = torch.zeros(2, 5, D)
    plain = export_onnx(Fixed(), (x,), {}, tmp_path / "plain.onnx")
    assert "latentize.profiles" not in {p.key for p in onnx.load(plain.path).metadata_props}
    assert plain.choices[0].tokens == tuple(1 << power for power in range(11))
    assert plain.problem == ""
    export = export_onnx(Fixed(), (x,), {}, tmp_path / "m.onnx", profiles=[Profile.parse("1x64")])
    assert "profile 1x64 asks for tokens 64, and axis 1 of input 'x' is always 5 in the graph" in export.problem


def test_metadata_is_in_the_file(lm: tuple[Lm, Path]) -> None:
    stored = {p.key: p.value for p in onnx.load(lm[1]).metadata_props}
    assert stored["recipe"] == "{}"
    assert json.loads(stored["latentize.forms"])["blocks.0.experts"] == "dense"


def test_model_is_left_as_it_was_and_only_free_sizes_are_symbols(tmp_path: Path) -> None:
    model = LatentMoE(make_spec()).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.random.get_rng_state()
    export_onnx(model, (torch.randn(2, 5, D, generator=torch.Generator()),), {}, tmp_path / "m.onnx", form="dense")
    assert model.training
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    batch, tokens, width = onnx.load(tmp_path / "m.onnx").graph.input[0].type.tensor_type.shape.dim
    assert batch.dim_param
    assert tokens.dim_param
    assert width.dim_value == D


def test_large_weights_go_to_a_second_file_and_replace_an_older_export(lm: tuple[Lm, Path], tmp_path: Path) -> None:
    model, path = lm[0], tmp_path / "m.onnx"
    graph = onnx_ir.load(lm[1])
    data_path = onnx_file.write_model(graph, path, external_above=1000)
    assert data_path == tmp_path / "m.onnx.data"
    assert {p.name for p in tmp_path.iterdir()} == {"m.onnx", "m.onnx.data"}
    assert path.stat().st_size < lm[1].stat().st_size
    onnx.checker.check_model(str(path), full_check=True)
    assert check_onnx(path, model, fresh_ids((1, 3))).error < 2e-6
    assert onnx_file.write_model(graph, path, external_above=1 << 30) is None
    assert {p.name for p in tmp_path.iterdir()} == {"m.onnx"}
    assert check_onnx(path, model, fresh_ids((1, 3))).error < 2e-6


def test_more_weights_than_one_file_holds_are_refused_unless_they_may_go_to_a_second(tmp_path: Path) -> None:
    """Beyond 2 GiB, as one value repeated."""
    weights = np.broadcast_to(np.float32(1), (1 << 29, 1))
    value = onnx_ir.Value(name="w", const_value=onnx_ir.Tensor(weights, name="w"))
    graph = onnx_ir.Graph([], [], nodes=[], initializers=[value], name="g")
    assert weights.nbytes == 1 << 31
    with pytest.raises(LatentizeError, match=r"2\.00 GiB of weights do not fit into one ONNX file"):
        onnx_file.write_model(onnx_ir.Model(graph, ir_version=10), tmp_path / "m.onnx", external_above=1 << 40)
    assert list(tmp_path.iterdir()) == []
    assert EXTERNAL_ABOVE < onnx_file.INLINE


def test_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx_ir, "save", full)
    model = onnx_ir.from_proto(onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [])))
    with pytest.raises(ResourceError, match="the disk is full"):
        onnx_file.write_model(model, tmp_path / "m.onnx", 0)
    assert list(tmp_path.iterdir()) == []


def test_unwritable_folder_is_one_line(lm: tuple[Lm, Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LatentizeError, match="cannot be written"):
        onnx_file.write_model(onnx_ir.load(lm[1]), tmp_path / "file" / "m.onnx", 0)


def test_fp16_runs_on_cpu(tmp_path: Path) -> None:
    model, path = LatentMoE(make_spec().to(torch.float16)), tmp_path / "m.onnx"
    export_onnx(model, (torch.ones(2, 5, D, dtype=torch.float16),), {}, path)
    x = torch.randn(1, 9, D, generator=torch.Generator().manual_seed(1)).half()
    # The body rounds to fp16 once at its end, PyTorch after every product: a few roundings of 5e-4.
    assert check_onnx(path, model, [((x,), {})]).error < 2e-3


def test_bf16_is_exported_and_cpu_kernels_that_lack_it_are_named(tmp_path: Path) -> None:
    model, path = LatentMoE(make_spec().to(torch.bfloat16)), tmp_path / "m.onnx"
    x = torch.ones(2, 5, D, dtype=torch.bfloat16)
    export_onnx(model, (x,), {}, path)
    onnx.checker.check_model(onnx.load(path), full_check=True)
    with pytest.raises(NoKernelError, match=r"has no CPU kernel for Gemm in the graph's dtype \(node_linear_1\)"):
        check_onnx(path, model, [((x,), {})])


class Halves(nn.Module):
    """A block between layers that hold what a graph may hold in bfloat16: constants, casts, branches, whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.moe = LatentMoE(make_spec())
        self.register_buffer("table", torch.arange(D) - 3)

    def forward(self, x: Tensor) -> Tensor:
        steps = self.table.to(x.dtype) * 0.01 + torch.tensor(0.5, dtype=x.dtype)
        return self.moe(x.float().cumsum(1).to(x.dtype) * steps) + torch.ones(D, dtype=x.dtype)


def test_a_bfloat16_graph_is_held_against_the_model_in_float32(tmp_path: Path) -> None:
    model, path, wide = Halves().to(torch.bfloat16), tmp_path / "m.onnx", tmp_path / "wide.onnx"
    x = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(2)).bfloat16()
    export_onnx(model, (x,), {}, path)
    assert holds_bfloat16(path)
    widen_graph(path, wide, EXTERNAL_ABOVE)
    onnx.checker.check_model(onnx.load(wide), full_check=True)
    assert not holds_bfloat16(wide)
    calls = [widen_inputs(Inputs((drawn,), {})) for drawn in (x, x[:, :1], x[:1, :3])]
    assert check_onnx(wide, widen_model(model), [(call.args, call.kwargs) for call in calls], TOLERANCE).error > 0
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        model.moe.experts.down.mul_(1.1)
    with pytest.raises(GateError, match="disagree"):
        check_onnx(wide, widen_model(model), [(call.args, call.kwargs) for call in calls], TOLERANCE)


def test_disagreement_is_a_gate_error(lm: tuple[Lm, Path]) -> None:
    other = Lm()
    with torch.no_grad():
        other.head.weight[0] += 0.01
    with pytest.raises(GateError, match=r"disagree on inputs \[1, 7\]: relative error .*, allowed 1e-05") as error:
        check_onnx(lm[1], other, fresh_ids((1, 7)))
    assert error.value.exit_code == 4


def test_not_a_number_is_a_gate_error(lm: tuple[Lm, Path]) -> None:
    other = Lm()
    with torch.no_grad():
        other.head.weight[0] = float("nan")
    with pytest.raises(GateError, match="relative error inf"):
        check_onnx(lm[1], other, fresh_ids((1, 7)))


def test_broken_missing_and_uncompared_files_are_one_line(lm: tuple[Lm, Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(lm[1].read_bytes()[:5000])
    with pytest.raises(LatentizeError, match="onnxruntime cannot load it"):
        open_session(broken)
    with pytest.raises(LatentizeError, match="no such file"):
        open_session(tmp_path / "none.onnx")
    with pytest.raises(LatentizeError, match="no inputs to compare on"):
        check_onnx(lm[1], lm[0], [])


class Stranger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), Eigenvalues())

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Special(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.lgamma(x)


class Eigenvalues(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvalsh(x @ x.mT)


def test_operator_that_onnx_lacks_is_named_with_its_place(tmp_path: Path) -> None:
    said = r"no operator for aten\._linalg_eigh \(in aten\.linalg_eigvalsh\), used in module 'inner\.1'"
    with pytest.raises(LatentizeError, match=said):
        export_onnx(Stranger(), (torch.ones(3, 4),), {}, tmp_path / "m.onnx")
    special = nn.Sequential(nn.Linear(4, 4), Special())  # what it becomes on the way is not what was written
    with pytest.raises(LatentizeError, match=r"for prims\.lgamma \(in aten\.lgamma\), used in module '1'; replace it"):
        export_onnx(special, (torch.ones(3, 4),), {}, tmp_path / "m.onnx")


class Rotary(nn.Module):
    """Turns pairs of values as complex numbers, some of them by themselves and some as real ones."""

    def forward(self, x: Tensor) -> Tensor:
        turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones(2), torch.ones(2))
        return torch.view_as_real(turned.unsqueeze(0)).flatten(-2).squeeze(0) + x.unsqueeze(0).squeeze(0)


def test_complex_numbers_are_named_with_their_place(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), Rotary())
    with pytest.raises(LatentizeError, match=r"no complex numbers, on which aten\.\w+ works in module '1'"):
        export_onnx(model, (torch.ones(3, 4),), {}, tmp_path / "m.onnx")


class Choosy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x


def test_model_that_cannot_be_captured_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(LatentizeError, match=r"torch\.export cannot capture Choosy") as error:
        export_onnx(Choosy(), (torch.ones(3, 4),), {}, tmp_path / "m.onnx")
    assert "\n" not in str(error.value)


def test_unsupported_requests_are_refused_before_the_work(tmp_path: Path) -> None:
    model, args, path = LatentMoE(make_spec()), (torch.ones(2, 5, D),), tmp_path / "m.onnx"
    with pytest.raises(LatentizeError, match="opset 12 is not supported: expected 20 to 23"):
        export_onnx(model, args, {}, path, opset=12)
    with pytest.raises(LatentizeError, match="form 'fast' is not known"):
        export_onnx(model, args, {}, path, form="fast")
    eight = nn.Linear(2, 2)
    eight.weight = nn.Parameter(eight.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(LatentizeError, match=r"weight is torch\.float8_e4m3fn; supported are float32"):
        export_onnx(eight, args, {}, path)


def make_qwen(vocab: int = VOCAB) -> nn.Module:
    """A transformers model with attention whose MoE blocks are in canonical form."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=vocab, hidden_size=D, intermediate_size=32, moe_intermediate_size=M, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=N, num_experts_per_tok=K,
        decoder_sparse_step=1, max_position_embeddings=64, norm_topk_prob=True, use_cache=True, initializer_range=0.3,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for i, layer in enumerate(model.model.layers):
        layer.mlp = LatentMoE(make_spec(seed=i))
    return model


@pytest.mark.slow
def test_transformers_model_generates_the_same_text(tmp_path: Path) -> None:
    model, path = make_qwen(), tmp_path / "m.onnx"
    export = export_onnx(model, (), {"input_ids": torch.zeros(1, 4, dtype=torch.long)}, path)
    assert export.inputs == ("input_ids",)
    assert model.config.use_cache
    calls = [((), {"input_ids": args[0]}) for args, _ in fresh_ids((1, 1), (2, 9), (3, 1))]
    assert check_onnx(path, model, calls).error < 5e-6
    prompt = fresh_ids((1, 5))[0][0][0]
    wanted = model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    session, ids = open_session(path, threads=1), prompt
    for _ in range(8):
        logits = run_session(session, Inputs(kwargs={"input_ids": ids}))[0]
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(ids, wanted)


@pytest.mark.slow
def test_a_model_that_works_chunk_by_chunk_takes_one_chunk_and_several(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.NemotronHConfig(
        vocab_size=VOCAB, hidden_size=D, layers_block_type=["mamba"], num_hidden_layers=1, mamba_num_heads=2,
        mamba_head_dim=D, n_groups=1, ssm_state_size=4, chunk_size=16, use_mamba_kernels=False, use_cache=False,
    )  # fmt: skip
    model = transformers.NemotronHForCausalLM(config).eval()
    export = export_onnx(model, (), {"input_ids": torch.zeros(2, 8, dtype=torch.long)}, tmp_path / "model.onnx")

    lengths = fresh_ids((1, 1), (2, 8), (1, 16), (3, 17), (1, 64))
    check_onnx(export.path, model, [((), {"input_ids": ids}) for (ids,), _ in lengths])


def test_an_output_that_is_not_a_number_is_as_far_off_as_can_be():
    expected = torch.ones(3)
    assert relative_error(torch.tensor([1.0, float("nan"), 1.0]), expected) == float("inf")
    assert relative_error(torch.tensor([1.0, float("inf"), 1.0]), expected) == float("inf")
