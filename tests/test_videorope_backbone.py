"""STA on VideoRoPE: which model counts as one, by `apply_videorope` or by the file of its authors."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch
import transformers
from cases import make_qwen2_vl, qwen2_vl_config, qwen2_vl_prompt, randomize
from qwen2_vl_prompts import needs_seams, transformers_version
from safetensors.torch import load_file
from standins.videorope import Qwen2VLForConditionalGeneration as PublishedStandIn

from sta_adapter import get_sta, inject_sta, load_sta
from sta_adapter.backbones.videorope import apply_videorope, remove_videorope
from sta_adapter.errors import CheckpointError, InjectionError, UnknownBackboneError

GOLDEN = Path(__file__).parent / "goldens" / "videorope"


@pytest.fixture
def model():
    return make_qwen2_vl().eval()


@needs_seams
def test_an_applied_model_is_named_videorope(model):
    assert inject_sta(apply_videorope(model)).backbone == "videorope"


@needs_seams
def test_a_removed_one_is_qwen2_vl_again(model):
    assert inject_sta(remove_videorope(apply_videorope(model))).backbone == "qwen2_vl"


@needs_seams
def test_the_name_follows_when_sta_was_there_first(model):
    handle = inject_sta(model)
    assert handle.backbone == "qwen2_vl"
    apply_videorope(model)
    assert (handle.backbone, get_sta(model)) == ("videorope", handle)
    remove_videorope(model)
    assert handle.backbone == "qwen2_vl"


@needs_seams
def test_a_tower_alone_can_not_tell(model):
    assert inject_sta(apply_videorope(model).model.visual).backbone == "qwen2_vl"


@pytest.mark.parametrize(
    ("which_rope", "name"),
    [
        pytest.param(None, "videorope", id="not-set-yet"),
        pytest.param("videorope", "videorope", id="videorope"),
        pytest.param("m_rope", "qwen2_vl", id="m-rope"),
        pytest.param("vanilla_rope", "qwen2_vl", id="vanilla"),
    ],
)
def test_the_published_file_is_told_by_its_positions(which_rope, name):
    published = PublishedStandIn(qwen2_vl_config())
    published.which_rope = which_rope
    assert inject_sta(published).backbone == name


def test_stock_qwen2_vl_is_none(model):
    assert inject_sta(model).backbone == "qwen2_vl"


def test_asking_for_it_on_stock_qwen2_vl_is_an_error(model):
    with pytest.raises(UnknownBackboneError, match="no encoder for backbone 'videorope'"):
        inject_sta(model, backbone="videorope")


@needs_seams
def test_sta_and_videorope_work_together(model):
    batch = qwen2_vl_prompt(4)
    with torch.no_grad():
        plain = apply_videorope(model)(**batch).logits
        handle = inject_sta(model)
        assert torch.equal(model(**batch).logits, plain)
        for block in handle.blocks.values():
            randomize(block)
        assert not torch.equal(model(**batch).logits, plain)
        handle.remove()
        assert torch.equal(model(**batch).logits, plain)


@needs_seams
def test_an_adapter_goes_back_to_videorope_only(model, tmp_path):
    batch = qwen2_vl_prompt(3)
    handle = inject_sta(apply_videorope(model))
    for block in handle.blocks.values():
        randomize(block)
    handle.save_pretrained(tmp_path)
    expected = model(**batch).logits
    handle.remove()
    assert torch.equal(load_sta(model, tmp_path).model(**batch).logits, expected)
    get_sta(model).remove()
    remove_videorope(model)
    with pytest.raises(CheckpointError, match="videorope"):
        load_sta(model, tmp_path)


@pytest.mark.skipif(transformers_version() >= (4, 52), reason="needs a transformers that VideoRoPE can't be applied to")
def test_an_old_transformers_is_an_error(model):
    with pytest.raises(InjectionError, match=r"of transformers 4\.\d+\.\d+ can't be given.*4.52 and newer ones can"):
        apply_videorope(model)


@pytest.fixture
def published():
    """The authors' model, from `videorope/modeling_videorope.py` in the folder of published files."""
    if transformers_version() != (4, 45):
        pytest.skip("the published file needs transformers 4.45")
    file = Path(os.environ["STA_REAL_CODE"]) / "videorope" / "modeling_videorope.py"
    if not file.is_file():
        pytest.skip(f"STA_REAL_CODE holds no {file.parent.name}/{file.name}")
    name = "transformers.models.qwen2_vl.modeling_videorope"  # it imports its neighbours in transformers
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
        yield module.Qwen2VLForConditionalGeneration.from_pretrained(GOLDEN).float().eval()
    finally:
        del sys.modules[name]


@pytest.mark.real_code
def test_the_published_file(published):
    golden = load_file(GOLDEN / "golden.safetensors")
    batch = {name: golden[name] for name in ("input_ids", "attention_mask", "pixel_values_videos", "video_grid_thw")}
    published.which_rope = "videorope"
    assert transformers.__version__.startswith("4.45")
    handle = inject_sta(published)
    assert handle.backbone == "videorope"
    kept = batch["attention_mask"] == 1
    options = {
        "which_rope": "videorope",
        "max_new_tokens": 3,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    with torch.no_grad():
        plain = published(**batch).logits
        assert (plain - golden["logits"])[kept].abs().max() <= 1e-4 * golden["logits"].abs().max()
        tokens = published.generate(**batch, **options)
        for block in handle.blocks.values():
            randomize(block)
        assert (published(**batch).logits - plain)[kept].abs().max() > 1e-3
        handle.disable()
        assert torch.equal(published.generate(**batch, **options), tokens)
        handle.remove()
        assert torch.equal(published(**batch).logits, plain)
