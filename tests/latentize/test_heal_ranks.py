"""Healing by several processes, started as torchrun starts them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from latentize.heal_parts import Part
from latentize.heal_ranks import Ranks

ONE = """
import json, os, sys
import torch
import torch.distributed as dist
from latentize.heal import HealPlan, heal
from small_lm import VOCAB, Lm

torch.set_num_threads(1)
rank = int(os.environ["RANK"])
if int(os.environ["WORLD_SIZE"]) > 1:
    dist.init_process_group("gloo")
teacher, student = Lm(), Lm()
with torch.no_grad():
    for parameter in student.blocks.parameters():
        parameter.mul_(1.1 + 0.05 * rank)  # rank 0's count
blocks = [{f"blocks.{i}": block for i, block in enumerate(model.blocks)} for model in (student, teacher)]
batches = [{"ids": torch.randint(VOCAB, (8, 16), generator=torch.Generator().manual_seed(i))} for i in range(8)]
plan = HealPlan(
    block_steps=4, model_steps=6, block_tokens=32, own_share=0.5, own_steps=1, piece_tokens=32, held_out=0.2,
    save_seconds=0.0, train=sys.argv[2],
)
seen = []
def see(_router, args):
    if torch.is_grad_enabled():
        seen.append(len(args[0]))

student.blocks[0].router.register_forward_pre_hook(see)
report = heal(student, teacher, *blocks, batches, steps=plan, seed=3, checkpoint=sys.argv[1] + f"/{rank}")
print(json.dumps({
    "before": report.loss_before, "after": report.loss_after, "tokens": min(seen),
    "weights": [p.double().sum().item() for p in student.parameters()], "outside": report.outside,
    "embed": (student.embed.weight - teacher.embed.weight).norm().item(),
    "wrote": os.path.exists(sys.argv[1] + f"/{rank}/heal.pt"),
}))
"""


def healed(folder: Path, world: int, train: str) -> list[dict[str, object]]:
    """What each of `world` processes printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment = os.environ | common | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", ONE, str(folder), train], env=environment | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
        )
        for rank in range(world)
    ]
    return [json.loads(process.communicate(timeout=180)[0].splitlines()[-1]) for process in running]


@pytest.mark.parametrize("train", ["latent", pytest.param("all", marks=pytest.mark.slow)])
def test_processes_share_out_the_steps_and_end_with_the_same_weights(tmp_path: Path, train: str):
    (alone,) = healed(tmp_path / "alone", 1, train)
    first, second = healed(tmp_path / "two", 2, train)
    assert first["weights"] == second["weights"]
    assert (first["embed"] > 0) == (first["outside"] > 0) == (train == "all")
    assert first["before"] == second["before"] == pytest.approx(alone["before"], rel=1e-5)  # rank 0's weights
    assert first["after"] == second["after"]
    assert first["after"] < 0.5 * first["before"]
    assert 2 * first["tokens"] == alone["tokens"] == 2 * second["tokens"]
    assert first["wrote"]
    assert not second["wrote"]


def test_alone_nothing_is_exchanged():
    ranks, tensor = Ranks.here(), torch.ones(3)
    part = Part(1.0, 2.0, [tensor], {})
    assert (ranks.rank, ranks.world) == (0, 1)
    assert ranks.together(part, [tensor], {}) is part
    assert ranks.together(None, [tensor], {}) is None
    ranks.agreed([tensor])
    assert tensor.tolist() == [1.0, 1.0, 1.0]
