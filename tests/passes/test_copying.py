"""Copies of modules that hold what cannot be copied."""

from __future__ import annotations

import itertools
import math
import threading

import pytest
import torch
from torch import nn

from latentize.passes.copying import deep_copy


class Holder:
    """A plain object that holds a lock, and itself."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.numbers = [1, 2]
        self.me = self


def model() -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net.math = math
    net[1].table = {"held": (Holder(), threading.Lock())}
    return net


def test_handles_are_shared_and_all_else_is_copied() -> None:
    net = model()
    copied = deep_copy(net)
    held, twin = net[1].table["held"], copied[1].table["held"]
    assert copied.math is math
    assert twin[1] is held[1]
    assert twin[0] is not held[0]
    assert twin[0].lock is held[0].lock
    assert twin[0].me is twin[0]
    assert twin[0].numbers == [1, 2]
    assert twin[0].numbers is not held[0].numbers
    assert copied[0].weight is not net[0].weight
    assert torch.equal(copied[0].weight, net[0].weight)


def test_known_objects_take_the_place_of_the_modules_own() -> None:
    net = model()
    other = nn.Parameter(torch.zeros(3, 3))
    copied = deep_copy(net, {id(net[0].weight): other})
    assert copied[0].weight is other
    assert copied.math is math


def test_iterators_are_not_shared() -> None:
    net = nn.Linear(3, 3)
    net.noise = (n for n in itertools.count())
    with pytest.raises(TypeError, match="generator"):
        deep_copy(net)
