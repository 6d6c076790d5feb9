"""The ONNX part of a run: both graphs, each checked against PyTorch on fresh inputs of several lengths."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from latentize import report
from latentize.blocks import Block
from latentize.errors import GateError, LatentizeError, one_line
from latentize.exporters.tensorrt_profiles import Profile
from latentize.inputs import Inputs, runnable_at
from latentize.passes.double import dtype_of
from latentize.recipe import Recipe
from latentize.report import OnnxAgreement
from latentize.sources import Source
from latentize.ties import TieWatch

if TYPE_CHECKING:
    from latentize.exporters.onnx import OnnxExport

ORIGINAL, REWRITTEN = "original.onnx", "model.onnx"
#: What runs the graphs: onnxruntime by standard operators, and with latentize's own.
ONNXRUNTIME, WITH_OPERATOR = "onnxruntime", "onnxruntime + latentize"
#: Lengths that graphs are checked at: one token, a few, more than a batch.
TOKENS = (1, 16, 256)
#: How often values are drawn before a disagreement counts although a router's choice is a tie.
DRAWS = 8


def export_original(
    source: Source, canonical: nn.Module, folder: Path, form: str = "auto", profiles: Sequence[Profile] = ()
) -> Path:
    """Export the original with its blocks in canonical form, as the graph to compare the rewritten one with.

    It comes first in a run: what stops it would stop the rewritten model too, after all the work.

    Raises:
        LatentizeError: the model cannot be exported.
    """
    from latentize.exporters.onnx import export_onnx

    path = folder / ORIGINAL
    metadata = {"latentize.model": "original"}
    export_onnx(canonical, source.args, source.kwargs, path, form=form, profiles=profiles, metadata=metadata)
    return path


def check_in_form(source: Source, canonical: nn.Module, form: str, folder: Path) -> None:
    """Export the original with its blocks as the rewritten ones will be (their dtype and form), and load that.

    Raises:
        LatentizeError: the form cannot express a block, or onnxruntime has no kernel for an operator in the dtype.
    """
    from latentize.exporters.onnx import export_onnx

    path = folder / "tried.onnx"
    export_onnx(canonical, source.args, source.kwargs, path, form=form)
    with runnable(path):
        pass
    for file in folder.glob(path.name + "*"):
        file.unlink()


@contextmanager
def runnable(path: Path) -> Iterator[Path]:
    """The graph as onnxruntime's CPU kernels take it: itself, or, while inside, a copy in float32 of a bfloat16 one.

    Raises:
        LatentizeError: onnxruntime cannot load the graph.
    """
    from latentize.exporters.onnx import EXTERNAL_ABOVE
    from latentize.exporters.onnx_check import NoKernelError, open_session
    from latentize.exporters.onnx_widened import holds_bfloat16, widen_graph

    try:
        open_session(path)
    except NoKernelError:
        if not holds_bfloat16(path):
            raise
    else:
        yield path
        return
    with TemporaryDirectory(prefix=".float32-", dir=path.parent) as folder:
        wide = Path(folder) / path.name
        widen_graph(path, wide, EXTERNAL_ABOVE)
        open_session(wide)
        yield wide


def widened_note(path: Path) -> str:
    """That a copy of a graph in float32 was run in its place."""
    return (
        f"{path.name} is bfloat16, for which onnxruntime has no CPU kernels: the same graph in float32 was held "
        "against the model in float32"
    )


def export_rewritten(
    source: Source, model: nn.Module, recipe: Recipe, blocks: Sequence[Block], folder: Path, form: str
) -> OnnxExport:
    """Export the rewritten model, its experts' bodies in a form, with its recipe and evidence among the metadata.

    Forms "auto" and "measured" go by the recipe's profiles.

    Raises:
        LatentizeError: the model cannot be exported.
    """
    from latentize.exporters.onnx import export_onnx

    path = folder / REWRITTEN
    metadata = {
        "latentize.model": "rewritten", "latentize.recipe": json.dumps(recipe.model_dump(mode="json")),
        "latentize.evidence": json.dumps({block.name: evidence(block) for block in blocks}, ensure_ascii=False),
    }  # fmt: skip
    profiles = profiles_of(recipe)
    return export_onnx(model, source.args, source.kwargs, path, form=form, profiles=profiles, metadata=metadata)


def check_own(out: Path, recipe: Mapping[str, Any]) -> None:
    """Check that the graph in OUT is that of its conversion, as far as its metadata say.

    A graph exported from Python says nothing of that and passes. Profiles may be others than those it was made for.

    Args:
        out: a folder that holds a graph.
        recipe: of the conversion.

    Raises:
        LatentizeError: it is the original's or another conversion's, or cannot be read.
    """
    import onnx

    path = out / REWRITTEN
    try:
        said = {entry.key: entry.value for entry in onnx.load(path, load_external_data=False).metadata_props}
    except Exception as error:  # protobuf's own
        raise LatentizeError(f"{path}: not a readable ONNX file ({one_line(error)}); export it again") from error
    other = _other(out, said, recipe)
    if other:
        raise LatentizeError(
            f"{path}: is not the graph of the model in {out}: {other}; put its own back, or have it exported again "
            "with --dtype"
        )


def _other(out: Path, said: Mapping[str, str], recipe: Mapping[str, Any]) -> str:
    """What a graph's metadata say against its being that of OUT; "" for nothing."""
    if said.get("latentize.model", "rewritten") != "rewritten":
        return f"it is the {said['latentize.model']} one"
    its = json.loads(said.get("latentize.recipe", "{}"))
    for name in (name for name in its if name in recipe and name != "profiles"):
        if its[name] != recipe[name]:
            return f"{name} of its recipe is {its[name]!r}, not {recipe[name]!r}"
    if "latentize.evidence" not in said or not (out / report.JSON_NAME).exists():
        return ""
    proved = {name: block["max_error"] for name, block in json.loads(said["latentize.evidence"]).items()}
    here = {block.name: block.max_error for block in report.read(out).blocks}
    if proved.keys() != here.keys():
        return f"its blocks are {', '.join(proved) or 'none'}, not {', '.join(here) or 'none'}"
    return next((f"its block {name} was proved by another run" for name in here if proved[name] != here[name]), "")


def profiles_of(recipe: Recipe) -> tuple[Profile, ...]:
    """What exported graphs will be used for; none where the recipe does not say."""
    return tuple(Profile.of(values) for values in recipe.model_dump()["profiles"])


def evidence(block: Block) -> dict[str, Any]:
    """What a block of the original was proved to compute and how closely, or why it was refused."""
    computes = "" if block.spec is None else block.spec.describe()
    return {
        "status": block.status, "reason": block.reason, "computes": computes, "max_error": block.max_error,
        "probes": {probe.name: probe.error for probe in block.evidence},
    }  # fmt: skip


def agreement(
    which: Literal["original", "rewritten"], path: Path, model: nn.Module, source: Source, notes: list[str]
) -> list[OnnxAgreement]:
    """The graph against the model at every length of `TOKENS` that the model takes, on values drawn anew.

    By standard operators, then with latentize's own, where its library can be had and takes the graph. A graph that
    cannot run or returns other shapes has an infinite error; `notes` gets the reason. Values on which both disagree and
    a router's choice is a tie within the tolerance are left out, counted and drawn again. A bfloat16 graph, which
    onnxruntime's CPU kernels do not take, is widened to float32 and held against the model widened alike.
    """
    from latentize.exporters.onnx_check import TOLERANCES
    from latentize.exporters.onnx_widened import TOLERANCE as WIDENED
    from latentize.exporters.onnx_widened import widen_inputs, widen_model

    lengths = _lengths(source, model, notes)
    half = any(isinstance(t, Tensor) and t.dtype == torch.bfloat16 for t in model.state_dict().values())
    with runnable(path) if half else nullcontext(path) as graph:
        if graph != path:
            notes.append(widened_note(path))
            model, lengths = widen_model(model), [(tokens, widen_inputs(inputs)) for tokens, inputs in lengths]
            wide = widen_inputs(Inputs(source.args, source.kwargs))
            source = replace(source, args=wide.args, kwargs=dict(wide.kwargs))
            return _agreements(which, graph, model, source, notes, lengths, WIDENED)
        return _agreements(which, graph, model, source, notes, lengths, TOLERANCES.get(dtype_of(model), 1e-5))


def _agreements(
    which: Literal["original", "rewritten"], path: Path, model: nn.Module, source: Source, notes: list[str],
    lengths: Sequence[tuple[int, Inputs]], tolerance: float,
) -> list[OnnxAgreement]:  # fmt: skip
    from latentize.exporters import onnxruntime_ops
    from latentize.exporters.onnx_check import open_session

    rows = [_agreement(which, path, model, source, notes, length, None, tolerance) for length in lengths]
    library = onnxruntime_ops.library()
    if library is None:
        return rows
    try:
        open_session(path, operator=library)
    except LatentizeError as error:
        notes.append(f"{WITH_OPERATOR} is not checked: {error}")
        return rows
    return rows + [_agreement(which, path, model, source, notes, length, library, tolerance) for length in lengths]


def _agreement(
    which: Literal["original", "rewritten"], path: Path, model: nn.Module, source: Source, notes: list[str],
    length: tuple[int, Inputs], operator: Path | None, tolerance: float,
) -> OnnxAgreement:  # fmt: skip
    from latentize.exporters.onnx_check import check_onnx

    tokens, inputs = length
    for attempt in range(DRAWS):
        drawn = redraw(inputs, source, tokens + attempt * max(TOKENS))
        with TieWatch(model) as ties:
            try:
                error = check_onnx(path, model, [(drawn.args, drawn.kwargs)], math.inf, operator=operator).error
            except GateError as problem:
                notes.append(str(problem))
                error = math.inf
        if error <= tolerance or ties.closest > tolerance:
            break
    if attempt:
        notes.append(
            f"{path.name}: {attempt} of {attempt + 1} inputs of {tokens} tokens were left out, where a router's "
            f"choice is a tie within {tolerance:.0e}, which rounding decides"
        )
    backend = ONNXRUNTIME if operator is None else WITH_OPERATOR
    return OnnxAgreement(which, tokens, error, tolerance, error <= tolerance, backend)


def redraw(inputs: Inputs, source: Source, seed: int) -> Inputs:
    """The same shapes with fresh values: integers from those of the example inputs, floats normal of the same spread.

    Positions (integers that count up), masks (two values or fewer) and tensors with infinities stay as they are.
    """
    generator = torch.Generator().manual_seed(seed)
    pools = iter(Inputs(source.args, source.kwargs).tensors())

    def draw(leaf: object) -> object:
        if not isinstance(leaf, Tensor):
            return leaf
        pool = next(pools, leaf)
        if leaf.is_floating_point():
            if not bool(torch.isfinite(pool).all()) or pool.numel() < 2:
                return leaf
            normal = torch.randn(leaf.shape, generator=generator, dtype=torch.float32)
            return (normal * pool.float().std() + pool.float().mean()).to(leaf.dtype)
        values = pool.unique()
        counts_up = pool.shape[-1:] != (1,) and pool.ndim > 0 and bool((pool.diff(dim=-1) == 1).all())
        if leaf.dtype == torch.bool or len(values) <= 2 or counts_up:
            return leaf
        return values[torch.randint(len(values), leaf.shape, generator=generator)]

    args, kwargs = pytree.tree_map(draw, (inputs.args, dict(inputs.kwargs)))
    return Inputs(args, kwargs)


def _lengths(source: Source, model: nn.Module, notes: list[str]) -> list[tuple[int, Inputs]]:
    found = []
    for tokens in TOKENS:
        inputs, reason = runnable_at(model, source.args, source.kwargs, tokens)
        if inputs is None:
            notes.append(f"ONNX at T = {tokens}: not checked: {reason}")
        else:
            found.append((tokens, inputs))
    if not found:
        sizes = [t.shape[0] for t in Inputs(source.args, source.kwargs).tensors() if t.ndim]
        found.append((sizes[0] if sizes else 1, Inputs(source.args, source.kwargs)))
    return found
