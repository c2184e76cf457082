"""Files that a stranger may have written are read in bounded time and memory, or refused."""

import json
import os

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from sta_adapter.adapter import safe_read
from sta_adapter.adapter.safe_read import (
    MAX_JSON_BYTES,
    compare_shapes,
    parse_tensors,
    read_json,
    read_tensors,
    require_plain_pattern,
    require_plain_patterns,
)
from sta_adapter.errors import CheckpointError


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "can't be read as JSON"),
        ('{"a":' * 10_000 + "1" + "}" * 10_000, "can't be read as JSON"),
        ("[1]", "holds a list, expected a JSON object"),
        ("9" * 5000, "can't be read as JSON"),
        (" " * (MAX_JSON_BYTES + 1), f"has {MAX_JSON_BYTES + 1} bytes"),
        ("\x00\xff", "can't be read as JSON"),
    ],
    ids=["deep list", "deep object", "list", "long number", "long", "bytes"],
)
def test_json_that_is_none(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_bytes(text.encode("latin1"))
    with pytest.raises(CheckpointError, match=message):
        read_json(path)


@pytest.mark.parametrize("read", [read_json, read_tensors])
@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
def test_a_path_that_is_no_file_is_not_waited_for(tmp_path, read, kind):
    path = tmp_path / "file"
    {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "device": lambda: path.symlink_to("/dev/zero")}[kind]()
    with pytest.raises(CheckpointError, match="is no regular file"):
        read(path)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_only_usual_floating_point_weights(tmp_path, dtype):
    save_file({"good": torch.ones(2), "odd": torch.ones(2).to(dtype)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"1 tensors are not finite floating-point .* first is 'odd'"):
        read_tensors(tmp_path / "a.safetensors")


def safetensors_of(header, data):
    """A file whose header is found where it must be."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


NUMBERS = st.integers(-2, 40) | st.sampled_from([1 << 31, 1 << 63, 10**30]) | st.floats()
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "I64", "U8", "BOOL", "F99", ""]) | NUMBERS,
        "shape": st.lists(NUMBERS, max_size=3) | NUMBERS,
        "data_offsets": st.lists(NUMBERS, max_size=3),
    },
)
WHOLE = st.integers(0, 9).map(lambda n: {"dtype": "F32", "shape": [n], "data_offsets": [0, 4 * n]})
HEADERS = st.dictionaries(
    st.sampled_from(["a", "blocks.0.gamma", "__metadata__", ""]),
    ENTRIES | WHOLE | st.none() | st.text(max_size=3),
    max_size=2,
)


def read_noise(tmp_path_factory, data):
    """What is read of a file's contents, by each reader; None where they refuse."""
    path = tmp_path_factory.getbasetemp() / "noise.safetensors"
    path.write_bytes(data)
    found = []
    for read in (lambda: read_tensors(path)[0], lambda: parse_tensors(data, path)):
        try:
            found.append({name: tuple(value.shape) for name, value in read().items()})
        except CheckpointError:
            found.append(None)
    assert found[0] == found[1]
    return found[0]


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_no_weights(tmp_path_factory, data):
    """Those of no header, and those behind a good one."""
    assert read_noise(tmp_path_factory, data) in (None, {})
    assert read_noise(tmp_path_factory, safetensors_of(data, b"")) in (None, {})
    header = {"a": {"dtype": "F32", "shape": [len(data)], "data_offsets": [0, 4 * len(data)]}}
    whole = np.arange(len(data), dtype="<f4").tobytes()
    assert read_noise(tmp_path_factory, safetensors_of(header, whole)) == {"a": (len(data),)}
    if data:
        assert read_noise(tmp_path_factory, safetensors_of(header, data)) is None


@given(HEADERS, st.integers(0, 40))
def test_headers_that_lie_are_refused(tmp_path_factory, header, size):
    """What is read is of the sizes that the header names, and takes up all the bytes that there are."""
    found = read_noise(tmp_path_factory, safetensors_of(header, np.ones(size, "<f4").tobytes()[:size]))
    if found is not None:
        assert all(header[name]["shape"] == list(shape) for name, shape in found.items())
        width = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
        taken = sum(int(np.prod(shape)) * width[header[name]["dtype"]] for name, shape in found.items())
        assert taken == size


def test_the_readers_get_past_the_header(tmp_path, monkeypatch):
    """The tests above reach the tensors: without the last check, numbers that are none come through."""
    content = safetensors_of({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, np.float32("nan").tobytes())
    with pytest.raises(CheckpointError, match="not finite"):
        parse_tensors(content, tmp_path)
    monkeypatch.setattr(safe_read, "_require_weights", lambda state, path: None)
    assert parse_tensors(content, tmp_path)["a"].isnan().all()


def test_every_difference_is_listed(tmp_path):
    with pytest.raises(CheckpointError, match=r"missing b; unexpected c; a has the shape \(1,\), expected \(2,\)"):
        compare_shapes(tmp_path, {"a": (1,), "c": (1,)}, {"a": (2,), "b": (1,)})


@pytest.mark.parametrize(
    "pattern", [r"(a+)+$", r"(a|a)*b", r"(.*)*", r".*.*.*.*.*x", "(a{1,9}){1,9}", r"(?=(a+)+)b", "a" * 1001,
                r"a*b*c*d*e*(?:xx|yy)", r"a*b*c*d*e*(x|y)", "(a{1,2})+", "(ab|cd)+", r"(a)\1", "(?!a*b*c*)d*e*", "(?=(ab|cd)*)e", "(a*|b*|c*)d*e*"], ids=str
)  # fmt: skip
def test_patterns_that_may_not_end(tmp_path, pattern):
    with pytest.raises(CheckpointError, match="repeats too much"):
        require_plain_pattern(tmp_path, pattern)


def test_many_differences_are_counted(tmp_path):
    with pytest.raises(CheckpointError, match=r"missing 00; .*; missing 19; and 5 more\.$") as caught:
        compare_shapes(tmp_path, {}, {f"{i:02}": (1,) for i in range(25)})
    assert str(caught.value).count("missing") == 20
    with pytest.raises(CheckpointError, match=r"missing 19\.$"):
        compare_shapes(tmp_path, {}, {f"{i:02}": (1,) for i in range(20)})


@pytest.mark.parametrize(
    "pattern",
    [
        *("q_proj", "attn.qkv", r".*\.sta(\..*)?", r".*layers\.\d+\.(self_attn|mlp)\..*", "all-linear"),
        # ms-swift's for "all-linear" with the vision encoder, without its merger
        r"^(model\.language_model(?=\.).*\.(q_proj|up_proj)|(?!(model\.visual\.merger))model\.visual(?=\.).*\.(qkv|proj))$",
    ],
)
def test_usual_patterns(tmp_path, pattern):
    require_plain_pattern(tmp_path, pattern)


@pytest.mark.parametrize(
    ("patterns", "prefixed"),
    [([f"layers.{i}.q_proj" for i in range(257)], False), ([".*a.*b.*c.*d", "x.*"], False), ([".*a.*b.*c.*d"], True), ([".*a.*b.*c"] * 2, True)],
    ids=["many", "long and another", "at every place", "two at every place"],
)  # fmt: skip
def test_patterns_that_together_take_long(tmp_path, patterns, prefixed):
    with pytest.raises(CheckpointError, match=r"257 patterns .* at most 256|together repeat too much"):
        require_plain_patterns(tmp_path, patterns, prefixed)


def test_patterns_that_together_are_usual(tmp_path):
    require_plain_patterns(tmp_path, [f"layers.{i}.self_attn.q_proj" for i in range(256)], prefixed=True)
    require_plain_patterns(tmp_path, [r"blocks\.\d+\.attn\.qkv", "v_proj", r".*\.gate_up_proj"], prefixed=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"a": 1e999}', "not finite"), ('{"a": [NaN]}', "not finite"), ('{"a": {"b": 36893488147419103232}}', "more than 64 bits"),
     ('{"a":' * 33 + "1" + "}" * 33, "deeper than 32")],
    ids=["large", "nan", "whole", "deep"],
)  # fmt: skip
def test_numbers_and_depths_of_no_configuration(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(CheckpointError, match=f"a.json can't be read as JSON: .*{message}"):
        read_json(tmp_path / "a.json")
