"""Commands on a folder that a conversion wrote: compare it with its original, and time both."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from torch import fx, nn

from latentize import artefact, compare_backends, compare_blocks, compare_outputs, report, staging, terminal
from latentize.bench import TOKENS, Latency, MakeInputs, bench_models, bench_onnx
from latentize.calibration import batches_of, example_batch
from latentize.compare import Evaluation, Gate, evaluate_pair, loss_gate, require
from latentize.compare_backends import Backend
from latentize.compare_inputs import Sequences, sequences
from latentize.comparison import BackendAgreement, BlockSearch, Comparison, Which
from latentize.disk_errors import COPY
from latentize.errors import LatentizeError, MissingExtraError
from latentize.exporters.captured import captured_graph
from latentize.exporters.onnx_widened import widen_inputs, widen_model
from latentize.inputs import Batch, Inputs, observing, runnable_at
from latentize.moe import LatentMoE
from latentize.passes.fuse import fuse
from latentize.progress import Steps
from latentize.run_onnx import ONNXRUNTIME, ORIGINAL, REWRITTEN, WITH_OPERATOR, redraw
from latentize.sources import Source, open_model
from latentize.terminal_compare import print_comparison

#: Batches that sequences are cut from and that blocks are compared on.
_BATCHES = 8
#: About the time that the calls of one model at one number of tokens may take.
_SECONDS = 5.0


@dataclass(frozen=True)
class Options:
    """What the command line asks for; see its help. `backends` None: all that OUT and this machine have."""

    out: Path
    original: str | None = None
    backends: tuple[str, ...] | None = None
    tolerance: float | None = None
    max_loss: float | None = None
    max_block_error: float | None = None
    max_tokens: int | None = None
    quiet: bool = False


def compare(options: Options) -> None:
    """Compare the converted model in OUT with its original, and what was exported with PyTorch; the report keeps it.

    Raises:
        LatentizeError: OUT is not ours, its original is not found, or a backend that was asked for is not there.
        GateError: an exported model disagrees with PyTorch, or a limit that was given is passed.
    """
    console, progress = terminal.consoles(quiet=options.quiet)
    steps = Steps(progress)
    artefact.read_manifest(options.out)
    check_report(options.out)
    notes: list[str] = []
    with ExitStack() as held:
        backends = compare_backends.available(options.out, options.backends, notes, held)
        with steps.step("load"):
            source, rewritten, blocks = open_pair(options.out, options.original)
        if options.max_loss is not None and source.evaluate is None:
            raise LatentizeError(
                "--max-loss needs an evaluate(model) in model.py, which this model does not have; add one"
            )
        made = _Pair(source, rewritten, blocks, backends, options).measure(steps, [*source.notes, *notes])
    print_comparison(console, made)
    terminal.print_end(console, made.gates, [*made.notes, *_kept(options.out, made)], (), str(options.out))
    require(made.gates, "The comparison says at which lengths and from which block on; --tolerance allows more")


def bench(out: Path, original: str | None, *, fused: bool = False, quiet: bool) -> None:
    """Time the converted model in OUT and its original; with `fused`, also as captured graphs, the converted one fused.

    Raises:
        LatentizeError: OUT is not ours, or its original is not found.
    """
    console, progress = terminal.consoles(quiet=quiet)
    steps = Steps(progress)
    with steps.step("load"):
        source, rewritten, _ = open_pair(out, original)
    with steps.step("time"):
        rows = latencies(source, source.model, rewritten, out)
    if fused:
        with steps.step("time fused"):
            rows += _fused_latencies(source, rewritten)
    terminal.print_latency(console, rows)


def require_tensorrt(feature: str) -> None:
    """Check that engines can be built here.

    Raises:
        MissingExtraError: naming the package that is missing.
    """
    from latentize.exporters import tensorrt_library

    tensorrt_library.find(feature)
    if importlib.util.find_spec("onnx") is None:
        raise MissingExtraError("onnx", "onnx", feature)


def check_report(out: Path) -> None:
    """Check that a report in OUT, which will get what is found, can be read and written: before the work.

    Raises:
        LatentizeError: it is damaged, or OUT cannot be written.
    """
    if (out / report.JSON_NAME).exists():
        report.read(out)
        staging.check_writable(out, elsewhere=COPY)


def open_pair(out: Path, original: str | None) -> tuple[Source, nn.Module, dict[str, LatentMoE]]:
    """(the original as a source, the converted model, its blocks) of a folder.

    Raises:
        LatentizeError: the folder is not ours, or the original is not where it was.
    """
    manifest = artefact.read_manifest(out)
    text = original if original is not None else manifest.origin.text
    if not text:
        raise LatentizeError(
            f"{out}: it was converted from Python, so its original is not known; give --original MODEL"
        )
    try:
        source = open_model(text)
    except LatentizeError as error:
        if original is not None:
            raise
        raise LatentizeError(f"{out}: its original cannot be opened ({error}); give --original MODEL") from error
    return source, *artefact.load_blocks(artefact.read_manifest(out))


def latencies(source: Source, original: nn.Module, rewritten: nn.Module, folder: Path) -> tuple[Latency, ...]:
    """Latency of both models in PyTorch and, where both graphs are in `folder`, in onnxruntime.

    Slow models are timed over fewer rounds, so that a table takes about a minute at most.
    """
    make_inputs, rounds = inputs_maker(source, original), rounds_for(original, source)
    models = {"original": original, "rewritten": rewritten}
    rows = bench_models(models, make_inputs, TOKENS, repeats=rounds, warmup=min(5, rounds))
    return rows + _onnx_latencies(folder, make_inputs, rounds)


def _fused_latencies(source: Source, rewritten: nn.Module) -> tuple[Latency, ...]:
    """Latency of both models as captured graphs, as they are and the converted one fused.

    A model that cannot be captured, as a loop over experts often cannot, is noted and not timed.
    """
    make_inputs, rounds = inputs_maker(source, source.model), rounds_for(source.model, source)
    graphs: dict[str, fx.GraphModule] = {}
    notes = []
    for name, model in (("original", source.model), ("rewritten", rewritten)):
        try:
            graphs[name] = captured_graph(model, Inputs(source.args, source.kwargs))
        except LatentizeError as reason:
            notes.append(f"the {name} model is not timed: {reason}")

    def timed(backend: str) -> tuple[Latency, ...]:
        note = "; ".join(notes)
        return bench_models(graphs, make_inputs, TOKENS, rounds, min(5, rounds), backend=backend, note=note)

    rows = timed("torch graph")
    if "rewritten" in graphs:
        fuse(graphs["rewritten"])
    return rows + timed("torch graph, fused")


def inputs_maker(source: Source, original: nn.Module) -> MakeInputs:
    """tokens -> the example inputs brought to that many, or why the model does not take so many."""

    def make_inputs(tokens: int) -> Inputs | str:
        inputs, reason = runnable_at(original, source.args, source.kwargs, tokens)
        return reason if inputs is None else inputs

    return make_inputs


def rounds_for(model: nn.Module, source: Source) -> int:
    """How often calls are timed: less often where one takes long."""
    began = time.monotonic()
    with observing(model):
        Inputs(source.args, source.kwargs).call(model)
    return max(3, min(30, int(_SECONDS / max(1e-6, time.monotonic() - began))))


def _onnx_latencies(folder: Path, make_inputs: MakeInputs, rounds: int) -> tuple[Latency, ...]:
    """Of the graphs in a folder by standard operators, and with latentize's own where its library takes them."""
    from latentize.exporters import onnxruntime_ops
    from latentize.exporters.onnx_check import NoKernelError

    try:
        rows = _graph_latencies(folder, make_inputs, rounds, ONNXRUNTIME, None)
    except (NoKernelError, MissingExtraError) as error:
        note = str(error) if isinstance(error, MissingExtraError) else "it has no CPU kernels in the graph's dtype"
        return tuple(Latency.of(ONNXRUNTIME, count, {}, note) for count in TOKENS)
    library = onnxruntime_ops.library() if rows else None
    if library is None:
        return rows
    try:
        return rows + _graph_latencies(folder, make_inputs, rounds, WITH_OPERATOR, library)
    except LatentizeError as error:
        return (*rows, *(Latency.of(WITH_OPERATOR, count, {}, str(error)) for count in TOKENS))


def _graph_latencies(
    folder: Path, make_inputs: MakeInputs, rounds: int, backend: str, operator: Path | None
) -> tuple[Latency, ...]:
    paths = {"original": folder / ORIGINAL, "rewritten": folder / REWRITTEN}
    present = {name: path for name, path in paths.items() if path.exists()}
    if "rewritten" not in present:
        return ()
    return bench_onnx(present, make_inputs, TOKENS, rounds, min(5, rounds), backend=backend, operator=operator)


@dataclass(frozen=True)
class _Pair:
    """Everything that one comparison is made from."""

    source: Source
    rewritten: nn.Module
    blocks: Mapping[str, LatentMoE]
    backends: Sequence[Backend]
    options: Options

    @property
    def models(self) -> dict[Which, nn.Module]:
        return {"original": self.source.model, "rewritten": self.rewritten}

    def measure(self, steps: Steps, notes: list[str]) -> Comparison:
        """Run every part of the comparison; `notes` are said before those that are made on the way."""
        batches = _batches(self.source)
        evaluation = None
        if self.source.evaluate is not None:
            with steps.step("evaluate"):
                evaluation = evaluate_pair(self.source.model, self.rewritten, self.source.evaluate)
        with steps.step("inspect"):
            teacher = compare_blocks.canonical_original(self.source, self.blocks)
        with steps.step("outputs"):
            cut = list(sequences(self.source.model, batches, self.options.max_tokens, notes))
            exported: dict[Which, nn.Module] = {"original": teacher.model, "rewritten": self.rewritten}
            lengths, rows = compare_outputs.agreement(
                self.models, self.backends, cut, notes, self.options.tolerance, exported=exported, redraw=self._redraw
            )
        with steps.step("blocks"):
            limit = self.options.max_block_error
            searches = [compare_blocks.against_original(teacher, self.blocks, batches, limit)]
            searches += self._graph_searches(cut, rows)
        with steps.step("time"):
            latency = self._latencies()
        with steps.step("memory"):
            shown = "torch" in self._names
            make_inputs = inputs_maker(self.source, self.source.model)
            memory = compare_backends.memory(self.models, self.backends, make_inputs, TOKENS, notes, torch_too=shown)
        notes += [f"{row.backend}, {row.model}, T = {row.tokens}: {row.note}" for row in rows if row.note]
        return Comparison(
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            backends=self._names,
            evaluation=evaluation,
            lengths=tuple(lengths),
            agreement=tuple(rows),
            required={b.name: max(row.error for row in rows if row.backend == b.name) for b in self.backends},
            blocks=tuple(searches),
            latency=latency,
            memory=tuple(memory),
            files=_sizes(self.options.out),
            gates=tuple(self._gates(evaluation, rows, searches)),
            notes=tuple(dict.fromkeys(notes)),
        )

    @property
    def _names(self) -> tuple[str, ...]:
        asked = self.options.backends
        return (*(("torch",) if asked is None or "torch" in asked else ()), *(b.name for b in self.backends))

    def _redraw(self, inputs: Inputs, seed: int) -> Inputs:
        return redraw(inputs, self.source, seed)

    def _graph_searches(self, cut: Sequence[Sequences], rows: Sequence[BackendAgreement]) -> list[BlockSearch]:
        """Block by block in onnxruntime: at the shortest length that disagrees, or else at a middle one."""
        backend = next((backend for backend in self.backends if backend.name == ONNXRUNTIME), None)
        if backend is None:
            return []
        mine = [row for row in rows if (row.backend, row.model) == (ONNXRUNTIME, "rewritten")]
        tokens = next((row.tokens for row in mine if not row.passed), cut[len(cut) // 2].tokens)
        calls: Sequence[Inputs] = next(batch.calls for batch in cut if batch.tokens == tokens)
        model, path = self.rewritten, backend.files["rewritten"]
        if "rewritten" in backend.widened:
            model, calls = widen_model(model), [widen_inputs(inputs) for inputs in calls]
        found = compare_blocks.in_onnxruntime(path, model, calls, tokens, mine[0].tolerance)
        if not (found.first_over or found.note or all(row.passed for row in mine)):
            where = "the difference is not in the routed experts: it is in projections or in what surrounds the blocks"
            found = replace(found, note=where)
        return [found]

    def _latencies(self) -> tuple[Latency, ...]:
        model = self.source.model
        make_inputs, rounds = inputs_maker(self.source, model), rounds_for(model, self.source)
        rows: tuple[Latency, ...] = ()
        if "torch" in self._names:
            models = {"original": model, "rewritten": self.rewritten}
            rows += bench_models(models, make_inputs, TOKENS, repeats=rounds, warmup=min(5, rounds))
        for backend in self.backends:
            if backend.name == ONNXRUNTIME:
                rows += _onnx_latencies(self.options.out, make_inputs, rounds)
            elif backend.name != WITH_OPERATOR:
                rows += tuple(compare_backends.timed(backend, make_inputs, TOKENS, rounds))
        return rows

    def _gates(
        self, evaluation: Evaluation | None, rows: Sequence[BackendAgreement], searches: Sequence[BlockSearch]
    ) -> Iterator[Gate]:
        limit = self.options.max_loss if self.options.max_loss is not None else _recorded_limit(self.options.out)
        if evaluation is not None and limit is not None:
            yield loss_gate(evaluation, limit)
        for row in rows:
            name = f"{row.backend} against PyTorch, {row.model}, T = {row.tokens}"
            yield Gate.of_agreement(name, row.error, row.tolerance)
        for search in searches:
            if search.tolerance is not None and search.errors:
                what = f"error of block {search.first_over or search.worst}, {search.comparison}"
                judged = Gate.of if search.comparison == compare_blocks.AGAINST_ORIGINAL else Gate.of_agreement
                yield judged(what, search.errors[search.first_over or search.worst], search.tolerance)


def _recorded_limit(out: Path) -> float | None:
    """What --max-loss was when the model was converted."""
    try:
        gates = report.read(out).gates
    except LatentizeError:
        return None
    return next((gate.limit for gate in gates if gate.name.startswith("relative rise of ")), None)


def _kept(out: Path, made: Comparison) -> list[str]:
    """Put a comparison into the report of OUT; what stood in the way, where something did."""
    if not (out / report.JSON_NAME).exists():
        return [f"{out} holds no {report.JSON_NAME}, so the comparison was only printed"]
    try:
        report.write(replace(report.read(out), comparison=made), out)
    except MissingExtraError as error:
        return [str(error)]
    return []


def _sizes(out: Path) -> dict[str, int]:
    """Bytes of every file of OUT, folders as a whole."""
    found = {}
    for entry in sorted(out.iterdir()):
        inner = [entry] if entry.is_file() else list(entry.rglob("*"))
        found[entry.name + "/" * entry.is_dir()] = sum(file.stat().st_size for file in inner if file.is_file())
    return {name: size for name, size in found.items() if not name.startswith((".", "__pycache__"))}


def _batches(source: Source) -> list[Batch]:
    if source.calibration is None:
        return [example_batch(source.model, source.args, source.kwargs)]
    return list(batches_of(source.calibration(), source.model))[-_BATCHES:]
