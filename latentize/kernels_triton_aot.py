"""The Triton kernels compiled ahead of time for a GPU that need not be here, as engines embed them.

A compiled kernel takes its tensors and counts in the order of `CompiledKernel.arguments`: inputs, counts, outputs, and
last what this Triton appends (pointers to scratch memory, null). All else, sizes and strides included, is a constant.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch

from latentize.errors import LatentizeError, MissingExtraError
from latentize.kernels_triton_steps import Config, Cut, Form, Problem, Step, fitting, steps

#: Compute capability -> bytes of shared memory that one block may have (CUDA C++ Programming Guide, its last appendix).
TARGETS = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
#: The version of the PTX: 8.7, the first that knows all of them, and what drivers of CUDA 12.8 and later take.
PTX_VERSION = 87
_POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
#: The parameters that are numbers; all others are tensors.
COUNTS = ("pairs", "blocks")
_INTEGERS = ("chunk_counts", "order", "block_expert", "block_start", "block_rows")


@dataclass(frozen=True)
class Argument:
    """One parameter of a compiled kernel: a tensor's or count's name, and its type, e.g. "*bf16", "*i64", "i32"."""

    name: str
    type: str


@dataclass(frozen=True)
class CompiledKernel:
    """One kernel for one target.

    `symbol` is its entry point; a block has `threads` threads and `shared` bytes of dynamic shared memory; `grid(T)` is
    `step.grid(T, config.constants)`. `cubin` runs on `target` only, `ptx` needs a driver of CUDA 12.8 or later.
    """

    symbol: str
    target: int
    arguments: tuple[Argument, ...]
    step: Step
    config: Config
    threads: int
    shared: int
    cubin: bytes
    ptx: str

    def grid(self, tokens: int) -> tuple[int, ...]:
        """Blocks to launch for so many tokens."""
        return self.step.grid(tokens, self.config.constants)

    @property
    def bare_ptx(self) -> str:
        """The PTX without the scratch pointers, for launchers that pass the arguments of the step alone.

        Raises:
            LatentizeError: the kernel uses its scratch memory.
        """
        scratch = sum(argument.name.startswith("scratch") for argument in self.arguments)
        head, entry, rest = self.ptx.partition(f".entry {self.symbol}(")
        declared, end, body = rest.partition(")")
        parameters = declared.split(",")
        for parameter in parameters[len(parameters) - scratch :]:
            if parameter.split()[-1] in body:
                raise LatentizeError(f"kernel {self.symbol} uses scratch memory, which this launcher does not give it")
        kept = ",".join(parameters[: len(parameters) - scratch])
        return f"{head}{entry}{kept.rstrip()}\n{end}{body}"


@dataclass(frozen=True)
class Compiled:
    """The kernels of one form in the order of their launches; workspaces as `kernels_triton_steps.workspaces` says."""

    problem: Problem
    cut: Cut
    kernels: tuple[CompiledKernel, ...]


def compile_for(target: int, problem: Problem, form: Form, *, tokens: int = 1) -> Compiled:
    """Compile the kernels of `form` for compute capability `target` (90 for 9.0), blocks sized for about `tokens`.

    They take any number of tokens all the same. No GPU is needed. Pointers must be aligned to 16 bytes.

    Raises:
        LatentizeError: the target or the dtype is unknown, or the kernels are being interpreted.
        MissingExtraError: Triton is not installed.
    """
    if importlib.util.find_spec("triton") is None:
        raise MissingExtraError("triton", "triton", "compiling GPU kernels (no GPU is needed for that)")
    if target not in TARGETS:
        known = ", ".join(f"{t // 10}.{t % 10}" for t in TARGETS)
        raise LatentizeError(f"compute capability {target / 10:.1f} is not known: expected one of {known}")
    if problem.dtype not in _POINTERS:
        raise LatentizeError(f"GPU kernels take fp32, bf16 and fp16, not {problem.dtype}: convert the model first")
    cut = Cut.of(problem, tokens, form)
    chosen = [(step, fitting(step.configs, TARGETS[target])[0]) for step in steps(problem, cut)]
    return Compiled(problem, cut, tuple(compile_step(target, problem, *pair) for pair in chosen))


def compile_step(target: int, problem: Problem, step: Step, config: Config) -> CompiledKernel:
    """One kernel in one of its configs; see `compile_for`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not isinstance(step.kernel, triton.JITFunction):
        raise LatentizeError("TRITON_INTERPRET is set: kernels that are interpreted cannot be compiled; unset it")
    absent = problem.absent()
    constants = {**step.constants, **config.constants, **{name: None for name in step.arguments if name in absent}}
    given = [name for name in step.arguments if name not in absent]
    arguments = tuple(Argument(name, argument_type(name, step, problem)) for name in given)
    types = {argument.name: argument.type for argument in arguments}
    names = step.kernel.arg_names
    source = ASTSource(
        fn=step.kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n, kind in types.items() if kind.startswith("*")},
    )
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "ptx_version": PTX_VERSION}
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    metadata, ptx = compiled.metadata, compiled.asm["ptx"]
    return CompiledKernel(
        metadata.name, target, arguments + _scratch(ptx, metadata.name, len(arguments)), step, config,
        32 * config.num_warps, metadata.shared, compiled.asm["cubin"], ptx,
    )  # fmt: skip


def argument_type(name: str, step: Step, problem: Problem) -> str:
    """The type of a kernel's tensor or count, as `Argument.type` spells it."""
    if name in COUNTS:
        return "i32"
    if name == "indices":
        return "*i64"
    if name in _INTEGERS:
        return "*i32"
    if name == "activated" and step.name.startswith("decode"):
        return "*fp32"
    return _POINTERS[problem.dtype]


def _scratch(ptx: str, symbol: str, given: int) -> tuple[Argument, ...]:
    """The parameters that Triton appended to ours, which take null pointers."""
    return tuple(Argument(f"scratch{i}", "*i8") for i in range(_parameters(ptx, symbol) - given))


def _parameters(ptx: str, symbol: str) -> int:
    declaration: Any = ptx.partition(f".entry {symbol}(")[2].partition(")")[0]
    return int(declaration.count(".param"))
