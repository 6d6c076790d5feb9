"""docs/ablations.md: tables and figures from benchmarks/results/ablations.json, between the page's markers.

python benchmarks/ablations_page.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from measured import RESULTS

from latentize import plots

DOCS = RESULTS.parents[1] / "docs"
#: The report's colours, for a figure that stands alone on a light or a dark page.
STYLE = """<style>
svg { --paper: #fdfdfb; --ink: #1d2127; --muted: #646b75; --line: #d9dcdf; --original: #8b939e; --rewritten: #0b6e8f;
font-family: sans-serif; background: var(--paper) }
@media (prefers-color-scheme: dark) { svg { --paper: #15181c; --ink: #e4e6e8; --muted: #98a0aa; --line: #343a42;
--original: #7d8794; --rewritten: #4fb6d9 } }
</style>"""

Row = dict[str, Any]


def main() -> None:
    """Write the figures and fill in the page."""
    rows = [row for row in json.loads((RESULTS / "ablations.json").read_text())["rows"] if row["heal"] == "0"]
    _save("ablations-compression.svg", _by_compression(rows))
    _save("ablations-prediction.svg", _by_prediction(rows))
    page = DOCS / "ablations.md"
    text = page.read_text()
    for name, table in (("sweep", _sweep(rows)), ("prediction", _predicted(rows)), ("auto", _auto(rows)),
                        ("router", _router(rows))):  # fmt: skip
        head, _, rest = text.partition(f"<!-- {name} -->")
        _, _, tail = rest.partition("<!-- end -->")
        text = f"{head}<!-- {name} -->\n\n{table}\n\n<!-- end -->{tail}"
    page.write_text(text)


def _sweep(rows: list[Row]) -> str:
    lines = [
        "| α | variant | N, k | expert weights, kB | dispatched, kB | output error | bits per byte | rise |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in _of(rows, "fixed", "eff", "acc"):
        factor = int(row["compression"])
        more = {"fixed": (1, 1), "eff": (factor, 1), "acc": (factor, factor)}[row["variant"]]
        lines.append(
            f"| {row['compression']:.3g} | {row['variant']} | {16 * more[0]}, {4 * more[1]} | "
            f"{row['weight_bytes'] / 1e3:.0f} | {row['dispatch_bytes'] / 1e3:.1f} | {row['block_error']:.3f} | "
            f"{row['bits_per_byte']:.4f} | {row['rise_percent']:+.2f} % |"
        )
    return "\n".join(lines)


def _predicted(rows: list[Row]) -> str:
    lines = ["| α | variant | predicted / measured error of blocks 0 to 3 | divergence, predicted / measured |",
             "|---|---|---|---|"]  # fmt: skip
    for row in _of(rows, "fixed", "eff", "acc", "auto"):
        if row["compression"] > 1:
            pairs = [f"{row['predicted'][name]:.3f} / {error:.3f}" for name, error in row["errors"].items()]
            known = row.get("predicted_divergence")
            total = "" if known is None else f"{known:.4f} / {row['divergence']:.4f}"
            lines.append(f"| {row['compression']:.3g} | {row['variant']} | {', '.join(pairs)} | {total} |")
    return "\n".join(lines)


def _auto(rows: list[Row]) -> str:
    lines = ["| bytes of experts | widths | predicted divergence | measured | bits per byte |", "|---|---|---|---|---|"]
    autos = {row["compression"]: row for row in rows if row["variant"] == "auto"}
    for row in _of(rows, "fixed"):
        other = autos.get(row["compression"])
        if other is not None:
            one = str(next(iter(row["latent_dim"].values())))
            each = ", ".join(map(str, other["latent_dim"].values()))
            lines += [_bought(row, "one for all", one), _bought(other, "auto", each)]
    return "\n".join(lines)


def _bought(row: Row, name: str, widths: str) -> str:
    known = row.get("predicted_divergence")
    return (
        f"| {row['weight_bytes'] / 1e3:.0f} kB, {name} | {widths} | {'' if known is None else f'{known:.4f}'} | "
        f"{row['divergence']:.4f} | {row['bits_per_byte']:.4f} |"
    )


def _router(rows: list[Row]) -> str:
    lines = ["| α | router reads | output error | bits per byte | rise |", "|---|---|---|---|---|"]
    for row in sorted(_of(rows, "fixed, at once"), key=lambda row: (row["compression"], row["router"])):
        reads = "x, width d" if row["router"] == "d" else "P x, width ℓ"
        lines.append(
            f"| {row['compression']:.3g} | {reads} | {row['block_error']:.3f} | {row['bits_per_byte']:.4f} | "
            f"{row['rise_percent']:+.2f} % |"
        )
    return "\n".join(lines)


def _by_compression(rows: list[Row]) -> str:
    looks = {"fixed": ("o", plots.PAPER), "eff": ("s", plots.MUTED), "acc": ("o", plots.REWRITTEN)}
    with plots._figure(240, "rise in bits per byte by compression and variant") as (figure, svg):
        axes = figure.subplots()
        base = [row for row in _of(rows, "fixed") if 1 < row["compression"] < 2]
        for variant, (marker, colour) in looks.items():
            shown = _of(rows, variant) if variant == "fixed" else base + _of(rows, variant)
            points = [(row["compression"], row["rise_percent"]) for row in shown if row["compression"] > 1]
            if points:
                x, y = zip(*points, strict=True)
                axes.plot(x, y, color=plots.LINE, linewidth=1, zorder=1)
                axes.plot(x, y, marker, color=colour, markeredgecolor=plots.REWRITTEN, label=variant, zorder=3)
        axes.set(xscale="log", yscale="log", xlabel="compression α", title="rise in bits per byte, %, without healing")
        axes.set_xticks([4 / 3, 2, 4, 8], ["1.33", "2", "4", "8"])
        axes.set_yticks([0.3, 1, 3, 10, 30, 100], ["0.3", "1", "3", "10", "30", "100"])
        axes.minorticks_off()
        axes.legend(loc="upper left")
    return str(svg())


def _by_prediction(rows: list[Row]) -> str:
    with plots._figure(240, "predicted against measured error of each block") as (figure, svg):
        axes = figure.subplots()
        ends = (0.04, 1.0)
        axes.fill_between(ends, [0.8 * e for e in ends], [1.2 * e for e in ends], color=plots.LINE, alpha=0.5)
        axes.plot(ends, ends, color=plots.MUTED, linewidth=0.8)
        for row in _of(rows, "fixed", "eff", "acc", "auto"):
            if row["compression"] > 1:
                points = [(error, row["predicted"][name]) for name, error in row["errors"].items()]
                x, y = zip(*points, strict=True)
                axes.plot(x, y, "o", color=plots.PAPER, markeredgecolor=plots.REWRITTEN, markersize=5)
        axes.set(xscale="log", yscale="log", xlabel="measured relative error", title="predicted (band: ± 20 %)")
    return str(svg())


def _of(rows: list[Row], *variants: str) -> list[Row]:
    chosen = [row for row in rows if row["variant"] in variants]
    return sorted(chosen, key=lambda row: (row["compression"], variants.index(row["variant"])))


def _save(name: str, svg: str) -> None:
    first, _, rest = svg.partition(">")
    path = Path(DOCS / name)
    path.write_text(f'{first} xmlns="http://www.w3.org/2000/svg">{STYLE}{rest}\n')


if __name__ == "__main__":
    main()
