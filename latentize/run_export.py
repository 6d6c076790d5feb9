"""The exports of a run: graphs and checkpoints, what would stop them looked for before the long work."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from latentize import api, conversion
from latentize.compare import Gate
from latentize.compare_inputs import own_length
from latentize.conversion import Prepared
from latentize.errors import GateError, LatentizeError
from latentize.exporters.onnx_choice import REQUESTS
from latentize.exporters.tensorrt_profiles import Profile, choose
from latentize.inputs import Inputs
from latentize.plan import make_plan
from latentize.report import OnnxAgreement

if TYPE_CHECKING:
    from latentize.run import Job


def original(job: Job, folder: Path) -> Path | None:
    """The original's graph, exported and run before the long work: what stops it would stop the rewritten model's too.

    Checkpoints that were asked for are looked at here too, as far as sizes and routing decide, and profiles.

    Raises:
        LatentizeError: the model cannot be exported, or not with what was asked for.
        GateError: onnxruntime cannot run the graph at some length, or returns other shapes.
    """
    if job.options.graphs:
        _profiles(job)
    if job.options.checkpoints:
        from latentize.exporters import nemotron_h

        specs = conversion.canonical(job.source.model, job.survey.selected).specs
        nemotron_h.check(job.source.model, specs, make_plan(specs, job.options.recipe))
    if not job.options.graphs:
        return None
    from latentize import run_onnx

    with job.steps.step("export"):
        canonical = conversion.canonical(job.source.model, job.survey.selected)
        profiles = run_onnx.profiles_of(job.options.recipe)
        recipe, form = job.options.recipe, job.options.onnx_form
        left_to_us = form in REQUESTS
        own = form if left_to_us else "auto"  # the graph to compare with is as fast as it can be
        path = run_onnx.export_original(job.source, canonical.model, folder, own, profiles)
        if recipe.dtype is not None or not left_to_us:
            specs = {name: conversion.in_dtype(spec, recipe) for name, spec in canonical.specs.items()}
            trial = conversion.rewrite(job.source.model, job.survey.selected, specs)
            run_onnx.check_in_form(job.source, trial.model, "auto" if left_to_us else form, folder)
        notes: list[str] = []
        job.onnx = run_onnx.agreement("original", path, canonical.model, job.source, notes)
        if any(math.isinf(row.relative_error) for row in job.onnx):
            said = f"{path.name}: "
            why = next(note for note in notes if said in note).split(said, 1)[1]
            raise GateError(f"the original's graph: {why}; the rewritten one's would too")
        job.warnings.extend(notes)
        return path


def check_checkpoints(job: Job, prepared: Prepared) -> None:
    """Raise the LatentizeError of what a checkpoint that was asked for has no room for."""
    if job.options.checkpoints:
        from latentize.exporters import nemotron_h

        nemotron_h.check(job.source.model, prepared.teacher.specs, prepared.plans)


def checkpoints(job: Job, folder: Path, result: api.Result, gates: list[Gate]) -> None:
    """Each asked-for checkpoint in a folder of its name; how well it agrees joins `gates`."""
    for name in job.options.checkpoints:
        from latentize.exporters import nemotron_h

        with job.steps.step("checkpoint"):
            inputs = Inputs(job.source.args, job.source.kwargs)
            agreement = nemotron_h.write(
                folder / name, result.model, result.rewritten, inputs, per_expert=name.endswith("-hub"), assets=folder
            )
            gates.append(Gate.of_agreement(f"{name} in transformers", agreement.error, agreement.tolerance))


def _profiles(job: Job) -> tuple[Profile, ...]:
    """What engines take: the recipe's profiles, which must fit the model, or the usual one, cut to fit."""
    return choose((), job.options.recipe.model_dump()["profiles"], own_length(job.source.model))


def graphs(
    job: Job, folder: Path, graph: Path | None, result: api.Result, gates: list[Gate]
) -> tuple[OnnxAgreement, ...] | None:
    """The rewritten model's graph, and engines where asked for; how well both graphs agree with PyTorch joins `gates`.

    `graph` is the original's, made by `original`; None where no graph was asked for.
    """
    if graph is None:
        return None
    from latentize import run_onnx

    with job.steps.step("export"):
        for file in graph.parent.glob(graph.name + "*"):
            shutil.copyfile(file, folder / file.name)
        form = job.options.onnx_form
        made = run_onnx.export_rewritten(job.source, result.model, job.options.recipe, result.blocks, folder, form)
        job.forms.extend(made.choices)
        if made.problem:
            job.warnings.append(made.problem)
        rows = job.onnx + run_onnx.agreement("rewritten", made.path, result.model, job.source, job.warnings)
    if "tensorrt" in job.options.exports:
        from latentize.exporters import tensorrt

        with job.steps.step("engine") as progress:
            try:
                strict = bool(job.options.recipe.profiles)
                job.engines.extend(tensorrt.build(folder, profiles=_profiles(job), strict=strict, progress=progress))
            except LatentizeError as error:  # what was converted is kept, and the command fails
                job.warnings.append(str(error).replace(str(folder), str(job.options.out)))
                gates.append(Gate.unmade("TensorRT engine"))
    for r in rows:
        title = "ONNX against PyTorch" if r.backend == run_onnx.ONNXRUNTIME else f"{r.backend} against PyTorch"
        gates.append(Gate.of_agreement(f"{title}, {r.model}, T = {r.tokens}", r.relative_error, r.tolerance))
    return tuple(rows)
