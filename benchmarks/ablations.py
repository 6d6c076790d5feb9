"""The LatentMoE paper's ablations at the sample's scale, as conversions: compression, more experts, what they buy.

    python benchmarks/ablations.py                               the sweep without healing (tens of CPU minutes)
    python benchmarks/ablations.py --compression 2 --variant fixed eff
    python benchmarks/ablations.py --heal 400                    the same, healed (hours)
    python benchmarks/ablations.py --part router                 the router at width d against width l
    python benchmarks/ablations.py --part auto                   a width for each block at the bytes of one for all
    python benchmarks/ablations.py --part predict                what the plan says of the rows that are there
    python benchmarks/ablations_page.py                          docs/ablations.md from the rows that are there

Rows of earlier runs stay in benchmarks/results/ablations.json; a row measured again replaces its old self.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from measured import RESULTS, keep, table
from teacher import Teacher, bits, dispatched_per_token, stdlib_lm, weights_per_token

from latentize import conversion
from latentize.conversion import Prepared
from latentize.initialise import fit_output, initialise
from latentize.projections import metric, reconstruction, shrink
from latentize.recipe import Recipe
from latentize.reference import experts_forward, router_forward
from latentize.routing import Routing
from latentize.spec import MoESpec
from latentize.statistics import BlockStatistics

Row = dict[str, Any]
KEY = ("compression", "variant", "router", "heal", "seed")
COLUMNS = {
    "compression": "g", "variant": "", "router": "", "heal": "", "bits_per_byte": ".4f", "rise_percent": "+.2f",
    "block_error": ".3f", "divergence": ".4f", "predicted_divergence": ".4f", "weight_bytes": ",d",
    "dispatch_bytes": ",d",
}  # fmt: skip


def main() -> None:
    """Measure what the arguments ask for, print the table, keep the rows."""
    options = _options()
    torch.set_num_threads(options.threads)
    stdlib_lm.EVALUATION_WINDOWS = options.windows
    teacher = Teacher.load(options.seed)
    for row in itertools.chain.from_iterable(PARTS[part](teacher, options) for part in options.part):
        print(table([row], COLUMNS).splitlines()[-1], flush=True)
        keep("ablations", [row], KEY)


def _sweep(teacher: Teacher, options: argparse.Namespace) -> Iterator[Row]:
    """Every compression and variant; where a variant multiplies by one it is "fixed" and measured once."""
    for compression, variant in itertools.product(options.compression, options.variant):
        if compression < 2 and variant != "fixed":
            continue
        recipe = Recipe(compression=compression, variant=variant, seed=options.seed, heal_steps=options.heal_steps)
        yield _converted(teacher, recipe, options) | {"compression": compression}


def _auto(teacher: Teacher, options: argparse.Namespace) -> Iterator[Row]:
    """A width for each block, at the bytes of each compression above 1; "fixed" is what to hold it against."""
    for compression in options.compression:
        if compression > 1:
            budget = {"bytes": 1 / compression}
            recipe = Recipe(compression="auto", budget=budget, seed=options.seed, heal_steps=options.heal_steps)
            yield _converted(teacher, recipe, options) | {"compression": compression, "variant": "auto"}


def _router(teacher: Teacher, options: argparse.Namespace) -> Iterator[Row]:
    """The router reads x, or what the down-projection keeps of it: R P x in place of x, R the best linear guess.

    N and k stay. Blocks are started all at once; either way the output side is then fitted to the routing there is.
    """
    for compression in options.compression:
        recipe = Recipe(compression=compression, variant="fixed", seed=options.seed, heal_steps=options.heal_steps)
        prepared = teacher.prepare(recipe)
        with conversion.workspace():
            starts = {
                name: initialise(block.spec, prepared.plans[name], teacher.statistics[name], seed=recipe.seed)
                for name, block in teacher.blocks.blocks.items()
            }
        for width in ("d", "l") if compression > 1 else ():
            with conversion.workspace():
                specs = {
                    name: _rerouted(start, teacher.blocks.blocks[name].spec, teacher.statistics[name], width)
                    for name, start in starts.items()
                }
            row = _measured(teacher, prepared, specs, recipe, options)
            yield row | {"compression": compression, "variant": "fixed, at once", "router": width}


def _rerouted(start: MoESpec, original: MoESpec, statistics: BlockStatistics, width: str) -> MoESpec:
    """`start` with a router that reads at width d or l, and the output side fitted to what it then chooses."""
    sample, latent = statistics.sample, start.latent
    assert latent is not None
    router = start.router
    if width == "l":
        moment = sample.hidden.double().T @ sample.hidden.double() / len(sample.hidden)
        guess = reconstruction(latent.down.double(), shrink(moment, len(sample.hidden)))
        weight = router.weight.double() @ guess @ latent.down.double()
        router = replace(router, weight=weight.to(router.weight.dtype))
    moved = replace(start, router=router)
    routing = Routing(sample.hidden.new_empty(0), sample.weights, sample.indices)
    target = experts_forward(original, sample.hidden, routing)
    even = sample.hidden.new_ones(len(sample.hidden), 1)
    importance = metric(statistics.sensitivity, original.hidden_size)
    return fit_output(moved, original, sample.hidden, router_forward(moved, sample.hidden), target, importance, even)


def _converted(teacher: Teacher, recipe: Recipe, options: argparse.Namespace) -> Row:
    """A conversion by the recipe, measured."""
    prepared = teacher.prepare(recipe)
    with conversion.workspace():
        specs = conversion.start(prepared, recipe)
    return _measured(teacher, prepared, specs, recipe, options)


def _measured(
    teacher: Teacher, prepared: Prepared, specs: dict[str, MoESpec], recipe: Recipe, options: argparse.Namespace
) -> Row:
    """A student of these blocks, healed as asked and measured."""
    student = teacher.student(specs, recipe)
    errors, score = teacher.errors(student), bits(student.model)
    plans = prepared.plans
    return {
        "compression": recipe.compression,
        "variant": recipe.variant,
        "router": "d",
        "heal": options.heal,
        "seed": options.seed,
        "windows": options.windows,
        "original": teacher.bits,
        "bits_per_byte": score,
        "rise_percent": 100 * (score / teacher.bits - 1),
        "divergence": teacher.divergence(student),
        "predicted_divergence": sum(plan.predicted_loss or 0.0 for plan in plans.values()),
        "block_error": sum(errors.values()) / len(errors),
        "errors": errors,
        "predicted": {name: plan.predicted_error for name, plan in plans.items()},
        "latent_dim": {name: plan.latent_dim for name, plan in plans.items()},
        "weight_bytes": weights_per_token(plans),
        "dispatch_bytes": dispatched_per_token(plans),
    }


def _predict(teacher: Teacher, options: argparse.Namespace) -> Iterator[Row]:
    """Rows that are there already, with what the plan predicts of them now; nothing is converted."""
    swept = teacher.swept
    for row in json.loads((RESULTS / "ablations.json").read_text())["rows"]:
        if row["variant"] in ("acc", "eff", "fixed") and (row["heal"], row["seed"]) == ("0", options.seed):
            curves, widths = swept.forecast.curves, row["latent_dim"]
            total = sum(curves[name].loss_at(width) or 0.0 for name, width in widths.items())
            yield row | {
                "predicted": {name: curves[name].error_at(width) for name, width in widths.items()},
                "predicted_divergence": swept.forecast.together(total),
            }


PARTS = {"sweep": _sweep, "auto": _auto, "router": _router, "predict": _predict}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compression", type=float, nargs="+", default=[1.0, 4 / 3, 2.0, 4.0, 8.0])
    parser.add_argument("--part", nargs="+", choices=list(PARTS), default=["sweep"])
    parser.add_argument("--variant", nargs="+", default=["fixed", "eff", "acc"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--heal", default="0", help='steps, or "chosen"')
    parser.add_argument("--windows", type=int, default=1024, help="of evaluation text; fewer are faster")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    options.heal_steps = None if options.heal == "chosen" else int(options.heal)
    return options


if __name__ == "__main__":
    main()
