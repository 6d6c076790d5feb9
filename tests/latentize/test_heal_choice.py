"""Which sequences healing reads."""

from __future__ import annotations

import torch
from small_lm import VOCAB, Lm
from torch import Tensor, nn

from latentize.heal_choice import Choice, choose
from latentize.heal_crew import Crew, Worker
from latentize.heal_pieces import rows_of, sequences_of

IDS = torch.randint(VOCAB, (6, 5), generator=torch.Generator().manual_seed(0))


class Sure(nn.Module):
    """Is as sure of what follows as the first token of the sequence is large."""

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        logits = torch.zeros(*ids.shape, VOCAB)
        logits[..., 0] = ids[:, :1].float()
        return logits


def crew(teacher: nn.Module) -> Crew:
    return Crew([Worker(Lm(), teacher, {}, {}, [])])


def test_rows_are_those_of_every_tensor_that_has_the_batch():
    batch = {"ids": IDS, "mask": torch.arange(6).unsqueeze(1).expand(6, 5), "use_cache": False, "scale": torch.ones(3)}
    found = rows_of(batch, torch.tensor([4, 1]))
    assert found["ids"].equal(IDS[[4, 1]])
    assert found["mask"][:, 0].tolist() == [4, 1]
    assert found["use_cache"] is False
    assert found["scale"].shape == (3,)
    assert (sequences_of(batch), sequences_of({"scale": torch.ones(3)})) == (6, 0)


def test_sequences_are_drawn_in_proportion_and_kept_in_order():
    choice = Choice([torch.ones(6), torch.tensor([8.0, 1.0, 1.0, 0.0, 0.0, 0.0])])
    first = torch.zeros(6)
    for seed in range(400):
        (drawn,) = choice.of((torch.arange(12).view(6, 2),), 1, 1, torch.Generator().manual_seed(seed))
        first[int(drawn[0, 0]) // 2] += 1
    assert 290 <= first[0] <= 350  # 320 of 400 expected, 8 a standard deviation
    assert first[1] + first[2] == 400 - first[0]
    (drawn,) = choice.of((torch.arange(12).view(6, 2),), 0, 4, torch.Generator().manual_seed(1))
    rows = (drawn[:, 0] // 2).tolist()
    assert rows == sorted(set(rows))
    assert len(rows) == 4
    again = choice.of((torch.arange(12).view(6, 2),), 0, 4, torch.Generator().manual_seed(1))[0]
    assert again.equal(drawn)
    assert choice.of((IDS,), 0, 9, torch.Generator())[0].equal(IDS)


def test_a_sequence_weighs_more_where_the_teacher_is_less_sure():
    ids = IDS.clone()
    ids[:, 0] = torch.arange(6)
    found = choose(crew(Sure()), [{"ids": ids}])
    assert found is not None
    weights = found.weights[0]
    assert weights.diff().lt(0).all()
    entropy = torch.tensor(float(VOCAB)).log()
    torch.testing.assert_close(weights[0], entropy.square(), rtol=1e-5, atol=0)


def test_nothing_is_chosen_where_the_output_has_no_sequences():
    assert choose(crew(nn.Flatten()), [(torch.ones(4, 3, 2),)]) is None
