"""Backbones from other packages: the example, installed for real, and everything that can go wrong with a plug-in."""

import contextlib
import copy
import dataclasses
import importlib.metadata
import importlib.util
import logging
import os
import pickle
import re
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
import transformers

from sta_adapter import Backbone, STAConfig, get_sta, inject_sta, list_backbones, load_sta, register_backbone
from sta_adapter.attention.layout import ClipLayout
from sta_adapter.backbones.frames import attention_heads, picture_dummy, pixel_layout
from sta_adapter.errors import ConfigError, InjectionError, UnknownBackboneError
from sta_adapter.injection import registry
from sta_adapter.injection.registry import ENTRY_POINT_GROUP, get_backbone, in_vllm, unregister_backbone

EXAMPLE = Path(__file__).parent.parent / "examples" / "my_vit_plugin"
USE = """
import torch
from my_vit_plugin import MyViT
from sta_adapter import STAConfig, inject_sta, list_backbones

assert "my_vit" in list_backbones(), list_backbones()
assert "qwen2_vl" in list_backbones(), list_backbones()
encoder, frames = MyViT().eval(), torch.randn(8, 3, 16, 16)
before = encoder(frames)
handle = inject_sta(encoder, STAConfig(init="normal"))
other = frames.clone()
other[1] = 0
with handle.clips([3, 5]):
    changed = (encoder(frames) - encoder(other)).abs().amax((1, 2)) > 0
assert changed.tolist() == [True] * 3 + [False] * 5, changed
handle.remove()
assert torch.equal(encoder(frames), before)
print("works:", handle.backbone)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the example package in it, installed by pip from a copy of its source."""
    missing = [name for name in ("setuptools", "pip") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"building a package needs {' and '.join(missing)}")
    source, target = tmp_path_factory.mktemp("source") / "my_vit_plugin", tmp_path_factory.mktemp("site")
    shutil.copytree(EXAMPLE, source, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--target", str(target)]
    command = [sys.executable, "-m", "pip", "install", *options, str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


@pytest.fixture
def example(monkeypatch):
    """The example's modules, without installing it."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    import my_vit_plugin.backbone

    yield my_vit_plugin
    if "my_vit" in list_backbones():
        unregister_backbone("my_vit")


@pytest.fixture
def fresh_registry(monkeypatch):
    """A registry that has not looked for plug-ins yet, and the built-in entry points."""
    found = list(importlib.metadata.entry_points(group=ENTRY_POINT_GROUP))
    monkeypatch.setattr(registry, "_REGISTRY", {})
    monkeypatch.setattr(registry, "_LOADED_ENTRY_POINTS", False)
    return [entry for entry in found if entry.name == "qwen2_vl"]


def with_plugins(monkeypatch, entries, **plugins):
    """Let the installed packages offer these entry points."""
    added = [importlib.metadata.EntryPoint(name, value, ENTRY_POINT_GROUP) for name, value in plugins.items()]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [*entries, *added])


def test_the_installed_example_is_found_and_works(installed, tmp_path):
    path = os.pathsep.join([str(installed), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", USE], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "works: my_vit\n"


def test_the_readme_of_the_example_runs(installed, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (EXAMPLE / "README.md").read_text(encoding="utf-8"), re.S)
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    code = "\n".join([*blocks, "print(tuple(tokens.shape))"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert (done.returncode, done.stdout) == (0, "(8, 17, 32)\n"), done.stderr


def test_the_error_in_the_readme_is_what_is_raised(example):
    wrong = dataclasses.replace(example.backbone.BACKBONE, norm="attention_norm")
    with pytest.raises(InjectionError) as caught:
        inject_sta(example.MyViT(), backbone=wrong)
    readme = " ".join((EXAMPLE / "README.md").read_text(encoding="utf-8").split())
    assert f"InjectionError: {caught.value}" in readme


def test_registered_in_the_process(example, tmp_path):
    with pytest.raises(UnknownBackboneError, match="no backbone matches 'MyViT'"):
        inject_sta(example.MyViT())
    register_backbone(example.backbone.BACKBONE)
    register_backbone(example.backbone.BACKBONE)  # twice is fine
    assert "my_vit" in list_backbones()
    torch.manual_seed(1)
    encoder = example.MyViT().eval()
    twin = example.MyViT().eval()
    twin.load_state_dict(encoder.state_dict())
    handle = inject_sta(encoder, STAConfig(init="normal"))
    assert handle.backbone == "my_vit"
    handle.save_pretrained(tmp_path)
    frames = torch.randn(4, 3, 16, 16)
    with load_sta(twin, tmp_path).clips([4]), handle.clips([4]):
        assert torch.equal(twin(frames), encoder(frames))


def llama4_vision():
    """The vision encoder of Llama 4, whose class token stands behind the patches."""
    sizes = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}
    config = transformers.Llama4VisionConfig(image_size=56, patch_size=14, **sizes, **ends)
    torch.manual_seed(0)
    encoder = transformers.Llama4VisionModel(config).eval()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return encoder


@pytest.mark.skipif(not hasattr(transformers, "Llama4VisionModel"), reason="this transformers has no Llama 4")
def test_a_class_token_behind_the_patches():
    backbone = Backbone(
        name="llama4",
        encoder_classes=("Llama4VisionModel",),
        blocks="model.layers",
        norm="post_attention_layernorm",
        heads=attention_heads,
        layout=pixel_layout(prefix=0, suffix=1),
        separate_frames=True,
        dummy_inputs=picture_dummy,
    )
    encoder, frames, streams = llama4_vision(), torch.randn(5, 3, 56, 56), []
    handle = inject_sta(encoder, STAConfig(init="normal"), backbone=backbone)
    encoder.model.layers[0].post_attention_layernorm.register_forward_pre_hook(
        lambda _, args: streams.append(args[0].clone())
    )
    with torch.no_grad(), handle.clips([2, 3]):
        for is_on in (handle.disabled(), contextlib.nullcontext()):
            with is_on:
                encoder(frames)
    before, after = streams
    assert torch.equal(after[:, -1], before[:, -1])
    for clip in (slice(0, 2), slice(2, 5)):
        for position in range(16):
            one = ClipLayout([(clip.stop - clip.start, 1)])
            with torch.no_grad():
                branch = handle.blocks[0](before[clip, position], one)
            torch.testing.assert_close(after[clip, position], before[clip, position] + branch)
    with pytest.raises(InjectionError, match=r"16 tokens and 2 class tokens a row, but .* shape \(1, 17, 32\)"):
        inject_sta(llama4_vision(), backbone=dataclasses.replace(backbone, layout=pixel_layout(prefix=1, suffix=1)))


def test_of_two_that_fit_an_adapter_takes_its_own(example, tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", {name: get_backbone(name) for name in list_backbones()})
    for name in ("my_vit", "another"):  # which comes first where none is named
        register_backbone(dataclasses.replace(example.backbone.BACKBONE, name=name))
        inject_sta(example.MyViT(), backbone=name).save_pretrained(tmp_path / name)
    assert inject_sta(example.MyViT()).backbone == "another"
    assert [load_sta(example.MyViT(), tmp_path / name).backbone for name in ("my_vit", "another")] == [
        "my_vit",
        "another",
    ]


def test_a_spec_that_was_passed_stays_unregistered(example):
    spec = example.backbone.BACKBONE
    before = list_backbones()
    encoder, frames = example.MyViT().eval(), torch.randn(4, 3, 16, 16)
    handle = inject_sta(encoder, STAConfig(init="normal"), backbone=spec)
    twin = copy.deepcopy(encoder)
    with handle.clips([4]), get_sta(twin).clips([4]):
        assert torch.equal(twin(frames), encoder(frames))
    with pytest.raises(ConfigError, match=r"the name 'my_vit', under which none is registered. Call register_backbone"):
        pickle.dumps(encoder)
    assert handle.lora_config(target_modules=["qkv"]).target_modules == {"qkv"}
    handle.remove()
    assert list_backbones() == before
    other = dataclasses.replace(spec, defaults={"head_scale": 0.5})
    assert inject_sta(encoder, backbone=other).config.head_scale == 0.5
    with pytest.raises(UnknownBackboneError, match="no backbone matches 'MyViT'"):
        inject_sta(example.MyViT())


def test_a_pickled_model_finds_its_registered_backbone(example):
    register_backbone(example.backbone.BACKBONE)
    encoder, frames = example.MyViT().eval(), torch.randn(1, 3, 16, 16)
    inject_sta(encoder, STAConfig(init="normal"))
    assert torch.equal(pickle.loads(pickle.dumps(encoder))(frames), encoder(frames))


def test_unregistered(example):
    register_backbone(example.backbone.BACKBONE)
    unregister_backbone("my_vit")
    assert "my_vit" not in list_backbones()
    with pytest.raises(UnknownBackboneError, match=r"no backbone 'my_vit'; known: .*qwen2_vl"):
        unregister_backbone("my_vit")


def test_a_name_that_is_taken_names_both_modules(example):
    mine = dataclasses.replace(example.backbone.BACKBONE, name="qwen2_vl")
    match = r"'qwen2_vl' is registered already: by sta_adapter\.backbones\.qwen2_vl, now by my_vit_plugin\.backbone"
    for attempt in (lambda: register_backbone(mine), lambda: inject_sta(example.MyViT(), backbone=mine)):
        with pytest.raises(ConfigError, match=match):
            attempt()
    assert get_backbone("qwen2_vl").encoder_classes == ("Qwen2VisionTransformerPretrainedModel",)


def test_a_name_is_taken_also_before_any_backbone_was_looked_up(example, fresh_registry, monkeypatch):
    with_plugins(monkeypatch, fresh_registry)
    with pytest.raises(ConfigError, match="'qwen2_vl' is registered already"):
        register_backbone(dataclasses.replace(example.backbone.BACKBONE, name="qwen2_vl"))


def test_only_a_backbone_can_be_registered():
    with pytest.raises(ConfigError, match="takes a Backbone, not dict"):
        register_backbone({"name": "mine"})


def test_a_plugin_is_loaded_when_it_is_needed(example, fresh_registry, monkeypatch):
    with_plugins(monkeypatch, fresh_registry, my_vit="my_vit_plugin.backbone:BACKBONE")
    assert list_backbones() == ["my_vit", "qwen2_vl"]
    assert inject_sta(example.MyViT()).backbone == "my_vit"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        pytest.param("no_such_package_at_all:BACKBONE", "ModuleNotFoundError", id="no module"),
        pytest.param("my_vit_plugin.backbone:NOTHING", "AttributeError", id="no such name"),
        pytest.param("my_vit_plugin.model:MyViT", "takes a Backbone, not type", id="no Backbone"),
        pytest.param("my_vit_clash:BACKBONE", "'qwen2_vl' is registered already", id="a name that is taken"),
        pytest.param("my_vit_broken:BACKBONE", "ZeroDivisionError", id="fails on import"),
    ],
)
def test_a_broken_plugin_warns_and_blocks_nobody(value, reason, example, fresh_registry, monkeypatch, tmp_path, caplog):
    (tmp_path / "my_vit_broken.py").write_text("1 / 0\n")
    (tmp_path / "my_vit_clash.py").write_text(
        "import dataclasses\nfrom my_vit_plugin.backbone import BACKBONE\n"
        "BACKBONE = dataclasses.replace(BACKBONE, name='qwen2_vl')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins = {"zz_broken": value, "my_vit": "my_vit_plugin.backbone:BACKBONE"}
    with_plugins(monkeypatch, fresh_registry, **plugins)
    with caplog.at_level(logging.WARNING, "sta_adapter.injection.registry"):
        assert list_backbones() == ["my_vit", "qwen2_vl"]
    (record,) = [r for r in caplog.records if r.name == "sta_adapter.injection.registry"]
    assert "backbone plug-in 'zz_broken' of unknown package is left out" in record.getMessage()
    assert reason in record.getMessage()
    assert inject_sta(example.MyViT()).backbone == "my_vit"
    assert get_backbone("qwen2_vl").encoder_classes == ("Qwen2VisionTransformerPretrainedModel",)


def write_module(folder, name, text):
    (folder / f"{name}.py").write_text(textwrap.dedent(text))


def test_a_plugin_that_ends_the_process_is_left_out(example, fresh_registry, monkeypatch, tmp_path, caplog):
    write_module(tmp_path, "my_vit_exits", "raise SystemExit(3)")
    monkeypatch.syspath_prepend(str(tmp_path))
    with_plugins(
        monkeypatch, fresh_registry, aa_exits="my_vit_exits:BACKBONE", my_vit="my_vit_plugin.backbone:BACKBONE"
    )
    assert list_backbones() == ["my_vit", "qwen2_vl"]
    assert "backbone plug-in 'aa_exits' of unknown package is left out: SystemExit: 3" in caplog.text


def test_an_interrupt_is_no_plugins_fault_and_loading_starts_again(example, fresh_registry, monkeypatch, tmp_path):
    write_module(tmp_path, "my_vit_interrupted", "raise KeyboardInterrupt")
    monkeypatch.syspath_prepend(str(tmp_path))
    with_plugins(
        monkeypatch, fresh_registry, aa="my_vit_interrupted:BACKBONE", my_vit="my_vit_plugin.backbone:BACKBONE"
    )
    with pytest.raises(KeyboardInterrupt, match=""):
        list_backbones()
    write_module(tmp_path, "my_vit_interrupted", "from my_vit_plugin.backbone import BACKBONE")
    importlib.invalidate_caches()
    assert list_backbones() == ["my_vit", "qwen2_vl"]


@pytest.mark.parametrize("by", ["entry point", "register_backbone at import"])
def test_no_plugin_takes_a_built_in_ones_place(by, example, fresh_registry, monkeypatch, tmp_path, caplog):
    """Whatever its entry point is called, ours are there before it is imported."""
    write_module(
        tmp_path,
        "my_vit_first",
        """
        import dataclasses
        from my_vit_plugin.backbone import BACKBONE as OTHER
        from sta_adapter import register_backbone
        BACKBONE = dataclasses.replace(OTHER, name="qwen2_vl")
        """
        + ("" if by == "entry point" else "register_backbone(BACKBONE)\n"),
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with_plugins(monkeypatch, fresh_registry, aa_first="my_vit_first:BACKBONE")
    assert get_backbone("qwen2_vl").encoder_classes == ("Qwen2VisionTransformerPretrainedModel",)
    assert "'aa_first' of unknown package is left out" in caplog.text


def test_two_plugins_of_one_name_are_both_left_out(example, fresh_registry, monkeypatch, tmp_path, caplog):
    write_module(
        tmp_path,
        "my_vit_double",
        """
        import dataclasses
        from my_vit_plugin.backbone import BACKBONE as OTHER
        BACKBONE = dataclasses.replace(OTHER, encoder_classes=("Another",))
        """,
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with_plugins(monkeypatch, fresh_registry, aa="my_vit_double:BACKBONE", my_vit="my_vit_plugin.backbone:BACKBONE")
    assert list_backbones() == ["qwen2_vl"]
    assert caplog.text.count("several packages have a backbone named 'my_vit'; uninstall all but one") == 2


def test_a_second_thread_sees_all_backbones_while_the_first_still_loads(example, fresh_registry, monkeypatch):
    """The first thread stands still in the import of a plug-in until the second one has what it asked for."""
    inside, seen = threading.Event(), threading.Event()

    class Slow(importlib.metadata.EntryPoint):
        def load(self):
            if threading.current_thread() is first:
                inside.set()
                assert seen.wait(60)
            return example.backbone.BACKBONE

    entries = [*fresh_registry, Slow("my_vit", "my_vit_plugin.backbone:BACKBONE", ENTRY_POINT_GROUP)]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: entries)
    found = []
    first = threading.Thread(target=lambda: found.append(list_backbones()))
    first.start()
    assert inside.wait(60)
    found.append(list_backbones())
    seen.set()
    first.join(60)
    assert found == [["my_vit", "qwen2_vl"]] * 2


def test_a_plugin_may_ask_for_backbones_while_it_is_loaded(example, fresh_registry, monkeypatch, tmp_path):
    write_module(
        tmp_path,
        "my_vit_asks",
        """
        from my_vit_plugin.backbone import BACKBONE
        from sta_adapter import list_backbones, register_backbone
        register_backbone(BACKBONE)
        SEEN = list_backbones()
        """,
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with_plugins(monkeypatch, fresh_registry, my_vit="my_vit_asks:BACKBONE")
    assert list_backbones() == ["my_vit", "qwen2_vl"]
    assert sys.modules["my_vit_asks"].SEEN == ["my_vit", "qwen2_vl"]


def test_which_backbones_vllm_serves():
    assert in_vllm(get_backbone("qwen2_vl")).is_variant
    assert get_backbone("clip").vllm is None
    served = ", ".join(name for name in list_backbones() if get_backbone(name).vllm)
    assert "llava_onevision" in served
    with pytest.raises(UnknownBackboneError, match=f"'clip' can't be served by vLLM; backbones that can: {served}\\."):
        in_vllm(get_backbone("clip"))
