"""The parts of examples/real_encoder, on a tiny random encoder and drawn pictures."""

import dataclasses
import functools
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from drawings import require_same_drawing

FOLDER = Path(__file__).parent.parent / "examples" / "real_encoder"
NAMES = (
    *("arms", "cache", "clips", "debian", "drawn", "encoder", "measure", "prepare", "pretrain_reader"),
    *("reader", "steps", "table", "train"),
)


@pytest.fixture(scope="module")
def parts():
    """The example's modules by name, imported as its scripts import each other."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield {name: importlib.import_module(name) for name in NAMES}
    finally:
        sys.path.remove(str(FOLDER))
        for name in NAMES:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def work(parts, tmp_path_factory):
    """A prepared folder in the quick size."""
    folder = tmp_path_factory.mktemp("real")
    drawn = parts["drawn"]
    pictures = drawn.draw_objects(folder / "objects"), drawn.draw_photographs(folder / "photographs")
    parts["prepare"].prepare(folder, parts["prepare"].QUICK, *pictures)
    return folder


@pytest.mark.parametrize("circling", [False, True])
def test_states_of_a_pair_are_each_other_in_opposite_order(parts, circling):
    course = functools.partial(parts["clips"].course, circling=circling)
    for one, other in parts["clips"].PAIRS:
        for seed in range(5):
            forwards, back = (course(label, np.random.default_rng(seed)) for label in (one, other))
            assert forwards == back[::-1]
            assert forwards != back


@pytest.mark.parametrize(("label", "sense"), [("clockwise", 1), ("counterclockwise", -1)])
def test_what_circles_goes_round_one_point_upright_and_the_way_it_is_called(parts, label, sense):
    course = parts["clips"].course
    for seed in range(5):
        circle, turn = (course(label, np.random.default_rng(seed), circling=kind) for kind in (True, False))
        places = np.array([[state.x, state.y] for state in circle])
        around = places - [turn[0].x, turn[0].y]
        distances = np.hypot(*around.T)
        assert distances == pytest.approx(distances[0])
        assert 0.15 <= distances[0] <= 0.275
        steps = np.diff(np.unwrap(np.arctan2(around[:, 1], around[:, 0])))  # y grows downwards: clockwise is positive
        assert steps == pytest.approx(steps[0])
        assert np.radians(137) <= 7 * sense * steps[0] <= np.radians(314)
        assert len({state.angle for state in circle}) == 1
        assert len({(state.x, state.y) for state in turn}) == 1
        assert len({state.angle for state in turn}) == len(turn)


def test_other_movements_are_the_same_beside_circles(parts):
    clips = parts["clips"]
    for label in clips.LABELS:
        kinds = [clips.course(label, np.random.default_rng(3), circling=kind) for kind in (True, False)]
        assert (kinds[0] == kinds[1]) == ("clockwise" not in label)


def test_clips_are_made_with_circles_where_they_are_asked_for(parts, work, tmp_path):
    prepared = parts["prepare"]
    settings = dataclasses.replace(prepared.QUICK, train=4, val=8, test=4, circling=True)
    prepared.prepare(tmp_path, settings, work / "objects", work / "photographs")
    made = prepared.Data(tmp_path, "val", settings.first).clips
    circled = [clip for clip in made if clip["label"].endswith("clockwise")]
    assert circled
    assert all(len({state["x"] for state in clip["states"]}) == len(clip["states"]) for clip in circled)
    assert all(len({state["angle"] for state in clip["states"]}) == 1 for clip in made)


def test_no_object_and_no_photograph_of_the_test_is_in_training(work):
    splits = {}
    for split in ("train", "val", "test"):
        lines = [json.loads(line) for line in (work / "clips" / f"{split}.jsonl").read_text().splitlines()]
        splits[split] = {key: {line[key] for line in lines} for key in ("object", "photograph")}
    assert splits["train"]["object"].isdisjoint(splits["val"]["object"] | splits["test"]["object"])
    assert splits["val"]["object"].isdisjoint(splits["test"]["object"])
    assert splits["test"]["photograph"].isdisjoint(splits["train"]["photograph"] | splits["val"]["photograph"])


def test_variants_of_an_object_stay_together_and_what_looks_alike_turned_is_left_out(parts, tmp_path):
    clips, image = parts["clips"], parts["drawn"].draw_objects(tmp_path / "source", 1) / "000.png"
    for number in range(30):
        for variant in ("", "-a", "-b"):
            (tmp_path / f"{number}{variant}.png").write_bytes(image.read_bytes())
    from PIL import Image, ImageDraw

    disc = Image.new("RGBA", (96, 96))
    ImageDraw.Draw(disc).ellipse((4, 4, 92, 92), fill="red")
    disc.save(tmp_path / "disc.png")
    (tmp_path / "source" / "000.png").unlink()
    found = {
        split: {p.stem for p in paths} for split, paths in clips.list_objects(tmp_path, tmp_path / "l.json").items()
    }
    assert sum(map(len, found.values())) == 90
    for stems in found.values():
        assert {stem.split("-")[0] + end for stem in stems for end in ("", "-a", "-b")} == stems


def test_a_photograph_in_another_size_or_light_is_no_new_one(parts, tmp_path):
    from PIL import Image

    first, second = sorted(parts["drawn"].draw_photographs(tmp_path, 2).iterdir())
    image = Image.open(first)
    image.resize((80, 60)).save(tmp_path / "small.png")
    image.point(lambda value: value // 2).save(tmp_path / "dark.png")
    image.crop((8, 6, 312, 234)).save(tmp_path / "cut.jpg")
    assert parts["clips"].distinct(sorted(tmp_path.iterdir())) == [first, second]


def test_of_a_wallpaper_in_many_sizes_one_is_taken(parts, tmp_path, monkeypatch):
    from PIL import Image

    share, noise = tmp_path / "share", np.random.default_rng(0)
    images = share / "wallpapers" / "Path" / "contents" / "images"
    for folder in (images, share / "backgrounds" / "mate" / "nature"):
        folder.mkdir(parents=True)
    for width, height in ((64, 48), (640, 480), (480, 640)):
        picture = Image.fromarray(noise.integers(0, 255, (height, width, 3), dtype=np.uint8))
        picture.save(images / f"{width}x{height}.png")
    picture.save(share / "backgrounds" / "mate" / "nature" / "Dune.jpg")
    (share / "wallpapers" / "Empty").mkdir()
    own = parts["drawn"].draw_photographs(tmp_path / "own", 2)
    monkeypatch.setattr(parts["debian"], "list_photographs", lambda folder: {"train": sorted(own.iterdir())})
    taken = parts["debian"].collect(share, tmp_path / "taken")
    assert {path.name for path in taken.iterdir()} == {"Dune.jpg", "Path.png", "00.png", "01.png"}
    assert Image.open(taken / "Path.png").size == (640, 480)


def test_a_picture_too_large_to_open_is_left_out(parts, tmp_path, monkeypatch):
    from PIL import Image

    path = next(parts["drawn"].draw_objects(tmp_path, 1).iterdir())
    assert parts["clips"].usable(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow refuses twice as many
    assert not parts["clips"].usable(path)


@pytest.mark.parametrize("arm", ["sta", "reader"])
def test_stored_tokens_give_the_features_of_the_whole_encoder(parts, work, arm):
    cache, clips, new_reader = parts["cache"], parts["clips"], parts["pretrain_reader"].new_reader
    encoder = parts["encoder"].load_encoder("tiny", work)
    watcher = parts["arms"].Watcher(encoder, new_reader(encoder), 2, parts["arms"].ARMS[arm])
    pixels = torch.randn(2 * clips.FRAMES, 3, clips.SIZE, clips.SIZE, generator=torch.Generator().manual_seed(0))
    whole = encoder
    if arm == "sta":
        from sta_adapter import STAConfig, inject_sta

        handle = inject_sta(whole, STAConfig(layers=(2, 3)))
        with torch.no_grad():
            for index, block in handle.blocks.items():
                block.to_out.weight.normal_(generator=torch.Generator().manual_seed(index))
                watcher.handle.blocks[index].load_state_dict(block.state_dict())
        with handle.clips([clips.FRAMES] * 2):
            expected = whole(pixels).last_hidden_state
    else:
        expected = whole(pixels).last_hidden_state
    tokens = cache.below(parts["encoder"].load_encoder("tiny", work), 2)(pixels).last_hidden_state
    found = watcher.features(tokens.unflatten(0, (2, clips.FRAMES))).flatten(0, 1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_tokens_stored_after_all_blocks_are_what_the_blocks_in_play_make_of_those_stored_before_them(parts, work):
    prepared, arms, new_reader = parts["prepare"], parts["arms"], parts["pretrain_reader"].new_reader
    encoder = parts["encoder"].load_encoder("tiny", work)
    before, after = (prepared.Data(work, "val", depth).tokens for depth in (prepared.QUICK.first, 4))
    watchers = [arms.Watcher(encoder, new_reader(encoder), depth, arms.ARMS["reader"]) for depth in (2, 4)]
    found = [watcher.features(tokens) for watcher, tokens in zip(watchers, (before, after), strict=True)]
    torch.testing.assert_close(*found, atol=0.05, rtol=0.05)  # both were stored in bf16


def test_what_the_reader_reads_is_counted_word_by_word(parts, work, monkeypatch):
    prepared, arms, measuring = parts["prepare"], parts["arms"], parts["measure"]
    encoder = parts["encoder"].load_encoder("tiny", work)
    reader = parts["pretrain_reader"].new_reader(encoder)
    watcher, data = arms.Watcher(encoder, reader, 4, arms.ARMS["reader"]), prepared.Data(work, "val", 4)

    def always(features, question, answer, places):
        said = torch.zeros(*answer.shape, len(reader.words))
        said[..., reader.number("0")] = 1
        said[:, 0] = torch.nn.functional.one_hot(torch.tensor(reader.number("yes")), len(reader.words))
        return said

    monkeypatch.setattr(reader, "forward", always)
    frames = [(clip, clip["states"][t]) for clip in data.clips for t in (0, 4, 7)]
    seen = [(clip, state) for clip, state in frames if state["visible"]]
    turned = [round(state["angle"] / 45) % 8 == 0 for clip, state in seen if clip["label"].endswith("clockwise")]
    found = measuring.read(watcher, data)
    assert found["there"] == pytest.approx(len(seen) / len(frames), abs=1e-3)
    assert found["angle"] == pytest.approx(sum(turned) / len(turned), abs=1e-3)
    assert found["column"] == pytest.approx(sum(state["x"] < 0.1 for _, state in seen) / len(seen), abs=1e-3)
    for clip in data.clips:
        for state in clip["states"]:
            state["angle"] = 5.0
    assert "angle" not in measuring.read(watcher, data)  # nothing turns


def test_the_question_sees_every_frame_and_where_it_stands(parts):
    reading = parts["reader"]
    reader = reading.Reader(32, 6, 4, ("right", "left"))
    generator = torch.Generator().manual_seed(0)
    clip, answer = torch.randn(2, 4, 37, 32, generator=generator), torch.tensor([[0], [1]])
    said = reader(clip, reading.MOVEMENT, answer)
    for frame in range(4):
        other = clip.clone()
        other[0, frame] = torch.randn(37, 32, generator=generator)
        changed = (reader(other, reading.MOVEMENT, answer) - said).abs().amax((1, 2))
        assert changed[0] > 1e-4, frame
        assert changed[1] < 1e-6, frame
    assert (reader(clip.flip(1), reading.MOVEMENT, answer) - said).abs().max() > 1e-4
    first, last = (reader(clip[:, :1], reading.DESCRIBE, answer, torch.full((2, 1), place)) for place in (0, 3))
    assert (first - last).abs().max() > 1e-4


def test_a_reader_that_knows_no_order_answers_alike_whatever_the_order(parts, work):
    prepared, arms, new_reader = parts["prepare"], parts["arms"], parts["pretrain_reader"].new_reader
    encoder = parts["encoder"].load_encoder("tiny", work)
    data = prepared.Data(work, "val", prepared.QUICK.first)
    tokens, answer = data.tokens[:4], data.answers(new_reader(encoder), list(range(4)))
    changes = {}
    for order in arms.ORDERS:
        watcher = arms.Watcher(encoder, new_reader(encoder), prepared.QUICK.first, arms.ARMS["lora"], order)
        changes[order] = (watcher(tokens.flip(1), answer) - watcher(tokens, answer)).abs().max().item()
    assert changes["none"] < 1e-5
    assert min(changes["told"], changes["causal"], changes["learned"]) > 1e-4


@pytest.mark.parametrize("arm", ["sta", "sta_then_lora"])
@pytest.mark.parametrize("stop_after", [1, 3])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(parts, work, tmp_path, arm, stop_after):
    train, prepared = parts["train"], parts["prepare"]
    what = train.Run(arm, steps=4, order="learned")  # with vectors of frames, which are resumed too
    assert train.run(work, prepared.QUICK, what, tmp_path / "stopped", stop_after=stop_after) is None
    assert (work / "runs" / f"{what.name}.pt").exists()
    files = [train.run(work, prepared.QUICK, what, tmp_path / name) for name in ("stopped", "whole")]
    stopped, whole = (json.loads(file.read_text()) for file in files)
    for key in ("curve", "ordered", "shuffled", "parameters"):
        assert stopped[key] == whole[key], key
    assert [point["step"] for point in whole["curve"]] == [1, 2, 3, 4]
    assert whole["ordered"]["total"] == prepared.QUICK.test


def test_lora_waits_until_sta_has_had_its_steps(parts, work, tmp_path):
    train = parts["train"]
    what = train.Run("sta_then_lora", steps=4)
    moved = []
    for stop_after in (2, 1):
        train.run(work, parts["prepare"].QUICK, what, tmp_path, stop_after=stop_after)
        trained = torch.load(work / "runs" / f"{what.name}.pt", weights_only=True)["trained"]
        moved.append(
            {kind: any(kind in name and p.any() for name, p in trained.items()) for kind in ("to_out", "lora_B")}
        )
    assert moved == [{"to_out": True, "lora_B": False}, {"to_out": True, "lora_B": True}]


def test_parameters_are_equal(parts, work):
    encoder = parts["encoder"].load_encoder("tiny", work)
    sizes = {}
    for arm in ("sta", "lora"):
        reader = parts["pretrain_reader"].new_reader(encoder)
        watcher = parts["arms"].Watcher(encoder, reader, 2, parts["arms"].ARMS[arm])
        sizes[arm] = sum(p.numel() for p in watcher.adapter())
    assert sizes["sta"] <= sizes["lora"] < 1.1 * sizes["sta"]


def test_the_page_and_the_figure_are_those_of_the_committed_runs(parts):
    table = parts["table"]
    runs, page = table.load(), (table.DOCS / "proof.md").read_text(encoding="utf-8")
    assert table.page(runs, page) == page
    require_same_drawing(table.figure(runs), (table.DOCS / "figures" / "proof.svg").read_text(encoding="utf-8"))


def test_the_goal_is_judged_by_seed(parts):
    def run(arm, seed, correct, val=0.5, lr=1.0, order="told", test=True):
        what = {
            "arm": arm,
            "seed": seed,
            "test": test,
            "share": 1.0,
            "steps": 1,
            "lr": lr,
            "reader_lr": 1.0,
            "order": order,
        }
        measured = {"correct": correct, "total": 600, "accuracy": correct / 600}
        return {"run": what, "ordered": measured, "curve": [{"step": 1, "val": val}]}

    verdict = parts["table"].verdict
    met = [run("sta", 0, 500), run("lora", 0, 300)]
    assert "*told* **met in every pair of runs** (1 of 1)." in verdict(met)
    assert "*told* **not met** (1 of 2)." in verdict([*met, run("sta", 1, 440), run("lora", 1, 300)])
    assert "**not met** (no pair of runs)." in verdict(met[:1])
    assert "*told* **not met** (0 of 1)." in verdict([*met, run("lora", 0, 550, val=0.9, lr=2.0)])
    assert "*told* **met" in verdict([*met, run("lora", 0, 550, val=0.1, lr=2.0)])
    grid = [run("lora", 0, 0, val=val, lr=lr, test=False) for val, lr in ((0.8, 1.0), (0.6, 2.0))]
    assert "*told* **met" in verdict(
        [*met, run("lora", 0, 550, val=0.9, lr=2.0), *grid]
    )  # the grid's rate for all seeds
    causal = [run("sta", 0, 400, order="causal"), run("lora", 0, 300, order="causal")]
    assert "*told* **met in every pair of runs** (1 of 1); " in verdict([*met, *causal])
    assert "*causal* **not met** (0 of 1)." in verdict([*met, *causal])


def test_a_run_s_result_goes_where_it_is_told(parts, monkeypatch, tmp_path, capsys):
    """A run on other pictures has the same name, and one whose file is there is not run again."""
    train = parts["train"]
    asked = []

    def run(work, settings, what, results):
        asked.append(settings.circling)
        return results / f"{what.name}.json"

    monkeypatch.setattr(train, "run", run)
    monkeypatch.setattr(train.torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(
        sys, "argv", ["train.py", "--results", str(tmp_path), "--circling", "run", "sta", "--order", "causal"]
    )
    train.main()
    assert asked == [True]
    assert capsys.readouterr().out.startswith(str(tmp_path / "sta-seed0"))
