"""One token through a stack of latent MoE blocks on CPU, as a model decodes: time of a layer, every implementation.

    python benchmarks/decode.py                       8 layers, fp32, about a minute
    python benchmarks/decode.py --layers 12 --threads 1 --seconds 20

Each layer has weights of its own, more in all than the caches hold, so that they come from memory as in a model, while
the code that runs is as warm as it is there. A block repeated alone (benchmarks/runtime.py) is not like that: between
its calls other forms may leave its weights in the caches, and throw its code out. h = h + block(h) all the way,
onnxruntime in one graph. A round runs a copy of 64 MB and every form, in an order drawn anew, each first untimed and
then timed on another token. All are medians over rounds: `bandwidth` is the bytes of a layer (experts that were hit,
projections, router) over its time, as a fraction of the copy (read + write) of the same round; `of_best_copy` divides
by the fastest copy of all rounds; `speedup` is the form's time over ours. `read alone` sums as many bytes that lie in
one piece: what a layer could reach that computed nothing else.
"""

from __future__ import annotations

import argparse
import logging
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measured import keep, table
from runtime import Sizes, onnxruntime_forms, plain, random_spec, settle, transformers_block, work
from torch import Tensor, nn

from latentize.moe import LatentMoE
from latentize.spec import MoESpec

Form = Callable[[Tensor], Any]
FEWEST = 15


class Stack(nn.Module):
    """Blocks one after the other, each added to what it reads."""

    def __init__(self, blocks: list[Any]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        """[1, d] of x [1, d]."""
        for block in self.blocks:
            x = x + block(x)
        return x


def main() -> None:
    """Measure, print the table, keep the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=40.0)
    chosen = parser.parse_args()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    torch.set_num_threads(chosen.threads)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        rows = measure(Sizes(), chosen.layers, chosen.seconds, Path(folder))
    for row in rows:
        row.update(threads=chosen.threads, layers=chosen.layers)
    keep("decode", rows, ("sizes", "threads", "layers", "form"))
    columns = {"form": "", "ms": ".3f", "bandwidth": ".2f", "of_best_copy": ".2f", "speedup": ".2f", "rounds": ""}
    print(table(rows, columns))


def measure(sizes: Sizes, layers: int, seconds: float, folder: Path) -> list[dict[str, Any]]:
    """One row for each form."""
    spec = random_spec(sizes, torch.float32, latent=True)
    specs = [_shuffled(spec, seed) for seed in range(layers)]
    nbytes, _ = work(spec, 1, spec.top_k)
    forms = _forms(specs, int(nbytes), folder)
    source = torch.randn(1 << 24)
    target = torch.empty_like(source)
    copies: list[float] = []
    spent: dict[str, list[float]] = {name: [] for name in forms}
    order, started = list(forms.items()), time.perf_counter()
    while len(copies) < FEWEST or time.perf_counter() - started < seconds:
        target.copy_(source)
        copies.append(2 * source.nbytes / _seconds(lambda: target.copy_(source)))
        random.Random(len(copies)).shuffle(order)
        x, y = torch.randn(2, 1, sizes.hidden).unbind()
        for name, form in order:
            form(y)
            spent[name].append(_seconds(lambda form=form, x=x: form(x)) / layers)
            settle(name)
    ours = spent["latent ours"]
    return [
        {
            "sizes": str(sizes),
            "dtype": "float32",
            "tokens": 1,
            "form": name,
            "ms": median(times) * 1e3,
            "fastest_ms": min(times) * 1e3,
            "rounds": len(times),
            "bytes": nbytes,
            "bandwidth": median(nbytes / t / copy for t, copy in zip(times, copies, strict=True)),
            "of_best_copy": nbytes / median(times) / max(copies),
            "speedup": median(t / own for t, own in zip(times, ours, strict=True)),
            "copy_gb_s": median(copies) / 1e9,
            "best_copy_gb_s": max(copies) / 1e9,
        }
        for name, times in spent.items()
    ]


def _shuffled(spec: MoESpec, seed: int) -> MoESpec:
    """Weights of another layer: the same numbers in another order."""
    generator = torch.Generator().manual_seed(seed)
    return spec.map_tensors(lambda t: t[torch.randperm(len(t), generator=generator)])


def _forms(specs: list[MoESpec], nbytes: int, folder: Path) -> dict[str, Form]:
    """Every form of the stack, held against ours."""
    ours = Stack([LatentMoE(spec) for spec in specs]).eval()
    forms: dict[str, Form] = {"latent ours": ours, "latent torch": plain(ours)}
    for name in ("eager", "grouped_mm"):
        forms["latent transformers " + name] = Stack([transformers_block(spec, name) for spec in specs])
    forms |= onnxruntime_forms(ours, specs[0].hidden_size, folder)
    x = torch.randn(1, specs[0].hidden_size)
    for name, form in forms.items():
        found = form(x)
        found = torch.as_tensor(found[0] if isinstance(found, list) else found)
        assert (found - ours(x)).norm() < 1e-4 * ours(x).norm(), f"{name} computes something else"
    regions = [torch.randn(nbytes // 4) for _ in specs]
    return forms | {"read alone": lambda _: [region.sum() for region in regions]}


def _seconds(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
