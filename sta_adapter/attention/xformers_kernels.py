"""xformers on the machine at hand: imported with the CUDA runtime that it was built for, and whether it takes a call."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import cast

import torch
from torch import Tensor

from sta_adapter.attention.weights import visible_keys

INSTALL = "pip install 'sta-adapter[xformers]'"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class XformersUnusable(Exception):
    """xformers can't be used in this process; the message says why, and what to install."""


def import_xformers() -> ModuleType:
    """`xformers.ops`, with its CUDA kernels loaded.

    The wheels of xformers 0.0.35 are linked against CUDA 12's runtime, which a torch built for CUDA 13 doesn't bring;
    imported without it, xformers refuses every call on CUDA tensors for the rest of the process. So that runtime (the
    package nvidia-cuda-runtime-cu12) is loaded first, and only here.

    Raises:
        XformersUnusable: when it is missing, broken, built for another torch, or was imported too early.
    """
    if "xformers" not in sys.modules and importlib.util.find_spec("xformers") is None:
        raise XformersUnusable(f"xformers isn't installed; `{INSTALL}`")
    imported_before = "xformers._cpp_lib" in sys.modules
    if not imported_before:
        _load_cuda_runtime()
    try:
        import xformers._cpp_lib
        import xformers.ops
    except Exception as error:  # a broken build raises OSError, AttributeError and others
        raise XformersUnusable(
            f"xformers can't be imported ({type(error).__name__}: {error}); `{INSTALL} --force-reinstall`"
        ) from error
    built = getattr(xformers._cpp_lib, "_built_with_cuda", None)
    if built is None:
        raise XformersUnusable(
            f"xformers {_version()} no longer tells whether it has CUDA kernels (_cpp_lib._built_with_cuda); tested with "
            "0.0.35: pip install xformers==0.0.35"
        )
    if not built:
        raise XformersUnusable(_why_without_cuda(imported_before))
    return cast("ModuleType", xformers.ops)


def refusal(device: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why xformers can't compute attention of such tensors, forward and backward; None when it can."""
    if device != "cuda":
        return f"its memory-efficient attention needs CUDA tensors, these are on {device!r}"
    if dtype not in DTYPES:
        return f"it takes float16, bfloat16 and float32, not {dtype}"
    if head_dim > 256 or head_dim % 8:
        return f"it takes head sizes up to 256 that 8 divides, not {head_dim}"
    try:
        ops = import_xformers()
    except XformersUnusable as error:
        return str(error)
    try:  # an import that succeeds proves little: the wheel may hold no kernel for this GPU, or none for a backward
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cuda", enabled=False):
            probe = torch.zeros(1, 8, 1, head_dim, device="cuda", dtype=dtype).requires_grad_()
            torch.autograd.grad(ops.memory_efficient_attention(probe, probe, probe).sum(), probe)
    except Exception as error:
        first_line = str(error).partition("\n")[0]  # there may be none
        return f"its kernels don't run here ({type(error).__name__}: {first_line})"
    return None


def causal_bias(q: Tensor, k: Tensor, window: int | None) -> object:
    """The mask for xformers in which queries (P, T, H, D), the last of the keys' (P, S, H, D) tokens, see `window` tokens."""
    from xformers.ops.fmha import attn_bias

    if window is None:
        same = q.shape[1] == k.shape[1]
        return attn_bias.LowerTriangularMask() if same else attn_bias.LowerTriangularFromBottomRightMask()
    if q.dtype != torch.float32 and torch.cuda.get_device_capability(q.device) >= (8, 0):
        return attn_bias.LowerTriangularFromBottomRightLocalAttentionMask(window)
    # only the flash kernels have a backward with a window; the others take numbers, rows of them aligned to 16 bytes
    visible = visible_keys(q.shape[1], k.shape[1], window, q.device)
    rows = q.new_zeros(q.shape[1], -(-k.shape[1] // 8) * 8)[:, : k.shape[1]]
    return rows.masked_fill_(~visible, float("-inf")).expand(q.shape[0], q.shape[2], -1, -1)


def kernel_names(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, window: int | None = None
) -> tuple[str, str]:
    """Names of the forward and backward kernels that xformers takes for q, k, v (P, T, H, D) on CUDA.

    A name that ends in "-pt" is a kernel of torch's own, called through xformers. Nothing is computed, so fake tensors do.

    Raises:
        XformersUnusable: when xformers can't be used, or has no kernel for these tensors.
    """
    import_xformers()
    from xformers.ops.fmha.common import Inputs
    from xformers.ops.fmha.dispatch import _dispatch_bw, _dispatch_fw

    bias = causal_bias(q, k, window) if causal else None
    inputs = Inputs(query=q, key=k, value=v, attn_bias=bias)
    try:
        return _dispatch_fw(inputs, True).NAME, _dispatch_bw(inputs, None).NAME
    except NotImplementedError as error:
        raise XformersUnusable(str(error)) from error


def _version() -> str:
    try:
        return importlib.metadata.version("xformers")
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def built_for() -> tuple[int | None, str]:
    """The CUDA release that the installed xformers was built for as 1208 for 12.8 (None: for none), and its torch."""
    for folder in _folders("xformers"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            version = json.loads((Path(folder) / "cpp_lib.json").read_text())["version"]
            return int(version["cuda"]) if version["cuda"] is not None else None, str(version["torch"])
    return None, "unknown"


def _load_cuda_runtime() -> None:
    """Loads libcudart of the CUDA release xformers was built for, where torch's own is of another."""
    cuda = built_for()[0]
    if cuda is None or not torch.version.cuda or int(torch.version.cuda.split(".")[0]) == cuda // 100:
        return
    for library in _runtime_libraries(cuda // 100):
        with contextlib.suppress(OSError):
            ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
            return


def _runtime_libraries(major: int) -> Iterator[str]:
    name = f"libcudart.so.{major}"
    for folder in _folders("nvidia"):
        for inside in ("cuda_runtime", f"cu{major}"):
            if (file := Path(folder) / inside / "lib" / name).is_file():
                yield str(file)
    yield name  # the system's own


def _folders(package: str) -> list[str]:
    """Where a package lies, without importing it."""
    if package in sys.modules:
        return list(getattr(sys.modules[package], "__path__", []))
    spec = importlib.util.find_spec(package)
    return list(spec.submodule_search_locations or []) if spec else []


def _why_without_cuda(imported_before: bool) -> str:
    cuda, built_torch = built_for()
    here = f"here are torch {torch.__version__} and CUDA {torch.version.cuda}"
    if cuda is None:
        return (
            f"xformers {_version()} was built without CUDA; {here}. `{INSTALL} --force-reinstall` takes a wheel with it"
        )
    head = f"xformers {_version()} was built for torch {built_torch} and CUDA {cuda // 100}.{cuda % 100}; {here}"
    library = f"libcudart.so.{cuda // 100}"
    if imported_before:
        return f"{head}. It was imported before sta-adapter could load {library}: import sta_adapter and inject first"
    return (
        f"{head}, and it doesn't load with them. It needs {library} (`pip install nvidia-cuda-runtime-cu{cuda // 100}`); "
        f"where that is there, an xformers built for this torch: `{INSTALL} --upgrade`"
    )
