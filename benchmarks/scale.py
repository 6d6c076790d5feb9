"""How the analysis scales: CPU seconds and memory of `inspect` on many experts, many layers, and on the meta device.

    python benchmarks/scale.py [NAME ...]

Each case runs in a process of its own on one thread. Kept in benchmarks/results/scale.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measured import keep, table
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent


class Loop(nn.Module):
    """A loop over the experts that got tokens, each a module of three matrices."""

    def __init__(self, experts: int, width: int, inner: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(Expert(width, inner) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weights, index = self.gate(flat).softmax(-1).topk(8, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(index == e)
            if len(token):
                out.index_add_(0, token, expert(flat[token]) * weights[token, slot, None])
        return out.view_as(x)


class Expert(nn.Module):
    """A SwiGLU feed-forward."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.w2 = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Stack(nn.Module):
    """Experts in stacks, the chosen ones looked up."""

    def __init__(self, experts: int, width: int, inner: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, 2 * inner, width) * width**-0.5)
        self.down = nn.Parameter(torch.randn(experts, width, inner) * inner**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weights, index = self.gate(flat).softmax(-1).topk(8, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        gate, up = torch.einsum("td,tkmd->tkm", flat, self.up[index]).chunk(2, -1)
        return torch.einsum("tkm,tkdm,tk->td", F.silu(gate) * up, self.down[index], weights).view_as(x)


def _transformer(layers: int, experts: int) -> nn.Module:
    """A Qwen3-MoE of tiny widths, its experts by grouped products."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, intermediate_size=48, moe_intermediate_size=24, num_experts=experts, num_experts_per_tok=8,
        norm_topk_prob=True,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def _ids() -> dict[str, Any]:
    return {"input_ids": torch.randint(0, 97, (2, 12)), "use_cache": False}


@dataclass(frozen=True)
class Case:
    """A model, a call of it, the blocks it has, and the CPU seconds that its inspection may take."""

    make: Callable[[], nn.Module]
    args: Callable[[], tuple[Any, ...]]
    kwargs: Callable[[], dict[str, Any]]
    blocks: int
    allowed: float


def _hidden(width: int) -> Callable[[], tuple[Any, ...]]:
    return lambda: (torch.randn(2, 32, width),)


CASES: dict[str, Case] = {
    "loop over 128 experts": Case(lambda: Loop(128, 64, 32), _hidden(64), dict, 1, 60),
    "512 stacked experts": Case(lambda: Stack(512, 64, 32), _hidden(64), dict, 1, 10),
    "48 layers of 128 experts": Case(lambda: _transformer(48, 128), tuple, _ids, 48, 60),
    "48 layers of 128 experts on meta": Case(lambda: _transformer(48, 128).to("meta"), tuple, _ids, 48, 60),
}


def measure(name: str) -> dict[str, Any]:
    """Inspect one case in this process."""
    import latentize

    case = CASES[name]
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = case.make().eval()
    args, kwargs = case.args(), case.kwargs()
    before, start = _peak(), time.process_time()
    blocks = latentize.inspect(model, args=args, kwargs=kwargs)
    seconds = time.process_time() - start
    lifted = sum(block.status == "moe" for block in blocks)
    return {
        "case": name, "blocks": lifted, "of": case.blocks, "CPU seconds": seconds, "allowed": case.allowed,
        "MiB beyond the model": (_peak() - before) / 2**20,
    }  # fmt: skip


def _peak() -> float:
    """Largest resident size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def run(name: str) -> dict[str, Any]:
    """Inspect one case in a process of its own."""
    command = [sys.executable, __file__, "--here", name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def main() -> int:
    """Print the table and keep it; exit code 1 when a case is not lifted whole or takes longer than it may."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--here", metavar="NAME", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(json.dumps(measure(options.here)))
        return 0
    rows = []
    for name in options.names or CASES:
        rows.append(run(name))
        print(json.dumps(rows[-1]), flush=True)
    keep("scale", rows, ["case"])
    columns = {
        "case": "", "blocks": "d", "of": "d", "CPU seconds": ".1f", "allowed": ".0f", "MiB beyond the model": ".0f"
    }  # fmt: skip
    print(table(rows, columns))
    return int(any(row["blocks"] < row["of"] or row["CPU seconds"] > row["allowed"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
