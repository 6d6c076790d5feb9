"""Where messages go: warnings to the terminal, details on request, everything to a log file."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from contextlib import suppress
from pathlib import Path

from latentize.errors import LatentizeError


def configure(verbosity: int, log_file: Path | None) -> None:
    """Set up logging for a command: verbosity -1 quiet, 0 normal, 1 details, 2 other libraries too.

    Raises:
        LatentizeError: the log file cannot be written.
    """
    root = logging.getLogger()
    root.handlers.clear()
    terminal = logging.StreamHandler()
    terminal.setLevel({-1: logging.ERROR, 0: logging.WARNING}.get(verbosity, logging.DEBUG))
    terminal.setFormatter(logging.Formatter("%(levelname)s %(message)s" if verbosity < 1 else "%(name)s: %(message)s"))
    terminal.addFilter(lambda record: not getattr(record, "shown", False))
    root.addHandler(terminal)
    if log_file is not None:
        root.addHandler(_file_handler(log_file))
    ours = logging.getLogger("latentize")
    ours.setLevel(logging.DEBUG)
    root.setLevel(logging.DEBUG if verbosity > 1 else logging.ERROR)
    if verbosity < 2:
        warnings.simplefilter("ignore")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")


class _LogFile(logging.FileHandler):
    """A log that ends in one line, not in a traceback for each message, when its disk is full."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  logging's name
        """Say why and write no more; what is no fault of the disk is shown as ever."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        self.addFilter(lambda _record: False)
        with suppress(OSError):
            self.close()
        print(f"--log-file {self.baseFilename}: the log ends here ({error.strerror})", file=sys.stderr)


def _file_handler(path: Path) -> logging.Handler:
    try:
        handler = _LogFile(path, encoding="utf-8")
    except OSError as error:
        message = f"--log-file {path}: cannot be written ({error.strerror}); give a path in a folder you can write to"
        raise LatentizeError(message) from None
    handler.setLevel(logging.DEBUG)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    return handler
