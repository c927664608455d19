"""Files appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from hwopt.errors import UsageError
from hwopt.files import check_writable, replacing, write_whole


def test_a_place_where_nothing_can_be_written_is_refused_before_any_work() -> None:
    with pytest.raises(UsageError, match=r"/proc/nowhere/net: cannot be written"):
        check_writable(Path("/proc/nowhere/net"))


def test_a_whole_text_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text("a longer text than the new one")
    write_whole(file, "new")
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("plan.json", "new")]


def test_an_attempt_that_fails_leaves_the_old_file_alone(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(file) as part:
        part.write_text("ne")
        raise KeyboardInterrupt
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("plan.json", "old")]


def test_an_error_names_the_file_that_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "nowhere" / "plan.json", tmp_path / "file" / "plan.json"):
        with pytest.raises(OSError) as caught:  # whichever: its name is what matters
            write_whole(place, "text")
        assert caught.value.filename == str(place)


def test_two_who_write_one_file_do_not_write_into_each_others_half(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    with replacing(file) as one:
        with replacing(file) as other:
            one.write_text("one")
            other.write_text("ot")
        assert file.read_text() == "ot"
    assert [(left.name, left.read_text()) for left in tmp_path.iterdir()] == [("plan.json", "one")]
