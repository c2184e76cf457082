"""The traps of hooks in somebody else's model, each on an encoder small enough to reason about."""

import asyncio
import contextlib
import copy
import dataclasses
import io
import pickle
import threading
import warnings

import pytest
import torch
from cases import make_qwen2_vl, qwen2_vl_prompt, randomize, seeded, token_types
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint
from toy import TOY, ToyEncoder, block_with_checkpointed_forward, toy, toy_pixels  # noqa: F401

from sta_adapter import ClipLayout, STAConfig, TemporalAttention, get_sta, inject_sta
from sta_adapter.errors import InjectionError, LayoutError, STAWarning
from sta_adapter.injection.data_parallel import EncoderAgree, LanguageModelBegin
from sta_adapter.injection.hooks import Hook
from sta_adapter.injection.registry import get_backbone
from sta_adapter.injection.state import Injection

A, B = ((4, 2), (1, 3)), ((2, 5), (3, 1))
styles = pytest.mark.parametrize("style", ["call", "forward", "inside"])
reentrancy = pytest.mark.parametrize("reentrant", [True, False], ids=["re-entrant", "non-re-entrant"])
orders = pytest.mark.parametrize("order", ["after_spatial", "before_spatial"])


def injected(encoder, **config):
    handle = inject_sta(encoder, STAConfig(**config))
    for module in handle.blocks.values():
        randomize(module)
    return handle


def reference(encoder, handle, pixels, clips):
    """The equations written out: one attention a clip, position and head, no hooks."""
    with handle.disabled():
        x = encoder.embed(pixels)
        for index, block in enumerate(encoder.blocks):
            sta = handle.blocks.get(index)
            before = handle.config.order == "before_spatial"
            if sta is not None and before:
                x = x + branch(sta, x, clips)
            x = x + block.attn(block.norm1(x))
            if sta is not None and not before:
                x = x + branch(sta, x, clips)
            x = x + block.mlp(block.norm2(x))
    return x


def branch(sta, x, clips):
    out = []
    start = 0
    for frames, positions in clips:
        clip = sta.norm(x[start : start + frames * positions]).view(frames, positions, -1)
        start += frames * positions
        heads = torch.stack([one_position(sta, clip[:, n]) for n in range(positions)], dim=1)
        out.append(sta.to_out(heads).flatten(0, 1))
    return torch.cat(out) * (1 if sta.gamma is None else sta.gamma)


def one_position(sta, tokens):
    q, k, v = sta.to_qkv(tokens).view(len(tokens), 3, sta.num_heads, sta.head_dim).unbind(1)
    if sta.config.rope_theta is not None:
        q, k = rotated(q, sta.config.rope_theta), rotated(k, sta.config.rope_theta)
    out = []
    for h in range(sta.num_heads):
        scores = q[:, h] @ k[:, h].T / sta.head_dim**0.5
        if sta.config.causal:
            scores = scores + torch.full_like(scores, float("-inf")).triu(1)
        out.append(scores.softmax(-1) @ v[:, h])
    return torch.cat(out, dim=-1)


def rotated(x, theta):
    frames, _, size = x.shape
    out = torch.empty_like(x)
    for t in range(frames):
        for i in range(size // 2):
            angle = torch.tensor(t * theta ** (-2 * i / size))
            a, b = x[t, :, i], x[t, :, i + size // 2]
            out[t, :, i] = a * angle.cos() - b * angle.sin()
            out[t, :, i + size // 2] = b * angle.cos() + a * angle.sin()
    return out


@settings(max_examples=25)
@given(
    clips=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4)), min_size=1, max_size=4),
    order=st.sampled_from(["after_spatial", "before_spatial"]),
    layers=st.sampled_from(["all", (0,), (1, 2)]),
    theta=st.sampled_from([None, 50.0]),
    gamma=st.sampled_from([None, 0.5]),
    causal=st.booleans(),
    scale=st.sampled_from([0.25, 1.0]),
)
def test_outputs_and_gradients_are_those_of_the_equations(toy, clips, order, layers, theta, gamma, causal, scale):  # noqa: F811
    encoder = copy.deepcopy(toy)
    handle = injected(
        encoder, order=order, layers=layers, rope_theta=theta, gamma_init=gamma, causal=causal, head_scale=scale
    )
    pixels = toy_pixels(clips)
    expected = reference(encoder, handle, pixels, clips)
    wanted = torch.autograd.grad(expected.square().mean(), list(handle.parameters()))
    found = encoder(pixels, clips)
    grads = torch.autograd.grad(found.square().mean(), list(handle.parameters()))
    assert torch.allclose(found, expected, atol=1e-5)
    for a, b in zip(grads, wanted, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-7


def losses(encoder, batches):
    return [encoder(toy_pixels(clips), clips).square().mean() for clips in batches]


def gradients(handle, encoder, batches, how):
    for parameter in handle.parameters():
        parameter.grad = None
    found = losses(encoder, batches)
    if how == "together":
        sum(found).backward()
    else:
        for loss in found if how == "in order" else found[::-1]:
            loss.backward()
    return [p.grad.clone() for p in handle.parameters()]


@pytest.mark.parametrize("depth", [3, 12])
def test_a_forward_without_checkpoints_asks_once_a_block_and_follows_no_tensor(toy, monkeypatch, depth):  # noqa: F811
    asked, followed = [], []
    encoder = ToyEncoder(depth)
    injected(encoder)
    encoder(toy_pixels(A), A)  # a backbone without dummy inputs is checked by the first call
    layout, register = Injection.layout, torch.Tensor.register_hook
    monkeypatch.setattr(Injection, "layout", lambda self: asked.append(1) or layout(self))
    monkeypatch.setattr(torch.Tensor, "register_hook", lambda self, hook: followed.append(1) or register(self, hook))
    encoder(toy_pixels(A), A).sum().backward()
    assert len(asked) == depth + 1  # and once when the forward is over
    assert not followed
    encoder.style = ("call", False)
    encoder(toy_pixels(A), A).sum().backward()
    assert len(followed) >= depth


@styles
@reentrancy
@orders
@pytest.mark.parametrize("how", ["together", "in order", "in reverse"])
def test_checkpointing_recomputes_with_the_layout_of_its_own_forward(toy, style, reentrant, order, how):  # noqa: F811
    handle = injected(toy, order=order).freeze_base()
    expected = gradients(handle, toy, [A, B], how)
    toy.checkpoint_with(style, reentrant)
    for batches in ([A, B], [B, A]):
        for found, wanted in zip(gradients(handle, toy, batches, how), expected, strict=True):
            assert (found - wanted).norm() <= 1e-5 * wanted.norm()


@styles
@reentrancy
def test_checkpointing_when_only_a_middle_output_is_used(toy, style, reentrant):  # noqa: F811
    handle = injected(toy)
    toy.embed.requires_grad_(True)

    def middle():
        kept = []
        hook = toy.blocks[1].register_forward_pre_hook(lambda module, args: kept.append(args[0]))
        toy(toy_pixels(A), A)
        hook.remove()
        toy(toy_pixels(B), B)
        return kept[0].square().mean()

    wanted = torch.autograd.grad(middle(), list(handle.blocks[0].parameters()))
    toy.checkpoint_with(style, reentrant)
    for parameter in toy.parameters():
        parameter.grad = None
    middle().backward()
    for parameter, expected in zip(handle.blocks[0].parameters(), wanted, strict=True):
        assert (parameter.grad - expected).norm() <= 1e-5 * expected.norm()


@reentrancy
def test_the_whole_encoder_checkpointed_by_the_user(toy, reentrant):  # noqa: F811
    handle = injected(toy)
    expected = gradients(handle, toy, [A, B], "together")
    for parameter in handle.parameters():
        parameter.grad = None
    inputs = [toy_pixels(clips).requires_grad_() for clips in (A, B)]
    outputs = [checkpoint(toy, x, clips, use_reentrant=reentrant) for x, clips in zip(inputs, (A, B), strict=True)]
    sum(out.square().mean() for out in outputs).backward()
    for parameter, wanted in zip(handle.parameters(), expected, strict=True):
        assert (parameter.grad - wanted).norm() <= 1e-5 * wanted.norm()
    with pytest.raises(LayoutError, match="outside of its encoder"):
        toy.blocks[0](torch.zeros(8, 16))


@reentrancy
@pytest.mark.parametrize("off", ["in the forward", "in the backward"])
def test_a_switch_between_the_runs_of_a_checkpointed_encoder(toy, reentrant, off):  # noqa: F811
    """The gradients would be those of another forward; without re-entry torch sees to it."""
    handle = injected(toy)

    def step(forward, backward):
        with forward:
            out = checkpoint(toy, toy_pixels(A).clone().requires_grad_(), A, use_reentrant=reentrant)
        with backward:
            out.square().mean().backward()

    step(contextlib.nullcontext(), contextlib.nullcontext())
    with torch.no_grad(), handle.disabled():
        toy(toy_pixels(A), A)  # no run of a checkpoint
    step(contextlib.nullcontext(), contextlib.nullcontext())
    contexts = [handle.disabled(), contextlib.nullcontext()]
    now = "on" if off == "in the forward" else "off"
    error = InjectionError if reentrant else torch.utils.checkpoint.CheckpointError
    with pytest.raises(error, match=f"with STA switched {now}" if reentrant else "torch.utils.checkpoint: "):
        step(*(contexts if off == "in the forward" else contexts[::-1]))


@reentrancy
def test_a_checkpointed_encoder_may_be_switched_off_in_both_runs(toy, reentrant):  # noqa: F811
    handle = injected(toy)
    with handle.disabled():
        pixels = toy_pixels(A).clone().requires_grad_()
        checkpoint(toy, pixels, A, use_reentrant=reentrant).square().mean().backward()
    assert all(parameter.grad is None for parameter in handle.parameters())


class StagedEncoder(ToyEncoder):
    """Checkpoints its blocks together as a stage, and within that each one, as Swin does in transformers."""

    stage = inner = None

    def run_blocks(self, x):
        for block in self.blocks:
            x = block(x) if self.inner is None else block_with_checkpointed_forward(block, x, self.inner)
        return x

    def forward(self, pixels, clips=((4, 2),)):
        x = self.embed(pixels)
        return self.run_blocks(x) if self.stage is None else checkpoint(self.run_blocks, x, use_reentrant=self.stage)


@orders
@pytest.mark.parametrize("stage", [True, False], ids=["re-entrant stage", "stage"])
@pytest.mark.parametrize("inner", [True, False], ids=["re-entrant blocks", "blocks"])
def test_checkpoints_of_blocks_within_one_of_their_stage(toy, order, stage, inner):  # noqa: F811
    encoder = StagedEncoder()
    encoder.gradient_checkpointing = True
    handle = injected(encoder, order=order).freeze_base()
    expected = gradients(handle, encoder, [A, B], "together")
    encoder.stage, encoder.inner = stage, inner
    for found, wanted in zip(gradients(handle, encoder, [A, B], "together"), expected, strict=True):
        assert (found - wanted).norm() <= 1e-5 * wanted.norm()


@styles
def test_recomputation_in_the_state_of_its_forward_when_switched_since(toy, style):  # noqa: F811
    handle = injected(toy)
    toy.requires_grad_(True)
    base = list(toy.embed.parameters())

    def both():
        with handle.disabled():
            off = toy(toy_pixels(A), A).square().mean()
        on = toy(toy_pixels(A), A).square().mean()
        return off + 2 * on

    expected = torch.autograd.grad(both(), base)
    toy.checkpoint_with(style, True)
    for parameter in toy.parameters():
        parameter.grad = None
    both().backward()
    for parameter, wanted in zip(base, expected, strict=True):
        assert (parameter.grad - wanted).norm() <= 1e-5 * wanted.norm()


@orders
def test_a_copy_of_data_parallel_is_an_error(toy, order):  # noqa: F811
    """transformers' Trainer wraps a model in nn.DataParallel by itself; the copies share the hooks of the original."""
    injected(toy, order=order)
    with pytest.raises(InjectionError, match=r"a copy of nn\.DataParallel.*start it by torchrun"):
        toy._replicate_for_data_parallel()(toy_pixels(A), A)
    toy(toy_pixels(A), A)


class MappingEncoder(ToyEncoder):
    """Takes all its arguments in one mapping."""

    def forward(self, inputs):
        return super().forward(**inputs)


def mapping_of(call):
    return ClipLayout(call.arguments["inputs"]["clips"])


def test_re_entrant_checkpointing_of_a_frozen_encoder_that_takes_a_mapping(toy):  # noqa: F811
    encoder = MappingEncoder()
    encoder.checkpoint_with("call", True)
    spec = dataclasses.replace(TOY, encoder_classes=("MappingEncoder",), layout=mapping_of, name="mapping")
    handle = inject_sta(encoder, STAConfig(init="normal"), backbone=spec).freeze_base()
    encoder({"pixels": toy_pixels(A), "clips": A}).sum().backward()
    assert all(block.to_out.weight.grad is not None for block in handle.blocks.values())


@pytest.mark.parametrize("how", ["plain", "checkpointed", "no grad"])
def test_a_block_whose_norm_was_replaced_after_injection_is_told_of(toy, how):  # noqa: F811
    """Some of the branches alone; the others' gradients would be right."""
    injected(toy).freeze_base()
    if how == "checkpointed":
        toy.checkpoint_with("call", False)
    with torch.set_grad_enabled(how != "no grad"):
        with warnings.catch_warnings():
            warnings.simplefilter("error", STAWarning)
            toy(toy_pixels(A), A)
        toy.blocks[1].norm2 = torch.nn.LayerNorm(toy.blocks[1].norm2.normalized_shape)
        with pytest.warns(
            STAWarning, match=r"not computed in 1 of \d blocks that ran in this forward of ToyEncoder: their 'norm2'"
        ):
            toy(toy_pixels(A), A)


def test_a_later_hook_that_comes_first_may_pass_on_a_copy(toy):  # noqa: F811
    """FSDP2's hooks come first, and cast what the norm gets: the branch would be added to a copy, past the residual stream."""
    injected(toy)
    expected = toy(toy_pixels(A), A)
    for block in toy.blocks[:2]:
        block.norm2.register_forward_pre_hook(lambda norm, args: (args[0].clone(),), prepend=True)
    toy.blocks[2].norm2.register_forward_pre_hook(lambda norm, args: None)
    assert torch.equal(toy(toy_pixels(A), A), expected)
    toy.blocks[0] = nn.Identity()
    assert toy(toy_pixels(A), A).isfinite().all()


def test_an_encoder_that_its_model_runs_without_gradients_is_told_of(monkeypatch):
    """As LLaVA's towers do, which were written for frozen encoders: the rest would train, and STA stay as it is."""
    model = seeded(make_qwen2_vl).train()
    handle = inject_sta(model, STAConfig(init="normal"))
    inputs = qwen2_vl_prompt(3)
    monkeypatch.setattr(handle.encoder, "forward", torch.no_grad()(handle.encoder.forward))
    assert model(**inputs).logits.requires_grad  # within the encoder's call: the next test's
    monkeypatch.undo()
    call = torch.no_grad()(nn.Module.__call__)
    monkeypatch.setattr(type(handle.encoder), "__call__", call, raising=False)
    with pytest.warns(
        STAWarning, match=r"no gradient from this forward.* within torch\.no_grad\(\).*requires_grad_\(False\)"
    ):
        model(**inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error", STAWarning)
        with torch.no_grad():
            model(**inputs)
        model.eval()(**inputs)
        with handle.disabled():
            model.train()(**inputs)
        for parameter in handle.parameters():
            parameter.requires_grad_(False)
        model(**inputs)


@styles
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
def test_a_forward_from_which_sta_gets_no_gradient_says_so(toy, style):  # noqa: F811
    """Re-entrant checkpoints of which no flag tells; the loss may have a gradient by other ways."""
    handle = injected(toy).freeze_base()
    toy.checkpoint_with(style, True)
    toy.gradient_checkpointing = False
    with pytest.warns(STAWarning, match=r"STA gets no gradient from this forward of ToyEncoder.*use_reentrant=False"):
        assert not toy(toy_pixels(A), A).requires_grad
    with warnings.catch_warnings():
        warnings.simplefilter("error", STAWarning)
        toy(toy_pixels(A).requires_grad_(), A)
        toy.eval()(toy_pixels(A), A)
        toy.train().requires_grad_(False)(toy_pixels(A), A)
        handle.freeze_base()
        with torch.no_grad():
            toy(toy_pixels(A), A)


class DirectEncoder(ToyEncoder):
    """Calls its blocks' `forward`, past all hooks on the blocks."""

    def forward(self, pixels, clips=((4, 2),)):
        x = self.embed(pixels)
        for block in self.blocks:
            x = block.forward(x)
        return x


def test_a_forward_without_sta_says_so(toy):  # noqa: F811
    """It would train nothing, silently. Hooks on the norms don't depend on the blocks' call."""
    handle = injected(DirectEncoder(), order="before_spatial")
    with pytest.warns(
        STAWarning, match="STA was not computed in this forward of DirectEncoder: it called none of its blocks"
    ):
        handle.model(toy_pixels(A), A)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with handle.disabled():
            handle.model(toy_pixels(A), A)
        injected(DirectEncoder()).freeze_base().model(toy_pixels(A), A)


@orders
def test_a_block_outside_of_its_encoder_is_an_error(toy, order):  # noqa: F811
    handle = injected(toy, order=order)
    tokens = torch.zeros(8, 16)
    with pytest.raises(LayoutError, match="outside of its encoder's forward"):
        toy.blocks[0](tokens)
    toy(toy_pixels(A), A).square().mean().backward()
    with pytest.raises(LayoutError, match="outside of its encoder's forward"):
        toy.blocks[0](tokens)
    with handle.disabled():
        toy.blocks[0](tokens)


def test_an_exception_in_mid_forward_leaves_nothing_behind(toy):  # noqa: F811
    handle = injected(toy)
    expected = toy(toy_pixels(A), A)
    failing = toy.blocks[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        toy(toy_pixels(B), B)
    failing.remove()
    with pytest.raises(LayoutError, match="outside of its encoder's forward"):
        toy.blocks[0](torch.zeros(8, 16))
    assert torch.equal(toy(toy_pixels(A), A), expected)
    with pytest.raises(LayoutError, match="have 11 tokens"):
        toy(toy_pixels(A)[1:], A)
    assert torch.equal(toy(toy_pixels(A), A), expected)
    handle.remove()


def test_threads_do_not_see_each_others_layout(toy):  # noqa: F811
    handle = injected(toy)
    with torch.no_grad():
        expected = {clips: toy(toy_pixels(clips), clips) for clips in (A, B)}
        with handle.disabled():
            base = toy(toy_pixels(A), A)
    wrong = []
    start = threading.Barrier(3)

    def work(clips, off):
        with torch.no_grad():
            start.wait()
            for _ in range(150):
                if off:
                    with handle.disabled():
                        wrong.append(not torch.equal(toy(toy_pixels(clips), clips), base))
                else:
                    wrong.append(not torch.equal(toy(toy_pixels(clips), clips), expected[clips]))

    threads = [threading.Thread(target=work, args=a) for a in ((A, False), (B, False), (A, True))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 450
    assert not any(wrong)


class Wrapped(nn.Module):
    """What PEFT's LN tuning and `modules_to_save` do: a wrapper that runs a deep copy of the module."""

    def __init__(self, module):
        super().__init__()
        self.original_module = module
        self.modules_to_save = nn.ModuleDict({"default": copy.deepcopy(module)})
        self.active_adapter = "default"

    def forward(self, *args):
        return self.modules_to_save["default"](*args)


def test_a_copied_norm_serves_the_same_block_and_drags_no_tower_along(toy):  # noqa: F811
    handle = injected(toy)
    expected = toy(toy_pixels(A), A)
    block = toy.blocks[1]
    block.norm2 = Wrapped(block.norm2)
    assert sum(p.numel() for p in block.norm2.parameters()) == 4 * 16
    (hook,) = [h for h in block.norm2.modules_to_save["default"]._forward_pre_hooks.values() if isinstance(h, Hook)]
    assert hook.block is block
    assert torch.equal(toy(toy_pixels(A), A), expected)
    randomize(handle.blocks[1], seed=9)
    assert not torch.equal(toy(toy_pixels(A), A), expected)
    handle.remove()
    assert not [h for m in toy.modules() for h in m._forward_pre_hooks.values()]


def test_a_copied_sta_module_takes_over(toy):  # noqa: F811
    handle = injected(toy)
    block = toy.blocks[0]
    block.sta = Wrapped(block.sta)
    trained = block.sta.modules_to_save["default"]
    assert handle.blocks[0] is trained
    assert sum(isinstance(m, TemporalAttention) for m in block.sta.modules()) == 2
    toy(toy_pixels(A), A).square().mean().backward()
    assert all(p.grad is not None for p in trained.parameters())
    assert all(p.grad is None for p in block.sta.original_module.parameters())
    handle.remove()
    assert not any(isinstance(m, TemporalAttention) for m in toy.modules())
    assert not hasattr(block, "sta")


def test_a_copied_block_never_runs_with_a_foreign_layout(toy):  # noqa: F811
    injected(toy)
    twin = copy.deepcopy(toy.blocks[0])

    def run_twin(module, args):
        with pytest.raises(LayoutError, match="outside of its encoder"):
            twin(args[0])
        reached.append(True)

    reached = []
    hook = toy.blocks[1].register_forward_pre_hook(run_twin)
    toy(toy_pixels(A), A)
    hook.remove()
    assert reached


def parameters_within(thing):
    """How many numbers a pickle of it holds as tensors."""
    found = []

    class Pickler(pickle.Pickler):
        def reducer_override(self, part):
            if isinstance(part, torch.Tensor):
                found.append(part.numel())
                return str, ()
            return NotImplemented

    Pickler(io.BytesIO()).dump(thing)
    return sum(found)


def test_a_copied_encoder_drags_no_language_model_along():
    model = seeded(make_qwen2_vl)
    expected = parameters_within(encoder := get_backbone("qwen2_vl").find_encoder(model))
    handle = inject_sta(model)
    expected += handle.num_parameters()
    expected += sum(sample.numel() for _, sample in handle._injection.base_marks.values())
    assert parameters_within(encoder) == expected
    assert parameters_within(copy.deepcopy(encoder)) == expected
    whole = get_sta(copy.deepcopy(model))
    (begin,) = (
        hook
        for module in whole.model.modules()
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, LanguageModelBegin)
    )
    (agree,) = (hook for hook in whole.encoder._forward_pre_hooks.values() if isinstance(hook, EncoderAgree))
    assert begin.agreement.encoder is whole.encoder
    assert any(module is begin.agreement.language_model for module in whole.model.modules())
    assert agree.groups is begin.agreement.groups


def test_a_copied_encoder_keeps_its_own_layout(toy):  # noqa: F811
    handle = injected(toy)
    twin = copy.deepcopy(toy)
    expected = toy(toy_pixels(A), A)
    handle.remove()
    assert torch.equal(twin(toy_pixels(A), A), expected)
    assert get_sta(twin).blocks.keys() == {0, 1, 2}


@orders
def test_the_encoders_input_is_never_changed(toy, order):  # noqa: F811
    injected(toy, order=order)
    toy.embed = nn.Identity()
    tokens = torch.randn(11, 16)
    before = tokens.clone()
    with torch.no_grad():
        toy(tokens, A)
    assert torch.equal(tokens, before)


@pytest.mark.parametrize("trainable", [True, False])
def test_no_copy_is_kept_when_nothing_needs_a_gradient(toy, trainable):  # noqa: F811
    handle = injected(toy)
    toy.requires_grad_(False)
    for parameter in handle.parameters():
        parameter.requires_grad_(trainable)
    assert toy(toy_pixels(A), A).requires_grad == trainable


def test_compile_finds_no_graph_break_in_a_block(toy):  # noqa: F811
    import torch._dynamo

    def breaks(**arguments):
        torch._dynamo.reset()
        found = torch._dynamo.explain(toy)(**arguments).graph_break_count
        torch._dynamo.reset()
        return found

    arguments = {"pixels": toy_pixels(A), "clips": A}
    before = breaks(**arguments)
    injected(toy)
    assert before == 0
    assert breaks(**arguments) <= 1


def test_compiled_output_and_gradients(toy):  # noqa: F811
    handle = injected(toy)
    expected = toy(toy_pixels(A), A)
    wanted = torch.autograd.grad(expected.square().mean(), list(handle.parameters()))
    torch._dynamo.reset()
    found = torch.compile(toy, backend="aot_eager")(toy_pixels(A), A)
    grads = torch.autograd.grad(found.square().mean(), list(handle.parameters()))
    assert torch.allclose(found, expected, atol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(grads, wanted, strict=True))
    torch._dynamo.reset()


def test_a_with_block_holds_in_its_task_alone(toy):  # noqa: F811
    """Coroutines of one thread take turns within their blocks; what asyncio runs in another thread belongs to its task."""
    handle = injected(toy)
    with torch.no_grad():
        on = toy(toy_pixels(A), A)
        with handle.disabled():
            off = toy(toy_pixels(A), A)
    injection = handle._injection

    async def work(lengths, disabled):
        with handle.clips(lengths), handle.disabled() if disabled else contextlib.nullcontext():
            for _ in range(3):
                await asyncio.sleep(0)
                assert injection.clip_lengths == lengths
                with torch.no_grad():
                    assert torch.equal(toy(toy_pixels(A), A), off if disabled else on)
            assert await asyncio.to_thread(lambda: injection.clip_lengths) == lengths
        assert injection.clip_lengths is None

    async def both():
        await asyncio.gather(work((4,), True), work((2, 2), False))

    asyncio.run(both())
    assert injection.clip_lengths is None


def test_blocks_may_end_in_another_order_than_they_began(toy):  # noqa: F811
    handle = injected(toy)
    injection = handle._injection
    disabled, clips = handle.disabled(), handle.clips((4,))
    with disabled:
        clips.__enter__()
    assert injection.is_enabled
    assert injection.clip_lengths == (4,)
    clips.__exit__(None, None, None)
    assert injection.clip_lengths is None


def test_a_batch_of_text_alone_has_a_backward_in_stage_one():
    """Text among clips is usual. In several processes it trained; in one its loss depended on nothing that trains, and torch's error ended the run."""
    model = seeded(make_qwen2_vl).train()
    ids = torch.tensor([[5, 6, 7, 8]])
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        **token_types([5, 6, 7, 8], video=151, image=150),
    }
    base = model(**batch).logits
    handle = inject_sta(model, STAConfig(init="normal")).freeze_base()
    found = model(**batch, labels=ids)
    assert torch.equal(found.logits, base)
    found.loss.backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in handle.parameters())
    model.zero_grad()
    with handle.disabled():
        assert not model(**batch).logits.requires_grad
    model.lm_head.requires_grad_(True)
    model(**batch, labels=ids).loss.backward()
    assert all(p.grad is None for p in handle.parameters())  # where others train, all is as it was


@pytest.mark.parametrize("part", ["model", "language model"])
def test_a_batch_of_text_alone_has_a_backward_where_it_is_compiled(part):
    """torch's error ended the run, as hooks that count the encoder's runs were passed by."""
    torch._dynamo.reset()
    model = seeded(make_qwen2_vl).train()
    handle = inject_sta(model, STAConfig(init="normal")).freeze_base()
    decoder, ids = model.get_decoder(), torch.tensor([[5, 6, 7, 8]])
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **token_types([5, 6, 7, 8], video=151, image=150)}
    clip = qwen2_vl_prompt(3)
    if part == "model":
        model.compile(backend="aot_eager")
    else:
        decoder.compile(backend="aot_eager")
    for batch, moves in ((text, False), (clip, True), (text, False)):
        model.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        assert all(bool(p.grad.any()) is moves for p in handle.parameters() if p.dim() == 2)
    assert not handle._injection.thread.model_with_grad
    torch._dynamo.reset()


def test_a_language_model_that_trains_is_compiled_in_one_graph():
    torch._dynamo.reset()
    model = seeded(make_qwen2_vl).train()
    handle = inject_sta(model, STAConfig(init="normal"))
    decoder = model.get_decoder()
    compiled = torch.compile(decoder, backend="aot_eager", fullgraph=True)
    compiled(inputs_embeds=torch.zeros(1, 4, decoder.embed_tokens.embedding_dim), use_cache=False)[0].sum().backward()
    handle.freeze_base()
    given = torch.zeros(1, 4, decoder.embed_tokens.embedding_dim, requires_grad=True)  # a clip's, in stage one
    compiled(inputs_embeds=given, use_cache=False)[0].sum().backward()
    assert given.grad is not None
    torch._dynamo.reset()
