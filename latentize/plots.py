"""The report's figures as inline SVG. Colours are CSS variables, so that one figure serves a light and a dark page.

Figures are drawn 350 px wide, the width of one column on every screen, so that their text is never scaled down.
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any

from latentize.bench import Latency
from latentize.errors import MissingExtraError
from latentize.report import BlockRecord, Report

#: Stand-ins that matplotlib accepts -> the page's CSS variable.
INK, MUTED, LINE, ORIGINAL, REWRITTEN, PAPER = (f"#00000{digit}" for digit in range(1, 7))
_VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", ORIGINAL: "original", REWRITTEN: "rewritten", PAPER: "paper"}
_WIDTH = 350
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "latentize",
    "font.size": 11,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "figure.facecolor": "none",
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 10,
}


def spectrum(block: BlockRecord) -> str:
    """Singular values of one block over their index, with the chosen ℓ and the energy it keeps."""
    plan = block.plan
    assert plan is not None
    assert plan.spectrum is not None
    values, chosen = _over_largest(plan.spectrum), plan.latent_dim
    with _figure(210, f"singular spectrum of {block.name}, {chosen} of {len(values)} kept") as (figure, svg):
        axes = figure.subplots()
        index = _thinned(len(values))
        shown = [i for i in index if i < chosen]
        kept = [values[i] for i in shown]
        axes.fill_between([i + 1 for i in shown], kept, min(values), color=REWRITTEN, alpha=0.16, linewidth=0)
        axes.plot([i + 1 for i in index], [values[i] for i in index], color=REWRITTEN)
        _mark_latent(axes, chosen, len(values), kept_energy(plan.spectrum, chosen))
        axes.set(title=block.name, xlabel="index", ylabel="σ / largest σ", yscale="log", xlim=(0, len(values) * 1.02))
    return svg()


def spectra(blocks: Sequence[BlockRecord]) -> str:
    """The spectra of many blocks in one figure, over the index as a share of d; a tick per block marks its ℓ/d."""
    title = f"{len(blocks)} blocks"
    with _figure(240, f"singular spectra of {title}") as (figure, svg):
        axes = figure.subplots()
        for block in blocks:
            plan = block.plan
            assert plan is not None
            assert plan.spectrum is not None
            values = _over_largest(plan.spectrum)
            index = _thinned(len(values))
            axes.plot(
                [(i + 1) / len(values) for i in index],
                [values[i] for i in index],
                color=REWRITTEN,
                alpha=0.35,
                linewidth=1,
            )
            chosen = plan.latent_dim / plan.hidden_size
            axes.axvline(chosen, color=INK, linewidth=0.8, alpha=0.5, linestyle=(0, (3, 2)))
        axes.set(title=title, xlabel="index / d   (dashed: the ℓ chosen)", ylabel="σ / largest σ", yscale="log")
    return svg()


def errors(blocks: Sequence[BlockRecord]) -> str:
    """Relative error of every block after each step, one row a block."""
    names, rest = short_names([block.name for block in blocks])
    rows = range(len(blocks))
    with _figure(96 + 20 * len(blocks), "relative error of each block before and after healing") as (figure, svg):
        axes = figure.subplots()
        steps: tuple[tuple[str, str, str, Callable[[BlockRecord], float | None]], ...] = (
            ("predicted", "|", MUTED, lambda b: b.plan.predicted_error if b.plan else None),
            ("initialised", "o", PAPER, lambda b: b.errors.initialised if b.errors else None),
            ("healed by block", "D", ORIGINAL, lambda b: b.errors.healed_block if b.errors else None),
            ("end to end", "o", REWRITTEN, lambda b: b.errors.healed_end_to_end if b.errors else None),
        )
        for label, marker, colour, value in steps:
            points = [(value(block), row) for row, block in zip(rows, blocks, strict=True)]
            known = [(x, row) for x, row in points if x is not None]
            if known:
                edge = REWRITTEN if colour == PAPER else colour
                x, y = zip(*known, strict=True)
                size = {"|": 9, "D": 5, "o": 7}[marker]
                axes.plot(x, y, marker, color=colour, markeredgecolor=edge, markersize=size, label=label, zorder=3)
        axes.hlines(rows, 0, axes.get_xlim()[1], color=LINE, linewidth=0.7, zorder=1)
        axes.set(ylim=(len(blocks) - 0.4, -0.6), xlim=(0, None), xlabel="relative error of the routed output")
        axes.set_yticks(list(rows), names)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_title(rest, color=MUTED)
        figure.legend(loc="outside lower left", ncols=2, handletextpad=0.1, columnspacing=1)
    return svg()


def accuracy(report: Report) -> str:
    """The first value of the evaluation against the routed weights read for one token: original, rewritten, others."""
    evaluation = report.evaluation
    assert evaluation is not None
    metric = evaluation.metric
    before = sum(block.plan.weight_bytes_before for block in report.rewritten if block.plan)
    after = sum(block.plan.weight_bytes_after for block in report.rewritten if block.plan)
    points = [("original", before, evaluation.original[metric], ORIGINAL, ORIGINAL)]
    if evaluation.initialised is not None:
        points.append(("before healing", after, evaluation.initialised[metric], PAPER, REWRITTEN))
    points.append(("rewritten", after, evaluation.rewritten[metric], REWRITTEN, REWRITTEN))
    scale, unit = _scale(max(point[1] for point in points))
    with _figure(240, f"{metric} against weights read per token") as (figure, svg):
        axes = figure.subplots()
        axes.axhline(points[0][2], color=ORIGINAL, linewidth=0.8, linestyle=(0, (3, 2)))
        lowest = min(point[2] for point in points)
        for label, size, value, colour, edge in points:
            at = (size / scale, value)
            axes.plot(*at, "o", color=colour, markeredgecolor=edge, markersize=7, zorder=3)
            shift, anchor = ((0, -8), "top") if value == lowest else ((0, 7), "bottom")
            text = f"{label} {value:.4g}"
            axes.annotate(text, at, shift, textcoords="offset points", ha="center", va=anchor)
        axes.margins(y=0.25)
        axes.set_xlim(0, 1.3 * max(point[1] for point in points) / scale)
        axes.locator_params(nbins=5)
        axes.grid(visible=True)
        axes.set(xlabel=f"routed weights read for one token, {unit}", title=metric)
    return svg()


def expert_load(block: BlockRecord) -> str:
    """Load of one block's experts over the mean, sorted, before and after; N may differ, so rank is a share of N."""
    with _figure(190, f"expert load of {block.name} before and after") as (figure, svg):
        axes = figure.subplots()
        axes.axhline(1, color=MUTED, linewidth=0.8, linestyle=(0, (3, 2)))
        for load, label, colour in ((block.load_before, "before", ORIGINAL), (block.load_after, "after", REWRITTEN)):
            if load is None or not sum(load.counts):
                continue
            mean = sum(load.counts) / len(load.counts)
            heights = sorted((count / mean for count in load.counts), reverse=True)
            edges = [i / len(heights) for i in range(len(heights) + 1)]
            look = {"fill": True, "alpha": 0.4} if label == "before" else {"linewidth": 1.6}
            axes.stairs(heights, edges, color=colour, label=f"{label}, N {len(heights)}", **look)
        axes.set(title=block.name, xlabel="experts, busiest first (share of N)", ylabel="load / mean", xlim=(0, 1))
        axes.set_ylim(bottom=0)
        axes.legend(loc="upper right")
    return svg()


def latency(rows: Sequence[Latency], backend: str) -> str:
    """Median milliseconds of both models in one backend, a panel with its own scale per number of tokens."""
    measured = [row for row in rows if row.backend == backend and (row.original or row.rewritten)]
    with _figure(200, f"latency in {backend}, original and rewritten") as (figure, svg):
        panels = figure.subplots(1, len(measured), squeeze=False)[0]
        for axes, row in zip(panels, measured, strict=True):
            for x, (timing, colour) in enumerate(((row.original, ORIGINAL), (row.rewritten, REWRITTEN))):
                if timing is None:
                    continue
                spread = [[timing.median_ms - timing.q25_ms], [timing.q75_ms - timing.median_ms]]
                axes.bar(x, timing.median_ms, width=0.72, color=colour)
                axes.errorbar(x, timing.median_ms, yerr=spread, color=INK, linewidth=1, capsize=2)
                text = milliseconds(timing.median_ms)
                axes.annotate(text, (x, timing.q75_ms), (0, 4), textcoords="offset points", ha="center", fontsize=10)
            axes.set_title(f"T {row.tokens}", loc="center", color=MUTED)
            axes.set(xticks=[], yticks=[], xlim=(-0.6, 1.6))
            axes.margins(y=0.15)
            axes.spines["left"].set_visible(False)
        figure.suptitle(f"{backend}, ms", x=0.02, ha="left", fontsize=11)
    return svg()


def kept_energy(values: Sequence[float], kept: int) -> float:
    """Share of the squared singular values that the first `kept` hold."""
    total = sum(value * value for value in values)
    return sum(value * value for value in values[:kept]) / total if total else 1.0


def short_names(names: Sequence[str]) -> tuple[list[str], str]:
    """Dotted names without what they all share, and the pattern they share with * in its place."""
    parts = [name.split(".") for name in names]
    shortest = min(map(len, parts), default=1)
    head = next((i for i in range(shortest) if len({p[i] for p in parts}) > 1), shortest - 1)
    tail = next((i for i in range(shortest - head) if len({p[-1 - i] for p in parts}) > 1), 0)
    short = [".".join(p[head : len(p) - tail]) for p in parts]
    rest = ".".join([*parts[0][:head], "*", *(parts[0][len(parts[0]) - tail :] if tail else [])]) if parts else ""
    return short, rest if rest != "*" else ""


def milliseconds(value: float) -> str:
    """Three significant digits without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


@contextmanager
def _figure(height: int, description: str) -> Iterator[tuple[Any, Callable[[], str]]]:
    """A matplotlib figure of the report's width, and a function that gives its SVG once the block has ended."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "report", "the report's figures") from None
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH / 72, height / 72), dpi=72, layout="constrained")
        yield figure, lambda: _inline(figure, description)


def _inline(figure: Any, description: str) -> str:
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context(_STYLE):
        nothing: Mapping[str, None] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|style).*?</\1>", "", text, flags=re.DOTALL)
    text = text.replace("font-family: 'DejaVu Sans'; ", "")
    text = _local_ids(text, f"f{zlib.crc32(description.encode()):08x}-")
    for colour, name in _VARIABLES.items():
        text = text.replace(colour, f"var(--{name})")
    head = re.search(r'viewBox="[^"]*"', text)
    assert head is not None
    body = text[text.index(">") + 1 :]
    return f'<svg {head[0]} role="img" aria-label="{escape(description)}" xmlns:xlink="http://www.w3.org/1999/xlink">{body}'


def _local_ids(svg: str, prefix: str) -> str:
    """`svg` with only the ids it refers to, prefixed so that figures on one page do not share them."""
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda m: f' id="{prefix}{m[1]}"' if m[1] in used else "", svg)
    return re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}", svg)


def _mark_latent(axes: Any, chosen: int, whole: int, energy: float) -> None:
    axes.axvline(chosen, color=INK, linewidth=1, linestyle=(0, (3, 2)))
    side, shift = ("right", -5) if chosen > whole / 2 else ("left", 5)
    axes.annotate(
        f"ℓ {chosen}\n{100 * energy:.1f} % kept", (chosen, 0.96), (shift, 0), xycoords=("data", "axes fraction"),
        textcoords="offset points", ha=side, va="top",
    )  # fmt: skip


def _over_largest(values: Sequence[float]) -> list[float]:
    """Values over the largest, floored where a logarithm would fail."""
    largest = max(values, default=0.0) or 1.0
    return [max(value / largest, 1e-8) for value in values]


def _thinned(length: int, most: int = 256) -> list[int]:
    """Indices of at most about `most` points, the first and the last among them: a curve needs no more."""
    step = max(1, length // most)
    return sorted({*range(0, length, step), length - 1})


def _scale(size: float) -> tuple[float, str]:
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= scale:
            return scale, unit
    return 1.0, "bytes"
