"""InternVideo2's ViT: the published numbers, fused norms, checkpointing within the block, masks, images, tubelets."""

import copy
import json

import pytest
import torch
from cases import randomize
from standins import internvideo2 as standin
from test_goldens import assert_golden_gradients, load_golden_weights, read_golden, relative_error

from sta_adapter import STAConfig, get_sta, inject_sta
from sta_adapter.errors import LayoutError
from sta_adapter.injection.registry import get_backbone

every_order = pytest.mark.parametrize("order", ["after_spatial", "before_spatial"])
every_norm = pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])


def tower(**settings):
    torch.manual_seed(0)
    return randomize(standin.PretrainVisionTransformer(**settings)).eval()


def injected(order="after_spatial", **settings):
    """A tower with random weights, STA's too, its base frozen, and its handle."""
    model = tower(**settings)
    handle = inject_sta(model, STAConfig(order=order)).freeze_base()
    for module in handle.blocks.values():
        randomize(module)
    return model, handle


def video(clips=2, frames=4, seed=0):
    return torch.randn(clips, 3, frames, 8, 8, generator=torch.Generator().manual_seed(seed))


def gradients(model, handle, *videos):
    """STA's gradients, each video's forward before the first backward."""
    handle_parameters = list(handle.parameters())
    for parameter in handle_parameters:
        parameter.grad = None
    for loss in [model(v).square().mean() for v in videos]:
        loss.backward()
    return [p.grad.clone() for p in handle_parameters]


def assert_close(found, expected, tolerance=1e-5):
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= tolerance * b.norm()


def test_golden_output_and_gradients():
    header, tensors = read_golden("internvideo2_after")
    model = standin.PretrainVisionTransformer(**json.loads(header["kwargs"]))
    model.load_state_dict({k.removeprefix("base."): v for k, v in tensors.items() if k.startswith("base.")})
    assert relative_error(model(tensors["pixel_values"]), tensors["base_output"]) <= 1e-5
    handle = inject_sta(model)
    assert {module.num_heads for module in handle.blocks.values()} == {int(header["num_heads"])}
    load_golden_weights(handle, tensors)
    output = model(tensors["pixel_values"])
    assert relative_error(output, tensors["sta_output"]) <= 1e-4
    assert relative_error(tensors["base_output"], tensors["sta_output"]) > 1e-3
    output.square().mean().backward()
    assert_golden_gradients(handle, tensors)


def test_golden_with_fused_norms():
    header, tensors = read_golden("internvideo2_after")
    model = standin.PretrainVisionTransformer(**{**json.loads(header["kwargs"]), "use_fused_rmsnorm": True})
    model.load_state_dict({k.removeprefix("base."): v for k, v in tensors.items() if k.startswith("base.")})
    handle = inject_sta(model)
    load_golden_weights(handle, tensors)
    output = model(tensors["pixel_values"])
    assert relative_error(output, tensors["sta_output"]) <= 1e-4
    output.square().mean().backward()
    assert_golden_gradients(handle, tensors)


@every_norm
def test_defaults_are_the_published_variant(fused):
    handle = inject_sta(tower(use_fused_rmsnorm=fused))
    assert handle.backbone == "internvideo2"
    assert (handle.config.rope_theta, handle.config.head_scale, handle.config.gamma_init) == (None, 1.0, 1e-5)
    for module in handle.blocks.values():
        assert isinstance(module.norm, torch.nn.RMSNorm)
        assert module.norm.eps == 1e-6
        assert torch.equal(module.gamma, torch.full_like(module.gamma, 1e-5))
        assert module.to_qkv.bias is not None
    published = inject_sta(tower(embed_dim=64), STAConfig(init="normal")).blocks[0]
    for layer in (published.to_qkv, published.to_out):
        assert 0.018 < layer.weight.std() < 0.022
        assert torch.equal(layer.bias, torch.zeros_like(layer.bias))
    given = inject_sta(tower(), STAConfig(rope_theta=100.0, gamma_init=None, head_scale=0.25))
    assert (given.config.rope_theta, given.config.gamma_init) == (100.0, None)
    assert {module.num_heads for module in given.blocks.values()} == {1}


@pytest.mark.parametrize("name", get_backbone("internvideo2").encoder_classes)
def test_found_by_every_published_class_name(name):
    model = type(name, (torch.nn.Module,), {})()
    model.patch_embed, model.blocks = tower().patch_embed, tower().blocks
    assert get_backbone("internvideo2").find_encoder(torch.nn.Sequential(model)) is model


@every_order
def test_fused_norms_agree_with_plain_ones(order):
    plain, handle = injected(order)
    fused, other = injected(order, use_fused_rmsnorm=True)
    fused.load_state_dict(plain.state_dict())
    assert_close([fused(video())], [plain(video())])
    assert_close(gradients(fused, other, video()), gradients(plain, handle, video()))
    with handle.disabled():
        base = plain(video())
    assert (plain(video()) - base).abs().max() > 1e-2


@every_order
@every_norm
@pytest.mark.parametrize("reentrant", [True, False], ids=["re-entrant", "non-re-entrant"])
@pytest.mark.parametrize("checkpoint_num", [1, 2])
def test_gradients_under_checkpointing_within_the_block(order, fused, reentrant, checkpoint_num):
    videos = [video(2, 4), video(1, 6, seed=1), video(3, 1, seed=2)]
    plain, handle = injected(order, use_fused_rmsnorm=fused)
    expected = gradients(plain.train(), handle, *videos)
    checked, other = injected(order, use_fused_rmsnorm=fused, checkpoint_num=checkpoint_num, use_reentrant=reentrant)
    assert_close(gradients(checked.train(), other, *videos), expected)


@every_norm
def test_training_with_drop_path_and_checkpointing(fused):
    model, handle = injected(use_fused_rmsnorm=fused, drop_path_rate=0.5, checkpoint_num=2)
    plain, other = injected(use_fused_rmsnorm=fused, drop_path_rate=0.5)
    torch.manual_seed(3)
    expected = gradients(plain.train(), other, video(6))
    torch.manual_seed(3)
    assert_close(gradients(model.train(), handle, video(6)), expected)
    assert all(g.abs().sum() > 0 for g in expected)


def test_a_fresh_injection_changes_nothing_under_drop_path():
    model = tower(drop_path_rate=0.5).train()
    torch.manual_seed(3)
    before = model(video(6))
    inject_sta(model)
    torch.manual_seed(3)
    assert torch.equal(model(video(6)), before)


@pytest.mark.parametrize("frames", [1, 4, 8, 16])
@every_norm
def test_frames_reach_each_other_through_the_branch_alone(frames, fused):
    model, handle = injected(use_fused_rmsnorm=fused)
    seen = []
    handle.blocks[0].register_forward_hook(lambda module, args, output: seen.append(output))
    changed = video(2, frames)
    changed[0, :, -1] += 1
    model(video(2, frames)), model(changed)
    assert seen[0].shape == (2, frames * 4, 32)
    first, second = (tokens.unflatten(1, (frames, 4)) for tokens in seen)
    assert (first[0] - second[0]).abs().amax((1, 2)).min() > 1e-5
    assert torch.equal(first[1], second[1])


def test_images_pass_through_the_branch_unless_told_otherwise():
    model, handle = injected()
    image = video(2, 1)
    with handle.disabled():
        base = model(image, use_image=True)
    assert (model(image, use_image=True) - base).abs().max() > 1e-3
    handle.remove()
    inject_sta(model, STAConfig(single_frames=False, init="normal", gamma_init=1.0))
    assert torch.equal(model(image, use_image=True), base)


def test_tubelets_are_the_frames():
    model, handle = injected(tubelet_size=2, num_frames=8)
    seen = []
    handle.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    model(video(2, 8))
    assert seen[0].clips == ((4, 4), (4, 4))
    assert seen[0].prefix == 1


def test_a_mask_that_keeps_everything_or_drops_tubes_is_served():
    model, _ = injected()
    keep = torch.zeros(2, 17, dtype=torch.bool)
    assert torch.equal(model(video(), mask=keep), model(video()))
    tubes = keep.clone()
    tubes[0, 1::4] = tubes[1, 3::4] = True
    assert model(video(), mask=tubes).shape == (2, 13, 32)
    assert model(video(1), mask=tubes[:1]).shape == (1, 13, 32)


@pytest.mark.parametrize(
    "dropped",
    [
        [(0, 1)],
        [(0, 1), (0, 6), (1, 1), (1, 6)],
        [(0, 0), (1, 0)],
        [(row, column) for row in range(2) for column in range(1, 17)],
    ],
    ids=["uneven", "no tube", "class token", "everything"],
)
def test_another_mask_raises_and_leaves_nothing_behind(dropped):
    model, handle = injected()
    mask = torch.zeros(2, 17, dtype=torch.bool)
    mask[tuple(zip(*dropped, strict=True))] = True
    before = model(video())
    with pytest.raises(LayoutError, match="mask"):
        model(video(), mask=mask)
    assert torch.equal(model(video()), before)
    if len({row for row, _ in dropped}) == 2:
        with handle.disabled():
            assert model(video(), mask=mask).isfinite().all()


def test_what_is_told_must_be_what_the_encoder_sees():
    model, handle = injected()
    with handle.clips([4, 4]):
        told = model(video())
    assert torch.equal(told, model(video()))
    with pytest.raises(LayoutError, match="sees them itself: 2 clips of 4 frames"), handle.clips([8]):
        model(video())
    with pytest.raises(LayoutError, match=r"shape \(2, 3, 8, 8\); expected \(clips, channels, frames"):
        model(video()[:, :, 0])


def test_depth_cut_by_the_returned_layer():
    model = tower(depth=3, x_vis_return_idx=-2)
    assert list(inject_sta(model).blocks) == [0, 1]


def test_dummy_inputs_run_every_block():
    for settings in ({}, {"use_fused_rmsnorm": True}, {"tubelet_size": 2}):
        model, handle = injected(**settings)
        args, kwargs = get_backbone("internvideo2").dummy_inputs(model)
        model(*args, **kwargs).sum().backward()
        assert all(p.grad is not None for p in handle.parameters())


def chat_model():
    torch.manual_seed(0)
    return randomize(standin.InternVideo2_VideoChat2(), std=0.1).eval()


def test_the_chat_model_and_its_lora_recipe():
    peft = pytest.importorskip("peft")
    model = chat_model()
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    before = model(ids, video())
    handle = inject_sta(model)
    assert handle.encoder is model.vision_encoder
    assert torch.equal(model(ids, video()), before)
    wrapped = peft.get_peft_model(model, handle.lora_config())
    adapted = {n.split(".lora_A")[0] for n, _ in wrapped.named_modules() if n.endswith(".lora_A")}
    ends = {n.split(".", 2)[-1].split("s.0.")[-1] for n in adapted if "s.0." in n}
    language = {f"self_attn.{k}_proj" for k in "qkvo"} | {f"mlp.{k}_proj" for k in ("gate", "up", "down")}
    assert ends == language | {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}
    ranks = {n.rsplit(".", 3)[0][-8:]: p.shape[0] for n, p in wrapped.named_parameters() if "lora_A" in n}
    assert ranks["attn.qkv"] == 32
    assert set(ranks.values()) == {16, 32}
    assert not any(".sta." in n for n in adapted)
    assert all(p.requires_grad for p in get_sta(wrapped).parameters())
    for module in get_sta(wrapped).blocks.values():
        randomize(module)
    wrapped(ids, video()).square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in get_sta(wrapped).parameters())


def test_copies_of_a_fused_tower_work_by_themselves():
    model, _ = injected(use_fused_rmsnorm=True)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(video()), model(video()))
    get_sta(twin).remove()
    assert (twin(video()) - model(video())).abs().max() > 1e-3
