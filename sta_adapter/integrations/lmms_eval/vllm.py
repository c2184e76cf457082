"""lmms-eval's models in vLLM, with STA: the one of its classes that hands clips over as clips.

Its default class for vLLM hands over each frame as a picture of its own, where STA has nothing to attend to.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sized

from lmms_eval.models.chat.vllm_generate import VLLMGenerate

from sta_adapter.errors import ConfigError
from sta_adapter.integrations.vllm.request import ADAPTER, REVISION
from sta_adapter.integrations.vllm.serve_line import check_plugins


class Chat(VLLMGenerate):
    """`vllm_sta`.

    Args:
        sta: the adapter, a folder or an id on the Hub; with LoRA weights merged into the base (`sta-adapter export`).
        sta_revision: branch, tag or commit on the Hub.
        hf_overrides: as vLLM has it, in JSON.
        arguments: those of lmms-eval's `vllm_generate`.

    Raises:
        ConfigError: no adapter, or `VLLM_PLUGINS` leaves STA out.
    """

    def __init__(
        self,
        sta: str | None = None,
        sta_revision: str | None = None,
        hf_overrides: str | dict[str, object] | None = None,
        **arguments: object,
    ) -> None:
        if sta is None:
            raise ConfigError("no adapter; add sta=FOLDER_OR_ID to --model_args, or take the model 'vllm_generate'.")
        check_plugins(os.environ.get("VLLM_PLUGINS"))
        given = json.loads(hf_overrides) if isinstance(hf_overrides, str) else hf_overrides or {}
        own = {ADAPTER: sta, **({REVISION: sta_revision} if sta_revision is not None else {})}
        super().__init__(hf_overrides={**given, **own}, **arguments)

    def make_one_request(self, request: object) -> tuple[dict[str, object], dict[str, object]]:
        """The prompt, and how to sample; with the times of frames, which lmms-eval leaves out for most models.

        Raises:
            ConfigError: there are several clips, of which lmms-eval tells the last one's frame rate alone.
        """
        made, how = super().make_one_request(request)
        clips = made["multi_modal_data"].get("video") or []
        if not any(isinstance(clip, tuple) for clip in clips):
            if len(clips) > 1:
                raise ConfigError(
                    f"a request has {len(clips)} clips, and lmms-eval tells vLLM the frame rate of the last one alone, so the "
                    "times of the others can't be known. Take lmms-eval's models for transformers (qwen2_vl_sta, "
                    "qwen2_5_vl_sta) for this task."
                )
            rate = made.get("mm_processor_kwargs", {}).get("fps")
            made["multi_modal_data"] |= {"video": [(clip, _times(clip, rate)) for clip in clips]} if clips else {}
        return made, how


def _times(clip: Sized, rate: float) -> dict[str, object]:
    """What vLLM is told of a clip of frames that were sampled at a rate."""
    count = len(clip)
    times = {"fps": rate, "frames_indices": list(range(count)), "total_num_frames": count, "duration": count / rate}
    return {**times, "video_backend": "qwen_vl_utils", "do_sample_frames": False}
