"""Every example in its `--tiny` mode, in this process, and what the recipes' data is made of."""

import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from drawings import require_same_drawing
from qwen2_vl_prompts import transformers_version
from safetensors.torch import load_file

from sta_adapter.errors import DataError

EXAMPLES = Path(__file__).parent.parent / "examples"
needs_qwen2_5 = pytest.mark.skipif(
    importlib.util.find_spec("transformers.models.qwen2_5_vl") is None,
    reason="this release of transformers has no Qwen2.5-VL",
)
needs_seams = pytest.mark.skipif(
    transformers_version() < (4, 52), reason="apply_videorope needs transformers 4.52 or newer"
)


@pytest.fixture
def example(monkeypatch):
    """Imports a file of examples/ as it is imported when run as a script."""

    def load(name: str):
        file = EXAMPLES / name
        for folder in (EXAMPLES, file.parent):
            monkeypatch.syspath_prepend(str(folder))
        spec = importlib.util.spec_from_file_location("example_" + name.replace("/", "_").removesuffix(".py"), file)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return load


def assert_trained(folder: Path, *, lora: bool = True) -> None:
    """The adapter in the folder is not the one that injection starts with."""
    weights = load_file(folder / "sta_adapter.safetensors")
    gammas = [value for name, value in weights.items() if name.endswith("gamma")]
    ends = [value for name, value in weights.items() if name.endswith("to_out.weight")]
    assert ends
    assert all((gamma != torch.tensor(1e-5)).any() for gamma in gammas)
    assert all(end.any() for end in ends)
    assert (folder / "adapter_model.safetensors").exists() == lora


SCRIPTS = [
    pytest.param("finetune_qwen2_vl.py", "", id="qwen2_vl"),
    pytest.param("finetune_qwen2_5_vl.py", "adapter", id="qwen2_5_vl", marks=needs_qwen2_5),
    pytest.param("finetune_videorope.py", "", id="videorope", marks=needs_seams),
    pytest.param("finetune_internvideo2_chat.py", "adapter", id="internvideo2_chat"),
    pytest.param("finetune_internvideo2_5_chat.py", "adapter", id="internvideo2_5_chat"),
]


@pytest.mark.parametrize(("script", "adapter"), SCRIPTS)
def test_fine_tuning(example, tmp_path, capsys, script, adapter):
    example(script).main(["--tiny", "--out", str(tmp_path)])
    assert_trained(tmp_path / adapter)
    assert "STAHandle(backbone=" in capsys.readouterr().out
    assert len((EXAMPLES / script).read_text(encoding="utf-8").splitlines()) <= 80


def test_real_use_needs_data(example, capsys):
    with pytest.raises(SystemExit):
        example("finetune_qwen2_vl.py").main(["--out", "x"])
    assert "--data and --out are needed, or --tiny" in capsys.readouterr().err


def records(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_ssv2_t10(example, tmp_path):
    example("ssv2_t10/run.py").main(["--tiny", "--out", str(tmp_path)])
    assert_trained(tmp_path / "adapter")
    parts = [records(tmp_path / f"{name}.jsonl") for name in ("train", "test")]
    assert [len(part) for part in parts] == [8, 2]
    assert len({r["messages"][0]["content"][0]["video"] for part in parts for r in part}) == 10
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    assert {order: r["overall"]["total"] for order, r in results["adapter"].items()} == {
        "ordered": 2,
        "shuffled": 2,
        "reversed": 2,
    }


def test_ssv2_t10_without_sta(example, tmp_path):
    example("ssv2_t10/run.py").main(["--tiny", "--out", str(tmp_path), "--set", "sta=false"])
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "adapter" / "sta_adapter.safetensors").exists()
    assert (tmp_path / "results" / "results.json").exists()


def test_ssv2_vsm(example, tmp_path):
    example("ssv2_vsm/run.py").main(["--tiny", "--out", str(tmp_path)])
    assert_trained(tmp_path / "adapter")
    seen = []
    for name in ("train", "test"):
        contents = [r["messages"][0]["content"] for r in records(tmp_path / f"{name}.jsonl")]
        seen.append({part["video"] for content in contents for part in content if part["type"] == "video"})
        assert all([part["type"] for part in content].count("video") == 3 for content in contents)
    assert not seen[0] & seen[1]
    assert (
        json.loads((tmp_path / "results" / "results.json").read_text())["adapter"]["ordered"]["overall"]["total"] == 4
    )


def test_webvid_qa(example, tmp_path):
    example("webvid_qa/run.py").main(["--tiny", "--out", str(tmp_path)])
    assert_trained(tmp_path / "adapter")
    made = records(tmp_path / "train.jsonl") + records(tmp_path / "held_out.jsonl")
    assert Counter(len(r["messages"]) for r in made) == {2: 2, 4: 4}  # a third has one question, the rest several


def test_ssv2_internvideo2(example, tmp_path, capsys):
    example("ssv2_internvideo2/run.py").main(["--tiny", "--out", str(tmp_path)])
    assert_trained(tmp_path, lora=False)
    assert load_file(tmp_path / "head.safetensors")["1.weight"].shape == (10, 32)
    assert "of 10; saved in" in capsys.readouterr().out


# ---- what the recipes' data is made of


@pytest.fixture
def labels(example):
    return example("ssv2_labels.py")


def test_only_the_wanted_classes(labels, tmp_path):
    file = tmp_path / "train.json"
    entries = [{"id": str(i), "template": t} for i, t in enumerate([*labels.TEN, "Opening [something]"])]
    file.write_text(json.dumps(entries))
    assert len(labels.read_actions(file)) == 11
    assert [action.template for action in labels.read_actions(file, labels.TEN)] == list(labels.TEN)
    assert len(set(labels.TEN)) == 10


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("{", "is no label file"),
        ('[{"id": "1"}]', "is no label file.*template"),
        ('[{"id": "1", "template": "Opening [something]"}]', "none of its 1 clips is of a wanted class"),
        (None, "is no label file.*No such file"),
    ],
    ids=["no_json", "no_template", "other_classes", "missing"],
)
def test_wrong_label_files(labels, tmp_path, text, error):
    file = tmp_path / "train.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(DataError, match=error):
        labels.read_actions(file, labels.TEN)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.8, 1.0], ids=str)
def test_triples(example, labels, share):
    vsm = example("ssv2_vsm/run.py")
    actions = [vsm.Action(str(number), template) for number, template in enumerate(labels.TEN * 20)]
    triples = vsm.make_triples(actions, share, seed=1)
    assert triples == vsm.make_triples(actions, share, seed=1)
    assert {query.id for _, _, query, _ in triples} == {action.id for action in actions}
    assert sum(answer != vsm.NONE for *_, answer in triples) == round(200 * share)
    for first, second, query, answer in triples:
        same = [example.template == query.template for example in (first, second)]
        assert same == [answer == "Example 1", answer == "Example 2"]
        assert query not in (first, second)
    if share:
        assert {answer for *_, answer in triples} >= {"Example 1", "Example 2"}


def test_split(labels):
    actions = [labels.Action(str(number), "") for number in range(10)]
    train, test = labels.split(actions, 0.2, seed=3)
    assert (len(train), len(test)) == (8, 2)
    assert sorted([*train, *test], key=lambda action: int(action.id)) == actions
    assert labels.split(actions, 0.2, seed=3) == (train, test)


def test_replies_without_form_give_no_question(example):
    qa = example("webvid_qa/make_qa.py")
    captions = [qa.Caption(str(number), "A cat jumps") for number in range(3)]
    reply = "Sure!\nQuestion: Who?\nAnswer: A cat.\n\nquestion: What?\nanswer: Jumps.\nQuestion: Why?"
    made = dict(qa.make_conversations(captions, lambda prompts: [reply] * len(prompts), seed=0, batch_size=1))
    both = [("Who?", "A cat."), ("What?", "Jumps.")]
    assert sorted(made.values(), key=len) == [both[:1], both, both]
    assert not any(pairs for _, pairs in qa.make_conversations(captions, lambda p: ["No."] * len(p), seed=0))


def test_longest_captions(example, tmp_path):
    qa = example("webvid_qa/make_qa.py")
    (tmp_path / "a.csv").write_text("videoid,name\n1,short\n2,a longer one\n")
    (tmp_path / "b.csv").write_text('videoid,name\n3,"the longest, of all"\n')
    assert [caption.id for caption in qa.read_captions(tmp_path, 2)] == ["3", "2"]
    (tmp_path / "c.csv").write_text("id,text\n1,x\n")
    with pytest.raises(DataError, match="has the columns id, text; expected videoid and name"):
        qa.read_captions(tmp_path, 2)


def test_a_language_model_answers_each_prompt_as_if_alone(example, tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from sta_adapter.demo import TINY_BASE
    from sta_adapter.loading import load_processor

    processor = load_processor(TINY_BASE)
    processor.tokenizer.chat_template = processor.chat_template
    processor.tokenizer.save_pretrained(tmp_path)
    sizes = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, **heads))
    for parameter in model.parameters():
        parameter.data *= 15 if parameter.dim() > 1 else 1  # so that prompts make a difference
    model.save_pretrained(tmp_path)
    ask = example("webvid_qa/make_qa.py").language_model(str(tmp_path), max_new_tokens=4)
    prompts = ["Why?", "What happens to the cat in the end?"]
    together = ask(prompts)
    assert together == [ask([prompt])[0] for prompt in prompts]
    assert together[0] != together[1]


def test_frames_encoded_once_give_what_the_clip_gives(example):
    from sta_adapter import STAConfig, inject_sta
    from sta_adapter.demo.clips import render
    from sta_adapter.demo.model import tiny_model
    from sta_adapter.loading import load_processor
    from sta_adapter.tiny_base import TINY_BASE

    run = example("live_movements/run.py")
    torch.manual_seed(0)
    model = tiny_model().eval()
    handle = inject_sta(model, STAConfig(causal=True, init="normal", gamma_init=None))
    for block in handle.blocks.values():
        torch.nn.init.normal_(block.to_out.weight)
    frames = torch.from_numpy(render("up", 1, frames=run.SEEN, size=32, rest=1)).permute(0, 3, 1, 2)
    processor = load_processor(TINY_BASE)
    given = processor.video_processor(videos=[frames], return_tensors="pt", do_resize=False)
    size = given["video_grid_thw"][0, 1:]
    pixels = given["pixel_values_videos"].unflatten(0, (-1, int(size.prod())))[None].repeat(2, 1, 1, 1)
    pixels[1] = pixels[1].flip(0)
    tokens = int(run.SEEN * size.prod()) // 4
    ids = torch.full((2, tokens + 1), model.config.video_token_id)
    ids[:, -1] = 0
    batch = {"input_ids": ids, "video_grid_thw": torch.tensor([[run.SEEN, *size.tolist()]] * 2)}
    batch["mm_token_type_ids"] = 2 * (ids == model.config.video_token_id)
    with torch.no_grad():
        again = list(run.asked_again(model, batch, pixels))
        stream = list(run.asked_in_a_stream(model, handle, batch, pixels, size))
    assert len(again) == len(stream) == 3
    torch.testing.assert_close(stream[0], again[0], rtol=1e-4, atol=1e-5)
    assert (again[0][0] - again[0][1]).abs().max() > 1e-3
    assert (stream[2] - again[2]).abs().max() > 1e-3  # what the frames before left is not encoded again


def test_the_page_about_live_movements_says_what_was_measured(example):
    figure = example("live_movements/figure.py")
    results = json.loads((EXAMPLES / "live_movements" / "results.json").read_text(encoding="utf-8"))
    page = (EXAMPLES.parent / "docs" / "live.md").read_text(encoding="utf-8")
    assert figure.page(results, page) == page
    assert figure.table(results) in page
    require_same_drawing(
        figure.figure(results), (EXAMPLES.parent / "docs" / "figures" / "live.svg").read_text(encoding="utf-8")
    )


def test_committed_runs_of_live_movements_are_gone_on_with(example, tmp_path):
    results = tmp_path / "results.json"
    results.write_bytes((EXAMPLES / "live_movements" / "results.json").read_bytes())
    example("live_movements/run.py").main(["--results", str(results), "--work", str(tmp_path / "work")])
    assert not (tmp_path / "work").exists()  # all seeds are there


def test_runs_of_other_settings_are_not_gone_on_with(example, tmp_path, capsys):
    results = tmp_path / "results.json"
    results.write_bytes((EXAMPLES / "live_movements" / "results.json").read_bytes())
    before = results.read_bytes()
    with pytest.raises(SystemExit):
        example("live_movements/run.py").main(["--quick", "--results", str(results), "--work", str(tmp_path / "work")])
    assert "holds runs of other settings; name another file with --results" in capsys.readouterr().err
    assert results.read_bytes() == before


def test_how_late_an_answer_is_right(example):
    import numpy as np

    figure = example("live_movements/figure.py")
    rows = [[0, 1, 0, 0, 1, 1, 1, 1, 1, 0], [1] * 10, [0] * 8 + [1, 1], [1] * 8 + [0, 1]]
    assert figure.delay(np.array(rows[:1], dtype=bool)) == 4
    assert figure.delay(np.array(rows[:3], dtype=bool)) == 4
    assert figure.delay(np.array(rows[1:2], dtype=bool)) == 0
    assert figure.delay(np.array(rows[2:], dtype=bool)) == 8
