"""Training runs that are killed, or whose disk is full: `python interrupted_run.py DATA OUT` writes OUT/report.json.

One process imports everything and encodes the data; each attempt at a run is a fork of it, so that it can be killed.
"""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from tiny_qwen import make_model, make_processor
from transformers import TrainerCallback, TrainerState

from sta_adapter.data import FrameSettings, VideoDataset
from sta_adapter.errors import CheckpointError
from sta_adapter.training import TrainingConfig, train
from sta_adapter.training import stage as stages  # noqa: F401  # with peft and accelerate, once for all forks
from sta_adapter.training.checkpoints import last_checkpoint

SETTINGS = {
    "batch_size": 2,
    "device_batch_size": 1,
    "epochs": 1.5,
    "learning_rate": 1e-2,
    "lora_dropout": 0.2,
    "save_steps": 2,
    "logging_steps": 1,
    "stage1": {"max_steps": 4},
}
FULL = 3  # exit status of an attempt that found the disk full
MOMENTS = ("on_step_begin", "on_substep_end", "on_optimizer_step", "on_step_end", "on_log", "on_save")


class Moments(TrainerCallback):
    """Calls `reached` with the stage, the step and the name of each moment of a run."""

    def __init__(self, reached):
        for name in MOMENTS:
            setattr(self, name, self._teller(name, reached))

    def _teller(self, name, reached):
        def tell(args, state, control, **_):
            reached([Path(args.output_dir).name, state.global_step, name])

        return tell


class FailingWrites:
    """While a checkpoint of a step is saved, its `number`-th write comes only half way: the process dies, or the disk is full."""

    def __init__(self, checkpoint, number, full):
        self.checkpoint, self.number, self.full = checkpoint, number, full
        self.fsync, self.replace, self.save, self.to_json = os.fsync, os.replace, torch.save, TrainerState.save_to_json
        os.fsync, os.replace, torch.save = self._fsync, self._replace, self._save
        TrainerState.save_to_json = lambda state, path: self._to_json(state, path)

    def _fails(self, path):
        if self.checkpoint in str(path):
            self.number -= 1
        return self.checkpoint in str(path) and self.number == 0

    def _end(self, error=OSError):
        if not self.full:
            os.kill(os.getpid(), signal.SIGKILL)
        raise error(28, "No space left on device")

    def _fsync(self, descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        written = "/." in path or path.endswith("trained.safetensors")
        if written and not os.path.isdir(path) and self._fails(path):
            os.truncate(path, os.stat(path).st_size // 2)
            self._end()
        self.fsync(descriptor)

    def _replace(self, source, target):
        if not self.full and self._fails(target):  # renaming takes no room
            self._end()
        self.replace(source, target)

    def _save(self, values, path, *args, **kwargs):
        self.save(values, path, *args, **kwargs)
        if self._fails(path):
            os.truncate(path, os.stat(path).st_size // 2)
            self._end(RuntimeError)

    def _to_json(self, state, path):
        self.to_json(state, path)
        if self._fails(path):
            os.truncate(path, os.stat(path).st_size // 2)
            self._end()


def attempt(dataset, out, prepare=lambda: None, reached=lambda moment: None, stage="both"):
    """One run in a process of its own; minus the signal that ended it, or its exit status."""
    child = os.fork()
    if not child:
        torch.set_num_threads(1)
        status = 1
        try:
            prepare()
            arguments = {"callbacks": [Moments(reached)], "progress": False, "stage": stage}
            config = TrainingConfig(**SETTINGS)
            train(make_model(dataset.processor.tokenizer), dataset, output_dir=out, config=config, **arguments)
            status = 0
        except CheckpointError as error:
            status = FULL if "No space left on device" in str(error) else 1
            if status != FULL:
                sys.excepthook(type(error), error, error.__traceback__)
        except BaseException as error:
            sys.excepthook(type(error), error, error.__traceback__)
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def whole_run(dataset, out):
    """A run that nothing stops, and its moments."""
    file = out.with_suffix(".moments")

    def write_down(moment):
        with file.open("a") as lines:
            lines.write(json.dumps(moment) + "\n")

    status = attempt(dataset, out, reached=write_down)
    return status, [json.loads(line) for line in file.read_text().splitlines()]


def killed_run(dataset, out, moments):
    """The same command again and again, each time killed at the next of the moments, and at last not."""

    def die_at(wanted):
        def reached(moment):
            if moment == wanted:
                os.kill(os.getpid(), signal.SIGKILL)

        return reached

    return [attempt(dataset, out, reached=die_at(moment)) for moment in [*moments, None]]


def failing_saves(dataset, out, full):
    """Stage one, whose second checkpoint fails at its first write, its second and so on, until it has no more."""
    attempts = []
    while not attempts or attempts[-1]["status"]:
        number = len(attempts) + 1
        status = attempt(dataset, out, prepare=lambda: FailingWrites("checkpoint-4", number, full), stage="1")
        last = last_checkpoint(out / "stage1")
        attempts.append({"status": status, "last": last and last.name, "half": (out / "stage1/checkpoint-4").exists()})
    return attempts


def main(data, out):
    """Everything, into a report."""
    processor = make_processor(data / "tokenizer")
    frames = FrameSettings(min_tokens=None, max_tokens=None)
    dataset = VideoDataset(data / "data.jsonl", processor, frames=frames, on_bad_sample="error", cache=True)
    for index in range(len(dataset)):
        dataset[index]
    gc.freeze()  # no fork needs to look through what is here
    os.fsync = lambda descriptor: None  # a process that is killed loses nothing that it has written
    status, moments = whole_run(dataset, out / "whole")
    places = sorted(random.Random(3).sample(range(len(moments)), 10))
    chosen = [moments[place] for place in places]
    report = {
        "whole": status,
        "chosen": chosen,
        "killed": killed_run(dataset, out / "killed", chosen),
        "killed in saving": failing_saves(dataset, out / "killed in saving", full=False),
        "disk full": failing_saves(dataset, out / "disk full", full=True),
    }
    (out / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
