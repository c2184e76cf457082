"""`sta-adapter visualize`: the files, the page, and what is said when there can be no overlay."""

import base64
import dataclasses
import hashlib
import html
import io
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from browser import chromium, find_chromium
from cases import randomize
from click.testing import CliRunner

from sta_adapter import STAConfig, inject_sta
from sta_adapter.cli import cli
from sta_adapter.cli.visualize import write_look
from sta_adapter.data.visual_processing import temporal_patch
from sta_adapter.demo import TINY_BASE
from sta_adapter.demo.clips import render
from sta_adapter.errors import CheckpointError, ConfigError
from sta_adapter.internvideo.v2_5_images import InternVideo2_5ImageProcessor
from sta_adapter.internvideo.v2_images import InternVideo2ImageProcessor
from sta_adapter.loading import load_model
from sta_adapter.video import read_clip, write_clip
from sta_adapter.visualization import Observation, observe
from sta_adapter.visualization import figures as pictures
from sta_adapter.visualization import report as look_page
from sta_adapter.visualization.viewer import LoadedClip, Viewer, crops

FILES = {
    "index.html",
    "attention.png",
    "branch.png",
    "overlay.png",
    "overlay.mp4",
    "overlay.gif",
    "arrays.npz",
    "numbers.json",
}


def observation(blocks=4, heads=3, frames=6, shape=(2, 3), **fields):
    """Made-up arrays of the right shapes."""
    rng, positions = np.random.default_rng(0), shape[0] * shape[1]
    made = {
        "blocks": tuple(range(1, blocks + 1)),
        "attention": rng.dirichlet(np.ones(frames), (blocks, heads, frames)).astype(np.float32),
        "crossing": rng.random((blocks, frames, positions), np.float32),
        "branch": rng.random((blocks, frames, positions), np.float32),
        "change": rng.random((frames, positions), np.float32),
        "even": np.full(frames, 1 - 1 / frames, np.float32),
        "positions": np.arange(positions).reshape(shape),
        "no_picture": "",
        "lands_elsewhere": False,
    }
    return Observation(**{**made, **fields})


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return str(write_clip(tmp_path_factory.mktemp("clips") / "left & right.mp4", render("left", 7), 8.0))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    handle = inject_sta(load_model(TINY_BASE, device="cpu"), STAConfig(head_scale=1.0))
    for index, module in enumerate(handle.blocks.values()):
        randomize(module, seed=index, std=0.1)
    handle.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def look(tmp_path_factory, clip, adapter):
    """Folder and JSON of one run."""
    folder = tmp_path_factory.mktemp("look") / "out"
    options = ["--adapter", adapter, "--out", str(folder), "--device", "cpu", "--json"]
    result = CliRunner().invoke(cli, ["visualize", clip, *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return folder, json.loads(result.stdout[result.stdout.index("{") :])


def test_files_and_numbers(look, clip, adapter):
    folder, numbers = look
    assert {file.name for file in folder.iterdir()} == FILES == set(numbers["files"])
    assert numbers["notes"] == []
    assert (numbers["frames"], numbers["positions"], numbers["heads"]) == (8, 16, 3)
    viewer = Viewer.load(TINY_BASE, adapter, device="cpu")
    seen = observe(viewer.handle, viewer.read(clip).inputs)
    arrays = np.load(folder / "arrays.npz")
    for name in ("attention", "crossing", "branch", "change", "even", "positions", "blocks"):
        np.testing.assert_array_equal(arrays[name], getattr(seen, name))
    for row, branch, crossing in zip(numbers["blocks"], seen.branch, seen.crossing, strict=True):
        assert row["branch"] == pytest.approx(branch.mean(), abs=1e-5)
        assert row["crossing"] == pytest.approx(crossing.mean(), abs=1e-5)
    assert numbers["block_shown"] == seen.blocks[seen.branch.mean((1, 2)).argmax()]
    assert read_clip(folder / "overlay.mp4", num_frames=100).frames.shape[0] == 8


def test_the_page_needs_nothing_else(look):
    text = (look[0] / "index.html").read_text(encoding="utf-8")
    assert "left &amp; right.mp4" in text
    sources = re.findall(r'(?:src|srcset|href)="([^"]{0,30})', text)
    assert len(sources) == 3 * 2 + 1
    assert all(source.startswith("data:") for source in sources)
    assert "$" not in re.sub(r'"data:[^"]*"', "", text)
    (allowed,) = re.findall(r"script-src ([^;\"]+)", html.unescape(text))
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert allowed == f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
    assert not re.search(r"fetch\(|XMLHttpRequest|WebSocket|import\(|https?:", script)


def test_without_an_adapter_it_says_so(tmp_path, clip):
    result = CliRunner().invoke(
        cli, ["visualize", clip, "--out", str(tmp_path), "--model", str(TINY_BASE), "--nframes", "3", "--device", "cpu"]
    )
    assert result.exit_code == 0, result.output
    assert "note: No adapter was given, so STA is untrained" in result.stdout
    assert "3 steps of 16 positions" in result.stdout
    assert "output changes by 0.00 %" in result.stdout
    assert "STA is untrained" in (tmp_path / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--block", "9"], r"--block 9: STA is in the blocks 0, 1, 2, 3\."),
        (["--fps", "1", "--nframes", "2"], "exclude each other"),
    ],
    ids=["block", "rates"],
)
def test_options_that_dont_fit(tmp_path, clip, options, message):
    with pytest.raises(ConfigError, match=message):
        CliRunner().invoke(cli, ["visualize", clip, "--out", str(tmp_path), *options], catch_exceptions=False)


def test_an_adapter_without_sta(tmp_path):
    peft = pytest.importorskip("peft")
    model = load_model(TINY_BASE, device="cpu")
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="holds LoRA weights and no STA"):
        Viewer.load(TINY_BASE, tmp_path, device="cpu")


# ---- never a wrong map


@pytest.fixture(scope="module")
def viewer():
    return Viewer.load(TINY_BASE, device="cpu")


def test_steps_of_several_frames_show_their_first(viewer, clip):
    loaded = viewer.read(clip)
    frames, times, why = loaded.step_frames(observation(frames=4))
    assert why == ""
    np.testing.assert_array_equal(frames, loaded.frames[::2])
    np.testing.assert_allclose(times, np.arange(0, 8, 2) / 8)
    assert temporal_patch(viewer.processor) == 1


@pytest.mark.parametrize("reason", ["steps", "positions", "cropped"])
def test_what_cant_be_laid_on_the_picture_is_left_out(viewer, clip, reason):
    part = SimpleNamespace(do_center_crop=reason == "cropped")
    loaded = dataclasses.replace(viewer.read(clip), cropped=crops(SimpleNamespace(video_processor=part)))
    unknown = {"positions": None, "no_picture": "nobody knows."} if reason == "positions" else {}
    seen = observation(frames=3 if reason == "steps" else 8, **unknown)
    expected = {"steps": "3 steps of 8 frames", "positions": "nobody knows", "cropped": "crops or pads"}[reason]
    frames, times, why = loaded.step_frames(seen)
    assert expected in why
    noted = look_page.notes(seen, why, trained=True)
    assert noted == [f"There is no overlay: {why}"]
    text = look_page.sections(seen, frames[:0], times, noted=noted)
    assert "Where in the picture" not in text
    assert expected in text
    assert "Which frame looks at which" in text


def test_no_picture_of_a_clip_before_stays(viewer, clip, tmp_path, monkeypatch):
    for name in ("overlay.png", "overlay.mp4", "overlay.gif"):
        (tmp_path / name).write_text("of another clip")
    monkeypatch.setattr(LoadedClip, "step_frames", lambda self, seen: (self.frames[:0], None, "nobody knows."))
    numbers = write_look(viewer, clip, tmp_path, None, "")
    assert {file.name for file in tmp_path.iterdir()} == set(numbers["files"])
    assert "overlay.png" not in numbers["files"]


def test_internvideo2_chat_sees_a_part_of_the_picture():
    for tiles in (None, (2, 1)):  # the middle, or each half
        assert crops(SimpleNamespace(image_processor=InternVideo2ImageProcessor(tiles=tiles)))
    assert not crops(SimpleNamespace(image_processor=InternVideo2_5ImageProcessor()))


def test_the_published_token_order_is_explained():
    (note,) = look_page.notes(observation(lands_elsewhere=True), "", trained=True)
    assert "where the result lands" in note


# ---- figures


@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 16, 4), (32, 4, 16)], ids=["least", "many-heads", "many-blocks"])
@pytest.mark.parametrize("theme", [pictures.LIGHT, pictures.DARK], ids=["light", "dark"])
def test_figures_of_any_size(shape, theme):
    from PIL import Image

    blocks, heads, frames = shape
    seen = observation(blocks, heads, frames)
    for figure in (pictures.draw_attention(seen, theme), pictures.draw_branch(seen, theme)):
        image = Image.open(io.BytesIO(pictures.png(figure)))
        assert image.mode == "RGBA"
        assert np.asarray(image)[0, 0, 3] == 0  # the page's own colour shows through
        assert image.width < 3000


def test_the_first_frame_of_a_square_is_at_the_top_left():
    seen = observation(2, 1, 4)
    seen.attention[:] = np.arange(1, 1 + 2 * 16, dtype=np.float32).reshape(2, 1, 4, 4) / 100
    axes = pictures.draw_attention(seen).axes[0]
    for image, tile in zip(axes.images, seen.attention[:, 0], strict=True):
        np.testing.assert_allclose(2 ** image.get_array(), 4 * tile, rtol=1e-5)  # as multiples of even spread
        left, right, bottom, top = image.get_extent()
        assert (right - left, bottom - top) == (pytest.approx(4), pytest.approx(4))
        assert image.origin == "upper"
    low, high = axes.get_ylim()
    assert low > high  # downwards, as the page says: down the frame that looks


@pytest.mark.parametrize(
    ("frames", "numbered"),
    [
        (5, [0, 1, 2, 3, 4]),
        (6, [0, 2, 4]),
        (20, [0, 4, 8, 12, 16]),
        (25, [0, 5, 10, 15, 20]),
        (40, [0, 8, 16, 24, 32]),
        (41, [0, 10, 20, 30, 40]),
        (64, [0, 16, 32, 48]),
        (256, [0, 64, 128, 192]),
    ],
)
def test_a_squares_frames_are_numbered_five_times_at_most(frames, numbered):
    texts = [
        text for text in pictures.draw_attention(observation(1, 1, frames)).axes[0].texts if text.get_ha() != "left"
    ]
    assert [int(text.get_text()) for text in texts if text.get_ha() == "right"] == numbered
    assert [int(text.get_text()) for text in texts if text.get_ha() == "center"] == numbered
    for text in texts:  # in the middle of its row or column of the square
        place = text.get_position()[text.get_ha() == "right"]
        assert place == pytest.approx(int(text.get_text()) + 0.5)


def test_moving_pictures_are_written_as_a_video_and_as_a_gif(tmp_path):
    from PIL import Image

    drawn = np.random.default_rng(0).integers(0, 255, (3, 32, 48, 3), np.uint8)
    video, gif = pictures.write_moving(tmp_path, "moving", drawn, fps=4.0)
    assert (video, gif) == (tmp_path / "moving.mp4", tmp_path / "moving.gif")
    assert read_clip(video, num_frames=100).frames.shape == drawn.shape
    with Image.open(gif) as image:
        assert (image.n_frames, image.size) == (3, (48, 32))
        assert (image.info["duration"], image.info["loop"]) == (250, 0)  # milliseconds; without an end


def test_the_bars_are_the_median_and_the_middle_eighty_percent():
    seen = observation(2, 1, 4)
    seen.branch[:] = np.linspace(0, 1, seen.branch.size, dtype=np.float32).reshape(seen.branch.shape)
    (_, _, (bars,)) = pictures.draw_branch(seen).axes[0].containers[0]
    for block, segment in enumerate(bars.get_segments()):
        values = np.sort(100 * seen.branch[block].ravel())
        expected = [np.quantile(values, 0.1), np.quantile(values, 0.9)]
        np.testing.assert_allclose(segment[:, 1], expected, rtol=1e-5)


def test_a_map_is_laid_patch_on_patch():
    """The value of a position shows in its own part of the picture, whatever the encoder's order is."""
    from matplotlib.figure import Figure

    seen = observation(shape=(2, 3), positions=np.array([[4, 1, 0], [2, 5, 3]]))
    values = np.arange(6.0)
    axes = Figure().subplots()
    shown = pictures.Quantity("branch", "", values, 0.1)
    pictures._lay_over(axes, np.zeros((20, 30)), seen.on_picture(values), shown, pictures.LIGHT)
    shown = axes.images[1]
    np.testing.assert_array_equal(shown.get_array(), [[4, 1, 0], [2, 5, 3]])
    assert list(shown.get_extent()) == [-0.5, 29.5, 19.5, -0.5]


def test_small_differences_are_not_blown_up():
    flat = observation(crossing=np.full((4, 6, 6), 5 / 6, np.float32), branch=np.zeros((4, 6, 6), np.float32))
    crossing, branch, _ = pictures.quantities(flat, 1)
    np.testing.assert_allclose(crossing.values, 1, rtol=1e-6)
    assert crossing.limits == (pytest.approx(0.98), pytest.approx(1.02))
    assert branch.limits == (0, pytest.approx(0.1))


def test_what_is_even_is_in_the_middle_of_the_colours():
    crossing, *_ = pictures.quantities(observation(), 1)
    low, high = crossing.limits
    assert low + high == pytest.approx(2)
    np.testing.assert_allclose(pictures.LIGHT.colours(0.5)[:3], np.array([0xF4, 0xF4, 0xF2]) / 255, atol=0.01)


def test_things_as_light_as_their_background_stay_visible():
    frames = np.full((2, 8, 8, 3), (120, 120, 120), np.uint8)
    frames[:, 2:5, 2:5] = (180, 60, 250)
    grey = pictures.shades(frames)
    assert abs(grey[0, 3, 3] - grey[0, 0, 0]) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_in_a_browser(look, tmp_path, dark):
    find_chromium()
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    with chromium(tmp_path / "profile", dark=dark) as browser:
        browser.get((look[0] / "index.html").as_uri())
        images = browser.find_elements(By.TAG_NAME, "img")
        assert len(images) == 3
        for image in images:
            assert browser.execute_script("return arguments[0].naturalWidth", image) > 300
            assert len(image.get_attribute("alt")) > 40
        ready = "const v = document.querySelector('video'); return v.readyState > 1 && v.videoWidth > 300 && !v.error"
        WebDriverWait(browser, 30).until(lambda b: b.execute_script(ready))
        shown = browser.execute_script("return arguments[0].currentSrc", images[0])
        source = browser.find_element(By.TAG_NAME, "source").get_attribute("srcset")
        assert (shown == source) is dark
        paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert paper == ("rgb(22, 25, 29)" if dark else "rgb(255, 255, 255)")
        table = browser.find_element(By.TAG_NAME, "table")
        assert not table.is_displayed()
        for _ in range(30):  # the numbers can be opened with the keyboard alone
            browser.switch_to.active_element.send_keys(Keys.TAB)
            if browser.switch_to.active_element.tag_name == "summary":
                break
        browser.switch_to.active_element.send_keys(Keys.ENTER)
        assert table.is_displayed()
        too_wide = "return document.documentElement.scrollWidth > document.documentElement.clientWidth"
        assert not browser.execute_script(too_wide)
        assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
