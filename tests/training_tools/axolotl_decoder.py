"""A plug-in for axolotl that has clips decoded by PyAV: transformers takes torchcodec, which needs FFmpeg on the machine."""

import transformers.video_processing_utils as videos
from axolotl.integrations.base import BasePlugin

load = videos.load_video
videos.load_video = lambda video, backend=None, **more: load(video, backend="pyav", **more)
videos.is_torchcodec_available = videos.is_torchcodec_usable = lambda *_, **__: True


class Decoder(BasePlugin):
    """Importing it is enough."""
