"""Broken and odd videos: frames or a clear error in bounded time, in every backend; equal frames of files that are whole.

Reading happens in a process that may crash or hang. With STA_TORTURE_FIGURES=FILE each chunk adds a line of figures.
"""

import collections
import dataclasses
import json
import os
import resource
from importlib.util import find_spec

import numpy as np
import pytest
from broken_videos import corpus, whole
from make_videos import decode_all

from sta_adapter.data.worker_process import Isolated, ProcessError
from sta_adapter.errors import BackendError, MissingExtraError, STAError, VideoError
from sta_adapter.video import read_clip

CASES = corpus()
CHUNKS = max(1, len(CASES) // int(os.environ.get("STA_TORTURE_VIDEOS", 160)))
FIGURES = os.environ.get("STA_TORTURE_FIGURES")
PACKAGES = {"pyav": "av", "decord": "decord", "torchcodec": "torchcodec"}
BACKENDS = tuple(name for name, package in PACKAGES.items() if find_spec(package))
UNLIKE_PLAIN = ("odd-turned", "odd-fast", "codec-libsvtav1.avif")  # turned; cut by an edit list; a still picture first
EVERYTHING = {"num_frames": 1000}
SECONDS, MEGABYTES = 60, 500  # a call may take; by which the reading process may grow


@dataclasses.dataclass
class Outcome:
    """What reading gave: a clip, or an error of ours, or (`wrong`) what must never happen."""

    clip: object = None
    error: Exception | None = None
    wrong: str = ""


def read(path, backend, options):
    """In the other process: a clip as plain values, or the error's kind and words."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        frames, timestamps, metadata = read_clip(path, backend=backend, **options)
    except STAError as error:
        return Outcome(error=error)
    except Exception as error:
        return Outcome(wrong=f"{type(error).__name__}: {error}")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    return Outcome(clip=(np.ascontiguousarray(frames), timestamps, metadata, grown))


def plain(path):
    """In the other process: every frame, decoded in order and as it is stored; None where that fails."""
    try:
        return decode_all(path)[0]
    except Exception:
        return None


@pytest.fixture(scope="module")
def isolated():
    made = {function: Isolated(function, SECONDS) for function in (read, plain)}
    yield made
    for one in made.values():
        one.close()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("videos")


def attempt(isolated, path, backend, options):
    try:
        outcome = isolated[read](path, backend, options)
    except ProcessError as error:
        return Outcome(wrong=f"process: {error}")
    if not outcome.wrong:
        outcome.wrong = faults_of(outcome, path, options)
    return outcome


def faults_of(outcome, path, options):
    """What is wrong with a clip or an error of ours; "" if nothing is."""
    if outcome.error is not None:
        kind, text = type(outcome.error), str(outcome.error)
        if not isinstance(outcome.error, (VideoError, BackendError, MissingExtraError)):
            return f"{kind.__name__} for a good call: {text}"
        return "" if path.name in text or kind is MissingExtraError else f"the message doesn't name the file: {text}"
    frames, times, about, grown = outcome.clip
    wanted = options.get("num_frames", options.get("max_frames", 32))
    numbers = [about.fps, about.duration, *times]
    faults = {
        "not uint8 (T, H, W, 3)": frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3,
        "no frame, or too many": not 0 < len(frames) <= wanted,
        "lengths differ": not len(frames) == len(times) == len(about.indices),
        "another size than told": frames.shape[1:3] != (about.height, about.width),
        "numbers not finite": not np.isfinite(numbers).all(),
        "times go back": bool((np.diff(times) < 0).any()) or times[0] < 0,
        "rate or duration not positive": min(about.fps, about.duration) <= 0,
        "indices not ascending": bool((np.diff(about.indices) <= 0).any()),
        "times outside the range": times[0] < options.get("start", 0) or times[-1] >= options.get("end", np.inf),
        f"{grown} MB more memory": grown > MEGABYTES,
        "times after the end": times[-1] > about.duration,
    }
    return ", ".join(fault for fault, is_so in faults.items() if is_so)


def options_for(number):
    """Every frame for most cases; for the others random options that are good for some file."""
    rng = np.random.default_rng([2026, number])
    if rng.random() < 0.6:
        return EVERYTHING
    options = {}
    if rng.random() < 0.5:
        options["num_frames"] = int(rng.choice([1, 2, 5, 16, 10**12]))
    else:
        options["fps"] = float(rng.choice([0.01, 1, 2, 7.3, 1e6]))
        options["max_frames"] = int(rng.choice([4, 8, 10**9]))
    if rng.random() < 0.6:
        options["start"] = float(rng.choice([0, 0.05, 0.3, 1.1, 1e9]))
    if rng.random() < 0.6:
        options["end"] = options.get("start", 0) + float(rng.choice([1e-3, 0.25, 0.8, 1e12]))
    return options


def judge(case, clips, stored, whole_file):
    """What is to be counted about the clips that backends read of one case, and what is wrong with them.

    `stored` are the frames of the file, or of the one that was damaged, decoded in order; None where they aren't known.
    """
    counted, faults = [], []
    (first, clip), *others = clips.items()
    for name, other in others:
        if not same(clip, other):
            counted.append("read unequally")
            faults += [f"{first} and {name} read other frames"] * case.intact
    if stored is None:
        return counted, faults
    frames, indices, total = clip[0], list(clip[2].indices), clip[2].total_frames
    equal = max(indices) < len(stored) and np.array_equal(frames, stored[indices])
    if case.intact:
        faults += [] if equal and total == len(stored) else ["other frames than in the file"]
    elif total < len(stored):
        counted += ["fewer frames, unnoticed"] if whole_file else ["the part that was asked for"]
    elif total > len(stored):
        counted.append("more frames")
    else:
        counted.append("damage had no effect" if equal else "painted over by the decoder")
    return counted, faults


def same(one, other):
    return np.array_equal(one[0], other[0]) and np.array_equal(one[1], other[1]) and one[2].indices == other[2].indices


def stored_frames(case, isolated, folder, path, clip):
    """Every frame of the file, or of the one that was damaged; None where plain decoding may give others."""
    plainly = case.whole or case.name.startswith(("codec-", "odd-"))
    if clip[2].rotation or not plainly or case.name.startswith(UNLIKE_PLAIN):
        return None
    return isolated[plain](whole(folder, case.whole) if case.whole else path)


def try_case(case, options, isolated, folder, tally):
    """Read one file with every backend; gives what is wrong."""
    path, clips, faults = case.make(folder), {}, []
    tally["files"] += 1
    for backend in BACKENDS:
        outcome = attempt(isolated, path, backend, options)
        kind = "wrong" if outcome.wrong else "refused" if outcome.error else "read"
        tally[f"{backend}: {kind}"] += 1
        if outcome.wrong:
            faults.append(f"{backend}: {outcome.wrong}")
        elif outcome.clip:
            clips[backend] = outcome.clip
    if clips:
        stored = stored_frames(case, isolated, folder, path, next(iter(clips.values())))
        counted, more = judge(case, clips, stored, "end" not in options)
        tally.update(f"{case.kind}: {word}" for word in counted)
        faults += more
    remove(path)
    return [f"{case.name} {options}: {fault}" for fault in faults]


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_frames_or_a_clear_error(isolated, folder, chunk):
    tally, faults = collections.Counter(), []
    for number in range(chunk, len(CASES), CHUNKS):
        faults += try_case(CASES[number], options_for(number), isolated, folder, tally)
    if FIGURES:
        with open(FIGURES, "a") as file:
            file.write(json.dumps(tally) + "\n")
    assert not faults, "\n".join(faults)
    assert tally["pyav: read"] > tally["files"] / 5
    assert tally["pyav: refused"] > tally["files"] / 10


def test_the_corpus_holds_what_it_says():
    names = {case.name for case in CASES}
    assert len(names) == len(CASES) > 2000
    assert sum(name.startswith("cut-") for name in names) > 1000
    assert {"odd-wide.mp4", "odd-turned-270.mp4", "codec-libsvtav1.mp4", "stamps-negative.mkv"} <= names


def remove(path):
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
