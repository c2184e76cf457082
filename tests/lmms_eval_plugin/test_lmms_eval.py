"""Models with STA inside the real lmms-eval, on a task made here."""

import json
import os
import subprocess
import sys

import pytest
import torch
from lmms_eval import evaluator
from lmms_eval.models import MODEL_REGISTRY_V2, get_model
from lmms_eval.tasks import TaskManager

from sta_adapter import get_sta, load_sta
from sta_adapter.demo import TINY_BASE
from sta_adapter.errors import ConfigError
from sta_adapter.integrations.lmms_eval import MODELS
from sta_adapter.loading import load_model

ARGUMENTS = "pretrained={},device=cpu,device_map=cpu"


@pytest.fixture(scope="module")
def adapter(make_adapter):
    return make_adapter(load_model(TINY_BASE, device="cpu"))


def ask(lm, folder):
    """Run the local task; gives the answers in the order of the clips, and what the model was given and returned."""
    calls, model = [], lm.model
    generate = model.generate

    def watched(**inputs):
        out = generate(**inputs)
        calls.append((inputs, out))
        return out

    model.generate = watched
    tasks = TaskManager(include_path=str(folder / "task"), include_defaults=False)
    done = evaluator.simple_evaluate(model=lm, tasks=["local_task"], task_manager=tasks, bootstrap_iters=0)
    del model.generate
    lm._model = model  # lmms-eval lets go of it when it is done
    samples = sorted(done["samples"]["local_task"], key=lambda sample: sample["doc_id"])
    return [sample["filtered_resps"] for sample in samples], calls


def test_lmms_eval_finds_the_models():
    assert set(MODELS) <= set(MODEL_REGISTRY_V2.list_canonical_model_ids())
    for name in MODELS:
        base = MODEL_REGISTRY_V2.get_manifest(name.removesuffix("_sta"))
        for simple in (True, False):
            path = base.simple_class_path if simple else base.chat_class_path or base.simple_class_path
            assert path in [f"{c.__module__}.{c.__name__}" for c in get_model(name, force_simple=simple).__mro__]


def test_answers_are_those_of_our_model_for_the_same_prompts(folder, adapter):
    lm = get_model("qwen2_vl_sta").create_from_arg_string(f"{ARGUMENTS.format(TINY_BASE)},sta={adapter}")
    with_sta, calls = ask(lm, folder)
    ours = load_model(TINY_BASE, device="cpu")
    base = [ours.generate(**inputs) for inputs, _ in calls]
    handle = load_sta(ours, adapter)
    assert len(calls) == 4
    for inputs, out in calls:
        assert torch.equal(ours.generate(**inputs), out)
    assert any(not torch.equal(a, b) for a, (_, b) in zip(base, calls, strict=True))
    with get_sta(lm.model).disabled():
        without, _ = ask(lm, folder)
    plain, _ = ask(get_model("qwen2_vl").create_from_arg_string(ARGUMENTS.format(TINY_BASE)), folder)
    assert without == plain != with_sta
    assert len(handle.blocks) == len(get_sta(lm.model).blocks)


def test_from_the_command_line(folder, adapter, tmp_path):
    command = [sys.executable, "-m", "lmms_eval", "--model", "qwen2_vl_sta", "--tasks", "local_task", "--log_samples"]
    arguments = f"pretrained={TINY_BASE},device_map=cpu,sta={adapter}"
    where = ["--include_path", str(folder / "task"), "--output_path", str(tmp_path), "--device", "cpu"]
    done = subprocess.run(
        [*command, "--model_args", arguments, *where],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "cache")},
    )
    assert "|local_task|" in done.stdout, done.stderr[-3000:]
    file = next(tmp_path.glob("*/*samples_local_task.jsonl"))
    assert len(file.read_text().splitlines()) == 4
    result = json.loads(next(tmp_path.glob("*/*_results.json")).read_text())
    assert result["results"]["local_task"]["exact,none"] == 0


def test_an_adapter_must_be_named(adapter):
    with pytest.raises(ConfigError, match="add sta=FOLDER_OR_ID to --model_args"):
        get_model("qwen2_vl_sta").create_from_arg_string(ARGUMENTS.format(TINY_BASE))


# ---- Qwen2.5-VL, tiny and random


@pytest.fixture(scope="module")
def tiny_qwen2_5(tmp_path_factory):
    """A folder with a random Qwen2.5-VL of the tiny base's sizes, and the tiny base's processor."""
    from transformers import (
        AutoConfig,
        AutoProcessor,
        AutoTokenizer,
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
    )

    old = AutoConfig.from_pretrained(TINY_BASE).to_dict()
    vision = {key: old["vision_config"][key] for key in ("depth", "num_heads", "patch_size", "spatial_merge_size")}
    text = {key: value for key, value in old["text_config"].items() if key not in ("model_type", "architectures")}
    vision |= {"hidden_size": 48, "intermediate_size": 64, "out_hidden_size": text["hidden_size"]}
    vision |= {"temporal_patch_size": 1, "window_size": 16, "fullatt_block_indexes": [1]}
    ids = {key: old[key] for key in old if key.endswith("_token_id")}
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids))
    place = tmp_path_factory.mktemp("qwen2_5")
    model.save_pretrained(place)
    for part in (AutoProcessor, AutoTokenizer):
        part.from_pretrained(TINY_BASE).save_pretrained(place)
    return place


@pytest.mark.parametrize("simple", [True, False], ids=["simple", "chat"])
def test_qwen2_5_vl(folder, tiny_qwen2_5, make_adapter, simple):
    made = make_adapter(load_model(tiny_qwen2_5, device="cpu"))
    kind = get_model("qwen2_5_vl_sta", force_simple=simple)
    assert kind.is_simple == simple
    lm = kind.create_from_arg_string(f"{ARGUMENTS.format(tiny_qwen2_5)},sta={made}")
    with_sta, calls = ask(lm, folder)
    assert len(calls) == len(with_sta) == 4
    with get_sta(lm.model).disabled():
        without, _ = ask(lm, folder)
    assert without != with_sta


# ---- InternVideo2.5: the published code isn't available here, so lmms-eval's class gets our stand-in of it


def test_internvideo2_5_on_a_stand_in(folder, monkeypatch, make_adapter):
    from lmms_eval.models.simple import internvideo2_5
    from standins.internvl_chat import InternVLChatModel, Tokenizer

    class Chat(InternVLChatModel):
        def chat(
            self,
            tokenizer,
            pixel_values,
            question,
            generation_config,
            num_patches_list=None,
            history=None,
            return_history=False,
        ):
            small = torch.nn.functional.avg_pool2d(pixel_values, 56)  # the stand-in's frames are 8 pixels wide
            out = super().chat(
                tokenizer, small, question, generation_config | {"max_new_tokens": 4}, None, num_patches_list
            )
            return " ".join(map(str, out[0].tolist())), None

    def make(*args, **options):
        torch.manual_seed(0)
        return Chat().to(torch.bfloat16)

    monkeypatch.setattr(internvideo2_5.AutoModel, "from_pretrained", make)
    monkeypatch.setattr(internvideo2_5.AutoTokenizer, "from_pretrained", lambda *args, **options: Tokenizer())
    made = make_adapter(make())
    arguments = f"pretrained=stand-in,device=cpu,device_map=auto,max_frames_num=4,sta={made}"
    lm = get_model("internvideo2_5_sta").create_from_arg_string(arguments)
    assert len(get_sta(lm.model).blocks) == 2
    seen = []
    lm.model.vision_model.register_forward_hook(lambda module, args, output: seen.append(output.last_hidden_state))
    ask(lm, folder)
    with get_sta(lm.model).disabled():
        ask(lm, folder)
    assert [len(frames) for frames in seen] == [4] * 8  # one clip a question
    for with_sta, without in zip(seen[:4], seen[4:], strict=True):
        assert not torch.allclose(with_sta, without, rtol=0.1)
