"""Everything a user may do, in random order, against a slow and obvious reference (a hypothesis state machine)."""

import contextlib
import copy
import io
import os
import threading

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch.nn import functional
from toy import TOY, ToyEncoder, toy_pixels

from sta_adapter import STAConfig, get_sta, inject_sta, load_sta, register_backbone
from sta_adapter.errors import CheckpointError, InjectionError
from sta_adapter.injection.registry import unregister_backbone

DEPTH = 2
CLIPS = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 3)), min_size=1, max_size=3).map(tuple)
SEEDS = st.integers(0, 99)
CONFIGS = st.builds(
    STAConfig,
    head_scale=st.sampled_from([0.25, 0.5, 1.0, 2.0]),
    order=st.sampled_from(["after_spatial", "before_spatial"]),
    layers=st.sampled_from(["all", [0], [1]]),
    rope_theta=st.sampled_from([10000.0, 100.0, None]),
    gamma_init=st.sampled_from([None, 0.5]),
    init=st.sampled_from(["zero", "normal"]),
    single_frames=st.booleans(),
    causal=st.booleans(),
    attention=st.sampled_from(["auto", "sdpa", "eager"]),
)


def weight(linear):
    """A layer's weight in float64, LoRA's part added."""
    base = getattr(linear, "base_layer", linear)
    value = base.weight.double()
    for name, a in getattr(linear, "lora_A", {}).items():
        value = value + linear.scaling[name] * linear.lora_B[name].weight.double() @ a.weight.double()
    return value, base.bias.double()


def norm(x, module):
    return functional.layer_norm(x, x.shape[-1:], module.weight.double(), module.bias.double(), module.eps)


def branch(sta, config, x, clips):
    """The paper's equation, one position and one frame at a time; x is (tokens, C)."""
    qkv, heads, size = functional.linear(norm(x, sta.norm), *weight(sta.to_qkv)), sta.num_heads, sta.head_dim
    rows, start = {}, 0
    for frames, positions in clips:
        for n in range(positions):
            at = [start + t * positions + n for t in range(frames)]
            q, k, v = (qkv[at].view(frames, 3, heads, size)[:, i] for i in range(3))
            if config.rope_theta is not None:
                q, k = (torch.stack([turn(part[t], t, config.rope_theta) for t in range(frames)]) for part in (q, k))
            for t in range(frames):
                seen = t + 1 if config.causal else frames
                scores = (q[t][None] * k[:seen]).sum(-1) * size**-0.5
                out = (scores.softmax(0)[..., None] * v[:seen]).sum(0).flatten()
                row = functional.linear(out, *weight(sta.to_out))
                row = row if sta.gamma is None else row * sta.gamma.double()
                rows[at[t]] = torch.zeros_like(row) if frames == 1 and not config.single_frames else row
        start += frames * positions
    return torch.stack([rows[i] for i in range(len(rows))])


def turn(x, t, theta):
    """Half-rotation of (heads, D) by the angles of frame t."""
    half = x.shape[-1] // 2
    angle = t * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    a, b = x[:, :half], x[:, half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def reference(encoder, branches, config, pixels, clips):
    """The encoder in float64, with `branches` of STA by block index."""
    x = functional.linear(pixels.double(), *weight(encoder.embed))
    for index, block in enumerate(encoder.blocks):
        sta = branches.get(index)
        if sta is not None and config.order == "before_spatial":
            x = x + branch(sta, config, x, clips)
        x = x + functional.linear(norm(x, block.norm1), *weight(block.attn))
        if sta is not None and config.order == "after_spatial":
            x = x + branch(sta, config, x, clips)
        hidden = functional.gelu(functional.linear(norm(x, block.norm2), *weight(block.mlp[0])))
        x = x + functional.linear(hidden, *weight(block.mlp[2]))
    return x


class RandomUse(RuleBasedStateMachine):
    """One model that goes through everything; `branches` is what the reference believes to be in it."""

    @initialize(seed=SEEDS)
    def start(self, seed):
        torch.manual_seed(seed)
        self.model = self.encoder = ToyEncoder(depth=DEPTH)
        self.keys = list(self.model.state_dict())
        self.off = False

    def base_state(self):
        """The base's tensors by the names that they have without STA and LoRA."""
        plain = {
            k.replace("base_model.model.", "").replace(".base_layer", ""): v for k, v in self.model.state_dict().items()
        }
        return {key: plain[key].clone() for key in self.keys}

    @property
    def handle(self):
        return get_sta(self.model)

    @property
    def branches(self):
        return {} if self.handle is None or self.off else self.handle.blocks

    def expected(self, pixels, clips):
        config = self.handle.config if self.handle else None
        return reference(self.encoder, self.branches, config, pixels, clips)

    def adopt(self, model):
        """Go on with a copy."""
        self.model = model
        self.encoder = next(m for m in model.modules() if isinstance(m, ToyEncoder))

    @rule(config=CONFIGS, seed=SEEDS)
    def inject(self, config, seed):
        if self.handle is not None:
            with pytest.raises(InjectionError, match="already"):
                inject_sta(self.model, config)
            return
        inject_sta(self.model, config)
        self.injected_into = self.base_state()
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in self.handle.parameters():
                parameter.normal_(std=0.4)

    @rule(clips=CLIPS, seed=SEEDS)
    def run(self, clips, seed):
        pixels = toy_pixels(clips, seed)
        with torch.no_grad():
            close(self.model(pixels, clips=clips), self.expected(pixels, clips))

    @rule(clips=st.lists(CLIPS, min_size=1, max_size=2), seed=SEEDS, style=st.sampled_from([None, "call", "forward", "inside"]),
          reentrant=st.booleans(), backwards=st.booleans())  # fmt: skip
    def train(self, clips, seed, style, reentrant, backwards):
        """Forwards of one or two layouts, then their backwards in either order, then a step."""
        self.encoder.checkpoint_with(style, reentrant)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        inputs = [(toy_pixels(c, seed + i).requires_grad_(), c) for i, c in enumerate(clips)]
        leaves = [*trained, *(pixels for pixels, _ in inputs)]
        wanted = torch.autograd.grad(sum(self.expected(*i).square().mean() for i in inputs), leaves, allow_unused=True)
        losses = [self.model(pixels, clips=c).square().mean() for pixels, c in inputs]
        for loss in losses[::-1] if backwards else losses:
            loss.backward()
        self.encoder.checkpoint_with(None, False)
        for parameter, gradient in zip(leaves, wanted, strict=True):
            if gradient is not None:
                close(parameter.grad, gradient)
            elif parameter.grad is not None:
                assert not parameter.grad.any()
        with torch.no_grad():
            for parameter in trained:
                if parameter.grad is not None:
                    parameter -= 0.01 * parameter.grad.clamp(-1, 1)
                    parameter.grad = None

    @precondition(lambda self: self.handle)
    @rule(off=st.booleans())
    def switch(self, off):
        self.handle.disable() if off else self.handle.enable()
        self.off = off

    @precondition(lambda self: self.handle and not self.off)
    @rule(clips=CLIPS, seed=SEEDS)
    def switch_for_a_while(self, clips, seed):
        pixels = toy_pixels(clips, seed)
        with torch.no_grad(), self.handle.disabled():
            close(self.model(pixels, clips=clips), reference(self.encoder, {}, None, pixels, clips))
        self.run(clips, seed)

    @precondition(lambda self: self.handle)
    @rule(clips=CLIPS, seed=SEEDS)
    def fail_in_the_middle(self, clips, seed):
        def fail(module, args):
            raise ZeroDivisionError

        with self.encoder.blocks[1].mlp.register_forward_pre_hook(fail), pytest.raises(ZeroDivisionError):
            self.model(toy_pixels(clips, seed), clips=clips)
        self.run(clips, seed)

    @rule(pickled=st.booleans(), keep=st.booleans(), clips=CLIPS, seed=SEEDS)
    def copy(self, pickled, keep, clips, seed):
        """Spoil one of the two; the other one is as before."""
        if pickled:
            file = io.BytesIO()
            torch.save(self.model, file)
            file.seek(0)
            twin = torch.load(file, weights_only=False)
        else:
            twin = copy.deepcopy(self.model)
        spoilt = self.model if keep else twin
        if keep:
            self.adopt(twin)
        with torch.no_grad():
            for parameter in spoilt.parameters():
                parameter.fill_(float("nan"))
        self.run(clips, seed)

    @precondition(lambda self: self.handle and not hasattr(self.model, "peft_config"))
    @rule(rank=st.integers(1, 3), seed=SEEDS)
    def add_lora(self, rank, seed):
        from peft import get_peft_model

        torch.manual_seed(seed)
        self.adopt(get_peft_model(self.model, self.handle.lora_config(target_modules=["attn"], r=rank)))
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
        self.off = self.off and self.handle is not None

    @precondition(lambda self: self.handle)
    @rule(trainable=st.booleans())
    def save_and_load(self, trainable):
        import tempfile

        base, state = ToyEncoder(depth=DEPTH), self.base_state()
        base.load_state_dict(state)
        changed = any(not torch.equal(value, self.injected_into[key]) for key, value in state.items())
        with tempfile.TemporaryDirectory() as folder:
            if changed:  # it was trained, and the adapter doesn't hold it
                with pytest.raises(CheckpointError, match="of the base model's tensors have changed"):
                    self.handle.save_pretrained(folder)
            self.handle.save_pretrained(folder, base_changed=changed)
            handle = load_sta(base, folder, is_trainable=trainable)
        assert handle.config == self.handle.config
        self.off = False
        self.adopt(handle.model)
        self.injected_into = state

    @precondition(lambda self: self.handle and not hasattr(self.model, "peft_config"))
    @rule()
    def remove(self):
        self.handle.remove()
        self.off = False
        assert list(self.model.state_dict()) == self.keys
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in self.model.modules())

    @rule(clips=st.lists(CLIPS, min_size=2, max_size=2), seed=SEEDS)
    def run_in_two_threads(self, clips, seed):
        inputs, outputs = [(toy_pixels(c, seed), c) for c in clips], {}

        def work(index):
            pixels, c = inputs[index]
            with torch.no_grad():
                outputs[index] = [self.model(pixels, clips=c) for _ in range(3)]

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for index, (pixels, c) in enumerate(inputs):
            for output in outputs[index]:
                close(output, self.expected(pixels, c))

    @precondition(lambda self: self.handle)
    @rule(clips=CLIPS, seed=SEEDS)
    def run_compiled(self, clips, seed):
        pixels = toy_pixels(clips, seed)
        torch._dynamo.reset()
        with torch.no_grad():
            compiled = torch.compile(self.model, backend="eager")
            close(compiled(pixels, clips=clips), self.expected(pixels, clips))

    @invariant()
    def hooks_are_counted(self):
        """One STA, one set of hooks, however often the model was copied or wrapped."""
        encoder = getattr(self, "encoder", None)
        if encoder is not None and self.handle is None:
            assert not any(m._forward_pre_hooks or m._forward_hooks for m in encoder.modules())


def close(found, expected):
    scale = max(1.0, expected.abs().max().item())
    assert (found.double() - expected).abs().max().item() <= 2e-5 * scale


def test_anything_in_any_order():
    examples = int(os.environ.get("STA_TORTURE_MACHINES", 20))
    register_backbone(TOY)
    with contextlib.ExitStack() as stack:
        stack.callback(unregister_backbone, "toy")
        run_state_machine_as_test(
            RandomUse, settings=settings(max_examples=examples, stateful_step_count=12, deadline=None)
        )
