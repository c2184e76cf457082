"""Serving lines and exports for vLLM, without vLLM."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hub_server import HubServer
from standins import fake_vllm
from tiny_qwen import make_processor, moving_square, save_base, write_video

from sta_adapter import STAConfig, get_sta, inject_sta, load_sta
from sta_adapter.adapter.lora_options import LoraOptions
from sta_adapter.adapter.push import push_folder
from sta_adapter.cli import cli
from sta_adapter.data.clip_reader import ClipReader
from sta_adapter.errors import CheckpointError, CompatibilityError, ConfigError, MissingExtraError
from sta_adapter.integrations.vllm import export, register
from sta_adapter.integrations.vllm.export import export_adapter, export_merged
from sta_adapter.integrations.vllm.frames import TrainedFrames, media_io_kwargs, register_loader
from sta_adapter.integrations.vllm.serve_line import _largest_rank, check_plugins, serve_line
from sta_adapter.loading import load_model, saved_frame_settings
from sta_adapter.text_positions import use_positions
from sta_adapter.video.frame_settings import FrameSettings


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    return save_base(folder, make_processor(folder))


def model_of(base):
    return use_positions(load_model(base, dtype="fp32", device="cpu"))


def save(base, folder, lora):
    from peft import get_peft_model

    handle = inject_sta(model_of(base), STAConfig(init="normal"))
    if lora:
        wrapped = get_peft_model(handle.model, handle.lora_config())
        handle = get_sta(wrapped)
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    handle.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain(base, tmp_path_factory):
    return save(base, tmp_path_factory.mktemp("plain"), lora=False)


@pytest.fixture(scope="module")
def adapted(base, tmp_path_factory):
    return save(base, tmp_path_factory.mktemp("adapted"), lora=True)


@torch.no_grad()
def logits(model, base):
    from transformers import AutoProcessor

    text = "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>Which way?<|im_end|>\n"
    inputs = AutoProcessor.from_pretrained(base)(text=[text], videos=[moving_square("left")], return_tensors="pt")
    return model.eval()(**inputs).logits


def test_an_export_beside_lora_is_what_vllm_takes_and_answers_alike(base, adapted, tmp_path):
    assert export_adapter(adapted, tmp_path / "out")
    fields = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    from safetensors.torch import load_file

    keys = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert not fields["modules_to_save"]
    assert keys
    assert not any(".sta." in key for key in keys)
    expected, base_logits = logits(load_sta(model_of(base), adapted).model, base), logits(model_of(base), base)
    assert (expected - base_logits).abs().max() > 0.01
    torch.testing.assert_close(logits(load_sta(model_of(base), tmp_path / "out").model, base), expected)


def test_a_merged_base_and_its_sta_answer_as_the_adapter_and_only_together(base, adapted, plain, tmp_path):
    export_merged(adapted, tmp_path, str(base), dtype="fp32", device="cpu")
    expected = logits(load_sta(model_of(base), adapted).model, base)
    merged = tmp_path / "base"
    found = logits(load_sta(model_of(merged), tmp_path / "sta").model, merged)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(CheckpointError, match=r"this model has none\. Use the base that `sta-adapter export`"):
        load_sta(model_of(base), tmp_path / "sta")
    with pytest.raises(CheckpointError, match="LoRA weights of another adapter merged into it"):
        load_sta(model_of(merged), plain)
    load_sta(model_of(base), tmp_path / "sta", base_model="any")


def test_exports_know_how_the_run_sampled_its_clips(base, adapted, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(adapted, run)
    frames = {"fps": 2.0, "max_frames": 6, "max_tokens": 64}
    (run / "run.json").write_text(json.dumps({"frames": frames}))
    export_adapter(run, tmp_path / "beside")
    export_merged(run, tmp_path / "merged", str(base), dtype="fp32", device="cpu")
    for folder in (tmp_path / "beside", tmp_path / "merged" / "sta"):
        assert saved_frame_settings(folder) == saved_frame_settings(run) == frames
    assert saved_frame_settings(adapted) == {}


def test_exports_that_cannot_be(base, plain, adapted, tmp_path):
    with pytest.raises(CheckpointError, match="nothing to merge"):
        export_merged(plain, tmp_path / "a", str(base))
    with pytest.raises(CheckpointError, match="would be written, and is read as well"):
        export_adapter(plain, plain)
    with pytest.raises(CheckpointError, match="there is no folder"):
        export_adapter(tmp_path / "nowhere", tmp_path / "b")
    shutil.copytree(plain, tmp_path / "damaged")
    (tmp_path / "damaged" / "sta_adapter.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"sta_adapter\.safetensors"):
        export_adapter(tmp_path / "damaged", tmp_path / "d")
    assert not (tmp_path / "d").exists()
    assert not export_adapter(plain, tmp_path / "c")
    load_sta(model_of(base), tmp_path / "c")


@pytest.mark.parametrize("wrong", [{"modules_to_save": 5}, {"r": "8"}, {"rank_pattern": [8]}], ids=str)
def test_lora_options_of_another_type_are_named(adapted, tmp_path, wrong):
    folder = shutil.copytree(adapted, tmp_path / "adapter")
    fields = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**fields, **wrong}))
    for use in (lambda: export_adapter(folder, tmp_path / "out"), lambda: serve_line("base", str(folder))):
        with pytest.raises(CheckpointError, match=rf"adapter_config\.json: {next(iter(wrong))} is .*expected"):
            use()


def test_the_command_says_how_the_export_is_served(plain, tmp_path):
    done = CliRunner().invoke(cli, ["export", str(plain), str(tmp_path / "out")], catch_exceptions=False)
    assert f"sta-adapter serve --model BASE --adapter {tmp_path / 'out'}" in done.output


def test_an_export_of_a_revision(plain, tmp_path, monkeypatch):
    """Of adapter and base, each its own."""
    with HubServer() as hub:
        hub.use(monkeypatch, tmp_path / "cache")
        push_folder(plain, "user/adapter")
        first = hub.repos["user/adapter"].resolve("main")
        hub.upload("user/adapter", {"sta_config.json": b"{}"})
        options = ["export", "user/adapter", str(tmp_path / "out")]
        assert isinstance(CliRunner().invoke(cli, options).exception, CheckpointError)
        CliRunner().invoke(cli, [*options, "--adapter-revision", first], catch_exceptions=False)
    assert (tmp_path / "out" / "sta_adapter.safetensors").read_bytes() == (
        plain / "sta_adapter.safetensors"
    ).read_bytes()


def test_the_revision_of_a_base_that_is_merged_into(plain, adapted, base, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(export, "export_merged", lambda *args, **kwargs: seen.update(kwargs))
    line = ["export", str(adapted), str(tmp_path / "out"), "--merge-lora", "org/base", "--revision", "v1"]
    CliRunner().invoke(cli, line, catch_exceptions=False)
    assert (seen["revision"], seen["adapter_revision"], seen["base_model"]) == ("v1", None, None)
    CliRunner().invoke(cli, [*line, "--any-base"], catch_exceptions=False)
    assert seen["base_model"] == "any"
    for words in (["--revision", "v1"], ["--dtype", "bf16"], ["--any-base"]):
        done = CliRunner().invoke(cli, ["export", str(plain), str(tmp_path / "x"), *words])
        assert f"{words[0]} applies to the base, and has no effect without --merge-lora" in str(done.exception)


def test_the_serve_line_carries_the_run_of_the_adapter(base, plain, adapted, tmp_path):
    export_adapter(plain, tmp_path / "a")
    (tmp_path / "a" / "run.json").write_text(json.dumps({"frames": {"fps": 2.0, "max_frames": 6, "max_tokens": 64}}))
    options = ["serve", "--model", str(base), "--adapter", str(tmp_path / "a"), "--print", "--", "--port", "8123"]
    words = shlex.split(CliRunner().invoke(cli, options, catch_exceptions=False).output)
    assert words[:3] == ["vllm", "serve", str(base)]
    assert words[-2:] == ["--port", "8123"]
    given = {name: json.loads(words[words.index(name) + 1]) for name in ("--hf-overrides", "--media-io-kwargs")}
    assert given["--hf-overrides"] == {"sta_adapter": str(tmp_path / "a")}
    video = given["--media-io-kwargs"]["video"]
    assert (video["fps"], video["max_frames"], video["max_tokens"], video["factor"]) == (2.0, 6, 64, 8)
    assert "--enable-lora" not in words
    words = serve_line("base", str(adapted), any_base=True, revision=None)
    assert json.loads(words[words.index("--hf-overrides") + 1])["sta_adapter_any_base"] is True
    assert words[words.index("--max-lora-rank") + 1] == "32"
    assert "--enable-tower-connector-lora" in words
    with pytest.raises(ConfigError, match="--hf-overrides is set by this command"):
        serve_line("base", str(plain), extra=["--hf-overrides={}"])


@pytest.mark.parametrize(
    ("reader", "sized"),
    [
        (ClipReader(FrameSettings(), factor=28), True),
        (ClipReader(FrameSettings(min_tokens=None, max_tokens=None), factor=28), False),
        (ClipReader(FrameSettings()), False),
    ],
    ids=["sized as trained", "by the processor", "a processor of one size"],
)
def test_the_processor_resizes_in_the_server_where_it_did_in_training(plain, reader, sized):
    words = serve_line("base", str(plain), reader=reader)
    assert "--media-io-kwargs" in words
    assert ("--mm-processor-kwargs" in words) == sized


def test_an_adapter_of_other_text_positions_is_refused_before_the_server_starts(base, plain, tmp_path):
    shutil.copytree(plain, tmp_path / "a")
    description = json.loads((tmp_path / "a" / "sta_config.json").read_text())
    (tmp_path / "a" / "sta_config.json").write_text(json.dumps({**description, "positions": "rows-and-columns"}))
    options = ["serve", "--model", str(base), "--adapter", str(tmp_path / "a"), "--print"]
    with pytest.raises(CheckpointError, match=r"positions 'rows-and-columns', and vLLM numbers text by 'original'"):
        CliRunner().invoke(cli, options, catch_exceptions=False)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 8),
        ({"r": 8}, 8),
        ({"r": 9}, 16),
        ({"r": 8, "rank_pattern": {"attn.qkv": 400}}, 512),
        ({"r": 200}, 256),
        ({"r": 300}, 320),
        ({"r": 600}, 600),
    ],
)
def test_the_largest_rank_is_one_that_vllm_takes(fields, expected):
    assert _largest_rank(LoraOptions(fields)) == expected


def test_a_server_without_the_plug_in_or_vllm_is_not_started(base, plain, monkeypatch):
    check_plugins(None)
    check_plugins("other,sta_adapter")
    with pytest.raises(ConfigError, match=r"VLLM_PLUGINS is 'other'.*without STA"):
        check_plugins("other")
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    with pytest.raises(MissingExtraError, match=r"sta-adapter\[vllm\]"):
        CliRunner().invoke(cli, ["serve", "--model", str(base), "--adapter", str(plain)], catch_exceptions=False)


def test_the_loader_gives_the_frames_of_training(tmp_path):
    file = write_video(tmp_path / "a.mp4", moving_square("left", size=64, count=16), fps=4)
    reader = ClipReader(FrameSettings(fps=1.0, min_frames=2, min_tokens=2, max_tokens=4), factor=8, temporal_patch=2)
    expected = reader.read([{"type": "video", "video": str(file)}])[0]
    options = media_io_kwargs(reader)["video"]
    assert options.pop("video_backend") == "sta_adapter"
    assert options.pop("num_frames") == -1  # of clips that a request sends as single frames, none is left out
    frames, metadata = TrainedFrames.load_bytes(file.read_bytes(), num_frames=32, **options)
    np.testing.assert_array_equal(frames, expected.pixels)
    assert frames.shape == (4, 16, 16, 3)
    assert metadata["frames_indices"] == expected.metadata["frames_indices"]
    assert metadata["do_sample_frames"] is False
    with pytest.raises(ConfigError, match="has no option num_frame; known: fps"):
        TrainedFrames.load_bytes(file.read_bytes(), num_frame=3)
    with pytest.raises(ConfigError, match=r"has no option num_frames \(it is 8\); use nframes"):
        TrainedFrames.load_bytes(file.read_bytes(), num_frames=8, **options)


def test_the_loader_is_registered(monkeypatch):
    fake_vllm.install(monkeypatch)
    register()
    import vllm.multimodal.video as video

    assert video.VIDEO_LOADER_REGISTRY.found == {"sta_adapter": TrainedFrames}
    monkeypatch.delattr(video, "VIDEO_LOADER_REGISTRY")
    with pytest.raises(CompatibilityError, match="no registry of video loaders"):
        register_loader()


def contents(folder):
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_an_export_replaces_nothing_without_being_told(base, plain, adapted, tmp_path):
    other = shutil.copytree(plain, tmp_path / "other")
    (other / "base").mkdir()
    before = contents(other)
    for words, lost in (
        ([], "sta_adapter.safetensors, sta_config.json"),
        (["--merge-lora", str(base)], "base"),
    ):
        done = CliRunner().invoke(cli, ["export", str(adapted), str(other), *words])
        assert f"holds {lost}, which would be lost" in str(done.exception)
        assert contents(other) == before
    CliRunner().invoke(cli, ["export", str(adapted), str(other), "--overwrite"], catch_exceptions=False)
    assert torch.equal(logits(load_sta(model_of(base), other).model, base), logits(load_sta(model_of(base), adapted).model, base))  # fmt: skip


@pytest.mark.parametrize("of", ["base", "sta"])
def test_a_merge_never_writes_over_what_it_reads(base, adapted, tmp_path, of):
    """As where an adapter and its base lie in one folder, which is the one to write to."""
    shutil.copytree(base if of == "base" else adapted, tmp_path / of)
    before = contents(tmp_path)
    words = [str(tmp_path / "sta" if of == "sta" else adapted), str(tmp_path), "--overwrite"]
    words += ["--merge-lora", str(tmp_path / "base" if of == "base" else base)]
    with pytest.raises(CheckpointError, match="would be written, and is read as well; write to another folder"):
        CliRunner().invoke(cli, ["export", *words], catch_exceptions=False)
    assert contents(tmp_path) == before


def with_lora(base, folder, **options):
    """An adapter with LoRA of these options on the base, saved."""
    from peft import LoraConfig, get_peft_model

    handle = inject_sta(model_of(base), STAConfig(init="normal"))
    model = get_peft_model(handle.model, LoraConfig(r=2, **options))
    for name, parameter in model.named_parameters():
        if "lora_" in name or ".modules_to_save." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    get_sta(model).save_pretrained(folder)
    return folder


def test_lora_on_stas_own_layers_is_merged_and_not_left_out(base, tmp_path):
    folder = with_lora(base, tmp_path / "adapter", target_modules=["to_qkv", "to_out", "q_proj"])
    with pytest.raises(CheckpointError, match=r"has LoRA on STA's own layers .*--merge-lora BASE"):
        export_adapter(folder, tmp_path / "beside")
    assert not (tmp_path / "beside").exists()
    expected = logits(load_sta(model_of(base), folder).model, base)
    export_merged(folder, tmp_path, str(base), dtype="fp32", device="cpu")
    merged = tmp_path / "base"
    found = logits(load_sta(model_of(merged), tmp_path / "sta").model, merged)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [{"target_modules": ["q_proj", "lm_head"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}],
    ids=["LoRA", "whole"],
)
def test_an_output_layer_that_is_trained_leaves_the_embeddings_as_they_are(base, tmp_path, options):
    """Bases whose output layer has the embeddings' weights, as Qwen2-VL-2B."""
    tied = shutil.copytree(base, tmp_path / "tied")
    model = load_model(base, dtype="fp32", device="cpu")
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tied)
    folder = with_lora(tied, tmp_path / "adapter", **options)
    expected = logits(load_sta(model_of(tied), folder).model, tied)
    export_merged(folder, tmp_path, str(tied), dtype="fp32", device="cpu")
    merged = tmp_path / "base"
    found = logits(load_sta(model_of(merged), tmp_path / "sta").model, merged)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("word", ["--hf_overrides={}", "--hf-overrides.a=1", "--hf-over", "--mm_processor_kwargs.b"])
def test_no_spelling_of_an_option_takes_the_place_of_this_lines(plain, word):
    """VLLM takes the last of them, so that the base would be served without STA."""
    reader = ClipReader(FrameSettings(), factor=28)
    with pytest.raises(ConfigError, match=r"^--(hf-overrides|mm-processor-kwargs) is set by this command"):
        serve_line("base", str(plain), reader=reader, extra=[word])
    serve_line("base", str(plain), reader=reader, extra=["--", "--hf-token", "x", "hf-overrides"])


def test_lora_weights_are_served_from_the_revision_of_their_sta(adapted, tmp_path, monkeypatch):
    export_adapter(adapted, tmp_path / "a, b=c")
    weights = (tmp_path / "a, b=c" / "adapter_model.safetensors").read_bytes()
    with HubServer() as hub:
        hub.use(monkeypatch, tmp_path / "cache")
        push_folder(tmp_path / "a, b=c", "user/adapter")
        first = hub.repos["user/adapter"].resolve("main")
        hub.upload("user/adapter", {"adapter_model.safetensors": b"of another commit"})
        lines = [serve_line("base", "user/adapter", revision=first), serve_line("base", str(tmp_path / "a, b=c"))]
    for words in lines:
        module = json.loads(words[words.index("--lora-modules") + 1])
        assert module["name"] == "adapted"
        assert Path(module["path"], "adapter_model.safetensors").read_bytes() == weights


def test_the_server_takes_the_place_of_the_command(base, plain, tmp_path):
    """So that what ends the command ends the server, and not after it."""
    (tmp_path / "vllm").write_text("#!/bin/sh\necho server $$ $1\n")
    (tmp_path / "vllm").chmod(0o755)
    code = f"import sys; sys.executable = {str(tmp_path / 'python')!r}; from sta_adapter.cli import cli; cli()"
    words = [sys.executable, "-c", code, "serve", "--model", base, "--adapter", plain, "--own-frames"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        said, _ = process.communicate()
    assert said.splitlines()[-1] == f"server {process.pid} serve"
