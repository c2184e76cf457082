"""`sta-adapter plan`: whether a training fits, and how long it takes, before it begins; weights are not loaded for it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, cast

import click

from sta_adapter.cli.model_source import ModelSource
from sta_adapter.cli.options import BITS, DTYPE, TRAINING, Grouped, data_options, option, read_run, stage_option

if TYPE_CHECKING:
    from torch import nn

    from sta_adapter.cli.options import Run
    from sta_adapter.data.dataset import VideoDataset
    from sta_adapter.training.config import TrainingConfig
    from sta_adapter.training.plan import LengthsReport, Machine, StagePlan

HELP = """\b
Example: sta-adapter plan --model Qwen/Qwen2-VL-7B-Instruct \\
             --data clips.jsonl --memory 80

Shows parameters, steps, lengths and the memory of a training step, part
by part, and the settings that fit. With a GPU, one step is measured.
"""


class MachineReport(TypedDict):
    """What a run is planned for."""

    memory: float
    cuda: bool
    precision: str
    processes: int


class PlanReport(TypedDict):
    """What --json prints."""

    model: str
    machine: MachineReport
    data: LengthsReport
    stages: dict[str, StagePlan]


@click.command(cls=Grouped, needs=TRAINING, help=HELP)
@option("Run", "--model", metavar="ID", help="Model on the Hub, or its folder.")
@option("Run", "--data", metavar="FILE[:WEIGHT]", multiple=True, help="Samples to train on, as for train.")
@data_options
@stage_option
@option("Run", "--config", metavar="FILE.yaml", help="Settings and options, as for train.")
@option("Run", "--set", "pairs", metavar="NAME=VALUE", multiple=True, help="One setting: --set frames.fps=2")
@option(
    "Machine", "--memory", type=click.FloatRange(1), metavar="GB", help="Memory of the GPU. [default: this machine's]"
)
@option("Machine", "--processes", type=click.IntRange(1), metavar="N", default=1, help="Number of GPUs. [default: 1]")
@option(
    "Machine", "--samples", type=click.IntRange(1), metavar="N", default=64, help="Samples to look at. [default: 64]"
)
@option("Machine", "--measure", is_flag=True, help="Load the model and measure a step; also without a GPU.")
@option("Machine", "--json", "as_json", is_flag=True, help="Print JSON, memory in bytes.")
@option("Model", "--dtype", type=DTYPE, metavar="TYPE", help="Of the base: auto, bf16, fp16 or fp32.")
@option("Model", "--quantize", type=BITS, metavar="BITS", help="Load the base in 4bit (QLoRA) or 8bit.")
@option("Model", "--revision", metavar="NAME", help="Branch, tag or commit on the Hub.")
@option("Model", "--trust-remote-code", is_flag=True, help="Run Python code that comes with the model.")
def command(
    config: str | None,
    pairs: tuple[str, ...],
    memory: float | None,
    processes: int,
    samples: int,
    measure: bool,
    as_json: bool,
    **options: object,
) -> None:
    """Plan, and print it."""
    run, settings = read_run(config, pairs, options, ("model", "data"))  # a file may hold those of train as well
    report = plan_run(run, settings, memory=memory, processes=processes, samples=samples, measure=measure)
    click.echo(json.dumps(report, indent=1) if as_json else "\n".join(describe(report)))


def plan_run(
    run: Run,
    settings: TrainingConfig,
    *,
    memory: float | None = None,
    processes: int = 1,
    samples: int = 64,
    measure: bool = False,
) -> PlanReport:
    """What a run of `sta-adapter train` would do and need; the arguments are the command's options."""
    import torch

    from sta_adapter.config import STAConfig
    from sta_adapter.data.stream import StreamDataset
    from sta_adapter.inspection import empty_model
    from sta_adapter.training.plan import measure_step, plan_stage, sample_lengths
    from sta_adapter.training.settings_check import check_settings, check_single_frames, check_sizes
    from sta_adapter.training.stage import Stage
    from sta_adapter.training.two_stage import open_data, stage_names

    source = ModelSource.of(run, None)
    names = stage_names(run["stage"], settings)
    machine = _machine(run, settings, memory, processes)
    processor = source.load_processor()
    configs = {name: settings.for_stage(name) for name in names}
    opened = partial(open_data, processor=processor, config=settings, format=run["format"], videos=run["videos"])
    data = opened(run["data"])
    measured_on = opened(run["eval_data"], stream=False) if run["eval_data"] else None
    check_settings(settings, list(configs.values()), data, measured_on, None)
    check_sizes(data.encoder.reader)
    if settings.sta:
        check_single_frames(data, STAConfig.from_dict(settings.sta_config))
    # of shards, which train reads as a stream, samples are looked up here
    dataset = cast("VideoDataset", opened(run["data"], stream=False) if isinstance(data, StreamDataset) else data)
    lengths = sample_lengths(dataset, samples, settings.num_workers)

    def make_model() -> nn.Module:
        return empty_model(source.model, revision=source.revision, trust_remote_code=source.trust_remote_code)

    stages = {n: plan_stage(n, config, make_model, dataset, lengths, machine) for n, config in configs.items()}
    if measure or (memory is None and torch.cuda.is_available()):
        for name, config in configs.items():
            model = source.load(None)
            found = measure_step(Stage(name, config, Path(), dataset), model, lengths.longest, processes)
            steps = stages[name]["steps"] * stages[name]["accumulation"]
            stages[name]["measured"], stages[name]["hours"] = found, steps * found["seconds"] / 3600
            del model
    about: MachineReport = {
        "memory": machine.memory,
        "cuda": machine.cuda,
        "precision": machine.precision,
        "processes": processes,
    }
    return {"model": run["model"], "machine": about, "data": lengths.to_dict(), "stages": stages}


def _machine(run: Run, settings: TrainingConfig, memory: float | None, processes: int) -> Machine:
    import psutil
    import torch

    from sta_adapter.loading import DTYPES
    from sta_adapter.training.arguments import precision_of
    from sta_adapter.training.plan import GB, Machine

    gpu = torch.cuda.is_available()
    cuda = gpu or memory is not None
    precision = "bf16" if cuda and settings.precision == "auto" else settings.precision
    if not cuda:
        precision = precision_of(precision)
    here = torch.cuda.get_device_properties(0).total_memory if gpu else psutil.virtual_memory().total
    auto = torch.bfloat16 if cuda else torch.float32
    dtype = DTYPES.get(run["dtype"] or "auto", auto)
    size = here if memory is None else memory * GB
    return Machine(size, cuda, precision, dtype, processes, run["quantize"])


def describe(report: PlanReport) -> list[str]:
    """The report as lines for a terminal."""
    machine, tokens = report["machine"], report["data"]["tokens"]
    where = "a GPU" if machine["cuda"] else "this machine (--memory GB plans for a GPU)"
    lines = [
        f"{report['model']}, in {machine['precision']} on {where} of {machine['memory'] / 1e9:.0f} GB",
        f"samples     {report['data']['samples']:,}, of which {report['data']['looked_at']} were looked at: "
        f"{tokens['least']:,} to {tokens['largest']:,} tokens, half of them up to {tokens['median']:,.0f}",
    ]
    for name, stage in report["stages"].items():
        lines += ["", *_stage_lines(name, stage, machine)]
    return lines


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _stage_lines(name: str, stage: StagePlan, machine: MachineReport) -> list[str]:
    parts = ", ".join(f"{part} {_size(size)}" for part, size in stage["parts"].items())
    reserve = " (with CUDA and 5 % that its allocator can't give)" if machine["cuda"] else ""
    on = "on" if stage["gradient_checkpointing"] else "off"
    lines = [
        f"stage {name}",
        f"  trains    {stage['trainable']:,} of {stage['parameters']:,} parameters",
        f"  steps     {stage['steps']:,} of {stage['batch_size']} clips: {stage['device_batch_size']} on a device at a time, "
        f"{stage['accumulation']} times",
        f"  memory    {_size(stage['needs'])}{reserve}: {'fits' if stage['fits'] else 'does not fit'}, "
        f"gradient checkpointing {on}",
        f"            {parts}",
    ]
    for choice in stage["choices"]:
        size, kind = choice["device_batch_size"], "with" if choice["gradient_checkpointing"] else "without"
        fits = f"up to {size} clips on a device" if size else "nothing fits"
        lines.append(f"  {kind + ' gradient checkpointing':<31} {fits}")
    best = stage["suggested"]
    if best is None:
        lines.append(
            "  Nothing fits: take --quantize 4bit, fewer or smaller frames, or share the weights (multi-node.md)."
        )
    elif not stage["fits"]:
        words = " ".join(f"--set stage{name}.{key}={str(value).lower()}" for key, value in best.items())
        lines.append(f"  Fits with: {words}")
    if "measured" in stage:
        found = stage["measured"]
        peak = f", {_size(found['bytes'])}" if "bytes" in found else ""
        lines.append(
            f"  measured  {found['seconds']:.2f} s for {stage['device_batch_size']} of the longest samples{peak}: at most "
            f"{stage['hours']:.2g} hours"
        )
    return lines
