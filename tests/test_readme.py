"""The README's blocks are run: every command ends as shown, and what is printed there is what is printed here.

A ```console block is run line by line in one folder that holds nothing but the samples. After its command, each line
of output shown must be among the lines printed, in their order, numbers and spacing apart; `…` stands for any lines.
`# exit 3` at the end of a command is the exit code it must have. A ```python block is a script of its own.
Blocks marked `slow` (```console slow) belong to the slow suite; ```text blocks are not run.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


@dataclass(frozen=True)
class Command:
    line: str
    exit_code: int
    output: tuple[str, ...]


@dataclass(frozen=True)
class Example:
    """One fenced block of the README."""

    number: int
    language: str
    slow: bool
    text: str


def examples(markdown: str) -> list[Example]:
    """The fenced blocks of `markdown` that can be run."""
    found = re.findall(r"^```(console|python)( slow)?\n(.*?)^```$", markdown, re.MULTILINE | re.DOTALL)
    return [Example(i, language, bool(slow), text) for i, (language, slow, text) in enumerate(found)]


def commands(text: str) -> list[Command]:
    """The `$ ` lines of a console block, each with the output shown below it."""
    found = []
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        line, *output = part.rstrip("\n").split("\n")
        code = re.search(r"\s*# exit (\d+)$", line)
        found.append(Command(line[: code.start()] if code else line, int(code[1]) if code else 0, tuple(output)))
    return found


def words(line: str) -> str:
    """`line` with every number as # and runs of blanks, bars and rules as one blank."""
    line = re.sub(r"[-+]?\d[\d.,]*(e[-+]?\d+)?", "#", line)
    return " ".join(re.sub(r"[\s─━│|┃=*]+", " ", line).split())


def missing(shown: tuple[str, ...], printed: str) -> list[str]:
    """The lines of `shown` that do not occur in `printed`, looked for in order."""
    rest = iter([words(line) for line in printed.splitlines()])
    wanted = [line for line in shown if words(line) not in {"", "…"}]
    return [line for line in wanted if not any(words(line) == candidate for candidate in rest)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader has: the samples, and room to write."""
    path = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "samples", path / "samples", ignore=shutil.ignore_patterns("__pycache__"))
    return path


def _marked(example: Example) -> pytest.param:  # type: ignore[valid-type]
    marks = [pytest.mark.slow] if example.slow else []
    return pytest.param(example, id=f"{example.number}-{example.language}", marks=marks)


@pytest.mark.parametrize("example", [_marked(example) for example in examples(README)])
def test_block_does_what_it_shows(example: Example, folder: Path) -> None:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "120"}
    if example.language == "python":
        done = subprocess.run([sys.executable, "-c", example.text], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return
    for command in commands(example.text):
        done = subprocess.run(
            command.line, shell=True, cwd=folder, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert done.returncode == command.exit_code, f"$ {command.line}\n{done.stdout}"
        assert missing(command.output, done.stdout) == [], f"$ {command.line}\n{done.stdout}"


def test_every_local_link_leads_somewhere() -> None:
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "samples").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
            assert target.startswith("https://") or (path.parent / target).exists(), f"{path.name}: {target}"


def test_output_is_compared_by_its_words_and_in_order() -> None:
    printed = "block a   error 1.5e-07\nblock b   error 2.0e-07\ndone in 3.1 s\n"
    assert missing(("block a error 9e-8", "…", "done in 12 s"), printed) == []
    assert missing(("done in 3 s", "block a error 1"), printed) == ["block a error 1"]
    assert missing(("block c error 1",), printed) == ["block c error 1"]


def test_console_blocks_are_read_with_their_exit_codes() -> None:
    block = "$ latentize x.py  # exit 2\nno such file\n$ echo hi\nhi\n"
    assert commands(block) == [Command("latentize x.py", 2, ("no such file",)), Command("echo hi", 0, ("hi",))]
    markdown = "```console slow\n$ a\n```\n```text\nb\n```\n```python\nc\n```\n"
    assert [example.slow for example in examples(markdown)] == [True, False]
