"""Adapters from strangers: an error of ours or an adapter that loads, in bounded time and memory; nothing else happens."""

import copy
import gc
import os
import sys

import numpy as np
import pytest
import torch
from guarded import counts, guarded
from mutations import mutate
from toy import ToyEncoder

from sta_adapter import get_sta, inject_sta, load_sta

CASES, CHUNK = counts("CASES", 20_000), 500


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Contents of two good adapters, of STA alone and with LoRA beside it."""
    from peft import get_peft_model

    found = []
    for lora in (False, True):
        torch.manual_seed(0)
        handle = inject_sta(ToyEncoder(depth=2))
        if lora:
            handle = get_sta(get_peft_model(handle.model, handle.lora_config(target_modules=["attn"], r=2)))
        folder = tmp_path_factory.mktemp("good")
        handle.save_pretrained(folder)
        found.append({path.name: path.read_bytes() for path in sorted(folder.iterdir())})
    return found


def put(folder, files):
    """Write an adapter, with the special things that stand in the place of files."""
    folder.mkdir()
    for name, data in files.items():
        path = folder / name
        if isinstance(data, bytes):
            path.write_bytes(data)
        elif data == "folder":
            path.mkdir()
        elif data == "pipe":
            os.mkfifo(path)
        else:
            targets = {"zero": "/dev/zero", "loop": name, "dangling": "nowhere", "outside": "../outside/secret"}
            path.symlink_to(targets[data])


def state_of(model):
    hooks = [(n, len(m._forward_pre_hooks), len(m._forward_hooks)) for n, m in model.named_modules()]
    return hooks, [(n, p.requires_grad) for n, p in model.named_parameters()]


def untouched(model, before, weights):
    now = model.state_dict()
    return (
        state_of(model) == before and now.keys() == weights.keys() and all(torch.equal(now[k], weights[k]) for k in now)
    )


@pytest.mark.parametrize("chunk", range(max(1, CASES // CHUNK)))
def test_changed_adapters(adapters, tmp_path, monkeypatch, chunk):
    (tmp_path / "trap.py").write_text("raise SystemExit('a stranger ran code')")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("secret")
    monkeypatch.syspath_prepend(str(tmp_path))
    torch.manual_seed(0)
    base = ToyEncoder(depth=2)
    before, weights = state_of(base), {k: v.clone() for k, v in base.state_dict().items()}
    refused = 0
    for case in range(chunk * CHUNK, (chunk + 1) * CHUNK):
        rng = np.random.default_rng([2026, case])
        change, files = mutate(adapters[case % 4 == 0], rng)
        folder, model = tmp_path / "adapter", copy.deepcopy(base)
        put(folder, files)
        error = guarded(f"case {case} ({change})", lambda model=model, folder=folder: load_sta(model, folder))
        if error is None:
            assert all(p.isfinite().all() for p in model.parameters()), f"case {case} ({change})"
        else:
            refused += 1
            assert untouched(model, before, weights), f"case {case} ({change}): {error}"
            assert "secret" not in str(error).replace("outside/secret", ""), f"case {case} ({change}): {error}"
        empty(folder)
    assert "trap" not in sys.modules
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["outside", "secret", "trap.py"]
    assert (tmp_path / "outside" / "secret").read_text() == "secret"
    assert CHUNK / 2 < refused < CHUNK  # the changes are neither all harmless nor all fatal
    gc.collect()


def empty(folder):
    for path in folder.iterdir():
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    folder.rmdir()
