"""Training from tar shards: who reads what, in which order, what is bad, and where a run goes on."""

import io
import itertools
import json
import logging
import tarfile
import time
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_training import AS_IS, FAST, folder, make_model, processor  # noqa: F401
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from sta_adapter.data import BadSample
from sta_adapter.data import stream as streaming
from sta_adapter.data.clip_reader import ClipReader
from sta_adapter.data.shards import find_shards, read_shard
from sta_adapter.data.stream import StreamDataset, StreamPosition, stream_loader
from sta_adapter.data.worker_process import worker_errors
from sta_adapter.errors import ConfigError, DataError
from sta_adapter.training import TrainingConfig, train
from sta_adapter.training.two_stage import _opened

pytest.importorskip("webdataset")


def write_tar(path, members):
    """A tar of names and contents."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_keys(path, shards, each):
    """Shards of samples that are known by their names alone."""
    path.mkdir(exist_ok=True)
    for shard in range(shards):
        names = [f"{shard}{number:03d}" for number in range(each + shard % 2)]  # of uneven size
        write_tar(path / f"train-{shard:03d}.tar", [(f"{name}.json", {"messages": []}) for name in names])
    return str(path / f"train-{{000..{shards - 1:03d}}}.tar")


class Keys(StreamDataset):
    """Gives where each sample stands in the place of its tensors."""

    def _load(self, packed):
        return packed.source.rsplit(", ")[-1]


def keys_of(pattern):
    return sorted(item.source.rsplit(", ")[-1] for path in find_shards(pattern) for item in read_shard(path))


@pytest.fixture(scope="module")
def shards(tmp_path_factory, folder):  # noqa: F811
    """The clips of the tests of training in four shards of two, one of them a `.jsonl`."""
    path = tmp_path_factory.mktemp("shards")
    records = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    for shard in range(4):
        members = []
        for index in (2 * shard, 2 * shard + 1):
            records[index]["messages"][0]["content"][0]["video"] = f"clip{index}.mp4"
            suffix = "jsonl" if index == 5 else "json"
            members.append((f"train/clip{index}.mp4", (folder / f"{index}.mp4").read_bytes()))
            members.append((f"train/clip{index}.{suffix}", records[index]))
        write_tar(path / f"train-{shard}.tar", members)
    return path


# ---- who reads what


@pytest.mark.parametrize("workers", [0, 2], ids=["no_workers", "two_workers"])
@pytest.mark.parametrize("processes", [1, 2], ids=["one_process", "two_processes"])
def test_each_sample_comes_once_a_pass(tmp_path, processor, processes, workers):  # noqa: F811
    pattern = write_keys(tmp_path, 5, 3)
    dataset = Keys(pattern, processor, passes=1, shuffle=4)
    seen = []
    for process in range(processes):
        place = StreamPosition(process, processes, workers, batch_size=2)
        seen.append([key for batch in stream_loader(dataset, place, list) for key in batch])
    assert all(seen)
    assert sorted(itertools.chain(*seen)) == keys_of(pattern)
    assert len(keys_of(pattern)) == 17


def emulated(dataset, place, count):
    """Batches as a DataLoader with workers gives them, in this process."""
    readers = []
    for worker in range(max(place.workers, 1)):
        readers.append(read_as(dataset.starting_at(place), worker, place.workers))
    turns = itertools.cycle(readers)
    return [list(itertools.islice(next(turns), place.batch_size)) for _ in range(count)]


def read_as(dataset, worker, workers):
    info = SimpleNamespace(id=worker, num_workers=workers) if workers else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "get_worker_info", lambda: info)
        iterator = iter(dataset)
        first = next(iterator)  # a generator asks when it begins
    return itertools.chain([first], iterator)


@pytest.fixture(scope="module")
def many_keys(tmp_path_factory):
    return write_keys(tmp_path_factory.mktemp("keys"), 6, 3)


@settings(max_examples=40, deadline=None)
@given(
    processes=st.integers(1, 2),
    workers=st.integers(0, 3),
    size=st.integers(1, 3),
    skip=st.integers(0, 15),
    shuffle=st.sampled_from([0, 1, 5, 100]),
)
def test_going_on_gives_what_would_have_come(many_keys, processes, workers, size, skip, shuffle):
    dataset = Keys(many_keys, None, shuffle=shuffle)
    for process in range(processes):
        place = StreamPosition(process, processes, workers, size, seed=3)
        whole = emulated(dataset, place, skip + 6)
        resumed = place.resumed(place.saved(), 10 + skip, 1)
        assert resumed.skip == 10 + skip
        rest = emulated(dataset, StreamPosition(process, processes, workers, size, 3, 0, skip), 6)
        assert rest == whole[skip:]


def test_workers_take_turns_as_emulated(many_keys):
    dataset, place = Keys(many_keys, None), StreamPosition(0, 1, 2, 3, seed=1, skip=3)
    assert list(itertools.islice(stream_loader(dataset, place, list), 5)) == emulated(dataset, place, 5)


def test_passes_and_seeds_differ_in_order(many_keys):
    count = len(keys_of(many_keys))
    read = {seed: list(itertools.islice(Keys(many_keys, None, seed=seed), 2 * count)) for seed in (0, 1)}
    orders = [tuple(keys[start : start + count]) for keys in read.values() for start in (0, count)]
    assert len(set(orders)) == 4
    assert {tuple(sorted(order)) for order in orders} == {tuple(keys_of(many_keys))}
    unmixed = list(itertools.islice(Keys(many_keys, None, shuffle=0), count))
    assert unmixed == sorted(unmixed)


def test_other_readers_begin_a_new_pass(caplog):
    was = StreamPosition(0, 2, 4, 1, seed=5)
    with caplog.at_level(logging.WARNING):
        now = StreamPosition(0, 1, 4, 1, seed=5).resumed(was.saved(), 30, 2)
    assert "read by 2 processes with 4 workers and batches of 1, now by 1 with 4 and 1" in caplog.text
    assert (now.seed, now.since, now.skip) == (35, 30, 0)
    again = now.resumed(now.saved(), 37, 2)  # and is found again from there
    assert (again.seed, again.since, again.skip) == (35, 30, 14)


def test_a_checkpoint_tells_who_reads_and_the_order():
    saved = {
        "processes": 1,
        "workers": 0,
        "batch_size": 1,
        "seed": 0,
        "since": 0,
    }  # as runs of earlier releases kept it
    assert StreamPosition().saved() == saved
    assert StreamPosition().resumed(saved, 5, 1) == StreamPosition(skip=5)


def test_each_process_needs_a_shard(many_keys):
    dataset = StreamDataset(many_keys, None)
    assert [dataset.usable_workers(8, processes) for processes in (1, 2, 4, 6)] == [6, 3, 1, 1]
    with pytest.raises(ConfigError, match="6 shards for 7 processes; each needs one of its own"):
        dataset.usable_workers(0, 7)


# ---- patterns


def test_patterns(tmp_path):
    for name in ("a-00", "a-01", "b-00"):
        write_tar(tmp_path / f"{name}.tar", [])
    names = {
        "a-00.tar": ["a-00"],
        "*.tar": ["a-00", "a-01", "b-00"],
        "a-{00..01}.tar": ["a-00", "a-01"],
        "{b,a}-*.tar": ["b-00", "a-00", "a-01"],
    }
    assert {name: [path.stem for path in find_shards(tmp_path / name)] for name in names} == names


@pytest.mark.parametrize(
    ("pattern", "error"),
    [
        ("none-{0..2}.tar", r"3 shards are not there, first '.*none-0\.tar'"),
        ("x*.tar", r"no shard fits \(from "),
        ("a-{0..1.tar", "brace too many or too few"),
        ("https://a.org/b.tar", "is an address, expected files: mount the storage"),
        ("pipe:cat a.tar", "is an address"),
    ],
    ids=["missing", "none", "brace", "address", "pipe"],
)
def test_patterns_that_fit_nothing(tmp_path, monkeypatch, pattern, error):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=error):
        find_shards(pattern)


# ---- bad samples


CLIP = {"messages": [{"role": "user", "content": "<video>?"}, {"role": "assistant", "content": "up"}]}
BAD_MEMBERS = {
    "no_record": ([("a.mp4", b"x")], "x.tar, a", r"no record; expected a\.json or a\.jsonl beside a\.mp4"),
    "no_json": ([("a.json", b"{")], "x.tar, a", "its record is not JSON: Expecting property name"),
    "no_clip": (
        [("a.json", {**CLIP, "videos": ["a.mp4"]})],
        "x.tar, a",
        "'a.mp4' is not beside its record in the shard; there: nothing. Pack both one after the other, as tar --sort=name does.",
    ),
    "other_clips": (
        [("a.json", {**CLIP, "videos": ["a.mp4"]}), ("a.b.mp4", b"x"), ("a.c.mp4", b"y")],
        "x.tar, a",
        "there: a.b.mp4, a.c.mp4.",
    ),
    "pictures": (
        [("a.json", {**CLIP, "videos": [{"video": ["a.0.png", "a.1.png"], "folder_fps": 2}]}), ("a.0.png", b"")],
        "x.tar, a",
        "a list of pictures, which are not read from shards",
    ),
    "no_video": ([("a.json", {**CLIP, "videos": ["a.mp4"]}), ("a.mp4", b"no video")], "x.tar, a", "a.mp4"),
    "no_answer": (
        [("a.json", {"messages": CLIP["messages"][:1], "videos": ["a.mp4"]}), ("a.mp4", b"")],
        "x.tar, a",
        "",
    ),
    "broken_line": (
        [("a.jsonl", b'{"messages": 3}\n{"messages":\n')],
        "x.tar, a, entry 2",
        "its record is not JSON: Expecting value",
    ),
    "second_line": ([("a.jsonl", b'{"messages": []}\n{"messages": 3}')], "x.tar, a, entry 2", "'messages' is a number"),
    "empty": ([], "x.tar", "there is no sample in the shard"),
    "unlike": ([("README", b"words")], "x.tar", "there is no sample in the shard"),
}


@pytest.mark.parametrize(("members", "source", "reason"), BAD_MEMBERS.values(), ids=BAD_MEMBERS)
def test_bad_samples_of_shards(tmp_path, processor, members, source, reason):  # noqa: F811
    path = write_tar(tmp_path / "x.tar", members)
    found = list(StreamDataset(path, processor, passes=1, shuffle=0))
    assert [type(item) for item in found] == [BadSample] * len(found)
    assert found[-1].source.endswith(source)
    assert reason.replace("\\", "") in found[-1].reason
    assert "/sta-" not in found[-1].reason  # nothing of the files that were there for the decoder
    with pytest.raises(DataError, match=rf"x\.tar.*: .*{reason if len(found) == 1 else ''}"):
        list(StreamDataset(path, processor, passes=1, on_bad_sample="error"))


def test_a_line_that_is_none_leaves_the_others(tmp_path):
    lines = [json.dumps({**CLIP, "videos": ["a.mp4"], "id": number}).encode() for number in range(3)]
    path = write_tar(tmp_path / "x.tar", [("a.mp4", b"x"), ("a.jsonl", b"\n".join([lines[0], b"{", lines[2]]))])
    one, bad, three = read_shard(path)
    assert [item.record["id"] for item in (one, three)] == [0, 2]
    assert (bad.source, [item.source for item in (one, three)]) == (
        f"{path}, a, entry 2",
        [f"{path}, a, entry 1", f"{path}, a, entry 3"],
    )


CUTS = ("in_a_member", "in_a_header", "between_members")


def cut_off(where, cut):
    """Two shards, of which the first holds two or three whole samples of five."""
    members = [(f"{number}.json", {"messages": [], "number": number, "words": "x" * 4000}) for number in range(5)]
    path = write_tar(where / "a-0.tar", members)
    write_tar(where / "a-1.tar", [("9.json", {"messages": []})])
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        third, fourth = tar.getmembers()[2:4]
    end = {"in_a_member": third.offset_data + 700, "in_a_header": fourth.offset + 100, "between_members": fourth.offset}
    path.write_bytes(data[: end[cut]])
    return find_shards(where / "a-*.tar")


@pytest.mark.parametrize("cut", CUTS)
def test_shards_that_are_cut_off(tmp_path, cut):
    """What comes before is used, the rest is told of, and the next shard is read."""
    path, _ = paths = cut_off(tmp_path, cut)
    whole = 2 if cut == "in_a_member" else 3
    found = [item for shard in paths for item in read_shard(shard)]
    assert [item.source.rsplit(", ")[-1] for item in found if not isinstance(item, BadSample)] == [
        *"01234"[:whole],
        "9",
    ]
    bad = [item for item in found if isinstance(item, BadSample)]
    assert [item.source for item in bad] == [str(path)]
    assert f"cut off or damaged after {whole} samples: " in bad[0].reason


def test_a_clip_that_hangs_is_a_bad_sample(shards, processor, monkeypatch):  # noqa: F811
    read = ClipReader.read

    def hanging(self, parts, index=0):
        if parts[0]["video"].endswith("clip3.mp4"):
            time.sleep(60)
        return read(self, parts, index)

    monkeypatch.setattr(ClipReader, "read", hanging)
    dataset = StreamDataset(shards / "train-1.tar", processor, frames=AS_IS, passes=1, shuffle=0, decode_timeout=2)
    first, second = DataLoader(dataset, batch_size=None, num_workers=1)
    assert first["input_ids"].ndim == 1
    assert second.source.endswith("train-1.tar, train/clip3")
    assert "clip3.mp4: not done after 2 s (decode_timeout)" in second.reason


def test_errors_of_workers_are_plain(tmp_path, processor):  # noqa: F811
    path = write_tar(tmp_path / "x.tar", [("a.mp4", b"")])
    dataset = StreamDataset(path, processor, on_bad_sample="error")
    with pytest.raises(DataError, match=r"^\S*x\.tar, a: no record"), worker_errors():
        list(stream_loader(dataset, StreamPosition(workers=1), list))


# ---- training


SETTINGS = {**FAST, "device_batch_size": 2, "save_steps": 2, "num_workers": 2, "shuffle_buffer": 3}


def test_tensors_are_those_of_a_file_of_samples(shards, folder, processor):  # noqa: F811
    from sta_adapter.data import VideoDataset

    whole = StreamDataset(shards / "train-*.tar", processor, frames=AS_IS, passes=1, shuffle=0)
    for one, other in zip(whole, VideoDataset(folder / "data.jsonl", processor, frames=AS_IS), strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_an_interrupted_run_ends_as_a_whole_one(tmp_path, shards, processor):  # noqa: F811
    """Through more than one pass, with workers, accumulation and dropout; to the bit."""
    config = TrainingConfig(**SETTINGS, frames=AS_IS, lora_dropout=0.2)
    pattern = f"{shards}/train-{{0..3}}.tar"

    def run(name, *callbacks):
        net = make_model(processor.tokenizer)
        arguments = {"processor": processor, "config": config, "callbacks": callbacks, "stage": "2", "progress": False}
        return train(net, pattern, output_dir=tmp_path / name, **arguments)

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("stopped", StopAt(5))
    stopped = run("stopped")
    assert stopped.stages["2"]["steps"] == whole.stages["2"]["steps"] == 6
    for name in ("sta_adapter.safetensors", "adapter_model.safetensors"):
        one, other = (load_file(tmp_path / run / name) for run in ("whole", "stopped"))
        assert all(torch.equal(one[key], other[key]) for key in one), name


def test_bad_samples_are_counted(tmp_path, shards, processor):  # noqa: F811
    for path in shards.glob("*.tar"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    damaged = tmp_path / "train-2.tar"
    damaged.write_bytes(damaged.read_bytes()[:-8000])
    write_tar(tmp_path / "train-1.tar", [("a.mp4", b"x")])
    config = TrainingConfig(**{**SETTINGS, "num_workers": 0}, frames=AS_IS)
    result = train(
        make_model(processor.tokenizer),
        tmp_path / "train-*.tar",
        processor=processor,
        output_dir=tmp_path / "out",
        stage="1",
        config=config,
        progress=False,
    )
    bad = sorted(message.removeprefix(str(tmp_path)) for message in result.bad_samples)
    assert bad[0].startswith("/train-1.tar, a: no record")
    assert any(message.startswith("/train-2.tar: the shard is cut off or damaged") for message in bad)
    assert result.stages["1"]["steps"] == 6


def test_shards_to_train_on_are_a_stream_and_those_to_measure_on_have_an_end(tmp_path, shards, processor):  # noqa: F811
    config = TrainingConfig(**{**SETTINGS, "max_steps": 1, "save_steps": 1, "eval_steps": 1})
    data, measured = shards / "train-0.tar", shards / "train-1.tar"
    assert isinstance(_opened(data, processor, config), StreamDataset)
    options = {"processor": processor, "config": config, "stage": "1", "progress": False}
    result = train(make_model(processor.tokenizer), data, eval_data=measured, output_dir=tmp_path, **options)
    assert [entry["step"] for entry in result.history if "eval_loss" in entry] == [1]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"config": TrainingConfig()}, r"set the number of steps, max_steps \(--max-steps 1000\)"),
        ({"eval_data": "STREAM"}, "eval_data is a StreamDataset, which has no end; expected a VideoDataset"),
        ({"processor": None}, "pass processor="),
    ],
    ids=["steps", "evaluation", "processor"],
)
def test_what_a_stream_can_not_do(tmp_path, shards, processor, options, error):  # noqa: F811
    stream = StreamDataset(shards / "train-0.tar", processor)
    options = {key: stream if value == "STREAM" else value for key, value in options.items()}
    arguments = {"processor": processor, "config": TrainingConfig(**SETTINGS), **options}
    with pytest.raises(ConfigError, match=error):
        train(make_model(processor.tokenizer), shards / "train-0.tar", output_dir=tmp_path, **arguments)
