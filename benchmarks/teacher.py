"""The sample language model, surveyed and measured once, for benchmarks that convert it many times."""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "samples"))

import stdlib_lm
from torch import nn

from latentize import conversion
from latentize.api import heal_student
from latentize.compare import output_agreement
from latentize.conversion import Prepared, Rewritten, Survey
from latentize.plan import BlockPlan, make_plan
from latentize.recipe import Recipe
from latentize.spec import MoESpec
from latentize.statistics import BlockStatistics

#: Calibration batches of 16 x 128 bytes that the start is computed from; healing takes all 400.
START_BATCHES = 16


@dataclass(frozen=True)
class Teacher:
    """The model, its blocks in canonical form, and what the calibration batches say about them."""

    model: nn.Module
    survey: Survey
    batches: list[Any]
    blocks: Rewritten
    statistics: Mapping[str, BlockStatistics]
    bits: float  # per byte, of the original

    @classmethod
    def load(cls, seed: int = 0, *, evaluate: bool = True) -> Teacher:
        """Open, survey and measure the model."""
        logging.getLogger("transformers").setLevel(logging.ERROR)
        model = stdlib_lm.build_model()
        survey = conversion.survey(model, (), stdlib_lm.example_inputs(), Recipe())
        batches = list(itertools.islice(stdlib_lm.calibration_data(seed), START_BATCHES))
        with conversion.workspace():
            blocks = conversion.canonical(model, survey.selected)
            statistics = conversion.measure(blocks, Recipe(seed=seed), batches)
        return cls(model, survey, batches, blocks, statistics, bits(model) if evaluate else float("nan"))

    def prepare(self, recipe: Recipe) -> Prepared:
        """The plan of a recipe, on predictions that are made once for all."""
        specs = self.blocks.specs
        plans = make_plan(specs, recipe, self.statistics, self.swept.forecast)
        return replace(self.swept, plans=plans)

    @cached_property
    def swept(self) -> Prepared:
        """What is known before a plan, with predictions over the whole range of widths."""
        with conversion.workspace():
            return conversion.prepare(
                self.model, self.survey.selected, Recipe(variant="fixed"), self.batches, statistics=self.statistics,
                sweep=True,
            )  # fmt: skip

    def student(self, specs: Mapping[str, MoESpec], recipe: Recipe | None = None) -> Rewritten:
        """The model with the given blocks; healed where a recipe asks for steps."""
        with conversion.workspace():
            student = conversion.rewrite(self.model, self.survey.selected, specs)
        if recipe is not None:
            self.heal(student, recipe)
        return student

    def heal(self, student: Rewritten, recipe: Recipe) -> None:
        """Heal a student in place for the steps of a recipe, which may be none."""
        if recipe.heal_steps != 0:
            with conversion.workspace():
                heal_student(student, self.blocks, list(stdlib_lm.calibration_data(recipe.seed)), recipe)

    def errors(self, student: Rewritten) -> dict[str, float]:
        """Relative error of each block on the original's own inputs, as a conversion measures it."""
        with conversion.workspace():
            return conversion.measure_errors(self.blocks, student, self.batches)

    def divergence(self, student: Rewritten) -> float | None:
        """KL from the original's predictions in nats per byte, on the batches that errors are measured on."""
        with conversion.workspace():
            batches = self.batches[: conversion.ERROR_BATCHES]
            return output_agreement(self.model, student.model, batches).kl_mean


def bits(model: nn.Module) -> float:
    """Bits per byte on the evaluation text."""
    return stdlib_lm.evaluate(model)["bits per byte"]


def weights_per_token(plans: Mapping[str, BlockPlan]) -> int:
    """Bytes of expert weights read for one token, over all blocks; projections are not counted."""
    return sum(plan.expert_bytes_after for plan in plans.values())


def dispatched_per_token(plans: Mapping[str, BlockPlan]) -> int:
    """Bytes that travel to the experts and back for one token, over all blocks."""
    return sum(plan.dispatched_bytes_after for plan in plans.values())
