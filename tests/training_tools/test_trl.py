"""STA in TRL's own trainers."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset, load_dataset
from runs import KILLED, Page, run, same_weights
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from sta_adapter import get_sta, load_sta
from sta_adapter.data import FrameSettings
from sta_adapter.errors import CompatibilityError, DataError
from sta_adapter.integrations.convert_data import convert_data
from sta_adapter.integrations.trl import prepare
from sta_adapter.loading import load_model, load_processor

FRAMES = FrameSettings(nframes=8, min_tokens=None, max_tokens=None)
RUN = {"per_device_train_batch_size": 2, "learning_rate": 1e-3, "use_cpu": True, "bf16": False, "report_to": "none"}


@pytest.fixture(scope="module")
def rows(clips):
    return load_dataset(
        "json", data_files=str(convert_data(clips / "clips.jsonl", clips / "trl.jsonl", to="trl").path), split="train"
    )


@pytest.fixture(scope="module")
def pairs(clips):
    return load_dataset(
        "json",
        data_files=str(convert_data(clips / "pairs.jsonl", clips / "trl-pairs.jsonl", to="trl").path),
        split="train",
    )


def sft(base, rows, out, steps=4, **changed):
    torch.manual_seed(0)
    sta = prepare(load_model(base), load_processor(base), frames=FRAMES, settings=changed.pop("settings", None))
    config = SFTConfig(str(out), max_steps=steps, save_steps=2, **{**RUN, **changed}, **sta.config)
    trainer = SFTTrainer(**sta.arguments, train_dataset=rows, args=config)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    return trainer, before


def logits(model, base, rows):
    from sta_adapter.integrations.trl import VideoCollator

    batch = VideoCollator(load_processor(base), frames=FRAMES)([rows[0], rows[1]])
    batch.pop("labels")
    model.eval()
    with torch.no_grad():
        return model(**batch, use_cache=False).logits


@pytest.fixture(scope="module")
def trained(base, rows, tmp_path_factory):
    out = tmp_path_factory.mktemp("sft")
    return (*sft(base, rows, out), out)


def test_sft_trains_sta_and_lora_and_nothing_else(trained):
    trainer, before, _ = trained
    sta = {id(p) for p in get_sta(trainer.model).parameters()}
    for name, parameter in trainer.model.named_parameters():
        changed = not torch.equal(parameter, before[name])
        assert changed == (id(parameter) in sta or "lora_" in name), name


def test_what_comes_out_is_an_adapter(trained, base, rows):
    trainer, _, out = trained
    expected = logits(trainer.model, base, rows)
    for folder in (out, out / "checkpoint-4"):
        assert torch.equal(logits(load_sta(load_model(base), folder).model, base, rows), expected)


def test_the_page(base, clips, tmp_path):
    page = Page("trl", base, clips, tmp_path)
    page.run(page.command("sta-adapter convert-data"))
    on_a_cpu = 'SFTConfig("my-adapter", use_cpu=True, bf16=False, report_to="none", '
    (tmp_path / "train.py").write_text(page.block("python").replace('SFTConfig("my-adapter", ', on_a_cpu))
    page.run("python train.py")
    load_sta(load_model(base), tmp_path / "my-adapter")
    page.run(page.command("sta-adapter evaluate"))


def test_bf16_and_checkpointing(base, rows, tmp_path):
    trainer, before = sft(base, rows, tmp_path, 2, bf16=True, gradient_checkpointing=True)
    assert all(
        not torch.equal(p, before[n])
        for n, p in trainer.model.named_parameters()
        if ".sta." in n and p.requires_grad and "to_out" in n
    )
    load_sta(load_model(base), tmp_path)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"packing": True}, "set `packing=False`"),
        ({"padding_free": True}, "set `padding_free=False`"),
        ({"completion_only_loss": False}, "completion_only_loss=False of SFTConfig has no effect on clips read here"),
    ],
    ids=["packing", "padding-free", "ours"],
)
def test_what_has_no_place_is_refused_with_what_to_set(base, rows, tmp_path, setting, said):
    with pytest.raises(ValueError, match=said):
        sft(base, rows, tmp_path, 1, **setting)


def test_stage_one_and_then_two(base, rows, tmp_path):
    sft(base, rows, tmp_path / "one", 2, settings={"stage": 1, "head_scale": 0.5})
    assert not (tmp_path / "one/adapter_config.json").exists()
    first = load_sta(load_model(base), tmp_path / "one")
    _, before = sft(base, rows, tmp_path / "two", 2, settings={"adapter": str(tmp_path / "one")})
    started = {
        n.split(".visual.")[1].replace("modules_to_save.default.", ""): v
        for n, v in before.items()
        if "sta.modules_to_save" in n
    }
    for index, block in first.blocks.items():
        for name, value in block.state_dict().items():
            assert torch.equal(started[f"blocks.{index}.sta.{name}"], value)
    assert load_sta(load_model(base), tmp_path / "two").config.head_scale == 0.5


def test_rows_with_a_videos_column_reach_no_encoder(base, clips, tmp_path):
    """TRL's own data code leaves such clips out silently."""
    from sta_adapter.integrations.callbacks import RequireGradient
    from sta_adapter.integrations.settings import Settings, prepare_model

    rows = [json.loads(line) for line in (clips / "clips.jsonl").read_text().splitlines()]
    told = [
        {
            "messages": [{"role": "user", "content": "What happens?"}, row["messages"][1]],
            "videos": [str(clips / "0.mp4")],
            "images": [],
        }
        for row in rows
    ]
    handle, lora = prepare_model(load_model(base), Settings())
    trainer = SFTTrainer(
        handle.model, SFTConfig(str(tmp_path), max_steps=4, **RUN), train_dataset=Dataset.from_list(told), peft_config=lora,
        processing_class=load_processor(base), callbacks=[RequireGradient(patience=2)],
    )  # fmt: skip
    with pytest.raises(DataError, match="no clip reached the vision encoder"):
        trainer.train()


def dpo(base, pairs, out, settings=None):
    torch.manual_seed(0)
    sta = prepare(load_model(base), load_processor(base), "dpo", frames=FRAMES, settings=settings)
    start = sta.model
    return DPOTrainer(
        **sta.arguments, train_dataset=pairs, args=DPOConfig(str(out), max_steps=3, save_steps=3, **RUN, **sta.config)
    ), start


def reference_outputs(trainer, base, rows):
    """Logits of what DPO takes for the reference, seen in its own forward."""
    import contextlib

    import trl.trainer.dpo_trainer as module

    seen, real = [], module.use_adapter

    @contextlib.contextmanager
    def spy(model, adapter_name):
        with real(model, adapter_name) as inside:
            seen.append(logits(model, base, rows))
            model.train()
            yield inside

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "use_adapter", spy)
        trainer.train()
    return seen


def test_dpo_from_nothing_has_the_base_as_reference(base, rows, pairs, tmp_path):
    expected = logits(load_model(base), base, rows)
    trainer, _ = dpo(base, pairs, tmp_path)
    seen = reference_outputs(trainer, base, rows)
    assert seen
    assert all(torch.equal(one, expected) for one in seen)
    loaded = load_sta(load_model(base), tmp_path)
    assert torch.equal(logits(loaded.model, base, rows), logits(trainer.model, base, rows))
    assert not torch.equal(logits(trainer.model, base, rows), expected)
    assert all(block.to_out.weight.any() for block in loaded.blocks.values())  # begins at zero: clips reached the loss


def test_dpo_after_sft_has_a_frozen_copy_as_reference(trained, base, rows, pairs, tmp_path):
    *_, out = trained
    expected = logits(load_sta(load_model(base), out).model, base, rows)
    trainer, _ = dpo(base, pairs, tmp_path, {"adapter": str(out)})
    seen = reference_outputs(trainer, base, rows)
    assert seen
    assert all(torch.allclose(one, expected, atol=1e-6) for one in seen)
    loaded = load_sta(load_model(base), tmp_path)
    assert torch.equal(logits(loaded.model, base, rows), logits(trainer.model, base, rows))


def test_grpo_without_pixels_in_its_loss_is_refused(base):
    with pytest.raises(CompatibilityError, match=r"GRPO in trl .* hands clips to generation alone"):
        prepare(load_model(base), load_processor(base), "grpo")


def test_grpo_with_video_is_found_out_by_the_callback(base, clips, tmp_path, monkeypatch):
    import transformers.video_processing_utils as videos

    load = videos.load_video  # TRL leaves decoding to transformers, which takes torchcodec, which needs FFmpeg
    monkeypatch.setattr(videos, "load_video", lambda video, backend=None, **more: load(video, backend="pyav", **more))
    for name in ("is_torchcodec_available", "is_torchcodec_usable"):
        monkeypatch.setattr(videos, name, lambda *_, **__: True, raising=False)
    from sta_adapter.integrations.callbacks import RequireGradient
    from sta_adapter.integrations.settings import Settings, prepare_model

    ask = [{"type": "video", "video": str(clips / "0.mp4")}, {"type": "text", "text": "What happens?"}]
    handle, lora = prepare_model(load_model(base), Settings())
    trainer = GRPOTrainer(
        handle.model, lambda completions, **_: [float(len(c[0]["content"])) + i for i, c in enumerate(completions)],
        GRPOConfig(str(tmp_path), max_steps=3, num_generations=2, max_completion_length=4, **RUN),
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": ask}]}] * 4),
        processing_class=load_processor(base), peft_config=lora, callbacks=[RequireGradient(patience=2)],
    )  # fmt: skip
    with pytest.raises(DataError, match="clips reached the encoder, but not the forward that the loss is made from"):
        trainer.train()


def script(base, clips, out, *more, processes=1, **environment):
    words = ["torchrun", "--nproc-per-node", processes, "--standalone", Path(__file__).with_name("trl_sft.py")]
    return run([*words, base, clips / "trl.jsonl", out, *more], clips, **environment)


def test_two_processes(base, clips, rows, tmp_path):
    script(base, clips, tmp_path, processes=2)
    for folder in (tmp_path, tmp_path / "checkpoint-4"):
        load_sta(load_model(base), folder)


def test_resuming_after_a_kill_gives_the_same_bits(base, clips, rows, tmp_path):
    script(base, clips, tmp_path / "alone")
    script(base, clips, tmp_path / "out", expect=1, PYTHONPATH=KILLED)
    assert not (tmp_path / "out/checkpoint-4").exists()
    script(base, clips, tmp_path / "out", "resume")
    same_weights(tmp_path / "alone", tmp_path / "out")
