"""A rewritten model taken apart from its original: what it copies, what stays together, and what cannot be trained."""

from __future__ import annotations

import pytest
import torch
from tied_lm import TiedLm, batches, model
from torch import Tensor, nn

from latentize import apart as module
from latentize import conversion
from latentize.apart import apart, entangled, write_back
from latentize.conversion import Rewritten
from latentize.errors import ResourceError
from latentize.recipe import Recipe

RECIPE = Recipe(compression=2, variant="fixed", init="weights")


def rewritten(original: TiedLm) -> Rewritten:
    survey = conversion.survey(original, (), batches()[0], RECIPE)
    assert len(survey.selected) == 2
    with conversion.workspace():
        prepared = conversion.prepare(original, survey.selected, RECIPE, ())
        return conversion.rewrite(original, survey.selected, conversion.start(prepared, RECIPE))


def memory(model: nn.Module) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}


@pytest.fixture(scope="module")
def pair() -> tuple[TiedLm, Rewritten, Rewritten]:
    original = model()
    shared = rewritten(original)
    return original, shared, apart(shared)


def test_nothing_is_shared_with_the_original_and_everything_is_equal(pair):
    original, shared, own = pair
    assert memory(original) & memory(shared.model)
    assert not memory(original) & memory(own.model)
    state = shared.model.state_dict()
    assert state.keys() == own.model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in own.model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(own.model(**batches()[0]), shared.model(**batches()[0]))


def test_what_shared_memory_goes_on_sharing_it(pair):
    _, _, own = pair
    made = own.model
    assert made.head.weight is made.embed.weight
    assert made.after.weight is made.before.weight  # one parameter, so that it moves once
    assert made.after.bias is not made.before.bias
    assert made.first.untyped_storage().data_ptr() == made.second.untyped_storage().data_ptr()
    assert not made.frozen.requires_grad
    assert all(p.requires_grad for name, p in made.named_parameters() if name != "frozen")


def test_the_blocks_are_those_in_the_model_and_their_weights_were_not_copied(pair):
    _, shared, own = pair
    inside = {id(module) for module in own.model.modules()}
    for name, block in own.blocks.items():
        assert id(block.experts) in inside
        assert id(block.router) in inside
        assert block.experts.up is shared.blocks[name].experts.up


def test_every_copied_parameter_is_named_with_its_copy_and_can_be_written_back():
    original = model()
    own = apart(rewritten(original))
    wanted = {id(p) for n, p in original.named_parameters() if not n.startswith("moes")}
    assert {id(a) for a, _ in own.copies} == wanted
    with torch.no_grad():
        for parameter in {id(p): p for _, p in own.copies}.values():
            parameter += 1.0
    before = original.embed.weight
    old = before.detach().clone()
    write_back(own.copies)
    assert original.embed.weight is before is original.head.weight
    assert torch.equal(before, old + 1.0)
    assert original.before.weight.data_ptr() == original.after.weight.data_ptr()
    assert torch.equal(original.second, own.model.second)


def test_parameters_that_share_some_of_their_memory_are_named():
    whole = torch.zeros(4, 6)

    def parameter(tensor: Tensor) -> nn.Parameter:
        return nn.Parameter(tensor)

    columns = {"left": parameter(whole[:, :3]), "right": parameter(whole[:, 3:])}
    assert entangled(columns) == set()
    assert entangled({**columns, "turned": parameter(whole[:, :2].T)}) == {"left", "turned"}
    assert entangled({"wide": parameter(torch.zeros(3, 1).expand(3, 5))}) == {"wide"}
    bits = parameter(whole[:2].view(torch.int32).view(torch.float16))
    assert entangled({"narrow": bits, "last": parameter(whole[3])}) == {"narrow", "last"}


def test_out_of_memory_becomes_advice(monkeypatch):
    shared = rewritten(model())

    def fail(_tensors):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(module, "_copied", fail)
    with pytest.raises(ResourceError, match="heal_train: latent"):
        apart(shared)
