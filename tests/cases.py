"""The tiny models that the contract runs over: a new backbone adds a `Case` here, not new tests.

A case makes a model (the real class, or a stand-in that the goldens prove) with seeded random weights, makes the
arguments of its encoder for clips of given lengths, and brings the encoder's output into one form.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sta_adapter import get_sta
from sta_adapter.injection.registry import get_backbone

Arguments = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Clip:
    """A clip of noise, or its frames from `start` on: pixels depend on the seed and the frame alone; frame `changed` holds others."""

    frames: int
    seed: int = 0
    changed: int | None = None
    start: int = 0

    def pixels(self, *shape: int) -> Tensor:
        """(frames, *shape), seeded standard normal numbers."""
        frames = range(self.start, self.start + self.frames)
        seeds = [1000 * self.seed + frame + (500 if frame == self.changed else 0) for frame in frames]
        return torch.stack([torch.randn(*shape, generator=torch.Generator().manual_seed(s)) for s in seeds])


@dataclasses.dataclass(frozen=True)
class Case:
    """One backbone in one tiny model.

    Attributes:
        id: shown by pytest.
        backbone: the name that injection must find.
        make: the model, evaluating, with seeded random weights.
        arguments: the encoder's keyword arguments for these clips.
        features: from the encoder's output for these clips to one tensor (frames, tokens, C) a clip, without class tokens.
        lengths: batches to try, each the frames of its clips.
        tell_clips: frames come as a batch, so that the clips are told by `handle.clips(lengths)`.
        lora_targets: modules for LoRA where the backbone has no recipe of its own.
        generate: keyword arguments of `model.generate` for one clip of so many frames; None without a language model.
        tell_model: the full model can't tell a clip from pictures, so that it must be told for `generate` as well.
        needs: the model's folder in transformers, where a tested release may lack it.
    """

    id: str
    backbone: str
    make: Callable[[], nn.Module]
    arguments: Callable[[Sequence[Clip]], Arguments]
    features: Callable[[Any, Sequence[Clip]], list[Tensor]]
    lengths: tuple[tuple[int, ...], ...] = ((4,), (3, 3), (2, 5, 1))
    tell_clips: bool = False
    lora_targets: tuple[str, ...] = ()
    generate: Callable[[int], Arguments] | None = None
    tell_model: bool = False
    needs: str = ""

    def encoder(self, model: nn.Module) -> nn.Module:
        """The vision encoder within the model."""
        encoder = get_backbone(self.backbone).find_encoder(model)
        assert encoder is not None
        return encoder

    def run(self, model: nn.Module, clips: Sequence[Clip]) -> list[Tensor]:
        """Features (frames, tokens, C) of each clip; the clips are told to STA when the model has it."""
        handle = get_sta(model)
        told = self.tell_clips and handle is not None
        with handle.clips([clip.frames for clip in clips]) if told else contextlib.nullcontext():
            return self.features(self.encoder(model)(**self.arguments(clips)), clips)


def clips_of(*lengths: int) -> list[Clip]:
    """Clips of these lengths, each with its own seed."""
    return [Clip(frames, seed) for seed, frames in enumerate(lengths)]


def randomize(module: nn.Module, seed: int = 0, std: float = 0.2) -> nn.Module:
    """Give every parameter seeded random values, so that no part is switched off by its initialisation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * std
            parameter.copy_(
                noise + 1 if name.endswith("norm.weight") or ("norm" in name and "weight" in name) else noise
            )
    return module


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """A model made under a fixed seed, in evaluation mode, in float32."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().float().eval()


QWEN2_VL_VISION = {
    "depth": 3,
    "embed_dim": 32,
    "num_heads": 4,
    "mlp_ratio": 2,
    "hidden_size": 32,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "in_channels": 3,
}
GRIDS = ((4, 4), (2, 4), (2, 2), (4, 6))  # rows and columns of patches, by the clip's seed


def grid_of(clip: Clip) -> tuple[int, int, int]:
    """Frames, rows and columns of a clip's patches."""
    return (clip.frames, *GRIDS[clip.seed % len(GRIDS)])


def qwen2_vl_arguments(clips: Sequence[Clip]) -> Arguments:
    """Packed patches and their grid."""
    parts = [clip.pixels(h * w, 96).flatten(0, 1) for clip in clips for _, h, w in [grid_of(clip)]]
    return {"hidden_states": torch.cat(parts), "grid_thw": torch.tensor([grid_of(clip) for clip in clips])}


def merged_tokens(output: Any, clips: Sequence[Clip]) -> list[Tensor]:
    """The merged tokens of a tower of Qwen2-VL's kind, four patches each, clip by clip."""
    tokens = output if isinstance(output, Tensor) else output.pooler_output
    sizes = [t * h * w // 4 for t, h, w in map(grid_of, clips)]
    return [part.view(clip.frames, -1, part.shape[-1]) for part, clip in zip(tokens.split(sizes), clips, strict=True)]


def make_qwen2_vl_tower() -> nn.Module:
    """The bare vision tower."""
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

    return Qwen2VisionTransformerPretrainedModel._from_config(Qwen2VLVisionConfig(**QWEN2_VL_VISION))


def qwen2_vl_config() -> Any:
    """A tiny configuration of the full model, understood by all tested versions of transformers."""
    from transformers import Qwen2VLConfig

    text = {
        "vocab_size": 160,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    ids = {
        "image_token_id": 150,
        "video_token_id": 151,
        "vision_start_token_id": 152,
        "vision_end_token_id": 153,
        "vision_token_id": 154,
    }
    return Qwen2VLConfig(**text, **ids, vision_config=QWEN2_VL_VISION)


def make_qwen2_vl() -> nn.Module:
    """The full model."""
    from transformers import Qwen2VLForConditionalGeneration

    return Qwen2VLForConditionalGeneration(qwen2_vl_config())


def qwen2_vl_prompt(frames: int) -> Arguments:
    """A prompt with one clip of so many temporal steps of 4x4 patches."""
    tokens = [152, *[151] * (frames * 4), 153, 5, 6]
    return {
        "input_ids": torch.tensor([tokens]),
        "attention_mask": torch.ones(1, len(tokens), dtype=torch.long),
        "pixel_values_videos": Clip(frames).pixels(16, 96).flatten(0, 1),
        "video_grid_thw": torch.tensor([[frames, 4, 4]]),
        **token_types(tokens, video=151, image=150),
    }


def token_types(tokens: list[int], *, video: int, image: int) -> Arguments:
    """What transformers asks for beside the tokens since 5.3: 0 for text, 1 for images, 2 for videos."""
    import transformers

    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 3):
        return {}
    return {"mm_token_type_ids": torch.tensor([[{image: 1, video: 2}.get(token, 0) for token in tokens]])}


def clip_videos(clips: Sequence[Clip]) -> Arguments:
    """Clips of equal length as the rows of a batch."""
    return {"x": torch.stack([clip.pixels(3, 8, 8).transpose(0, 1) for clip in clips])}


def clip_rows(output: Any, clips: Sequence[Clip]) -> list[Tensor]:
    """Rows that hold a whole clip behind a class token, frame by frame."""
    return [row[1:].unflatten(0, (clip.frames, -1)) for row, clip in zip(output, clips, strict=True)]


def make_internvideo2(**settings: Any) -> nn.Module:
    """InternVideo2's bare tower; gains of 0.5 in the place of the published 1e-5, which hide a tiny model's blocks."""
    from standins.internvideo2 import PretrainVisionTransformer

    return PretrainVisionTransformer(**{"init_values": 0.5, **settings})


def make_fused_internvideo2() -> nn.Module:
    """The same with norms that take and give the residual."""
    return make_internvideo2(use_fused_rmsnorm=True)


def make_internvideo2_chat() -> nn.Module:
    """The chat model around the tower."""
    from standins.internvideo2 import InternVideo2_VideoChat2

    return InternVideo2_VideoChat2(init_values=0.5)


def internvideo2_chat_prompt(frames: int) -> Arguments:
    """A clip of so many frames in front of the text."""
    return {"input_ids": torch.tensor([[5, 6]]), "video": clip_videos([Clip(frames)])["x"]}


def make_internvideo2_chat_model() -> nn.Module:
    """InternVideo2-Chat as `load_model` puts it together."""
    from sta_adapter.internvideo.v2_config import InternVideo2ChatConfig
    from sta_adapter.internvideo.v2_model import InternVideo2Chat

    vision = {"embed_dim": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 2, "img_size": 8, "patch_size": 4}
    vision |= {"num_frames": 4, "init_values": 0.5, "sep_image_video_pos_embed": True}
    layers = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    text = {**layers, "vocab_size": 64, "num_key_value_heads": 2, "pad_token_id": 0}
    config = InternVideo2ChatConfig(vision, {**layers, "vocab_size": 16}, text, 2, 2)
    return InternVideo2Chat(config)


def internvideo2_chat_model_prompt(frames: int) -> Arguments:
    """A clip of so many frames, four tokens, and text around it."""
    clip = clip_videos([Clip(frames)])["x"].transpose(1, 2)
    return {"input_ids": torch.tensor([[1, *[65] * 4, 5, 6]]), "pixel_values_videos": clip}


def frame_pixels(clips: Sequence[Clip]) -> Arguments:
    """All frames of all clips as a batch of pictures."""
    return {"pixel_values": torch.cat([clip.pixels(3, 8, 8) for clip in clips])}


def frame_rows(output: Any, clips: Sequence[Clip]) -> list[Tensor]:
    """Rows that hold a frame behind a class token."""
    return list(output.last_hidden_state[:, 1:].split([clip.frames for clip in clips]))


def make_intern_vit() -> nn.Module:
    """InternVideo2.5's bare tower."""
    from standins.internvl_chat import InternVisionModel

    return InternVisionModel()


def make_internvl_chat() -> nn.Module:
    """InternVideo2.5-Chat."""
    from standins.internvl_chat import InternVLChatModel

    model = InternVLChatModel()
    model.img_context_token_id = 60
    return model


def internvl_chat_prompt(frames: int) -> Arguments:
    """A prompt with one clip of so many frames, one image token each."""
    tokens = [61, *[60] * frames, 62, 5, 6]
    mask = torch.ones(1, len(tokens), dtype=torch.long)
    return {**frame_pixels([Clip(frames)]), "input_ids": torch.tensor([tokens]), "attention_mask": mask}


EQUAL = ((4,), (3, 3), (1, 1), (2, 2, 2))
CASES = [
    Case("internvideo2", "internvideo2", make_internvideo2, clip_videos, clip_rows, EQUAL),
    Case("internvideo2-fused", "internvideo2", make_fused_internvideo2, clip_videos, clip_rows, EQUAL),
    Case(
        *("internvideo2-chat", "internvideo2", make_internvideo2_chat, clip_videos, clip_rows, EQUAL),
        generate=internvideo2_chat_prompt,
    ),
    Case(
        *("internvideo2_chat", "internvideo2", make_internvideo2_chat_model, clip_videos, clip_rows, EQUAL),
        generate=internvideo2_chat_model_prompt,
    ),
    Case("internvideo2_5-tower", "internvideo2_5", make_intern_vit, frame_pixels, frame_rows, tell_clips=True),
    Case(
        *("internvideo2_5", "internvideo2_5", make_internvl_chat, frame_pixels, frame_rows),
        tell_clips=True,
        generate=internvl_chat_prompt,
    ),
    Case("qwen2_vl-tower", "qwen2_vl", make_qwen2_vl_tower, qwen2_vl_arguments, merged_tokens),
    Case("qwen2_vl", "qwen2_vl", make_qwen2_vl, qwen2_vl_arguments, merged_tokens, generate=qwen2_vl_prompt),
]


def all_cases() -> list[Case]:
    """The cases of this file and of the files beside it."""
    import cases_transformers
    import cases_videorope

    return [*CASES, *cases_transformers.CASES, *cases_videorope.CASES]


def lacks(needs: str) -> pytest.MarkDecorator:
    """Skips a test where the installed transformers has no model of that name."""
    missing = bool(needs) and importlib.util.find_spec(f"transformers.models.{needs}") is None
    return pytest.mark.skipif(missing, reason=f"this release of transformers has no {needs}")


def case_parameters(condition: Callable[[Case], bool] = lambda case: True) -> list[Any]:
    """The cases that fulfil a condition, as pytest parameters."""
    return [pytest.param(case, id=case.id, marks=lacks(case.needs)) for case in all_cases() if condition(case)]
