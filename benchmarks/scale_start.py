"""Time and memory of the start of one layer of a released model's size, and what larger ones would take.

    python benchmarks/scale_start.py                     N 128, m 768, d 2048 (Qwen3-30B-A3B) to l 1024, bf16 (minutes)
    python benchmarks/scale_start.py --experts 16        an eighth of the experts

Three things are measured on random weights: the start from weights and a given covariance, whole; the output side
fitted on tokens, expert by expert, for a few experts of the same size; and the pieces of a layer of Kimi-K2's size
(N 384, m 2048, d 7168), from which the whole is extrapolated. Peak memory is the process's, the weights included.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measured import keep, table
from torch import Tensor

from latentize.initialise import initialise
from latentize.output_fit import Features, explained, fit
from latentize.plan import plan_block
from latentize.projections import gram, leading, square_root
from latentize.recipe import Recipe
from latentize.spec import ExpertsSpec, MoESpec, RouterSpec
from latentize.statistics import BlockStatistics, Sample

TOKENS, TOP_K = 32768, 8
KEY = ("what", "experts", "neurons", "hidden_size", "latent_dim")
COLUMNS = {
    "what": "", "experts": "d", "neurons": ",d", "hidden_size": ",d", "latent_dim": ",d", "cpu_seconds": ".1f",
    "wall_seconds": ".1f", "peak_gib": ".2f", "note": "",
}  # fmt: skip


def main() -> None:
    """Measure, print the table, keep the rows."""
    options = _options()
    torch.set_num_threads(options.threads)
    n, m, d, rank = options.experts, 768, 2048, 1024
    rows = [_whole(n, m, d, rank)]
    if not options.start_only:
        rows.append(_output_side(n, m, d, rank))
        rows.append(_kimi())
    for row in rows:
        row["threads"] = options.threads
    keep("scale_start", rows, KEY)
    print(table(rows, COLUMNS))


def _whole(n: int, m: int, d: int, rank: int) -> dict[str, Any]:
    """The start of one layer from weights and a covariance."""
    spec, statistics = _layer(n, m, d), _moments(n, d)
    plan = plan_block("layer", spec, Recipe(latent_dim=rank, variant="fixed"))
    kept: list[MoESpec] = []
    cost = _measure(lambda: kept.append(initialise(spec, plan, statistics)))
    start = kept[0]
    assert start.latent is not None
    assert start.experts.up.shape == (n, m, rank)
    assert all(tensor.isfinite().all() for tensor in start.tensors().values())
    return _row("start from weights and covariance", n, m, d, rank, cost)


def _output_side(n: int, m: int, d: int, rank: int, sample: int = 4) -> dict[str, Any]:
    """The output side of `sample` experts at the tokens that each would get, scaled to all of them."""
    each = TOKENS * TOP_K // n
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randperm(TOKENS, generator=generator)[:each] for _ in range(sample)]
    phi = Features(tokens, [torch.randn(each, m, generator=generator) for _ in tokens], TOKENS, m)
    target, start = torch.randn(TOKENS, d, generator=generator), torch.zeros(sample, m, d)
    from latentize import output_fit

    output_fit.DENSE_FEATURES = 0
    cost = _measure(lambda: (explained(phi, target, start, 1.0), fit(phi, target[:, :rank], start[..., :rank], 1.0)))
    scaled = {name: cost[name] * n / sample for name in ("cpu_seconds", "wall_seconds")}
    held = 4 * (n * m * rank + 4 * TOKENS * d) / 2**30
    note = f"from {sample} experts; its coefficients, targets and residuals take {held:.1f} GiB beside the weights"
    return {**_row("output side on 32,768 tokens", n, m, d, rank, {**scaled, "peak_gib": None}), "note": note}


def _kimi(sample: int = 1, smaller: int = 1792) -> dict[str, Any]:
    """The start of a layer of Kimi-K2's size from the cost of one expert and of decompositions a quarter as wide."""
    n, m, d, rank = 384, 2048, 7168, 3584
    spec = _layer(sample, m, d)
    loads = torch.ones(sample)
    guess, up = torch.randn(d, rank), torch.randn(d, rank)

    def narrowed() -> None:
        for e in range(sample):
            for weights in (spec.experts.gate, spec.experts.up):
                assert weights is not None
                (weights[e].float() @ guess).bfloat16()
            (up.T @ spec.experts.down[e].float()).bfloat16()

    grams = _measure(lambda: gram(spec.experts, loads, loads))
    narrow = _measure(narrowed)
    small = _moment(smaller)
    # square root of C, leading directions of C^½ G C^½, leading directions of the output, and solves that cost as much
    solves = _measure(lambda: (square_root(small), leading(small, smaller // 2), leading(small, smaller // 2)))
    cost: dict[str, Any] = {}
    for name in ("cpu_seconds", "wall_seconds"):
        cost[name] = n / sample * (grams[name] + narrow[name]) + (d / smaller) ** 3 * solves[name]
    held = 2 * n * 3 * m * (d + rank) / 2**30 + 6 * 8 * d * d / 2**30
    cost["peak_gib"] = held
    note = "extrapolated; memory is the weights of both in bf16 and six d x d matrices in fp64"
    return {**_row("start from weights and covariance", n, m, d, rank, cost), "note": note}


def _layer(n: int, m: int, d: int) -> MoESpec:
    """Random experts in bf16, made one at a time."""
    generator = torch.Generator().manual_seed(0)

    def weights(a: int, b: int) -> Tensor:
        full = torch.empty(n, a, b, dtype=torch.bfloat16)
        for e in range(n):
            full[e] = torch.randn(a, b, generator=generator) / b**0.5
        return full

    router = RouterSpec(torch.randn(n, d, generator=generator).bfloat16(), min(TOP_K, n), normalize="sum")
    return MoESpec(router, ExpertsSpec(weights(m, d), weights(d, m), weights(m, d)))


def _moment(d: int) -> Tensor:
    """A covariance with a falling spectrum, [d, d] in fp64."""
    mix = torch.randn(d, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / d**0.5
    scaled = mix * torch.logspace(0, -2, d, dtype=torch.float64)
    return scaled @ scaled.T


def _moments(n: int, d: int) -> BlockStatistics:
    moment = _moment(d)
    empty = Sample(torch.zeros(0, d), None, torch.zeros(0, TOP_K), torch.zeros(0, TOP_K, dtype=torch.long))
    counts = torch.full((n,), TOKENS * TOP_K // n)
    return BlockStatistics(TOKENS, 1, 0, moment, moment, counts, counts.double() / TOP_K, empty)


def _measure(run: Callable[[], object]) -> dict[str, Any]:
    """CPU and wall seconds, and the process's peak memory in GiB meanwhile (Linux)."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    cpu, wall = time.process_time(), time.perf_counter()
    run()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return {"cpu_seconds": cpu, "wall_seconds": wall, "peak_gib": peak / 2**20}


def _row(what: str, n: int, m: int, d: int, rank: int, cost: dict[str, Any]) -> dict[str, Any]:
    return {"what": what, "experts": n, "neurons": m, "hidden_size": d, "latent_dim": rank, **cost, "note": ""}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--start-only", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
