"""When a run goes wrong or is ended: a loss that leaves, signals, checkpoints by time, runs that are made longer."""

import errno
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import types

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from tiny_qwen import make_model, make_processor, write_samples
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sta_adapter.cli import cli
from sta_adapter.data import FrameSettings, VideoDataset
from sta_adapter.errors import ConfigError, DivergenceError, TrainingStopped
from sta_adapter.training import TrainingConfig, train
from sta_adapter.training.checkpoints import last_checkpoint
from sta_adapter.training.sole_run import sole_run
from sta_adapter.training.watch import Signals, Watch, stopped_early

FAST = {
    **{"batch_size": 4, "device_batch_size": 4, "max_steps": 4, "learning_rate": 5e-3},
    **{"logging_steps": 1, "save_steps": 2, "lora_dropout": 0.1, "report_to": "none"},
}


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return make_processor(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    return write_samples(tmp_path_factory.mktemp("data"), 8)


@pytest.fixture(scope="module")
def dataset(samples, processor):
    frames = FrameSettings(min_tokens=None, max_tokens=None)
    return VideoDataset(samples, processor, frames=frames, on_bad_sample="error", cache=True)


@pytest.fixture
def run(processor, dataset):
    """A run of stage one on a fresh model."""

    def run(out, model=None, data=dataset, callbacks=(), stage="1", eval_fn=None, **changes):
        config = TrainingConfig(**{**FAST, **changes})
        options = {"stage": stage, "config": config, "callbacks": callbacks, "eval_fn": eval_fn, "progress": False}
        return train(model or make_model(processor.tokenizer), data, output_dir=out, **options)

    return run


class At(TrainerCallback):
    """Does something at the end of a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            self.action()


# ---- a loss that leaves


def steps_of(watch, losses, step=0):
    """The watch's view of steps with these losses."""
    control = TrainerControl()
    for step, loss in enumerate(losses, start=step + 1):
        watch.add(torch.tensor(loss))
        watch.on_step_end(
            types.SimpleNamespace(device=torch.device("cpu")), TrainerState(global_step=step, max_steps=1000), control
        )
    return control


@pytest.mark.parametrize(
    ("losses", "error"),
    [
        ([2.0, float("nan")], r"stage 1: the loss is not finite \(nan\) at step 2, so the run ends\. The learning rate \(0\.003\)"),
        ([2.0, 1.0, float("inf")], r"not finite \(inf\) at step 3.* try --learning-rate 1e-03\. No checkpoint had been saved"),
        ([float("nan")], r"at step 1, .*It is the first loss, so the learning rate is not the cause: .*precision \(auto"),
        ([2.0] * 5 + [201.0] * 15, r"has grown to 201, more than a hundred times its lowest \(2\) at step 8"),
        ([1e-4] * 5 + [1.1] * 5, r"has grown to 1\.1, more than a hundred times its lowest \(0\.01\) at step 8"),
    ],
    ids=["nan", "inf", "first", "hundredfold", "from_nothing"],
)  # fmt: skip
def test_a_loss_that_leaves_ends_the_run(tmp_path, losses, error):
    watch = Watch("stage 1", TrainingConfig(learning_rate=3e-3), tmp_path)
    with pytest.raises(DivergenceError, match=error):
        steps_of(watch, losses)


@pytest.mark.parametrize(
    "losses",
    [[2.0, 150.0, 90.0, 10.0] * 5, [2.0] * 9 + [1e4] + [2.0] * 9, [1e-6] * 9 + [0.9] * 9, [8.0, 0.09] * 10],
    ids=["noisy", "odd_batch", "memorised", "swinging"],
)
def test_a_loss_that_stays_does_not(tmp_path, losses):
    watch = Watch("stage 1", TrainingConfig(), tmp_path)
    control = steps_of(watch, losses)
    assert not control.should_training_stop
    assert watch.loss == pytest.approx(losses[-1])


def test_a_step_of_bad_samples_says_nothing(tmp_path):
    watch = Watch("stage 1", TrainingConfig(), tmp_path)
    steps_of(watch, [2.0])
    watch.add(torch.zeros(()), usable=False)
    steps_of(watch, [0.0], step=1)
    assert watch.loss == 2.0
    steps_of(watch, [2.0] * 5, step=2)


def test_the_last_good_checkpoint_is_kept_and_named(tmp_path, run, processor):
    from sta_adapter import load_sta

    model = make_model(processor.tokenizer)
    spoil = At(4, lambda: model.lm_head.weight.data.fill_(float("nan")))
    with pytest.raises(
        DivergenceError, match=r"not finite.*to start from it: --adapter '?/.*checkpoint-2'? and another"
    ):
        run(tmp_path, model=model, callbacks=[spoil], max_steps=40, learning_rate=1e-3)
    assert [path.name for path in (tmp_path / "stage1").glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (tmp_path / "stage1" / "result.json").exists()
    load_sta(make_model(processor.tokenizer), tmp_path / "stage1" / "checkpoint-2")


# ---- signals


def test_a_signal_saves_and_the_run_goes_on_as_if_it_had_not_come(tmp_path, run, processor):
    number, model = signal.SIGTERM, make_model(processor.tokenizer)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    whole = run(tmp_path / "whole", max_steps=4)
    with pytest.raises(
        TrainingStopped, match=rf"stage 1 was stopped by {number.name}; .*checkpoint-3 is saved"
    ) as stopped:
        run(tmp_path / "cut", model=model, callbacks=[At(3, lambda: os.kill(os.getpid(), number))])
    assert (stopped.value.signal, stopped.value.checkpoint.name) == (number, "checkpoint-3")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert not (tmp_path / "cut" / "stage1" / "result.json").exists()
    with pytest.raises(ConfigError, match=r"differs in .*start\. .*The model was trained already.*load it anew"):
        run(tmp_path / "cut", model=model)
    more = run(tmp_path / "cut")
    assert more.stages["1"]["steps"] == 4
    one, other = (load_file(tmp_path / name / "stage1" / "trained.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert [e["loss"] for e in more.history if "loss" in e] == [e["loss"] for e in whole.history if "loss" in e]


def test_a_stop_in_the_middle_of_an_epoch_does_not_evaluate(tmp_path, run):
    measured = []
    how = {"epochs": 2, "max_steps": None, "batch_size": 2, "device_batch_size": 2, "save_steps": 100}
    with pytest.raises(TrainingStopped):
        run(tmp_path, callbacks=[At(6, lambda: os.kill(os.getpid(), signal.SIGINT))], eval_fn=lambda m: measured.append(0) or {"a": 0}, **how)  # fmt: skip
    assert len(measured) == 1  # at the end of the first epoch


def test_a_signal_in_the_last_step_comes_too_late(tmp_path):
    """There is nothing left to go on with: the stage is finished as if none had come."""
    watch = Watch("stage 1", TrainingConfig(), tmp_path)
    assert (watch.signals.received, watch.stopped) == (0, False)
    watch.signals.received = signal.SIGTERM
    arguments = TrainingArguments(output_dir=tmp_path, use_cpu=True)
    for step, stops in ((7, False), (6, True)):
        control = TrainerControl()
        watch.on_step_end(arguments, TrainerState(global_step=step, max_steps=7), control)
        assert (watch.stopped, control.should_training_stop, control.should_save) == (stops, stops, stops)


@pytest.mark.parametrize(("epoch", "evaluates"), [(1.5, False), (2.0, True)])
def test_a_stopped_stage_evaluates_where_an_epoch_ends(tmp_path, epoch, evaluates):
    watch = Watch("stage 1", TrainingConfig(), tmp_path)
    for stopped, expected in ((False, True), (True, evaluates)):
        watch.stopped = stopped
        control = TrainerControl(should_log=True, should_evaluate=True, should_save=True)
        watch.on_epoch_end(None, TrainerState(epoch=epoch), control)
        assert (control.should_log, control.should_evaluate, control.should_save) == (expected,) * 3


def test_a_signal_is_answered_once():
    said = []
    with Signals(said.append):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    assert said == ["SIGTERM: the run ends after this step and saves a checkpoint (Ctrl-C again: at once)."]


def test_a_second_ctrl_c_is_at_once():
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


class Slow:
    """A data set of which each worker is quick with its first batch alone; workers must not outlive the run."""

    def __init__(self, dataset):
        self.dataset, self.processor, self.cached = dataset, dataset.processor, False
        self.samples, self.encoder, self.frames = dataset.samples, dataset.encoder, dataset.frames
        self.read = 0

    def __len__(self):
        return 40

    def __getitem__(self, index):
        import time

        from sta_adapter.data.worker_signals import ready_worker

        ready_worker()
        self.read += 1
        if self.read > FAST["batch_size"]:
            time.sleep(60)
        return self.dataset[index % 8]

    def digest(self):
        return "slow"


def test_workers_end_with_the_run(tmp_path, run, dataset):
    pids = []

    def interrupt():
        pids.extend(child.pid for child in multiprocessing.active_children())
        for pid in (*pids, os.getpid()):  # as a terminal or a cluster does
            os.kill(pid, signal.SIGTERM)

    with pytest.raises(TrainingStopped):
        run(tmp_path / "out", data=Slow(dataset), callbacks=[At(1, interrupt)], num_workers=2, max_steps=None)
    assert len(pids) == 2
    assert last_checkpoint(tmp_path / "out" / "stage1").name == "checkpoint-1"
    assert not multiprocessing.active_children()


def test_the_command_says_how_to_go_on(tmp_path, monkeypatch, samples, processor):
    from sta_adapter.training import two_stage

    def stopped(*args, **options):
        raise TrainingStopped("x", signal=15, checkpoint=tmp_path / "my out" / "checkpoint-3")

    for name in ("load_model", "load_processor"):
        monkeypatch.setattr(f"sta_adapter.loading.{name}", lambda *a, **o: processor)
    monkeypatch.setattr("sta_adapter.loading.use_positions_of", lambda *a: None)
    monkeypatch.setattr(two_stage, "train", stopped)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    words = ["train", "--model", "m", "--data", str(samples), "--out", str(tmp_path / "my out")]
    done = CliRunner().invoke(cli, [*words, "--overwrite", "--set", "seed=1"])
    assert done.exit_code == 143, done.output
    assert f"Stopped by SIGTERM. '{tmp_path}/my out/checkpoint-3' is saved. To go on:" in done.output
    line = f"  sta-adapter train --model m --data {samples} --out '{tmp_path}/my out' --set seed=1\n"
    assert line in done.output


# ---- checkpoints by time


def test_checkpoints_by_time(tmp_path):
    now = [0.0]
    watch = Watch("stage 1", TrainingConfig(save_minutes=2), tmp_path, clock=lambda: now[0])
    saved = []
    for step in range(1, 11):
        now[0] += 40
        control = steps_of(watch, [1.0], step - 1)
        if control.should_save:
            saved.append(step)
            watch.on_save(None, None, None)
    assert saved == [3, 6, 9]
    never = Watch("stage 1", TrainingConfig(save_minutes=None), tmp_path, clock=lambda: 1e9)
    assert not steps_of(never, [1.0]).should_save


def test_a_run_of_300_steps_leaves_checkpoints():
    assert TrainingConfig().save_steps <= 100
    assert TrainingConfig().save_minutes <= 30


# ---- longer runs, and those that end early


def test_a_finished_run_says_so_and_can_be_made_longer(tmp_path, run):
    first = run(tmp_path, stage="both", max_steps=2)
    assert first.finished_before == []
    again = run(tmp_path, stage="both", max_steps=2)
    assert again.finished_before == ["1", "2"]
    trained = zip(first.handle.parameters(), again.handle.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in trained)
    longer = run(tmp_path, stage="both", max_steps=4)
    assert longer.finished_before == ["1"]  # stage two stands on it
    assert [longer.stages[name]["steps"] for name in "12"] == [2, 4]
    assert run(tmp_path, stage="both", max_steps=4).finished_before == ["1", "2"]
    with pytest.raises(ConfigError, match=r"differs in max_steps\. .*epochs and max_steps may be raised"):
        run(tmp_path, stage="both", max_steps=3)
    with pytest.raises(ConfigError, match=r"differs in learning_rate, max_steps"):
        run(tmp_path, stage="both", max_steps=5, learning_rate=1e-4)


LOCKING = """
import fcntl, sys
file = open(sys.argv[1], "r+" if sys.argv[2] == "try" else "w+")
try:
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    print("free", flush=True)
except OSError:
    print("taken by", file.read(), flush=True)
if sys.argv[2] == "hold":
    file.write("process 1 on node7")
    file.flush()
    print("written", flush=True)
    sys.stdin.read()
"""


def locking(folder, how):
    """Another process that looks for the lock of a run's folder, or holds it until its standard input ends."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", LOCKING, str(folder / ".lock"), how], **pipes)


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks there")
def test_two_runs_are_not_at_work_in_one_folder(tmp_path, run):
    """They deleted each other's checkpoints, and went on from each other's."""
    other = locking(tmp_path, "hold")
    assert [other.stdout.readline() for _ in range(2)] == ["free\n", "written\n"]
    with pytest.raises(ConfigError, match=r"another run \(process 1 on node7\) is using .*take another output"):
        run(tmp_path)
    assert not (tmp_path / "run.json").exists()
    other.communicate()
    found = []
    run(tmp_path, callbacks=[At(2, lambda: found.append(locking(tmp_path, "try").communicate()[0]))])
    assert found == [f"taken by process {os.getpid()} on {socket.gethostname()}\n"]
    assert not (tmp_path / ".lock").exists()


def test_two_threads_are_not_at_work_in_one_folder(tmp_path):
    """A file's lock is a process's, so the second took it as well, and gave it back for both."""
    found = []

    def second(folder):
        try:
            with sole_run(folder):
                found.append("went in")
        except ConfigError as error:
            found.append(str(error))

    link = tmp_path / "link"
    link.symlink_to(tmp_path / "out")
    with sole_run(tmp_path / "out"):
        for folder in (tmp_path / "out", link, tmp_path / "other"):
            thread = threading.Thread(target=second, args=(folder,))
            thread.start()
            thread.join()
        found.append(locking(tmp_path / "out", "try").communicate()[0])
    second(link)
    this = f"process {os.getpid()}"
    assert [this in text for text in found] == [True, True, False, True, False]
    assert all(f"another run ({this}, this one) is using" in text for text in found[:2])
    assert found[2] == found[4] == "went in"


def test_a_folder_without_locks_is_trained_into(tmp_path, run, monkeypatch):
    """As of some network file systems."""
    import fcntl

    def lockf(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    assert run(tmp_path, max_steps=1).stages["1"]["steps"] == 1


@pytest.mark.parametrize("before", [None, "fp8"])
def test_the_precision_of_a_run_stays_with_it(before, tmp_path, run, monkeypatch):
    """A trainer of transformers that was made after it took it."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if before is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", before)
    within = []
    look = At(1, lambda: within.append(os.environ["ACCELERATE_MIXED_PRECISION"]))
    run(tmp_path, precision="bf16", max_steps=1, callbacks=[look])
    assert within == ["bf16"]
    assert os.environ.get("ACCELERATE_MIXED_PRECISION") == before


def test_epochs_are_raised_too_and_a_device_batch_may_change(tmp_path, run):
    run(tmp_path, max_steps=None, epochs=1)
    half = tmp_path / "stage1" / "checkpoint-9"  # of a process that was killed while it saved
    half.mkdir()
    longer = run(tmp_path, max_steps=None, epochs=2, device_batch_size=2, gradient_checkpointing=True)
    assert (longer.stages["1"]["steps"], longer.finished_before) == (4, [])
    assert not half.exists()


def test_a_longer_run_has_the_rates_of_its_schedule_at_once(tmp_path, run):
    """The shorter one ended with a rate of 0, with which a step would change nothing."""
    rates = []
    for name, ends in (("whole", (5,)), ("longer", (2, 5))):
        results = [run(tmp_path / name, max_steps=steps) for steps in ends]
        rates.append([e["learning_rate"] for e in results[-1].history if e.get("step", 0) > 2 and "loss" in e])
    assert rates[0] == rates[1]
    assert rates[0][0] > 0


def test_what_saves_may_change_when_a_run_goes_on(tmp_path, run):
    how = {"max_steps": 5, "keep_checkpoints": 9}
    with pytest.raises(TrainingStopped):
        run(tmp_path, callbacks=[At(2, lambda: os.kill(os.getpid(), signal.SIGTERM))], save_steps=100, **how)
    run(tmp_path, save_steps=1, **how)
    saved = {path.name for path in (tmp_path / "stage1").glob("checkpoint-*")}
    assert saved == {f"checkpoint-{step}" for step in (2, 3, 4, 5)}


def test_early_stopping(tmp_path, run):
    scores = iter([0.5, 0.6, 0.6, 0.4, 0.9])
    how = {"eval_steps": 1, "max_steps": 9, "early_stopping": 2, "save_steps": 100}
    result = run(tmp_path, eval_fn=lambda model: {"accuracy": next(scores)}, **how)
    assert result.stages["1"]["steps"] == 4
    with pytest.raises(ConfigError, match=r"early_stopping counts evaluations, and there are none: .*--eval-data"):
        run(tmp_path / "other", early_stopping=2)
    with pytest.raises(ConfigError, match="early_stopping has no effect with keep_best: false"):
        run(tmp_path / "other", eval_fn=lambda model: {}, early_stopping=2, keep_best=False, save_steps=100)


@pytest.mark.parametrize(
    ("values", "more", "patience", "ends"),
    [
        ([3, 2, 2, 2], False, 2, True),
        ([3, 2, 2], False, 2, False),
        ([1, 2, 1], True, 1, True),
        ([1, 2], True, 1, False),
        ([], True, 1, False),
    ],
)
def test_when_a_stage_has_stopped_early(values, more, patience, ends):
    history = [entry for value in values for entry in ({"loss": 9.0}, {"m": float(value)})]
    args = types.SimpleNamespace(metric_for_best_model="m", greater_is_better=more)
    assert stopped_early(TrainerState(log_history=history), args, patience) is ends
    assert not stopped_early(TrainerState(log_history=history), args, None)


# ---- too little memory


def test_too_little_memory_halves_what_is_computed_at_a_time(tmp_path, run, monkeypatch, caplog):
    from sta_adapter.training.trainer import AdapterTrainer

    computed = AdapterTrainer.compute_loss

    def compute(self, model, inputs, *args, **kwargs):
        too_many = self.state.global_step == 1 and len(inputs["input_ids"]) > 2
        if too_many:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return computed(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(AdapterTrainer, "compute_loss", compute)
    result = run(tmp_path / "short", lora_dropout=0.0)
    assert (
        "not enough for 4 clips at a time; going on with device_batch_size 2 and gradient_checkpointing False"
        in caplog.text
    )
    assert result.stages["1"]["steps"] == 4
    monkeypatch.setattr(AdapterTrainer, "compute_loss", computed)
    roomy = run(tmp_path / "roomy", lora_dropout=0.0)
    one, other = ([e["loss"] for e in found.history if "loss" in e] for found in (result, roomy))
    assert one == pytest.approx(other, rel=1e-3)  # the same clips in each step


def test_memory_for_no_clip_at_all_is_an_error(tmp_path, run, monkeypatch):
    from sta_adapter.training.trainer import AdapterTrainer

    seen = []

    def compute(self, model, inputs, *args, **kwargs):
        seen.append((len(inputs["input_ids"]), getattr(self.config, "gradient_checkpointing", None)))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(AdapterTrainer, "compute_loss", compute)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(tmp_path)
    assert seen == [(4, False), (2, False), (1, False), (1, True)]


# ---- reporters


def test_wandb_without_a_key_is_refused_before_training(monkeypatch):
    from sta_adapter.requirements import require_reporters

    fake = types.SimpleNamespace(api=types.SimpleNamespace(api_key=None))
    monkeypatch.setitem(__import__("sys").modules, "wandb", fake)
    monkeypatch.setattr(
        "transformers.integrations.get_available_reporting_integrations", lambda: ["wandb", "tensorboard"]
    )
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(ConfigError, match=r"report_to: wandb has no API key.*wandb login.*WANDB_MODE=offline"):
        require_reporters("tensorboard, wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    require_reporters("wandb")
    monkeypatch.delenv("WANDB_MODE")
    fake.api.api_key = "k"
    require_reporters("wandb")


def test_mlflow_without_an_answer_is_refused_before_training(monkeypatch):
    from sta_adapter.requirements import require_reporters

    def search_experiments(max_results):
        raise ConnectionError("refused\nthere")

    fake = types.SimpleNamespace(search_experiments=search_experiments, get_tracking_uri=lambda: "http://h:1")
    monkeypatch.setitem(__import__("sys").modules, "mlflow", fake)
    monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", lambda: ["mlflow"])
    with pytest.raises(ConfigError, match=r"mlflow can't use 'http://h:1' \(refused there\).*MLFLOW_TRACKING_URI"):
        require_reporters("mlflow")


def test_tensorboard_is_on_where_it_is_installed(monkeypatch):
    from sta_adapter import requirements

    assert requirements.reporters(TrainingConfig().report_to) == ["tensorboard"]
    monkeypatch.setattr(requirements, "find_spec", lambda name: None)
    assert requirements.reporters("auto") == ["none"]
    requirements.require_reporters("auto")
