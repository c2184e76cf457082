"""An adapter and the model it was trained on: what is another model, and what is not."""

import json
from types import SimpleNamespace

import pytest
from cases import make_qwen2_vl, make_qwen2_vl_tower, seeded
from test_inject import assert_unchanged, state

from sta_adapter import inject_sta, load_sta
from sta_adapter.adapter import base_model
from sta_adapter.adapter.base_model import describe_base, is_hub_id
from sta_adapter.adapter.format import CONFIG
from sta_adapter.errors import CheckpointError, ConfigError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def model(name=None, **text):
    """A tiny Qwen2-VL under a name, with other sizes of the language model."""
    made = seeded(make_qwen2_vl)
    made.config._name_or_path = name or ""
    part = getattr(made.config, "text_config", made.config)
    for key, value in text.items():
        setattr(part, key, value)
    return made


def saved(folder, name=None):
    """The folder of an adapter that was trained on a model of that name."""
    inject_sta(model(name)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("trained_on", "loaded_into"),
    [
        (None, None),
        ("org/a", "org/a"),
        ("org/a", "Org/A"),
        ("org/a", None),
        (None, "org/a"),
        ("org/a", "/models/anything"),
        ("./models/a", "../models/b"),
        ("/models/a", "org/a"),
        ("org/a", f"/cache/models--org--a/snapshots/{COMMIT}"),
    ],
)
def test_the_same_model_under_any_of_its_names(tmp_path, trained_on, loaded_into):
    assert load_sta(model(loaded_into), saved(tmp_path, trained_on)).backbone == "qwen2_vl"


@pytest.mark.parametrize("here", ["org/b", f"/cache/models--org--b/snapshots/{COMMIT}"], ids=["id", "cached"])
def test_another_id_is_another_model(tmp_path, here):
    saved(tmp_path, "org/a")
    other = model(here)
    before = state(other)
    with pytest.raises(
        CheckpointError, match=r"trained on 'org/a'; the model is 'org/b'\. .*base_model='any' \(--any-base of"
    ):
        load_sta(other, tmp_path)
    assert_unchanged(other, before)
    assert load_sta(other, tmp_path, base_model="any").backbone == "qwen2_vl"


def test_a_relative_folder_is_no_id(tmp_path, monkeypatch):
    (tmp_path / "models" / "a").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "adapter", "models/a")
    assert json.loads((tmp_path / "adapter" / CONFIG).read_text())["base_model"]["id"] == "./models/a"
    assert load_sta(model("org/b"), tmp_path / "adapter").backbone == "qwen2_vl"


def test_another_language_model_behind_the_same_encoder(tmp_path):
    saved(tmp_path, "org/2b")
    larger = model("org/7b", hidden_size=96, num_hidden_layers=7)
    message = r"another language model: hidden_size: \d+ in the adapter, 96 in the model; num_hidden_layers: \d+ in the adapter, 7"
    with pytest.raises(CheckpointError, match=message + r".*trained on 'org/2b'; the model is 'org/7b'"):
        load_sta(larger, tmp_path)
    assert load_sta(larger, tmp_path, base_model="any").backbone == "qwen2_vl"


@pytest.mark.parametrize("size", ["hidden_size", "num_hidden_layers", "num_attention_heads"])
def test_each_size_of_the_language_model_counts(tmp_path, size):
    saved(tmp_path)
    with pytest.raises(
        CheckpointError, match=rf"another language model: {size}: \d+ in the adapter, 99 in the model\."
    ):
        load_sta(model(**{size: 99}), tmp_path)


SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        *(({name: SimpleNamespace(**SIZES), "hidden_size": 5}, SIZES) for name in base_model.LANGUAGE_PARTS),
        ({"llm_config": SIZES}, SIZES),
        ({"vision_config": {}, **SIZES}, SIZES),
        ({"mm_vision_tower": "tower", **SIZES}, SIZES),
        ({"vision_config": {}}, None),
        (SIZES, None),
        ({"text_config": {"hidden_size": 8}}, {**dict.fromkeys(SIZES), "hidden_size": 8}),
    ],
)
def test_sizes_of_the_language_model_in_every_form_of_configuration(fields, expected):
    assert describe_base(SimpleNamespace(config=SimpleNamespace(**fields)))["language_model"] == expected


def test_a_folder_is_named_as_it_is(tmp_path):
    assert describe_base(model(str(tmp_path)))["id"] == str(tmp_path)
    assert describe_base(SimpleNamespace()) == {"id": None, "revision": None, "language_model": None}


def test_another_encoder_is_never_waived(tmp_path):
    saved(tmp_path, "org/a")
    description = json.loads((tmp_path / CONFIG).read_text())
    description["encoder"]["width"] = 1280
    (tmp_path / CONFIG).write_text(json.dumps(description))
    message = "another encoder: width: 1280 in the adapter, 32 in the model. It was trained on 'org/a'; the model is"
    with pytest.raises(CheckpointError, match=message + " a model without a name"):
        load_sta(model(), tmp_path, base_model="any")


def test_a_tower_and_a_full_model_may_share_an_adapter(tmp_path):
    inject_sta(seeded(make_qwen2_vl_tower)).save_pretrained(tmp_path / "tower")
    assert json.loads((tmp_path / "tower" / CONFIG).read_text())["language_model"] is None
    assert load_sta(model("org/a"), tmp_path / "tower").backbone == "qwen2_vl"
    assert load_sta(seeded(make_qwen2_vl_tower), saved(tmp_path / "full", "org/a")).backbone == "qwen2_vl"


@pytest.mark.parametrize("base", [None, "text", {"id": 3}, {}], ids=repr)
def test_what_an_adapter_does_not_say_is_not_compared(tmp_path, base):
    saved(tmp_path)
    description = {**json.loads((tmp_path / CONFIG).read_text()), "base_model": base, "language_model": "x"}
    (tmp_path / CONFIG).write_text(json.dumps(description))
    assert load_sta(model("org/b"), tmp_path).backbone == "qwen2_vl"


def test_only_any_waives(tmp_path):
    saved(tmp_path)
    with pytest.raises(ConfigError, match="base_model is 'org/b', expected 'any'"):
        load_sta(model(), tmp_path, base_model="org/b")


def test_a_path_into_the_cache_tells_id_and_commit():
    found = describe_base(model(f"/home/x/hub/models--org--a-2B.v1/snapshots/{COMMIT}"))
    assert (found["id"], found["revision"]) == ("org/a-2B.v1", COMMIT)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("user/name", True),
        ("a/b/c", False),
        ("./a", False),
        ("../a", False),
        ("/a", False),
        ("a", False),
        (None, False),
    ],
)
def test_the_form_of_ids(name, expected):
    assert is_hub_id(name) is expected
