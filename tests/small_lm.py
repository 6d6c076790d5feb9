"""A small language model with two latent blocks, exported once."""

import torch
from torch import nn

from latentize.moe import LatentMoE
from latentize.spec import ExpertsSpec, LatentSpec, MoESpec, RouterSpec

D, L, M, N, K, VOCAB = 16, 8, 12, 6, 2, 32


def block(seed: int, *, d: int = D) -> LatentMoE:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    experts = ExpertsSpec(draw(N, M, L), draw(N, L, M), draw(N, M, L))
    return LatentMoE(MoESpec(RouterSpec(draw(N, d), K, normalize="sum"), experts, LatentSpec(draw(L, d), draw(d, L))))


class Lm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, D)
        self.blocks = nn.ModuleList(block(i) for i in range(2))
        self.head = nn.Linear(D, VOCAB)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for each in self.blocks:
            x = x + each(x)
        return self.head(x)


def write_onnx(folder, model=None):
    from latentize.exporters.onnx import export_onnx

    return export_onnx(model or Lm(), (torch.zeros(2, 5, dtype=torch.long),), {}, folder / "model.onnx").path
