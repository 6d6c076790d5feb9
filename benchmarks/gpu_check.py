"""Everything that needs a GPU, in one command: is it right, and how fast is it?

    python benchmarks/gpu_check.py                    all of it (`make gpu-check`); ends with status 1 if a check fails
    python benchmarks/gpu_check.py --only forms sizes --no-times      in parts: results are added to those at hand
    python benchmarks/gpu_check.py --only --families 95BT-8BA
    python benchmarks/gpu_check.py --dry-run          on CPU in Triton's interpreter, tiny, nothing kept: does it run?

Writes results/gpu-DEVICE.json and .txt. Without a CUDA device it says so and ends with status 2.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
TOKENS = [1, 4, 16, 64, 128, 256, 1024, 4096, 16384]


def main() -> int:
    """Check, measure, print, keep; the exit status."""
    chosen = arguments()
    if chosen.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    import torch

    if not chosen.dry_run and not torch.cuda.is_available():
        print("gpu-check: no CUDA device here; run it on a machine with one (or --dry-run)", file=sys.stderr)
        return 2
    if importlib.util.find_spec("triton") is None:
        print("gpu-check: Triton is not installed: pip install 'latentize[triton]'", file=sys.stderr)
        return 2
    import gpu_correct
    import gpu_whole

    quick = chosen.dry_run
    dtypes = (torch.float32, torch.float16) if quick else (torch.float32, torch.bfloat16, torch.float16)
    where = gpu_correct.Where("cpu" if quick else "cuda", dtypes, quick)
    known = gpu_correct.CHECKS | gpu_whole.CHECKS
    if unknown := set(chosen.only or ()) - set(known):
        print(f"gpu-check: no check {sorted(unknown)[0]!r}: expected {', '.join(known)}", file=sys.stderr)
        return 2
    checks = []
    tuning = os.environ.get("LATENTIZE_TUNE")
    os.environ["LATENTIZE_TUNE"] = "0"  # for checks of many small shapes; times are taken tuned unless told otherwise
    names = list(known) if chosen.only is None else chosen.only
    for outcome in outcomes(where, {name: known[name] for name in names}):
        print(f"{outcome['outcome']:>7}  {outcome['check']}: {outcome['found']}", flush=True)
        checks.append(outcome)
    del os.environ["LATENTIZE_TUNE"]
    if tuning is not None:
        os.environ["LATENTIZE_TUNE"] = tuning
    record: dict[str, Any] = {
        "device": device_name(where.device), "commit": chosen.commit or commit(), "checks": checks, "times": [],
    }  # fmt: skip
    if not chosen.no_times:
        with torch.no_grad():
            record |= measured(where, chosen.tokens, chosen.families)
    record = keep(Path(chosen.output), record) if not chosen.no_keep else record
    print(page(record))
    return int(any(outcome["outcome"] == "failed" for outcome in checks))


def outcomes(where: Any, checks: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """Outcomes of the checks as they come; on a device each runs in a process of its own: they mostly compile."""
    from gpu_correct import run_check

    if where.quick or len(checks) < 2:
        yield from (run_check(name, check, where) for name, check in checks.items())
        return
    with ProcessPoolExecutor(min(len(checks), os.cpu_count() or 1), multiprocessing.get_context("spawn")) as pool:
        for done in as_completed([pool.submit(run_check, name, check, where) for name, check in checks.items()]):
            yield done.result()


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on CPU in Triton's interpreter")
    parser.add_argument("--only", nargs="*", metavar="CHECK", help="the checks to run; all by default")
    parser.add_argument("--families", nargs="+", help="the families of blocks to time; all by default")
    parser.add_argument("--tokens", type=int, nargs="+", default=None, metavar="T")
    parser.add_argument("--no-times", action="store_true", help="checks only")
    parser.add_argument("--no-keep", action="store_true", help="write no files")
    parser.add_argument("--output", default=None, help="folder for the results (benchmarks/results)")
    parser.add_argument("--commit", help="what is measured, where git cannot be asked")
    chosen = parser.parse_args()
    chosen.tokens = chosen.tokens or ([1, 3] if chosen.dry_run else TOKENS)
    chosen.no_keep = chosen.no_keep or (chosen.dry_run and chosen.output is None)
    chosen.output = chosen.output or str(Path(__file__).resolve().parent / "results")
    return chosen


def measured(where: Any, tokens: list[int], families: Sequence[str] | None) -> dict[str, Any]:
    """Times of the families, with the device's measured peaks."""
    import torch
    from gpu_speed import FAMILIES, TINY, calls_of, measure, overlap, peaks
    from gpu_warm import compile_ahead

    dtype = torch.float32 if where.quick else torch.bfloat16
    if not where.quick:
        start = time.perf_counter()
        number = compile_ahead(call for family in families or FAMILIES for call in calls_of(family, tokens, dtype))
        print(f"{number} kernels compiled in {time.perf_counter() - start:.0f} s", flush=True)
    copied, gemm = peaks(where, dtype)
    times: list[dict[str, Any]] = []
    for family in families or (TINY if where.quick else FAMILIES):
        start = time.perf_counter()
        times += measure(family, tokens, where, dtype, copied, gemm)
        print(f"{family}: measured in {time.perf_counter() - start:.0f} s", flush=True)
        if where.device != "cpu":
            torch.cuda.empty_cache()
    if where.device != "cpu" and not families:
        times += overlap(where, dtype, [t for t in tokens if t <= 256])
    return {"peaks": {"copy_gb_s": copied / 1e9, "gemm_tflop_s": gemm / 1e12}, "times": times}


def requirements(times: Sequence[Row]) -> list[dict[str, Any]]:
    """What was asked for, what was measured, and whether it was met; only what the rows can answer."""
    found = {(r["family"], r["block"], r["form"], r["tokens"]): r for r in times}
    answers: list[dict[str, Any]] = []

    def ask(what: str, value: float, limit: float, *, at_least: bool = True) -> None:
        met = value >= limit if at_least else value <= limit
        answers.append({"what": what, "required": limit, "measured": value, "met": met})

    for (family, block, form, tokens), r in found.items():
        if r.get("error") is not None:
            what = f"{family}, {block}, {form}, T = {tokens}: relative error against fp64"
            ask(what, r["error"], r["tolerance"], at_least=False)
        rival = found.get((family, block, "experts grouped_mm", tokens))
        if form != "experts ours" or rival is None or block == "original":
            continue
        name = f"{family}, {block}, T = {tokens}: "
        if tokens <= 16:
            ask(name + "experts' fraction of copy bandwidth", r["bandwidth"], 0.8)
            ask(name + "experts' fraction of the rate of a copy of as many bytes", r["copied"], 0.8)
            ask(name + "experts, times as fast as grouped_mm", rival["us"] / r["us"], 1.3)
        elif tokens >= 4096:
            ask(name + "experts' fraction of GEMM rate", r["gemm"], 0.6)
            ask(name + "experts, times as fast as grouped_mm", rival["us"] / r["us"], 1.0)
    for tokens, limit in ((1, 1.12), (4, 1.12), (16, 1.06), (64, 1.06), (128, 1.06)):
        pair = [found.get(("95BT-8BA", block, "block ours", tokens)) for block in ("acc, alpha 4", "original")]
        if None not in pair:
            over = pair[0]["us"] / pair[1]["us"]
            ask(f"95BT-8BA, T = {tokens}: time of acc, alpha 4 over the original's", over, limit, at_least=False)
    pair = [found.get(("95BT-8BA", block, "experts ours", 1)) for block in ("original", "eff, alpha 4")]
    if None not in pair:
        ask("95BT-8BA, T = 1: eff, routed path, times as fast as the original's", pair[0]["us"] / pair[1]["us"], 2.5)
    return answers


def page(record: Mapping[str, Any]) -> str:
    """The record as text: peaks, times, latent against original, requirements, outcomes."""
    from measured import table

    parts = [f"{record['device']}, commit {record['commit']}"]
    if record["times"]:
        parts[0] += "; measured copy {copy_gb_s:.0f} GB/s, GEMM {gemm_tflop_s:.1f} TFLOP/s".format(**record["peaks"])
        columns = {"family": "", "block": "", "form": "", "tokens": "", "us": ".1f", "mode": "", "bandwidth": ".2f",
                   "gemm": ".2f"}  # fmt: skip
        parts += [table(record["times"], columns), table(ratios(record["times"]), RATIOS)]
    if asked := requirements(record["times"]):
        parts.append(table(asked, {"what": "", "required": ".3g", "measured": ".3g", "met": ""}))
    outcomes = [check["outcome"] for check in record["checks"]]
    parts.append("checks: " + ", ".join(f"{outcomes.count(name)} {name}" for name in ("ok", "failed", "skipped")))
    return "\n\n".join(parts)


RATIOS = {"family": "", "block": "", "tokens": "", "original_us": ".1f", "latent_us": ".1f", "speedup": ".2f",
          "against_grouped_mm": ".2f"}  # fmt: skip


def ratios(times: Sequence[Row]) -> list[dict[str, Any]]:
    """Every latent block against its original, both by the operator, and against itself by torch's grouped product."""
    us = {(r["family"], r["block"], r["form"], r["tokens"]): r["us"] for r in times}
    rows = []
    for (family, block, form, tokens), value in us.items():
        if form != "block ours" or block == "original":
            continue
        original = us.get((family, "original", form, tokens))
        rows.append({
            "family": family, "block": block, "tokens": tokens, "original_us": original, "latent_us": value,
            "speedup": original and original / value,
            "against_grouped_mm": us[family, block, "block grouped_mm", tokens] / value,
        })  # fmt: skip
    return rows


def commit() -> str:
    """The commit that is checked out, marked where files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude", "*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def device_name(device: str) -> str:
    """The device in words."""
    import torch

    return "CPU (interpreter)" if device == "cpu" else torch.cuda.get_device_name()


def keep(folder: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Write both files, named after the device; what they held from earlier runs stays unless measured again."""
    import torch
    import triton

    from latentize.report import Environment

    name = "gpu-" + re.sub(r"[^a-z0-9]+", "-", record["device"].lower()).strip("-")
    path = folder / f"{name}.json"
    old = json.loads(path.read_text()) if path.exists() else {}
    versions = {"triton": triton.__version__, "cuda": torch.version.cuda}
    for row in (*record["checks"], *record["times"]):
        row["commit"] = record["commit"]
    merged = {
        **old, **record,
        "checks": merge(old.get("checks", []), record["checks"], ("check",)),
        "times": merge(old.get("times", []), record["times"], ("family", "block", "form", "tokens")),
        "environment": {**asdict(Environment.here()), **versions},
    }  # fmt: skip
    merged["requirements"] = requirements(merged["times"])
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(merged, indent=1, ensure_ascii=False) + "\n")
    path.with_suffix(".txt").write_text(page(merged) + "\n")
    print(f"written: {path} and .txt")
    return merged


def merge(old: Sequence[Row], new: Sequence[Row], key: Sequence[str]) -> list[Row]:
    """The old rows with the new ones in place of those that agree with them in `key`."""
    replaced = {tuple(row[column] for column in key) for row in new}
    return [row for row in old if tuple(row[column] for column in key) not in replaced] + list(new)


if __name__ == "__main__":
    sys.exit(main())
