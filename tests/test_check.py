"""What injection finds out about a backbone that does not fit its model, before anything changes."""

import copy
import dataclasses
import logging
import threading
import warnings

import pytest
import torch
from cases import all_cases, case_parameters, seeded
from torch import nn

from sta_adapter import Backbone, ClipLayout, STAConfig, get_sta, inject_sta, list_backbones
from sta_adapter.backbones.frames import row_clips
from sta_adapter.errors import (
    ConfigError,
    InjectionError,
    LayoutError,
    STAWarning,
    UnknownBackboneError,
    UnknownClipsError,
)
from sta_adapter.injection import plan
from sta_adapter.injection.backbone import ClipSource
from sta_adapter.injection.target import resolve_target
from sta_adapter.injection.validate import FEW_TOKENS, validate_target

WIDTH, HEADS, PATCHES = 16, 4, 3


class Mixer(nn.Module):
    """Stands for spatial attention: mixes the tokens of a row."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.q_norm = nn.LayerNorm(WIDTH // HEADS)

    def forward(self, x):
        heads = self.q_norm(x.unflatten(-1, (HEADS, -1))).flatten(-2)
        return self.proj(heads + x.mean(-2, keepdim=True))


class Block(nn.Module):
    """Pre-norm, as STA needs it."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn, self.mlp = Mixer(), nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TupleBlock(Block):
    def forward(self, x):
        return super().forward(x), torch.zeros(1, HEADS)


class PostNormBlock(Block):
    """As in BERT."""

    def forward(self, x):
        x = self.norm1(x + self.attn(x))
        return self.norm2(x + self.mlp(x))


class SandwichBlock(Block):
    """Norms before and behind each branch, the residual stream left alone: pre-norm for STA."""

    def __init__(self):
        super().__init__()
        self.norm3 = nn.LayerNorm(WIDTH)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.norm3(self.mlp(self.norm2(x)))


class ParallelBlock(Block):
    """Attention and MLP read the same norm."""

    def forward(self, x):
        normed = self.norm2(x)
        return x + self.attn(normed) + self.mlp(normed)


class CopyBlock(Block):
    """The norm gets a copy, so that what is added in place is lost."""

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x.clone()))


class ScaledBlock(Block):
    """Halves the residual stream behind the norm."""

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        branch = self.mlp(self.norm2(x))
        return 0.5 * x + branch


class SharedNormBlock(Block):
    """One norm for both branches."""

    def forward(self, x):
        x = x + self.attn(self.norm2(x))
        return x + self.mlp(self.norm2(x))


class ForgetfulBlock(Block):
    """Has a norm that it does not use."""

    def forward(self, x):
        return x + self.mlp(x + self.attn(self.norm1(x)))


class Encoder(nn.Module):
    """Frames as rows (F, N, 4) of patches; a class token in front of each row."""

    def __init__(self, *blocks):
        super().__init__()
        self.embed = nn.Linear(4, WIDTH)
        self.cls = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.dropout = nn.Dropout(0.5)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, patches):
        x = self.embed(patches)
        x = self.dropout(torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1))
        for block in self.blocks:
            x = block(x)
            x = x[0] if isinstance(x, tuple) else x
        return x


def row_layout(call):
    patches = call.tensor("patches")
    return ClipLayout([patches.shape[:2]], prefix=1)


def dummy(encoder):
    return (torch.ones(2, PATCHES, 4, dtype=encoder.embed.weight.dtype),), {}


SPEC = Backbone(
    name="toy", encoder_classes=("Encoder",), layout=row_layout, heads=lambda encoder: HEADS, dummy_inputs=dummy
)


def spec(**changes):
    return dataclasses.replace(SPEC, **changes)


def toy(kind=Block, depth=2, dtype=torch.float32):
    return Encoder(*[kind() for _ in range(depth)]).to(dtype)


def count_hooks(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def assert_refused(model, backbone, match):
    """The error, and that the model, its mode and the random state are as before."""
    state = {k: v.clone() for k, v in model.state_dict().items()}
    modes, random = [m.training for m in model.modules()], torch.get_rng_state()
    with pytest.raises(InjectionError, match=match):
        inject_sta(model, backbone=backbone)
    assert get_sta(model) is None
    assert count_hooks(model) == 0
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert "toy" not in list_backbones()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", [Block, TupleBlock, SandwichBlock], ids=lambda kind: kind.__name__)
def test_a_pre_norm_block_passes_and_nothing_changes(kind, dtype, caplog):
    model = toy(kind, dtype=dtype).train()
    model.blocks[1].eval()
    modes, random = [m.training for m in model.modules()], torch.get_rng_state()
    caplog.set_level(logging.INFO)
    validate_target(resolve_target(SPEC, model))
    assert not [r for r in caplog.records if r.name == "sta_adapter.injection.validate"]
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert count_hooks(model) == 0
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("kind", "norm", "match"),
    [
        pytest.param(PostNormBlock, "norm2", "'norm2' of block 0 does not come out of the block", id="post-norm"),
        pytest.param(PostNormBlock, "norm1", "'norm1' of block 0 does not come out", id="post-norm, first norm"),
        pytest.param(Block, "norm1", "'norm1' of block 0 gets the block's own input", id="the norm of attention"),
        pytest.param(Block, "attn.q_norm", r"gets a tensor of the shape \(2, 4, 4, 4\)", id="a norm of heads"),
        pytest.param(SandwichBlock, "norm3", "'norm3' of block 0 does not come out", id="the norm behind the MLP"),
        pytest.param(ParallelBlock, "norm2", "gets the block's own input", id="parallel branches"),
        pytest.param(CopyBlock, "norm2", "gets a copy of the residual stream", id="a copy"),
        pytest.param(ScaledBlock, "norm2", "comes out of the block changed", id="a scaled residual"),
        pytest.param(SharedNormBlock, "norm2", "is called 2 times", id="one norm for two"),
        pytest.param(ForgetfulBlock, "norm2", "is called 0 times", id="an unused norm"),
    ],
)
def test_a_norm_that_is_not_in_front_of_the_mlp_is_refused(kind, norm, match):
    assert_refused(toy(kind), spec(norm=norm), match)


def test_the_last_block_is_looked_at_too():
    assert_refused(Encoder(Block(), Block(), PostNormBlock()), SPEC, "'norm2' of block 2 does not come out")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        pytest.param({"blocks": "layers"}, "no Backbone.blocks='layers'; its children are embed, dropout", id="blocks"),
        pytest.param({"norm": "ln"}, "blocks 0, 1: no norm 'ln' .*children there are norm1, norm2, attn", id="norm"),
        pytest.param({"norm": "mlp"}, "Backbone.norm='mlp' is a Sequential without a weight vector", id="no norm"),
        pytest.param({"heads": lambda e: 5}, "gives 5 heads, which don't divide the width 16", id="heads"),
        pytest.param({"heads": lambda e: "4"}, "gives '4' heads", id="heads of a wrong type"),
        pytest.param({"heads": lambda e: e.config.heads}, "Backbone.heads fails: AttributeError", id="heads fail"),
        pytest.param({"layout": lambda call: [(2, 3)]}, "returns a list; expected a ClipLayout", id="layout's type"),
        pytest.param(
            {"layout": lambda call: ClipLayout([(2, PATCHES)])},
            r"6 tokens and 0 class tokens a row, but the blocks get tokens of the shape \(2, 4, 16\)",
            id="layout forgets the class token",
        ),
        pytest.param({"layout": lambda call: ClipLayout([(2, 9)])}, r"18 tokens .* \(2, 4, 16\)", id="too many tokens"),
        pytest.param(
            {"layout": lambda call: ClipLayout([call.tensor("video").shape[:2]])},
            "layout fails on Backbone.dummy_inputs: LayoutError: Encoder was called without video",
            id="layout fails",
        ),
        pytest.param(
            {"dummy_inputs": lambda e: ((torch.ones(2, 3),), {})},
            "can't run on Backbone.dummy_inputs: RuntimeError",
            id="dummy inputs",
        ),
    ],
)
def test_a_spec_with_a_mistake_is_refused(changes, match):
    assert_refused(toy(), spec(**changes), match)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"encoder_classes": "Encoder"}, r"encoder_classes='Encoder': expected a tuple of class names, \('Encoder',\)"),
        ({"encoder_classes": ()}, r"encoder_classes=\(\): expected a tuple of class names"),
        ({"name": None}, "name=None: expected text"),
        ({"name": ""}, "name='': expected text"),
    ],
)
def test_a_spec_that_names_nothing_is_refused_when_it_is_made(changes, match):
    """A string is searched for each class's name within it: `Module` is in many."""
    with pytest.raises(ConfigError, match=match):
        spec(**changes)
    with pytest.raises(ConfigError, match=r"model_classes='Model': expected a tuple"):
        ClipSource(model_classes="Model", methods={})


def test_several_mistakes_are_listed_together():
    with pytest.raises(InjectionError, match=r"no norm 'ln'.*; Backbone.heads gives 0 heads"):
        inject_sta(toy(), backbone=spec(norm="ln", heads=lambda encoder: 0))


def test_a_class_that_is_not_there_names_the_nearest():
    with pytest.raises(UnknownBackboneError, match="class Encoders; the model's nearest are Encoder"):
        inject_sta(toy(), backbone=spec(encoder_classes=("Encoders",)))


def test_blocks_of_different_widths_are_refused():
    model = toy()
    model.blocks[1].norm2 = nn.LayerNorm(8)
    assert_refused(model, SPEC, r"different widths, \[8, 16\]")


class RMSNorm(nn.Module):
    """As several encoders have it, each with its own name for the small number."""

    def __init__(self, **numbers):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))
        vars(self).update(numbers)


@pytest.mark.parametrize(
    ("norm", "kind", "eps"),
    [
        (nn.LayerNorm(WIDTH, eps=1e-3), "layernorm", 1e-3),
        (RMSNorm(eps=1e-4), "rmsnorm", 1e-4),
        (RMSNorm(variance_epsilon=1e-5), "rmsnorm", 1e-5),
        (RMSNorm(epsilon=1e-7), "rmsnorm", 1e-7),
        (RMSNorm(), "rmsnorm", 1e-6),
        (nn.RMSNorm(WIDTH), "rmsnorm", 1e-6),
    ],
    ids=["layer norm", "eps", "variance_epsilon", "epsilon", "none", "torch's"],
)
def test_the_branch_gets_a_norm_of_the_encoders_kind(norm, kind, eps):
    model = toy(depth=1)
    model.blocks[0].norm2 = norm
    site = resolve_target(spec(), model)
    assert (site.norm_kind, site.norm_eps, site.width, site.heads, site.head_dim) == (kind, eps, 16, 4, 4)


def test_an_encoder_that_leaves_out_its_blocks_is_refused():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(4, WIDTH)
            self.blocks = nn.ModuleList([Block()])

        def forward(self, patches):
            return self.embed(patches)

    assert_refused(Encoder(), SPEC, "does not call the first of Backbone.blocks")


@pytest.mark.parametrize(
    ("change", "shape"),
    [
        (lambda x: x[:, None], r"\(2, 1, 4, 16\)"),
        (lambda x: x[0, 0], r"\(16,\)"),
        (lambda x: x.long(), r"\(2, 4, 16\)"),
        (lambda x: "text", "None"),
    ],
    ids=["pictures", "one token", "whole numbers", "nothing"],
)
def test_blocks_that_do_not_get_tokens_are_refused(change, shape):
    model = toy()
    model.dropout.register_forward_hook(lambda module, args, output: change(output))
    with pytest.raises(InjectionError, match=f"its blocks' first tensor has the shape {shape}; expected tokens"):
        validate_target(resolve_target(SPEC, model))


def test_blocks_that_share_their_norm_are_refused():
    """The norm would add the branch of each of them, whichever it runs in."""
    model = toy(depth=3)
    model.blocks[2].norm2 = model.blocks[0].norm2
    assert_refused(model, SPEC, "blocks share one module as 'norm2'; STA needs a norm of its own in each")


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_blocks_of_torchscript_are_refused():
    model = Encoder(torch.jit.trace(Block(), torch.zeros(2, 4, WIDTH)), Block())
    with pytest.raises(InjectionError, match=r"its blocks are compiled by torch.jit. Inject into the original model"):
        inject_sta(model, backbone=SPEC)


class PairBlock(Block):
    """Takes the tokens and something else as one argument."""

    def forward(self, pair):
        return super().forward(pair[0]), pair[1]


class PairEncoder(Encoder):
    def forward(self, patches):
        x = self.embed(patches), None
        for block in self.blocks:
            x = block(x)
        return x[0]


def test_blocks_that_take_their_tokens_within_something_are_refused():
    layout = lambda call: ClipLayout([call.tensor("patches").shape[:2]])  # noqa: E731
    match = "its blocks get their tokens within something else; expected a tensor, the first argument or by name"
    assert_refused(PairEncoder(PairBlock()), spec(layout=layout), match)


class SizedBlock(Block):
    """Must be told how many tokens there are, as blocks with windows are."""

    def forward(self, x, size):
        return super().forward(x.view(len(x), size[0], WIDTH))


class SizedEncoder(Encoder):
    def forward(self, patches):
        x = self.embed(patches)
        for block in self.blocks:
            x = block(x, (x.shape[1],))
        return x


@pytest.mark.parametrize("dummy", [lambda encoder: ((torch.ones(2, 40, 4),), {}), None], ids=["dummy", "first call"])
def test_blocks_that_are_told_the_number_of_their_tokens_get_them_all(dummy):
    changes = {"layout": lambda call: ClipLayout([call.tensor("patches").shape[:2]]), "dummy_inputs": dummy}

    def use(norm):
        model = SizedEncoder(SizedBlock(), SizedBlock())
        inject_sta(model, backbone=spec(**changes, norm=norm))
        return model(torch.randn(2, 40, 4))

    assert use("norm2").shape == (2, 40, WIDTH)
    with pytest.raises(InjectionError, match="own input"):
        use("norm1")


class TorchEncoder(nn.Module):
    """Torch's own layers, by default or not."""

    def __init__(self, batch_first):
        super().__init__()
        self.embed, self.batch_first = nn.Linear(4, WIDTH), batch_first
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, WIDTH, 0.0, batch_first=batch_first, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).layers

    def forward(self, patches):
        x = self.embed(patches)
        x = x if self.batch_first else x.transpose(0, 1)
        for block in self.blocks:
            x = block(x)
        return x if self.batch_first else x.transpose(0, 1)


@pytest.mark.parametrize("rows", [1, 2])
def test_blocks_that_take_the_batch_second_are_refused(rows):
    """As many tokens, in another order: each frame would have been taken for parts of all."""

    def layout(call):
        return row_clips(*call.tensor("patches").shape[:2], call.clip_lengths)

    told = spec(
        encoder_classes=("TorchEncoder",), layout=layout, dummy_inputs=lambda e: ((torch.ones(rows, 6, 4),), {})
    )
    assert_refused(
        TorchEncoder(batch_first=False), told, rf"shape \(6, {rows}, 16\); expected \({rows} rows, tokens, C\)"
    )
    inject_sta(TorchEncoder(batch_first=True), backbone=told)
    undummied(model := TorchEncoder(batch_first=False), encoder_classes=("TorchEncoder",), layout=layout)
    with get_sta(model).clips([2]), pytest.raises(LayoutError, match=r"expected \(2 rows, tokens, C\)"):
        model(torch.randn(2, 6, 4))


def test_a_mended_spec_of_the_same_name_is_taken():
    model = toy()
    assert_refused(model, spec(norm="norm1"), "own input")
    handle = inject_sta(model, STAConfig(init="normal"), backbone=SPEC)
    assert handle.backbone == "toy"
    assert "toy" not in list_backbones()


def test_few_tokens_of_a_large_dummy_clip_are_enough():
    model, seen = toy(), []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    validate_target(resolve_target(spec(dummy_inputs=lambda encoder: ((torch.ones(2, 40, 4),), {})), model))
    assert seen == [(2, FEW_TOKENS, WIDTH)] * 4


def undummied(model, **changes):
    return inject_sta(model, STAConfig(init="normal"), backbone=spec(dummy_inputs=None, **changes))


@pytest.mark.parametrize(
    ("kind", "changes", "match"),
    [
        (Block, {"norm": "norm1"}, "'norm1' of block 0 gets the block's own input"),
        (PostNormBlock, {}, "the block is post-norm"),
        (ForgetfulBlock, {}, "called 0 times in the block's forward"),
        (CopyBlock, {}, "the norm gets a copy of the residual"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_without_dummy_inputs_the_first_call_is_checked(kind, changes, match, training):
    """And every further one refused, until STA is taken off again."""
    model, patches = toy(kind).train(training), torch.randn(2, PATCHES, 4)
    torch.manual_seed(1)
    expected = model(patches)
    handle = undummied(model, **changes)
    before = count_hooks(model)
    for _ in range(2):
        with pytest.raises(InjectionError, match=match):
            model(patches)
    assert count_hooks(model) == before
    with handle.disabled():
        torch.manual_seed(1)
        assert torch.equal(model(patches), expected)
    handle.remove()
    torch.manual_seed(1)
    assert torch.equal(model(patches), expected)
    assert count_hooks(model) == 0


def test_a_first_call_that_is_as_declared_changes_nothing():
    """Outputs, gradients, dropout's random numbers, modes: as with dummy inputs."""
    patches, results = torch.randn(2, 40, 4), []
    for backbone in (SPEC, spec(dummy_inputs=None)):
        torch.manual_seed(2)
        model, shapes = toy().train(), []
        handle = inject_sta(model, STAConfig(init="normal"), backbone=backbone)
        model.blocks[1].eval()
        model.blocks[0].attn.register_forward_pre_hook(lambda module, args, seen=shapes: seen.append(args[0].shape[1]))
        torch.manual_seed(3)
        outputs = [model(patches), model(patches)]
        outputs[1].square().mean().backward()
        modes = [module.training for module in model.modules()]
        results.append((*outputs, *(p.grad for p in handle.parameters()), torch.tensor(modes)))
        assert shapes == ([FEW_TOKENS] * 2 if backbone.dummy_inputs is None else []) + [41, 41]
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


def test_a_call_that_fails_by_itself_says_so_and_the_next_is_checked():
    model = toy(PostNormBlock)
    undummied(model)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        model(torch.randn(2, PATCHES, 5))
    with pytest.raises(InjectionError, match="post-norm"):
        model(torch.randn(2, PATCHES, 4))


def test_another_threads_first_call_waits_for_the_verdict(monkeypatch):
    model, patches = toy(), torch.randn(2, PATCHES, 4)
    undummied(model)
    validate, checks, second = plan.validate_call, [], threading.Event()

    def checked(*given):
        checks.append(given)
        if len(checks) > 1:
            second.set()
        second.wait(0.3)  # whoever comes second comes now, unless it is kept out
        return validate(*given)

    monkeypatch.setattr(plan, "validate_call", checked)
    threads = [threading.Thread(target=model, args=(patches,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(checks) == 1


def test_a_traced_first_call_is_not_checked_and_the_next_is():
    model, patches = toy(PostNormBlock), torch.randn(2, PATCHES, 4)
    undummied(model)
    with pytest.warns(STAWarning, match="a tracer or a transform looks at its operations, so whether its norm is"):
        torch.export.export(model, (patches,), strict=False)
    with pytest.warns(STAWarning, match="unverified"):
        torch.func.vjp(model, patches)
    with pytest.raises(InjectionError, match="post-norm"):
        model(patches)


@pytest.mark.parametrize("found", [None, [(2, PATCHES)]], ids=["nothing", "a list"])
def test_a_layout_that_is_none_is_told_without_dummy_inputs_too(found):
    undummied(model := toy(), layout=lambda call: found)
    with pytest.raises(LayoutError, match=f"layout returns a {type(found).__name__}; expected a ClipLayout"):
        model(torch.randn(2, PATCHES, 4))


def test_copies_and_pickles_are_checked_too():
    model = toy(PostNormBlock)
    undummied(model)
    with pytest.raises(InjectionError, match="post-norm"):
        copy.deepcopy(model)(torch.randn(2, PATCHES, 4))


def test_a_sharded_encoder_says_that_it_is_unverified(monkeypatch):
    model, patches = toy(), torch.randn(2, PATCHES, 4)
    undummied(model)
    monkeypatch.setattr(plan, "is_sharded", lambda tensors: True)
    with pytest.warns(STAWarning, match="the encoder is sharded, so whether its norm is .* is unverified"):
        model(patches)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(patches)


def test_no_dummy_inputs_means_no_run_at_injection():
    validate_target(resolve_target(spec(dummy_inputs=None), toy(PostNormBlock)))


def test_a_dummy_of_several_rows_is_one_clip_for_a_layout_that_must_be_told():
    def told(call):
        rows, positions = call.tensor("patches").shape[:2]
        return row_clips(rows, positions, call.clip_lengths, prefix=1)

    model = toy().eval()
    handle = inject_sta(model, backbone=spec(layout=told))
    with pytest.raises(UnknownClipsError, match="the encoder's 4 rows may be frames of one clip or separate pictures"):
        model(torch.randn(4, 3, 4))
    with handle.clips([4]):
        model(torch.randn(4, 3, 4))
    model(torch.randn(1, 3, 4))


def test_the_meta_device_is_left_alone(caplog):
    caplog.set_level(logging.INFO)
    validate_target(resolve_target(SPEC, toy(PostNormBlock).to("meta")))
    assert "not checked: parameters are on the meta device" in caplog.text


def test_a_block_that_gives_nan_is_no_verdict(caplog):
    caplog.set_level(logging.INFO)
    model = toy()
    nn.init.constant_(model.blocks[0].mlp[0].bias, float("nan"))
    validate_target(resolve_target(SPEC, model))
    assert "gives NaN or infinity" in caplog.text


@pytest.mark.parametrize("case", case_parameters())
def test_built_in_backbones_are_really_checked(case, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "sta_adapter.injection.validate")
    model = seeded(case.make)
    site = resolve_target(_backbone(case), case.encoder(model))
    validate_target(site)
    assert not [r for r in caplog.records if r.name == "sta_adapter.injection.validate"]
    monkeypatch.setattr(type(site.blocks[0]), "forward", _post_norm(type(site.blocks[0]).forward))
    with pytest.raises(InjectionError, match="block 0"):
        validate_target(site)


@pytest.mark.parametrize("case", case_parameters())
def test_a_built_in_backbone_that_can_not_run_is_logged_and_goes_on(case, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "sta_adapter.injection.validate")
    model = seeded(case.make)

    def fail(*args, **kwargs):
        raise RuntimeError("no kernel for this device")

    site = resolve_target(_backbone(case), case.encoder(model))
    monkeypatch.setattr(type(site.blocks[0]), "forward", fail)
    validate_target(site)
    assert "is not checked" in caplog.text
    assert "no kernel for this device" in caplog.text


def _fails(encoder):
    raise RuntimeError("no such file")


@pytest.mark.parametrize(
    ("dummy_inputs", "told"),
    [
        (_fails, "can't run on Backbone.dummy_inputs: RuntimeError: no such file"),
        (lambda encoder: ((), {"pixel_valuez": torch.zeros(1, 3, 16, 16)}), "can't run on Backbone.dummy_inputs: "),
        (
            lambda encoder: (torch.zeros(1, 3, 16, 16), {}),
            r"returns \(Tensor, dict\); expected the encoder's arguments",
        ),
        (lambda encoder: ([torch.zeros(1, 3, 16, 16)], None), r"returns \(list, NoneType\); expected"),
    ],
)
def test_a_backbone_made_of_our_helpers_is_its_makers(dummy_inputs, told):
    """What is wrong with it is told; it was taken for one of ours, and went on unchecked."""
    from sta_adapter.injection.registry import get_backbone

    case = next(case for case in all_cases() if case.id == "dinov2")
    mine = dataclasses.replace(get_backbone("dinov2"), name="mine", dummy_inputs=dummy_inputs)
    with pytest.raises(InjectionError, match=told):
        inject_sta(seeded(case.make), backbone=mine)


def _backbone(case):
    from sta_adapter.injection.registry import get_backbone

    return get_backbone(case.backbone)


def _post_norm(forward):
    """A block that forgets what it got: its output no longer holds the residual stream."""

    def changed(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        return tuple(t * 0.5 for t in output if t is not None) if isinstance(output, tuple) else output * 0.5

    return changed
