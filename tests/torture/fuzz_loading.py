"""Coverage-guided fuzzing of what reads an adapter's settings and files: `python fuzz_loading.py -max_total_time=600`.

Needs atheris (pip install atheris). An input begins with a byte that says what the rest is; what is found is an error
that is not ours, a hang (`-timeout=20`) or much memory (`-rss_limit_mb=4096`).
"""

import contextlib
import json
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["sta_adapter"]):
    from sta_adapter import config
    from sta_adapter.adapter import format as adapter_format
    from sta_adapter.adapter import lora_weights as lora_files
    from sta_adapter.adapter import safe_read as reading
from sta_adapter.errors import STAError

FOLDER = Path(tempfile.mkdtemp())


def settings(data):
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(data)
        if isinstance(value, dict):
            config.STAConfig.from_dict(value)


def description(data):
    (FOLDER / adapter_format.CONFIG).write_bytes(data)
    found = adapter_format.read_description(FOLDER)
    config.STAConfig.from_dict(found["config"])


def weights(data):
    (FOLDER / adapter_format.WEIGHTS).write_bytes(data)
    adapter_format.read_weights(FOLDER)


def lora(data):
    path = FOLDER / lora_files.LORA_CONFIG
    path.write_bytes(data)
    lora_files.read_lora(FOLDER)


def pattern(data):
    reading.require_plain_pattern(FOLDER, data.decode("utf-8", "replace"))


TARGETS = (settings, description, weights, lora, pattern)


def one_input(data):
    if data:
        with contextlib.suppress(STAError):
            TARGETS[data[0] % len(TARGETS)](data[1:])


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
