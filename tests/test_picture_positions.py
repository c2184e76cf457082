"""Where a position stands on the picture: found out from the encoders and the processor themselves."""

import contextlib

import numpy as np
import pytest
import torch
from cases import Clip, case_parameters, clips_of

from sta_adapter import get_sta, inject_sta
from sta_adapter.backbones.qwen2_vl import merged_positions
from sta_adapter.data.chat_encoding import encode_prompt
from sta_adapter.data.message import Visual
from sta_adapter.demo import TINY_BASE
from sta_adapter.loading import load_processor
from sta_adapter.visualization import observe


def told(handle, case, clips):
    return handle.clips([c.frames for c in clips]) if case.tell_clips else contextlib.nullcontext()


@pytest.mark.parametrize(
    ("rows", "columns", "merge", "window", "expected"),
    [
        (2, 3, 1, 0, [[0, 1, 2], [3, 4, 5]]),
        (2, 4, 2, 0, [[0, 1, 4, 5], [2, 3, 6, 7]]),
        (3, 3, 1, 2, [[0, 1, 4], [2, 3, 5], [6, 7, 8]]),
    ],
    ids=["rows", "merged", "windows"],
)
def test_merged_positions(rows, columns, merge, window, expected):
    assert merged_positions(rows, columns, merge, window).tolist() == expected


def rotary_of(seen):
    """Angles (tokens, 2, D) that an encoder of Qwen2-VL's kind gives its first block: of rows and of columns."""
    cos = seen["position_embeddings"][0]
    half = cos.shape[-1] // 2
    return cos[:, :half].unflatten(1, (2, -1))


@pytest.mark.parametrize(
    "case",
    case_parameters(
        lambda case: (
            case.backbone in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "video_llama_3") and case.generate is None
        )
    ),
)
def test_positions_are_those_of_the_encoders_own_rotary_embedding(case, monkeypatch):
    """Rows and columns that the encoder itself gives a token: found out from the embedding that its first block gets."""
    model = case.make()
    handle = inject_sta(model)
    encoder, seen = case.encoder(model), {}
    blocks = encoder.get_submodule(handle._injection.spec.blocks)
    blocks[0].register_forward_pre_hook(lambda m, args, kwargs: seen.update(kwargs), with_kwargs=True)
    get_sta(model).model = encoder
    for rows, columns in ((8, 10), (4, 6), (2, 4)):  # whole windows and cut ones, where there are windows
        monkeypatch.setattr("cases.GRIDS", ((rows, columns),))
        clips = [Clip(2)]
        with told(handle, case, clips):
            positions = torch.from_numpy(observe(handle, case.arguments(clips)).positions)
        assert positions.shape == (rows, columns)
        if "position_embeddings" not in seen:
            pytest.skip("this release hands its blocks other embeddings")
        down, across = rotary_of(seen)[positions].unbind(2)  # each (rows, columns, D)
        frequencies = torch.acos(down[1, 0].clamp(-1, 1))
        for row in range(rows):
            expected = torch.cos(row * frequencies).expand(columns, -1)
            assert torch.allclose(down[row], expected, atol=1e-4)
        for column in range(columns):
            expected = torch.cos(column * frequencies).expand(rows, -1)
            assert torch.allclose(across[:, column], expected, atol=1e-4)


def is_row_case(case):
    return case.id in ("internvideo2", "internvideo2_5-tower", "internvl-tower", "clip", "siglip", "dinov2")


@pytest.mark.parametrize("case", case_parameters(is_row_case))
def test_positions_are_where_a_changed_patch_is_seen(case):
    """A patch of the picture is changed, and the token that differs in front of the first block is looked up."""
    model = case.make()
    handle = inject_sta(model)
    encoder, seen = case.encoder(model), []
    blocks = encoder.get_submodule(handle._injection.spec.blocks)
    next(iter(blocks)).register_forward_pre_hook(lambda m, args: seen.append(args[0].detach().clone()))
    get_sta(model).model = encoder
    clips = clips_of(2)
    with told(handle, case, clips), torch.no_grad():
        arguments = case.arguments(clips)
        found = observe(handle, arguments)
        name, pixels = next((k, v) for k, v in arguments.items() if isinstance(v, torch.Tensor) and v.dim() >= 4)
        rows, columns = found.positions.shape
        down, across = (size // count for size, count in zip(pixels.shape[-2:], (rows, columns), strict=True))
        for row, column in [(0, 0), (0, columns - 1), (rows - 1, 0), (rows // 2, columns // 2)]:
            changed = pixels.clone()
            changed[..., row * down : (row + 1) * down, column * across : (column + 1) * across] += 1
            seen.clear()
            encoder(**{**arguments, name: pixels})
            encoder(**{**arguments, name: changed})
            differs = (seen[0] != seen[1]).any(-1)
            tokens = differs[
                ..., differs.shape[-1] - (found.crossing.shape[-1] * (2 if differs.shape[0] == 1 else 1)) :
            ]
            assert tokens.reshape(2, -1).nonzero()[:, 1].unique().tolist() == [found.positions[row, column]]


def test_positions_fit_the_processor_of_qwen2_vl():
    """From the pixels of a frame to its token: the processor's order of patches is the one that is declared."""
    processor = load_processor(TINY_BASE)
    frames = np.zeros((4, 32, 64, 3), np.uint8)
    frames[2, 8:16, 40:48] = 255  # frame 2, row 1, column 5 of patches of 8 pixels
    fps = {"fps": 1, "total_num_frames": 4, "frames_indices": [0, 1, 2, 3], "duration": 4.0}
    parts = [{"type": "video", "video": ""}, {"type": "text", "text": "What?"}]
    visual = Visual("video", frames, fps, resized=True)
    encoded = encode_prompt(processor, [{"role": "user", "content": parts}], [[visual]])
    assert encoded["video_grid_thw"].tolist() == [[4, 4, 8]]
    brightest = encoded["pixel_values_videos"].view(4, 32, -1).mean(-1)
    assert brightest.argmax() == 2 * 32 + merged_positions(4, 8, 2)[1, 5]


def test_positions_that_cant_be_known_are_not_guessed():
    from standins.internvl_chat import InternVisionModel

    encoder = InternVisionModel()
    handle = inject_sta(encoder)
    with handle.clips([2]):
        whole = observe(handle, {"pixel_values": torch.zeros(2, 3, 8, 8)})
    assert whole.positions is not None
    with handle._injection.clips(((2, 2),)):  # each frame cut into two tiles
        tiled = observe(handle, {"pixel_values": torch.zeros(4, 3, 8, 8)})
    assert tiled.positions is None
    assert "several tiles" in tiled.no_picture
