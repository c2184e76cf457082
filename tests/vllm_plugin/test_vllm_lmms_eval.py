"""lmms-eval's model in vLLM with STA, inside the real lmms-eval, on a task made here."""

import json

import pytest
import torch
from engines import Reference, make_adapter, make_base

from sta_adapter.errors import ConfigError

evaluator = pytest.importorskip("lmms_eval.evaluator")
from lmms_eval.models import get_model  # noqa: E402
from lmms_eval.tasks import TaskManager  # noqa: E402
from lmms_eval_task import write_task  # noqa: E402

ENGINE = "dtype=float32,enforce_eager=True,max_model_len=1024,max_num_seqs=2,max_num_batched_tokens=1024,nframes=4"


def test_answers_are_those_of_transformers_for_the_same_prompts(tmp_path):
    base = make_base(tmp_path / "base", "Qwen2VL")
    adapter = make_adapter(tmp_path / "sta", base)
    task = write_task(tmp_path / "local")
    arguments = (
        f"model={base},sta={adapter},max_new_tokens=6,max_pixels=3136,min_image_pixels=784,batch_size=4,{ENGINE}"
    )
    lm = get_model("vllm_sta").create_from_arg_string(arguments)
    asked, generate = [], lm.client.generate

    def watched(prompts, *args, **kwargs):
        out = generate(prompts, *args, **kwargs)
        asked.extend(zip(prompts, out, strict=True))
        return out

    lm.client.generate = watched
    done = evaluator.simple_evaluate(
        model=lm,
        tasks=["local_task"],
        task_manager=TaskManager(include_path=str(task / "task"), include_defaults=False),
        bootstrap_iters=0,
    )
    assert len(done["samples"]["local_task"]) == len(asked) == 4
    reference, others = Reference(base, adapter), 0
    for prompt, out in asked:
        [(frames, facts)] = prompt["multi_modal_data"]["video"]
        assert len(frames) == len(facts["frames_indices"]) == 4
        inputs = reference.processor(
            text=[prompt["prompt"]], videos=[frames], do_sample_frames=False, return_tensors="pt"
        )
        found = list(out.outputs[0].token_ids)
        with torch.no_grad():
            expected = reference.model.generate(**inputs, do_sample=False, max_new_tokens=len(found))
            with reference.handle.disabled():
                plain = reference.model.generate(**inputs, do_sample=False, max_new_tokens=len(found))
        assert list(out.prompt_token_ids) == inputs["input_ids"][0].tolist()
        assert found == expected[0, inputs["input_ids"].shape[1] :].tolist()
        others += plain.tolist() != expected.tolist()
    assert others > 0


def test_an_adapter_and_the_plug_in_must_be_there(monkeypatch):
    with pytest.raises(ConfigError, match="add sta=FOLDER_OR_ID"):
        get_model("vllm_sta").create_from_arg_string("model=a/b")
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    with pytest.raises(ConfigError, match="would serve the base without STA"):
        get_model("vllm_sta").create_from_arg_string(f"model=a/b,sta={json.dumps('c/d')}")


@pytest.mark.parametrize("clips", [1, 2])
def test_the_times_of_several_clips_can_not_be_known(monkeypatch, clips):
    from lmms_eval.models.chat.vllm_generate import VLLMGenerate

    from sta_adapter.integrations.lmms_eval.vllm import Chat

    made = {"prompt": "?", "multi_modal_data": {"video": [torch.zeros(4, 3, 2, 2)] * clips}}
    made["mm_processor_kwargs"] = {"fps": 2.0, "do_sample_frames": False}
    monkeypatch.setattr(VLLMGenerate, "make_one_request", lambda *_: (made, {}))
    if clips == 1:
        [(_, facts)] = Chat.make_one_request(object.__new__(Chat), None)[0]["multi_modal_data"]["video"]
        assert facts["fps"] == 2.0
        return
    with pytest.raises(ConfigError, match="2 clips, and lmms-eval tells vLLM the frame rate of the last one alone"):
        Chat.make_one_request(object.__new__(Chat), None)
