"""What `gpu_check.py` checks of the operator on the device, before it times anything.

A check returns one line saying what was compared and how close it came; it raises AssertionError where it fails and
`Skipped` where the machine lacks something. Every comparison is with fp64.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from latentize import kernels_triton, ops, route_triton
from latentize.activations import FUNCTIONS, Activation
from latentize.kernels_torch import Experts
from latentize.kernels_triton_steps import FORMS, Form
from latentize.moe import LatentMoE
from latentize.reference import experts_forward
from latentize.routing import Routing, route
from latentize.spec import ExpertsSpec, LatentSpec, MoESpec, RouterSpec

SILU = Activation("silu")
CLAMPED = {"alpha": 1.7, "gate_min": -0.9, "gate_max": 0.8, "up_min": -0.7, "up_max": 0.7, "up_offset": 1.0}
#: Largest relative error: sums in another order; in 16 bits, hidden activations, pairs' outputs and the result rounded.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


class Skipped(Exception):  # noqa: N818 - the outcome of a check, not an error
    """The machine lacks what a check needs."""


@dataclass(frozen=True)
class Where:
    """The device and dtypes of a run; `quick` keeps sizes tiny, for the interpreter."""

    device: str
    dtypes: tuple[torch.dtype, ...]
    quick: bool


class Call(NamedTuple):
    """The tensors of one call of the operator."""

    hidden: Tensor
    indices: Tensor
    weights: Tensor
    experts: Experts


def call(
    where: Where, dtype: torch.dtype, tokens: int = 9, experts: int = 6, k: int = 3, m: int = 40, width: int = 24,
    *, gated: bool = True, biases: bool = True, absent: int = 1, seed: int = 0,
) -> Call:  # fmt: skip
    """Random arguments on the device; `absent` expert numbers past the real ones may be selected."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(where.device, dtype)

    scores = torch.rand(tokens, experts + absent, generator=generator)
    return Call(
        normal(tokens, width),
        scores.argsort(1)[:, :k].to(where.device),
        normal(tokens, k),
        Experts(
            normal(experts, m, width) / width**0.5 if gated else None,
            normal(experts, m, width) / width**0.5,
            normal(experts, width, m) / m**0.5,
            normal(experts, m) if gated and biases else None,
            normal(experts, m) if biases else None,
            normal(experts, width) if biases else None,
        ),
    )


def run(c: Call, form: Form | None = None, activation: Activation = SILU, on_input: bool = False) -> Tensor:
    """The kernels' result."""
    assert kernels_triton.serves(c.hidden, c.experts), "the Triton kernels do not serve this device"
    return kernels_triton.forward(*c, activation, on_input, form)


def reference(c: Call, activation: Activation = SILU, on_input: bool = False) -> Tensor:
    """The same in fp64 by the definition."""
    e = Experts(*(None if t is None else t.double() for t in c.experts))
    router = RouterSpec(torch.empty(0), c.indices.shape[1], applies_to="input" if on_input else "output")
    experts = ExpertsSpec(e.up, e.down, e.gate, e.gate_bias, e.up_bias, e.down_bias, activation)
    weights = c.weights.double()
    return experts_forward(MoESpec(router, experts), c.hidden.double(), Routing(weights, weights, c.indices))


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative error over the whole tensor; inf where something is not finite."""
    value = float((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30))
    return value if value == value else float("inf")


def compare(c: Call, form: Form | None, activation: Activation = SILU, on_input: bool = False) -> float:
    """The relative error as a fraction of its tolerance, which it must not exceed."""
    found = error(run(c, form, activation, on_input), reference(c, activation, on_input))
    limit = TOLERANCE[c.hidden.dtype]
    sizes = f"T {len(c.hidden)}, N, m, l {list(c.experts.up.shape)}, k {c.indices.shape[1]}"
    assert found < limit, f"{form} {c.hidden.dtype} {activation} {sizes}: {found:.1e}, allowed {limit:.1e}"
    return found / limit


def check_activations(where: Where) -> str:
    """Every activation, plain and clamped, in the decode form."""
    names = ["silu", "gelu_tanh"] if where.quick else list(FUNCTIONS)
    calls = [call(where, torch.float32, gated=gated) for gated in (True, False)]
    worst = max(
        compare(c, "decode", Activation(name, **options)) for name in names for options in ({}, CLAMPED) for c in calls
    )
    return f"{len(names)} activations: {worst:.2f} of the tolerance"


def check_forms(where: Where) -> str:
    """Every form in every dtype: gated or not, biases or not, weights on the output or the input."""
    variants = [(True, True, False), (False, False, False), (True, False, True), (False, True, True)]
    worst = 0.0
    for dtype in where.dtypes:
        for form in FORMS:
            for gated, biases, on_input in variants[:2] if where.quick else variants:
                worst = max(worst, compare(call(where, dtype, gated=gated, biases=biases), form, SILU, on_input))
    return f"{len(where.dtypes)} dtypes × {len(FORMS)} forms: {worst:.2f} of the tolerance"


def check_sizes(where: Where) -> str:
    """Odd and extreme sizes and routings; what names no expert; NaN; no tokens; strided tokens."""
    dtype = where.dtypes[0]
    odd = [(1, 1, 1, 1, 1), (7, 5, 5, 33, 17), (3, 2, 1, 129, 50)]
    large = [(2, 1024, 32, 24, 40), (1000, 8, 2, 100, 72), (33, 4, 4, 512, 256)]
    worst = 0.0
    for form in FORMS:
        for sizes in odd if where.quick else odd + large:
            worst = max(worst, compare(call(where, dtype, *sizes, absent=0), form))
        c = call(where, dtype, tokens=20, absent=0)
        worst = max(worst, compare(c._replace(indices=torch.full_like(c.indices, 2)), form))
        c.indices[0], c.indices[1, 0], c.indices[2, 1] = 99, 2**40, -1
        c.hidden[3] = float("nan")
        output = run(c, form)
        bad = output.isnan().all(1).nonzero().flatten().tolist()
        assert bad == [2, 3], f"{form}: NaN expected in tokens 2 and 3, found in {bad}"
        assert not output[0].any(), f"{form}: experts that do not exist must contribute nothing"
        strided = c._replace(hidden=c.hidden.T.contiguous().T)
        assert torch.equal(run(strided, form)[4:], output[4:]), f"{form}: strided tokens"
        assert run(call(where, dtype, tokens=0), form).shape == (0, 24)
    return f"{worst:.2f} of the tolerance"


def check_routing(where: Where) -> str:
    """The router's one launch against its definition in fp64; as many experts and choices as there are."""
    worst, routed = 0.0, 0
    sizes = ((5, 8, 3), (2, 64, 8)) if where.quick else ((64, 128, 8), (4096, 512, 22), (33, 1000, 32))
    for tokens, experts, k in sizes:
        for rule in ({}, {"score": "sigmoid", "normalize": "sum", "scale": 2.5}, {"order": "topk_first"}):
            router = RouterSpec(torch.empty(0), k, **rule)  # type: ignore[arg-type]
            logits = torch.randn(tokens, experts, device=where.device)
            assert route_triton.serves(logits, router), "the routing kernel does not serve this device"
            found, exact = route_triton.route(logits, router), route(logits.double(), router)
            clear = (found.indices == exact.indices).all(1)  # near ties fall either way in fp32
            assert clear.double().mean() > 0.995, f"{tokens} tokens, {rule}: {(~clear).sum()} chose otherwise"
            worst = max(worst, error(found.weights[clear], exact.weights[clear]))
            routed += tokens
    assert worst < 2e-6, f"weights differ by {worst:.1e}"
    return f"{routed} tokens, largest relative error of the weights {worst:.1e}"


def check_logits(where: Where) -> str:
    """The router's logits from hidden states of every dtype, in fp32, against fp64."""
    worst = 0.0
    for dtype in where.dtypes:
        module, x = block(where, dtype).router, torch.randn(17, 48, device=where.device).to(dtype)
        with torch.no_grad():
            found = module.logits(x)
        assert found.dtype == torch.float32, f"{dtype}: the logits are {found.dtype}"
        assert module.weight is not None
        worst = max(worst, error(found, x.double() @ module.weight.double().T))
    assert worst < 1e-6, f"logits differ by {worst:.1e}"
    return f"{len(where.dtypes)} dtypes, largest relative error {worst:.1e}"


def check_determinism(where: Where) -> str:
    """The same bits again, and from several threads at once."""
    from concurrent.futures import ThreadPoolExecutor

    calls = [call(where, dtype, tokens=5 if where.quick else 300, seed=1) for dtype in where.dtypes]
    for c in calls:
        for form in FORMS:
            first = run(c, form)
            with ThreadPoolExecutor(1 if where.quick else 4) as pool:
                again = list(pool.map(lambda _, c=c, form=form: run(c, form), range(2 if where.quick else 16)))
            assert all(torch.equal(first, other) for other in again), f"{form} {c.hidden.dtype} differs between runs"
    return "bit-identical over repetitions" + ("" if where.quick else " and threads")


def check_gradients(where: Where) -> str:
    """Autograd through the operator, and torch's own check of its registration."""
    c = call(where, torch.float32)
    leaves = [t.requires_grad_() for t in (c.hidden, c.weights, *c.experts)]
    others = [t.detach().double().requires_grad_() for t in leaves]
    output = ops.compute(*c[:3], *c.experts, SILU, False)
    expected = reference(Call(others[0], c.indices, others[1], Experts(*others[2:])))
    grad = torch.randn_like(output)
    ours, theirs = torch.autograd.grad(output, leaves, grad), torch.autograd.grad(expected, others, grad.double())
    worst = max(error(a, b) for a, b in zip(ours, theirs, strict=True))
    assert worst < 1e-5, f"gradients differ by {worst:.1e}"
    arguments = (*c[:3], *c.experts, "silu", 1.0, None, None, None, None, 0.0, False)
    torch.library.opcheck(ops.latent_experts, arguments)
    return f"largest relative error {worst:.1e}; opcheck clean"


def block(where: Where, dtype: torch.dtype, seed: int = 0) -> LatentMoE:
    """A latent block on the device."""
    c = call(where, dtype, width=16, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    d = 48
    matrices = [torch.randn(*shape, generator=generator) / shape[1] ** 0.5 for shape in ((6, d), (16, d), (d, 16))]
    weight, down, up = (matrix.to(where.device, dtype) for matrix in matrices)
    e = c.experts
    experts = ExpertsSpec(e.up, e.down, e.gate, e.gate_bias, e.up_bias, e.down_bias, SILU)
    router = RouterSpec(weight, 3, normalize="sum")
    return LatentMoE(MoESpec(router, experts, LatentSpec(down, up))).requires_grad_(False)


def check_compile(where: Where) -> str:
    """torch.compile without a graph break, in every dtype."""
    worst = 0.0
    for dtype in where.dtypes:
        module = block(where, dtype)
        backend = "aot_eager" if where.quick else "inductor"
        compiled = torch.compile(module, fullgraph=True, backend=backend, dynamic=True)
        for tokens in (5, 2, 1):
            x = torch.randn(tokens, 48, device=where.device, dtype=dtype)
            found = error(compiled(x), module(x).double())
            assert found < TOLERANCE[dtype], f"{dtype}: compiled and eager differ by {found:.1e}"
            worst = max(worst, found / TOLERANCE[dtype])
    return f"{len(where.dtypes)} dtypes, compiled against eager: {worst:.2f} of the tolerance"


def check_cuda_graph(where: Where) -> str:
    """Captured once, replayed on other inputs, without asking the device anything; every form."""
    if where.device == "cpu":
        raise Skipped("CUDA graphs need a CUDA device")
    for dtype in where.dtypes:
        for form in FORMS:
            c, other = call(where, dtype, seed=1), call(where, dtype, seed=2)
            run(c, form)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                output = run(c, form)
            for target, source in ((c.hidden, other.hidden), (c.indices, other.indices), (c.weights, other.weights)):
                target.copy_(source)
            graph.replay()
            assert torch.equal(output, run(c, form)), f"{form} {dtype}: the replayed graph computes something else"
            torch.cuda.set_sync_debug_mode("error")
            try:
                run(c, form)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    return "every form captured and replayed; no synchronisation"


def check_memory(where: Where) -> str:
    """compute-sanitizer over the forms and sizes."""
    if where.device == "cpu":
        raise Skipped("the memory checker needs a CUDA device")
    checker = shutil.which("compute-sanitizer")
    if checker is None:
        raise Skipped("compute-sanitizer is not on PATH")
    environment = {**os.environ, "LATENTIZE_TUNE": "0", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    script = str(Path(__file__).with_name("gpu_check.py"))
    command = [checker, "--error-exitcode", "9", sys.executable, script, "--only", "sizes", "--no-times", "--no-keep"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=150)
    summary = next((line for line in done.stdout.splitlines()[::-1] if "ERROR SUMMARY" in line), "")
    if not summary:
        raise Skipped(f"compute-sanitizer did not run here: {(done.stderr or done.stdout).strip()[-200:]}")
    assert done.returncode == 0, summary
    return summary.strip("= ")


CHECKS: dict[str, Callable[[Where], str]] = {  # in the order of their running
    "activations": check_activations,
    "forms": check_forms,
    "sizes": check_sizes,
    "routing": check_routing,
    "router's logits": check_logits,
    "determinism": check_determinism,
    "gradients": check_gradients,
    "compile": check_compile,
    "CUDA graph": check_cuda_graph,
    "memory checker": check_memory,
}


def run_check(name: str, check: Callable[[Where], str], where: Where) -> dict[str, str]:
    """A check's name, "ok", "failed" or "skipped", and a line on what was found."""
    try:
        return {"check": name, "outcome": "ok", "found": check(where)}
    except Skipped as reason:
        return {"check": name, "outcome": "skipped", "found": str(reason)}
    except Exception as reason:  # the other checks are still worth running
        return {"check": name, "outcome": "failed", "found": f"{type(reason).__name__}: {reason}"}
