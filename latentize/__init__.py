"""Compile trained Mixture-of-Experts models into LatentMoE.

The names below are loaded on first use, so that `latentize --help` does not pay for importing torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentize.api import Result as Result
    from latentize.api import convert as convert
    from latentize.api import inspect as inspect
    from latentize.api import load as load
    from latentize.blocks import Block as Block
    from latentize.errors import LatentizeError as LatentizeError
    from latentize.recipe import Recipe as Recipe
    from latentize.spec import MoESpec as MoESpec

__version__ = "0.1.0"

_HOME = {
    "Block": "latentize.blocks",
    "LatentizeError": "latentize.errors",
    "MoESpec": "latentize.spec",
    "Recipe": "latentize.recipe",
    "Result": "latentize.api",
    "convert": "latentize.api",
    "inspect": "latentize.api",
    "load": "latentize.api",
}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'latentize' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
