"""What `gpu_check.py` times: latent blocks against the blocks they come from, and each way of running the experts.

Every form of a row is timed in turn, on the same inputs, new ones every round. On CUDA a form is captured into a graph
and its replays are timed by events with cold caches, so that launches from Python do not count; a form that cannot be
captured is timed as it runs, which its row says. `bandwidth` is the bytes of the experts that were hit (and of router
and projections for whole blocks) over the time, as a fraction of the measured copy bandwidth; `gemm` the FLOPs against
the measured rate; `copied` the time of a copy of as many bytes over the time. `error` is that of the form's output
against fp64.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from gpu_correct import TOLERANCE, Where, error
from torch import Tensor

from latentize import kernels_triton
from latentize.activations import Activation
from latentize.kernels_torch import Experts
from latentize.kernels_triton_steps import FUSED_WIDTH, Form, Problem
from latentize.moe import LatentMoE
from latentize.spec import ExpertsSpec, LatentSpec, MoESpec, RouterSpec

Way = Callable[[Tensor], Tensor]
Key = TypeVar("Key")
#: Rounds of each row, and how many inputs they take in turn.
ROUNDS, INPUTS = 21, 7
#: Pairs up to which each pair reading its expert's weights is tried at all.
DECODE_PAIRS = 4096


@dataclass(frozen=True)
class Sizes:
    """One block; `latent` equals `hidden` where it is not latent."""

    name: str
    hidden: int
    latent: int
    intermediate: int
    experts: int
    top_k: int
    gated: bool

    @property
    def activation(self) -> Activation:
        """SwiGLU's silu where gated, else relu²."""
        return Activation("silu" if self.gated else "relu_squared")

    def __str__(self) -> str:
        return f"{self.name} d{self.hidden} l{self.latent} m{self.intermediate} N{self.experts} k{self.top_k}"


#: Family -> the block as it is trained (None where it is latent from the start) and its latent forms.
FAMILIES: dict[str, tuple[Sizes | None, tuple[Sizes, ...]]] = {
    "Nemotron-3 Super": (None, (Sizes("latent", 4096, 1024, 2688, 512, 22, False),)),
    "Qwen3-30B-A3B": (
        Sizes("original", 2048, 2048, 768, 128, 8, True),
        (
            Sizes("acc, alpha 2", 2048, 1024, 768, 256, 16, True),
            Sizes("acc, alpha 4", 2048, 512, 768, 512, 32, True),
            Sizes("fixed, alpha 4", 2048, 512, 768, 128, 8, True),
        ),
    ),
    "95BT-8BA": (
        Sizes("original", 4096, 4096, 2688, 128, 6, False),
        (
            Sizes("acc, alpha 4", 4096, 1024, 2688, 512, 24, False),
            Sizes("eff, alpha 4", 4096, 1024, 2688, 512, 6, False),
        ),
    ),
}
TINY: dict[str, tuple[Sizes | None, tuple[Sizes, ...]]] = {
    "tiny": (Sizes("original", 24, 24, 16, 4, 2, True), (Sizes("acc, alpha 2", 24, 12, 16, 8, 4, True),))
}


def blocks_of(family: tuple[Sizes | None, tuple[Sizes, ...]]) -> list[Sizes]:
    """The blocks of a family, the original first where there is one."""
    original, latents = family
    return [*([original] if original else []), *latents]


def random_block(sizes: Sizes, where: Where, dtype: torch.dtype) -> LatentMoE:
    """A block with random weights on the device: latency does not depend on them."""
    generator = torch.Generator(where.device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        made = torch.empty(shape, dtype=dtype, device=where.device).normal_(generator=generator)
        return made.mul_(shape[-1] ** -0.5)

    n, m, width, d = sizes.experts, sizes.intermediate, sizes.latent, sizes.hidden
    gate = normal(n, m, width) if sizes.gated else None
    experts = ExpertsSpec(normal(n, m, width), normal(n, width, m), gate, activation=sizes.activation)
    latent = LatentSpec(normal(width, d), normal(d, width)) if width < d else None
    router = RouterSpec(normal(n, d), sizes.top_k, normalize="sum")
    return LatentMoE(MoESpec(router, experts, latent)).requires_grad_(False)


def grouped_mm(hidden: Tensor, indices: Tensor, weights: Tensor, experts: Experts, activation: Activation) -> Tensor:
    """The experts by torch's grouped matrix product: pairs sorted, one grouped product a matrix, outputs added."""
    flat = indices.flatten()
    order = flat.argsort(stable=True)
    token = order // indices.shape[1]
    number = torch.arange(len(experts.up), device=flat.device)
    ends = torch.searchsorted(flat[order], number, right=True).to(torch.int32)
    x = hidden[token]
    up = F.grouped_mm(x, experts.up.transpose(1, 2), offs=ends)
    gate = None if experts.gate is None else F.grouped_mm(x, experts.gate.transpose(1, 2), offs=ends)
    y = F.grouped_mm(activation(gate, up), experts.down.transpose(1, 2), offs=ends)
    slots = torch.empty_like(y).index_copy_(0, order, y * weights.flatten()[order, None])
    return slots.view(*indices.shape, -1).sum(1)


def forms_of(block: LatentMoE, kept: Kept, tokens: int) -> dict[str, Way]:
    """The block whole and its experts alone, ours (as chosen and in each form) and by torch's grouped product.

    Each takes hidden states [T, d]; the experts alone read latents and routing from `kept`.
    """
    e = block.experts
    experts = Experts(e.gate, e.up, e.down, None, None, None)

    def whole_by_grouped_mm(x: Tensor) -> Tensor:
        routing = block.router(x)
        y = grouped_mm(latent_of(block, x), routing.indices, routing.weights.to(x.dtype), experts, e.activation)
        return y if e.latent_up is None else F.linear(y, e.latent_up)

    forms: dict[str, Way] = {"block ours": block, "block grouped_mm": whole_by_grouped_mm}
    forms["router and projections"] = kept.around
    forms["experts ours"] = lambda x: e.combine(*kept(x))
    forms["experts grouped_mm"] = lambda x: grouped_mm(*kept(x), experts, e.activation)
    for form in forms_for(experts.up.shape[2], block.router.spec.top_k, tokens):
        forms[f"experts {form}"] = lambda x, form=form: kernels_triton.forward(
            *kept(x), experts, e.activation, False, form
        )
    return forms


def calls_of(family: str, tokens: Sequence[int], dtype: torch.dtype) -> Iterator[tuple[Problem, int, Form | None]]:
    """What `measure` will call the kernels with."""
    for sizes in blocks_of(FAMILIES[family]):
        problem = Problem.contiguous(
            sizes.experts, sizes.top_k, sizes.latent, sizes.intermediate, dtype, sizes.activation,
            gated=sizes.gated, biases=False,
        )  # fmt: skip
        for count in tokens:
            yield problem, count, None
            yield from ((problem, count, form) for form in forms_for(sizes.latent, sizes.top_k, count))


def forms_for(width: int, top_k: int, tokens: int) -> list[Form]:
    """The forms that are worth timing."""
    every: list[Form] = ["grouped"]
    if tokens * top_k <= DECODE_PAIRS:
        every.append("decode")
    return [*every, "fused"] if width <= FUSED_WIDTH else every


def latent_of(block: LatentMoE, x: Tensor) -> Tensor:
    """What the experts read for hidden states x [T, d]."""
    down = block.experts.latent_down
    return x if down is None else F.linear(x, down)


def exact(latent: Tensor, indices: Tensor, weights: Tensor, block: LatentMoE) -> Tensor:
    """The experts' combined output in fp64, one expert in memory at a time."""
    e, x = block.experts, latent.double()
    out = torch.zeros_like(x)
    for expert in indices.unique().tolist():
        token, slot = (indices == expert).nonzero(as_tuple=True)
        up = x[token] @ e.up[expert].double().T
        gate = None if e.gate is None else x[token] @ e.gate[expert].double().T
        y = e.activation(gate, up) @ e.down[expert].double().T
        out.index_add_(0, token, y * weights[token, slot, None].double())
    return out


class Kept:
    """Latents, indices and weights of hidden states, computed outside the timed region into tensors that stay put."""

    def __init__(self, block: LatentMoE) -> None:
        self._block = block
        self._held: tuple[Tensor, Tensor, Tensor] | None = None

    def fill(self, x: Tensor) -> None:
        """Compute what the experts read for hidden states x [T, d]."""
        routing = self._block.router(x)
        new = (latent_of(self._block, x).clone(), routing.indices.clone(), routing.weights.to(x.dtype).clone())
        if self._held is None:
            self._held = new
        for held, value in zip(self._held, new, strict=True):
            held.copy_(value)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self._held is None:
            self.fill(x)
        assert self._held is not None
        return self._held

    def around(self, x: Tensor) -> Tensor:
        """Router and projections without experts."""
        latent, up = latent_of(self._block, x), self._block.experts.latent_up
        back = latent if up is None else F.linear(latent, up)
        return back + self._block.router(x).weights.sum().to(x.dtype)


@functools.cache
def swept() -> Tensor:
    """Memory to read between measurements, larger than the device's caches."""
    return torch.zeros(1 << 26, dtype=torch.float32, device="cuda")


class Timed:
    """One form, ready to be run on inputs [T, d] and timed."""

    def __init__(self, form: Way, x: Tensor, *, graph: bool = True) -> None:
        self._form, self._x = form, x.clone()
        self._graph: Any = None
        self.mode = "eager"
        form(self._x)  # compiles and tunes
        if x.is_cuda and graph:
            self._capture()

    def _capture(self) -> None:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._form(self._x)
        except RuntimeError:  # it asks the device something
            torch.cuda.synchronize()
            return
        self._graph, self.mode = graph, "graph"

    def seconds(self, x: Tensor) -> float:
        """Time of one run on x."""
        self._x.copy_(x)
        run = self._graph.replay if self._graph is not None else lambda: self._form(self._x)
        if not x.is_cuda:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        swept().sum()  # caches hold nothing of use and nothing to be written back; what follows is queued meanwhile
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3


def measure(
    family: str, tokens: list[int], where: Where, dtype: torch.dtype, copied: float, gemm: float
) -> Iterator[dict[str, Any]]:
    """Rows of one family: all blocks of it side by side, for each number of tokens."""
    every = blocks_of((TINY if where.quick else FAMILIES)[family])
    blocks = {sizes: random_block(sizes, where, dtype) for sizes in every}
    number, rounds = (1, 1) if where.quick else (INPUTS, ROUNDS)
    for count in tokens:
        inputs = [torch.randn(count, every[0].hidden, device=where.device).to(dtype) for _ in range(number)]
        kept = {sizes: Kept(block) for sizes, block in blocks.items()}
        timed: dict[tuple[Sizes, str], Timed] = {}
        errors: dict[tuple[Sizes, str], float] = {}
        for sizes, block in blocks.items():
            expected = exact(*kept[sizes](inputs[0]), block)
            for name, form in forms_of(block, kept[sizes], count).items():
                if name.startswith("experts"):
                    errors[sizes, name] = error(form(inputs[0]), expected)
                timed[sizes, name] = Timed(form, inputs[0])
        spent = interleaved(timed, list(kept.values()), inputs, rounds)
        for (sizes, name), seconds in spent.items():
            hit = sum(int(blocks[sizes].router(x).indices.unique().numel()) for x in inputs) / number
            made = row(family, sizes, name, count, median(seconds), timed[sizes, name].mode, hit, dtype, copied, gemm)
            if name == "experts ours" and count <= 16:
                made["copied"] = copy_seconds(where, int(made["bytes"])) / median(seconds)
            yield made | {"error": errors.get((sizes, name)), "tolerance": TOLERANCE[dtype]}


def interleaved(
    timed: Mapping[Key, Timed], kept: Sequence[Kept], inputs: Sequence[Tensor], rounds: int
) -> dict[Key, list[float]]:
    """Seconds of each form in each round; a round runs every form once, on the same tokens."""
    spent: dict[Key, list[float]] = {key: [] for key in timed}
    for turn in range(rounds):
        x = inputs[turn % len(inputs)]
        for each in kept:
            each.fill(x)
        for key, form in timed.items():
            spent[key].append(form.seconds(x))
    return spent


def row(
    family: str, sizes: Sizes, form: str, tokens: int, seconds: float, mode: str, hit: float, dtype: torch.dtype,
    copied: float, gemm: float,
) -> dict[str, Any]:  # fmt: skip
    """One measurement, with the work that it did."""
    per_expert = (3 if sizes.gated else 2) * sizes.intermediate * sizes.latent
    around = sizes.experts * sizes.hidden + (2 * sizes.hidden * sizes.latent if sizes.latent < sizes.hidden else 0)
    inside, outside = not form.startswith("router"), not form.startswith("experts")
    nbytes = (hit * per_expert * inside + around * outside) * dtype.itemsize
    flops = 2 * tokens * (sizes.top_k * per_expert * inside + around * outside)
    return {
        "family": family, "block": sizes.name, "sizes": str(sizes), "form": form, "tokens": tokens, "us": seconds * 1e6,
        "mode": mode, "experts_hit": hit, "bytes": nbytes, "flops": flops, "bandwidth": nbytes / seconds / copied,
        "gemm": flops / seconds / gemm, "dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip


def overlap(where: Where, dtype: torch.dtype, tokens: list[int]) -> Iterator[dict[str, Any]]:
    """A latent block with a shared expert at width d, on one stream and with the shared expert on a second one."""
    sizes = FAMILIES["Nemotron-3 Super"][1][0]
    block = random_block(sizes, where, dtype)
    d, m = sizes.hidden, 2 * sizes.intermediate
    up, down = (torch.randn(*shape, device=where.device, dtype=dtype) / shape[1] ** 0.5 for shape in ((m, d), (d, m)))
    side = torch.cuda.Stream()

    def shared(x: Tensor) -> Tensor:
        return F.linear(F.relu(F.linear(x, up)).square(), down)

    def apart(x: Tensor) -> Tensor:
        main = torch.cuda.current_stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            other = shared(x)
        routed = block(x)
        main.wait_stream(side)
        return routed + other

    for count in tokens:
        x = torch.randn(count, d, device=where.device, dtype=dtype)
        timed = {"one stream": Timed(lambda x: block(x) + shared(x), x), "two streams": Timed(apart, x)}
        spent = interleaved(timed, (), [x], ROUNDS)
        for name, seconds in spent.items():
            yield {"family": "Nemotron-3 Super", "block": "latent + shared expert", "form": name, "tokens": count,
                   "us": median(seconds) * 1e6, "mode": timed[name].mode}  # fmt: skip


def peaks(where: Where, dtype: torch.dtype) -> tuple[float, float]:
    """Copy bandwidth (bytes read and written a second) and GEMM rate (FLOP/s) of the device, on random data."""
    size, side = (1 << 16, 64) if where.quick else (1 << 30, 8192)
    a, b = (torch.randn(side, side, device=where.device).to(dtype) for _ in range(2))
    multiplying = Timed(lambda _: a @ b, a[:1])
    gemm_seconds = median(multiplying.seconds(a[:1]) for _ in range(ROUNDS))
    return size / copy_seconds(where, size), 2 * side**3 / gemm_seconds


def copy_seconds(where: Where, nbytes: int) -> float:
    """Time of a copy that reads and writes so many bytes in all; cold, but not in a graph, where it is slower."""
    source = torch.randn(max(1, nbytes // 8), device=where.device)
    target = torch.empty_like(source)
    copying = Timed(lambda _: target.copy_(source), source[:1], graph=False)
    return median(copying.seconds(source[:1]) for _ in range(ROUNDS))
