"""What a disk has against a write is one line in its own words, and what it is not stays what it was."""

import errno
import os

import pytest

from latentize.disk_errors import disk_errors, write_error
from latentize.errors import LatentizeError


def error_of(number):
    return OSError(number, os.strerror(number))


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (error_of(errno.ENOSPC), 5, "out: the disk is full; two are kept: free some space and run again"),
        (error_of(errno.EDQUOT), 5, "out: the disk quota is used up; two are kept: free some space and run again"),
        (error_of(errno.EFBIG), 5, r"out: a file grows larger .*\(ulimit -f\) allows; two are kept: allow larger"),
        (RuntimeError("I/O error: File too large (os error 27)"), 5, "a file grows larger than"),
        (RuntimeError("I/O error: Disk quota exceeded (os error 122)"), 5, "the disk quota is used up"),
        (error_of(errno.EROFS), 2, r"out: cannot be written \(Read-only file system\); go away$"),
        (error_of(errno.EACCES), 2, r"out: cannot be written \(Permission denied\); go away$"),
        (error_of(errno.EBUSY), 2, r"out: cannot be written \(Device or resource busy\); go away$"),
    ],
)
def test_what_is_full_and_what_cannot_be_written_are_told_apart(error, code, words):
    with pytest.raises(LatentizeError, match=words) as caught, disk_errors("out", "two are kept", "go away"):
        raise error
    assert caught.value.exit_code == code


@pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "No such file"), ValueError("full of errors")])
def test_other_errors_pass_and_can_be_said_of_a_write(error):
    with pytest.raises(type(error)), disk_errors("out"):
        raise error
    said = write_error("out", error)
    assert said.exit_code == 2
    assert str(said).startswith("out: cannot be written (")
    assert str(said).endswith("; choose another place with -o")
