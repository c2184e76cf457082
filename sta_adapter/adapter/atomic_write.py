"""Writing several files so that a crash leaves the old ones or the new ones, never halves or a mixture.

All files are written in full into a hidden folder beside their places; renaming that folder is the one moment from
which the new ones count. Moving them to their places can then be cut off and finished later, by the next reader or
writer.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

SAVING, SAVED, REMOVED = ".saving-", ".saved", ".removed"
DAY = 86_400  # seconds after which what a killed process left is thrown away


def atomic_folder_write(folder: Path, files: Mapping[str, bytes], remove: Iterable[str] = ()) -> None:
    """Write files into a folder, and remove others, all at once.

    Args:
        folder: made with its parents when it does not exist.
        files: contents by name.
        remove: names of files that shall be gone afterwards.

    Raises:
        OSError: what the file system says; nothing temporary is left, and files that were there are as before, or,
            when only the moving failed, `finish_write` puts the new ones into their places.
    """
    folder.mkdir(parents=True, exist_ok=True)
    finish_write(folder)
    for left in folder.glob(f"{SAVING}*"):
        with contextlib.suppress(FileNotFoundError):  # of a process that saves at the same time
            if time.time() - left.stat().st_mtime > DAY:
                shutil.rmtree(left, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(dir=folder, prefix=SAVING))
    try:
        for name, content in {**files, **{name + REMOVED: b"" for name in remove}}.items():
            with (staging / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        _sync(staging)
        _declare_saved(staging, folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    finish_write(folder)


def _declare_saved(staging: Path, folder: Path) -> None:
    """Rename; where another process saves into the folder too, after its files have been moved."""
    for tries_left in range(99, -1, -1):
        try:
            return os.replace(staging, folder / SAVED)
        except OSError as error:
            if not tries_left or error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EACCES):  # Windows: the last
                raise
            finish_write(folder)


def finish_write(folder: Path) -> None:
    """Move what an interrupted `atomic_folder_write` had already declared saved into its place."""
    saved = folder / SAVED
    if not saved.is_dir() or saved.is_symlink():
        return
    gone = contextlib.suppress(FileNotFoundError)  # another process finishes it at the same time
    paths: list[Path] = []
    with gone:
        paths = sorted(saved.iterdir())
    for path in paths:
        with gone:
            if path.name.endswith(REMOVED):
                (folder / path.name.removesuffix(REMOVED)).unlink(missing_ok=True)
                path.unlink()
            else:
                os.replace(path, folder / path.name)
    with contextlib.suppress(OSError):
        saved.rmdir()
    _sync(folder)


def _sync(folder: Path) -> None:
    """Bring a folder's list of names to the disk, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
