"""What every backbone keeps, over all cases in cases.py."""

import contextlib
import copy
import dataclasses
import functools
import io
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import Clip, case_parameters, clips_of, randomize, seeded
from qwen2_vl_prompts import transformers_version
from safetensors.torch import load_file
from torch.utils import checkpoint as checkpoints
from torch.utils.checkpoint import checkpoint

from sta_adapter import STAConfig, get_sta, inject_sta, load_sta
from sta_adapter.errors import InjectionError
from sta_adapter.injection.hooks import Hook
from sta_adapter.injection.registry import get_backbone

every_case = pytest.mark.parametrize("case", case_parameters())
every_order = pytest.mark.parametrize("order", ["after_spatial", "before_spatial"])


def injected(case, seed=0, **config):
    """A model with random weights everywhere, STA's too, and its handle."""
    model = seeded(case.make)
    handle = inject_sta(model, STAConfig(**config))
    for module in handle.blocks.values():
        randomize(module, seed)
    return model, handle


def count_hooks(model):
    """Hooks of any kind on all modules, and STA's among them."""
    hooks = [h for m in model.modules() for d in (m._forward_pre_hooks, m._forward_hooks) for h in d.values()]
    return len(hooks), sum(isinstance(h, Hook) for h in hooks)


def equal(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def close(found, expected, tolerance=1e-5):
    return all(
        torch.allclose(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())
        for a, b in zip(found, expected, strict=True)
    )


def loss_of(features):
    """A number that depends on every feature; their squares would not, behind a norm that gives all one length."""
    generator = torch.Generator().manual_seed(0)
    return sum((f.float() * torch.randn(f.shape, generator=generator)).mean() for f in features)


@every_case
@every_order
def test_a_fresh_injection_changes_nothing(case, order):
    model = seeded(case.make)
    batches = [clips_of(*lengths) for lengths in case.lengths]
    before = [case.run(model, clips) for clips in batches]
    handle = inject_sta(model, STAConfig(order=order))
    assert handle.backbone == case.backbone
    assert all(equal(case.run(model, clips), expected) for clips, expected in zip(batches, before, strict=True))


@every_case
@every_order
def test_only_sta_trains_and_all_of_it(case, order):
    model, handle = injected(case, order=order)
    handle.freeze_base()
    loss_of(case.run(model.train(), clips_of(*case.lengths[-1]))).backward()
    trained = {id(p) for p in handle.parameters()}
    assert len(trained) == len(list(handle.parameters())) > 0
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (id(parameter) in trained), name
        if id(parameter) in trained:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name


@every_case
@every_order
@pytest.mark.filterwarnings("ignore:For backward hooks to be called", "ignore:Full backward hook is firing")
def test_backward_hooks_of_others_on_every_module_change_nothing(case, order):
    model, handle = injected(case, order=order)
    handle.freeze_base()
    clips = clips_of(*case.lengths[-1])
    expected = torch.autograd.grad(loss_of(case.run(model, clips)), list(handle.parameters()))
    for module in model.modules():
        module.register_full_backward_hook(lambda *_: None)
    assert close(torch.autograd.grad(loss_of(case.run(model, clips)), list(handle.parameters())), expected, 1e-4)


@every_case
@every_order
@pytest.mark.parametrize("failure", [False, True], ids=["clean", "after an exception"])
def test_remove_leaves_no_trace(case, order, failure):
    model = seeded(case.make)
    clips = clips_of(*case.lengths[0])
    keys, hooks, before = list(model.state_dict()), count_hooks(model), case.run(model, clips)
    handle = inject_sta(model, STAConfig(order=order, init="normal"))
    assert count_hooks(model)[1] > 0
    if failure:
        last = list(handle.blocks)[-1]
        broken = handle.blocks[last].register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            case.run(model, clips)
        broken.remove()
    assert handle.remove() is model
    handle.remove()
    assert list(model.state_dict()) == keys
    assert count_hooks(model) == hooks
    assert get_sta(model) is None
    assert equal(case.run(model, clips), before)


@every_case
@every_order
def test_disabled_is_the_base_model_bit_for_bit(case, order):
    model = seeded(case.make)
    clips = clips_of(*case.lengths[0])
    before = case.run(model, clips)
    handle = inject_sta(model, STAConfig(order=order))
    for module in handle.blocks.values():
        randomize(module)
    changed = case.run(model, clips)
    assert not close(changed, before)
    with handle.disabled():
        assert equal(case.run(model, clips), before)
    assert equal(case.run(model, clips), changed)
    handle.disable()
    assert equal(case.run(model, clips), before)
    handle.enable()
    assert equal(case.run(model, clips), changed)


@every_case
def test_saved_and_loaded_into_a_fresh_model(case, tmp_path):
    model, handle = injected(case)
    clips = clips_of(*case.lengths[0])
    expected = case.run(model, clips)
    handle.save_pretrained(tmp_path)
    fresh = seeded(case.make)
    loaded = load_sta(fresh, tmp_path)
    assert loaded.config == handle.config
    assert equal(case.run(fresh, clips), expected)


@every_case
def test_sta_comes_back_from_the_weights_of_the_whole_model(case, tmp_path):
    """As transformers' trainer loads its checkpoints: the names are those of an older release, or of the part that the model was there."""
    model, handle = injected(case)
    if not hasattr(model, "save_pretrained"):
        pytest.skip("a model of transformers' alone is saved so")
    handle.freeze_base()
    model.save_pretrained(tmp_path)
    state = {key: value for file in tmp_path.glob("model*.safetensors") for key, value in load_file(file).items()}
    fresh = inject_sta(seeded(case.make)).freeze_base()
    fresh.model.load_state_dict(state, strict=False)
    assert equal(fresh.parameters(), handle.parameters())


@every_case
@every_order
def test_frames_reach_each_other_within_a_clip_and_never_across(case, order):
    model, _ = injected(case, order=order)
    lengths = next(lengths for lengths in case.lengths if len(lengths) > 1)
    clips = clips_of(*lengths)
    changed = [Clip(lengths[0], 0, changed=1), *clips[1:]]
    before, after = case.run(model, clips), case.run(model, changed)
    assert all((x - y).abs().max() > 1e-4 for x, y in zip(before[0], after[0], strict=True)), "a frame saw no change"
    for untouched, expected in zip(after[1:], before[1:], strict=True):
        assert torch.equal(untouched, expected)


@every_case
@every_order
def test_a_clip_does_not_depend_on_the_batch(case, order):
    model, _ = injected(case, order=order)
    for lengths in case.lengths:
        clips = clips_of(*lengths)
        together = case.run(model, clips)
        alone = [case.run(model, [clip])[0] for clip in clips]
        assert close(together, alone, 1e-6 * 10)


@every_case
@every_order
def test_single_frames_can_be_left_alone(case, order):
    model = seeded(case.make)
    image = [Clip(1)]
    before = case.run(model, image)
    handle = inject_sta(model, STAConfig(order=order, single_frames=False))
    for module in handle.blocks.values():
        randomize(module)
    assert equal(case.run(model, image), before)
    assert not close(
        case.run(model, clips_of(*case.lengths[0])), [f * 0 for f in case.run(model, clips_of(*case.lengths[0]))]
    )
    handle.remove()
    handle = inject_sta(model, STAConfig(order=order))
    for module in handle.blocks.values():
        randomize(module)
    assert not close(case.run(model, image), before)


def gradients(case, model, handle, batches, together=True, run=lambda backward: backward()):
    """STA's gradients of one loss over all batches, or of one loss each; `run` calls the backwards."""
    for parameter in handle.parameters():
        parameter.grad = None
    losses = [loss_of(case.run(model, clips)) for clips in batches]
    for loss in [sum(losses)] if together else losses:
        run(loss.backward)
    return [p.grad.clone() for p in handle.parameters()]


@every_case
@every_order
@pytest.mark.parametrize("reentrant", [True, False], ids=["re-entrant", "non-re-entrant"])
def test_gradients_under_checkpointing(case, order, reentrant):
    model, handle = injected(case, order=order)
    handle.freeze_base()
    batches = [clips_of(*case.lengths[0]), [Clip(n + 1, 7 + i) for i, n in enumerate(case.lengths[0])]]
    expected = gradients(case, model, handle, batches)
    encoder = case.encoder(model).train()
    if not enable_checkpointing(model, encoder, reentrant):
        pytest.skip("this version's tower can't checkpoint")
    calls = []
    spec = get_backbone(case.backbone)
    first = encoder.get_submodule(spec.blocks)[0].get_submodule(spec.norm)
    first.register_forward_hook(lambda *_: calls.append(1))
    for together in (True, False):
        for order_of_batches in (batches, batches[::-1]):
            found = gradients(case, model, handle, order_of_batches, together)
            for a, b in zip(found, expected, strict=True):
                assert (a - b).norm() <= 1e-5 * b.norm()
    assert len(calls) > 4 * len(batches), "nothing was computed again"
    with ThreadPoolExecutor(1) as thread:  # on a GPU backwards run in one of their own
        found = gradients(case, model, handle, batches, False, lambda backward: thread.submit(backward).result())
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def enable_checkpointing(model, encoder, reentrant):
    """Switch the encoder's own gradient checkpointing on; False when it has none."""
    owner = encoder if hasattr(encoder, "gradient_checkpointing_enable") else model
    try:
        owner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    except ValueError:
        return False
    return True


def keep_products(context, operator, *args, **kwargs):
    products = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}
    policies = checkpoints.CheckpointPolicy
    return policies.MUST_SAVE if operator in products else policies.PREFER_RECOMPUTE


@pytest.mark.skipif(
    not hasattr(checkpoints, "CheckpointPolicy"), reason="torch has no selective checkpoints before 2.5"
)
@every_order
@pytest.mark.parametrize("case", case_parameters(lambda case: case.id in ("clip", "siglip", "qwen2_vl-tower")))
def test_gradients_under_selective_checkpointing(case, order):
    """What it keeps of operators must not be changed in place."""
    model, handle = injected(case, order=order)
    handle.freeze_base()
    clips = clips_of(*case.lengths[-1])
    expected = torch.autograd.grad(loss_of(case.run(model, clips)), list(handle.parameters()))
    contexts = functools.partial(checkpoints.create_selective_checkpoint_contexts, keep_products)
    for block in handle.encoder.get_submodule(get_backbone(case.backbone).blocks):
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)
    assert close(torch.autograd.grad(loss_of(case.run(model, clips)), list(handle.parameters())), expected, 1e-4)


@every_case
def test_autocast(case):
    model, handle = injected(case)
    handle.freeze_base()
    clips = clips_of(*case.lengths[0])
    expected, slopes = case.run(model, clips), torch.cat([g.flatten() for g in gradients(case, model, handle, [clips])])
    with torch.autocast("cpu", torch.bfloat16):
        assert close([f.float() for f in case.run(model, clips)], expected, 0.2)
        found = torch.cat([g.flatten() for g in gradients(case, model, handle, [clips])])
    assert found.dtype == torch.float32
    assert (found - slopes).norm() <= 0.2 * slopes.norm()


@every_case
def test_half_models(case):
    clips = clips_of(*case.lengths[0])
    expected = case.run(injected(case)[0], clips)
    half = dataclasses.replace(
        case,
        make=lambda: case.make().to(torch.bfloat16),
        arguments=lambda clips: {
            k: v.bfloat16() if v.is_floating_point() else v for k, v in case.arguments(clips).items()
        },
    )
    torch.manual_seed(0)
    model = half.make().eval()
    handle = inject_sta(model)
    assert {p.dtype for p in handle.parameters()} == {torch.bfloat16}
    for module in handle.blocks.values():
        randomize(module)
    assert close([f.float() for f in half.run(model, clips)], expected, 0.2)


@every_case
def test_no_grad_and_inference_mode_agree_with_training_mode(case):
    model, _ = injected(case)
    clips = clips_of(*case.lengths[-1])
    expected = case.run(model, clips)
    with torch.no_grad():
        assert equal(case.run(model, clips), expected)
    with torch.inference_mode():
        assert equal(case.run(model, clips), expected)


@every_case
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: unpickle(pickled(m))], ids=["deepcopy", "pickle"])
def test_a_copy_has_working_hooks_of_its_own(case, duplicate):
    model, handle = injected(case)
    clips = clips_of(*case.lengths[0])
    expected = case.run(model, clips)
    twin = duplicate(model)
    assert equal(case.run(twin, clips), expected)
    other = get_sta(twin)
    randomize(next(iter(other.blocks.values())), seed=5)
    assert not close(case.run(twin, clips), expected)
    assert equal(case.run(model, clips), expected)
    other.remove()
    assert count_hooks(twin)[1] == 0
    assert equal(case.run(model, clips), expected)
    handle.remove()


def pickled(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return buffer


def unpickle(buffer):
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@every_case
def test_a_second_injection_raises(case):
    model, handle = injected(case)
    keys = list(model.state_dict())
    with pytest.raises(InjectionError, match="has STA already"):
        inject_sta(model)
    assert list(model.state_dict()) == keys
    handle.remove()
    assert inject_sta(model).num_parameters() > 0


@every_case
@pytest.mark.parametrize("when", ["peft first", "STA first"])
def test_with_lora(case, when, tmp_path):
    peft = pytest.importorskip("peft")
    model = seeded(case.make)
    clips = clips_of(*case.lengths[0])
    base = case.run(model, clips)
    targets = case.lora_targets
    if when == "peft first":
        plain = peft.LoraConfig(target_modules=list(targets)) if targets else inject_and_recipe(model)
        wrapped = peft.get_peft_model(model, plain)
        handle = inject_sta(wrapped)
    else:
        handle = inject_sta(model)
        overrides = {"target_modules": list(targets)} if targets else {}
        wrapped = peft.get_peft_model(model, handle.lora_config(**overrides))
        handle = get_sta(wrapped)
        assert handle.model is wrapped
        assert all(p.requires_grad for p in handle.parameters())
    assert not any("lora" in n for module in handle.blocks.values() for n, _ in module.named_parameters())
    assert close(case.run(wrapped, clips), base)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    for module in handle.blocks.values():
        randomize(module)
    loss_of(case.run(wrapped, clips)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in handle.parameters())
    expected = case.run(wrapped, clips)
    assert not close(expected, base)
    handle.save_pretrained(tmp_path)
    fresh = seeded(case.make)
    loaded = load_sta(fresh, tmp_path)
    assert isinstance(loaded.model, peft.PeftModel)
    assert equal(case.run(loaded.model, clips), expected)


def inject_and_recipe(model):
    """The backbone's LoRA recipe, without STA in the model or in the recipe."""
    handle = inject_sta(model)
    config = handle.lora_config()
    handle.remove()
    config.modules_to_save = None
    return config


@pytest.mark.parametrize("case", case_parameters(lambda case: case.generate is not None))
def test_generate(case):
    model = seeded(case.make)
    prompt = case.generate(4)
    options = {"max_new_tokens": 4, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    before = model.generate(**prompt, **options)
    handle = inject_sta(model)
    seen = []
    handle.blocks[0].register_forward_pre_hook(
        lambda module, args: seen.append([frames for frames, _ in args[1].clips])
    )
    with handle.clips([4]) if case.tell_model else contextlib.nullcontext():
        same = model.generate(**prompt, **options)
        for module in handle.blocks.values():
            randomize(module)
        other = model.generate(**prompt, **options)
        with handle.disabled():
            again = model.generate(**prompt, **options)
    assert seen == [[4], [4]], "the encoder ran once for each answer, on the prompt's one clip"
    assert torch.equal(same.sequences, before.sequences)
    assert all(torch.equal(a, b) for a, b in zip(same.scores, before.scores, strict=True))
    assert not torch.equal(other.scores[0], before.scores[0])
    assert torch.equal(again.scores[0], before.scores[0])


@pytest.mark.skipif(
    transformers_version() < (5, 18), reason="older releases encode clips within the forward, which breaks its graph"
)
@pytest.mark.parametrize("case", case_parameters(lambda case: case.id in ("qwen2_vl", "internvl")))
def test_generation_is_compiled_in_one_graph(case):
    """As transformers advises for static caches; on a GPU `generate` does so by itself."""
    model, handle = injected(case)
    options = {"max_new_tokens": 3, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    with handle.clips([4]) if case.tell_model else contextlib.nullcontext():
        expected = model.generate(**case.generate(4), **options)
        torch._dynamo.reset()
        model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
        found = model.generate(**case.generate(4), **options, cache_implementation="static", disable_compile=True)
    for a, b in zip(found.scores, expected.scores, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
