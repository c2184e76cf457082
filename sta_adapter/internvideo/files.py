"""Files of a model in a folder or on the Hub: its configuration alone, and all that loading needs."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sta_adapter.adapter.hub import explain, patiently
from sta_adapter.errors import CheckpointError

__all__ = ["added_tokens", "fetch_folder", "published_config", "read_json"]

TOKENIZER_FILES = ("*token*", "*.model", "vocab.json", "merges.txt", "chat_template*", "preprocessor_config.json")
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.index.json", "generation_config.json")


def published_config(name: str | os.PathLike[str], revision: str | None = None) -> dict[str, object]:
    """Contents of a model's `config.json`; empty where there is none, which is left to transformers to tell."""
    from transformers import PretrainedConfig

    try:
        return PretrainedConfig.get_config_dict(name, revision=revision)[0]
    except (OSError, ValueError):
        return {}


def fetch_folder(name: str | os.PathLike[str], revision: str | None, patterns: Sequence[str]) -> Path:
    """A local folder with a model's files that fit the patterns, from the Hub or its cache where it isn't one already.

    Raises:
        CheckpointError: the repository or its revision can't be had.
    """
    text = os.fspath(name)
    if os.path.isdir(text):
        return Path(text)
    from huggingface_hub import snapshot_download

    wanted = ["config.json", *patterns]
    try:
        return Path(patiently(lambda: snapshot_download(text, revision=revision, allow_patterns=wanted)))
    except Exception as error:  # whatever the client's releases raise
        at = f" at revision {revision!r}" if revision else ""
        raise CheckpointError(f"the files of {text!r}{at} can't be had: {explain(error)}") from error


def read_json(file: Path) -> dict[str, Any]:
    """Contents of a JSON file; empty where it is missing.

    Raises:
        CheckpointError: it is damaged, or holds no object.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} can't be read as JSON: {error}; download it again.") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} holds a {type(found).__name__}, expected an object; download it again.")
    return found


def added_tokens(folder: Path) -> dict[str, int]:
    """Ids of the tokens that a tokenizer adds to its vocabulary, or renames in it, by their text; empty if files don't say."""
    told = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
    found = {str(token["content"]): int(number) for number, token in told.items()}
    found.update(
        {token["content"]: token["id"] for token in read_json(folder / "tokenizer.json").get("added_tokens", [])}
    )
    return {**found, **{text: int(number) for text, number in read_json(folder / "added_tokens.json").items()}}
