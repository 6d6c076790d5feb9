"""The routed experts on CUDA by Triton kernels: the choice of form, workspaces, launches. Forward only.

Three forms (`kernels_triton_steps.choose_form`): decode for few tokens, fused and grouped for many. None asks the
device anything, so all can be captured into a CUDA graph (run once before: see `kernels_triton_tune`). Results do not
depend on scheduling: there are no atomics, and sums run in a fixed order.

`LATENTIZE_TRITON=0`, a machine without Triton or where it does not work, GPUs before compute capability 8.0 and dtypes
other than fp32, bf16 and fp16 leave it to the plain torch kernels. Under `TRITON_INTERPRET=1` the kernels take CPU
tensors too, one program at a time, for tests.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from latentize.activations import Activation
from latentize.kernels_torch import Experts
from latentize.kernels_triton_steps import (
    Config,
    Cut,
    Form,
    Problem,
    Step,
    block_count,
    fitting,
    steps,
    workspaces,
)

_log = logging.getLogger(__name__)
#: Experts up to which a program of the sort holds a count for each.
MOST_EXPERTS = 1 << 14
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def serves(hidden: Tensor, experts: Experts) -> bool:
    """Whether these kernels can take the tensors as they are: on CUDA, rows contiguous, Triton at hand and working."""
    if hidden.dtype not in _DTYPES or not all(t is None or _rows_contiguous(t) for t in experts):
        return False
    if len(experts.up) > MOST_EXPERTS:
        return False
    return runs_on(hidden.device)


def runs_on(device: torch.device) -> bool:
    """Whether Triton's kernels run on a device."""
    if not _available():
        return False
    return _works(device.index) if device.type == "cuda" else device.type == "cpu" and _interpreted()


def forward(
    hidden: Tensor,
    indices: Tensor,
    weights: Tensor,
    experts: Experts,
    activation: Activation,
    weights_on_input: bool,
    form: Form | None = None,
) -> Tensor:
    """Combined output [T, l] of the selected experts on hidden [T, l]; indices and weights are [T, k].

    An index that names no expert contributes nothing; the output of a token with a negative one is NaN, as raising
    an error would stall the device. `form` is chosen by the number of tokens where it is None.
    """
    if not indices.numel() or not hidden.numel():
        return hidden.new_zeros(hidden.shape)
    problem = problem_of(hidden, indices, experts, activation, weights_on_input)
    combined = hidden.new_empty(hidden.shape)
    given = {"hidden": hidden.contiguous(), "indices": indices.contiguous(), "weights": weights.contiguous()}
    cut = Cut.of(problem, len(hidden), form)
    shapes = workspaces(problem, len(hidden), cut)
    held = {name: hidden.new_empty(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
    with on_device(hidden):
        run(problem, cut, {**given, **experts._asdict(), **held, "combined": combined})
    return combined


def run(problem: Problem, cut: Cut, tensors: dict[str, Tensor | None]) -> None:
    """Fill `combined` [T, l] from `hidden` [T, l], `indices`, `weights` [T, k] and the experts' tensors.

    `tensors` holds them by name, and the workspaces that `kernels_triton_steps.workspaces` asks for; all contiguous but
    for the strides that `problem` names, on the current device, T at least 1. Runs on the current stream.
    """
    indices = tensors["indices"]
    assert indices is not None
    pairs = indices.numel()
    counts = {"pairs": pairs, "blocks": block_count(problem, pairs, cut.block)}
    values: dict[str, Any] = {**tensors, **counts}
    for step in steps(problem, cut):
        launch(step, values, len(indices))


def problem_of(
    hidden: Tensor, indices: Tensor, experts: Experts, activation: Activation, weights_on_input: bool
) -> Problem:
    """What the kernels are specialised to for these arguments of `forward`."""
    e = experts
    n, m, width = e.up.shape
    exact = hidden.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    strides: dict[str, Any] = {name: (t.stride(0), t.stride(1)) for name, t in e._asdict().items() if _is(t, 3)}
    strides |= {name: t.stride(0) for name, t in e._asdict().items() if _is(t, 2)}
    return Problem(
        n, indices.shape[1], width, m, hidden.dtype, activation, weights_on_input,
        **strides, precision="ieee" if exact else "tf32",
    )  # fmt: skip


def launch(step: Step, values: Mapping[str, Any], tokens: int) -> None:
    """One step on the tensors and counts named by its kernel's parameters."""
    arguments = [values[name] for name in step.arguments]

    def attempt(config: Config) -> None:
        step.kernel[step.grid(tokens, config.constants)](*arguments, **step.constants, **config.options())

    if _interpreted():
        attempt(step.configs[0])
        return
    from latentize import kernels_triton_tune as tune

    device = torch.cuda.current_device()
    configs = fitting(step.configs, shared_memory(device))
    if len(configs) > 1 and tune.may_tune():
        attempt(tune.tuner(device).choose(step, configs, attempt))
    else:
        attempt(tune.tuner(device).known(step) or configs[0])


def _is(tensor: Tensor | None, dimensions: int) -> bool:
    return tensor is not None and tensor.dim() == dimensions


def _rows_contiguous(tensor: Tensor) -> bool:
    return tensor.shape[-1] <= 1 or tensor.stride(-1) == 1


def _available() -> bool:
    return os.environ.get("LATENTIZE_TRITON") != "0" and _installed()


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _works(device: int) -> bool:
    """Whether the kernels run on this device; asked once, by a launch, but not while a CUDA graph is being captured."""
    return torch.cuda.is_current_stream_capturing() or _launches(device)


@functools.cache
def _launches(device: int) -> bool:
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        with torch.cuda.device(device):
            return _passes_values_through(torch.device("cuda", device))
    except Exception as error:  # no C compiler, a driver that is too old, a broken installation: all leave it to torch
        _log.info("Triton's kernels do not run on CUDA device %d, plain torch is used: %s", device, error)
        return False


def _passes_values_through(device: torch.device) -> bool:
    """One small launch: the sum of one output is that output."""
    problem = Problem(1, 1, 16, 16, torch.float32, Activation("identity"), up=(256, 16), down=(256, 16))
    outputs = torch.arange(16.0, device=device).view(1, 16)
    indices = torch.zeros(1, 1, dtype=torch.int64, device=device)
    combined = torch.full_like(outputs, float("nan"))
    launch(steps(problem, Cut("fused", 16, 1))[-1], {"indices": indices, "outputs": outputs, "combined": combined}, 1)
    return torch.equal(combined, outputs)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") != "0" and _kernels_interpreted()


@functools.cache
def _kernels_interpreted() -> bool:
    from triton.runtime.interpreter import InterpretedFunction

    from latentize.kernels_triton_sort import place_pairs

    return isinstance(place_pairs, InterpretedFunction)


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Launches inside go to the tensor's device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@functools.cache
def shared_memory(device: int) -> int:
    """Bytes of shared memory that one block may have."""
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)
