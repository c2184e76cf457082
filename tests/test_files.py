"""Several files change together or not at all, wherever the writing process dies."""

import errno
import os
import shutil
import time
from pathlib import Path

import pytest

from sta_adapter.adapter import atomic_write as files
from sta_adapter.adapter.atomic_write import atomic_folder_write, finish_write

OLD, NEW = {"a": b"old a", "b": b"old b", "lora": b"old"}, {"a": b"new a", "b": b"new b", "more": b"new"}
STEPS = ("fsync", "replace", "unlink", "rmdir", "mkdir", "listdir")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def die_at(count):
    """Make this process die at its `count`th call that changes files."""
    calls = iter(range(count))

    def dying(call):
        def step(*args, **kwargs):
            if next(calls, None) is None:
                os._exit(9)
            return call(*args, **kwargs)

        return step

    for name in STEPS:
        setattr(os, name, dying(getattr(os, name)))


def test_whenever_the_writer_dies(tmp_path):
    """Old files, or new ones and none that was to go; then a next write works. At the last step nothing is left to die for."""
    seen = []
    for count in range(100):
        folder = tmp_path / str(count)
        atomic_folder_write(folder, OLD)
        child = os.fork()
        if child == 0:
            die_at(count)
            atomic_folder_write(folder, NEW, ["lora"])
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        finish_write(folder)
        found = contents(folder)
        assert found in (OLD, NEW), f"died at step {count}"
        seen.append(found == NEW)
        atomic_folder_write(folder, {"a": b"newest"})
        assert contents(folder) == {**found, "a": b"newest"}
        if status == 0:
            break
        assert status == 9
    assert seen == sorted(seen)  # first the old ones, from one moment on the new ones
    assert 3 < seen.count(False) < 100
    assert seen.count(True) > 3


def test_an_error_leaves_nothing_behind(tmp_path, monkeypatch):
    atomic_folder_write(tmp_path, OLD)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        atomic_folder_write(tmp_path, NEW)
    assert contents(tmp_path) == OLD
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(OLD)


def test_what_killed_writers_left_is_thrown_away_after_a_day(tmp_path):
    old, fresh = tmp_path / f"{files.SAVING}old", tmp_path / f"{files.SAVING}fresh"
    old.mkdir()
    fresh.mkdir()
    os.utime(old, (time.time() - 2 * files.DAY,) * 2)
    atomic_folder_write(tmp_path, NEW)
    assert not old.exists()
    assert fresh.exists()


def test_a_link_in_the_place_of_saved_files_is_not_followed(tmp_path):
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "folder"
    elsewhere.mkdir()
    folder.mkdir()
    (elsewhere / "a").write_text("mine")
    (folder / files.SAVED).symlink_to(elsewhere)
    finish_write(folder)
    assert (elsewhere / "a").read_text() == "mine"
    assert not (folder / "a").exists()


def test_two_writers_of_one_folder(tmp_path):
    """Each of 60 saves succeeds, and the files that stay are of one save."""
    children = []
    for writer in range(2):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                for number in range(30):
                    atomic_folder_write(tmp_path, dict.fromkeys("abc", b"%d %d" % (writer, number)))
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    finish_write(tmp_path)
    assert set(contents(tmp_path)) == set("abc")
    assert len(set(contents(tmp_path).values())) == 1
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())


def test_folders_above_are_made_and_the_files_are_written_beside_their_places(tmp_path, monkeypatch):
    folder = tmp_path / "a" / "b"
    staged = []
    sync = os.fsync
    monkeypatch.setattr(files.os, "fsync", lambda at: (staged.extend(folder.glob(f"{files.SAVING}*")), sync(at)))
    atomic_folder_write(folder, NEW)
    assert contents(folder) == NEW
    assert staged


def test_what_others_left_or_take_away_is_no_error(tmp_path, monkeypatch):
    (tmp_path / f"{files.SAVING}link").symlink_to(tmp_path / "nothing")
    odd = tmp_path / f"{files.SAVING}file"
    odd.touch()
    os.utime(odd, (time.time() - 2 * files.DAY,) * 2)
    atomic_folder_write(tmp_path, NEW)
    assert NEW.items() <= contents(tmp_path).items()

    (tmp_path / files.SAVED).mkdir()

    def gone(path):
        raise FileNotFoundError(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", gone)
        finish_write(tmp_path)
    assert not (tmp_path / files.SAVED).exists()


def test_the_first_error_is_told_when_the_staging_folder_is_gone_too(tmp_path, monkeypatch):
    def full(*args):
        for staging in tmp_path.glob(f"{files.SAVING}*"):
            shutil.rmtree(staging)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        atomic_folder_write(tmp_path, NEW)


@pytest.mark.parametrize(
    ("code", "failures", "tries"),
    [
        (errno.ENOTEMPTY, 99, 100),
        (errno.EEXIST, 1, 2),
        (errno.EACCES, 2, 3),
        (errno.ENOTEMPTY, 100, 100),
        (errno.EROFS, 1, 1),
    ],
    ids=["many", "exists", "windows", "too many", "another error"],
)
def test_another_process_that_saves_is_waited_for_a_bounded_time(tmp_path, monkeypatch, code, failures, tries):
    replace, tried = os.replace, []

    def taken(source, place):
        if Path(place).name == files.SAVED:
            tried.append(place)
            if len(tried) <= failures:
                raise OSError(code, "taken")
        replace(source, place)

    monkeypatch.setattr(files.os, "replace", taken)
    if failures < tries:
        atomic_folder_write(tmp_path, NEW)
    else:
        with pytest.raises(OSError, match="taken"):
            atomic_folder_write(tmp_path, NEW)
    assert contents(tmp_path) == (NEW if failures < tries else {})
    assert len(tried) == tries
