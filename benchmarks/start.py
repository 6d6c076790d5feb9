"""Bits per byte of the sample language model after conversion, per compression, variant and initialiser.

    python benchmarks/start.py                          every start, without healing (minutes)
    python benchmarks/start.py --heal                   healed for as many steps as latentize chooses (an hour)
    python benchmarks/start.py --compression 4 --variant acc --init activation --heal 400
    python benchmarks/start.py --init activation --bypass 0 16 32       with a bypass of these ranks

Rows of earlier runs stay in benchmarks/results/start.json; a row measured again replaces its old self.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "samples"))

import stdlib_lm
import torch
from measured import keep_each

import latentize

#: Calibration batches of 16 x 128 bytes: enough for the second moments; healing takes all of them.
START_BATCHES = 16
KEY = ("compression", "variant", "init", "heal", "seed", "bypass")
COLUMNS = {
    "compression": "g", "variant": "", "init": "", "heal": "", "seed": "d", "bypass": "d", "original": ".4f",
    "bits_per_byte": ".4f", "rise_percent": "+.2f", "block_error": ".3f", "weight_bytes": ",d", "bypass_bytes": ",d",
    "seconds": ".0f",
}  # fmt: skip


def main() -> None:
    """Measure what the arguments ask for, print the table, keep the rows."""
    options = _options()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    original = stdlib_lm.evaluate(stdlib_lm.build_model())["bits per byte"]
    keep_each("start", _rows(options, original), KEY, COLUMNS)


def _rows(options: argparse.Namespace, original: float) -> Iterator[dict[str, Any]]:
    for compression, variant, init, seed, bypass in itertools.product(
        options.compression, options.variant, options.init, options.seed, options.bypass
    ):
        recipe = latentize.Recipe(
            compression=compression, variant=variant, init=init, seed=seed, heal_steps=options.heal_steps, bypass=bypass
        )
        yield {"heal": options.heal_name} | _measure(recipe, original)


def _measure(recipe: latentize.Recipe, original: float) -> dict[str, Any]:
    """Convert a fresh model by the recipe and evaluate it."""
    batches = stdlib_lm.calibration_data(recipe.seed)
    calibration = list(itertools.islice(batches, START_BATCHES) if recipe.heal_steps == 0 else batches)
    model = stdlib_lm.build_model()
    begin = time.perf_counter()
    result = latentize.convert(model, kwargs=stdlib_lm.example_inputs(), recipe=recipe, calibration=calibration)
    seconds = time.perf_counter() - begin
    after = stdlib_lm.evaluate(result.model)["bits per byte"]
    last = [e.healed_end_to_end if e.healed_end_to_end is not None else e.initialised for e in result.errors.values()]
    return {
        "compression": recipe.compression,
        "variant": recipe.variant,
        "init": recipe.init,
        "seed": recipe.seed,
        "bypass": recipe.bypass,
        "original": original,
        "bits_per_byte": after,
        "rise_percent": 100 * (after / original - 1),
        "block_error": sum(error for error in last if error is not None) / len(last),
        "weight_bytes": sum(
            plan.expert_bytes_after + plan.projection_bytes + plan.bypass_bytes for plan in result.plan.values()
        ),
        "bypass_bytes": sum(plan.bypass_bytes for plan in result.plan.values()),
        "seconds": seconds,
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compression", type=float, nargs="+", default=[2.0, 4.0])
    parser.add_argument("--variant", nargs="+", default=["acc", "eff", "fixed"])
    parser.add_argument("--init", nargs="+", default=["activation", "weights"])
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--heal", nargs="?", const="chosen", default="0", help="steps; alone: as latentize chooses")
    parser.add_argument("--bypass", type=int, nargs="+", default=[0], help="ranks of a bypass; 0 for none")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    options.heal_name = options.heal
    options.heal_steps = None if options.heal == "chosen" else int(options.heal)
    return options


if __name__ == "__main__":
    main()
