"""Training killed at random times, started again with the same command until it ends: the bits of a run left alone."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

KILLS = int(os.environ.get("STA_TORTURE_TRAINING_KILLS", 200))
FILES = ("stage1/trained", "stage2/trained", "sta_adapter", "adapter_model")


def final_weights(folder):
    from safetensors.torch import load_file

    return {name: load_file(folder / f"{name}.safetensors") for name in FILES}


def same(one, other):
    return all(
        one[name].keys() == other[name].keys() and all(torch.equal(v, other[name][k]) for k, v in one[name].items())
        for name in FILES
    )


def main(data, out, kills):
    """Kill runs until there were enough kills and the last run has ended; write OUT/report.json."""
    from interrupted_run import attempt
    from tiny_qwen import make_processor

    from sta_adapter.data import FrameSettings, VideoDataset

    frames = FrameSettings(min_tokens=None, max_tokens=None)
    processor = make_processor(data / "tokenizer")
    dataset = VideoDataset(data / "data.jsonl", processor, frames=frames, on_bad_sample="error", cache=True)
    for index in range(len(dataset)):
        dataset[index]
    begun = time.monotonic()
    report = {"whole": attempt(dataset, out / "whole"), "killed": 0, "others": [], "ended": 0, "equal": 0}
    seconds = time.monotonic() - begun
    expected, generator, fresh = final_weights(out / "whole"), random.Random(0), True
    while report["killed"] < kills:
        delay = generator.uniform(0.05, 0.6) * seconds

        def die(delay=delay):
            timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL))
            timer.daemon = True
            timer.start()

        run = out / f"run{report['ended']}"
        begun = time.monotonic()
        status = attempt(dataset, run, prepare=die)
        if fresh and status == 0:  # what a whole run takes by now
            seconds = time.monotonic() - begun
        fresh = status == 0
        report["killed"] += status == -signal.SIGKILL
        seconds *= 1.05 if status else 1  # a machine that has become slower: some run must end
        if status == 0:
            report["ended"] += 1
            report["equal"] += same(final_weights(run), expected)
        elif status != -signal.SIGKILL:
            report["others"].append(status)
            break
    (out / "report.json").write_text(json.dumps(report))


def test_training_killed_at_random_times(tmp_path):
    from tiny_qwen import make_processor, write_samples

    write_samples(tmp_path / "data", 8)
    make_processor(tmp_path / "data" / "tokenizer")
    command = [sys.executable, __file__, tmp_path / "data", tmp_path, str(KILLS)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["whole"], report["others"]) == (0, []), done.stderr[-3000:]
    assert report["killed"] == KILLS
    assert report["equal"] == report["ended"] > 0


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
