"""Every MoE family of the installed transformers, tiny and random: lifted, latent, refused with a reason, or an error.

    python benchmarks/coverage.py [--only REGEX] [--write docs/coverage.md]

A lifted model is rewritten at full width with twice the experts and compared with the original on fresh inputs: a
difference is counted as wrong. The number of MoE layers a model has is counted by the names of its classes, which the
package itself never looks at.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import logging
import multiprocessing
import re
import resource
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "passes"))
import hf  # noqa: E402

import latentize  # noqa: E402

#: Largest relative error of a rewritten fp32 model at which the rewrite counts as exact.
TOLERANCE = 1e-4
#: Address space that one family may take, in bytes.
MEMORY = 12 * 2**30
#: MoE layers of a tiny model where class names do not tell: vision experts that text never reaches, lists in lists.
LAYERS = {"jetmoe": 2, "ernie4_5_vl_moe_text": 2, "doge": 2, "nllb-moe": 2, "vitpose_backbone": 2}
#: Why a family is rightly refused, beyond the reason that the package gives.
JUSTIFIED = {
    "doge": "product-key retrieval over expert embeddings: no routed feed-forward",
    "muse_spark_text": "its experts work at a latent width, with norms before and after them",
    "phimoe": "sparsemixer routing: weights come from two masked softmaxes, not from softmax and top-k",
    "nllb-moe": "as shipped it does not compute its top-2 mixture",
    "deepseek_v4": "its first layers choose experts by a table of token ids",
    "inkling_text": "the shared experts' gates take part in the normaliser of the selected weights",
    "inkling2_text": "tanh softcaps inside the GLU",
    "zaya": "the router is an MLP with a state carried from layer to layer",
    "jetmoe": "its attention layers route projections with the same router class",
    "vitpose_backbone": "experts are chosen by a data-set index that the caller gives; there is no router",
}


@dataclass(frozen=True)
class Row:
    """What became of one family."""

    family: str
    verdict: str
    layers: int
    found: int
    error: float | None
    seconds: float
    note: str


def count_layers(family: str, model: nn.Module) -> int:
    """MoE layers that example inputs run, by class name: modules that hold stacked experts, or lists of them."""
    if family in LAYERS:
        return LAYERS[family]
    named = [name for name, m in model.named_modules() if re.search(r"Experts$|NaiveMoe$", type(m).__name__)]
    lists = [name for name, m in model.named_modules() if name.endswith("experts") and isinstance(m, nn.ModuleList)]
    return len({*named, *lists})


@torch.no_grad()
def look_at(family: str) -> Row:
    """Inspect, convert and compare one family."""
    start, layers = time.process_time(), 0
    try:
        make = functools.partial(hf.build, family)
        model = make()
        layers = count_layers(family, model)
        start = time.process_time()
        blocks = latentize.inspect(model, args=(), kwargs=hf.inputs(model))
        seconds = time.process_time() - start
        lifted = [b for b in blocks if b.status == "moe"]
        reasons = list(dict.fromkeys(b.reason for b in blocks if b.status == "refused"))
        if not lifted:
            verdict = "latent" if any(b.status == "latent" for b in blocks) else "refused" if blocks else "none"
            return Row(family, verdict, layers, len(blocks), None, seconds, "; ".join(reasons))
        error = _rewrite_error(make(), lifted[0].spec.hidden_size)
        verdict = "wrong" if not error <= TOLERANCE else "lifted" if len(lifted) >= layers else "partly"
        spec = lifted[0].spec
        note = "; ".join([spec.describe(), *(f"refused: {r}" for r in reasons)])
        return Row(family, verdict, layers, len(lifted), error, seconds, note)
    except Exception as error:
        note = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        return Row(family, "error", layers, 0, None, time.process_time() - start, note)


def _rewrite_error(model: nn.Module, hidden_size: int) -> float:
    recipe = latentize.Recipe(latent_dim=hidden_size, experts_factor=2, topk_factor=2, heal_steps=0)
    converted = latentize.convert(model, args=(), kwargs=hf.inputs(model), recipe=recipe).model
    errors = []
    for batch, tokens, seed in ((1, 5, 3), (3, 9, 4), (1, 1, 5)):
        inputs = hf.inputs(model, batch, tokens, seed)
        ours, theirs = (hf.main_output(m(**inputs)).double() for m in (converted, model))
        errors.append(float((ours - theirs).norm() / theirs.norm()))
    return max(errors)


def table(rows: list[Row]) -> str:
    """The rows as a Markdown page."""
    import transformers

    verdicts = ("lifted", "partly", "latent", "refused", "none", "error", "wrong")
    counts = {v: sum(r.verdict == v for r in rows) for v in verdicts}
    lines = [
        "# MoE families of transformers",
        "",
        "Made by `python benchmarks/coverage.py --write docs/coverage.md` with "
        f"transformers {transformers.__version__} and torch {torch.__version__}: {len(rows)} tiny random models, "
        + ", ".join(f"{n} {v}" for v, n in counts.items())
        + ". The error is the relative difference of the whole model's output, in fp32, after every block was "
        "rewritten at full width with twice the experts and twice the active ones, on fresh inputs. Seconds are "
        "those of `inspect` on one thread, in CPU time.",
        "",
        "| family | | blocks | error | seconds | what it computes, or why not |",
        "|---|---|---|---|---|---|",
    ]
    for r in sorted(rows, key=lambda r: (r.verdict != "lifted", r.verdict, r.family)):
        error = "" if r.error is None else f"{r.error:.0e}"
        note = "; ".join(n for n in (r.note, JUSTIFIED.get(r.family, "") if r.verdict != "lifted" else "") if n)
        note = note.replace("|", "\\|")
        lines.append(f"| {r.family} | {r.verdict} | {r.found} of {r.layers} | {error} | {r.seconds:.1f} | {note} |")
    return "\n".join(lines) + "\n"


def _sections(page: Path) -> str:
    """What a page holds after the table: its sections, written by hand."""
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    start = text.find("\n## ")
    return "" if start < 0 else text[start:]


def _limit_memory() -> None:
    """An analysis that needs more than this is an error of ours, not the machine's."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def main() -> int:
    """Print the table, and write it where asked; exit code 1 when a rewrite is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="REGEX")
    parser.add_argument("--write", type=Path, metavar="FILE")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    importlib.import_module("transformers.modeling_utils")  # loaded once, not in every family's process
    importlib.import_module("torch._dynamo")
    rows = []
    families = [f for f in hf.FAMILIES if re.search(options.only, f)]
    pool = multiprocessing.get_context("fork").Pool(1, _limit_memory, maxtasksperchild=1)
    for r in pool.imap(look_at, families):
        rows.append(r)
        error = "" if r.error is None else f" {r.error:.0e}"
        found = f"{r.found} of {r.layers}{error}"
        print(f"{r.verdict:8}{r.family:28} {found:14} {r.seconds:6.1f} s  {r.note[:150]}", flush=True)
    print(", ".join(f"{sum(r.verdict == v for r in rows)} {v}" for v in dict.fromkeys(r.verdict for r in rows)))
    if options.write:
        options.write.write_text(table(rows) + _sections(options.write), encoding="utf-8")
    return int(any(r.verdict == "wrong" for r in rows))


if __name__ == "__main__":
    sys.exit(main())
