"""The Hugging Face Hub: adapters found by id, in the cache or by download, and what its errors mean; `push` is the other way."""

from __future__ import annotations

import inspect
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from sta_adapter._validate import causes, one_line
from sta_adapter.adapter.format import CONFIG, WEIGHTS
from sta_adapter.adapter.lora_weights import LORA_CONFIG, LORA_WEIGHTS
from sta_adapter.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

ADAPTER_FILES = [WEIGHTS, CONFIG, LORA_CONFIG, LORA_WEIGHTS]
PASSING = (408, 425, 429, 500, 502, 503, 504)  # statuses that may be gone a moment later
WAITS = (1.0, 4.0)  # seconds before each further try
CLIENTS = ("requests", "urllib3", "httpx", "httpx2", "httpcore", "httpcore2")  # what huggingface_hub talks HTTP with
LOGIN = "log in (python -c 'import huggingface_hub; huggingface_hub.login()'), set HF_TOKEN, or pass token=..."
MISSING = f"it does not exist, or is private, which looks the same from outside: then {LOGIN}"
OFFLINE = (
    "HF_HUB_OFFLINE=1 is set, and the cache holds no complete copy of it. Load it once with a connection, with the same "
    "HF_HOME, or unset HF_HUB_OFFLINE"
)

T = TypeVar("T")


def resolve_adapter(
    folder_or_repo_id: str | os.PathLike[str],
    revision: str | None = None,
    *,
    subfolder: str | None = None,
    **options: Any,
) -> Path:
    """A local folder with the adapter's files, downloaded when it isn't one already; no other file is fetched.

    A folder of that name goes before a repository. What is in the Hub's cache is not fetched again; with
    HF_HUB_OFFLINE=1, or when the Hub can't be reached, the cache alone is used.

    Args:
        folder_or_repo_id: a folder, or a repository's id on the Hub.
        revision: branch, tag or commit on the Hub; not for a folder.
        subfolder: in which the files lie, if not at the top.
        options: further arguments of `huggingface_hub.snapshot_download`.

    Raises:
        CheckpointError: neither a folder nor a repository that can be had.
        ConfigError: it is neither text nor a path.
    """
    if not isinstance(folder_or_repo_id, (str, os.PathLike)):
        raise ConfigError(
            f"the adapter is a {type(folder_or_repo_id).__name__}; expected its folder, or its id on the Hub."
        )
    text = os.fspath(folder_or_repo_id)
    if os.path.isdir(text):
        if revision is not None:
            raise CheckpointError(f"{text!r} is a folder, which has no revision {revision!r}.")
        return Path(text, subfolder or "")
    if os.path.exists(text):
        raise CheckpointError(f"{text!r} is a file; expected the folder that holds it, or a repository id on the Hub.")
    if is_path(text):
        raise CheckpointError(f"there is no folder {text!r}, and it is no repository id on the Hub (user/name).")
    from huggingface_hub import snapshot_download

    files = [(PurePosixPath(subfolder or "") / name).as_posix() for name in ADAPTER_FILES]

    def download() -> Path:
        return Path(snapshot_download(text, revision=revision, allow_patterns=files, **options), subfolder or "")

    try:
        return patiently(download)
    except Exception as error:
        at = f" at revision {revision!r}" if revision else ""
        raise CheckpointError(
            f"there is no folder {text!r}, and the Hub repository of that id{at} isn't available: {explain(error)}"
        ) from error


def is_path(name: str) -> bool:
    """Whether a name can only be a path, and no id on the Hub."""
    return name.count("/") > 1 or name.startswith((".", "/", "~"))


def download_options(given: Mapping[str, object]) -> dict[str, object]:
    """Those of another loader's arguments that `resolve_adapter` passes on, such as a token or the cache's folder."""
    from huggingface_hub import snapshot_download

    known = inspect.signature(snapshot_download).parameters
    return {name: value for name, value in given.items() if name in known and name != "revision"}


def patiently(action: Callable[[], T]) -> T:
    """Do it, and again a little later where the network or the server failed in a way that may pass."""
    for wait in WAITS:
        try:
            return action()
        except Exception as error:
            if not _may_pass(error):
                raise
            logger.info("trying again in %g s: %s", wait, error)
            time.sleep(wait)
    return action()


def explain(error: BaseException, endpoint: str | None = None) -> str:
    """What an error of `huggingface_hub` means for the user, and what to do about it.

    Args:
        error: what was raised.
        endpoint: what was to be written to; None for reading, where the cache helps.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    chain = list(causes(error))
    if constants.HF_HUB_OFFLINE or any(type(cause).__name__ == "OfflineModeIsEnabled" for cause in chain):
        meaning = "HF_HUB_OFFLINE=1 is set; unset it to push" if endpoint else OFFLINE
    elif any(isinstance(cause, GatedRepoError) for cause in chain):
        meaning = f"its owner lets in only who asked for access on its page; then {LOGIN}"
    elif any(isinstance(cause, RevisionNotFoundError) for cause in chain):
        meaning = "it has no such branch, tag or commit"
    elif any(isinstance(cause, RepositoryNotFoundError) for cause in chain):
        meaning = MISSING
    elif (status := status_of(error)) is not None:
        meaning = _status_meaning(status, str(error), pushing=endpoint is not None)
    elif any(map(_is_connection_trouble, chain)):
        there = endpoint or f"{constants.ENDPOINT} (HF_ENDPOINT), and no complete copy in the cache"
        meaning = f"no connection to {there}"
    else:
        return one_line(error)
    return f"{meaning} ({one_line(error)})"


def why_no_model(name: str | os.PathLike[str], error: BaseException) -> str:
    """What an error of transformers' loading means, on one line: that neither a folder nor a repository is there, or its own words."""
    text = os.fspath(name)
    if isinstance(error, OSError) and not os.path.exists(text):
        if is_path(text):
            return "there is no such folder, and it is no repository id on the Hub (user/name)"
        if (meaning := explain(error)) != one_line(error):
            return f"there is no such folder, and the Hub repository of that id isn't available: {meaning}"
    return " ".join(str(error).split()).rstrip(".")


def _status_meaning(status: int, text: str, *, pushing: bool) -> str:
    if status == 401 and "Invalid credentials" in text:
        return f"the Hub does not know your token; {LOGIN}"
    if status == 401:
        return f"the Hub wants a token with write access; {LOGIN}" if pushing else MISSING
    if status == 403:
        return "your token does not allow it; use one with the rights, from the settings page of the account"
    if status == 429:
        return "the Hub has had too many requests from here; wait some minutes, or log in"
    return f"the Hub answered with status {status}"


def status_of(error: BaseException) -> int | None:
    """The HTTP status behind an error, if a server has answered."""
    for cause in causes(error):
        response = getattr(cause, "response", None)
        if response is not None:
            return int(response.status_code)
    return None


def _may_pass(error: BaseException) -> bool:
    status = status_of(error)
    return any(map(_is_connection_trouble, causes(error))) if status is None else status in PASSING


def _is_connection_trouble(error: BaseException) -> bool:
    if type(error).__name__ == "OfflineModeIsEnabled":
        return False
    if isinstance(error, (ConnectionError, TimeoutError)) or "Consistency check failed" in str(error):
        return True
    return type(error).__module__.split(".")[0] in CLIENTS and not isinstance(error, ValueError)
