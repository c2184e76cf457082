"""Models and processors from the Hub or a folder, the same way on every version of transformers."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from sta_adapter.adapter.base_model import saved_base
from sta_adapter.adapter.format import CONFIG, is_lora_alone, read_description
from sta_adapter.adapter.hub import resolve_adapter, why_no_model
from sta_adapter.adapter.lora_weights import LORA_CONFIG, load_lora, read_lora
from sta_adapter.adapter.run_file import RECORDS, RECORDS_FIELD, RUN_FILE, read_frames, read_run_file
from sta_adapter.compatibility.processors import Processor
from sta_adapter.errors import CheckpointError, ConfigError, MissingExtraError, STAWarning
from sta_adapter.injection.load import load_sta, watch_peft
from sta_adapter.injection.saved_sta import require_weights, warn_of_sta
from sta_adapter.injection.text_positions import use_positions_of
from sta_adapter.internvideo import builder_of
from sta_adapter.internvideo.weights import DTYPE, published_config
from sta_adapter.requirements import require_device
from sta_adapter.tiny_base import usual_frames
from sta_adapter.video.frame_settings import FrameSettings

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PretrainedConfig
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

__all__ = ["load_adapter", "load_model", "load_processor"]

AUTO_CLASSES = ("AutoModelForImageTextToText", "AutoModelForVision2Seq", "AutoModelForCausalLM", "AutoModel")
OWN_LOOP = (
    "check-data, train, evaluate, visualize and app take models whose processor in transformers makes text and clips into "
    "tensors; with any other, use inject_sta in a training loop of your own, see 'Quick start' in README."
)
QUANTIZED = ("4bit", "8bit")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def load_model(
    name: str | os.PathLike[str],
    *,
    dtype: str = "auto",
    device: str | None = None,
    quantize: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> nn.Module:
    """Load a video language model.

    Args:
        name: Hub id or folder.
        dtype: "auto" (as saved; fp32 where there is no CUDA), "bf16", "fp16" or "fp32".
        device: where to; None takes CUDA if there is one.
        quantize: "4bit" (NF4, as QLoRA has it) or "8bit" weights, by bitsandbytes. STA and LoRA stay floating point.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: run Python code that comes with the model, also where it could be put together without (see
            `sta_adapter.internvideo`).
        attn_implementation: the base's own attention, "sdpa", "flash_attention_2", "eager" or another that transformers
            knows; None for its default.

    Raises:
        CheckpointError: it isn't available, was saved with LoRA in it, or this transformers knows no class for it.
        ConfigError: an argument is none of those named, or has no effect on this model, or the device isn't here.
        MissingExtraError: quantized weights were asked for, and bitsandbytes is not installed.

    Warns:
        STAWarning: the weights hold STA, which transformers leaves out, or not all that the model has.
    """
    import transformers

    watch_peft()
    if dtype not in ("auto", *DTYPES):
        raise ConfigError(f"dtype is {dtype!r}, expected one of auto, {', '.join(DTYPES)}.")
    require_device(device)
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    wanted: object = DTYPES.get(dtype, "auto" if torch.cuda.is_available() else torch.float32)
    options: dict[str, object] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    narrow = (
        {} if quantize is None else {"quantization_config": _quantization(quantize, wanted), "device_map": {"": where}}
    )
    published = {} if trust_remote_code else published_config(name, revision)
    if (builder := builder_of(published)) is not None:
        if attn_implementation is not None:
            raise ConfigError(
                f"attn_implementation is {attn_implementation!r}, which has no effect on a model that is put together here; "
                "leave it out."
            )
        how = {"dtype": wanted, "device": where, "quantization_config": narrow.get("quantization_config")}
        return builder.load_model(name, published, revision=revision, **how).eval()
    try:
        config = transformers.AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
        loader = auto_class(transformers, config)
        kwargs = {DTYPE: wanted, **narrow, **options}
        model = _load(loader, name, kwargs)
    except (OSError, ValueError, ImportError) as error:
        _refuse_adapter(name)
        raise CheckpointError(f"can't load the model {os.fspath(name)!r}: {why_no_model(name, error)}.") from error
    found: nn.Module = (model if getattr(model, "is_quantized", False) else model.to(where)).eval()
    return found


def _load(loader: type[_BaseAutoModelClass], name: str | os.PathLike[str], options: Mapping[str, object]) -> nn.Module:
    """The model, with a warning of STA among its weights, which transformers leaves out, and of weights that it has made up."""
    if options["trust_remote_code"]:  # whose own from_pretrained need not know of a report
        return cast("nn.Module", loader.from_pretrained(name, **options))
    model, report = loader.from_pretrained(name, output_loading_info=True, **options)
    require_weights(name, report["missing_keys"], report["unexpected_keys"])
    warn_of_sta(name, report["unexpected_keys"])
    return cast("nn.Module", model)


def _quantization(kind: str, dtype: object) -> BitsAndBytesConfig:
    """The settings for bitsandbytes, which computes in `dtype`; "auto" means bfloat16."""
    if kind not in QUANTIZED:
        raise ConfigError(f"quantize is {kind!r}, expected one of {', '.join(QUANTIZED)}.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtraError(f"weights in {kind} need a package more: pip install bitsandbytes")
    from transformers import BitsAndBytesConfig

    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.bfloat16 if dtype == "auto" else dtype
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def auto_class(transformers: ModuleType, config: PretrainedConfig) -> type[_BaseAutoModelClass]:
    """The auto class that has an entry for this config, from the most to the least special."""
    remote = getattr(config, "auto_map", None) or {}
    for name in AUTO_CLASSES:
        loader: type[_BaseAutoModelClass] | None = getattr(transformers, name, None)
        if loader is not None and (name in remote or type(config) in (loader._model_mapping or ())):
            return loader
    raise ValueError(f"transformers {transformers.__version__} knows no model class for {type(config).__name__}")


def load_processor(
    name: str | os.PathLike[str], *, revision: str | None = None, trust_remote_code: bool = False
) -> Processor:
    """Load a model's processor.

    Raises:
        CheckpointError: it isn't available, or has no tokenizer or chat template.
        MissingExtraError: it needs packages that are not installed.
    """
    from transformers import AutoProcessor

    what = f"the processor of {os.fspath(name)!r}"
    published = {} if trust_remote_code else published_config(name, revision)
    if (builder := builder_of(published)) is not None:
        return builder.load_processor(name, published, revision)
    try:
        processor: Processor = AutoProcessor.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code
        )
    except ImportError as error:  # transformers names packages, and not what brings them
        packages = ", ".join(name for name in ("torchvision", "PIL") if name in str(error)) or str(error).split("\n")[0]
        raise MissingExtraError(f"{what} needs more packages ({packages}): pip install 'sta-adapter[train]'") from error
    except OSError as error:
        _refuse_adapter(name)
        raise CheckpointError(f"can't load {what}: {why_no_model(name, error)}.") from error
    except (ValueError, KeyError) as error:
        _refuse_adapter(name)
        raise CheckpointError(f"can't load {what}: {why_no_model(name, error)}. {OWN_LOOP}") from error
    tokenizer = getattr(processor, "tokenizer", None)
    template = getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)
    if tokenizer is None or template is None:
        missing = "tokenizer" if tokenizer is None else "chat template"
        raise CheckpointError(f"{what} has no {missing}; expected a chat model's processor. {OWN_LOOP}")
    return processor


def _refuse_adapter(name: str | os.PathLike[str]) -> None:
    """Say so where what can't be loaded as a model is an adapter's folder."""
    folder = Path(name)
    if (folder / "config.json").exists() or not any((folder / file).is_file() for file in (CONFIG, LORA_CONFIG)):
        return
    base = saved_base(read_description(folder))["id"] if (folder / CONFIG).is_file() else None
    raise CheckpointError(
        f"{os.fspath(name)!r} is an adapter's folder; expected a model's. Give its base{f', {base},' if base else ''} as the model, and this as "
        "the adapter (load_sta, --adapter)."
    )


def load_adapter(
    model: nn.Module,
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    is_trainable: bool = False,
    base_model: str | None = None,
) -> nn.Module:
    """Put a saved adapter into a model: STA, STA with LoRA, or a LoRA baseline.

    Args:
        model: the base model.
        name: the adapter's folder, or its id on the Hub.
        revision: branch, tag or commit of the adapter on the Hub.
        is_trainable: whether to go on training.
        base_model: "any" takes every model that the adapter fits, as for `load_sta`.

    Returns:
        The model to go on with.

    Raises:
        CheckpointError: no adapter, or one for another model.
    """
    folder = resolve_adapter(name, revision)
    if is_lora_alone(folder) and read_lora(folder).sta is None:
        return load_lora(model, folder, is_trainable).eval()
    return load_sta(model, folder, is_trainable=is_trainable, base_model=base_model).model.eval()


def with_adapter(
    model: nn.Module,
    name: str | os.PathLike[str] | None,
    *,
    positions: str | None = None,
    revision: str | None = None,
    is_trainable: bool = False,
    base_model: str | None = None,
) -> nn.Module:
    """A base as commands work on it: with the text positions that are asked for, else the adapter's own; and the adapter, if there is one.

    `positions` is "trained" or "transformers" (see `sta_adapter.text_positions`); all else is as for `load_adapter`.
    """
    use_positions_of(model, positions, None if name is None else saved_positions(name, revision=revision))
    if name is None:
        return model
    return load_adapter(model, name, revision=revision, is_trainable=is_trainable, base_model=base_model)


def frames_in_force(
    model: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | None,
    given: Mapping[str, Any] | None = None,
    *,
    revision: str | None = None,
) -> FrameSettings:
    """How commands sample clips: by fields that are `given`, over those of the adapter's training, else those that the model was made for."""
    trained = {} if adapter is None else saved_frame_settings(adapter, revision=revision)
    return FrameSettings(**{**(trained or usual_frames(model)), **(given or {})})


def saved_frame_settings(name: str | os.PathLike[str], *, revision: str | None = None) -> dict[str, Any]:
    """How clips were sampled when an adapter (its folder, or its Hub id) was trained; empty if it isn't known.

    Raises:
        CheckpointError: no adapter, or what it says of frames is out of range.

    Warns:
        STAWarning: the records of its data set their own sampling, each otherwise, so that there is no one setting.
    """
    run, description = _saved_run(name, revision)
    said = (run or description).get(RECORDS_FIELD)
    if isinstance(said, str) and said in RECORDS:
        warnings.warn(
            f"{Path(name).name} was trained on clips of which not all were sampled alike: {RECORDS[said]}. A clip that doesn't say "
            "it is sampled by the settings of the run; give fps or nframes to have it otherwise.",
            STAWarning,
            stacklevel=2,
        )
    if run:
        return read_frames(run.get("frames", {}), Path(name) / RUN_FILE)
    # the numbers, without the rest of the run
    published = read_frames(description.get("frames") or {}, Path(name) / CONFIG)
    return {key: value for key, value in published.items() if key != "backend"}


def saved_positions(name: str | os.PathLike[str], *, revision: str | None = None) -> str | None:
    """The rule of text positions that an adapter (as above) was trained with; None if it isn't known, or there is one rule only.

    Raises:
        CheckpointError: no adapter.
    """
    run, description = _saved_run(name, revision)
    found = description.get("positions", run.get("positions"))
    return found if isinstance(found, str) else None


def _saved_run(name: str | os.PathLike[str], revision: str | None) -> tuple[Mapping[str, object], Mapping[str, object]]:
    """What an adapter's `run.json` and `sta_config.json` say; empty where there is no such file."""
    folder = resolve_adapter(name, revision)
    return read_run_file(folder / RUN_FILE), read_description(folder) if (folder / CONFIG).is_file() else {}
