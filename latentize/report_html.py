"""report.html: the record of one conversion as one self-contained page, its headline first and its limits last."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latentize import plots
from latentize.bench import Timing
from latentize.compare import Gate
from latentize.errors import MissingExtraError
from latentize.report import BlockRecord, Report

_TEMPLATES = Path(__file__).parent / "templates"
#: Up to this many blocks, each gets a figure of its own.
MANY_BLOCKS = 12


def render(report: Report) -> str:
    """The page as HTML text: no script, no reference to anything outside it.

    Raises:
        MissingExtraError: jinja2 or matplotlib is not installed.
    """
    environment = _environment()
    from markupsafe import Markup

    figures = {name: [Markup(svg) for svg in drawn] for name, drawn in _figures(report).items()}  # noqa: S704  ours
    style = Markup((_TEMPLATES / "report.css").read_text(encoding="utf-8"))  # noqa: S704  ours
    page = environment.get_template("report.html.j2")
    short, pattern = plots.short_names([block.name for block in report.rewritten])
    text: str = page.render(
        report=report,
        short=dict(zip((block.name for block in report.rewritten), short, strict=True)),
        pattern=pattern or "block",
        style=style,
        figures=figures,
        title=title(report),
        headline=headline(report),
        keys=list(key_numbers(report)),
        passed=list(passed_gates(report)),
        limits=list(limits(report)),
        totals=totals(report),
        shared_experts=[block for block in report.rewritten if block.shared_expert is not None],
    )
    return text


def title(report: Report) -> str:
    """The model's name, short."""
    return Path(report.model.name).name or report.model.class_name


def passed_gates(report: Report) -> Iterator[str]:
    """One sentence for each kind of gate that held: the closest call among them."""
    kinds: dict[tuple[str, float], list[Gate]] = {}
    for gate in report.gates:
        if gate.passed:
            kinds.setdefault((gate.name.partition(",")[0], gate.limit), []).append(gate)
    for (kind, limit), gates in kinds.items():
        closest = max(gates, key=lambda gate: gate.value)
        name = closest.name if len(gates) == 1 else f"{kind} ({len(gates)} comparisons, the worst)"
        yield f"Gate passed: {name} is {number(closest.value, 3)}, allowed {number(limit, 3)}."


def headline(report: Report) -> str:
    """What the conversion cost and what it won, in one sentence of measured or counted numbers."""
    count, whole = len(report.rewritten), len(report.blocks)
    if not count:
        return f"Nothing was rewritten: of {whole} places looked at, none could be." if whole else "No MoE was found."
    blocks = f"{count} MoE block{'s' if count > 1 else ''}"
    evaluation = report.evaluation
    cost = f"{blocks} rewritten, accuracy not measured"
    if evaluation is not None:
        before, after = evaluation.original[evaluation.metric], evaluation.rewritten[evaluation.metric]
        name = evaluation.metric.replace("_", " ")
        if not math.isfinite(after):
            cost = f"{name} of the rewritten model is not finite"
        else:
            verb = "rose" if evaluation.rise > 5e-5 else "fell" if evaluation.rise < -5e-5 else "stayed"
            by = "" if verb == "stayed" else f" by {abs(100 * evaluation.rise):.1f} %"
            cost = f"{name} {verb}{by}, {number(before)} → {number(after)}"
    sums = totals(report)
    moved = _change("routed weights read for one token", sums["weight_bytes_before"], sums["weight_bytes_after"])
    return f"{cost[0].upper()}{cost[1:]}; {moved}{_speed(report)}."


def key_numbers(report: Report) -> Iterator[dict[str, str]]:
    """The few numbers that lead the page: label, before, after, change."""
    evaluation = report.evaluation
    if evaluation is not None:
        for name, before in evaluation.original.items():
            after = evaluation.rewritten[name]
            yield {"label": name.replace("_", " "), "before": number(before), "after": number(after),
                   "change": percent_change(before, after)}  # fmt: skip
    if report.rewritten:
        sums = totals(report)
        for field, label, show in (
            ("weight_bytes", "weights read for one token", size),
            ("dispatch_bytes", "dispatched per token", size),
            ("flops", "routed FLOPs per token", count),
        ):
            before, after = sums[f"{field}_before"], sums[f"{field}_after"]
            yield {"label": label, "before": show(before), "after": show(after),
                   "change": percent_change(before, after)}  # fmt: skip
    model = report.model
    if model.bytes_after is not None:
        yield {"label": "model as stored", "before": size(model.bytes_before), "after": size(model.bytes_after),
               "change": percent_change(model.bytes_before, model.bytes_after)}  # fmt: skip


def limits(report: Report) -> Iterator[str]:
    """What a reader must not conclude from this page."""
    left = [block for block in report.blocks if block.plan is None]
    if left:
        yield f"{len(left)} of {len(report.blocks)} places were left as they are; each is listed with its reason."
    if report.calibration is None:
        yield "No calibration data was given: the weights alone decided, and nothing was healed."
    elif not report.calibration.heal_steps:
        yield "Nothing was healed."
    elif report.calibration.healed_outside:
        yield (
            f"Healing trained {report.calibration.healed_outside:,} parameters outside the rewritten blocks too: they "
            "are no longer the original's."
        )
    if report.evaluation is None:
        yield "Accuracy was not measured: the model came without an evaluate function."
    if report.recipe.get("variant") == "acc" and report.rewritten:
        yield (
            "Variant acc spends what narrower experts save on more of them, for accuracy at about the same bytes; "
            "the variants eff and fixed keep the saving."
        )
    if report.latency is None:
        yield "Latency was not measured."
    else:
        threads = ", ".join(sorted({str(row.threads) for row in report.latency}))
        yield (
            f"Latency is that of one sequence of T tokens on {report.environment.cpu} with {threads} thread(s); "
            "other machines, batch sizes and key-value caches will differ."
        )
    if report.onnx is None:
        yield "No ONNX graph was exported or checked."
    yield (
        "Bytes and FLOPs are counted from the plan for one token on its own; the tokens of one batch share the "
        "projections and some experts, and read fewer bytes each."
    )


def totals(report: Report) -> dict[str, int]:
    """The plans' costs, summed over the rewritten blocks."""
    names = ("weight_bytes", "dispatch_bytes", "stored_bytes", "flops")
    fields = [*(f"{name}_{when}" for name in names for when in ("before", "after")), "projection_bytes", "bypass_bytes"]
    return {field: sum(getattr(block.plan, field) or 0 for block in report.rewritten) for field in fields}


def told_apart(original: Timing | None, rewritten: Timing | None) -> bool:
    """Whether the middle halves of two measurements do not overlap; otherwise their difference is noise."""
    if original is None or rewritten is None:
        return False
    return original.q75_ms < rewritten.q25_ms or rewritten.q75_ms < original.q25_ms


def number(value: float | None, digits: int = 4) -> str:
    """A value with `digits` significant digits, four meaning four decimals from 1 to 10; a dash when there is none."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "−∞"
    if value and not 1e-3 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa} · 10{str(int(exponent)).translate(_SUPERSCRIPT)}".replace("-", "−")
    whole = len(f"{abs(value):.0f}") if abs(value) >= 1 else 1 + math.floor(math.log10(abs(value))) if value else 1
    places = 4 if digits == 4 and whole == 1 and abs(value) >= 1 else max(0, digits - whole)
    return f"{value:.{places}f}".replace("-", "−")


_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def percent_change(before: float, after: float) -> str:
    """after against before, e.g. "+0.4 %", "−50 %", "unchanged"."""
    if not before or not math.isfinite(after):
        return ""
    change = 100 * (after - before) / abs(before)
    if abs(change) < 0.005:
        return "unchanged"
    return f"{change:+.{1 if abs(change) < 10 else 0}f} %".replace("-", "−")


def size(value: float | None) -> str:
    """Bytes in decimal units."""
    if value is None:
        return "–"
    return _with_unit(value, (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1)))


def count(value: float | None) -> str:
    """A count with a decimal prefix."""
    if value is None:
        return "–"
    return _with_unit(value, (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1)))


def seconds(value: float) -> str:
    """A duration: seconds below two minutes, then minutes."""
    return f"{value:.1f} s" if value < 120 else f"{value / 60:.1f} min"


def _figures(report: Report) -> dict[str, list[str]]:
    blocks = report.rewritten
    with_spectrum = [block for block in blocks if block.plan is not None and block.plan.spectrum]
    loads = [block for block in blocks if block.load_before is not None or block.load_after is not None]
    many = len(blocks) > MANY_BLOCKS
    drawn: dict[str, list[str]] = {"spectra": [], "errors": [], "accuracy": [], "loads": [], "latency": []}
    if with_spectrum:
        drawn["spectra"] = [plots.spectra(with_spectrum)] if many else [plots.spectrum(b) for b in with_spectrum]
    if any(block.errors is not None for block in blocks):
        drawn["errors"] = [plots.errors(blocks)]
    if report.evaluation is not None and blocks:
        drawn["accuracy"] = [plots.accuracy(report)]
    drawn["loads"] = [plots.expert_load(block) for block in (loads if not many else _most_uneven(loads))]
    for backend in dict.fromkeys(row.backend for row in report.latency or ()):
        if any(row.original or row.rewritten for row in report.latency or () if row.backend == backend):
            drawn["latency"].append(plots.latency(report.latency or (), backend))
    return drawn


def _most_uneven(blocks: list[BlockRecord]) -> list[BlockRecord]:
    def unevenness(block: BlockRecord) -> float:
        load = block.load_after or block.load_before
        return load.max_over_mean if load is not None else 0.0

    chosen = sorted(blocks, key=unevenness, reverse=True)[:MANY_BLOCKS]
    return [block for block in blocks if block in chosen]


def _change(what: str, before: float, after: float) -> str:
    if not before:
        return f"{what}: {size(after)}"
    ratio = after / before
    if abs(ratio - 1) < 0.02:
        return f"{what} as before ({size(after)})"
    return f"{what} {'fell' if ratio < 1 else 'rose'} from {size(before)} to {size(after)} ({_times(ratio)})"


def _speed(report: Report) -> str:
    """One token in the fastest backend of each model, so that a slow baseline does not flatter."""
    rows = [row for row in report.latency or () if row.tokens == 1]
    before = min(((row.original.median_ms, row.backend, row.original) for row in rows if row.original), default=None)
    after = min(((row.rewritten.median_ms, row.backend, row.rewritten) for row in rows if row.rewritten), default=None)
    if before is None or after is None or not before[0] or not after[0]:
        return ""
    ratio = after[0] / before[0]
    where = before[1] if before[1] == after[1] else f"{after[1]} against {before[1]}"
    if not told_apart(before[2], after[2]):
        return f"; one token takes as long as before ({where}, within the spread of the runs)"
    word = f"{1 / ratio:.2f}\u00a0× faster" if ratio < 1 else f"{ratio:.2f}\u00a0× slower"
    return f"; one token {word} ({where})"


def _times(ratio: float) -> str:
    return f"÷\u00a0{1 / ratio:.2f}" if ratio < 1 else f"×\u00a0{ratio:.2f}"


def _with_unit(value: float, units: tuple[tuple[str, float], ...]) -> str:
    for unit, scale in units:
        if abs(value) >= scale:
            shown = value / scale
            places = 0 if scale == 1 or shown >= 100 else 2
            return f"{shown:.{places}f}\u00a0{unit}".strip()
    return f"{value:.0f}\u00a0{units[-1][0]}".strip()


def _breakable(name: str) -> Any:
    """A dotted name that may be broken after each dot."""
    from markupsafe import Markup, escape

    return Markup(".<wbr>").join(escape(part) for part in name.split("."))


def _environment() -> Any:
    try:
        import jinja2
    except ImportError:
        raise MissingExtraError("jinja2", "report", "the report page") from None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "size": size,
        "count": count,
        "seconds": seconds,
        "breakable": _breakable,
        "told_apart": lambda row: told_apart(row.original, row.rewritten),
        "ms": lambda timing: "–" if timing is None else plots.milliseconds(timing.median_ms),
    }
    return environment
