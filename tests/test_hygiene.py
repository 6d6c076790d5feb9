"""What must not stand in a public project: words about how it was made, and paths or hosts of one machine."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FORBIDDEN = {
    "issue number": r"\bissues? #?\d+\b|(?<![\w&#/])#\d{1,2}\b",
    "path of one machine": r"(?<![\w.\-/])/(work|root|home|mnt|opt)/\w",
    "package registry host": r"\bpypi\.org|pythonhosted\.org|download\.pytorch\.org|--(extra-)?index-url",
    "words about who wrote it": r"\b(claude|anthropic|chatgpt|copilot|ai[- ]generated|language model wrote)\b",
    "words about a working session": r"\b(this|last|next|previous|another|our) session\b|\bsub-?agents?\b",
    "unfinished work": r"\b(TODO|FIXME|XXX|HACK)\b",
}


def tracked() -> Iterator[Path]:
    """Text files under version control; every file of the tree where there is none."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    names = listing.stdout.split("\0") if listing.returncode == 0 else [str(p) for p in ROOT.rglob("*")]
    for name in filter(None, names):
        path = ROOT / name
        if path.is_file() and not path.is_symlink() and path != Path(__file__).resolve():
            yield path


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_holds(what: str) -> None:
    pattern = re.compile(FORBIDDEN[what], re.IGNORECASE if what.startswith("words") else 0)
    found = []
    for path in tracked():
        data = path.read_bytes()
        if b"\0" in data[:4096] or path.suffix in {".bin", ".json", ".svg", ".html"}:
            continue
        for number, line in enumerate(data.decode().splitlines(), 1):
            if pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert found == []


def test_package_holds_no_stub() -> None:
    for folder in ("latentize", "passes", "exporters"):
        for path in (ROOT / folder).glob("*.py"):
            assert "raise NotImplementedError" not in path.read_text(), path


def test_text_ends_with_a_newline_and_has_no_tabs_or_trailing_blanks() -> None:
    found = []
    for path in tracked():
        if path.suffix in {".py", ".md", ".toml", ".txt", ".cff"}:
            text = path.read_text()
            if not text.endswith("\n") and text:
                found.append(f"{path}: no newline at the end")
            found += [f"{path}:{n}" for n, line in enumerate(text.splitlines(), 1) if re.search(r"\s$|\t", line)]
    assert found == []


def test_the_pattern_for_issue_numbers_spares_colours_and_entities() -> None:
    pattern = re.compile(FORBIDDEN["issue number"])
    assert not pattern.search("color: #112233 &#39; issue of order f#1")
    assert pattern.search("see #12")
    assert pattern.search("as issue 3 says")
