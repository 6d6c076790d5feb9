"""What calibration data says about each block: second moments, expert loads, and a bounded sample of its tokens.

One forward of the model per batch serves every block. Moments and loads are streamed over all tokens in fp64; the
sample is drawn uniformly (a seeded reservoir), so that memory does not grow with the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from latentize.errors import LatentizeError, ResourceError
from latentize.inputs import Inputs
from latentize.moe import LatentMoE
from latentize.routing import Routing
from latentize.sensitivity import LossKind, Sensitivity

#: Called after every batch with (batches done, batches in all or None when the calibration has no length).
Progress = Callable[[int, int | None], None]


@dataclass(frozen=True)
class Sample:
    """Tokens of one block, in calibration order: what its experts and its router read, and how they were routed."""

    hidden: Tensor  # [S, d]
    router_hidden: Tensor | None  # [S, d]; None where the router reads `hidden`
    weights: Tensor  # [S, k]
    indices: Tensor  # [S, k] int64
    importance: Tensor | None = None  # [S] fp32, squared gradient of the model's loss at the output, of mean about 1
    places: Tensor | None = None  # [S] int64, where in the stream of the block's tokens each was
    stream: int = 0  # tokens in that stream, those of skipped batches included


@dataclass(frozen=True)
class BlockStatistics:
    """Calibration statistics of one block, over `tokens` tokens. Second moments are uncentred fp64 means over tokens.

    The routed output is what the routed experts add up to, before `output_scale`, `output_bias` and identity experts.
    """

    tokens: int
    batches: int
    skipped: int  # batches left out for non-finite activations
    input_moment: Tensor  # [d, d] mean of (Σ_e w_e²) x xᵀ, e over the token's real experts
    output_moment: Tensor  # [d, d] mean of y yᵀ, y the routed output
    counts: Tensor  # [N + identities] int64, tokens that selected each expert
    weight_mass: Tensor  # [N + identities] fp64, sum of each expert's routing weights
    sample: Sample
    warnings: tuple[str, ...] = ()
    sensitivity: Tensor | None = None  # [d, d] see `latentize.sensitivity`; None where gradients were not to be had
    loss_kind: LossKind = "divergence"
    loss_scale: float = 1.0  # ½ mean eᵀ S e of an error e of the routed output, over this, is the loss it adds

    @property
    def unreached(self) -> list[int]:
        """Experts that no calibration token selected."""
        return (self.counts == 0).nonzero().flatten().tolist()


def collect(
    model: nn.Module,
    blocks: Mapping[str, LatentMoE],
    calibration: Iterable[Any],
    *,
    max_tokens: int = 32768,
    gradient_tokens: int = 32768,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, BlockStatistics]:
    """Run `model` over `calibration` and describe what every block saw.

    Args:
        model: contains the blocks. Run in eval mode without gradients; its training flags are restored.
        blocks: the LatentMoE modules to watch, by name.
        calibration: tuples (positional arguments) or dicts (keyword arguments); may be a one-shot iterator.
        max_tokens: tokens kept in each block's sample.
        gradient_tokens: tokens after which no more gradients are taken; 0 takes none.
        seed: of the sample.
        progress: called after every batch.

    Raises:
        LatentizeError: no batches, an item that is neither tuple nor dict, a batch that the model rejects, or a block
            for which every batch held non-finite activations.
        ResourceError: out of memory.
    """
    watches = {name: _Watch(name, block, max_tokens, seed + i) for i, (name, block) in enumerate(blocks.items())}
    sensitivity = Sensitivity(model, blocks, gradient_tokens, seed)
    total = len(calibration) if isinstance(calibration, Sized) else None
    done = 0
    with _evaluating(model):
        for done, item in enumerate(_items(calibration), start=1):
            for watch in watches.values():
                watch.batch = done - 1
            inputs = Inputs.of(item)
            lengths = {} if sensitivity.done else sensitivity.add(inputs.args, inputs.kwargs)
            for name, watch in watches.items():
                watch.importance = lengths.get(name, [])
            with torch.no_grad(), _watching(watches.values()):
                _run(model, item, done - 1)
            for watch in watches.values():
                watch.reraise()
            if progress is not None:
                progress(done, total)
    if not done:
        raise LatentizeError("calibration is empty: give at least one batch, a tuple of arguments or a dict")
    results = {name: watch.result(done) for name, watch in watches.items()}
    return {name: _with_sensitivity(name, result, sensitivity) for name, result in results.items()}


def _with_sensitivity(name: str, result: BlockStatistics, sensitivity: Sensitivity) -> BlockStatistics:
    failure = sensitivity.failure
    warning = (f"{name}: no gradients ({failure}): all output directions count alike",) if failure else ()
    return replace(
        result, sensitivity=sensitivity.result(name), warnings=(*result.warnings, *warning),
        loss_kind=sensitivity.kind, loss_scale=sensitivity.loss_scale(name),
    )  # fmt: skip


def _items(calibration: Iterable[Any]) -> Iterable[Any]:
    """The batches, with an exception of the user's iterable turned into a message."""
    iterator = iter(calibration)
    index = 0
    while True:
        try:
            item = next(iterator)
        except StopIteration:
            return
        except Exception as error:
            raise LatentizeError(f"calibration batch {index}: producing it failed: {_words(error)}") from error
        if not isinstance(item, (tuple, list, Mapping)):
            raise LatentizeError(
                f"calibration batch {index}: expected a tuple of arguments or a dict of keywords, "
                f"found {type(item).__name__}; wrap it, e.g. (batch,)"
            )
        yield item
        index += 1


def _run(model: nn.Module, item: Any, index: int) -> None:
    try:
        Inputs.of(item).call(model)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ResourceError(f"calibration batch {index}: out of memory; use smaller batches") from error
    except Exception as error:
        if "can't allocate memory" in str(error):
            raise ResourceError(f"calibration batch {index}: out of memory; use smaller batches") from error
        shapes = ", ".join(_shapes(item)) or "no tensors"
        raise LatentizeError(
            f"calibration batch {index} ({shapes}): the model rejected it: {_words(error)}; "
            "give what the model's forward accepts"
        ) from error


def _shapes(item: Any) -> list[str]:
    pairs = item.items() if isinstance(item, Mapping) else enumerate(item)
    return [f"{key}: {list(value.shape)}" for key, value in pairs if isinstance(value, Tensor)]


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@contextmanager
def _evaluating(model: nn.Module) -> Any:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _watching(watches: Iterable[_Watch]) -> Any:
    handles = []
    for watch in watches:
        handles.append(watch.block.router.register_forward_hook(watch.routed))
        handles.append(watch.block.experts.register_forward_hook(watch.computed))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Watch:
    """Streams the statistics of one block from hooks on its router and its experts."""

    def __init__(self, name: str, block: LatentMoE, max_tokens: int, seed: int) -> None:
        self.name, self.block = name, block
        self.batch = 0
        self.tokens = self.skipped = self.stream = 0
        self.bad_batches: list[int] = []
        self.router_hidden: Tensor | None = None
        self.failure: Exception | None = None
        self.importance: list[Tensor] = []  # of the calls to come
        rows, d = block.router.spec.weight.shape
        self.real = block.spec.num_experts
        device = block.router.spec.weight.device
        self.input_moment = torch.zeros(d, d, dtype=torch.float64, device=device)
        self.output_moment = torch.zeros(d, d, dtype=torch.float64, device=device)
        self.counts = torch.zeros(rows, dtype=torch.int64, device=device)
        self.weight_mass = torch.zeros(rows, dtype=torch.float64, device=device)
        self.reservoir = _Reservoir(max_tokens, seed)

    def routed(self, _module: nn.Module, inputs: tuple[Tensor, ...], _output: Routing) -> None:
        """Hook of the router: remembers what it read."""
        self.router_hidden = inputs[0]

    def computed(self, _module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Hook of the experts. An exception of ours must not look like the model rejecting its input."""
        hidden, indices, weights = inputs
        try:
            self._accumulate(hidden, indices, weights, output)
        except Exception as error:
            self.failure = error
        self.router_hidden = None

    def reraise(self) -> None:
        """Raise what the hook caught."""
        if self.failure is not None:
            raise self.failure

    def _accumulate(self, hidden: Tensor, indices: Tensor, weights: Tensor, output: Tensor) -> None:
        importance = self.importance.pop(0) if self.importance else hidden.new_full((len(hidden),), math.nan)
        places = torch.arange(self.stream, self.stream + len(hidden))
        self.stream += len(hidden)
        if not (hidden.isfinite().all() and weights.isfinite().all() and output.isfinite().all()):
            if self.batch not in self.bad_batches:
                self.bad_batches.append(self.batch)
            return
        real = indices < self.real
        share = (weights.double().square() * real).sum(-1, keepdim=True)
        x, y = hidden.double(), self._routed_output(hidden, weights, real, output)
        self.input_moment += x.T @ (x * share)
        self.output_moment += y.T @ y
        self.counts += torch.bincount(indices.flatten(), minlength=len(self.counts))
        self.weight_mass.index_add_(0, indices.flatten(), weights.double().flatten())
        self.tokens += len(hidden)
        seen = self.router_hidden
        columns = {"hidden": hidden, "weights": weights, "indices": indices, "importance": importance.float()}
        columns["places"] = places
        if seen is not None and (seen.shape != hidden.shape or seen.data_ptr() != hidden.data_ptr()):
            columns["seen"] = seen
        self.reservoir.add(columns)

    def _routed_output(self, hidden: Tensor, weights: Tensor, real: Tensor, output: Tensor) -> Tensor:
        experts = self.block.experts
        y = output.double()
        if experts.output_bias is not None:
            y = y - experts.output_bias.double()
        y = y / experts.output_scale
        if experts.num_identity:
            y = y - hidden.double() * (weights.double() * ~real).sum(-1, keepdim=True)
        return y

    def result(self, batches: int) -> BlockStatistics:
        """The statistics over `batches` batches."""
        self.skipped = len(self.bad_batches)
        if self.bad_batches and not self.tokens:
            raise LatentizeError(
                f"{self.name}: activations are not finite in any of the {batches} calibration batches; "
                "check the model's weights and the data"
            )
        scale = 1.0 / max(1, self.tokens)
        kept = self.reservoir.rows()
        d, k = self.input_moment.shape[0], self.block.spec.top_k
        sample = Sample(
            hidden=kept.get("hidden", self.input_moment.new_zeros(0, d)),
            router_hidden=kept.get("seen"),
            weights=kept.get("weights", self.input_moment.new_zeros(0, k)),
            indices=kept.get("indices", self.counts.new_zeros(0, k)),
            importance=_relative(kept.get("importance")),
            places=kept.get("places"),
            stream=self.stream,
        )
        return BlockStatistics(
            tokens=self.tokens,
            batches=batches,
            skipped=self.skipped,
            input_moment=self.input_moment * scale,
            output_moment=self.output_moment * scale,
            counts=self.counts,
            weight_mass=self.weight_mass,
            sample=sample,
            warnings=tuple(self._warnings()),
        )

    def _warnings(self) -> Iterable[str]:
        d = self.input_moment.shape[0]
        if self.bad_batches:
            shown = ", ".join(map(str, self.bad_batches[:8])) + (", …" if len(self.bad_batches) > 8 else "")
            yield f"{self.name}: activations not finite in calibration batch {shown}: {self.skipped} skipped"
        if not self.tokens:
            yield f"{self.name}: calibration never reached this block: its weights alone decide"
        elif self.tokens < d:
            yield f"{self.name}: {self.tokens} calibration tokens for width {d}: covariances are shrunk, give more data"
        unreached = (self.counts[: self.real] == 0).nonzero().flatten().tolist()
        if self.tokens and unreached:
            shown = ", ".join(map(str, unreached[:8])) + (", …" if len(unreached) > 8 else "")
            yield f"{self.name}: no calibration token reached {len(unreached)} of {self.real} experts ({shown})"


def _relative(importance: Tensor | None) -> Tensor | None:
    """Importances [S] with mean 1, tokens without a gradient counting as average; None when no token has one."""
    if importance is None:
        return None
    mean = importance.nanmean()
    return (importance / mean).nan_to_num(nan=1.0) if mean > 0 else None


class _Reservoir:
    """A uniform sample of rows from a stream: every row draws a random key, and the smallest keys stay.

    A row that comes later takes the place of one that goes; `rows` puts them back in order.
    """

    def __init__(self, capacity: int, seed: int) -> None:
        self.capacity = capacity
        self.generator = torch.Generator().manual_seed(seed)
        self.keys = torch.empty(0, dtype=torch.float64)
        self.order = torch.empty(0, dtype=torch.int64)
        self.offered = 0
        self.columns: dict[str, list[Tensor]] = {}

    def add(self, columns: dict[str, Tensor]) -> None:
        """Offer rows; every column has the same number of them."""
        count = len(next(iter(columns.values())))
        keys = torch.rand(count, generator=self.generator, dtype=torch.float64)
        order = torch.arange(self.offered, self.offered + count)
        self.offered += count
        room = min(count, self.capacity - len(self.keys))
        if room:
            self.keys, self.order = torch.cat([self.keys, keys[:room]]), torch.cat([self.order, order[:room]])
            for name, tensor in columns.items():
                self.columns.setdefault(name, []).append(tensor[:room].clone())
        if room == count:
            return
        every = torch.cat([self.keys, keys[room:]])
        kept = torch.zeros(len(every), dtype=torch.bool)
        kept[every.topk(self.capacity, largest=False).indices] = True
        gone, come = (~kept[: self.capacity]).nonzero().flatten(), kept[self.capacity :].nonzero().flatten() + room
        self.keys[gone], self.order[gone] = keys[come], order[come]
        for name, tensor in columns.items():
            parts = self.columns[name]
            whole = parts[0] if len(parts) == 1 else torch.cat(parts)
            whole[gone.to(whole.device)] = tensor[come.to(tensor.device)]
            self.columns[name] = [whole]

    def rows(self) -> dict[str, Tensor]:
        """The sample, in the order of the stream."""
        order = self.order.argsort()
        found = {}
        for name in list(self.columns):
            whole = torch.cat(self.columns.pop(name))
            found[name] = whole[order.to(whole.device)]
        return found
