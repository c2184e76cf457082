"""Encoded samples on disk: the same to the bit, keyed by all that they depend on, and no run is lost for a bad file or disk."""

import errno
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from tiny_qwen import make_processor, moving_square, write_samples, write_video
from torch.utils.data import DataLoader

from sta_adapter.data import BadSample, FrameSettings, VideoDataset, sample_cache
from sta_adapter.data.sample_encoder import SampleEncoder
from sta_adapter.errors import ConfigError

AS_IS = FrameSettings(min_tokens=None, max_tokens=None)


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return make_processor(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    return write_samples(tmp_path_factory.mktemp("clips"), 3).parent


@pytest.fixture
def clips(originals, tmp_path):
    return shutil.copytree(originals, tmp_path / "clips") / "data.jsonl"


@pytest.fixture
def decodes(monkeypatch):
    """How many samples were decoded."""
    made, usual = [], SampleEncoder.visuals
    monkeypatch.setattr(SampleEncoder, "visuals", lambda *args: made.append(args[-1]) or usual(*args))
    return made


def entries(folder):
    return sorted(Path(folder).rglob("*.safetensors"))


def same(one, other):
    assert list(one) == list(other)
    assert all(torch.equal(one[key], other[key]) and one[key].dtype == other[key].dtype for key in one)


def test_a_kept_sample_is_the_same_to_the_bit(clips, processor, tmp_path, decodes):
    plain = VideoDataset(clips, processor, frames=AS_IS)
    expected = [plain[index] for index in range(3)]
    decodes.clear()
    for _ in range(2):  # another data set, as in another run
        data = VideoDataset(clips, processor, frames=AS_IS, cache=tmp_path / "cache")
        for index in (*range(3), *range(3)):
            same(data[index], expected[index])
            assert data[index].source == expected[index].source
    assert len(decodes) == len(entries(tmp_path / "cache")) == 3
    assert not data.cached  # so that workers still load it
    if hasattr(transformers, "Qwen2VLVideoProcessor"):  # earlier ones compute in float64, which bytes don't give back
        sizes = [file.stat().st_size for file in entries(tmp_path / "cache")]
        assert max(sizes) < expected[0]["pixel_values_videos"].nbytes / 2


def test_workers_share_it(clips, processor, tmp_path):
    data = VideoDataset(clips, processor, frames=AS_IS, cache=tmp_path / "cache")
    expected = [VideoDataset(clips, processor, frames=AS_IS)[index] for index in range(3)]
    for _ in range(2):
        items = list(DataLoader(data, batch_size=None, sampler=[0, 0, 1, 2, 2, 0], num_workers=2))
        for index, item in zip([0, 0, 1, 2, 2, 0], items, strict=True):
            same(item, expected[index])
    assert len(entries(tmp_path / "cache")) == 3
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def change_words(clips, processor):
    clips.write_text(clips.read_text().replace("Which way?", "Where to?"))


def change_clip(clips, processor):
    write_video(clips.parent / "0.mp4", moving_square("right", 5))


def change_time(clips, processor):
    os.utime(clips.parent / "0.mp4", ns=(1, 1))


def change_part(clips, processor):
    clips.write_text(clips.read_text().replace('"nframes": 4', '"nframes": 2'))


def change_processor(clips, processor):
    for part in (processor.image_processor, getattr(processor, "video_processor", None)):
        if part is not None:
            part.image_mean = [0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("change", "options"),
    [
        *[(change, {}) for change in (change_words, change_clip, change_time, change_part, change_processor)],
        (None, {"frames": FrameSettings(min_tokens=None, max_tokens=None, backend="pyav")}),
        (None, {"frames": FrameSettings(max_tokens=None)}),
        (None, {"prompts": True}),
        (None, {"frame_order": "reversed"}),
        (None, {"frame_order": "shuffled"}),
        (None, {"max_length": 500}),
    ],
    ids=[
        "words",
        "clip",
        "time",
        "sampling",
        "processor",
        "backend",
        "size",
        "prompts",
        "reversed",
        "shuffled",
        "length",
    ],
)
def test_it_is_made_again_when_what_it_depends_on_changed(clips, processor, tmp_path, decodes, change, options):
    cache = tmp_path / "cache"
    assert not isinstance(VideoDataset(clips, processor, frames=AS_IS, cache=cache)[0], BadSample)
    usual = list(processor.image_processor.image_mean)
    try:
        if change is not None:
            change(clips, processor)
        data = VideoDataset(clips, processor, cache=cache, **{"frames": AS_IS, **options})
        expected = VideoDataset(clips, processor, **{"frames": AS_IS, **options})[0]
        decodes.clear()
        same(data[0], expected)
        assert len(decodes) == 1
        same(data[0], expected)
        assert len(decodes) == 1
    finally:
        for part in (processor.image_processor, getattr(processor, "video_processor", None)):
            if part is not None:
                part.image_mean = usual


def test_the_same_clip_twice_is_kept_once_unless_each_sample_mixes_its_frames(clips, processor, tmp_path, decodes):
    twice = [json.loads(clips.read_text().splitlines()[0])] * 2
    for sample in twice:
        sample["messages"][0]["content"][0]["video"] = str(clips.parent / "0.mp4")
    for order, times in (("ordered", 1), ("shuffled", 2)):
        how = {"frames": AS_IS, "frame_order": order}
        expected = [VideoDataset(twice, processor, **how)[index] for index in range(2)]
        decodes.clear()
        for index in range(2):
            same(VideoDataset(twice, processor, cache=tmp_path / order, **how)[index], expected[index])
        assert len(decodes) == times


def test_versions_are_part_of_the_key(clips, processor, tmp_path, monkeypatch, decodes):
    for version in ("1", "2", "1"):
        monkeypatch.setattr("sta_adapter.data.sample_cache._versions", lambda found=version: {"transformers": found})
        assert VideoDataset(clips, processor, frames=AS_IS, cache=tmp_path / "cache")[0]
    assert len(decodes) == 2


def test_the_place_of_a_clip_is_not(clips, processor, tmp_path, decodes):
    VideoDataset(clips, processor, frames=AS_IS, cache=tmp_path / "cache")[0]
    moved = shutil.copytree(clips.parent, tmp_path / "moved") / clips.name  # with its times
    VideoDataset(moved, processor, frames=AS_IS, cache=tmp_path / "cache")[0]
    assert len(decodes) == 1


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "other bytes", "another's", "unknown name"])
def test_a_damaged_entry_is_noticed_and_made_again(clips, processor, tmp_path, decodes, caplog, damage):
    data = VideoDataset(clips, processor, frames=AS_IS, cache=tmp_path / "cache")
    expected = data[0]
    (file,) = entries(tmp_path / "cache")
    good = file.read_bytes()
    if damage == "another's":
        data[1]
        (other,) = set(entries(tmp_path / "cache")) - {file}
        file.write_bytes(other.read_bytes())
    else:
        file.write_bytes(
            {
                "flip": good[:-100] + bytes([good[-100] ^ 1]) + good[-99:],
                "cut": good[: len(good) // 2],
                "empty": b"",
                "other bytes": b"\xff" * 1000,
                "unknown name": good.replace(b"input_ids", b"input_idz"),
            }[damage]
        )
    decodes.clear()
    same(data[0], expected)
    assert len(decodes) == 1
    assert "is damaged" in caplog.text
    same(data[0], expected)
    assert len(decodes) == 1


@pytest.mark.parametrize("fault", ["full while writing", "nearly full"])
def test_a_full_disk_is_said_once_and_nothing_else_changes(clips, processor, tmp_path, monkeypatch, caplog, fault):
    data = VideoDataset(clips, processor, frames=AS_IS, cache=tmp_path / "cache")
    data[0]
    if fault == "nearly full":
        monkeypatch.setattr(sample_cache.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 8, 1))
    else:

        def replace(*paths):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(sample_cache.os, "replace", replace)
    expected = VideoDataset(clips, processor, frames=AS_IS)
    for index in (1, 2, 0):
        same(data[index], expected[index])
    said = [record.message for record in caplog.records if "no more samples are kept in the cache" in record.message]
    assert len(said) == 1
    assert len(entries(tmp_path / "cache")) == 1
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_bad_samples_are_not_kept(clips, processor, tmp_path):
    data = VideoDataset(clips, processor, frames=AS_IS, cache=tmp_path / "cache")
    clip = clips.parent / "0.mp4"
    away = clip.rename(tmp_path / "away.mp4")
    assert isinstance(data[0], BadSample)
    assert entries(tmp_path / "cache") == []
    away.rename(clip)
    assert not isinstance(data[0], BadSample)


def test_a_cache_that_is_a_file(clips, processor):
    with pytest.raises(ConfigError, match="is no folder and none can be made"):
        VideoDataset(clips, processor, cache=clips)


def test_values_that_are_no_bytes_stay_as_they_are(tmp_path):
    odd = torch.rand(4, 12)
    values = {"pixel_values": odd, "labels": torch.arange(3)}
    packed = sample_cache._packed(values, "k", (1 / 255, [0.5] * 3, [0.5] * 3))
    found = sample_cache._unpacked(packed, "k")
    assert torch.equal(found["pixel_values"], odd)
    assert found["labels"].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="another sample"):
        sample_cache._unpacked(packed, "l")


def flipped(data, number):
    data[number * 7919 % len(data)] ^= 1 << number % 8


def cut_or_longer(data, number):
    return data[: -1 - number] if number % 2 else np.append(data, np.zeros(number, np.uint8))


def words(data):
    """Those of its values, which the file has after a header, up to the last whole row of the checksum."""
    values = data[8 + int.from_bytes(data[:8].tobytes(), "little") :]
    return values[: len(values) // sample_cache.ROW * sample_cache.ROW].view("<u8")


def cancelling(data, number):
    words(data)[[0, number]] += np.array([1, -1]).astype("<u8")  # so that the sum of both stays


def words_swapped(data, number):
    words(data)[[0, number]] = words(data)[[number, 0]]


def blocks_swapped(data, number):
    rows = words(data).reshape(-1, sample_cache.ROW // 8)
    rows[[0, 1 + number % 4]] = rows[[1 + number % 4, 0]]


@pytest.mark.parametrize("damage", [flipped, cut_or_longer, cancelling, words_swapped, blocks_swapped])
def test_no_damage_goes_unnoticed(damage):
    values = {"values": torch.from_numpy(np.random.default_rng(0).integers(0, 256, 5 * 4096 + 40, np.uint8))}
    good = sample_cache._packed({**values, "ids": torch.arange(700)}, "k", (None, None, None))
    assert torch.equal(sample_cache._unpacked(good, "k")["values"], values["values"])
    for number in range(1, 2000):
        data = np.array(bytearray(good))
        found = damage(data, number)
        with pytest.raises(sample_cache.DAMAGE):
            sample_cache._unpacked((data if found is None else found).tobytes(), "k")


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16, torch.int32, torch.int16, torch.int8, torch.bool])
def test_tensors_of_other_kinds_are_kept(kind):
    values = {"whole": torch.arange(6).view(2, 3).to(kind), "none": torch.zeros(0, 3, dtype=kind), "one": torch.tensor(1, dtype=kind)}  # fmt: skip
    packed = sample_cache._packed(values, "k", (None, None, None))
    same(sample_cache._unpacked(packed, "k"), values)
    assert list(safetensors.torch.load(packed)) != []  # others can read it


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (1, 2, 3, 4, 4), (6, 12)], ids=["frames", "clips", "patches"])
def test_pixel_values_of_any_form_lie_as_bytes(shape):
    codes, scale = torch.arange(math.prod(shape)).mul(5).remainder(256).to(torch.uint8).view(shape), (1 / 255, [0.5] * 3, [0.25] * 3)  # fmt: skip
    values = sample_cache._from_bytes(codes, torch.tensor(scale[1:]) * 255)
    found = sample_cache._as_bytes(values, *scale)
    assert torch.equal(found[0], codes)
    assert sample_cache._as_bytes(values.double(), *scale) is None


def test_the_versions_of_all_that_makes_a_sample():
    assert {"sta-adapter", "torch", "torchvision", "transformers", "tokenizers", "numpy", "pillow", "av"} <= set(sample_cache._versions())  # fmt: skip


def test_shards_are_kept_too(clips, processor, tmp_path, decodes):
    pytest.importorskip("webdataset")
    import tarfile

    from sta_adapter.data.stream import StreamDataset

    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number, line in enumerate(clips.read_text().splitlines()):
            (clips.parent / f"{number}.json").write_text(json.dumps(json.loads(line)))
            for name in (f"{number}.json", f"{number}.mp4"):
                tar.add(clips.parent / name, name)
    shards = StreamDataset(tmp_path / "a.tar", processor, frames=AS_IS, passes=2, cache=tmp_path / "cache")
    found = list(shards)
    assert len(found) == 6
    assert not [item for item in found if isinstance(item, BadSample)]
    assert len(decodes) == len(entries(tmp_path / "cache")) == 3
    VideoDataset(tmp_path / "a.tar", processor, frames=AS_IS, cache=tmp_path / "looked up")[0]
    assert len(entries(tmp_path / "looked up")) == 1
