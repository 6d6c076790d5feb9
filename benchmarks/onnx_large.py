"""ONNX files beyond 2 GiB, which the format holds only with its weights in a second file: exported, checked and run.

    python benchmarks/onnx_large.py              every model, about 5 GiB of disk and 6 GiB of memory at a time
    python benchmarks/onnx_large.py blocks       one of them

Each step is a process of its own; its peak memory is the largest resident size that the process ever had. Weights are
random. A model is exported and run in PyTorch, onnx checks the file by its path, and onnxruntime runs it; one thread.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from measured import keep, table
from torch import Tensor, nn

from latentize.activations import Activation
from latentize.moe import LatentMoE
from latentize.spec import ExpertsSpec, LatentSpec, MoESpec, RouterSpec

TOKENS = (1, 16)
WIDTH = 512
COLUMNS = {"model": "", "step": "", "seconds": ".1f", "peak_gib": ".2f", "gib": ".2f", "largest_gib": ".2f",
           "form": "", "error": ".1e"}  # fmt: skip


class Stack(nn.Module):
    """An embedding and blocks with a residual each."""

    def __init__(self, vocabulary: int, *blocks: LatentMoE) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, WIDTH)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        return x


def make_block(n: int, k: int, latent: int, m: int, activation: str = "silu", *, gated: bool = True) -> LatentMoE:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape).mul_(shape[-1] ** -0.5)

    gate = draw(n, m, latent) if gated else None
    experts = ExpertsSpec(draw(n, m, latent), draw(n, latent, m), gate, activation=Activation(activation))
    projections = LatentSpec(draw(latent, WIDTH), draw(WIDTH, latent))
    return LatentMoE(MoESpec(RouterSpec(draw(n, WIDTH), k, normalize="sum"), experts, projections))


#: blocks: many tensors, together beyond 2 GiB; the others: one tensor that alone is.
MODELS: Mapping[str, Callable[[], Stack]] = MappingProxyType(
    {
        "blocks": lambda: Stack(1000, *(make_block(32, 4, 512, 3072) for _ in range(4))),
        "embedding": lambda: Stack(1_100_000, make_block(8, 2, 256, 256)),
        "experts": lambda: Stack(1000, make_block(300, 4, 512, 4096, "gelu", gated=False)),
    }
)


def main() -> None:
    """Run what was asked for in processes of their own, print the table, keep the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", choices=[*MODELS, []])
    parser.add_argument("--step", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.step:
        print(json.dumps(step(options.models[0], options.step[0], Path(options.step[1]))))
        return
    rows = []
    for model in options.models or MODELS:
        with tempfile.TemporaryDirectory() as folder:
            for name in STEPS:
                command = [sys.executable, __file__, model, "--step", name, folder]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                rows.append({"model": model, "step": name, **json.loads(done.stdout.splitlines()[-1])})
                print(table(rows[-1:], COLUMNS).splitlines()[-1], flush=True)
    keep("onnx_large", rows, ("model", "step"))
    print(table(rows, COLUMNS))


def step(model: str, name: str, folder: Path) -> dict[str, Any]:
    begin = time.perf_counter()
    found = STEPS[name](model, folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": time.perf_counter() - begin, "peak_gib": peak, **found}


def export(model: str, folder: Path) -> dict[str, Any]:
    """Writes the file, and what PyTorch computes."""
    from latentize.exporters.onnx import export_onnx

    torch.manual_seed(0)
    module = MODELS[model]().eval()
    made = export_onnx(module, (torch.zeros(1, 4, dtype=torch.long),), {}, folder / "model.onnx")
    assert made.data_path is not None
    inputs = [torch.randint(1000, (1, tokens)) for tokens in TOKENS]
    with torch.no_grad():
        torch.save([(ids, module(ids)) for ids in inputs], folder / "computed.pt")
    sizes = [p.nbytes for p in module.parameters()]
    return {"gib": sum(sizes) / 2**30, "largest_gib": max(sizes) / 2**30, "form": next(iter(made.forms.values()))}


def check(_model: str, folder: Path) -> dict[str, Any]:
    """onnx's own checker, shapes included."""
    import onnx

    onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)
    return {}


def run(_model: str, folder: Path, operator: Path | None = None) -> dict[str, Any]:
    """onnxruntime's outputs against PyTorch's."""
    from latentize.exporters.onnx_check import open_session, relative_error, run_session
    from latentize.inputs import Inputs

    session = open_session(folder / "model.onnx", threads=1, operator=operator)
    pairs = torch.load(folder / "computed.pt", weights_only=True)
    return {"error": max(relative_error(run_session(session, Inputs((ids,)))[0], wanted) for ids, wanted in pairs)}


def run_by_operator(model: str, folder: Path) -> dict[str, Any]:
    """The same with latentize's operator."""
    from latentize.exporters import onnxruntime_ops

    return run(model, folder, onnxruntime_ops.library())


STEPS: Mapping[str, Callable[[str, Path], dict[str, Any]]] = MappingProxyType(
    {"export": export, "check": check, "run": run, "run + latentize": run_by_operator}
)

if __name__ == "__main__":
    main()
