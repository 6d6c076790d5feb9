from __future__ import annotations

import math

import pytest
import torch

from latentize.routing import route, selection_scores
from latentize.spec import Groups, RouterSpec


def spec(**options) -> RouterSpec:
    return RouterSpec(torch.empty(0), **{"top_k": 2, **options})


LOGITS = torch.tensor([[1.0, 3.0, -1.0, 2.0], [0.5, -2.0, 0.25, 4.0]], dtype=torch.float64)


def test_softmax_first_keeps_the_probabilities_over_all_experts():
    routing = route(LOGITS, spec())
    assert routing.indices.tolist() == [[1, 3], [3, 0]]
    assert routing.weights[0].tolist() == pytest.approx(LOGITS[0].softmax(0)[[1, 3]].tolist())
    assert routing.logits is LOGITS


def test_topk_first_scores_only_the_selected():
    routing = route(LOGITS, spec(order="topk_first"))
    assert routing.weights[0].tolist() == pytest.approx(torch.tensor([3.0, 2.0]).softmax(0).tolist())
    assert routing.weights.sum(-1).tolist() == pytest.approx([1, 1])


@pytest.mark.parametrize(
    "kind, function",
    [("sigmoid", torch.sigmoid), ("sqrt_softplus", lambda x: torch.log1p(x.exp()).sqrt())],
)
def test_elementwise_scores(kind, function):
    routing = route(LOGITS, spec(score=kind))
    torch.testing.assert_close(routing.weights, function(LOGITS).gather(1, routing.indices))


@pytest.mark.parametrize(
    "options, divisor",
    [
        ({"normalize": "sum", "eps": 0.5}, lambda w: w.sum(-1, keepdim=True) + 0.5),
        ({"normalize": "clamp", "eps": 1.9}, lambda w: w.sum(-1, keepdim=True).clamp_min(1.9)),
        ({"normalize": "norm", "p": 2.0}, lambda w: w.square().sum(-1, keepdim=True).sqrt()),
        ({"normalize": "norm", "p": 1.0}, lambda w: w.sum(-1, keepdim=True)),
    ],
)
def test_normalisers(options, divisor):
    plain = route(LOGITS, spec(score="sigmoid")).weights
    torch.testing.assert_close(route(LOGITS, spec(score="sigmoid", **options)).weights, plain / divisor(plain))


def test_scale_and_per_expert_scale_multiply_the_normalised_weights():
    scales = torch.tensor([1.0, 2.0, 3.0, 4.0])
    plain = route(LOGITS, spec(normalize="sum"))
    scaled = route(LOGITS, spec(normalize="sum", scale=2.5, per_expert_scale=scales))
    torch.testing.assert_close(scaled.weights, plain.weights * 2.5 * scales.double()[plain.indices])


def test_selection_bias_changes_who_is_selected_but_not_the_weight():
    bias = torch.tensor([0.0, 0.0, 10.0, 0.0])
    routing = route(LOGITS, spec(score="sigmoid", selection_bias=bias))
    assert routing.indices[:, 0].tolist() == [2, 2]
    torch.testing.assert_close(routing.weights, LOGITS.sigmoid().gather(1, routing.indices))


def test_selection_bias_on_the_logit_and_on_the_score_select_differently():
    bias = torch.tensor([0.0, 0.0, 1.5, 0.0])
    on_score = route(LOGITS, spec(score="sigmoid", selection_bias=bias))
    on_logit = route(LOGITS, spec(score="sigmoid", selection_bias=bias, selection_bias_on="logit"))
    assert 2 in on_score.indices[0].tolist()
    assert 2 not in on_logit.indices[0].tolist()


def test_softcap_bounds_the_logits():
    routing = route(LOGITS, spec(softcap=1.5))
    torch.testing.assert_close(routing.weights, (1.5 * (LOGITS / 1.5).tanh()).softmax(-1).gather(1, routing.indices))


def test_groups_keep_only_the_best_groups():
    logits = torch.tensor([[5.0, -9.0, 3.0, 3.0, 1.0, 1.0]])
    by_max = route(logits, spec(groups=Groups(3, 1, "max")))
    by_top2 = route(logits, spec(groups=Groups(3, 1, "top2"), score="sigmoid"))
    assert sorted(by_max.indices[0].tolist()) == [0, 1]
    assert sorted(by_top2.indices[0].tolist()) == [2, 3]


@pytest.mark.parametrize("fill, outside", [("-inf", -math.inf), ("zero", 0.0)])
def test_fill_of_the_groups_that_are_not_kept(fill, outside):
    router = spec(
        groups=Groups(2, 1, "max", fill), score="sigmoid", selection_bias=torch.tensor([-2.0, -2.0, -3.0, -3.0])
    )
    choice = selection_scores(LOGITS, LOGITS.sigmoid(), router)
    assert choice[0, 2:].tolist() == [outside, outside]
    # Biased scores are negative: zeros outside the kept group win, -inf never does.
    assert sorted(route(LOGITS, router).indices[0].tolist()) == ([0, 1] if fill == "-inf" else [2, 3])


def test_groups_of_one_expert_score_by_that_expert():
    routing = route(LOGITS, spec(groups=Groups(4, 2, "top2")))
    assert sorted(routing.indices[0].tolist()) == [1, 3]


def test_no_tokens():
    routing = route(LOGITS[:0], spec(normalize="sum", groups=Groups(2, 1)))
    assert routing.weights.shape == routing.indices.shape == (0, 2)
