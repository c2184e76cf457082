"""The published files of InternVideo2, InternVideo2.5, LLaVA-Video and STAVEQ2 themselves; see real_code.py for how to run this."""

import inspect
import json
import sys

import internvideo2_5_chat
import internvideo2_chat
import pytest
import torch
import transformers
from cases import randomize
from real_code import load, load_package
from safetensors.torch import save_file
from standins.internvideo2 import PretrainVisionTransformer
from standins.internvl_chat import InternVisionModel
from test_goldens import assert_golden_gradients, load_golden_weights, read_golden, relative_error
from test_internvideo2_5 import Layouts

from sta_adapter import STAConfig, get_sta, inject_sta
from sta_adapter.errors import LayoutError
from sta_adapter.injection.registry import get_backbone
from sta_adapter.internvideo.v2_encoder_loading import load_encoder
from sta_adapter.loading import load_model

pytestmark = pytest.mark.real_code
needs_old_transformers = pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) >= (4, 50), reason="the files need transformers below 4.50"
)
TINY = {
    **{"in_chans": 3, "img_size": 8, "patch_size": 4, "embed_dim": 64, "num_heads": 4, "mlp_ratio": 2, "depth": 2},
    **{"num_frames": 4, "attn_pool_num_heads": 4, "clip_embed_dim": 16, "drop_path_rate": 0.0, "init_values": 0.5},
    **{"num_classes": 5, "clip_teacher_embed_dim": 16, "clip_teacher_final_dim": 16, "clip_return_layer": 1},
    **{"mae_teacher_embed_dim": 16, "mae_return_layer": 1},
}
TOWERS = {
    "chat": ("internvideo2_chat", "modeling_internvideo2_vit", "PretrainVisionTransformer_clean"),
    "stage 2": ("internvideo2", "internvideo2", "PretrainInternVideo2"),
    "CLIP": ("internvideo2", "internvideo2_clip_vision", "InternVideo2"),
    "classifier": ("internvideo2_single", "internvideo2", "InternVideo2"),
    "pretraining": ("internvideo2_single", "internvideo2_pretrain", "PretrainInternVideo2"),
    "distilled": ("internvideo2_single", "internvideo2_distill", "DistInternVideo2"),
}
every_tower = pytest.mark.parametrize("where", TOWERS.values(), ids=TOWERS.keys())


def tower(where, fused=False, checkpoint_num=0):
    """A tiny tower of the published class with random weights, training mode, and its call."""
    folder, file, name = where
    cls = getattr(load(folder, file, flash=True), name)
    settings = {**TINY, **dict.fromkeys(("use_flash_attn", "use_fused_rmsnorm", "use_fused_mlp"), fused)}
    settings |= {"use_checkpoint": checkpoint_num > 0, "checkpoint_num": checkpoint_num}
    known = inspect.signature(cls.__init__).parameters
    torch.manual_seed(0)
    model = randomize(cls(**{k: v for k, v in settings.items() if k in known})).train()
    arguments = {}
    if "mask" in inspect.signature(model.forward).parameters:
        arguments["mask"] = torch.zeros(2, 17, dtype=torch.bool)

    def call(video):
        output = model(video, **arguments)
        first = output[0] if isinstance(output, tuple) else output
        return first.flatten(0, -3) if first.dim() > 3 else first

    return model, call


def video():
    return torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def trained(where, **settings):
    """(output, gradients) of a tower with random STA."""
    model, call = tower(where, **settings)
    handle = inject_sta(model).freeze_base()
    for module in handle.blocks.values():
        randomize(module)
    output = call(video())
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))  # some outputs have length 1
    (output * weights).mean().backward()
    return output.detach(), [p.grad for p in handle.parameters()]


@every_tower
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_internvideo2_towers(where, fused):
    model, call = tower(where, fused)
    keys, before = list(model.state_dict()), call(video())
    handle = inject_sta(model)
    assert handle.backbone == "internvideo2"
    assert isinstance(handle.blocks[0].norm, torch.nn.RMSNorm)
    assert handle.blocks[0].norm.eps == 1e-6
    assert torch.equal(call(video()), before)
    for module in handle.blocks.values():
        randomize(module)
    assert (call(video()) - before).abs().max() > 1e-4
    handle.remove()
    assert torch.equal(call(video()), before)
    assert list(model.state_dict()) == keys


@every_tower
def test_fused_checkpointed_and_plain_towers_agree(where):
    output, gradients = trained(where)
    for settings in ({"fused": True}, {"checkpoint_num": 2}, {"fused": True, "checkpoint_num": 1}):
        other, found = trained(where, **settings)
        assert relative_error(other, output) <= 1e-5
        for a, b in zip(found, gradients, strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm()


@every_tower
def test_dummy_inputs(where):
    model, _ = tower(where)
    handle = inject_sta(model)
    args, kwargs = get_backbone("internvideo2").dummy_inputs(model)
    model(*args, **kwargs)
    handle.remove()


@every_tower
def test_our_encoder_takes_every_towers_weights(where, tmp_path):
    """Read off a checkpoint with all that stands beside the blocks, it gives the tokens of the last block."""
    model, call = tower(where)
    tokens = []
    model.blocks[-1].register_forward_hook(lambda block, args, output: tokens.append(output))
    call(video())
    torch.save({f"vision_encoder.{name}": kept for name, kept in model.state_dict().items()}, tmp_path / "tower.pt")
    encoder = load_encoder(tmp_path / "tower.pt", num_heads=4, img_size=8)
    assert relative_error(encoder(video()), tokens[0]) <= 1e-5


def test_internvideo2_golden_and_stand_in():
    header, tensors = read_golden("internvideo2_after")
    cls = load("internvideo2_chat", "modeling_internvideo2_vit", flash=True).PretrainVisionTransformer_clean
    settings = json.loads(header["kwargs"])
    model, standin = cls(**settings), PretrainVisionTransformer(**settings)
    weights = {k.removeprefix("base."): v for k, v in tensors.items() if k.startswith("base.")}
    assert model.load_state_dict(weights) == standin.load_state_dict(weights)
    assert relative_error(standin(tensors["pixel_values"]), model(tensors["pixel_values"])) <= 1e-5
    handle = inject_sta(model)
    load_golden_weights(handle, tensors)
    output = model(tensors["pixel_values"])
    assert relative_error(output, tensors["sta_output"]) <= 1e-4
    output.square().mean().backward()
    assert_golden_gradients(handle, tensors)


def test_staveq2_block_agrees():
    """The authors' own temporal branch, with a gain that shows, against ours with the same weights."""
    settings = {**TINY, "num_frames": 8, "x_vis_only": True}
    settings |= dict.fromkeys(("use_flash_attn", "use_fused_rmsnorm", "use_fused_mlp"), False)
    stacked_cls = load("staveq2", "custom_vit_stacked", flash=True).PretrainVisionTransformer_clean
    plain_cls = load("internvideo2_chat", "modeling_internvideo2_vit", flash=True).PretrainVisionTransformer_clean
    known = inspect.signature(plain_cls.__init__).parameters
    settings = {k: v for k, v in settings.items() if k in known}
    stacked = randomize(stacked_cls(**settings)).eval()
    plain = plain_cls(**settings).eval()
    plain.load_state_dict(stacked.state_dict(), strict=False)
    handle = inject_sta(plain)
    names = get_backbone("internvideo2").published_names
    for index, module in handle.blocks.items():
        for name, _ in module.named_parameters():
            head, _, rest = name.partition(".")
            published = ".".join(filter(None, (names[head], rest)))
            module.get_parameter(name).data.copy_(stacked.blocks[index].get_parameter(published))
    clip = torch.randn(2, 3, 8, 8, 8)
    assert relative_error(plain(clip), stacked(clip)) <= 1e-5
    with handle.disabled():
        assert relative_error(plain(clip), stacked(clip)) > 1e-2


@needs_old_transformers
def test_internvideo2_5_golden_and_stand_in():
    header, tensors = read_golden("internvideo2_5_after")
    files = load("internvideo2_5", "modeling_intern_vit")
    settings = json.loads(header["vision_config"])
    config = {"qkv_bias": True, "qk_normalization": False, "norm_type": "layer_norm", "use_flash_attn": False}
    model = files.InternVisionModel(files.InternVisionConfig(**{**settings, **config}))
    standin = InternVisionModel(**settings)
    weights = {k.removeprefix("base."): v for k, v in tensors.items() if k.startswith("base.")}
    assert model.load_state_dict(weights) == standin.load_state_dict(weights)
    rows, lengths = tensors["pixel_values"], tensors["clip_lengths"].tolist()
    for mode in (False, True):  # the published encoder checkpoints its layers in training
        model.train(mode)
        handle = inject_sta(model).freeze_base()
        assert relative_error(model(rows).last_hidden_state, tensors["base_output"]) <= 1e-5
        load_golden_weights(handle, tensors)
        output = model(rows, clip_lengths=lengths).last_hidden_state
        assert relative_error(output, tensors["sta_output"]) <= 1e-4
        output.square().mean().backward()
        assert_golden_gradients(handle, tensors)
        handle.remove()
    assert relative_error(standin.eval()(rows).last_hidden_state, tensors["base_output"]) <= 1e-5


@needs_old_transformers
def test_internvideo2_chat_itself():
    """Its code gives the numbers that the main tests compare ours with; its weights have the names that they load."""
    shapes, expected = internvideo2_chat.read_golden()
    model, found_shapes = internvideo2_chat.published_with_weights()
    assert found_shapes == shapes
    found = dict(internvideo2_chat.results_of(model))
    assert found.keys() == expected.keys()
    for name, result in found.items():
        if result.is_floating_point():
            assert relative_error(result, expected[name]) <= 1e-5, name
        else:
            assert torch.equal(result, expected[name]), name


class Tokenizer:
    """Just enough of a tokenizer for the published chat methods: one id a piece of text."""

    padding_side = "left"

    def convert_tokens_to_ids(self, token):
        return {"<IMG_CONTEXT>": 60, "<|im_end|>": 2}.get(token, 7)

    def __call__(self, text, return_tensors=None, padding=False):
        rows = [self._ids(t) for t in ([text] if isinstance(text, str) else text)]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        return {"input_ids": ids, "attention_mask": (ids != 0).long()}

    def _ids(self, text):
        return [60 if word == "<IMG_CONTEXT>" else 8 for word in text.replace(">", "> ").replace("<", " <").split()]

    def batch_decode(self, ids, skip_special_tokens=True):
        return ["answer"] * len(ids)


@pytest.fixture
def real_chat():
    """(the published chat model, tiny; the layouts that its STA sees)."""
    files = load("internvideo2_5", "modeling_internvl_chat_hico2")
    vision = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48}
    vision |= {"image_size": 56, "patch_size": 14, "qkv_bias": True, "qk_normalization": False, "drop_path_rate": 0.0}
    vision |= {"norm_type": "layer_norm"}
    language = {"architectures": ["InternLM2ForCausalLM"], "vocab_size": 64, "hidden_size": 32}
    language |= {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    language |= {"bias": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = files.InternVLChatConfig(vision, language, template="internvl2_5", ps_version="v2")
    torch.manual_seed(0)
    model = files.InternVLChatModel(config, use_flash_attn=False).eval()
    model.num_tome_tokens, model.num_image_token = 8, 2
    handle = inject_sta(model)
    for module in handle.blocks.values():
        randomize(module)
    return model, Layouts(handle).seen


@needs_old_transformers
def test_internvideo2_5_chat(real_chat):
    model, seen = real_chat
    rows, options = torch.randn(8, 3, 56, 56), {"max_new_tokens": 2, "do_sample": False}
    frames = "".join(f"Frame{i + 1}: <image>\n" for i in range(8))
    model.chat(Tokenizer(), rows, frames + "What?", dict(options), num_patches_list=[1] * 8, history=None)
    model.chat(Tokenizer(), rows, "What?", dict(options))
    model.batch_chat(Tokenizer(), rows, ["What?", "Who?"], dict(options), num_patches_list=[4, 4])
    assert seen == [((8, 16),), ((8, 16),), ((4, 16), (4, 16))]
    with pytest.raises(LayoutError, match="can't be known"):
        model.chat(Tokenizer(), rows[:4], "<image>\n" * 4, dict(options), num_patches_list=[1] * 4)


VARIANTS = {
    "published": {},
    "other_settings": {
        "vision": {"qk_normalization": True, "norm_type": "rms_norm", "qkv_bias": False},
        "language": {"bias": True, "rope_scaling": {"type": "linear", "factor": 2.0}, "num_key_value_heads": 4},
        "chat": {"ps_version": "v1", "select_layer": -2, "template": "internlm2-chat"},
    },
    "no_scaling": {"language": {"rope_scaling": None, "num_key_value_heads": 1}, "chat": {"force_image_size": 112}},
}


@needs_old_transformers
@pytest.mark.parametrize("case", list(internvideo2_5_chat.CASES))
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_internvideo2_5_put_together(variant, case, tmp_path, monkeypatch):
    """Ours against the published model itself."""
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    tiny, changed = internvideo2_5_chat, VARIANTS[variant]
    config = {**tiny.CONFIG, **changed.get("chat", {})}
    config["vision_config"] = {**tiny.VISION, **changed.get("vision", {})}
    config["llm_config"] = {**tiny.LANGUAGE, **changed.get("language", {})}
    theirs = tiny.published(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    ours = tiny.tiny(load_model(tmp_path, dtype="fp32", device="cpu"))
    (ids, mask), rows = tiny.prompts(case), tiny.pixels(tiny.CASES[case][0], seed=2)
    flags = torch.ones(len(rows), 1, dtype=torch.long)
    with torch.no_grad():
        assert relative_error(ours.extract_feature(rows), theirs.extract_feature(rows)) <= 1e-5
        expected = theirs(rows, ids, mask, image_flags=flags).logits
        assert (
            relative_error(ours(rows, ids, mask, image_flags=flags).logits[mask.bool()], expected[mask.bool()]) <= 1e-5
        )
    options = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False, "pad_token_id": 0, "eos_token_id": 2}
    fresh = tiny.published(config).generate(rows, ids, mask, **options)
    assert ours.generate(rows, ids, mask, **options)[:, ids.shape[1] :].tolist() == fresh.tolist()


@needs_old_transformers
def test_internvideo2_5_lora_recipe(real_chat):
    peft = pytest.importorskip("peft")
    handle = inject_sta(get_sta(real_chat[0]).remove())
    wrapped = peft.get_peft_model(handle.model, handle.lora_config())
    adapted = {n.split(".lora_A")[0].split("layers.")[-1][2:] for n, _ in wrapped.named_modules() if "lora_A" in n}
    language = {"attention.wqkv", "attention.wo", *(f"feed_forward.w{i}" for i in (1, 2, 3))}
    assert adapted == language | {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}


@every_tower
def test_the_config_is_what_was_given(where):
    model, call = tower(where)
    handle = inject_sta(model, STAConfig(layers=[1], head_scale=0.5, rope_theta=10000.0))
    assert list(handle.blocks) == [1]
    call(video())


def llava_video():
    """A tiny LLaVA-Video of the published code; its tower sees 27 x 27 patches, of which that code is sure."""
    files = load_package("llava_next", "llava.model.language_model.llava_qwen")
    siglip = sys.modules["llava.model.multimodal_encoder.siglip_encoder"]
    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192, "use_cache": False}
    sight = {"mm_vision_tower": "siglip", "delay_load": True, "mm_hidden_size": 32, "mm_projector_type": "mlp2x_gelu"}
    sight |= {"mm_patch_merge_type": "spatial_unpad", "mm_newline_position": "grid", "mm_spatial_pool_mode": "bilinear"}
    config = files.LlavaQwenConfig(**text, **sight)
    torch.manual_seed(0)
    model = files.LlavaQwenForCausalLM(config)
    tower = model.get_vision_tower()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    tower.config = siglip.SigLipVisionConfig(**sizes, image_size=384, patch_size=14)
    tower.vision_tower = siglip.SigLipVisionModel(tower.config)
    del tower.vision_tower.vision_model.encoder.layers[-1:]  # as its load_model does
    tower.vision_tower.vision_model.head = torch.nn.Identity()
    return randomize(model).eval()


@needs_old_transformers
def test_llava_video_reads_its_clips_and_pictures():
    model, ids = llava_video(), torch.tensor([[5, -200, 6, -200, 7, -200, 8]])
    rows = torch.randn(9, 3, 384, 384, generator=torch.Generator().manual_seed(0))
    clips = [rows[:4], rows[4:5], rows[5:]]  # a video, a picture and a video, in one sample
    told = {"images": clips, "modalities": ["video", "image", "video"], "image_sizes": [(384, 384)] * 3}
    with torch.no_grad():
        tower, before = model.get_vision_tower(), model(ids, **told).logits
        untouched = tower(rows)
        handle = inject_sta(model)
        assert handle.backbone == "llava_video"
        assert list(handle.blocks) == [0, 1]
        assert torch.equal(model(ids, **told).logits, before)
        for module in handle.blocks.values():
            randomize(module)
        seen = []
        watch = tower.register_forward_hook(lambda module, args, output: seen.append(output))
        assert (model(ids, **told).logits - before).abs().max() > 1e-4
        watch.remove()
        for clip, found in zip(clips, seen[0].split([4, 1, 4]), strict=True):  # each as it is by itself
            with handle.clips([len(clip)]):
                torch.testing.assert_close(found, tower(clip), rtol=1e-5, atol=1e-5)
        assert (seen[0] - untouched).flatten(1).norm(dim=1).min() > 1e-3
        said = model.generate(ids, **told, max_new_tokens=4, do_sample=False)
        assert said.shape == (1, 4)
        with pytest.raises(LayoutError, match="clips"):
            tower(rows)
        handle.remove()
        assert torch.equal(model(ids, **told).logits, before)
