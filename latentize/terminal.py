"""What a run says on the terminal: short tables of what was found, planned and measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.table import Table

from latentize.bench import Latency, Timing
from latentize.blocks import Block
from latentize.compare import Evaluation, Gate, OutputAgreement
from latentize.exporters.onnx_choice import FormChoice
from latentize.load_balance import ExpertLoad
from latentize.outlook import SHOWN, Outlook
from latentize.report import BlockRecord, File, OnnxAgreement, Plan

#: Blocks that are named where all of them share a line.
_FEW = 3


def consoles(*, quiet: bool) -> tuple[Console, Console | None]:
    """(console for results, console for progress or None); `quiet` silences both."""
    width = None if Console().is_terminal else 140
    results = Console(quiet=quiet, width=width, highlight=False)
    return results, None if quiet else Console(stderr=True, highlight=False)


def print_blocks(console: Console, blocks: Sequence[Block], left: Mapping[str, str] | None = None) -> None:
    """Every block found: what it was proved to compute and with what error, or why it was refused."""
    if not blocks:
        console.print("No MoE block found, and nothing that looks like one.")
        return
    table = new_table("Blocks found", "block", "status", "computes, or why not", "max error")
    for block in blocks:
        what = block.spec.describe() if block.spec is not None else block.reason
        if left and block.name in left:
            what = f"{what} [left alone: {left[block.name]}]"
        table.add_row(block.name, block.status, plain(what), small(block.max_error))
    console.print(table)


def print_plan(console: Console, plans: Mapping[str, Plan], spent: str = "") -> None:
    """What becomes of each block, and what it costs per token before and after; `spent` says what a budget bought."""
    table = new_table("Plan", "block", "d → ℓ", "N → N'", "k → k'", "weights/token", "dispatched/token",
                      "FLOPs/token", "stored", "predicted error")  # fmt: skip
    for name, plan in plans.items():
        table.add_row(
            name,
            f"{plan.hidden_size} → {plan.latent_dim}",
            f"{plan.num_experts_before} → {plan.num_experts_after}",
            f"{plan.top_k_before} → {plan.top_k_after}",
            _change(plan.weight_bytes_before, plan.weight_bytes_after, "B"),
            _change(plan.dispatch_bytes_before, plan.dispatch_bytes_after, "B"),
            _change(plan.flops_before, plan.flops_after),
            _change(plan.stored_bytes_before, plan.stored_bytes_after, "B"),
            small(plan.predicted_error),
        )
    console.print(table)
    if any(plan.bypass_rank for plan in plans.values()):
        _print_bypasses(console, plans)
    if spent:
        console.print(spent)


def _print_bypasses(console: Console, plans: Mapping[str, Plan]) -> None:
    """What each bypass takes, beside what it is predicted to give."""
    heads = "block", "rank", "bytes", "predicted error without", "with"
    table = new_table("Bypass of the experts, in the weights above", *heads)
    for name, plan in plans.items():
        rank, taken = str(plan.bypass_rank), amount(plan.bypass_bytes, "B")
        table.add_row(name, rank, taken, small(plan.error_without_bypass), small(plan.predicted_error))
    console.print(table)


def print_outlook(console: Console, outlook: Outlook) -> None:
    """What narrower experts are predicted to cost each block, and the model."""
    heads = [f"α {alpha:.3g}" for alpha in SHOWN]
    table = new_table("Predicted relative error of each block at its start, by compression", "block", "d",
                      "effective rank", *heads)  # fmt: skip
    for row in outlook.rows:
        cells = (f"ℓ {width}: {small(row.curve.error_at(width))}" for width in map(row.width, SHOWN))
        table.add_row(row.name, str(row.hidden_size), f"{row.effective_rank:.1f}", *cells)
    losses = [outlook.loss_at(alpha) for alpha in SHOWN]
    if outlook.loss is not None and all(loss is not None for loss in losses):
        table.add_row("predicted loss", "", "", *map(small, losses))
    console.print(table)
    if outlook.loss is not None:
        console.print(f"Loss: {outlook.loss}, all blocks together, before healing")
    if outlook.bound is not None:
        found = "no width" if outlook.knee is None else f"ℓ {outlook.knee}"
        console.print(f"Knee: {found} is the smallest for all blocks whose predicted loss is at most {outlook.bound:g}")


def print_errors(console: Console, records: Iterable[BlockRecord]) -> None:
    """Error and expert load of each rewritten block."""
    table = new_table("Error per block, and expert load (max/mean, entropy, dead)", "block", "initialised",
                      "block-healed", "healed", "load before", "load after")  # fmt: skip
    for record in records:
        if record.errors is None:
            continue
        errors = record.errors
        table.add_row(
            record.name,
            small(errors.initialised),
            small(errors.healed_block),
            small(errors.healed_end_to_end),
            _load(record.load_before),
            _load(record.load_after),
        )
    console.print(table)


def print_shared_experts(console: Console, records: Iterable[BlockRecord]) -> None:
    """What became of each block's shared expert, a line each; nothing where no refit was asked for."""
    for record in records:
        shared = record.shared_expert
        if shared is None or not shared.tensors:
            continue  # the reason is among the notes
        console.print(
            plain(
                f"Shared expert of {record.name} ({' and '.join(shared.tensors)}) refitted: error of routed + shared "
                f"output {small(shared.error_before)} → {small(shared.error_after)} on {shared.held_out:,} held-out "
                f"tokens; {amount(shared.bytes_added, 'B')} added"
            )
        )


def print_evaluation(console: Console, evaluation: Evaluation | None, outputs: OutputAgreement | None) -> None:
    """The model's own scores and the agreement of outputs."""
    if evaluation is not None:
        table = new_table("Evaluation (lower is better)", "", "original", "initialised", "rewritten", "change")
        for name, before in evaluation.original.items():
            start = None if evaluation.initialised is None else evaluation.initialised.get(name)
            after = evaluation.rewritten[name]
            change = f"{100 * (after - before) / abs(before):+.2f} %" if before else ""
            table.add_row(name, f"{before:.4f}", "" if start is None else f"{start:.4f}", f"{after:.4f}", change)
        console.print(table)
    if outputs is not None:
        words = [f"relative {outputs.relative:.2e}", f"cosine {outputs.cosine:.5f}"]
        if outputs.kl_mean is not None:
            words.append(f"KL {outputs.kl_mean:.2e} nats (p99 {outputs.kl_p99:.2e})")
        if outputs.top1 is not None:
            words.append(f"same best class {100 * outputs.top1:.1f} %")
        console.print(f"Outputs against the original over {outputs.positions:,} positions: {', '.join(words)}")


def print_latency(console: Console, rows: Sequence[Latency]) -> None:
    """Median latency of both models."""
    table = new_table("Latency, ms (median of one sequence)", "backend", "T", "original", "rewritten", "ratio", "")
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        table.add_row(row.backend, str(row.tokens), _ms(row.original), _ms(row.rewritten), ratio, plain(row.note))
    console.print(table)


def print_forms(console: Console, choices: Sequence[FormChoice]) -> None:
    """How the graph's experts order their work by standard operators, and for how many tokens that was chosen."""
    blocks: dict[str, list[str]] = {}
    for choice in choices:
        blocks.setdefault(choice.describe(), []).append(choice.block)
    for words, names in blocks.items():
        where = ", ".join(names) if len(names) <= _FEW else f"{len(names)} blocks"
        console.print(plain(f"Graph of {where} by standard operators: {words}"))


def print_onnx(console: Console, rows: Sequence[OnnxAgreement]) -> None:
    """Agreement of exported graphs with PyTorch."""
    table = new_table("ONNX against PyTorch", "graph", "backend", "T", "relative error", "allowed", "")
    for row in rows:
        numbers = small(row.relative_error), small(row.tolerance), verdict(row.passed)
        table.add_row(row.model, row.backend, str(row.tokens), *numbers)
    console.print(table)


def print_end(
    console: Console, gates: Sequence[Gate], warnings: Sequence[str], files: Sequence[File], out: str
) -> None:
    """Gates, warnings and where every file is."""
    for gate in (gate for gate in gates if not gate.passed or "against PyTorch" not in gate.name):
        value = f"{gate.value:.4g}, allowed {gate.limit:.4g}" if gate.made else "none could be made"
        console.print(f"Gate {gate.name}: {value}: {verdict(gate.passed)}")
    for warning in warnings:
        console.print(f"Note: {plain(warning)}")
    if files:
        table = new_table(f"Files in {out}", "file", "what", "size")
        for file in files:
            table.add_row(file.path, file.what, "" if file.bytes is None else amount(file.bytes, "B"))
        console.print(table)


def new_table(title: str, *columns: str) -> Table:
    """An empty table in the style of all of them."""
    table = Table(
        title=f"\n{title}", title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim"
    )
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def plain(text: str) -> str:
    """Text whose brackets are no markup."""
    return text.replace("[", r"\[")


def small(value: float | None) -> str:
    """An error or a tolerance; "" for None."""
    return "" if value is None else f"{value:.1e}" if value < 1e-3 else f"{value:.4f}"


def _ms(timing: Timing | None) -> str:
    return "" if timing is None else f"{timing.median_ms:.3g}"


def _load(load: ExpertLoad | None) -> str:
    return "" if load is None else f"{load.max_over_mean:.2f}, {load.entropy:.3f}, {load.dead}"


def verdict(passed: bool) -> str:
    """Whether something was within its limit, in a word."""
    return "passed" if passed else "FAILED"


def _change(before: int, after: int, unit: str = "") -> str:
    return f"{amount(before, unit)} → {amount(after, unit)}"


def amount(value: float, unit: str = "") -> str:
    """A count or bytes with a decimal prefix."""
    for scale, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {prefix}{unit}".rstrip()
    return f"{value:g} {unit}".rstrip()
