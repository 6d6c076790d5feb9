"""A `.pt2` file of torch.export: opened only when nothing in it is a pickle or native code."""

from __future__ import annotations

import builtins
import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export.pt2_archive import constants as pt2

from latentize.errors import LatentizeError, first_line
from latentize.sources import Source, as_inputs, evaluation_mode, out_of_memory

#: Targets a graph may call, and characters a symbolic size may hold: the rest could reach beyond tensor operators.
_TARGET = re.compile(
    r"torch\.ops\.\w+\.\w+(\.\w+)?|_operator\.[a-z]+_?|math\.[a-z0-9_]+|torch\.sym_\w+|torch\._sym_\w+"
)
_EXPRESSION = re.compile(r"[\w\s+\-*/(),<>=!&|~%]*")
_BUILTINS = set(dir(builtins)) - {"True", "False", "None", "abs", "max", "min", "pow", "round"}


def open_pt2(path: Path) -> Source:
    """The module in a `.pt2`, with the example inputs it was exported with.

    Raises:
        LatentizeError: it is not a .pt2, holds a pickle or native code, or has no example inputs.
    """
    check_archive(path)
    module, inputs = load_module(path)
    if inputs is None:
        raise LatentizeError(f"{path.name}: it holds no example inputs; export it again with torch.export.save")
    args, kwargs = inputs
    return Source("pt2", path, module, as_inputs(args, f"{path.name}: example inputs")[0], dict(kwargs))


def load_module(path: Path) -> tuple[nn.Module, Any]:
    """(module, example inputs or None) of a `.pt2` that `check_archive` let through."""
    try:
        program = torch.export.load(path)
    except Exception as error:
        if out_of_memory(error):
            raise
        raise LatentizeError(f"{path.name}: torch {torch.__version__} cannot load it: {first_line(error)}") from error
    module = program.module(check_guards=False)
    evaluation_mode(module)
    return module, program.example_inputs


def check_archive(path: Path) -> None:
    """Look through a `.pt2` for anything that runs code when it is loaded.

    torch.export.load unpickles tensors of unusual classes, opaque constants, example inputs and the files of older
    versions, and opens compiled libraries; none of that is let through.

    Raises:
        LatentizeError: naming what was found.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            _check_names(path, archive)
            for name in archive.namelist():
                _check_record(path, name.partition("/")[2], archive, name)
    except (OSError, zipfile.BadZipFile, ValueError, KeyError) as error:
        raise LatentizeError(f"{path.name}: not a readable .pt2 file: {first_line(error)}") from None


def _check_names(path: Path, archive: zipfile.ZipFile) -> None:
    names = [name.lower() for name in archive.namelist()]
    if len(set(names)) != len(names) or len({name.partition("/")[0] for name in names}) != 1:
        raise LatentizeError(f"{path.name}: a damaged .pt2: its records repeat or have several roots; export it again")
    inner = {name.partition("/")[2] for name in names}
    if pt2.ARCHIVE_FORMAT_PATH not in inner or "models/model.json" not in inner:
        raise LatentizeError(
            f"{path.name}: not a .pt2 of torch.export.save, or of a version before 2.8; export it again"
        )


def _check_record(path: Path, inner: str, archive: zipfile.ZipFile, name: str) -> None:
    folder, _, base = inner.rpartition("/")
    if inner.startswith(pt2.AOTINDUCTOR_DIR) or base.endswith((".so", ".dll", ".dylib")):
        raise LatentizeError(f"{path.name}: holds compiled code ({inner}), which is not run; export the plain program")
    if inner.startswith(pt2.SAMPLE_INPUTS_DIR):
        _check_sample_inputs(path, inner, archive.read(name))
    elif base.startswith((pt2.OPAQUE_OBJ_FILENAME_PREFIX, pt2.CUSTOM_OBJ_FILENAME_PREFIX)) or base.endswith(".pt"):
        raise _pickle(path, inner)
    elif folder + "/" in (pt2.WEIGHTS_DIR, pt2.CONSTANTS_DIR) and base.endswith("_config.json"):
        for tensor, payload in json.loads(archive.read(name))["config"].items():
            if payload.get("use_pickle", True):
                raise _pickle(path, f"{inner}: {tensor}")
    elif inner.startswith("models/") and base.endswith(".json"):
        _check_graph(path, json.loads(archive.read(name)))


def _check_sample_inputs(path: Path, inner: str, content: bytes) -> None:
    if not content:
        return
    try:
        torch.load(io.BytesIO(content), weights_only=True)
    except Exception:
        raise _pickle(path, f"{inner}: example inputs that are not plain tensors") from None


def _check_graph(path: Path, document: Any) -> None:
    for key, value in _strings(document):
        if key == "target" and value.startswith(("torch", "_operator", "math", "#")) and not _TARGET.fullmatch(value):
            raise LatentizeError(f"{path.name}: its graph calls {value!r}, which is not a tensor operator; refused")
        if key == "expr_str" and not _is_arithmetic(value):
            raise LatentizeError(f"{path.name}: its graph has a size {value[:40]!r} that is not arithmetic; refused")


def _is_arithmetic(expression: str) -> bool:
    """Whether a symbolic size, which torch evaluates, has no strings, attributes or built-in functions in it."""
    plain = re.sub(r"Symbol\('\w+'", "Symbol(0", expression)
    plain = re.sub(r"(?<![\w.])\d+\.\d*", "0", plain)
    names = set(re.findall(r"[A-Za-z_]\w*", plain))
    return _EXPRESSION.fullmatch(plain) is not None and "__" not in plain and not names & _BUILTINS


def _strings(document: Any) -> Iterator[tuple[str, str]]:
    """Every (key, string value) of a JSON document."""
    pending: list[Any] = [document]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            for key, value in item.items():
                if isinstance(value, str):
                    yield key, value
                else:
                    pending.append(value)
        elif isinstance(item, list):
            pending.extend(item)


def _pickle(path: Path, what: str) -> LatentizeError:
    return LatentizeError(
        f"{path.name}: holds a pickle ({what}), which can run any code when opened, so it is not; export the model "
        "again from plain tensors"
    )


def copy_graph(path: Path, target: Path) -> None:
    """Copy a `.pt2` without its weights: the graph, its constants and example inputs, for rebuilding the module."""
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as copy:
        for name in archive.namelist():
            inner = name.partition("/")[2]
            is_weight = inner.startswith(pt2.WEIGHTS_DIR) and not inner.endswith(".json")
            copy.writestr(name, b"" if is_weight else archive.read(name))
