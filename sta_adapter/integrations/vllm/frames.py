"""A video loader for vLLM's server that samples and sizes frames as training did.

vLLM's own loaders take other frames (see docs/serve.md). `sta-adapter serve` names this one in `--media-io-kwargs`,
with the settings of the adapter's run.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sta_adapter.compatibility.releases import incompatible
from sta_adapter.data.clip_reader import ClipReader
from sta_adapter.data.message import Visual
from sta_adapter.data.visual_processing import step_seconds
from sta_adapter.errors import ConfigError
from sta_adapter.video.frame_settings import FrameSettings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LOADER = "sta_adapter"
SIZES = ("factor", "temporal_patch")
EVERY_FRAME, UNTOLD = -1, 32  # vLLM's num_frames: without a limit, and where neither settings nor request give it


def media_io_kwargs(reader: ClipReader) -> dict[str, object]:
    """The value of vLLM's `media_io_kwargs` by which its server reads clips as this reader does."""
    settings = {name: getattr(reader.settings, name) for name in FrameSettings.__dataclass_fields__}
    sizes = {name: getattr(reader, name) for name in SIZES}
    return {"video": {"video_backend": LOADER, "num_frames": EVERY_FRAME, **settings, **sizes}}


def register_loader() -> None:
    """Make the loader known to vLLM by its name."""
    try:
        from vllm.multimodal.video import VIDEO_LOADER_REGISTRY as registry
    except ImportError as error:
        raise incompatible("vllm", f"it has no registry of video loaders ({error})") from error
    registry.register(LOADER)(TrainedFrames)


class TrainedFrames:
    """What vLLM calls to decode a video."""

    @classmethod
    def load_bytes(
        cls, data: bytes, num_frames: int = -1, **options: Any
    ) -> tuple[NDArray[np.uint8], dict[str, object]]:
        """The frames (T, H, W, 3) of a video and their metadata.

        Args:
            data: contents of the file.
            num_frames: what vLLM's loaders limit frames by, for which there is `nframes` among the options.
            options: fields of `FrameSettings`, and the `factor` and `temporal_patch` of `ClipReader`.

        Raises:
            ConfigError: an option that doesn't exist, or `num_frames`.
            DataError: the video can't be read.
        """
        fields = FrameSettings.__dataclass_fields__
        if unknown := sorted(set(options) - set(fields) - set(SIZES)):
            raise ConfigError(
                f"media_io_kwargs: {LOADER} has no option {', '.join(unknown)}; known: {', '.join((*fields, *SIZES))}."
            )
        if num_frames not in (EVERY_FRAME, UNTOLD):
            raise ConfigError(f"media_io_kwargs: {LOADER} has no option num_frames (it is {num_frames}); use nframes.")
        settings = FrameSettings(**{name: value for name, value in options.items() if name in fields})
        reader = ClipReader(settings, **{name: options[name] for name in SIZES if name in options})
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "clip")
            file.write_bytes(data)
            clip = reader.read([{"type": "video", "video": str(file)}])[0]
        return clip.pixels, clip_facts(clip, reader.temporal_patch)


def clip_facts(clip: Visual, temporal_patch: int) -> dict[str, object]:
    """What vLLM is told of a decoded clip: its times as training had them, and that no frames are to be chosen again.

    Processors take the seconds of a temporal step, in which the model merges `temporal_patch` frames into one, from the
    share of the file's frames that was sampled. That is right for frames spread evenly over the whole file; the total is
    given such that the clip's own step comes out, whatever was read.
    """
    facts = {**(clip.metadata or {}), "video_backend": LOADER, "do_sample_frames": False}
    if clip.metadata is not None:
        step = step_seconds(clip.metadata, temporal_patch) / temporal_patch
        facts["total_num_frames"] = len(clip.metadata["frames_indices"]) * clip.metadata["fps"] * step
    return facts
