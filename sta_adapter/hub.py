"""Adapters on the Hugging Face Hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sta_adapter.errors import CheckpointError

ADAPTER_FILES = ["sta_adapter.safetensors", "sta_config.json", "adapter_config.json", "adapter_model.safetensors"]


def resolve_adapter(folder_or_repo_id: str | os.PathLike[str], revision: str | None = None, **options: Any) -> Path:
    """A local folder with the adapter's files, downloaded when it isn't one already; no other file is fetched.

    Args:
        folder_or_repo_id: a folder, or a repository's id on the Hub.
        revision: branch, tag or commit on the Hub; not for a folder.
        options: further arguments of `huggingface_hub.snapshot_download`.

    Raises:
        CheckpointError: neither a folder nor a repository that can be had.
    """
    text = os.fspath(folder_or_repo_id)
    if os.path.isdir(text):
        if revision is not None:
            raise CheckpointError(f"{text!r} is a folder, which has no revision {revision!r}.")
        return Path(text)
    if os.path.exists(text):
        raise CheckpointError(f"{text!r} is a file; expected the folder that holds it, or a repository id on the Hub.")
    if text.count("/") > 1 or text.startswith((".", "/", "~")):
        raise CheckpointError(f"there is no folder {text!r}, and it is no repository id on the Hub (user/name).")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text, revision=revision, allow_patterns=ADAPTER_FILES, **options))
    except Exception as error:
        at = f" at revision {revision!r}" if revision else ""
        raise CheckpointError(
            f"there is no folder {text!r}, and the Hub repository of that id{at} can't be had: {type(error).__name__}: {error}"
        ) from error
