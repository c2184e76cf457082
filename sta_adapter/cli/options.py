"""What the commands share: options under headings, settings by name, and the options that say how a model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, cast, get_type_hints

import click

from sta_adapter._validate import shown
from sta_adapter.errors import ConfigError
from sta_adapter.requirements import require_packages
from sta_adapter.tiny_base import usual_frames

if TYPE_CHECKING:
    from sta_adapter.training.config import TrainingConfig

POSITIONS = "Text positions: trained (default) or transformers."
SHOWN_ADAPTER = "Adapter on the Hub, or its folder. [default: the tiny base's; else untrained STA]"
STAGES = "1 (STA), 2 (STA and LoRA) or both. [default: both]"
DTYPE = click.Choice(["auto", "bf16", "fp16", "fp32"])
BITS = click.Choice(["4bit", "8bit"])
STAGE = click.Choice(["1", "2", "both"])
RULES = ("trained", "transformers")  # those of sta_adapter.injection.text_positions, which imports torch
# modules that training, and a plan of it, can't do without
TRAINING = {"train": ("peft", "accelerate", "torchvision", "PIL", "tqdm", "yaml")}


Decorated = TypeVar("Decorated", bound="Callable[..., object] | click.Command")


class _GroupedOption(click.Option):
    def __init__(self, *args: Any, group: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group


class Grouped(click.Command):
    """A command whose help begins with its example and lists options under headings, short enough for a screen.

    It can't work without the modules that it `needs`, by the extra that brings them.
    """

    def __init__(self, *args: Any, needs: Mapping[str, Sequence[str]] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.needs = needs or {}

    def invoke(self, ctx: click.Context) -> object:
        """Run it, if all packages are there."""
        require_packages(f"sta-adapter {ctx.info_name}", self.needs)
        return super().invoke(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, heading by heading."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, _GroupedOption):
                groups.setdefault(parameter.group, []).append(record)
        formatter.write_paragraph()
        for heading, records in groups.items():
            formatter.write_heading(heading)
            with formatter.indentation():
                formatter.write_dl(records, col_max=26)


def option(group: str, *names: str, **settings: Any) -> Callable[[Decorated], Decorated]:
    """A click option below a heading."""
    return click.option(*names, cls=_GroupedOption, group=group, **settings)


def together(*options: Callable[[Decorated], Decorated]) -> Callable[[Decorated], Decorated]:
    """Several options as one decorator; the last of them comes first in the help."""

    def decorate(command: Decorated) -> Decorated:
        for add in options:
            command = add(command)
        return command

    return decorate


# How the model is loaded.
model_options = together(
    option("Model", "--trust-remote-code", is_flag=True, help="Run Python code that comes with the model."),
    option("Model", "--dtype", type=DTYPE, metavar="TYPE", help="Of the base: auto, bf16, fp16 or fp32."),
    option("Model", "--revision", metavar="NAME", help="Branch, tag or commit on the Hub."),
    option("Model", "--positions", type=click.Choice(RULES), metavar="RULE", help=POSITIONS),
)

# How an adapter is had and put on the model; what `find_adapter` and `base_model_of` read.
adapter_options = together(
    option("Model", "--any-base", is_flag=True, help="Accept another base, if the adapter fits it."),
    option("Model", "--adapter-revision", metavar="NAME", help="The adapter's branch, tag or commit."),
)

# Which model and adapter to look at, without any of them the demo's.
shown_model_options = together(
    option("What", "--adapter", metavar="ID", help=SHOWN_ADAPTER),
    option("What", "--model", metavar="ID", help="Model on the Hub, or its folder. [default: the demo's tiny base]"),
)

quantize_option = option(
    "Model", "--quantize", type=BITS, metavar="BITS", help="Load the base in 4bit (QLoRA) or 8bit."
)
stage_option = option("Run", "--stage", type=STAGE, metavar="STAGE", help=STAGES)


class ModelOptions(TypedDict):
    """What `model_options` and `adapter_options` add to a command that has --device."""

    device: str | None
    revision: str | None
    positions: str | None
    trust_remote_code: bool
    dtype: str | None
    any_base: bool
    adapter_revision: str | None


def viewer_settings(options: ModelOptions) -> dict[str, Any]:
    """The arguments of `Viewer.load` for which the options of model and adapter stand."""
    return {
        "base_model": base_model_of(options["any_base"]),
        "dtype": options["dtype"] or "auto",
        "device": options["device"],
        "revision": options["revision"],
        "positions": options["positions"],
        "trust_remote_code": options["trust_remote_code"],
    }


def frame_rate(fps: float | None, nframes: int | None) -> dict[str, Any]:
    """The fields of `FrameSettings` that --fps or --nframes set, of which one may be given."""
    if fps is not None and nframes is not None:
        raise ConfigError("--fps and --nframes exclude each other; give one of them.")
    if fps is not None:
        return {"fps": fps, "nframes": None}
    return {} if nframes is None else {"nframes": nframes}


def find_adapter(adapter: str | None, revision: str | None, any_base: bool = False) -> Path | None:
    """The adapter's folder, looked for and downloaded once, before anything takes time; its options need an adapter."""
    if adapter is None:
        if revision is not None:
            raise ConfigError(f"--adapter-revision {revision}: there is no --adapter.")
        if any_base:
            raise ConfigError("--any-base: there is no --adapter.")
        return None
    from sta_adapter.adapter.hub import resolve_adapter

    return resolve_adapter(adapter, revision)


def base_model_of(any_base: bool) -> str | None:
    """The `base_model` of `load_sta` that stands for the option."""
    return "any" if any_base else None


def data_options(command: Decorated) -> Decorated:
    """How a file of samples is read; in the group of the options beside it."""
    from sta_adapter.data.formats import FORMATS

    choice = click.Choice(list(FORMATS))
    return together(
        option("Run", "--format", type=choice, metavar="NAME", help=f"{', '.join(FORMATS)}. [default: by keys]"),
        option("Run", "--videos", metavar="FOLDER", help="Relative paths start here. [default: FILE's folder]"),
    )(command)


class Run(TypedDict):
    """A run's own options, those of `sta-adapter train` that are no settings; None for what was not given."""

    model: str
    revision: str | None
    dtype: str | None
    quantize: str | None
    attn_implementation: str | None
    positions: str | None
    adapter: str | None
    adapter_revision: str | None
    data: str | list[str]
    eval_data: str | None
    videos: str | None
    format: str | None
    cache: str | None
    out: str
    stage: str
    overwrite: bool
    trust_remote_code: bool
    dry_run: bool
    any_base: bool


RUN_OPTIONS = tuple(Run.__annotations__)
FLAGS = [name for name, kind in get_type_hints(Run).items() if kind is bool]


def parse_settings(pairs: tuple[str, ...]) -> dict[str, object]:
    """`("lora_rank=8", "frames.fps=2")` as nested values, read as YAML would."""
    from sta_adapter.training.yaml_file import parse_yaml

    values: dict[str, object] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise ConfigError(f"--set {pair!r}: expected NAME=VALUE, such as --set lora_rank=8.")
        try:
            value = parse_yaml(text)
        except ValueError as error:
            raise ConfigError(f"--set {pair!r}: {text!r} is not a YAML value.") from error
        *path, last = name.split(".")
        place = values
        for part in path:
            below = place.setdefault(part, {})
            if not isinstance(below, dict):
                raise ConfigError(f"--set {pair!r}: {part!r} has a value already.")
            place = below
        place[last] = value
    return values


def read_run(
    config: str | None, pairs: tuple[str, ...], options: Mapping[str, object], needed: Sequence[str]
) -> tuple[Run, TrainingConfig]:
    """A run's own options and its settings of training: of a YAML file, of --set, and of options, of which the later ones win.

    Of `options`, what was not given is None, False or empty; those that are `needed` must be given in one of the three.
    """
    from sta_adapter.training.config import LENGTH, TrainingConfig
    from sta_adapter.training.yaml_file import read_yaml

    given = {name: value for name, value in options.items() if value is not None and value is not False and value != ()}
    given = merged(parse_settings(pairs), given)
    values = read_yaml(config) if config else {}
    if not given.keys().isdisjoint(LENGTH):  # steps instead of the file's epochs, or the other way round
        values = {name: value for name, value in values.items() if name not in LENGTH}
    values = merged(values, given)
    try:
        found = {name: _own_option(name, values.pop(name, None)) for name in RUN_OPTIONS}
        run, missing = cast(Run, found), [f"--{name}" for name in needed if not found[name]]
        if missing:
            command = click.get_current_context().info_name
            raise click.UsageError(
                f"Missing option {', '.join(missing)}; see the example in sta-adapter {command} --help."
            )
        frames = values.get("frames", {})
        if run["model"] and isinstance(frames, dict) and (usual := usual_frames(run["model"], frames)):
            values["frames"] = usual  # what is no mapping is refused with the other settings
        settings = TrainingConfig.from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{config}: {error}" if config else str(error)) from error
    run["stage"] = run["stage"] or ("both" if settings.sta else "2")
    return run, settings


def _own_option(name: str, value: object) -> object:
    """One of a run's own options, of which a file may say anything: a flag is true or false, any other a text."""
    if name == "data":
        return one_or_several(value)
    if name == "stage" and isinstance(value, int):
        return str(value)
    kind, expected = (bool, "true or false") if name in FLAGS else (str, "a text")
    if value is not None and not isinstance(value, kind):
        raise ConfigError(f"{name} is {shown(value)}, expected {expected}.")
    return bool(value) if name in FLAGS else value


def one_or_several(data: object) -> str | list[str] | None:
    """`--data` as `open_data` takes it: a name, or a list of at least two."""
    if data is None or isinstance(data, str):
        return data
    if not isinstance(data, (list, tuple)) or not data or not all(isinstance(name, str) for name in data):
        raise ConfigError(f"data is {data!r}, expected a file, or a list of them, such as [a.jsonl, b.jsonl:2].")
    return data[0] if len(data) == 1 else list(data)


def merged(first: Mapping[str, object], second: Mapping[str, object]) -> dict[str, object]:
    """`first` with what `second` says in its place, also one level down."""
    result = dict(first)
    for key, value in second.items():
        before = result.get(key)
        result[key] = {**before, **value} if isinstance(value, dict) and isinstance(before, dict) else value
    return result
