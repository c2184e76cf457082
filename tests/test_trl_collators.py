"""The collators for TRL, and what is refused before its trainers are made; they need no TRL."""

import json
import sys
import types

import pytest
import tiny_bases
import torch
from test_templates import TEMPLATES
from tiny_qwen import make_model, make_processor, write_samples

from sta_adapter.data import Collator, FrameSettings, VideoDataset
from sta_adapter.errors import CompatibilityError, ConfigError, DataError, MissingExtraError
from sta_adapter.integrations import trl
from sta_adapter.integrations.convert_data import convert_data

FRAMES = FrameSettings(min_tokens=None, max_tokens=None)


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return make_processor(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_samples(tmp_path_factory.mktemp("clips"), 4)


@pytest.fixture(scope="module")
def rows(file):
    path = convert_data(file, file.with_name("trl.jsonl"), to="trl").path
    return [json.loads(line) for line in path.read_text().splitlines()]


def pair(row, *before, rejected="up"):
    said = [{"role": "assistant", "content": [{"type": "text", "text": rejected}]}]
    return {"prompt": [*before, *row["messages"][:-1]], "chosen": row["messages"][-1:], "rejected": said, "images": []}


def test_a_batch_is_that_of_our_own_data_set(processor, file, rows):
    data = VideoDataset(file, processor, frames=FRAMES)
    expected = Collator.of(processor)([data[0], data[1]])
    found = trl.VideoCollator(processor, frames=FRAMES)(rows[:2])
    assert found.keys() == expected.keys() - {"bad_samples"}
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


def test_rows_filled_with_nulls(processor, rows):
    filled = [
        {**row, "rejected": None, "messages": [{**m, "loss": None, "content": [{"text": None, "video": None, "nframes": None, **p} for p in m["content"]]} for m in row["messages"]]}
        for row in rows[:2]
    ]  # fmt: skip
    collator = trl.VideoCollator(processor, frames=FRAMES)
    found, expected = collator(filled), collator(rows[:2])
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


def test_bad_rows_are_left_out_and_counted(processor, rows, caplog, tmp_path):
    gone = json.loads(json.dumps(rows[1]).replace("1.mp4", "gone.mp4"))
    collator = trl.VideoCollator(processor, frames=FRAMES)
    assert len(collator([rows[0], gone])["input_ids"]) == 1
    assert collator.counts() == (1, 1)
    assert "gone.mp4" in caplog.text
    with pytest.raises(DataError, match=r"all 1 samples of a batch are bad, first .*gone"):
        collator([gone])
    with pytest.raises(DataError, match=r"gone\.mp4"):
        trl.VideoCollator(processor, frames=FRAMES, on_bad_sample="error")([rows[0], gone])
    with pytest.raises(DataError, match="more than max_length 8"):
        trl.VideoCollator(processor, frames=FRAMES, max_length=8)(rows[:1])
    with pytest.raises(DataError, match="a record of no known format"):
        collator([{"text": "x"}])


def test_workers_count_too(processor, rows):
    gone = json.loads(json.dumps(rows[1]).replace("1.mp4", "gone.mp4"))
    collator = trl.VideoCollator(processor, frames=FRAMES)
    loader = torch.utils.data.DataLoader([rows[0], gone] * 2, batch_size=2, num_workers=1, collate_fn=collator)
    assert len(list(loader)) == 2
    assert collator.counts() == (2, 2)


def test_pairs_are_chosen_first_and_only_the_last_answer_counts(processor, rows):
    before = [
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "down"}]},
    ]
    batch = trl.PreferenceCollator(processor, frames=FRAMES)([pair(rows[0], *before), pair(rows[1])])
    said = [
        processor.tokenizer.decode(ids[mask.bool()])
        for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)
    ]
    assert said == [f"{word}<|im_end|>" for word in ("left", "right", "up", "up")]
    assert "labels" not in batch
    half = len(batch["pixel_values_videos"]) // 2
    assert torch.equal(batch["pixel_values_videos"][:half], batch["pixel_values_videos"][half:])


def test_both_answers_of_a_pair_stand_behind_one_prompt(rows, tmp_path):
    """Also where a chat template asks for reasoning, which the better answer alone has."""
    processor = make_processor(tmp_path)
    processor.chat_template = TEMPLATES["qwen3_5"][0]
    row = json.loads(json.dumps(pair(rows[0])))
    row["chosen"][0]["content"][0]["text"] = "<think>\nIt moves.\n</think>\n\nleft"
    batch = trl.PreferenceCollator(processor, frames=FRAMES)([row])
    better, worse = (
        ids[: int(mask.argmax())] for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)
    )
    assert better.equal(worse)
    assert processor.tokenizer.decode(better).endswith("assistant\n<think>\n")


def test_bad_pairs(processor, rows, caplog):
    collator = trl.PreferenceCollator(processor, frames=FRAMES)
    gone = json.loads(json.dumps(pair(rows[1])).replace("1.mp4", "gone.mp4"))
    assert len(collator([pair(rows[0]), gone])["input_ids"]) == 2
    assert collator.counts() == (1, 1)
    with pytest.raises(DataError, match="all 1 samples of a batch are bad"):
        collator([gone])
    with pytest.raises(DataError, match="a row has no rejected; expected prompt, chosen and rejected"):
        collator([{**pair(rows[0]), "rejected": None}])
    with pytest.raises(DataError, match=r"gone\.mp4"):
        trl.PreferenceCollator(processor, frames=FRAMES, on_bad_sample="error")([gone])
    with pytest.raises(DataError, match="more than max_length 8"):
        trl.PreferenceCollator(processor, frames=FRAMES, max_length=8, on_bad_sample="error")([pair(rows[0])])


def picture_row(path, size):
    from PIL import Image

    Image.new("RGB", size).save(path)
    user = [{"type": "image", "image": str(path)}, {"type": "text", "text": "Which way?"}]
    said = [{"type": "text", "text": "left"}]
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": said}]}


def test_what_a_library_raises_for_a_pair_is_about_that_pair(processor, rows, tmp_path, caplog):
    """A picture that is too narrow for the processor, here."""
    narrow = pair(picture_row(tmp_path / "narrow.png", (2, 900)))
    collator = trl.PreferenceCollator(processor, frames=FRAMES)
    assert len(collator([pair(rows[0]), narrow])["input_ids"]) == 2
    assert collator.counts() == (1, 1)
    assert "aspect ratio" in caplog.text


@pytest.mark.skipif(not tiny_bases.takes_clips("glm4v"), reason="no GLM-4.1V that takes clips in this release")
@pytest.mark.parametrize("pairs", [False, True], ids=["rows", "pairs"])
def test_rows_that_make_no_batch_with_the_others_are_counted(rows, tmp_path, caplog, pairs):
    """GLM takes either pictures or clips in one forward."""
    processor = tiny_bases.make_processor("glm4v", tmp_path)
    kind, made = (trl.PreferenceCollator, pair) if pairs else (trl.VideoCollator, lambda row: row)
    given = [made(rows[0]), made(rows[1]), made(picture_row(tmp_path / "a.png", (16, 16)))]
    collator = kind(processor, frames=FRAMES)
    assert len(collator(given)["input_ids"]) == (4 if pairs else 2)
    assert collator.counts() == (1, 2)
    assert "it has pictures and others of its batch have clips" in caplog.text
    with pytest.raises(DataError, match="it has pictures and others of its batch have clips"):
        kind(processor, frames=FRAMES, on_bad_sample="error")(given)


@pytest.fixture
def tool(monkeypatch):
    """Stands for TRL, with a GRPO trainer whose loss takes what is named."""

    def make(*names):
        class GRPOTrainer:
            exec(f"def _get_per_token_logps_and_entropies(self, {', '.join(names)}): pass")

        monkeypatch.setitem(sys.modules, "trl", types.SimpleNamespace(GRPOTrainer=GRPOTrainer))
        monkeypatch.setattr(trl, "version", lambda package: "1.16.0")

    return make


def test_grpo_that_hands_no_clips_to_its_loss_is_refused(processor, tool):
    model = make_model(processor.tokenizer)
    tool("model", "pixel_values", "image_grid_thw")
    with pytest.raises(CompatibilityError, match=r"GRPO in trl 1\.16\.0 hands clips to generation alone"):
        trl.prepare(model, processor, "grpo")
    tool("model", "pixel_values_videos", "video_grid_thw")
    assert "data_collator" not in trl.prepare(model, processor, "grpo").arguments


def test_what_goes_into_a_trainer(processor, tool):
    tool("model")
    made = trl.prepare(make_model(processor.tokenizer), processor, "dpo", frames=FRAMES, r=4)
    assert isinstance(made.arguments["data_collator"], trl.PreferenceCollator)
    assert (made.peft_config.r, made.peft_config.modules_to_save) == (
        4,
        {"sta"} if isinstance(made.peft_config.modules_to_save, set) else ["sta"],
    )
    assert made.config == {"remove_unused_columns": False, "max_length": None}
    assert len(made.callbacks) == 4
    assert made.model is made.handle.model
    with pytest.raises(ConfigError, match="trainer is 'ppo', expected one of 'sft', 'dpo', 'grpo'"):
        trl.prepare(made.model, processor, "ppo")
    with pytest.raises(ConfigError, match="stage 1 of dpo would have no reference model"):
        trl.prepare(made.model, processor, "dpo", settings={"stage": 1})
    with pytest.raises(ConfigError, match=r"unknown setting 'stag' \(did you mean 'stage'\?\)"):
        trl.prepare(made.model, processor, settings={"stag": 1})


@pytest.mark.parametrize("release", ["0.20.0", "1.0.0"])
def test_releases_whose_dpo_leaves_clips_out_are_refused(processor, tool, monkeypatch, release):
    tool("model")
    monkeypatch.setattr(trl, "version", lambda package: release)
    with pytest.raises(CompatibilityError, match=r"before 1\.1, TRL's DPO .* STA was tested with 1\.1\.0, "):
        trl.prepare(make_model(processor.tokenizer), processor)


@pytest.mark.parametrize(
    "changed",
    [{"max_length": 16}, {"completion_only_loss": False}, {"packing": True}, {"eval_packing": True}, {"pad_to_multiple_of": 8}],
    ids=lambda changed: next(iter(changed)),
)  # fmt: skip
def test_settings_that_have_no_effect_here_are_refused(processor, tool, changed):
    tool("model")
    refuse = trl.prepare(make_model(processor.tokenizer), processor).callbacks[-1]
    of_trl = {"max_length": None, "completion_only_loss": None, "packing": False, "eval_packing": None}
    refuse.on_train_begin(types.SimpleNamespace(**of_trl), None, None)
    with pytest.raises(ConfigError, match=f"{next(iter(changed))}=.* has no effect on clips read here"):
        refuse.on_train_begin(types.SimpleNamespace(**{**of_trl, **changed}), None, None)


def test_without_trl(processor, monkeypatch):
    monkeypatch.setattr(trl, "version", lambda package: "not installed")
    with pytest.raises(MissingExtraError, match="pip install trl"):
        trl.prepare(make_model(processor.tokenizer), processor)
