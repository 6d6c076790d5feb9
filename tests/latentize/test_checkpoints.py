"""Stages are kept until the run is complete, and a resumed run that would differ is refused by name."""

import pytest
import torch
from torch import nn

from latentize.checkpoints import Checkpoints, fingerprint
from latentize.errors import LatentizeError, ResourceError
from latentize.recipe import Recipe

BATCHES = [{"x": torch.ones(2, 3)}, {"x": torch.zeros(2, 3)}]


def marks(model=None, recipe=None, batches=BATCHES):
    torch.manual_seed(0)
    return fingerprint(nn.Linear(2, 2) if model is None else model, {}, recipe or Recipe(), batches)


def test_a_finished_stage_is_not_done_again(tmp_path):
    kept = Checkpoints(tmp_path / "out")
    assert not kept.open(marks(), resume=False)
    assert torch.equal(
        kept.stage("start", dict[str, torch.Tensor], lambda: {"a": torch.arange(3)})["a"], torch.arange(3)
    )
    again = Checkpoints(tmp_path / "out")
    assert again.open(marks(), resume=True)
    assert torch.equal(again.stage("start", dict[str, torch.Tensor], pytest.fail)["a"], torch.arange(3))


def test_a_stage_that_the_disk_has_no_room_for_leaves_the_finished_ones(tmp_path, monkeypatch):
    kept = Checkpoints(tmp_path / "out")
    kept.open(marks(), resume=False)
    kept.stage("first", dict[str, float], lambda: {"a": 1.0})
    before = {file.name: file.read_bytes() for file in kept.folder.iterdir()}

    def full(tensors, path):
        path.write_bytes(b"half")
        raise RuntimeError("I/O error: No space left on device (os error 28)")  # as safetensors does

    monkeypatch.setattr("latentize.store.save_file", full)
    with pytest.raises(ResourceError, match="the disk is full; what was finished is kept there"):
        kept.stage("second", dict[str, float], lambda: {"a": 2.0})
    assert {file.name: file.read_bytes() for file in kept.folder.iterdir()} == before


def test_a_run_that_does_not_resume_starts_over(tmp_path):
    kept = Checkpoints(tmp_path / "out")
    kept.open(marks(), resume=False)
    kept.stage("scores", dict[str, float], lambda: {"loss": 1.0})
    kept.open(marks(), resume=False)
    assert kept.stage("scores", dict[str, float], lambda: {"loss": 2.0}) == {"loss": 2.0}
    kept.clear()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"recipe": Recipe(compression=4)}, r"recipe\.compression differs .* \(was 2\.0, now 4\.0\)"),
        ({"recipe": Recipe(exclude=("layers.0",))}, r"recipe\.exclude differs"),
        ({"model": nn.Linear(2, 2).requires_grad_(False)}, "model differs"),
        ({"batches": BATCHES[:1]}, "data differs"),
    ],
)
def test_a_resumed_run_that_would_differ_is_refused_by_name(tmp_path, changed, field):
    kept = Checkpoints(tmp_path / "out")
    kept.open(marks(), resume=False)
    torch.manual_seed(1)
    with pytest.raises(LatentizeError, match=field):
        kept.open(marks(**changed), resume=True)


def test_versions_are_part_of_the_fingerprint(tmp_path):
    kept = Checkpoints(tmp_path / "out")
    kept.open(marks() | {"version of torch": "1.0"}, resume=False)
    with pytest.raises(LatentizeError, match=r"version of torch differs .* \(was '1\.0'"):
        kept.open(marks(), resume=True)


def test_a_damaged_stage_is_one_line(tmp_path):
    kept = Checkpoints(tmp_path / "out")
    kept.open(marks(), resume=False)
    kept.stage("start", dict[str, torch.Tensor], lambda: {"a": torch.arange(3)})
    (kept.folder / "start.safetensors").write_bytes(b"cut")
    with pytest.raises(LatentizeError, match="start cannot be read"):
        kept.stage("start", dict[str, torch.Tensor], pytest.fail)
