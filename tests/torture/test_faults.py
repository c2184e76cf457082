"""Saving that is killed at any moment, on a full disk, into a folder that can't be written or that vanishes."""

import os
import random
import shutil
import signal
import subprocess
import time

import pytest
import torch
from toy import ToyEncoder

from sta_adapter import STAConfig, get_sta, inject_sta, load_sta
from sta_adapter.errors import CheckpointError

KILLS = int(os.environ.get("STA_TORTURE_KILLS", 200))


def filled(value, lora):
    """A handle all of whose trained weights have one value; so a mixture of two saves would show."""
    handle = inject_sta(ToyEncoder(depth=2), STAConfig(init="normal"))
    if lora:
        from peft import get_peft_model

        handle = get_sta(get_peft_model(handle.model, handle.lora_config(target_modules=["attn"], r=2)))
    fill(handle, value)
    return handle


def fill(handle, value):
    with torch.no_grad():
        for name, parameter in handle.model.named_parameters():
            if ".sta." in name or "lora_" in name:
                parameter.fill_(value)


def loaded_values(folder):
    """The values in an adapter, and whether it has LoRA."""
    handle = load_sta(ToyEncoder(depth=2), folder)
    values = {v.item() for n, p in handle.model.named_parameters() if ".sta." in n or "lora_" in n for v in p.unique()}
    return values, hasattr(handle.model, "peft_config")


def test_killed_while_saving(tmp_path):
    """Adapters with and without LoRA in turn, over each other; after each kill the folder holds one of them, whole."""
    folder, generator, seen = tmp_path / "adapter", random.Random(0), set()
    handles = [filled(0.0, lora=False), filled(0.0, lora=True)]
    handles[0].save_pretrained(folder)
    for kill in range(KILLS):
        child = os.fork()
        if child == 0:
            number = 0
            while True:
                number += 1
                fill(handles[number % 2], float(number))
                handles[number % 2].save_pretrained(folder)
        time.sleep(generator.uniform(0.0, 0.08))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        values, lora = loaded_values(folder)
        assert len(values) == 1, f"kill {kill}: {values}"
        assert values == {0.0} or lora == bool(values.pop() % 2), f"kill {kill}"
        seen.add(lora)
    assert seen == {False, True}


def small_disk(folder):
    """A disk of 64 KiB, if this process may mount one."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")


def test_full_disk(tmp_path):
    disk = tmp_path / "disk"
    small_disk(disk)
    try:
        filled(1.0, lora=True).save_pretrained(disk / "adapter")
        (disk / "ballast").write_bytes(b"x" * (shutil.disk_usage(disk).free - 8192))
        with pytest.raises(CheckpointError, match="No space left on device"):
            filled(2.0, lora=True).save_pretrained(disk / "adapter")
        assert loaded_values(disk / "adapter") == ({1.0}, True)
        assert not [p.name for p in (disk / "adapter").iterdir() if p.name.startswith(".")]
        (disk / "ballast").unlink()
        filled(3.0, lora=True).save_pretrained(disk / "adapter")
        assert loaded_values(disk / "adapter") == ({3.0}, True)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_read_only_disk(tmp_path):
    disk = tmp_path / "disk"
    small_disk(disk)
    try:
        filled(1.0, lora=False).save_pretrained(disk / "adapter")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        with pytest.raises(CheckpointError, match=r"can't write the adapter to .*Read-only"):
            filled(2.0, lora=False).save_pretrained(disk / "adapter")
        assert loaded_values(disk / "adapter") == ({1.0}, False)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_folder_that_vanishes(tmp_path):
    """Someone deletes the folder again and again while it is saved to: an error of ours, or a whole adapter."""
    folder, handle, errors = tmp_path / "adapter", filled(1.0, lora=True), []
    child = os.fork()
    if child == 0:
        while True:
            shutil.rmtree(folder, ignore_errors=True)
            time.sleep(0.002)
    try:
        for _ in range(100):
            try:
                handle.save_pretrained(folder)
            except CheckpointError as error:
                errors.append(str(error))
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    handle.save_pretrained(folder)
    assert loaded_values(folder) == ({1.0}, True)
    assert all(str(folder) in error for error in errors)
