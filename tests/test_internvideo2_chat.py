"""InternVideo2-Chat from published names and weights: the numbers are those of the published code (see internvideo2_chat.py)."""

import copy
import json

import pytest
import torch
from internvideo2_chat import (
    CLIPS,
    CONFIG,
    HISTORY,
    INSTRUCTION,
    MIXED,
    NEW_TOKENS,
    QUESTION,
    clips,
    prompts,
    read_golden,
    tokenizer,
    write_folder,
)
from test_goldens import read_golden as read_encoder_golden
from test_goldens import relative_error

from sta_adapter.errors import CheckpointError
from sta_adapter.internvideo.v2_encoder_loading import load_encoder
from sta_adapter.internvideo.v2_loading import load_model
from sta_adapter.internvideo.v2_prompt import prompt_tokens

GREEDY = {"do_sample": False, "max_new_tokens": NEW_TOKENS}


@pytest.fixture(scope="module")
def golden():
    return read_golden()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(folder, CONFIG)


@pytest.fixture(scope="module")
def logits(loaded):
    """Those of a batch's last tokens, computed in float64: in float32 they differ between machines by more than the golden's error."""
    wide = copy.deepcopy(loaded).double()

    @torch.no_grad()
    def of(batch):
        return wide(**{key: x.double() if x.is_floating_point() else x for key, x in batch.items()}).logits[:, -6:]

    return of


def padded(rows):
    """(input_ids, attention_mask) of rows of ids, padded on the left."""
    longest = max(map(len, rows))
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return torch.tensor([[0] * (longest - len(row)) + row for row in rows]), mask


@pytest.mark.parametrize("name", CLIPS)
@torch.no_grad()
def test_what_the_language_model_reads_of_clips(loaded, golden, name):
    assert relative_error(loaded.encode(clips(name)), golden[f"{name}/embeddings"]) <= 1e-5


@torch.no_grad()
def test_an_instruction_for_the_q_former(loaded, golden):
    found = loaded.encode(clips("three tiles of 8"), INSTRUCTION)
    assert relative_error(found, golden["three tiles of 8/instructed"]) <= 1e-5
    assert relative_error(found, golden["three tiles of 8/embeddings"]) > 1e-2


@torch.no_grad()
def test_clips_of_unequal_lengths_in_one_call(loaded, golden):
    names = ("one clip of 12", "two clips of 16", "one clip of 8")
    rows = [clip for name in names for clip in clips(name)]
    filled = torch.stack(
        [torch.nn.functional.pad(row, (0,) * 7 + (16 - len(row),), value=float("nan")) for row in rows]
    )
    expected = torch.cat([golden[f"{name}/embeddings"] for name in names])
    assert relative_error(loaded.encode(filled), expected) <= 1e-5


@pytest.mark.parametrize("name", ["one clip of 8", "two clips of 16", "one clip of 64", "three tiles of 8"])
@torch.no_grad()
def test_logits_and_greedy_tokens(loaded, logits, golden, name):
    text = tokenizer()
    ids, mask = padded([prompt_tokens(text, f"<s>{prompt}", loaded.config) for prompt in prompts(name)])
    batch = {"input_ids": ids, "attention_mask": mask, "pixel_values_videos": clips(name)}
    assert relative_error(logits(batch), golden[f"{name}/logits"]) <= 1e-5
    out = loaded.generate(**batch, **GREEDY)
    assert torch.equal(out[:, : ids.shape[1]], ids)
    assert torch.equal(out[:, ids.shape[1] :], golden[f"{name}/tokens"])


@torch.no_grad()
def test_pictures_and_a_clip_in_one_sample(loaded, logits, golden):
    ids = torch.tensor([prompt_tokens(tokenizer(), MIXED, loaded.config)])
    batch = {
        "input_ids": ids,
        "pixel_values_videos": clips("one clip of 8"),
        "pixel_values": clips("two pictures")[:, 0],
    }
    assert relative_error(logits(batch), golden["mixed/logits"]) <= 1e-5
    assert torch.equal(loaded.generate(**batch, **GREEDY)[:, ids.shape[1] :], golden["mixed/tokens"])


@pytest.mark.parametrize(("name", "kind"), [("one clip of 8", "video"), ("two pictures", "image")])
def test_chat(loaded, golden, name, kind):
    said, history = loaded.chat(
        *(tokenizer(), "Taken at 1, 2 s. ", QUESTION, kind, clips(name)[0], "Look closely.", HISTORY, True, GREEDY)
    )
    assert said.encode() == bytes(golden[f"{name}/chat"].tolist())
    assert history == [*HISTORY, (QUESTION, said)]


@pytest.mark.parametrize("size", [(8, 4, 3), (3, 4, 3), (1, 4, 3), (3, 2, 2)])
@torch.no_grad()
def test_positions_are_stretched_over_time_and_over_the_picture(loaded, size):
    """As one picture after the other would be, between the frames that the encoder was made for."""
    encoder = loaded.vision_encoder
    table = (encoder.img_pos_embed if size[0] == 1 else encoder.pos_embed)[0]
    frames, rows, columns = (
        1 if size[0] == 1 else encoder.patch_embed.grid_size[0],
        *encoder.patch_embed.grid_size[1:],
    )
    cells = table[1:].unflatten(0, (frames, rows * columns)).permute(1, 2, 0)
    cells = torch.nn.functional.interpolate(cells, size=size[0], mode="linear")
    pictures = cells.unflatten(0, (rows, columns)).permute(3, 2, 0, 1)
    pictures = torch.nn.functional.interpolate(pictures, size=size[1:], mode="bicubic")
    expected = torch.cat([table[:1], pictures.permute(0, 2, 3, 1).flatten(0, 2)])[None]
    torch.testing.assert_close(encoder.positions(*size), expected)


@pytest.mark.parametrize("layout", ["stage 1", "stage 2", "trained in parallel"])
def test_the_encoder_by_itself(tmp_path, layout):
    """From checkpoints that spell its weights otherwise, or have other parts; output as of the published code."""
    header, tensors = read_encoder_golden("internvideo2_after")
    settings = json.loads(header["kwargs"])
    weights = {key.removeprefix("base."): kept for key, kept in tensors.items() if key.startswith("base.")}
    if layout == "stage 2":
        scaled = {name: f"{name}.gamma" if name.endswith(("ls1", "ls2")) else name for name in weights}
        weights = {f"vision_encoder.{scaled[name]}": kept for name, kept in weights.items()}
        weights |= {
            "text_encoder.cls_token": torch.zeros(3),
            "vision_encoder.clip_projector.norm1_q.weight": torch.ones(3),
        }
    if layout == "trained in parallel":
        weights = {"module": {f"module.{name}": kept for name, kept in weights.items()}}
    torch.save(weights, tmp_path / "encoder.pt")
    size = {"num_heads": settings["num_heads"], "img_size": settings["img_size"]}
    encoder = load_encoder(tmp_path / "encoder.pt", **size)
    with torch.no_grad():
        assert relative_error(encoder(tensors["pixel_values"]), tensors["base_output"]) <= 1e-5
    with pytest.raises(CheckpointError, match=r"heads are known for 1408, 3200 \(1B, 6B\)\. Give num_heads"):
        load_encoder(tmp_path / "encoder.pt", img_size=settings["img_size"])
    with pytest.raises(CheckpointError, match="no whole number of frames"):
        load_encoder(tmp_path / "encoder.pt", num_heads=4, img_size=10 * settings["img_size"])


def test_a_file_without_an_encoder(tmp_path):
    torch.save({"text_encoder.weight": torch.zeros(2)}, tmp_path / "text.pt")
    with pytest.raises(CheckpointError, match="no InternVideo2 encoder: cls_token is missing among 1 weights"):
        load_encoder(tmp_path / "text.pt")
