"""What the full TensorRT measured in earlier builds, kept in a file for the next one: its timing cache."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from latentize.whole_files import written_whole

#: What a file begins with; then comes a line of JSON, then what the library wrote.
_MAGIC = b"latentize timing cache\n"


class TimingCache:
    """The timing cache of one build, attached to its configuration.

    It holds for one version of the library and one device, which name the file. A file of another one, or that is
    damaged, is not used: `notes` says so, and it is written anew.

    Args:
        trt: the full library; tensorrt-rtx measures nothing while it builds.
        config: the builder's configuration.
        folder: where the file is.
        device: the GPU's name and compute capability.
    """

    def __init__(self, trt: Any, config: Any, folder: Path, device: str) -> None:
        self.notes: list[str] = []
        self._config = config
        self._key = {"library": f"tensorrt {trt.__version__}", "device": device}
        self.path = folder / f"{re.sub(r'[^a-z0-9.]+', '-', f'tensorrt {trt.__version__} {device}'.lower())}.timing"
        known = self._read()
        cache = config.create_timing_cache(known) if known else None
        if known and (cache is None or not config.set_timing_cache(cache, False)):
            self._refuse("the library does not take it")
            known = b""
        self.served = bool(known)
        if not self.served:
            config.set_timing_cache(config.create_timing_cache(b""), False)

    def keep(self) -> None:
        """Write what is known now, whole or not at all; a cache that cannot be written is done without."""
        measured = bytes(self._config.get_timing_cache().serialize())
        head = {**self._key, "sha256": hashlib.sha256(measured).hexdigest()}
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with written_whole(self.path, mode=0o600) as (file,):
                file.write_bytes(_MAGIC + json.dumps(head).encode() + b"\n" + measured)
        except OSError as error:
            self.notes.append(f"timing cache {self.path}: not kept ({error.strerror or error})")

    def _read(self) -> bytes:
        """What an earlier build of this library on this device measured; nothing where there is none."""
        try:
            stored = self.path.read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            self._refuse(f"cannot be read: {error.strerror}")
            return b""
        line, _, measured = stored.removeprefix(_MAGIC).partition(b"\n")
        try:
            head = json.loads(line) if stored.startswith(_MAGIC) else {}
        except ValueError:
            head = {}
        of = {name: head.get(name) for name in self._key} if isinstance(head, dict) else {}
        if not measured or not all(of.values()) or hashlib.sha256(measured).hexdigest() != head.get("sha256"):
            self._refuse("cut short or damaged")
            return b""
        if of != self._key:
            self._refuse(f"is of {' on '.join(map(str, of.values()))}")
            return b""
        return measured

    def _refuse(self, why: str) -> None:
        self.notes.append(f"timing cache {self.path}: not used ({why}); made anew")
