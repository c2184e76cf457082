"""Settings of an engine under which STA would be left out or wrong: each is refused before weights load."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from sta_adapter.adapter.format import require_lora
from sta_adapter.adapter.lora_weights import LORA_CONFIG, LORA_WEIGHTS
from sta_adapter.adapter.safe_read import read_header, read_json
from sta_adapter.compatibility.releases import incompatible
from sta_adapter.errors import CheckpointError, InjectionError
from sta_adapter.injection.backbone import Backbone
from sta_adapter.integrations.vllm.request import ServedAdapter

ENCODER_OPTIONS = {"cudagraph_mm_encoder": "captured", "compile_mm_encoder": "compiled"}
TOWERS = ("visual", "vision_tower", "vision_model")  # what the encoder is called in a base


def setting(config: object, name: str) -> Any:
    """A field of one of vLLM's configurations, or of its model; a CompatibilityError where there is none."""
    try:
        return getattr(config, name)
    except AttributeError as error:
        raise incompatible("vllm", f"{type(config).__name__} has no {name}") from error


def check_encoder_settings(adapter: ServedAdapter, vllm_config: object) -> None:
    """Refuse a compiled or captured encoder, frames split among ranks, and LoRA that nobody serves."""
    compilation = setting(vllm_config, "compilation_config")
    for option, how in ENCODER_OPTIONS.items():
        if setting(compilation, option):
            raise InjectionError(f"STA can't run in a {how} vision encoder: leave {option} out of compilation_config.")
    tower = adapter.backbone.vllm
    multimodal = setting(setting(vllm_config, "model_config"), "multimodal_config")
    if tower is not None and tower.splits_clips and setting(multimodal, "mm_encoder_tp_mode") == "data":
        raise InjectionError(
            "mm_encoder_tp_mode='data' gives the frames of one clip to different ranks, and STA must see them together: "
            "use mm_encoder_tp_mode='weights'."
        )
    check_positions(adapter.folder, adapter.description, adapter.backbone)
    _check_lora(adapter, setting(vllm_config, "lora_config"))


def check_positions(folder: Path, description: Mapping[str, object], backbone: Backbone) -> None:
    """Refuse an adapter that was trained with text positions which vLLM doesn't have."""
    trained, served = description.get("positions"), getattr(backbone.vllm, "text_positions", None)
    if isinstance(trained, str) and served is not None and trained != served:
        raise CheckpointError(
            f"the adapter in {folder} was trained with the text positions {trained!r}, and vLLM numbers text by "
            f"{served!r}, so that its answers would differ. Train it with those (sta_adapter.text_positions.use_positions), "
            "or answer with transformers."
        )


def encodes_elsewhere(vllm_config: object) -> bool:
    """Whether an engine without a vision encoder gets the features of one that has it.

    That is another engine (disaggregated encoders and prefills), which serves the same STA if the identifiers of pictures
    and videos are to be the same, or the first stage of a pipeline.
    """
    multimodal = setting(setting(vllm_config, "model_config"), "multimodal_config")
    if setting(multimodal, "allow_missing_mm_embeddings"):
        return True
    if setting(setting(vllm_config, "parallel_config"), "pipeline_parallel_size") == 1:
        return False
    try:
        from vllm.distributed import get_pp_group
    except ImportError as error:
        raise incompatible("vllm", f"it does not tell the stage of a pipeline ({error})") from error
    return not get_pp_group().is_first_rank


def check_tower(adapter: ServedAdapter, model: nn.Module) -> None:
    """Refuse an engine without a tower, branches at a place that vLLM's blocks pass by, and LoRA that it has no place for."""
    spec = adapter.backbone
    encoder = spec.find_encoder(model)
    if encoder is None:
        raise InjectionError(
            f"this engine has no vision encoder ({' or '.join(spec.encoder_classes)}), so there is nothing that STA could "
            "work in: allow pictures or videos (limit_mm_per_prompt, no language_model_only), or leave sta_adapter out."
        )
    telling = () if spec.clip_source is None else spec.clip_source.methods
    untold = [name for name in telling if not hasattr(type(model), name)]
    if untold:
        raise incompatible("vllm", f"{type(model).__name__} has no {untold[0]}, whose calls tell the clips")
    blocks = encoder.get_submodule(spec.blocks)
    passed_by = any(type(block).__call__ is not nn.Module.__call__ for block in blocks.children())
    if adapter.config.order == "before_spatial" and passed_by:
        raise InjectionError(
            f"the adapter in {adapter.folder} has order='before_spatial', and vLLM calls the blocks of "
            f"{type(encoder).__name__} past their hooks: only order='after_spatial' can be served there."
        )
    if _is_for_tower(adapter) and not setting(model, "supports_tower_connector_lora"):
        raise CheckpointError(
            f"the LoRA weights in {adapter.folder} are for the vision encoder as well, and vLLM leaves those of "
            f"{type(model).__name__} out. Merge them into the base: sta-adapter export {adapter.folder} OUT --merge-lora BASE."
        )


def _check_lora(adapter: ServedAdapter, lora_config: object) -> None:
    file = adapter.folder / LORA_CONFIG
    require_lora(adapter.folder, adapter.description)
    if not file.exists():
        return
    export = f"sta-adapter export {adapter.folder} OUT"
    if lora_config is None:
        raise CheckpointError(
            f"{adapter.folder} holds LoRA weights that nobody serves. Merge them into the base "
            f"({export} --merge-lora BASE), or serve them by vLLM beside STA ({export}, then --enable-lora "
            "--enable-tower-connector-lora --lora-modules NAME=OUT)."
        )
    if read_json(file).get("modules_to_save"):
        raise CheckpointError(
            f"vLLM takes no LoRA that trains whole modules, as {file} does. Write it for vLLM: {export}"
        )
    if _is_for_tower(adapter) and not setting(lora_config, "enable_tower_connector_lora"):
        raise CheckpointError(
            f"the LoRA weights in {adapter.folder} are for the vision encoder as well, where vLLM leaves them out: add "
            "--enable-tower-connector-lora."
        )


def _is_for_tower(adapter: ServedAdapter) -> bool:
    """Whether LoRA weights in the adapter's folder are the vision encoder's."""
    if not (adapter.folder / LORA_CONFIG).exists():
        return False
    return any(set(TOWERS) & set(key.split(".")) for key in read_header(adapter.folder / LORA_WEIGHTS)[0])
