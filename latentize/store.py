"""Frozen dataclasses with tensors in them, as JSON and safetensors and back: no pickles anywhere."""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from latentize.whole_files import written_whole

T = TypeVar("T")


def encode(value: Any, put: Callable[[str, Tensor], Any], path: str = "") -> Any:
    """A JSON value for a dataclass, container, number, string, dtype or tensor.

    Args:
        value: what to encode; dataclasses become objects of their fields, NaN and infinities become strings.
        put: called with each tensor's dotted path and the tensor; returns its JSON stand-in.
        path: dotted path of `value`.

    Raises:
        TypeError: a value has no JSON form.
    """
    below = f"{path}." if path else ""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Tensor):
        return put(path, value)
    if isinstance(value, (torch.dtype, Path)):
        return str(value).removeprefix("torch.")
    if is_dataclass(value):
        return {f.name: encode(getattr(value, f.name), put, below + f.name) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): encode(item, put, below + str(key)) for key, item in value.items()}
    if isinstance(value, (tuple, list, set, frozenset)):
        return [encode(item, put, f"{below}{index}") for index, item in enumerate(value)]
    raise TypeError(f"{path}: a {type(value).__name__} has no JSON form")


def decode(kind: Any, data: Any, get: Callable[[Any], Tensor]) -> Any:
    """The value of type `kind` that `encode` turned into `data`; `get` turns a tensor's stand-in into the tensor."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any or origin is Literal:
        return data
    if origin in (typing.Union, types.UnionType):
        options = [option for option in arguments if option is not type(None)]
        return None if data is None else decode(options[0], data, get)
    if kind is Tensor:
        return get(data)
    if kind is torch.dtype:
        return getattr(torch, data)
    if is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        known = [f for f in fields(kind) if f.init and f.name in data]
        return typing.cast(Any, kind)(**{f.name: decode(hints[f.name], data[f.name], get) for f in known})
    base = origin or kind
    if isinstance(base, type) and issubclass(base, Mapping):
        key, item = arguments or (str, Any)
        return {key(name): decode(item, value, get) for name, value in data.items()}
    if base in (tuple, list, set, frozenset) or (isinstance(data, list) and origin is not None):
        return _decode_sequence(base if base in (tuple, list, set, frozenset) else list, arguments, data, get)
    return kind(data) if kind in (float, int, str, Path) else data


def _decode_sequence(base: Any, arguments: tuple[Any, ...], data: list[Any], get: Callable[[Any], Tensor]) -> Any:
    if base is tuple and arguments and arguments[-1] is not Ellipsis:
        return tuple(decode(kind, item, get) for kind, item in zip(arguments, data, strict=True))
    kind = arguments[0] if arguments else Any
    return base(decode(kind, item, get) for item in data)


def save(value: Any, path: Path) -> None:
    """Write a value as `path`.json and its tensors as `path`.safetensors; the JSON appears last, and whole."""
    tensors: dict[str, Tensor] = {}

    def put(name: str, tensor: Tensor) -> str:
        tensors[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
        return name

    data = encode(value, put)
    with written_whole(path.with_suffix(".safetensors"), path.with_suffix(".json")) as (weights, described):
        save_file(tensors, weights)
        described.write_text(json.dumps(data), encoding="utf-8")


def load(kind: type[T], path: Path) -> T:
    """The value of type `kind` written by `save`.

    Raises:
        OSError, ValueError, KeyError: the files are missing or damaged.
    """
    data = json.loads(path.with_suffix(".json").read_text())
    with safe_open(path.with_suffix(".safetensors"), framework="pt") as file:
        value: T = decode(kind, data, file.get_tensor)
    return value
