"""Checkpoints of a training run: what is in them, when one counts, and which is the newest.

A checkpoint counts once `complete.json`, written last, names all its files with their sizes: whatever stopped a run while
it saved, the next one goes on from the checkpoint before.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils import import_utils

from sta_adapter.adapter.atomic_write import atomic_folder_write
from sta_adapter.compatibility.module_names import name_in_state
from sta_adapter.compatibility.releases import version
from sta_adapter.distributed import assign, full_shape, full_tensor
from sta_adapter.errors import CheckpointError, ConfigError

TRAINED_FILE = "trained.safetensors"
SAMPLES_FILE = "samples.json"
COMPLETE_FILE = "complete.json"


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies on the CPU of the parameters that require a gradient, by name; gathered where they are sharded."""
    return {
        name_in_state(name): full_tensor(parameter).detach().cpu().clone().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def load_trained(model: nn.Module, folder: Path) -> None:
    """Put what `trained_state` gave back into the model: all of it, or a CheckpointError before anything is changed."""
    file = folder / TRAINED_FILE
    try:
        saved = load_file(file)
    except Exception as error:
        raise CheckpointError(
            f"can't read {str(file)!r} ({error}); remove the folder to go on from an earlier checkpoint."
        ) from error
    target = {name_in_state(name): p for name, p in model.named_parameters() if p.requires_grad}
    wrong = sorted(
        name
        for name in saved.keys() | target.keys()
        if name not in saved or name not in target or saved[name].shape != full_shape(target[name])
    )
    if wrong:
        raise CheckpointError(
            f"{str(file)!r} is of another run: {len(wrong)} parameters are missing, unexpected or of another shape, "
            f"such as {', '.join(wrong[:4])}. Use the model and settings that it was made with, or another output folder."
        )
    for name, parameter in target.items():
        assign(parameter, saved[name])


def mark_complete(checkpoint: Path) -> None:
    """Declare a checkpoint written, after its files have reached the disk; after an OSError it doesn't count."""
    sizes = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
            sizes[path.relative_to(checkpoint).as_posix()] = path.stat().st_size
    atomic_folder_write(checkpoint, {COMPLETE_FILE: json.dumps(sizes, indent=1).encode()})


def is_complete(checkpoint: Path) -> bool:
    """Whether everything is there that was when the checkpoint was declared complete."""
    try:
        sizes = json.loads((checkpoint / COMPLETE_FILE).read_text(encoding="utf-8"))
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in a stage's folder."""
    return next(iter(_complete(folder)), None)


def drop_incomplete(folder: Path) -> None:
    """Remove what a run left that was stopped while it saved or deleted a checkpoint."""
    for path in folder.glob("checkpoint-*"):
        if path.is_dir() and not is_complete(path):
            shutil.rmtree(path, ignore_errors=True)


def rotate(folder: Path, keep: int, best: str | None = None) -> None:
    """Keep the newest complete checkpoints, `keep` in all; the newest and the best always stay."""
    newest_first = _complete(folder)
    stay = [path for path in newest_first[1:] if best is not None and path.name == Path(best).name]
    stay = [*newest_first[:1], *stay]
    stay += [path for path in newest_first if path not in stay][: max(keep - len(stay), 0)]
    for path in newest_first:
        if path not in stay:
            (path / COMPLETE_FILE).unlink()  # first, so that half of it never counts
            shutil.rmtree(path, ignore_errors=True)


def require_readable(checkpoint: Path) -> None:
    """Refuse to go on where transformers would not read the optimizer's state: since 4.52, with a torch before 2.6."""
    check = getattr(import_utils, "check_torch_load_is_safe", None)
    try:
        if check is not None:
            check()
    except ValueError as error:
        raise ConfigError(
            f"can't go on from {checkpoint}: transformers {version('transformers')} reads the optimizer's state with torch 2.6 "
            f"or newer alone, and this is torch {version('torch')}. The checkpoint is whole: after pip install 'torch>=2.6', "
            "the same command goes on from it."
        ) from error


def numpy_allowed() -> contextlib.AbstractContextManager[object]:
    """A context in which torch reads what older transformers' random state files hold, beside weights."""
    allow = getattr(torch.serialization, "safe_globals", None)
    if allow is None:  # before torch 2.5, which asks for no list
        return contextlib.nullcontext()
    core = np.core if np.__version__.startswith("1.") else np._core  # type: ignore[attr-defined]
    kinds = [type(np.dtype(np.uint32)), type(np.dtype(np.float64))]
    allowed: contextlib.AbstractContextManager[object] = allow(
        [core.multiarray._reconstruct, np.ndarray, np.dtype, *kinds]
    )
    return allowed


def _complete(folder: Path) -> list[Path]:
    """Complete checkpoints, the newest first."""
    steps = {path: path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")}
    numbered = [path for path in steps if steps[path].isdigit() and is_complete(path)]
    return sorted(numbered, key=lambda path: int(steps[path]), reverse=True)
