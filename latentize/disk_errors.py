"""What a disk has against a write, as errors of ours: it is full, a quota or a limit is, or it cannot be written."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from latentize.errors import LatentizeError, ResourceError, first_line

#: What a full disk left, and what to do about a place that cannot be written: a new one, or a finished OUT.
LEFT, ELSEWHERE, COPY = "nothing was left there", "choose another place with -o", "make it writable, or use a copy"
#: What is full, and the way out.
_FULL = {
    errno.ENOSPC: ("the disk is full", "free some space"),
    errno.EDQUOT: ("the disk quota is used up", "free some space"),
    errno.EFBIG: ("a file grows larger than the disk or a limit (ulimit -f) allows", "allow larger files"),
}
#: A place that is not to be written, or not to be replaced, or that is a file where a folder should be.
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY, errno.EXDEV, errno.EEXIST, errno.ENOTDIR)


@contextmanager
def disk_errors(place: Path | str, left: str = LEFT, elsewhere: str = ELSEWHERE) -> Iterator[None]:
    """Turn what a disk has against writing `place` into errors of ours; any other error passes.

    Args:
        place: what is written.
        left: what is there where something is full.
        elsewhere: what to do where it cannot be written.

    Raises:
        ResourceError: the disk, a quota or a limit is full.
        LatentizeError: `place` cannot be written.
    """
    try:
        yield
    except LatentizeError:
        raise
    except Exception as error:
        if _full(error) or (isinstance(error, OSError) and error.errno in _UNWRITABLE):
            raise write_error(place, error, left, elsewhere) from error
        raise


def write_error(place: Path | str, error: Exception, left: str = LEFT, elsewhere: str = ELSEWHERE) -> LatentizeError:
    """The error of ours for a write that failed for whatever reason; arguments as for `disk_errors`."""
    full = _full(error)
    if full:
        what, way_out = full
        return ResourceError(f"{place}: {what}; {left}: {way_out} and run again")
    why = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
    return LatentizeError(f"{place}: cannot be written ({why}); {elsewhere}")


def _full(error: Exception) -> tuple[str, str] | None:
    """What is full, whoever raised the error: some that are no OSError say it in words."""
    for number, found in _FULL.items():
        if (isinstance(error, OSError) and error.errno == number) or os.strerror(number) in str(error):
            return found
    return None
