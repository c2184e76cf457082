"""InternVideo2.5-Chat: the published encoder's numbers, and every way to tell where a clip ends."""

import contextlib
import copy
import json
import pickle

import pytest
import torch
from cases import randomize
from hypothesis import given
from hypothesis import strategies as st
from standins.internvl_chat import InternVisionModel, InternVLChatModel, Tokenizer
from test_goldens import assert_golden_gradients, load_golden_weights, read_golden, relative_error
from torch.utils.checkpoint import checkpoint

from sta_adapter import STAConfig, get_sta, inject_sta
from sta_adapter.backbones.frames import row_clips
from sta_adapter.backbones.internvideo2_5 import batch_chat_clips, sample_clips
from sta_adapter.errors import LayoutError
from sta_adapter.injection.registry import get_backbone

OPTIONS = {"max_new_tokens": 2, "do_sample": False}


def pixels(rows, seed=0):
    return torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def injected(make=InternVLChatModel, order="after_spatial"):
    """A model with random weights, STA's too, its base frozen, and its handle."""
    torch.manual_seed(0)
    model = randomize(make()).eval()
    handle = inject_sta(model, STAConfig(order=order)).freeze_base()
    for module in handle.blocks.values():
        randomize(module)
    return model, handle


class Layouts:
    """The layouts that the first block's branch sees."""

    def __init__(self, handle):
        self.seen = []
        handle.blocks[0].register_forward_pre_hook(lambda module, args: self.seen.append(args[1].clips))


@pytest.fixture
def chat():
    model, handle = injected()
    model.layouts = Layouts(handle).seen
    return model


def golden_tower():
    header, tensors = read_golden("internvideo2_5_after")
    tower = InternVisionModel(**json.loads(header["vision_config"])).eval()
    tower.load_state_dict({k.removeprefix("base."): v for k, v in tensors.items() if k.startswith("base.")})
    return tower, tensors


@pytest.mark.parametrize("how", ["handle.clips", "clip_lengths"])
def test_golden_output_and_gradients(how):
    tower, tensors = golden_tower()
    rows, lengths = tensors["pixel_values"], tensors["clip_lengths"].tolist()
    assert relative_error(tower(rows).last_hidden_state, tensors["base_output"]) <= 1e-5
    handle = inject_sta(tower)
    assert handle.backbone == "internvideo2_5"
    assert {module.num_heads for module in handle.blocks.values()} == {1}
    load_golden_weights(handle, tensors)
    one_clip = tower(rows).last_hidden_state
    if how == "clip_lengths":
        output = tower(rows, clip_lengths=lengths).last_hidden_state
    else:
        with handle.clips(lengths):
            output = tower(rows).last_hidden_state
    assert relative_error(output, tensors["sta_output"]) <= 1e-4
    assert relative_error(one_clip, tensors["sta_output"]) > 1e-3
    output.square().mean().backward()
    assert_golden_gradients(handle, tensors)


@pytest.mark.parametrize("lengths", [[4], [4, 5], [9]])
def test_rows_that_do_not_add_up(lengths):
    tower, handle = injected(InternVisionModel)
    before = tower(pixels(8)).last_hidden_state
    with (
        pytest.raises(LayoutError, match=r"got 8 rows, one a frame, but the clips .* must add up"),
        handle.clips(lengths),
    ):
        tower(pixels(8))
    with pytest.raises(LayoutError, match="got 8 rows"):
        tower(pixels(8), clip_lengths=lengths)
    assert torch.equal(tower(pixels(8)).last_hidden_state, before)


@pytest.mark.parametrize("lengths", [[0, 8], [4.5, 3.5], "44", 8, [], [-1, 9]])
def test_lengths_that_are_no_lengths(lengths):
    tower, handle = injected(InternVisionModel)
    with pytest.raises(LayoutError, match="whole numbers above 0"):
        tower(pixels(8), clip_lengths=lengths)
    with pytest.raises(LayoutError, match="whole numbers above 0"):
        handle.clips(lengths)


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 3)), min_size=1, max_size=5), st.integers(1, 9))
def test_row_clips_hold_every_row_once(clips, positions):
    rows = sum(frames * tiles for frames, tiles in clips)
    layout = row_clips(rows, positions, clips, prefix=1)
    assert layout.num_tokens == rows * positions
    assert [frames for frames, _ in layout.clips] == [frames for frames, _ in clips]
    assert row_clips(rows, positions, None, must_be_told=False).clips == ((rows, positions),)
    with pytest.raises(LayoutError, match="must add up"):
        row_clips(rows + 1, positions, clips)


def test_wrong_pixels():
    tower, _ = injected(InternVisionModel)
    with pytest.raises(LayoutError, match=r"shape \(8, 3, 8\); expected \(frames, channels"):
        tower(pixels(8)[..., 0])
    with pytest.raises(LayoutError, match="called without pixel_values"):
        tower()


def test_embedded_pixels():
    tower, handle = injected(InternVisionModel)
    embedded = tower.embeddings(pixels(4))
    with handle.clips([2, 2]):
        assert torch.equal(tower(pixel_embeds=embedded).last_hidden_state, tower(pixels(4)).last_hidden_state)


@pytest.mark.parametrize("order", ["after_spatial", "before_spatial"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["re-entrant", "non-re-entrant"])
def test_gradients_under_the_encoders_own_checkpointing(order, reentrant):
    tower, handle = injected(InternVisionModel, order)
    tower.encoder.use_reentrant = reentrant

    def gradients():
        losses = []
        for lengths in ([4, 4], [1], [2, 3]):
            losses.append(tower(pixels(sum(lengths)), clip_lengths=lengths).last_hidden_state.square().mean())
        handle.encoder.zero_grad()
        for loss in losses:
            loss.backward()
        return [p.grad.clone() for p in handle.parameters()]

    expected = gradients()
    tower.train()
    for found, wanted in zip(gradients(), expected, strict=True):
        assert (found - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("reentrant", [True, False], ids=["re-entrant", "non-re-entrant"])
def test_what_was_told_is_over_when_a_checkpoint_runs_the_whole_encoder_again(reentrant):
    """All rows were taken for one clip there, so that the gradients were those of another forward."""
    tower, handle = injected(InternVisionModel)

    def gradients(checkpointed, **told):
        handle.encoder.zero_grad()
        rows, call = pixels(8).requires_grad_(), lambda rows: tower(rows, **told).last_hidden_state
        with contextlib.nullcontext() if told else handle.clips([4, 4]):
            out = checkpoint(call, rows, use_reentrant=reentrant) if checkpointed else call(rows)
        out.square().mean().backward()
        return [p.grad.clone() for p in handle.parameters()]

    expected = gradients(checkpointed=False)
    with pytest.raises(LayoutError, match=r"what was told of its clips is over\. Checkpoint its blocks"):
        gradients(checkpointed=True)
    for found, wanted in zip(gradients(checkpointed=True, clip_lengths=[4, 4]), expected, strict=True):
        assert (found - wanted).norm() <= 1e-5 * wanted.norm()


FRAMES = "Frame1: <image>\nFrame2: <image>\nFrame3: <image>\nFrame4: <image>\n"
KNOWN = {
    "a video behind one placeholder": (8, "<image>\nWhat?", None, [(8, 4)]),
    "a video without a placeholder": (8, "What?", None, [(8, 4)]),
    "one entry": (8, "<image> What?", [8], [(8, 4)]),
    "a picture": (1, "<image> What?", [1], [(1, 4)]),
    "labelled frames": (4, FRAMES + "What?", [1] * 4, [(4, 4)]),
    "labelled frames of tiles": (12, FRAMES + "What?", [3] * 4, [(4, 12)]),
    "one labelled frame of tiles": (3, "Frame1: <image>", [3], [(1, 12)]),
    "labels by the sampled frame": (3, "frame 3 <image> frame 17 <image> frame 40 <image>", [1] * 3, [(3, 4)]),
    "two labelled videos": (6, FRAMES + "And: Frame1: <image>\nFrame2: <image>", [1] * 6, [(4, 4), (2, 4)]),
    "two videos": (8, "First <image> then <image>. Same?", [5, 3], [(5, 4), (3, 4)]),
}


@pytest.mark.parametrize(("rows", "question", "patches", "expected"), KNOWN.values(), ids=KNOWN.keys())
def test_chat_tells_the_clips(chat, rows, question, patches, expected):
    chat.chat(Tokenizer(), pixels(rows), question, OPTIONS, num_patches_list=patches)
    assert chat.layouts == [tuple(expected)]


def test_chat_counts_the_history(chat):
    history = [(FRAMES + "What?", "A ball.")]
    chat.chat(Tokenizer(), pixels(6), "Frame1: <image> Frame2: <image>", OPTIONS, history, [1] * 6)
    assert chat.layouts == [((4, 4), (2, 4))]


UNKNOWN = {
    "two pictures": (2, "<image>\n<image>\nWhat differs?", [1, 1], "can't be known: 2 <image>"),
    "numbered pictures": (2, "Image-1: <image>\nImage-2: <image>", [1, 1], r"clip_lengths=\[...\] or handle.clips"),
    "picture and video": (9, "<image>\n<image>\nWhere?", [1, 8], "can't be known"),
    "frames and a picture": (5, FRAMES + "<image>", [1] * 5, "can't be known"),
    "frames of unequal tiles": (5, FRAMES, [1, 2, 1, 1], r"have \[1, 2, 1, 1\] tiles; .*max_num=1"),
}


@pytest.mark.parametrize(("rows", "question", "patches", "message"), UNKNOWN.values(), ids=UNKNOWN.keys())
def test_chat_raises_where_the_clips_are_unknown(chat, rows, question, patches, message):
    with pytest.raises(LayoutError, match=message):
        chat.chat(Tokenizer(), pixels(rows), question, OPTIONS, num_patches_list=patches)
    chat.chat(Tokenizer(), pixels(rows), question, OPTIONS, num_patches_list=patches, clip_lengths=[1] * rows)
    with get_sta(chat).clips([rows]):
        chat.chat(Tokenizer(), pixels(rows), question, OPTIONS, num_patches_list=patches)
    assert chat.layouts == [((1, 4),) * rows, ((rows, 4),)]
    with get_sta(chat).disabled():
        chat.chat(Tokenizer(), pixels(rows), question, OPTIONS, num_patches_list=patches)


def test_batch_chat_has_a_clip_a_question(chat):
    batch = chat.batch_chat(
        Tokenizer(), pixels(8), ["What?", "Who is it?", "Why?"], OPTIONS, num_patches_list=[5, 0, 3]
    )
    assert chat.layouts == [((5, 4), (3, 4))]
    alone = chat.batch_chat(Tokenizer(), pixels(8)[:5], ["What?"], OPTIONS, num_patches_list=[5])
    assert batch.shape[0] == 3
    assert alone.shape[0] == 1


@pytest.mark.parametrize("name", ["num_patches_list", "image_counts"])
def test_batch_chat_tells_its_clips_by_itself(chat, name):
    assert batch_chat_clips(chat, {"pixel_values": pixels(8), name: [5, 0, 3]}) == (5, 3)
    assert batch_chat_clips(chat, {"pixel_values": None, name: [5, 0, 3]}) is None
    assert batch_chat_clips(chat, {"pixel_values": pixels(8)}) is None


def test_text_alone(chat):
    chat.chat(Tokenizer(), None, "What?", OPTIONS)
    assert chat.layouts == []


def prompt(*samples):
    """(input_ids, attention_mask) of samples, each a list of rows behind its placeholders."""
    return Tokenizer()(
        [" ".join(f"<img> {'<IMG_CONTEXT> ' * n}</img>" for n in sample) + " What is it?" for sample in samples]
    )


@pytest.mark.parametrize("method", ["forward", "generate"])
def test_forward_and_generate_count_image_tokens(chat, method):
    call = chat if method == "forward" else chat.generate
    ids, mask = prompt([5], [3])
    chat.img_context_token_id = None
    with pytest.raises(LayoutError, match="8 rows for 2 samples whose image tokens aren't known"):
        call(pixel_values=pixels(8), input_ids=ids, attention_mask=mask)
    chat.img_context_token_id = Tokenizer().convert_tokens_to_ids("<IMG_CONTEXT>")
    call(pixel_values=pixels(8), input_ids=ids, attention_mask=mask)
    assert chat.layouts.pop() == ((5, 4), (3, 4))
    assert sample_clips(chat, {"pixel_values": pixels(8), "input_ids": ids, "visual_features": pixels(8)}) is None
    chat.num_image_token = 4
    with pytest.raises(LayoutError, match=r"2 rows for samples with \[1, 1\] runs of \[5, 3\] tokens"):
        call(pixel_values=pixels(2), input_ids=ids, attention_mask=mask)
    chat.num_image_token = 1
    ids, mask = prompt([1, 1])
    with pytest.raises(LayoutError, match=r"samples with \[2\] runs"):
        call(pixel_values=pixels(2), input_ids=ids, attention_mask=mask)
    call(pixel_values=pixels(2), input_ids=ids, attention_mask=mask, clip_lengths=[1, 1])
    assert chat.layouts.pop() == ((1, 4), (1, 4))
    with get_sta(chat).clips([2]):
        call(pixel_values=pixels(2), input_ids=ids, attention_mask=mask)
    assert chat.layouts == [((2, 4),)]


def test_text_samples_of_a_training_batch(chat):
    chat.img_context_token_id = 60
    ids, mask = Tokenizer()(["What is it?", "Who?"])
    chat(pixels(2), ids, mask, image_flags=torch.zeros(2, 1, dtype=torch.long))
    assert chat.layouts == [((1, 4), (1, 4))]


def test_what_a_call_told_is_forgotten_after_it(chat):
    chat.img_context_token_id = 60
    ids, mask = prompt([5], [3])
    chat(pixels(8), ids, mask, clip_lengths=[4, 4])
    with pytest.raises(LayoutError, match="got 8 rows"):
        chat(pixels(8), ids, mask, clip_lengths=[4, 5])
    with pytest.raises(TypeError, match="nonsense"):
        chat(pixels(8), ids, mask, nonsense=1)
    with pytest.raises(TypeError, match="nonsense"):
        chat.chat(nonsense=1)
    with pytest.raises(LayoutError, match="can't be known: the 8 rows of InternVLChatModel"):
        chat.extract_feature(pixels(8))
    chat.vision_model(pixels(8))
    assert chat.layouts == [((4, 4), (4, 4)), ((8, 4),)]


def test_a_call_past_the_hooks_is_told_its_clips_or_refused(chat):
    """`model.forward(...)`, as PEFT before 0.19 calls it, runs no hook of the model: all rows were taken for one clip."""
    chat.img_context_token_id = 60
    ids, mask = prompt([5], [3])
    with pytest.raises(LayoutError, match=r"the 8 rows of InternVLChatModel's pixel_values .*handle\.clips"):
        chat.forward(pixels(8), ids, mask)
    with get_sta(chat).clips([5, 3]):
        past = chat.forward(pixels(8), ids, mask).logits
    chat.extract_feature(pixels(8), clip_lengths=[5, 3])
    assert torch.equal(past, chat(pixels(8), ids, mask).logits)
    chat.extract_feature(pixels(1))
    with get_sta(chat).disabled():
        chat.extract_feature(pixels(8))
    assert chat.layouts == [((5, 4), (3, 4))] * 3 + [((1, 4),)]


def test_clip_lengths_are_taken_away_when_sta_is_off(chat):
    tower = chat.vision_model
    get_sta(chat).disable()
    base = tower(pixels(4)).last_hidden_state
    assert torch.equal(tower(pixels(4), clip_lengths=[2, 2]).last_hidden_state, base)
    chat.chat(Tokenizer(), pixels(2), "<image> <image>", OPTIONS, num_patches_list=[1, 1], clip_lengths=[1, 1])
    assert chat.layouts == []


def test_remove_takes_the_methods_away(chat):
    del chat.layouts
    before = InternVLChatModel().__dict__.keys()
    assert {"chat", "batch_chat", "generate"} <= chat.__dict__.keys() - before
    get_sta(chat).remove()
    assert chat.__dict__.keys() == before
    chat.chat(Tokenizer(), pixels(2), "<image> <image>", OPTIONS, num_patches_list=[1, 1])


def test_a_method_of_the_instance_is_kept():
    model = InternVLChatModel()
    model.chat = lambda *args, **kwargs: "mine"
    handle = inject_sta(model)
    assert model.chat(Tokenizer(), pixels(2), "What?", OPTIONS) == "mine"
    handle.remove()
    assert model.chat() == "mine"


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_tells_its_own_encoder(duplicate):
    model, handle = injected()
    twin = duplicate(model)
    question = (Tokenizer(), pixels(8), "First <image> then <image>?", OPTIONS, None, [5, 3])
    handle.remove()
    model.chat(*question)
    seen = Layouts(get_sta(twin)).seen
    twin.chat(*question)
    assert seen == [((5, 4), (3, 4))]
    get_sta(twin).remove()
    assert "chat" not in twin.__dict__


def test_lora_recipe_and_chat_of_a_peft_model():
    peft = pytest.importorskip("peft")
    model, handle = injected()
    wrapped = peft.get_peft_model(model, handle.lora_config())
    adapted = {n.split(".lora_A")[0] for n, _ in wrapped.named_modules() if n.endswith(".lora_A")}
    assert sum("vision_model" in n for n in adapted) == 8
    assert sum("language_model" in n for n in adapted) == 7
    assert not any(".sta" in n for n in adapted)
    seen = Layouts(get_sta(wrapped)).seen
    wrapped.chat(Tokenizer(), pixels(8), "First <image> then <image>?", OPTIONS, None, [5, 3])
    wrapped(pixel_values=pixels(2), input_ids=prompt([1, 1])[0], clip_lengths=[1, 1])
    assert seen == [((5, 4), (3, 4)), ((1, 4), (1, 4))]


def test_dummy_inputs_run_every_block():
    model, handle = injected(InternVisionModel)
    args, kwargs = get_backbone("internvideo2_5").dummy_inputs(model)
    model(*args, **kwargs).last_hidden_state.sum().backward()
    assert all(p.grad is not None for p in handle.parameters())
