"""A model's tensors as safetensors: sharded where they are large, loaded strictly, shared tensors stored once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from latentize.errors import LatentizeError

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 2**30


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of a model's state by name, checked to be complete and finite.

    Raises:
        LatentizeError: an entry is not a tensor, has no data, or is not finite.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise LatentizeError(
                f"{name}: a {type(value).__name__} in the model's state, which safetensors cannot hold"
            )
        if value.is_meta:
            raise LatentizeError(
                f"{name} {list(value.shape)}: missing, it is on the meta device; load the weights first"
            )
        if value.is_floating_point() or value.is_complex():
            wrong = ~torch.isfinite(value) if name in parameters else torch.isnan(value)
            if bool(wrong.any()):
                count = int(wrong.sum())
                raise LatentizeError(f"{name} {list(value.shape)}: {count} values are not finite, so it is not saved")
        state[name] = value
    return state


def save_state(model: nn.Module, folder: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> dict[str, str]:
    """Write a model's state into a folder; returns alias -> stored name of tensors that share memory.

    Raises:
        LatentizeError: see `state_of`.
    """
    stored: dict[tuple[object, ...], str] = {}
    aliases: dict[str, str] = {}
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in state_of(model).items():
        key = (
            tensor.device,
            tensor.untyped_storage().data_ptr(),
            tensor.storage_offset(),
            tensor.shape,
            tensor.stride(),
        )
        if tensor.numel() and key in stored:
            aliases[name] = stored[key]
            continue
        stored[key] = name
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        size += tensor.nbytes
        shards[-1][name] = tensor
    _write_shards(shards, folder)
    return aliases


def _write_shards(shards: list[dict[str, Tensor]], folder: Path) -> None:
    names = (
        [FILE]
        if len(shards) == 1
        else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    )
    for shard, name in zip(shards, names, strict=True):
        save_file({key: _own(tensor) for key, tensor in shard.items()}, folder / name, metadata={"format": "pt"})
    if len(shards) > 1:
        where = {key: name for shard, name in zip(shards, names, strict=True) for key in shard}
        total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2))


def _own(tensor: Tensor) -> Tensor:
    """The tensor as safetensors wants it: on the CPU, contiguous, alone in its storage."""
    plain = tensor.detach().cpu().contiguous()
    return plain.clone() if plain.untyped_storage().nbytes() != plain.nbytes else plain


@torch.no_grad()
def load_state(model: nn.Module, folder: Path, aliases: Mapping[str, str]) -> None:
    """Give a model the tensors of a folder, strictly: every tensor of the model, none besides, shapes equal.

    A tensor takes the stored dtype, and tensors that share memory go on sharing it.

    Raises:
        LatentizeError: naming what is missing, unexpected, of another shape, or unreadable.
    """
    files = _files(folder)
    where = {key: (file, key) for file in files for key in _keys(file)}
    where.update({alias: where[name] for alias, name in aliases.items() if name in where})
    state = model.state_dict(keep_vars=True)
    for problem, names in (
        ("missing from", state.keys() - where.keys()),
        ("unexpected in", where.keys() - state.keys()),
    ):
        if names:
            first = min(names)
            raise LatentizeError(
                f"{folder}: {first} and {len(names) - 1} more are {problem} the saved tensors; save again"
            )
    for file in files:
        loaded = _read(file)
        for name, (home, key) in where.items():
            if home != file:
                continue
            tensor, target = loaded[key], state[name]
            if tensor.shape != target.shape:
                raise LatentizeError(
                    f"{folder}: {name} is {list(tensor.shape)}, the model expects {list(target.shape)}"
                )
            target.data = tensor.to(target.device)


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if not index.exists():
        return [folder / FILE]
    names = json.loads(index.read_text())["weight_map"].values()
    return [folder / Path(name).name for name in dict.fromkeys(names)]


def _read(file: Path) -> dict[str, Tensor]:
    with safe_open(file, framework="pt") as reader:
        return {key: reader.get_tensor(key) for key in reader.keys()}  # noqa: SIM118  not a mapping


def _keys(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as reader:
            return list(reader.keys())
    except (OSError, SafetensorError) as error:
        raise LatentizeError(f"{file}: cannot be read: {error}; it is missing or was cut short") from None
