"""The command-line job: the steps of a conversion with checks before, checkpoints between, and a report at the end."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from latentize import api, conversion, run_export, run_report, staging, terminal
from latentize.artefact import Origin
from latentize.bench import Latency
from latentize.blocks import Block
from latentize.calibration import batches_of, example_batch
from latentize.checkpoints import Checkpoints, fingerprint
from latentize.compare import Evaluation, Gate, loss_gate, output_agreement, require
from latentize.conversion import Prepared, Rewritten, Start, Survey
from latentize.errors import LatentizeError, MissingExtraError, NothingToRewriteError
from latentize.exporters.onnx_choice import FormChoice
from latentize.exporters.tensorrt import Engine
from latentize.heal import HealPlan
from latentize.heal_job import split_batches
from latentize.inputs import Batch, observing
from latentize.load_balance import ExpertLoad, expert_load
from latentize.outlook import Outlook
from latentize.progress import Steps
from latentize.recipe import Recipe
from latentize.report import OnnxAgreement
from latentize.sources import Source, open_model, split_model
from latentize.statistics import BlockStatistics

#: Batches that statistics are collected on in a dry run.
_DRY_BATCHES = 4


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    model: str
    out: Path
    recipe: Recipe
    exports: tuple[str, ...] = ()
    onnx_form: str = "auto"
    dry_run: bool = False
    resume: bool = False
    max_loss: float | None = None
    quiet: bool = False

    @property
    def graphs(self) -> bool:
        """Whether graphs are exported, for themselves or for the engines made of them."""
        return "onnx" in self.exports or "tensorrt" in self.exports

    @property
    def checkpoints(self) -> tuple[str, ...]:
        """The exports that are checkpoints of an architecture that other programs know."""
        return tuple(name for name in self.exports if name not in ("onnx", "tensorrt"))


@dataclass
class Job:
    """One run: what was asked for, and what is known so far."""

    options: Options
    source: Source
    survey: Survey
    batches: Sequence[Batch]
    origin: Origin
    steps: Steps
    console: Console
    warnings: list[str] = field(default_factory=list)
    forms: list[FormChoice] = field(default_factory=list)
    engines: list[Engine] = field(default_factory=list)
    onnx: list[OnnxAgreement] = field(default_factory=list)

    @property
    def example(self) -> list[Batch]:
        """The example inputs as one batch."""
        return [example_batch(self.source.model, self.source.args, self.source.kwargs)]

    @property
    def compared(self) -> Sequence[Batch]:
        """The batches that both models are compared on: those that healing holds out."""
        if not self.batches:
            return self.example
        return split_batches(self.batches, HealPlan.chosen(self.options.recipe.heal_steps))[1]


def convert(options: Options) -> None:
    """Convert a model as the command line asks.

    Raises:
        LatentizeError: and its subclasses, for every fault that is not ours.
    """
    console, progress = terminal.consoles(quiet=options.quiet)
    steps = Steps(progress)
    split_model(options.model)
    check_request(options)
    with steps.step("load"):
        source = open_model(options.model)
    if options.max_loss is not None and source.evaluate is None:
        raise LatentizeError("--max-loss needs an evaluate(model) in model.py, which this model does not have; add one")
    if options.recipe.bypass and source.calibration is None:
        raise LatentizeError(
            f"bypass {options.recipe.bypass} is fitted to calibration data, which this model does not have; add "
            "calibration_data() to model.py, or set bypass to 0"
        )
    origin = Origin.of(source.model, source)
    with steps.step("inspect"):
        survey = conversion.survey(source.model, source.args, source.kwargs, options.recipe)
    terminal.print_blocks(console, [found.block for found in survey.found], survey.left)
    _require_blocks(options, survey)
    conversion.check_comparable(source.model, source.args, source.kwargs)
    batches: Sequence[Batch] = ()
    if source.calibration is not None:
        with steps.step("data"):
            batches = batches_of(source.calibration(), source.model, options.recipe.heal_steps)
    job = Job(options, source, survey, batches, origin, steps, console, list(source.notes))
    with conversion.workspace():
        if options.dry_run:
            dry_run(job)
        else:
            run(job)


def inspect(model: str, *, as_json: bool, quiet: bool, calibrate: bool = False, knee: float | None = None) -> None:
    """Print every block of a model; with `calibrate`, also what each latent width is predicted to cost it.

    Raises:
        NothingToRewriteError: it holds no MoE, or every block was refused.
        LatentizeError: with `calibrate`, there is no calibration data.
    """
    console, progress = terminal.consoles(quiet=quiet)
    split_model(model)
    steps = Steps(progress)
    with steps.step("load"):
        source = open_model(model)
    if calibrate and source.calibration is None:
        raise LatentizeError("--calibrate needs calibration_data() in model.py, which this model does not have; add it")
    with steps.step("inspect"):
        found = conversion.find(source.model, source.args, source.kwargs)
    blocks = [item.block for item in found]
    proved = [item for item in found if item.block.status == "moe" and item.block.max_error is not None]
    if not as_json:
        terminal.print_blocks(console, blocks)
    outlook = None
    if calibrate and proved:
        assert source.calibration is not None
        with steps.step("calibrate") as trials, conversion.workspace():
            batches = batches_of(source.calibration(), source.model)
            prepared = conversion.prepare(
                source.model, proved, Recipe(variant="fixed"), batches[:_DRY_BATCHES], sweep=True, progress=trials
            )
        outlook = Outlook.of(prepared, knee)
    if as_json:
        console.file.write(json.dumps([run_report.block_json(block, outlook) for block in blocks], indent=2) + "\n")
    elif outlook is not None:
        terminal.print_outlook(console, outlook)
        terminal.print_end(console, (), [_seen(batches)], (), "")
    if not any(block.status in ("moe", "latent") for block in blocks):
        raise NothingToRewriteError(_nothing(model, blocks))


def check_request(options: Options) -> None:
    """Everything that can be known to fail before the model is opened.

    Raises:
        LatentizeError: OUT is not ours or cannot be written.
        MissingExtraError: a package that an export needs is missing.
    """
    staging.check_target(options.out)
    if options.recipe.auto and options.checkpoints:
        raise LatentizeError(
            f"--export {options.checkpoints[0]}: its architecture has one latent size for all blocks, and compression "
            "auto gives each its own; give --latent-dim (`latentize inspect MODEL --calibrate` shows what widths cost)"
        )
    if options.recipe.bypass and options.checkpoints:
        raise LatentizeError(
            f"--export {options.checkpoints[0]}: its architecture has no place for a bypass; leave out one of them"
        )
    if options.onnx_form != "auto":
        if not options.graphs:
            raise LatentizeError("--onnx-form has no graph to shape; add --export onnx")
        from latentize.exporters.onnx_bodies import check_form

        check_form(options.onnx_form)
    if options.graphs:
        for package in ("onnx", "onnxscript", "onnxruntime"):
            if importlib.util.find_spec(package) is None:
                raise MissingExtraError(package, "onnx", "--export onnx")
    if "tensorrt" in options.exports:
        from latentize.run_compare import require_tensorrt

        require_tensorrt("--export tensorrt")


def dry_run(job: Job) -> None:
    """Print the plan, having checked everything that could fail at the end; writes nothing."""
    with job.steps.step("plan") as progress:
        prepared = conversion.prepare(
            job.source.model, job.survey.selected, job.options.recipe, job.batches[:_DRY_BATCHES], sweep=True,
            progress=progress,
        )  # fmt: skip
    run_export.check_checkpoints(job, prepared)
    with tempfile.TemporaryDirectory() as folder:
        run_export.original(job, Path(folder))
    _evaluate(job, job.source.model)
    terminal.print_plan(job.console, run_report.plans(prepared), run_report.spent(prepared, job.options.recipe))
    if prepared.forecast.curves:
        terminal.print_outlook(job.console, Outlook.of(prepared))
    staging.check_space(job.options.out, run_report.estimated_bytes(job.source.model, prepared, job.options))
    shared = run_report.shared_experts(prepared, job.options.recipe)
    notes = [_seen(job.batches), *_plan_warnings(job, prepared), *shared, f"would write {job.options.out}"]
    terminal.print_end(job.console, (), [*job.warnings, *notes], (), "")


def run(job: Job) -> None:
    """Convert, save, export, compare and report.

    Raises:
        GateError: an accuracy or agreement gate failed; OUT is written nevertheless, and says so.
    """
    kept = Checkpoints(job.options.out)
    marks = fingerprint(job.source.model, job.survey.selected_specs, job.options.recipe, job.batches)
    if job.options.resume and not kept.open(marks, resume=True):
        job.warnings.append("--resume: there was no interrupted run, so this one started from the beginning")
    elif not job.options.resume:
        kept.open(marks, resume=False)
    graph = run_export.original(job, kept.folder)
    before = _evaluate(job, job.source.model)
    prepared, started = _start(job, kept)
    spent = run_report.spent(prepared, job.options.recipe)
    terminal.print_plan(job.console, run_report.plans(prepared, started.specs), spent)
    terminal.print_end(job.console, (), _plan_warnings(job, prepared), (), "")
    staging.check_space(job.options.out, run_report.estimated_bytes(job.source.model, prepared, job.options))
    result, evaluation = _heal(job, kept, prepared, started, before)
    gates: list[Gate] = []
    with staging.staged(job.options.out) as folder:
        with job.steps.step("save"):
            result.write(folder)
        run_export.checkpoints(job, folder, result, gates)
        onnx = run_export.graphs(job, folder, graph, result, gates)
        measured = _compare(job, folder, prepared.teacher, result, evaluation, onnx, gates)
        with job.steps.step("report"):
            report = run_report.write(job, result, prepared, measured, folder)
    kept.clear()
    run_report.show(job.console, report, job.options.out)
    finds = f"; latentize compare {job.options.out} finds the block of a graph where it begins"
    require(gates, f"The report says by how much{finds if job.options.graphs else ''}")


@dataclass
class Measured:
    """What the comparison found; None where it was not measured."""

    evaluation: Evaluation | None
    outputs: Any
    loads: Mapping[str, tuple[ExpertLoad, ExpertLoad]]
    latency: tuple[Latency, ...]
    onnx: tuple[OnnxAgreement, ...] | None
    gates: tuple[Gate, ...]


def _start(job: Job, kept: Checkpoints) -> tuple[Prepared, Start]:
    recipe, model, selected = job.options.recipe, job.source.model, job.survey.selected
    statistics = None
    if job.batches and recipe.init == "activation":
        with job.steps.step("statistics") as progress:
            statistics = kept.stage(
                "statistics", dict[str, BlockStatistics],
                lambda: conversion.measure(conversion.canonical(model, selected), recipe, job.batches, progress),
            )  # fmt: skip
    with job.steps.step("plan") as progress:
        prepared = conversion.prepare(model, selected, recipe, job.batches, statistics=statistics, progress=progress)
        run_export.check_checkpoints(job, prepared)
    with job.steps.step("initialise") as progress:
        started = kept.stage("start", Start, lambda: conversion.begin(prepared, recipe, progress))
    return prepared.after_start(), started


def _heal(
    job: Job, kept: Checkpoints, prepared: Prepared, started: Start, before: Mapping[str, float]
) -> tuple[api.Result, Evaluation | None]:
    recipe, model = job.options.recipe, job.source.model
    student = conversion.rewrite(model, job.survey.selected, started.specs, started.refits)
    conversion.check_rewritten(student, job.source.args, job.source.kwargs)
    student = api.separate(student, job.batches, recipe)
    start = _evaluate(job, student.model)
    errors = kept.stage(
        "errors-initialised", dict[str, float],
        lambda: conversion.measure_errors(prepared.teacher, student, job.batches or job.example),
    )  # fmt: skip
    healing = None
    if job.batches and recipe.heal_steps != 0:
        with job.steps.step("heal") as progress:
            healing = api.heal_student(
                student, prepared.teacher, job.batches, recipe, progress=progress, checkpoint=kept.folder / "heal"
            )
    result = api.finish(model, job.survey, prepared, student, errors, healing, recipe, job.origin)
    if not before:
        return result, None
    after = _evaluate(job, student.model)
    return result, Evaluation(before, after, start)


def _evaluate(job: Job, model: Any) -> dict[str, float]:
    """The model's own evaluation; empty when there is none."""
    if job.source.evaluate is None:
        return {}
    with job.steps.step("evaluate"), observing(model):
        return job.source.evaluate(model)


def _compare(
    job: Job, folder: Path, teacher: Rewritten, result: api.Result, evaluation: Evaluation | None,
    onnx: tuple[OnnxAgreement, ...] | None, gates: list[Gate],
) -> Measured:  # fmt: skip
    from latentize import run_compare

    if evaluation is not None and job.options.max_loss is not None:
        gates.append(loss_gate(evaluation, job.options.max_loss))
    with job.steps.step("compare"):
        outputs = output_agreement(job.source.model, result.model, job.compared)
        before = expert_load(teacher.model, teacher.blocks, job.compared)
        after = expert_load(result.model, result.rewritten, job.compared)
    with job.steps.step("time"):
        latency = run_compare.latencies(job.source, job.source.model, result.model, folder)
    loads = {name: (before[name], after[name]) for name in after}
    return Measured(evaluation, outputs, loads, latency, onnx, tuple(gates))


def _require_blocks(options: Options, survey: Survey) -> None:
    if survey.selected:
        return
    if survey.left:
        name, why = next(iter(survey.left.items()))
        raise LatentizeError(
            f"the recipe selects none of the {len(survey.left)} blocks: {name}: {why}; change the patterns"
        )
    raise NothingToRewriteError(_nothing(options.model, [found.block for found in survey.found]))


def _nothing(model: str, blocks: Sequence[Block]) -> str:
    if not blocks:
        return f"{model}: no MoE block found; there is nothing to rewrite"
    refused = [f"{block.name}: {block.reason}" for block in blocks if block.status == "refused"]
    if len(refused) < len(blocks):
        return f"{model}: its blocks are latent already; there is nothing to rewrite"
    more = f"; and {len(refused) - 3} more" if len(refused) > 3 else ""
    return f"{model}: every block was refused: {'; '.join(refused[:3])}{more}"


def _seen(batches: Sequence[Batch]) -> str:
    seen = f"{min(len(batches), _DRY_BATCHES)} of {len(batches)} calibration batches" if batches else "no data"
    return f"errors are predicted from {seen}"


def _plan_warnings(job: Job, prepared: Prepared) -> list[str]:
    lines = [line for plan in prepared.plans.values() for line in plan.warnings]
    if not job.batches:
        lines.append("no calibration data: the weights decide alone and nothing is healed")
    return list(dict.fromkeys(lines))
