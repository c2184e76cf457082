"""A plug-in that lets axolotl run here: clips decoded by PyAV, as torchcodec needs FFmpeg, and no GPU asked for what it can do."""

import axolotl.utils.environment as environment
import transformers.training_args as training_args
import transformers.video_processing_utils as videos
from axolotl.integrations.base import BasePlugin

load = videos.load_video
videos.load_video = lambda video, backend=None, **more: load(video, backend="pyav", **more)
videos.is_torchcodec_available = videos.is_torchcodec_usable = lambda *_, **__: True
environment.check_cuda_p2p_support = lambda: True  # asked of several processes, without looking whether there is a GPU
training_args.is_torch_bf16_gpu_available = lambda: True  # axolotl has no way to say use_cpu, as bf16 on a CPU must


class Decoder(BasePlugin):
    """Where several processes run, axolotl gives each a GPU."""

    def load_datasets(self, cfg, preprocess=False):
        cfg["device_map"] = {"": "cpu"}
