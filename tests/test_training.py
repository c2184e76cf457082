import copy
import dataclasses
import json
import os

import pytest
import torch
from safetensors.torch import load_file
from tiny_qwen import make_model, make_processor, write_samples

from sta_adapter import get_sta, inject_sta, load_sta
from sta_adapter.data import Collator, FrameSettings, VideoDataset
from sta_adapter.errors import CheckpointError, ConfigError, DataError
from sta_adapter.loading import load_adapter
from sta_adapter.training import TrainingConfig, train
from sta_adapter.training.checkpoints import load_trained
from sta_adapter.training.trainer import parameter_groups

AS_IS = FrameSettings(min_tokens=None, max_tokens=None)
FAST = {
    "batch_size": 4,
    "device_batch_size": 4,
    "max_steps": 6,
    "learning_rate": 5e-3,
    "logging_steps": 1,
    "save_steps": 3,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Clips, their file and a tokenizer."""
    path = tmp_path_factory.mktemp("data")
    write_samples(path, 8)
    return path


@pytest.fixture(scope="module")
def processor(folder):
    return make_processor(folder / "tokenizer")


@pytest.fixture(scope="module")
def dataset(folder, processor):
    return VideoDataset(folder / "data.jsonl", processor, frames=AS_IS, on_bad_sample="error", cache=True)


@pytest.fixture
def model(processor):
    return make_model(processor.tokenizer)


@pytest.fixture(scope="module")
def batch(dataset, processor):
    made = Collator.of(processor)([dataset[i] for i in range(8)])
    return {key: value for key, value in made.items() if isinstance(value, torch.Tensor)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, processor, dataset):
    """Both stages, once."""
    out = tmp_path_factory.mktemp("both")
    model = make_model(processor.tokenizer)
    before = copy.deepcopy(model.state_dict())
    return train(model, dataset, output_dir=out, config=TrainingConfig(**FAST), progress=False), before


def logits(model, batch):
    with torch.no_grad():
        return model.eval()(**batch).logits


def mean_loss(model, batch):
    with torch.no_grad():
        return model.eval()(**batch).loss


def losses(result, stage, name="loss"):
    return [entry[name] for entry in result.stages[stage]["history"] if name in entry]


def base_weights(model):
    """The base model's parameters by their names without PEFT's and STA's."""
    found = {}
    for name, value in getattr(model, "get_base_model", lambda: model)().state_dict().items():
        if "lora_" not in name and ".sta." not in name:
            found[name.replace(".base_layer", "")] = value
    return found


# ---- the two stages


def test_stage_one_changes_sta_alone(tmp_path, model, dataset, batch):
    before = copy.deepcopy(model.state_dict())
    loss = mean_loss(model, batch)
    handle = inject_sta(model)
    fresh = [p.clone() for p in handle.parameters()]
    result = train(handle, dataset, output_dir=tmp_path, stage="1", config=TrainingConfig(**FAST), progress=False)
    assert result.model is model
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if ".sta." in n
    }
    assert all(torch.equal(before[n], v) for n, v in base_weights(model).items())
    assert len(base_weights(model)) == len(before)
    assert all(not torch.equal(a, b) for a, b in zip(fresh, result.handle.parameters(), strict=True))
    assert mean_loss(model, batch) < loss
    assert result.stages["1"]["trainable_parameters"] == handle.num_parameters()


def test_both_stages_leave_the_base_alone(trained, processor, batch):
    result, before = trained
    now = base_weights(result.model)
    assert now.keys() == before.keys()
    assert all(torch.equal(before[name], now[name]) for name in before)
    assert mean_loss(result.model, batch) < 0.9 * mean_loss(make_model(processor.tokenizer), batch)
    names = [name for name, p in result.model.named_parameters() if p.requires_grad]
    assert all("lora_" in name or ".sta.modules_to_save." in name for name in names)
    kinds = (
        "visual.blocks.0.attn.qkv.lora_A",
        "visual.blocks.1.mlp.fc2.lora_B",
        "layers.0.self_attn.q_proj",
        "blocks.0.sta",
    )
    assert all(any(kind in name for name in names) for kind in kinds)


def test_stage_two_changes_what_stage_one_left(trained):
    result, _ = trained
    first, last = (load_file(result.output_dir / f"stage{s}" / "sta_adapter.safetensors") for s in "12")
    assert first.keys() == last.keys()
    assert all(not torch.equal(first[key], last[key]) for key in first)
    lora = load_file(result.output_dir / "adapter_model.safetensors")
    assert all(value.any() for key, value in lora.items() if "lora_B" in key)


def test_saved_adapter_gives_the_same_logits(trained, processor, batch):
    result, _ = trained
    fresh = make_model(processor.tokenizer)
    assert not torch.equal(logits(fresh, batch), logits(result.model, batch))
    handle = load_sta(fresh, result.output_dir)
    assert torch.equal(logits(handle.model, batch), logits(result.model, batch))


def test_every_checkpoint_is_an_adapter(trained, processor, batch):
    result, _ = trained
    folders = sorted(path.name for path in (result.output_dir / "stage2").glob("checkpoint-*"))
    assert folders == ["checkpoint-3", "checkpoint-6"]
    handle = load_sta(make_model(processor.tokenizer), result.output_dir / "stage2" / "checkpoint-6")
    assert torch.equal(logits(handle.model, batch), logits(result.model, batch))
    size = sum(file.stat().st_size for file in (result.output_dir / "stage1" / "checkpoint-6").iterdir())
    assert size < 100_000  # the frozen base has 200,000 bytes


def test_repeating_a_finished_run_trains_nothing(trained, processor, dataset, batch):
    result, _ = trained
    again = train(
        make_model(processor.tokenizer),
        dataset,
        output_dir=result.output_dir,
        config=TrainingConfig(**FAST),
        progress=False,
    )
    assert again.stages == result.stages
    assert torch.equal(logits(again.model, batch), logits(result.model, batch))


def test_a_run_of_other_settings_is_not_overwritten(trained, processor, dataset):
    result, _ = trained
    other = TrainingConfig(**{**FAST, "lora_rank": 4})
    with pytest.raises(ConfigError, match=r"holds a run that differs in lora_rank\. .*overwrite"):
        train(make_model(processor.tokenizer), dataset, output_dir=result.output_dir, config=other, progress=False)


def test_overwrite_begins_anew(tmp_path, processor, dataset):
    for rank in (4, 2):
        config = TrainingConfig(**{**FAST, "max_steps": 1, "lora_rank": rank})
        result = train(
            make_model(processor.tokenizer), dataset, output_dir=tmp_path, config=config, overwrite=True, progress=False
        )
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 2
    assert result.stages["1"]["steps"] == 1


def test_stage_two_goes_on_from_an_adapter(trained, tmp_path, processor, dataset):
    result, _ = trained
    handle = load_sta(make_model(processor.tokenizer), result.output_dir, is_trainable=True)
    config = TrainingConfig(**{**FAST, "max_steps": 2})
    more = train(handle, dataset, output_dir=tmp_path, stage="2", config=config, progress=False)
    assert more.stages["2"]["trainable_parameters"] == result.stages["2"]["trainable_parameters"]
    for name in ("sta_adapter.safetensors", "adapter_model.safetensors"):
        old, new = load_file(result.output_dir / name), load_file(tmp_path / name)
        assert old.keys() == new.keys()
        assert all(not torch.equal(old[key], new[key]) for key in old)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"sta_config": {"head_scale": 1.0}}, "sta_config.head_scale is 1.0, but the model has STA with .* already"),
        ({"lora_rank": 3}, "lora_rank is 3, but the model has LoRA already"),
        (
            {"lora_targets": "language"},
            r"lora_targets is 'language', but the model has LoRA already \(set up when it was made\)",
        ),
    ],
    ids=["sta", "rank", "targets"],
)
def test_settings_that_an_adapter_leaves_without_effect(trained, tmp_path, processor, dataset, changes, error):
    handle = load_sta(make_model(processor.tokenizer), trained[0].output_dir, is_trainable=True)
    config = TrainingConfig(**{**FAST, "max_steps": 1, **changes})
    with pytest.raises(ConfigError, match=error):
        train(handle, dataset, output_dir=tmp_path, stage="2", config=config, progress=False)


# ---- checkpoints (of interrupted runs: test_interruption.py)


def test_checkpoint_of_another_model_changes_nothing(trained, model):
    result, _ = trained
    handle = inject_sta(model).freeze_base()
    before = [p.clone() for p in handle.parameters()]
    with pytest.raises(
        CheckpointError, match=r"is of another run: .* parameters are missing, unexpected or of another"
    ):
        load_trained(model, result.output_dir / "stage2")
    assert all(torch.equal(a, b) for a, b in zip(before, handle.parameters(), strict=True))
    with pytest.raises(CheckpointError, match=r"can't read .*trained\.safetensors"):
        load_trained(model, result.output_dir / "nothing")


# ---- optimisation


def test_own_rate_for_sta_and_no_decay_on_vectors(model):
    from sta_adapter import STAConfig

    handle = inject_sta(model, STAConfig(gamma_init=0.1))
    model.requires_grad_(True)
    config = TrainingConfig(learning_rate=1e-3, sta_learning_rate=1e-2, weight_decay=0.1)
    groups = parameter_groups(model, set(map(id, handle.parameters())), config)
    seen = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(seen) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert seen[id(parameter)] == (1e-2 if ".sta." in name else 1e-3, 0.1 if parameter.dim() > 1 else 0.0)
    names = dict(model.named_parameters())
    assert seen[id(names[next(n for n in names if n.endswith("sta.gamma"))])] == (1e-2, 0.0)


@pytest.mark.parametrize("kind", [True, "reentrant"], ids=["plain", "reentrant"])
def test_gradient_checkpointing_gives_the_same_weights(trained, tmp_path, processor, dataset, kind):
    result, _ = trained
    model = make_model(processor.tokenizer)
    config = TrainingConfig(**FAST, gradient_checkpointing=kind)
    other = train(model, dataset, output_dir=tmp_path, config=config, progress=False)
    for name in ("sta_adapter.safetensors", "adapter_model.safetensors"):
        a, b = load_file(result.output_dir / name), load_file(other.output_dir / name)
        assert all(torch.allclose(a[key], b[key], atol=1e-4) for key in a)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in other.model.modules())


def test_accumulated_batches_give_the_same_weights(trained, tmp_path, processor, dataset):
    result, _ = trained
    config = TrainingConfig(**{**FAST, "device_batch_size": 2})
    other = train(make_model(processor.tokenizer), dataset, output_dir=tmp_path, config=config, progress=False)
    assert losses(other, "2") == pytest.approx(losses(result, "2"), rel=1e-3)


def test_narrow_weights_are_trained_in_full_precision(tmp_path, processor, dataset):
    model = make_model(processor.tokenizer).to(torch.bfloat16)
    config = TrainingConfig(**{**FAST, "learning_rate": 1e-5, "max_steps": 3}, sta_config={"init": "normal"})
    result = train(model, dataset, output_dir=tmp_path, stage="1", config=config, progress=False)
    assert {p.dtype for p in result.model.parameters()} == {torch.bfloat16}
    saved = load_file(tmp_path / "sta_adapter.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float32}
    moved = saved["blocks.0.norm.weight"] - 1
    assert 0 < moved.abs().max() < 1e-4  # bfloat16 would have rounded it to 1


def test_best_checkpoint_is_kept(tmp_path, model, processor, dataset, batch):
    scores = iter([0.2, 0.9, 0.4])
    seen = []

    def measure(net):
        seen.append(logits(net, batch))
        torch.rand(3)  # must not change what the training draws
        return {"accuracy": next(scores), "other": 1.0}

    config = TrainingConfig(**{**FAST, "save_steps": 2}, eval_steps=2)
    result = train(model, dataset, output_dir=tmp_path, stage="1", config=config, eval_fn=measure, progress=False)
    assert torch.equal(logits(result.model, batch), seen[1])
    assert [entry["eval_accuracy"] for entry in result.history if "eval_accuracy" in entry] == [0.2, 0.9, 0.4]
    again = make_model(processor.tokenizer)  # the run has ended; its best checkpoint is what comes back
    again = train(again, dataset, output_dir=tmp_path, stage="1", config=config, eval_fn=measure, progress=False)
    assert torch.equal(logits(again.model, batch), seen[1])


@pytest.mark.parametrize(("keep_best", "evaluation"), [(True, 1), (False, 2)], ids=["best", "last"])
def test_a_run_that_died_after_its_last_step_ends_as_it_would_have(
    tmp_path, model, processor, dataset, batch, keep_best, evaluation
):
    scores, seen = iter([0.2, 0.9, 0.4]), []

    def measure(net):
        seen.append(logits(net, batch))
        return {"accuracy": next(scores)}

    config = TrainingConfig(**{**FAST, "save_steps": 2}, eval_steps=2, keep_best=keep_best)
    settings = {"output_dir": tmp_path, "stage": "1", "config": config, "eval_fn": measure, "progress": False}
    train(model, dataset, **settings)
    (tmp_path / "stage1" / "result.json").unlink()
    again = train(make_model(processor.tokenizer), dataset, **settings)
    assert len(seen) == 3  # nothing was trained or measured again
    assert torch.equal(logits(again.model, batch), seen[evaluation])


def test_loss_on_other_data_is_measured(tmp_path, model, dataset):
    config = TrainingConfig(**FAST, eval_steps=3)
    result = train(model, dataset, output_dir=tmp_path, stage="1", config=config, eval_data=dataset, progress=False)
    measured = [entry["eval_loss"] for entry in result.history if "eval_loss" in entry]
    assert len(measured) == 2
    assert measured[1] < measured[0]


@pytest.mark.parametrize(
    ("measured", "name", "more_is_better"), [(False, "eval_loss", False), (True, "eval_score", True)]
)
def test_a_low_loss_and_a_high_score_are_the_best(tmp_path, dataset, measured, name, more_is_better):
    from sta_adapter.training.stage import Stage

    other = {"eval_fn": lambda net: {"accuracy": 1.0}} if measured else {"eval_dataset": dataset}
    found = Stage("1", TrainingConfig(**FAST), tmp_path, dataset, **other)._arguments()
    assert found.load_best_model_at_end
    assert (found.metric_for_best_model, found.greater_is_better) == (name, more_is_better)


@pytest.mark.parametrize(
    ("settings", "more", "error"),
    [
        ({"eval_steps": 2}, {}, "eval_steps is 2, but there is nothing to evaluate"),
        ({"stage1": {"eval_steps": 2}}, {}, "eval_steps is 2, but there is nothing to evaluate"),
        ({"eval_steps": 2}, {"eval_fn": len}, "save_steps 3 has no effect while the best evaluation is kept"),
        ({}, {"eval_fn": len, "eval_data": "same"}, "eval_data has no effect together with eval_fn"),
        ({"shuffle_buffer": 8}, {}, "shuffle_buffer applies to tar shards and has no effect"),
        (
            {"max_length": 9},
            {},
            "max_length is 9, but the data set was made with None; make it with the same value, or",
        ),
        ({"decode_timeout": 9.0}, {}, "decode_timeout is 9.0, but the data set was made with"),
        ({"frames": FrameSettings(fps=3)}, {}, r"frames is FrameSettings\(fps=3, .* but the data set was made with"),
    ],
)
def test_settings_that_others_leave_without_effect(tmp_path, model, dataset, settings, more, error):
    more = {name: dataset if value == "same" else value for name, value in more.items()}
    config = TrainingConfig(**{**FAST, **settings})
    with pytest.raises(ConfigError, match=error):
        train(model, dataset, output_dir=tmp_path / "out", stage="1", config=config, progress=False, **more)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("limit", [0.125, 3.0])
def test_the_limit_on_gradients_reaches_the_trainer(tmp_path, dataset, limit):
    from sta_adapter.training.stage import Stage

    config = TrainingConfig(**FAST, max_grad_norm=limit)
    assert Stage("1", config, tmp_path, dataset)._arguments().max_grad_norm == limit


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"max_steps": 6, "warmup": 0.5}, {"max_steps": 6, "warmup_steps": 3}),
        ({"max_steps": None, "epochs": 3, "warmup": 0.5}, {"max_steps": -1, "num_train_epochs": 3, "warmup_steps": 3}),
        ({"batch_size": 8, "device_batch_size": 2}, {"gradient_accumulation_steps": 4}),
        ({"precision": "bf16", "schedule": "linear"}, {"bf16": True, "lr_scheduler_type": "linear"}),
    ],
    ids=str,
)
def test_settings_in_the_trainer_s_words(tmp_path, dataset, monkeypatch, settings, expected):
    from sta_adapter.training.stage import Stage

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")  # as a launcher has it
    config = TrainingConfig(**{**FAST, **settings})
    found = Stage("1", config, tmp_path, dataset)._arguments()
    same = {"remove_unused_columns": False, "disable_tqdm": True, "prediction_loss_only": True, "seed": 0}
    expected = {"per_device_train_batch_size": config.device_batch_size, **same, **expected}
    assert {name: getattr(found, name) for name in expected} == expected
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == ("bf16" if config.precision == "bf16" else "no")


# ---- baselines


@pytest.mark.parametrize("targets", ["all", "language"])
def test_lora_without_sta(tmp_path, processor, dataset, batch, targets):
    ranks = {"lora_rank": 4, **({"lora_qkv_rank": 6} if targets == "all" else {})}
    config = TrainingConfig(**{**FAST, "max_steps": 2}, sta=False, lora_targets=targets, **ranks)
    result = train(
        make_model(processor.tokenizer), dataset, output_dir=tmp_path, stage="2", config=config, progress=False
    )
    assert result.handle is None
    assert get_sta(result.model) is None
    ranks = {n: p.shape[0] for n, p in result.model.named_parameters() if "lora_A" in n}
    assert any("visual" in name for name in ranks) == (targets == "all")
    assert {rank for name, rank in ranks.items() if "attn.qkv" in name} == ({6} if targets == "all" else set())
    assert {rank for name, rank in ranks.items() if "attn.qkv" not in name} == {4}
    assert sum("layers" in name for name in ranks) == 2 * 7
    again = load_adapter(make_model(processor.tokenizer), tmp_path)
    assert torch.equal(logits(again, batch), logits(result.model, batch))


def test_sta_with_lora_on_the_language_model(tmp_path, model, dataset):
    config = TrainingConfig(**{**FAST, "max_steps": 1}, lora_targets="language")
    result = train(model, dataset, output_dir=tmp_path, stage="2", config=config, progress=False)
    names = [name for name, p in result.model.named_parameters() if p.requires_grad]
    assert not any("visual" in name and "lora_" in name for name in names)
    assert sum("lora_A" in name for name in names) == 14
    assert any(".sta.modules_to_save." in name for name in names)


# ---- bad samples


@pytest.fixture
def spoilt(tmp_path):
    """Eight samples of which two can't be read; the fourth is text without a clip."""
    file = write_samples(tmp_path / "spoilt", 8)
    (file.parent / "1.mp4").unlink()
    (file.parent / "2.mp4").write_text("no video")
    lines = file.read_text().splitlines()
    lines[3] = json.dumps(
        {"messages": [{"role": "user", "content": "Say up."}, {"role": "assistant", "content": "up"}]}
    )
    file.write_text("\n".join(lines))
    return file


@pytest.mark.parametrize("size", [1, 4], ids=["alone", "in_batches"])
def test_bad_samples_are_counted(tmp_path, model, processor, spoilt, size):
    config = TrainingConfig(**{**FAST, "max_steps": 4, "device_batch_size": size, "num_workers": 0}, frames=AS_IS)
    result = train(
        model, spoilt, processor=processor, output_dir=tmp_path / "out", stage="1", config=config, progress=False
    )
    assert sorted(message.split(": ")[0][-6:] for message in result.bad_samples) == ["line 2", "line 3"]
    assert all(torch.isfinite(p).all() for p in result.handle.parameters())


def test_bad_samples_to_measure_on_are_counted(tmp_path, model, processor, dataset, spoilt):
    config = TrainingConfig(
        **{**FAST, "max_steps": 2, "eval_steps": 1, "save_steps": 1, "num_workers": 0}, frames=AS_IS
    )
    result = train(
        model,
        dataset,
        eval_data=spoilt,
        processor=processor,
        output_dir=tmp_path / "out",
        stage="1",
        config=config,
        progress=False,
    )
    assert sorted(message.split(": ")[0][-6:] for message in result.bad_samples) == ["line 2", "line 3"]
    assert all(entry["eval_loss"] > 0 for entry in result.history if "eval_loss" in entry)


def test_nothing_to_measure_on_is_told(tmp_path, model, processor, dataset):
    """The best evaluation decides which checkpoint is kept: without any it was a KeyError of transformers'."""
    file = write_samples(tmp_path / "unread", 2)
    for clip in file.parent.glob("*.mp4"):
        clip.write_text("no video")
    settings = {**FAST, "max_steps": 2, "eval_steps": 1, "save_steps": 1, "num_workers": 0}
    config, how = TrainingConfig(**settings, frames=AS_IS), {"output_dir": tmp_path / "out", "progress": False}
    with pytest.raises(DataError, match=r"nothing to evaluate: all samples are bad, the latest .*line 2"):
        train(model, dataset, eval_data=file, processor=processor, stage="1", config=config, **how)


def test_bad_samples_stop_the_run_if_asked(tmp_path, model, processor, spoilt):
    config = TrainingConfig(**{**FAST, "num_workers": 0}, frames=AS_IS, on_bad_sample="error")
    with pytest.raises(DataError, match=r"data.jsonl, line [23]: "):
        train(model, spoilt, processor=processor, output_dir=tmp_path / "out", config=config, progress=False)


def test_nothing_usable_is_an_error(tmp_path, model, processor, spoilt):
    file = spoilt.with_name("bad.jsonl")
    file.write_text("\n".join(spoilt.read_text().splitlines()[1:3]))
    config = TrainingConfig(**{**FAST, "num_workers": 0}, frames=AS_IS)
    with pytest.raises(DataError, match=r"all 2 samples are bad, first .*line"):
        train(model, file, processor=processor, output_dir=tmp_path / "out", config=config, progress=False)


def test_words_alone_teach_sta_nothing(tmp_path, model, processor):
    words = {"messages": [{"role": "user", "content": "Which way?"}, {"role": "assistant", "content": "left"}]}
    data = VideoDataset([words, words], processor)
    with pytest.raises(
        DataError, match=r"none of the 2 samples has a clip or a picture.*train LoRA alone \(sta: false\)"
    ):
        train(model, data, output_dir=tmp_path / "out", config=TrainingConfig(**FAST), progress=False)
    assert get_sta(model) is None


# ---- arguments


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"stage": "3"}, "stage is '3', expected one of '1', '2', 'both'"),
        ({"config": TrainingConfig(sta=False)}, "nothing to train in stage one; use stage '2'"),
        ({"config": TrainingConfig(sta_learning_rate=0)}, "sta_learning_rate 0 trains nothing in stage one"),
        (
            {"config": TrainingConfig(stage1={"sta_learning_rate": 0})},
            "sta_learning_rate 0 trains nothing in stage one",
        ),
        ({"data": "data.jsonl"}, "pass processor="),
    ],
    ids=["stage", "baseline", "no_rate", "no_rate_of_the_stage", "no_processor"],
)
def test_arguments_that_do_not_fit(tmp_path, model, dataset, options, error):
    arguments = {"data": dataset, "output_dir": tmp_path, **options}
    with pytest.raises(ConfigError, match=error):
        train(model, **arguments)
    assert get_sta(model) is None


# ---- the command


def test_command(tmp_path, folder, processor, batch):
    from click.testing import CliRunner

    from sta_adapter.cli import cli

    base = tmp_path / "base"
    make_model(processor.tokenizer).save_pretrained(base)
    processor.save_pretrained(base)
    processor.tokenizer.chat_template = processor.chat_template
    processor.tokenizer.save_pretrained(base)
    settings = tmp_path / "run.yaml"
    settings.write_text(
        f"model: {base}\nmax_steps: 2\nbatch_size: 6\nnum_workers: 0\nframes: {{min_tokens: null, max_tokens: null}}\n"
    )
    line = ["train", "--config", str(settings), "--data", str(folder / "data.jsonl"), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(cli, [*line, "--set", "lora_rank=4", "--learning-rate", "0.01"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "stage 2: " in done.output
    written = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (written["lora_rank"], written["learning_rate"], written["max_steps"]) == (4, 0.01, 2)
    assert load_sta(make_model(processor.tokenizer), tmp_path / "out").backbone == "qwen2_vl"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--modle", "x"], "Did you mean --model?"),
        (["--model", "x", "--out", "y"], "Missing option --data"),
        (["--stage", "3"], "'3' is not one of '1', '2', 'both'"),
    ],
    ids=["typo", "missing", "choice"],
)
def test_command_refuses(arguments, error):
    from click.testing import CliRunner

    from sta_adapter.cli import cli

    done = CliRunner().invoke(cli, ["train", *arguments])
    assert done.exit_code == 2
    assert error in done.output.replace("'--model'", "--model")


def test_a_backbone_without_lora_says_so_before_stage_one(tmp_path, model, dataset):
    from sta_adapter.injection.registry import get_backbone

    plain = dataclasses.replace(get_backbone("qwen2_vl"), name="plain", lora=None)
    handle = inject_sta(model, backbone=plain)
    with pytest.raises(ConfigError, match="backbone 'plain' has no LoRA recipe; train stage 1"):
        train(handle, dataset, output_dir=tmp_path / "out", config=TrainingConfig(**FAST), progress=False)
    assert not (tmp_path / "out").exists()
