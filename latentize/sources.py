"""Where a model comes from: `model.py[:factory]`, a HF directory, a `.pt2`, or a folder that latentize wrote."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from latentize.errors import LatentizeError, first_line
from latentize.inputs import owned
from latentize.memory import all_finite

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
Form = Literal["file", "hf", "pt2", "module"]

_log = logging.getLogger("latentize")
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}


@dataclass
class Source:
    """A model as the user gave it, with what is needed to run it.

    `calibration` and `evaluate` come from a model.py that defines them. `folder` holds what belongs to the model (the
    model.py, the tokenizer); `notes` are things done on the way that the user should know.
    """

    form: Form
    path: Path
    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    factory: str = ""
    calibration: Callable[[], Iterable[Any]] | None = None
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The MODEL argument that opens it again, with an absolute path."""
        path = str(self.path.resolve())
        return f"{path}:{self.factory}" if self.factory not in ("", "build_model") else path


def split_model(text: str) -> tuple[Path, str]:
    """(path, factory) of a MODEL argument; the factory is "" unless one is named.

    Raises:
        LatentizeError: nothing is there, or its form is not one that latentize opens.
    """
    path, factory = Path(text), ""
    if not path.exists() and ":" in text:
        head, _, factory = text.rpartition(":")
        path = Path(head)
    if not path.exists():
        raise LatentizeError(f"{text}: no such file or folder; MODEL is model.py, model.py:factory, a folder or a .pt2")
    if factory and path.suffix != ".py":
        raise LatentizeError(f"{text}: only a model.py has factories; leave out ':{factory}'")
    if path.suffix in _PICKLES:
        raise LatentizeError(
            f"{text}: a pickle checkpoint can run any code when it is opened, so it is not; give a safetensors folder, "
            "a .pt2, or a model.py that builds the model"
        )
    if not path.is_dir() and path.suffix not in {".py", ".pt2"}:
        raise LatentizeError(
            f"{text}: not a model that latentize opens; MODEL is model.py[:factory], a folder or a .pt2"
        )
    return path, factory


def open_model(text: str) -> Source:
    """The model that a MODEL argument names, in evaluation mode, checked to run on its example inputs.

    Raises:
        LatentizeError: the model is missing, refused, cannot be built, holds non-finite weights, or rejects its inputs.
    """
    path, factory = split_model(text)
    source = _open(path, factory)
    if source.model.training:
        evaluation_mode(source.model)
        source.notes.append("the model was in training mode: switched to evaluation mode")
    check_finite(source.model)
    check_runs(source.model, source.args, source.kwargs, f"{path.name}: example inputs")
    for note in source.notes:
        _log.info(note)
    return source


def _open(path: Path, factory: str) -> Source:
    from latentize import artefact, source_file, source_hf, source_pt2

    if path.suffix == ".py":
        return source_file.open_file(path, factory)
    if path.suffix == ".pt2":
        return source_pt2.open_pt2(path)
    if artefact.is_artefact(path):
        return artefact.open_artefact(path)
    return source_hf.open_directory(path)


def evaluation_mode(model: nn.Module) -> None:
    """Set the evaluation flag of every module; exported graphs, which refuse `eval()`, have it too."""
    for module in model.modules():
        module.training = False


def as_inputs(value: Any, what: str) -> Inputs:
    """(args, kwargs) from a tuple (args) or a mapping (kwargs).

    Raises:
        LatentizeError: it is neither.
    """
    if isinstance(value, Mapping):
        return (), dict(value)
    if isinstance(value, (tuple, list)):
        return tuple(value), {}
    found = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    raise LatentizeError(f"{what}: expected a tuple of arguments or a dict of keyword arguments, found {found}")


def check_finite(model: nn.Module) -> None:
    """Refuse weights that hold NaN or Inf.

    Raises:
        LatentizeError: naming the tensor and the module that holds it.
    """
    for name, stored in model.named_parameters():
        if stored.is_meta or not stored.is_floating_point():
            continue
        tensor = stored.float() if stored.element_size() < 2 else stored  # no arithmetic is defined on eight bits
        if all_finite(tensor):
            continue
        nan, inf = int(torch.isnan(tensor).sum()), int(torch.isinf(tensor).sum())
        module, _, short = name.rpartition(".")
        raise LatentizeError(
            f"block {module or 'model'!r}: weight {short!r} {list(tensor.shape)} holds {nan} NaN and {inf} Inf; "
            "every weight must be finite: repair or reload the checkpoint"
        )


def check_runs(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], what: str) -> None:
    """Run the model once on the inputs, so that later failures are not the user's.

    Raises:
        LatentizeError: the model rejects them.
    """
    try:
        with torch.no_grad():
            given, named = owned(args, kwargs)
            model(*given, **named)
    except Exception as error:
        if out_of_memory(error):
            raise
        raise LatentizeError(
            f"{what}: the model rejects them ({describe_inputs(args, kwargs)}): {first_line(error)}; "
            "give inputs that the model's forward accepts"
        ) from error


def describe_inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """The inputs in words, e.g. "float32 [2, 5], use_cache=False"."""

    def one(value: Any) -> str:
        if isinstance(value, Tensor):
            return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        return repr(value) if isinstance(value, (int, float, str, bool, type(None))) else type(value).__name__

    return (
        ", ".join([one(value) for value in args] + [f"{name}={one(value)}" for name, value in kwargs.items()]) or "none"
    )


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, whoever raised it."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and ("can't allocate memory" in str(error) or "out of memory" in str(error))
