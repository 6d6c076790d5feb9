"""Every error a user can cause: one line saying what, where, why and what to do, and the exit code it ends with."""

from __future__ import annotations

from collections.abc import Iterable


class LatentizeError(Exception):
    """A fault in what the user gave. The command line prints the message alone and exits with `exit_code`."""

    exit_code = 2


class NothingToRewriteError(LatentizeError):
    """The model holds no MoE block, or every block was refused."""

    exit_code = 3


class GateError(LatentizeError):
    """An accuracy or agreement gate failed."""

    exit_code = 4


class ResourceError(LatentizeError):
    """Out of memory or disk."""

    exit_code = 5


class MissingExtraError(LatentizeError):
    """A package that an optional feature needs is not installed."""

    def __init__(self, package: str, extra: str, feature: str) -> None:
        super().__init__(
            f"{feature} needs the package {package!r}, which is not installed: pip install 'latentize[{extra}]'"
        )


def require_packages(packages: Iterable[str], extra: str, feature: str) -> None:
    """Check that what a feature needs of an extra can be imported.

    Raises:
        MissingExtraError: naming the first package that is not installed.
    """
    for package in packages:
        try:
            __import__(package)
        except ImportError:
            raise MissingExtraError(package, extra, feature) from None


def first_line(error: BaseException) -> str:
    """Type and first line of an error's message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def one_line(error: BaseException) -> str:
    """An exception as the first lines of its message, on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{'…' if len(text) > 300 else ''}"
