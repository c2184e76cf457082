"""One run at a time in a folder: two would delete each other's checkpoints, and go on from each other's."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

from sta_adapter.errors import ConfigError

LOCK_FILE = ".lock"  # there while a run is, and maybe after one that was killed
_HERE: set[str] = set()  # folders with runs of this process, whose threads a file's lock doesn't keep apart
_GUARD = threading.Lock()


@contextlib.contextmanager
def sole_run(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder meanwhile, as far as its file system knows locks, which end with their process.

    Raises:
        ConfigError: another run is in it.
    """
    place = os.path.realpath(folder)
    with _GUARD:
        if place in _HERE:
            raise _at_work(folder, f"process {os.getpid()}, this one")
        _HERE.add(place)
    descriptor = None
    try:
        descriptor = _locked(folder / LOCK_FILE)
        yield
    finally:
        _HERE.discard(place)
        if descriptor is not None:
            with contextlib.suppress(OSError):
                (folder / LOCK_FILE).unlink()
            os.close(descriptor)


def _locked(file: Path) -> int | None:
    """The open file, locked for this process and not for those that it forks; None where there are no locks."""
    if importlib.util.find_spec("fcntl") is None:  # Windows
        return None
    import fcntl

    while True:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:  # of which the run's first file tells
            return None
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if file.exists() and file.stat().st_ino == os.fstat(descriptor).st_ino:  # else another run has just ended
                os.truncate(descriptor, 0)
                os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
                return descriptor
            os.close(descriptor)
        except (BlockingIOError, PermissionError) as error:
            who = os.pread(descriptor, 200, 0).decode(errors="replace")
            os.close(descriptor)
            raise _at_work(file.parent, who) from error
        except OSError:  # the file system has no locks
            os.close(descriptor)
            return None


def _at_work(folder: Path, who: str) -> ConfigError:
    return ConfigError(
        f"another run ({who}) is using {folder}, and two would resume from each other's checkpoints. Wait for it or end it, or "
        "take another output folder."
    )
