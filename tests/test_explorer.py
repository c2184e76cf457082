"""The part of the page that can be clicked: its numbers are those of the attention, whatever is chosen, and its size is bounded."""

import base64
import contextlib
import io
import json
import re

import numpy as np
import pytest
import torch
from browser import chromium, find_chromium, requested
from cases import randomize

from sta_adapter import STAConfig
from sta_adapter.demo import TINY_BASE
from sta_adapter.demo.clips import render
from sta_adapter.video import write_clip
from sta_adapter.visualization import Observation, observe, temporal_attention
from sta_adapter.visualization import report as look_page
from sta_adapter.visualization.explorer import _sampled, explorer_data
from sta_adapter.visualization.patch_attention import (
    EVEN,
    HIDDEN,
    Pooling,
    choose_pooling,
    decode,
    encode,
    may_see,
    pool,
    scale_of,
)
from sta_adapter.visualization.viewer import Viewer

T, SHAPE = 5, (2, 3)
STRANGE = "</script><script>document.title = 'hit'</script>"


def known(blocks=2, heads=2, frames=T, shape=SHAPE, times=None):
    """An observation whose attention is known for each patch, and frames for it."""
    rng, positions = np.random.default_rng(1), shape[0] * shape[1]
    weights = rng.dirichlet(np.ones(frames), (blocks, heads, *shape, frames)).astype(np.float32)
    sees = np.ones((frames, frames), bool)
    seen = Observation(
        blocks=tuple(range(1, blocks + 1)),
        attention=weights.mean((2, 3)),
        crossing=rng.random((blocks, frames, positions), np.float32),
        branch=rng.random((blocks, frames, positions), np.float32),
        change=rng.random((frames, positions), np.float32),
        even=np.full(frames, 1 - 1 / frames, np.float32),
        positions=np.arange(positions).reshape(shape),
        no_picture="",
        lands_elsewhere=False,
        patches=encode(weights, sees),
        pooling=Pooling(1, True, blocks),
    )
    return seen, weights, rng.integers(0, 255, (frames, 20, 30, 3), np.uint8)


# ---- a byte a value


@pytest.mark.parametrize("frames", [1, 2, 5, 64])
def test_a_byte_holds_a_weight_as_closely_as_is_said(frames):
    weights = np.random.default_rng(0).dirichlet(np.full(frames, 0.3), (3, frames)).astype(np.float32)
    found, sees = decode(encode(weights, np.ones((frames, frames), bool))), np.ones((frames, frames), bool)
    relative = weights * frames
    inside = relative >= 1 / frames
    np.testing.assert_allclose(found[inside], relative[inside], rtol=np.expm1(np.log(max(2, frames)) / 254) + 1e-5)
    assert (found[~inside] <= 1.05 / frames).all()
    even = encode(np.full((frames, frames), 1 / frames, np.float32), sees)
    assert (even == EVEN).all()
    assert (decode(even) == 1).all()


def test_what_a_frame_may_not_look_at_is_told_apart():
    even = np.array([0, 1 / 2, 2 / 3, 2 / 3], np.float32)  # causal, with a window of three
    sees = may_see(even)
    np.testing.assert_array_equal(sees, np.tril(np.ones((4, 4), bool)) & ~np.tril(np.ones((4, 4), bool), -3))
    codes = encode(np.where(sees, (1 - even)[:, None], 0), sees)
    assert ((codes == HIDDEN) == ~sees).all()
    assert (codes[sees] == EVEN).all()
    assert np.isnan(decode(codes)[~sees]).all()
    assert may_see(np.full(4, 0.75, np.float32)).all()


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((4, 1, (4, 4), 8), Pooling(1, True, 4)),
        ((32, 4, (18, 32), 16), Pooling(2, True, 32)),
        ((32, 4, (18, 32), 64), Pooling(5, True, 16)),
        ((32, 16, (16, 16), 64), Pooling(2, False, 32)),
        ((24, 16, (24, 24), 200), Pooling(5, False, 6)),
        ((24, 16, (24, 24), 4000), None),
    ],
    ids=["tiny", "7B-16", "7B-64", "many-heads", "heads-together", "too-many-frames"],
)
def test_what_is_kept_of_patches_fits(size, expected):
    blocks, heads, (rows, columns), frames = size
    found = choose_pooling(blocks, heads, (rows, columns), frames)
    assert found == expected
    if found is not None:
        cells = -(-rows // found.edge) * -(-columns // found.edge)
        assert found.blocks * (heads if found.by_head else 1) * cells * frames**2 <= 8 << 20


def test_cells_are_means_of_their_patches_also_at_the_edge():
    weights = torch.rand(2, 6, 3, 3)
    positions = torch.tensor([[4, 1, 0], [2, 5, 3]])
    cells = pool(weights, positions, Pooling(2, True, 1))
    assert cells.shape == (2, 1, 2, 3, 3)
    torch.testing.assert_close(cells[:, 0, 0], weights[:, [4, 1, 2, 5]].mean(1))
    torch.testing.assert_close(cells[:, 0, 1], weights[:, [0, 3]].mean(1))
    torch.testing.assert_close(pool(weights, positions, Pooling(1, False, 1))[0, 1, 0], weights[:, 2].mean(0))


def test_colours_end_where_nearly_all_values_do():
    assert scale_of(np.full(10, np.nan)) == 1.25
    assert scale_of(np.array([1.1, 0.95])) == 1.25
    assert scale_of(np.array([0.001, 1.0, 3.4, np.nan])) == 4
    assert scale_of(np.array([1000.0])) == 64


# ---- from the model to the page


@pytest.mark.parametrize("causal", [False, True])
def test_a_models_patches_are_its_attention(tmp_path, causal):
    from sta_adapter import inject_sta
    from sta_adapter.loading import load_model, load_processor

    handle = inject_sta(load_model(TINY_BASE, device="cpu"), STAConfig(head_scale=1.0, causal=causal))
    for index, module in enumerate(handle.blocks.values()):
        randomize(module, seed=index, std=0.1)
    plain = Viewer.load(TINY_BASE, device="cpu")
    clip = plain.read(write_clip(tmp_path / "left.mp4", render("left", 7), 8.0))
    assert load_processor(TINY_BASE)
    seen, weights = observe(handle, clip.inputs), temporal_attention(handle, clip.inputs)
    assert seen.pooling == Pooling(1, True, 4)
    assert seen.patches.shape == (4, 3, 4, 4, 8, 8)
    visible = np.arange(1, 9)[:, None] if causal else 8
    for row, block in enumerate(seen.blocks):
        relative = weights[block][:, seen.positions] * visible
        found = decode(seen.patches[row])
        assert (np.isnan(found) == np.triu(np.full((8, 8), causal), 1)).all()
        clear = ~np.isnan(found) & (relative > 1 / 8)
        np.testing.assert_allclose(found[clear], relative[clear], rtol=0.01)
    whole = np.where(may_see(seen.even), seen.attention * visible, np.nan)
    np.testing.assert_allclose(seen.relative, whole, rtol=1e-5)
    small = observe(handle, clip.inputs, patch_budget=4 * 3 * 4 * 64)
    assert small.pooling is None
    assert small.patches is None


def test_the_page_holds_the_numbers(tmp_path):
    seen, weights, frames = known()
    text = look_page.sections(seen, frames, None, noted=[], block=2)
    data = json.loads(re.search(r'id="sta-data">(.*?)</script>', text)[1])
    means = np.frombuffer(base64.b64decode(data["means"]), np.uint8).reshape(2, 2, T, T)
    np.testing.assert_allclose(decode(means), seen.relative, rtol=0.01)
    codes = np.frombuffer(base64.b64decode(data["patches"]["codes"]), np.uint8).reshape(2, 2, *SHAPE, T, T)
    clear = weights * T > 1 / T
    np.testing.assert_allclose(decode(codes)[clear], T * weights[clear], rtol=0.01)
    assert (data["first"], data["blocks"], data["times"]) == (1, [1, 2], None)


def test_without_a_picture_there_are_whole_frames_alone():
    seen, _, frames = known()
    data = explorer_data(seen, frames[:0], None, 1)
    assert data["patches"] is None
    assert data["sprite"] is None
    assert data["means"]


def test_colours_of_many_patches_are_found_from_a_part_of_them():
    codes = np.tile(np.array([EVEN, 254, HIDDEN, 254], np.uint8), (1 << 16, 12))  # 3 << 20; each third is looked at
    found = _sampled(codes)
    assert found.size == 3 << 18  # of a million, but for a quarter that is hidden
    np.testing.assert_allclose(np.unique(found), [1, codes.shape[-1]], rtol=1e-5)
    assert _sampled(codes[:4]).size == 4 * 36


@pytest.mark.parametrize(
    ("frames", "picture", "shown", "across"),
    [
        (2, (448, 300), (224, 150), 2),
        (2, (300, 448), (150, 224), 2),
        (16, (20, 30), (20, 30), 16),
        (17, (20, 224), (10, 112), 16),
        (101, (2, 112), (1, 56), 16),
    ],
    ids=["high", "wide", "small", "more-than-a-row", "many"],
)
def test_frames_are_made_smaller_the_more_there_are(frames, picture, shown, across):
    from PIL import Image

    seen, *_ = known(blocks=1, heads=1, frames=frames)
    clip = np.random.default_rng(0).integers(0, 255, (frames, *picture, 3), np.uint8)
    sprite = explorer_data(seen, clip, None, 1)["sprite"]
    assert (sprite["height"], sprite["width"], sprite["across"]) == (*shown, across)
    for name in ("source", "grey"):
        image = Image.open(io.BytesIO(base64.b64decode(sprite[name].partition(",")[2])))
        assert image.size == (across * shown[1], -(-frames // across) * shown[0])


def test_blocks_that_dont_fit_are_left_out_and_said():
    seen, _, frames = known(blocks=6)
    one = 2 * T * T  # bytes of a block's means
    strongest = [seen.blocks[i] for i in np.argsort(-seen.branch.mean((1, 2)))]
    data = explorer_data(seen, frames, None, 1, budget=8 * 3 * one)
    wanted = [1, *[block for block in strongest if block != 1]][:3]
    assert data["blocks"] == sorted(wanted)
    assert explorer_data(seen, frames, None, 1, budget=one) is None


# ---- in a browser


@contextlib.contextmanager
def opened(tmp_path, seen, frames, times=None, **options):
    find_chromium()
    text = look_page.page(STRANGE, "model, adapter", "made", look_page.sections(seen, frames, times, noted=[STRANGE]))
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    with chromium(tmp_path / "profile", **options) as browser:
        browser.get((tmp_path / "page.html").as_uri())
        yield browser


def told(browser):
    """Multiples of even that the page shows for each frame looked at, and which one looks."""
    from selenium.webdriver.common.by import By

    buttons = browser.find_elements(By.CSS_SELECTOR, "#sta-strip button")
    labels = [button.get_attribute("aria-label") for button in buttons]
    looking = [button.get_attribute("aria-pressed") for button in buttons].index("true")
    return [float(re.search(r": ([\d.]+)\u00d7 uniform", label)[1]) for label in labels], looking


@pytest.mark.slow
def test_a_click_shows_where_that_patch_looks(tmp_path):
    """A known attention in, by mouse and by keyboard; the numbers of the patch, block and head that were chosen out."""
    seen, weights, frames = known()
    with opened(tmp_path, seen, frames, np.arange(T) / 4, width=900) as browser:
        from selenium.webdriver.common.action_chains import ActionChains
        from selenium.webdriver.common.by import By
        from selenium.webdriver.common.keys import Keys
        from selenium.webdriver.support.ui import Select

        def choose(name, value):
            Select(browser.find_element(By.ID, name)).select_by_visible_text(str(value))

        def expect(block, head, row, column, frame):
            values, looking = told(browser)
            assert looking == frame
            wanted = T * weights[block, head, row, column, frame]
            np.testing.assert_allclose(values, np.maximum(wanted, 1 / T), rtol=0.01, atol=0.006)

        choose("sta-block", 2)
        choose("sta-head", 1)
        canvas = browser.find_elements(By.CSS_SELECTOR, "#sta-strip canvas")[3]
        width, height = canvas.size["width"], canvas.size["height"]
        ActionChains(browser).move_to_element_with_offset(canvas, width * 0.33, -height * 0.25).perform()
        under = browser.find_element(By.ID, "sta-under").text
        assert "row 0, column 2" in under
        assert "looks at frame 3 (0.75 s)" in under
        ActionChains(browser).click().perform()
        expect(1, 1, 0, 2, 3)
        picture = browser.find_element(By.ID, "sta-picture")
        picture.send_keys(Keys.ARROW_DOWN, Keys.ARROW_LEFT)
        expect(1, 1, 1, 1, 3)
        browser.find_element(By.ID, "sta-matrix").send_keys(Keys.ARROW_UP)
        expect(1, 1, 1, 1, 2)
        assert "Row 1, column 1 of frame 2 (0.50 s), block 2, head 1" in browser.find_element(By.ID, "sta-told").text
        choose("sta-head", "mean")
        np.testing.assert_allclose(told(browser)[0], T * weights[1, :, 1, 1, 2].mean(0), rtol=0.03, atol=0.03)
        browser.find_element(By.ID, "sta-all").click()
        np.testing.assert_allclose(told(browser)[0], seen.relative[1, :, 2].mean(0), rtol=0.01, atol=0.006)
        assert browser.title == STRANGE  # shown as text, never run
        assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
        assert not [address for address in requested(browser) if address.startswith("http")]


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_on_a_phone_nothing_is_wider_than_the_screen(tmp_path, dark):
    """With 64 frames; and the colours follow the scheme."""
    seen, _, frames = known(frames=64, blocks=1, heads=1)
    with opened(tmp_path, seen, frames, dark=dark) as browser:
        phone = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
        assert browser.execute_script("return document.documentElement.scrollWidth") == 390
        shown = "return [...document.querySelectorAll('#explore canvas, figure img')].map(e => e.getBoundingClientRect().right)"
        assert max(browser.execute_script(shown)) <= 390
        inner = "return [...document.querySelectorAll('figure')].filter(e => e.scrollWidth > e.clientWidth + 1).length"
        assert browser.execute_script(inner) == 0
        middle = """const c = document.getElementById('sta-scale'), x = c.getContext('2d');
            return [...x.getImageData(c.width >> 1, 4, 1, 1).data].slice(0, 3)"""
        even = [43, 49, 56] if dark else [244, 244, 242]
        np.testing.assert_allclose(browser.execute_script(middle), even, atol=3)
