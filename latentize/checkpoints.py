"""Results of finished stages, kept beside OUT until the run is complete, so that `--resume` goes on from there."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from latentize import store
from latentize.artefact import versions
from latentize.disk_errors import disk_errors
from latentize.errors import LatentizeError, first_line
from latentize.inputs import Batch
from latentize.recipe import Recipe
from latentize.spec import MoESpec
from latentize.whole_files import write_text

T = TypeVar("T")
_FINGERPRINT = "fingerprint.json"


def fingerprint(
    model: nn.Module, specs: Mapping[str, MoESpec], recipe: Recipe, batches: Iterable[Batch]
) -> dict[str, Any]:
    """What decides the outcome of a run: weights, what they compute, data, versions, and every field of the recipe."""
    leaves = [leaf for batch in batches for leaf in pytree.tree_leaves(batch)]
    fields = {f"recipe.{name}": value for name, value in recipe.model_dump(mode="json").items()}
    found = versions()
    del found["python"]
    return {
        "model": _digest(tensor for _, tensor in sorted(_named_tensors(model))),
        "blocks": store.encode(specs, lambda _path, tensor: list(tensor.shape)),
        "data": _digest(leaves),
        **{f"version of {name}": version for name, version in found.items()},
        **fields,
    }


class Checkpoints:
    """A folder beside OUT with one file pair per finished stage."""

    def __init__(self, out: Path) -> None:
        self.folder = out.with_name(f".{out.name}.work")

    def open(self, current: Mapping[str, Any], *, resume: bool) -> bool:
        """Get ready for a run with the fingerprint `current`; returns whether there is something to go on from.

        Raises:
            LatentizeError: `resume` is asked for, and the interrupted run was another one.
        """
        file = self.folder / _FINGERPRINT
        if resume and file.exists():
            _compare(json.loads(file.read_text()), json.loads(json.dumps(current)), self.folder)
            return True
        with disk_errors(self.folder):
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            write_text(file, json.dumps(current, indent=1))
        return False

    def stage(self, name: str, kind: Any, make: Callable[[], T]) -> T:
        """The value of a stage: as it was kept, else made now and kept.

        Raises:
            LatentizeError: what was kept is damaged.
            ResourceError: the disk is full.
        """
        path = self.folder / name
        if path.with_suffix(".json").exists():
            try:
                kept: T = store.load(kind, path)
            except Exception as error:
                raise LatentizeError(
                    f"{path}: the interrupted run's {name} cannot be read ({first_line(error)}); run without --resume"
                ) from error
            return kept
        value = make()
        with disk_errors(self.folder, "what was finished is kept there"):
            store.save(value, path)
        return value

    def clear(self) -> None:
        """Forget everything: the run is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _compare(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    for field in dict.fromkeys([*before, *now]):
        was, current = before.get(field), now.get(field)
        if was != current:
            change = "" if field in ("model", "blocks", "data") else f" (was {was!r}, now {current!r})"
            raise LatentizeError(
                f"--resume: {field} differs from the interrupted run{change}; give the same arguments, or leave out "
                f"--resume to start over (its results are in {folder})"
            )


def _named_tensors(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    return ((name, value) for name, value in model.state_dict().items() if isinstance(value, Tensor))


def _digest(values: Iterable[Any]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for value in values:
        if isinstance(value, Tensor):
            plain = value.detach().cpu().contiguous()
            digest.update(f"{plain.dtype}{list(plain.shape)}".encode())
            digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()
