"""Reading files that a stranger may have written: JSON and safetensors, checked, in memory of the order of their size.

Public: `read_json`, `read_tensors`, `compare_shapes`, `require_plain_pattern`.
"""

from __future__ import annotations

import json
import re
import stat
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sta_adapter.errors import CheckpointError

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.10 calls the parser sre_parse
    try:
        from re import _parser  # type: ignore[attr-defined]
    except ImportError:
        import sre_parse as _parser

MAX_JSON_BYTES = 1 << 20
MAX_DIFFERENCES = 20
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of at most 1 MiB.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: no regular file, too large, not JSON, nested too deeply, or no object.
    """
    try:
        size = _size(path)
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} has {size} bytes; an adapter's configuration has some thousands at most.")
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} can't be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a {type(found).__name__}, expected a JSON object.")
    return found


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, on the CPU, and its metadata.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: damaged, or a tensor is not of a floating dtype of 16, 32 or 64 bits, or not finite.
    """
    from safetensors import SafetensorError, safe_open

    try:
        _size(path)
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, ValueError, RuntimeError, MemoryError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from error
    wrong = [key for key, value in state.items() if value.dtype not in DTYPES or not torch.isfinite(value).all()]
    if wrong:
        raise CheckpointError(
            f"{path}: {len(wrong)} tensors are not finite floating-point numbers of 16, 32 or 64 bits, "
            f"the first is {wrong[0]!r}."
        )
    return state, metadata


def _size(path: Path) -> int:
    """Bytes of a regular file; a pipe or a device would be read without an end."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} is no regular file.")
    return status.st_size


def compare_shapes(
    path: Path, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], of: str = "the model"
) -> None:
    """Raise a CheckpointError that lists every key and shape that a file has otherwise than expected."""
    differences = [f"missing {key}" for key in expected if key not in found]
    differences += [f"unexpected {key}" for key in found if key not in expected]
    differences += [
        f"{key} has the shape {found[key]}, expected {shape}"
        for key, shape in expected.items()
        if key in found and found[key] != shape
    ]
    if differences:
        more = f"; and {len(differences) - MAX_DIFFERENCES} more" if len(differences) > MAX_DIFFERENCES else ""
        raise CheckpointError(f"{path} does not fit {of}: {'; '.join(differences[:MAX_DIFFERENCES])}{more}.")


def require_plain_pattern(path: Path, pattern: str) -> None:
    """Raise a CheckpointError for a regular expression that could take forever on some module name.

    Allowed are at most 1000 characters and four repetitions, none of which repeats another one or a choice.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = _parser.parse(pattern) if len(pattern) <= 1000 else None
    except (re.error, RecursionError, OverflowError) as error:
        raise CheckpointError(f"{path}: {pattern[:80]!r} is no regular expression: {error}") from error
    if tree is None or _repetitions(tree) > 4:
        raise CheckpointError(
            f"{path}: the pattern {pattern[:80]!r} repeats too much to be matched safely; expected names of modules."
        )


def _repetitions(tree: Any, inside: bool = False) -> int:
    """How many repetitions a parsed expression has; 100 for one that nests them."""
    count = 0
    for operation, argument in tree:
        name = str(operation)
        if name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            again = argument[1] > 1
            if inside and again:
                return 100
            count += again + _repetitions(argument[2], inside or again)
        elif name == "BRANCH":
            count += 100 if inside else sum(_repetitions(branch, inside) for branch in argument[1])
        elif name == "SUBPATTERN":
            count += _repetitions(argument[-1], inside)
        elif name in ("ASSERT", "ASSERT_NOT", "GROUPREF", "GROUPREF_EXISTS", "ATOMIC_GROUP"):
            return 100
    return count
