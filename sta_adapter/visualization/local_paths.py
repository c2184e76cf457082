"""What is shown of names and messages that may be published: no folders of this machine."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar, cast

Plain = TypeVar("Plain")
_ABSOLUTE = re.compile(r"(?:(?<![\w/.:~])~?/(?=[^\s/])|\b[A-Za-z]:[\\/]|\\\\)(?:[^\s/\\'\"<>|:,;]+[/\\])*")


def public_name(name: str | os.PathLike[str]) -> str:
    """A Hub id as it is; of a file or a folder, its own name."""
    text = os.fspath(name)
    local = os.path.exists(text) or text.startswith(("/", ".", "~")) or "\\" in text or text.count("/") > 1
    return Path(text.replace("\\", "/")).expanduser().resolve().name if local else text


def subject(model: str | os.PathLike[str], adapter: str | os.PathLike[str] | None) -> str:
    """What a page shows, by the public names of both."""
    return f"{public_name(model)}, {public_name(adapter) if adapter else 'no adapter'}"


def without_folders(value: Plain, roots: Iterable[str | os.PathLike[str]] = ()) -> Plain:
    """Plain values with what stands before a file's own name taken away from every path in their texts.

    Args:
        value: a text, or lists and dictionaries of them.
        roots: folders whose names may hold blanks, or are relative.
    """
    longest_first = sorted({os.fspath(root).rstrip("/\\") for root in roots} - {"", "."}, key=len, reverse=True)
    return cast(Plain, _without(value, longest_first))


def _without(value: object, roots: list[str]) -> object:
    if isinstance(value, dict):
        return {key: _without(entry, roots) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without(entry, roots) for entry in value]
    if not isinstance(value, str):
        return value
    for root in roots:
        value = value.replace(f"{root}/", "").replace(f"{root}\\", "")
    return _ABSOLUTE.sub("", value)
