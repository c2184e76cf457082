"""The settings of a run: from YAML and Python, their checks, and how a step's clips are shared out."""

import json

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from sta_adapter.errors import ConfigError
from sta_adapter.training import TrainingConfig


def test_the_defaults_are_the_published_recipe():
    config, frames = TrainingConfig(), TrainingConfig().frames
    assert (config.learning_rate, config.schedule, config.warmup, config.batch_size, config.epochs) == (
        *(1e-4, "cosine", 0.02, 64, 1.0),
    )
    assert (config.lora_rank, config.lora_alpha, config.lora_qkv_rank, config.lora_qkv_alpha) == (16, 16, 32, 32)
    assert (config.precision, config.sta_learning_rate, config.lora_targets) == ("auto", None, "all")
    assert (frames.fps, frames.min_frames, frames.max_frames, frames.min_tokens, frames.max_tokens) == (
        1,
        4,
        32,
        16,
        256,
    )


OPTIONS = {
    **{
        "model": "m",
        "data": "d.jsonl",
        "out": "o",
        "stage": "1",
        "eval_data": "e.jsonl",
        "adapter": "a",
        "videos": "v",
    },
    **{"format": "ssv2", "overwrite": True, "learning_rate": 1e-3, "batch_size": 8, "max_steps": 5},
    **{"on_bad_sample": "error", "trust_remote_code": True, "dtype": "bf16", "quantize": "4bit", "revision": "main"},
    **{"positions": "trained", "adapter_revision": "v1", "any_base": True, "attn_implementation": "sdpa"},
    **{"early_stopping": 3, "num_workers": 1, "seed": 7, "run_name": "first", "dry_run": True, "cache": "c"},
}


def settings_of(tmp_path, monkeypatch, values, *line):
    """What `sta-adapter train` would train with."""
    from sta_adapter.cli import train

    seen = []
    monkeypatch.setattr(train, "_train", lambda run, settings: seen.append((run, settings)))
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(values))
    done = CliRunner().invoke(train.command, ["--config", str(file), *line], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return seen[0]


@pytest.mark.parametrize(("other", "options"), [("epochs", {"max_steps": 5}), ("max_steps", {"epochs": 2.0})])
def test_each_option_of_train_can_stand_in_the_file(tmp_path, monkeypatch, other, options):
    from sta_adapter.cli import train

    given = {**{name: value for name, value in OPTIONS.items() if name != "max_steps"}, **options}
    assert {parameter.name for parameter in train.command.params} - {"config", "pairs", other} == given.keys()
    in_file = settings_of(tmp_path, monkeypatch, given)
    words = [
        f"--{name.replace('_', '-')}" if value is True else f"--{name.replace('_', '-')}={value}"
        for name, value in given.items()
    ]
    assert settings_of(tmp_path, monkeypatch, {}, *words) == in_file
    run, settings = in_file
    assert {name: run[name] if name in run else getattr(settings, name) for name in given} == given


@pytest.mark.parametrize("line", [("--epochs", "2"), ("--set", "epochs=2")], ids=["option", "set"])
def test_a_length_that_is_given_wins_over_the_other_one_in_the_file(tmp_path, monkeypatch, line):
    _, settings = settings_of(tmp_path, monkeypatch, OPTIONS, *line)
    assert (settings.epochs, settings.max_steps) == (2, None)


def test_options_win_over_the_file(tmp_path, monkeypatch):
    line = ("--batch-size", "4", "--stage", "2", "--set", "frames.fps=3", "--on-bad-sample", "skip")
    run, settings = settings_of(tmp_path, monkeypatch, {**OPTIONS, "frames": {"max_frames": 8}}, *line)
    assert (run["stage"], settings.batch_size, settings.on_bad_sample) == ("2", 4, "skip")
    assert (settings.frames.fps, settings.frames.max_frames) == (3, 8)


@pytest.mark.parametrize(
    "value", ["[", "2024-13-45", "{fps: 1, fps: 2}", "9" * 5000], ids=["open", "date", "twice", "digits"]
)
def test_a_value_that_is_no_yaml(tmp_path, monkeypatch, value):
    with pytest.raises(ConfigError, match=r"^--set 'frames=.* is not a YAML value\."):
        settings_of(tmp_path, monkeypatch, {}, "--set", f"frames={value}")


def test_flags_in_the_file_are_true_or_false(tmp_path, monkeypatch):
    run, _ = settings_of(tmp_path, monkeypatch, {"model": "m", "data": "d", "out": "o", "overwrite": False})
    assert (run["overwrite"], run["trust_remote_code"]) == (False, False)
    with pytest.raises(ConfigError, match=r"run\.yaml: trust_remote_code is 'no', expected true or false"):
        settings_of(tmp_path, monkeypatch, {**OPTIONS, "trust_remote_code": "no"})


def test_options_in_the_file_are_texts(tmp_path, monkeypatch):
    assert settings_of(tmp_path, monkeypatch, {**OPTIONS, "stage": 2})[0]["stage"] == "2"
    for name in ("out", "model", "adapter", "videos"):
        with pytest.raises(ConfigError, match=rf"run\.yaml: {name} is 2026, expected a text"):
            settings_of(tmp_path, monkeypatch, {**OPTIONS, name: 2026})


def test_settings_from_yaml(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "learning_rate: 1e-3\nbatch_size: 8\nframes:\n  nframes: 8\nsta_config:\n  head_scale: 0.5\n"
        "stage2:\n  learning_rate: 5e-4\n  epochs: 2\n"
    )
    config = TrainingConfig.from_yaml(file, batch_size=16, seed=None)
    assert (config.learning_rate, config.batch_size, config.frames.nframes, config.seed) == (1e-3, 16, 8, 0)
    assert (config.for_stage("1").learning_rate, config.for_stage("1").epochs) == (1e-3, 1.0)
    assert (config.for_stage("2").learning_rate, config.for_stage("2").epochs) == (5e-4, 2)
    assert TrainingConfig.from_dict(config.to_dict()) == config


WRONG_YAML = {
    "unknown": ("learning_rat: 1", "unknown setting 'learning_rat'. Did you mean 'learning_rate'?"),
    "unknown_below": ("frames:\n  fsp: 1", "frames: unknown setting 'fsp'. Did you mean 'fps'?"),
    "unknown_in_stage": ("stage1:\n  epoch: 1", "stage1: unknown setting 'epoch'. Did you mean 'epochs'?"),
    "far_off": ("zzz: 1", "unknown setting 'zzz'. Known: learning_rate, "),
    "no_number": ("learning_rate: fast", "learning_rate is 'fast', expected a number"),
    "negative": ("learning_rate: -1", "learning_rate is -1, expected a number above 0"),
    "no_rate": ("learning_rate: 0.0", r"learning_rate is 0\.0, expected a number above 0"),
    "no_epochs": ("epochs: 0", "epochs is 0, expected a number above 0"),
    "no_epochs_of_a_stage": ("stage2: {epochs: 0}", "epochs is 0, expected a number above 0"),
    "zero": ("batch_size: 0", "batch_size is 0, expected a number of at least 1"),
    "nan": ("learning_rate: .nan", "learning_rate is nan, expected a number above 0"),
    "nan_epochs": ("epochs: .nan", "epochs is nan, expected a number"),
    "infinite": ("weight_decay: .inf", "weight_decay is inf, expected a number"),
    "nan_rank": ("lora_rank: .nan", "lora_rank is nan, expected a number of at least 1"),
    "steps_as_warmup": ("warmup: 100", "warmup is 100, expected a number of at least 0, at most 1"),
    "percent_of_dropout": ("lora_dropout: 5", "lora_dropout is 5, expected a number of at least 0, below 1"),
    "all_dropped": ("lora_dropout: 1.0", "lora_dropout is 1.0, expected a number of at least 0, below 1"),
    "rank_that_no_file_has": (
        "stage2: {lora_rank: 8193}",
        "lora_rank is 8193, expected a number of at least 1, at most 8192, a whole one",
    ),
    "qkv_rank_that_no_file_has": (
        "lora_qkv_rank: 8193",
        "lora_qkv_rank is 8193, expected a number of at least 1, at most 8192",
    ),
    "alpha_that_no_file_has": (
        "lora_alpha: 1000001",
        "lora_alpha is 1000001, expected a number of at least 1, at most 1000000",
    ),
    "half_a_step": ("max_steps: 10.5", "max_steps is 10.5, expected a number of at least 1, a whole one"),
    "half_a_clip": ("batch_size: 2.5", "batch_size is 2.5, expected a number of at least 1, a whole one"),
    "half_a_rank": (
        "stage2: {lora_rank: 2.5}",
        "lora_rank is 2.5, expected a number of at least 1, at most 8192, a whole one",
    ),
    "half_a_worker": ("num_workers: 1.5", "num_workers is 1.5, expected a number of at least 0, a whole one"),
    "no_update": ("lora_alpha: 0", "lora_alpha is 0, expected a number of at least 1"),
    "word_as_alpha": (
        "lora_alpha: twice",
        "lora_alpha is 'twice', expected a number of at least 1, at most 1000000, a whole one",
    ),
    "no_alpha": ("lora_qkv_alpha: null", "lora_qkv_alpha is None, expected a number of at least 1"),
    "seed_in_words": (
        "seed: first",
        "seed is 'first', expected a number of at least 0, at most 4294967295, a whole one",
    ),
    "negative_seed": ("seed: -1", "seed is -1, expected a number of at least 0"),
    "word_as_flag": ("sta: 'false'", "sta is 'false', expected true or false"),
    "no_flag": ("keep_best: 0", "keep_best is 0, expected true or false"),
    "reporters_in_a_list": ("report_to: [wandb]", r"report_to is \['wandb'\], expected a text"),
    "number_as_name": ("run_name: 3", "run_name is 3, expected a text"),
    "in_stage": ("stage2:\n  max_steps: 0", "max_steps is 0, expected a number of at least 1"),
    "choice": ("precision: fp8", "precision is 'fp8', expected one of 'auto', 'bf16'"),
    "division": ("batch_size: 10\ndevice_batch_size: 4", "batch_size 10 is not a multiple of device_batch_size 4"),
    "no_yaml": ("a: [", "is not YAML: while parsing"),
    "list": ("- a", "holds list, expected lines like 'learning_rate: 1.0e-4'"),
    "of_the_run": (
        "stage2:\n  frames:\n    fps: 2",
        "stage2: frames has no effect there, as it is one for both stages; write it beside stage2",
    ),
    "sta_of_a_stage": ("stage1:\n  sta_config: {head_scale: 0.5}", "stage1: sta_config has no effect there"),
    "length_of_a_stage": ("stage2:\n  max_length: 100", "stage2: max_length has no effect there"),
    "stage_in_stage": ("stage2:\n  stage1: {}", "stage2: stage1 has no effect there"),
    "lora_in_stage_one": (
        "stage1:\n  lora_rank: 4",
        "stage1: lora_rank has no effect there, as stage one trains STA alone",
    ),
    "sta_settings_without_sta": (
        "sta: false\nsta_config: {head_scale: 0.5}",
        "sta_config has no effect with sta: false",
    ),
    "sta_rate_without_sta": ("sta: false\nsta_learning_rate: 1", "sta_learning_rate has no effect with sta: false"),
    "qkv_of_the_language_model": (
        "lora_targets: language\nlora_qkv_alpha: 4",
        "lora_qkv_alpha has no effect with lora_targets: language, as it is of the vision encoder",
    ),
    "stage_one_without_sta": ("sta: false\nstage1: {max_steps: 5}", "stage1 has no effect with sta: false"),
    "two_lengths": ("epochs: 2\nmax_steps: 5", "epochs has no effect beside max_steps"),
    "two_lengths_of_a_stage": ("stage2: {epochs: 2, max_steps: 5}", "epochs has no effect beside max_steps"),
    "warmup_of_a_constant": ("schedule: constant\nwarmup: 0.1", "warmup has no effect with schedule: constant"),
    "two_samplings": ("frames: {nframes: 8, fps: 2}", "frames.fps has no effect beside frames.nframes"),
    "frames_crossed": (
        "frames: {min_frames: 8, max_frames: 6}",
        "min_frames 8 is above max_frames 6; change one of them",
    ),
    "tokens_crossed": ("frames: {min_tokens: 300}", "min_tokens 300 is above max_tokens 256; change one of them"),
    "no_frames": ("frames: fast", "frames is 'fast', expected settings of frames"),
    "no_mapping": ("stage1: fast", "stage1 is 'fast', expected settings below it"),
}


def test_a_stage_says_how_long_it_takes_in_its_own_way():
    """Else the other way, said for the whole run, would win silently."""
    by_steps = TrainingConfig(max_steps=10, stage2={"epochs": 3.0})
    assert [(c.max_steps, c.epochs) for c in map(by_steps.for_stage, "12")] == [(10, 1.0), (None, 3.0)]
    by_epochs = TrainingConfig(epochs=3.0, stage1={"max_steps": 10})
    assert [(c.max_steps, c.epochs) for c in map(by_epochs.for_stage, "12")] == [(10, 1.0), (None, 3.0)]


@pytest.mark.parametrize(("text", "error"), WRONG_YAML.values(), ids=WRONG_YAML)
def test_wrong_settings(tmp_path, text, error):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match="run.yaml.*" + error.replace("?", r"\?")):
        TrainingConfig.from_yaml(file)


@pytest.mark.parametrize(
    ("batch", "device", "processes", "expected"),
    [
        (64, None, 1, (4, 16)),
        (10, None, 1, (2, 5)),
        (9, None, 1, (3, 3)),
        (7, None, 1, (1, 7)),
        (3, None, 1, (3, 1)),
        (24, None, 4, (3, 2)),
        (10, 5, 1, (5, 2)),
        (2, 8, 1, (2, 1)),
        (64, 16, 4, (16, 1)),
    ],
)
def test_device_batches(batch, device, processes, expected):
    found = TrainingConfig(batch_size=batch, device_batch_size=device).device_batches(processes)
    assert found == expected
    assert [type(number) for number in found] == [int, int]  # numbers of clips and of passes, for `range`


@given(st.integers(1, 300), st.integers(1, 16))
def test_device_batches_that_are_not_set_fill_every_share(share, processes):
    size, times = TrainingConfig(batch_size=share * processes).device_batches(processes)
    assert (size * times, size <= 4) == (share, True)
    assert all(share % larger for larger in range(size + 1, 5))


@pytest.mark.parametrize(
    ("batch", "device", "processes", "error"),
    [
        (10, 4, 1, r"batch_size 10 is not a multiple of device_batch_size 4\. Change one of them, or leave"),
        (12, 4, 2, "batch_size 12; for each of 2 processes it is 6, which is not a multiple of device_batch_size 4"),
        (10, None, 4, "batch_size 10 doesn't divide into 4 processes; take a multiple of 4"),
        (2, None, 4, "batch_size 2 doesn't divide into 4 processes"),
    ],
    ids=["at_once", "share", "processes", "too_few"],
)
def test_batches_that_do_not_divide(batch, device, processes, error):
    with pytest.raises(ConfigError, match=error):
        TrainingConfig(batch_size=batch, device_batch_size=device).device_batches(processes)


def test_missing_settings_file(tmp_path):
    with pytest.raises(ConfigError, match=r"can't read the settings in .*none\.yaml.*No such file"):
        TrainingConfig.from_yaml(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs: 1\nepochs: 2\n", "'epochs' stands twice in it"),
        ("frames:\n  fps: 1\n  fps: 2\n", "'fps' stands twice in it"),
        ("epochs: 2024-13-45\n", "is not YAML: month must be"),
        ("a: " + "[" * 5000, "is not YAML"),
        ("max_steps: " + "9" * 5000, "is not YAML: Exceeds the limit"),
    ],
    ids=["twice", "twice-inside", "date", "deep", "digits"],
)
def test_settings_that_are_no_yaml(tmp_path, text, message):
    from sta_adapter.training.yaml_file import read_yaml

    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_yaml(tmp_path / "run.yaml")
