"""Reading untrusted files: JSON and safetensors, checked, in memory of the order of their size."""

from __future__ import annotations

import contextlib
import json
import math
import re
import stat
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sta_adapter.errors import CheckpointError

if TYPE_CHECKING:
    from safetensors import safe_open

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.10 calls the parser sre_parse
    try:
        from re import _parser  # type: ignore[attr-defined]
    except ImportError:
        import sre_parse as _parser

MAX_JSON_BYTES = 1 << 20
MAX_INDEX_BYTES = 64 << 20
MAX_JSON_DEPTH = 32
MAX_JSON_NUMBER = 1 << 63
MAX_PATTERNS = 256  # each is tried on every module of a model
MAX_REPETITIONS, NAME_LENGTH = 4, 64
MAX_NAMES = 5000  # of modules, which are compared as they are
MAX_DIFFERENCES = 20
POINTER = b"version https://git-lfs"  # how a file of Git LFS begins that was not fetched
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, object]:
    """The object in a JSON file of at most 1 MiB.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: no regular file, too large, not JSON, no object, nested too deeply, or with a number that is
            not finite or beyond 64 bits.
    """
    return parse_json(read_bytes(path, max_bytes), path)


def read_index(path: Path) -> list[Path]:
    """The files that the index of weights in parts names, all of which must lie beside it; errors as `read_json`."""
    table = read_json(path, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise CheckpointError(f"{path}: weight_map must name a file for each tensor.")
    names = sorted(set(table.values()))
    if outside := [name for name in names if Path(name).name != name]:
        raise CheckpointError(f"{path} names {outside[0]!r}, which is outside of its folder.")
    if missing := [name for name in names if not (path.parent / name).is_file()]:
        raise CheckpointError(
            f"{path.name} names {len(names)} files of weights, and {', '.join(missing)} is not in {path.parent}; download the "
            "checkpoint again."
        )
    return [path.parent / name for name in names]


def parse_json(content: bytes, path: Path) -> dict[str, object]:
    """The object in the contents of a JSON file; `path` is named in errors, which are those of `read_json`."""
    try:
        found = json.loads(content)
        wrong = _unusual(found)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} can't be read as JSON: {error}") from error
    if wrong:
        raise CheckpointError(f"{path} can't be read as JSON: {wrong}")
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a {type(found).__name__}, expected a JSON object.")
    return found


def _unusual(value: object, depth: int = 0) -> str:
    """What in a JSON value no configuration needs, and later code might stumble over; empty if there is nothing."""
    if depth > MAX_JSON_DEPTH:
        return f"it is nested deeper than {MAX_JSON_DEPTH} levels"
    if isinstance(value, float) and not math.isfinite(value):
        return "it holds a number that is not finite"
    if isinstance(value, int) and abs(value) > MAX_JSON_NUMBER:
        return "it holds a number of more than 64 bits"
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((wrong for item in inside if (wrong := _unusual(item, depth + 1))), "")


def read_bytes(path: Path, max_bytes: int | None = None) -> bytes:
    """The contents of a regular file.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: no regular file, too large, or it can't be read.
    """
    try:
        size = _size(path)
        if max_bytes is not None and size > max_bytes:
            raise CheckpointError(f"{path} has {size} bytes; expected at most {max_bytes}.")
        with path.open("rb") as file:
            return file.read(size)  # of a file that grows meanwhile, no more
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error}") from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, on the CPU, and its metadata.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: damaged, or a tensor is not of a floating dtype of 16, 32 or 64 bits, or not finite.
    """
    with opened(path) as file:
        metadata = dict(file.metadata() or {})
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    _require_weights(state, path)
    return state, metadata


def parse_tensors(content: bytes, path: Path) -> dict[str, Tensor]:
    """The tensors in the contents of a safetensors file; `path` is named in errors, which are those of `read_tensors`."""
    from safetensors.torch import load

    with _damage_named(path):
        state = load(content)
    _require_weights(state, path)
    return state


def parse_metadata(content: bytes, path: Path) -> dict[str, str]:
    """The metadata in the contents of a safetensors file that `parse_tensors` has taken."""
    header = parse_json(content[8 : 8 + int.from_bytes(content[:8], "little")], path)
    found = header.get("__metadata__")
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}


def read_header(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """The shapes of a safetensors file's tensors, and its metadata; no tensor is read. Errors as `read_tensors`."""
    with opened(path) as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        return shapes, dict(file.metadata() or {})


@contextlib.contextmanager
def opened(path: Path) -> Iterator[safe_open]:
    """A safetensors file, whose tensors are read one by one. Errors as `read_tensors`, but for the tensors' values."""
    from safetensors import safe_open

    with _damage_named(path):
        _size(path)
        with safe_open(path, framework="pt") as file:
            yield file


@contextlib.contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (FileNotFoundError, CheckpointError):
        raise
    except (SafetensorError, OSError, ValueError, RuntimeError, MemoryError, KeyError, TypeError) as error:
        with contextlib.suppress(OSError), path.open("rb") as file:
            if file.read(len(POINTER)) == POINTER:
                raise CheckpointError(
                    f"{path} is a pointer of Git LFS in the place of weights: run `git lfs pull` there."
                ) from error
        raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from error


def _require_weights(state: Mapping[str, Tensor], path: Path) -> None:
    wrong = [key for key, value in state.items() if value.dtype not in DTYPES or not torch.isfinite(value).all()]
    if wrong:
        raise CheckpointError(
            f"{path}: {len(wrong)} tensors are not finite floating-point numbers of 16, 32 or 64 bits, "
            f"the first is {wrong[0]!r}."
        )


def _size(path: Path) -> int:
    """Bytes of a regular file; a pipe or a device would be read without an end."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} is no regular file.")
    return status.st_size


def compare_shapes(path: Path, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
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
        raise CheckpointError(f"{path} does not fit the model: {'; '.join(differences[:MAX_DIFFERENCES])}{more}.")


def require_plain_patterns(path: Path | str, patterns: Collection[str], prefixed: bool = False) -> None:
    """Raise a CheckpointError for regular expressions that together could take minutes on a model's names of modules.

    Args:
        path: named in errors.
        patterns: all that are tried on each name.
        prefixed: whether each is tried at every place of a name.
    """
    if len(patterns) > MAX_PATTERNS:
        raise CheckpointError(
            f"{path} has {len(patterns)} patterns for names of modules; expected at most {MAX_PATTERNS}."
        )
    steps = sum(NAME_LENGTH ** (require_plain_pattern(path, pattern) + prefixed) for pattern in patterns)
    if steps > NAME_LENGTH**MAX_REPETITIONS:
        raise CheckpointError(f"{path} has patterns that together repeat too much; expected names of modules.")


def require_plain_pattern(path: Path | str, pattern: str) -> int:
    """Raise a CheckpointError for a regular expression that could take forever on some module name.

    Allowed are at most 1000 characters and four repetitions, none of which repeats another one or a choice.

    Returns:
        How many repetitions it has.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = _parser.parse(pattern) if len(pattern) <= 1000 else None
    except (re.error, RecursionError, OverflowError) as error:
        raise CheckpointError(f"{path}: {pattern[:80]!r} is no regular expression: {error}") from error
    count = 100 if tree is None else _repetitions(tree)
    if count > MAX_REPETITIONS:
        raise CheckpointError(
            f"{path}: the pattern {pattern[:80]!r} repeats too much to be matched safely; expected names of modules."
        )
    return count


def _repetitions(tree: Iterable[tuple[object, Any]], inside: bool = False) -> int:
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
        elif name in ("ASSERT", "ASSERT_NOT"):  # a look ahead or behind, as ms-swift's patterns have it
            count += _repetitions(argument[1], inside)
        elif name in ("GROUPREF", "GROUPREF_EXISTS", "ATOMIC_GROUP"):
            return 100
    return count
