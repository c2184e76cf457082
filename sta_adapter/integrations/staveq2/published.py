"""Files of the published STAVEQ2 code: which tensors in them are STA's, whatever stands in front of their names."""

from __future__ import annotations

import dataclasses
import re
import shlex
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from sta_adapter.adapter.safe_read import opened, read_header, read_index, read_json
from sta_adapter.config import STAConfig
from sta_adapter.errors import CheckpointError, STAWarning
from sta_adapter.injection.backbone import Backbone

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
PARAMETERS = {
    "norm": ("weight", "bias"),
    "to_qkv": ("weight", "bias"),
    "to_out": ("weight", "bias"),
    "gamma": ("gamma",),
}
WRAPPED = r"(?:\.modules_to_save(?:\.[^.]+?)?)?"  # as PEFT names the copy that it trains


@dataclasses.dataclass(frozen=True)
class Source:
    """A published checkpoint: its configuration, and which file holds which tensor; no tensor is read."""

    folder: Path  # where the files are
    files: Mapping[str, Path]  # the file of each key
    config: Mapping[str, object]  # contents of `config.json`; empty without one
    metadata: Mapping[str, str]  # header fields of the first file

    def read(self, keys: list[str]) -> dict[str, Tensor]:
        """These tensors, and no other, on the CPU."""
        found = {}
        for file in sorted({self.files[key] for key in keys}):
            with opened(file) as tensors:
                found.update({key: tensors.get_tensor(key) for key in keys if self.files[key] == file})
        return found


def open_source(source: str | Path, config: str | Path | None = None) -> Source:
    """List the tensors of a checkpoint: a folder, in one piece or sharded, or one file; its `config` may lie elsewhere."""
    path = Path(source)
    folder = path if path.is_dir() else path.parent
    metadata: dict[str, str] = {}
    files: dict[str, Path] = {}
    for file in _safetensors(path):
        keys, header = read_header(file)
        metadata = metadata or header
        twice = [key for key in keys if key in files]
        if twice:
            raise CheckpointError(
                f"{twice[0]!r} stands in {files[twice[0]].name} and in {file.name}; pass the file that is meant."
            )
        files |= dict.fromkeys(keys, file)
    settings = Path(config) if config else folder / "config.json"
    if config and not settings.exists():
        raise CheckpointError(f"there is no configuration {settings}.")
    return Source(folder, files, read_json(settings) if settings.exists() else {}, metadata)


def _safetensors(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint."""
    if path.is_file() and path.suffix == ".safetensors":
        return [path]
    if path.is_file():
        if path.suffix in PICKLES:
            raise CheckpointError(_pickle_message(path))
        raise CheckpointError(f"{path} is no safetensors file; expected one, or a folder with them.")
    if not path.is_dir():
        raise CheckpointError(f"there is no file or folder {path}.")
    for index in sorted(path.glob("*.safetensors.index.json")):
        return read_index(index)
    found = sorted(path.glob("*.safetensors"))
    if found:
        return found
    pickles = sorted(p for p in path.iterdir() if p.suffix in PICKLES)
    if pickles:
        raise CheckpointError(_pickle_message(pickles[0]))
    others = ", ".join(sorted(p.name for p in path.iterdir())[:10]) or "nothing"
    raise CheckpointError(f"{path} holds no safetensors file; found: {others}.")


def _pickle_message(path: Path) -> str:
    """The refusal, with a command whose words are data to the shell and to Python, whatever the file is called."""
    code = (
        "import sys, torch, safetensors.torch as s; s.save_file({k: v.contiguous() for k, v in torch.load(sys.argv[1], "
        'map_location="cpu", weights_only=True).items()}, sys.argv[2])'
    )
    command = shlex.join(["python", "-c", code, str(path), str(path.with_suffix(".safetensors"))])
    return (
        f"{path} is a pickle, which can run code when it is opened and is never read here. If you trust it, make "
        f"safetensors of it once: {command}"
    )


def published_keys(spec: Backbone) -> dict[str, str]:
    """From our names within a block, `to_qkv.weight`, to the published ones, `temp_attn.qkv.weight`."""
    return {
        (name if name == "gamma" else f"{name}.{leaf}"): f"{module}.{leaf}"
        for name, module in spec.published_names.items()
        for leaf in PARAMETERS[name]
    }


def match_keys(spec: Backbone, keys: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Find STA's tensors of a backbone under their published names.

    Returns:
        (from our key, `blocks.{i}.to_qkv.weight`, to the checkpoint's; keys below STA's modules that we have no place
        for). A tensor that stands there twice, as with several PEFT adapters, is refused.
    """
    block = rf"(?:^|\.){re.escape(spec.blocks)}\.(\d{{1,6}})\."
    patterns = {n: re.compile(f"{block}{_with_wrappers(p)}$") for n, p in published_keys(spec).items()}
    roots = "|".join({re.escape(module.split(".")[0]) for module in spec.published_names.values()})
    below = re.compile(rf"(?:^|\.){re.escape(spec.blocks)}\.\d+\.(?:{roots})(?:\.|$)")
    found: dict[str, str] = {}
    unknown = []
    for key in keys:
        if not below.search(key) or ".original_module." in key:
            continue
        match = next(((name, m[1]) for name, pattern in patterns.items() if (m := pattern.search(key))), None)
        if match is None:
            unknown.append(key)
            continue
        ours = f"blocks.{match[1]}.{match[0]}"
        if ours in found:
            raise CheckpointError(f"{found[ours]!r} and {key!r} are the same tensor of STA; keep one of them.")
        found[ours] = key
    return found, unknown


def _with_wrappers(name: str) -> str:
    """Pattern of a published name, also below the copies that PEFT trains; a `gamma` may stand there without its module."""
    pattern = rf"{WRAPPED}\.".join(map(re.escape, name.split(".")))
    return (
        pattern.removesuffix(rf"{WRAPPED}\.gamma") + rf"(?:{WRAPPED}\.gamma)?" if name.endswith(".gamma") else pattern
    )


def warn_of_other_settings(spec: Backbone, config: STAConfig) -> None:
    """Warn where the published code, which knows no settings, computes otherwise than STA with these."""
    there = STAConfig(token_order="published" if spec.published_token_order else "clip").with_defaults(spec.defaults)
    differ = [
        f"{name} is {getattr(config, name)!r}, there {getattr(there, name)!r}"
        for name in ("token_order", "rope_theta", "causal", "window", "single_frames")
        if getattr(config, name) != getattr(there, name)
    ]
    if differ:
        warnings.warn(
            f"the published code computes something else with these weights: {'; '.join(differ)}. Converted back they compute what they did.",
            STAWarning,
            stacklevel=3,
        )
