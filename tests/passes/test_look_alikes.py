"""Every look-alike is refused with a reason and left exactly as it is."""

from __future__ import annotations

import codings
import contract
import pytest
from codings_base import example
from test_styles import FRESH, run

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
