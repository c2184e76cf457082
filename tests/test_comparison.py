"""Results side by side: intervals of differences, sentences, table and picture."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sta_adapter.data import Sample
from sta_adapter.errors import MissingExtraError
from sta_adapter.evaluation import EvaluationResult, Prediction
from sta_adapter.evaluation.comparison import as_text, chance, clips_of, compare, mean_interval
from sta_adapter.evaluation.plot import MOST_ROWS, draw, figure_of

TASKS = [
    "Temporal Perception", "Spatial Perception", "Attribute Perception", "Action Recognition", "Object Recognition",
    "OCR Problems", "Counting Problem", "Temporal Reasoning", "Spatial Reasoning", "Action Reasoning",
    "Object Reasoning", "Information Synopsis", "Throwing something in the air and letting it fall, very far away",
]  # fmt: skip


def result(right, frames="ordered", unmatched=0, bad=()):
    predictions = [
        Prediction(i, f"line {i}", TASKS[i % len(TASKS)], "A", "B", bool(ok), unmatched=i < unmatched)
        for i, ok in enumerate(right)
    ]
    return EvaluationResult(predictions, list(bad), frames)


def drawn(share, count, seed):
    return np.random.default_rng(seed).random(count) < share


# ---- intervals


def test_one_question_a_clip_is_the_plain_bootstrap():
    values = drawn(0.3, 400, 0).astype(float)
    mean, low, high = mean_interval(values, range(400), seed=1)
    error = np.sqrt(mean * (1 - mean) / 400)
    assert mean == values.mean()
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.004)
    assert mean_interval(values, range(400), seed=1) == (mean, low, high)
    assert mean_interval(values, range(400), seed=2) != (mean, low, high)


def test_questions_about_one_clip_are_drawn_together():
    clips = drawn(0.5, 50, 0).astype(float)
    one = mean_interval(clips, range(50))
    three = mean_interval(clips.repeat(3), np.arange(50).repeat(3))  # the same, asked three times: no new knowledge
    assert three == pytest.approx(one)
    singly = mean_interval(clips.repeat(3), range(150))
    assert singly[2] - singly[1] < 0.7 * (one[2] - one[1])


def test_nothing_asked():
    assert mean_interval([], []) == (0, 0, 0)


@given(st.lists(st.tuples(st.sampled_from([-1.0, 0.0, 1.0]), st.integers(0, 5)), min_size=1, max_size=40))
def test_the_interval_holds_the_mean_of_values_and_stays_in_range(pairs):
    values, clips = zip(*pairs, strict=True)
    mean, low, high = mean_interval(values, clips, draws=200)
    assert min(values) <= low <= high <= max(values)
    assert mean == pytest.approx(np.mean(values))
    negated = mean_interval([-value for value in values], clips, draws=200)
    assert negated == pytest.approx((-mean, -high, -low))


# ---- comparing


def test_base_against_adapter_and_controls():
    base, adapter = drawn(0.5, 300, 1), np.maximum(drawn(0.5, 300, 1), drawn(0.6, 300, 2))
    results = {
        "base": {"ordered": result(base), "shuffled": result(base)},
        "adapter": {"ordered": result(adapter), "shuffled": result(drawn(0.4, 300, 3))},
    }
    report = compare(results, range(300))
    found = {(d["of"], d.get("model") or d["frames"]): d for d in report["differences"]}
    assert set(found) == {
        ("adapter - base", "ordered"), ("adapter - base", "shuffled"), ("ordered - shuffled", "base"),
        ("ordered - shuffled", "adapter"), ("ordered - shuffled", "adapter - base"),
    }  # fmt: skip
    gain = found["adapter - base", "ordered"]
    assert gain["difference"] == pytest.approx(adapter.mean() - base.mean())
    assert 0 < gain["low"] < gain["difference"] < gain["high"]
    assert (gain["questions"], gain["clips"]) == (300, 300)
    assert found["ordered - shuffled", "base"]["high"] == 0
    both = found["ordered - shuffled", "adapter - base"]
    assert both["difference"] == pytest.approx(found["ordered - shuffled", "adapter"]["difference"])
    reading = "\n".join(report["reading"])
    assert "The adapter is better than the base: +" in reading
    assert "Does the base use time at all? Not shown: ordered - shuffled is +0.0 [+0.0, +0.0]" in reading
    assert "Does the adapter use time at all? Yes: ordered - shuffled is +" in reading
    assert "The adapter uses it more than the base does: +" in reading
    assert "too few" not in reading


def test_only_questions_that_all_answered_count():
    whole, part = result([1, 1, 1, 1]), result([0, 0])
    difference = compare({"base": {"ordered": part}, "adapter": {"ordered": whole}}, "abab")["differences"][0]
    assert (difference["questions"], difference["clips"], difference["difference"]) == (2, 2, 1)


def test_the_seed_is_zero_unless_another_is_given():
    results = {"base": {"ordered": result(drawn(0.5, 401, 1)), "shuffled": result(drawn(0.5, 401, 2))}}
    clips = [number**2 // 401 for number in range(401)]  # of many sizes, so that no two draws have the same mean
    assert compare(results, clips) == compare(results, clips, seed=0) != compare(results, clips, seed=1)


def test_few_clips_and_a_model_that_is_better_without_order():
    orders = {"ordered": result([0] * 9), "reversed": result([1] * 9)}
    reading = compare({"base": orders}, range(9))["reading"]
    assert reading == [
        "Does the base use time at all? No, it is better without: ordered - reversed is -100.0 [-100.0, -100.0] points.",
        "Only 9 clips: too few to rely on these intervals.",
    ]


@pytest.mark.parametrize(("count", "few"), [(29, True), (30, False)])
def test_how_many_clips_are_few(count, few):
    orders = {"ordered": result([1] * count), "reversed": result([0] * count)}
    reading = compare({"base": orders}, range(count))["reading"]
    assert any(f"Only {count} clips: too few" in line for line in reading) is few


def test_clips_and_chance():
    def sample(name, options):
        parts = [{"type": "video", "video": name}, {"type": "text", "text": "?"}]
        return Sample([{"role": "user", "content": parts}], category="k", options=options)

    samples = [sample("a", ["x", "y"]), sample("a", list("wxyz")), sample("b", ["x", "y"])]
    assert clips_of(samples) == [("a",), ("a",), ("b",)]
    assert chance(samples) == {"overall": pytest.approx(1.25 / 3), "categories": {"k": pytest.approx(1.25 / 3)}}
    assert chance([*samples, sample("c", None)]) is None


# ---- showing


@pytest.fixture(scope="module")
def report():
    results = {
        name: {o: result(drawn(share, 260, seed), o, 3, ["line 9: gone"]) for o in ("ordered", "shuffled", "reversed")}
        for name, share, seed in (("base", 0.4, 0), ("adapter", 0.6, 1))
    }
    return {
        **compare(results, range(260)),
        "chance": {"overall": 0.25, "categories": dict.fromkeys(TASKS, 0.25)},
        "notes": ["Asked without subtitles."],
    }


def test_text_fits_the_screen(report):
    whole = {"accuracy": 1.0, "low": 1.0, "high": 1.0, "correct": 1200, "total": 1200}
    wide = {
        "categories": {"Throwing something in the air or": whole},
        "overall": whole,
        "bad_samples": [],
        "frames": "ordered",
    }
    assert max(map(len, as_text({name: {"ordered": wide} for name in ("base", "adapter")}).split("\n"))) <= 80
    lines = as_text(report).split("\n")
    assert max(map(len, lines)) <= 80
    heads = [block.split("\n")[0].split() for block in as_text(report).split("\n\n")[:2]]
    assert heads == [["right,", "%", "of"], ["difference", "points", "clips"]]
    text = " ".join(" ".join(lines).split())
    for words in ("base, reversed", "by category, ordered", "Information Synopsis", "Asked without subtitles."):
        assert words in text
    assert "Samples that could not be used and don't count: 1. The first: line 9: gone" in text
    assert "Answers that could not be read, counted as wrong: 3 (base, ordered), 3 (base, shuffled)" in text
    assert lines[-3:] == ['  "B" (line 0)', '  "B" (line 1)', '  "B" (line 2)']


def test_labels_of_the_picture_do_not_collide(report):
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = figure_of(report)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    for axis in figure.axes:
        boxes = [label.get_window_extent(canvas.get_renderer()) for label in axis.get_yticklabels()]
        assert len(boxes) in (13, 3)
        for above, below in itertools.pairwise(boxes):
            assert above.y0 >= below.y1
        assert min(box.x0 for box in boxes) >= 0


def test_without_matplotlib(report, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'sta-adapter\[viz\]'"):
        draw(report, tmp_path / "results.png")


@pytest.mark.parametrize("frames", ["ordered", "shuffled"])
def test_the_picture_shows_the_shares_of_the_order_that_was_asked(frames):
    """By category those of the frames in order, or of the only order there is; below them all questions."""
    pytest.importorskip("matplotlib")
    right = [True, False, True, True] * 13
    figure = figure_of({"base": {frames: result(right, frames).to_dict()}})
    by_category, all_questions = figure.axes
    assert by_category.get_title(loc="left") == f"By category, frames {frames}"
    (marks,) = [line.get_xdata() for line in all_questions.lines if line.get_marker() == "s"]
    assert list(marks) == [75.0]


@pytest.mark.parametrize("count", [MOST_ROWS, MOST_ROWS + 1, 5000])
def test_more_categories_than_a_picture_holds(report, tmp_path, count):
    pytest.importorskip("matplotlib")
    overall = report["base"]["ordered"]["overall"]
    categories = {f"category {n}": {**overall, "total": n} for n in range(count)}
    runs = {order: {**run, "categories": categories} for order, run in report["base"].items()}
    figure = figure_of({"base": runs, "adapter": runs})
    axis = figure.axes[0]
    labels = [label.get_text() for label in axis.get_yticklabels()]
    assert labels == [f"category {n}" for n in range(count - MOST_ROWS, count)]
    more = "" if count == MOST_ROWS else f": the {MOST_ROWS} of {count} with most questions"
    assert axis.get_title(loc="left") == f"By category, frames ordered{more}"
    draw({"base": runs, "adapter": runs}, tmp_path / "results.png")


@pytest.mark.parametrize("name", [r"$\frac$", "a $ b $", "50 % {x_}", r"\alpha"])
def test_a_category_is_no_formula(report, tmp_path, name):
    pytest.importorskip("matplotlib")
    runs = {order: {**run, "categories": {name: run["overall"]}} for order, run in report["base"].items()}
    draw({"base": runs}, tmp_path / "results.png")
    assert (tmp_path / "results.png").stat().st_size
