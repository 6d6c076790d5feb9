"""Files that appear whole or not at all: written beside their places, then renamed into them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(*places: Path, mode: int = 0o644) -> Iterator[tuple[Path, ...]]:
    """Paths to write to, one for each of `places`; they take their places, in this order, when the block ends well.

    None does before all are on the disk. Where the block or writing fails, what was written is gone and the places are
    as they were; only a failure between two renames leaves some new.

    Args:
        places: files that may exist already, in folders that exist.
        mode: of the files.

    Raises:
        OSError: what the disk has against it.
    """
    partial: list[Path] = []
    try:
        for place in places:
            handle, name = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name}.", suffix=".partial")
            os.close(handle)
            partial.append(Path(name))
        yield tuple(partial)
        for path in partial:
            path.chmod(mode)
            with path.open("rb") as file:
                os.fsync(file.fileno())
        for path, place in zip(partial, places, strict=True):
            path.replace(place)
    except BaseException:
        for path in partial:
            path.unlink(missing_ok=True)
        raise


def write_text(place: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all.

    Raises:
        OSError: what the disk has against it.
    """
    with written_whole(place) as (path,):
        path.write_text(text, encoding="utf-8")
