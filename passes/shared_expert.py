"""Find the shared expert beside a routed block: by what flows where, never by a name, and proved by numbers.

A shared expert's last linear layer is told by four things. What it computes is a function of what the routed experts
read, token by token. It is added up with the routed output: somewhere both arrive, each times one number for a token.
They arrive nowhere else: whatever is added to one and taken off the other leaves the model's outputs as they are. And
its weights are read there alone. Whatever is short of that is no shared expert, with the reason.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from latentize.errors import first_line
from latentize.inputs import Batch, Inputs, observing, with_tokens
from latentize.moe import LatentMoE
from latentize.passes import probes
from latentize.passes.double import in_fp64
from latentize.passes.hearing import Place, heard
from latentize.passes.listening import listening
from latentize.passes.widened import Widened

_log = logging.getLogger(__name__)

#: Tokens that the proof is made on; the second number is that of another run.
TOKENS = (24, 7)
#: Relative difference in fp64 that is rounding.
ROUNDING = 1e-9
#: Sizes of what is exchanged between the two summands, relative to the routed output.
SIZES = (1.0, 30.0)
#: The smallest relative change of a model's outputs that shows that it minds the routed outputs at all.
FELT = 1e-6


@dataclass(frozen=True)
class SharedExpert:
    """The last linear layer of a shared expert: what it is called, and where its sum with the routed output is seen.

    `weight` [d, f] and `bias` [d] are names of parameters of the model. Paths are those of a `listening` copy.
    """

    weight: str
    bias: str | None
    path: str  # of the linear layer
    experts: str  # of the routed experts
    total: Place  # where both have arrived
    gated: bool  # whether it is multiplied by another number for every token


@dataclass(frozen=True)
class Heard:
    """One run over T tokens of a block: the two summands, and what each is multiplied by on its way into the sum."""

    routed: Tensor  # [T, d]
    routed_scale: Tensor  # [T, 1]
    shared: Tensor  # [T, d]
    shared_scale: Tensor  # [T, 1]
    features: Tensor  # [T, f] what the shared expert's last layer reads

    @property
    def total(self) -> Tensor:
        """[T, d] what both are together."""
        return self.routed * self.routed_scale + self.shared * self.shared_scale


class NotASumError(Exception):
    """Somewhere the two outputs were not added up as the proof had it."""


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
        return search.proved(search.hypotheses())
    except Exception as error:  # code that does not run in fp64, or not under hooks
        _log.debug("looking for shared experts failed", exc_info=True)
        return dict.fromkeys(blocks, f"the model does not run in fp64 with gradients: {first_line(error)}")


def hear(model: nn.Module, experts: Mapping[str, SharedExpert], batch: Batch) -> dict[str, Heard]:
    """Run a `listening` copy, without gradients of its own, and hear both summands of each block.

    Raises:
        NotASumError: a block's summands do not arrive as they were proved to.
    """
    ears = {name: _Ear(name, expert) for name, expert in experts.items()}
    with observing(model), torch.enable_grad(), _all_heard(model, list(ears.values())):
        Inputs.of(batch).call(model)
    return {name: ear.result() for name, ear in ears.items()}


@contextmanager
def _all_heard(model: nn.Module, ears: Sequence[_Ear]) -> Iterator[None]:
    def listen(place: Place, tensor: Tensor) -> Tensor | None:
        given = (ear.listen(place, tensor) for ear in ears)
        return next((other for other in given if other is not None), None)

    paths = {path for ear in ears for path in (ear.expert.path, ear.expert.experts, ear.expert.total.path)}
    with heard(model, listen, paths):
        yield


class _Ear:
    """Hears one block: gradients from the sum back to both summands are what they are multiplied by."""

    def __init__(self, name: str, expert: SharedExpert) -> None:
        self.name, self.expert = name, expert
        self.routed = self.shared = self.features = None
        self.scales: tuple[Tensor, Tensor] | None = None

    def listen(self, place: Place, tensor: Tensor) -> Tensor | None:
        expert = self.expert
        if place == Place(expert.experts, "out"):
            self.routed = tensor.detach().requires_grad_()
            return self.routed.clone()
        if place == Place(expert.path, "in"):
            self.features = tensor.detach()
        elif place == Place(expert.path, "out"):
            self.shared = tensor.detach().requires_grad_()
            return self.shared.clone()
        if place == expert.total and self.routed is not None and self.shared is not None:
            pull = torch.linspace(0.5, 1.5, tensor.shape[-1], dtype=tensor.dtype, device=tensor.device)
            found = torch.autograd.grad((tensor * pull).sum(), [self.routed, self.shared], allow_unused=True)
            self.scales = tuple(self._scale(gradient, pull) for gradient in found)
            return tensor.detach()
        return None

    def _scale(self, gradient: Tensor | None, pull: Tensor) -> Tensor:
        if gradient is None:
            raise NotASumError(f"{self.name}: a summand does not reach the sum")
        rows = gradient.reshape(-1, gradient.shape[-1])
        wide, exact = rows.double(), pull.double()
        scale = (wide @ exact) / (exact @ exact)
        tolerance = max(ROUNDING, 8 * torch.finfo(gradient.dtype).eps)
        if not float((wide - scale[:, None] * exact).norm()) <= tolerance * max(float(wide.norm()), 1e-300):
            raise NotASumError(f"{self.name}: a summand does not arrive unchanged")
        return scale[:, None]

    def result(self) -> Heard:
        if self.routed is None or self.shared is None or self.features is None or self.scales is None:
            raise NotASumError(f"{self.name}: its sum was not reached")
        routed, shared, features = (
            t.detach().reshape(-1, t.shape[-1]) for t in (self.routed, self.shared, self.features)
        )
        return Heard(routed, self.scales[0], shared, self.scales[1], features)


@dataclass
class _Seen:
    """One clean run: what was where, in order, and which layers are linear ones."""

    order: dict[Place, int] = field(default_factory=dict)
    values: dict[Place, Tensor] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)


@dataclass
class _Search:
    """A model in fp64, and where its routed experts are."""

    model: nn.Module  # listening, in fp64
    experts: Mapping[str, str]  # block name -> path of its experts
    names: Mapping[str, tuple[str, str | None]]  # path of a layer that may be linear -> names of its parameters
    refused: Mapping[str, str]  # path of such a layer -> why its weights cannot be changed
    inputs: Sequence[probes.Inputs]

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
        names, refused = {}, {}
        for path, module in opened.named_modules():
            layer = _linear_parameters(module, widths)
            if layer is None or any(path.startswith(f"{own}.") for own in experts.values()):
                continue
            weight, bias = layer
            held = [known.get(id(p), []) for p in (weight, bias) if p is not None]
            if not all(held):
                refused[path] = "its weights are no parameters of the model"
            elif any(len(name) > 1 for name in held) or _overlaps(original, weight):
                refused[path] = "other layers read its weights too"
            else:
                names[path] = held[0][0], held[1][0] if bias is not None else None
        return cls(Widened().copy(opened), experts, names, refused, _inputs(canonical, batches))

    def hypotheses(self) -> dict[str, SharedExpert | str]:
        """For every block the layer that gradients take for a shared expert, or the reason why none is."""
        seen = self._look()
        where = {name: self._reads(seen, path) for name, path in self.experts.items()}
        marks = {name: place for name, place in where.items() if isinstance(place, Place)}
        traced = _Traced(self, seen, marks)
        with self._running(self.inputs[0]) as call, heard(self.model, traced.listen):
            call()
        return {name: place if isinstance(place, str) else traced.judge(name) for name, place in where.items()}

    def proved(self, found: Mapping[str, SharedExpert | str]) -> dict[str, SharedExpert | str]:
        """What stands the exchange of the two summands, and of the weights."""
        judged = dict(found)
        for why, test in (
            ("what is added to its output and taken off the routed output changes the model's outputs", self._exchange),
            ("the model's outputs depend on its weights in another way than through its output", self._reweigh),
        ):
            now = {name: expert for name, expert in judged.items() if isinstance(expert, SharedExpert)}
            if not now or test(now):
                continue
            for name, expert in now.items():
                if not test({name: expert}):
                    judged[name] = _none(f"{expert.weight}: {why}, so it is used elsewhere too")
        return judged

    @contextmanager
    def _running(self, inputs: probes.Inputs) -> Iterator[Any]:
        ready = inputs.to(torch.float64)
        with observing(self.model), torch.enable_grad(), torch.compiler.set_stance("force_eager"), in_fp64():
            yield lambda: self.model(*ready.args, **ready.kwargs)

    def _outputs(self, inputs: probes.Inputs) -> list[Tensor]:
        with self._running(inputs) as call, torch.no_grad():
            leaves = pytree.tree_leaves(call())
        return [t.detach().double() for t in leaves if isinstance(t, Tensor) and not t.is_complex()]

    def _look(self) -> _Seen:
        seen = _Seen()

        def listen(place: Place, tensor: Tensor) -> None:
            if place not in seen.order:
                seen.order[place] = len(seen.order)
                seen.values[place] = tensor.detach().clone()
            if place.end == "out" and place.leaf == 0:
                seen.calls[place.path] += 1

        with self._running(self.inputs[0]) as call, torch.no_grad(), heard(self.model, listen):
            call()
        return seen

    def _reads(self, seen: _Seen, path: str) -> Place | str:
        """The first place where what the experts at `path` read is seen."""
        if seen.calls[path] != 1:
            return _none(f"its routed experts run {seen.calls[path]} times in one pass")
        hidden = seen.values[Place(path, "in")]
        for place in seen.order:  # in order
            value = seen.values[place]
            inside = place.path == path or place.path.startswith(f"{path}.")
            if not inside and value.numel() == hidden.numel() and value.shape[-1] == hidden.shape[-1]:
                if torch.equal(value.reshape(hidden.shape), hidden):
                    return place
        return _none("what its routed experts read is not seen at the boundary of any module")

    def _exchange(self, experts: Mapping[str, SharedExpert]) -> bool:
        """Whether the outputs stay when the summands of all blocks exchange something."""
        felt = False
        for number, inputs in enumerate(self.inputs):
            try:
                with self._running(inputs) as call:
                    ears = {name: _Ear(name, expert) for name, expert in experts.items()}
                    with _all_heard(self.model, list(ears.values())):
                        call()
                    found = {name: ear.result() for name, ear in ears.items()}
            except NotASumError:
                return False
            clean = self._outputs(inputs)
            for size in SIZES:
                generator = torch.Generator().manual_seed(number)
                drawn = {
                    name: size * h.routed.std() * torch.randn(h.routed.shape, generator=generator, dtype=torch.float64)
                    for name, h in found.items()
                }
                moved = self._outputs_with(inputs, experts, found, drawn, both=True)
                if not _furthest(moved, clean) <= ROUNDING * size:
                    return False
                felt = felt or _furthest(self._outputs_with(inputs, experts, found, drawn, both=False), clean) > FELT
        return felt

    def _outputs_with(
        self, inputs: probes.Inputs, experts: Mapping[str, SharedExpert], found: Mapping[str, Heard],
        drawn: Mapping[str, Tensor], *, both: bool,
    ) -> list[Tensor]:  # fmt: skip
        """The outputs when each shared expert's output is moved, and, with `both`, the routed one back by as much."""
        moves: dict[Place, Tensor] = {}
        for name, expert in experts.items():
            scale = found[name].shared_scale / found[name].routed_scale
            moves[Place(expert.path, "out")] = drawn[name]
            if both:
                moves[Place(expert.experts, "out")] = -scale * drawn[name]

        def listen(place: Place, tensor: Tensor) -> Tensor | None:
            move = moves.get(place)
            return None if move is None else tensor + move.reshape(tensor.shape).to(tensor)

        with heard(self.model, listen, {place.path for place in moves}):
            return self._outputs(inputs)

    def _reweigh(self, experts: Mapping[str, SharedExpert]) -> bool:
        """Whether the outputs stay when the weights are others and the layer's output is what it was."""
        inputs = self.inputs[0]
        clean = self._outputs(inputs)
        layers = {expert.path: self.model.get_submodule(expert.path) for expert in experts.values()}
        before = {path: dict(layer._parameters.items()) for path, layer in layers.items()}
        linear = True
        read: dict[str, Tensor] = {}

        def listen(place: Place, tensor: Tensor) -> Tensor | None:
            nonlocal linear
            if place.end == "in":
                read[place.path] = tensor
                return None
            now, was = layers[place.path]._parameters, before[place.path]
            expected = _product(read[place.path], now["weight"], now["bias"] if "bias" in now else None)
            linear = linear and _apart(tensor, expected) <= ROUNDING
            return _product(read[place.path], was["weight"], was.get("bias"))

        try:
            for path, layer in layers.items():
                generator = torch.Generator().manual_seed(len(path))
                for key, parameter in before[path].items():
                    if parameter is not None:
                        noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                        other = parameter.detach() + noise * parameter.detach().abs().mean()
                        layer._parameters[key] = nn.Parameter(other, requires_grad=False)
            with heard(self.model, listen, layers):
                moved = self._outputs(inputs)
        finally:
            for path, layer in layers.items():
                layer._parameters.update(before[path])
        return linear and _furthest(moved, clean) <= ROUNDING


class _Traced:
    """The run in which gradients are taken: from every later place to each block's summands, and to what it reads."""

    def __init__(self, search: _Search, seen: _Seen, marks: Mapping[str, Place]) -> None:
        self.search, self.seen = search, seen
        self.marks = {place: None for place in marks.values()}
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
        if place in self.marks and place not in self.starts:
            self.starts[place] = tensor.detach().requires_grad_()
            return self.starts[place].clone()
        if place.end == "out" and place.path in self.expert_paths:
            self.routed[place.path] = tensor.detach().requires_grad_()
            return self.routed[place.path].clone()
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
        for place, (direction, product) in self.pulled.items():
            if not here < order[place] < end or direction.numel() != routed.numel():
                continue
            if direction.shape[-1] != routed.shape[-1]:
                continue
            known = {p: t for p, t in layers.items() if order[Place(p, "out")] <= order[place]}
            gradients = torch.autograd.grad(product, [routed, *known.values()], retain_graph=True, allow_unused=True)
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
                ratio = shared[layer] / scale  # type: ignore[operator]
                gated = not bool(((ratio - ratio[0]).abs() <= ROUNDING * ratio[0].abs()).all())
                return SharedExpert(*self.search.names[layer], layer, path, place, gated)
            if near:
                return _none(near)
        return _none(near or "no linear layer that reads what its experts read is added to the routed output")

    def _width(self, path: str) -> tuple[int, int]:
        """The widest layers first, then the earliest."""
        return -self.seen.values[Place(path, "in")].shape[-1], self.seen.order[Place(path, "out")]

    def _unfit(self, path: str, start: Tensor) -> str:
        if path in self.search.refused:
            return self.search.refused[path]
        if self.seen.calls[path] != 1:
            return f"it runs {self.seen.calls[path]} times in one pass"
        layer = self.search.model.get_submodule(path)._parameters
        read, given = self.seen.values[Place(path, "in")], self.seen.values[Place(path, "out")]
        wanted = _product(read, layer["weight"], layer["bias"] if "bias" in layer else None)
        if not _apart(given, wanted) <= ROUNDING:
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


def _none(reason: str) -> str:
    return f"no shared expert was found ({reason})"


def _some(count: int) -> list[int]:
    return sorted({0, count // 2, count - 1})


def _linear_parameters(module: nn.Module, widths: set[int]) -> tuple[nn.Parameter, nn.Parameter | None] | None:
    """Weight [d, f] and bias of a module that could be a linear layer to one of the widths d."""
    held = {name: p for name, p in module._parameters.items() if p is not None}
    weight, bias = held.get("weight"), held.get("bias")
    if next(module.children(), None) is not None or held.keys() - {"weight", "bias"} or any(True for _ in module.buffers(False)):
        return None
    if type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.dim() != 2:
        return None
    if weight.shape[0] not in widths or (bias is not None and bias.shape != weight.shape[:1]):
        return None
    return weight, bias


def _overlaps(model: nn.Module, weight: Tensor) -> bool:
    """Whether another tensor of the model's state lies in the memory of a weight."""
    start, end = weight.data_ptr(), weight.data_ptr() + weight.nbytes
    count = 0
    for _, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        if tensor.device == weight.device and tensor.numel():
            count += tensor.data_ptr() < end and start < tensor.data_ptr() + tensor.nbytes
    return count != 1


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


def _product(x: Tensor, weight: Any, bias: Any) -> Tensor:
    return F.linear(x.detach(), weight.detach().to(x), None if bias is None else bias.detach().to(x))


def _apart(a: Tensor, b: Tensor) -> float:
    """Relative difference where `b` is finite; infinite where `a` is another infinity, or nothing is to compare."""
    finite = b.isfinite()
    if a.shape != b.shape or not b.numel() or not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
        return float("inf")
    wrong, whole = float((a - b)[finite].norm()), float(b[finite].norm())
    return wrong / whole if whole else float("inf") if wrong else 0.0


def _furthest(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Largest relative difference of pairs; infinite where there are none."""
    if not b or len(a) != len(b):
        return float("inf")
    return max(_apart(one, other) for one, other in zip(a, b, strict=True))
