"""Encoded samples on disk, so that a clip is decoded and processed once for all epochs and runs.

An entry is a safetensors file named by the fingerprint of all that the sample depends on. Pixel values that a processor
made of bytes lie as bytes, where its arithmetic gives back the very same values: a quarter of the size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load, save

from sta_adapter.compatibility.processors import Processor
from sta_adapter.compatibility.releases import version
from sta_adapter.data.clip_reader import ClipReader
from sta_adapter.data.fingerprint import fingerprint, fingerprint_clip, fingerprint_processor
from sta_adapter.data.message import Message, Part
from sta_adapter.data.visual_processing import Encoded
from sta_adapter.errors import ConfigError

logger = logging.getLogger(__name__)

CACHE_FORMAT = 7  # raised when the same settings mean other tensors than before, or entries have another form
MADE_BY = ("sta-adapter", "torch", "torchvision", "transformers", "tokenizers", "numpy", "pillow", "av", "decord")
RESERVE = 1 << 30  # bytes of the disk that are left to others: a cache must not cost a run its checkpoints
CODES, AFFINE = "bytes of ", "shift and scale of "
CHANNELS = 3
ROW = 4096  # bytes of a row of the checksum's words
UNKNOWN = "-" * 64  # in the checksum's place while it is taken
DAMAGE = (SafetensorError, ValueError, KeyError, TypeError, IndexError, AttributeError, RuntimeError)


class SampleCache:
    """A folder of encoded samples that processes share; it may be thrown away at any time.

    Raises:
        ConfigError: the folder can't be made.
    """

    def __init__(self, folder: str | Path, processor: Processor, reader: ClipReader) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cache {str(folder)!r} is no folder and none can be made: {error.strerror}.") from error
        self.settings = fingerprint(
            CACHE_FORMAT,
            _versions(),
            type(processor).__name__,
            fingerprint_processor(processor),
            dataclasses.asdict(reader),
        )
        part = getattr(processor, "video_processor", None) or getattr(processor, "image_processor", None)
        self.scale = tuple(getattr(part, name, None) for name in ("rescale_factor", "image_mean", "image_std"))
        self.writing = True

    def key(self, messages: list[Message], *rest: object) -> str | None:
        """The name of an entry, for a sample and the rest that it depends on; None where a clip can't be found."""
        clips = [
            fingerprint_clip(part) for message in messages for part in message["content"] if part["type"] != "text"
        ]
        if None in clips:
            return None
        plain = [{**m, "content": [_without_place(part) for part in m["content"]]} for m in messages]
        return fingerprint(self.settings, plain, clips, rest)

    def read(self, key: str) -> Encoded | None:
        """A sample's tensors; None where there are none, or what is there is damaged."""
        path = self._path(key)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            logger.warning("%s can't be read (%s); the sample is made again", path, error)
            return None
        try:
            return _unpacked(data, key)
        except DAMAGE as error:
            logger.warning("%s is damaged (%s); the sample is made again", path, str(error).split("\n")[0])
            return None

    def write(self, key: str, encoded: Encoded) -> None:
        """Keep a sample's tensors, whole or not at all; where the disk takes no more, it goes on without."""
        if not self.writing:
            return
        path = self._path(key)
        try:
            if shutil.disk_usage(self.folder).free < RESERVE:
                raise OSError(f"less than {RESERVE >> 20} MiB are free")
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_whole(path, _packed(encoded, key, self.scale))
        except OSError as error:
            self.writing = False
            logger.warning("no more samples are kept in the cache %s: %s; the run goes on", self.folder, error)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key[2:]}.safetensors"


def _versions() -> dict[str, str]:
    """Of all packages that have a part in what comes out."""
    return {name: found for name in MADE_BY if (found := version(name)) != "not installed"}


def _without_place(part: Part) -> Part:
    """A part as it is but for where its clip lies, whose contents the key has."""
    if part["type"] == "text":
        return dict(part)
    return {key: value for key, value in part.items() if key not in ("packed", part["type"])}


def _write_whole(path: Path, data: bytes) -> None:
    """Under its name there is a whole file or none, whoever writes it at the same time."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _packed(encoded: Encoded, key: str, scale: tuple[object, ...]) -> bytes:
    """A safetensors file with the names' order, and a checksum over all of it."""
    tensors: dict[str, torch.Tensor] = {}
    for name, value in encoded.items():
        coded = _as_bytes(value, *scale)
        if coded is None:
            tensors[name] = value.contiguous()
        else:
            tensors[CODES + name], tensors[AFFINE + name] = coded
    data = save(tensors, {"key": key, "order": json.dumps(list(encoded)), "checksum": UNKNOWN})
    header, values = _halves(data)
    return data.replace(UNKNOWN.encode(), _checksum(header, values).encode(), 1)


def _unpacked(data: bytes, key: str) -> Encoded:
    """What `_packed` was given; a ValueError, or what json and safetensors raise, where the data are something else."""
    header, values = _halves(data)
    about = json.loads(header)["__metadata__"]
    if about["key"] != key:
        raise ValueError("it is of another sample")
    if _checksum(header.replace(about["checksum"].encode(), UNKNOWN.encode()), values) != about["checksum"]:
        raise ValueError("its checksum differs")
    tensors = load(data)
    return {
        name: tensors[name] if name in tensors else _from_bytes(tensors[CODES + name], tensors[AFFINE + name])
        for name in json.loads(about["order"])
    }


def _halves(data: bytes) -> tuple[bytes, NDArray[np.uint8]]:
    """The header and the values of a safetensors file."""
    start = 8 + int.from_bytes(data[:8], "little")
    return data[8:start], np.frombuffer(data, np.uint8)[start:]


def _checksum(header: bytes, values: NDArray[np.uint8]) -> str:
    """SHA-256 of the header and of the values' sums, as 64-bit words by rows of 4 KB and by columns.

    It takes a quarter of CRC-32's time. Whatever changes up to three words is noticed for certain, as is a run of bytes of up to
    4 KB; so is what swaps blocks or cuts the file.
    """
    words = values[: len(values) // ROW * ROW].view("<u8").reshape(-1, ROW // 8)
    found = hashlib.sha256(header)
    for part in (words.sum(0), words.sum(1), values[words.nbytes :]):
        found.update(part.tobytes())
    return found.hexdigest()


def _by_channel(value: torch.Tensor) -> torch.Tensor | None:
    """Pixel values as (n, 3, m): packed patches (n, 3 m), or frames (..., 3, H, W)."""
    if value.dim() == 2 and value.shape[1] % CHANNELS == 0:
        return value.view(len(value), CHANNELS, -1)
    if value.dim() >= 4 and value.shape[-3] == CHANNELS:
        return value.view(-1, CHANNELS, value.shape[-2] * value.shape[-1])
    return None


def _as_bytes(
    value: torch.Tensor, factor: object, mean: object, std: object
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Pixel values as bytes of the same shape, with the shift and scale (2, 3) of channels; None where a bit would be lost."""
    found = _by_channel(value.contiguous()) if value.dtype == torch.float32 and value.dim() > 1 else None
    lists = isinstance(mean, (list, tuple)) and isinstance(std, (list, tuple)) and len(mean) == len(std) == CHANNELS
    if found is None or not lists or not isinstance(factor, (int, float)) or not factor:
        return None
    affine = torch.tensor([mean, std], dtype=torch.float32) * (1.0 / factor)  # as processors fuse them
    shift, scale = affine.view(2, 1, CHANNELS, 1)
    codes = found.mul(scale).add_(shift).round_().clamp_(0, 255).to(torch.uint8).view(value.shape)
    same = torch.equal(_from_bytes(codes, affine).view(torch.int32), value.contiguous().view(torch.int32))
    return (codes, affine) if same else None


def _from_bytes(codes: torch.Tensor, affine: torch.Tensor) -> torch.Tensor:
    """The values that bytes stand for, by the arithmetic of torchvision's normalize."""
    found = _by_channel(codes)
    if found is None:
        raise ValueError("its bytes are of another shape")
    shift, scale = affine.view(2, 1, CHANNELS, 1)
    return found.float().sub_(shift).div_(scale).view(codes.shape)  # torch.sub of bytes and floats takes twice as long
