"""Signals and the processes that load data: Ctrl-C and SIGTERM reach them as well, and must not end them before their run."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from multiprocessing.process import BaseProcess

PR_SET_PDEATHSIG = 1  # linux/prctl.h
MAIN = threading.main_thread().ident  # a forked process has one thread, with the number that it has in the parent
DYING = 10.0  # seconds that a killed process may take to be gone: on a loaded machine that is no matter of milliseconds


class _Passing:
    """Whether workers stay at a SIGTERM: those that begin now in this process, in a worker itself."""

    now = False


@contextlib.contextmanager
def outlasting_signals() -> Iterator[None]:
    """Workers stay at a SIGTERM, which a cluster sends to all processes of a job; the run ends them itself."""
    _Passing.now = True
    try:
        yield
    finally:
        _Passing.now = False


def outlasts() -> bool:
    """Whether a worker that begins now stays. A forked one knows; what others are given has to tell `ready_worker`."""
    return _Passing.now


def ready_worker(stays: bool = False) -> None:
    """Prepare a worker of a DataLoader, once: Ctrl-C is its parent's business, and without a parent it ends."""
    _Passing.now |= stays
    _ready(os.getpid())


@functools.lru_cache(maxsize=1)
def _ready(pid: int) -> None:
    if in_main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, _end_unless_passing)
    die_with_parent()


def _end_unless_passing(*_: object) -> None:
    if not _Passing.now:
        os._exit(0)


def die_with_parent() -> None:
    """The kernel kills this process when its parent is gone (Linux; elsewhere nothing).

    Not where another thread than the parent's main one forked it: to the kernel that thread is the parent, and a server's
    threads come and go.
    """
    if sys.platform == "linux" and threading.get_ident() == MAIN:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def in_main_thread() -> bool:
    """Whether this thread may set signal handlers."""
    return threading.current_thread() is threading.main_thread()


def end_workers(others: Iterable[BaseProcess] = ()) -> None:
    """Kill this process's workers but for others, whatever they are decoding; torch would wait five seconds for each."""
    stay = {child.pid for child in others}
    ours = [child for child in multiprocessing.active_children() if child.daemon and child.pid not in stay]
    if not ours:
        return
    # torch's handler of SIGCHLD raises when a worker was killed, in whatever the process is doing by then. It comes back when all
    # of them are gone; if one can't go, torch finds workers that died by looking every five seconds.
    previous = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if in_main_thread() else None
    try:
        for child in ours:
            child.kill()
        for child in ours:
            child.join(DYING)
    finally:
        if previous is not None and not any(child.is_alive() for child in ours):
            signal.signal(signal.SIGCHLD, previous)
