"""What all training tools share: settings, callbacks and the hook in PEFT, on transformers' own trainer."""

import functools
import inspect
import itertools
import json
import os
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_qwen import make_model, make_processor, write_samples
from transformers import TrainerState, TrainingArguments

from sta_adapter import STAConfig, get_sta, inject_sta, load_sta
from sta_adapter.data import Collator, FrameSettings, VideoDataset
from sta_adapter.data.conversation import parse_sample
from sta_adapter.errors import CheckpointError, ConfigError, DataError, InjectionError
from sta_adapter.injection import saved_sta
from sta_adapter.injection.load import watch_peft
from sta_adapter.integrations import peft as hook
from sta_adapter.integrations.callbacks import ReportBadClips, RequireGradient, SaveAdapter, sta_callbacks
from sta_adapter.integrations.settings import Settings, prepare_model
from sta_adapter.training.checkpoints import numpy_allowed


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return make_processor(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def data(processor, tmp_path_factory):
    file = write_samples(tmp_path_factory.mktemp("clips"), 4)
    return VideoDataset(file, processor, frames=FrameSettings(min_tokens=None, max_tokens=None), cache=True)


@pytest.fixture
def model(processor):
    return make_model(processor.tokenizer)


@pytest.fixture
def installed(monkeypatch):
    """The hook's `install`, in a process in which nothing has looked at PEFT before."""
    load = inspect.unwrap(vars(PeftModel)["from_pretrained"].__func__)
    monkeypatch.setattr(PeftModel, "from_pretrained", classmethod(load))
    monkeypatch.setattr(PeftModel, "load_adapter", inspect.unwrap(PeftModel.load_adapter))
    yield hook.install
    hook.uninstall()


def collate(processor, without=()):
    inner = Collator.of(processor)

    def collator(rows):
        batch = inner(rows)
        return {k: v for k, v in batch.items() if isinstance(v, torch.Tensor) and k not in without}

    return collator


def train(model, data, collator, out, steps=2, callbacks=None, trainer=transformers.Trainer, **settings):
    options = {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-3}
    args = transformers.TrainingArguments(
        str(out),
        use_cpu=True,
        remove_unused_columns=False,
        **{"max_steps": steps, "report_to": "none", **options, **settings},
    )
    callbacks = sta_callbacks() if callbacks is None else callbacks
    made = trainer(model, args, train_dataset=data, data_collator=collator, callbacks=callbacks)
    made.train()
    return made


def outputs(model, data, processor):
    batch = collate(processor, ("labels",))([data[0], data[1]])
    model.eval()
    with torch.no_grad():
        return model(**batch, use_cache=False).logits


def test_every_checkpoint_is_an_adapter(model, data, processor, tmp_path):
    handle, lora = prepare_model(model, Settings())
    trained = get_peft_model(handle.model, lora)
    train(trained, data, collate(processor), tmp_path / "out")
    for folder in ("out", "out/checkpoint-2"):
        loaded = load_sta(make_model(processor.tokenizer), tmp_path / folder)
        assert torch.equal(outputs(loaded.model, data, processor), outputs(trained, data, processor))
    first = load_sta(make_model(processor.tokenizer), tmp_path / "out/checkpoint-1")
    assert not torch.equal(outputs(first.model, data, processor), outputs(trained, data, processor))


def test_a_reference_beside_the_adapter_is_not_spoken_of(model, data, processor, tmp_path, recwarn):
    handle = inject_sta(model)
    trained = get_peft_model(handle.model, handle.lora_config(r=2))
    trained.add_adapter("ref", LoraConfig(r=2, target_modules=["q_proj"]))
    train(trained, data, collate(processor), tmp_path, callbacks=[SaveAdapter()])
    assert not [str(warning.message) for warning in recwarn if "PEFT adapters" in str(warning.message)]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 2


def test_resuming_from_the_files_that_the_callback_writes(processor, data, tmp_path):
    def run(out, steps, resume=None):
        torch.manual_seed(0)
        handle, lora = prepare_model(make_model(processor.tokenizer), Settings())
        args = transformers.TrainingArguments(
            str(tmp_path / out), max_steps=4, save_steps=steps, per_device_train_batch_size=2, learning_rate=1e-3,
            use_cpu=True, report_to="none", remove_unused_columns=False,
        )  # fmt: skip
        trainer = transformers.Trainer(
            get_peft_model(handle.model, lora), args, train_dataset=data, data_collator=collate(processor),
            callbacks=sta_callbacks(),
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model

    alone = run("alone", 2)
    again = run("again", 2, resume=str(tmp_path / "alone/checkpoint-2"))
    for (name, a), b in zip(alone.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_adapters_of_a_search_lie_in_the_checkpoints_of_its_trials(model, tmp_path):
    handle, _ = prepare_model(model, Settings(stage=1))
    callback, arguments = SaveAdapter(), TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    state = TrainerState(global_step=1, is_hyper_param_search=True)
    for trial in range(2):
        checkpoint = tmp_path / f"run-{trial}/checkpoint-1"
        checkpoint.mkdir(parents=True)  # by the trainer, just before
        os.utime(checkpoint, ns=(trial + 1, trial + 1))
        callback.on_save(arguments, state, None, model=handle.model)
        assert (checkpoint / "sta_config.json").exists()
        os.utime(checkpoint, ns=(trial + 1, trial + 1))
    assert not (tmp_path / "checkpoint-1").exists()


class FakeHub:
    """What a trainer pushes, each time in a folder of its own."""

    def __init__(self, folder):
        self.folder, self.pushed, self.checkpoints = folder, [], []

    def create_repo(self, repo_id, **_):
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, folder_path, path_in_repo=None, **_):
        pushed = self.pushed if path_in_repo is None else self.checkpoints
        pushed.append(self.folder / f"{path_in_repo}{len(pushed)}")
        shutil.copytree(folder_path, pushed[-1], ignore=shutil.ignore_patterns("checkpoint-*"))
        return SimpleNamespace(done=lambda: True)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    "saved",
    [{}, {"hub_strategy": "checkpoint"}, {"save_strategy": "epoch", "num_train_epochs": 2, "max_steps": -1}],
    ids=["each", "with checkpoints", "by epochs"],
)
def test_each_push_to_the_hub_is_an_adapter(saved, stage, model, data, processor, tmp_path, monkeypatch):
    hub = FakeHub(tmp_path)
    for name, value in (
        ("hf_api", lambda *_, **kwargs: hub),
        ("create_repo", hub.create_repo),
        ("upload_folder", hub.upload_folder),
    ):
        monkeypatch.setattr(transformers.trainer, name, value, raising=False)
    handle, lora = prepare_model(model, Settings(stage=stage))
    trained = handle.model if lora is None else get_peft_model(handle.model, lora)
    pushing = {"push_to_hub": True, "hub_model_id": "me/sta", "hub_token": "hf_none", **saved}
    train(trained, data, collate(processor), tmp_path / "out", per_device_train_batch_size=4, **pushing)
    assert len(hub.pushed) >= 2
    assert len(hub.checkpoints) == (2 if "hub_strategy" in saved else 0)
    for step, folder in [*enumerate(hub.pushed[:2], 1), *enumerate(hub.checkpoints, 1)]:
        pushed, kept = (
            load_sta(make_model(processor.tokenizer), where) for where in (folder, tmp_path / f"out/checkpoint-{step}")
        )
        assert (folder / "sta_config.json").exists()
        assert all(torch.equal(a, b) for a, b in zip(pushed.parameters(), kept.parameters(), strict=True))


class Copying(transformers.TrainerCallback):
    """What W&B, MLflow and the like do with a checkpoint, before the callbacks that a user gives."""

    def __init__(self, folder):
        self.folder = folder

    def on_save(self, args, state, control, **kwargs):
        name = f"checkpoint-{state.global_step}"
        shutil.copytree(f"{args.output_dir}/{name}", self.folder / name)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    "saved",
    [{}, {"eval_strategy": "steps", "eval_steps": 1}, {"save_strategy": "best", "metric_for_best_model": "calls"}],
    ids=["each", "with evaluations", "best"],
)
def test_a_checkpoint_that_is_reported_is_an_adapter(saved, stage, model, data, processor, tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.trainer, "get_reporting_integration_callbacks", lambda names: [Copying(tmp_path)])
    handle, lora = prepare_model(model, Settings(stage=stage))
    measured = {"eval_strategy": "steps", "eval_steps": 1} if "save_strategy" in saved else {}
    settings = {"report_to": "mlflow", **measured, **saved, "greater_is_better": False}
    calls = itertools.count()  # the first evaluation is the best
    evaluated = functools.partial(
        transformers.Trainer, eval_dataset=data, compute_metrics=lambda _: {"calls": next(calls)}
    )
    trained = handle.model if lora is None else get_peft_model(handle.model, lora)
    train(trained, data, collate(processor), tmp_path / "out", trainer=evaluated, **settings)
    copies = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert copies == sorted(path.name for path in tmp_path.glob("out/checkpoint-*"))  # and no other folders are left
    assert "checkpoint-1" in copies
    assert ("checkpoint-2" in copies) == ("save_strategy" not in saved)
    for name in copies:
        assert (tmp_path / name / "sta_config.json").exists()
        one, other = (load_sta(make_model(processor.tokenizer), tmp_path / where / name) for where in (".", "out"))
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


class Preempted(transformers.TrainerCallback):
    """Has the trainer find, at the next chance after an event of the second step, that its process is about to be killed."""

    def __init__(self, event):
        setattr(self, event, self._ask)

    def _ask(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.manager.is_checkpoint_requested = True


@pytest.mark.skipif(
    not hasattr(TrainingArguments, "enable_jit_checkpoint"), reason="transformers makes no such checkpoints"
)
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("event", ["on_step_begin", "on_pre_optimizer_step", "on_step_end", "on_epoch_begin"])
def test_a_checkpoint_at_a_signal_is_an_adapter(event, stage, model, data, processor, tmp_path):
    from transformers.trainer_jit_checkpoint import JITCheckpointCallback

    handle, lora = prepare_model(model, Settings(stage=stage))
    asked = Preempted(event)

    def trainer(*args, callbacks, **kwargs):
        made = transformers.Trainer(*args, callbacks=[asked, *callbacks], **kwargs)
        found = [one for one in made.callback_handler.callbacks if isinstance(one, JITCheckpointCallback)]
        asked.manager = found[0].jit_manager
        return made

    trained = handle.model if lora is None else get_peft_model(handle.model, lora)
    settings = {"per_device_train_batch_size": 4, "save_steps": 100, "enable_jit_checkpoint": True, "warmup_steps": 0}
    train(trained, data, collate(processor), tmp_path, steps=5, trainer=trainer, **settings)
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    step = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
    assert step == int(checkpoint.name.removeprefix("checkpoint-")) == (2 if event == "on_pre_optimizer_step" else 1)
    assert (checkpoint / "sta_config.json").exists()
    kept = load_sta(make_model(processor.tokenizer), checkpoint)
    again = make_model(processor.tokenizer)
    handle, lora = prepare_model(again, Settings(stage=stage))
    trained = handle.model if lora is None else get_peft_model(handle.model, lora)
    trainer = transformers.Trainer(trained, TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    trainer._load_from_checkpoint(str(checkpoint))  # as the trainer goes on from it
    goes_on = get_sta(trainer.model)
    assert all(torch.equal(a, b) for a, b in zip(kept.parameters(), goes_on.parameters(), strict=True))


def test_stage_one_trains_sta_alone(model, data, processor, tmp_path):
    before = {name: p.clone() for name, p in model.named_parameters()}
    handle, lora = prepare_model(model, Settings(stage=1))
    assert lora is None
    train(handle.model, data, collate(processor), tmp_path)
    changed = {name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])}
    assert changed == set()
    assert load_sta(make_model(processor.tokenizer), tmp_path).num_parameters() == handle.num_parameters()


def test_stage_one_takes_no_settings_of_lora(model):
    with pytest.raises(ConfigError, match="r: stage 1 trains STA alone, without LoRA; leave that out"):
        prepare_model(model, Settings(stage=1), r=4)


def test_stage_two_starts_from_stage_one(model, processor, tmp_path):
    handle = inject_sta(model, STAConfig(init="normal", head_scale=0.5))
    handle.save_pretrained(tmp_path)
    again, lora = prepare_model(make_model(processor.tokenizer), Settings(adapter=str(tmp_path)))
    assert again.config.head_scale == 0.5
    assert "sta" in lora.modules_to_save
    trained = get_sta(get_peft_model(again.model, lora))
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), handle.parameters(), strict=True))
    assert all(p.requires_grad for p in trained.parameters())


def test_an_adapter_with_lora_goes_on(model, processor, tmp_path):
    handle, lora = prepare_model(model, Settings())
    get_sta(get_peft_model(handle.model, lora)).save_pretrained(tmp_path)
    again, more = prepare_model(make_model(processor.tokenizer), Settings(adapter=str(tmp_path)))
    assert isinstance(again.model, PeftModel)
    assert more is None
    with pytest.raises(ConfigError, match="has LoRA weights, and stage 1 trains STA alone"):
        prepare_model(make_model(processor.tokenizer), Settings(adapter=str(tmp_path), stage=1))
    with pytest.raises(ConfigError, match="r: the LoRA that is there goes on as it is"):
        prepare_model(make_model(processor.tokenizer), Settings(adapter=str(tmp_path)), r=4)


NARROW = pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


def dtypes(handle):
    return {parameter.dtype for parameter in handle.parameters()}


@NARROW
def test_sta_trains_in_32_bits_on_a_narrow_base(narrow, processor, tmp_path, recwarn):
    """As LoRA does by PEFT; in 16 bits most steps are rounded away."""
    handle, lora = prepare_model(make_model(processor.tokenizer).to(narrow), Settings())
    handle = get_sta(get_peft_model(handle.model, lora))
    assert dtypes(handle) == {torch.float32}
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(1e-6)  # nothing that the base's dtype can hold
    handle.save_pretrained(tmp_path)
    for again in (
        prepare_model(make_model(processor.tokenizer).to(narrow), Settings(adapter=str(tmp_path)))[0],
        load_sta(make_model(processor.tokenizer).to(narrow), tmp_path, is_trainable=True),
    ):
        assert dtypes(again) == {torch.float32}
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), handle.parameters(), strict=True))
    assert dtypes(load_sta(make_model(processor.tokenizer).to(narrow), tmp_path)) == {narrow}
    assert not any("16 bits" in str(warning.message) for warning in recwarn)


@NARROW
def test_sta_that_peft_trains_is_32_bits_wide(narrow, model, processor, tmp_path, installed):
    installed()
    trained = get_peft_model(model.to(narrow), LoraConfig(target_modules=["q_proj"]))
    assert dtypes(get_sta(trained)) == {torch.float32}
    trained.save_pretrained(tmp_path)
    for is_trainable, expected in ((True, torch.float32), (False, narrow)):
        base = make_model(processor.tokenizer).to(narrow)
        again = PeftModel.from_pretrained(base, str(tmp_path), is_trainable=is_trainable)
        assert dtypes(get_sta(again)) == {expected}


class Narrowing(transformers.Trainer):
    """As TRL's trainers do on a base in 4 or 8 bits."""

    def __init__(self, model, *args, **kwargs):
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            parameter.data = parameter.data.to(torch.bfloat16)
        super().__init__(model, *args, **kwargs)


def test_sta_trains_in_32_bits_whatever_the_trainer_makes_of_lora(model, data, processor, tmp_path, recwarn):
    handle, lora = prepare_model(model, Settings())
    trained = get_peft_model(handle.model, lora)
    train(trained, data, collate(processor), tmp_path, trainer=Narrowing)
    assert dtypes(get_sta(trained)) == {torch.float32}
    assert {p.dtype for name, p in trained.named_parameters() if "lora_" in name} == {torch.bfloat16}
    assert not any("16 bits" in str(warning.message) for warning in recwarn)


@pytest.mark.parametrize("wide", [False, True], ids=["as it is", "in 32 bits"])
def test_a_loop_that_trains_sta_in_16_bits_is_told(wide, model, data, processor, recwarn):
    handle = inject_sta(model.to(torch.bfloat16)).freeze_base()
    if wide:
        for parameter in handle.parameters():
            parameter.data = parameter.data.float()
    model.train()(**collate(processor)([data[0]])).loss.backward()
    told = [str(warning.message) for warning in recwarn if "STA trains in 16 bits" in str(warning.message)]
    assert len(told) == (0 if wide else 1)


def test_an_optimizer_without_sta_is_an_error(model, data, processor, tmp_path):
    handle, lora = prepare_model(model, Settings())
    optimizer = torch.optim.AdamW(handle.parameters())  # PEFT then trains copies
    trained = get_peft_model(handle.model, lora)
    args = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", remove_unused_columns=False)
    options = {"train_dataset": data, "data_collator": collate(processor), "callbacks": sta_callbacks()}
    trainer = transformers.Trainer(trained, args, optimizers=(optimizer, None), **options)
    with pytest.raises(ConfigError, match="the optimizer has none of STA's parameters"):
        trainer.train()


@pytest.mark.parametrize(("least", "told"), [(1, ""), (2, "8 of 12 stay as they are")], ids=["all", "matrices"])
def test_an_optimizer_of_a_part_of_sta_is_told(least, told, model, tmp_path, caplog):
    handle = inject_sta(model).freeze_base()
    optimizer = torch.optim.SGD([p for p in handle.parameters() if p.ndim >= least], lr=0.1)
    args = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    RequireGradient().on_train_begin(args, TrainerState(), None, model=model, optimizer=optimizer)
    assert ("stay as they are" in caplog.text) == bool(told)
    assert told in caplog.text


@pytest.mark.parametrize(("optim", "told"), [("apollo_adamw", 1), ("galore_adamw", 0), ("adamw_torch", 0)])
def test_an_optimizer_that_does_not_move_what_starts_at_zero_is_told(optim, told, model, tmp_path, caplog):
    inject_sta(model).freeze_base()
    args = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    args.optim = optim  # of itself transformers asks for its package
    RequireGradient().on_train_begin(args, TrainerState(), None, model=model)
    assert caplog.text.count("nothing moves for some thousand steps") == told


class Averaging(torch.optim.SGD):
    """What schedule-free optimizers do: train weights, and give their average."""

    def __init__(self, parameters):
        super().__init__([{"params": list(parameters), "train_mode": True}], lr=0.1)

    def step(self, closure=None):
        super().step()
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            count = state["count"] = state.get("count", torch.zeros(())) + 1
            average = state.get("other", torch.zeros_like(parameter))
            state["other"] = average.lerp(parameter.detach(), 1 / count.item())

    def _show(self, train_mode):
        for group in self.param_groups:
            if group["train_mode"] != train_mode:
                group["train_mode"] = train_mode
                for parameter in group["params"]:
                    state = self.state[parameter]
                    shown, state["other"] = state["other"], parameter.detach().clone()
                    parameter.data.copy_(shown)

    def train(self):
        self._show(True)

    def eval(self):
        self._show(False)


@pytest.mark.parametrize("stage", [1, 2])
def test_of_averaged_weights_the_average_is_saved(stage, data, processor, tmp_path):
    def run(resume=None):
        handle, lora = prepare_model(make_model(processor.tokenizer), Settings(stage=stage))
        model = handle.model if lora is None else get_peft_model(handle.model, lora)
        optimizer = Averaging(p for p in model.parameters() if p.requires_grad)
        settings = {"per_device_train_batch_size": 2, "max_steps": 3, "save_steps": 2, "lr_scheduler_type": "constant"}
        args = transformers.TrainingArguments(
            str(tmp_path),
            use_cpu=True,
            report_to="none",
            remove_unused_columns=False,
            save_strategy="steps",
            **settings,
        )
        options = {"train_dataset": data, "data_collator": collate(processor), "callbacks": sta_callbacks()}
        trainer = transformers.Trainer(model, args, optimizers=(optimizer, None), **options)
        seen = []
        trainer.add_callback(Recorder(lambda: seen.append([p.detach().clone() for p in get_sta(model).parameters()])))
        with numpy_allowed():  # of which transformers 4.45 writes something
            trainer.train(resume_from_checkpoint=resume)
        return seen

    torch.manual_seed(0)
    steps = run()
    assert not all(torch.equal(a, b) for a, b in zip(steps[0], steps[2], strict=True))
    for count, folder in ((2, tmp_path / "checkpoint-2"), (3, tmp_path)):
        saved = load_sta(make_model(processor.tokenizer), folder)
        for found, *values in zip(saved.parameters(), *steps[:count], strict=True):
            assert torch.allclose(found, torch.stack(values).mean(0), atol=1e-6)
    torch.manual_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(run(tmp_path / "checkpoint-2")[0], steps[2], strict=True))


class Recorder(transformers.TrainerCallback):
    """Calls a function after each step of the optimizer."""

    def __init__(self, record):
        self.record = record

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.record()


def test_no_pixels_is_said_and_then_an_error(model, data, processor, tmp_path, caplog):
    handle, lora = prepare_model(model, Settings())
    blind = collate(processor, ("pixel_values_videos", "video_grid_thw", "mm_token_type_ids"))
    with pytest.raises(DataError, match=r"no gradient in the first 3 steps.* no clip reached the vision encoder"):
        train(get_peft_model(handle.model, lora), data, blind, tmp_path, 5, [RequireGradient(patience=3)])
    assert "STA got no gradient in the first step: no clip reached" in caplog.text


def test_a_short_run_without_pixels_does_not_end_in_silence(model, data, processor, tmp_path, caplog):
    handle, lora = prepare_model(model, Settings())
    blind = collate(processor, ("pixel_values_videos", "video_grid_thw", "mm_token_type_ids"))
    train(get_peft_model(handle.model, lora), data, blind, tmp_path, 2)
    assert "the run ends after 2 steps in which STA got no gradient" in caplog.text


def test_clips_that_the_loss_does_not_see(model, data, processor, tmp_path, caplog):
    handle, lora = prepare_model(model, Settings())
    trained = get_peft_model(handle.model, lora)
    outputs(trained, data, processor)  # as in GRPO's generation
    blind = collate(processor, ("pixel_values_videos", "video_grid_thw", "mm_token_type_ids"))
    with pytest.raises(DataError, match="clips reached the encoder, but not the forward that the loss is made from"):
        train(trained, data, blind, tmp_path, 5, [RequireGradient(patience=2)])


class ShortOfMemory(transformers.Trainer):
    """Whose memory is not enough for the first step."""

    def training_step(self, *args, **kwargs):
        if self._train_batch_size == 4:
            raise RuntimeError("CUDA out of memory. Tried to allocate")
        return super().training_step(*args, **kwargs)


def test_nothing_is_left_of_a_start_that_memory_was_too_short_for(model, data, processor, tmp_path):
    handle, lora = prepare_model(model, Settings())
    trained = get_peft_model(handle.model, lora)
    options = {"per_device_train_batch_size": 4, "auto_find_batch_size": True}
    train(trained, data, collate(processor), tmp_path, trainer=ShortOfMemory, **options)
    assert not any(parameter._backward_hooks for parameter in get_sta(trained).parameters())


def test_steps_with_nothing_to_learn_do_not_count(model, data, processor, tmp_path, caplog):
    handle, lora = prepare_model(model, Settings())
    trained = get_peft_model(handle.model, lora)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    callback = RequireGradient(patience=1)
    callback.on_train_begin(None, None, None, model=trained)
    callback.on_pre_optimizer_step(None, None, None, model=trained)
    assert callback.steps == 0
    assert "no gradient" not in caplog.text


def test_clips_of_a_single_frame_are_told(model, data, processor, tmp_path, caplog):
    parts = [
        {"type": "video", "video": data.samples[0].messages[0]["content"][0]["video"], "nframes": 2}
    ]  # merged to one
    record = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "left"}]}
    single = VideoDataset([parse_sample(record)] * 2, processor, frames=data.frames)
    handle, lora = prepare_model(model, Settings())
    train(get_peft_model(handle.model, lora), single, collate(processor), tmp_path, 1)
    assert "every clip of the first steps had a single frame" in caplog.text


def test_frozen_sta_is_an_error(model, data, processor, tmp_path):
    inject_sta(model)
    trained = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="no parameter of it requires a gradient"):
        train(trained, data, collate(processor), tmp_path)


def test_lora_on_stas_own_layers_is_told(model, data, processor, tmp_path, caplog):
    inject_sta(model)
    trained = get_peft_model(model, LoraConfig(target_modules=["q_proj", "to_qkv", "to_out"]))
    train(trained, data, collate(processor), tmp_path, 1)
    assert re.search(r"LoRA lies on \d+ of STA's own layers, first blocks\.0\.sta\.to_", caplog.text)
    loaded = load_sta(make_model(processor.tokenizer), tmp_path)
    assert torch.equal(outputs(loaded.model, data, processor), outputs(trained, data, processor))


def test_a_model_without_sta_is_an_error(model, data, processor, tmp_path):
    with pytest.raises(InjectionError, match="the model that is trained has no STA"):
        train(model, data, collate(processor), tmp_path)


def test_fsdp_of_version_one_is_refused(model):
    handle, _ = prepare_model(model, Settings())

    class FullyShardedDataParallel(torch.nn.Module):
        pass

    handle.model.wrapped = FullyShardedDataParallel()
    with pytest.raises(ConfigError, match="set fsdp_version: 2"):
        SaveAdapter().on_train_begin(None, None, None, model=handle.model)


def test_what_could_not_be_saved_is_refused_before_it_trains(model, data, processor, tmp_path):
    handle = inject_sta(model)
    with pytest.raises(ConfigError, match=r"\d+ of the base model's tensors would be trained, the first is"):
        train(model, data, collate(processor), tmp_path)
    once = get_peft_model(handle.model, handle.lora_config())
    with torch.no_grad():
        for name, parameter in once.named_parameters():
            if "lora_B" in name:
                parameter.add_(1)
    handle = get_sta(once.merge_and_unload())
    again = get_peft_model(handle.model, handle.lora_config())
    with pytest.raises(CheckpointError, match="LoRA was merged into them"):
        train(again, data, collate(processor), tmp_path)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_bad_clips_are_told_once_each_time_there_are_more(caplog):
    counts = [1, 5]
    callback = ReportBadClips(lambda: tuple(counts))
    callback.on_log(None, None, None)
    callback.on_log(None, None, None)
    counts[0] = 3
    callback.on_train_end(None, None, None)
    assert [record.getMessage() for record in caplog.records] == [
        "left out 1 bad samples so far, beside 5 good ones",
        "left out 3 bad samples so far, beside 5 good ones",
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stage": "both"}, r"stage='both': expected 1 \(STA alone\) or 2"),
        ({"stage": True}, "stage=True"),
        ({"patience": 0}, "patience=0: expected a whole number"),
        ({"head_scal": 1}, r"unknown setting 'head_scal' \(did you mean 'head_scale'\?\)"),
        ({"adapter": "x", "causal": True}, "causal and adapter exclude each other"),
        ({"adapter": 3}, "adapter=3: expected a folder"),
        (["stage"], r"the settings of STA are \['stage'\], expected a mapping"),
        ({"head_scale": -1}, "head_scale=-1"),
    ],
)
def test_wrong_settings(values, message):
    with pytest.raises(ConfigError, match=message):
        Settings.from_mapping(values)


def test_settings_from_the_environment(monkeypatch, tmp_path):
    (tmp_path / "sta.yaml").write_text("stage: 1\nlayers: [0]\n")
    for text in ('{"stage": 1, "layers": [0]}', "{stage: 1, layers: [0]}", str(tmp_path / "sta.yaml")):
        monkeypatch.setenv("STA_SETTINGS", text)
        assert Settings.from_environment() == Settings(config=STAConfig(layers=[0]), stage=1)
    monkeypatch.delenv("STA_SETTINGS")
    assert Settings.from_environment() == Settings()
    monkeypatch.setenv("STA_SETTINGS", "gone.yaml")
    with pytest.raises(ConfigError, match=r"STA_SETTINGS='gone\.yaml': .*No such file"):
        Settings.from_environment()
    monkeypatch.setenv("STA_SETTINGS", "{stage: 3}")
    with pytest.raises(ConfigError, match=r"STA_SETTINGS='\{stage: 3\}': stage=3"):
        Settings.from_environment()


def test_peft_alone_trains_and_saves_sta(model, data, processor, tmp_path, installed):
    installed(Settings(config=STAConfig(head_scale=0.5)))
    trained = get_peft_model(model, LoraConfig(target_modules="all-linear", r=4))
    handle = get_sta(trained)
    assert handle.config.head_scale == 0.5
    train(trained, data, collate(processor), tmp_path, callbacks=[RequireGradient()])
    trained.save_pretrained(str(tmp_path))
    expected = outputs(trained, data, processor)
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        loaded = load_sta(make_model(processor.tokenizer), folder)
        assert torch.equal(outputs(loaded.model, data, processor), expected)
    again = PeftModel.from_pretrained(make_model(processor.tokenizer), str(tmp_path))
    assert get_sta(again).config.head_scale == 0.5
    assert torch.equal(outputs(again, data, processor), expected)


@pytest.mark.parametrize("options", [{"revision": "main"}, {"subfolder": "one"}], ids=["revision", "subfolder"])
def test_peft_goes_on_with_sta_whatever_it_is_given_beside_the_folder(
    model, data, processor, tmp_path, installed, options
):
    installed(Settings(config=STAConfig(init="normal")))
    trained = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    trained.save_pretrained(str(tmp_path / "one"))
    folder = tmp_path if "subfolder" in options else tmp_path / "one"
    again = PeftModel.from_pretrained(make_model(processor.tokenizer), str(folder), is_trainable=True, **options)
    assert all(parameter.requires_grad for parameter in get_sta(again).parameters())
    assert torch.equal(outputs(again, data, processor), outputs(trained, data, processor))


@pytest.mark.parametrize("targets", ["all-linear", r".*(to_qkv|q_proj)", ["to_out", "q_proj"]], ids=str)
def test_peft_alone_gives_no_lora_to_what_is_trained_whole(model, tmp_path, data, processor, installed, targets):
    """It would before 0.16, though nothing computes with it."""
    installed(Settings(config=STAConfig(init="normal")))
    trained = get_peft_model(model, LoraConfig(target_modules=targets, modules_to_save=["merger"]))
    assert not [name for name, _ in trained.named_parameters() if re.search(r"\.(sta|merger)\..*lora_", name)]
    trained.save_pretrained(str(tmp_path))
    again = load_sta(make_model(processor.tokenizer), tmp_path).model
    assert torch.equal(outputs(again, data, processor), outputs(trained, data, processor))


@pytest.mark.parametrize("names", [["visual"], ["sta", "visual"]], ids=str)
def test_an_encoder_trained_whole_holds_its_sta(model, tmp_path, data, processor, installed, names):
    installed(Settings(config=STAConfig(init="normal")))
    trained = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=names))
    assert trained.peft_config["default"].modules_to_save == ["visual"]
    assert all(parameter.requires_grad for parameter in get_sta(trained).parameters())
    trained.save_pretrained(str(tmp_path))
    again = load_sta(make_model(processor.tokenizer), tmp_path).model
    assert torch.equal(outputs(again, data, processor), outputs(trained, data, processor))


def test_sta_is_looked_for_at_the_revision_of_its_lora(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(saved_sta, "resolve_adapter", lambda *where, subfolder: asked.append(where) or tmp_path)
    for name in ("user/adapter", str(tmp_path)):
        hook.adapter_folder(name, {"revision": "v1"})
    assert asked == [("user/adapter", "v1"), (str(tmp_path), None)]


def test_weights_in_parts_are_no_adapter(model, tmp_path, installed, monkeypatch):
    installed()
    trained = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    monkeypatch.setattr(hook, "is_sharded", lambda parameters: True)
    with pytest.raises(CheckpointError, match=r"has PEFT's files alone: .*SaveAdapter\(\) to the trainer's callbacks"):
        trained.save_pretrained(str(tmp_path))
    assert not (tmp_path / "sta_config.json").exists()


def test_an_adapter_that_is_trained_on_keeps_its_branch(model, processor, tmp_path, installed):
    installed(Settings(config=STAConfig(head_scale=0.5)))
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(str(tmp_path))
    hook.uninstall()
    installed(Settings(config=STAConfig(head_scale=0.25)))
    loaded = PeftModel.from_pretrained(make_model(processor.tokenizer), str(tmp_path))  # to answer
    assert get_sta(loaded).config.head_scale == 0.5
    with pytest.raises(ConfigError, match=r"has head_scale 0\.5 \(not 0\.25\), and goes on with that; leave it out"):
        PeftModel.from_pretrained(make_model(processor.tokenizer), str(tmp_path), is_trainable=True)


def test_what_peft_alone_saved_is_loaded_and_not_merged_without_its_sta(model, data, processor, tmp_path, installed):
    handle = inject_sta(model, STAConfig(init="normal"))
    trained = get_peft_model(handle.model, handle.lora_config(target_modules=["q_proj"]))
    trained.save_pretrained(str(tmp_path))
    assert not (tmp_path / "sta_config.json").exists()
    installed()
    assert hook.adapter_folder(tmp_path, {}) == tmp_path  # by which LLaMA-Factory's export is refused
    again = PeftModel.from_pretrained(make_model(processor.tokenizer), str(tmp_path), is_trainable=True)
    assert torch.equal(outputs(again, data, processor), outputs(trained, data, processor))


def test_the_hook_takes_no_adapter_of_another_base(model, processor, tmp_path, installed):
    installed()
    other = make_model(processor.tokenizer)
    model.config._name_or_path, other.config._name_or_path = "user/one", "user/other"
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(str(tmp_path))
    with pytest.raises(CheckpointError, match="is for another base model"):
        PeftModel.from_pretrained(other, str(tmp_path), is_trainable=True)


@pytest.mark.parametrize("place", ["out", "elsewhere/first"])
def test_a_run_that_goes_on_keeps_its_branch(processor, data, tmp_path, place):
    def run(where, config, steps, resume=None):
        handle = inject_sta(make_model(processor.tokenizer), config).freeze_base()
        args = TrainingArguments(
            str(tmp_path / where), max_steps=steps, save_steps=1, per_device_train_batch_size=2, use_cpu=True,
            report_to="none", remove_unused_columns=False, restore_callback_states_from_checkpoint=steps == 3,
        )  # fmt: skip
        trainer = transformers.Trainer(
            handle.model, args, train_dataset=data, data_collator=collate(processor), callbacks=sta_callbacks()
        )
        with numpy_allowed():  # of which transformers 4.45 writes something
            trainer.train(resume_from_checkpoint=resume)

    run(place, STAConfig(causal=True), 1)
    checkpoint = str(tmp_path / place / "checkpoint-1")
    with pytest.raises(
        ConfigError, match=r"the checkpoint that the run goes on from \(step 1\) has causal True \(not False\)"
    ):
        run("out", None, 2, checkpoint)
    run("out", STAConfig(causal=True), 2, checkpoint)
    run("out", STAConfig(causal=True), 3, str(tmp_path / "out/checkpoint-2"))
    with pytest.raises(ConfigError, match=r"rope_theta 10000\.0 \(not 500\.0\)"):
        run("out", STAConfig(causal=True, rope_theta=500), 4, str(tmp_path / "out/checkpoint-3"))


def test_a_checkpoint_of_a_run_without_the_callback_is_gone_on_from(processor, data, tmp_path):
    handle = inject_sta(make_model(processor.tokenizer)).freeze_base()
    train(handle.model, data, collate(processor), tmp_path, 1, callbacks=[])
    state = TrainerState.load_from_json(str(tmp_path / "checkpoint-1/trainer_state.json"))
    SaveAdapter().on_train_begin(TrainingArguments(str(tmp_path)), state, None, model=handle.model)
    assert state.stateful_callbacks["SaveAdapter"]["attributes"]["branch"]["causal"] is False


def test_peft_says_so_where_it_can_not_see_sta(processor, tmp_path, installed, caplog):
    installed()
    with pytest.raises(Exception, match="gone"):
        PeftModel.from_pretrained(make_model(processor.tokenizer), str(tmp_path / "gone"))
    assert "whether STA belongs to the LoRA of" in caplog.text


def test_stas_own_file_is_the_one_truth_for_peft_too(model, data, processor, tmp_path, installed):
    from safetensors.torch import load_file, save_file

    installed(Settings(config=STAConfig(init="normal")))
    trained = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    trained.save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    save_file({k: v * (".sta." not in k) for k, v in load_file(file).items()}, file, {"format": "pt"})
    again = PeftModel.from_pretrained(make_model(processor.tokenizer), str(tmp_path))
    assert torch.equal(outputs(again, data, processor), outputs(trained, data, processor))


def test_peft_leaves_other_models_and_other_adapters_alone(model, processor, tmp_path, installed, caplog):
    plain = get_peft_model(make_model(processor.tokenizer), LoraConfig(target_modules=["q_proj"]))
    plain.save_pretrained(str(tmp_path / "plain"))
    installed()
    language = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    )
    config = LoraConfig(target_modules=["q_proj"])
    assert get_sta(get_peft_model(language, config)) is None
    assert not config.modules_to_save
    loaded = PeftModel.from_pretrained(model, str(tmp_path / "plain"))
    assert get_sta(loaded) is None
    assert "has no sta_config.json, so the model gets its LoRA without STA" in caplog.text


def test_installing_twice_and_taking_it_out(model, installed):
    from peft import LoraModel

    watch_peft()
    before = (LoraModel._pre_injection_hook, PeftModel.save_pretrained, PeftModel.__dict__["from_pretrained"])
    installed()
    with pytest.raises(ConfigError, match="is installed already"):
        installed()
    hook.uninstall()
    hook.uninstall()
    assert (LoraModel._pre_injection_hook, PeftModel.save_pretrained, PeftModel.__dict__["from_pretrained"]) == before
    assert get_sta(get_peft_model(model, LoraConfig(target_modules=["q_proj"]))) is None
    with pytest.raises(ConfigError, match="stage 1 trains STA without LoRA"):
        installed(Settings(stage=1))


def test_a_second_adapter_beside_the_first(model, installed):
    installed()
    trained = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    handle = get_sta(trained)
    before = [p.clone() for p in handle.parameters()]
    trained.add_adapter("ref", LoraConfig(target_modules=["q_proj"]))
    assert all(torch.equal(a, b) for a, b in zip(before, get_sta(trained).parameters(), strict=True))


def test_settings_for_the_hook_from_the_environment(model, installed, monkeypatch):
    monkeypatch.setenv("STA_SETTINGS", json.dumps({"layers": [1]}))
    installed()
    assert list(get_sta(get_peft_model(model, LoraConfig(target_modules=["q_proj"]))).blocks) == [1]
    assert os.environ["STA_SETTINGS"]
