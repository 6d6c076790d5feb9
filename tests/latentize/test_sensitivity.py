"""Sensitivity against Jacobians written out, and models that have no gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from latentize.moe import LatentMoE
from latentize.sensitivity import Sensitivity
from latentize.spec import ExpertsSpec, MoESpec, RouterSpec
from latentize.statistics import collect

D, CLASSES, VOCABULARY = 8, 5, 20


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_block() -> LatentMoE:
    router = RouterSpec(random(4, D, seed=1), 2, normalize="sum")
    return LatentMoE(MoESpec(router, ExpertsSpec(random(4, 6, D, seed=2), random(4, D, 6, seed=3))))


class Classifier(nn.Module):
    """Embedding, one MoE block, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, D, dtype=torch.float64)
        self.block = make_block()
        self.head = nn.Linear(D, CLASSES, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.embedding.weight.copy_(random(VOCABULARY, D, seed=4))
            self.head.weight.copy_(random(CLASSES, D, seed=5))

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.head(self.block(self.embedding(ids)))
        return x


class Regression(nn.Module):
    """One MoE block and a linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.block = make_block()
        self.register_buffer("matrix", random(D, 3, seed=6))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.block(x) @ self.matrix, None


def test_a_classifier_is_measured_by_its_fisher_information() -> None:
    model = Classifier().eval()
    ids = torch.randint(VOCABULARY, (8000,), generator=torch.Generator().manual_seed(7))
    statistics = collect(model, {"block": model.block}, [(ids,)])["block"]
    with torch.no_grad():
        p = model(ids).softmax(-1)
    w = model.head.weight.detach()
    fisher = w.T @ (torch.diag(p.mean(0)) - p.T @ p / len(p)) @ w
    assert statistics.sensitivity is not None
    # A mean over 8000 drawn labels: a few parts in a hundred.
    assert (statistics.sensitivity - fisher).norm() < 0.08 * fisher.norm()
    assert statistics.sample.importance is not None
    assert statistics.sample.importance.mean().item() == pytest.approx(1.0, rel=1e-5)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_any_other_model_is_measured_by_its_jacobian() -> None:
    model = Regression().eval()
    statistics = collect(model, {"block": model.block}, [(random(20000, D, seed=8),)])["block"]
    expected = model.matrix @ model.matrix.T
    assert statistics.sensitivity is not None
    assert (statistics.sensitivity - expected).norm() < 0.05 * expected.norm()


def test_importances_belong_to_their_tokens() -> None:
    model = Regression().eval()
    x = random(300, D, seed=8)
    probe = Sensitivity(model, {"block": model.block}, 10**6, seed=0)
    lengths = torch.cat([probe.add((part,), {})["block"][0] for part in x.split(100)])
    batches = [(part,) for part in x.split(100)]
    sample = collect(model, {"block": model.block}, batches, max_tokens=50)["block"].sample
    position = (sample.hidden[:, None] == x[None]).all(-1).double().argmax(1)
    expected = lengths[position] / lengths[position].mean()
    assert sample.importance is not None
    torch.testing.assert_close(sample.importance.double(), expected, rtol=1e-5, atol=1e-6)


def test_gradients_stop_after_enough_tokens_and_can_be_left_out() -> None:
    model = Regression().eval()
    batches = [(part,) for part in random(300, D, seed=8).split(100)]
    some = collect(model, {"block": model.block}, batches, gradient_tokens=150)["block"]
    assert some.sample.importance is not None
    assert torch.equal(some.sample.importance[200:], torch.ones(100))
    none = collect(model, {"block": model.block}, batches, gradient_tokens=0)["block"]
    assert none.sensitivity is None
    assert none.sample.importance is None
    assert none.warnings == ()


class Detached(Regression):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        with torch.no_grad():
            return super().forward(x)


class Numpy(Regression):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        y, _ = super().forward(x)
        return torch.from_numpy(y.detach().numpy() if not y.requires_grad else y.numpy()), None


@pytest.mark.parametrize(
    "model, reason",
    [(Detached(), "does not depend on any block"), (Numpy(), "RuntimeError: Can't call numpy")],
    ids=["detached", "numpy"],
)
def test_a_model_without_gradients_is_said_and_still_measured(model: Regression, reason: str) -> None:
    statistics = collect(model.eval(), {"block": model.block}, [(random(100, D, seed=8),)])["block"]
    assert statistics.sensitivity is None
    assert statistics.tokens == 100
    assert statistics.warnings[0].startswith("block: no gradients (")
    assert reason in statistics.warnings[0]
