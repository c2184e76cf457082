"""Where full models of transformers tell their clips, and what is refused where they can't."""

import dataclasses
import gc
import inspect
import weakref
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from cases import Clip, all_cases, case_parameters, lacks, randomize, seeded
from cases_transformers import CASES, FRAME, glm_prompt, llava_prompt, picture_prompt, tiny
from qwen2_vl_prompts import transformers_version

from sta_adapter import STAConfig, get_sta, inject_sta
from sta_adapter.data.clip_batches import put_together
from sta_adapter.errors import LayoutError, UnknownBackboneError
from sta_adapter.injection.backbone import ClipSource
from sta_adapter.injection.clip_source import ModelPostHook, TellingMethod
from sta_adapter.injection.registry import get_backbone
from sta_adapter.injection.state import Injection

LLAVA = pytest.param("llava_onevision", id="llava_onevision")
GLM = pytest.param(
    "glm4v",
    id="glm4v",
    marks=[
        lacks("glm4v"),
        pytest.mark.skipif(transformers_version() == (4, 55), reason="it looks for clips under another token there"),
    ],
)
GLM_MOE = pytest.param("glm4v_moe", id="glm4v_moe", marks=lacks("glm4v_moe"))
INTERNVL = lacks("internvl")
TOWERS = ["siglip", "clip", "dinov2", pytest.param("siglip2", marks=lacks("siglip2"))]


def injected(case_id, order="before_spatial"):
    """A tiny model with random STA, and a list of the clips (frames, positions) of each call of its encoder."""
    model = seeded(lambda: tiny(case_id))
    handle = inject_sta(model, STAConfig(order=order))
    seen = []
    for module in handle.blocks.values():
        randomize(module)
    handle.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(list(args[1].clips)))
    return model, handle, seen


def two_videos(case_id):
    """A batch of two prompts with a clip of four frames each, and their layout."""
    one = llava_prompt(4) if case_id == "llava_onevision" else glm_prompt(4)
    return {name: torch.cat([value, value]) for name, value in one.items()}, [(4, 16), (4, 16)]


@pytest.mark.parametrize("case_id", [LLAVA, GLM, GLM_MOE])
@pytest.mark.parametrize("call", ["forward", "generate"])
def test_clips_are_read_from_the_models_call(case_id, call):
    model, handle, seen = injected(case_id)
    batch, clips = two_videos(case_id)
    with torch.no_grad():
        if call == "forward":
            model(**batch)
        else:
            model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert seen == [clips], "the encoder ran once, on the clips of the prompt"
    with handle.clips([2, 6]), torch.no_grad():
        model(**batch)
    assert seen[1] == [(2, 16), (6, 16)], "what the user tells comes first"


class Chatty(torch.nn.Module):
    """Its `chat` gives what it was told of the clips of its rows."""

    def chat(self, rows, more=0):
        return self.chat.injection.clip_lengths, rows, more


def telling(runs):
    """A method in front of `Chatty.chat`, and the arguments of each time that clips were read from them."""
    read = []
    source = ClipSource(
        model_classes=("Chatty",), methods={"chat": lambda model, given: read.append(dict(given)) or [3, 1]}, runs=runs
    )
    spec = dataclasses.replace(get_backbone("qwen2_vl"), clip_source=source)
    model = Chatty()
    model.__dict__["chat"] = TellingMethod(Injection(STAConfig(), spec), model, "chat")
    return model, read


def test_a_method_is_run_as_its_backbone_says_unless_the_user_tells_the_clips():
    run = {"chat": lambda model, call, args, kwargs: ("run", call(*args, **kwargs))}
    model, read = telling(run)
    assert model.chat(4, more=1) == ("run", ([3, 1], 4, 1))
    assert read == [{"rows": 4, "more": 1}]
    assert model.chat(4, clip_lengths=[2, 2]) == ((2, 2), 4, 0)
    assert len(read) == 1
    model, _ = telling({})
    assert model.chat(4) == ([3, 1], 4, 0)


def test_a_method_says_itself_what_is_wrong_with_its_arguments():
    model, read = telling({})
    with pytest.raises(TypeError, match=r"chat\(\) missing 1 required positional argument: 'rows'"):
        model.chat(more=1)
    assert not read


@pytest.mark.parametrize("case_id", [LLAVA, GLM, GLM_MOE])
def test_clips_are_read_beneath_peft_and_in_copies(case_id):
    import copy

    peft = pytest.importorskip("peft")
    model, handle, seen = injected(case_id)
    wrapped = peft.get_peft_model(model, handle.lora_config())
    batch, clips = two_videos(case_id)
    if not has_a_method_for_each(model):
        pytest.skip(
            "peft calls forward past the hooks, and this release has no methods that tell; see the error's test"
        )
    twin = copy.deepcopy(model)
    with torch.no_grad():
        wrapped(**batch)
        assert [clips] * len(seen) == seen == [clips]
        twin(**batch)
    get_sta(twin).remove()
    assert not any(type(v).__name__ == "TellingMethod" for m in twin.modules() for v in vars(m).values())


@INTERNVL
@pytest.mark.parametrize("case_id", ["llava_onevision", "internvl"])
def test_clips_are_told_to_an_encoder_that_peft_trains_whole(case_id):
    """PEFT copies it out of the model whose calls tell its clips."""
    peft = pytest.importorskip("peft")
    if case_id == "internvl" and "x" in inspect.signature(peft.utils.other.AuxiliaryTrainingWrapper.forward).parameters:
        pytest.skip("this PEFT takes no keywords for what it trains whole, by which InternVL calls its encoder")
    model, handle, seen = injected(case_id)
    batch, clips = two_videos(case_id) if case_id == "llava_onevision" else (picture_prompt(4), [(3, 16), (1, 16)])
    more = {} if case_id == "llava_onevision" else {"clip_lengths": [3, 1]}
    with torch.no_grad():
        expected = model(**batch, **more).logits
        wrapped = peft.get_peft_model(model, handle.lora_config(modules_to_save=["vision_tower"])).eval()
        assert torch.equal(wrapped(**batch, **more).logits, expected)
    assert seen == [clips, clips]
    assert get_sta(wrapped).encoder is not handle.encoder


@pytest.mark.parametrize("case_id", [LLAVA, GLM])
def test_a_copy_of_the_model_is_not_told_the_original_s_clips(case_id):
    """A reference model or an average of weights, called within `clips(...)` of the other."""
    import copy

    model, handle, _ = injected(case_id)
    twin = copy.deepcopy(model)
    with handle.clips([2, 2]):
        for other in (twin, copy.deepcopy(twin)):
            assert get_sta(other)._injection.clip_lengths is None
            with get_sta(other).clips([4]):
                assert handle._injection.clip_lengths == (2, 2)
                assert get_sta(other)._injection.clip_lengths == (4,)


@pytest.mark.parametrize("case_id", [LLAVA, GLM])
def test_pictures_are_clips_of_one_frame(case_id):
    model, _, seen = injected(case_id)
    if case_id == "glm4v":
        arguments = {"pixel_values": torch.randn(32, 96), "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}
    else:
        arguments = {"pixel_values": torch.randn(2, 3, *FRAME), "image_sizes": torch.tensor([[16, 16], [16, 32]])}
    if not hasattr(getattr(model, "model", None), "get_image_features"):
        pytest.skip("this release has no method for pictures alone")
    with torch.no_grad():
        model.model.get_image_features(**arguments)
    rows = sum(frames for frames, _ in seen[0])
    assert seen == [[(1, 16)] * rows]
    assert rows >= 2


def has_a_method_for_each(model):
    """Whether this release encodes videos, and pictures, in a method of its own; on 4.52 the inner model alone has it."""
    return hasattr(model, "get_video_features") or hasattr(getattr(model, "model", None), "get_video_features")


def test_llava_refuses_what_an_old_release_can_not_tell_apart():
    model, _, _ = injected("llava_onevision")
    if has_a_method_for_each(model):
        pytest.skip("this release has a method for each")
    both = {**llava_prompt(4), "pixel_values": torch.randn(1, 1, *FRAME), "image_sizes": torch.tensor([[16, 16]])}
    with pytest.raises(LayoutError, match="pictures and videos in calls of their own"):
        model(**both)
    with pytest.raises(LayoutError, match=r"handle.clips\(\[8, 1\]\)"):
        model.forward(**llava_prompt(4))


@pytest.mark.parametrize(
    ("images", "modalities", "lengths"),
    [
        ([torch.zeros(4, *FRAME), torch.zeros(2, *FRAME)], ["video", "video"], [4, 2]),
        ([torch.zeros(3, *FRAME), torch.zeros(4, *FRAME)], ["image", "video"], [1, 1, 1, 4]),
        ([torch.zeros(FRAME), torch.zeros(4, *FRAME)], ["video", "video"], [1, 4]),
        (torch.zeros(2, 4, *FRAME), ["video", "video"], [4, 4]),
        (torch.zeros(2, *FRAME), ["image"], [1, 1]),
        ([torch.zeros(2, *FRAME)], "video", [2]),
    ],
    ids=["two videos", "tiles and a video", "a frame and a video", "one tensor", "pictures", "a word"],
)
def test_llava_video_reads_modalities(images, modalities, lengths):
    model, handle, seen = injected("llava_video")
    ids = torch.zeros(1, 9, dtype=torch.long)
    model(ids, images, modalities)
    model(ids[:, :1], images, modalities)
    model(ids)
    assert seen == [[(frames, 16) for frames in lengths]]
    with pytest.raises(LayoutError, match="can't be known"):
        model.vision_tower(torch.zeros(2, *FRAME))
    handle.remove()
    assert "prepare_inputs_labels_for_multimodal" not in vars(model)


@INTERNVL
def test_internvl_refuses_rows_that_may_be_pictures_or_frames():
    model, handle, seen = injected("internvl")
    several = picture_prompt(4)
    for call in (model, lambda **batch: model.generate(**batch, max_new_tokens=2)):
        with pytest.raises(LayoutError, match=r"can't be known: the 4 rows.*with handle.clips\(\[8, 1\]\)"):
            call(**several)
    assert seen == []
    with torch.no_grad():
        model(**picture_prompt(1))
        model(**several, clip_lengths=[3, 1])
        with handle.clips([4]):
            model(**several, clip_lengths=[2, 2])  # what is told with a call counts, not what stands around it
            model(**several)
            model.generate(**several, max_new_tokens=2, do_sample=False)
        model.generate(**several, max_new_tokens=2, do_sample=False, clip_lengths=torch.tensor([1, 3]))
        model.model.vision_tower(several["pixel_values"])
        with handle.disabled():
            model(**several)
            model.generate(**several, max_new_tokens=2, clip_lengths=[4])
    handle.remove()
    assert "generate" not in vars(model)
    assert seen == [
        [(1, 16)],
        [(3, 16), (1, 16)],
        [(2, 16), (2, 16)],
        [(4, 16)],
        [(4, 16)],
        [(1, 16), (3, 16)],
        [(4, 16)],
    ]


def test_clips_of_an_interrupted_call_are_forgotten():
    """Torch calls no hook of a module that a KeyboardInterrupt leaves, and a notebook goes on after it."""
    model, handle, seen = injected("llava_onevision")
    video = llava_prompt(4)

    def interrupt(module, args):
        raise KeyboardInterrupt

    def generate(**prompt):
        model.generate(**prompt, max_new_tokens=1)

    turns = [(model, model), (model, generate)]
    if (
        inner := getattr(model, "model", None)
    ) is not None:  # the whole model has the parts itself in transformers 4.45
        turns += [(inner, inner), (inner, model)]
    for call, then in turns:
        hook = handle.encoder.register_forward_pre_hook(interrupt)
        with torch.no_grad():
            with pytest.raises(KeyboardInterrupt):
                call(**video, clip_lengths=[3, 1])
            hook.remove()
            then(**video)
    assert seen == [[(4, 16)]] * len(turns)


def test_what_an_interrupted_call_was_given_is_let_go():
    """A frame that somebody keeps holds all its tensors: on a GPU, those of the whole model's forward."""
    model, handle, _ = injected("llava_onevision")

    def interrupt(module, args):
        raise KeyboardInterrupt

    handle.encoder.register_forward_pre_hook(interrupt)
    video = llava_prompt(4)
    pixels = weakref.ref(video["pixel_values_videos"])
    try:
        model(**video, clip_lengths=[3, 1])
    except KeyboardInterrupt:
        del video
    gc.collect()  # the traceback's cycles
    assert pixels() is None


@pytest.mark.parametrize("case_id", TOWERS)
def test_plain_towers_take_one_picture_and_must_be_told_of_several_rows(case_id):
    case = next(case for case in all_cases() if case.id == case_id)
    model, handle, seen = injected(case_id)
    encoder = case.encoder(model)
    with torch.no_grad():
        encoder(**case.arguments([Clip(1)]))
        with pytest.raises(LayoutError, match=r"can't be known.*with handle.clips\(\[8, 1\]\)"):
            encoder(**case.arguments([Clip(2)]))
        with handle.clips([2, 1]):
            encoder(**case.arguments([Clip(3)]))
        with pytest.raises(LayoutError, match="must add up"), handle.clips([2, 2]):
            encoder(**case.arguments([Clip(3)]))
    assert [[frames for frames, _ in clips] for clips in seen] == [[1], [2, 1]]


@lacks("siglip2")
def test_siglip2_refuses_a_clip_of_frames_of_different_shapes():
    case = next(case for case in all_cases() if case.id == "siglip2")
    model, handle, _ = injected("siglip2")
    arguments = case.arguments([Clip(3)])
    arguments["spatial_shapes"] = torch.tensor([[4, 4], [4, 4], [2, 8]])
    with torch.no_grad(), handle.clips([2, 1]):
        case.encoder(model)(**arguments)
    with pytest.raises(LayoutError, match="expected all alike"), handle.clips([3]):
        case.encoder(model)(**arguments)


@pytest.mark.parametrize(
    ("grid", "told", "message"),
    [
        ([[1, 4, 4], [1, 4, 4]], None, "can't be known"),
        ([[1, 4, 4], [1, 4, 4]], [3], "the encoder got 2 frames"),
        ([[1, 4, 4], [1, 2, 8]], [2], "expected the same in each frame"),
    ],
    ids=["not told", "don't add up", "different grids"],
)
@lacks("glm4v")
def test_glms_tower_by_itself_must_be_told(grid, told, message):
    model, handle, _ = injected("glm4v-tower")
    pixels = torch.randn(sum(t * h * w for t, h, w in grid), 96)
    with handle.clips(told), pytest.raises(LayoutError, match=message):
        model(pixels, grid_thw=torch.tensor(grid))


@pytest.mark.parametrize("case", case_parameters())
def test_the_dummy_clip_runs_without_being_told(case):
    model = seeded(case.make)
    handle = inject_sta(model)
    args, kwargs = handle._injection.spec.dummy_inputs(handle.encoder)
    sum(t.sum() for t in outputs(handle.encoder(*args, **kwargs))).backward()
    assert all(p.grad is not None for p in handle.parameters())


def outputs(found):
    """The tensors of an encoder's output that depend on STA."""
    from sta_adapter.compatibility.calls import iterate_tensors

    return [t for t in iterate_tensors(found) if t.requires_grad]


@pytest.mark.parametrize("case", case_parameters(lambda case: case in CASES and case.generate is not None))
def test_every_name_of_lora_s_settings_is_in_the_model(case):
    model = seeded(case.make)
    config = inject_sta(model).lora_config()
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    missing = {t for t in config.target_modules if not any(n == t or n.endswith(f".{t}") for n in names)}
    assert missing == set(), transformers.__version__


@pytest.mark.parametrize("name", sorted({case.backbone for case in CASES if case.generate}))
def test_every_name_of_a_recipe_is_in_a_model_of_its_family(name):
    cases = [case for case in CASES if case.backbone == name and case.generate]
    here = [case for case in cases if not case.needs or find_spec(f"transformers.models.{case.needs}")]
    if here != cases:
        pytest.skip("this release of transformers lacks models of the family")
    found = {target for case in here for target in inject_sta(seeded(case.make)).lora_config().target_modules}
    assert found == {*get_backbone(name).lora.target_modules}, transformers.__version__


LATER = {"Qwen4ExpVisionModel", "Exaone4_5_VisionModel", "Glm5NextVisionModel", "Glm5NextModel"}
OF_TRANSFORMERS_4 = {"CLIPVisionTransformer", "SiglipVisionTransformer", "Siglip2VisionTransformer"}


@pytest.mark.skipif(transformers_version() < (5, 2), reason="older releases lack some of the classes")
@pytest.mark.parametrize("name", sorted({case.backbone for case in CASES} - {"llava_video"} | {"qwen2_vl"}))
def test_every_class_that_a_backbone_names_is_one_of_transformers(name):
    spec = get_backbone(name)
    named = {*spec.encoder_classes, *(spec.clip_source.model_classes if spec.clip_source else ())}
    sources = Path(transformers.__file__).parent.glob("models/*/modeling_*.py")
    families = ("qwen", "video_llama", "internvl", "llava", "clip", "dino", "siglip", "glm", "exaone4_5")
    text = "".join(p.read_text(encoding="utf-8") for p in sources if p.parent.name.startswith(families))
    elsewhere = OF_TRANSFORMERS_4 | (LATER if transformers_version() < (5, 16) else set())
    assert {cls for cls in named - elsewhere if f"\nclass {cls}(" not in text} == set()


@pytest.mark.parametrize(
    "case", case_parameters(lambda case: case.generate is not None and not case.id.endswith("moe"))
)
def test_the_encoders_queries_keys_and_values_get_the_larger_rank_of_the_recipe(case):
    peft = pytest.importorskip("peft")
    handle = inject_sta(seeded(case.make))
    wrapped = peft.get_peft_model(handle.model, handle.lora_config())
    tower = {id(module) for module in handle.encoder.modules()}
    found = {"q, k, v": set(), "others": set()}
    for name, module in wrapped.named_modules():
        if name.endswith("lora_A.default"):
            layer = name.removesuffix(".lora_A.default").rpartition(".")[2]
            inside = id(module) in tower and layer in ("qkv", "q_proj", "k_proj", "v_proj", "query", "key", "value")
            found["q, k, v" if inside else "others"].add(module.out_features)
    assert found == {"q, k, v": {32}, "others": {16}}
    scales = {m.scaling["default"] for m in wrapped.modules() if hasattr(m, "lora_A")}
    assert scales == {1.0}


def test_a_tower_within_llava_is_not_taken_for_a_plain_one():
    model = seeded(lambda: tiny("llava_onevision"))
    assert inject_sta(model).backbone == "llava_onevision"
    other = seeded(lambda: tiny("llava_onevision"))
    tower = next(m for n, m in other.named_modules() if n.endswith("vision_tower"))
    assert inject_sta(tower).backbone == "siglip"
    with pytest.raises(UnknownBackboneError, match="holds no encoder for backbone 'llava_onevision'"):
        inject_sta(seeded(lambda: tiny("siglip")), backbone="llava_onevision")


def test_a_picture_and_a_video_in_one_prompt():
    model, _, seen = injected("llava_onevision")
    if not has_a_method_for_each(model):
        pytest.skip("this release takes pictures and videos in one call; see the error's test")
    video = llava_prompt(4)
    picture = {"pixel_values": torch.randn(1, 2, *FRAME), "image_sizes": torch.tensor([[16, 16]])}
    tokens = 16 + 4 * (4 + 1)  # the whole picture, then four rows of the one tile, each with its newline
    ids = torch.cat([video["input_ids"], torch.full((1, tokens), 150)], dim=1)
    batch = {**video, **picture, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        model(**batch)
        model.generate(**batch, max_new_tokens=2, do_sample=False)
    assert seen == [[(1, 16), (1, 16)], [(4, 16)]] * 2


@pytest.mark.parametrize("how", [{"num_beams": 2}, {"do_sample": True}], ids=["beams", "samples"])
@pytest.mark.parametrize("as_embeddings", [False, True], ids=["ids", "embeddings"])
def test_several_answers_about_clips_of_unequal_lengths(how, as_embeddings):
    """Each prompt's answers are about its own clips, also where the next prompt's are encoded beside them."""
    model, _, _ = injected("llava_onevision")
    if not has_a_method_for_each(model):
        pytest.skip("this release takes no clips of unequal lengths in one forward; see the error's test")
    if as_embeddings and transformers_version() < (4, 54):
        pytest.skip("this release takes no pixels beside embeddings")
    prompts = [llava_prompt(2), llava_prompt(5)]
    width = prompts[1]["input_ids"].shape[1]
    batch = {
        "input_ids": torch.cat([F.pad(p["input_ids"], (width - p["input_ids"].shape[1], 0)) for p in prompts]),
        "attention_mask": torch.cat(
            [F.pad(p["attention_mask"], (width - p["input_ids"].shape[1], 0)) for p in prompts]
        ),
        "pixel_values_videos": put_together("pixel_values_videos", [p["pixel_values_videos"] for p in prompts]),
    }
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "num_return_sequences": 2, "suppress_tokens": [150, 151]}
    options |= {"output_logits": True, "return_dict_in_generate": True, "do_sample": False, **how}

    def first_logits(batch):
        if as_embeddings:
            ids = batch.pop("input_ids")
            batch["inputs_embeds"] = model.get_input_embeddings()(ids)
        with torch.no_grad():
            return model.generate(**batch, **options).logits[0]

    expected = torch.cat([first_logits(prompt) for prompt in prompts])
    torch.testing.assert_close(first_logits(batch), expected, rtol=1e-4, atol=1e-4)
    assert (expected[0] - expected[2]).abs().max() > 1e-2


@pytest.mark.parametrize("case_id", [LLAVA, GLM])
@pytest.mark.parametrize("reentrant", [True, False], ids=["re-entrant", "non-re-entrant"])
def test_gradients_of_a_full_model_under_checkpointing(case_id, reentrant):
    model, handle, seen = injected(case_id, order="after_spatial")
    handle.freeze_base()
    batch, clips = two_videos(case_id)
    shorter = llava_prompt(3) if case_id == "llava_onevision" else glm_prompt(3)

    def gradients():
        for parameter in handle.parameters():
            parameter.grad = None
        losses = [model(**b, use_cache=False).logits.square().mean() for b in (batch, shorter)]
        for loss in losses:
            loss.backward()
        return [p.grad.clone() for p in handle.parameters()]

    model.train()
    expected = gradients()
    assert all(g.abs().sum() > 0 for g in expected)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    found = gradients()
    assert len(seen) > 4, "nothing was computed again"
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()
    assert set(map(tuple, seen)) == {tuple(clips), ((3, 16),)}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"input_ids": torch.ones(1, 2), "attention_mask": torch.ones(1, 2), "past_key_values": ()}, False),
        ({"inputs_embeds": torch.ones(1, 2, 3), "video_grid_thw": torch.ones(1, 3), "pixel_values": None}, False),
        ({"input_ids": torch.ones(1, 2), "pixel_values_videos": torch.ones(1, 2)}, True),
        ({"input_ids": torch.ones(1, 2), "frames": torch.ones(4, 3, 8, 8)}, True),
        ({"videos": [torch.ones(4, 3, 8, 8)]}, True),
        ({"input_ids": torch.ones(1, 2), "clip_lengths": [4]}, True),
    ],
    ids=["text", "embeddings", "clips", "another name", "list", "told"],
)
def test_a_compiler_passes_by_calls_of_text_alone(arguments, told):
    """An argument that nobody knows may be clips, whatever a model calls it."""
    from sta_adapter.injection.clip_source import _may_tell

    assert _may_tell(None, None, (), arguments) is told
    assert _may_tell(None, None, (torch.ones(1),), arguments)


def test_a_compiled_call_forgets_clips_that_were_told_after_it_was_compiled():
    injection = Injection(STAConfig(), get_backbone("llava_onevision"))
    hook = ModelPostHook(injection)

    def call(x):
        y = x + 1
        hook(None, (), y)
        return y

    torch._dynamo.reset()
    compiled = torch.compile(call, backend="eager")
    compiled(torch.ones(2))
    injection.told.tell([4], torch.nn.Identity())
    compiled(torch.ones(2))
    assert injection.told.by_call.lengths is None
    torch._dynamo.reset()
