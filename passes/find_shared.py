"""Find the shared expert beside a routed block: by what flows where, never by a name, and proved by numbers.

A shared expert's last linear layer is told by four things. What it computes is a function of what the routed experts
read, token by token. It is added up with the routed output: somewhere both arrive, each times one number for a token.
They arrive nowhere else: whatever is added to one and taken off the other leaves the model's outputs as they are. And
its weights are read there alone. Whatever is short of that is no shared expert, with the reason. `prove_shared` is the
third and the fourth.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from latentize.errors import first_line
from latentize.inputs import Batch, Inputs, observing, with_tokens
from latentize.moe import LatentMoE
from latentize.passes import probes
from latentize.passes.hearing import Place, heard
from latentize.passes.listening import listening
from latentize.passes.prove_shared import Runs, apart, none_found, product, proved
from latentize.passes.shared_expert import ROUNDING, SharedExpert, watched
from latentize.passes.widened import Widened

_log = logging.getLogger(__name__)

#: Tokens that the proof is made on; the second number is that of another run.
TOKENS = (24, 7)


def find_shared(
    original: nn.Module, canonical: nn.Module, blocks: Mapping[str, LatentMoE], batches: Sequence[Batch]
) -> dict[str, SharedExpert | str]:
    """The shared expert of every block, or the reason why none was found, by name.

    Args:
        original: the model whose parameters are named.
        canonical: the same with its blocks in canonical form, sharing its parameters; left as it is.
        blocks: those inside `canonical`.
        batches: inputs of the model; a few tokens of them are used.
    """
    try:
        search = _Search.of(original, canonical, blocks, batches)
        return proved(search.runs, search.hypotheses())
    except Exception as error:  # code that does not run in fp64, or not under hooks
        _log.debug("looking for shared experts failed", exc_info=True)
        why = none_found(f"the model does not run with gradients in fp64: {first_line(error)}")
        return dict.fromkeys(blocks, why)


@dataclass
class _Seen:
    """One clean run: what was where, in order, and which layers are linear ones."""

    order: dict[Place, int] = field(default_factory=dict)
    values: dict[Place, Tensor] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)


@dataclass
class _Search:
    """A model in fp64, and where its routed experts are."""

    runs: Runs
    experts: Mapping[str, str]  # block name -> path of its experts
    names: Mapping[str, tuple[str, str | None]]  # path of a layer that may be linear -> names of its parameters
    refused: Mapping[str, str]  # path of such a layer -> why its weights cannot be changed

    @classmethod
    def of(
        cls, original: nn.Module, canonical: nn.Module, blocks: Mapping[str, LatentMoE], batches: Sequence[Batch]
    ) -> _Search:
        opened = listening(canonical)
        paths = {id(module): path for path, module in canonical.named_modules()}
        experts = {name: paths[id(block.experts)] for name, block in blocks.items()}
        widths = {int(block.router.spec.weight.shape[1]) for block in blocks.values()}
        known: dict[int, list[str]] = {}
        for name, parameter in original.named_parameters(remove_duplicate=False):
            known.setdefault(id(parameter), []).append(name)
        spans = [_span(tensor) for tensor in [*original.parameters(), *original.buffers()] if tensor.numel()]
        names, refused = {}, {}
        for path, module in opened.named_modules():
            layer = _linear_parameters(module, widths)
            if layer is None or any(path.startswith(f"{own}.") for own in experts.values()):
                continue
            weight, bias = layer
            held = [known.get(id(p), []) for p in (weight, bias) if p is not None]
            if not all(held):
                refused[path] = "its weights are no parameters of the model"
            elif any(len(name) > 1 for name in held) or any(_shared(p, spans) for p in (weight, bias) if p is not None):
                refused[path] = "other layers read its weights too"
            else:
                names[path] = held[0][0], held[1][0] if bias is not None else None
        return cls(Runs(Widened().copy(opened), _inputs(canonical, batches)), experts, names, refused)

    def hypotheses(self) -> dict[str, SharedExpert | str]:
        """For every block the layer that gradients take for a shared expert, or the reason why none is."""
        seen = self._look()
        where = {name: self._reads(seen, path) for name, path in self.experts.items()}
        marks = {name: place for name, place in where.items() if isinstance(place, Place)}
        traced = _Traced(self, seen, marks)
        with self.runs.running(self.runs.inputs[0]) as call, heard(self.runs.model, traced.listen):
            call()
        return {name: place if isinstance(place, str) else traced.judge(name) for name, place in where.items()}

    def _look(self) -> _Seen:
        seen = _Seen()

        def listen(place: Place, tensor: Tensor) -> None:
            if place not in seen.order:
                seen.order[place] = len(seen.order)
                seen.values[place] = tensor.detach().clone()
            if place.end == "out" and place.leaf == 0:
                seen.calls[place.path] += 1

        with self.runs.running(self.runs.inputs[0]) as call, torch.no_grad(), heard(self.runs.model, listen):
            call()
        return seen

    def _reads(self, seen: _Seen, path: str) -> Place | str:
        """The first place where what the experts at `path` read is seen."""
        if seen.calls[path] != 1:
            return none_found(f"its routed experts run {seen.calls[path]} times in one pass")
        hidden = seen.values[Place(path, "in")]
        for place in seen.order:  # in order
            value = seen.values[place]
            inside = place.path == path or place.path.startswith(f"{path}.")
            alike = value.numel() == hidden.numel() and value.shape[-1] == hidden.shape[-1]
            if alike and not inside and torch.equal(value.reshape(hidden.shape), hidden):
                return place
        return none_found("what its routed experts read is not seen at the boundary of any module")


class _Traced:
    """The run in which gradients are taken: from every later place to each block's summands, and to what it reads."""

    def __init__(self, search: _Search, seen: _Seen, marks: Mapping[str, Place]) -> None:
        self.search, self.seen = search, seen
        self.marks = dict.fromkeys(marks.values())
        self.reads = marks
        self.starts: dict[Place, Tensor] = {}  # what the experts read, a leaf
        self.routed: dict[str, Tensor] = {}  # by path of the experts
        self.layers: dict[str, Tensor] = {}  # outputs of layers, by path
        self.features: dict[str, list[Tensor]] = {}  # some tokens of what they read, each as a number
        self.pulled: dict[Place, tuple[Tensor, Tensor]] = {}  # places later on: direction and product with it
        self.layer_paths = set(search.names) | set(search.refused)
        self.expert_paths = set(search.experts.values())

    def listen(self, place: Place, tensor: Tensor) -> Tensor | None:
        """See `heard`."""
        routed = place.end == "out" and place.path in self.expert_paths
        if routed or (place in self.marks and place not in self.starts):
            leaf, passed = watched(tensor)
            if routed:
                self.routed[place.path] = leaf
            if place in self.marks:
                self.starts[place] = leaf
            return passed
        if place.path in self.layer_paths and place.end == "in" and tensor.requires_grad:
            rows = tensor.reshape(-1, tensor.shape[-1])
            self.features[place.path] = [rows[t].sum() for t in _some(len(rows))]
        if tensor.requires_grad and place not in self.pulled:
            generator = torch.Generator().manual_seed(0)
            direction = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
            self.pulled[place] = direction, (tensor * direction).sum()
        if place.path in self.layer_paths and place == Place(place.path, "out") and tensor.requires_grad:
            self.layers[place.path] = tensor
            return tensor.clone()
        return None

    def judge(self, name: str) -> SharedExpert | str:
        """The block's shared expert, or the reason why it has none."""
        path, order = self.search.experts[name], self.seen.order
        first, routed = order[self.reads[name]], self.routed[path]
        ends = sorted(order[Place(other, "out")] for other in self.expert_paths)
        here = order[Place(path, "out")]
        end = next((later for later in ends if later > here), len(order))
        layers = {p: t for p, t in self.layers.items() if first < order[Place(p, "out")] < end}
        near = ""
        for place, (direction, pulled) in self.pulled.items():
            if not here < order[place] < end or direction.numel() != routed.numel():
                continue
            if direction.shape[-1] != routed.shape[-1]:
                continue
            known = {p: t for p, t in layers.items() if order[Place(p, "out")] <= order[place]}
            gradients = torch.autograd.grad(pulled, [routed, *known.values()], retain_graph=True, allow_unused=True)
            scale = _proportional(gradients[0], direction)
            if scale is None or not bool((scale.abs() > ROUNDING).all()):
                continue
            shared = {p: _proportional(g, direction) for p, g in zip(known, gradients[1:], strict=True)}
            for layer in sorted((p for p, s in shared.items() if s is not None and bool(s.any())), key=self._width):
                weight = self.search.names.get(layer, (layer, None))[0]
                reason = self._unfit(layer, self.starts[self.reads[name]])
                if reason:
                    near = near or f"{weight}: {reason}"
                    continue
                times = shared[layer]
                assert times is not None
                ratio = times / scale
                gated = not bool(((ratio - ratio[0]).abs() <= ROUNDING * ratio[0].abs()).all())
                return SharedExpert(*self.search.names[layer], layer, path, place, gated)
            if near:
                return none_found(near)
        return none_found(near or "no linear layer that reads what its experts read is added to the routed output")

    def _width(self, path: str) -> tuple[int, int]:
        """The widest layers first, then the earliest."""
        return -self.seen.values[Place(path, "in")].shape[-1], self.seen.order[Place(path, "out")]

    def _unfit(self, path: str, start: Tensor) -> str:
        if path in self.search.refused:
            return self.search.refused[path]
        if self.seen.calls[path] != 1:
            return f"it runs {self.seen.calls[path]} times in one pass"
        layer = self.search.runs.model.get_submodule(path)._parameters
        read, given = self.seen.values[Place(path, "in")], self.seen.values[Place(path, "out")]
        wanted = product(read, layer["weight"], layer.get("bias"))
        if not apart(given, wanted) <= ROUNDING:
            return "its output is not its input times its weight"
        rows = start.reshape(-1, start.shape[-1])
        for token, number in zip(_some(len(rows)), self.features[path], strict=True):
            (gradient,) = torch.autograd.grad(number, [start], retain_graph=True, allow_unused=True)
            if gradient is None:
                return "it does not read what the routed experts read"
            others = gradient.reshape(rows.shape).abs().sum(-1)
            if float(others.sum() - others[token]) > 0.0:
                return "what it reads at one token depends on other tokens"
        return ""


def _some(count: int) -> list[int]:
    return sorted({0, count // 2, count - 1})


def _linear_parameters(module: nn.Module, widths: set[int]) -> tuple[nn.Parameter, nn.Parameter | None] | None:
    """Weight [d, f] and bias of a module that could be a linear layer to one of the widths d."""
    held = {name: p for name, p in module._parameters.items() if p is not None}
    weight, bias = held.get("weight"), held.get("bias")
    if next(module.children(), None) is not None or held.keys() - {"weight", "bias"} or module._buffers:
        return None
    if type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.dim() != 2:
        return None
    if weight.shape[0] not in widths or (bias is not None and bias.shape != weight.shape[:1]):
        return None
    return weight, bias


def _span(tensor: Tensor) -> tuple[torch.device, int, int]:
    """The memory between a tensor's first and last element."""
    reach = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.device, tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size()


def _shared(parameter: Tensor, spans: Sequence[tuple[torch.device, int, int]]) -> bool:
    """Whether another of the tensors than the parameter itself lies in its memory."""
    device, start, end = _span(parameter)
    return sum(device == there and first < end and start < last for there, first, last in spans) != 1


def _inputs(model: nn.Module, batches: Sequence[Batch]) -> list[probes.Inputs]:
    """A few tokens of the first batch and fewer of the last, where the model takes so few."""
    found = []
    for batch, tokens in zip((batches[0], batches[-1]), TOKENS, strict=True):
        given = Inputs.of(batch)
        cut = with_tokens(given.args, given.kwargs, tokens)
        if cut is not None:
            try:
                with observing(model):
                    cut.call(model)
            except Exception:  # sizes that this model does not take
                cut = None
        used = given if cut is None else cut
        found.append(probes.Inputs("calibration", tuple(used.args), dict(used.kwargs)))
    return found


def _proportional(gradient: Tensor | None, direction: Tensor) -> Tensor | None:
    """k [T, 1] where a gradient's rows are k times the rows of `direction`; None where they are not."""
    if gradient is None or gradient.numel() != direction.numel() or gradient.shape[-1] != direction.shape[-1]:
        return None
    rows, wanted = gradient.reshape(-1, gradient.shape[-1]), direction.reshape(-1, direction.shape[-1])
    scale = (rows * wanted).sum(-1, keepdim=True) / wanted.square().sum(-1, keepdim=True)
    near = float((rows - scale * wanted).norm()) <= ROUNDING * float(rows.norm())
    return scale if near and bool(rows.isfinite().all()) else None
