"""What the Triton kernels are specialised to, and which of them a call runs, in order. Nothing here touches a device.

The same steps are launched on tensors (`kernels_triton`) and compiled ahead of time (`kernels_triton_aot`). A kernel's
parameters in small letters are tensors or counts, looked up by name; those in capitals are constants.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from latentize.activations import Activation

Form = Literal["decode", "fused", "grouped"]
FORMS: tuple[Form, ...] = ("decode", "fused", "grouped")
#: Widths up to here keep a block's accumulator on the processor: gate, up, activation and down in one kernel.
FUSED_WIDTH = 256
#: Pairs for each distinct expert up to which reading an expert's weights once per pair is taken: repeats hit the cache.
DECODE_REUSE = 1.25
#: Blocks that one program of the sort lists: not more than the pairs of a chunk.
SLICE = 64
#: Programs that keep a large device busy.
PROGRAMS = 264


@dataclass(frozen=True)
class Problem:
    """One block's routed experts, as far as kernels depend on them; strides are (expert, row), in elements."""

    num_experts: int
    top_k: int
    width: int
    intermediate: int
    dtype: torch.dtype
    activation: Activation
    weights_on_input: bool = False
    gate: tuple[int, int] | None = None
    up: tuple[int, int] | None = None
    down: tuple[int, int] | None = None
    gate_bias: int | None = None
    up_bias: int | None = None
    down_bias: int | None = None
    precision: str = "ieee"

    @classmethod
    def contiguous(
        cls, num_experts: int, top_k: int, width: int, intermediate: int, dtype: torch.dtype, activation: Activation,
        *, gated: bool, biases: bool, weights_on_input: bool = False,
    ) -> Problem:  # fmt: skip
        """The problem whose experts are contiguous gate, up [N, m, l], down [N, l, m], with all biases or none."""
        inner, outer = (intermediate * width, width), (intermediate * width, intermediate)
        return cls(
            num_experts, top_k, width, intermediate, dtype, activation, weights_on_input,
            inner if gated else None, inner, outer, intermediate if gated and biases else None,
            intermediate if biases else None, width if biases else None,
        )  # fmt: skip

    @property
    def constants(self) -> dict[str, Any]:
        """Every constant that follows from the problem, by the kernels' names."""
        a = self.activation
        strides: dict[str, Any] = {}
        for name in ("gate", "up", "down"):
            pair = getattr(self, name) or (0, 0)
            bias = getattr(self, f"{name}_bias") or 0
            strides |= {f"{name}_stride": pair[0], f"{name}_row": pair[1], f"{name}_bias_stride": bias}
        return {
            "NUM_EXPERTS": self.num_experts, "TOP_K": self.top_k, "WIDTH": self.width,
            "INTERMEDIATE": self.intermediate, "ON_INPUT": self.weights_on_input, "PRECISION": self.precision,
            "PADDED": max(16, power_of_two(self.width)), "EXPERTS": max(32, power_of_two(self.num_experts)),
            "ACTIVATION": a.name, "ALPHA": float(a.alpha), "GATE_MIN": a.gate_min, "GATE_MAX": a.gate_max,
            "UP_MIN": a.up_min, "UP_MAX": a.up_max, "UP_OFFSET": float(a.up_offset),
            **{name.upper(): value for name, value in strides.items()},
        }  # fmt: skip

    def absent(self) -> frozenset[str]:
        """The names of the experts' tensors that this problem has not."""
        names = ("gate", "gate_bias", "up_bias", "down_bias")
        return frozenset(name for name in names if getattr(self, name) is None)


@dataclass(frozen=True)
class Config:
    """One way to cut a kernel's work: its constants, warps, pipeline stages, and about how much shared memory."""

    constants: Mapping[str, int]
    num_warps: int = 4
    num_stages: int = 2
    shared: int = 0

    def options(self) -> dict[str, int]:
        """The keyword arguments of a launch."""
        return {**self.constants, "num_warps": self.num_warps, "num_stages": self.num_stages}


Grid = Callable[[int, Mapping[str, int]], tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Step:
    """One launch: a kernel, its constants, its grid as a function of (tokens, config's constants), its configs."""

    name: str
    kernel: Any
    constants: Mapping[str, Any]
    grid: Grid
    configs: tuple[Config, ...]
    key: str = field(default="")

    @property
    def arguments(self) -> tuple[str, ...]:
        """Names of the tensors and counts, in the kernel's order."""
        return tuple(name for name in self.kernel.arg_names if name.islower())


@dataclass(frozen=True)
class Cut:
    """How a form cuts its work for some tokens: blocks of `block` rows, outputs in `splits` parts to be added.

    Pairs are sorted by `chunk` at a time.
    """

    form: Form
    block: int
    splits: int
    chunk: int = 128

    @classmethod
    def of(cls, problem: Problem, tokens: int, form: Form | None = None) -> Cut:
        """The cut for so many tokens; the form is `choose_form`'s where it is None."""
        form = form or choose_form(problem, tokens)
        if form == "decode":
            return cls(form, 16, 1)
        pairs = tokens * problem.top_k
        share = power_of_two(max(1, pairs // problem.num_experts))  # pairs that an expert gets
        chunk = min(2048, max(128, power_of_two(pairs) // 256))
        largest = 128 if form == "grouped" else 128 // problem.dtype.itemsize  # fused: they stay in shared memory whole
        block = min(largest, max(16, share))
        if form == "grouped":
            return cls(form, block, 1, chunk)
        idle = PROGRAMS // max(1, block_count(problem, pairs, block))
        return cls(form, block, min(8, power_of_two(max(1, idle)), -(-problem.intermediate // 32)), chunk)


def block_count(problem: Problem, pairs: int, block: int) -> int:
    """The largest number of blocks of one expert each that `pairs` pairs can be cut into."""
    return min(pairs, -(-pairs // block) + min(problem.num_experts, pairs))


def workspaces(problem: Problem, tokens: int, cut: Cut) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of what the kernels hand one another, by name."""
    pairs = tokens * problem.top_k
    if cut.form == "decode":
        return {"activated": ((pairs, problem.intermediate), torch.float32)}
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"order": ((pairs,), torch.int32)}
    for name in ("block_expert", "block_start", "block_rows"):
        shapes[name] = ((block_count(problem, pairs, cut.block),), torch.int32)
    shapes["chunk_counts"] = ((-(-pairs // cut.chunk), problem.constants["EXPERTS"]), torch.int32)
    shapes["outputs"] = ((pairs, cut.splits, problem.width), problem.dtype)
    if cut.form == "grouped":
        shapes["activated"] = ((pairs, problem.intermediate), problem.dtype)
    return shapes


def choose_form(problem: Problem, tokens: int) -> Form:
    """The form for so many tokens, were they routed at random.

    Decode reads an expert once for each pair; it is taken while few pairs share one.
    """
    pairs, n = tokens * problem.top_k, problem.num_experts
    distinct = n * (1 - (1 - 1 / n) ** pairs) if n > 1 else 1
    if tokens == 1 or pairs <= DECODE_REUSE * distinct:
        return "decode"
    return "fused" if problem.width <= FUSED_WIDTH else "grouped"


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << max(0, number - 1).bit_length()


@functools.lru_cache(maxsize=1024)
def steps(problem: Problem, cut: Cut) -> tuple[Step, ...]:
    """The launches of one call, in order; Triton must be installed."""
    from latentize import kernels_triton_decode as decode
    from latentize import kernels_triton_grouped as grouped
    from latentize.kernels_triton_sort import count_pairs, place_pairs

    k, m, width = problem.top_k, problem.intermediate, problem.width
    constants = {**problem.constants, "BLOCK": cut.block, "SPLITS": cut.splits, "CHUNK": cut.chunk, "SLICE": SLICE}
    constants["OUTPUTS"] = power_of_two(k * cut.splits)
    constants["CHUNKS"] = max(1, min(64, 8192 // constants["EXPERTS"]))

    def blocks(tokens: int) -> int:
        return block_count(problem, tokens * k, cut.block)

    def step(kernel: Any, grid: Grid, configs: tuple[Config, ...]) -> Step:
        own = {name: constants[name] for name in kernel.arg_names if name in constants}
        name = kernel.fn.__name__
        return Step(name, kernel, own, grid, configs, f"{name} {problem.dtype} {own}")

    if cut.form == "decode":
        first = step(decode.decode_up, lambda t, c: (t * k, -(-m // c["ROWS"])), streaming(problem, width))
        second = step(decode.decode_down, lambda t, c: (t, -(-width // c["ROWS"])), streaming(problem, m))
        return first, second
    count = step(count_pairs, lambda t, _: (-(-t * k // cut.chunk),), (Config({}, 4),))
    place = step(place_pairs, lambda t, _: (-(-t * k // SLICE),), (Config({}, 8),))
    add = step(grouped.combine, lambda t, c: (t, -(-width // c["COLUMNS"])), combining(k * cut.splits, width))
    if cut.form == "fused":
        both = step(grouped.fused, lambda t, _: (blocks(t) * cut.splits,), fusing(problem, cut.block))
        return count, place, both, add
    up_tiles, down_tiles = tiling(problem, cut.block, up=True), tiling(problem, cut.block)
    first = step(grouped.grouped_up, lambda t, c: (blocks(t) * -(-m // c["COLUMNS"]),), up_tiles)
    second = step(grouped.grouped_down, lambda t, c: (blocks(t) * -(-width // c["COLUMNS"]),), down_tiles)
    return count, place, first, second, add


def streaming(problem: Problem, length: int) -> tuple[Config, ...]:
    """Configs of the decode kernels, whose inner loop runs over `length`; the first is taken where nothing is tuned."""
    size = problem.dtype.itemsize
    chosen = []
    sizes = ((4, 2048, 4, 4), (2, 2048, 4, 4), (8, 512, 2, 4), (8, 512, 4, 1), (4, 1024, 8, 1), (1, 2048, 2, 1))
    for rows, nbytes, warps, stages in sizes:
        inner = min(nbytes // size, max(16, power_of_two(length)))
        rows = min(64, rows * (nbytes // size) // inner)  # short rows: more of them
        constants = {"ROWS": rows, "INNER": inner, "STAGES": stages}
        chosen.append(Config(constants, warps, stages, 2 * stages * rows * inner * size))
    return tuple(chosen)


def tiling(problem: Problem, block: int, *, up: bool = False) -> tuple[Config, ...]:
    """Configs of a grouped matrix product: columns of the result and bytes of a row of an operand tile."""
    operands = 2 if up and problem.gate is not None else 1
    few = ((64, 256, 4, 4), (64, 256, 4, 3), (32, 256, 4, 4), (128, 256, 4, 2))  # rows: weights stream past them
    many = ((128, 128, 8, 3), (256, 128, 8, 3), (256, 128, 8, 4), (64, 128, 8, 3), (128, 128, 4, 3), (64, 128, 4, 3))
    chosen = []
    for columns, nbytes, warps, stages in few if block <= 32 else many:
        if block * columns * operands > 128 * 32 * warps:  # fp32 accumulators: at most 128 registers of a thread
            continue
        shared = stages * nbytes * (block + operands * columns)
        chosen.append(Config({"COLUMNS": columns, "INNER": nbytes // problem.dtype.itemsize}, warps, stages, shared))
    return tuple(chosen)


def fusing(problem: Problem, block: int) -> tuple[Config, ...]:
    """Configs of the fused kernel: neurons of one turn of its loop."""
    padded, size = max(16, power_of_two(problem.width)), problem.dtype.itemsize
    operands = 2 if problem.gate is None else 3
    sizes = ((32, 4, 2), (64, 8, 2), (32, 8, 3), (16, 4, 2), (16, 4, 1))
    return tuple(
        Config({"COLUMNS": columns}, warps, stages, padded * size * (block + stages * operands * columns))
        for columns, warps, stages in sizes
    )


def combining(outputs: int, width: int) -> tuple[Config, ...]:
    """The config of the combine kernel, which adds so many rows: about 4096 values at a time."""
    return (Config({"COLUMNS": min(power_of_two(width), max(32, 4096 // power_of_two(outputs)))}, 4, 1),)


def fitting(configs: tuple[Config, ...], shared: int) -> tuple[Config, ...]:
    """The configs that fit in so many bytes of shared memory; the smallest where none seems to."""
    fits = tuple(config for config in configs if config.shared <= shared)
    return fits or (min(configs, key=lambda config: config.shared),)
