"""Published low-rank methods beside latentize on the sample language model, at equal bytes, without healing.

    python benchmarks/peers/run.py                   every method at l = d/2 and d/4 (minutes of CPU)
    python benchmarks/peers/run.py --heal 400        the same, healed (hours)
    python benchmarks/peers/run.py --stored          MoBE's own terms: error of gate weights at equal bytes stored
    python benchmarks/peers/run.py --write           docs/peers.md from the rows that are there

"Equal bytes" is of expert weights read for one token (k experts; what all experts share is read once for a whole batch
and listed beside it), or of elements dispatched to and from the experts. A method that cannot reach one is left out.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import methods
import torch
from forms import Form, held
from measured import RESULTS, keep, table
from teacher import Teacher, bits, stdlib_lm
from torch import Tensor

from latentize import conversion
from latentize.recipe import Recipe

#: A method, or the `init` of a conversion by latentize; whether it is at equal bytes, and at equal dispatch.
METHODS: dict[str, tuple[Any, bool, bool]] = {
    "latentize": ("activation", True, True),
    "latentize, weights alone": ("weights", True, True),
    "plain SVD": (methods.plain_svd, True, False),
    "MoLAE": (methods.molae, True, False),
    "MoLAE, latents halved": (partial(methods.molae, by_dispatch=True), False, True),
    "D2-MoE, shared V": (methods.d2_moe, True, False),
    "TD-MoE, all neurons": (methods.tucker, True, True),
    "TD-MoE, 3/4 of the neurons": (partial(methods.tucker, neurons=0.75), True, False),
    "MoBE, 4 bases": (methods.mobe, True, False),
}
KEY = ("method", "latent_dim", "heal")
HEADS = (
    "method", "experts, kB", "shared, kB", "dispatched, kB", "weight error", "output error", "bits per byte", "rise"
)  # fmt: skip
COLUMNS = {
    "method": "", "latent_dim": "d", "heal": "", "expert_bytes": ",d", "shared_bytes": ",d", "dispatch_bytes": ",d",
    "weight_error": ".3f", "block_error": ".3f", "bits_per_byte": ".4f", "rise_percent": "+.2f", "seconds": ".0f",
}  # fmt: skip


def main() -> None:
    """Measure what the arguments ask for, print the table, keep the rows."""
    options = _options()
    if options.write:
        _write()
        return
    torch.set_num_threads(options.threads)
    stdlib_lm.EVALUATION_WINDOWS = options.windows
    teacher = Teacher.load(evaluate=not options.stored)
    if options.stored:
        rows = [row for latent in options.latent_dim for row in _stored(teacher, latent)]
        keep("peers_stored", rows, ("method", "latent_dim"))
        print(table(rows, {"method": "", "latent_dim": "d", "weight_error": ".3f"}))
        return
    for latent in options.latent_dim:
        for name in options.method:
            try:
                row = _measure(teacher, name, latent, options)
            except ValueError as error:
                print(f"{name} at {latent}: {error}", flush=True)
                continue
            print(table([row], COLUMNS).splitlines()[-1], flush=True)
            keep("peers", [row], KEY)


def _measure(teacher: Teacher, name: str, latent: int, options: argparse.Namespace) -> dict[str, Any]:
    method, bytes_equal, dispatch_equal = METHODS[name]
    begin = time.process_time()
    originals = teacher.blocks.specs
    with conversion.workspace():
        if callable(method):
            rebuilt = {block: method(spec, teacher.statistics[block], latent) for block, spec in originals.items()}
        else:
            rebuilt = _ours(teacher, Recipe(latent_dim=latent, variant="fixed", init=method, heal_steps=options.heal))
    seconds = time.process_time() - begin
    student = teacher.student({block: r.spec for block, r in rebuilt.items()})
    with held(student.blocks, {block: r.forms for block, r in rebuilt.items()}):
        teacher.heal(student, Recipe(heal_steps=options.heal))
    errors = teacher.errors(student)
    score = bits(student.model)
    per_token = {"expert": 0, "shared": 0, "dispatched": 0}
    for block, r in rebuilt.items():
        k, element = originals[block].top_k, originals[block].experts.up.element_size()
        per_token["expert"] += k * r.expert * element
        per_token["shared"] += r.shared * element
        per_token["dispatched"] += k * r.dispatched * element
    weight_errors = [methods.weight_error(originals[block], r.spec) for block, r in rebuilt.items()]
    return {
        "method": name, "latent_dim": latent, "heal": str(options.heal), "windows": options.windows,
        "equal_bytes": bytes_equal,
        "equal_dispatch": dispatch_equal, "expert_bytes": per_token["expert"], "shared_bytes": per_token["shared"],
        "dispatch_bytes": per_token["dispatched"], "weight_error": sum(weight_errors) / len(weight_errors),
        "block_error": sum(errors.values()) / len(errors), "original": teacher.bits, "bits_per_byte": score,
        "rise_percent": 100 * (score / teacher.bits - 1), "seconds": seconds,
    }  # fmt: skip


def _stored(teacher: Teacher, latent: int) -> Iterator[dict[str, Any]]:
    """Mean relative error of the gates of all blocks, each method storing N m l + l d weights for a block's gates."""
    gates = [spec.experts.gate for spec in teacher.blocks.specs.values()]
    n, m, d = gates[0].shape
    allowed = n * m * latent + latent * d
    ways: dict[str, Callable[[Tensor], Form]] = {
        "one right factor for all (MoLAE)": lambda w: methods.stacked(w, latent),
        "plain SVD": lambda w: methods.truncate(w, allowed // (n * (m + d))),
    }
    for bases in (2, 4):
        rank = allowed // (n * m + bases * d)
        ways[f"MoBE, {bases} bases"] = partial(methods.basis_fit, rank=rank, bases=bases, steps=500)
    for method, way in ways.items():
        with conversion.workspace():
            errors = [((way(w).dense() - w).norm() / w.norm()).item() for w in gates]
        yield {"method": method, "latent_dim": latent, "weight_error": sum(errors) / len(errors)}


def _ours(teacher: Teacher, recipe: Recipe) -> dict[str, methods.Rebuilt]:
    """latentize's own start, at N and k unchanged."""
    prepared = teacher.prepare(recipe)
    if recipe.init == "weights":
        prepared = replace(prepared, statistics=None)
    specs = conversion.start(prepared, recipe)
    return {name: methods.latent(spec) for name, spec in specs.items()}


def _write() -> None:
    """Put the tables into docs/peers.md, between its markers."""
    rows = json.loads((RESULTS / "peers.json").read_text())["rows"]
    stored = json.loads((RESULTS / "peers_stored.json").read_text())["rows"]
    path = RESULTS.parents[1] / "docs" / "peers.md"
    text = path.read_text()
    for name, filled in (("table", _tables(rows)), ("stored", _stored_table(stored))):
        head, _, rest = text.partition(f"<!-- {name} -->")
        _, _, tail = rest.partition("<!-- end -->")
        text = f"{head}<!-- {name} -->\n\n{filled}\n\n<!-- end -->{tail}"
    path.write_text(text)


def _stored_table(rows: list[dict[str, Any]]) -> str:
    shown = sorted(rows, key=lambda row: (-row["latent_dim"], row["weight_error"]))
    lines = [f"| {row['latent_dim']} | {row['method']} | {row['weight_error']:.3f} |" for row in shown]
    return "\n".join(["| stored like ℓ | method | relative error of the gates |", "|---|---|---|", *lines])


def _tables(rows: list[dict[str, Any]]) -> str:
    parts = []
    for latent in sorted({row["latent_dim"] for row in rows}, reverse=True):
        for title, column in (("expert weights read per token", "equal_bytes"), ("dispatch", "equal_dispatch")):
            shown = [row for row in rows if row["latent_dim"] == latent and row[column]]
            lines = [
                f"**At the bytes of ℓ = {latent}: {title}**\n",
                f"| {' | '.join(HEADS)} |",
                "|---|---|---|---|---|---|---|---|",
            ]
            for row in sorted(shown, key=lambda row: row["bits_per_byte"]):
                cells = [
                    row["method"] + ("" if row["heal"] == "0" else ", healed"),
                    f"{row['expert_bytes'] / 1e3:.0f}",
                    f"{row['shared_bytes'] / 1e3:.0f}",
                    f"{row['dispatch_bytes'] / 1e3:.1f}",
                    f"{row['weight_error']:.3f}",
                    f"{row['block_error']:.3f}",
                    f"{row['bits_per_byte']:.4f}",
                    f"{row['rise_percent']:+.1f} %",
                ]
                lines.append(f"| {' | '.join(cells)} |")
            parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--latent-dim", type=int, nargs="+", default=[64, 32])
    parser.add_argument("--heal", type=int, default=0, help="steps of distillation")
    parser.add_argument("--stored", action="store_true", help="only the error of gates at equal bytes stored")
    parser.add_argument("--write", action="store_true", help="write docs/peers.md from the kept rows")
    parser.add_argument("--windows", type=int, default=1024, help="of evaluation text; fewer are faster")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
