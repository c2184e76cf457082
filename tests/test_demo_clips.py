"""The demo's clips: opposite motions that only the order of frames tells apart."""

import json
import math

import numpy as np
import pytest
import torch

from sta_adapter.data import read_samples
from sta_adapter.demo import clips
from sta_adapter.errors import ConfigError
from sta_adapter.video import read_clip

PAIRS = pytest.mark.parametrize("pair", clips.PAIRS, ids="/".join)
TRAIN, TEST = range(300), range(10_000, 10_200)


@PAIRS
@pytest.mark.parametrize("look", ["train", "held_out"])
def test_reversed_clip_is_the_opposite_of_the_same_seed(pair, look):
    for seed in range(20):
        first, second = (clips.render(label, seed, look, size=32) for label in pair)
        np.testing.assert_array_equal(first[::-1], second)
        assert (first != second).any()


@PAIRS
def test_a_shape_rests_before_and_after_its_motion(pair):
    quiet = clips.Difficulty(shake=0, noise=0)
    first, second = (clips.render(label, 3, frames=4, size=32, level=quiet, rest=2) for label in pair)
    np.testing.assert_array_equal(first[::-1], second)
    assert len(first) == 2 + 4 + 2
    assert all((frame == first[2]).all() for frame in first[:2])
    assert all((frame == first[5]).all() for frame in first[6:])
    assert (first[2] != first[5]).any()


@pytest.mark.parametrize("label", clips.LABELS)
def test_opposite_is_its_own_inverse_within_a_category(label):
    other = clips.opposite(label)
    assert other != label
    assert clips.opposite(other) == label
    assert clips.category(other) == clips.category(label)


def test_looks_share_no_shape_no_colour_and_no_background():
    train, held_out = clips.LOOKS["train"], clips.LOOKS["held_out"]
    assert not set(train.shapes) & set(held_out.shapes)
    assert not set(train.colours) & set(held_out.colours)
    assert all(top <= low or high <= bottom for bottom, top in train.background for low, high in held_out.background)
    assert {*train.shapes, *held_out.shapes} == set(clips.SHAPES)


@pytest.mark.parametrize("shape", clips.SHAPES)
def test_every_shape_has_an_inside_and_an_outside(shape):
    v, u = np.meshgrid(np.linspace(-1.5, 1.5, 61), np.linspace(-1.5, 1.5, 61), indexing="ij")
    inside = clips.signed_distance(shape, u, v) < 0
    assert 0.05 < inside.mean() < 0.6
    assert not inside[0].any()
    assert not inside[:, 0].any()


def test_seed_decides_the_clip():
    np.testing.assert_array_equal(clips.render("left", 1), clips.render("left", 1))
    assert (clips.render("left", 1) != clips.render("left", 2)).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sideways", 0), "label is 'sideways', expected one of left, right"),
        (("left", 0, "odd"), "look is 'odd', expected one of"),
        (("left", 0, "train", 1), "frames is 1, expected at least 2"),
    ],
    ids=["label", "look", "frames"],
)
def test_what_cannot_be_rendered_is_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        clips.render(*arguments)


def test_data_set_on_disk(tmp_path):
    file = clips.write_dataset(tmp_path, "held_out", range(20), look="held_out")
    records = [json.loads(line) for line in file.read_text().splitlines()]
    answers = [record["messages"][1]["content"] for record in records]
    assert answers == list(clips.LABELS) * 2
    assert all(record["messages"][0]["content"][0]["video"].startswith("held_out/") for record in records)
    samples = read_samples(file)
    assert [sample.category for sample in samples[:2]] == ["left/right"] * 2
    for index, sample in enumerate(samples[:10]):
        frames, times, _ = read_clip(sample.messages[0]["content"][0]["video"], num_frames=8)
        drawn = clips.render(answers[index], index, "held_out").astype(int)
        assert frames.shape == drawn.shape
        lost = (frames - drawn).reshape(8, 32, 2, 32, 2, 3).mean((2, 4))  # at the 32 x 32 pixels that the base sees
        assert np.abs(lost).mean() < 5  # grey levels, of the 100 and more that a shape stands out by
        assert np.all(np.diff(times) > 0)


def measures(clip: np.ndarray) -> np.ndarray:
    """What stands out of each frame, (T, 7): where, how large, how much, which way it is drawn out."""
    away = np.abs(clip.astype(float) - np.median(clip, axis=(1, 2), keepdims=True)).sum(-1)
    away = np.where(away > 60, away, 0) + 1e-3
    rows, columns = np.meshgrid(*(np.linspace(-1, 1, size) for size in clip.shape[1:3]), indexing="ij")
    mass = away.sum((1, 2))

    def mean(values: np.ndarray) -> np.ndarray:
        return (away * values).sum((1, 2)) / mass

    x, y = mean(columns), mean(rows)
    dx, dy = columns - x[:, None, None], rows - y[:, None, None]
    return np.stack([x, y, (away > 1).mean((1, 2)), away.max((1, 2)), mean(dx * dx), mean(dy * dy), mean(dx * dy)], 1)


def share_right(inputs: dict[str, torch.Tensor], labels: dict[str, torch.Tensor]) -> float:
    """Accuracy on the test clips of a small network trained on the others."""
    torch.manual_seed(0)
    mean, spread = inputs["train"].mean(0), inputs["train"].std(0) + 1e-6
    known, new = ((inputs[part] - mean) / spread for part in ("train", "test"))
    network = torch.nn.Sequential(torch.nn.Linear(known.shape[1], 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3, weight_decay=0.3)
    for _ in range(150):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(known), labels["train"]).backward()
        optimizer.step()
    return (network(new).argmax(1) == labels["test"]).float().mean().item()


@pytest.fixture(scope="module", params=clips.PAIRS, ids="/".join)
def seen(request):
    """Measures (clips, T, 7) and small grey frames (clips, T, 64) of one pair's clips, and which of the two each is."""
    found, labels = {}, {}
    for part, seeds in (("train", TRAIN), ("test", TEST)):
        drawn = [clips.render(request.param[seed % 2], seed, "train", size=32) for seed in seeds]
        grey = [clip.mean(-1).reshape(len(clip), 8, 4, 8, 4).mean((2, 4)).reshape(len(clip), 64) for clip in drawn]
        found["measures", part] = torch.tensor(np.stack([measures(clip) for clip in drawn])).float()
        found["grey", part] = torch.tensor(np.stack(grey)).float()
        labels[part] = torch.tensor([seed % 2 for seed in seeds])
    return found, labels


def bound(count: int) -> float:
    """Chance is left behind by luck in one of about a thousand tries: half and 3.3 standard deviations."""
    return 0.5 + 3.3 * 0.5 / math.sqrt(count)


@pytest.mark.parametrize("kind", ["measures", "grey"])
@pytest.mark.parametrize("pooling", ["sorted", "random order"])
def test_frames_without_order_say_nothing(seen, kind, pooling):
    found, labels = seen
    inputs = {}
    for part in ("train", "test"):
        frames = found[kind, part]
        if pooling == "sorted":
            frames = torch.cat([frames.sort(1).values, frames.var(1, keepdim=True)], 1)
        else:
            order = torch.rand(frames.shape[:2], generator=torch.Generator().manual_seed(0)).argsort(1)
            frames = frames.gather(1, order[..., None].expand_as(frames))
        inputs[part] = frames.flatten(1)
    assert share_right(inputs, labels) < bound(len(TEST))


def test_frames_in_order_tell_the_two_apart(seen):
    found, labels = seen
    inputs = {part: found["measures", part].flatten(1) for part in ("train", "test")}
    assert share_right(inputs, labels) > bound(len(TEST))


def test_a_description_follows_the_movement_and_is_reversed_with_it():
    found = {label: clips.describe(label, 5) for label in clips.LABELS}
    for label in clips.LABELS:
        assert found[label] == found[clips.opposite(label)][::-1]
        assert {len(words) for words in found[label]} == {5}
    place = {"left": (0, -1), "up": (1, -1), "grows": (2, 1), "clockwise": (3, 1), "appears": (4, 1)}
    for label, (digit, sign) in place.items():
        first, last = (int(found[label][t][digit]) for t in (0, -1))
        assert sign * (last - first) > 0, label
