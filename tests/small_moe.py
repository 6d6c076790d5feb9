"""A small MoE model in plain PyTorch: text for the model.py of a test, and classes to build on."""

import torch
import torch.nn.functional as F
from torch import nn


class Moe(nn.Module):
    """Two of four experts, relu, a loop over all of them."""

    def __init__(self):
        super().__init__()
        self.r = nn.Linear(16, 4, bias=False)
        self.a = nn.Parameter(torch.randn(4, 12, 16) * 0.2)
        self.c = nn.Parameter(torch.randn(4, 16, 12) * 0.2)

    def expert(self, e, x):
        return F.relu(x @ self.a[e].to(x.dtype).T) @ self.c[e].to(x.dtype).T

    def forward(self, hidden):
        x = hidden.reshape(-1, 16)
        w, i = self.r(x).softmax(-1).topk(2, -1)
        out = torch.zeros_like(x)
        for e in range(4):
            row, slot = torch.where(i == e)
            out.index_add_(0, row, self.expert(e, x[row]) * w[row, slot, None])
        return out.view(hidden.shape)


class Net(nn.Module):
    """A linear layer and the MoE, with a residual around both."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(16, 16)
        self.moe = Moe()

    def forward(self, x):
        return x + self.moe(self.inner(x))


def build_model():
    torch.manual_seed(0)
    return Net().eval()
