"""Folders that appear complete or not at all: written beside their place, then renamed into it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path

from latentize.disk_errors import ELSEWHERE, disk_errors, write_error
from latentize.errors import LatentizeError, ResourceError

MANIFEST = "latentize.json"
#: How folders that `working_folder` makes in an OUT are called.
WORK = ".engine."
#: What a folder of ours may hold besides the files its manifest lists: engines and the library of `latentize build`,
#: and what a killed `build` or `compare` left.
_LATER = ("*.engine", "latentize_onnxruntime.so", f"{WORK}*", ".latentize_onnxruntime.so.*.partial",
          ".report.*.partial", ".model.onnx.*.onnx", ".float32-*")  # fmt: skip


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A new folder beside `out` that takes its place when the block ends without an error, and is deleted otherwise.

    Raises:
        LatentizeError: `out` exists and is not ours, or cannot be written.
        ResourceError: the disk is full.
    """
    check_target(out)
    folder: Path | None = None
    with ExitStack() as held:
        try:
            with disk_errors(out):
                out.parent.mkdir(parents=True, exist_ok=True)
                _clear_leftovers(out)
                folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.partial-"))
                held.enter_context(_in_use(folder))
                folder.chmod(0o755)
            with disk_errors(out):
                yield folder
                _list_files(folder)
                _publish(folder, out)
        except LatentizeError as error:  # it may name a file of the folder, which the user never sees
            error.args = (str(error).replace(str(folder or out), str(out)), *error.args[1:])
            raise
        finally:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)


def check_target(out: Path) -> None:
    """Refuse an OUT that holds anything but an earlier result of ours, or that cannot be written.

    Raises:
        LatentizeError: saying what is in the way.
    """
    if not out.name or out.name == "..":
        raise LatentizeError(f"{out}: is the folder that the command runs in or above; name a new one with -o")
    if _is_mount(out):
        raise LatentizeError(f"{out}: is a mount point, which cannot be replaced as a whole; name a folder inside it")
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    check_writable(parent, f"{out}: the folder {parent}")
    if not out.exists():
        return
    if not out.is_dir():
        raise LatentizeError(f"{out}: exists and is a file; choose another place with -o")
    files = {file.name for file in out.iterdir()}
    if not files:
        return
    if not is_ours(out):
        raise LatentizeError(
            f"{out}: exists and was not written by latentize; choose another place with -o, or remove it"
        )
    listed = set(json.loads((out / MANIFEST).read_text()).get("files", []))
    unlisted = files - listed - {MANIFEST}
    for work in sorted(name for name in unlisted if name.startswith(WORK)):
        if _at_work(out / work):
            raise LatentizeError(f"{out}: a latentize build is at work in it; wait for its end, or stop it")
    foreign = sorted(name for name in unlisted if not any(fnmatchcase(name, later) for later in _LATER))
    if foreign:
        raise LatentizeError(
            f"{out}: holds {foreign[0]!r}, which latentize did not write and would delete; move it away"
        )


def check_writable(folder: Path, said: str = "", elsewhere: str = ELSEWHERE) -> None:
    """Refuse a folder that no file can be made in, a full disk's too.

    Args:
        folder: it exists.
        said: what it is called; its path where nothing is given.
        elsewhere: what to do where it cannot be written.

    Raises:
        LatentizeError: saying why.
    """
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise write_error(said or folder, error, elsewhere=elsewhere) from None


def is_ours(folder: Path) -> bool:
    """Whether a folder was written by latentize."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and manifest.get("format") == "latentize"


def check_space(out: Path, needed: int) -> None:
    """Refuse to start what the disk cannot hold.

    Raises:
        ResourceError: fewer than `needed` bytes are free where `out` goes.
    """
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise ResourceError(
            f"{out}: about {needed / 2**20:,.0f} MiB will be written and {free / 2**20:,.0f} MiB are free on {parent}; "
            "free some space, or choose another place with -o"
        )


@contextmanager
def replaced(folder: Path, last: str, old: Sequence[str] = ()) -> Iterator[Path]:
    """A new folder whose files take their places in `folder`, made where it is missing, when the block ends well.

    Files of the same names are replaced, those that match one of the patterns `old` go, and others stay. The file named
    `last` goes first and comes last: while it is there, the others are those it was written with. Where the block
    fails, nothing has changed.

    Raises:
        LatentizeError: `folder` cannot be written.
        ResourceError: the disk is full.
    """
    with disk_errors(folder), ExitStack() as held:
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        if made:
            held.callback(_remove_empty, folder)
        work = Path(tempfile.mkdtemp(dir=folder, prefix=".partial-"))
        held.callback(shutil.rmtree, work, ignore_errors=True)
        yield work
        files = sorted(work.iterdir(), key=lambda file: file.name == last)
        for file in files:
            file.chmod(0o644)
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        (folder / last).unlink(missing_ok=True)
        for file in (file for pattern in old for file in folder.glob(pattern)):
            file.unlink()
        for file in files:
            file.replace(folder / file.name)


@contextmanager
def working_folder(out: Path) -> Iterator[Path]:
    """A new folder in `out`, to build in, that is deleted when the block ends; those that killed runs left go first.

    Raises:
        OSError: what the disk has against it.
    """
    for left in out.glob(f"{WORK}*"):
        _clear(left)
    folder = Path(tempfile.mkdtemp(dir=out, prefix=WORK))
    try:
        with _in_use(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


@contextmanager
def _in_use(folder: Path) -> Iterator[None]:
    """Holds a lock on a folder that ends with this process, however it ends.

    Raises:
        BlockingIOError: another process holds it.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _is_mount(path: Path) -> bool:
    """Whether something is mounted there, of the same file system too, which `os.path.ismount` does not see."""
    if os.path.ismount(path):
        return True
    try:
        mounts = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return False
    places = (re.sub(rb"\\([0-7]{3})", lambda code: bytes([int(code[1], 8)]), mount.split()[4]) for mount in mounts)
    return os.fsencode(path.absolute().parent.resolve() / path.name) in places


def _at_work(folder: Path) -> bool:
    """Whether a process that is alive holds a folder."""
    try:
        with _in_use(folder):
            return False
    except BlockingIOError:
        return True
    except OSError:
        return False


def _clear(folder: Path) -> None:
    """Delete a folder that no process holds."""
    with suppress(OSError), _in_use(folder):
        shutil.rmtree(folder, ignore_errors=True)


def _clear_leftovers(out: Path) -> None:
    """Put right what killed runs left beside `out`: half-written folders go, a result in mid-replacement returns."""
    kinds = tuple(f".{out.name}.{kind}-" for kind in ("partial", "old"))
    for left in [path for path in out.parent.iterdir() if path.name.startswith(kinds)]:
        with suppress(OSError), _in_use(left):
            if not out.exists() and is_ours(left / out.name):
                (left / out.name).rename(out)
            shutil.rmtree(left, ignore_errors=True)


def _list_files(folder: Path) -> None:
    """Note in the manifest what the folder holds, so that a later run may replace it."""
    manifest = folder / MANIFEST
    if manifest.exists():
        data = json.loads(manifest.read_text())
        data["files"] = sorted(entry.name for entry in folder.iterdir())
        manifest.write_text(json.dumps(data, indent=1) + "\n")


def _publish(folder: Path, out: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(0o644)
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    if not out.exists():
        folder.rename(out)
        return
    old = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.old-"))
    with _in_use(old):
        try:
            _set_aside(out, old)
            folder.rename(out)
        except BaseException:
            if (old / out.name).exists():
                (old / out.name).rename(out)
            raise
        finally:
            shutil.rmtree(old, ignore_errors=True)


def _set_aside(out: Path, old: Path) -> None:
    try:
        out.rename(old / out.name)
    except OSError as error:
        if error.errno not in (errno.EBUSY, errno.EXDEV):
            raise
        raise LatentizeError(
            f"{out}: cannot be replaced ({error.strerror}) and stays as it was; move it away and run again, a command "
            "with --resume"
        ) from error
