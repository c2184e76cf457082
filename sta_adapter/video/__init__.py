"""Video files in and out: `read_clip` and `read_folder` sample a clip by time, `write_clip` writes one."""

from sta_adapter.video.frame_table import VideoNotFoundError
from sta_adapter.video.image_folder import read_folder
from sta_adapter.video.reader import Clip, ClipMetadata, read_clip
from sta_adapter.video.sampling import Sampling, choose_frames
from sta_adapter.video.writer import write_clip

__all__ = [
    "Clip",
    "ClipMetadata",
    "Sampling",
    "VideoNotFoundError",
    "choose_frames",
    "read_clip",
    "read_folder",
    "write_clip",
]
