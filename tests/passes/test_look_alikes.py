"""Every look-alike is refused with a reason and left exactly as it is."""

from __future__ import annotations

import codings
import codings_strangers
import contract
import pytest
from codings_base import HIDDEN, example
from test_styles import FRESH, run
from torch import nn

NAMES = list(codings.NOT_MOES)
SLOW_EVERY = 3


def refuse(name: str) -> None:
    case = codings.NOT_MOES[name]
    fresh = [case.arguments(example(*f) * case.loud) for f in FRESH[1:]]
    contract.assert_refused(lambda: codings.build(case), case.arguments(example()), fresh, run(case))


@pytest.mark.parametrize("name", NAMES[::SLOW_EVERY])
def test_refuses(name: str) -> None:
    refuse(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for i, n in enumerate(NAMES) if i % SLOW_EVERY])
def test_refuses_in_full(name: str) -> None:
    refuse(name)


@pytest.mark.parametrize("name", codings_strangers.RARE)
def test_refuses_what_random_inputs_do_not_show(name: str) -> None:
    case = codings_strangers.RARE[name]
    found = contract.inspect(lambda: codings.build(case), case.arguments(example()))
    assert [b.status for b in found] == ["refused"]


REASONS = {
    "DenseSigmoid": "dense mixture",
    "AllSelected": "dense mixture",
    "SoftSlots": "soft MoE",
    "ExpertChoice": "expert choice",
    "MixtureOfDepths": "mixture of depths",
    "AboveThreshold": "by a threshold",
    "PreviousToken": "other tokens",
    "SequenceMean": "other tokens",
    "EvalNoiseSmall": "random numbers",
    "NearestCentroid": "distance of a token from centroids",
    "SwitchOverflow": "capacity",
    "BatchCapacity": "capacity",
}


@pytest.mark.parametrize("name", REASONS)
def test_says_why(name: str) -> None:
    case = codings.NOT_MOES[name]
    (block,) = contract.inspect(lambda: codings.build(case), case.arguments(example()))
    assert block.status == "refused"
    assert REASONS[name] in block.reason


def test_plain_layers_and_attention_are_not_listed() -> None:
    layer = nn.TransformerEncoderLayer(HIDDEN, 8, 64, batch_first=True)

    def make() -> nn.Module:
        return nn.TransformerEncoder(layer, 8, enable_nested_tensor=False).eval()

    assert contract.inspect(make, ((example(2, 8),), {})) == []
