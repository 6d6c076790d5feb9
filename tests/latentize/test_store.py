"""Dataclasses with tensors survive JSON and safetensors, to the bit and to the type."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from latentize import store
from latentize.activations import Activation
from latentize.spec import ExpertsSpec, Groups, LatentSpec, MoESpec, RouterSpec


@dataclass(frozen=True)
class Leaf:
    value: Tensor
    note: str | None = None


@dataclass(frozen=True)
class Tree:
    leaves: Mapping[str, Leaf]
    curve: tuple[tuple[int, float], ...]
    sizes: list[int]
    dtype: torch.dtype
    place: Path
    anything: Any = None


def spec(seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    router = RouterSpec(
        draw(8, 4), 2, score="sigmoid", selection_bias=draw(8), groups=Groups(4, 2, "max", "zero"), normalize="norm",
        p=math.inf, scale=2.5,
    )  # fmt: skip
    experts = ExpertsSpec(draw(8, 6, 3), draw(8, 3, 6), draw(8, 6, 3), activation=Activation("silu", gate_max=7.0))
    return MoESpec(router, experts, LatentSpec(draw(3, 4), draw(4, 3)), output_scale=0.5)


def equal(a, b):
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if hasattr(a, "__dataclass_fields__"):
        return type(a) is type(b) and all(equal(getattr(a, f), getattr(b, f)) for f in a.__dataclass_fields__)
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return type(a) is type(b) and a == b


def test_a_spec_with_every_kind_of_field_comes_back(tmp_path):
    specs = {"layers.0": spec(), "layers.1": spec(1)}
    store.save(specs, tmp_path / "specs")
    assert equal(store.load(dict[str, MoESpec], tmp_path / "specs"), specs)


def test_containers_and_plain_values_come_back(tmp_path):
    tree = Tree({"a.b": Leaf(torch.arange(3)), "c": Leaf(torch.ones(2).half(), "x")}, ((1, 0.5), (2, math.inf)), [1, 2],
                torch.bfloat16, Path("a/b"), {"k": [1, None]})  # fmt: skip
    store.save(tree, tmp_path / "tree")
    assert equal(store.load(Tree, tmp_path / "tree"), tree)


def test_what_has_no_json_form_is_an_error(tmp_path):
    with pytest.raises(TypeError, match="x: a object"):
        store.save({"x": object()}, tmp_path / "bad")
    assert not list(tmp_path.iterdir())


def test_the_json_is_plain(tmp_path):
    store.save({"loss": 0.5, "worst": math.nan}, tmp_path / "plain")
    assert json.loads((tmp_path / "plain.json").read_text()) == {"loss": 0.5, "worst": "nan"}
    assert math.isnan(store.load(dict[str, float], tmp_path / "plain")["worst"])
