"""Parts of a run that need no training: settings without effect, which run a folder holds, the trainer's arguments, memory."""

import json
import math
import signal
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.data import DataLoader

from sta_adapter import STAConfig, distributed
from sta_adapter.adapter.format import CONFIG, WEIGHTS
from sta_adapter.data import FrameSettings, VideoDataset
from sta_adapter.data.chat_encoding import IGNORE
from sta_adapter.data.stream import StreamDataset
from sta_adapter.demo import TINY_BASE
from sta_adapter.errors import ConfigError, DataError, MissingExtraError
from sta_adapter.loading import load_processor
from sta_adapter.training import TrainingConfig, token_loss, train
from sta_adapter.training.arguments import refuse_flattening, training_arguments
from sta_adapter.training.epoch_shares import Fillable, fill_up
from sta_adapter.training.identity import claim
from sta_adapter.training.memory import SMALL, _Bookkeeping, _norms_like_cuda, step_peak, without_values
from sta_adapter.training.progress import describe
from sta_adapter.training.sample_counts import SampleCounts
from sta_adapter.training.settings_check import check_settings, check_single_frames, check_sizes
from sta_adapter.training.stage import Stage
from sta_adapter.training.token_loss import TokenTrainer, placeholder
from sta_adapter.training.two_stage import _opened, _publish

# ---- settings without effect


def check(settings, *, evaluated=False, eval_fn=None, **made_with):
    """As `train` does it, on a file of samples that was made with the defaults."""
    config = TrainingConfig.from_dict(settings)
    made = {
        "frames": FrameSettings(),
        "max_length": config.max_length,
        "decode_timeout": 60.0,
        "on_bad_sample": "skip",
        **made_with,
    }
    dataset = SimpleNamespace(encoder=SimpleNamespace(**made))
    stages = [config.for_stage(name) for name in ("1", "2")]
    check_settings(config, stages, dataset, dataset if evaluated else None, eval_fn)


@pytest.mark.parametrize(
    ("settings", "more", "message"),
    [
        ({}, {"evaluated": True, "eval_fn": dict}, "eval_data has no effect together with eval_fn"),
        ({"early_stopping": 2}, {}, "early_stopping counts evaluations, and there are none"),
        ({"stage2": {"early_stopping": 2}}, {}, "early_stopping counts evaluations, and there are none"),
        ({"early_stopping": 2, "keep_best": False}, {"evaluated": True}, "no effect with keep_best: false"),
        ({"eval_steps": 5}, {}, "eval_steps is 5, but there is nothing to evaluate"),
        ({"save_steps": 7}, {"evaluated": True}, "save_steps 7 has no effect while the best evaluation is kept"),
        ({"save_steps": 7, "eval_steps": 5}, {"eval_fn": dict}, "save_steps 7 has no effect"),
        ({"shuffle_buffer": 3}, {}, "shuffle_buffer applies to tar shards"),
        ({"max_length": 9}, {"max_length": 8}, "max_length is 9, but the data set was made with 8"),
        ({"decode_timeout": 5.0}, {}, r"decode_timeout is 5\.0, but the data set was made with 60\.0"),
        ({"on_bad_sample": "error"}, {}, "on_bad_sample is 'error', but the data set was made with 'skip'"),
        ({"frames": {"fps": 2}}, {}, "frames is FrameSettings.*but the data set was made with"),
    ],
)  # fmt: skip
def test_a_setting_without_effect_is_refused(settings, more, message):
    with pytest.raises(ConfigError, match=message):
        check(settings, **more)


@pytest.mark.parametrize(
    ("settings", "more"),
    [
        ({}, {}),
        ({"early_stopping": 2, "eval_steps": 5}, {"evaluated": True}),
        ({"eval_steps": 5}, {"eval_fn": dict}),
        ({"save_steps": 7}, {}),
        ({"save_steps": 5, "eval_steps": 5}, {"evaluated": True}),
        ({"save_steps": 7, "keep_best": False}, {"evaluated": True}),
        ({}, {"max_length": 8}),
        ({"decode_timeout": 5.0}, {"decode_timeout": 5.0}),
        ({}, {"on_bad_sample": "error"}),
    ],
)  # fmt: skip
def test_a_setting_with_effect_is_taken(settings, more):
    check(settings, **more)


def test_the_shuffling_of_a_ready_stream_is_its_own():
    shards = StreamDataset.__new__(StreamDataset)
    shards.shuffle = 100
    shards.encoder = SimpleNamespace(frames=FrameSettings(), max_length=None, decode_timeout=60.0, on_bad_sample="skip")
    check_settings(TrainingConfig(), [], shards, None, None)
    with pytest.raises(
        ConfigError, match="shuffle_buffer is 500, but the data set was made with 100; make it with the same value, or"
    ):
        check_settings(TrainingConfig(shuffle_buffer=500), [], shards, None, None)


@pytest.mark.parametrize(
    ("part", "steps"),
    [
        ({"type": "image", "image": "a.png"}, 1),
        ({"type": "video", "video": "a.mp4", "nframes": 2}, 1),
        ({"type": "video", "video": "a.mp4", "max_frames": 2}, 1),
        ({"type": "video", "video": "a.mp4", "nframes": 3}, 2),
        ({"type": "video", "video": "a.mp4"}, 16),
    ],
    ids=["picture", "two frames", "at most two", "three", "by default"],
)
def test_clips_of_a_single_step_are_told_of(part, steps, caplog):
    answer = {"role": "assistant", "content": "left"}
    data = VideoDataset([{"messages": [{"role": "user", "content": [part]}, answer]}] * 2, load_processor(TINY_BASE))
    data.encoder.reader = replace(data.encoder.reader, temporal_patch=2)
    check_single_frames(data, STAConfig())
    told = "each of 2 clips and pictures is a single step in time (of 2 frames, which the model merges), over which STA has"
    assert [told in record.message for record in caplog.records] == ([True] if steps == 1 else [])
    if steps == 1:
        with pytest.raises(DataError, match="with single_frames: false nothing of it would be trained"):
            check_single_frames(data, STAConfig(single_frames=False))
    else:
        check_single_frames(data, STAConfig(single_frames=False))


@pytest.mark.parametrize(
    ("limits", "wrong"),
    [
        ({}, ""),
        ({"min_tokens": None, "max_tokens": None}, ""),
        ({"max_tokens": 64}, "max_tokens is 64"),
        ({"min_tokens": 32}, "min_tokens is 32"),
    ],
)
def test_tokens_of_a_frame_have_an_effect(limits, wrong):
    data = VideoDataset([], load_processor(TINY_BASE), frames=FrameSettings(**limits))
    check_sizes(data.encoder.reader)
    reader = replace(data.encoder.reader, factor=1)
    with (
        pytest.raises(ConfigError, match=f"^frames.{wrong}, and has no effect with this model")
        if wrong
        else nullcontext()
    ):
        check_sizes(reader)


# ---- which run a folder holds

RUN = {"data": "d", "learning_rate": 0.1, "epochs": 1.0, "max_steps": None, "save_steps": 5}


@pytest.mark.parametrize(
    ("was", "now", "taken_up"),
    [
        ({}, {}, True),
        ({}, {"save_steps": 9}, True),
        ({}, {"epochs": 2.0}, True),
        ({}, {"epochs": 0.5}, False),
        ({"max_steps": 5}, {"max_steps": 6}, True),
        ({"max_steps": 5}, {"max_steps": 4}, False),
        ({"max_steps": 5}, {}, False),
        ({}, {"max_steps": 5}, False),
        ({}, {"epochs": 2.0, "data": "e"}, False),
        ({}, {"learning_rate": 0.2}, False),
        ({"stage1": {"max_steps": 5}}, {"stage1": {"max_steps": 6}}, True),
        ({"stage1": {"max_steps": 5}}, {"stage1": {"max_steps": 4}}, False),
        ({"stage2": {"epochs": 1.0}}, {"stage2": {"epochs": 3.0}}, True),
        ({"stage2": {"epochs": 3.0}}, {"stage2": {"epochs": 1.0}}, False),
        ({"stage1": {"max_steps": 5}}, {"stage1": {"max_steps": 6, "learning_rate": 1.0}}, False),
    ],
)  # fmt: skip
def test_a_run_may_be_longer_and_nothing_else(tmp_path, was, now, taken_up):
    claim(tmp_path, {**RUN, **was}, overwrite=False)
    if taken_up:
        claim(tmp_path, {**RUN, **now}, overwrite=False)
        assert json.loads((tmp_path / "run.json").read_text()) == {**RUN, **now}
        return
    (tmp_path / "stage1").mkdir()
    with pytest.raises(ConfigError, match=r"holds a run that differs in .*overwrite"):
        claim(tmp_path, {**RUN, **now}, overwrite=False)
    assert json.loads((tmp_path / "run.json").read_text()) == {**RUN, **was}
    claim(tmp_path, {**RUN, **now}, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize("change", [{"max_steps": "9"}, {"epochs": None}, {"stage1": ["x"]}, "max_steps", "epochs"])
def test_a_file_that_no_run_wrote_is_another_run(tmp_path, change):
    wrote = {k: v for k, v in RUN.items() if k != change} if isinstance(change, str) else {**RUN, **change}
    (tmp_path / "run.json").write_text(json.dumps(wrote))
    with pytest.raises(ConfigError, match=r"holds a run that differs in .*max_steps.*overwrite"):
        claim(tmp_path, {**RUN, "max_steps": 10}, overwrite=False)


# ---- the trainer's arguments


@pytest.mark.parametrize(
    ("settings", "measured", "expected"),
    [
        ({"save_steps": 7}, None, ("steps", 7, "no", False)),
        ({}, "eval_loss", ("epoch", 100, "epoch", True)),
        ({"eval_steps": 5}, "eval_loss", ("steps", 5, "steps", True)),
        ({"eval_steps": 5, "save_steps": 7, "keep_best": False}, "eval_score", ("steps", 7, "steps", False)),
        ({"keep_best": False}, "eval_score", ("steps", 100, "epoch", False)),
    ],
)  # fmt: skip
def test_when_a_run_saves_and_evaluates(tmp_path, settings, measured, expected):
    found = training_arguments(TrainingConfig(report_to="none", **settings), tmp_path, 40, 3, measured, False)
    when = (found.save_strategy.value, found.save_steps, found.eval_strategy.value, found.load_best_model_at_end)
    assert when == expected
    assert found.eval_steps == settings.get("eval_steps")
    if expected[-1]:
        assert (found.metric_for_best_model, found.greater_is_better) == (measured, measured != "eval_loss")


@pytest.mark.parametrize(("steps", "warmup", "expected"), [(1, 0.02, 0), (2, 0.02, 1), (2, 1.0, 1), (100, 0.02, 2)])
def test_a_run_is_not_all_warm_up(steps, warmup, expected, tmp_path):
    config = TrainingConfig(warmup=warmup, report_to="none")
    assert training_arguments(config, tmp_path, steps, 0, None, False).warmup_steps == expected


def test_the_settings_in_the_trainers_words(tmp_path, monkeypatch):
    config = TrainingConfig(
        **{
            "batch_size": 12,
            "device_batch_size": 3,
            "learning_rate": 0.5,
            "schedule": "constant_with_warmup",
            "warmup": 0.1,
        },
        **{"max_steps": 40, "max_grad_norm": 0.7, "seed": 9, "run_name": "mine", "report_to": "none"},
    )
    found = training_arguments(config, tmp_path, 41, 3, None, True)
    assert (found.per_device_train_batch_size, found.per_device_eval_batch_size) == (3, 3)
    assert (found.gradient_accumulation_steps, found.warmup_steps, found.max_steps) == (4, 5, 40)
    assert (found.learning_rate, found.lr_scheduler_type.value, found.max_grad_norm) == (
        0.5,
        "constant_with_warmup",
        0.7,
    )
    assert (found.seed, found.run_name) == (9, "mine")
    assert (found.dataloader_num_workers, found.ignore_data_skip, found.remove_unused_columns) == (3, True, False)
    assert (found.label_names, found.prediction_loss_only, found.disable_tqdm) == (["labels"], True, True)
    assert (found.bf16, found.fp16, found.report_to) == (False, False, [])
    assert found.n_gpu <= 1
    assert found.dataloader_pin_memory == torch.cuda.is_available()
    narrow = training_arguments(replace(config, precision="bf16"), tmp_path, 41, 0, None, False)
    assert (narrow.bf16, narrow.fp16, narrow.ignore_data_skip) == (True, False, False)
    reentrant = training_arguments(replace(config, gradient_checkpointing="reentrant"), tmp_path, 41, 0, None, False)
    assert (found.ddp_find_unused_parameters, reentrant.ddp_find_unused_parameters) == (None, False)
    long = training_arguments(replace(config, max_steps=None, epochs=3.0), tmp_path, 41, 0, None, False)
    assert (long.max_steps, long.num_train_epochs) == (-1, 3.0)


# ---- the summary


def described(tmp_path, dataset, model, stage="1", **settings):
    """Its lines by what they are about, of a stage that measures nothing and begins anew."""
    made = Stage(stage, TrainingConfig(report_to="none", **settings), tmp_path, dataset)
    return {line[2:12].strip(): line[12:] for line in describe(made, model, None)[1:]}


def sized(*counts):
    """A module with so many parameters, the first of which train, without their memory."""
    with torch.device("meta"):
        model = nn.ParameterList([nn.Parameter(torch.empty(count)) for count in counts])
    for parameter in list(model)[1:]:
        parameter.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ((999_999, 1), "STA: 999,999 of 1.0 M parameters"),
        ((1_000_000, 998_000_000), "STA: 1.0 M of 999.0 M parameters"),
        ((10**9, 10**9), "STA: 1.00 B of 2.00 B parameters"),
    ],
)  # fmt: skip
def test_the_summary_counts_parameters(tmp_path, counts, said):
    lines = described(tmp_path, range(8), sized(*counts), max_steps=5)
    assert lines["trains"] == said
    assert {"measures", "shows", "goes on"}.isdisjoint(lines)


def test_the_summary_of_stage_two_and_of_a_baseline(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    shards = StreamDataset.__new__(StreamDataset)
    shards.shards = ["a", "b"]
    lines = described(tmp_path, shards, sized(5), "2", max_steps=9, gradient_checkpointing=True, save_minutes=None)
    assert lines["trains"] == "STA and LoRA: 5 of 5 parameters"
    assert lines["data"].startswith("2 shards, 9 steps of 64 clips (4 on a device at a time, 16 times)")
    assert lines["computes"] == "in fp32 on the CPU, gradient checkpointing on"
    assert lines["saves"].endswith(", every 100 steps")
    lines = described(tmp_path, range(8), sized(5), "2", sta=False, batch_size=4, device_batch_size=4)
    assert lines["trains"] == "LoRA: 5 of 5 parameters"
    assert lines["data"] == "8 samples, 2 steps of 4 clips (4 on a device at a time)"


@pytest.mark.parametrize(
    ("settings", "measures", "saves"),
    [
        ({}, "what eval_fn measures each epoch", "evaluation or 15 minutes"),
        ({"eval_steps": 5}, "what eval_fn measures every 5 steps", "evaluation or 15 minutes"),
        ({"eval_steps": 5, "keep_best": False}, "what eval_fn measures every 5 steps", "100 steps or 15 minutes"),
    ],
)  # fmt: skip
def test_the_summary_says_when_it_measures_and_saves(tmp_path, settings, measures, saves):
    config = TrainingConfig(report_to="tensorboard", **settings)
    lines = describe(Stage("1", config, tmp_path / "a b", range(8), eval_fn=dict), sized(5), Path("x/checkpoint-3"))
    assert f"  measures  {measures}" in lines
    assert f"  saves     into '{tmp_path}/a b', every {saves}" in lines
    assert f"  shows     tensorboard --logdir '{tmp_path}/a b'" in lines
    assert "  goes on   from checkpoint-3" in lines


# ---- where the memory is not enough


def test_what_was_used_is_added_up_over_processes(monkeypatch):
    counts = SampleCounts(2, ["line 3: torn"])
    assert counts.of_all() == {"batches_used": 2, "bad_samples": ["line 3: torn"]}

    def gather(found, own):
        assert len(found) == 2
        found[:] = [own, (3, ["line 3: torn", "line 9: gone"])]

    monkeypatch.setattr(distributed, "is_parallel", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    assert counts.of_all() == {"batches_used": 5, "bad_samples": ["line 3: torn", "line 9: gone"]}


def test_twenty_bad_samples_and_nothing_else_end_a_run():
    lines = [f"line {number}: torn" for number in range(20)]
    SampleCounts(0, lines[:19]).require_good_start()
    SampleCounts(1, lines).require_good_start()
    with pytest.raises(DataError, match="the first 20 samples are all bad, first line 0: torn"):
        SampleCounts(0, lines).require_good_start()
    with pytest.raises(DataError, match="all 1 samples are bad, first line 0: torn"):
        SampleCounts(0, lines[:1]).require_used()
    SampleCounts(1, lines).require_used()


def test_of_each_bad_sample_there_is_one_warning(caplog):
    counts = SampleCounts()
    for lines in (["line 1: torn", "line 1: torn"], ["line 1: torn", "line 9: gone"]):
        counts.add_bad(lines)
    assert counts.of_all() == {"batches_used": 0, "bad_samples": ["line 1: torn", "line 9: gone"]}
    assert [record.getMessage() for record in caplog.records] == [
        "skipped a bad sample (1 so far): line 1: torn",
        "skipped a bad sample (2 so far): line 9: gone",
    ]


def test_a_batch_with_nothing_to_learn_from():
    batch = placeholder(torch.device("cpu"))
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[1, 1]], "attention_mask": [[1, 1]], "labels": [[IGNORE, IGNORE]],
    }  # fmt: skip
    assert {value.dtype for value in batch.values()} == {torch.long}


def shared_out(count, size, processes, rank, *filled, shuffle=False):
    """A process's loader, as `Trainer` has accelerate make it."""
    torch.manual_seed(0)
    loader = DataLoader(Fillable(list(range(count))), size, shuffle=shuffle, collate_fn=list)
    how = {"use_seedable_sampler": True, "put_on_device": False}
    return fill_up(prepare_data_loader(loader, num_processes=processes, process_index=rank, **how), *filled)


@pytest.mark.parametrize("together", [1, 3], ids=lambda n: f"{n} in a step")
@pytest.mark.parametrize(
    ("count", "size", "processes"),
    [(8, 2, 2), (7, 2, 2), (5, 2, 2), (9, 4, 2), (1, 3, 4), (7, 2, 1), (5, 1, 1)],
    ids=str,
)
def test_each_sample_of_an_epoch_comes_once(count, size, processes, together):
    """In the order and the batches of one process, and in as many batches for each."""
    shares = []
    for rank in range(processes):
        loader = shared_out(count, size, processes, rank, lambda: 0, together)
        shares.append(list(loader))
        assert len(loader) == len(shares[-1]) == math.ceil(count / (size * processes * together)) * together
        assert all(len(batch) == size for batch in shares[-1])
    found = [index for step in zip(*shares, strict=True) for batch in step for index in batch]
    assert found[:count] == list(range(count))
    assert set(found[count:]) <= {None}


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("told", ["before", "after"])
def test_a_run_that_goes_on_within_an_epoch_has_that_epochs_order(processes, told):
    """Trainers tell a loader the epoch before its first batches are skipped, or (transformers 5.3 and later) after that."""
    for rank in range(processes):
        now = SimpleNamespace(epoch=0)
        loader = shared_out(9, 2, processes, rank, lambda: now.epoch, shuffle=True)
        orders = []
        for now.epoch in range(3):
            orders.append(list(loader))
        assert orders[0] != orders[1] != orders[2]
        for now.epoch in range(3):
            if told == "before":
                loader.set_epoch(now.epoch)
            rest = skip_first_batches(loader, 1)
            if told == "after":
                rest.set_epoch(now.epoch)
            assert list(rest) == orders[now.epoch][1:]


def test_one_of_several_processes_without_an_answer_has_a_loss_of_zero(monkeypatch):
    """Not the model's own loss, a mean over no token; the gradients are there, as the others wait for them."""
    monkeypatch.setattr(token_loss, "is_parallel", lambda: True)
    weight = torch.ones(3, requires_grad=True)
    model = lambda input_ids, attention_mask: {"logits": input_ids.float().sum() * weight}  # noqa: E731
    loss = TokenTrainer.compute_loss(None, model, placeholder(torch.device("cpu")))
    loss.backward()
    assert loss == 0
    assert weight.grad.tolist() == [0, 0, 0]


def test_the_last_stages_adapter_goes_where_users_look_for_it(tmp_path):
    stage, out = tmp_path / "stage2", tmp_path / "out"
    (stage / "checkpoint-3").mkdir(parents=True)
    for name in (WEIGHTS, CONFIG, "result.json", "samples.json", "trained.safetensors", ".hidden"):
        (stage / name).write_text(name)
    _publish(stage, out)
    assert {file.name: file.read_text() for file in out.iterdir()} == {WEIGHTS: WEIGHTS, CONFIG: CONFIG}


def test_what_training_needs_is_named_with_its_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(
        sys.modules, "sta_adapter.training.stage", None
    )  # as where accelerate is missing: importing it fails
    with pytest.raises(MissingExtraError, match=r"training needs more packages .*pip install 'sta-adapter\[train\]'"):
        train(nn.Linear(2, 2), [], output_dir=tmp_path)


@pytest.mark.parametrize("data", ["clips.jsonl", Path("clips.jsonl"), ["a.jsonl", "b.jsonl:2"]], ids=str)
def test_files_are_opened_and_data_sets_taken_as_they_are(data):
    with pytest.raises(ConfigError, match="the data is a file, so pass processor="):
        _opened(data, None, TrainingConfig())
    dataset = object()
    assert _opened(dataset, None, TrainingConfig()) is dataset


def test_smaller_parts_of_a_step(tmp_path):
    """A half that divides, down to one clip, then checkpointing, then nothing more."""
    stage = Stage("1", TrainingConfig(batch_size=6, device_batch_size=6), tmp_path, range(12))
    tried = []
    while (smaller := stage._smaller()) is not None:
        stage.config = smaller
        tried.append((smaller.batch_size, smaller.device_batch_size, smaller.gradient_checkpointing))
    assert tried == [(6, 3, False), (6, 1, False), (6, 1, True)]


def test_a_stopped_stage_says_what_is_saved(tmp_path):
    stage = Stage("1", TrainingConfig(), tmp_path, range(12))
    stage.signals.received = signal.SIGTERM
    found = stage.stopped()
    assert (found.checkpoint, found.signal) == (None, signal.SIGTERM)
    assert str(found).startswith("stage 1 was stopped by SIGTERM; no checkpoint was saved. Call train again")


# ---- memory

WORDS, WIDTH, TOKENS = 50, 8, 10


class Words(nn.Module):
    """Tokens to logits; the output layer trains."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.requires_grad_(False)
        self.head.requires_grad_(True)

    def get_output_embeddings(self):
        return self.head

    def forward(self, tokens):
        return SimpleNamespace(loss=self.head(self.norm(self.embed(tokens))).square().mean())


def peak(**how):
    model = Words()
    mode = without_values(model)
    found = step_peak(model, {"tokens": torch.arange(TOKENS)}, mode, **how)
    assert all(p.grad is None for p in model.parameters())
    assert not model.head.weight._post_accumulate_grad_hooks
    assert not model.norm._forward_pre_hooks
    return found, model


def test_the_parts_of_a_peak():
    parts, _ = peak()
    assert parts["weights"] == 4 * (2 * WORDS * WIDTH + 2 * WIDTH)
    assert parts["optimizer"] == 2 * 4 * WORDS * WIDTH
    logits = 4 * TOKENS * WORDS
    assert parts["logits"] % logits == 0
    assert parts["logits"] >= 2 * logits
    assert parts["activations"] >= 4 * TOKENS * WIDTH


def test_gradients_of_earlier_parts_of_a_step_are_there():
    (fresh, _), (more, _) = peak(), peak(accumulates=True)
    assert more["gradients"] == 4 * WORDS * WIDTH
    assert more["weights"] == fresh["weights"]
    assert sum(more.values()) > sum(fresh.values())


def test_half_precision_takes_half():
    model, (wide, _) = Words().bfloat16(), peak()
    narrow = step_peak(model, {"tokens": torch.arange(TOKENS)}, without_values(model), precision="bf16")
    for part in ("weights", "optimizer", "logits"):
        assert narrow[part] == wide[part] // 2


def test_norms_compute_as_cuda_does():
    model, narrow = Words().bfloat16(), torch.ones(1, WIDTH, dtype=torch.bfloat16)
    hooks = _norms_like_cuda(model)
    assert {p.dtype for p in model.norm.parameters()} == {torch.float32}
    assert model.norm(narrow).dtype == torch.float32
    assert model.head.weight.dtype == torch.bfloat16
    assert [hook.remove() for hook in hooks] == [None]


def test_a_storage_is_counted_while_it_lives_and_once():
    books = _Bookkeeping(FakeTensorMode(), WORDS)
    tensor, logits = torch.empty(TOKENS), torch.empty(2, WORDS)
    books.note(tensor)
    books.note(tensor[1:])
    books.note(logits)
    assert books.alive == {"activations": 4 * TOKENS, "logits": 8 * WORDS}
    books.note(tensor, "gradients")
    assert books.alive == {"activations": 0, "gradients": 4 * TOKENS, "logits": 8 * WORDS}
    del tensor
    assert books.alive == {"activations": 0, "gradients": 0, "logits": 8 * WORDS}
    assert sum(books.peak.values()) == 4 * TOKENS + 8 * WORDS


def test_what_is_made_in_a_step_has_values_where_models_read_them():
    """Small tables and whole numbers are real; large ones of floating point take no memory."""
    with _Bookkeeping(FakeTensorMode(), WORDS):
        made = torch.ones(SMALL), torch.ones(SMALL + 1), torch.arange(5), torch.zeros(SMALL + 1, dtype=torch.long)
    assert [isinstance(tensor, FakeTensor) for tensor in made] == [False, True, False, False]


def test_pixels_are_there_during_the_step():
    class Seeing(Words):
        def forward(self, tokens, pixels):
            return SimpleNamespace(loss=super().forward(tokens).loss + pixels.mean())

    sizes = []
    for count in (SMALL + 1, 2 * SMALL):  # of which neither is made real
        model = Seeing()
        batch = {"tokens": torch.arange(TOKENS), "pixels": torch.ones(count)}
        sizes.append(step_peak(model, batch, without_values(model))["activations"])
    assert sizes[1] - sizes[0] == 4 * (SMALL - 1)


def test_what_has_values_and_what_has_none():
    model = Words()
    model.tied = model.embed.weight
    with torch.device("meta"):
        model.register_buffer("unknown", torch.empty(3))
    for name, value in (("table", torch.ones(SMALL)), ("large", torch.ones(SMALL + 1)), ("numbers", torch.arange(3))):
        model.register_buffer(name, value)
    without_values(model)
    fake = {name for name, value in model.state_dict().items() if isinstance(value, FakeTensor)}
    assert fake == {"embed.weight", "tied", "norm.weight", "norm.bias", "head.weight", "unknown", "large"}
    assert model.tied is model.embed.weight
    assert (model.head.weight.requires_grad, model.embed.weight.requires_grad) == (True, False)
    assert model.unknown.device.type == "cpu"


def test_fsdp_of_version_one_is_refused():
    for plugin in (None, SimpleNamespace(fsdp_version=2)):
        refuse_flattening(plugin)
    for plugin in (SimpleNamespace(fsdp_version=1), SimpleNamespace()):  # the latter before there were versions
        with pytest.raises(ConfigError, match=r"flattens weights, .* can't be saved; set fsdp_version: 2"):
            refuse_flattening(plugin)
