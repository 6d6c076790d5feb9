"""Which block of an exported graph is the first to differ from the PyTorch model: one block after the other."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from latentize.disk_errors import COPY, disk_errors
from latentize.errors import LatentizeError, one_line, require_packages
from latentize.exporters.captured import exporting
from latentize.exporters.onnx_bodies import DOMAIN, OP_TYPE
from latentize.exporters.onnx_check import open_session, relative_error, run_session
from latentize.exporters.onnx_experts import place
from latentize.inputs import Inputs
from latentize.ops import latent_experts

if TYPE_CHECKING:
    import onnxruntime

#: Bytes of blocks' outputs that are held at a time.
HELD = 64 << 20


def block_errors(path: Path, model: nn.Module, inputs: Inputs, tolerance: float) -> tuple[dict[str, float], str]:
    """Relative error of each block's combined output [T, l] in the graph, in order, until one exceeds `tolerance`.

    Blocks are worked through in groups whose outputs take `HELD` bytes, so memory does not grow with their number.

    Args:
        path: the exported graph, whose weights may lie in a second file.
        model: the rewritten model that it was made of; run in eval mode, left as it was.
        inputs: one call.
        tolerance: largest relative error.

    Returns:
        errors by the blocks' places in the model, and the place of the first one over the tolerance ("" for none).

    Raises:
        LatentizeError: the file cannot be read or run, or holds other blocks than the model.
        MissingExtraError: onnx or onnx_ir is not installed.
        ResourceError: a copy of the graph, without its weights where these lie in a file of their own, does not fit.
    """
    places, values = _blocks(path)
    found: dict[str, float] = {}
    left = "a copy of the graph that gives its blocks' outputs does not fit"
    with (
        disk_errors(path, left, COPY),
        tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".onnx") as opened,
    ):
        _with_outputs(path, Path(opened.name), values)
        session = open_session(Path(opened.name))
        sizes = _sizes(model, inputs)
        if len(sizes) != len(places):
            raise LatentizeError(f"{path}: holds {len(places)} blocks and the model runs {len(sizes)}; export it again")
        for group in _groups(sizes):
            outputs = _run(session, path, inputs, [values[i] for i in group])
            held = dict(zip(group, outputs, strict=True))
            for number, error in _compare(model, inputs, held, [f"{path}: block {name}" for name in places]):
                found[places[number]] = error
                if not error <= tolerance:
                    return found, places[number]
    return found, ""


class _Watch(TorchDispatchMode):
    """Calls `seen(number, output)` after each call of the routed experts' operator."""

    def __init__(self, seen: Callable[[int, Tensor], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seen, self._count = seen, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is latent_experts:
            self._seen(self._count, output)
            self._count += 1
        return output


def _blocks(path: Path) -> tuple[list[str], list[str]]:
    """Places of the blocks in the model, and the names of their outputs in the graph."""
    require_packages(("onnx", "onnx_ir"), "onnx", "comparing a graph block by block")
    import onnx_ir as ir

    try:
        nodes = [n for n in ir.load(path).graph if (n.domain, n.op_type) == (DOMAIN, OP_TYPE)]
    except Exception as error:
        raise LatentizeError(f"{path}: not a readable ONNX file ({one_line(error)}); export it again") from error
    return [place(node) for node in nodes], [node.outputs[0].name or "" for node in nodes]


def _with_outputs(path: Path, copy: Path, values: Sequence[str]) -> None:
    """The graph with more outputs, beside the original so that it finds the same weights."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    known = {value.name: value for value in model.graph.value_info}
    there = {value.name for value in model.graph.output}
    model.graph.output.extend(known.get(name) or onnx.ValueInfoProto(name=name) for name in values if name not in there)
    onnx.save(model, copy)


def _sizes(model: nn.Module, inputs: Inputs) -> list[int]:
    """Bytes of each block's output, in the order of the calls."""
    sizes: list[int] = []
    with exporting(model), _Watch(lambda _, output: sizes.append(output.nbytes)):
        inputs.call(model)
    return sizes


def _groups(sizes: Sequence[int]) -> Iterator[list[int]]:
    """Consecutive numbers whose sizes add up to `HELD` at most, one at least."""
    group: list[int] = []
    for number, _ in enumerate(sizes):
        if group and sum(sizes[i] for i in group) + sizes[number] > HELD:
            yield group
            group = []
        group.append(number)
    if group:
        yield group


def _run(session: onnxruntime.InferenceSession, path: Path, inputs: Inputs, names: list[str]) -> list[Tensor]:
    try:
        return run_session(session, inputs, names)
    except Exception as error:  # onnxruntime's exceptions have no common base but Exception
        raise LatentizeError(f"{path}: onnxruntime cannot run it: {one_line(error)}") from error


def _compare(
    model: nn.Module, inputs: Inputs, outputs: dict[int, Tensor], blocks: Sequence[str]
) -> list[tuple[int, float]]:
    errors: list[tuple[int, float]] = []

    def seen(number: int, output: Tensor) -> None:
        if number not in outputs:
            return
        found = outputs.pop(number)
        if found.shape != output.shape:
            raise LatentizeError(
                f"{blocks[number]} returns {list(found.shape)} and the model's {list(output.shape)}: it is another "
                "model's graph; export this one again"
            )
        errors.append((number, relative_error(found, output)))

    with exporting(model), _Watch(seen), torch.no_grad():
        inputs.call(model)
    return errors
