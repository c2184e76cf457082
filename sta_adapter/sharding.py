"""Weights that several processes hold in parts (FSDP2, DeepSpeed ZeRO-3), and files that one process writes for all.

Public: `whole`, `assign`, `is_sharded`, `is_first`, `write_once`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, distributed

from sta_adapter.errors import CheckpointError


def whole(tensor: Tensor) -> Tensor:
    """A tensor's full value. Where it is sharded, all processes must call this, in the same order."""
    if hasattr(tensor, "full_tensor"):  # FSDP2
        return tensor.full_tensor()
    if hasattr(tensor, "ds_id"):  # ZeRO-3
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor


@torch.no_grad()
def assign(parameter: Any, value: Tensor) -> None:
    """Give a parameter a full value, of which a sharded one keeps this process's part; called on all processes."""
    if hasattr(parameter, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        value = value.to(parameter.device, parameter.dtype)
        parameter.copy_(distribute_tensor(value, parameter.device_mesh, parameter.placements))
    elif hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if distributed.get_rank() == 0:
                parameter.copy_(value)
    else:
        parameter.copy_(value)


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape of the full value."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether any of them lies in parts on several processes."""
    return any(hasattr(tensor, "full_tensor") or hasattr(tensor, "ds_id") for tensor in tensors)


def is_parallel() -> bool:
    """Whether this is one of several processes."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def is_first() -> bool:
    """Whether this is process 0, or the only one."""
    return not is_parallel() or distributed.get_rank() == 0


def write_once(write: Callable[[], None]) -> None:
    """Run `write` on process 0 while the others wait for it; alone, just run it.

    Raises:
        CheckpointError: on the other processes, when process 0 failed; there its own error is raised.
    """
    if not is_parallel():
        write()
        return
    failure: Exception | None = None
    if distributed.get_rank() == 0:
        try:
            write()
        except Exception as error:
            failure = error
    report = [None if failure is None else str(failure)]
    distributed.broadcast_object_list(report, src=0)
    if failure is not None:
        raise failure
    if report[0] is not None:
        raise CheckpointError(f"process 0 could not save: {report[0]}")
