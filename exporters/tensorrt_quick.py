"""The routed latent experts as kernels that a TensorRT engine carries with it, so that it runs without Python.

For the full library (`tensorrt.plugin`, 10.9 or newer): one plugin for each kernel, several nodes for a block, in the
decode or the prefill form. A kernel gets its inputs, then counts as int32, then its outputs, and no workspace: what the
kernels hand one another are tensors of the graph. Each plugin stands for one kernel at one set of sizes, so it has no
attributes; its name says which.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from latentize.errors import LatentizeError
from latentize.exporters.onnx_bodies import DOMAIN, OP_TYPE
from latentize.exporters.onnx_experts import node_config
from latentize.kernels_triton_aot import COUNTS, TARGETS, argument_type, compile_step
from latentize.kernels_triton_steps import SLICE, Config, Cut, Problem, Step, steps

if TYPE_CHECKING:
    import onnx_ir as ir

    from latentize.exporters.onnx_forms import NodeConfig

NAMESPACE = DOMAIN
#: Dynamic shared memory that every launch may have; more must be asked of the driver, which TensorRT may not do.
SHARED = 48 << 10
_INPUTS = ("hidden", "indices", "weights", "gate", "up", "down", "gate_bias", "up_bias", "down_bias")
_DTYPES = {1: torch.float32, 10: torch.float16, 16: torch.bfloat16}  # ONNX's numbers
_KINDS = {"fp32": "FP32", "fp16": "FP16", "bf16": "BF16", "i64": "INT64", "i32": "INT32"}
_TRT = {"FP32": "FLOAT", "FP16": "HALF", "BF16": "BF16", "INT64": "INT64", "INT32": "INT32"}


@dataclass(frozen=True)
class Kernel:
    """One plugin: the names of what goes in, of the counts after it, and of what comes out, in the kernel's order."""

    name: str
    problem: Problem
    cut: Cut
    step: Step
    inputs: tuple[str, ...]
    counts: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def configs(self) -> tuple[Config, ...]:
        """The ways to cut its work that any launch has the shared memory for: TensorRT's tactics, from 1 on.

        Where none is, those that do without a pipeline.

        Raises:
            LatentizeError: there is none.
        """
        plain = tuple(replace(c, num_stages=1, shared=c.shared // c.num_stages) for c in self.step.configs)
        every = (tuple(c for c in given if c.shared <= SHARED) for given in (self.step.configs, plain))
        fits = next((some for some in every if some), ())
        if not fits:
            raise LatentizeError(
                f"kernel {self.step.name} at l {self.problem.width}, m {self.problem.intermediate} needs more than "
                f"{SHARED >> 10} KiB of shared memory, which embedded kernels may not get; use --experts plugin"
            )
        return fits

    def kind(self, name: str) -> str:
        """The type of a tensor as TensorRT spells it, e.g. "BF16"."""
        return _KINDS[argument_type(name, self.step, self.problem).removeprefix("*")]

    def shape(self, name: str, tokens: Any, math: Any) -> tuple[Any, ...]:
        """Shape of an output for `tokens` [an expression of TensorRT's]; `math` has its `min` and `cdiv`."""
        p, pairs = self.problem, tokens * self.problem.top_k
        if name == "combined":
            return tokens, p.width
        if name == "activated":
            return pairs, p.intermediate
        if name == "outputs":
            return pairs, self.cut.splits, p.width
        if name == "chunk_counts":
            return math.cdiv(pairs, self.cut.chunk), p.constants["EXPERTS"]
        return (pairs,) if name == "order" else (self._blocks(pairs, math),)

    def count(self, name: str, tokens: Any, math: Any) -> Any:
        """What a count is for `tokens`."""
        pairs = tokens * self.problem.top_k
        return pairs if name == "pairs" else self._blocks(pairs, math)

    def grid(self, config: Config, tokens: Any, math: Any) -> tuple[Any, ...]:
        """Blocks to launch for `tokens`, as `step.grid` has them for a number."""
        p, constants = self.problem, config.constants
        pairs = tokens * p.top_k
        if self.step.name == "decode_up":
            return pairs, -(-p.intermediate // constants["ROWS"])
        if self.step.name == "decode_down":
            return tokens, -(-p.width // constants["ROWS"])
        if self.step.name == "combine":
            return tokens, -(-p.width // constants["COLUMNS"])
        if self.step.name == "count_pairs":
            return (math.cdiv(pairs, self.cut.chunk),)
        if self.step.name == "place_pairs":
            return (math.cdiv(pairs, SLICE),)
        if self.step.name == "fused":
            return (self._blocks(pairs, math) * self.cut.splits,)
        length = p.intermediate if self.step.name == "grouped_up" else p.width
        return (self._blocks(pairs, math) * -(-length // constants["COLUMNS"]),)

    def _blocks(self, pairs: Any, math: Any) -> Any:
        """`kernels_triton_steps.block_count` as an expression."""
        partial = math.min(pairs, self.problem.num_experts)
        return math.min(pairs, math.cdiv(pairs, self.cut.block) + partial)


def kernels(problem: Problem, tokens: int) -> tuple[Kernel, ...]:
    """The kernels of a block's routed experts in order, in the form that suits `tokens`."""
    cut = Cut.of(problem, tokens)
    known = {name for name in _INPUTS if name not in problem.absent()}
    key = hashlib.sha256(f"{problem} {cut}".encode()).hexdigest()[:12]
    found = []
    for step in steps(problem, cut):
        names = [name for name in step.arguments if name not in problem.absent()]
        inputs = tuple(name for name in names if name in known)
        counts = tuple(name for name in names if name in COUNTS)
        outputs = tuple(name for name in names if name not in known and name not in COUNTS)
        assert [*inputs, *counts, *outputs] == names, f"{step.name} takes its arguments in another order"
        known.update(outputs)
        found.append(Kernel(f"{OP_TYPE}_{key}_{step.name}", problem, cut, step, inputs, counts, outputs))
    return tuple(found)


def problem_of(config: NodeConfig) -> Problem:
    """What the kernels are specialised to for a node.

    Raises:
        LatentizeError: the node's dtype is not one of theirs.
    """
    if config.dtype not in _DTYPES:
        raise LatentizeError("embedded kernels take fp32, fp16 and bf16; give --dtype")
    n, m, width = config.num_experts, config.intermediate_size, config.latent_dim
    inner = (m * width, width)
    return Problem(
        n, config.top_k, width, m, _DTYPES[config.dtype], config.activation, config.weights_on_input,
        gate=inner if "gate" in config.inputs else None, up=inner, down=(width * m, m),
        gate_bias=m if "gate_bias" in config.inputs else None, up_bias=m if "up_bias" in config.inputs else None,
        down_bias=width if "down_bias" in config.inputs else None,
    )  # fmt: skip


def embed(model: ir.Model, tokens: int) -> list[Problem]:
    """Put the nodes of the kernels for about `tokens` in place of every `latentize::LatentExperts` node.

    Returns:
        what `register` must be told to define them.
    """
    problems: dict[Problem, None] = {}
    for node in [n for n in model.graph if (n.domain, n.op_type) == (DOMAIN, OP_TYPE)]:
        problem = problem_of(node_config(node))
        problems[problem] = None
        _replace(model, node, kernels(problem, tokens))
    return list(problems)


def _replace(model: ir.Model, node: ir.Node, chain: Sequence[Kernel]) -> None:
    import onnx_ir as ir

    values = dict(zip(_INPUTS, [*node.inputs, *(None,) * (len(_INPUTS) - len(node.inputs))], strict=True))
    for kernel in chain:
        made = ir.node(
            kernel.name, [values[name] for name in kernel.inputs], {"plugin_namespace": NAMESPACE},
            domain=NAMESPACE, num_outputs=len(kernel.outputs), name=f"{node.name or 'experts'}_{kernel.step.name}",
        )  # fmt: skip
        for name, output in zip(kernel.outputs, made.outputs, strict=True):
            output.name = f"{made.name}_{name}"
        values.update(zip(kernel.outputs, made.outputs, strict=True))
        model.graph.insert_before(node, made)
    result, final = node.outputs[0], values["combined"]
    assert final is not None
    final.name, final.shape, final.type = result.name, result.shape, result.type
    result.name = None
    ir.convenience.replace_all_uses_with(result, final, replace_graph_outputs=True)
    model.graph.remove(node, safe=True)


def register(trtp: Any, trt: Any, problems: Sequence[Problem], tokens: int, target: int) -> None:
    """Define the plugins of these problems in TensorRT, for building on compute capability `target`.

    Args:
        trtp: the module `tensorrt.plugin`.
        trt: the module `tensorrt`.
        problems: from `embed`.
        tokens: as given to `embed`.
        target: 90 for 9.0.

    Raises:
        LatentizeError: the kernels are not compiled for this target.
    """
    if target not in TARGETS:
        known = ", ".join(f"{t // 10}.{t % 10}" for t in TARGETS)
        raise LatentizeError(f"compute capability {target / 10:.1f}: embedded kernels are compiled for {known}")
    for problem in problems:
        for kernel in kernels(problem, tokens):
            _define(trtp, trt, kernel, target)


def _define(trtp: Any, trt: Any, kernel: Kernel, target: int) -> None:
    """One plugin's three functions; TensorRT reads their signatures, which are made from the kernel's arguments."""
    name, inputs = f"{NAMESPACE}::{kernel.name}", kernel.inputs
    tensor = trtp.TensorDesc

    def describe(*given: Any) -> Any:
        tokens = _tokens(kernel, given)
        made = tuple(
            trtp.from_shape_expr(kernel.shape(output, tokens, trtp), getattr(trt.DataType, _TRT[kernel.kind(output)]))
            for output in kernel.outputs
        )
        return made if len(made) > 1 else made[0]

    def combinations(*_: Any) -> Any:
        kinds = ", ".join(kernel.kind(each) for each in (*inputs, *kernel.outputs))
        return [trtp.AutoTuneCombination(kinds, "LINEAR", list(range(1, len(kernel.configs) + 1)))]

    def compiled(*given: Any) -> Any:
        tokens, tactic = _tokens(kernel, given), given[-1]
        config = kernel.configs[max(0, tactic - 1)]
        made = compile_step(target, kernel.problem, kernel.step, config)
        if made.shared > SHARED:
            raise LatentizeError(
                f"kernel {kernel.step.name} takes {made.shared} bytes of shared memory, {SHARED} are sure to be there"
            )
        launch = trtp.KernelLaunchParams()
        for axis, blocks in zip("xyz", kernel.grid(config, tokens, trtp), strict=False):
            setattr(launch, f"grid_{axis}", blocks)
        launch.block_x, launch.shared_mem = made.threads, made.shared
        counts = trtp.SymIntExprs(len(kernel.counts))
        for i, count in enumerate(kernel.counts):
            counts[i] = trtp.SymInt32(kernel.count(count, tokens, trtp))
        return made.symbol, made.bare_ptx, launch, counts

    outputs: Any = types.GenericAlias(tuple, (tensor,) * len(kernel.outputs))
    result = outputs if len(kernel.outputs) > 1 else tensor
    text = str | bytes
    returned = types.GenericAlias(tuple, (text, text, trtp.KernelLaunchParams, trtp.SymIntExprs))
    listed = types.GenericAlias(list, (trtp.AutoTuneCombination,))
    parameters = {f"input_{each}": tensor for each in inputs}  # the bare names would clash with TensorRT's own
    trtp.register(name)(_signed(describe, parameters, result))
    trtp.autotune(name)(_signed(combinations, {**parameters, "outputs": outputs}, listed))
    trtp.aot_impl(name)(_signed(compiled, {**parameters, "outputs": outputs, "tactic": int}, returned))


def _tokens(kernel: Kernel, given: Sequence[Any]) -> Any:
    """The number of tokens, or of what it follows from, among the descriptions of the inputs."""
    by_name = dict(zip(kernel.inputs, given, strict=False))
    for name in ("hidden", "indices", "weights"):
        if name in by_name:
            return by_name[name].shape_expr[0]
    raise AssertionError(f"{kernel.step.name} has no input that counts tokens")


def _signed(function: Callable[..., Any], parameters: Mapping[str, Any], returned: Any) -> Callable[..., Any]:
    """The function with a signature of its own, and with its arguments in that order however they are passed."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    listed = [inspect.Parameter(name, kind, annotation=annotation) for name, annotation in parameters.items()]
    signature = inspect.Signature(listed, return_annotation=returned)

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        return function(*bound.arguments.values())

    called.__signature__ = signature  # type: ignore[attr-defined]
    return called
