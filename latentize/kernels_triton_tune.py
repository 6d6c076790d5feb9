"""The choice of a kernel's config: measured once on the device, kept in memory and in a file of the user's cache.

`LATENTIZE_TUNE=0` takes the first config that fits instead, as does a call that is being captured into a CUDA graph
before it was measured: run the model once before the capture.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from latentize.kernels_triton_steps import Config, Step
from latentize.native_build import cache_folder
from latentize.whole_files import write_text

_log = logging.getLogger(__name__)
Attempt = Callable[[Config], None]
#: Timed launches of each config.
ROUNDS = 7
#: More than any device's second-level cache.
SWEEP_BYTES = 1 << 28


class ConfigRefusedError(Exception):
    """A config that the device or the compiler cannot take."""


class Tuner:
    """Configs by step, measured where unknown. Safe to use from threads.

    Args:
        path: the file that keeps choices over processes; None keeps them in memory only.
        measure: seconds that an attempt with a config takes; `ConfigRefusedError` rules it out.
    """

    def __init__(self, path: Path | None, measure: Callable[[Attempt, Config], float]) -> None:
        self._path, self._measure = path, measure
        self._lock = threading.Lock()
        self._known: dict[str, Config] = {}
        self._kept = _read(path)

    def known(self, step: Step) -> Config | None:
        """The config that was chosen for `step`, if one was."""
        return self._known.get(step.key)

    def choose(self, step: Step, configs: tuple[Config, ...], attempt: Attempt) -> Config:
        """The fastest of `configs` for `step`; measures by calling `attempt`, which must be repeatable.

        Raises:
            RuntimeError: no config can run; the message names the step.
        """
        known = self._known.get(step.key)
        if known is not None:
            return known
        with self._lock:
            if step.key not in self._known:
                self._known[step.key] = self._kept_choice(step, configs) or self._fastest(step, configs, attempt)
            return self._known[step.key]

    def _kept_choice(self, step: Step, configs: tuple[Config, ...]) -> Config | None:
        kept = self._kept.get(step.key)
        return next((config for config in configs if config.options() == kept), None)

    def _fastest(self, step: Step, configs: tuple[Config, ...], attempt: Attempt) -> Config:
        times: dict[int, float] = {}
        refused = ""
        for number, config in enumerate(configs):
            try:
                times[number] = self._measure(attempt, config)
            except ConfigRefusedError as error:
                refused = str(error)
        if not times:
            raise RuntimeError(f"{step.key}: no configuration runs on this device: {refused}")
        best = configs[min(times, key=times.__getitem__)]
        _log.info("%s: %s, %.1f µs", step.name, best.options(), min(times.values()) * 1e6)
        self._kept[step.key] = best.options()
        _write(self._path, step.key, best.options())
        return best


def seconds_on_device(attempt: Attempt, config: Config) -> float:
    """Median time of a launch, by events on the current stream, with nothing of its data in the device's caches.

    Raises:
        ConfigRefusedError: too much shared memory or too many registers, for instance.
    """
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    try:
        attempt(config)
    except (OutOfResources, PTXASError, CompilationError) as error:
        raise ConfigRefusedError(str(error)) from error
    times: list[float] = []
    swept = torch.zeros(SWEEP_BYTES // 4, dtype=torch.float32, device="cuda")
    for _ in range(ROUNDS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        swept.sum()  # leaves nothing to be written back; meanwhile the launch is queued: its host time does not count
        begin.record()
        attempt(config)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3)
    return median(times)


@functools.cache
def tuner(device: int) -> Tuner:
    """The tuner of one CUDA device; choices are kept for its name, this Triton and these kernels."""
    import triton

    key = hashlib.sha256(f"{torch.cuda.get_device_name(device)} {triton.__version__}".encode())
    for source in sorted(Path(__file__).parent.glob("kernels_triton*.py")):
        key.update(source.read_bytes())
    return Tuner(cache_folder() / f"triton-{key.hexdigest()[:20]}.json", seconds_on_device)


def may_tune() -> bool:
    """Whether measuring is allowed now: not switched off, and nothing is being captured."""
    return os.environ.get("LATENTIZE_TUNE") != "0" and not torch.cuda.is_current_stream_capturing()


def _read(path: Path | None) -> dict[str, dict[str, int]]:
    try:
        kept = json.loads(path.read_text()) if path is not None else {}
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def _write(path: Path | None, key: str, options: dict[str, int]) -> None:
    """Add one choice to the file; a folder that cannot be written only means measuring again."""
    if path is None:
        return
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_text(path, json.dumps({**_read(path), key: options}, indent=1))
    except OSError as error:
        _log.info("kernel choices are not kept: %s", error)
