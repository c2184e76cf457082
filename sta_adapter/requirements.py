"""What a command needs, looked at before it works for minutes: packages, a device, a reporter, a folder to write into."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from sta_adapter.errors import ConfigError, MissingExtraError


def require_packages(what: str, extras: Mapping[str, Sequence[str]]) -> None:
    """Refuse to begin without packages.

    Args:
        what: that needs them.
        extras: modules by the extra that brings them.

    Raises:
        MissingExtraError: names what is missing, and all extras to install.
    """
    missing = {extra: [name for name in names if find_spec(name) is None] for extra, names in extras.items()}
    absent = list(dict.fromkeys(name for names in missing.values() for name in names))
    if absent:
        wanted = ",".join(extra for extra, names in missing.items() if names)
        raise MissingExtraError(
            f"{what} needs more packages ({', '.join(absent)}): pip install 'sta-adapter[{wanted}]'"
        )


def require_device(name: str | None) -> None:
    """Refuse a device that there is not."""
    import torch

    if name is None:
        return
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device is {name!r}, expected one such as cpu, cuda or cuda:1.") from error
    if device.type == "meta":
        raise ConfigError("device is 'meta', which computes nothing; expected one such as cpu, cuda or cuda:1.")
    if device.type == "cuda" and torch.cuda.is_available() and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device is {name!r}, but there are {torch.cuda.device_count()} CUDA devices, from cuda:0.")
    try:
        torch.zeros(1, device=device)
    except Exception as error:  # whatever a backend of torch raises
        reason = " ".join(str(error).split("\n")[0].split())
        raise ConfigError(f"device {name!r} can't be used here: {reason}. Expected one such as cpu.") from error


def reporters(asked: str | Sequence[str]) -> list[str]:
    """The names in a `report_to` such as "tensorboard,wandb"; "auto" is TensorBoard where that is installed."""
    if asked == "auto":
        return ["tensorboard"] if find_spec("tensorboard") is not None else ["none"]
    return [name.strip() for name in asked.split(",")] if isinstance(asked, str) else list(asked)


def require_reporters(asked: str | Sequence[str]) -> None:
    """Refuse a `report_to` that is misspelt, whose package is missing, or who would not take a report now.

    Raises:
        ConfigError: there is no such reporter, or it has no key, or its server doesn't answer.
        MissingExtraError: its package is not installed.
    """
    names = reporters(asked)
    if names in ([], ["none"], ["all"]) or asked == "auto":
        return
    from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks

    available = get_available_reporting_integrations()
    for name in names:
        try:
            get_reporting_integration_callbacks([name])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"report_to is {name!r}: {str(error).strip(chr(39))} Or auto, none, or all.") from error
        if name not in available:
            raise MissingExtraError(f"report_to: {name} needs a package more: pip install {name.replace('_', '-')}")
        _REPORTER_CHECKS.get(name, lambda: None)()


def _check_wandb() -> None:
    import wandb

    offline = os.environ.get("WANDB_MODE", "online") in ("offline", "disabled", "dryrun")
    if not offline and not wandb.api.api_key:
        raise ConfigError(
            "report_to: wandb has no API key, and would ask for one in the middle of the run: run wandb login, set "
            "WANDB_API_KEY, or WANDB_MODE=offline to report later."
        )


def _check_mlflow() -> None:
    import mlflow

    try:
        mlflow.search_experiments(max_results=1)
    except Exception as error:  # whatever the store or the connection says
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"report_to: mlflow can't use {mlflow.get_tracking_uri()!r} ({reason}). Expected a server that answers or a "
            "store that can be written, in MLFLOW_TRACKING_URI."
        ) from error


_REPORTER_CHECKS = {"wandb": _check_wandb, "mlflow": _check_mlflow}


_MADE: list[Path] = []  # folders that require_writable made, the innermost last


def require_writable(folder: Path) -> None:
    """Make a folder, and refuse one that can't be written into; `remove_empty` takes back what was made for nothing."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _MADE.extend(path.absolute() for path in reversed(missing))
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\n")
    except OSError as error:
        raise ConfigError(
            f"can't write into {os.fspath(folder)!r}: {error.strerror or error}. Take another folder."
        ) from error


def remove_empty() -> None:
    """Remove the folders that `require_writable` made in this process and that nothing was written into."""
    while _MADE:
        with contextlib.suppress(OSError):  # not empty, or gone
            _MADE.pop().rmdir()


def require_free(folder: Path, names: Iterable[str], overwrite: bool) -> None:
    """Refuse to replace what is in a folder, unless that is wanted.

    Args:
        folder: need not exist.
        names: of files and folders in it that would be lost.
        overwrite: whether that is wanted.
    """
    there = [name for name in names if os.path.lexists(folder / name)]
    if there and not overwrite:
        raise ConfigError(
            f"{os.fspath(folder)!r} holds {', '.join(there)}, which would be lost. Take another folder, or throw that away "
            "(overwrite=True, --overwrite)."
        )
