"""Pictures are read as people see them, folders in the order of their numbers, and a picture is not taken for a video."""

import json

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_qwen import moving_square, write_video

from sta_adapter.data import BadSample, VideoDataset
from sta_adapter.errors import BackendError, DataError, VideoError
from sta_adapter.live.source import LiveSource
from sta_adapter.video import read_clip, read_folder
from sta_adapter.video.image import MOST_PIXELS, natural_order, read_image

CORNERS = np.zeros((8, 16, 3), np.uint8)
CORNERS[:4, :8], CORNERS[:4, 8:], CORNERS[4:, :8] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
RAMP = np.linspace(0, 65535, 256).round().reshape(16, 16).astype(np.uint16)
TURNS = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.swapaxes(0, 1),
    6: lambda p: p.swapaxes(0, 1)[:, ::-1],
    7: lambda p: p[::-1, ::-1].swapaxes(0, 1),
    8: lambda p: p.swapaxes(0, 1)[::-1],
}


@pytest.mark.parametrize("ending", ["png", "webp", "tif"])
@pytest.mark.parametrize("turn", list(TURNS))
def test_turns(tmp_path, turn, ending):
    exif = Image.Exif()
    exif[0x0112] = turn
    Image.fromarray(CORNERS).save(tmp_path / f"a.{ending}", exif=exif, lossless=True)
    np.testing.assert_array_equal(read_image(tmp_path / f"a.{ending}")[0], TURNS[turn](CORNERS))


def transparent(mode):
    """A black square on nothing, 16 bits and palettes included; the nothing has a colour that nobody sees."""
    grey = np.full((16, 16), 90, np.uint8)
    grey[4:12, 4:12] = 0
    alpha = np.where(grey == 0, 255, 0).astype(np.uint8)
    if mode == "RGBA":
        return Image.fromarray(np.dstack([grey, grey, grey, alpha])), {}
    if mode == "LA":
        return Image.fromarray(np.dstack([grey, alpha])), {}
    if mode == "P":
        return Image.fromarray(grey).convert("P"), {"transparency": 90}
    if mode == "RGB":
        return Image.fromarray(np.dstack([grey] * 3)), {"transparency": (90, 90, 90)}
    if mode == "L":
        return Image.fromarray(grey), {"transparency": 90}
    return Image.fromarray(grey.astype(np.uint16) * 257), {"transparency": 90 * 257}


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L", "I;16"])
def test_what_is_transparent_lies_on_white(tmp_path, mode):
    picture, more = transparent(mode)
    picture.save(tmp_path / "a.png", **more)
    found = read_image(tmp_path / "a.png")[0]
    expected = np.full((16, 16, 3), 255, np.uint8)
    expected[4:12, 4:12] = 0
    np.testing.assert_array_equal(found, expected)


def a_square_that_goes(path):
    """Three frames in RGBA, a black square on black that nobody sees."""
    frames = [np.zeros((16, 32, 4), np.uint8) for _ in range(3)]
    for number, frame in enumerate(frames):
        frame[4:12, 8 * number : 8 * number + 8, 3] = 255
    if path.suffix == ".apng":
        first, *rest = map(Image.fromarray, frames)
        first.save(path, format="PNG", save_all=True, append_images=rest, duration=100, disposal=1)
        return frames
    with av.open(str(path), "w") as container:
        stream = container.add_stream("png", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "rgba"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgba")))
        container.mux(stream.encode(None))
    return frames


@pytest.mark.parametrize("name", ["a.apng", "a.mov"])
def test_frames_that_are_transparent_lie_on_white(tmp_path, name):
    frames = a_square_that_goes(tmp_path / name)
    clip = read_clip(tmp_path / name)
    np.testing.assert_array_equal(clip.frames, np.stack([255 - frame[..., 3:].repeat(3, -1) for frame in frames]))
    watched = LiveSource(str(tmp_path / name), fps=1000, fast=True).frames()
    np.testing.assert_array_equal([frame.pixels for frame in watched], clip.frames)
    assert clip.metadata.backend == "pyav"
    pytest.importorskip("decord")
    tells_all = int(av.__version__.split(".")[0]) >= 18  # PyAV before that refuses decord for each file
    unlike = "its codec" if name == "a.apng" else "would not be put on white" if tells_all else "before 18"
    with pytest.raises(BackendError, match=unlike):
        read_clip(tmp_path / name, backend="decord")


def write_webm(path, codec, pix_fmt, frames, **metadata):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10, options={"auto-alt-ref": "0", "crf": "4", "b": "4M"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix_fmt
        container.metadata.update(metadata)
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgba").reformat(format=pix_fmt)
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9"])
def test_transparency_that_webm_keeps_beside_the_pictures(tmp_path, codec):
    """FFmpeg's own decoders leave it out."""
    frames = np.zeros((12, 64, 64, 4), np.uint8)
    for number, frame in enumerate(frames):
        frame[..., 0] = 200
        frame[:, 4 * number : 4 * number + 16, 3] = 255
    path = write_webm(tmp_path / "a.webm", codec, "yuva420p", frames)
    expected = np.where(frames[..., 3:] == 255, np.array([200, 0, 0]), 255)
    clip = read_clip(path, num_frames=12)
    assert np.abs(clip.frames - expected).mean() < 3
    np.testing.assert_array_equal(read_clip(path, start=0.7, num_frames=1).frames[0], clip.frames[7])
    watched = LiveSource(str(path), fps=1000, fast=True).frames()
    np.testing.assert_array_equal([frame.pixels for frame in watched], clip.frames)
    pytest.importorskip("decord")
    with pytest.raises(BackendError, match=r"would not be put on white|before 18"):
        read_clip(path, backend="decord")


@pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9"])
def test_webm_that_a_browser_records_says_transparent_and_is_not(tmp_path, codec):
    frames = np.full((12, 64, 64, 4), 255, np.uint8)
    frames[..., :3] = np.random.default_rng(0).integers(0, 255, (12, 8, 8, 3)).repeat(8, 1).repeat(8, 2)
    path = write_webm(tmp_path / "a.webm", codec, "yuv420p", frames, alpha_mode="1")
    with av.open(str(path)) as container:
        assert container.streams.video[0].metadata["alpha_mode"] == "1"
        own = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    np.testing.assert_array_equal(read_clip(path, num_frames=12).frames, own)


def write_colour(path, codec, pix_fmt, colour, weights, space, full):
    """Frames of one colour in YUV, by the weights of red and blue in brightness and FFmpeg's number of that matrix."""
    red, blue = weights
    r, g, b = np.array(colour) / 255
    y = red * r + (1 - red - blue) * g + blue * b
    u, v = (b - y) / 2 / (1 - blue), (r - y) / 2 / (1 - red)
    values = [255 * y, 128 + 255 * u, 128 + 255 * v] if full else [16 + 219 * y, 128 + 224 * u, 128 + 224 * v]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, pix_fmt
        stream.codec_context.colorspace, stream.codec_context.color_range = space, 2 if full else 1
        for number in range(4):
            frame = av.VideoFrame(64, 48, pix_fmt)
            for plane, value in zip(frame.planes, values, strict=True):
                plane.update(bytes([round(value)]) * plane.buffer_size)
            frame.pts, frame.colorspace, frame.color_range = number, space, 2 if full else 1
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize(("weights", "space"), [((0.299, 0.114), 6), ((0.2126, 0.0722), 1)], ids=["601", "709"])
@pytest.mark.parametrize(
    ("codec", "pix_fmt", "name"),
    [("libx264", "yuv420p", "a.mp4"), ("libvpx-vp9", "yuv420p", "a.webm"), ("ffv1", "yuv444p", "a.mkv")],
)
def test_colours_are_those_that_the_file_tells(tmp_path, codec, pix_fmt, name, weights, space, full):
    colour = (190, 60, 30)
    path = write_colour(tmp_path / name, codec, pix_fmt, colour, weights, space, full)
    assert np.abs(read_clip(path).frames.astype(int) - colour).max() <= 4


def test_half_transparent_is_mixed_with_white(tmp_path):
    Image.fromarray(np.full((4, 4, 4), (0, 0, 0, 128), np.uint8)).save(tmp_path / "a.png")
    assert set(read_image(tmp_path / "a.png").ravel()) == {127}


def test_a_palette_gives_its_colours(tmp_path):
    Image.fromarray(CORNERS).convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png")[0], CORNERS)


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_sixteen_bits_become_eight(tmp_path, ending):
    Image.fromarray(RAMP).save(tmp_path / f"a.{ending}")
    found = read_image(tmp_path / f"a.{ending}")[0]
    np.testing.assert_array_equal(found, np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2))


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_values_of_an_unknown_range_are_an_error(tmp_path, kind):
    Image.fromarray(RAMP.astype(kind)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match="32 bits"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("ending", ["gif", "png", "webp", "tif"])
def test_several_pictures_in_a_file_are_not_one(tmp_path, ending):
    pictures = [Image.fromarray(np.roll(CORNERS, shift, 1)) for shift in (0, 3)]
    pictures[0].save(tmp_path / f"a.{ending}", save_all=True, append_images=pictures[1:])
    with pytest.raises(DataError, match="holds 2 pictures"):
        read_image(tmp_path / f"a.{ending}")


def test_a_phones_second_view_does_not_matter(tmp_path):
    pictures = [Image.fromarray(np.full((8, 8, 3), grey, np.uint8)) for grey in (200, 0)]
    pictures[0].save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=pictures[1:])
    assert read_image(tmp_path / "a.jpg").mean() == 200


@pytest.mark.parametrize("side", [8200, 20000])
def test_large_pictures_are_refused_before_they_are_decoded(tmp_path, monkeypatch, side):
    Image.new("1", (side, side)).save(tmp_path / "a.png")
    monkeypatch.setattr("PIL.Image.Image.load", lambda self: pytest.fail("decoded"))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    assert side**2 > MOST_PIXELS
    with pytest.raises(DataError, match="pixels"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n", b"GIF89a"])
def test_what_is_no_picture(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.png' is not an image that can be read .*video"):
        read_image(tmp_path / "a.png")


def test_what_pillow_says_of_it_is_told(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"can be read \(cannot identify image file"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("brand", [b"heic", b"mif1"])
def test_what_a_phone_took_is_told_as_that(tmp_path, brand):
    (tmp_path / "a.jpg").write_bytes(b"\0\0\0\x18ftyp" + brand + b"\0" * 40)
    with pytest.raises(DataError, match=r"a\.jpg' is a HEIC picture, .*Save it as JPEG or PNG"):
        read_image(tmp_path / "a.jpg")


def test_a_pointer_of_git_lfs_is_told_as_that(tmp_path):
    (tmp_path / "a.jpg").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(DataError, match=r"a\.jpg' is a pointer of Git LFS in the place of a picture: run `git lfs"):
        read_image(tmp_path / "a.jpg")


def test_a_folder_is_no_picture(tmp_path):
    with pytest.raises(IsADirectoryError, match="Is a directory"):
        read_image(tmp_path)


# ---- folders


@pytest.mark.parametrize("pattern", ["frame_{}.png", "{}.png", "a2_{}_b.PNG", "Frame ({}).png", "f{}.0.png"])
def test_numbers_in_names_are_in_order(tmp_path, pattern):
    for number in range(1, 13):
        name = pattern.format(number)
        Image.fromarray(np.full((8, 8, 3), 20 * number, np.uint8)).save(tmp_path / name)
    Image.fromarray(CORNERS).save(tmp_path / "._frame_1.png")  # what macOS puts beside files
    order = [int(frame[0, 0, 0]) // 20 for frame in read_folder(tmp_path, 2.0, num_frames=12).frames]
    assert order == list(range(1, 13))


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ([f"{kind}_{n:05}.jpg" for kind in ("flow_x", "flow_y", "img") for n in range(1, 4)], "several series, such as 'flow_x_00001"),
        (["cover.png", "frame_1.png", "frame_2.png"], "several series, such as 'cover.png' and 'frame_1.png'"),
        (["frame_1.png", "frame_2 (copy).png", "frame_2.png"], "several series, such as 'frame_1.png' and 'frame_2 "),
        (["1.jpg", "1.png", "2.jpg", "2.png"], "holds '1.(jpg|png)' and '1.(jpg|png)'; expected each picture once"),
        (["0.0.png", "0.25.png", "0.5.png", "0.75.png", "1.0.png"], "'0.5.png' and '0.25.png', whose order depends"),
    ],
    ids=["optical flow beside it", "a cover", "a copy", "two formats", "decimals"],
)  # fmt: skip
def test_names_that_tell_no_order_are_an_error(tmp_path, names, reason):
    for name in names:
        Image.new("L", (8, 8)).save(tmp_path / name)
    with pytest.raises(VideoError, match=reason):
        read_folder(tmp_path, 2.0)


@pytest.mark.parametrize(
    "names",
    [
        ["before.png", "during.png", "in the end.png"],
        ["0.00.png", "0.25.png", "0.50.png", "10.00.png"],
        ["s1_f9.png", "s1_f10.png", "S2_f1.png"],
        ["2024.01.05 10.09.58.png", "2024.01.05 10.10.01.png", "2024.11.02 09.00.00.png"],
    ],
)
def test_names_that_tell_an_order(tmp_path, names):
    for number, name in enumerate(names):
        Image.new("L", (8, 8), number).save(tmp_path / name)
    assert read_folder(tmp_path, 2.0).frames[:, 0, 0, 0].tolist() == list(range(len(names)))


@given(st.lists(st.integers(0, 10**12), min_size=2, max_size=20, unique=True), st.integers(0, 4))
def test_order_is_that_of_the_numbers(numbers, width):
    from pathlib import Path

    files = [Path(f"clip7-{number:0{width}}.jpg") for number in numbers]
    assert sorted(files, key=natural_order) == [Path(f"clip7-{number:0{width}}.jpg") for number in sorted(numbers)]


def test_pictures_of_a_folder_are_turned(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for number in range(4):
        Image.fromarray(CORNERS).save(tmp_path / f"{number}.png", exif=exif)
    clip = read_folder(tmp_path, 1.0)
    assert clip.frames.shape == (4, 16, 8, 3)
    assert (clip.metadata.width, clip.metadata.height) == (8, 16)


def test_pictures_of_every_kind_count_and_other_files_do_not(tmp_path):
    kinds = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "ppm", "pgm", "gif")
    for number, kind in enumerate(kinds):
        Image.new("L", (8, 8)).save(tmp_path / f"{number}.{kind}")
    (tmp_path / "notes.txt").write_text("words")
    assert read_folder(tmp_path, 1.0).metadata.total_frames == len(kinds)


def test_no_picture_is_no_clip():
    with pytest.raises(VideoError, match="no picture that a clip could be made of"):
        read_folder([], 2)


def test_pictures_of_several_sizes_are_no_clip(tmp_path):
    for number, height in enumerate((8, 6)):
        Image.new("L", (8, height)).save(tmp_path / f"{number}.png")
    with pytest.raises(VideoError, match="pictures of several sizes: 8x6, 8x8; expected one"):
        read_folder(tmp_path, 1.0)


# ---- a picture in the place of a video


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "bmp", "tif", "gif", "ppm", "avif"])
@pytest.mark.parametrize("name", ["a.{}", "a.mp4"])
def test_a_picture_is_no_video(tmp_path, ending, name):
    Image.fromarray(CORNERS.repeat(4, 0).repeat(4, 1)).save(tmp_path / f"b.{ending}")
    path = (tmp_path / f"b.{ending}").rename(tmp_path / name.format(ending))
    with pytest.raises(VideoError, match=r"is a picture .*Name it as an image"):
        read_clip(path)


@pytest.mark.parametrize("ending", ["gif", "png"])
def test_an_animation_is_a_video(tmp_path, ending):
    pictures = [Image.fromarray(np.roll(CORNERS, shift, 1)) for shift in range(4)]
    pictures[0].save(tmp_path / f"a.{ending}", save_all=True, append_images=pictures[1:], duration=500)
    assert read_clip(tmp_path / f"a.{ending}", num_frames=4).frames.shape == (4, 8, 16, 3)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_an_avif_that_moves_is_a_video_unless_it_is_transparent(tmp_path, mode):
    """Its transparency is another stream, so that what lies under it would be shown."""
    pictures = [
        Image.fromarray(np.roll(CORNERS.repeat(8, 0).repeat(8, 1), shift, 1)).convert(mode) for shift in range(4)
    ]
    for picture in pictures if mode == "RGBA" else ():
        picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    pictures[0].save(tmp_path / "a.avif", save_all=True, append_images=pictures[1:], duration=500)
    if mode == "RGB":
        assert read_clip(tmp_path / "a.avif", num_frames=4).timestamps.tolist() == [0, 0.5, 1, 1.5]
        return
    with pytest.raises(VideoError, match="an AVIF whose transparency is a stream of its own"):
        read_clip(tmp_path / "a.avif")


@pytest.mark.parametrize(("kind", "name", "said"), [("video", "a.png", "picture"), ("image", "a.mp4", "video")])
def test_samples_that_mix_them_up_are_bad_and_say_so(tmp_path, kind, name, said):
    Image.fromarray(CORNERS).save(tmp_path / "a.png")
    write_video(tmp_path / "a.mp4", moving_square("left"))
    content = [{"type": kind, kind: name}, {"type": "text", "text": "?"}]
    record = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "x"}]}
    (tmp_path / "data.jsonl").write_text(json.dumps(record))
    item = VideoDataset(tmp_path / "data.jsonl", None)[0]
    assert isinstance(item, BadSample)
    assert said in item.reason
