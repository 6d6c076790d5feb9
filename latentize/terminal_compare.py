"""What `latentize compare` says on the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console

from latentize import terminal
from latentize.compare import OutputAgreement
from latentize.comparison import BackendAgreement, BlockSearch, Comparison, LengthAgreement, Memory
from latentize.terminal import amount, new_table, plain, small, verdict


def print_comparison(console: Console, made: Comparison) -> None:
    """Every number of a comparison, as the report has them."""
    terminal.print_evaluation(console, made.evaluation, None)
    _lengths(console, made.lengths)
    if made.agreement:
        _backends(console, made.agreement)
        for name, needed in made.required.items():
            console.print(f"Minimum required tolerance of {name}: {needed:.2e}")
    _blocks(console, made.blocks)
    if made.latency:
        terminal.print_latency(console, made.latency)
    if made.memory:
        _memory(console, made.memory)
    sizes = new_table("Files", "file", "size")
    for name, size in made.files.items():
        sizes.add_row(name, amount(size, "B"))
    console.print(sizes)


_OUTPUTS = ("relative", "max abs", "cosine", "KL mean", "KL p99", "KL worst", "same best class")


def _outputs(found: OutputAgreement | None) -> Iterator[str]:
    if found is None:
        yield from [""] * len(_OUTPUTS)
        return
    yield f"{found.relative:.2e}"
    yield f"{found.max_abs:.2e}"
    yield f"{found.cosine:.6f}"
    for value in (found.kl_mean, found.kl_p99, found.kl_worst):
        yield "" if value is None else f"{value:.2e}"
    yield "" if found.top1 is None else f"{100 * found.top1:.2f} %"


def _lengths(console: Console, rows: Sequence[LengthAgreement]) -> None:
    shown = new_table("Rewritten against original, in PyTorch", "T", "positions", *_OUTPUTS)
    for row in rows:
        shown.add_row(str(row.tokens), f"{row.outputs.positions:,}", *_outputs(row.outputs))
    console.print(shown)


def _backends(console: Console, rows: Sequence[BackendAgreement]) -> None:
    shown = new_table("Backends against PyTorch", "backend", "model", "T", "error", "allowed", "", *_OUTPUTS[1:])
    for row in rows:
        _, *outputs = _outputs(row.outputs)
        shown.add_row(
            row.backend, row.model, str(row.tokens), small(row.error), small(row.tolerance), verdict(row.passed),
            *outputs,
        )  # fmt: skip
    console.print(shown)


def _blocks(console: Console, searches: Sequence[BlockSearch]) -> None:
    for search in searches:
        line = f"Blocks, {search.comparison}, {search.tokens} tokens: {len(search.errors)} compared"
        if search.errors:
            line += f", the worst {search.worst} with {small(search.errors[search.worst])}"
        if search.first_over:
            line += f"; the first over {search.tolerance:.1e} is {search.first_over}"
        elif search.tolerance is not None and search.errors:
            line += f"; none is over {search.tolerance:.1e}"
        console.print(plain(f"{line}; {search.note}" if search.note else line))


def _memory(console: Console, rows: Sequence[Memory]) -> None:
    shown = new_table("Memory of one call beside the weights", "backend", "T", "original", "rewritten")
    for row in rows:
        sizes = ("" if size is None else amount(size, "B") for size in (row.original, row.rewritten))
        shown.add_row(row.backend, str(row.tokens), *sizes)
    console.print(shown)
