"""The plug-in inside the real vLLM, on a CPU: the same answers as transformers and load_sta, from the same frames."""

import base64
import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from engines import (
    CLIP,
    GLM_PROMPT,
    NEW_TOKENS,
    PICTURE,
    PROMPT,
    Engine,
    Reference,
    clip_prompt,
    clips,
    copy_folder,
    difference,
    make_adapter,
    make_base,
    make_family_base,
    picture,
    quantize_base,
    with_metadata,
)
from hub_server import HubServer
from PIL import Image
from tiny_qwen import moving_square, write_video

from sta_adapter.adapter.format import CONFIG
from sta_adapter.data.clip_reader import ClipReader
from sta_adapter.errors import CheckpointError, ConfigError, InjectionError
from sta_adapter.integrations.vllm.export import export_adapter, export_merged
from sta_adapter.integrations.vllm.serve_line import trained_reader
from sta_adapter.integrations.vllm.serving import SERVED

KINDS = ("Qwen2VL", "Qwen2_5_VL", "Qwen3VL", "Qwen3_5")


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A base of each kind, two adapters for it, and one with LoRA."""
    made = {}
    for kind in KINDS:
        root = tmp_path_factory.mktemp(kind)
        made[kind] = {"base": make_base(root / "base", kind)}
        made[kind]["sta"] = make_adapter(root / "sta", made[kind]["base"])
    base = made["Qwen2VL"]["base"]
    root = tmp_path_factory.mktemp("more")
    made["other"] = make_adapter(root / "other", base, seed=1, spread=0.2)
    made["lora"] = make_adapter(root / "lora", base, seed=2, lora=True)
    return made


@contextlib.contextmanager
def running(*args, **options):
    engine = Engine(*args, **options)
    try:
        yield engine
    finally:
        engine.close()


def compare(engine, reference, meta, **options):
    """Tokens and logprobs of each clip by itself, and the embeddings of all in a batch."""
    for frames in clips():
        [(tokens, logprobs)] = engine.ask([clip_prompt(frames, meta, reference.text)], **options)
        expected, scores = reference.answer(reference.inputs(videos=[frames]))
        assert tokens == expected
        assert max(abs(scores[i][t].item() - v) for i, d in enumerate(logprobs) for t, v in d.items()) < 1e-3
    changed = [frames[:, :, ::-1].copy() for frames in clips()]  # not in any cache
    engine.ask([clip_prompt(frames, meta, reference.text) for frames in changed], **options)
    for found, frames in zip(engine.embeddings, changed, strict=True):
        assert difference(found, reference.embeddings(frames)) < 1e-5


def test_without_an_adapter_it_is_vllms_model(folders):
    base = folders["Qwen2VL"]["base"]
    with running(base) as engine:
        compare(engine, Reference(base), meta=False)
        assert not any("-sta-" in name for name in engine.identifiers)


def test_qwen2_vl(folders):
    base, adapter = folders["Qwen2VL"]["base"], folders["Qwen2VL"]["sta"]
    reference = Reference(base, adapter)
    with running(base, adapter) as engine:
        compare(engine, reference, meta=False)
        assert all("-sta-" in name for name in engine.identifiers)
        frames, image = clips()[0], picture()
        text = PROMPT.replace(CLIP, f"{PICTURE}{CLIP}{PICTURE}{CLIP}")
        media = {"video": [frames, clips()[2]], "image": [image, image[::-1].copy()]}
        [(tokens, _)] = engine.ask([{"prompt": text, "multi_modal_data": media}])
        inputs = reference.inputs(text, videos=media["video"], images=media["image"])
        assert tokens == reference.answer(inputs)[0]

        engine.llm.collective_rpc("reload_weights")
        engine.llm.reset_mm_cache()
        engine.llm.llm_engine.reset_encoder_cache()
        engine.llm.reset_prefix_cache()
        compare(engine, reference, meta=False)
        with reference.handle.disabled():
            assert difference(reference.embeddings(frames), engine.embeddings[0]) > 0.1


def test_two_engines_in_one_process(folders):
    base = folders["Qwen2VL"]["base"]
    with running(base, folders["Qwen2VL"]["sta"]) as one, running(base, folders["other"]) as two:
        for _ in range(2):
            for engine, adapter in ((one, folders["Qwen2VL"]["sta"]), (two, folders["other"])):
                engine.ask([clip_prompt(clips()[0])])
                found = engine.embeddings[0] if engine.embeddings else engine.first
                engine.first = found
                assert difference(found, Reference(base, adapter).embeddings(clips()[0])) < 1e-5
        assert set(one.identifiers).isdisjoint(two.identifiers)


def test_qwen2_5_vl(folders):
    base, adapter = folders["Qwen2_5_VL"]["base"], folders["Qwen2_5_VL"]["sta"]
    reference = Reference(base, adapter)
    with running(base, adapter) as engine:
        compare(engine, reference, meta=True)
        with reference.handle.disabled():
            assert difference(reference.embeddings(clips()[0][:, :, ::-1]), engine.embeddings[0]) > 0.05


def test_qwen3_vl(folders):
    base, adapter = folders["Qwen3VL"]["base"], folders["Qwen3VL"]["sta"]
    reference = Reference(base, adapter)
    with running(base, adapter) as engine:  # embeddings with those of deepstack
        [(tokens, _)] = engine.ask([clip_prompt(clips()[0][:, :, ::-1].copy(), meta=True)])
        assert tokens == reference.answer(reference.inputs(videos=[clips()[0][:, :, ::-1]]))[0]
        for frames in clips():
            engine.ask([clip_prompt(frames, meta=True)])
            found = engine.embeddings[0]
            assert difference(found, reference.embeddings(frames)) < 1e-5
            with reference.handle.disabled():
                assert difference(reference.embeddings(frames), found) > 0.05


def test_qwen3_5(folders):
    """VLLM's linear attention on a CPU is in 16 bits alone."""
    base, adapter = folders["Qwen3_5"]["base"], folders["Qwen3_5"]["sta"]
    reference = Reference(base, adapter)
    with running(base, adapter, dtype="bfloat16") as engine:
        for frames in clips():
            [(tokens, _)] = engine.ask([clip_prompt(frames, meta=True)])
            assert len(tokens) == NEW_TOKENS
            assert difference(engine.embeddings[0], reference.embeddings(frames)) < 0.05
            with reference.handle.disabled():
                assert difference(reference.embeddings(frames), engine.embeddings[0]) > 0.1


def test_llava_onevision(tmp_path):
    base = make_family_base(tmp_path / "base", "llava_onevision")
    adapter = make_adapter(tmp_path / "sta", base)
    reference = Reference(base, adapter)
    with running(base, adapter) as engine:
        for frames in clips():
            frames = frames[:, :32, :32].copy()
            engine.ask([{"prompt": "<|video_pad|>What?", "multi_modal_data": {"video": frames}}])
            pixels = reference.processor.video_processor([list(frames)], return_tensors="pt")["pixel_values_videos"]
            with torch.no_grad():
                found = reference.model.model.get_video_features(pixels)
            expected = getattr(found, "pooler_output", found).flatten(0, -2)
            assert difference(engine.embeddings[0], expected) < 1e-5


@pytest.mark.parametrize("kind", ["glm4v", "glm4v_moe"])
def test_glm4v(tmp_path, kind):
    """Its tower in vLLM gets a clip as one row of the grid, in transformers each frame as one."""
    base = make_family_base(tmp_path / "base", kind)
    adapter = make_adapter(tmp_path / "sta", base)
    reference = Reference(base, adapter)
    with running(base, adapter) as engine:
        compare(engine, reference, meta=True)
        with reference.handle.disabled():
            assert difference(reference.embeddings(clips()[0][:, :, ::-1]), engine.embeddings[0]) > 0.05
        frames, image = clips()[1][:, ::-1].copy(), picture()
        text = "<|begin_of_image|><|image|><|end_of_image|>" * 2 + GLM_PROMPT
        media = {"video": with_metadata(frames), "image": [image, image[::-1].copy()]}
        engine.ask([{"prompt": text, "multi_modal_data": media}])
        [found] = [part for part in engine.embeddings if len(part) == 96]  # pictures have 16 tokens
        assert difference(found, reference.embeddings(frames)) < 1e-5


def test_lora_beside_sta(folders, tmp_path):
    from vllm.lora.request import LoRARequest

    base = folders["Qwen2VL"]["base"]
    export_adapter(folders["lora"], tmp_path / "out")
    lora = {"enable_lora": True, "enable_tower_connector_lora": True, "max_lora_rank": 32}
    with running(base, tmp_path / "out", **lora) as engine:
        request = LoRARequest("adapted", 1, str(tmp_path / "out"))
        compare(engine, Reference(base, folders["lora"]), meta=False, lora_request=request)


def test_lora_without_its_sta_is_refused(folders, tmp_path):
    """Also by an engine that serves no STA; in vLLM itself it answers without."""
    from vllm.lora.request import LoRARequest

    export_adapter(folders["lora"], tmp_path / "out")
    request = LoRARequest("adapted", 1, str(tmp_path / "out"))
    SERVED.clear()  # of engines that were closed in this process
    with (
        running(folders["Qwen2VL"]["base"], enable_lora=True, max_lora_rank=32) as engine,
        pytest.raises(CheckpointError, match="were trained with STA, and this engine serves none"),
    ):
        engine.ask([clip_prompt(clips()[0])], lora_request=request)


def test_a_merged_base(folders, tmp_path):
    base = folders["Qwen2VL"]["base"]
    export_merged(folders["lora"], tmp_path, str(base), dtype="fp32", device="cpu")
    with running(tmp_path / "base", tmp_path / "sta") as engine:
        compare(engine, Reference(base, folders["lora"]), meta=False)


def test_bfloat16(folders):
    base, adapter = folders["Qwen2VL"]["base"], folders["Qwen2VL"]["sta"]
    reference = Reference(base, adapter)
    with running(base, adapter, dtype="bfloat16") as engine:
        engine.ask([clip_prompt(clips()[0])])
        assert difference(engine.embeddings[0], reference.embeddings(clips()[0])) < 0.05


def int8_layers(model):
    """Of each linear layer in 8 bits: whether the processor has what vLLM's own kernel needs (AMX), the dtype of the
    weights that vLLM keeps, and whether oneDNN keeps them instead."""
    from vllm.model_executor.layers.utils import check_cpu_sgl_kernel

    layers = [layer for layer in model.modules() if hasattr(getattr(layer, "scheme", None), "kernel")]
    return [
        (
            check_cpu_sgl_kernel(layer.output_size_per_partition, layer.input_size_per_partition, torch.int8),
            getattr(layer.weight, "dtype", None),
            hasattr(layer.scheme.kernel, "dnnl_handler"),
        )
        for layer in layers
    ]


def test_a_quantized_base(folders, tmp_path):
    """A language model in 8 bits, as vLLM runs it on a CPU as well; STA and the encoder are not touched by it."""
    base, adapter = folders["Qwen2VL"]["base"], folders["Qwen2VL"]["sta"]
    reference, frames = Reference(base, adapter), clips()[0]
    with running(quantize_base(base, tmp_path / "int8"), adapter, dtype="bfloat16") as engine:
        [kept] = engine.llm.apply_model(int8_layers)
        assert len(kept) == 8  # qkv, o, gate_up and down, in two layers
        assert set(kept) <= {(True, torch.int8, False), (False, None, True)}
        [kinds] = engine.llm.apply_model(lambda model: {n: p.dtype for n, p in model.named_parameters()})
        assert {kind for name, kind in kinds.items() if ".sta." in name} == {torch.bfloat16}
        [(tokens, _)] = engine.ask([clip_prompt(frames)])
        assert len(tokens) == NEW_TOKENS
        assert difference(engine.embeddings[0], reference.embeddings(frames)) < 0.05
        with reference.handle.disabled():
            assert difference(reference.embeddings(frames), engine.embeddings[0]) > 0.1


REFUSED = {
    "no folder": (lambda f: {"hf_overrides": {"sta_adapter": "/no/where/else"}}, "there is no folder"),
    "typo": (lambda f: {"hf_overrides": {"sta_adaptor": "a/b"}}, "Did you mean 'sta_adapter'"),
    "another kind": (lambda f: {"adapter": f["Qwen2_5_VL"]["sta"]}, "which vLLM runs as Qwen2_5_VL"),
    "another class": (lambda f: {"adapter": f["Qwen2VL"]["sta"], "model_impl": "transformers"}, "by vLLM's own class"),
    "lora": (lambda f: {"adapter": f["lora"]}, "LoRA weights that nobody serves"),
    "no weights": (lambda f: {"adapter": f["Qwen2VL"]["sta"], "load_format": "dummy"}, "passes by its load_weights"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_start_is_refused(folders, case):
    options, message = REFUSED[case]
    with pytest.raises((CheckpointError, ConfigError, InjectionError, ValueError), match=message):
        Engine(folders["Qwen2VL"]["base"], **options(folders))


def test_an_encoder_in_an_engine_of_its_own(folders, tmp_path, monkeypatch):
    """What it gives reaches an engine without one, by identifiers that both make with the digest."""
    from vllm.config import ECTransferConfig

    monkeypatch.setattr("vllm.model_executor.layers.rotary_embedding._ROPE_DICT", {})  # of a tower that isn't built
    base, adapter = folders["Qwen2VL"]["base"], folders["Qwen2VL"]["sta"]
    reference, frames = Reference(base, adapter), clips()[0]
    inputs = reference.inputs(videos=[frames])

    def transfer(role):
        where = {"shared_storage_path": str(tmp_path)}
        settings = {"ec_connector": "ECExampleConnector", "engine_id": role, "ec_role": f"ec_{role}"}
        return {"ec_transfer_config": ECTransferConfig(**settings, ec_connector_extra_config=where)}

    told = {"multi_modal_uuids": {"video": ["mine"]}}
    with running(base, adapter, **transfer("producer")) as engine:
        engine.ask([{**clip_prompt(frames), **told}])
        [name] = engine.identifiers
    with running(base, adapter, limit_mm_per_prompt={"image": 0, "video": 0}, **transfer("consumer")) as engine:
        media = {"video": {"video_embeds": None, "video_grid_thw": inputs["video_grid_thw"]}}
        [(tokens, _)] = engine.ask([{"prompt": PROMPT, "multi_modal_data": media, **told}])
        assert engine.identifiers == [name]
        assert tokens == reference.answer(inputs)[0]
        assert engine.llm.apply_model(lambda model: type(model.visual).__name__) == ["StageMissingLayer"]


PARALLEL = """
import sys, torch
sys.path[:0] = {paths!r}
import conftest
from engines import Engine, clip_prompt, clips
if __name__ == "__main__":
    engine = Engine({base!r}, {adapter!r}, tensor_parallel_size=2, mm_encoder_tp_mode={mode!r})
    torch.save([engine.ask([clip_prompt(c)])[0][0] for c in clips()], {out!r})
"""


@pytest.mark.parametrize("mode", ["weights", "data"])
def test_two_ranks(folders, tmp_path, mode):
    base, adapter = folders["Qwen2VL"]["base"], folders["Qwen2VL"]["sta"]
    here = Path(__file__).parent
    script, out = tmp_path / "run.py", tmp_path / "tokens.pt"
    facts = {"base": str(base), "adapter": str(adapter), "mode": mode, "out": str(out)}
    script.write_text(PARALLEL.format(paths=[str(here), str(here.parent)], **facts))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    reference = Reference(base, adapter)
    assert torch.load(out) == [reference.answer(reference.inputs(videos=[c]))[0] for c in clips()]


def test_served_over_http_from_the_hub(folders, tmp_path):
    """`sta-adapter serve` with ids of a Hub on loopback; a clip in an mp4, read as training reads it."""
    base = folders["Qwen2VL"]["base"]
    adapter = copy_folder(folders["Qwen2VL"]["sta"], tmp_path / "sta")
    description = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(
        json.dumps({**description, "base_model": {**description["base_model"], "id": "ann/base"}})
    )
    file = write_video(tmp_path / "clip.mp4", moving_square("left", size=64, count=16), fps=4)
    with HubServer(tokens={"hf_ann": "ann"}) as hub:
        for name, folder in (("ann/base", base), ("ann/sta", adapter)):
            hub.upload(
                name, {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
            )
        environment = hub.environment(tmp_path / "home", "hf_ann")
        command = [str(Path(sys.executable).with_name("sta-adapter")), "serve", "--model", "ann/base", "--adapter"]
        refused = subprocess.run([*command, "ann/none"], capture_output=True, text=True, env=environment, timeout=120)
        assert refused.returncode == 1
        assert "ann/none" in refused.stderr
        with _serving([*command, "ann/sta"], environment, tmp_path / "log") as address:
            answer = _ask(address, _data("video/mp4", file.read_bytes()), "ann/base")
            single = moving_square(
                "left", size=16, count=40
            )  # frames that a request sends one by one, in their own size
            sent = _ask(address, _data("video/jpeg", *map(_jpeg, single)), "ann/base")
    reference = Reference(base, adapter)
    reader: ClipReader = trained_reader(str(base), str(adapter))
    frames = reader.read([{"type": "video", "video": str(file)}])[0].pixels
    message = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Which way?"}]}]
    text = reference.processor.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    inputs = reference.processor(text=[text], videos=[list(frames)], do_resize=False, return_tensors="pt")
    assert answer["usage"]["prompt_tokens"] == inputs["input_ids"].shape[1]
    of_all = reference.processor(text=[text], videos=[list(single)], do_resize=False, return_tensors="pt")
    assert sent["usage"]["prompt_tokens"] == of_all["input_ids"].shape[1]
    _, scores = reference.answer(inputs)
    found = [entry["logprob"] for entry in answer["choices"][0]["logprobs"]["content"]]
    assert len(found) == len(scores)
    assert all(abs(a - b.max().item()) < 1e-3 for a, b in zip(found, scores, strict=True))


@contextlib.contextmanager
def _serving(command, environment, log):
    """The address of a server that is ready; it ends with the context."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = f"--host 127.0.0.1 --port {port} --dtype float32 --enforce-eager --max-model-len 512".split()
    with log.open("w") as target:
        server = subprocess.Popen(
            [*command, "--", *options], stdout=target, stderr=target, start_new_session=True, env=environment
        )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(150):
            assert server.poll() is None, log.read_text()[-3000:]
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=5):
                break
            time.sleep(2)
        else:
            pytest.fail(log.read_text()[-3000:])
        yield address
    finally:
        if server.poll() is None:
            os.killpg(server.pid, 15)
        server.wait(60)


def _jpeg(frame):
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG")
    return file.getvalue()


def _data(kind, *parts):
    return f"data:{kind};base64,{','.join(base64.b64encode(part).decode() for part in parts)}"


def _ask(address, video, model):
    content = [{"type": "video_url", "video_url": {"url": video}}, {"type": "text", "text": "Which way?"}]
    body = {
        "model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 8, "temperature": 0,
        "logprobs": True, "ignore_eos": True,
    }  # fmt: skip
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.loads(response.read())
