"""Runs of real training tools, each in an environment of its own: `make test-tools`. Elsewhere they are not collected."""

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest

TOOLS = {
    "test_trl.py": "trl",
    "test_ms_swift.py": "swift",
    "test_llamafactory.py": "llamafactory",
    "test_axolotl.py": "axolotl",
}
collect_ignore = [file for file, package in TOOLS.items() if importlib.util.find_spec(package) is None]
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")


@pytest.fixture(scope="session")
def base():
    """The folder of the tiny base."""
    from sta_adapter.demo import TINY_BASE

    return Path(TINY_BASE)


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """Eight mp4 clips with questions, answers and wrong answers, as our records: `clips.jsonl` and `pairs.jsonl`."""
    from sta_adapter.demo.clips import LABELS, QUESTION, opposite, render
    from sta_adapter.video import write_clip

    folder = tmp_path_factory.mktemp("clips")
    rows = []
    for index in range(8):
        label = LABELS[index]
        write_clip(folder / f"{index}.mp4", np.asarray(render(label, index, frames=8, size=32)), fps=8)
        ask = [{"type": "video", "video": f"{index}.mp4"}, {"type": "text", "text": QUESTION}]
        messages = [{"role": "user", "content": ask}, {"role": "assistant", "content": label}]
        rows.append({"messages": messages, "rejected": opposite(label)})
    for name, keys in (("clips", ["messages"]), ("pairs", ["messages", "rejected"])):
        lines = [json.dumps({key: row[key] for key in keys}) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder
