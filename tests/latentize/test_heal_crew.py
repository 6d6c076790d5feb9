"""Healing in several threads: copies that share parameters, parts put together, and when it is left alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from small_lm import VOCAB, Lm
from torch import Tensor

from latentize.heal import HealPlan, heal
from latentize.heal_crew import Worker, hire
from latentize.heal_parts import Part, together
from latentize.moe import LatentMoE

BATCH = {"ids": torch.randint(VOCAB, (8, 16), generator=torch.Generator().manual_seed(1))}
PLAN = HealPlan(block_steps=4, model_steps=6, block_tokens=32, piece_tokens=32, held_out=0.2)


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Unlike(Lm):
    """Answers by which copy of it is asked."""

    copies = 0

    def __deepcopy__(self, memo: dict[int, object]) -> Unlike:
        made = Unlike()
        made.copies = self.copies + 1
        return made

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * (1 + self.copies)


class Uncopied(Lm):
    def __deepcopy__(self, memo: dict[int, object]) -> Uncopied:
        raise TypeError("holds what cannot be copied")


class OnlyHere(Lm):
    """Refuses to run in another thread than the one it was made in."""

    def __init__(self) -> None:
        super().__init__()
        self.owner = threading.get_ident()

    def forward(self, ids: Tensor) -> Tensor:
        assert threading.get_ident() == self.owner
        return super().forward(ids)


def blocks_of(model: Lm) -> dict[str, LatentMoE]:
    return {f"blocks.{i}": block for i, block in enumerate(model.blocks)}  # type: ignore[misc]


def worker(student: Lm | None = None) -> Worker:
    teacher, student = Lm(), student or Lm()
    with torch.no_grad():
        for parameter in student.blocks.parameters():
            parameter.mul_(1.1)
    return Worker(student, teacher, blocks_of(student), blocks_of(teacher), [teacher.embed, student.embed])


def test_a_twin_shares_parameters_and_nothing_else():
    first = worker()
    first.student.register_buffer("counter", torch.zeros(3))
    twin = first.twin()
    for mine, its in ((first.student, twin.student), (first.teacher, twin.teacher)):
        assert all(a is b for a, b in zip(mine.parameters(), its.parameters(), strict=True))
        assert not set(map(id, mine.modules())) & set(map(id, its.modules()))
    assert twin.student.counter.data_ptr() != first.student.counter.data_ptr()
    assert list(twin.student_blocks.values()) == list(twin.student.blocks)
    assert set(map(id, twin.embeddings)) == {id(twin.teacher.embed), id(twin.student.embed)}


def test_one_worker_for_each_thread_and_none_more():
    crew = hire(worker(), BATCH, pieces=2)
    assert len(crew) == 2
    torch.set_num_threads(1)
    assert len(hire(worker(), BATCH, pieces=2)) == 1


@pytest.mark.parametrize("kind", [Unlike, Uncopied, OnlyHere])
def test_models_that_do_not_bear_it_are_healed_in_one_thread(kind: type[Lm]):
    assert len(hire(worker(kind()), BATCH, pieces=2)) == 1


def test_a_model_with_large_buffers_is_not_copied(monkeypatch):
    first = worker()
    first.student.register_buffer("table", torch.zeros(300))
    monkeypatch.setattr("latentize.heal_crew.BUFFER_BYTES", 1200)
    assert len(hire(first, BATCH, pieces=2)) == 2
    monkeypatch.setattr("latentize.heal_crew.BUFFER_BYTES", 1199)
    assert len(hire(first, BATCH, pieces=2)) == 1


def test_a_batch_that_is_not_known_to_come_apart_stays_whole():
    assert len(hire(worker(), BATCH, pieces=1)) == 1


def test_results_come_in_the_order_of_the_items_from_every_worker_at_once():
    crew = hire(worker(), BATCH, pieces=2)
    meeting = threading.Barrier(2, timeout=20)

    def work(one: Worker, item: int) -> tuple[int, int]:
        if item < 2:
            meeting.wait()  # both are at work, or this never ends
        return item, crew.workers.index(one)

    with crew.at_work():
        assert crew.each(work, range(5)) == [(0, 0), (1, 1), (2, 0), (3, 1), (4, 0)]
        assert torch.get_num_threads() == 2
    assert crew.each(lambda one, item: (item, crew.workers.index(one)), range(2)) == [(0, 0), (1, 0)]


def test_what_a_worker_raises_is_raised():
    crew = hire(worker(), BATCH, pieces=2)

    def fail(_one: Worker, item: int) -> None:
        if item == 1:
            raise RuntimeError("item 1")

    with crew.at_work(), pytest.raises(RuntimeError, match="item 1"):
        crew.each(fail, [0, 1])
    assert torch.get_num_threads() == 2


def test_gradients_of_parts_add_up_to_those_of_the_whole():
    first = worker()
    crew = hire(first, BATCH, pieces=2)
    parameters = list(first.student.blocks.parameters())

    def gradients(one: Worker, ids: Tensor) -> Part:
        loss = (one.student(ids) - one.teacher(ids)).square().mean()
        found = list(torch.autograd.grad(loss, parameters, allow_unused=True))
        return Part(loss.item() * len(ids), len(ids), found, {"block": torch.tensor([len(ids), 0])})

    whole = gradients(first, BATCH["ids"])
    with crew.at_work():
        parts = together(crew.each(gradients, [BATCH["ids"][:3], BATCH["ids"][3:]]))
    assert parts is not None
    assert parts.distance == pytest.approx(whole.distance, rel=1e-5)
    assert parts.counts["block"].tolist() == [8, 0]
    for a, b in zip(parts.gradients, whole.gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_a_gradient_that_one_part_lacks_is_the_other_parts():
    one = torch.ones(2)
    found = together([Part(1.0, 1.0, [one, None, None], {}), Part(1.0, 3.0, [one, one, None], {})])
    assert found is not None
    assert [None if g is None else g.tolist() for g in found.gradients] == [[1.0, 1.0], [0.75, 0.75], None]
    assert together([found, None]) is None


@pytest.mark.parametrize("train", ["latent", "all"])
def test_healing_in_threads_is_decided_by_the_seed_and_as_good_as_in_one(train: str):
    calibration = [{"ids": torch.randint(VOCAB, (8, 16), generator=torch.Generator().manual_seed(i))} for i in range(8)]
    plan, healed, reports = replace(PLAN, train=train), [], []
    for threads in (2, 2, 1):
        torch.set_num_threads(threads)
        w = worker()
        report = heal(w.student, w.teacher, w.student_blocks, w.teacher_blocks, calibration, steps=plan, seed=3)
        moved = not torch.equal(w.student.head.weight, w.teacher.head.weight)
        assert (train == "all") == (report.outside > 0) == moved
        healed.append([p.detach().clone() for p in w.student.parameters()])
        reports.append(report)
    assert all(torch.equal(a, b) for a, b in zip(healed[0], healed[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(healed[0], healed[2], strict=True))  # it did share out the work
    assert all(report.loss_after < 0.5 * report.loss_before for report in reports)
    assert reports[0].loss_after == pytest.approx(reports[2].loss_after, rel=0.5)
