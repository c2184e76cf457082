"""Running a tool's own command, and looking at what came out."""

import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from sta_adapter import get_sta, load_sta
from sta_adapter.data import Collator, FrameSettings, VideoDataset
from sta_adapter.loading import load_model, load_processor

BIN = Path(sys.executable).parent
KILLED = str(Path(__file__).with_name("killed"))  # on Python's path it ends a run in its fourth step
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


@functools.lru_cache
def commands():
    """A folder with `torchrun` for this environment, since torch lies in another, whose command runs Python there."""
    folder = Path(tempfile.mkdtemp(prefix="commands-"))
    (folder / "torchrun").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m torch.distributed.run "$@"\n')
    (folder / "torchrun").chmod(0o755)
    return folder


def run(words, folder, expect=0, **environment):
    """What a command wrote; it ends as expected, and within minutes."""
    done = subprocess.run(
        [str(word) for word in words], cwd=folder, env={**os.environ, **OFFLINE, "PATH": f"{commands()}:{BIN}:{os.environ['PATH']}", **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1200,
    )  # fmt: skip
    assert (done.returncode == 0) == (expect == 0), done.stdout[-5000:]
    return done.stdout


def outputs(folder, base, clips):
    """What base and adapter answer to two clips, and what the base answers alone."""
    data = VideoDataset(
        clips / "clips.jsonl", load_processor(base), frames=FrameSettings(nframes=8, min_tokens=None, max_tokens=None)
    )
    batch = Collator.of(data.processor)([data[0], data[1]])
    batch = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor) and key != "labels"}
    model = load_model(base, device="cpu", dtype="fp32")
    with torch.no_grad():
        alone = model(**batch, use_cache=False).logits
        handle = load_sta(model, folder)
        return handle, handle.model.eval()(**batch, use_cache=False).logits, alone


def check_adapter(folder, base, clips, lora=True):
    """The folder is an adapter whose STA was trained, whole."""
    handle, found, alone = outputs(folder, base, clips)
    assert not torch.equal(found, alone)
    for block in handle.blocks.values():
        assert block.to_out.weight.any()  # begins at zero
    assert bool(getattr(handle.model, "peft_config", None)) == lora
    with handle.disabled(), torch.no_grad():
        assert get_sta(handle.model) is handle
    return found


def same_weights(one, other):
    """Whether two adapters' files hold the same bits."""
    from safetensors.torch import load_file

    for name in ("sta_adapter.safetensors", "adapter_model.safetensors"):
        a, b = load_file(Path(one) / name), load_file(Path(other) / name)
        assert a.keys() == b.keys()
        differ = [key for key in a if not torch.equal(a[key], b[key])]
        assert not differ, (name, differ[:3], max(float((a[key] - b[key]).abs().max()) for key in differ))


class Page:
    """A page of docs/tools, followed in a folder with clips, train.jsonl and test.jsonl alone, on the tiny base."""

    def __init__(self, name, base, clips, folder):
        text = (Path(__file__).parents[2] / f"docs/tools/{name}.md").read_text()
        self.text, self.folder = text.replace("Qwen/Qwen2-VL-2B-Instruct", str(base)), folder
        for clip in clips.glob("*.mp4"):
            shutil.copy(clip, folder)
        for file in ("train.jsonl", "test.jsonl"):
            shutil.copy(clips / "clips.jsonl", folder / file)

    def block(self, kind):
        """The first block of code of that kind."""
        return re.search(rf"```{kind}\n(.*?)```", self.text, re.DOTALL)[1]

    def command(self, start):
        """The command in the text that starts so."""
        return re.search(rf"^ {{4}}({start}.*)$", self.text, re.MULTILINE)[1]

    def run(self, command, **environment):
        """Run it as a shell would."""
        return run(["bash", "-euc", command], self.folder, **environment)
