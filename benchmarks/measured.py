"""Results of the benchmarks: rows printed as a table, and kept in benchmarks/results/ with where they came from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from latentize.report import Environment

RESULTS = Path(__file__).resolve().parent / "results"


def keep(name: str, rows: Sequence[Mapping[str, Any]], key: Sequence[str]) -> list[dict[str, Any]]:
    """Write `rows` to results/NAME.json, in place of those there whose `key` columns are the same; returns all.

    A column that a row kept earlier lacks counts as 0.
    """
    path = RESULTS / f"{name}.json"
    environment = asdict(Environment.here())
    new = [{**row, "environment": environment} for row in rows]
    replaced = {tuple(row[column] for column in key) for row in new}
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    kept = [row for row in old if tuple(row.get(column, 0) for column in key) not in replaced]
    merged = sorted(kept + new, key=lambda row: tuple(str(row.get(column, 0)) for column in key))
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps({"rows": merged}, indent=1, ensure_ascii=False) + "\n")
    return merged


def keep_each(
    name: str, rows: Iterable[Mapping[str, Any]], key: Sequence[str], columns: Mapping[str, str]
) -> None:
    """Print and keep every row, with its "notes" where it has some, as it comes; then all of them as a table."""
    made = []
    for row in rows:
        print(table([row], columns).splitlines()[-1], *row.get("notes", ()), sep="\n  ", flush=True)
        made.append(row)
        keep(name, [row], key)
    print(f"\n{table(made, columns)}")


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """Rows as aligned text; `columns` maps a column to the format of its values, e.g. ".4f"."""
    cells = [list(columns), *([_cell(row.get(name), spec) for name, spec in columns.items()] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = ["  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in cells]
    return "\n".join([lines[0], "  ".join("─" * width for width in widths), *lines[1:]])


def _cell(value: Any, spec: str) -> str:
    return "–" if value is None else format(value, spec)
