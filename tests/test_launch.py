"""`accelerate launch` with the settings of examples/cluster: two processes on the CPU train from shards."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pairs import free_port
from test_streaming import write_tar
from tiny_qwen import make_model, make_processor, write_samples

from sta_adapter import load_sta

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_two_processes_by_accelerate_launch(tmp_path):
    """One of the samples is bad; what the run made is told once."""
    processor = make_processor(tmp_path / "tokenizer")
    make_model(processor.tokenizer).save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    processor.tokenizer.chat_template = processor.chat_template
    processor.tokenizer.save_pretrained(tmp_path / "base")
    records = [json.loads(line) for line in write_samples(tmp_path, 4).read_text().splitlines()]
    for index, record in enumerate(records):
        clip = b"no video" if index == 3 else (tmp_path / f"{index}.mp4").read_bytes()
        write_tar(tmp_path / f"train-{index}.tar", [(f"{index}.mp4", clip), (f"{index}.json", record)])
    line = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / "examples/cluster/ddp.yaml"),
    ]
    line += ["--num_processes", "2", "--main_process_port", str(free_port()), "-m", "sta_adapter.cli", "train"]
    line += [
        "--model",
        str(tmp_path / "base"),
        "--data",
        f"{tmp_path}/train-{{0..3}}.tar",
        "--out",
        str(tmp_path / "out"),
    ]
    line += [
        "--stage",
        "1",
        "--batch-size",
        "4",
        "--max-steps",
        "2",
        "--set",
        "num_workers=1",
        "--set",
        "precision=fp32",
    ]
    settings = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, env={**os.environ, **settings}, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("The adapter is in ") == done.stdout.count("1 bad samples were skipped") == 1
    counts = json.loads((tmp_path / "out" / "stage1" / "samples.json").read_text())
    assert counts["place"] == {"processes": 2, "workers": 1, "batch_size": 2, "seed": 0, "since": 0}
    assert counts["bad_samples"][0].startswith(f"{tmp_path}/train-3.tar, 3: ")
    assert load_sta(make_model(processor.tokenizer), tmp_path / "out").backbone == "qwen2_vl"
