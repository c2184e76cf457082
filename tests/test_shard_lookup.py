"""Tar shards where samples are looked up in them: check-data, evaluate and --eval-data. Training from them: test_streaming.py."""

import gzip
import json
import tarfile

import pytest
import torch
from click.testing import CliRunner
from test_streaming import BAD_MEMBERS, CLIP, CUTS, cut_off, shards, write_tar  # noqa: F401
from test_training import AS_IS, FAST, folder, make_model, processor  # noqa: F401
from tiny_qwen import save_base

from sta_adapter.cli import cli
from sta_adapter.data import BadSample, VideoDataset, read_samples
from sta_adapter.data import shards as shards_module
from sta_adapter.data.check import check_data
from sta_adapter.data.shards import find_shards, read_shard, scan_shards
from sta_adapter.data.stream import StreamDataset
from sta_adapter.errors import ConfigError, DataError
from sta_adapter.evaluation import evaluate
from sta_adapter.training import TrainingConfig, train

pytest.importorskip("webdataset")


@pytest.fixture(scope="module")
def pattern(shards):  # noqa: F811
    return f"{shards}/train-{{0..3}}.tar"


@pytest.fixture(scope="module")
def base(tmp_path_factory, processor):  # noqa: F811
    return save_base(tmp_path_factory.mktemp("base"), processor)


# ---- what is found in shards


@pytest.mark.parametrize("workers", [0, 2], ids=["here", "workers"])
def test_samples_in_any_order_are_those_of_the_file(pattern, folder, processor, workers):  # noqa: F811
    file, packed = (VideoDataset(data, processor, frames=AS_IS) for data in (folder / "data.jsonl", pattern))
    order = [5, 0, 7, 2]
    loaded = torch.utils.data.DataLoader(packed, batch_size=None, sampler=order, num_workers=workers)
    for index, item in zip(order, loaded, strict=True):
        assert item.keys() == file[index].keys()
        assert all(torch.equal(item[key], file[index][key]) for key in item)
    assert len(packed) == 8
    assert packed.samples[3].source.endswith("train-1.tar, train/clip3")


@pytest.mark.parametrize(("members", "source", "reason"), BAD_MEMBERS.values(), ids=BAD_MEMBERS)
def test_bad_samples_are_those_of_training(tmp_path, processor, members, source, reason):  # noqa: F811
    path = write_tar(tmp_path / "x.tar", members)
    streamed = list(StreamDataset(path, processor, passes=1, shuffle=0))
    found = scan_shards(path)
    dataset = VideoDataset([item for item in found if not isinstance(item, BadSample)], processor)
    bad = [item for item in [*found, *dataset] if isinstance(item, BadSample)]
    assert sorted((item.source, item.reason) for item in bad) == sorted((item.source, item.reason) for item in streamed)


@pytest.mark.parametrize("cut", CUTS)
def test_cut_off_shards_are_read_as_in_training(tmp_path, cut):
    paths = cut_off(tmp_path, cut)
    one, other = ([item for path in paths for item in read_shard(path, lookup=lookup)] for lookup in (False, True))
    assert [(item.source, getattr(item, "reason", "")) for item in one] == [
        (item.source, getattr(item, "reason", "")) for item in other
    ]


@pytest.mark.parametrize("lookup", [False, True], ids=["streamed", "looked_up"])
def test_a_damaged_header_is_not_taken_for_the_end(tmp_path, lookup):
    path = write_tar(tmp_path / "x.tar", [(f"{number}.json", CLIP) for number in range(4)])
    with tarfile.open(path) as tar:
        start = tar.getmembers()[2].offset
    data = bytearray(path.read_bytes())
    data[start + 148] ^= 1  # in the checksum
    path.write_bytes(data)
    *good, bad = read_shard(path, lookup=lookup)
    assert [item.source.rsplit(", ")[-1] for item in good] == ["0", "1"]
    assert bad.reason == f"the shard is cut off or damaged after 2 samples: what stands at byte {start} is no header."


def test_notes_in_a_shard_are_no_samples(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("__notes__/a.json", CLIP), ("a.json", CLIP)])
    assert [item.source.rsplit(", ")[-1] for item in read_shard(path)] == ["a"]


def test_compressed_shards_are_for_training_alone(tmp_path, processor):  # noqa: F811
    plain = write_tar(tmp_path / "x.tar", [(f"{number}.json", {**CLIP, "number": number}) for number in range(50)])
    path = tmp_path / "x.tar.gz"
    path.write_bytes(gzip.compress(plain.read_bytes()))
    assert [item.record for item in read_shard(path)] == [item.record for item in read_shard(plain)]
    path.write_bytes(path.read_bytes()[:-300])
    *_, last = read_shard(path)
    assert "the shard is cut off or damaged after " in last.reason
    for use in (check_data, read_samples, lambda name: VideoDataset(name, processor)):
        with pytest.raises(DataError, match=r"x\.tar\.gz' is compressed.*training alone reads such.*gunzip"):
            use(path)


def test_shards_take_no_folder_of_videos(pattern, tmp_path):
    with pytest.raises(ConfigError, match="shards hold their clips themselves"):
        check_data(pattern, videos=tmp_path)


@pytest.mark.parametrize("make", [read_samples, lambda name, format: StreamDataset(name, None, format=format)])
def test_formats_that_there_are_not(pattern, make):
    with pytest.raises(ConfigError, match=r"format is 'csv', expected one of conversations, multiple-choice, ssv2"):
        make(pattern, format="csv")


def claiming(path, name, size, kind=tarfile.REGTYPE):
    """A tar whose only header claims so many bytes."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    return path


@pytest.mark.parametrize("lookup", [False, True], ids=["streamed", "looked_up"])
@pytest.mark.parametrize(("name", "size", "kind"), [("a.mp4", 1 << 40, tarfile.REGTYPE), ("a.json", 1 << 31, tarfile.REGTYPE), ("a.mp4", 1 << 31, tarfile.GNUTYPE_SPARSE), ("a.mp4", 1 << 40, tarfile.GNUTYPE_LONGNAME)], ids=["terabyte", "record", "sparse", "long_name"])  # fmt: skip
def test_what_a_header_claims_is_not_believed(tmp_path, name, size, kind, lookup):
    (bad,) = read_shard(claiming(tmp_path / "x.tar", name, size, kind), lookup=lookup)
    assert "the shard is cut off or damaged after 0 samples" in bad.reason


@pytest.mark.parametrize(
    ("name", "size", "packed"),
    [("a.mp4", (1 << 30) + 1, True), ("a.json", (64 << 20) + 1, False)],
    ids=["clip", "record"],
)
def test_how_large_a_member_may_be(tmp_path, name, size, packed):
    path = claiming(tmp_path / "x.tar", name, size)
    if packed:
        path.write_bytes(gzip.compress(path.read_bytes()))
    (bad,) = read_shard(path)
    assert f"{name!r} claims {size} bytes, more than is read" in bad.reason


def test_what_the_system_says_of_a_shard(tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise OSError(5, "Input/output error")

    path = write_tar(tmp_path / "x.tar", [("a.json", {"messages": []})])
    monkeypatch.setattr(tarfile, "open", fails)
    (bad,) = read_shard(path)
    assert bad.reason.endswith("damaged after 0 samples: Input/output error.")


def test_members_of_a_compressed_shard_are_bounded(tmp_path):
    plain = claiming(tmp_path / "x.tar", "a.mp4", 1 << 40)
    packed = tmp_path / "x.tar.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    (bad,) = read_shard(packed)
    assert "'a.mp4' claims 1099511627776 bytes, more than is read" in bad.reason


def gzipped(path, *members, end=bytes(1024)):
    """A compressed shard of files `(name, size, kind)` of zeros; of other kinds than files the size is claimed alone."""
    content = b""
    for name, size, kind in members:
        info = tarfile.TarInfo(name)
        info.size, info.type = size, kind
        content += info.tobuf(tarfile.GNU_FORMAT) + bytes(size + -size % 512)
    path.write_bytes(gzip.compress(content + end))
    return path


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, b"Q"], ids=["files", "of another kind"])
def test_a_whole_compressed_shard_is_bounded(tmp_path, monkeypatch, kind):
    """However many members there are, and whatever they are."""
    monkeypatch.setattr(shards_module, "MOST_INFLATED", 1 << 16)
    packed = gzipped(tmp_path / "x.tar.gz", *((f"{n}.mp4", 1 << 13, kind) for n in range(1000)))
    most = (1 << 16) + shards_module.MOST_TIMES * packed.stat().st_size
    assert packed.stat().st_size < 40_000 < most < 1000 << 13
    *found, bad = read_shard(packed)
    assert f"it goes on past byte {most}, more than a shard of its size on disk holds" in bad.reason
    assert len(found) <= most >> 13


def test_what_follows_the_end_of_a_compressed_shard_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "MOST_INFLATED", 1 << 16)
    packed = gzipped(tmp_path / "x.tar.gz", ("a.mp4", 10, tarfile.REGTYPE), end=bytes(50 << 20))
    *_, bad = read_shard(packed)
    assert "it goes on past byte" in bad.reason


@pytest.mark.parametrize(
    "kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE], ids=["name", "pax", "global"]
)
def test_texts_of_headers_are_bounded(tmp_path, kind):
    (bad,) = read_shard(gzipped(tmp_path / "x.tar.gz", ("a", 30 << 20, kind)))
    assert f"a header claims {30 << 20} bytes of text, more than is read" in bad.reason


def test_a_compressed_shard_of_usual_contents_is_read_whole(tmp_path, shards):  # noqa: F811
    plain = shards / "train-0.tar"
    packed = tmp_path / "x.tar.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    found, expected = ([item.record for item in read_shard(path)] for path in (packed, plain))
    assert found == expected
    assert found


@pytest.mark.parametrize(
    "names", ["train-{0,0}.tar", "train-{0,*}.tar", "{,./}train-0.tar", "train-{0..3}.tar", "*.tar"], ids=str
)
def test_a_shard_that_is_named_twice_is_read_once(shards, names):  # noqa: F811
    found = find_shards(shards / names)
    assert len(found) == len({path.resolve() for path in found}) == (1 if "*" not in names and ".." not in names else 4)
    sources = [sample.source for sample in scan_shards(shards / names)]
    assert len(sources) == len(set(sources)) > 0


# ---- check-data


def test_check_data_finds_every_problem(tmp_path, shards, processor):  # noqa: F811
    answered = {"messages": [*CLIP["messages"]], "videos": ["a.mp4"]}
    silent = {"messages": [CLIP["messages"][0], {"role": "assistant", "content": " "}], "videos": ["a.mp4"]}
    clip = find_clip(shards / "train-0.tar")
    write_tar(tmp_path / "x-0.tar", [("a.mp4", clip), ("a.json", answered), ("b.json", answered)])
    write_tar(tmp_path / "x-1.tar", [("a.mp4", b"no video"), ("a.json", answered)])
    write_tar(
        tmp_path / "x-2.tar", [("a.mp4", clip), ("a.jsonl", f"{json.dumps(answered)}\n{json.dumps(silent)}".encode())]
    )
    whole = write_tar(tmp_path / "x-3.tar", [("a.mp4", clip), ("a.json", answered), ("b.mp4", clip)])
    with tarfile.open(whole) as tar:
        end = tar.getmember("b.mp4").offset_data + 100
    whole.write_bytes(whole.read_bytes()[:end])
    report = check_data(tmp_path / "x-{0..3}.tar", processor=processor, frames=AS_IS, num_workers=1)
    found = {p["source"].removeprefix(f"{tmp_path}/"): (p["kind"], p["reason"]) for p in report.problems}
    assert {source: kind for source, (kind, _) in found.items()} == {
        "x-0.tar, b": "missing",
        "x-1.tar, a": "unreadable",
        "x-2.tar, a, entry 2": "record",
        "x-3.tar": "unreadable",
    }
    assert (
        found["x-0.tar, b"][1]
        == "'a.mp4' is not beside its record in the shard; there: nothing. Pack both one after the other, as tar --sort=name does."
    )
    assert found["x-1.tar, a"][1].startswith("a.mp4 can't be read as a video")
    assert "cut off or damaged after 1 samples" in found["x-3.tar"][1]
    assert (report.samples, len(report.seconds), len(report.tokens)) == (7, 3, 3)
    with pytest.raises(DataError, match=r"x-3\.tar: the shard is cut off or damaged after 1 samples"):
        read_samples(whole)  # to measure on, nothing less than all will do


def find_clip(shard):
    with tarfile.open(shard) as tar:
        return tar.extractfile(next(member for member in tar if member.name.endswith(".mp4"))).read()


def test_check_data_command(pattern):
    done = CliRunner().invoke(cli, ["check-data", pattern, "--num-workers", "0"], catch_exceptions=False)
    assert done.exit_code == 0
    assert done.output.startswith("8 samples, 0 of them bad\nseconds a clip: 1 to 1, median 1\n")
    assert "       4  left" in done.output


# ---- evaluate


def test_evaluation_is_that_of_the_file_and_goes_on(tmp_path, pattern, folder, processor):  # noqa: F811
    net, log = make_model(processor.tokenizer), tmp_path / "answers.jsonl"
    how = {
        "processor": processor,
        "frame_settings": AS_IS,
        "max_new_tokens": 2,
        "batch_size": 2,
        "frame_order": "shuffled",
    }
    one, other = (evaluate(net, data, **how).predictions for data in (folder / "data.jsonl", pattern))
    assert [p.prediction for p in one] == [p.prediction for p in other]
    assert [p.answer for p in other] == ["left", "right"] * 4
    whole = evaluate(net, pattern, predictions_file=log, **how)
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:4]) + lines[4][:10])  # cut off while writing
    assert evaluate(net, pattern, predictions_file=log, **how).predictions == whole.predictions
    assert log.read_text().splitlines(keepends=True) == lines
    with pytest.raises(ConfigError, match="an evaluation that differs in data"):
        evaluate(net, pattern.replace("0..3", "0..2"), predictions_file=log, **how)


def test_evaluate_command(base, pattern):
    line = [
        "evaluate",
        "--model",
        str(base),
        "--data",
        pattern,
        "--max-new-tokens",
        "1",
        "--num-workers",
        "0",
        "--json",
    ]
    done = CliRunner().invoke(cli, line, catch_exceptions=False)
    report = json.loads(done.stdout[done.stdout.index("{") :])
    assert report["base"]["ordered"]["overall"]["total"] == 8
    assert set(report["base"]["ordered"]["categories"]) == {"left", "right"}


# ---- train --eval-data


def test_the_loss_measured_on_shards_is_that_of_the_file(tmp_path, pattern, folder, processor):  # noqa: F811
    settings = {**FAST, "max_steps": 2, "eval_steps": 1, "save_steps": 1, "num_workers": 0}
    measured = []
    for name, data in (("file", folder / "data.jsonl"), ("shards", pattern)):
        result = train(
            make_model(processor.tokenizer),
            folder / "data.jsonl",
            eval_data=data,
            processor=processor,
            output_dir=tmp_path / name,
            stage="1",
            config=TrainingConfig(**settings, frames=AS_IS),
            progress=False,
        )
        measured.append([entry["eval_loss"] for entry in result.history if "eval_loss" in entry])
    assert len(measured[0]) == 2
    assert measured[0] == measured[1]


def test_train_command_on_shards_alone(tmp_path, base, pattern):
    line = ["train", "--model", str(base), "--data", pattern, "--eval-data", pattern, "--out", str(tmp_path)]
    line += ["--max-steps", "1", "--batch-size", "2", "--stage", "1"]
    for setting in ("eval_steps=1", "num_workers=0", "frames.min_tokens=null", "frames.max_tokens=null"):
        line += ["--set", setting]
    done = CliRunner().invoke(cli, line, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    history = json.loads((tmp_path / "stage1" / "result.json").read_text())["history"]
    assert sum("eval_loss" in entry for entry in history) == 1
