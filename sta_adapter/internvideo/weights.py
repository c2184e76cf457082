"""Files of a model, from a folder or the Hub: its configuration, and its weights into a model that has none yet.

Weights come one tensor after the other. Safetensors are mapped from the disk, and pickles (`.bin`, `.pt`, `.pth`) are
read by torch's `weights_only` reader alone, which runs no code. Beyond the model's own size, no more than one tensor is
held (of pickles in the format before torch 1.6, one file).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from sta_adapter._validate import one_line
from sta_adapter.adapter.hub import explain, patiently
from sta_adapter.adapter.safe_read import read_index
from sta_adapter.compatibility.module_names import STA_TENSOR
from sta_adapter.errors import CheckpointError, ConfigError
from sta_adapter.injection.saved_sta import warn_of_sta

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

TOKENIZER_FILES = ("*token*", "*.model", "vocab.json", "merges.txt", "chat_template*", "preprocessor_config.json")
Weights = Iterable[tuple[str, Tensor]]
DTYPE = "dtype" if hasattr(PretrainedConfig(), "dtype") else "torch_dtype"  # what this release of transformers calls it
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.index.json", "generation_config.json")
MAKERS = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)  # of parameters


def published_config(name: str | os.PathLike[str], revision: str | None = None) -> dict[str, object]:
    """Contents of a model's `config.json`; empty where there is none, which is left to transformers to tell."""
    try:
        return PretrainedConfig.get_config_dict(name, revision=revision)[0]
    except (OSError, ValueError):
        return {}


def fetch_folder(name: str | os.PathLike[str], revision: str | None, patterns: Sequence[str]) -> Path:
    """A local folder with a model's files that fit the patterns, from the Hub or its cache where it isn't one already."""
    text = os.fspath(name)
    if os.path.isdir(text):
        return Path(text)
    from huggingface_hub import snapshot_download

    wanted = ["config.json", *patterns]
    try:
        return Path(patiently(lambda: snapshot_download(text, revision=revision, allow_patterns=wanted)))
    except Exception as error:  # whatever the client's releases raise
        at = f" at revision {revision!r}" if revision else ""
        raise CheckpointError(f"the files of {text!r}{at} isn't available: {explain(error)}") from error


def refuse_quantization(name: str | os.PathLike[str]) -> NoReturn:
    """Published weights are other tensors until they are converted: a ConfigError."""
    raise ConfigError(
        f"the weights of {os.fspath(name)!r} have their published names, and can't be quantized while they are converted. "
        "Save the model once (load_model(...).save_pretrained(FOLDER), and the processor likewise), and load FOLDER."
    )


def read_json(file: Path) -> dict[str, Any]:
    """Contents of a JSON file; empty where it is missing."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} can't be read as JSON: {error}; download it again.") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} holds a {type(found).__name__}, expected an object; download it again.")
    return found


def added_tokens(folder: Path) -> dict[str, int]:
    """Ids of the tokens that a tokenizer adds to its vocabulary, or renames in it, by their text; empty if files don't say."""
    told = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
    whole, further = read_json(folder / "tokenizer.json"), read_json(folder / "added_tokens.json")
    try:
        found = {str(token["content"]): int(number) for number, token in told.items()}
        found |= {token["content"]: token["id"] for token in whole.get("added_tokens", [])}
        return found | {text: int(number) for text, number in further.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"tokenizer files in {folder} list no added tokens; download them again.") from error


NAMES = ("model.safetensors", "pytorch_model.bin")
PICKLES = (".bin", ".pt", ".pth")
NESTED = ("model", "module", "state_dict")
"""Keys below which training code keeps the weights in a `.pt`."""
SHOWN = 4
"""Differences of each kind that an error names."""


def weight_files(source: Path) -> list[Path]:
    """The files with a checkpoint's weights: those of its index, else the one of the usual name, else the only one there is."""
    if source.is_file():
        return [source]
    for name in NAMES:
        index = source / f"{name}.index.json"
        if index.is_file():
            return read_index(index)
        if (source / name).is_file():
            return [source / name]
    found = sorted(path for path in source.glob("*") if path.suffix in (".safetensors", *PICKLES))
    if len(found) == 1:
        return found
    held = f"holds {', '.join(path.name for path in found)}" if found else "holds no weights"
    raise CheckpointError(
        f"{source} {held}; expected {' or '.join(NAMES)}, or one of them in parts with its .index.json. Name the file, or "
        "download the checkpoint again."
    )


def iterate_weights(files: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of each weight; a CheckpointError for a damaged file, or a pickle that holds more than tensors."""
    for file in files:
        yield from _pickled(file) if file.suffix in PICKLES else _mapped(file)


def _mapped(file: Path) -> Iterator[tuple[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no mapping
                yield name, opened.get_tensor(name)
    except SafetensorError as error:
        raise CheckpointError(f"{file} can't be read as safetensors: {error}; download it again.") from error


def _pickled(file: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        try:
            held = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            held = torch.load(file, map_location="cpu", weights_only=True)  # the format before torch 1.6
    except Exception as error:  # whatever the unpickler says
        raise CheckpointError(
            f"{file} can't be read as weights alone: {one_line(error)}. It is damaged, or "
            "holds objects whose code would have to run, which is never done; get the checkpoint as safetensors."
        ) from error
    inner = [key for key in NESTED if isinstance(held, Mapping) and isinstance(held.get(key), Mapping)]
    weights: object = held[inner[0]] if len(inner) == 1 else held
    if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise CheckpointError(f"{file} holds a {type(held).__name__} that is no table of weights by name.")
    yield from weights.items()


def dtype_of_weights(asked: torch.dtype | str, config: Mapping[str, object]) -> torch.dtype:
    """The type that weights are loaded in: the one asked for, with "auto" the one that `config.json` names, or bfloat16."""
    if isinstance(asked, torch.dtype):
        return asked
    name = config.get("torch_dtype") or config.get("dtype") or "bfloat16" if asked == "auto" else asked
    found = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise CheckpointError(f"the weights' dtype is {name!r}; expected one of torch's, such as bfloat16 or float32.")
    return found


class Unallocated(TorchFunctionMode):
    """New parameters are on the meta device; what is computed, as rotary frequencies, is real, and so are tables of numbers."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Collection[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        """See torch."""
        kwargs = kwargs or {}
        if func in MAKERS and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def load_published(
    model: PreTrainedModel,
    weights: Weights,
    folder: Path,
    name: str | os.PathLike[str],
    dtype: torch.dtype,
    device: str,
) -> nn.Module:
    """A model made in `Unallocated` with the published weights of a `folder`; STA among them is left out and told of."""
    left: list[str] = []

    def without_sta() -> Iterator[tuple[str, Tensor]]:
        for weight, tensor in weights:
            if STA_TENSOR.search(weight):
                left.append(weight)
            else:
                yield weight, tensor

    fill(model, without_sta(), source=folder, dtype=dtype, device=device)
    warn_of_sta(name, left)
    model.config._name_or_path = os.fspath(name)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    found: nn.Module = model.eval()
    return found.to(device)


def load_saved(
    cls: type[PreTrainedModel],
    folder: Path,
    name: str | os.PathLike[str],
    dtype: torch.dtype | str,
    device: str,
    quantization_config: BitsAndBytesConfig | None,
) -> nn.Module:
    """A model of ours from the `folder` in which `save_pretrained` wrote it; STA among its weights is told of."""
    options: dict[str, object] = {DTYPE: dtype}
    if quantization_config is not None:
        options |= {"quantization_config": quantization_config, "device_map": {"": device}}
    loaded = cast("Any", cls).from_pretrained(folder, output_loading_info=True, **options)
    model: nn.Module = loaded[0]
    warn_of_sta(name, loaded[1]["unexpected_keys"])
    cast(PreTrainedModel, model).config._name_or_path = os.fspath(name)
    return model if quantization_config is not None else model.to(device)


def fill(model: nn.Module, weights: Weights, *, source: object, dtype: torch.dtype, device: str = "cpu") -> None:
    """Give a model on the meta device its weights, each in memory of its own, those of floating point as `dtype`.

    Buffers that no checkpoint holds (rotary frequencies) must be real already. Errors call the checkpoint `source`.

    Raises:
        CheckpointError: naming weights that are missing, have no place, or are of another shape.
    """
    places = model.state_dict()
    missing, foreign, shapes = set(places), [], []
    for name, tensor in weights:
        if name not in places:
            foreign.append(name)
            continue
        missing.discard(name)
        if places[name].shape != tensor.shape:
            shapes.append(f"{name} is {tuple(tensor.shape)}, expected {tuple(places[name].shape)}")
            continue
        kept = tensor.detach().to(device, dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
        path, _, last = name.rpartition(".")
        model.get_submodule(path).load_state_dict({last: kept.contiguous()}, strict=False, assign=True)
    problems = [
        *([f"{_few(sorted(missing))} missing"] if missing else []),
        *([f"{_few(sorted(foreign))} without a place in the model"] if foreign else []),
        *([f"of other sizes: {_few(shapes)}"] if shapes else []),
    ]
    if problems:
        raise CheckpointError(
            f"the weights in {source} don't fit its configuration: {'; '.join(problems)}. Either config.json or the weights "
            "are of another model or release; download both again."
        )


def _few(names: list[str]) -> str:
    rest = len(names) - SHOWN
    return f"{', '.join(names[:SHOWN])}{f' and {rest} more' if rest > 0 else ''}"
