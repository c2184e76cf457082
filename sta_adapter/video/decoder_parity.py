"""Whether another release of FFmpeg, as decord and torchcodec carry one, reads a file as PyAV does.

Measured with releases 4 to 8: what is not known to give equal pixels, or could crash, is left to PyAV.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

CONTAINERS = frozenset({"mov", "matroska", "avi"})  # seeking in others ends up at other frames
CODECS = frozenset({"h264", "hevc", "vp8", "vp9", "mpeg4", "mjpeg", "ffv1", "huffyuv", "png"})
FRAMES = 10_000_000  # decord reserves memory for as many frames as times or header announce, and aborts if it gets none
_PROGRESSIVE = (0, 1)  # FFmpeg's field orders: unknown, progressive


def why_unlike(container: "InputContainer", stream: "VideoStream", first: "VideoFrame", end: float) -> str:
    """Why another FFmpeg may read the file differently; "" where none does. `end` is its last timestamp in seconds."""
    codec, moving = stream.codec_context.name, len(container.streams.video)
    timed = max(end, (container.duration or 0) / 1e6) * float(stream.average_rate or 25)
    announced = max(timed, stream.frames)
    if codec not in CODECS:
        return f"its codec ({codec}) isn't one that is known to give the same pixels everywhere"
    if moving > 1:
        return f"it has {moving} video streams, of which another may be taken"
    fields = getattr(stream.codec_context, "field_order", None)
    if fields is None and not first.interlaced_frame:
        return "PyAV before 18 doesn't tell whether its pictures are interlaced"
    if first.interlaced_frame or fields not in _PROGRESSIVE:
        return "its pictures are interlaced"
    if has_alpha(first):
        return "its pictures may be transparent, and would not be put on white"
    if blends_colour(first):
        return (
            "its colour (more than 8 bits, 4:2:0 with an odd height, 4:4:0, 4:1:0 or a palette) would be turned into "
            "other pixels than PyAV's"
        )
    if not announced < FRAMES:
        return f"its {'times announce' if announced == timed else 'header announces'} {announced:.3g} frames"
    return ""


def seeks_exactly(container: "InputContainer") -> bool:
    """Whether the kind of container has an index that every release follows to the frame."""
    return bool(CONTAINERS & set(container.format.name.split(",")))


def has_alpha(frame: "VideoFrame") -> bool:
    """Whether the frame can be transparent, also in the colours of its palette."""
    return frame.format.has_palette or any(component.is_alpha for component in frame.format.components)


def blends_colour(frame: "VideoFrame") -> bool:
    """Whether turning the frame into RGB interpolates colour, which every FFmpeg release does a little differently.

    Releases agree to the bit on 8 bits with colour stored at full size, for each two pixels of a row, or for each two
    by two where the height is even.
    """
    shape = frame.format
    rows_shared, columns_shared = shape.chroma_height(4) < 4, shape.chroma_width(4) < 4
    odd = rows_shared and (frame.height % 2 == 1 or not columns_shared or shape.chroma_height(4) < 2)
    odd = odd or shape.chroma_width(4) < 2
    return odd or shape.has_palette or any(component.bits > 8 for component in shape.components)
