"""Evaluations by vLLM: the same questions as by transformers, from the command line and in Python, with the same answers."""

import json

import pytest
from click.testing import CliRunner
from engines import make_adapter, make_base, make_family_base
from tiny_qwen import moving_square, write_video

from sta_adapter.cli import cli
from sta_adapter.data import FrameSettings, VideoDataset
from sta_adapter.evaluation import evaluate
from sta_adapter.evaluation.engine import agreement
from sta_adapter.integrations.vllm.engine import VLLMEngine
from sta_adapter.loading import load_adapter, load_model, load_processor
from sta_adapter.text_positions import use_positions

SMALL = {"enforce_eager": True, "max_model_len": 1024, "max_num_seqs": 4, "max_num_batched_tokens": 1024}


def write_data(folder, equal=False, alone=False):
    """Eight samples, half of them with options: a clip, of one length if `equal`; unless `alone`, some with a picture or another."""
    from PIL import Image

    folder.mkdir()
    lines = []
    for index in range(8):
        label = ("left", "right")[index % 2]
        write_video(folder / f"{index}.mp4", moving_square(label, index, size=32, count=12), fps=(4, 8)[index % 2])
        rate = {"nframes": 6} if equal else {"fps": (2.0, 3.0)[index // 4]}
        content = [{"type": "video", "video": f"{index}.mp4", **rate}]
        if index % 4 == 2 and not alone:
            Image.fromarray(moving_square(label, index, size=32)[0]).save(folder / f"{index}.png")
            content.append({"type": "image", "image": f"{index}.png"})
        if index % 4 == 3 and not alone:
            content.append({"type": "video", "video": "0.mp4", "nframes": 6})
        content.append({"type": "text", "text": "Which way?"})
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": label}]
        options = {"options": ["left", "right", "left and then up"]} if index < 4 else {}
        lines.append(json.dumps({"messages": messages, "category": label, **options}))
    file = folder / "data.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file


def test_the_command_line(tmp_path):
    data = write_data(tmp_path / "data")
    base = make_base(tmp_path / "base", "Qwen2VL")
    adapter = make_adapter(tmp_path / "lora", base, lora=True)
    words = ["evaluate", "--model", str(base), "--adapter", str(adapter), "--base", "--data", str(data), "--json"]
    words += ["--engine", "vllm", "--engine-options", json.dumps(SMALL), "--check", "8", "--num-workers", "0"]
    words += ["--max-new-tokens", "6", "--frames", "all", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out/results.json").read_text())
    assert report["engine"]["name"] == "vllm"
    for run in ("base", "adapter"):
        found = report["engine"]["agreement"][run]
        assert (found["samples"], found["equal"]) == (8, 8)
        assert found["largest_difference"] < 1e-3
        assert report[run]["shuffled"]["overall"]["total"] == 8
    kept = [json.loads(line) for line in (tmp_path / "out/adapter-ordered.jsonl").read_text().splitlines()]
    assert len(kept) == 9
    assert report["adapter"]["ordered"] != report["base"]["ordered"]


KINDS = {
    "Qwen2_5_VL": (make_base, {"min_tokens": 4, "max_tokens": 64}),
    "Qwen3VL": (make_base, {"min_tokens": 4, "max_tokens": 64}),
    "llava_onevision": (make_family_base, {"min_tokens": None, "max_tokens": None}),
    "internvl": (make_family_base, {"min_tokens": None, "max_tokens": None}),
    "glm4v": (make_family_base, {"min_tokens": 4, "max_tokens": 64}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_transformers(tmp_path, kind):
    make, frames = KINDS[kind]
    # vLLM takes no clips of other lengths in a batch of LLaVA-OneVision's, and one clip in a prompt of GLM's
    data = write_data(tmp_path / "data", equal=kind == "llava_onevision", alone=kind == "glm4v")
    base = make(tmp_path / "base", kind)
    adapter = make_adapter(tmp_path / "sta", base)
    dataset = VideoDataset(data, load_processor(base), frames=FrameSettings(**frames))
    how = {"batch_size": 4, "max_new_tokens": 6}
    model = use_positions(load_model(base, dtype="fp32", device="cpu"))
    plain = evaluate(model, dataset, **how)
    expected = evaluate(load_adapter(model, adapter), dataset, **how)
    with VLLMEngine(str(base), adapter, most={"video": 2, "image": 1}, options=SMALL) as engine:
        found = evaluate(engine, dataset, **how)
    agreed = agreement(found, expected)
    assert not found.bad_samples
    assert (agreed["samples"], agreed["equal"]) == (8, 8)
    assert agreed["largest_difference"] < 1e-3
    assert agreement(plain, expected)["largest_difference"] > 0.05
