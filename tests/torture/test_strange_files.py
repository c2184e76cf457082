"""Files from strangers other than whole adapters: LoRA's settings, runs beside an adapter, shards, records, pictures."""

import ast
import copy
import dataclasses
import gzip
import io
import json
import re
import struct
import tarfile
import zlib

import numpy as np
import pytest
import torch
import yaml
from guarded import counts, guarded
from make_benchmarks import mvbench, ssv2_t10, tempcompass, videomme, vitatecs
from make_videos import write
from mutations import JUNK, deep, flip, pick, settings
from PIL import Image
from safetensors.torch import load, save
from test_strangers import state_of, untouched
from toy import ToyEncoder

from sta_adapter import get_sta, inject_sta
from sta_adapter.adapter.format import read_description
from sta_adapter.adapter.model_card import CardFacts, make_card, read_run
from sta_adapter.data.bad_sample import BadSample
from sta_adapter.data.formats import FORMATS
from sta_adapter.data.samples import open_samples
from sta_adapter.data.shards import read_shard
from sta_adapter.evaluation.benchmarks import load_benchmark
from sta_adapter.loading import load_adapter
from sta_adapter.training import TrainingConfig
from sta_adapter.video import read_clip
from sta_adapter.video.image import read_image

CASES, CHUNK = counts("FILES", 1500), 500
chunks = pytest.mark.parametrize("chunk", range(max(1, CASES // CHUNK)))


def cases(chunk, seed):
    for case in range(chunk * CHUNK, (chunk + 1) * CHUNK):
        yield case, np.random.default_rng([2026, seed, case])


# ---- adapters of LoRA: every field, ranks, patterns

NESTED = "a"
for _ in range(300):
    NESTED = [NESTED]
VALUES = [
    *JUNK, 400_000, 8193, 1 << 31, 1e300, -1, False, "pissa", "olora", "eva", "corda", "loftq", "gaussian", "all-linear",
    "q" * 100_000, r"(.*)*x", r"(a|a|a)*$", ".*.*.*.*.*attn", "(?P<n>attn)", "attn|" * 3000 + "attn", NESTED,
    ["attn"] * 6000, [f"{i}.*a.*" for i in range(600)], {"attn": 400_000}, {".*": 8}, {"(.*)*": 4}, {"attn": "4"},
    {f"a{i}": 2 for i in range(6000)}, {f"{i}.*x.*": 2 for i in range(400)}, {"attn": 1e400}, {"attn": float("nan")},
    {"attn": {"attn": 2}}, ["sta"], ["patch_embed"], [0], {"megatron_core": "trap"}, ["blocks.0.attn", "blocks.1.attn"],
]  # fmt: skip
RANKS = [0, 1, 3, 8192, 400_000, 1 << 40]


@pytest.fixture(scope="module", params=["lora", "sta and lora"])
def adapter(request, tmp_path_factory):
    """Contents of an adapter of LoRA, and whether STA is in it."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    folder, model = tmp_path_factory.mktemp("good"), ToyEncoder(depth=2)
    if request.param == "lora":
        get_peft_model(model, LoraConfig(target_modules=["attn"], r=2)).save_pretrained(folder)
    else:
        handle = inject_sta(model)
        get_sta(get_peft_model(handle.model, handle.lora_config(target_modules=["attn"], r=2))).save_pretrained(folder)
    names = {"adapter_config.json", "adapter_model.safetensors", "sta_config.json", "sta_adapter.safetensors"}
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name in names}


def attack_lora(files, tmp_path, attacks):
    """Load each; how many were refused."""
    torch.manual_seed(0)
    base = ToyEncoder(depth=2)
    before, weights = state_of(base), {k: v.clone() for k, v in base.state_dict().items()}
    refused = 0
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    for case, changed in attacks:
        for name, data in changed.items():
            (folder / name).write_bytes(data)
        model = copy.deepcopy(base)
        error = guarded(case, lambda model=model: load_adapter(model, folder))
        if error is None:
            assert all(p.isfinite().all() for p in model.parameters()), case
        else:
            refused += 1
            assert untouched(model, before, weights), f"{case}: {error}"
        assert sorted(p.name for p in folder.iterdir()) == sorted(files), case
    return refused


def test_every_field_of_lora(adapter, tmp_path):
    from peft import LoraConfig

    good = json.loads(adapter["adapter_config.json"])
    fields = sorted({*good, *(entry.name for entry in dataclasses.fields(LoraConfig)), "megatron_config", "auto_map"})

    def attacks():
        for field in fields:
            for value in VALUES:
                text = json.dumps({**good, field: value}).encode("utf-8", "surrogatepass")
                yield f"{field} = {str(value)[:60]}", {"adapter_config.json": text}

    refused = attack_lora(adapter, tmp_path, attacks())
    assert len(fields) * len(VALUES) / 4 < refused < len(fields) * len(VALUES)


def test_ranks_that_settings_and_weights_claim(adapter, tmp_path):
    good = json.loads(adapter["adapter_config.json"])
    state = load(adapter["adapter_model.safetensors"])

    def attacks():
        for rank in RANKS:
            for shape in ((2, rank), (rank, 2), (rank,), ()):
                changed = dict(state)
                name = next(key for key in state if "lora_A" in key)
                small = [min(size, 4) for size in shape]
                changed[name] = torch.zeros(small)
                raw = save(changed, {"format": "pt"})
                (length,) = struct.unpack("<Q", raw[:8])
                header = json.loads(raw[8 : 8 + length])
                header[name]["shape"] = list(shape)
                text = json.dumps(header).encode()
                files = {
                    "adapter_model.safetensors": struct.pack("<Q", len(text)) + text + raw[8 + length :],
                    "adapter_config.json": json.dumps({**good, "r": rank}).encode(),
                }
                yield f"rank {rank}, shape {shape}", files

    assert attack_lora(adapter, tmp_path, attacks()) == 4 * len(RANKS)


# ---- runs beside an adapter, in its card

HOSTILE = [
    *JUNK, "<script>alert(1)</script>", "[x](http://evil.example)", '"; import os; os.system("id")  #', "\n# pwned\n",
    "```\n\n# pwned\n```python\nimport os\nos.system('id')", "---\nlicense: evil\n---", "| a | b |\n|---|---|", "<!-- ",
    "![x](http://evil.example/x.png)", "{{ 7 * 7 }}", "'''", '"""', "\\", "\r\n# pwned", "`id`", "$(id)", "\u2028# pwned",
    "<img src=x onerror=alert(1)>", "&lt;script&gt;", "javascript:alert(1)", "https://evil.example",
]  # fmt: skip


def poison(root, rng):
    """A value replaced, at any depth."""
    place = root = copy.deepcopy(root)
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return root
        key = pick(rng, keys)
        if not isinstance(place[key], dict | list) or rng.random() < 0.2:
            if isinstance(place, dict) and rng.random() < 0.2:
                place[str(pick(rng, HOSTILE))] = place.pop(key)
            else:
                place[key] = pick(rng, HOSTILE)
            return root
        place = place[key]


SCORE = {"accuracy": 0.8125, "low": 0.7, "high": 0.9, "correct": 13, "total": 16}
BESIDE = {
    "run.json": {
        **{"stage": "both", "learning_rate": 1e-4, "schedule": "cosine", "batch_size": 64, "lora_rank": 16},
        **{"model": "org/base", "positions": "original", "data": "digest", "epochs": 1.0},
        "frames": {"fps": 2.0, "nframes": None, "min_frames": 4, "max_frames": 8, "backend": "decord"},
    },
    "results.json": {
        "base": {"ordered": {"overall": SCORE}},
        "adapter": {"ordered": {"overall": SCORE}, "shuffled": {"overall": SCORE}},
        "reading": ["Better than the base."],
        "benchmark": "mvbench",
        "data": "clips.jsonl",
    },
    "stage1/result.json": {"steps": 4, "trainable_parameters": 9, "history": [{"loss": 2.5}, {"loss": 0.1}]},
}


@chunks
def test_cards_of_poisoned_runs(tmp_path, chunk):
    inject_sta(ToyEncoder(depth=2)).save_pretrained(tmp_path)
    (tmp_path / "stage1").mkdir()
    description = json.loads((tmp_path / "sta_config.json").read_text())
    refused = 0
    for case, rng in cases(chunk, 1):
        files = {**BESIDE, "sta_config.json": description}
        for name in pick(rng, [[name] for name in files] + [sorted(files)]):
            files[name] = poison(files[name], rng)
        for name, value in files.items():
            (tmp_path / name).write_bytes(json.dumps(value).encode("utf-8", "surrogatepass"))
        cards = []

        def make(cards=cards):
            found, run = read_description(tmp_path), read_run(tmp_path)
            facts = CardFacts("user/adapter", parameters=9, run=run, base_model="org/base")
            cards.append(make_card({**found, "frames": run.get("frames", {})}, facts))

        refused += guarded(f"case {case}", make) is not None
        for card in cards:
            check_card(card, f"case {case}")
    assert CHUNK / 8 < refused < CHUNK


def check_card(card, case):
    """Nothing of a stranger's is code or markup in it."""
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head).get("license") is None, case
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", body, re.M | re.S)
    outside = re.sub(r"^```(\w*)\n(.*?)^```$", "", body, flags=re.M | re.S)
    for language, code in blocks:
        if language == "python":
            names = {n.id for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Name)}
            assert not names & {"os", "eval", "exec", "__import__"}, case
    assert not re.search(r"<script|<img|\]\(http[^)]*evil|^# pwned|<!--", outside, re.M), case
    assert body.count("```") == 2 * len(blocks), case


# ---- shards


def spoilt_tar(rng):
    """A small shard of which headers and members are not what they say."""
    packed = io.BytesIO()
    kinds = [tarfile.REGTYPE, tarfile.REGTYPE, tarfile.GNUTYPE_SPARSE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE]
    kinds += [tarfile.XGLTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE, b"Q", b"\xff"]
    record = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    for number in range(4):
        name = pick(
            rng, [f"{number}.json", f"{number}.mp4", "../../etc/x.json", "/etc/passwd", "a/b/c", "", ".", "x" * 90]
        )
        data = pick(rng, [json.dumps(record).encode(), b"[" * 100_000, rng.bytes(600), b"", b"null", b"9" * 6000])
        info = tarfile.TarInfo(name)
        info.size = len(data) if rng.random() < 0.5 else pick(rng, [0, 1, 1 << 20, 1 << 31, 1 << 40, (1 << 62)])
        info.type, info.linkname = pick(rng, kinds), pick(rng, ["", "../../etc/passwd", f"{number}.json"])
        packed.write(info.tobuf(tarfile.GNU_FORMAT, errors="surrogateescape"))
        packed.write(data + bytes(-len(data) % 512))
    data = packed.getvalue() + bytes(pick(rng, [0, 512, 1024, 20_000]))
    if rng.random() < 0.3:
        data = flip(data, rng)
    if rng.random() < 0.3:
        data = gzip.compress(data + bytes(pick(rng, [0, 1 << 22])))
        data = flip(data, rng) if rng.random() < 0.3 else data
    return data


@chunks
def test_shards_that_lie(tmp_path, chunk):
    found = []
    for case, rng in cases(chunk, 2):
        path = tmp_path / "x.tar"
        path.write_bytes(spoilt_tar(rng))

        def read(lookup, path=path, case=case):
            for count, item in enumerate(read_shard(path, lookup=lookup)):
                assert count < 100, case
                found.append(item)

        guarded(f"case {case}", lambda read=read: read(False))
        guarded(f"case {case}, looked up", lambda read=read: read(True))
    assert 0 < sum(isinstance(item, BadSample) for item in found) < len(found)
    assert [p.name for p in tmp_path.iterdir()] == ["x.tar"]


# ---- records, settings, annotations

PART = {"type": "video", "video": "a.mp4", "fps": 2.0, "video_start": 1, "video_end": 2.5, "max_pixels": 5000}
RECORDS = [
    {"messages": [{"role": "user", "content": [PART, {"type": "text", "text": "?"}]}, {"role": "assistant", "content": "b"}]},
    {"video": "a.mp4", "conversations": [{"from": "human", "value": "<video>\n?"}, {"from": "gpt", "value": "b"}]},
    {"video": "a.mp4", "question": "?", "options": ["a", "b"], "answer": "a", "category": "c", "start": 1, "end": 2},
    {"id": "1", "label": "holding something", "template": "Holding [something]", "placeholders": ["a"]},
]  # fmt: skip


def spoilt(value, rng):
    data = json.dumps(value).encode()
    for _ in range(pick(rng, [1, 1, 2, 3])):
        try:
            data = pick(rng, [settings, settings, settings, flip])(data, rng)
        except (ValueError, TypeError, RecursionError):
            data = flip(data, rng)
    return deep(data, rng) if rng.random() < 0.03 else data


@chunks
def test_records_of_wrong_types(tmp_path, chunk):
    usable, refused = 0, 0
    for case, rng in cases(chunk, 3):
        name = pick(rng, ["d.jsonl", "d.json", "d.csv"])
        records = [spoilt(pick(rng, RECORDS), rng) for _ in range(2)]
        text = b"\n".join(records) if name != "d.json" else b"[" + b",".join(records) + b"]"
        if name == "d.csv":
            text = b"video,question,answer\n" + b"\n".join(b",".join([flip(b"a.mp4", rng), r[:200]]) for r in records)
        (tmp_path / name).write_bytes(text)
        how = {"format": pick(rng, [None, None, *FORMATS])}
        found = []
        error = guarded(f"case {case}", lambda p=tmp_path / name, h=how, f=found: f.extend(open_samples(p, **h)))
        usable += any(sample.problem is None for sample in found)
        refused += error is not None or any(sample.problem is not None for sample in found)
        (tmp_path / name).unlink()
    assert usable > CHUNK / 20
    assert refused > CHUNK / 3


@chunks
def test_settings_of_wrong_types(tmp_path, chunk):
    good = {
        "learning_rate": 1e-4,
        "max_steps": 4,
        "frames": {"fps": 2, "max_frames": 8},
        "sta_config": {"causal": True},
    }
    good |= {"stage1": {"learning_rate": 1e-3}, "stage2": {"lora_rank": 4}, "report_to": "none", "keep_best": False}
    file, refused = tmp_path / "run.yaml", 0
    for case, rng in cases(chunk, 4):
        file.write_bytes(spoilt(good, rng))
        refused += guarded(f"case {case}", lambda: TrainingConfig.from_yaml(file)) is not None
    assert CHUNK / 3 < refused < CHUNK


BENCHMARKS = {
    **{"mvbench": mvbench, "vitatecs": vitatecs, "tempcompass": tempcompass, "videomme": videomme, "ssv2-t10": ssv2_t10}
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_annotations_of_wrong_types(tmp_path, name):
    BENCHMARKS[name](tmp_path)
    files = [path for path in sorted(tmp_path.rglob("*")) if path.suffix in (".json", ".jsonl", ".csv", ".parquet")]
    refused = 0
    for case in range(CHUNK // 2):
        rng = np.random.default_rng([2026, 5, case])
        file = pick(rng, files)
        good = file.read_bytes()
        try:
            file.write_bytes(spoilt(json.loads(good), rng))
        except ValueError:
            file.write_bytes(flip(good, rng))
        refused += guarded(f"case {case}, {file.name}", lambda: load_benchmark(name, tmp_path)) is not None
        file.write_bytes(good)
    assert refused > CHUNK / 20


# ---- giant frames and pictures

SIDES = [0, 1, 17, 4000, 8193, 16_384, 32_768, 65_535]


def claim_jpeg(data, width, height):
    """JPEG frames with another size in their headers."""
    found = re.sub(rb"(\xff\xc0..\x08)....", lambda m: m[1] + struct.pack(">HH", height, width), data, flags=re.S)
    assert found != data
    return found


def claim_png(data, width, height):
    """PNG pictures with another size in their headers, and the checksums that go with it."""
    parts = data.split(b"IHDR")
    assert len(parts) > 1
    for number in range(1, len(parts)):
        body = b"IHDR" + struct.pack(">II", width, height) + parts[number][8:13]
        parts[number] = body[4:] + struct.pack(">I", zlib.crc32(body)) + parts[number][17:]
    return b"IHDR".join(parts)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Contents of pictures and clips of small frames."""
    folder = tmp_path_factory.mktemp("small")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8))
    for name in ("a.png", "a.jpg"):
        picture.save(folder / name)
    write(folder / "png.avi", codec="png", pix_fmt="rgb24", count=3)
    write(folder / "jpeg.avi", codec="mjpeg", pix_fmt="yuvj420p", count=3)
    write(folder / "jpeg.mkv", codec="mjpeg", pix_fmt="yuvj420p", count=3)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "png.avi", "jpeg.avi", "jpeg.mkv"])
def test_frames_of_any_size(small, tmp_path, name):
    """Only what the file says is read before it is refused; what is read is at most one 8k frame at a time."""
    claim = claim_png if "png" in name else claim_jpeg
    read = read_image if name.startswith("a.") else lambda path: read_clip(path, num_frames=2)
    refused = 0
    for width in SIDES:
        for height in SIDES:
            (tmp_path / name).write_bytes(claim(small[name], width, height))
            case = f"{name}, {width}x{height}"
            refused += guarded(case, lambda: read(tmp_path / name), seconds=60, megabytes=1200) is not None
    assert refused > len(SIDES) ** 2 / 2
