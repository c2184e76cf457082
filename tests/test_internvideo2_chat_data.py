"""InternVideo2-Chat's processor, and the commands: JSON Lines of clips and pictures to a loss, an adapter and an answer."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from internvideo2_chat import CONFIG, QUERIES, SIDE, tokenizer, value, write_folder
from PIL import Image
from qwen2_vl_prompts import OF_SAVED
from safetensors import safe_open
from tiny_qwen import moving_square, write_video

from sta_adapter import get_sta, inject_sta
from sta_adapter.cli import cli
from sta_adapter.data import Collator, VideoDataset
from sta_adapter.data.samples import parse_sample
from sta_adapter.errors import CheckpointError, ConfigError, DataError, STAWarning
from sta_adapter.evaluation.answering import Answerer, Question
from sta_adapter.internvideo import v2_loading
from sta_adapter.internvideo.v2_config import read_config
from sta_adapter.internvideo.v2_images import MEAN, STD
from sta_adapter.internvideo.v2_processor import InternVideo2ChatProcessor
from sta_adapter.internvideo.v2_prompt import IMAGE, VIDEO, conversation, prompt_tokens
from sta_adapter.internvideo.weights import DTYPE
from sta_adapter.loading import load_adapter, load_model, load_processor


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def processor(base):
    return load_processor(base)


@pytest.fixture(scope="module")
def model(base):
    model = load_model(base, device="cpu")
    handle = inject_sta(model)
    torch.manual_seed(1)
    for parameter in handle.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    write_video(folder / "short.mp4", moving_square("left", count=24))
    write_video(folder / "long.mp4", moving_square("right", size=24, count=56))
    Image.effect_noise((44, 20), 200).convert("RGB").save(folder / "wide.png")
    return folder


def clip(name, **how):
    return {"type": "video", "video": f"{name}.mp4", **how}


WIDE = {"type": "image", "image": "wide.png"}


def record(*content, answer="left", **more):
    user = {"role": "user", "content": [*content, {"type": "text", "text": "Which way?"}]}
    return {"messages": [user, {"role": "assistant", "content": answer}], **more}


LINES = [
    record(clip("short", nframes=8)),
    record(clip("long")),
    record(clip("short"), clip("long", nframes=5), answer="right"),
    record(clip("long", nframes=2), options=["left", "right", "up"]),
    record(WIDE),
    record(WIDE, clip("short"), answer="right"),
    record(answer="up"),
]


def encoded(processor, folder, *lines, **options):
    samples = [parse_sample(line, folder=folder) for line in lines]
    data = VideoDataset(samples, processor, on_bad_sample="error", **options)
    return [data[index] for index in range(len(samples))]


def run(*line):
    done = CliRunner().invoke(cli, [str(word) for word in line])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.filterwarnings("ignore:adapter was trained on clips of which not all were sampled alike")
def test_from_json_lines_to_an_adapter_and_an_answer(base, clips, tmp_path):
    file = clips / "all.jsonl"
    file.write_text("\n".join(map(json.dumps, LINES)))
    assert run("check-data", file, "--model", base).startswith(f"{len(LINES)} samples, 0 of them bad")
    size = ["--set", "device_batch_size=4", "--set", "num_workers=0", "--set", "lora_rank=2"]
    out = ["--out", tmp_path / "adapter", "--max-steps", 2, "--batch-size", 4]
    run("train", "--model", base, "--data", file, *out, *size)
    for stage in ("stage1", "stage2"):
        assert json.loads((tmp_path / "adapter" / stage / "result.json").read_text())["bad_samples"] == []
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as lora:
        assert [name for name in lora.keys() if "embed_tokens" in name or "lm_head" in name] == []  # noqa: SIM118
    answers = ["--out", tmp_path / "answers", "--batch-size", 4, "--max-new-tokens", 2]
    run("evaluate", "--model", base, "--adapter", tmp_path / "adapter", "--data", file, *answers)
    assert f'"total": {len(LINES)}' in (tmp_path / "answers" / "results.json").read_text()
    again = load_adapter(load_model(base, device="cpu"), tmp_path / "adapter")
    assert get_sta(again).backbone == "internvideo2"
    assert any("lora_A" in name for name, _ in again.named_parameters())


def losses(model, processor, items):
    batch = Collator.of(processor, on_bad_sample="error")(items)
    batch.pop("bad_samples")
    learned = int((batch["labels"] != -100).sum())
    with torch.no_grad():
        return float(model(**batch).loss) * learned


def test_a_batch_is_its_samples(model, processor, clips):
    items = encoded(processor, clips, *LINES[1:])
    total = losses(model, processor, items)
    assert total == pytest.approx(sum(losses(model, processor, [item]) for item in items), rel=1e-4)


def test_answers_do_not_depend_on_the_batch(model, processor, clips):
    samples = [parse_sample(line, folder=clips) for line in LINES]
    data = VideoDataset(samples, processor, prompts=True, on_bad_sample="error")
    asked = Answerer(model, processor, 3, 4)
    questions = [Question(index, sample, data[index], []) for index, sample in enumerate(samples)]
    together = {found.index: found.prediction for found in asked.answer(questions)}
    assert together == {found.index: found.prediction for one in questions for found in asked.answer([one])}


def test_only_the_answer_is_learned_and_the_prompt_is_the_published_one(processor, clips):
    (item,) = encoded(processor, clips, record(clip("short"), answer="to the left"))
    learned = item["labels"][item["labels"] != -100]
    assert tokenizer().decode(learned) == "to the left</s>"
    prompt = conversation("Which way?", [VIDEO])
    assert item["input_ids"][: -len(learned)].tolist() == prompt_tokens(tokenizer(), prompt, processor)
    assert int((item["input_ids"] == processor.video_token_id).sum()) == QUERIES


def test_a_clip_of_a_later_turn_is_read_as_in_the_whole_text(processor, clips):
    first, second = (record(clip("short", nframes=2), answer=answer)["messages"] for answer in ("left", "up"))
    (item,) = encoded(processor, clips, {"messages": [*first, *second]})
    messages = parse_sample({"messages": [*first, *second]}).messages
    frames = [np.zeros((2, 16, 16, 3), np.uint8)] * 2
    whole = processor(text=processor.apply_chat_template(messages), videos=frames, add_special_tokens=False)
    assert item["input_ids"].tolist() == whole["input_ids"][0].tolist()
    asked = conversation("Which way?", [VIDEO])
    begins = [processor(text=asked, videos=frames[:1], add_special_tokens=special) for special in (True, False)]
    assert begins[0]["input_ids"][0].tolist() == [processor.tokenizer.bos_token_id, *begins[1]["input_ids"][0].tolist()]


def test_pixels_are_the_published_ones(processor):
    """The shorter side to the encoder's size, the middle, ImageNet's colours; one frame after the other by torchvision."""
    from torchvision.transforms import v2

    frames = np.random.default_rng(0).integers(0, 256, (3, 40, 61, 3), dtype=np.uint8)
    steps = [
        v2.Resize(SIDE, v2.InterpolationMode.BICUBIC, antialias=True),
        v2.CenterCrop(SIDE),
        v2.Normalize(MEAN, STD),
    ]
    expected = v2.Compose(steps)(torch.from_numpy(frames).permute(0, 3, 1, 2) / 255)
    torch.testing.assert_close(processor.image_processor.clip(frames)[0], expected, rtol=1e-5, atol=1e-5)


def test_the_hd_variant_cuts_frames_into_two_tiles_and_adds_the_whole(base, clips):
    hd = load_processor(base)
    hd.image_processor.tiles = (2, 1)
    (item,) = encoded(hd, clips, record(clip("short", nframes=3), clip("long", nframes=2)))
    assert item["pixel_values_videos"].shape == (6, 3, 3, SIDE, SIDE)
    assert int((item["input_ids"] == hd.video_token_id).sum()) == 6 * QUERIES
    frames = np.random.default_rng(0).integers(0, 256, (2, 20, 30, 3), dtype=np.uint8)
    left, right, whole = hd.image_processor.clip(frames)
    wide = F.interpolate(torch.from_numpy(frames).permute(0, 3, 1, 2).float(), (SIDE, 2 * SIDE), mode="bicubic") / 255
    wide = (wide - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    torch.testing.assert_close(torch.cat([left, right], dim=-1), wide)
    torch.testing.assert_close(whole, F.interpolate(wide, (SIDE, SIDE), mode="bicubic"))


def test_saved_and_loaded_again(base, processor, clips, tmp_path):
    plain, folder = load_model(base, device="cpu"), tmp_path / "not" / "there yet"
    processor.save_pretrained(folder)
    plain.save_pretrained(folder)
    again, words = load_model(folder, device="cpu"), load_processor(folder)
    (item,) = encoded(processor, clips, LINES[2])
    (same,) = encoded(words, clips, LINES[2])
    assert torch.equal(item["input_ids"], same["input_ids"])
    assert losses(plain, processor, [item]) == pytest.approx(losses(again, words, [same]), rel=OF_SAVED, abs=0)


def test_sta_among_a_whole_models_weights_is_told_of(base, model, processor, tmp_path):
    """As transformers' trainer saves a model."""
    processor.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    with pytest.warns(STAWarning, match="hold STA .*loaded without it: give its adapter as .*load_sta, --adapter"):
        found = load_model(tmp_path, device="cpu")
    assert get_sta(found) is None
    expected = load_model(base, device="cpu").state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in found.state_dict().items())


def test_pickled_weights_of_published_names(base, tmp_path):
    from safetensors.torch import load_file

    folder = write_folder(tmp_path)
    whole = {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}
    for file in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        file.unlink()
    newer = {name: name.replace(".q_proj.weight", ".q_proj.base_layer.weight") for name in whole}  # PEFT's
    scaled = {name: f"{new}.gamma" if name.endswith((".ls1", ".ls2")) else new for name, new in newer.items()}
    named = {scaled[name]: kept for name, kept in whole.items()}
    torch.save({"module": named}, folder / "pytorch_model.bin")
    found, expected = load_model(folder, device="cpu").state_dict(), load_model(base, device="cpu").state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vision_encoder.pos_embed": torch.zeros(1, 9, 32)}, r"pos_embed is \(1, 9, 32\), expected \(1, 33, 32\)"),
        ({"vision_encoder.extra": torch.zeros(3)}, "vision_encoder.extra without a place"),
        (
            {"lm.base_model.model.lm_head.lora_A.default.weight": torch.zeros(4, 7)},
            r"LoRA of 'lm.lm_head' has the shapes \(4, 7\)",
        ),
    ],
    ids=["sizes", "foreign", "lora"],
)
def test_weights_of_another_model(tmp_path, change, said):
    with pytest.raises(CheckpointError, match=said):
        load_model(write_folder(tmp_path, changes=change), device="cpu")


@pytest.mark.parametrize(
    ("path", "told", "said"),
    [
        (("llm", "name"), "internlm2_5_7b", "language model is 'internlm2_5_7b'; expected 'mistral_7b'"),
        (("llm", "use_lora"), False, "lora_A.*without a place"),
        (("bridge", "name"), "mlp", "bridge is 'mlp'"),
    ],
    ids=["language model", "lora", "bridge"],
)
def test_variants_that_are_not_known(tmp_path, path, told, said):
    folder = write_folder(tmp_path)
    config = json.loads(json.dumps(CONFIG))
    config["model_config"][path[0]][path[1]] = told
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=said):
        load_model(folder, device="cpu")


def test_missing_files(tmp_path):
    folder = write_folder(tmp_path)
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.raises(
        CheckpointError, match=r"tokenizer in .* can't be loaded.*no file of a tokenizer, expected tokenizer"
    ):
        load_processor(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"names 2 files of weights, and model-00002-of-00002\.safetensors is not in"
    ):
        load_model(folder, device="cpu")


def test_clips_and_placeholders_that_do_not_go_together(model, processor):
    frames = np.zeros((2, SIDE, SIDE, 3), np.uint8)
    with pytest.raises(DataError, match="a clip has no frame; expected at least one"):
        processor(text=VIDEO, videos=[[]])
    with pytest.raises(DataError, match=r"1 times .*VID.*and 2 clips"):
        processor(text=VIDEO, videos=[frames, frames])
    with pytest.raises(DataError, match=r"frames have the shape \(28, 28, 3\)"):
        processor(text=VIDEO, videos=[frames[0]])
    batch = processor(text=VIDEO, videos=[frames])
    with pytest.raises(DataError, match="96 placeholders of clips and 2 clips"):
        model(**{**batch, "pixel_values_videos": batch["pixel_values_videos"].repeat(2, 1, 1, 1, 1)})
    with pytest.raises(DataError, match=r"clips have the shape \(1, 2, 28, 28\)"):
        model(**{**batch, "pixel_values_videos": batch["pixel_values_videos"][:, :, 0]})
    with pytest.raises(DataError, match="media_type is 'video' and media_tensor of the shape"):
        model.chat(tokenizer(), "", "What?", "video", torch.zeros(3, SIDE, SIDE))
    with pytest.raises(DataError, match="tokenizer of bert-base-uncased"):
        processor(text=VIDEO, videos=[frames], instruction="Look.")


def test_pictures_in_one_array_are_taken_one_by_one_as_clips_are(processor):
    pictures = np.arange(2 * SIDE * SIDE * 3, dtype=np.uint8).reshape(2, SIDE, SIDE, 3)
    found, expected = (processor(text=IMAGE * 2, images=given) for given in (pictures, list(pictures)))
    assert torch.equal(found["pixel_values"], expected["pixel_values"])
    with pytest.raises(DataError, match=r"1 times .*IMG.*and there are 2 pictures and 0 clips"):
        processor(text=IMAGE, images=pictures)


def test_texts_of_unequal_lengths_are_filled_up(processor):
    texts = ["What?", "What is it?"]
    with pytest.raises(DataError, match=r"texts have \[6, 12\] tokens; expected padding=True"):
        processor(text=texts, padding=False)
    batch = processor(text=texts)
    assert batch["attention_mask"].sum(1).tolist() == [6, 12]
    assert processor(text=texts[0], padding=False)["input_ids"].tolist() == [
        row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"][:1], batch["attention_mask"], strict=False)
    ]


def test_a_batch_holds_what_the_processor_says(model, processor):
    frames = np.zeros((2, SIDE, SIDE, 3), np.uint8)
    batch = processor(text=VIDEO + IMAGE, videos=[frames], images=[frames[0]])
    assert {*batch} == {*processor.model_input_names}
    assert model.main_input_name in batch  # by which trainers count tokens


@pytest.mark.parametrize(("unknown", "expected"), [("<unk>", "<unk>"), (None, "</s>")])
def test_a_tokenizer_that_can_not_fill_up_gets_a_token_for_it(processor, unknown, expected):
    words = tokenizer()
    words.pad_token, words.unk_token = None, unknown
    ids = {name: getattr(processor, name) for name in ("num_visual_tokens", "image_token_id", "video_token_id")}
    assert InternVideo2ChatProcessor(words, processor.image_processor, **ids).tokenizer.pad_token == expected


def test_an_instruction_for_the_q_former_is_cut_to_what_it_reads(processor, monkeypatch):
    monkeypatch.setattr(processor, "qformer_tokenizer", tokenizer())
    frames = np.zeros((1, SIDE, SIDE, 3), np.uint8)
    for length, expected in ((5, 6), (600, 512)):
        batch = processor(text=VIDEO, videos=[frames], instruction="a" * length)
        assert batch["qformer_input_ids"].shape == batch["qformer_attention_mask"].shape == (1, expected)


def test_chat_samples_as_published_where_nothing_is_asked_for(model, monkeypatch):
    asked = []
    monkeypatch.setattr(model, "generate", lambda **options: asked.append(options) or options["input_ids"])
    clip = torch.zeros(1, 3, SIDE, SIDE)
    model.chat(tokenizer(), "", "What?", "video", clip)
    model.chat(tokenizer(), "", "What?", "video", clip, generation_config={"do_sample": False, "max_new_tokens": 3})
    names = ("max_new_tokens", "do_sample", "min_length", "top_p")
    assert [[options.get(name) for name in names] for options in asked] == [[200, True, 1, 0.9], [3, False, 1, None]]


def test_a_configuration_says_what_the_published_one_does_or_leaves_to_its_code():
    config = json.loads(json.dumps(CONFIG))
    config["model_config"]["llm"]["pretrained_llm_path"] = "mistralai/Mistral-7B-Instruct-v0.3"
    config["model_config"]["bridge"] |= {
        "qformer_hidden_dropout_prob": 0.3,
        "qformer_attention_probs_dropout_prob": 0.2,
    }
    made = read_config(config)
    text = made.text_config
    assert (text.vocab_size, text.hidden_size, text.intermediate_size, text.num_hidden_layers) == (
        32768,
        4096,
        14336,
        32,
    )
    assert (text.num_attention_heads, text.num_key_value_heads, text.sliding_window) == (32, 8, None)
    assert (made.qformer().hidden_dropout_prob, made.qformer().attention_probs_dropout_prob) == (0.3, 0.2)
    assert made.to_dict()["model_type"] == "internvideo2_chat"  # of folders that were saved, for good
    assert read_config(made.to_dict()).to_dict() == made.to_dict()


@pytest.mark.parametrize("path", [None, ""])
def test_a_checkpoints_own_config_is_not_taken_for_the_language_models(path, tmp_path):
    config = json.loads(json.dumps(CONFIG))
    config["model_config"]["llm"]["pretrained_llm_path"] = path
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(config, tmp_path).text_config.vocab_size == 32768


@pytest.mark.parametrize("text", ["{", "[]"], ids=["no JSON", "no object"])
def test_a_damaged_config_of_the_language_model_is_told(text, tmp_path):
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm/config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"llm/config\.json .*download it again"):
        read_config(CONFIG, tmp_path)


def test_published_weights_are_quantized_only_after_saving(base):
    with pytest.raises(ConfigError, match="Save the model once"):
        v2_loading.load_model(base, CONFIG, quantization_config={"load_in_8bit": True})


def test_lora_is_merged_whatever_order_its_parts_come_in():
    """LoRA is merged a layer at a time, whatever order files have; layers that wait are few."""
    from sta_adapter.internvideo.v2_loading import model_weights

    layer = "lm.base_model.model.model.layers.0.mlp.up_proj"
    parts = {f"{layer}.weight": value("w", (6, 5)), f"{layer}.lora_A.default.weight": value("a", (2, 5))}
    parts[f"{layer}.lora_B.default.weight"] = value("b", (6, 2))
    expected = value("w", (6, 5)) + 0.5 * value("b", (6, 2)) @ value("a", (2, 5))
    for names in (sorted(parts), sorted(parts, reverse=True)):
        found = dict(model_weights([(name, parts[name]) for name in names], 0.5))
        torch.testing.assert_close(found, {"lm.model.layers.0.mlp.up_proj.weight": expected})
    with pytest.raises(CheckpointError, match=r"1 layers of the language model.*have A, weight of A, B"):
        list(model_weights([(name, parts[name]) for name in sorted(parts) if "lora_B" not in name], 0.5))


def test_a_quantized_model_gets_its_dtype_and_device(monkeypatch, tmp_path):
    asked = {}
    model = torch.nn.Module()
    model.config = SimpleNamespace()
    monkeypatch.setattr(v2_loading, "fetch_folder", lambda *_: tmp_path)
    monkeypatch.setattr(
        v2_loading.InternVideo2Chat,
        "from_pretrained",
        lambda folder, **options: asked.update(options) or (model, {"unexpected_keys": []}),
    )
    config = {"model_type": v2_loading.MODEL_TYPE}
    v2_loading.load_model("x", config, dtype=torch.float16, device="cuda:1", quantization_config={"load_in_8bit": True})
    assert asked[DTYPE] is torch.float16
    assert asked["device_map"] == {"": "cuda:1"}


@pytest.mark.parametrize(
    ("place", "tiles"),
    [
        ("InternVideo2-Chat-8B-HD", (2, 1)),
        (f"models--OpenGVLab--InternVideo2-Chat-8B-HD/snapshots/{'0' * 40}", (2, 1)),
        (f"models--OpenGVLab--InternVideo2-Chat-8B/snapshots/{'0' * 40}", None),
    ],
)
def test_the_hd_variant_is_known_by_its_name_also_in_the_hubs_cache(base, tmp_path, place, tiles):
    folder = shutil.copytree(base, tmp_path / place)
    assert load_processor(folder).image_processor.tiles == tiles
