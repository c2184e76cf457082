"""Several processes that share an evaluation give what one does; batches by length; answers that end with their letter."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from pairs import pairs_of
from tiny_qwen import make_model, make_processor, save_base, write_samples

from sta_adapter.cli import cli
from sta_adapter.data import BadSample, FrameSettings, VideoDataset
from sta_adapter.data.chat_encoding import Loaded, Prompt
from sta_adapter.data.conversation import Sample
from sta_adapter.data.message import Visual
from sta_adapter.errors import ConfigError, STAError
from sta_adapter.evaluation import evaluate, sharding
from sta_adapter.evaluation.answering import Answerer, AtLetter, Question
from sta_adapter.evaluation.prediction_log import PredictionLog
from sta_adapter.evaluation.sharding import Processes, batches, units

AS_IS = FrameSettings(min_tokens=None, max_tokens=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, and samples of unequal lengths of which one is bad; half of them have options."""
    path = tmp_path_factory.mktemp("data")
    save_base(path / "base", make_processor(path / "tokenizer"))
    records = [json.loads(line) for line in write_samples(path, 7).read_text().splitlines()]
    for index, record in enumerate(records):
        record["messages"][0]["content"][0]["nframes"] = (2, 8, 4)[index % 3]
    (path / "3.mp4").write_bytes(b"no video")
    (path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def words(folder, out, *more):
    line = ["evaluate", "--model", str(folder / "base"), "--data", str(folder / "data.jsonl"), "--out", str(out)]
    return [
        *line,
        "--device",
        "cpu",
        "--dtype",
        "fp32",
        "--num-workers",
        "0",
        "--batch-size",
        "2",
        "--max-new-tokens",
        "4",
        *more,
    ]


def without_time(path):
    found = json.loads(path.read_text())
    for orders in (found["base"],):
        for result in orders.values():
            result.pop("seconds")
    return found


@pytest.mark.slow
def test_two_processes_give_what_one_does(folder, tmp_path):
    """Also after a failure of one of them, whose share alone is asked again."""
    one, two, failed = (tmp_path / name for name in ("one", "two", "failed"))
    done = CliRunner().invoke(cli, words(folder, one))
    assert done.exit_code == 0, done.output
    with pairs_of("evaluation_worker.py") as pairs:
        said = pairs.run(
            tmp_path,
            {"words": words(folder, two)},
            {"words": words(folder, failed), "failing": "1"},
            {"words": words(folder, failed)},
        )
    errors = [(tmp_path / f"errors{rank}").read_text() for rank in range(2)]
    assert "STAError: process 1 failed: RuntimeError: out of memory, say" in errors[0]
    assert "RuntimeError: out of memory, say" in errors[1]
    assert said.count("base, ordered") == 2
    assert (tmp_path / "out1").read_text() == ""
    for folder_of in (two, failed):
        assert (folder_of / "base-ordered.jsonl").read_bytes() == (one / "base-ordered.jsonl").read_bytes()
        assert without_time(folder_of / "results.json") == without_time(one / "results.json")
        assert not list(folder_of.glob("*.part*"))
    (bad,) = without_time(one / "results.json")["base"]["ordered"]["bad_samples"]
    assert "3.mp4" in bad


@pytest.mark.parametrize(
    ("option", "message"), [(("--device", "cuda:0"), "exclude each other"), (("--engine", "vllm"), "is one process")]
)
def test_what_processes_can_not_share(folder, tmp_path, monkeypatch, option, message):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("sta_adapter.cli.evaluate.require_device", lambda name: None)
    line = words(folder, tmp_path)
    line[line.index("--device") : line.index("--device") + 2] = []
    with pytest.raises(ConfigError, match=message):
        CliRunner().invoke(cli, [*line, *option], catch_exceptions=False)


def test_a_share_is_every_nth_unit():
    assert [list(Processes(rank, 3).share(range(7))) for rank in range(3)] == [[0, 3, 6], [1, 4], [2, 5]]


@pytest.mark.parametrize(
    ("count", "sizes"), [(5, [2, 2, 1]), (70, [4] * 17 + [2]), (0, [])], ids=["few", "many", "none"]
)
def test_units_are_whole_batches(count, sizes):
    found = units(range(count), 2)
    assert [len(unit) for unit in found] == sizes
    assert [index for unit in found for index in unit] == list(range(count))


class Items:
    """A data set of encoded samples of given lengths; 0 for a bad one."""

    cached = True
    encoder = SimpleNamespace(frame_order="ordered")

    def __init__(self, lengths):
        self.lengths = lengths

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        length = self.lengths[index]
        return {"input_ids": torch.zeros(length, dtype=torch.long)} if length else BadSample("x", "bad")


def test_batches_are_of_about_one_length(monkeypatch):
    lengths = [5, 50, 0, 6, 51, 7, 3, 4]
    found = list(batches(Items(lengths), [range(6), range(6, 8)], 2, 0, False))
    assert [[index for index, _ in batch] for batch in found] == [[4, 1], [5, 3], [0, 2], [7, 6]]
    assert all(len(item["input_ids"]) == lengths[index] for batch in found for index, item in batch if lengths[index])
    monkeypatch.setattr("sta_adapter.evaluation.sharding.HELD_BYTES", 8 * 54)
    found = list(batches(Items(lengths), [range(6), range(6, 8)], 2, 0, False))
    assert [[index for index, _ in batch] for batch in found] == [[1, 0], [4, 3], [2], [5], [7, 6]]


def test_what_an_engine_is_to_have_counts_among_what_is_held(monkeypatch):
    """Its samples are token ids, and the pixels stand in their prompts."""

    class Clips(Items):
        def __getitem__(self, index):
            item = Loaded({"input_ids": torch.zeros(1, dtype=torch.long)})
            item.prompt = Prompt([0], [Visual("video", np.zeros((1, 2, 2, 3), np.uint8))] * self.lengths[index], {})
            return item

    monkeypatch.setattr("sta_adapter.evaluation.sharding.HELD_BYTES", 60)
    found = list(batches(Clips([1, 2, 3, 5, 1]), [range(5)], 2, 0, False))
    assert [[index for index, _ in batch] for batch in found] == [[0, 1], [2], [3], [4]]


@pytest.mark.parametrize(("cached", "workers", "ahead"), [(True, 0, None), (False, 3, 4)])
def test_workers_encode_a_batch_ahead(monkeypatch, cached, workers, ahead):
    asked = {}

    def loader(dataset, **how):
        asked.update(how)
        return [dataset[index] for index in range(len(dataset))]

    monkeypatch.setattr("sta_adapter.evaluation.sharding.DataLoader", loader)
    items = Items([3, 4])
    items.cached = cached
    assert len(list(batches(items, [range(2)], 2, 3, False))) == 1
    assert (asked["batch_size"], asked["num_workers"], asked.get("prefetch_factor")) == (None, workers, ahead)


@pytest.mark.parametrize(("shown", "said"), [(True, "answers"), ("answers of the base", "answers of the base")])
def test_the_bar_counts_samples(monkeypatch, shown, said):
    bars = []

    class Bar:
        def __init__(self, **how):
            self.how, self.done = how, 0
            bars.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def update(self, count):
            self.done += count

    monkeypatch.setattr("tqdm.auto.tqdm", Bar)
    monkeypatch.setattr("sta_adapter.evaluation.sharding.HELD_BYTES", 8 * 54)
    lengths = [5, 50, 0, 6, 51, 7, 3, 4]
    assert sum(map(len, batches(Items(lengths), [range(6), range(6, 8)], 2, 0, shown))) == 8
    (bar,) = bars
    assert bar.how == {"total": 8, "desc": f"{said}, ordered frames", "dynamic_ncols": True, "disable": False}
    assert bar.done == 8


def test_a_process_alone():
    alone = Processes.joined()
    assert (alone.rank, alone.size, alone.group) == (0, 1, None)
    assert alone.gather(lambda: 5) == [5]
    alone.close()


def test_processes_that_have_found_each_other_talk_in_a_group_of_their_own(monkeypatch):
    made, ended = [], []
    monkeypatch.setattr(sharding, "is_parallel", lambda: True)
    monkeypatch.setattr(sharding.distributed, "new_group", lambda **how: made.append(how) or "group")
    monkeypatch.setattr(sharding.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(sharding.distributed, "get_world_size", lambda: 3)
    monkeypatch.setattr(sharding.distributed, "destroy_process_group", ended.append)
    found = Processes.joined()
    assert (found.rank, found.size, found.group) == (1, 3, "group")
    assert made == [{"backend": "gloo", "timeout": sharding.PATIENCE}]
    found.close()
    assert ended == ["group"]


def test_what_processes_tell_each_other(monkeypatch):
    told, other = [], [(True, 7)]

    def exchange(found, mine, group):
        told.append((mine, group))
        found[:] = [mine, *other]

    monkeypatch.setattr(sharding.distributed, "all_gather_object", exchange)
    two = Processes(0, 2, "group")
    assert two.gather(lambda: 5) == [5, 7]
    with pytest.raises(ZeroDivisionError):
        two.gather(lambda: 1 / 0)
    assert told == [((True, 5), "group"), ((False, "ZeroDivisionError: division by zero"), "group")]
    other[:] = [(False, "ValueError: x")]
    with pytest.raises(STAError, match=r"^process 1 failed: ValueError: x$"):
        two.gather(lambda: 5)


def test_a_log_takes_over_the_parts_of_others(tmp_path):
    about = ({"a": 1}, ["q0", "q1", "q2"])
    path = tmp_path / "log.jsonl"
    with PredictionLog(path) as first, PredictionLog(path, part=1) as second:
        first.open(first.read(*about))
        second.read(*about)
        second.open(first.done)
        second.add(0, {"said": "zero"})
        first.add(2, {"said": "two"})
    assert (tmp_path / "log.jsonl.part1").exists()
    with PredictionLog(path) as log:  # as after a crash
        assert log.read(*about) == {0: {"said": "zero"}, 2: {"said": "two"}}
        assert not (tmp_path / "log.jsonl.part1").exists()
        log.open(log.done)
        log.finish({2: {"said": "two"}, 1: {"said": "one"}, 0: {"said": "zero"}}, {})
    assert [json.loads(line).get("index") for line in path.read_text().splitlines()] == [None, 0, 1, 2]


class Words:
    """A tokenizer of few words."""

    names = ("<pad>", "A", "B", "F", "Because", ".", "(", ")", "\n")

    def batch_decode(self, rows, skip_special_tokens):
        return ["".join(self.names[token] for token in row if token) for row in rows.tolist()]


@pytest.mark.parametrize(
    ("said", "ended"),
    [("B .", True), ("( B )", True), ("B \n", True), ("B", False), ("F .", False), ("( B", False), ("Because .", False), (". B", False)],
    ids=["mark", "brackets", "line", "may go on", "no option", "open bracket", "a word", "later"],
)  # fmt: skip
def test_an_answer_ends_at_its_letter(said, ended):
    tokens = [Words.names.index(word) for word in said.split(" ")]
    rows = torch.tensor([[1, 1, *tokens], [1, 1, *[0] * len(tokens)]])
    assert AtLetter(Words(), 2, [4, 4])(rows, None).tolist() == [ended, False]
    assert AtLetter(Words(), 2, [0, 4])(rows, None).tolist() == [False, False]


def test_generation_stops_there(folder):
    processor = make_processor(folder / "tokenizer")
    model, tokenizer = make_model(processor.tokenizer), processor.tokenizer
    script = tokenizer("B. left")["input_ids"]
    head = model.lm_head.forward
    steps = []

    def scripted(hidden):
        logits = torch.zeros_like(head(hidden))
        logits[..., script[min(len(steps), len(script) - 1)]] = 1
        steps.append(1)
        return logits

    model.lm_head.forward = scripted
    answer = {"role": "assistant", "content": [{"type": "text", "text": "B"}]}
    sample = Sample([answer], options=["A", "B"])
    question = Question(0, sample, {"input_ids": torch.tensor(tokenizer("Which?")["input_ids"])}, [])
    for stops, said in ((True, "B."), (False, "B. left")):
        steps.clear()
        [found] = Answerer(model, processor, len(script), 2, stop_at_letter=stops).answer([question])
        assert (found.prediction, found.correct) == (said, True)


def test_sharded_models_are_not_shared(folder, monkeypatch):
    processor = make_processor(folder / "tokenizer")
    model = make_model(processor.tokenizer)
    monkeypatch.setattr("sta_adapter.evaluation.evaluator.is_sharded", lambda parameters: True)
    sample = Sample([{"role": "user", "content": []}], "x")
    with pytest.raises(ConfigError, match="that each process has whole"):
        evaluate(model, VideoDataset([sample], processor, frames=AS_IS), shared=True)
