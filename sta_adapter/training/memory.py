"""How much memory a training step takes at its peak, found without taking it.

The step is run for its bookkeeping alone: floating-point tensors are torch's fake ones, which have shapes and no
values, and whole numbers (tokens, grids, masks) are real, as models read them. What is alive is counted by storages, as
they come and go.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.hooks import RemovableHandle

PARTS = ("weights", "gradients", "optimizer", "activations", "logits")
SMALL = 1 << 16  # numbers; tables up to this size are real, as some models read them


class _Bookkeeping(TorchDispatchMode):
    """Runs what is fake as fake and what is real as it is, and counts the bytes of living storages."""

    def __init__(self, fake: FakeTensorMode, vocabulary: int) -> None:
        super().__init__()
        self.fake, self.vocabulary = fake, vocabulary
        self.alive: Counter[str] = Counter()
        self.part_of: dict[int, str] = {}
        self.peak: dict[str, int] = {}

    def __torch_dispatch__(
        self,
        func: OpOverload[..., object],
        types: Collection[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = dict(kwargs or {})
        args = _masks_as_indices(func, args)
        given = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
        if any(isinstance(value, FakeTensor) for value in given) or (not given and _is_large(args, kwargs)):
            with self.fake:
                found = func(*args, **kwargs)
        else:
            found = func(*args, **kwargs)
        for value in tree_flatten(found)[0]:
            if isinstance(value, torch.Tensor):
                self.note(value)
        return found

    def note(self, tensor: torch.Tensor, part: str | None = None) -> None:
        """Count a tensor's storage until it goes."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.part_of:
            if part is not None:
                self._move(key, storage.nbytes(), part)
            return
        if part is None:
            part = "logits" if tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary else "activations"
        self.part_of[key] = part
        self.alive[part] += storage.nbytes()
        weakref.finalize(storage, self._gone, key, storage.nbytes())
        if sum(self.alive.values()) > sum(self.peak.values()):
            self.peak = dict(self.alive)

    def _move(self, key: int, size: int, part: str) -> None:
        self.alive[self.part_of[key]] -= size
        self.alive[part] += size
        self.part_of[key] = part

    def _gone(self, key: int, size: int) -> None:
        self.alive[self.part_of.pop(key)] -= size


def _masks_as_indices(func: OpOverload[..., object], args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Fake tensors can't be indexed by masks, whose counts are unknown; these masks are real."""
    if func._schema.name not in ("aten::index", "aten::index_put", "aten::index_put_"):
        return args
    found: list[object] = []
    for index in args[1]:
        masked = isinstance(index, torch.Tensor) and index.dtype == torch.bool and not isinstance(index, FakeTensor)
        found += list(index.nonzero(as_tuple=True)) if masked else [index]
    return (args[0], found, *args[2:])


def _is_large(args: tuple[object, ...], kwargs: Mapping[str, object]) -> bool:
    """Whether a function that makes a tensor from nothing makes a large one of floating point."""
    dtype = kwargs.get("dtype") or torch.get_default_dtype()
    sizes = args[0] if args and isinstance(args[0], (list, tuple, torch.Size)) else ()
    return (
        isinstance(dtype, torch.dtype) and dtype.is_floating_point and bool(sizes) and torch.Size(sizes).numel() > SMALL
    )


def without_values(model: nn.Module) -> FakeTensorMode:
    """Give a model, whose parameters may be on the meta device, parameters and buffers that have shapes alone, in place."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    made: dict[int, tuple[Any, torch.Tensor]] = {}  # what takes its place, parameter or buffer, and what was there
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, value in table.items():
                if value is None:
                    continue
                small = value.numel() <= SMALL and not isinstance(value, nn.Parameter)
                if not value.is_meta and (small or not value.is_floating_point()):
                    continue
                if id(value) not in made:
                    with mode:
                        fake = torch.empty(value.shape, dtype=value.dtype, device="cpu")
                    if isinstance(value, nn.Parameter):
                        fake = nn.Parameter(fake, requires_grad=value.requires_grad)
                    made[id(value)] = (fake, value)
                table[name] = made[id(value)][0]
    return mode


def step_peak(
    model: nn.Module,
    batch: Mapping[str, object],
    mode: FakeTensorMode,
    *,
    precision: str = "fp32",
    like_cuda: bool = False,
    accumulates: bool = False,
) -> dict[str, float]:
    """What is alive at the peak of a step's forward and backward, with the optimizer's two moments (AdamW) beside it.

    Args:
        model: from `without_values`, with what trains marked, in its training contexts.
        batch: as the collator makes it; whole numbers real, the pixels real or fake.
        mode: from `without_values`.
        precision: "fp32", "bf16" or "fp16" autocast.
        like_cuda: cast as CUDA's autocast does.
        accumulates: gradients of earlier parts of the step are there already.

    Returns:
        Bytes of each of `PARTS`.
    """
    vocabulary = int(model.get_output_embeddings().weight.shape[0])  # type: ignore[operator]
    books = _Bookkeeping(mode, vocabulary)
    for value in {id(v): v for v in (*model.parameters(), *model.buffers())}.values():
        books.note(value, "weights")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hooks: list[RemovableHandle] = [
        p.register_post_accumulate_grad_hook(lambda p: books.note(p.grad, "gradients")) for p in trained
    ]
    hooks += _norms_like_cuda(model) if like_cuda and precision != "fp32" else []
    if accumulates:
        for parameter in trained:
            with mode:
                parameter.grad = torch.empty_like(parameter)
            books.note(parameter.grad, "gradients")
    inputs = {key: _fake(value, mode) for key, value in batch.items()}
    for given in inputs.values():
        if isinstance(given, torch.Tensor):
            books.note(given)
    try:
        with books:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32"):
                loss = model(**inputs).loss
            loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in trained:
            parameter.grad = None
    moments = 2 * sum(parameter.numel() * parameter.element_size() for parameter in trained)
    return {part: moments if part == "optimizer" else books.peak.get(part, 0) for part in PARTS}


def _norms_like_cuda(model: nn.Module) -> list[RemovableHandle]:
    """CUDA's autocast computes layer norms in 32 bit, of which copies stay; the CPU's leaves them in 16."""
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    for norm in norms:
        for parameter in norm.parameters():
            parameter.data = parameter.data.float()
    return [norm.register_forward_pre_hook(lambda norm, args: (args[0].float(), *args[1:])) for norm in norms]


def _fake(value: object, mode: FakeTensorMode) -> object:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.numel() <= SMALL:
        return value
    with mode:
        return torch.empty(value.shape, dtype=value.dtype)
