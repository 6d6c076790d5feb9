"""A folder appears complete or not at all, and nothing of the user's is overwritten."""

import errno
import json
import os
from pathlib import Path

import pytest

from latentize.errors import LatentizeError, ResourceError
from latentize.staging import MANIFEST, check_space, check_target, replaced, staged, working_folder


def fill(folder, text="new"):
    (folder / "weights").write_text(text)
    (folder / MANIFEST).write_text(json.dumps({"format": "latentize", "files": ["weights", MANIFEST]}))


def write_and_fail(out, error):
    with staged(out) as folder:
        fill(folder)
        raise error


def test_a_folder_appears_when_everything_is_written(tmp_path):
    out = tmp_path / "a" / "out"
    with staged(out) as folder:
        fill(folder)
        assert not out.exists()
    assert (out / "weights").read_text() == "new"
    assert [file.name for file in out.parent.iterdir()] == ["out"]


def test_an_earlier_result_of_ours_is_replaced_as_a_whole(tmp_path):
    out = tmp_path / "out"
    with staged(out) as folder:
        fill(folder, "old")
        (folder / "model.onnx").write_text("old graph")
    with staged(out) as folder:
        fill(folder)
    assert (out / "weights").read_text() == "new"
    assert not (out / "model.onnx").exists()


def test_what_was_built_in_an_earlier_result_does_not_stand_in_the_way(tmp_path):
    library = pytest.importorskip("latentize.exporters.onnxruntime_ops").FILE
    out = tmp_path / "out"
    with staged(out) as folder:
        fill(folder, "old")
    for built in ("model.SM80.engine", library):
        (out / built).write_text("built from the old one")
    with staged(out) as folder:
        fill(folder)
    assert not [*out.glob("*.engine"), *out.glob("*.so")]
    assert (out / "weights").read_text() == "new"


def test_a_folder_to_build_in_is_gone_afterwards_and_so_are_those_of_killed_builds(tmp_path):
    dead = tmp_path / ".engine.dead"
    dead.mkdir()
    (dead / "model.onnx").write_text("half")
    with working_folder(tmp_path) as first, working_folder(tmp_path) as second:
        (first / "model.onnx").write_text("whole")
        assert {path.name for path in tmp_path.iterdir()} == {first.name, second.name}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "left",
    [
        ".report.json.x1.partial", ".latentize_onnxruntime.so.x1.partial", ".model.onnx.x1.onnx",
        ".engine.x1/model.onnx", ".float32-x1/model.onnx",
    ],
)  # fmt: skip
def test_what_a_killed_command_left_in_an_earlier_result_does_not_stand_in_the_way(tmp_path, left):
    out = tmp_path / "out"
    with staged(out) as folder:
        fill(folder, "old")
    (out / left).parent.mkdir(exist_ok=True)
    (out / left).write_text("half")
    with staged(out) as folder:
        fill(folder)
    assert {file.name for file in out.iterdir()} == {"weights", MANIFEST}


def test_a_build_at_work_in_an_earlier_result_is_named(tmp_path):
    out = tmp_path / "out"
    with staged(out) as folder:
        fill(folder)
    with working_folder(out) as work, pytest.raises(LatentizeError, match="a latentize build is at work in it; wait"):
        check_target(out)
    assert not work.exists()
    check_target(out)


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyboardInterrupt()])
def test_nothing_is_left_after_a_failure(tmp_path, error):
    out = tmp_path / "out"
    with pytest.raises(type(error)):
        write_and_fail(out, error)
    assert not list(tmp_path.iterdir())


def test_the_earlier_result_stays_when_the_new_one_fails(tmp_path):
    out = tmp_path / "out"
    with staged(out) as folder:
        fill(folder, "old")
    with pytest.raises(RuntimeError):
        write_and_fail(out, RuntimeError())
    assert (out / "weights").read_text() == "old"


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("I/O error: No space left on device (28)")]
)
def test_a_full_disk_is_a_resource_error_and_leaves_nothing(tmp_path, error):
    with pytest.raises(ResourceError, match="the disk is full") as caught:
        write_and_fail(tmp_path / "out", error)
    assert caught.value.exit_code == 5
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_ours_is_refused_and_kept(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(LatentizeError, match="not written by latentize"), staged(tmp_path) as folder:
        fill(folder)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_foreign_file_in_a_folder_of_ours_is_refused_and_kept(tmp_path):
    out = tmp_path / "out"
    with staged(out) as folder:
        fill(folder)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(LatentizeError, match=r"notes\.txt"):
        check_target(out)


def test_a_file_in_the_way_and_an_empty_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LatentizeError, match="is a file"):
        check_target(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with staged(tmp_path / "empty") as folder:
        fill(folder)
    assert (tmp_path / "empty" / "weights").exists()


def test_too_little_space_is_said_before_the_work(tmp_path):
    check_space(tmp_path / "out", 1)
    with pytest.raises(ResourceError, match="are free"):
        check_space(tmp_path / "out", 2**62)


@pytest.mark.parametrize("out", [".", "..", "/proc/mine", "/"])
def test_places_that_cannot_become_a_folder_of_ours_are_named(out):
    with pytest.raises(LatentizeError, match="with -o"):
        check_target(Path(out))


@pytest.mark.parametrize("name", ["out", "out of é"])
def test_a_mount_point_of_the_same_file_system_is_refused_before_the_work(tmp_path, monkeypatch, name):
    out, read = tmp_path / name, Path.read_bytes
    out.mkdir()
    check_target(out)
    place = str(out).replace(" ", r"\040")
    mounts = f"22 1 8:1 / / rw - ext4 a rw\n23 22 8:1 /a {place} rw - ext4 a rw\n".encode()
    monkeypatch.setattr(Path, "read_bytes", lambda p: mounts if p == Path("/proc/self/mountinfo") else read(p))
    with pytest.raises(LatentizeError, match="is a mount point, which cannot be replaced"):
        check_target(out)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LatentizeError, match="is a mount point"):
        check_target(Path(name))
    check_target(tmp_path / "another")


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EXDEV])
def test_a_folder_that_cannot_be_moved_stays_and_is_one_line(tmp_path, monkeypatch, number):
    out, rename = tmp_path / "out", Path.rename
    with staged(out) as folder:
        fill(folder, "old")

    def refused(path, target):
        if path == out:
            raise OSError(number, os.strerror(number))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(LatentizeError, match=r"cannot be replaced \(.* --resume"), staged(out) as folder:
        fill(folder)
    assert (out / "weights").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_run_left_is_cleared_by_the_next_one(tmp_path):
    out = tmp_path / "out"
    killed = tmp_path / ".out.partial-dead"
    killed.mkdir()
    (killed / "weights").write_text("half")
    with staged(out) as folder:
        fill(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_result_whose_replacement_was_killed_between_two_renames_returns(tmp_path):
    out = tmp_path / "out"
    with staged(out) as folder:
        fill(folder, "earlier")
    (tmp_path / ".out.old-dead").mkdir()
    out.rename(tmp_path / ".out.old-dead" / "out")
    with pytest.raises(RuntimeError):
        write_and_fail(out, RuntimeError())
    assert (out / "weights").read_text() == "earlier"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_another_run_at_work_beside_is_left_alone(tmp_path):
    out = tmp_path / "out"
    with staged(out) as first:
        fill(first, "first")
        with staged(out) as second:
            fill(second, "second")
        assert (first / "weights").read_text() == "first"
    assert (out / "weights").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_error_names_the_folder_that_was_asked_for(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ResourceError) as caught, staged(out) as folder:
        raise ResourceError(f"{folder / 'report.json'}: cannot be written")
    assert str(caught.value) == f"{out / 'report.json'}: cannot be written"


def checkpoint(folder, text, *names, fail=False):
    with replaced(folder, "config.json", ("model*",)) as work:
        for name in ("config.json", *names):
            (work / name).write_text(text)
        if fail:
            raise OSError(errno.ENOSPC, "No space left on device")


def test_files_replace_those_of_their_names_and_the_old_ones_go(tmp_path):
    folder = tmp_path / "n"
    checkpoint(folder, "old", "model-1", "model-2", "notes")
    checkpoint(folder, "new", "model")
    assert {file.name: file.read_text() for file in folder.iterdir()} == {
        "config.json": "new", "model": "new", "notes": "old",
    }  # fmt: skip


@pytest.mark.parametrize("there", [False, True])
def test_files_stay_as_they_were_when_the_new_ones_fail(tmp_path, there):
    folder = tmp_path / "n"
    if there:
        checkpoint(folder, "old", "model-1")
    with pytest.raises(ResourceError, match="the disk is full"):
        checkpoint(folder, "new", "model", fail=True)
    found = {file.name: file.read_text() for file in folder.glob("*")}
    assert found == ({"config.json": "old", "model-1": "old"} if there else {})
    assert folder.exists() == there


def test_the_last_file_is_there_only_with_those_it_was_written_with(tmp_path, monkeypatch):
    """However the process ends between two of them."""
    folder = tmp_path / "n"
    checkpoint(folder, "old", "model")
    rename, seen = Path.replace, []

    def watched(path, target):
        seen.append(sorted((file.name, file.read_text()) for file in folder.iterdir() if file.is_file()))
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", watched)
    checkpoint(folder, "new", "model")
    assert seen == [[], [("model", "new")]]
