"""InternVideo2.5-Chat from the published layout: JSON Lines to losses, adapters and answers, STA, LoRA, and what is refused."""

import json
import shutil
import warnings

import internvideo2_5_chat as tiny
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from qwen2_vl_prompts import OF_SAVED
from safetensors.torch import load_file, save_file
from standins.internvl_chat import InternVisionModel
from test_internvideo2_5 import Layouts
from tiny_qwen import moving_square, write_video

from sta_adapter import get_sta, inject_sta, load_sta
from sta_adapter.adapter.lora_peft import has_other_vocabulary
from sta_adapter.cli import cli
from sta_adapter.data import Collator, FrameSettings, VideoDataset
from sta_adapter.data.conversation import parse_sample
from sta_adapter.errors import CheckpointError, ConfigError, DataError, LayoutError, STAWarning
from sta_adapter.internvideo.internlm2_tokenizer import load_tokenizer
from sta_adapter.internvideo.v2_5_config import NEW_ROPE, from_published
from sta_adapter.internvideo.v2_5_images import InternVideo2_5ImageProcessor
from sta_adapter.internvideo.v2_5_processor import InternVideo2_5Processor
from sta_adapter.internvideo.v2_5_prompt import conversation
from sta_adapter.loading import load_model, load_processor
from sta_adapter.training.contexts import activation_checkpointing
from sta_adapter.video.sampling import Sampling, choose_frames


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return tiny.save_published(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def base(published, tmp_path_factory):
    """A folder as `save_pretrained` writes it, with the tiny model's own numbers of tokens."""
    folder = tmp_path_factory.mktemp("saved") / "base"
    tiny.tiny(load_model(published, dtype="fp32", device="cpu")).save_pretrained(folder)
    processor = load_processor(published)
    processor.image_seq_length = tiny.ROW_TOKENS
    processor.image_processor.max_tiles = 3
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def processor(base):
    return load_processor(base)


@pytest.fixture
def model(base):
    return load_model(base, dtype="fp32", device="cpu")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    write_video(folder / "short.mp4", moving_square("left", count=24))
    write_video(folder / "long.mp4", moving_square("right", size=24, count=56))
    for name, size in (("square", (16, 16)), ("wide", (48, 16))):
        Image.effect_noise(size, 200).convert("RGB").save(folder / f"{name}.png")
    return folder


def clip(name, **how):
    return {"type": "video", "video": f"{name}.mp4", **how}


def picture(name):
    return {"type": "image", "image": f"{name}.png"}


def record(*content, answer="left", **more):
    user = {"role": "user", "content": [*content, {"type": "text", "text": "Which way?"}]}
    return {"messages": [user, {"role": "assistant", "content": answer}], **more}


def encoded(processor, folder, *lines, **options):
    samples = [parse_sample(line, folder=folder) for line in lines]
    data = VideoDataset(samples, processor, frames=FrameSettings(), on_bad_sample="error", **options)
    return [data[index] for index in range(len(samples))]


def trained(model):
    """The model's handle, with STA that does something."""
    handle = inject_sta(model)
    torch.manual_seed(1)
    for parameter in handle.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return handle


MIXED = [clip("short", nframes=8), picture("wide"), clip("long", nframes=5)]


def test_a_prompt_is_what_chat_writes(model, processor, clips):
    (item,) = encoded(processor, clips, record(clip("short", nframes=8)), prompts=True)
    model.generate = lambda **inputs: seen.append(inputs) or inputs["input_ids"]
    seen = []
    question = "".join(f"Frame{number}: <image>\n" for number in range(1, 9)) + "Which way?"
    model.chat(processor, item["pixel_values"], question, {}, num_patches_list=[1] * 8)
    assert item["input_ids"].tolist() == seen[0]["input_ids"][0].tolist()
    assert item["clip_lengths"].tolist() == [8]


def test_clips_and_pictures_are_filled_up_to_whole_groups(processor, clips):
    (item,) = encoded(processor, clips, record(*MIXED))
    assert item["clip_lengths"].tolist() == [8, 1, 1, 1, 1, 8]
    assert item["pixel_values"].shape == (20, 3, 112, 112)
    torch.testing.assert_close(item["pixel_values"][-1], item["pixel_values"][-4], rtol=0, atol=0)
    assert int((item["input_ids"] == tiny.CONTEXT).sum()) == 20 * tiny.ROW_TOKENS
    assert processor.tokenizer.decode(item["labels"][item["labels"] != -100]) == "left<|im_end|>"


def test_several_clips_of_a_sample_are_told_by_the_batch_itself(model, processor, clips):
    handle = trained(model)
    layouts = Layouts(handle)
    items = encoded(processor, clips, record(*MIXED), record(clip("long", nframes=4)), record())
    batch = Collator.of(processor, on_bad_sample="error")(items)
    batch.pop("bad_samples")
    with torch.no_grad():
        model(**batch)
        model.generate(**{k: v for k, v in batch.items() if k != "labels"}, max_new_tokens=1, pad_token_id=tiny.EOS)
    one = tuple((rows, 64) for rows in (8, 1, 1, 1, 1, 8, 4))
    assert layouts.seen == [one, one]


def test_a_batch_is_its_samples(model, processor, clips):
    trained(model)
    lines = [record(*MIXED), record(clip("long", nframes=4), answer="right"), record(picture("square")), record()]
    items = encoded(processor, clips, *lines)

    def loss(*some):
        batch = Collator.of(processor, on_bad_sample="error")(some)
        batch.pop("bad_samples")
        learned = int((batch["labels"] != -100).sum())
        with torch.no_grad():
            return float(model(**batch).loss) * learned

    assert loss(*items) == pytest.approx(sum(map(loss, items)), rel=1e-4)


def test_frames_reach_each_other_within_a_clip_alone(model, processor, clips):
    trained(model)
    (item,) = encoded(processor, clips, record(clip("short", nframes=8), clip("long", nframes=8)))
    changed = item["pixel_values"].clone()
    changed[0] += 1
    with torch.no_grad(), get_sta(model).clips(item["clip_lengths"].tolist()):
        before = model.vision_model(item["pixel_values"]).last_hidden_state
        after = model.vision_model(changed).last_hidden_state
    moved = (before - after).abs().amax((1, 2)) > 0
    assert moved.tolist() == [True] * 8 + [False] * 8


def test_a_forward_that_is_run_past_the_hooks_is_told_its_clips(model):
    """PEFT before 0.19 runs the model's so, with task_type="CAUSAL_LM"."""
    layouts = Layouts(trained(model))
    (ids, mask), rows = tiny.prompts("batch"), tiny.pixels(12)
    inputs = {"pixel_values": rows, "input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        expected = model(**inputs, clip_lengths=[8, 4]).logits
        found = model.forward(**inputs, clip_lengths=[8, 4]).logits
        with pytest.raises(LayoutError, match="can't be known: 12 rows for samples"):
            model.forward(**inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert layouts.seen == [((8, 64), (4, 64))] * 2


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"do_sample": True, "top_k": 5}, {"use_cache": False}, {}])
def test_generate(model, processor, clips, how):
    items = encoded(processor, clips, record(clip("short", nframes=8)), record(clip("long", nframes=4)), prompts=True)
    batch = Collator.of(processor, side="left")(items)
    inputs = {key: value for key, value in batch.items() if key != "bad_samples"}
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": tiny.EOS, "do_sample": False, **how}
    torch.manual_seed(0)
    said = model.generate(**inputs, **options)
    assert said.shape == (2, inputs["input_ids"].shape[1] + 6)
    if not how.get("do_sample"):
        alone = model.generate(**{**items[1], "input_ids": items[1]["input_ids"][None]}, **options)
        assert alone[0, -6:].tolist() == said[1, -6:].tolist()
    if how == {"use_cache": False}:
        assert said.tolist() == model.generate(**inputs, **{**options, "use_cache": True}).tolist()


def test_saved_and_loaded_it_computes_the_same(published, base):
    first, second = tiny.tiny(load_model(published, dtype="fp32", device="cpu")), load_model(base, dtype="fp32")
    (ids, mask), rows = tiny.prompts("one_clip"), tiny.pixels(8)
    with torch.no_grad():
        torch.testing.assert_close(
            first(rows, ids, mask).logits, second(rows, ids, mask).logits, rtol=OF_SAVED, atol=OF_SAVED
        )
    assert second.generation_config.eos_token_id == first.generation_config.eos_token_id == [tiny.EOS, tiny.END]
    assert second.config.image_token_id == second.img_context_token_id == tiny.CONTEXT


def test_weights_come_in_the_type_that_their_configuration_names(published):
    from sta_adapter.internvideo import v2_5_loading

    model = v2_5_loading.load_model(published, {**tiny.CONFIG, "torch_dtype": "float16"})
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}


def test_weights_in_half_precision(published):
    model = load_model(published, dtype="bf16", device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    frequencies = model.language_model.model.rotary_emb.inv_freq
    assert frequencies.dtype == torch.float32
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def run(*line):
    done = CliRunner().invoke(cli, [str(word) for word in line])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.filterwarnings("ignore:.*sampled alike:sta_adapter.errors.STAWarning")
def test_from_json_lines_to_an_adapter_and_answers(base, clips, tmp_path):
    lines = [
        record(clip("short", nframes=4)),
        record(*MIXED, answer="right"),
        record(clip("long", nframes=4), options=["left", "right", "up"]),
        record(picture("square")),
        record(),
    ]
    file = clips / "mixed.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    assert run("check-data", file, "--model", base).startswith(f"{len(lines)} samples, 0 of them bad")
    size = ["--set", "device_batch_size=5", "--set", "num_workers=0", "--set", "lora_rank=2"]
    out = tmp_path / "adapter"
    run("train", "--model", base, "--data", file, "--out", out, "--max-steps", 2, "--batch-size", 5, *size)
    for stage in ("stage1", "stage2"):
        assert json.loads((out / stage / "result.json").read_text())["bad_samples"] == []
    answers = ["--out", tmp_path / "answers", "--batch-size", 4, "--max-new-tokens", 2]
    run("evaluate", "--model", base, "--adapter", out, "--data", file, *answers)
    assert f'"total": {len(lines)}' in (tmp_path / "answers" / "results.json").read_text()
    run("visualize", clips / "short.mp4", "--model", base, "--adapter", out, "--out", tmp_path / "seen")
    assert list((tmp_path / "seen").rglob("*.html"))


def test_lora_and_sta_are_saved_and_loaded(base, model, tmp_path):
    peft = pytest.importorskip("peft")
    handle = trained(model)
    wrapped = peft.get_peft_model(handle.model, handle.lora_config(r=2))
    adapted = {name.split(".lora_A")[0] for name, _ in wrapped.named_modules() if name.endswith(".lora_A")}
    assert sum("vision_model" in name for name in adapted) == 8
    assert sum("language_model" in name for name in adapted) == 14
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    get_sta(wrapped).save_pretrained(tmp_path)
    (ids, mask), rows = tiny.prompts("two_clips"), tiny.pixels(12)
    inputs = {"pixel_values": rows, "input_ids": ids, "attention_mask": mask, "clip_lengths": [8, 4]}
    with torch.no_grad():
        before = wrapped(**inputs).logits
        again = load_sta(load_model(base, dtype="fp32", device="cpu"), tmp_path).model
        torch.testing.assert_close(again(**inputs).logits, before)
        assert (load_model(base, dtype="fp32", device="cpu")(**inputs).logits - before).abs().max() > 1e-3


def test_sta_goes_from_the_published_towers_names_to_ours_and_back(model, tmp_path):
    sizes = {name: tiny.VISION[name] for name in ("image_size", "patch_size")}
    theirs = InternVisionModel(**sizes).eval()
    theirs.load_state_dict(model.vision_model.state_dict())
    trained(theirs).save_pretrained(tmp_path)
    load_sta(model, tmp_path)
    rows = tiny.pixels(8)
    with torch.no_grad():
        expected = theirs(rows).last_hidden_state
        torch.testing.assert_close(model.vision_model(rows).last_hidden_state, expected, rtol=1e-4, atol=1e-5)


def test_tiles_are_cut_as_published(processor):
    rows = processor.image_processor
    assert [rows.grid(*size) for size in ((112, 112), (336, 112), (112, 400), (200, 100))] == [
        (1, 1),
        (3, 1),
        (1, 3),
        (2, 1),
    ]
    noise = np.random.default_rng(0).integers(0, 255, (112, 224, 3), dtype=np.uint8)
    made = rows.picture(noise)
    assert made.shape == (4, 3, 112, 112)
    torch.testing.assert_close(rows.picture(noise.transpose(2, 0, 1)), made, rtol=0, atol=0)
    whole = (torch.from_numpy(noise).permute(2, 0, 1) / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / (
        torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    )
    torch.testing.assert_close(torch.cat([made[0], made[1]], dim=2), whole)


def test_a_picture_comes_in_more_tiles_the_larger_it_is():
    rows = InternVideo2_5ImageProcessor(112, max_tiles=6)
    assert [rows.grid(side, side) for side in (112, 158, 159, 224)] == [(1, 1), (1, 1), (2, 2), (2, 2)]


def test_what_a_published_configuration_leaves_to_its_code():
    language = {"architectures": ["InternLM2ForCausalLM"]}
    made = from_published({"template": "internvl2_5", "vision_config": tiny.VISION, "llm_config": language})
    text = made.text_config
    theta = text.rope_parameters["rope_theta"] if NEW_ROPE else text.rope_theta
    assert (text.vocab_size, text.attention_bias, text.pad_token_id, theta) == (103168, True, 0, 10000)
    assert (made.use_thumbnail, made.ps_version) == (False, "v1")


def test_a_processor_by_itself_has_the_published_conversation(processor):
    made = InternVideo2_5Processor(processor.tokenizer, processor.image_processor)
    assert (made.template, made.image_seq_length) == ("internvl2_5", 16)
    asked = made.apply_chat_template([{"role": "user", "content": "Who?"}], add_generation_prompt=True)
    assert asked == "<s>" + conversation("internvl2_5", [], "Who?")


def test_several_conversations_at_once(processor):
    frames, picture = np.zeros((4, 8, 8, 3), np.uint8), np.full((8, 8, 3), 200, np.uint8)
    content = [
        {"type": "video", "video": frames},
        {"type": "image", "image": picture},
        {"type": "text", "text": "What?"},
    ]
    several = [[{"role": "user", "content": "Who?"}], [{"role": "user", "content": content}]]
    batch = processor.apply_chat_template(several, tokenize=True)
    texts = processor.apply_chat_template(several)
    expected = processor(text=texts, videos=[frames], images=[picture], add_special_tokens=False)
    assert {*batch} == {*processor.model_input_names} == {*expected}
    assert all(torch.equal(batch[name], expected[name]) for name in expected)
    alone = processor.apply_chat_template(several[1], tokenize=True, return_dict=False)
    assert processor.decode(alone[0]) == processor.decode(batch["input_ids"][1])
    made = processor.image_processor.preprocess([picture], [frames])
    assert {*made} == {*processor.image_processor.model_input_names}


def broken(folder, target, change):
    """A copy of a folder's files, with one changed."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    change(target)
    return target


def of_config(**changed):
    def change(folder):
        (folder / "config.json").write_text(json.dumps({**tiny.CONFIG, **changed}))

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (of_config(llm_config={**tiny.LANGUAGE, "hidden_size": 64}), r"of other sizes|has 64 rows; expected 128"),
        (of_config(llm_config={**tiny.LANGUAGE, "num_hidden_layers": 3}), "layers.2.* missing"),
        (
            of_config(vision_config={**tiny.VISION, "intermediate_size": 96}),
            r"of other sizes: .*\(48,\), expected \(96,\)",
        ),
        (of_config(template="phi3-chat"), "template 'phi3-chat'; expected 'internvl2_5'"),
        (of_config(llm_config={**tiny.LANGUAGE, "architectures": ["Phi3ForCausalLM"]}), "Phi3ForCausalLM"),
        (of_config(vision_config=None), "no vision_config and llm_config"),
        (lambda folder: (folder / "model-00002-of-00002.safetensors").unlink(), "download the checkpoint again"),
    ],
    ids=["width", "depth", "vision", "template", "language_model", "no_vision", "missing_shard"],
)
def test_a_checkpoint_that_does_not_fit_is_refused(published, change, said, tmp_path):
    folder = broken(published, tmp_path / "base", change)
    with pytest.raises(CheckpointError, match=said):
        load_model(folder, dtype="fp32", device="cpu")


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "[]", '{"added_tokens_decoder": [7]}', '{"added_tokens_decoder": {"7": 1}}'])  # fmt: skip
def test_damaged_settings_of_a_tokenizer_are_named(published, tmp_path, text):
    folder = broken(published, tmp_path / "a", lambda folder: (folder / "tokenizer_config.json").write_text(text))
    with pytest.raises(CheckpointError, match="download"):
        load_model(folder, dtype="fp32", device="cpu")


def test_a_missing_tokenizer_is_named(published, tmp_path):
    folder = broken(published, tmp_path / "base", lambda folder: (folder / "tokenizer.json").unlink())
    with pytest.raises(CheckpointError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        load_processor(folder)
    (folder / "tokenizer.model").write_bytes(b"\xff\xffno model")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
        load_processor(folder)


def test_published_weights_are_quantized_only_after_saving(published):
    from sta_adapter.internvideo import v2_5_loading

    with pytest.raises(ConfigError, match="Save the model once"):
        v2_5_loading.load_model(published, tiny.CONFIG, quantization_config={"load_in_8bit": True})


def test_rows_that_do_not_go_together_are_refused(model, processor):
    (ids, mask), rows = tiny.prompts("one_clip"), tiny.pixels(8)
    words = processor.tokenizer
    with pytest.raises(LayoutError, match="6 rows of pixels: tokens of 4 rows"):
        model(rows[:6], ids, mask)
    with pytest.raises(LayoutError, match="16 places for visual tokens, and the rows of pixels give 8"):
        model(rows[:4], ids, mask)
    with pytest.raises(LayoutError, match=r"clip 1 takes rows 0 to 5"):
        model(rows, ids, mask, clip_lengths=[6, 2])
    with pytest.raises(LayoutError, match=r"shape \(2, 4, 3, 112, 112\); expected \(frames, 3"):
        model.vision_model(rows.view(2, 4, 3, 112, 112))
    with pytest.raises(LayoutError, match=r"pixel_values have the shape None; expected \(frames, 3"):
        model.vision_model()
    with pytest.raises(LayoutError, match=r"multiple of 4 rows"):
        model.batch_chat(words, rows, ["What?", "Who?"], {}, num_patches_list=[6, 2])
    with pytest.raises(LayoutError, match=r"num_patches_list is \[4\]"):
        model.chat(words, rows, "What?", {}, num_patches_list=[4])
    with pytest.raises(LayoutError, match="neither input_ids nor inputs_embeds"):
        model(rows)
    model.img_context_token_id = None
    with pytest.raises(LayoutError, match="img_context_token_id"):
        model(rows, ids, mask)


def test_tiles_where_frames_are_expected_are_refused(processor):
    tiles = np.zeros((2, 4, 8, 8, 3), np.uint8)
    with pytest.raises(DataError, match="tiles of frames are not taken"):
        processor(text="<video>What?", videos=[tiles])
    with pytest.raises(DataError, match="0 times <image> and 1 times <video>, and there are 1 pictures and 1 clips"):
        processor(text="<video>What?", videos=[tiles[0]], images=[tiles[0, 0]])
    with pytest.raises(DataError, match="come as a list"):
        processor(text="<video>What?", videos=tiles[0])


def test_an_unknown_revision_is_told(monkeypatch):
    import huggingface_hub
    from huggingface_hub.utils import RevisionNotFoundError

    from sta_adapter.internvideo import weights

    def refuse(*args, **kwargs):
        raise RevisionNotFoundError.__new__(RevisionNotFoundError)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(CheckpointError, match=r"'user/model' at revision 'v9' isn't available: it has no such branch"):
        weights.fetch_folder("user/model", "v9", ())


def test_all_files_of_a_published_model_are_asked_for_and_no_code(monkeypatch):
    import huggingface_hub

    from sta_adapter.internvideo import weights

    asked = []

    def note(name, *, revision, allow_patterns):
        asked.extend(allow_patterns)
        return "there"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", note)
    weights.fetch_folder("user/model", None, (*weights.WEIGHT_FILES, *weights.TOKENIZER_FILES))
    needed = [
        *("config.json", "generation_config.json", "model.safetensors.index.json", "model-00001-of-00004.safetensors"),
        *("pytorch_model.bin", "stage2.pt", "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "vocab.json"),
        *("added_tokens.json", "special_tokens_map.json", "merges.txt", "preprocessor_config.json"),
    ]
    assert list(huggingface_hub.utils.filter_repo_objects(needed, allow_patterns=asked)) == needed
    others = ["modeling_internvl_chat_hico2.py", "README.md", "examples/car.mp4"]
    assert not list(huggingface_hub.utils.filter_repo_objects(others, allow_patterns=asked))


def test_inspect_says_whose_code_it_is(published):
    found = json.loads(run("inspect", published, "--json"))
    assert found["model"] == "InternVideo2_5ForConditionalGeneration"
    assert found["code"].startswith("sta-adapter, put together")
    assert found["backbone"] == "internvideo2_5"
    assert found["encoder"]["path"] == "vision_model"


ADDED = {3: "<|im_start|>", 4: "<|im_end|>", 270: "<img>", 271: "</img>", 272: "<IMG_CONTEXT>"}


def sentencepiece_model(folder, prefix=False):
    """InternLM2's kind of tokenizer.model: byte pairs, bytes, and unused pieces whose places other tokens take."""
    protobuf = pytest.importorskip("google.protobuf")
    assert protobuf
    from transformers.convert_slow_tokenizer import import_protobuf

    model = import_protobuf().ModelProto()
    model.trainer_spec.model_type, model.trainer_spec.unk_id = 2, 0
    model.normalizer_spec.add_dummy_prefix = prefix
    unknown, normal, control, defined, byte = 2, 1, 3, 4, 6
    words = ["▁", "a", "b", "ab", "▁ab", "abb"]
    pieces = [("<unk>", unknown), ("<s>", control), ("</s>", control), ("[UNUSED_1]", defined), ("[UNUSED_2]", defined)]
    pieces += [(f"<0x{number:02X}>", byte) for number in range(256)] + [(word, normal) for word in words]
    pieces += [("c", normal), ("bb", normal), ("<keep>", defined)]
    for number, (text, kind) in enumerate(pieces):
        model.pieces.add(piece=text, type=kind, score=0.0 if kind != normal else -float(number))
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    told = {str(number): {"content": text, "special": True} for number, text in ADDED.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": told, "add_bos_token": True}))


def test_a_sentencepiece_model_is_converted_without_the_published_code(tmp_path):
    sentencepiece_model(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    text = "<|im_start|>abb ab é<IMG_CONTEXT><|im_end|><keep>"
    words = ["<|im_start|>", "abb", "▁ab", "▁", "<0xC3>", "<0xA9>", "<IMG_CONTEXT>", "<|im_end|>", "<keep>"]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == words
    assert tokenizer(text)["input_ids"] == [1, *ids]
    assert tokenizer.decode(ids) == text
    assert [tokenizer.convert_tokens_to_ids(word) for word in ADDED.values()] == list(ADDED)
    assert "<IMG_CONTEXT>" in tokenizer.all_special_tokens
    ends = (tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    assert ends == ("<unk>", "<s>", "</s>", "</s>")
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    assert load_tokenizer(tmp_path)(text)["input_ids"] == [1, *ids]


def test_a_dummy_prefix_and_foreign_ids_are_known(tmp_path):
    sentencepiece_model(tmp_path, prefix=True)
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer("ab", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["▁ab"]
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<img>": 99999}))
    with pytest.raises(CheckpointError, match="added tokens don't get their ids"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(("total", "count"), [(56, 8), (300, 16), (57, 4), (24, 12)])
def test_frames_are_the_middles_of_segments(total, count):
    size = (total - 1) / count  # as the published loader counts them
    expected = [int(size / 2 + np.round(size * index)) for index in range(count)]
    times = np.arange(total) / 8
    assert choose_frames(times, total / 8, Sampling(num_frames=count, segments=True)).tolist() == expected


def test_more_segments_than_frames_take_each_frame_once():
    found = choose_frames(np.arange(6) / 8, 6 / 8, Sampling(num_frames=16, segments=True))
    assert found.tolist() == [0, 1, 2, 3, 4, 5]
    part = choose_frames(np.arange(80) / 8, 10.0, Sampling(num_frames=4, segments=True, start=2.0, end=4.0))
    assert part.tolist() == [18, 22, 26, 30]


def test_the_commands_read_those_frames(processor, clips):
    reader = VideoDataset([], processor, frames=FrameSettings(nframes=8)).encoder.reader
    (visual,) = reader.read([{"type": "video", "video": str(clips / "long.mp4")}])
    assert [round(number) for number in visual.metadata["frames_indices"]] == [
        int(55 / 16 + np.round(55 / 8 * index)) for index in range(8)
    ]


def test_rows_without_text(processor):
    frames = [np.zeros((8, 8, 3), np.uint8)] * 5
    made = processor.image_processor.preprocess(images=frames[:1], videos=[frames])
    assert made["clip_lengths"].tolist() == [1, 1, 1, 1, 8]
    assert len(made["pixel_values"]) == 12
    with pytest.raises(DataError, match="neither pictures nor clips"):
        processor.image_processor.preprocess()


def test_chats_tell_their_clips(model, processor):
    layouts = Layouts(trained(model))
    options = {"max_new_tokens": 1, "do_sample": False}
    question = "".join(f"Frame{1 + number % 4}: <image>\n" for number in range(8)) + "Which way?"
    model.chat(processor, tiny.pixels(8), question, dict(options), num_patches_list=[1] * 8)
    model.chat(processor, tiny.pixels(8), "Which way?", dict(options))
    model.batch_chat(processor, tiny.pixels(12), ["What?", "Who?"], dict(options), num_patches_list=[8, 4])
    assert layouts.seen == [((4, 64), (4, 64)), ((8, 64),), ((8, 64), (4, 64))]


def test_a_conversation_goes_on(model, processor):
    options = {"max_new_tokens": 2, "do_sample": False}
    first, history = model.chat(processor, tiny.pixels(8), "What?", dict(options), return_history=True)
    assert history == [("<image>\nWhat?", first)]
    again, longer = model.chat(processor, tiny.pixels(8), "Why?", dict(options), history, True)
    assert longer == [*history, ("Why?", again)]
    assert isinstance(model.chat(processor, None, "Who are you?", dict(options)), str)


def test_an_answer_is_shown_without_what_fills_it_up(model, processor, monkeypatch):
    """The shorter of two answers is filled up behind its end, and one that was cut has no end."""
    words = processor.tokenizer
    said = [words("up", add_special_tokens=False)["input_ids"], words("left", add_special_tokens=False)["input_ids"]]
    width = max(map(len, said)) + 1
    rows = torch.tensor([[*row, *[tiny.EOS] * (width - len(row))] for row in said])
    monkeypatch.setattr(model, "generate", lambda **inputs: torch.cat([inputs["input_ids"], rows], dim=1))
    assert model.batch_chat(processor, None, ["Which way?", "And you?"], {}) == ["up", "left"]


@pytest.mark.parametrize("kind", [True, "reentrant"])
def test_checkpointing_gives_the_same_gradients(model, kind):
    handle = trained(model)
    handle.freeze_base()
    (ids, mask), rows = tiny.prompts("two_clips"), tiny.pixels(12)

    def gradients(checkpointing):
        model.train()
        with activation_checkpointing(model, handle, checkpointing):
            model(rows, ids, mask, labels=ids, clip_lengths=[8, 4]).loss.backward()
        found = [parameter.grad.clone() for parameter in handle.parameters()]
        model.zero_grad()
        return found

    for plain, checkpointed in zip(gradients(False), gradients(kind), strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layout", ["saved", "published"])
def test_sta_among_a_whole_models_weights_is_told_of(layout, base, published, tmp_path):
    """As transformers' trainer saves a model, in its own layout; or with STA's tensors among published files."""
    if layout == "saved":
        inject_sta(load_model(base, dtype="fp32", device="cpu")).model.save_pretrained(tmp_path)
    else:
        shutil.copytree(published, tmp_path, dirs_exist_ok=True)
        file = sorted(tmp_path.glob("*.safetensors"))[0]
        key = "vision_model.encoder.layers.0.sta.norm.weight"
        save_file({**load_file(file), key: torch.ones(32)}, file, {"format": "pt"})
        index = tmp_path / "model.safetensors.index.json"
        told = json.loads(index.read_text())
        index.write_text(json.dumps({**told, "weight_map": {**told["weight_map"], key: file.name}}))
    with pytest.warns(STAWarning, match="hold STA .*loaded without it: give its adapter as .*load_sta, --adapter"):
        model = load_model(tmp_path, dtype="fp32", device="cpu")
    assert get_sta(model) is None
    expected = load_model(base, dtype="fp32", device="cpu").state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_an_adapter_on_published_files_has_no_embeddings(published, tmp_path):
    """config.json is read otherwise there, and its default vocabulary is no other number of tokens."""
    model = load_model(published, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error", STAWarning)
        inject_sta(model).save_pretrained(tmp_path / "sta")
    assert not has_other_vocabulary(model.config)
