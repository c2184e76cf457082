"""What injection would do to a model, from its configuration alone: weights are never loaded."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from torch import nn

from sta_adapter.adapter.hub import is_path, why_no_model
from sta_adapter.attention.module import TemporalAttention
from sta_adapter.compatibility.releases import version
from sta_adapter.config import STAConfig
from sta_adapter.errors import CheckpointError, ConfigError
from sta_adapter.injection.plan import Plan, plan_injection
from sta_adapter.injection.stream import check_streaming
from sta_adapter.internvideo import builder_of
from sta_adapter.internvideo.weights import Unallocated
from sta_adapter.loading import auto_class

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FORMULA = (
    "percent = 100 L' (4 C H + 2 T H) / (L (W + 2 N C) + E), in multiplications per token: C width, H = heads of STA x "
    "head size, T frames, N patches of a frame, W numbers in a block's weight matrices, E in the patch embedding, L "
    "blocks, L' blocks with STA; the projector behind the blocks is not counted, an operation is half a multiply-add"
)
STREAM_FORMULA = "bytes = 2 x heads of STA x head size x positions x window x blocks with STA x bytes of a number"
POSITIONS = (
    "transformers {version} numbers the text after a clip by the rule {rule!r}, and the model was trained with {trained!r} "
    "(docs/compatibility.md has the rules). sta_adapter.text_positions.use_positions(model) brings that back; the commands do "
    "so by themselves (--positions)."
)


@dataclasses.dataclass(frozen=True)
class ClipSize:
    """The clip that arithmetic is counted for: frames (temporal steps), rows and columns of patches."""

    frames: int = 16
    rows: int = 32
    columns: int = 32

    @classmethod
    def parse(cls, text: str) -> ClipSize:
        """From "16x32x32".

        Raises:
            ConfigError: for anything else.
        """
        parts = text.lower().split("x")
        if len(parts) != 3 or not all(p.isdigit() and int(p) > 0 for p in parts):
            raise ConfigError(f"clip {text!r}: expected FRAMESxROWSxCOLUMNS of patches, such as 16x32x32.")
        return cls(*map(int, parts))

    def __str__(self) -> str:
        return f"{self.frames} frames of {self.rows}x{self.columns} patches"


def empty_model(
    source: str | os.PathLike[str], *, revision: str | None = None, trust_remote_code: bool = False
) -> nn.Module:
    """A model of the class that its configuration names, its parameters on the meta device.

    Args:
        source: Hub id, folder, or path of a `config.json`; no other file is read or downloaded.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        CheckpointError: the configuration isn't available, or names a model that this transformers does not know.
    """
    import transformers

    name, path = os.fspath(source), Path(source)
    if path.is_dir() and not (path / "config.json").exists():
        there = ", ".join(sorted(p.name for p in path.iterdir())[:10]) or "nothing"
        raise CheckpointError(f"{name} holds no config.json; found: {there}. Pass a model's folder, not an adapter's.")
    if not path.exists() and (is_path(name) or path.suffix == ".json"):
        raise CheckpointError(
            f"there is no folder or file {name!r}, and it is no repository id on the Hub (user/name)."
        )
    try:
        found, _ = transformers.PretrainedConfig.get_config_dict(name, revision=revision)
        kind, builder = found.get("model_type"), None if trust_remote_code else builder_of(found)
        if builder is not None:
            with Unallocated():
                return builder.empty_model(found).eval()
        if "auto_map" in found and kind not in transformers.CONFIG_MAPPING and not trust_remote_code:
            raise CheckpointError(
                f"{name!r} comes with Python code of its own ({kind}). If you trust it, pass trust_remote_code=True "
                "(--trust-remote-code)."
            )
        config = transformers.AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
        with Unallocated():
            return _make(config, trust_remote_code).eval()
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, ImportError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"can't make the model of {name!r} with transformers {transformers.__version__}: "
            f"{'' if isinstance(error, OSError) else f'{type(error).__name__}: '}{why_no_model(name, error)}."
        ) from error


def _make(config: PretrainedConfig, trust_remote_code: bool) -> nn.Module:
    import transformers

    for name in getattr(config, "architectures", None) or ():
        cls: type[nn.Module] | None = getattr(transformers, name, None)
        if cls is not None:
            return cls(config)
    found: nn.Module = auto_class(transformers, config).from_config(config, trust_remote_code=trust_remote_code)
    return found


class InspectedBlock(TypedDict):
    """A block of the encoder with STA."""

    index: int
    hook: str
    width: int
    heads: int
    head_size: int
    parameters: int


EncoderFacts = TypedDict(
    "EncoderFacts", {"class": str, "path": str, "blocks": int, "width": int, "heads": int, "head_size": int}
)


class Arithmetic(TypedDict):
    """Operations for one clip."""

    clip: dict[str, int]
    encoder_gflop: float
    sta_gflop: float
    percent: float
    formula: str


class StreamFacts(TypedDict):
    """What a stream keeps."""

    bytes: int
    dtype: str
    positions: int
    window: int
    formula: str


class Inspection(TypedDict):
    """What `inspect_model` gives."""

    model: str
    code: str
    backbone: str
    encoder: EncoderFacts
    config: dict[str, object]
    blocks: list[InspectedBlock]
    parameters: dict[str, int]
    arithmetic: Arithmetic
    stream: StreamFacts | None
    warnings: list[str]


def inspect_model(
    model: nn.Module, cfg: STAConfig | None = None, *, backbone: str | None = None, clip: ClipSize | None = None
) -> Inspection:
    """What `inject_sta` would put where, and what it costs; the model stays as it is.

    Args:
        model: with or without weights (`empty_model`).
        cfg: settings to try.
        backbone: its name; None finds it.
        clip: for which arithmetic is counted; None for 16 frames of 32x32 patches.

    Raises:
        STAError: as `inject_sta`.
    """
    plan = plan_injection(model, cfg, backbone)
    target, config = plan.target, plan.config
    names = {id(module): name for name, module in model.named_modules(remove_duplicate=False)}
    modules = plan.build("meta")
    hooked = target.norms if config.order == "after_spatial" else target.blocks
    blocks: list[InspectedBlock] = [
        {
            "index": index,
            "hook": names[id(hooked[index])],
            "width": target.width,
            "heads": module.num_heads,
            "head_size": module.head_dim,
            "parameters": sum(p.numel() for p in module.parameters()),
        }
        for index, module in modules.items()
    ]
    return {
        "model": type(model).__name__,
        "code": _code_of(model),
        "backbone": target.backbone.name,
        "encoder": {
            "class": type(target.encoder).__name__,
            "path": names[id(target.encoder)],
            "blocks": len(target.blocks),
            "width": target.width,
            "heads": target.heads,
            "head_size": target.head_dim,
        },
        "config": config.to_dict(),
        "blocks": blocks,
        "parameters": {
            "sta": sum(block["parameters"] for block in blocks),
            "encoder": sum(p.numel() for p in target.encoder.parameters()),
            "model": sum(p.numel() for p in model.parameters()),
        },
        "arithmetic": count_arithmetic(plan, clip or ClipSize()),
        "stream": count_stream(plan, clip or ClipSize(), modules),
        "warnings": _warnings(plan),
    }


def _code_of(model: nn.Module) -> str:
    """Where a model's class comes from."""
    package = type(model).__module__.split(".")[0]
    return {
        "sta_adapter": "sta-adapter, put together from the published weights; the published code is not run",
        "transformers_modules": "Python files that come with the model",
    }.get(package, package)


def count_arithmetic(plan: Plan, clip: ClipSize) -> Arithmetic:
    """Operations of the tower and of STA for one clip, as `formula` says, and STA's in percent of the tower's."""
    target = plan.target
    positions = clip.rows * clip.columns
    blocks = {id(p): p for block in target.blocks for p in block.parameters()}
    matrices = sum(p.numel() for p in blocks.values() if p.dim() == 2)
    embedding = sum(p.numel() for p in target.encoder.parameters() if p.dim() > 2 and id(p) not in blocks)
    base = matrices + embedding + len(target.blocks) * 2 * positions * target.width
    inner = plan.num_heads * target.head_dim
    added = len(plan.layers) * (4 * target.width * inner + 2 * clip.frames * inner)
    tokens = clip.frames * positions
    return {
        "clip": dataclasses.asdict(clip),
        "encoder_gflop": 2e-9 * base * tokens,
        "sta_gflop": 2e-9 * added * tokens,
        "percent": 100 * added / base,
        "formula": FORMULA,
    }


def count_stream(plan: Plan, clip: ClipSize, modules: Mapping[int, TemporalAttention]) -> StreamFacts | None:
    """Memory of a stream whose frames have the clip's rows and columns, as `Stream.bytes` will say; None without one."""
    window = plan.config.window
    if window is None or _why_no_stream(plan):
        return None
    positions = clip.rows * clip.columns
    numbers = sum(2 * m.num_heads * m.head_dim * positions * window for m in modules.values())
    weight = next(iter(modules.values())).to_qkv.weight
    return {
        "window": window,
        "positions": positions,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "bytes": numbers * weight.element_size(),
        "formula": STREAM_FORMULA,
    }


def _why_no_stream(plan: Plan) -> str:
    try:
        check_streaming(plan.config, plan.target.backbone, None)
    except ConfigError as error:
        return str(error)
    return ""


def _warnings(plan: Plan) -> list[str]:
    """What the user should know about this model before training."""
    found = []
    target = plan.target
    rules = target.backbone.text_positions
    if rules is not None and (rule := rules.in_use(plan.model)) != (trained := rules.of_training(plan.model)):
        found.append(POSITIONS.format(version=version("transformers"), rule=rule, trained=trained))
    if plan.config.window is not None and (reason := _why_no_stream(plan)):
        found.append(reason)
    if target.backbone.clip_source is not None and target.encoder is plan.model:
        found.append(
            "this encoder gets frames as a batch: tell the frames of each clip with handle.clips([...]), or all rows are one."
        )
    if getattr(getattr(target.encoder, "config", None), "window_size", None):
        found.append("windowed attention is counted as attention over whole frames, so STA's share is a little higher.")
    if target.backbone.name == "internvideo2":
        found.append("attention over all frames is counted as attention over one frame each, so STA's share is lower.")
    return found
