"""A disk that is really full: a small tmpfs, mounted in a process of its own where the system lets any user do that."""

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

from latentize.errors import LatentizeError

PAGE = 4  # KiB: the least that a disk of this kind gives


@cache
def available():
    """Whether a process may have mounts of its own."""
    if shutil.which("unshare") is None or shutil.which("mount") is None:
        return False
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def run(script, folder, *arguments):
    """What `script`, whose `main(disk, *arguments)` returns JSON values, returns with a small disk at `folder`."""
    folder.mkdir()
    tests = Path(__file__).resolve().parent
    path = os.pathsep.join([str(tests), str(tests.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        ["unshare", "-rm", sys.executable, str(script), str(folder), *arguments],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


class Disk:
    """The disk at `folder`, inside that process."""

    def __init__(self, folder):
        self.folder = Path(folder)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(folder)], check=True)

    def leave(self, kib):
        """Let `kib` KiB be free."""
        found = os.statvfs(self.folder)
        used = (found.f_blocks - found.f_bfree) * found.f_frsize // 1024
        size = max(used + kib, PAGE)  # 0 would be without a limit
        subprocess.run(["mount", "-o", f"remount,size={size}k", str(self.folder)], check=True)

    def empty(self):
        """Nothing on it and all of it free."""
        for entry in self.folder.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        self.leave(64 << 10)

    def files(self):
        """The files on it, with their bytes."""
        return {str(f.relative_to(self.folder)): f.read_bytes() for f in self.folder.rglob("*") if f.is_file()}

    def sweep(self, write, whole, before=lambda: None, step=PAGE):
        """Write on a disk with ever more room, until it fits and `whole()` holds.

        Returns:
            for each attempt but the last: the error, and what changed of the files that were there `before`.
        """
        attempts, room = [], 0
        while True:
            self.empty()
            before()
            there = self.files()
            self.leave(room)
            try:
                write()
            except LatentizeError as error:
                now = self.files()
                changed = sorted(name for name in {*there, *now} if there.get(name) != now.get(name))
                folders = sorted(f.name for f in self.folder.iterdir() if f.is_dir() and not any(f.iterdir()))
                attempts.append((error.exit_code, str(error), changed + folders))
            else:
                assert whole()
                return attempts
            room += step
