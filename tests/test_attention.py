"""attend: every kernel against float64, and the choice of the kernel."""

import itertools
import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sta_adapter import attend
from sta_adapter.attention import kernels as attention
from sta_adapter.attention import xformers_kernels
from sta_adapter.attention.kernels import choose_kernel, xformers_refusal
from sta_adapter.attention.weights import visible_keys
from sta_adapter.errors import BackendError, ConfigError

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 5e-3}


def plain(q, k, v, causal, window=None):
    """Written out in float64, sequence by sequence and head by head."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros_like(q)
    for p, h in itertools.product(range(q.shape[0]), range(q.shape[2])):
        scores = q[p, :, h] @ k[p, :, h].T / q.shape[-1] ** 0.5
        for i, j in itertools.product(range(scores.shape[0]), range(scores.shape[1])) if causal else ():
            own = scores.shape[1] - scores.shape[0] + i  # the queries are those of the last keys
            if not own - (window or own + 1) < j <= own:
                scores[i, j] = float("-inf")
        out[p, :, h] = scores.softmax(-1) @ v[p, :, h]
    return out


def random_qkv(shape, dtype, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=generator) * scale).to(dtype) for _ in range(3)]


@settings(max_examples=40)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 12), st.integers(1, 3), st.sampled_from([1, 3, 16, 40, 80, 128])),
    dtype=st.sampled_from(list(TOLERANCE)),
    causal=st.booleans(),
    backend=st.sampled_from(["auto", "sdpa", "eager"]),
    seed=st.integers(0, 99),
)
def test_against_float64(shape, dtype, causal, backend, seed):
    q, k, v = random_qkv(shape, dtype, seed)
    expected = plain(q, k, v, causal)
    found = attend(q, k, v, causal=causal, backend=backend)
    assert found.dtype == dtype
    assert found.shape == q.shape
    assert (found - expected).abs().max() <= TOLERANCE[dtype] * max(1.0, expected.abs().max().item())


@settings(max_examples=60)
@given(
    queries=st.integers(1, 8),
    earlier=st.integers(0, 8),
    window=st.none() | st.integers(1, 20),
    dtype=st.sampled_from(list(TOLERANCE)),
    backend=st.sampled_from(["auto", "sdpa", "eager"]),
)
def test_windows_and_keys_of_earlier_frames_against_float64(queries, earlier, window, dtype, backend):
    q, k, v = random_qkv((3, queries + earlier, 2, 8), dtype)
    q = q[:, earlier:]
    expected = plain(q, k, v, True, window)
    found = attend(q, k, v, causal=True, window=window, backend=backend)
    assert found.shape == q.shape
    assert (found - expected).abs().max() <= TOLERANCE[dtype] * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_that_16_bits_do_not_hold_against_float64(dtype):
    q, k, v = random_qkv((2, 6, 2, 16), dtype, scale=100.0)
    expected = plain(q, k, v, causal=False)
    found = attend(q, k, v, backend="eager")
    assert (found - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 1, 3, 7, 8])
@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (4, 7), (1, 7)])
def test_the_mask_is_that_of_xformers(window, queries, keys, dtype, monkeypatch):
    pytest.importorskip("xformers.ops")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    q, k = torch.zeros(2, queries, 3, 8, dtype=dtype), torch.zeros(2, keys, 3, 8, dtype=dtype)
    bias = xformers_kernels.causal_bias(q, k, window)
    found = bias if isinstance(bias, torch.Tensor) else bias.materialize((2, 3, queries, keys))
    assert found.shape == (2, 3, queries, keys)
    assert torch.equal(found == 0, visible_keys(queries, keys, window, q.device).expand(found.shape))


def test_a_window_needs_causal():
    q, k, v = random_qkv((2, 3, 1, 4), torch.float32)
    with pytest.raises(ConfigError, match="window=2 with causal=False"):
        attend(q, k, v, window=2)
    with pytest.raises(ConfigError, match="window=0 with causal=True"):
        attend(q, k, v, causal=True, window=0)


@pytest.mark.parametrize("backend", ["auto", "sdpa", "eager"])
@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (True, 3)])
def test_gradients_against_float64(backend, causal, window):
    inputs = [x.requires_grad_() for x in random_qkv((5, 7, 2, 16), torch.float32)]
    references = [x.detach().double().requires_grad_() for x in inputs]
    weight = torch.linspace(-1, 1, 5 * 7 * 2 * 16).view(5, 7, 2, 16)
    (attend(*inputs, causal=causal, window=window, backend=backend) * weight).sum().backward()
    (plain(*references, causal, window) * weight).sum().backward()
    for found, expected in zip(inputs, references, strict=True):
        assert (found.grad - expected.grad).norm() <= 1e-5 * expected.grad.norm()


@pytest.mark.parametrize("backend", ["auto", "sdpa", "eager"])
def test_strided_views_and_large_scores(backend):
    qkv = torch.randn(11, 5, 3, 2, 16) * 30
    q, k, v = qkv.unbind(2)
    found = attend(q, k, v, backend=backend)
    assert torch.isfinite(found).all()
    assert torch.allclose(found.double(), plain(q, k, v, False), atol=1e-4)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_xformers_refuses_with_a_reason(device):
    choice, reason = choose_kernel(device, torch.float32, 16), f"needs CUDA tensors, these are on {device!r}"
    assert choice.backend == "sdpa"
    assert reason in choice.reason
    with pytest.raises(BackendError, match=f"(?s){reason}.*Use attention='auto'"):
        choose_kernel(device, torch.float32, 16, "xformers")


def test_xformers_refuses_dtypes_and_head_sizes_that_it_does_not_take():
    assert "not torch.float64" in xformers_refusal("cuda", torch.float64, 16)
    assert "not 20" in xformers_refusal("cuda", torch.float16, 20)
    assert "not 264" in xformers_refusal("cuda", torch.float16, 264)


@pytest.fixture
def stand_in(monkeypatch):
    """A module in xformers' place, on a machine without CUDA; the calls of its kernel are in `calls`."""
    ops = types.ModuleType("xformers.ops")
    ops.calls = []
    ops.memory_efficient_attention = lambda q, k, v: ops.calls.append((q, k, v)) or q + k + v
    built = types.ModuleType("xformers._cpp_lib")
    built._built_with_cuda = True
    package = types.ModuleType("xformers")
    package.ops, package._cpp_lib = ops, built
    for module in (package, ops, built):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(attention, "_REFUSALS", {})
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, device, dtype: zeros(*shape, device="meta", dtype=dtype))
    return ops


def test_xformers_is_tried_once_for_each_kind_of_call(stand_in):
    for _ in range(2):
        choice = choose_kernel("cuda", torch.bfloat16, 72)
        assert choice == ("xformers", "CUDA tensors that xformers takes")
    assert choose_kernel("cuda", torch.float16, 256, "xformers") == ("xformers", "asked for by name")
    found = [{(x.shape[1:], x.dtype) for x in call} for call in stand_in.calls]
    assert found == [{((8, 1, 72), torch.bfloat16)}, {((8, 1, 256), torch.float16)}]


@pytest.mark.parametrize("text", ["no kernel image\nmore", ""], ids=["lines", "no text"])
def test_xformers_that_does_not_run_is_not_taken(stand_in, monkeypatch, text):
    def fail(*args):
        raise RuntimeError(text)

    stand_in.memory_efficient_attention = fail
    told = f"its kernels don't run here (RuntimeError: {text.partition(chr(10))[0]})"
    assert xformers_refusal("cuda", torch.float32, 8) == told
    monkeypatch.setitem(sys.modules, "xformers.ops", None)  # as a broken build: importing it fails
    assert choose_kernel("cuda", torch.float32, 16).backend == "sdpa"
    with pytest.raises(BackendError, match=r"(?s)can't be imported \(ModuleNotFoundError: .*sta-adapter\[xformers\]"):
        choose_kernel("cuda", torch.float32, 16, "xformers")


@torch.inference_mode()
def test_the_trial_of_the_backward_works_where_gradients_are_off(stand_in):
    assert xformers_refusal("cuda", torch.float32, 8) is None


def test_the_reason_says_when_16_bits_are_widened():
    assert choose_kernel("cpu", torch.float32, 16).reason.endswith("on 'cpu'")
    assert "in float32, which the CPU's kernel" in choose_kernel("cpu", torch.bfloat16, 16).reason


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_results_stay_on_the_device(backend):
    q = torch.zeros(2, 3, 1, 4, device="meta")
    assert attend(q, q, q, causal=True, backend=backend).device.type == "meta"


def test_asked_for_by_name():
    assert choose_kernel("cpu", torch.float32, 1, "eager") == ("eager", "asked for by name")
    with pytest.raises(ConfigError, match="'flash': expected one of auto, xformers, sdpa, eager"):
        attend(*random_qkv((1, 2, 1, 4), torch.float32), backend="flash")


@pytest.mark.parametrize(
    "shapes", [((2, 3, 1, 4), (2, 4, 1, 4)), ((3, 1, 4), (3, 1, 4))], ids=["unequal", "three axes"]
)
def test_shapes_that_do_not_fit(shapes):
    q, k = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ConfigError, match=r"one shape .positions, frames, heads, head size.; found"):
        attend(q, k, k)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("positions", [7, 70000])
@pytest.mark.parametrize("backend", ["auto", "xformers", "sdpa"])
@pytest.mark.parametrize(
    ("causal", "window", "earlier"), [(False, None, 0), (True, None, 0), (True, 3, 0), (True, 5, 6)]
)
def test_on_cuda(dtype, positions, backend, causal, window, earlier):
    if backend == "xformers":
        pytest.importorskip("xformers")
    q, k, v = (x.cuda() for x in random_qkv((positions, 8 + earlier, 2, 80), dtype))
    q = q[:, earlier:]
    found = attend(q, k, v, causal=causal, window=window, backend=backend)[:5].cpu()
    expected = plain(q[:5].cpu(), k[:5].cpu(), v[:5].cpu(), causal, window)
    assert (found - expected).abs().max() <= max(TOLERANCE[dtype], 1e-3)
