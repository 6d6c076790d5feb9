"""The text as a target: which models predict it, and how far the following token is from what a model says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from latentize.heal import HealPlan, HealReport, heal
from latentize.heal_splice import reading, token_embeddings
from latentize.heal_text import next_token_loss, predicts_next
from latentize.moe import LatentMoE
from latentize.spec import ExpertsSpec, MoESpec, RouterSpec

ROWS = 12


class Counts(nn.Module):
    """Says with some certainty that `shift` comes after every token."""

    def __init__(self, shift: int, certainty: float = 8.0) -> None:
        super().__init__()
        self.tokens = nn.Embedding(ROWS, ROWS)
        self.tokens.weight.data = torch.eye(ROWS).roll(shift, 1) * certainty

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.tokens(ids)
        return out


def counting(rows: int = 4, length: int = 24) -> Tensor:
    """Sequences in which every token is the one before, plus one."""
    return (torch.arange(length) + torch.arange(rows)[:, None] * 5) % ROWS


@pytest.mark.parametrize(("shift", "certainty", "expected"), [(1, 8.0, True), (0, 8.0, False), (1, 0.1, False)])
def test_a_model_predicts_text_when_the_next_token_surprises_it_little(shift: int, certainty: float, expected: bool):
    model = Counts(shift, certainty)
    batches = [(counting(),), (counting(2),)]
    assert predicts_next(model, token_embeddings((model,), batches[0]), batches) is expected


def test_a_model_whose_output_is_not_per_token_does_not_predict_text():
    class Pooled(Counts):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids).mean(1)

    model = Pooled(1)
    assert not predicts_next(model, [model.tokens], [(counting(),)])
    assert not predicts_next(Counts(1), [], [(counting(),)])
    assert not predicts_next(Counts(1), [], [])


def test_the_loss_is_the_surprise_at_the_following_token():
    logits, ids = torch.randn(3, 5, ROWS, generator=torch.Generator().manual_seed(0)), counting(3, 5)
    loss = next_token_loss(logits, ids)
    said = logits.double().log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])
    assert loss is not None
    torch.testing.assert_close(loss.double(), -said.mean(), rtol=1e-6, atol=1e-6)
    assert next_token_loss(logits, None) is None
    assert next_token_loss(logits, ids[:, :1]) is None
    assert next_token_loss(logits[0], ids) is None


def test_it_is_taken_on_the_spliced_text_that_the_model_read():
    model, ids = Counts(1), counting()
    with reading([model.tokens], lambda: torch.Generator().manual_seed(3)) as text:
        output = model(ids)
    assert text.ids is not None
    assert not torch.equal(text.ids, ids)
    assert torch.equal(output, model(text.ids))


class Text(nn.Module):
    """Predicts a count not too well; its one block adds to what it says."""

    def __init__(self, block: LatentMoE) -> None:
        super().__init__()
        self.counts, self.block = Counts(1, 3.0), block

    def forward(self, ids: Tensor) -> Tensor:
        x = self.counts(ids)
        out: Tensor = x + self.block(x)
        return out


def block(noise: float) -> LatentMoE:
    draw = torch.Generator().manual_seed(0)
    router, up, down = (torch.randn(4, a, b, generator=draw) * 0.3 for a, b in ((1, ROWS), (6, ROWS), (ROWS, 6)))
    down = down + noise * torch.randn(down.shape, generator=draw)
    return LatentMoE(MoESpec(RouterSpec(router[:, 0], top_k=2, normalize="sum"), ExpertsSpec(up, down)))


def healed(weight: float, noise: float = 0.3) -> tuple[HealReport, float]:
    """The report, and how much the text surprises the student afterwards; `noise` is how far it begins."""
    teacher, student = Text(block(0.0)), Text(block(noise))
    batches = [(counting(4, 24).roll(i, 0),) for i in range(10)]
    plan = HealPlan(block_steps=0, model_steps=40, held_out=0.2, text=weight)
    report = heal(student, teacher, {"b": student.block}, {"b": teacher.block}, batches, steps=plan, seed=0)
    surprise = next_token_loss(student(counting()), counting())
    assert surprise is not None
    return report, surprise.item()


def test_near_the_goal_the_student_comes_closer_to_the_text_and_still_to_the_teacher():
    with_it, without = healed(0.2), healed(0.0)
    assert with_it[1] < without[1]
    assert with_it[0].loss_after < with_it[0].loss_before
    assert without[0].loss_after < without[0].loss_before


def test_far_from_the_goal_the_teacher_alone_is_the_target():
    assert healed(0.2, noise=3.0)[1] == healed(0.0, noise=3.0)[1]


@pytest.mark.parametrize(("noise", "expected"), [(0.3, 5), (3.0, 8)])
def test_near_the_goal_the_last_steps_read_the_text_as_it_is(noise: float, expected: int):
    teacher, student = Text(block(0.0)), Text(block(noise))
    batches = [(counting(4, 24).roll(i, 0),) for i in range(10)]
    given = {tuple(row.tolist()) for (ids,) in batches for row in ids}
    read: list[bool] = []

    def listen(_module: nn.Module, args: tuple[Tensor], _output: Tensor) -> None:
        if torch.is_grad_enabled():
            read.append(any(tuple(row.tolist()) not in given for row in args[0]))

    student.counts.tokens.register_forward_hook(listen)
    plan = HealPlan(block_steps=0, model_steps=8, pieces=1, held_out=0.2)
    heal(student, teacher, {"b": student.block}, {"b": teacher.block}, batches, steps=plan, seed=0)
    assert read == [True] * expected + [False] * (8 - expected)
