"""Adapters as a stranger could have changed them: `mutate(files, rng)` gives a name of the change and the new files.

A file is bytes, or a special thing of `SPECIAL` to be put in its place.
"""

import json
import struct

import numpy as np

WEIGHTS, CONFIG = "sta_adapter.safetensors", "sta_config.json"
LORA_WEIGHTS, LORA_CONFIG = "adapter_model.safetensors", "adapter_config.json"
SPECIAL = ("folder", "pipe", "zero", "loop", "dangling", "outside")
JUNK = [
    None, True, -1, 0, 10**30, 1e400, float("nan"), "", "x" * 5000, "../../../../etc/passwd", "/etc/passwd", "trap",
    "trap.Trap", [], [[]], {}, {"a": {"b": []}}, "\ud800", "é\x00", [1, 2, 3], ["..", "../.."], "(a+)+$", 1 << 62, -0.5,
]  # fmt: skip
DTYPES = ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "I32", "U8", "BOOL", "C64", "F4", "X", 7]


def pick(rng, choices):
    return choices[int(rng.integers(len(choices)))]


def flip(data, rng):
    """Some bytes changed, most often near the beginning, where the headers are."""
    data = bytearray(data)
    for _ in range(int(rng.integers(1, 9))):
        reach = len(data) if rng.random() < 0.3 else min(len(data), 400)
        data[int(rng.integers(reach))] = int(rng.integers(256))
    return bytes(data)


def cut(data, rng):
    return data[: int(rng.integers(len(data)))]


def grow(data, rng):
    at = int(rng.integers(len(data)))
    return data[:at] + rng.bytes(int(rng.integers(1, 2000))) + data[at:]


def lie_about_length(data, rng):
    length = pick(rng, [0, 1, 7, 2**31, 2**63, 2**64 - 1, len(data), len(data) - 8, 100_000_001, 99_999_999])
    return struct.pack("<Q", length) + data[8:]


def header(data, rng):
    """The safetensors header, with one entry spoilt."""
    (length,) = struct.unpack("<Q", data[:8])
    entries = json.loads(data[8 : 8 + length])
    names = [name for name in entries if name != "__metadata__"]
    name = pick(rng, names)
    entry = entries[name]
    what = int(rng.integers(9))
    if what == 0:
        entry["dtype"] = pick(rng, DTYPES)
    elif what == 1:
        entry["shape"] = pick(rng, [[], [0], [-1], [2**62, 4], [1] * 100, entry["shape"][::-1], "4", [1.5]])
    elif what == 2:
        entry["data_offsets"] = pick(rng, [[0, 0], [0, 2**63], [8, 4], [-4, 4], [0], entries[names[0]]["data_offsets"]])
    elif what == 3:
        entries[
            pick(rng, ["../out", "blocks.0.sta.norm.weight", "blocks.99.norm.weight", "", "a\x00b", name + ".x"])
        ] = entry
    elif what == 4:
        del entries[name]
    elif what == 5:
        entries["__metadata__"] = pick(rng, [*JUNK, {"format": "pt", "sta_config_sha256": "0" * 64}])
    elif what == 6:
        entries[name] = pick(rng, JUNK)
    elif what == 7:
        entry[pick(rng, ["extra", "dtype", "shape"])] = pick(rng, JUNK)
    text = json.dumps(entries)
    if what == 8:  # the same key twice
        text = text[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}" + "}"
    raw = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw + data[8 + length :]


def not_finite(data, rng):
    (length,) = struct.unpack("<Q", data[:8])
    values = np.frombuffer(data[8 + length :], np.float32).copy()
    values[int(rng.integers(len(values)))] = pick(rng, [np.nan, np.inf, -np.inf])
    return data[: 8 + length] + values.tobytes()


def settings(data, rng):
    """A JSON file with a value replaced by junk, at any depth, or a field more or less."""
    root = json.loads(data)
    place = root
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = pick(rng, keys) if keys else None
        if key is not None and isinstance(place[key], dict | list) and place[key] and rng.random() < 0.6:
            place = place[key]
            continue
        break
    if isinstance(place, dict) and (key is None or rng.random() < 0.15):
        place[pick(rng, ["extra", "lora", "config", "auto_mapping", "megatron_config", "__class__"])] = pick(rng, JUNK)
    elif isinstance(place, dict) and rng.random() < 0.15:
        del place[key]
    elif key is not None:
        place[key] = pick(rng, JUNK)
    return json.dumps(root).encode("utf-8", "surrogatepass")


def deep(data, rng):
    depth = pick(rng, [1000, 10_000, 200_000])
    return pick(rng, [b"[" * depth + b"]" * depth, b'{"config":' * depth + b"1" + b"}" * depth])


def mutate(files, rng):
    """One to three changes to a copy of an adapter's files."""
    files, names = dict(files), []
    for _ in range(pick(rng, [1, 1, 1, 2, 3])):
        name = pick(rng, sorted(files))
        data = files[name]
        if not isinstance(data, bytes) or not data:
            continue
        own = (
            (header, header, not_finite, lie_about_length)
            if name.endswith("tensors")
            else (settings, settings, settings, deep)
        )
        change = pick(rng, [flip, cut, grow, *own, *own, None, None])
        if change is None:
            files[name] = pick(rng, SPECIAL)
        else:
            try:
                files[name] = change(data, rng)
            except (ValueError, KeyError, TypeError, IndexError, AttributeError, struct.error, RecursionError):
                files[name] = flip(data, rng)  # a file that an earlier change left without a structure
        names.append(f"{change.__name__ if change else files[name]} {name}")
    return ", ".join(names), files
