"""`latentize::LatentExperts` in onnxruntime on the CPU: our compiled kernels as a library of one custom operator.

A session that the library was registered in runs the node by the kernels, on its own threads; any other session runs
the body of standard operators that lies in the file. onnxruntime 1.17 or newer loads it, from whatever language.
"""

from __future__ import annotations

import functools
import logging
import os
import platform
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from latentize import kernels_native
from latentize.disk_errors import COPY, disk_errors
from latentize.errors import LatentizeError, one_line
from latentize.native_build import Sources, cache_folder, compiled
from latentize.whole_files import written_whole

if TYPE_CHECKING:
    import onnxruntime

_log = logging.getLogger(__name__)
_lock = threading.Lock()
_SOURCE = Path(__file__).with_name("onnxruntime_ops.cpp")
_ABI = Path(__file__).with_name("onnxruntime_abi.h")
#: The file that `build` writes.
FILE = "latentize_onnxruntime.so"
#: What `build` can compile for, and the compiler's words for it by the machine's architecture.
PORTABLE = {"x86_64": ("x86-64-v3", ("-march=x86-64-v3",)), "aarch64": ("armv8-a", ("-march=armv8-a",))}
_NATIVE = (("-march=native",), ("-mcpu=native",), ())


@dataclass(frozen=True)
class Library:
    """A library that `build` wrote. `processor` is the instruction set it needs, `system` what it was compiled on."""

    file: str
    processor: str
    system: str
    bytes: int


def library() -> Path | None:
    """The library for this machine, or None where it cannot be had; the first call may compile.

    None where no C++ compiler is found, on other systems than Linux, or with `LATENTIZE_NATIVE=0`. Safe to call from
    threads.
    """
    with _lock:
        return _library()


@functools.cache
def _library() -> Path | None:
    if os.environ.get("LATENTIZE_NATIVE") == "0":
        return None
    try:
        return _compiled(_NATIVE)
    except OSError as error:
        _log.info("no operator library for onnxruntime, standard operators are used: %s", error)
        return None


def register(options: onnxruntime.SessionOptions) -> bool:
    """Have sessions that are made with `options` run latentize's operator; False where there is no library.

    Raises:
        LatentizeError: onnxruntime refuses the library, as one that is older than 1.17 does.
    """
    path = library()
    if path is not None:
        register_library(options, path)
    return path is not None


def register_library(options: onnxruntime.SessionOptions, path: Path) -> None:
    """Have sessions that are made with `options` run the operator in a library.

    Raises:
        LatentizeError: onnxruntime refuses it.
    """
    try:
        options.register_custom_ops_library(str(path))
    except Exception as error:  # onnxruntime's exceptions have no common base but Exception
        raise LatentizeError(f"{path}: onnxruntime does not take this library: {one_line(error)}") from error


def build(out: Path, *, native: bool = False) -> Library:
    """Write the library into the folder `out`, for servers that run `model.onnx`.

    Args:
        out: the folder.
        native: for this machine's processor instead of one that most machines of its architecture have.

    Raises:
        LatentizeError: no compiler was found or it fails, or this system or architecture is not supported; or
            `out` or LATENTIZE_CACHE cannot be written.
        ResourceError: the disk is full, that of `out` or of LATENTIZE_CACHE.
    """
    machine = platform.machine()
    variants: tuple[tuple[str, ...], ...] = _NATIVE
    if native:
        processor = f"{machine} with this machine's instructions"
    elif machine in PORTABLE:
        processor, flags = PORTABLE[machine]
        variants = (flags,)
    else:
        known = ", ".join(PORTABLE)
        raise LatentizeError(
            f"no portable library for {machine}, only for {known}; give --target onnxruntime-native for this machine"
        )
    try:
        with _lock, disk_errors(cache_folder(), elsewhere="name another folder in LATENTIZE_CACHE"):
            made = _compiled(variants)
    except OSError as error:
        raise LatentizeError(f"{out}: no {FILE} ({error}); install g++ or clang++, or name one in CXX") from None
    return _placed(made, out, processor)


def _placed(made: Path, out: Path, processor: str) -> Library:
    target = out / FILE
    with disk_errors(target, "an earlier one stays there", COPY), written_whole(target) as (unfinished,):
        shutil.copyfile(made, unfinished)
    system = f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}".rstrip(", ")
    return Library(FILE, processor, system, target.stat().st_size)


def _compiled(variants: tuple[tuple[str, ...], ...]) -> Path:
    if platform.system() != "Linux":
        raise OSError(f"{platform.system()} is not supported")
    sources = Sources(_SOURCE, (*kernels_native.headers(), _ABI), "onnxruntime's operator")
    return compiled(sources, variants, "onnxruntime_ops")
