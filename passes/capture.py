"""Record one real run of a module as a data-flow graph of ATen calls, with the tensors that flowed through it.

A real run captures any coding, data-dependent loops included, but only for its input: what is read off a recording is a
hypothesis until `verify` has proved it on other inputs. Values that do not depend on the inputs are *constant*; they
can be evaluated again for other weights, so that a lift made on one copy of a module can be bound to another.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from latentize.passes.double import kernel

#: Bytes of intermediate values that one recording may hold.
MOST_BYTES = 2 * 2**30


class RecordingTooLargeError(Exception):
    """A run that computes too much to be written down."""


@dataclass(eq=False)
class Value:
    """One tensor at one moment of the run; an in-place write makes a new value of the same tensor."""

    index: int
    tensor: Tensor
    call: Call | None  # None for inputs and for constants that existed before the run
    const: bool
    source: str = ""  # state-dict name of a parameter or buffer
    users: list[Call] = field(default_factory=list)

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor."""
        return self.tensor.shape


@dataclass(eq=False)
class Call:
    """One ATen call. `args`, `kwargs` hold `Value`s where the call had tensors."""

    index: int
    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: list[Value]
    outputs: list[Value]
    frames: tuple[int, ...]  # open module calls, outermost first

    @functools.cached_property
    def name(self) -> str:
        """Base name of the operator, without overload and in-place underscore."""
        name: str = getattr(getattr(self.op, "overloadpacket", self.op), "__name__", "") or str(self.op)
        return name.rstrip("_") if not name.startswith("_") else name

    @property
    def scalars(self) -> list[float]:
        """Python numbers among the arguments."""
        flat = pytree.tree_leaves((self.args, self.kwargs))
        return [float(a) for a in flat if isinstance(a, (int, float)) and not isinstance(a, bool)]


@dataclass(eq=False)
class Frame:
    """One call of a submodule: the tensors that entered and left it."""

    path: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: Any = None  # args and kwargs with Values for tensors
    output: Any = None  # output tree with Values for tensors
    depth: int = 0


@dataclass(eq=False)
class Recording:
    """A finished run."""

    calls: list[Call]
    frames: list[Frame]
    inputs: list[Value]
    outputs: list[Value]  # tensors of the output tree, flattened
    output_tree: Any  # the output with Values for tensors

    def constant(self, value: Value, tensors: Mapping[str, Tensor]) -> Tensor:
        """A constant value, evaluated with the parameters and buffers in `tensors` by state-dict name.

        Views of parameters come back as views of `tensors`, so that nothing is copied where nothing was computed.
        """
        memo: dict[int, Tensor] = {}
        return _evaluate(value, tensors, memo)

    def random_calls(self) -> list[Call]:
        """Calls that draw random numbers."""
        return [c for c in self.calls if torch.Tag.nondeterministic_seeded in getattr(c.op, "tags", ())]


def _evaluate(value: Value, tensors: Mapping[str, Tensor], memo: dict[int, Tensor]) -> Tensor:
    if value.index in memo:
        return memo[value.index]
    if value.source in tensors:
        result = _computable(tensors[value.source])
    elif value.call is None:
        result = value.tensor
    else:
        call = value.call
        swap = _swapper(lambda v: _evaluate(v, tensors, memo))
        args, kwargs = swap(call.args), swap(call.kwargs)
        if call.op._schema.is_mutable:
            args = pytree.tree_map(lambda a: a.clone() if isinstance(a, Tensor) else a, args)
        outputs = [t for t in pytree.tree_leaves(call.op(*args, **kwargs)) if isinstance(t, Tensor)]
        position = next(i for i, v in enumerate(call.outputs) if v is value)
        result = outputs[position]
    memo[value.index] = result
    return result


def _computable(tensor: Tensor) -> Tensor:
    """A tensor itself, or in fp32 where it is stored in a floating dtype without arithmetic."""
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() < 2 else tensor


def _swapper(function: Callable[[Value], Any]) -> Callable[[Any], Any]:
    def swap(tree: Any) -> Any:
        return pytree.tree_map(lambda a: function(a) if isinstance(a, Value) else a, tree)

    return swap


class _Recorder(TorchDispatchMode):
    """Writes every ATen call down, following tensors through views and in-place writes by their storage."""

    def __init__(self, state: Mapping[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []
        self.frames: list[Frame] = []
        self.open: list[int] = []
        self.values: dict[int, Value] = {}
        self.alive: list[Tensor] = []  # keeps ids of tensors unique for the length of the run
        self.count = 0
        self.state = state
        self.kept_bytes = 0
        self.by_storage: dict[int, list[Value]] = {}
        self.last_write: dict[int, Value] = {}

    def value(self, tensor: Tensor) -> Value:
        """The current value of a tensor; tensors never seen before are constants of the model."""
        value = self.values.get(id(tensor))
        if value is None:
            value = self._new(tensor, None, const=True, source=self.state.get(id(tensor), ""))
        writer = self.last_write.get(_storage(tensor))
        if writer is not None and writer.index > value.index and writer.tensor is not tensor:
            merged = Call(
                len(self.calls), _read_after_write, (value, writer), {}, [value, writer], [], tuple(self.open)
            )
            self.calls.append(merged)
            value = self._new(tensor, merged, const=value.const and writer.const)
            self._link(merged, value)
        return value

    def input(self, tensor: Tensor) -> Value:
        """Declare a tensor as an input of the run."""
        return self._new(tensor, None, const=False)

    def _new(self, tensor: Tensor, call: Call | None, *, const: bool, source: str = "") -> Value:
        self.count += 1
        value = Value(self.count, tensor, call, const, source)
        self.values[id(tensor)] = value
        self.alive.append(tensor)
        self.by_storage.setdefault(_storage(tensor), []).append(value)
        return value

    @staticmethod
    def _link(call: Call, *outputs: Value) -> None:
        call.outputs.extend(outputs)
        for value in call.inputs:
            value.users.append(call)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        seen: list[Value] = []

        def read(item: Any) -> Any:
            if not isinstance(item, Tensor):
                return item
            seen.append(self.value(item))
            return seen[-1]

        recorded = pytree.tree_map(read, (args, kwargs))
        written = _written(func, args, kwargs)
        for tensor in written:
            self._snapshot(tensor)
        result = kernel(func, args)(*args, **kwargs)
        call = Call(len(self.calls), func, recorded[0], recorded[1], seen, [], tuple(self.open))
        self.calls.append(call)
        self._keep(t for t in pytree.tree_leaves(result) if isinstance(t, Tensor) and not t._is_view())
        const = all(v.const for v in seen) and torch.Tag.nondeterministic_seeded not in getattr(func, "tags", ())
        outputs = [self._new(t, call, const=const) for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
        self._link(call, *outputs)
        for tensor in written:
            value = self.values.get(id(tensor))
            if value is None or value.call is not call:
                value = self._new(tensor, call, const=const)
                call.outputs.append(value)
            self.last_write[_storage(tensor)] = value
        return result

    def _keep(self, tensors: Iterable[Tensor]) -> None:
        self.kept_bytes += sum(t.nbytes for t in tensors if t.layout == torch.strided)
        if self.kept_bytes > MOST_BYTES:
            raise RecordingTooLargeError(f"its run holds more than {MOST_BYTES / 2**30:.0f} GiB of intermediate values")

    def _snapshot(self, tensor: Tensor) -> None:
        """Keep what values of this storage hold now, before it is overwritten."""
        for value in self.by_storage.get(_storage(tensor), ()):
            if value.call is not None or not value.const:
                value.tensor = value.tensor.detach().clone()
                self._keep([value.tensor])
        self.by_storage[_storage(tensor)] = []


def _read_after_write(value: Tensor, writer: Tensor) -> Tensor:  # noqa: ARG001
    return value


def _storage(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return id(tensor)


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors a call writes to."""
    schema = func._schema
    if not schema.is_mutable:
        return []
    found: list[Tensor] = []
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        item = args[position] if position < len(args) else kwargs.get(argument.name)
        found += [t for t in pytree.tree_leaves(item) if isinstance(t, Tensor)]
    return found


def record(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Recording:
    """Run `module(*args, **kwargs)` once without gradients and record it. The caller owns the module and its inputs."""
    state = {id(t): name for name, t in _named_state(module)}
    recorder = _Recorder(state)
    paths: dict[int, str] = {}
    for name, child in module.named_modules():
        paths.setdefault(id(child), name)

    def to_values(tree: Any) -> Any:
        return pytree.tree_map(lambda a: recorder.value(a) if isinstance(a, Tensor) else a, tree)

    def enter(child: nn.Module, a: Any, k: Any) -> None:
        if id(child) in paths and isinstance(child, nn.Module):
            frame = Frame(paths[id(child)], child, a, k, to_values((a, k)), depth=len(recorder.open))
            recorder.frames.append(frame)
            recorder.open.append(len(recorder.frames) - 1)

    def leave(child: nn.Module, _a: Any, _k: Any, output: Any) -> None:
        if id(child) in paths and recorder.open:
            recorder.frames[recorder.open.pop()].output = to_values(output)

    with torch.no_grad(), _no_compile():
        inputs = [
            recorder.input(t)
            for t in _unique(t for t in pytree.tree_leaves((args, dict(kwargs))) if isinstance(t, Tensor))
        ]
        handles = [child.register_forward_pre_hook(enter, with_kwargs=True, prepend=True) for child in module.modules()]
        handles += [child.register_forward_hook(leave, with_kwargs=True) for child in module.modules()]
        try:
            with recorder:
                output = module(*args, **kwargs)
            tree = pytree.tree_map(lambda a: recorder.value(a) if isinstance(a, Tensor) else a, output)
        finally:
            for handle in handles:
                handle.remove()
    outputs = [v for v in pytree.tree_leaves(tree) if isinstance(v, Value)]
    return Recording(recorder.calls, recorder.frames, inputs, outputs, tree)


def _unique(tensors: Iterator[Tensor]) -> list[Tensor]:
    return list({id(t): t for t in tensors}.values())


def _named_state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _no_compile() -> Any:
    return torch.compiler.set_stance("force_eager")
