"""How fast: both models interleaved in one process, medians, the original beside ours."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from torch import nn

from latentize.errors import LatentizeError
from latentize.inputs import Inputs, observing

#: tokens -> the inputs for one sequence of that length, or the reason why there are none.
MakeInputs = Callable[[int], Inputs | str]

TOKENS = (1, 16, 256)


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call over `repeats` calls: median and the quartiles around it."""

    median_ms: float
    q25_ms: float
    q75_ms: float
    repeats: int


@dataclass(frozen=True)
class Latency:
    """One row of the latency table: `backend` at `tokens` tokens of one sequence.

    `ratio` is rewritten / original, below 1 where the rewritten model is faster. A side that was not measured is None
    and `note` says why.
    """

    backend: str
    tokens: int
    original: Timing | None
    rewritten: Timing | None
    ratio: float | None
    threads: int
    note: str = ""

    @classmethod
    def of(cls, backend: str, tokens: int, timings: Mapping[str, Timing], note: str = "") -> Latency:
        """The row of `timings`, which holds "original" and "rewritten" as far as they were measured."""
        original, rewritten = timings.get("original"), timings.get("rewritten")
        ratio = None
        if original is not None and rewritten is not None and original.median_ms > 0:
            ratio = rewritten.median_ms / original.median_ms
        return cls(backend, tokens, original, rewritten, ratio, torch.get_num_threads(), note)


def latency(callables: Mapping[str, Callable[[], Any]], repeats: int = 30, warmup: int = 5) -> dict[str, Timing]:
    """Time every callable `repeats` times, one call of each per round, in turning order, without garbage collection.

    Args:
        callables: name -> what to time, without arguments.
        repeats: timed rounds, at least 1.
        warmup: rounds before them that are not timed.
    """
    names = list(callables)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(warmup):
        for call in callables.values():
            call()
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in range(repeats):
            start = turn % max(1, len(names))
            for name in names[start:] + names[:start]:
                begin = time.perf_counter_ns()
                callables[name]()
                samples[name].append((time.perf_counter_ns() - begin) / 1e6)
    finally:
        if collecting:
            gc.enable()
    return {name: _timing(values) for name, values in samples.items()}


def bench_models(
    models: Mapping[str, nn.Module],
    make_inputs: MakeInputs,
    tokens: Sequence[int] = TOKENS,
    repeats: int = 30,
    warmup: int = 5,
    *,
    backend: str = "torch",
    note: str = "",
) -> tuple[Latency, ...]:
    """Latency in PyTorch at each number of tokens, in eval mode; the models are left as found.

    Args:
        models: "original" and "rewritten" -> model; `note` says why one is missing.
        make_inputs: see `MakeInputs`.
        tokens, repeats, warmup: as for `latency`.
        backend: what the rows name.
        note: what they note.
    """
    rows = []
    with observing(*models.values()):
        for count in tokens:
            inputs = make_inputs(count)
            if isinstance(inputs, str):
                rows.append(Latency.of(backend, count, {}, inputs))
                continue
            calls = {name: _torch_call(model, inputs) for name, model in models.items()}
            rows.append(Latency.of(backend, count, latency(calls, repeats, warmup), note))
    return tuple(rows)


def bench_onnx(
    paths: Mapping[str, Path],
    make_inputs: MakeInputs,
    tokens: Sequence[int] = TOKENS,
    repeats: int = 30,
    warmup: int = 5,
    *,
    backend: str = "onnxruntime",
    operator: Path | None = None,
) -> tuple[Latency, ...]:
    """Latency of exported graphs in onnxruntime on the CPU with as many threads as torch has.

    Args:
        paths: "original" and "rewritten" -> .onnx file; one that is missing or does not run is noted, not timed.
        make_inputs: as for `bench_models`; the tensors are fed in order.
        tokens, repeats, warmup: as for `latency`.
        backend: what the rows name.
        operator: as for `latentize.exporters.onnx_check.open_session`.

    Raises:
        MissingExtraError: onnxruntime is not installed.
    """
    from latentize.exporters.onnx_check import open_session

    sessions = {name: open_session(path, torch.get_num_threads(), operator=operator) for name, path in paths.items()}
    missing = [name for name in ("original", "rewritten") if name not in sessions]
    note = f"no exported graph of the {' and '.join(missing)} model" if missing else ""
    rows = []
    for count in tokens:
        inputs = make_inputs(count)
        if isinstance(inputs, str):
            rows.append(Latency.of(backend, count, {}, inputs))
            continue
        calls = {name: _onnx_call(graph, inputs) for name, graph in sessions.items()}
        rows.append(timed_graphs(backend, count, calls, repeats, warmup, note))
    return tuple(rows)


def timed_graphs(
    backend: str, tokens: int, calls: Mapping[str, Callable[[], Any]], repeats: int, warmup: int, note: str = ""
) -> Latency:
    """The row of exported graphs' calls; one that does not run is noted beside `note`, not timed."""
    failures = {name: reason for name, call in calls.items() if (reason := _failure(call))}
    timed = latency({name: call for name, call in calls.items() if name not in failures}, repeats, warmup)
    notes = [note, *(f"the {name} graph does not run: {reason}" for name, reason in failures.items())]
    return Latency.of(backend, tokens, timed, "; ".join(filter(None, notes)))


def feeds(graph: Any, inputs: Inputs) -> dict[str, Any]:
    """numpy arrays for the inputs of an onnxruntime session, which are the call's tensors in order.

    Raises:
        LatentizeError: the call has another number of tensors than the graph has inputs.
    """
    names, tensors = [node.name for node in graph.get_inputs()], inputs.tensors()
    if len(names) != len(tensors):
        raise LatentizeError(
            f"the exported graph reads {len(names)} tensors ({', '.join(names)}) and the inputs hold {len(tensors)}; "
            "export it again with these inputs"
        )
    return {name: tensor.detach().cpu().numpy() for name, tensor in zip(names, tensors, strict=True)}


def _torch_call(model: nn.Module, inputs: Inputs) -> Callable[[], Any]:
    if not any(tensor.is_cuda for tensor in inputs.tensors()):
        return lambda: inputs.call(model)

    def call() -> None:
        inputs.call(model)
        torch.cuda.synchronize()

    return call


def _onnx_call(graph: Any, inputs: Inputs) -> Callable[[], Any]:
    fed = cache(partial(feeds, graph, inputs))  # made by the first call, which tells whether the graph runs
    return lambda: graph.run(None, fed())


def _failure(call: Callable[[], Any]) -> str:
    """Why a graph does not run; "" when it does."""
    try:
        call()
    except Exception as error:  # onnxruntime's exceptions have no common base but Exception
        return " ".join(str(error).split())[:300]
    return ""


def _timing(values: Sequence[float]) -> Timing:
    if len(values) == 1:
        return Timing(values[0], values[0], values[0], 1)
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return Timing(middle, low, high, len(values))
