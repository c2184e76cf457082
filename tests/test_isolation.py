import contextlib
import copy
import multiprocessing
import os
import pickle
import platform
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_qwen import make_model, make_processor, write_samples
from torch.utils.data import DataLoader

from sta_adapter.data import BadSample, Collator, FrameSettings, VideoDataset
from sta_adapter.data import clip_reader as clips
from sta_adapter.data.worker_process import Isolated, ProcessError, worker_errors
from sta_adapter.data.worker_signals import end_workers, outlasting_signals, ready_worker
from sta_adapter.errors import DataError, STAError, VideoError
from sta_adapter.training import TrainingConfig, train
from sta_adapter.video import VideoNotFoundError, read_clip

AS_IS = FrameSettings(min_tokens=None, max_tokens=None)
LONG = 3600.0  # a decoder that hangs


def work(what, value=None):
    """What a decoder may do."""
    if what == "hang":
        time.sleep(LONG)
    if what == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "mute":  # its connection goes, and it stays
        os.closerange(3, 256)
        signal.pause()
    if what == "leave":
        os._exit(0)
    if what == "missing":
        raise VideoNotFoundError("no such clip")
    if what == "strange":
        raise type("Local", (Exception,), {})("can't be pickled")
    return os.getpid(), value


@pytest.fixture
def isolated():
    made = Isolated(work, timeout=30)
    yield made
    made.close()


def gone(pid):
    """Whether a process has ended, zombies included."""
    for _ in range(500):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return True
        time.sleep(0.01)
    return False


def test_calls_run_in_one_other_process(isolated):
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    first, value = isolated("give", {"pixels": pixels})
    second, _ = isolated("give")
    assert first == second != os.getpid()
    np.testing.assert_array_equal(value["pixels"], pixels)
    assert value["pixels"].flags.writeable


@pytest.mark.parametrize(
    ("what", "error"),
    [
        ("crash", r"died \(SIGSEGV\)"),
        ("killed", r"died \(SIGKILL, often for lack of memory\)"),
        ("leave", "ended silently"),
    ],
    ids=["crash", "killed", "left"],
)
def test_a_death_is_an_error_and_the_next_call_works(isolated, what, error):
    before, _ = isolated("give")
    with pytest.raises(ProcessError, match=error):
        isolated(what)
    after, value = isolated("give", 3)
    assert after != before
    assert value == 3
    assert gone(before)


def test_a_hanging_call_is_stopped():
    isolated = Isolated(work, timeout=1)
    before, _ = isolated("give")
    with pytest.raises(ProcessError, match=r"not done after 1 s \(decode_timeout\), so its process was stopped"):
        isolated("hang")
    assert gone(before)
    assert isolated("give")[0] != before


FAULTS_OF_LARGE_TENSORS = """
import resource, torch
from sta_adapter.data.worker_process import Isolated

def faults():
    for _ in range(12):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.full((25_000_000,), 1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(Isolated(faults, timeout=60.0)())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are of GNU's C library")
def test_memory_of_a_long_clip_stays_with_the_process():
    """The last of twelve tensors, each let go before the next, needs few pages of the kernel's.

    Its 100 MB are 24,000 pages, and above the 32 MB from which on malloc gives memory back at once by itself. In an
    interpreter of its own: where memory has once been too short, as in other tests, malloc serves this thread otherwise.
    """
    found = subprocess.run([sys.executable, "-c", FAULTS_OF_LARGE_TENSORS], capture_output=True, text=True, check=True)
    assert int(found.stdout) < 1000


@pytest.mark.parametrize(
    ("what", "kind", "error"),
    [("missing", VideoNotFoundError, "no such clip"), ("strange", DataError, "Local: can't be pickled")],
    ids=["missing", "strange"],
)
def test_errors_come_back(isolated, what, kind, error):
    with pytest.raises(kind, match=error):
        isolated(what)


def test_copies_and_forks_have_processes_of_their_own(isolated):
    own, _ = isolated("give")
    copies = [copy.deepcopy(isolated), pickle.loads(pickle.dumps(isolated))]
    pids = {made("give")[0] for made in copies}
    reader, writer = os.pipe()
    fork = os.fork()
    if fork == 0:
        try:
            os.write(writer, str(isolated("give")[0]).encode())
        finally:
            os._exit(0)
    os.waitpid(fork, 0)
    theirs = int(os.read(reader, 20))
    assert len({own, theirs, *pids}) == 4
    assert isolated("give")[0] == own
    assert gone(theirs)


def test_the_process_ends_with_its_caller(isolated):
    pid, _ = isolated("give")
    isolated.close()
    assert gone(pid)
    isolated.close()


def test_the_process_ends_with_its_caller_also_in_the_middle_of_a_call(isolated):
    reader, writer = os.pipe()
    caller = os.fork()
    if caller == 0:
        try:
            os.write(writer, str(isolated("give")[0]).encode())
            isolated("hang")
        finally:
            os._exit(0)
    pid = int(os.read(reader, 20))
    os.kill(caller, signal.SIGKILL)
    os.waitpid(caller, 0)
    assert gone(pid)


def in_a_thread_that_ends(function):
    """The function's result, when the thread that called it is gone for the kernel as well."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    while Path(f"/proc/self/task/{thread.native_id}").exists():
        time.sleep(0.01)
    return results[0]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere calls have no process of their own")
def test_the_process_outlives_the_thread_that_began_it(isolated):
    """The threads of a server come and go; to the kernel the thread that forked is the parent."""
    pid, _ = in_a_thread_that_ends(lambda: isolated("give"))
    assert isolated("give", 3) == (pid, 3)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere calls have no process of their own")
def test_a_process_that_a_thread_began_ends_with_its_caller(isolated, monkeypatch):
    """Also where another process has inherited the caller's end of the pipe."""
    monkeypatch.setattr("sta_adapter.data.worker_process.ORPHANED", 0.05)
    read, write = os.pipe()
    middle = os.fork()
    if middle == 0:
        pid, _ = in_a_thread_that_ends(lambda: isolated("give"))
        heir = os.fork()
        if heir == 0:
            time.sleep(LONG)
        os.write(write, f"{pid} {heir}".encode())
        os._exit(0)
    os.waitpid(middle, 0)
    pid, heir = map(int, os.read(read, 64).split())
    try:
        assert gone(pid)
    finally:
        os.kill(heir, signal.SIGKILL)
        os.close(read)
        os.close(write)


def test_a_process_that_hangs_up_and_lives_on_is_killed(isolated, monkeypatch):
    pid, _ = isolated("give")
    monkeypatch.setattr("sta_adapter.data.worker_process.time.sleep", lambda seconds: None)
    with pytest.raises(ProcessError, match="ended silently"):
        isolated("mute")
    monkeypatch.undo()
    assert gone(pid)


def exit_code(action):
    """Of a fork that runs this; 9 if it raised."""
    fork = os.fork()
    if fork == 0:
        code = 9
        try:
            code = action() or 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1])


def test_signals_to_a_worker_are_its_parents_business():
    def ctrl_c():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which what runs in the background may lack
        ready_worker()
        os.kill(os.getpid(), signal.SIGINT)
        return 3  # it goes on

    def terminated():
        ready_worker()
        with outlasting_signals():
            os.kill(os.getpid(), signal.SIGTERM)
        os.write(writer, b"outlasted")
        os.kill(os.getpid(), signal.SIGTERM)
        return 4

    reader, writer = os.pipe()
    assert exit_code(ctrl_c) == 3
    assert exit_code(terminated) == 0
    assert os.read(reader, 20) == b"outlasted"


# ---- in a DataLoader's workers


@pytest.mark.slow
def test_a_worker_outlasts_signals_that_was_not_forked(processor, tmp_path):
    """As Python 3.14 and macOS start them: it shares no memory with the run."""
    dataset = VideoDataset(write_samples(tmp_path, 4), processor, frames=AS_IS)
    with outlasting_signals():
        items = iter(DataLoader(dataset, None, num_workers=1, prefetch_factor=1, multiprocessing_context="spawn"))
        next(items)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGTERM)
        assert len(list(items)) == 3


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return make_processor(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def trouble(monkeypatch, tmp_path):
    """Eight samples; what the decoder does with some is set by file name."""
    file, what = write_samples(tmp_path, 8), {}

    def reading(path, **options):
        work(what.get(Path(path).name))
        return read_clip(path, **options)

    monkeypatch.setattr(clips, "read_clip", reading)
    return file, what


def load(dataset, processor, workers=2, epochs=1):
    loader = DataLoader(dataset, 2, num_workers=workers, collate_fn=Collator.of(processor))
    return [batch for _ in range(epochs) for batch in loader]


@pytest.mark.slow
def test_trouble_makes_bad_samples_and_no_more(trouble, processor):
    file, what = trouble
    what.update({"1.mp4": "hang", "4.mp4": "crash", "6.mp4": "killed"})
    (file.parent / "2.mp4").unlink()
    dataset = VideoDataset(file, processor, frames=AS_IS, decode_timeout=3)
    batches = load(dataset, processor, epochs=2)
    assert [len(batch["input_ids"]) for batch in batches] == [1, 1, 1, 1] * 2
    bad = [message for batch in batches[:4] for message in batch["bad_samples"]]
    assert [message.split(": ")[0].rsplit(" ", 1)[1] for message in bad] == ["2", "3", "5", "7"]
    assert "1.mp4: not done after 3 s" in bad[0]
    assert "2.mp4" in bad[1]
    assert "4.mp4: the process that decodes it died (SIGSEGV)" in bad[2]
    assert "6.mp4: the process that decodes it died (SIGKILL, often" in bad[3]
    assert [message for batch in batches[4:] for message in batch["bad_samples"]] == bad


@pytest.mark.parametrize("timeout", [60.0, None], ids=["isolated", "without_limit"])
def test_workers_give_the_same_tensors(trouble, processor, timeout):
    dataset = VideoDataset(trouble[0], processor, frames=AS_IS, on_bad_sample="error", decode_timeout=timeout)
    for ours, theirs in zip(load(dataset, processor, workers=0), load(dataset, processor), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours if key != "bad_samples")


@pytest.mark.parametrize("timeout", [60.0, None], ids=["isolated", "without_limit"])
@pytest.mark.parametrize(("workers", "threads"), [(0, None), (2, 1)], ids=["none", "workers"])
def test_workers_decode_by_one_thread_each(tmp_path, monkeypatch, processor, workers, threads, timeout):
    def reading(path, **options):
        raise VideoError(f"threads={options['threads']}")

    monkeypatch.setattr(clips, "read_clip", reading)
    dataset = VideoDataset(write_samples(tmp_path, 2), processor, frames=AS_IS, decode_timeout=timeout)
    (batch,) = load(dataset, processor, workers)
    assert [message.rsplit(": ", 1)[1] for message in batch["bad_samples"]] == [f"threads={threads}"] * 2


def test_an_error_in_a_worker_is_told_plainly(trouble, processor):
    file, what = trouble
    what["3.mp4"] = "crash"
    dataset = VideoDataset(file, processor, frames=AS_IS, on_bad_sample="error")
    with (
        pytest.raises(
            DataError, match=r"^\S*data.jsonl, line 4: \S*3.mp4: the process that decodes it died \(SIGSEGV\)\.$"
        ),
        worker_errors(),
    ):
        load(dataset, processor)


class Dying(VideoDataset):
    """Its worker is killed on the way, as for lack of memory."""

    def __getitem__(self, index):
        if index == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def test_a_killed_worker_is_an_error(trouble, processor):
    with (
        pytest.raises(DataError, match=r"a process that loads data died: .*\(num_workers\).*goes on from the last"),
        worker_errors(),
    ):
        load(Dying(trouble[0], processor, frames=AS_IS), processor)


@pytest.mark.parametrize("broken", [ConnectionResetError(104, "reset by peer"), EOFError()], ids=["reset", "end"])
def test_a_worker_that_dies_while_it_hands_a_tensor_over(broken):
    """Its connection breaks before the signal of its death comes."""

    def told(*_):
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed. ")

    def dies():
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        raise broken

    handler = signal.signal(signal.SIGALRM, told)
    try:
        with pytest.raises(DataError, match=r"a process that loads data died: .*killed by signal"), worker_errors():
            dies()
    finally:
        signal.signal(signal.SIGALRM, handler)


def test_connections_that_break_without_a_death_are_told_as_they_are():
    with pytest.raises(ConnectionResetError, match="by a server"), worker_errors():
        raise ConnectionResetError("by a server")


def test_a_worker_that_dies_late_is_no_fault_of_what_runs_by_then(monkeypatch):
    """On a loaded machine a killed process takes its time, and torch's handler of SIGCHLD would end the next run."""
    items = iter(DataLoader(range(100), num_workers=1))
    assert next(items).tolist() == [0]
    handler, (worker,) = signal.getsignal(signal.SIGCHLD), items._workers
    assert callable(handler)
    others = [child for child in multiprocessing.active_children() if child.pid != worker.pid]
    monkeypatch.setattr(type(worker), "join", lambda self, timeout=None: None)
    try:
        end_workers(others)
        with contextlib.suppress(ChildProcessError):  # gone at once
            os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)  # dead by now, and still there
    finally:
        monkeypatch.undo()
        worker.join()
        signal.signal(signal.SIGCHLD, handler)
    assert worker.exitcode == -signal.SIGKILL


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA out of memory"), VideoError("no frames"), KeyError("x")], ids=["runtime", "own", "other"]
)  # fmt: skip
def test_other_errors_pass(error):
    with pytest.raises(type(error)) as caught, worker_errors():
        raise error
    assert caught.value is error


def test_without_workers_there_is_no_process(trouble, processor):
    dataset = VideoDataset(trouble[0], processor, frames=AS_IS)
    assert not isinstance(dataset[0], BadSample)
    assert dataset.encoder.isolated._pipe is None


def test_errors_are_ours():
    assert issubclass(ProcessError, STAError)


# ---- in training


@pytest.mark.parametrize("on_bad_sample", ["skip", "error"])
def test_bad_samples_of_workers_count_in_training(trouble, processor, tmp_path, on_bad_sample):
    file, what = trouble
    what["4.mp4"] = "crash"
    (file.parent / "2.mp4").unlink()
    settings = {"batch_size": 4, "max_steps": 4, "num_workers": 2, "on_bad_sample": on_bad_sample, "frames": AS_IS}
    options = {"output_dir": tmp_path / "out", "stage": "1", "config": TrainingConfig(**settings), "progress": False}
    model = make_model(processor.tokenizer)
    if on_bad_sample == "error":
        with pytest.raises(DataError, match=r"^\S*data.jsonl, line [35]: "):
            train(model, file, processor=processor, **options)
        return
    result = train(model, file, processor=processor, **options)
    assert sorted(message.split(": ")[0][-6:] for message in result.bad_samples) == ["line 3", "line 5"]
    assert result.stages["1"]["steps"] == 4
