"""The second process of the demo: loads the saved adapter into a fresh model and writes down its answers.

Run by `sta_adapter.demo.run` as `python -m sta_adapter.demo.reload FOLDER CLIPS`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from safetensors.torch import save_file

from sta_adapter import load_sta
from sta_adapter.data import VideoDataset
from sta_adapter.demo.methods import FRAME_SETTINGS
from sta_adapter.demo.model import tiny_model, two_threads
from sta_adapter.demo.run import LOGITS, answer_logits
from sta_adapter.loading import load_processor
from sta_adapter.tiny_base import TINY_BASE


@two_threads()
def main() -> None:
    """Write the logits of the answers to the test clips."""
    folder, clips = Path(sys.argv[1]), sys.argv[2]
    handle = load_sta(tiny_model(folder / "base"), folder / "adapter")
    test = VideoDataset(clips, load_processor(TINY_BASE), frames=FRAME_SETTINGS, decode_timeout=None)
    save_file({"logits": answer_logits(handle.model, test).contiguous()}, folder / "runs" / LOGITS)


if __name__ == "__main__":
    main()
