"""A Mixture of Experts in plain PyTorch, in one file: what your own model.py could look like.

    latentize samples/plain_moe.py -o out/       convert it
    python samples/plain_moe.py                  what the original scores
    python samples/plain_moe.py --train          train it again and write plain_moe.safetensors

The task: a system whose next state follows one of 16 nonlinear laws, chosen by where its present state lies. A router
can learn where the laws change and an expert what a law says, so the weights have the structure that random ones lack.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WEIGHTS = Path(__file__).resolve().with_suffix(".safetensors")
STATE, LAWS = 24, 16
HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, LAYERS = 64, 48, 8, 2, 2
TRAIN_STEPS, TRAIN_ROWS = 800, 256
EVALUATION_SEED, CALIBRATION_SEED, TRAIN_SEED = 1, 2, 3


class Expert(nn.Module):
    """A SwiGLU feed-forward network."""

    def __init__(self, intermediate: int) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, intermediate, bias=False)
        self.up = nn.Linear(HIDDEN, intermediate, bias=False)
        self.down = nn.Linear(intermediate, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Output [T, d] of x [T, d]."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class MixtureOfExperts(nn.Module):
    """Top-2 of 8 experts with weights that sum to one, beside an expert that works on every row."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.ModuleList(Expert(INTERMEDIATE) for _ in range(EXPERTS))
        self.shared = Expert(INTERMEDIATE)

    def forward(self, x: Tensor) -> Tensor:
        """Output [T, d] of x [T, d]."""
        weights, chosen = self.router(x).softmax(-1).topk(TOP_K, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        routed = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            row, slot = torch.where(chosen == number)
            routed.index_add_(0, row, expert(x[row]) * weights[row, slot, None])
        return routed + self.shared(x)


class NextState(nn.Module):
    """Residual layers of norm and experts between two linear maps."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(STATE, HIDDEN)
        self.norms = nn.ModuleList(nn.LayerNorm(HIDDEN) for _ in range(LAYERS))
        self.layers = nn.ModuleList(MixtureOfExperts() for _ in range(LAYERS))
        self.head = nn.Linear(HIDDEN, STATE)

    def forward(self, state: Tensor) -> Tensor:
        """Predicted next state [T, 24] of state [T, 24]."""
        x = self.embed(state)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        return self.head(x)


def build_model() -> nn.Module:
    """The trained model; without its weights file it is trained first, which takes seconds."""
    if not WEIGHTS.exists():
        return train()
    model = NextState()
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval()


def example_inputs() -> tuple[Tensor, ...]:
    """Positional arguments of one call: states [256, 24] float32."""
    return (observe(256, CALIBRATION_SEED)[0],)


def calibration_data() -> Iterator[tuple[Tensor, ...]]:
    """200 batches of 512 states."""
    for states in torch.split(observe(200 * 512, CALIBRATION_SEED)[0], 512):
        yield (states,)


@torch.no_grad()
def evaluate(model: nn.Module) -> dict[str, float]:
    """Share of the next state's variance that the model does not explain, over 16,384 new states; lower is better."""
    states, following = observe(16_384, EVALUATION_SEED)
    return {"unexplained variance": (F.mse_loss(model(states), following) / following.var()).item()}


def observe(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """`count` states [count, 24] and the states that follow them [count, 24]."""
    world = torch.Generator().manual_seed(0)
    centres = torch.randn(LAWS, STATE, generator=world)
    laws = torch.randn(LAWS, STATE, STATE, generator=world) / STATE**0.5
    generator = torch.Generator().manual_seed(seed)
    law = torch.randint(LAWS, (count,), generator=generator)
    states = centres[law] + 0.5 * torch.randn(count, STATE, generator=generator)
    following = torch.empty_like(states)
    for number in range(LAWS):
        here = law == number
        following[here] = torch.tanh(2 * states[here] @ laws[number])
    return states, following


def train() -> nn.Module:
    """The model trained from scratch on states drawn as it goes; the same on every run of one machine."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = NextState()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=TRAIN_STEPS)
    states, following = observe(TRAIN_STEPS * TRAIN_ROWS, TRAIN_SEED)
    with torch.enable_grad():
        for x, y in zip(states.split(TRAIN_ROWS), following.split(TRAIN_ROWS), strict=True):
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def main() -> None:
    """Print the original model's score, after training it where asked to."""
    if "--train" in sys.argv[1:]:
        save_file(train().state_dict(), WEIGHTS)
    for name, value in evaluate(build_model()).items():
        print(f"{name} {value:.4f}")


if __name__ == "__main__":
    main()
