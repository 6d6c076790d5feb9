"""Latency of one MoE block on CPU: the original and its latent form, each by every implementation, side by side.

    python benchmarks/runtime.py                      fp32 and bf16, T = 1 … 1024, under three minutes
    python benchmarks/runtime.py --tokens 4096 --dtypes float32 --threads 2

All forms of a row are run in turn, in one process and on the same tokens, with new tokens every round and in an order
drawn anew; times are medians. Threads of onnxruntime spin for some 50 ms after a call, on the cores that the next form
needs: after each of its calls there is a pause, and then a call of PyTorch that wakes its own threads. `original` works
at width d, `latent` at ℓ with projections around it; `transformers` is its experts class (eager, batched_mm,
grouped_mm), `ours` the operator as it chooses, `torch` its plain torch kernels, `onnxruntime` an exported file.
`bandwidth` is the bytes of the experts that were hit, and of projections and router, over the time, as a fraction of
the copy bandwidth (read + write) measured in the same process; `gemm` the FLOPs as a fraction of the measured GEMM
rate. Reading alone can be faster than copying, and caches faster than both: a fraction may exceed 1. At one token
benchmarks/decode.py says what a block takes among others, as in a model.
"""

from __future__ import annotations

import argparse
import copy
import logging
import random
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measured import RESULTS, keep, table
from torch import Tensor, nn

from latentize import ops
from latentize.activations import Activation
from latentize.kernels_torch import Dispatch
from latentize.moe import LatentMoE
from latentize.reference import moe_forward
from latentize.spec import ExpertsSpec, LatentSpec, MoESpec, RouterSpec

Form = Callable[[Tensor], Any]
TRANSFORMERS = ("eager", "batched_mm", "grouped_mm")
#: Seconds for one row's rounds, and the fewest and most rounds.
SECONDS, FEWEST, MOST = 6.0, 5, 200
#: Seconds after which onnxruntime's threads sleep.
SETTLE = 0.1
#: Where a form copies each pair's weights: not run beyond so many tokens.
BATCHED_LIMIT = 64


@dataclass(frozen=True)
class Sizes:
    """One block: width d, latent width l, intermediate size m, N experts of which k are active."""

    hidden: int = 512
    latent: int = 128
    intermediate: int = 512
    experts: int = 64
    top_k: int = 8

    def __str__(self) -> str:
        return f"d{self.hidden}_l{self.latent}_m{self.intermediate}_N{self.experts}_k{self.top_k}"


def main() -> None:
    """Measure, print the table and the guidance, keep the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64, 256, 1024])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: time of one thread")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for one row's rounds")
    chosen = parser.parse_args()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    torch.set_num_threads(1 if chosen.clock == "cpu" else chosen.threads)
    clock = time.thread_time if chosen.clock == "cpu" else time.perf_counter
    rows = []
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        for name in chosen.dtypes:
            rows += measure(Sizes(), getattr(torch, name), chosen.tokens, clock, chosen.seconds, Path(folder))
    for row in rows:
        row.update(threads=torch.get_num_threads(), clock=chosen.clock)
    merged = keep("runtime", rows, ("sizes", "dtype", "threads", "clock", "tokens", "form"))
    print(table(rows, {"dtype": "", "tokens": "", "form": "", "ms": ".3f", "bandwidth": ".2f", "gemm": ".2f"}))
    print("\n".join(guidance(rows)))
    roofline(merged, RESULTS / "runtime.png")


def measure(
    sizes: Sizes, dtype: torch.dtype, tokens: list[int], clock: Callable[[], float], seconds: float, folder: Path
) -> list[dict[str, Any]]:
    """One row for each form and number of tokens, and for each part of the latent block."""
    original = random_spec(replace(sizes, latent=sizes.hidden), dtype, latent=False)
    latent = random_spec(sizes, dtype, latent=True)
    forms = {"original transformers " + name: transformers_block(original, name) for name in TRANSFORMERS} | {
        "original ours": LatentMoE(original)
    }
    forms |= {"latent transformers " + name: transformers_block(latent, name) for name in TRANSFORMERS}
    forms |= {"latent reference": lambda x: moe_forward(latent, x), "latent torch": plain(LatentMoE(latent))}
    forms |= {"latent ours": LatentMoE(latent), **parts(latent)}
    if dtype == torch.float32:
        forms |= onnxruntime_forms(LatentMoE(latent), latent.hidden_size, folder)
    copied, gemm = peaks(dtype, clock)
    rows = []
    for count in tokens:
        usable = {n: f for n, f in forms.items() if count <= BATCHED_LIMIT or "batched" not in n}
        samples = [torch.randn(count, sizes.hidden).to(dtype) for _ in range(8)]
        hit = [int(LatentMoE(latent).router(x).indices.unique().numel()) for x in samples]
        for name, spent in interleaved(usable, samples, clock, seconds).items():
            spec = original if name.startswith("original") else latent
            nbytes, flops = work(spec, count, sum(hit) / len(hit))
            whole = not name.startswith("part")
            rows.append(
                {
                    "sizes": str(sizes),
                    "dtype": str(dtype).removeprefix("torch."),
                    "tokens": count,
                    "form": name,
                    "ms": median(spent) * 1e3,
                    "fastest_ms": min(spent) * 1e3,
                    "rounds": len(spent),
                    "bytes": nbytes if whole else None,
                    "flops": flops if whole else None,
                    "bandwidth": nbytes / median(spent) / copied if whole else None,
                    "gemm": flops / median(spent) / gemm if whole else None,
                    "copy_gb_s": copied / 1e9,
                    "gemm_gflop_s": gemm / 1e9,
                }
            )
    return rows


def random_spec(sizes: Sizes, dtype: torch.dtype, *, latent: bool) -> MoESpec:
    """A SwiGLU block, softmax → top-k ÷ sum, with random weights: latency does not depend on them."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * shape[-1] ** -0.5).to(dtype)

    n, m, width, d = sizes.experts, sizes.intermediate, sizes.latent, sizes.hidden
    return MoESpec(
        RouterSpec(normal(n, d), sizes.top_k, normalize="sum"),
        ExpertsSpec(normal(n, m, width), normal(n, width, m), normal(n, m, width), activation=Activation("silu")),
        LatentSpec(normal(width, d), normal(d, width)) if latent else None,
    )


class TransformersBlock(nn.Module):
    """transformers' Qwen3-MoE router at width d and experts at the spec's width, with the projections around them."""

    def __init__(self, spec: MoESpec, implementation: str) -> None:
        super().__init__()
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3

        config = Qwen3MoeConfig(
            hidden_size=spec.hidden_size,
            moe_intermediate_size=spec.intermediate_size,
            num_experts=spec.num_experts,
            num_experts_per_tok=spec.top_k,
            norm_topk_prob=True,
        )
        narrow = copy.copy(config)
        narrow.hidden_size = spec.latent_dim
        narrow._experts_implementation = implementation
        e = spec.experts
        self.router = qwen3.Qwen3MoeTopKRouter(config)
        self.router.weight = nn.Parameter(spec.router.weight)
        self.experts = qwen3.Qwen3MoeExperts(narrow)
        self.experts.gate_up_proj = nn.Parameter(torch.cat([e.gate, e.up], 1))
        self.experts.down_proj = nn.Parameter(e.down)
        self.latent = spec.latent

    def forward(self, x: Tensor) -> Tensor:
        """Routed output [T, d] of x [T, d]."""
        _, weights, indices = self.router(x)
        if self.latent is None:
            return self.experts(x, indices, weights)
        return self.experts(x @ self.latent.down.T, indices, weights) @ self.latent.up.T


def transformers_block(spec: MoESpec, implementation: str) -> Form:
    """transformers' block, checked against ours.

    In 16 bits, where its logits are rounded, some tokens choose other experts.
    """
    block = TransformersBlock(spec, implementation)
    x = torch.randn(64, spec.hidden_size).to(spec.experts.up.dtype)
    theirs, ours = block(x).double(), LatentMoE(spec)(x).double()
    tolerance, others = (1e-4, 0.0) if x.dtype == torch.float32 else (3e-2, 0.125)
    off = (theirs - ours).norm(dim=1) > tolerance * ours.norm(dim=1)
    assert off.double().mean() <= others, f"{implementation} computes something else for {int(off.sum())} of 64 tokens"
    return block


def plain(module: nn.Module) -> Form:
    """A module of ours with the plain torch kernels in place of the compiled ones."""

    def run(x: Tensor) -> Any:
        with ops.plain():
            return module(x)

    return run


def parts(spec: MoESpec) -> dict[str, Form]:
    """The steps of the latent block, each on its own: the experts' part includes dispatch and combine."""
    block = LatentMoE(spec)
    kept: dict[int, tuple[Any, Tensor]] = {}

    def inputs(x: Tensor) -> tuple[Any, Tensor]:
        if id(x) not in kept:
            kept[id(x)] = (block.router(x), x @ spec.latent.down.T)
        return kept[id(x)]

    def experts(x: Tensor) -> Tensor:
        routing, latent = inputs(x)
        return block.experts.combine(latent, routing.indices, routing.weights)

    def projections(x: Tensor) -> Tensor:
        return (x @ spec.latent.down.T) @ spec.latent.up.T

    return {
        "part router": block.router,
        "part projections": projections,
        "part experts": experts,
        "part dispatch, plain torch": lambda x: Dispatch.of(inputs(x)[0].indices, spec.num_experts),
    }


def onnxruntime_forms(module: nn.Module, hidden_size: int, folder: Path) -> dict[str, Form]:
    """A latent block, or several, exported with the two fastest bodies; none where onnxruntime is not installed."""
    try:
        from latentize.exporters.onnx import export_onnx
        from latentize.exporters.onnx_check import open_session
    except ImportError:
        return {}
    forms: dict[str, Form] = {}
    for body in ("moe", "unrolled"):
        path = folder / f"{body}.onnx"
        export_onnx(module, (torch.randn(16, hidden_size),), {}, path, form=body)
        session = open_session(path, torch.get_num_threads())
        name = session.get_inputs()[0].name
        forms["latent onnxruntime " + body] = lambda x, s=session, n=name: s.run(None, {n: x.numpy()})
    return forms


def interleaved(
    forms: Mapping[str, Form], samples: list[Tensor], clock: Callable[[], float], seconds: float
) -> dict[str, list[float]]:
    """Seconds of each form in each round; a round runs every form once, on the same tokens."""
    for form in forms.values():
        form(samples[0])
        form(samples[1])
    spent: dict[str, list[float]] = {name: [] for name in forms}
    started, order = time.perf_counter(), list(forms.items())
    for i in range(MOST):
        if i >= FEWEST and time.perf_counter() - started > seconds:
            break
        x = samples[i % len(samples)]
        random.Random(i).shuffle(order)
        for name, form in order:
            begin = clock()
            form(x)
            spent[name].append(clock() - begin)
            settle(name)
    return spent


def settle(name: str) -> None:
    """Let the threads of onnxruntime stop spinning after one of its forms, and wake PyTorch's."""
    if "onnxruntime" in name:
        time.sleep(SETTLE)
        torch.zeros(1 << 20).add_(1)


def peaks(dtype: torch.dtype, clock: Callable[[], float]) -> tuple[float, float]:
    """Copy bandwidth (read + write bytes/s) and GEMM rate (FLOP/s) of this process: the best of several runs."""
    source = torch.randn(1 << 24)
    target = torch.empty_like(source)
    a, b = torch.randn(1024, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)

    def best(run: Callable[[], Any]) -> float:
        times = []
        for _ in range(15):
            begin = clock()
            run()
            times.append(clock() - begin)
        return min(times)

    return 2 * source.nbytes / best(lambda: target.copy_(source)), 2 * 1024**3 / best(lambda: a @ b)


def work(spec: MoESpec, tokens: int, hit: float) -> tuple[float, float]:
    """Bytes that must be read (weights of experts that were hit, projections, router) and FLOPs, of one call."""
    e = spec.experts
    per_expert = 3 * spec.intermediate_size * spec.latent_dim
    shared = spec.num_experts * spec.hidden_size
    if spec.latent is not None:
        shared += 2 * spec.hidden_size * spec.latent_dim
    flops = 2 * tokens * (spec.top_k * per_expert + shared)
    return (hit * per_expert + shared) * e.up.element_size(), flops


def guidance(rows: list[dict[str, Any]]) -> list[str]:
    """Ratios against the baselines, and from which T on which form wins."""
    lines = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        for tokens in dict.fromkeys(row["tokens"] for row in rows):
            ms = {row["form"]: row["ms"] for row in rows if (row["dtype"], row["tokens"]) == (dtype, tokens)}
            ours = ms["latent ours"]
            best = {
                kind: min((value, name) for name, value in ms.items() if name.startswith(kind))
                for kind in ("latent transformers", "original transformers", "latent onnxruntime")
                if any(name.startswith(kind) for name in ms)
            }
            against = ", ".join(f"{value / ours:.2f} × {name}" for value, name in best.values())
            around = (ms["part router"] + ms["part projections"]) / ours
            fastest = min((v, n) for n, v in ms.items() if not n.startswith("part"))[1]
            lines.append(
                f"{dtype} T = {tokens}: latent ours is {against}; router and projections take {around:.0%} of it; "
                f"fastest: {fastest}"
            )
    return lines


def roofline(rows: list[dict[str, Any]], path: Path) -> None:
    """FLOP/s against FLOP per byte for our latent and original blocks, under the measured roofs."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    rows = [row for row in rows if row["dtype"] == "float32" and row["form"] in ("latent ours", "original ours")]
    if not rows:
        return
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log", xlabel="FLOP / byte", ylabel="GFLOP/s")
    for form, marker in (("latent ours", "o"), ("original ours", "s")):
        points = sorted((r["flops"] / r["bytes"], r["flops"] / r["ms"] / 1e6) for r in rows if r["form"] == form)
        axes.plot(*zip(*points, strict=True), marker=marker, linestyle="", label=form)
    copied, gemm = max(r["copy_gb_s"] for r in rows), max(r["gemm_gflop_s"] for r in rows)
    roof = sorted({0.25, gemm / copied, max(r["flops"] / r["bytes"] for r in rows) * 1.5})
    axes.plot(roof, [min(gemm, copied * x) for x in roof], color="grey", label="measured roofs")
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
