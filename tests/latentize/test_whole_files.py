"""Files appear whole, all of them or none."""

import pytest

from latentize.whole_files import write_text, written_whole


def test_files_take_their_places_together(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_text("old")
    with written_whole(one, other) as (first, second):
        first.write_text("new")
        second.write_text("newer")
        assert (one.read_text(), other.exists()) == ("old", False)
    assert (one.read_text(), other.read_text()) == ("new", "newer")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "other"]
    assert one.stat().st_mode & 0o777 == 0o644


def fail_with(error, *places):
    with written_whole(*places) as (first, _):
        first.write_text("half")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_everything_as_it_was(tmp_path, error):
    one = tmp_path / "one"
    one.write_text("old")
    with pytest.raises(error):
        fail_with(error, one, tmp_path / "other")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("one", "old")]


def test_a_folder_that_is_missing_is_the_callers(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "no" / "file", "text")
