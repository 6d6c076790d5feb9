"""Where and how a lifted block is put back into its model: plain values that can be stored and used again.

A site is described with paths, positions and node names only, never with code, so that a saved model can be rebuilt
from the original structure without detecting anything again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import Tensor

from latentize.errors import LatentizeError

#: What a router's output can be made of.
Item = Literal["logits", "scores", "weights", "indices", "dense"]


@dataclass(frozen=True)
class Argument:
    """One argument of a call: by position, or by keyword."""

    position: int | None = None
    keyword: str | None = None

    def pick(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The argument's value; a positional one may also be passed by keyword."""
        if self.position is not None and self.position < len(args):
            return args[self.position]
        return kwargs[self.keyword] if self.keyword is not None else args[self.position or 0]


@dataclass(frozen=True)
class Output:
    """One tensor of a module's output, made from the routing or the routed output.

    `like_hidden`: shaped [*hidden.shape[:-1], width]; otherwise [T, width]. `factor` multiplies it.
    """

    item: Literal["routed", "logits", "scores", "weights", "indices", "dense"]
    like_hidden: bool
    factor: float = 1.0


@dataclass(frozen=True)
class Structure:
    """How a module's output is put together: a tensor, or a tuple or dict of tensors and constants."""

    kind: Literal["tensor", "tuple", "list", "dict"]
    items: tuple[Output | float | bool | str | None, ...]
    keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fixed:
    """An argument that is no tensor, with the value at which a call was proved."""

    name: str
    position: int | None  # None: by keyword only
    value: bool | float | str | None
    default: bool | float | str | None  # what stands where it is not given


def check_fixed(fixed: tuple[Fixed, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any], what: str) -> None:
    """Refuse a call with other values than those at which it was proved.

    Raises:
        LatentizeError: names the argument and both values.
    """
    for each in fixed:
        place = len(args) if each.position is None else each.position
        value = args[place] if place < len(args) else kwargs.get(each.name, each.default)
        if type(value) is not type(each.value) or value != each.value:
            plain = value is None or isinstance(value, (bool, int, float, str))
            found = repr(value) if plain else f"a {type(value).__name__}"
            if isinstance(value, Tensor):
                found = f"a tensor {list(value.shape)}"
            raise LatentizeError(
                f"{what} was converted for {each.name} = {each.value!r} and is called with {found}, of which nothing "
                "was proved; convert it again with example inputs that are called so"
            )


@dataclass(frozen=True)
class ExpertsCall:
    """A submodule that computes the routed output from hidden states, selected experts and their weights."""

    path: str
    hidden: Argument
    indices: Argument
    weights: Argument
    like_hidden: bool
    fixed: tuple[Fixed, ...] = ()


@dataclass(frozen=True)
class RouterCall:
    """A submodule that computes the routing from hidden states; `before` names what it does to them first."""

    path: str
    hidden: Argument
    output: Structure
    prefix: tuple[str, ...] = ()  # node that holds what the router's weight multiplies, in the graph of the module
    fixed: tuple[Fixed, ...] = ()


@dataclass(frozen=True)
class PartsSite:
    """Router and experts are submodules of their own; what lies around them stays as it is."""

    path: str
    router: RouterCall
    experts: ExpertsCall
    kind: Literal["parts"] = "parts"


@dataclass(frozen=True)
class WholeSite:
    """A module that computes nothing but the routed block."""

    path: str
    hidden: Argument
    output: Structure
    router: RouterCall | None = None  # its router, when that is a submodule which hooks may look for
    fixed: tuple[Fixed, ...] = ()
    kind: Literal["whole"] = "whole"


@dataclass(frozen=True)
class GraphSite:
    """Nodes of a graph: of the module at `path` once captured, or of the model itself, a graph (`path` None)."""

    path: str | None
    hidden: str
    router_hidden: str
    output: str
    rest: tuple[str, ...] = ()
    logits: str = ""
    channels_first: bool = False
    example: Any = None  # shapes, dtypes and constants of the arguments that the module was captured with
    experts: int = 0  # number of experts that were all taken to be hit while the module was captured; 0: none were
    fixed: tuple[Fixed, ...] = ()
    kind: Literal["graph"] = "graph"


Site = PartsSite | WholeSite | GraphSite


def to_json(site: Site) -> dict[str, Any]:
    """The site as JSON values."""
    return asdict(site)


def from_json(values: Mapping[str, Any]) -> Site:
    """The site back from `to_json`'s values."""
    kind = values["kind"]
    if kind == "graph":
        return GraphSite(**{**values, "rest": tuple(values["rest"]), "fixed": _fixed(values)})
    if kind == "parts":
        experts = dict(values["experts"])
        for name in ("hidden", "indices", "weights"):
            experts[name] = Argument(**experts[name])
        experts["fixed"] = _fixed(experts)
        return PartsSite(values["path"], _router(values["router"]), ExpertsCall(**experts))
    router = None if values["router"] is None else _router(values["router"])
    hidden, output = Argument(**values["hidden"]), _structure(values["output"])
    return WholeSite(values["path"], hidden, output, router, _fixed(values))


def _router(values: Mapping[str, Any]) -> RouterCall:
    return RouterCall(
        values["path"], Argument(**values["hidden"]), _structure(values["output"]), tuple(values["prefix"]),
        _fixed(values),
    )  # fmt: skip


def _fixed(values: Mapping[str, Any]) -> tuple[Fixed, ...]:
    return tuple(Fixed(**each) for each in values.get("fixed", ()))


def _structure(values: Mapping[str, Any]) -> Structure:
    items = tuple(Output(**item) if isinstance(item, dict) else item for item in values["items"])
    return Structure(values["kind"], items, tuple(values["keys"]))


def build(structure: Structure, parts: Mapping[str, Tensor], leading: tuple[int, ...]) -> Any:
    """An output of the given structure.

    Args:
        structure: what to build.
        parts: tensors [T, width] by item name.
        leading: shape of the hidden states without their last axis.
    """
    built = [_item(item, parts, leading) for item in structure.items]
    if structure.kind == "tensor":
        return built[0]
    if structure.kind == "dict":
        return dict(zip(structure.keys, built, strict=True))
    return tuple(built) if structure.kind == "tuple" else built


def _item(item: Any, parts: Mapping[str, Tensor], leading: tuple[int, ...]) -> Any:
    if not isinstance(item, Output):
        return item
    value = parts[item.item]
    if item.factor != 1.0:
        value = value * item.factor
    return value.reshape(*leading, value.shape[-1]) if item.like_hidden else value
