"""How many pixels are decoded and kept at most, looked at before memory is taken for them."""

from sta_adapter.errors import VideoError

FRAME_PIXELS = 8192 * 4320
"""Area of a video's frame: 8K."""

KEPT_PIXELS = 2**30
"""Of all frames and pictures that are held at once, about 3.2 GB."""

CHUNK_PIXELS = 2**26
"""Decoded in full size at once, where frames are made smaller."""

DECODER_LIMIT = {"max_pixels": str(FRAME_PIXELS + 2**18)}
"""FFmpeg's own limit, for streams that are larger than their container says; coded frames are a little larger than shown."""


def check_frame(path: object, width: int, height: int) -> None:
    """Refuse a video whose frames are too large to be decoded."""
    if width * height > FRAME_PIXELS:
        raise VideoError(
            f"{path} has frames of {width}x{height} pixels, and at most {FRAME_PIXELS} (8192x4320) are decoded. Write it again "
            "with a smaller picture."
        )


def check_kept(path: object, frames: int, pixels: int) -> None:
    """Refuse to hold so many frames of so many pixels."""
    if frames * pixels > KEPT_PIXELS:
        raise VideoError(
            f"{path}: {frames} frames of {pixels} pixels are more than the {KEPT_PIXELS} pixels that are held at once. Ask for "
            "fewer frames, or for smaller ones (max_tokens, or a clip's max_pixels)."
        )
