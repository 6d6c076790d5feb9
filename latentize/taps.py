"""Listen to blocks inside a running model, wherever their router and their experts were placed in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from latentize.moe import LatentMoE


@dataclass(frozen=True)
class BlockCall:
    """What went into a block and came out of its routed path, over T tokens.

    `inputs` are the arguments of `LatentMoE`: hidden [T, d], and what the router read [T, d] where that is another one.
    """

    inputs: tuple[Tensor, ...]
    output: Tensor  # [T, d]


@contextmanager
def tapped(blocks: Mapping[str, LatentMoE], seen: Callable[[str, BlockCall], None]) -> Iterator[None]:
    """Call `seen(name, call)` after every call of a block's experts, while inside."""
    read: dict[str, Tensor] = {}

    def watch_router(name: str) -> Any:
        def remember(_module: nn.Module, args: tuple[Tensor, ...], _output: Any) -> None:
            read[name] = args[0]

        return remember

    def watch_experts(name: str) -> Any:
        def report(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            hidden, routed_on = args[0], read.pop(name, args[0])
            same = routed_on.data_ptr() == hidden.data_ptr() and routed_on.shape == hidden.shape
            inputs = (hidden,) if same else (hidden, routed_on)
            seen(name, BlockCall(tuple(_flat(tensor) for tensor in inputs), _flat(output)))

        return report

    handles = []
    try:
        for name, block in blocks.items():
            handles.append(block.router.register_forward_hook(watch_router(name)))
            handles.append(block.experts.register_forward_hook(watch_experts(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])
