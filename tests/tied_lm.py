"""A small language model whose parts hang together: tied embeddings, one matrix in two modules, views of one buffer."""

import torch
from small_moe import Moe
from torch import nn

VOCABULARY, WIDTH = 24, 16


class TiedLm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight  # the same parameter
        self.before, self.after = (nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.after.weight.data = self.before.weight.data  # other parameters of the same memory
        flat = torch.randn(2 * WIDTH, WIDTH) * 0.2
        self.first, self.second = (nn.Parameter(half) for half in flat.split(WIDTH))  # halves of one memory
        self.frozen = nn.Parameter(torch.randn(WIDTH), requires_grad=False)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.moes = nn.ModuleList(Moe() for _ in range(2))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.before(self.embed(ids)) * (1 + 0.1 * self.frozen)
        for moe in self.moes:
            x = x + moe(self.norm(x.movedim(1, -1)).movedim(-1, 1) @ self.first)
        return self.head(self.after(x @ self.second))


def model() -> TiedLm:
    made = TiedLm()
    made.norm.running_mean += 0.1
    return made.eval()


def batches(count: int = 10, length: int = 12, tokens: int = VOCABULARY) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [{"ids": torch.randint(tokens, (4, length), generator=generator)} for _ in range(count)]
