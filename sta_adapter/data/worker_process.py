"""Calls in a process of their own, which may hang, crash or be killed without taking the caller along.

The process is forked at the first call and serves all that follow. A call that takes too long gets it killed; the next
call forks another one. It offers itself to the kernel's out-of-memory killer first.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import multiprocessing
import os
import pickle
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path
from typing import Generic, TypeVar, cast

from sta_adapter.data.tensor_handover import HAS_MEMFD, mapped, written
from sta_adapter.data.worker_signals import die_with_parent, end_workers
from sta_adapter.errors import DataError, STAError, VideoError

T = TypeVar("T")
GRACE = 5.0  # seconds after the limit at which the process ends itself, should its caller be gone
POSSIBLE = sys.platform == "linux"  # elsewhere forking is missing or unsafe: calls run in this process, without a limit

ORPHANED = 5.0  # seconds after which a process that waits for calls sees that its caller is gone
DEATH_TOLD = 1.0  # seconds after which the signal of a process's death has come
KEPT = {-1: 256 << 20, -4: 0}  # malloc.h: M_TRIM_THRESHOLD; M_MMAP_MAX, as M_MMAP_THRESHOLD goes no further than 32 MB


class ProcessError(VideoError):
    """A call in a process of its own took too long, or killed that process."""


class Isolated(Generic[T]):
    """A function, called in a process of its own.

    Args:
        function: what to call. Its arguments and result must be picklable.
        timeout: seconds that a call may take.
        memory: bytes that the process may take beyond what it begins with; None for no limit.
    """

    def __init__(self, function: Callable[..., T], timeout: float, memory: int | None = None) -> None:
        self.function = function
        self.timeout = timeout
        self.memory = memory
        self._pipe: Connection | None = None
        self._pid = self._owner = 0

    def __call__(self, *args: object) -> T:
        """The function's result; what it raises is raised here.

        Raises:
            ProcessError: the call took too long, or its process died.
        """
        pipe = self._connected()
        try:
            pipe.send(args)
            reply = _receive(pipe) if pipe.poll(self.timeout) else None
        except (EOFError, OSError) as error:
            raise ProcessError(f"the process that decodes it died ({self._end()}).") from error
        except BaseException:  # a reply that is still to come would be taken for that of the next call
            self.close()
            raise
        if reply is None:
            self.close()
            raise ProcessError(f"not done after {self.timeout:g} s (decode_timeout), so its process was stopped.")
        result, failure = reply
        if failure is not None:
            raise failure
        return cast("T", result)

    def close(self) -> None:
        """End the process, if this one began it."""
        pid, owner, pipe = self._pid, self._owner, self._pipe
        self._pid, self._pipe = 0, None
        if pipe is not None:
            pipe.close()
        if pid and owner == os.getpid():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            _reap(pid)

    def _connected(self) -> Connection:
        """The pipe to a living process of our own; one that was inherited by forking serves another caller."""
        if self._pipe is not None and self._owner == os.getpid():
            return self._pipe
        self.close()
        ours, theirs = Pipe()
        with warnings.catch_warnings():  # Python 3.12 warns of threads; the child touches nothing that they hold
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            try:
                ours.close()
                if self.memory is not None:
                    _limit_memory(self.memory)
                _serve(self.function, theirs, self.timeout + GRACE)
            finally:
                os._exit(0)
        theirs.close()
        self._pid, self._owner, self._pipe = pid, os.getpid(), ours
        return ours

    def _end(self) -> str:
        """Forget a process that died; gives how."""
        status = _reap(self._pid)
        self._pid = 0 if status is not None else self._pid
        self.close()
        if status is None or not os.WIFSIGNALED(status):
            return "it ended silently"
        name = signal.Signals(os.WTERMSIG(status)).name
        return f"{name}, often for lack of memory" if name == "SIGKILL" else name

    def __getstate__(self) -> dict[str, object]:
        """Copies and pickles begin a process of their own."""
        return {**self.__dict__, "_pipe": None, "_pid": 0, "_owner": 0}

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()


def _serve(function: Callable[..., object], pipe: Connection, limit: float) -> None:
    """Answer calls until the caller is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the caller's business, who kills
        signal.signal(number, signal.SIG_IGN)
    die_with_parent()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    keep_memory()
    if "torch" in sys.modules:  # threads of OpenMP don't live on in a forked process, and waiting for them never ends
        sys.modules["torch"].set_num_threads(1)
    caller = os.getppid()
    while True:
        try:
            while not pipe.poll(ORPHANED):
                if os.getppid() != caller:
                    return
            args = pipe.recv()
        except (EOFError, OSError):
            return
        signal.setitimer(signal.ITIMER_REAL, limit)
        reply: tuple[object, Exception | None]
        try:
            reply = (function(*args), None)
        except Exception as error:
            reply = (None, _portable(error))
        signal.setitimer(signal.ITIMER_REAL, 0)
        _send(pipe, reply)


def _limit_memory(more: int) -> None:
    """Let the process take so many bytes more than it has, then MemoryError."""
    import resource

    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    limit = int(fields["VmData"].split()[0]) * 1024 + more
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (limit if most == resource.RLIM_INFINITY else min(limit, most), most))


@functools.cache
def keep_memory() -> None:
    """Freed memory stays with the process: the next clip needs as much, and milliseconds to get it from the kernel."""
    with contextlib.suppress(OSError, AttributeError):  # another C library than GNU's
        mallopt = ctypes.CDLL(None).mallopt
        for option, size in KEPT.items():
            mallopt(option, size)


def _portable(error: Exception) -> Exception:
    """The error, or one of the same words if it can't be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return DataError(f"{type(error).__name__}: {error}")
    return error


def _send(pipe: Connection, value: object) -> None:
    """Pixels go beside the pickle: through memory that both processes have, which spares copying them through the pipe."""
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    raw = [buffer.raw() for buffer in buffers]
    sizes = [len(part) for part in raw]
    if not (HAS_MEMFD and any(sizes)):
        pipe.send((data, sizes, False))
        for part in raw:
            pipe.send_bytes(part)
        return
    with written(raw) as file:
        pipe.send((data, sizes, True))
        send_handle(pipe, file.fileno(), os.getppid())


def _receive(pipe: Connection) -> tuple[object, Exception | None]:
    """What the function gave, or what it raised."""
    data, sizes, shared = pipe.recv()
    buffers: list[memoryview | bytearray]
    if shared:
        memory = memoryview(mapped(recv_handle(pipe), sum(sizes)))
        ends = list(itertools.accumulate(sizes))
        buffers = [memory[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    else:
        buffers = [bytearray(size) for size in sizes]
        for buffer in buffers:
            pipe.recv_bytes_into(buffer)
    return cast("tuple[object, Exception | None]", pickle.loads(data, buffers=buffers))


def _reap(pid: int) -> int | None:
    """Wait a moment for a dying process; gives its status. One that can't even be killed is left behind."""
    for _ in range(100):
        try:
            done, status = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            return None
        if done:
            return status
        time.sleep(0.01)
    return None


@contextlib.contextmanager
def worker_errors() -> Iterator[None]:
    """A context in which errors of a DataLoader's workers are raised as what a worker raised itself, or a DataError if one died."""
    others = multiprocessing.active_children()
    try:
        try:
            yield
        except (ConnectionError, EOFError):  # as from a worker that dies while it hands a tensor over
            time.sleep(DEATH_TOLD)  # in which torch's handler of its death raises
            raise
    except BaseException as error:
        plain = _cause(error)
        if plain is None:
            raise
        end_workers(others)  # those left would end with the loader, and torch complain of the dead one once more
        link: BaseException | None = error
        while link is not None:
            link.__traceback__ = None  # its frames hold the loader
            link = link.__cause__ or link.__context__
        raise plain from error


def _cause(error: BaseException) -> STAError | None:
    kind, text = type(error), str(error)
    name = f"{kind.__module__}.{kind.__qualname__}: "
    if isinstance(error, STAError) and "DataLoader worker process" in text.split("\n", 1)[0] and name in text:
        return type(error)(text.rsplit(name, 1)[1].strip())
    if isinstance(error, RuntimeError) and text.startswith("DataLoader worker"):
        return DataError(
            f"a process that loads data died: {text.splitlines()[0]} If it was killed, memory was probably short: set fewer of "
            "them (num_workers), or fewer or smaller frames. The same command goes on from the last checkpoint."
        )
    return None
