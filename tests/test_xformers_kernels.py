"""xformers as `pip install 'sta-adapter[xformers]'` brings it, on a machine without a GPU: what loads, and what it would run."""

import platform
import re
import subprocess
import sys
import types
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from sta_adapter import STAConfig
from sta_adapter.attention import ClipLayout, TemporalAttention, frame_attention, xformers_kernels

wheel = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="xformers has wheels for Linux on x86-64 alone"
)


def in_a_new_process(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@wheel
def test_it_loads_with_its_cuda_kernels_and_says_nothing():
    run = in_a_new_process(
        "from sta_adapter.attention.xformers_kernels import import_xformers\n"
        "import_xformers()\nimport xformers._cpp_lib\nprint(xformers._cpp_lib._built_with_cuda)"
    )
    assert (run.stdout.strip(), run.stderr.strip()) == ("True", ""), run


@wheel
def test_nothing_is_loaded_before_it_is_asked_for():
    run = in_a_new_process(
        "import ctypes, sys, torch\nloaded, load = [], ctypes.CDLL\n"
        "ctypes.CDLL = lambda name, *args, **named: loaded.append(name) or load(name, *args, **named)\n"
        "import sta_adapter, sta_adapter.attention.kernels\nfrom sta_adapter.attention.xformers_kernels import import_xformers\n"
        "print(loaded, 'xformers' in sys.modules)\nimport_xformers()\nprint(any('cudart' in str(x) for x in loaded))"
    )
    same = int((torch.version.cuda or "0").split(".")[0]) == xformers_kernels.built_for()[0] // 100
    assert run.stdout.splitlines() == ["[] False", str(not same)], run


@wheel
def test_xformers_imported_too_early_is_told():
    run = in_a_new_process(
        "import torch\nfrom sta_adapter.attention import xformers_kernels as x\n"
        "if int(torch.version.cuda.split('.')[0]) == x.built_for()[0] // 100: x._load_cuda_runtime = print\n"
        "import xformers.ops, xformers._cpp_lib\nxformers._cpp_lib._built_with_cuda = False\n"
        "print(x.refusal('cuda', torch.float16, 64))"
    )
    assert "was imported before sta-adapter could load libcudart.so." in run.stdout, run
    assert f"here are torch {torch.__version__}" in run.stdout


BACKBONES = {  # width and heads of the encoders of README's table
    "qwen2_vl, qwen2_5_vl, videorope": (1280, 16, 0.25),
    "qwen3_vl, video_llama_3, llava_onevision, siglip": (1152, 16, 0.25),
    "internvideo2": (1408, 16, 1.0),
    "internvideo2_5, internvl, clip, dinov2": (1024, 16, 0.25),
    "glm4v": (1536, 12, 0.25),
}


@wheel
@pytest.mark.parametrize("clips", [[(8, 6), (8, 6)], [(4, 6), (8, 6), (1, 9)]], ids=["equal", "unequal"])
@pytest.mark.parametrize("rope", [10000.0, None], ids=["rope", "no rope"])
@pytest.mark.parametrize(
    "causal", [{}, {"causal": True}, {"causal": True, "window": 3}], ids=["both ways", "causal", "window"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", list(BACKBONES.values()), ids=list(BACKBONES))
def test_kernels_forward_and_backward_for_what_the_branch_makes(shape, dtype, causal, rope, clips, monkeypatch):
    width, heads, scale = shape
    calls = []

    def record(q, k, v, *, causal, window, backend):
        as_xformers_gets_them = (x.transpose(1, 2) for x in (q, k, v))
        calls.append(xformers_kernels.kernel_names(*as_xformers_gets_them, causal=causal, window=window))
        return q

    monkeypatch.setattr(frame_attention, "attend_by_head", record)
    config = STAConfig(head_scale=scale, rope_theta=rope, **causal)
    xformers_kernels.import_xformers()
    from xformers.ops.fmha import cutlass

    for operator in (cutlass.FwOp, cutlass.BwOp):  # which look at the class of a mask
        masks = (*operator.SUPPORTED_ATTN_BIAS_TYPES, FakeTensor)
        monkeypatch.setattr(operator, "SUPPORTED_ATTN_BIAS_TYPES", masks)
    with FakeTensorMode(), mock.patch("torch.cuda.get_device_capability", return_value=(9, 0)):
        branch = TemporalAttention(
            width, max(1, round(scale * heads)), width // heads, config, device="cuda", dtype=dtype
        )
        layout = ClipLayout(clips)
        branch(torch.empty(layout.num_tokens, width, device="cuda", dtype=dtype), layout)
    assert len(calls) == len({t for t, _ in clips if t > 1})
    family = ("cutlassF", "cutlassB") if dtype == torch.float32 else ("fa", "fa")
    assert all(f.startswith(family[0]) and b.startswith(family[1]) for f, b in calls), calls


@wheel
def test_what_no_kernel_takes_is_told_in_xformers_words():
    q = torch.empty(2, 8, 1, 64)
    with pytest.raises(xformers_kernels.XformersUnusable, match="device=cpu"):
        xformers_kernels.kernel_names(q, q, q)


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """An xformers that was imported and has no kernels for CUDA."""
    package, ops, built = (types.ModuleType(f"xformers{name}") for name in ("", ".ops", "._cpp_lib"))
    package.ops, package._cpp_lib, package.__path__, built._built_with_cuda = ops, built, [str(tmp_path)], False
    for module in (package, ops):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, "xformers._cpp_lib", built)
    return built


def test_a_seam_of_xformers_that_is_gone_is_told(stand_in):
    del stand_in._built_with_cuda
    with pytest.raises(xformers_kernels.XformersUnusable, match=r"no longer tells .* pip install xformers==0\.0\.35"):
        xformers_kernels.import_xformers()


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ("{}", "was built without CUDA"),
        ("not json", "was built without CUDA"),
        ('{"version": {"cuda": null, "torch": "2.11.0+cpu"}}', "was built without CUDA"),
        ('{"version": {"cuda": 1208, "torch": "2.10.0+cu128"}}', r"built for torch 2\.10\.0\+cu128 and CUDA 12\.8"),
    ],
    ids=["empty", "broken", "for the CPU", "for CUDA 12"],
)
def test_an_xformers_without_cuda_says_what_to_install(stand_in, tmp_path, metadata, reason):
    (tmp_path / "cpp_lib.json").write_text(metadata)
    found = xformers_kernels.refusal("cuda", torch.float16, 64)
    assert re.search(reason, found), found


def test_a_runtime_that_does_not_load_says_which_package_has_it(monkeypatch, tmp_path):
    (tmp_path / "cpp_lib.json").write_text('{"version": {"cuda": 1208, "torch": "2.10.0+cu128"}}')
    monkeypatch.setattr(xformers_kernels, "_folders", lambda package: [str(tmp_path)])
    assert "pip install nvidia-cuda-runtime-cu12" in xformers_kernels._why_without_cuda(imported_before=False)


def test_xformers_that_is_not_there(monkeypatch):
    monkeypatch.delitem(sys.modules, "xformers", raising=False)
    monkeypatch.setattr(xformers_kernels.importlib.util, "find_spec", lambda name: None)
    assert "isn't installed; `pip install 'sta-adapter[xformers]'`" in xformers_kernels.refusal("cuda", torch.half, 64)
