"""Names of the tensors in a file of LoRA weights: which tensor of a model each one is, whatever release of transformers wrote it.

The file's header is enough: all is known before a tensor is read or made.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from sta_adapter.adapter.lora_options import LoraOptions
from sta_adapter.adapter.safe_read import compare_shapes, read_tensors
from sta_adapter.compatibility.module_names import STA_TENSOR, canonical
from sta_adapter.compatibility.releases import version
from sta_adapter.compatibility.seams import experts_are_out_in
from sta_adapter.errors import CheckpointError

PREFIX = "base_model.model."  # of a PeftModel around its model
EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight")  # PEFT saves them along when they were resized
Shape = tuple[int, ...]


def sta_among(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """STA's tensors among LoRA's, under the names of an adapter's file."""
    found = ((STA_TENSOR.search(key), tensor) for key, tensor in state.items())
    return {f"blocks.{match[1]}.{match[2]}": tensor for match, tensor in found if match}


@dataclass(frozen=True)
class Placement:
    """Where the tensors of a file go."""

    keys: Mapping[str, str]  # from the file's names to those of the model, both with PEFT's prefix
    targets: Mapping[str, str]  # the modules with LoRA, from the model's names to those that the options have for them
    renamed: bool  # whether the file has other names than the model


@dataclass(frozen=True)
class LoraFile:
    """A file of LoRA weights, by its header."""

    path: Path  # of the file
    options: LoraOptions  # LoRA's options that belong to it
    shapes: Mapping[str, Shape]  # of its tensors
    sta: dict[str, object] | None = None  # the description of the STA that was trained with it, where PEFT saved both

    @property
    def holds_sta(self) -> bool:
        """Whether tensors of STA are among them."""
        return any(STA_TENSOR.search(key) for key in self.shapes)

    def require_parts(self) -> None:
        """Refuse tensors that are not LoRA's or saved along, and ranks other than the options', as far as it shows without a model."""
        experts = self.options.get("target_parameters", list[str]())
        for key, shape in self.shapes.items():
            name = key.removeprefix(PREFIX)
            module, last = _module(name), name.rpartition(".")[2]
            known = ".lora_" in name or self.options.is_saved(module) or "bias" in last or is_embedding(name)
            if not key.startswith(PREFIX) or not known:
                raise CheckpointError(
                    f"{self.path}: {key[:200]!r} is no tensor of LoRA, and none that is saved with it."
                )
            rank = self.options.rank(module)
            if key.endswith(".lora_A.weight") and not experts and shape[:1] != (rank,):
                raise CheckpointError(f"{self.path}: {key[:200]!r} has the shape {shape}, expected the rank {rank}.")

    def read_sta(self) -> dict[str, Tensor]:
        """STA's tensors under the names of an adapter's file; errors as `read_tensors`."""
        return sta_among(read_tensors(self.path)[0])

    def place(self, model: nn.Module) -> Placement:
        """Find each tensor's place in a model, and see to it that none is missing and all ranks and shapes fit.

        Args:
            model: without LoRA; STA in it where it was when LoRA was trained.

        Raises:
            CheckpointError: every difference is listed.
        """
        outside = [key for key in self.shapes if not key.startswith(PREFIX)]
        if outside:
            raise CheckpointError(
                f"{self.path}: {outside[0][:200]!r} is no name of LoRA's, which begin with {PREFIX!r}."
            )
        modules = dict(model.named_modules())
        names = {key: key.removeprefix(PREFIX) for key in self.shapes if not _is_copy(key, self.shapes)}
        spelled = _spellings({_module(name) for name in names.values()}, modules)
        prefixes = _prefixes(spelled)
        found = {key: _respelled(name, spelled) for key, name in names.items()}
        targets = {name: theirs for name in modules if name and self.options.targets(theirs := _theirs(name, prefixes))}
        expected, possible = self._expected(modules, targets)
        shapes = {ours: self.shapes[key] for key, ours in found.items()}
        wanted = {**expected, **{key: shape for key, shape in possible.items() if key in shapes}}
        try:
            compare_shapes(self.path, _prefixed(shapes), _prefixed(wanted))
        except CheckpointError as error:
            raise CheckpointError(f"{error} {self._hint(shapes, wanted, modules)}".rstrip()) from None
        if not expected:
            raise CheckpointError(f"{self.path.parent}: LoRA's target_modules name no module of this model.")
        keys = {key: PREFIX + ours for key, ours in found.items()}
        return Placement(keys, targets, any(theirs != ours for theirs, ours in spelled.items()))

    def _expected(
        self, modules: Mapping[str, nn.Module], targets: Mapping[str, str]
    ) -> tuple[dict[str, Shape], dict[str, Shape]]:
        """Names and shapes that the file must have for this model, and those that it may have besides."""
        options, expected, possible = self.options, dict[str, Shape](), dict[str, Shape]()
        bias = options.get("bias", "none")
        for name, module in modules.items():
            start = f"{name}." if name else ""
            if options.is_saved(name):
                tensors = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
                kept = tensors.keys() - module._non_persistent_buffers_set
                expected |= {start + key: tuple(tensors[key].shape) for key in kept}
                continue
            inner = start
            expected |= self._expert_shapes(name, module)
            if name in targets:
                expected |= self._lora_shapes(name, targets[name], module)
                inner = f"{start}base_layer."
            biased = bias == "all" or (bias == "lora_only" and name in targets)
            for key, tensor in module.named_parameters(recurse=False):
                if biased and "bias" in key:
                    expected[inner + key] = tuple(tensor.shape)
                elif is_embedding(start + key):
                    possible[inner + key] = tuple(tensor.shape)
        return expected, possible

    def _lora_shapes(self, name: str, theirs: str, module: nn.Module) -> dict[str, Shape]:
        """Names and shapes of LoRA's own tensors on a module."""
        width, out = getattr(module, "in_features", None), getattr(module, "out_features", None)
        if not isinstance(width, int) or not isinstance(out, int):
            raise CheckpointError(
                f"{self.path.parent}: LoRA's target_modules name {theirs!r}, which is a {type(module).__name__} in this model; "
                "expected linear layers."
            )
        rank = self.options.rank(theirs)
        shapes: dict[str, Shape] = {"lora_A.weight": (rank, width), "lora_B.weight": (out, rank)}
        if self.options.get("use_dora", False):
            shapes["lora_magnitude_vector"] = (out,)
        return {f"{name}.{key}": shape for key, shape in shapes.items()}

    def _expert_shapes(self, name: str, module: nn.Module) -> dict[str, Shape]:
        """Names and shapes of LoRA's tensors on a module's own parameters, of which each wraps the module once more."""
        own = [(key, tuple(p.shape)) for key, p in module.named_parameters(recurse=False)]
        own = [(key, shape) for key, shape in own if self.options.targets_parameter(f"{name}.{key}")]
        shapes: dict[str, Shape] = {}
        for depth, (key, shape) in enumerate(reversed(own)):
            if len(shape) not in (2, 3):
                raise CheckpointError(
                    f"{self.path.parent}: LoRA's target_parameters name '{name}.{key}', which has the shape {shape} in this "
                    "model; expected matrices, or a stack of them."
                )
            rank = self.options.rank(f"{name}.{key}") * math.prod(shape[:-2])
            out, width = shape[-2:] if len(shape) == 2 or experts_are_out_in(module) else reversed(shape[-2:])
            start = f"{name}.{'base_layer.' * depth}"
            shapes |= {f"{start}lora_A.weight": (rank, width), f"{start}lora_B.weight": (out, rank)}
        return shapes

    def _hint(self, found: Mapping[str, Shape], wanted: Mapping[str, Shape], modules: Mapping[str, nn.Module]) -> str:
        """What may be the cause where the model has other embeddings, or not even the modules."""
        rows = next(
            (shape[0] for key, shape in found.items() if is_embedding(key) and wanted.get(key, shape) != shape), 0
        )
        if rows:
            return f"The base was given other tokens for its training: model.resize_token_embeddings({rows}) first."
        if all(_module(key) in modules for key in found):
            return ""
        return (
            "The file names modules that this model lacks: it is for another model, or of a release of transformers with "
            f"names that are not known here (this is {version('transformers')})."
        )


def is_embedding(key: str) -> bool:
    """Whether a tensor is the weight of the embeddings or the output layer, which may have LoRA."""
    return key.replace(".base_layer.", ".").endswith(EMBEDDINGS)


def _prefixed(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    return {PREFIX + name: shape for name, shape in shapes.items()}


def _is_copy(key: str, keys: Iterable[str]) -> bool:
    """Whether PEFT has written a tensor twice, as with bias="all": below its wrapper's names, and as what it is."""
    return ".original_module." in key or (".modules_to_save." in key and key.replace(".modules_to_save.", ".") in keys)


def _module(name: str) -> str:
    """The module of a tensor of LoRA, or of one that is saved along."""
    if ".lora_" in name:
        return re.sub(r"(\.base_layer)+$", "", name.split(".lora_")[0])
    return name.rpartition(".")[0].removesuffix(".base_layer")


def _spellings(theirs: Iterable[str], modules: Iterable[str]) -> dict[str, str]:
    """From a file's names of modules to the model's; without those that the model has not."""
    known = set(modules)
    ours: dict[str, str | None] = {}
    for name in known:
        ours[canonical(name)] = None if canonical(name) in ours else name  # of two with one spelling, none is meant
    found = {name: name if name in known else ours.get(canonical(name)) for name in theirs}
    return {name: here for name, here in found.items() if here is not None}


def _respelled(name: str, spelled: Mapping[str, str]) -> str:
    """A tensor's name with its module's in the model's spelling."""
    module = _module(name)
    return spelled.get(module, module) + name[len(module) :]


def _prefixes(spelled: Mapping[str, str]) -> list[tuple[str, str]]:
    """(the model's, the file's) beginnings of names, the longest first, as seen in the names that both have."""
    pairs = set()
    for theirs, ours in spelled.items():
        a, b = theirs.split("."), ours.split(".")
        while a and b and a[-1] == b[-1]:
            a.pop(), b.pop()
        pairs.add((".".join([*b, ""]), ".".join([*a, ""])))
    return sorted(pairs, key=lambda pair: (-len(pair[0]), pair))


def _theirs(name: str, prefixes: Iterable[tuple[str, str]]) -> str:
    """A module's name as the file would have it."""
    return next((theirs + name[len(ours) :] for ours, theirs in prefixes if name.startswith(ours)), name)
