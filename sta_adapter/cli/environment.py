"""What this machine has that matters to STA: for bug reports, and for the first minutes on a new machine."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import TypedDict
from urllib.parse import urlsplit

import huggingface_hub
import torch

from sta_adapter.attention.kernels import choose_kernel
from sta_adapter.cli.seam_report import seams
from sta_adapter.compatibility.releases import TESTED, version
from sta_adapter.injection.registry import ENTRY_POINT_GROUP, get_backbone, list_backbones

PACKAGES = (
    *("sta-adapter", "torch", "torchvision", "transformers", "peft", "accelerate", "safetensors", "einops", "triton"),
    *("xformers", "nvidia-cuda-runtime-cu12", "av", "decord", "torchcodec", "huggingface-hub", "numpy", "pillow"),
)
DECODERS = {"decord": "decord", "pyav": "av", "torchcodec": "torchcodec"}
HUB_SETTINGS = ("HF_ENDPOINT", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET", "TRANSFORMERS_CACHE")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_DIM, FRAMES = 80, 8  # Qwen2-VL's head size; any number of frames gets the same kernel


class Environment(TypedDict):
    """What `sta-adapter env --json` prints."""

    platform: dict[str, str | None]
    versions: dict[str, str]
    tested: dict[str, str]
    devices: list[dict[str, str]]
    kernels: list[dict[str, str]]
    decoders: dict[str, str]
    backbones: dict[str, str]
    seams: list[dict[str, object]]
    hub: dict[str, str]


def describe_environment() -> Environment:
    """Versions, devices, kernels, decoders, backbones, seams and Hub settings, as `sta-adapter env --json` prints them.

    No secrets: of a token, only whether there is one; of an address, no user and password; the home folder is "~".
    """
    devices = _devices()
    return {
        "platform": {"python": platform.python_version(), "system": platform.platform(), "cuda": torch.version.cuda},
        "versions": {**{name: version(name) for name in PACKAGES}, "torch": torch.__version__},
        "tested": dict(TESTED),
        "devices": devices,
        "kernels": [_kernel(device["type"], dtype) for device in devices for dtype in DTYPES],
        "decoders": {name: _decoder(module) for name, module in DECODERS.items()},
        "backbones": {name: _source(name) for name in list_backbones()},
        "seams": [{**seam._asdict(), "differs": seam.differs} for seam in seams()],
        "hub": _hub(),
    }


def _devices() -> list[dict[str, str]]:
    found = [{"type": "cpu", "name": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"}]
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        about = torch.cuda.get_device_properties(number)
        size = f"{about.total_memory / 2**30:.0f} GiB, capability {about.major}.{about.minor}"
        found.append({"type": "cuda", "name": f"{about.name}, {size}"})
    if torch.backends.mps.is_available():
        found.append({"type": "mps", "name": platform.processor() or "Apple"})
    return found


def _kernel(device: str, dtype: torch.dtype) -> dict[str, str]:
    choice = choose_kernel(device, dtype, HEAD_DIM)
    kernel = choice.backend
    if kernel == "xformers":
        from sta_adapter.attention.xformers_kernels import kernel_names

        q = torch.empty(1, FRAMES, 1, HEAD_DIM, device=device, dtype=dtype)
        kernel = f"xformers ({', '.join(kernel_names(q, q, q))})"
    return {"device": device, "dtype": str(dtype).removeprefix("torch."), "kernel": kernel, "reason": choice.reason}


def _decoder(module: str) -> str:
    if importlib.util.find_spec(module) is None:
        return "not installed"
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken build raises OSError, RuntimeError and others
        return f"can't be imported: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    return version(module)


def _source(name: str) -> str:
    """The package that a backbone comes from, and its version."""
    module = get_backbone(name).layout.__module__
    for entry in metadata.entry_points(group=ENTRY_POINT_GROUP):
        if entry.name == name and entry.dist is not None:
            return f"{entry.dist.name} {entry.dist.version}"
    return f"registered in this process, by {module}"


def _hub() -> dict[str, str]:
    found = {name: _without_secrets(os.environ[name]) for name in HUB_SETTINGS if name in os.environ}
    return {**found, "token": "set" if huggingface_hub.get_token() else "not set"}


def _without_secrets(value: str) -> str:
    parts = urlsplit(value)
    if "@" in parts.netloc:
        value = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    value = re.sub(r"hf_\w+", "hf_...", value.partition("?")[0])
    home = str(Path.home())
    return "~" + value[len(home) :] if value == home or value.startswith(home + os.sep) else value


def format_environment(found: Environment) -> str:
    """The same as text, a line for each fact."""
    lines = [
        f"Python {found['platform']['python']}, {found['platform']['system']}, CUDA of torch: {found['platform']['cuda']}"
    ]

    def section(title: str, rows: dict[str, str]) -> None:
        lines.extend(["", title, *(f"  {name:<34} {value}" for name, value in rows.items())])

    tested = {name: f" (tested: {versions})" for name, versions in found["tested"].items()}
    section("Versions", {name: value + tested.get(name, "") for name, value in found["versions"].items()})
    section("Devices", {f"{number} {device['type']}": device["name"] for number, device in enumerate(found["devices"])})
    section(
        "Attention kernels (attention='auto')",
        {f"{k['device']} {k['dtype']}": f"{k['kernel']}: {k['reason']}" for k in found["kernels"]},
    )
    section("Video decoders", found["decoders"])
    section("Backbones", found["backbones"])
    section(
        "What STA leans on in other packages",
        {str(seam["name"]): f"{'DIFFERS: ' if seam['differs'] else ''}{seam['found']}" for seam in found["seams"]},
    )
    section("Hugging Face Hub", found["hub"])
    return "\n".join(lines)
