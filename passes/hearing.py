"""Listen at places of a running model: what arrives there, what would arrive if it were another, and in what order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Place:
    """A tensor that goes into a module or comes out of it: the `leaf`-th among its arguments or in its output."""

    path: str
    end: Literal["in", "out"]
    leaf: int = 0


#: Called with a place and the tensor there; what it returns takes the tensor's place, None leaves it.
Listener = Callable[[Place, Tensor], Tensor | None]


@contextmanager
def heard(model: nn.Module, listener: Listener, paths: Iterable[str] | None = None) -> Iterator[None]:
    """Call `listener` wherever a floating tensor goes into or comes out of a submodule, while inside.

    Args:
        model: what will run.
        listener: see `Listener`.
        paths: the submodules to listen at; all of them, and the model itself, when None.
    """
    wanted = None if paths is None else set(paths)
    handles = []
    try:
        for path, module in model.named_modules():
            if wanted is None or path in wanted:
                handles.append(module.register_forward_pre_hook(_before(path, listener), with_kwargs=True))
                handles.append(module.register_forward_hook(_after(path, listener)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _before(path: str, listener: Listener) -> Any:
    def hook(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        return _passed(path, "in", (args, kwargs), listener)

    return hook


def _after(path: str, listener: Listener) -> Any:
    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        return _passed(path, "out", output, listener)

    return hook


def _passed(path: str, end: Literal["in", "out"], tree: Any, listener: Listener) -> Any:
    leaves, structure = pytree.tree_flatten(tree)
    changed = False
    for number, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim:
            other = listener(Place(path, end, number), leaf)
            if other is not None:
                leaves[number], changed = other, True
    return pytree.tree_unflatten(leaves, structure) if changed else None
