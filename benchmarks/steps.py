"""Time and peak memory of each step of a conversion, without healing.

    python benchmarks/steps.py                                    the sample language model, compression 2
    python benchmarks/steps.py samples/plain_moe.py --compression 4
    python benchmarks/steps.py --large --batches 2                a random model, large beside what any model takes
    python benchmarks/steps.py benchmarks/large_moe.py:build_larger_model --batches 2       four times as large

Peak memory is what the process held at most during the step above what it held before it, beside the model's own
bytes; the promise is twice the model plus one block. Linux only: the high-water mark is reset before each step.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measured import keep, table

import latentize
from latentize.sources import open_model

SAMPLE = Path(__file__).resolve().parents[1] / "samples" / "stdlib_lm.py"
LARGE = Path(__file__).resolve().parent / "large_moe.py"
KEY = ("model", "compression", "variant", "step")
COLUMNS = {"step": "", "seconds": ".2f", "peak_mib": ",.0f", "peak_over_model": ".1f"}


def main() -> None:
    """Run the steps one after the other, print the table, keep the rows."""
    options = _options()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    rows = _Rows()
    source = rows.measure("load", lambda: open_model(options.model))
    model, args, kwargs = source.model, source.args, source.kwargs
    given = source.calibration() if source.calibration is not None else ()
    calibration = list(itertools.islice(given, options.batches)) or None
    recipe = latentize.Recipe(compression=options.compression, variant=options.variant, heal_steps=0)
    weights = recipe.model_copy(update={"init": "weights"})
    rows.measure("inspect", lambda: latentize.inspect(model, args, kwargs))
    rows.measure("convert, weights alone", lambda: latentize.convert(model, args, kwargs, weights))
    result = rows.measure("convert, with data", lambda: latentize.convert(model, args, kwargs, recipe, calibration))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        rows.measure("save", lambda: result.save(out))
        rows.measure("load again", lambda: latentize.load(out))
    size = sum(t.nbytes for t in itertools.chain(model.parameters(), model.buffers()))
    shared = {"model": Path(options.model).name, "compression": options.compression, "variant": options.variant}
    done = [{**shared, **row, "peak_over_model": row["peak_mib"] * 2**20 / size} for row in rows.rows]
    keep("steps", done, KEY)
    print(f"{options.model}: {size / 2**20:.1f} MiB of parameters and buffers, {len(result.plan)} blocks rewritten\n")
    print(table(done, COLUMNS))


class _Rows:
    """Time and memory of each step as they are run."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def measure(self, step: str, run: Callable[[], Any]) -> Any:
        """What `run` returns."""
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        before, begin = _memory("VmRSS"), time.perf_counter()
        value = run()
        seconds = time.perf_counter() - begin
        self.rows.append({"step": step, "seconds": seconds, "peak_mib": (_memory("VmHWM") - before) / 2**10})
        return value


def _memory(name: str) -> int:
    """A field of /proc/self/status, kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--large", action="store_true", help=f"convert {LARGE.name}")
    parser.add_argument("--compression", type=float, default=2.0)
    parser.add_argument("--variant", default="acc")
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    options.model = options.model or str(LARGE if options.large else SAMPLE)
    return options


if __name__ == "__main__":
    main()
