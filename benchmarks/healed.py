"""How close healing comes from one start, by what it reads and what it trains: the sample language model, one seed.

    python benchmarks/healed.py --compression 4 --variant fixed --own-share 0 0.5 1        block-wise stage (minutes)
    python benchmarks/healed.py --compression 2 --variant acc --heal-train latent all --model-steps 400

Distances are in nats per byte from the original on the held-out calibration batches, at the start, after the block-wise
stage and at the end; the rise is in bits per byte on the evaluation text. Rows stay in benchmarks/results/healed.json.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "samples"))

import stdlib_lm
import torch
from measured import keep_each

from latentize import conversion
from latentize.apart import apart
from latentize.heal import HealPlan, heal
from latentize.recipe import Recipe

KEY = ("compression", "variant", "seed", "block_steps", "model_steps", "heal_train", "own_share")
COLUMNS = {
    "compression": "g", "variant": "", "block_steps": "d", "model_steps": "d", "heal_train": "", "own_share": "g",
    "start": ".4f", "after_blocks": ".4f", "end": ".4f", "rise": ".4f", "cpu_seconds": ".0f",
}  # fmt: skip


def main() -> None:
    """Heal from one start as often as the arguments ask for, print the table, keep the rows."""
    options = _options()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    keep_each("healed", _rows(options), KEY, COLUMNS)


def _rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    recipe = Recipe(compression=options.compression, variant=options.variant, seed=options.seed)
    model, batches = stdlib_lm.build_model(), list(stdlib_lm.calibration_data(options.seed))
    original = stdlib_lm.evaluate(model)["bits per byte"]
    survey = conversion.survey(model, (), stdlib_lm.example_inputs(), recipe)
    with conversion.workspace():
        prepared = conversion.prepare(model, survey.selected, recipe, batches)
        specs = conversion.start(prepared, recipe)
    for train, share in itertools.product(options.heal_train, options.own_share):
        begin = _cpu()
        with conversion.workspace():
            fresh = {name: spec.map_tensors(torch.clone) for name, spec in specs.items()}
            student = conversion.rewrite(model, survey.selected, fresh)
            student = student if train == "latent" else apart(student)
            plan = HealPlan(options.block_steps, options.model_steps, own_share=share, train=train)
            teacher = prepared.teacher
            report = heal(
                student.model, teacher.model, student.blocks, teacher.blocks, batches, steps=plan, seed=options.seed
            )
        seconds = _cpu() - begin
        yield {
            "compression": options.compression,
            "variant": options.variant,
            "seed": options.seed,
            "block_steps": options.block_steps,
            "model_steps": options.model_steps,
            "heal_train": train,
            "own_share": share,
            "start": report.loss_before,
            "after_blocks": report.loss_after_blocks,
            "end": report.loss_after,
            "rise": stdlib_lm.evaluate(student.model)["bits per byte"] - original,
            "cpu_seconds": seconds,
            "notes": list(report.notes),
        }


def _cpu() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compression", type=float, default=2.0)
    parser.add_argument("--variant", default="acc")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--block-steps", type=int, default=100)
    parser.add_argument("--model-steps", type=int, default=100)
    parser.add_argument("--heal-train", choices=["latent", "all"], nargs="+", default=["latent"])
    parser.add_argument("--own-share", type=float, nargs="+", default=[0.0])
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
