"""The second process of the demo: loads the saved adapter into a fresh model and writes down its answers.

Run by `sta_adapter.demo.run` as `python -m sta_adapter.demo.reload FOLDER CLIPS`.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> None:
    """Write the logits of the first so many test clips."""
    from safetensors.torch import save_file

    from sta_adapter import load_sta
    from sta_adapter.data import VideoDataset
    from sta_adapter.demo import TINY_BASE
    from sta_adapter.demo.run import FRAME_SETTINGS, LOGITS, answer_logits
    from sta_adapter.loading import load_model, load_processor
    from sta_adapter.samples import read_samples

    folder, count = Path(sys.argv[1]), int(sys.argv[2])
    handle = load_sta(load_model(TINY_BASE, dtype="fp32", device="cpu"), folder / "adapter")
    samples = read_samples(folder / "clips" / "test.jsonl")[:count]
    test = VideoDataset(samples, load_processor(TINY_BASE), frames=FRAME_SETTINGS)
    save_file({"logits": answer_logits(handle.model, test).contiguous()}, folder / "runs" / LOGITS)


if __name__ == "__main__":
    main()
