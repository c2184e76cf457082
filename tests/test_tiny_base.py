"""The tiny base that ships with the package: a real Qwen2-VL that tells what is in a frame."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from sta_adapter.cli import cli
from sta_adapter.cli.options import read_run
from sta_adapter.data import FrameSettings
from sta_adapter.demo import TINY_BASE, clips
from sta_adapter.errors import ConfigError
from sta_adapter.loading import load_model, load_processor
from sta_adapter.tiny_base import TINY_ADAPTER, model_and_adapter, usual_frames

QUESTION = "What is here?"
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")


@pytest.fixture(scope="module")
def processor():
    return load_processor(TINY_BASE)


@pytest.fixture(scope="module")
def model():
    return load_model(TINY_BASE, device="cpu")


def still(seed: int, frames: int = 1) -> tuple[np.ndarray, list[str]]:
    """Frames (T, 32, 32, 3) of a shape at rest, and row, column, colour and shape of it."""
    rng = np.random.default_rng(seed)
    scene = clips.still(rng, clips.LOOKS["all"], frames, 32)
    row, column = (min(int(place[0] / 32 * 3), 2) for place in (scene.y, scene.x))
    colour = next(name for name, value in clips.COLOURS.items() if value == scene.colour)
    return clips.draw(scene, 32, 4.0, rng), [ROWS[row], COLUMNS[column], colour, scene.shape]


def ask(model, processor, frames: np.ndarray, kind: str, question: str = QUESTION) -> torch.Tensor:
    """Token ids of the greedy answer to a question about frames (T, H, W, 3)."""
    content = [{"type": kind}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    visual = {"images": [frames[0]]} if kind == "image" else {"videos": [frames]}
    inputs = processor(text=[text], return_tensors="pt", **visual)
    out = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    return out[0, inputs["input_ids"].shape[1] :]


def test_what_is_shown_where_nobody_names_a_model():
    assert model_and_adapter(None, None) == (TINY_BASE, TINY_ADAPTER)
    assert model_and_adapter(None, "mine") == (TINY_BASE, "mine")
    assert model_and_adapter("org/model", None) == ("org/model", None)


def test_folder_is_small_and_names_no_machine():
    files = [path for path in TINY_BASE.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 2 * 1024 * 1024
    texts = {path.name: path.read_text(encoding="utf-8") for path in files if path.suffix in (".json", ".md", ".txt")}
    assert {"config.json", "tokenizer.json", "preprocessor_config.json", "README.md"} <= texts.keys()
    for name, text in texts.items():
        assert not re.search(r"/(home|root|tmp|work|Users)/", text), name


def test_it_is_the_real_class(model):
    from transformers import Qwen2VLForConditionalGeneration

    assert type(model) is Qwen2VLForConditionalGeneration
    assert all(torch.isfinite(weight).all() for weight in model.parameters())


def test_special_tokens_have_the_ids_of_the_config(processor):
    config = json.loads((TINY_BASE / "config.json").read_text(encoding="utf-8"))
    for name in ("vision_start", "vision_end"):
        assert processor.tokenizer.convert_tokens_to_ids(f"<|{name}|>") == config[f"{name}_token_id"]
    for name in ("image", "video"):
        assert processor.tokenizer.convert_tokens_to_ids(f"<|{name}_pad|>") == config[f"{name}_token_id"]
    assert processor.tokenizer.eos_token_id == config["eos_token_id"]
    assert processor.tokenizer.pad_token_id == config["pad_token_id"]
    assert len(processor.tokenizer) <= config["vocab_size"]


@pytest.mark.parametrize("text", ["Where is it?", "Ünïcode 漢字 \n\t 12", "<|im_start|>user\nHi<|im_end|>"])
def test_tokenizer_spells_anything(processor, text):
    ids = processor.tokenizer(text)["input_ids"]
    assert processor.tokenizer.decode(ids) == text


@pytest.mark.parametrize("label", clips.LABELS)
def test_every_answer_is_one_token(processor, label):
    assert len(processor.tokenizer(label)["input_ids"]) == 1


@pytest.mark.parametrize(("frames", "size"), [(1, 32), (3, 32), (8, 64), (8, 96)], ids=str)
def test_clips_are_brought_to_32_pixels_and_four_tokens_a_frame(processor, frames, size):
    clip = np.zeros((frames, size, size, 3), np.uint8)
    content = [{"type": "video"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=[text], videos=[clip], return_tensors="pt")
    assert inputs["video_grid_thw"].tolist() == [[frames, 4, 4]]
    assert (inputs["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<|video_pad|>")).sum() == 4 * frames


@pytest.mark.parametrize("kind", ["image", "video"])
def test_it_tells_shape_colour_and_place(model, processor, kind):
    right = []
    for seed in range(60):
        frames, told = still(seed, 1 if kind == "image" else 8)
        said = processor.tokenizer.decode(ask(model, processor, frames, kind), skip_special_tokens=True).split()
        right.append([word in said for word in told])
    place_colour_shape = np.mean(right, axis=0)
    assert (place_colour_shape > 0.8).all(), place_colour_shape  # chance is a third or less


def test_it_has_never_seen_a_movement(model, processor):
    answers = [processor.tokenizer.decode(ask(model, processor, clips.render(label, 3), "video", clips.QUESTION),
               skip_special_tokens=True).strip() for label in clips.LABELS]  # fmt: skip
    assert sum(said == label for said, label in zip(answers, clips.LABELS, strict=True)) <= 4


@pytest.mark.slow
def test_script_makes_such_a_folder(tmp_path, monkeypatch):
    scripts = Path(__file__).parent.parent / "scripts"
    monkeypatch.syspath_prepend(str(scripts))
    transformers = pytest.importorskip("transformers", minversion="5.0")
    import make_tiny_base

    steps = ["--vision-steps", "2", "--language-steps", "10", "--pictures", "32", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["make_tiny_base.py", "--out", str(tmp_path), *steps])
    make_tiny_base.main()
    shipped = {path.name for path in TINY_BASE.iterdir() if path.is_file()}
    assert {path.name for path in tmp_path.iterdir()} == shipped
    for name in ("config.json", "tokenizer.json", "preprocessor_config.json", "chat_template.json"):
        assert (tmp_path / name).read_text() == (TINY_BASE / name).read_text(), name
    assert transformers.AutoConfig.from_pretrained(tmp_path).model_type == "qwen2_vl"


GIVEN = st.fixed_dictionaries(
    {}, optional={"nframes": st.integers(1, 64), "fps": st.floats(0.5, 8), "max_tokens": st.integers(1, 64)}
).filter(lambda given: not {"nframes", "fps"} <= given.keys())


@given(given=GIVEN)
def test_its_own_frames_stand_where_nothing_else_is_said(given):
    settings = FrameSettings(**usual_frames(TINY_BASE, given))
    assert {name: getattr(settings, name) for name in given} == given
    assert settings.nframes == given.get("nframes", None if "fps" in given else 8)
    assert settings.min_tokens is None
    assert settings.max_tokens == given.get("max_tokens")
    assert usual_frames("Qwen/Qwen2-VL-2B-Instruct", given) == given


@pytest.mark.parametrize("frames", [[], 0, "", None])
def test_frames_that_are_no_settings_are_not_replaced(frames, tmp_path):
    (tmp_path / "run.yaml").write_text(json.dumps({"frames": frames}))
    with pytest.raises(ConfigError, match=rf"frames is {re.escape(repr(frames))}, expected settings of frames"):
        read_run(str(tmp_path / "run.yaml"), (), {"model": str(TINY_BASE)}, ())


def test_commands_ask_it_with_the_frames_that_it_was_made_for(tmp_path, monkeypatch):
    """Also its adapter: with others it names a movement no oftener than chance would."""
    monkeypatch.chdir(tmp_path)
    clips.write_dataset(tmp_path, "test", range(1000, 1020), "held_out")
    words = ["--model", str(TINY_BASE), "--data", "test.jsonl", "--num-workers", "0", "--max-new-tokens", "4"]
    words += ["--adapter", str(TINY_ADAPTER), "--out", "results"]
    CliRunner().invoke(cli, ["evaluate", *words], catch_exceptions=False)
    found = json.loads(Path("results", "results.json").read_text())
    assert found["adapter"]["ordered"]["overall"]["accuracy"] > 0.3
    Path("run.yaml").write_text("frames: {max_tokens: 64, min_tokens: 64}\n")
    tokens = [  # its own are 8 frames of 4, and words
        json.loads(CliRunner().invoke(cli, [*command, "--json"], catch_exceptions=False).output)
        for command in (
            ["check-data", "test.jsonl", "--model", str(TINY_BASE)],
            ["check-data", "test.jsonl", "--model", str(TINY_BASE), "--config", "run.yaml"],
            ["plan", "--data", "test.jsonl", "--model", str(TINY_BASE), "--memory", "24"],
            ["plan", "--data", "test.jsonl", "--model", str(TINY_BASE), "--memory", "24", "--config", "run.yaml"],
        )
    ]
    own, other, *planned = [told.get("tokens") or told["data"]["tokens"] for told in tokens]
    assert planned == [own, other]
    assert own["largest"] < 8 * 4 + 20 < 8 * 64 < other["least"]
