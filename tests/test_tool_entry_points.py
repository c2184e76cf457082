"""Our entry points in training and evaluation tools, without the tools: what they take, refuse and hand on."""

import importlib
import re
import runpy
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest

from sta_adapter.errors import CompatibilityError, ConfigError, STAError
from sta_adapter.integrations import llamafactory
from sta_adapter.integrations.lmms_eval.adapted import WithAdapter
from sta_adapter.integrations.settings import Settings


@pytest.fixture
def imported(monkeypatch):
    """A module of ours that imports a tool, with stand-ins for the tool's modules."""

    def load(name, **modules):
        for path, names in modules.items():
            parts = path.split("__")
            for end in range(1, len(parts) + 1):
                package = ".".join(parts[:end])
                if end == len(parts) or package not in sys.modules:
                    module = types.ModuleType(package)
                    module.__path__ = []
                    monkeypatch.setitem(sys.modules, package, module)
                    if end > 1:
                        monkeypatch.setattr(
                            sys.modules[".".join(parts[: end - 1])], parts[end - 1], module, raising=False
                        )
            vars(sys.modules[".".join(parts)]).update(names)
        monkeypatch.delitem(sys.modules, name, raising=False)
        found = importlib.import_module(name)
        monkeypatch.delitem(sys.modules, name)
        return found

    return load


# ---- axolotl


@pytest.fixture
def axolotl(imported):
    return imported("sta_adapter.integrations.axolotl", axolotl__integrations__base={"BasePlugin": object})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sta": {"stage": 1}}, "stage 1 has no LoRA"),
        ({"sta": {}, "adapter": None}, "set adapter: lora"),
        ({"rl": "dpo"}, "rl is 'dpo' in the YAML"),
        ({"sample_packing": True}, "set sample_packing: false"),
        ({"eval_sample_packing": True}, "set eval_sample_packing: false"),
        ({"batch_flattening": "auto"}, "set batch_flattening: false"),
        ({"freeze_mm_modules": True}, "would freeze STA, which is in the vision encoder"),
        ({"merge_lora": True}, "axolotl merge-lora writes the base model with LoRA in its weights"),
    ],
    ids=["stage", "adapter", "rl", "packing", "eval", "flattening", "freezing", "merging"],
)
def test_axolotl_is_told_before_anything_is_loaded(axolotl, values, message):
    plugin = axolotl.STAPlugin()
    plugin.register({"sta": {}, "adapter": "lora"})
    with pytest.raises(ConfigError, match=message):
        plugin.register({"adapter": "lora", **values})


def test_axolotl_finds_the_fields_and_takes_settings(axolotl):
    assert axolotl.STAPlugin().get_input_args() == "sta_adapter.integrations.axolotl.STAArgs"
    assert axolotl.STAArgs(sta={"stage": 2}).sta == {"stage": 2}
    found = axolotl.take_settings({"sta": {"patience": 3, "head_scale": 0.5}, "adapter": "qlora"})
    assert (found.patience, found.config.head_scale) == (3, 0.5)


# ---- LLaMA-Factory


def launch_of_theirs():
    return __file__


def test_llamafactory_is_launched_with_our_file(monkeypatch):
    launched, installed = [], []
    launcher = SimpleNamespace(launch=launch_of_theirs)
    tuner = SimpleNamespace(run_exp="own", export_model="own")
    package = types.ModuleType("llamafactory")
    package.launcher = launcher
    monkeypatch.setitem(sys.modules, "llamafactory", package)
    monkeypatch.setitem(sys.modules, "llamafactory.train", SimpleNamespace(tuner=tuner))
    monkeypatch.setattr(llamafactory.peft, "install", lambda *settings: installed.append(settings))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(sys, "argv", ["x", "train", "run.yaml"])
    llamafactory.main()
    assert launcher.__file__.endswith("llamafactory/__main__.py")
    assert (installed, callable(tuner.run_exp)) == ([], True)
    chat = SimpleNamespace(get_infer_args=lambda args=None: args)
    monkeypatch.setitem(sys.modules, "llamafactory.chat.chat_model", chat)
    monkeypatch.setattr(sys, "argv", ["x", "chat", "run.yaml"])
    llamafactory.main()
    assert installed == [()]
    settings = SimpleNamespace(
        adapter_name_or_path=["lora"], adapter_folder=None, model_revision="main", infer_backend="sglang"
    )
    monkeypatch.setattr(llamafactory.peft, "adapter_folder", lambda name, within: name if name == "sta" else None)
    assert chat.get_infer_args((settings,)) == (settings,)
    settings.adapter_name_or_path = ["sta"]
    with pytest.raises(ConfigError, match="infer_backend: sglang would answer by LoRA without its STA"):
        chat.get_infer_args((settings,))
    settings.infer_backend = "huggingface"
    assert chat.get_infer_args((settings,)) == (settings,)
    monkeypatch.setattr(sys, "argv", ["x", "webui"])
    with pytest.raises(ConfigError, match="starts llamafactory-cli by itself, which trains without STA"):
        llamafactory.main()
    launcher.launch = lambda: launched.append(1)
    for command in ("train", "chat"):
        monkeypatch.setattr(sys, "argv", ["x", command, "run.yaml"])
        with pytest.raises(CompatibilityError, match="starts its processes in another way"):
            llamafactory.main()
    monkeypatch.setattr(sys, "argv", ["x", "train", "run.yaml"])
    asked = []
    monkeypatch.setattr(llamafactory, "run_exp", lambda *args: asked.append(args))
    monkeypatch.setenv("LOCAL_RANK", "0")
    llamafactory.main()
    assert sys.argv == ["x", "run.yaml"]
    assert asked[0][:2] == (None, None)
    assert not launched


def test_llamafactory_exports_no_adapter_with_sta(monkeypatch, tmp_path):
    (tmp_path / "sta").mkdir()
    (tmp_path / "sta/sta_config.json").touch()
    (tmp_path / "lora").mkdir()
    settings = SimpleNamespace(adapter_name_or_path=None, adapter_folder=None, model_revision="main")
    hparams = SimpleNamespace(get_infer_args=lambda args: (settings,))
    monkeypatch.setitem(sys.modules, "llamafactory", types.ModuleType("llamafactory"))
    monkeypatch.setitem(sys.modules, "llamafactory.hparams", hparams)
    llamafactory.refuse_merging()
    settings.adapter_name_or_path = [str(tmp_path / "lora")]
    llamafactory.refuse_merging()
    settings.adapter_name_or_path.append(str(tmp_path / "sta"))
    with pytest.raises(ConfigError, match="llamafactory-cli export writes the base model with LoRA in its weights"):
        llamafactory.refuse_merging()


def test_llamafactorys_settings():
    values = {"sta": {"patience": 3}, "finetuning_type": "lora", "packing": True, "neat_packing": True}
    assert llamafactory.take_settings(values).patience == 3
    assert "sta" not in values  # which would be unknown there
    assert llamafactory.take_settings({}) == Settings()
    with pytest.raises(ConfigError, match="set finetuning_type: lora"):
        llamafactory.take_settings({"finetuning_type": "full"})
    with pytest.raises(ConfigError, match="set neat_packing: true"):
        llamafactory.take_settings({"packing": True})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--do_train --packing true --stage sft", "set neat_packing: true"),
        ("--packing --neat_packing=false", "set neat_packing: true"),
        ("--packing=True", "set neat_packing: true"),
        ("--finetuning_type full", "set finetuning_type: lora"),
        ("--finetuning_type=freeze --do_train", "set finetuning_type: lora"),
    ],
)
def test_llamafactorys_settings_on_the_command_line(monkeypatch, words, message):
    with pytest.raises(ConfigError, match=message):
        llamafactory.take_settings(words.split())
    monkeypatch.setenv("STA_SETTINGS", "{patience: 3}")
    fine = "--do_train --packing false --finetuning_type lora --learning_rate 1e-4 --resume -1"
    assert llamafactory.take_settings(fine.split()).patience == 3


def test_llamafactorys_command(monkeypatch):
    asked = []
    monkeypatch.setattr(llamafactory, "main", lambda: asked.append(1))
    runpy.run_module("sta_adapter.integrations.llamafactory.__main__", run_name="__main__")
    assert asked == [1]
    runpy.run_module("sta_adapter.integrations.llamafactory.__main__", run_name="imported")
    assert asked == [1]

    def fail():
        raise STAError("not so")

    monkeypatch.setattr(llamafactory, "main", fail)
    with pytest.raises(SystemExit, match="error: not so"):
        runpy.run_module("sta_adapter.integrations.llamafactory.__main__", run_name="__main__")


# ---- ms-swift


@pytest.fixture
def ms_swift(imported):
    return imported(
        "sta_adapter.integrations.ms_swift",
        swift__callbacks={"callbacks_map": {}},
        swift__tuner_plugin={"Tuner": object, "tuners_map": {}},
        swift__tuners={"Swift": type("Swift", (), {"merge_and_unload": staticmethod(lambda model: f"{model} LoRA")})},
    )


def test_ms_swift_finds_tuner_and_callbacks(ms_swift):
    assert sys.modules["swift.tuner_plugin"].tuners_map == {"sta": ms_swift.STATuner}
    made = sys.modules["swift.callbacks"].callbacks_map
    assert set(made) == {"sta_save", "sta_gradient"}
    for given in (("trainer",), ("args", "trainer")):  # of ms-swift 4.0, and later
        assert [type(make(*given)).__name__ for make in made.values()] == ["SaveAdapter", "RequireGradient"]


def test_ms_swift_of_another_form_is_told_by_its_release(imported):
    with pytest.raises(CompatibilityError, match=r"since 4\.0, can't be imported .* This is ms-swift .* tested with "):
        imported("sta_adapter.integrations.ms_swift", swift={})


def test_ms_swift_puts_lora_in_if_there_is_any(ms_swift, monkeypatch):
    args = SimpleNamespace(lora_rank=4, lora_alpha=32.0, callbacks=None)
    handle, given, lora = SimpleNamespace(model="net"), [], [None, "recipe"]
    monkeypatch.setattr(
        ms_swift, "prepare_model", lambda *a, **own: (given.append(own), (handle, lora[len(given) - 1]))[1]
    )
    monkeypatch.setattr(ms_swift, "get_peft_model", lambda model, config: (model, config))
    assert ms_swift.STATuner.prepare_model(args, "base") == "net"
    assert ms_swift.STATuner.prepare_model(args, "base") == ("net", "recipe")
    assert given == [{"r": 4}] * 2  # ms-swift's own default of alpha is not the recipe's
    assert args.callbacks == ["sta_save", "sta_gradient"]
    with pytest.raises(ConfigError, match="set --use_vllm false"):
        ms_swift.STATuner.prepare_model(SimpleNamespace(use_vllm=True), "base")


def test_ms_swifts_options_of_lora(ms_swift):
    defaults = {"target_modules": ["all-linear"], "modules_to_save": [], "lora_bias": "none", "init_weights": True}
    assert ms_swift.lora_options(SimpleNamespace(**defaults, use_dora=False, freeze_vit=True, lora_dtype=None)) == {}
    given = {
        "target_modules": "q_proj|v_proj",
        "modules_to_save": ["lm_head"],
        "lora_bias": "all",
        "init_weights": "pissa",
    }
    assert ms_swift.lora_options(SimpleNamespace(**given, use_dora=True, lora_dropout=0.0, use_rslora=True)) == {
        "lora_dropout": 0.0, "target_modules": "q_proj|v_proj", "modules_to_save": ["lm_head"], "bias": "all", "use_rslora": True,
        "use_dora": True, "init_lora_weights": "pissa",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"freeze_vit": False}, "--freeze_vit False: which layers get LoRA beside STA is said by --target_modules"),
        ({"freeze_llm": True, "freeze_aligner": False}, "--freeze_aligner False, --freeze_llm True: which layers"),
        ({"lora_dtype": "bfloat16"}, "LoRA is kept in float32"),
        ({"target_modules": ["all-linear", "lm_head"]}, "'all-linear' is ms-swift's short form"),
        ({"modules_to_save": ["all-embedding"]}, "'all-embedding' is ms-swift's short form"),
    ],
    ids=["vit", "llm", "dtype", "targets", "saved"],
)
def test_ms_swifts_options_without_a_place_are_refused(ms_swift, given, message):
    with pytest.raises(ConfigError, match=message):
        ms_swift.lora_options(SimpleNamespace(**given))


def test_ms_swift_merges_no_adapter_with_sta(ms_swift, monkeypatch):
    merge = sys.modules["swift.tuners"].Swift.merge_and_unload
    monkeypatch.setattr(ms_swift, "get_sta", lambda model: "handle" if model == "with" else None)
    assert merge("without") == "without LoRA"
    with pytest.raises(ConfigError, match="--merge_lora true writes the base model with LoRA in its weights"):
        merge("with")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"quant_method": "awq"}, "ms-swift's --quant_method awq writes the base model"),
        ({"to_ollama": True}, "ms-swift's --to_ollama True writes"),
        ({"infer_backend": "sglang"}, "--infer_backend sglang would answer without STA"),
    ],
    ids=str,
)
def test_ms_swift_drops_sta_nowhere(ms_swift, monkeypatch, tmp_path, given, message):
    made = (
        SimpleNamespace(run=lambda self: "exported"),
        SimpleNamespace(get_infer_engine=lambda args, template=None: args),
    )
    monkeypatch.setitem(sys.modules, "swift.pipelines.export.export", SimpleNamespace(SwiftExport=made[0]))
    monkeypatch.setitem(sys.modules, "swift.pipelines.infer.infer", SimpleNamespace(SwiftInfer=made[1]))
    ms_swift.register()

    def run(adapter, **given):
        args = SimpleNamespace(adapters=[str(adapter)], **given)
        return made[1].get_infer_engine(args) if "infer_backend" in given else made[0].run(SimpleNamespace(args=args))

    assert run(tmp_path, **given)
    (tmp_path / "sta_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, **given)
    assert run(tmp_path, infer_backend="transformers")
    assert run(tmp_path, quant_method=None, to_peft_format=True) == "exported"


@pytest.mark.parametrize("sharded", [False, True])
def test_ms_swift_saves_what_one_process_can(ms_swift, monkeypatch, sharded):
    saved = []
    handle = SimpleNamespace(model=SimpleNamespace(parameters=list), save_pretrained=saved.append)
    monkeypatch.setattr(ms_swift, "get_sta", lambda model: handle if model == "with" else None)
    monkeypatch.setattr(ms_swift, "is_sharded", lambda parameters: sharded)
    ms_swift.STATuner.save_pretrained("with", "folder")
    ms_swift.STATuner.save_pretrained("without", "folder")
    assert saved == ([] if sharded else ["folder"])


def test_ms_swift_loads_an_adapter(ms_swift, monkeypatch, tmp_path):
    monkeypatch.setattr(ms_swift, "get_sta", lambda model: None)
    monkeypatch.setattr(ms_swift, "load_sta", lambda *given, **how: SimpleNamespace(model=(*given, how)))
    assert ms_swift.STATuner.from_pretrained("net", "a") == ("net", "a", {"is_trainable": False})
    with pytest.raises(ConfigError, match="is of stage 1, without LoRA"):
        ms_swift.STATuner.from_pretrained("net", str(tmp_path), is_trainable=True)


# ---- lmms-eval


class Base:
    def __init__(self, **arguments):
        self._model, self.arguments = "base", arguments


class Adapted(WithAdapter, Base):
    pass


def test_lmms_eval_is_told_every_class_under_its_models_name(imported):
    package = imported("sta_adapter.integrations.lmms_eval", lmms_eval__models__registry_v2={"ModelManifest": dict})
    found = {made.pop("model_id"): made for made in package.manifests()}
    assert set(found) == {"qwen2_vl_sta", "qwen2_5_vl_sta", "internvideo2_5_sta", "vllm_sta"}
    assert {(kind, path) for paths in found.values() for kind, path in paths.items()} == {
        (f"{name.lower()}_class_path", f"{package.__name__}.{file.stem}.{name}")
        for file in Path(package.__file__).parent.glob("*.py")
        for name in re.findall(r"^class (Simple|Chat)\(", file.read_text(encoding="utf-8"), re.MULTILINE)
    }


def test_lmms_eval_puts_the_adapter_in(monkeypatch):
    told = []
    monkeypatch.setattr("sta_adapter.loading.saved_positions", lambda name, revision=None: (name, revision))
    monkeypatch.setattr("sta_adapter.loading.use_positions_of", lambda *given: told.append(given))
    monkeypatch.setattr("sta_adapter.loading.load_adapter", lambda *given, **how: (*given, how))
    found = Adapted(sta="org/adapter", sta_revision="v1", positions="trained", pretrained="org/base")
    assert found._model == ("base", "org/adapter", {"revision": "v1", "is_trainable": False, "base_model": None})
    assert found.arguments == {"pretrained": "org/base"}
    assert told == [("base", "trained", ("org/adapter", "v1"))]
    with pytest.raises(ConfigError, match="no adapter; add sta="):
        Adapted(pretrained="org/base")


def test_lmms_evals_internvideo_answers_one_round(imported):
    ours = imported(
        "sta_adapter.integrations.lmms_eval.internvideo2_5",
        lmms_eval__models__simple__internvideo2_5={"InternVideo2_5": Base},
    )
    with pytest.raises(ConfigError, match="questions of one round"):
        ours.Simple.generate_until_multi_round(None, [])


class Generate:
    def __init__(self, **arguments):
        self.arguments = arguments

    def make_one_request(self, request):
        return request, "how"


@pytest.fixture
def lmms_vllm(imported):
    return imported(
        "sta_adapter.integrations.lmms_eval.vllm", lmms_eval__models__chat__vllm_generate={"VLLMGenerate": Generate}
    ).Chat


def test_lmms_evals_vllm_is_told_of_the_adapter(lmms_vllm, monkeypatch):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    assert lmms_vllm(sta="org/a", model="m").arguments == {"hf_overrides": {"sta_adapter": "org/a"}, "model": "m"}
    both = {"sta_adapter": "org/a", "sta_adapter_revision": "v1", "x": 1}
    for given in ('{"x": 1}', {"x": 1}):
        assert lmms_vllm(sta="org/a", sta_revision="v1", hf_overrides=given).arguments == {"hf_overrides": both}
    with pytest.raises(ConfigError, match="no adapter; add sta="):
        lmms_vllm(model="m")
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    with pytest.raises(ConfigError, match="VLLM_PLUGINS"):
        lmms_vllm(sta="org/a")


def test_lmms_evals_vllm_hands_the_times_of_frames_over(lmms_vllm, monkeypatch):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    chat = lmms_vllm(sta="org/a")
    made, how = chat.make_one_request({"multi_modal_data": {"video": ["abcd"]}, "mm_processor_kwargs": {"fps": 2.0}})
    times = {"fps": 2.0, "frames_indices": [0, 1, 2, 3], "total_num_frames": 4, "duration": 2.0}
    told = {**times, "video_backend": "qwen_vl_utils", "do_sample_frames": False}
    assert (made["multi_modal_data"], how) == ({"video": [("abcd", told)]}, "how")
    known = {"multi_modal_data": {"video": [("abcd", {})]}}
    assert chat.make_one_request(known)[0]["multi_modal_data"]["video"] == [("abcd", {})]
    assert chat.make_one_request({"multi_modal_data": {}})[0]["multi_modal_data"] == {}
