"""Seams: what STA leans on in other packages though no documentation promises it. Each is named here, and looked at when used.

An unknown shape is a `CompatibilityError` with the version found, those tested and what to install; never a default
that goes on. `sta_adapter.cli.seam_report` looks at all of them at once, for `sta-adapter env`.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import FrameType, ModuleType
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import Tensor, nn

from sta_adapter.compatibility.calls import parameter_names
from sta_adapter.compatibility.releases import incompatible

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper
    from torch.nn.parallel import DistributedDataParallel

HOOK_TABLES = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
DDP_ATTRIBUTES = ("find_unused_parameters", "process_group", "device", "static_graph", "parameters_to_ignore")
ADAPTER_FLAG = "_hf_peft_config_loaded"
LOAD_HOOKS = "_load_state_dict_pre_hooks"
HOOK_OPTIONS = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")

Function = TypeVar("Function", bound=Callable[..., object])


def graph_task() -> int:
    """The number of the backward pass that runs in this thread; -1 outside of one."""
    function: Callable[[], int] | None = getattr(torch._C, "_current_graph_task_id", None)
    if function is None:
        raise incompatible(
            "torch", "torch._C has no _current_graph_task_id, so a recomputation can't be told from a forward"
        )
    return function()


def active_ddp() -> DistributedDataParallel | None:
    """The DistributedDataParallel whose forward runs; None outside of one."""
    from torch.nn.parallel import DistributedDataParallel

    function = getattr(DistributedDataParallel, "_get_active_ddp_module", None)
    if function is None:
        raise incompatible("torch", "DistributedDataParallel has no _get_active_ddp_module")
    ddp: DistributedDataParallel | None = function()
    missing = [name for name in DDP_ATTRIBUTES if ddp is not None and not hasattr(ddp, name)]
    if missing:
        raise incompatible("torch", f"{type(ddp).__name__} has no {' and no '.join(missing)}")
    return ddp


def disable_dynamo() -> Callable[[Function], Function]:
    """`torch.compiler.disable`, as a decorator that doesn't import torch's compiler (seconds) before the first call."""
    compiler = importlib.import_module("torch._compile")
    function: Callable[[Function], Function] | None = getattr(compiler, "_disable_dynamo", None)
    if function is None:
        raise incompatible("torch", "torch._compile has no _disable_dynamo")
    return function


uncompiled = disable_dynamo()


def uncompiled_where(needed: Callable[..., bool]) -> Callable[[Function], Function]:
    """`uncompiled` for a hook, which a compiler passes by where it has nothing to do: it would break the graph.

    Args:
        needed: of the hook's arguments, whether it has; traced by the compiler.
    """

    def decorate(hook: Function) -> Function:
        outside = uncompiled(hook)

        @functools.wraps(hook)
        def call(*args: object) -> object:
            return None if torch.compiler.is_compiling() and not needed(*args) else outside(*args)

        return cast(Function, call)

    return decorate


def has_adapter(model: nn.Module) -> bool:
    """Whether transformers' trainer takes a quantised model for one with an adapter: `ADAPTER_FLAG` says so."""
    found = getattr(model, ADAPTER_FLAG, None)
    if not isinstance(found, bool):
        raise incompatible(
            "transformers", f"{type(model).__name__} has no {ADAPTER_FLAG}, by which the trainer knows adapters"
        )
    return found


def hook_table(module: nn.Module, name: str) -> dict[int, object]:
    """A module's hooks by their numbers; `name` is one of `HOOK_TABLES` or `HOOK_OPTIONS`."""
    table = getattr(module, name, None)
    if not isinstance(table, dict):
        raise incompatible("torch", f"{type(module).__name__}.{name} is a {type(table).__name__}, expected a dict")
    return table


def add_load_hook(module: nn.Module, hook: Callable[..., None]) -> None:
    """Call `hook(module, state_dict, prefix, ...)` before `load_state_dict` gives the module its tensors."""
    for name, options in (
        ("register_load_state_dict_pre_hook", {}),  # since torch 2.5
        ("_register_load_state_dict_pre_hook", {"with_module": True}),
    ):
        register = getattr(module, name, None)
        if register is not None:
            register(hook, **options)
            return
    raise incompatible("torch", f"{type(module).__name__} has no register_load_state_dict_pre_hook")


def put_first(module: nn.Module, chosen: Callable[[object], bool]) -> None:
    """Let those of a module's forward pre-hooks that are chosen run before the others."""
    hooks = cast("OrderedDict[int, object]", hook_table(module, "_forward_pre_hooks"))
    for key in [key for key, hook in hooks.items() if chosen(hook)]:
        hooks.move_to_end(key, last=False)


def drop_hooks(module: nn.Module, chosen: Callable[[object], bool]) -> None:
    """Take the hooks around forwards, and those of `add_load_hook`, off a module that are chosen."""
    for name in ("_forward_pre_hooks", "_forward_hooks", LOAD_HOOKS):
        table = hook_table(module, name)
        for key in [key for key, hook in table.items() if chosen(getattr(hook, "hook", hook))]:
            del table[key]
            for options in HOOK_OPTIONS:
                if options.startswith(name):
                    hook_table(module, options).pop(key, None)


def is_hooked(module: nn.Module) -> bool:
    """Whether a module has hooks of any kind, which see what goes in and out of it."""
    try:
        return bool(
            module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        )
    except AttributeError as error:
        raise incompatible("torch", f"the hooks of {type(module).__name__} can't be found ({error})") from error


def calls_are_watched() -> bool:
    """Whether hooks on the calls of all modules are at work, as profilers set them."""
    module = nn.modules.module
    try:
        return bool(
            module._global_forward_hooks
            or module._global_forward_pre_hooks
            or module._global_backward_hooks
            or module._global_backward_pre_hooks
        )
    except AttributeError as error:
        raise incompatible("torch", f"the hooks on the calls of all modules can't be found ({error})") from error


def is_running(module: nn.Module | None) -> bool:
    """Whether a call of a module, which runs its hooks, is at work in this thread.

    No hook hears of a call's end by an interrupt, or by an error where it is compiled. Frames are looked at and none is
    kept, as that would keep all tensors of a call that has ended.
    """
    frame: FrameType | None = None if module is None else sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == nn.modules.module.__name__ and frame.f_locals.get("self") is module:
            return True
        frame = frame.f_back
    return False


def operations_are_watched() -> bool:
    """Whether a tracer, a transform of torch.func or forward-mode derivatives are at work on torch's operations."""
    try:
        return bool(torch._C._is_tracing() or torch._C._are_functorch_transforms_active() or has_forward_derivatives())
    except AttributeError as error:
        raise incompatible("torch", f"it no longer tells who looks at its operations ({error})") from error


def outputs_are_kept() -> bool:
    """Whether a selective activation checkpoint is at work, which keeps what operators give, and takes no change of it in place."""
    try:
        modes = [torch._C._get_dispatch_stack_at(i) for i in range(torch._C._len_torch_dispatch_stack())]
    except AttributeError as error:
        raise incompatible("torch", f"it no longer tells who looks at its operations ({error})") from error
    return any(type(mode).__module__ == "torch.utils.checkpoint" for mode in modes)


def has_forward_derivatives() -> bool:
    """Whether forward-mode derivatives are at work."""
    return torch.autograd.forward_ad._current_level >= 0


def softmax_gradient(grad: Tensor, weights: Tensor) -> Tensor:
    """The gradient in front of a softmax over the last axis, from that behind it and what it gave: one operator, where autograd has one."""
    try:
        return torch._softmax_backward_data(grad, weights, -1, weights.dtype)
    except AttributeError as error:
        raise incompatible("torch", "it has no _softmax_backward_data") from error


def peft_parts() -> tuple[type[BaseTunerLayer], type[ModulesToSaveWrapper]]:
    """PEFT's classes of a layer that an adapter wraps, and of a module that is trained as a copy."""
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import ModulesToSaveWrapper
    except ImportError as error:
        raise incompatible("peft", f"its classes can't be imported ({error})") from error
    if not hasattr(BaseTunerLayer, "get_base_layer"):
        raise incompatible("peft", "BaseTunerLayer has no get_base_layer")
    return BaseTunerLayer, ModulesToSaveWrapper


def peft_targets(config: LoraConfig, names: Iterable[str]) -> set[str]:
    """Those of a model's modules to which the installed PEFT gives LoRA."""
    try:
        from peft.tuners.tuners_utils import check_target_module_exists
    except ImportError as error:
        raise incompatible("peft", f"its rule for target_modules can't be imported ({error})") from error
    return {name for name in names if check_target_module_exists(config, name)}


def experts_are_out_in(module: nn.Module) -> bool:
    """Whether PEFT takes a module's stacked weights of three axes for (experts, out, in), else for (experts, in, out).

    It does since 0.19, but where the module says that it `is_transposed`.
    """
    from peft.tuners.lora import layer

    wrapper = getattr(layer, "ParamWrapper", None)
    if wrapper is None:
        raise incompatible("peft", "its LoRA has no ParamWrapper, which target_parameters needs (PEFT 0.17)")
    return hasattr(wrapper, "_get_in_out_features") and not getattr(module, "is_transposed", False)


def peft_hook() -> Callable[..., None]:
    """PEFT's own hook that runs on a model just before LoRA is put into it."""
    from peft import LoraModel

    hook: Callable[..., None] | None = getattr(LoraModel, "_pre_injection_hook", None)
    if hook is None:
        raise incompatible("peft", "LoraModel has no _pre_injection_hook")
    names = parameter_names(hook, "LoraModel._pre_injection_hook", "peft")
    if names != ("self", "model", "config", "adapter_name"):
        raise incompatible("peft", f"LoraModel._pre_injection_hook takes {', '.join(names)}")
    return hook


class _Watcher(MetaPathFinder):
    """Finds one package or module as the other finders do, and calls a function when it has run."""

    def __init__(self, name: str, call: Callable[[], None]) -> None:
        self.name = name
        self.call = call

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The package's spec; asked for also where nobody goes on to import it."""
        if fullname != self.name:
            return None
        others = (finder for finder in list(sys.meta_path) if finder is not self and hasattr(finder, "find_spec"))
        spec = next((found for finder in others if (found := finder.find_spec(fullname, path, target))), None)
        if spec is None or spec.loader is None or not hasattr(spec.loader, "__dict__"):
            return spec
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            self.call()

        vars(spec.loader)["exec_module"] = exec_module
        return spec


def after_import(name: str, call: Callable[[], None]) -> None:
    """Call a function once a package or module has been imported, which takes seconds or is not there; asking twice is asking once."""
    if all(not isinstance(finder, _Watcher) or finder.name != name for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher(name, call))
