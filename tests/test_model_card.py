"""The card of a published adapter: its metadata, its tables, and that its code runs."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cases import make_qwen2_vl_tower, seeded
from hub_server import HubServer

from sta_adapter import inject_sta, load_sta
from sta_adapter.adapter.format import CONFIG, read_description, weights_digest
from sta_adapter.adapter.model_card import CardFacts, make_card, read_run
from sta_adapter.adapter.push import push_folder
from sta_adapter.demo import TINY_BASE
from sta_adapter.errors import CheckpointError
from sta_adapter.loading import saved_frame_settings

SCORE = {"accuracy": 0.8125, "low": 0.7, "high": 0.9, "correct": 13, "total": 16}
RESULTS = {
    "base": {"ordered": {"overall": {**SCORE, "accuracy": 0.5}}},
    "adapter": {"ordered": {"overall": SCORE}, "shuffled": {"overall": {**SCORE, "accuracy": 0.25}}},
    "differences": [],
    "reading": ["The adapter is better than the base: +31.2 [+10.0, +50.0] points."],
    "data": "/home/ann/clips.jsonl",
}
SETTINGS = {
    "stage": "both",
    "learning_rate": 1e-4,
    "schedule": "cosine",
    "batch_size": 64,
    "epochs": 1.0,
    "lora_rank": 16,
}
FRAMES = {"fps": 2.0, "nframes": None, "min_frames": 4, "max_frames": 8, "backend": "decord"}
STAGE = {"steps": 40, "trainable_parameters": 13056, "history": [{"loss": 2.5}, {"loss": 0.125}], "seconds": 1.0}


@pytest.fixture
def folder(tmp_path):
    """The output of a training run, with results of an evaluation."""
    inject_sta(seeded(make_qwen2_vl_tower)).save_pretrained(tmp_path)
    run = {**SETTINGS, "frames": FRAMES, "model": "/home/ann/qwen", "data": "digest"}
    (tmp_path / "run.json").write_text(json.dumps(run))
    (tmp_path / "stage1").mkdir()
    (tmp_path / "stage1" / "result.json").write_text(json.dumps(STAGE))
    write_results(tmp_path)
    return tmp_path


def write_results(folder, **changed):
    """Results of an evaluation of the folder's adapter."""
    (folder / "results.json").write_text(json.dumps({**RESULTS, "adapter_sha256": weights_digest(folder), **changed}))


def card(folder, **facts):
    description = {**read_description(folder), "frames": FRAMES}
    return make_card(description, CardFacts("user/adapter", parameters=13056, run=read_run(folder), **facts))


def test_metadata(folder):
    from huggingface_hub import ModelCard

    text = card(folder, base_model="org/base", license="apache-2.0", datasets=["org/clips"], lora=True)
    data = ModelCard(text).data
    assert data.base_model == "org/base"
    assert data.to_dict()["base_model_relation"] == "adapter"
    assert (data.library_name, data.pipeline_tag, data.license) == ("sta-adapter", "video-text-to-text", "apache-2.0")
    assert data.datasets == ["org/clips"]
    assert {"sta-adapter", "lora"} <= set(data.tags)
    assert [(result.metric_type, result.metric_value) for result in data.eval_results] == [
        ("accuracy", 0.8125),
        ("accuracy", 0.25),
    ]


def test_what_is_not_known_is_left_out(tmp_path):
    from huggingface_hub import ModelCard

    inject_sta(seeded(make_qwen2_vl_tower)).save_pretrained(tmp_path)
    text = make_card(read_description(tmp_path), CardFacts("user/adapter"))
    data = ModelCard(text).data.to_dict()
    assert data.keys() == {"library_name", "pipeline_tag", "tags"}
    assert "## Training" not in text
    assert "## Evaluation" not in text
    assert "None" not in text


def test_tables(folder):
    text = card(folder, datasets=["org/clips"])
    for line in (
        "| data | org/clips |",
        "| learning rate | 0.0001 |",
        "| frames: fps | 2.0 |",
        "| stage 1 | 13,056 parameters, 40 steps, loss 2.500 to 0.125 |",
        "| base | ordered | 50.0 [70.0, 90.0] | 16 |",
        "| adapter | shuffled | 25.0 [70.0, 90.0] | 16 |",
        "- The adapter is better than the base: +31.2 [+10.0, +50.0] points.",
        "| blocks with STA | 3 of 3, 32 wide |",
    ):
        assert line in text.splitlines()
    assert "/home/ann" not in text
    assert 'read_clip("clip.mp4", fps=2.0, min_frames=4, max_frames=8)' in text


def test_every_setting_of_the_recipe_is_in_the_card(folder):
    names = {
        "stage": "stage (1: STA; 2: STA and LoRA)",
        "learning_rate": "learning rate",
        "sta_learning_rate": "learning rate of STA",
        "schedule": "schedule",
        "warmup": "warm-up, share of the steps",
        "weight_decay": "weight decay",
        "batch_size": "clips a step",
        "epochs": "epochs",
        "max_steps": "most steps",
        "precision": "precision",
        "seed": "seed",
        "lora_targets": "LoRA on",
        "lora_rank": "LoRA rank",
        "lora_alpha": "LoRA alpha",
        "lora_qkv_rank": "LoRA rank of the encoder's qkv",
    }
    (folder / "run.json").write_text(json.dumps({name: number for number, name in enumerate(names, 900)}))
    lines = card(folder, lora=True).splitlines()
    told = [f"| {said} | {n} |" for n, said in enumerate(names.values(), 900) if said != "epochs"]  # there are steps
    assert [line for line in lines if re.fullmatch(r".* \| 9\d\d \|", line)] == told


@pytest.mark.parametrize(
    "results",
    [{}, {"adapter": 3}, {"adapter": {"ordered": {"overall": {"accuracy": 1}}}}, {"adapter": {"ordered": []}}],
    ids=["none", "number", "part", "list"],
)
def test_results_of_another_form_are_left_out(folder, results):
    (folder / "results.json").write_text(json.dumps(results))
    assert "## Evaluation" not in card(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"backbone": "`<script>"},
        {"backbone": 'x"\nimport os'},
        {"sta_adapter_version": "[x](http://x)"},
        {"sta_adapter_version": "see www.example.org"},
        {"encoder": {"depth": "<b>", "width": 32, "num_heads": 4, "head_dim": 8}},
        {"encoder": {"depth": 3, "width": True, "num_heads": 4, "head_dim": 8}},
    ],
    ids=["markup", "code", "link", "address", "word", "truth"],
)
def test_what_is_no_name_and_no_number_is_refused(folder, change):
    with pytest.raises(
        CheckpointError, match=r"sta_config\.json: .* (expected a number or a few words|must be whole numbers)"
    ):
        make_card({**read_description(folder), **change}, CardFacts("user/adapter"))


def test_sentences_are_no_markup(folder):
    reading = ["<script>alert(1)</script> [x](y) `z` https://example.org\n# big"]
    write_results(folder, reading=reading)
    text = card(folder)
    assert "- &lt;script&gt;alert(1)&lt;/script&gt; [x] (y) 'z' https: //example.org # big" in text.splitlines()


def save_another(folder):
    """Other weights in the place of the adapter."""
    handle = inject_sta(seeded(make_qwen2_vl_tower))
    for parameter in handle.parameters():
        parameter.data += 1
    handle.save_pretrained(folder)


def test_results_of_another_adapter_are_left_out(folder):
    assert not [note for note in push_folder(folder, "user/adapter", dry_run=True).notes if "results" in note]
    save_another(folder)
    done = push_folder(folder, "user/adapter", dry_run=True)
    assert any("results.json is of another adapter, and is no part of the card" in note for note in done.notes)
    assert "## Evaluation" not in done.card_text
    assert "## Training" in done.card_text  # of weights that nobody has kept
    with pytest.raises(CheckpointError, match=r"results\.json is of another adapter, whose weights are not those in"):
        push_folder(folder, "user/adapter", dry_run=True, results=folder)


def test_results_that_do_not_name_their_adapter(folder):
    write_results(folder, adapter_sha256=None)
    assert "## Evaluation" not in card(folder)
    assert any("does not say of which adapter" in note for note in read_run(folder)["left_out"])
    assert read_run(folder, folder)["results"]["adapter"]  # named by the user


def test_results_are_of_an_adapter_saved_again(folder):
    load_sta(seeded(make_qwen2_vl_tower), folder).save_pretrained(folder)
    assert "## Evaluation" in card(folder)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_recipe_of_other_weights_is_left_out(folder, stage):
    load_sta(seeded(make_qwen2_vl_tower), folder).save_pretrained(folder / stage)
    assert "| stage 1 | 13,056 parameters" in card(folder)
    save_another(folder)
    found = read_run(folder)
    assert any("run.json is of a training that ended in other weights" in note for note in found["left_out"])
    assert "## Training" not in card(folder)


def test_a_damaged_adapter_beside_results(folder):
    (folder / "sta_adapter.safetensors").write_bytes(b"x" * 40)
    with pytest.raises(CheckpointError, match=r"sta_adapter\.safetensors is damaged"):
        read_run(folder)


def test_results_that_are_not_there(folder):
    with pytest.raises(CheckpointError, match=r"no results of an evaluation in .*nowhere\.json"):
        read_run(folder, Path("nowhere.json"))
    (folder / "results.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"results\.json can't be read as JSON"):
        read_run(folder)


@pytest.mark.parametrize("backbone", ["qwen2_vl", "internvideo2", "clip"])
def test_code_is_python(folder, backbone):
    description = {**read_description(folder), "backbone": backbone}
    text = make_card(description, CardFacts("user/adapter", base_model="org/base"))
    (code,) = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    compile(code, "card", "exec")
    assert "trust_remote_code" not in code  # nobody is told to run what a base brings along


def test_how_clips_were_sampled_travels_along(folder, tmp_path, monkeypatch):
    sampling = {name: value for name, value in FRAMES.items() if name != "backend"}
    with HubServer() as hub:
        hub.use(monkeypatch, tmp_path / "cache")
        push_folder(folder, "user/adapter")
        assert saved_frame_settings("user/adapter") == sampling
        description = json.loads(hub.files("user/adapter")[CONFIG])
        hub.upload("user/adapter", {CONFIG: json.dumps({**description, "frames": {"nframes": 4, "cmd": 1}}).encode()})
        assert saved_frame_settings("user/adapter") == {"nframes": 4}
        hub.upload("user/adapter", {CONFIG: json.dumps({**description, "frames": {"fps": "x"}}).encode()})
        with pytest.raises(CheckpointError, match="fps is 'x', expected a number"):
            saved_frame_settings("user/adapter")
    assert saved_frame_settings(folder) == FRAMES


@pytest.mark.slow
def test_the_cards_code_runs_by_ids_and_then_offline(tmp_path, monkeypatch):
    """Base and adapter on a Hub, the card's code, as it is, in new processes."""
    from sta_adapter.demo.clips import write_dataset
    from sta_adapter.loading import load_model

    inject_sta(load_model(TINY_BASE, device="cpu")).save_pretrained(tmp_path / "adapter")
    write_dataset(tmp_path / "clips", "train", range(1))
    next((tmp_path / "clips").rglob("*.mp4")).rename(tmp_path / "clip.mp4")
    with HubServer() as hub:
        hub.upload("user/tiny-base", {file.name: file.read_bytes() for file in TINY_BASE.iterdir() if file.is_file()})
        with monkeypatch.context() as here:
            hub.use(here, tmp_path / "cache")
            push_folder(tmp_path / "adapter", "user/adapter", base_model="user/tiny-base")
        text = hub.files("user/adapter")["README.md"].decode()
        (code,) = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
        (tmp_path / "card.py").write_text(code)

        def run(**variables):
            environment = {**hub.environment(tmp_path / "home"), "OMP_NUM_THREADS": "1", **variables}
            words = [sys.executable, "card.py"]
            done = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr
            return done.stdout

        answer = run()
        asked = len(hub.log)
        assert run(HF_HUB_OFFLINE="1") == answer
        assert len(hub.log) == asked


@pytest.mark.parametrize("backbone", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "llava_onevision"])
def test_vllm_serves_these(folder, backbone):
    text = make_card({**read_description(folder), "backbone": backbone}, CardFacts("user/adapter", base_model="a/base"))
    assert "sta-adapter serve --model a/base --adapter user/adapter" in text


def test_how_vllm_serves_it(folder):
    assert "sta-adapter serve --model a/base --adapter user/adapter" in card(folder, base_model="a/base")
    merged = card(folder, base_model="a/base", lora=True)
    assert "sta-adapter export user/adapter served --merge-lora a/base\nsta-adapter serve --model served/base" in merged
    description = {**read_description(folder), "backbone": "internvideo2"}
    assert "## Serve" not in make_card(description, CardFacts("user/adapter"))


def test_scores_stand_under_what_they_were_measured_on(folder):
    """And not under the data of the training."""
    from huggingface_hub import ModelCard

    (first, _) = ModelCard(card(folder, datasets=["org/clips"])).data.eval_results
    assert (first.dataset_type, first.dataset_name) == ("own", "own clips, frames ordered")
    write_results(folder, benchmark="mvbench")
    (first, _) = ModelCard(card(folder, datasets=["org/clips"])).data.eval_results
    assert (first.dataset_type, first.dataset_name) == ("mvbench", "mvbench, frames ordered")


@pytest.mark.parametrize(("stage", "shown"), [("both", "12"), ("1", "1"), ("2", "2")])
def test_what_holds_in_one_stage_alone_is_said_of_that_stage(folder, stage, shown):
    run = {"learning_rate": 1e-4, "stage": stage, "stage1": {"max_steps": 5}, "stage2": {"learning_rate": 2e-5}}
    (folder / "run.json").write_text(json.dumps(run))
    rows = card(folder).splitlines()
    assert "| learning rate | 0.0001 |" in rows
    assert ("| most steps, stage 1 | 5 |" in rows) == ("1" in shown)
    assert ("| learning rate, stage 2 | 2e-05 |" in rows) == ("2" in shown)
    (folder / "run.json").write_text(json.dumps({**run, "stage2": {"learning_rate": "[x](y)"}}))
    with pytest.raises(CheckpointError, match=r"learning_rate is '\[x\]\(y\)', expected a number or a few words"):
        card(folder)


def test_settings_that_did_not_count_are_left_out(folder):
    (folder / "run.json").write_text(json.dumps({**SETTINGS, "max_steps": 5}))
    assert "LoRA rank" not in card(folder)
    assert "| epochs" not in card(folder)
    assert "| LoRA rank | 16 |" in card(folder, lora=True)


def test_the_cards_code_numbers_text_as_training_did(folder):
    description = {**read_description(folder), "positions": "original"}
    text = make_card(description, CardFacts("user/adapter", base_model="a/base"))
    assert 'use_positions(model, "original")' in text
    assert "sta-adapter serve" in text
    other = make_card({**description, "positions": "rows-and-columns"}, CardFacts("user/adapter", base_model="a/base"))
    assert "sta-adapter serve" not in other  # vLLM has other ones, and refuses
    assert "use_positions" not in make_card({**description, "positions": None}, CardFacts("user/adapter"))
    with pytest.raises(CheckpointError, match=r"positions is .* expected a number or a few words"):
        make_card({**description, "positions": '"); import os'}, CardFacts("user/adapter"))
