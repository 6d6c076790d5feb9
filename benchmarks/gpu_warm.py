"""Compiles what `gpu_check.py` will time, on all cores at once, into Triton's cache: device time is for measuring."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from latentize.kernels_triton import shared_memory
from latentize.kernels_triton_aot import argument_type
from latentize.kernels_triton_steps import Config, Cut, Form, Problem, Step, fitting, steps

_TYPES = {"*fp32": torch.float32, "*bf16": torch.bfloat16, "*fp16": torch.float16, "*i32": torch.int32,
          "*i64": torch.int64}  # fmt: skip
Job = tuple[Problem, Cut, int, Config]


def compile_ahead(calls: Iterable[tuple[Problem, int, Form | None]]) -> int:
    """Compile every config of the kernels that calls (problem, tokens, form) launch on this device; how many."""
    shared = shared_memory(torch.cuda.current_device())
    jobs: dict[tuple[str, str], Job] = {}
    for problem, tokens, form in calls:
        cut = Cut.of(problem, tokens, form)
        for number, step in enumerate(steps(problem, cut)):
            for config in fitting(step.configs, shared):
                jobs.setdefault((step.key, str(config.options())), (problem, cut, number, config))
    return compile_jobs(list(jobs.values()))


def compile_jobs(jobs: list[Job]) -> int:
    """Compile these in as many processes as there are cores; a config that cannot be compiled is passed over."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 16, len(jobs)), mp_context=spawn) as pool:
        return sum(pool.map(compile_job, jobs, chunksize=4))


def compile_job(job: Job) -> bool:
    """One kernel in one config, as a launch would compile it; whether it could be."""
    problem, cut, number, config = job
    step = steps(problem, cut)[number]
    try:
        step.kernel.warmup(*mock_arguments(step, problem), grid=(1,), **step.constants, **config.options())
    except Exception:  # the tuner meets it again, and says what is wrong
        return False
    return True


def mock_arguments(step: Step, problem: Problem) -> list[Any]:
    """What stands for a step's arguments where only types count."""
    arguments: list[Any] = []
    for name in step.arguments:
        kind = argument_type(name, step, problem)
        arguments.append(None if name in problem.absent() else 1 if kind == "i32" else _TYPES[kind])
    return arguments
