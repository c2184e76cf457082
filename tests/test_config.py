"""STAConfig: what it takes, what it refuses, and how a backbone's defaults come in."""

import copy
import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sta_adapter import STAConfig
from sta_adapter._validate import shown
from sta_adapter.errors import ConfigError, STAError

valid = st.builds(
    lambda looks, **others: STAConfig(**looks, **others),
    looks=st.sampled_from(
        [{"causal": c, "window": w} for c, w in ((False, None), (True, None), (True, 1), (True, 64))]
    ),
    head_scale=st.floats(0.01, 16),
    order=st.sampled_from(["after_spatial", "before_spatial"]),
    layers=st.just("all") | st.sets(st.integers(0, 99), min_size=1).map(tuple),
    rope_theta=st.none() | st.floats(1, 1e7),
    gamma_init=st.none() | st.floats(-1, 1),
    init=st.sampled_from(["zero", "normal"]),
    single_frames=st.booleans(),
    attention=st.sampled_from(["auto", "xformers", "sdpa", "eager"]),
    token_order=st.sampled_from(["clip", "published"]),
)


def test_pinned_defaults():
    assert STAConfig().to_dict() == {
        "head_scale": 0.25,
        "order": "after_spatial",
        "layers": "all",
        "rope_theta": 10000.0,
        "gamma_init": None,
        "init": "zero",
        "single_frames": True,
        "causal": False,
        "attention": "auto",
        "token_order": "clip",
        "window": None,
    }


@given(valid)
def test_round_trip(config):
    assert STAConfig.from_dict(config.to_dict()) == config


@given(valid)
def test_what_is_given_always_holds(config):
    assert config.with_defaults({"head_scale": 9.0, "rope_theta": None, "causal": True}) == config


def test_what_is_not_given_takes_the_backbones_default():
    config = STAConfig(layers=[2, 0]).with_defaults({"head_scale": 1.0, "rope_theta": None, "layers": [7]})
    assert (config.head_scale, config.rope_theta, config.layers) == (1.0, None, (0, 2))
    assert STAConfig(rope_theta=10000.0).with_defaults({"rope_theta": None}).rope_theta == 10000.0


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("head_scale", 0, "above 0"),
        ("head_scale", -1.0, "above 0"),
        ("head_scale", float("nan"), "finite number"),
        ("head_scale", 17, "at most 16"),
        pytest.param("rope_theta", 10**400, "finite number or None", id="a number without a float"),
        ("head_scale", None, r"finite number\.$"),
        ("head_scale", "0.25", "finite number"),
        ("head_scale", True, "finite number"),
        ("rope_theta", 0, "above 0"),
        ("rope_theta", float("inf"), "finite number or None"),
        ("gamma_init", "x", "finite number or None"),
        ("order", "between", "'after_spatial', 'before_spatial'"),
        ("init", None, "'zero', 'normal'"),
        ("attention", "flash", "'auto', 'xformers', 'sdpa', 'eager'"),
        ("token_order", "frame", "'clip', 'published'"),
        ("single_frames", 1, "True or False"),
        ("causal", "no", "True or False"),
        ("window", 0, "whole number of frames above 0"),
        ("window", -1, "whole number of frames above 0"),
        ("window", 2.0, "whole number of frames above 0"),
        ("window", True, "whole number of frames above 0"),
        ("window", "8", "whole number of frames above 0"),
        ("window", 8, "needs causal=True; found causal=False"),
        ("layers", "some", "'all' or a sequence"),
        ("layers", 3, "'all' or a sequence"),
        ("layers", [], "nothing in it"),
        ("layers", [0, -1], "-1 in it"),
        ("layers", [0.5], "0.5 in it"),
        ("layers", [True], "True in it"),
        ("layers", [1, 1], "twice"),
    ],
)
def test_bad_values(field, value, message):
    with pytest.raises(ConfigError, match=message) as caught:
        STAConfig(**{field: value})
    assert field in str(caught.value)
    assert isinstance(caught.value, STAError)
    assert isinstance(caught.value, ValueError)


def test_unknown_fields_are_all_named_with_a_suggestion():
    with pytest.raises(
        ConfigError, match=r"'head_scales' \(did you mean 'head_scale'\?\), 'zzz'; known: head_scale, order"
    ):
        STAConfig.from_dict({"head_scales": 1, "zzz": 2})
    with pytest.raises(ConfigError, match="mapping of fields, not list"):
        STAConfig.from_dict([1])


def test_values_in_errors_are_cut_where_they_are_long_or_deep():
    assert shown("x" * 500) == "'" + "x" * 57 + "..." + "x" * 58 + "'"
    assert shown(list(range(100))) == "[" + ", ".join(map(str, range(26))) + ", ...]"
    assert shown([[[[1]]]]) == "[[[[...]]]]"
    assert shown({"a": 1}) == "{'a': 1}"


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        STAConfig().causal = True


def test_copies_are_the_same_settings():
    config = STAConfig(causal=True)
    assert copy.deepcopy([config])[0] is config
