"""What a block is given beside its hidden states: it is proved to matter or not, and values that were not tried are
refused."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from codings_base import swiglu_loop
from torch import Tensor, nn

import latentize
from latentize.errors import LatentizeError
from latentize.passes import site_to_json
from latentize.passes.blocks import LatentBlock
from latentize.passes.sites import from_json

D, N, M, K = 16, 4, 24, 2
EXACT = latentize.Recipe(latent_dim=D, variant="acc", experts_factor=2, topk_factor=2, heal_steps=0)


def hidden(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed))


def mask(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(3)) > 0.4


class Moe(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, N, bias=False)
        self.gate, self.up = (nn.Parameter(torch.randn(N, M, D) * D**-0.5) for _ in range(2))
        self.down = nn.Parameter(torch.randn(N, D, M) * M**-0.5)
        self.table = nn.Parameter(torch.randn(9, N) * 2)
        self.beside = nn.Parameter(torch.randn(D, D) * 0.1)

    def routed(self, x: Tensor, logits: Tensor, factor: Tensor | None = None) -> Tensor:
        weights, chosen = logits.softmax(-1).topk(K, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        weights = weights if factor is None else weights * factor
        return swiglu_loop(x, weights, chosen, self.gate, self.up, self.down)

    def forward(self, x: Tensor, given: Any = None) -> Tensor:
        flat = x.reshape(-1, D)
        return self.of(flat, self.router(flat), given).view(x.shape)

    def of(self, x: Tensor, logits: Tensor, given: Any) -> Tensor:
        raise NotImplementedError


class OnOutput(Moe):
    def of(self, x: Tensor, logits: Tensor, given: Any) -> Tensor:
        out = self.routed(x, logits)
        return out if given is None else out * given.reshape(-1, 1).to(out.dtype)


class OnWeights(Moe):
    def of(self, x: Tensor, logits: Tensor, given: Any) -> Tensor:
        return self.routed(x, logits, None if given is None else given.reshape(-1, 1))


class OnlySome(Moe):
    def of(self, x: Tensor, logits: Tensor, given: Any) -> Tensor:
        if bool(given.all()):
            return self.routed(x, logits)
        some = given.reshape(-1).bool()
        return torch.zeros_like(x).index_copy(0, some.nonzero().flatten(), self.routed(x[some], logits[some]))


class Temperature(Moe):
    def of(self, x: Tensor, logits: Tensor, given: Any) -> Tensor:
        return self.routed(x, logits / given)


class ByTask(Moe):
    def of(self, x: Tensor, logits: Tensor, given: Any) -> Tensor:
        return self.routed(x, logits + self.table[given])


class ByToken(Moe):
    def of(self, x: Tensor, logits: Tensor, given: Any) -> Tensor:
        return self.routed(x, logits + self.table[given.reshape(-1)])


class Beside(Moe):
    """Has a path of its own, so that its module becomes a graph."""

    def of(self, x: Tensor, logits: Tensor, given: Any) -> Tensor:
        out = self.routed(x, logits)
        if isinstance(given, float):
            out = out * given
        elif given is not None:
            out = out * given.reshape(-1, 1).to(out.dtype)
        return out + x @ self.beside


class Unused(Moe):
    def forward(self, x: Tensor, given: Any = None, flag: bool = False) -> Tensor:
        flat = x.reshape(-1, D)
        return self.routed(flat, self.router(flat)).view(x.shape)


class Net(nn.Module):
    def __init__(self, moe: type[Moe]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.moe, self.head = nn.LayerNorm(D), moe(), nn.Linear(D, D)

    def forward(self, x: Tensor, given: Any = None) -> Tensor:
        return self.head(x + self.moe(self.norm(x), given))


def ones(dtype: torch.dtype) -> Callable[[], Tensor]:
    return lambda: torch.ones(2, 6, dtype=dtype)


CASES = [
    (OnOutput, ones(torch.bool), lambda: mask(3, 7)),
    (OnOutput, lambda: None, lambda: mask(3, 7)),
    (OnWeights, ones(torch.int64), lambda: mask(3, 7).long()),
    (OnWeights, lambda: None, lambda: mask(3, 7)),
    (OnlySome, ones(torch.bool), lambda: mask(3, 7)),
    (OnlySome, ones(torch.float32), lambda: mask(3, 7).float()),
    (Beside, lambda: None, lambda: mask(3, 7)),
    (Beside, lambda: None, lambda: 2.0),
    (Temperature, lambda: torch.tensor(1.0), lambda: torch.tensor(3.0)),
    (Temperature, lambda: 1.0, lambda: 3.0),
    (ByTask, lambda: 0, lambda: 2),
    (ByTask, lambda: torch.tensor(0), lambda: torch.tensor(2)),
    (ByToken, lambda: torch.zeros(2, 6, dtype=torch.int64), lambda: torch.full((3, 7), 5)),
    (ByToken, lambda: torch.full((2, 6), 4), lambda: torch.full((3, 7), 5)),
]  # fmt: skip


@pytest.mark.parametrize(("case", "seen", "later"), CASES)
def test_no_argument_is_dropped(case: type[Moe], seen: Callable[[], Any], later: Callable[[], Any]) -> None:
    """Exact at values that the example inputs do not show, refused, or an error where such a value is given."""
    model = Net(case).eval()
    (block,) = latentize.inspect(model, args=(hidden(2, 6), seen()))
    if block.status == "refused":
        return
    converted = latentize.convert(model, args=(hidden(2, 6), seen()), recipe=EXACT).model
    x = hidden(3, 7, seed=1)
    with torch.no_grad():
        wanted = model(x, later())
        try:
            found = converted(x, later())
        except LatentizeError as error:
            assert "was converted for given = " in str(error)  # noqa: PT017
            return
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5


def test_what_a_block_does_not_look_at_may_be_anything() -> None:
    model = Net(Unused).eval()
    converted = latentize.convert(model, args=(hidden(2, 6), None), recipe=EXACT).model
    with torch.no_grad():
        for given in (None, 3, mask(3, 7)):
            x = hidden(3, 7, seed=1)
            torch.testing.assert_close(converted(x, given), model(x, given), rtol=1e-4, atol=1e-5)


def test_a_graph_is_held_to_the_values_that_it_was_captured_with(tmp_path: Path) -> None:
    model = Net(Beside).eval()
    result = latentize.convert(model, args=(hidden(2, 6), 1.0), recipe=EXACT)
    assert result.blocks[0].status == "moe"
    result.save(tmp_path / "out")
    for again in (result.model, latentize.load(tmp_path / "out", model=model), copy.deepcopy(result.model)):
        again(hidden(1, 3), 1.0)
        with pytest.raises(LatentizeError, match=r"converted for given = 1\.0 and is called with 2\.0"):
            again(hidden(1, 3), 2.0)
        with pytest.raises(LatentizeError, match=r"is called with a tensor \[1, 3\]"):
            again(hidden(1, 3), mask(1, 3))


def test_the_values_of_a_call_are_stored_with_its_site() -> None:
    model = Net(ByTask).eval()
    converted = latentize.convert(model, args=(hidden(2, 6), 3), recipe=EXACT)
    block = next(m for m in converted.model.modules() if isinstance(m, LatentBlock))
    (fixed,) = block._site.fixed
    assert (fixed.name, fixed.value, fixed.default) == ("given", 3, None)
    kept = from_json(json.loads(json.dumps(site_to_json(converted._found[0]))))
    assert kept.fixed == (fixed,)


def test_torchscript_is_refused_by_name() -> None:
    traced = torch.jit.trace(Net(Unused).eval(), (hidden(2, 6),), check_trace=False)
    (block,) = latentize.inspect(traced, args=(hidden(2, 6),))
    assert (block.status, block.name) == ("refused", ".")
    assert "TorchScript" in block.reason


def test_a_converted_model_prints_and_pickles() -> None:
    model = Net(Unused).eval()
    converted = latentize.convert(model, args=(hidden(2, 6),), recipe=EXACT).model
    assert "LatentExperts" in repr(converted)
    kept = io.BytesIO()
    torch.save(converted, kept)
    kept.seek(0)
    x = hidden(3, 7, seed=1)
    pickled = pickle.loads(pickle.dumps(converted))
    for again in (torch.load(kept, weights_only=False), pickled, copy.deepcopy(converted)):
        assert torch.equal(again(x), converted(x))
        assert type(again.moe.router) is type(converted.moe.router)


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(N, D) * 0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, chosen = F.linear(x, self.weight).softmax(-1).topk(K, -1)
        return weights / weights.sum(-1, keepdim=True), chosen


class Experts(Moe):
    def forward(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        return swiglu_loop(x, weights, chosen, self.gate, self.up, self.down)


class BetweenModules(nn.Module):
    """The mask weighs the experts between two modules, where it stays."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = Router(), Experts()

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        weights, chosen = self.router(flat)
        return self.experts(flat, weights * self.kept(given).to(weights.dtype), chosen).view(x.shape)

    def kept(self, given: Tensor) -> Tensor:
        return given.reshape(-1, 1) != 0


class LeftOut(BetweenModules):
    """Its mask says which tokens are left out."""

    def kept(self, given: Tensor) -> Tensor:
        return given.reshape(-1, 1) == 0


@pytest.mark.parametrize("case", [BetweenModules, LeftOut])
@pytest.mark.parametrize(
    "seen", [mask(2, 6), mask(2, 6).long(), torch.ones(2, 6, dtype=torch.int64), torch.zeros(2, 6, dtype=torch.bool)]
)
def test_a_mask_between_router_and_experts_is_kept(case: type[nn.Module], seen: Tensor) -> None:
    model = Net(case).eval()
    (block,) = latentize.inspect(model, args=(hidden(2, 6), seen))
    nothing = bool((LeftOut.kept(None, seen) if case is LeftOut else BetweenModules.kept(None, seen)).any()) is False
    assert block.status == ("refused" if nothing else "moe"), block.reason
    converted = latentize.convert(model, args=(hidden(2, 6), seen), recipe=EXACT).model
    x = hidden(3, 7, seed=1)
    for later in (mask(3, 7), ~mask(3, 7), torch.ones(3, 7, dtype=torch.bool)):
        with torch.no_grad():
            torch.testing.assert_close(converted(x, later), model(x, later), rtol=1e-4, atol=1e-5)


def test_a_mask_inside_the_routed_path_is_named() -> None:
    for seen in (mask(2, 6).long(), torch.ones(2, 6, dtype=torch.int64)):
        (block,) = latentize.inspect(Net(OnWeights).eval(), args=(hidden(2, 6), seen))
        assert block.status == "refused"
        assert block.reason.endswith(
            "it is given a mask: what a mask does between a router and its experts is kept only where both are modules"
        )
