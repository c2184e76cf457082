"""The branch on every path against float64 on random layouts, what it keeps for the backward, and which kernel it says it takes."""

import copy
import gc
import weakref

import pytest
import torch
import transformers
from cases import make_qwen2_vl_tower, randomize
from hypothesis import given, settings
from hypothesis import strategies as st

from sta_adapter import ClipLayout, STAConfig, TemporalAttention, inject_sta
from sta_adapter.attention import frame_attention
from sta_adapter.attention.block_function import Weights, weights_or_reason
from sta_adapter.attention.explain import calls_of
from sta_adapter.attention.kernels import step_back

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
layouts = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4)), min_size=1, max_size=4) | st.builds(
    lambda clip, times: [clip] * times, st.tuples(st.integers(1, 9), st.integers(1, 4)), st.integers(1, 3)
)


def branch(width=24, heads=2, head_dim=16, dtype=torch.float32, norm="layernorm", scale=1.0, **config):
    torch.manual_seed(0)
    config = STAConfig(**{"rope_theta": 10000.0, "init": "normal", **config})
    module = TemporalAttention(width, heads, head_dim, config, norm=norm)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * scale * (0.2 if parameter.dim() > 1 else 1.0))
    return module.to(dtype)


def written_out(module, tokens, clips):
    """The equations of the method, in float64, position by position."""
    qkv = module.to_qkv(module.norm(tokens))
    out = torch.zeros(len(tokens), module.num_heads, module.head_dim, dtype=torch.float64)
    start = 0
    for frames, positions in clips:
        for n in range(positions):
            rows = start + n + positions * torch.arange(frames)
            q, k, v = qkv[rows].view(frames, 3, module.num_heads, module.head_dim).unbind(1)
            q, k = (x if module.config.rope_theta is None else turned(x, module.config.rope_theta) for x in (q, k))
            scores = torch.einsum("thd,shd->hts", q, k) / module.head_dim**0.5
            if module.config.causal:
                scores = scores.masked_fill(torch.ones(frames, frames).triu(1).bool(), float("-inf"))
            out = out.index_copy(0, rows, torch.einsum("hts,shd->thd", scores.softmax(-1), v))
        start += frames * positions
    return module.to_out(out.flatten(1))


def turned(x, theta):
    frames, _, size = x.shape
    angles = torch.arange(frames)[:, None].double() * theta ** (-torch.arange(0, size, 2).double() / size)
    z = torch.complex(x[..., : size // 2], x[..., size // 2 :]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([z.real, z.imag], dim=-1)


def far(found, expected):
    """Relative distance, in the norm over all elements."""
    return ((found.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


@settings(max_examples=60)
@given(
    clips=layouts,
    dtype=st.sampled_from(list(TOLERANCE)),
    head_dim=st.sampled_from([4, 16, 40, 64, 80, 88, 128]),  # 4: less than a clip has frames
    norm=st.sampled_from(["layernorm", "rmsnorm"]),
    config=st.fixed_dictionaries({}, optional={"causal": st.just(True), "rope_theta": st.just(None)}),
    backend=st.sampled_from(["auto", "sdpa", "eager"]),
    recompute=st.booleans(),
)
def test_outputs_and_gradients_against_float64(clips, dtype, head_dim, norm, config, backend, recompute):
    module = branch(head_dim=head_dim, dtype=dtype, norm=norm, attention=backend, **config)
    module.recompute = recompute
    layout = ClipLayout(clips)
    tokens = torch.randn(layout.num_tokens, 24).to(dtype).requires_grad_()
    wide, wide_tokens = copy.deepcopy(module).double(), tokens.detach().double().requires_grad_()
    found, expected = module(tokens, layout), written_out(wide, wide_tokens, clips)
    assert found.dtype == dtype
    assert far(found, expected) <= TOLERANCE[dtype]
    with torch.no_grad():
        assert far(module(tokens, layout), expected) <= TOLERANCE[dtype]
    weight = torch.randn(expected.shape)
    (found * weight.to(dtype)).sum().backward()
    grads = [x.grad for x in (tokens, *module.parameters())]
    wanted = torch.autograd.grad((expected * weight.to(dtype)).sum(), [wide_tokens, *wide.parameters()])
    total = torch.cat([g.flatten() for g in wanted])
    assert far(torch.cat([g.flatten() for g in grads]), total) <= 2 * TOLERANCE[dtype]
    for grad, want in zip(grads, wanted, strict=True):
        assert grad.dtype == dtype
        assert (grad.double() - want).norm() <= 2 * TOLERANCE[dtype] * max(want.norm(), 0.05 * total.norm())


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("scale", [1e-3, 30.0])
def test_finite_where_the_reference_is(dtype, backend, scale):
    module = branch(dtype=dtype, scale=scale, attention=backend)
    tokens = torch.randn(24, 24).to(dtype).requires_grad_()
    wide = copy.deepcopy(module).double()
    expected = written_out(wide, tokens.detach().double(), [(6, 4)])
    assert module.to_qkv(module.norm(tokens)).abs().max() ** 2 * 16 > (65504 if scale > 1 else 0)
    found = module(tokens, ClipLayout([(6, 4)]))
    assert torch.equal(found.isfinite(), expected.to(dtype).isfinite())
    found.float().mean().backward()
    assert all(p.grad.isfinite().all() for p in (tokens, *module.parameters()))


def kept(module, tokens, layout):
    """Tensors that a forward keeps for its backward, each storage once, without the parameters."""
    found = {}
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in parameters:
            found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = module(tokens, layout)
    assert out.requires_grad
    return list(found.values())


clip_kinds = pytest.mark.parametrize(
    "clips", [[(64, 3)], [(64, 3), (64, 3)], [(64, 3), (80, 2)]], ids=["one", "equal", "unequal"]
)


@clip_kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_what_is_kept_for_the_backward(clips, dtype, norm, backend):
    module, layout = branch(width=96, dtype=dtype, norm=norm, attention=backend), ClipLayout(clips)
    tokens = torch.randn(layout.num_tokens, 96).to(dtype).requires_grad_()
    found = kept(module, tokens, layout)
    per_token = 96 + 3 * 2 * 16 + 2 * 16  # the tokens; q, k, v; what the heads give
    size = sum(t.untyped_storage().nbytes() for t in found if t.numel() >= layout.num_tokens)
    assert size == per_token * layout.num_tokens * tokens.element_size()
    assert max(t.numel() for t in found) < sum(2 * t * t * n for t, n in clips)
    module.recompute = True
    found = kept(module, tokens, layout)
    assert sum(t.untyped_storage().nbytes() for t in found) == tokens.numel() * tokens.element_size()


SETTINGS = {
    "plain": {},
    "window": {"causal": True, "window": 2},
    "published order": {"token_order": "published"},
    "gamma": {"gamma_init": 0.5, "rope_theta": None},
    "pictures pass by": {"single_frames": False, "gamma_init": 0.5},
    "causal, written out": {"causal": True, "attention": "eager"},
}


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("clips", [[(4, 3), (4, 3)], [(4, 3), (1, 2), (5, 2)]], ids=["equal", "unequal"])
@pytest.mark.parametrize("config", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_the_function_gives_what_the_layers_do(config, clips, recompute, norm):
    module, layout = branch(dtype=torch.float64, norm=norm, **config), ClipLayout(clips, prefix=1)
    module.recompute = recompute
    rows = torch.randn(1, layout.num_tokens + 1, 24, dtype=torch.float64).requires_grad_()
    weight = torch.randn(1, layout.num_tokens, 24, dtype=torch.float64)
    results = []
    for plain in (False, True):
        hook = module.to_out.register_forward_hook(lambda *_: None) if plain else None
        assert isinstance(weights_or_reason(module, rows, layout), str) == plain
        out = module(layout.patches(rows), layout)
        (out * weight).sum().backward()
        results.append([out.detach(), *(x.grad for x in (rows, *module.parameters()))])
        for tensor in (rows, *module.parameters()):
            tensor.grad = None
        if hook:
            hook.remove()
    for found, expected in zip(*results, strict=True):
        assert far(found, expected) <= 1e-12


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("trained", ["all", "to_out"])
def test_gradients_have_gradients(recompute, trained):
    module, clips = branch(dtype=torch.float64), [(3, 2), (2, 2)]
    module.recompute = recompute
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(trained == "all" or name.startswith(trained))
    tokens = torch.randn(10, 24, dtype=torch.float64).requires_grad_(trained == "all")
    inputs = [x for x in (tokens, *module.parameters()) if x.requires_grad]
    results = []
    for out in (module(tokens, ClipLayout(clips)), written_out(module, tokens, clips)):
        grads = torch.autograd.grad(out.pow(3).sum(), inputs, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in grads), inputs))
    for found, expected in zip(*results, strict=True):
        assert far(found, expected) <= 1e-9


class OtherTensor(torch.Tensor):
    """A class of tensors that might compute otherwise."""


def as_other_tensor(module):
    module.norm.weight = torch.nn.Parameter(module.norm.weight.detach().as_subclass(OtherTensor))


REFUSED = {
    "hook": (lambda m: m.norm.register_forward_hook(lambda *_: None), "hooks"),
    "backward hook": (lambda m: m.to_out.register_full_backward_hook(lambda *_: None), "hooks"),
    "own forward": (lambda m: vars(m.to_qkv).update(forward=m.to_qkv.forward), "a forward of its own"),
    "other class": (lambda m: setattr(m, "to_qkv", torch.nn.Sequential(m.to_qkv)), "another class"),
    "dtype": (lambda m: m.norm.double(), "another dtype"),
    "subclass": (as_other_tensor, "a parameter is of a class"),
}


@pytest.mark.parametrize(("change", "reason"), REFUSED.values(), ids=REFUSED)
def test_layers_that_the_function_cannot_stand_for(change, reason):
    module, layout, tokens = branch(), ClipLayout([(3, 2)]), torch.randn(6, 24)
    assert isinstance(weights_or_reason(module, tokens, layout), Weights)
    change(module)
    assert reason in weights_or_reason(module, tokens, layout)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # a trace is for tensors of one shape
def test_calls_that_the_function_cannot_stand_for():
    module, layout, tokens = branch(attention="eager"), ClipLayout([(3, 2)]), torch.randn(6, 24)
    assert "class" in weights_or_reason(module, tokens.as_subclass(OtherTensor), layout)
    assert "earlier frames" in weights_or_reason(module, tokens, ClipLayout([]))
    assert "earlier frames" in weights_or_reason(module, tokens, ClipLayout([(3, 2)], past=object()))
    hook = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert "all modules" in weights_or_reason(module, tokens, layout)
    hook.remove()
    found, tangent = torch.func.jvp(lambda x: module(x, layout), (tokens,), (tokens,))
    assert torch.allclose(found, module(tokens, layout), atol=1e-6)
    assert tangent.isfinite().all()
    module.requires_grad_(False)  # a trace takes them for constants
    traced = torch.jit.trace(lambda x: module(x, layout), (tokens,), check_trace=False)
    assert torch.allclose(traced(2 * tokens), module(2 * tokens, layout), atol=1e-6)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("causal", [False, True])
def test_forward_mode_derivatives(recompute, causal):
    """Torch's SDPA has none, on a CPU at least."""
    module = branch(dtype=torch.float64, causal=causal)
    module.recompute = recompute
    layout, tokens, way = ClipLayout([(3, 2)]), *torch.randn(2, 6, 24, dtype=torch.float64)
    found, tangent = torch.func.jvp(lambda x: module(x, layout), (tokens,), (way,))
    step = 1e-6 * way
    expected = (module(tokens + step, layout) - module(tokens - step, layout)) / 2e-6
    assert far(found, module(tokens, layout)) <= 1e-12
    assert far(tangent, expected) <= 1e-7


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_gradients_by_torch_func(recompute):
    module, layout, tokens = branch(dtype=torch.float64), ClipLayout([(3, 2)]), torch.randn(6, 24, dtype=torch.float64)
    module.recompute = recompute
    parameters = dict(module.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(module, parameters, (tokens, layout)).pow(2).sum()

    found = torch.func.grad(loss)({name: parameter.detach() for name, parameter in parameters.items()})
    expected = torch.autograd.grad(loss(parameters), list(parameters.values()))
    for name, gradient in zip(parameters, expected, strict=True):
        assert far(found[name], gradient) <= 1e-12


class Doubled(torch.nn.Module):
    def forward(self, x):
        return 2 * x


def as_attribute(layer, name):
    """A plain tensor in a parameter's place, as FSDP with `use_orig_params` puts it there for a forward."""
    value = 2 * layer._parameters.pop(name).detach()
    setattr(layer, name, value)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: torch.nn.utils.parametrize.register_parametrization(m, "gamma", Doubled()),
        lambda m: torch.nn.utils.parametrize.register_parametrization(m.to_out, "weight", Doubled()),
        lambda m: as_attribute(m, "gamma"),
        lambda m: as_attribute(m.to_qkv, "weight"),
        lambda m: as_attribute(m.norm, "bias"),
    ],
    ids=["gamma by a parametrization", "layer by a parametrization", "gamma", "weight", "bias"],
)
def test_parameters_are_those_that_the_layers_use(change):
    module, layout, tokens = branch(gamma_init=0.5), ClipLayout([(3, 2)]), torch.randn(6, 24)
    before = module(tokens, layout)
    change(module)
    found = module(tokens, layout)
    module.to_out.register_forward_hook(lambda *_: None)
    assert torch.allclose(found, module(tokens, layout), atol=1e-6)
    assert not torch.allclose(found, before, atol=1e-4)


def test_what_trains_alone_keeps_no_more_than_it_needs():
    module, layout = branch().requires_grad_(False), ClipLayout([(8, 3)])
    module.to_out.requires_grad_(True)
    (heads,) = [t for t in kept(module, torch.randn(24, 24), layout) if t.numel() >= 24]
    assert heads.shape == (24, 32)


@settings(max_examples=60)
@given(
    clips=layouts,
    part=st.sampled_from([1, 100, 1000]),
    config=st.fixed_dictionaries(
        {},
        optional={
            "causal": st.just(True),
            "window": st.sampled_from([1, 3]),
            "rope_theta": st.just(None),
            "attention": st.just("eager"),
        },
    ),
    dtype=st.sampled_from([torch.float64, torch.bfloat16]),
)
def test_parts_of_the_positions_give_what_all_of_them_give(clips, part, config, dtype):
    if "window" in config:
        config["causal"] = True
    settings = STAConfig(**{"rope_theta": 10000.0, **config})
    layout, heads = ClipLayout(clips), 2
    torch.manual_seed(0)
    qkv, grad = torch.randn(layout.num_tokens, 3 * heads * 16).to(dtype), torch.randn(layout.num_tokens, heads * 16)
    grad = grad.to(dtype)

    def both():
        with torch.no_grad():
            attention = frame_attention.FrameAttention(layout, heads, settings, qkv)
            out, rotated = attention.mix_in_place(qkv.clone(), layout)
            return (
                frame_attention.mix_frames(qkv, layout, heads, settings),
                out,
                attention.gradient(grad, rotated, layout),
            )

    whole = both()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frame_attention, "PART", part)
        parts = both()
    for found, expected in zip(parts, whole, strict=True):
        torch.testing.assert_close(found, expected)


def test_many_positions_are_computed_in_parts(monkeypatch):
    """Without gradients, as the function of a block computes; autograd gets them at once."""
    seen = []
    monkeypatch.setattr(frame_attention, "PART", 4 * 6 * 32)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    attend = frame_attention.attend_by_head
    monkeypatch.setattr(frame_attention, "attend_by_head", lambda q, *a, **k: seen.append(len(q)) or attend(q, *a, **k))
    qkv, layout = torch.randn(6 * 10, 3 * 32), ClipLayout([(6, 10)])
    with torch.no_grad():
        frame_attention.mix_frames(qkv, layout, 2, STAConfig())
    assert seen == [4, 4, 2]
    frame_attention.mix_frames(qkv, layout, 2, STAConfig())
    assert seen[3:] == [10]
    with torch.no_grad():
        plain = STAConfig(rope_theta=None, attention="eager")
        torch.func.vmap(lambda x: frame_attention.mix_frames(x, layout, 2, plain))(qkv[None])
    assert seen[4:] == [10]


def test_a_layout_is_gone_with_its_forward_and_backward():
    """Without a collector: what it keeps for the blocks must not keep it, nor its tables on a GPU."""
    module, layout = branch(), ClipLayout([(3, 2), (2, 2), (3, 2)])
    gone = weakref.ref(layout)
    gc.disable()
    try:
        module(torch.randn(layout.num_tokens, 24), layout).sum().backward()
        del layout
        assert gone() is None
    finally:
        gc.enable()


def test_one_step_back_is_taken_where_there_is_one_alone():
    x, y = torch.randn(4).requires_grad_(), torch.randn(4).requires_grad_()
    for compute in (lambda: x * y, lambda: x * (x + y), lambda: x * x, lambda: (x * 2).exp() + y, y.clone):
        output, again = compute(), compute()
        leaves = [
            leaf
            for leaf in (x, y)
            if torch.autograd.grad(output.sum(), leaf, retain_graph=True, allow_unused=True)[0] is not None
        ]
        grad = torch.randn(4)
        expected = torch.autograd.grad(output, leaves, grad, retain_graph=True)
        with torch.no_grad():
            found = step_back(output, leaves, grad)
            turned = step_back(again, leaves[::-1], grad)[::-1]
        for pair in (found, turned):
            assert all(torch.equal(a, b) for a, b in zip(pair, expected, strict=True))


def test_one_operation_needs_no_run_of_the_engine(monkeypatch):
    x, y = torch.randn(4).requires_grad_(), torch.randn(4).requires_grad_()
    one, two = x * y, x * (x + y)

    def run(*args):
        raise RuntimeError("the engine runs")

    monkeypatch.setattr(torch.autograd, "grad", run)
    with torch.no_grad():
        found = step_back(one, [x, y], torch.ones(4))
        for output, leaves in ((two, [x, y]), (one, [y, x]), (one, [x])):
            with pytest.raises(RuntimeError, match="the engine runs"):
                step_back(output, leaves, torch.ones(4))
    assert torch.equal(found[0], y)
    assert torch.equal(found[1], x)


def test_under_autocast_the_gradients_are_those_without_recomputation():
    module, layout = branch(), ClipLayout([(5, 3)])
    tokens = torch.randn(15, 24).bfloat16().requires_grad_()
    grads = []
    for plain in (False, True):
        hook = module.to_qkv.register_forward_hook(lambda *_: None) if plain else None
        with torch.autocast("cpu", torch.bfloat16):
            out = module(tokens, layout)
        assert out.dtype == torch.bfloat16
        grads.append(torch.autograd.grad(out.float().square().sum(), [tokens, *module.parameters()]))
        if hook:
            hook.remove()
    for found, expected in zip(*grads, strict=True):
        assert found.dtype == expected.dtype
        assert (found - expected).norm() <= 1e-2 * expected.norm()


@pytest.mark.parametrize("frozen", ["norm", "to_qkv", "tokens", "all but to_out"])
def test_gradients_of_a_part(frozen):
    module, layout = branch(), ClipLayout([(3, 2)])
    tokens = torch.randn(6, 24).requires_grad_(frozen == "norm")
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen) and (frozen != "all but to_out" or "to_out" in name))
    wide = copy.deepcopy(module).double()
    module(tokens, layout).square().sum().backward()
    written_out(wide, tokens.detach().double(), [(3, 2)]).square().sum().backward()
    for found, expected in zip(module.parameters(), wide.parameters(), strict=True):
        assert (found.grad is None) == (expected.grad is None)
        assert found.grad is None or far(found.grad, expected.grad) <= 1e-5


def tower_with_sta(**config):
    """A tiny Qwen2-VL tower, its handle, and a function that runs it on clips of (frames, rows, columns)."""
    torch.manual_seed(0)
    encoder = make_qwen2_vl_tower().eval()
    handle = inject_sta(encoder, STAConfig(head_scale=0.25, **config))
    for module in handle.blocks.values():
        randomize(module)
    return encoder, handle, lambda grids: encoder(**packed(grids, next(encoder.parameters()).dtype))[0]


def packed(grids, dtype=torch.float32):
    pixels = torch.randn(sum(t * h * w for t, h, w in grids), 96, generator=torch.Generator().manual_seed(0))
    return {"hidden_states": pixels.to(dtype), "grid_thw": torch.tensor(grids)}


def test_explain_names_kernel_and_reason_of_each_shape():
    encoder, handle, run = tower_with_sta()
    assert handle.explain() == []
    run([(3, 2, 4), (2, 2, 2), (3, 2, 2)])
    run([(3, 2, 4), (2, 2, 2), (3, 2, 2)])
    run([(1, 2, 2)])
    found = [(c.positions, c.frames, c.heads, c.head_dim, c.kernel) for c in handle.explain()]
    assert found == [(4, 2, 1, 8, "sdpa"), (12, 3, 1, 8, "sdpa"), (4, 1, 1, 8, "none")]
    assert handle.explain()[2].reason == "a softmax over one frame is 1"
    text = str(handle.explain()[0])
    assert text.startswith("4 positions x 2 frames, 1 heads of 8, torch.float32 on cpu: sdpa (not xformers: ")
    encoder.to(torch.bfloat16)
    run([(3, 2, 2)])
    assert "in float32, which the CPU's kernel is faster in" in handle.explain()[-1].reason


@pytest.mark.parametrize("shape", [(12, 2, 16), (3, 4, 2, 16)], ids=["packed", "by position"])
def test_calls_take_heads_and_their_size_from_the_last_dimensions(shape):
    (call,) = calls_of(ClipLayout([(4, 3)]), torch.zeros(shape), "auto")
    assert (call.positions, call.frames, call.heads, call.head_dim) == (3, 4, 2, 16)


def test_explain_follows_the_kernel_asked_for():
    _, handle, run = tower_with_sta(attention="eager")
    run([(3, 2, 2)])
    assert [(c.kernel, c.reason) for c in handle.explain()] == [("eager", "asked for by name")]


def test_recompute_of_whole_branches_changes_no_gradient():
    _, handle, run = tower_with_sta()
    handle.freeze_base()
    grads = []
    for whole in (False, True):
        handle.recompute(whole)
        assert all(module.recompute == whole for module in handle.blocks.values())
        grads.append(torch.autograd.grad(run([(3, 2, 4), (2, 2, 2)]).square().sum(), list(handle.parameters())))
    for found, expected in zip(*grads, strict=True):
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-7)


def test_one_wait_for_the_device_a_forward(monkeypatch):
    encoder, handle, _ = tower_with_sta()
    waits = {True: 0, False: 0}
    for name in ("tolist", "item", "__bool__", "__int__", "cpu"):
        original = getattr(torch.Tensor, name)

        def counted(self, *args, original=original):
            waits[handle._injection.is_enabled] += 1
            return original(self, *args)

        monkeypatch.setattr(torch.Tensor, name, counted)
    inputs = packed([(3, 2, 4), (2, 2, 2)])
    encoder(**inputs)
    with handle.disabled():
        encoder(**inputs)
    assert waits[True] == waits[False] + 1


@pytest.mark.skipif(int(transformers.__version__.split(".")[0]) < 5, reason="older towers have breaks of their own")
def test_compile_breaks_the_graph_at_most_once_and_in_no_block():
    import torch._dynamo

    encoder = make_qwen2_vl_tower().eval()
    inject_sta(encoder)
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch._dynamo.explain(encoder)(**packed([(3, 2, 2)])).break_reasons
    torch._dynamo.reset()
    ours = [r for r in found if any("sta_adapter" in str(frame) for frame in (*r.user_stack, r.reason))]
    assert len(ours) <= 1
    assert not any("NormPreHook" in str(r) or "BlockPreHook" in str(r) or "modules.py" in str(r) for r in ours)


@pytest.mark.parametrize("name", ["norm", "to_qkv"])
def test_hooks_on_parts_of_the_branch_are_called(name):
    module, called = branch(), []
    getattr(module, name).register_forward_hook(lambda *_: called.append(name))
    assert module(torch.randn(6, 24), ClipLayout([(3, 2)])).requires_grad
    assert called == [name]
