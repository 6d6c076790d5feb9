"""Shared libraries of our C++ sources, compiled once per machine and kept in a cache."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_log = logging.getLogger(__name__)
_FLAGS = ("-O2", "-std=c++17", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")


@dataclass(frozen=True)
class Sources:
    """One library: `main` and the headers it may include, wherever they lie. `what` names it in the log."""

    main: Path
    headers: tuple[Path, ...]
    what: str


def compiled(
    sources: Sources, variants: Sequence[tuple[str, ...]], name: str, *, openmp: Path | None = None
) -> Path:
    """The shared library of these sources for this compiler and processor, compiled unless the cache holds it.

    Args:
        sources: what to compile.
        variants: compiler flags, from the widest to the plainest; the first that compiles is taken.
        name: of the file in the cache.
        openmp: the OpenMP runtime to link in variants with -fopenmp, instead of the compiler's.

    Raises:
        OSError: no compiler was found, or none could compile it.
    """
    compiler = _compiler()
    key = hashlib.sha256()
    for source in (sources.main, *sources.headers):
        key.update(source.read_bytes())
    key.update(repr((shutil.which(compiler), _FLAGS, tuple(variants), openmp, _processor())).encode())
    folder = cache_folder()
    path = folder / f"{name}-{key.hexdigest()[:20]}.so"
    if not path.exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _compile(compiler, sources, variants, openmp, path)
    if hasattr(os, "getuid") and path.stat().st_uid != os.getuid():
        raise OSError(f"{path} belongs to another user")
    return path


def cache_folder() -> Path:
    """Where compiled kernels are kept: `LATENTIZE_CACHE`, or latentize in the user's cache folder."""
    given = os.environ.get("LATENTIZE_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "latentize"


def _compiler() -> str:
    found = next((c for c in (os.environ.get("CXX"), "c++", "g++", "clang++") if c and shutil.which(c)), None)
    if found is None:
        raise OSError("no C++ compiler was found")
    return found


def _compile(
    compiler: str, sources: Sources, variants: Sequence[tuple[str, ...]], openmp: Path | None, path: Path
) -> None:
    _log.info("compiling %s, once on this machine", sources.what)
    started = time.perf_counter()
    complaint = ""
    include = sorted({f"-I{header.parent}" for header in sources.headers})
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        for variant in variants:
            command = [compiler, *_FLAGS, *variant, *include, str(sources.main), "-o", str(built)]
            if "-fopenmp" in variant and openmp is not None:
                command += ["-Wl,--as-needed", str(openmp)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
            if done.returncode == 0:
                built.replace(path)
                _log.info("compiled in %.0f s: %s", time.perf_counter() - started, path)
                return
            complaint = (done.stderr.strip().splitlines() or ["no message"])[0]
    raise OSError(f"{compiler} could not compile {sources.main.name}: {complaint}")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
