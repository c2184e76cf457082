"""Several processes: weights that they hold in parts (FSDP2, DeepSpeed ZeRO-3) or average (DDP), and files that one of them writes for all."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeGuard, TypeVar, cast

import torch
from torch import Tensor, distributed, nn
from torch.autograd.graph import get_gradient_edge

from sta_adapter.errors import CheckpointError, InjectionError

if TYPE_CHECKING:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor
    from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")
AVERAGED = "sta_adapter"  # what is noted on a parameter, see `require_averages`
FLATTENS = "FSDP of version 1 flattens weights, from which an adapter can't be saved; set fsdp_version: 2."


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor's full value. Where it is sharded, all processes must call this, in the same order.

    Raises:
        CheckpointError: it has none, on the meta device.
    """
    if tensor.is_meta:
        raise CheckpointError(
            "weights to save are on the meta device, where they have no values. If accelerate offloads them, bring them back first: "
            "accelerate.hooks.remove_hook_from_module(model, recurse=True)."
        )
    if hasattr(tensor, "full_tensor"):  # FSDP2
        sharded = cast("DTensor", tensor)
        where = sharded.device_mesh.device_type
        if sharded.device.type != where:  # offloaded to the CPU, for which a GPU's process group gathers nothing
            sharded = cast("DTensor", sharded.to(where))
        found: Tensor = sharded.full_tensor()
        return found
    if hasattr(tensor, "ds_id"):  # ZeRO-3
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor


@torch.no_grad()
def assign(parameter: Tensor, value: Tensor) -> None:
    """Give a parameter a full value, of which a sharded one keeps this process's part; called on all processes."""
    if hasattr(parameter, "device_mesh") and hasattr(parameter, "placements"):
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


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape of the full value."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether any of them lies in parts on several processes."""
    return any(hasattr(tensor, "full_tensor") or hasattr(tensor, "ds_id") for tensor in tensors)


class Group(NamedTuple):
    """Processes that communicate with each other, and the device on which they do; None for all processes."""

    processes: distributed.ProcessGroup | None
    device: torch.device


def shard_groups(modules: Iterable[nn.Module]) -> list[Group]:
    """The groups over which the modules' own parameters are sharded, in the same order on all processes."""
    groups: dict[int, Group] = {}
    for module in modules:
        found = [Group(module.process_group, cast("torch.device", module.compute_device))] if is_fsdp1(module) else []
        for parameter in module.parameters(recurse=False):
            mesh = getattr(parameter, "device_mesh", None)
            if mesh is not None:
                device = torch.device(mesh.device_type)
                found += [Group(mesh.get_group(dimension), device) for dimension in range(mesh.ndim)]
            elif hasattr(parameter, "ds_id"):
                found.append(Group(getattr(parameter, "ds_process_group", None), parameter.device))
        for group in found:
            groups.setdefault(id(group.processes), group)
    return list(groups.values())


def agree(numbers: Sequence[int], groups: Iterable[Group]) -> list[int]:
    """The largest of each number over the processes of all groups, which must all call this."""
    found = list(numbers)
    for group in groups:
        tensor = torch.tensor(found, device=group.device)
        distributed.all_reduce(tensor, op=distributed.ReduceOp.MAX, group=group.processes)
        found = tensor.tolist()
    return found


def average(numbers: Sequence[float], device: torch.device) -> list[float]:
    """The mean of each number over all processes, which must all call this; of a single one the numbers themselves."""
    if not is_parallel():
        return list(numbers)
    tensor = torch.tensor(numbers, dtype=torch.float32, device=device)
    distributed.all_reduce(tensor)
    found: list[float] = (tensor / distributed.get_world_size()).tolist()
    return found


def is_fsdp1(module: nn.Module) -> TypeGuard[FullyShardedDataParallel]:
    """Whether a module is FSDP's first version around another, `module.module`."""
    return any(cls.__name__ == "FullyShardedDataParallel" for cls in type(module).__mro__)


def is_parallel() -> bool:
    """Whether this is one of several processes."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def is_rank_zero() -> bool:
    """Whether this is process 0, or the only one."""
    return not is_parallel() or distributed.get_rank() == 0


def end_processes() -> None:
    """Leave the other processes at the end of a run: what uses their connection ends first, then the connection.

    Left to the interpreter's end, threads of the connection may still run when their objects are taken apart, and a
    signal ends the process after all its work is done.
    """
    if distributed.is_available() and distributed.is_initialized():
        gc.collect()  # wrapped models, trainers and loaders that only cycles keep
        distributed.destroy_process_group()
        gc.collect()


def on_rank_zero(write: Callable[[], None]) -> None:
    """Run `write` on process 0 while the others wait for it.

    Raises:
        CheckpointError: on the other processes, when process 0 failed; there its own error is raised.
    """
    failure: Exception | None = None
    if is_rank_zero():
        try:
            write()
        except Exception as error:
            failure = error
    report = of_rank_zero(None if failure is None else str(failure))
    if failure is not None:
        raise failure
    if report is not None:
        raise CheckpointError(f"process 0 could not save: {report}")


def of_all_ranks(value: T) -> list[T]:
    """The value that each process has, by rank; all must call this."""
    found = [value]
    if is_parallel():
        found *= distributed.get_world_size()
        distributed.all_gather_object(found, value)
    return found


def of_rank_zero(value: T) -> T:
    """The value that process 0 has, on all, which must all call this: what each finds by itself may differ."""
    told = [value]
    if is_parallel():
        distributed.broadcast_object_list(told, src=0)
    return told[0]


def execution_device(module: nn.Module) -> torch.device | None:
    """Where accelerate runs a module, or a part of it, whose weights it keeps elsewhere; None where it has no hand in it."""
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            device = getattr(one, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return None


def require_averages(
    parameters: Iterable[nn.Parameter], ddp: DistributedDataParallel, known: tuple[int, ...]
) -> tuple[int, ...]:
    """Refuse parameters of STA that train in each process by themselves, unless DDP was told to ignore them.

    DDP averages the gradients of those that train when it wraps the model. What accumulates a parameter's gradients lives
    as long as somebody holds it. DDP holds that of all that it averages; of the others it ends with each backward, and is
    looked for before the first forward that they take part in.

    Args:
        parameters: of STA.
        ddp: whose forward runs.
        known: what the last call gave: with the same parameters nothing is looked at.
    """
    training = [p for p in parameters if p.requires_grad]
    found = (id(ddp), *map(id, training))
    if found == known:
        return known
    ignored = {id(p) for name, p in ddp.module.named_parameters() if name in ddp.parameters_to_ignore}
    if alone := sum(id(p) not in ignored and not _is_held(p) for p in training):
        raise InjectionError(
            f"{alone} of STA's {len(training)} parameters that train were unfrozen after DistributedDataParallel had wrapped the model. It "
            "would not average their gradients, and the processes' weights would diverge: wrap the model again."
        )
    return found


def _is_held(parameter: Tensor) -> bool:
    mark = object()
    _gradient_notes(parameter)[AVERAGED] = mark
    return _gradient_notes(parameter).get(AVERAGED) is mark


def _gradient_notes(parameter: Tensor) -> dict[str, object]:
    """What was noted on what accumulates a parameter's gradients, as long as that lives."""
    return cast("dict[str, object]", get_gradient_edge(parameter).node.metadata)
