"""`sta-adapter train`: both stages of training on your clips.

Every option can also stand in the YAML file, under its own name.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sta_adapter.cli import WORDS
from sta_adapter.cli.model_source import ModelSource
from sta_adapter.cli.options import (
    TRAINING,
    Grouped,
    adapter_options,
    data_options,
    find_adapter,
    model_options,
    option,
    quantize_option,
    read_run,
    stage_option,
)
from sta_adapter.errors import TrainingStopped
from sta_adapter.requirements import require_reporters, require_writable

if TYPE_CHECKING:
    from sta_adapter.cli.options import Run
    from sta_adapter.training.config import TrainingConfig
    from sta_adapter.training.two_stage import TrainingResult

HELP = """\b
Example: sta-adapter train --model Qwen/Qwen2-VL-2B-Instruct \\
             --data clips.jsonl --out my-adapter

Trains STA in the model's vision encoder, then LoRA beside it.
"""


@click.command(cls=Grouped, needs=TRAINING, help=HELP)
@option("Run", "--model", metavar="ID", help="Model on the Hub, or its folder.")
@option("Run", "--data", metavar="FILE[:WEIGHT]", multiple=True, help="Samples or tar shards; may be repeated.")
@data_options
@option("Run", "--out", metavar="FOLDER", help="Gets the adapter; resumes the run in it.")
@stage_option
@option("Run", "--eval-data", metavar="FILE", help="Samples to evaluate on; the best is kept.")
@option("Run", "--adapter", metavar="ID", help="Start from this adapter, not from a new one.")
@option("Run", "--dry-run", is_flag=True, help="Show what it would do and need, as plan does.")
@option("Run", "--cache", metavar="FOLDER", help="Keep encoded samples for later epochs and runs.")
@option("Run", "--overwrite", is_flag=True, help="Discard the run in FOLDER.")
@option("Settings", "--config", metavar="FILE.yaml", help="Settings and options; the command line wins.")
@option("Settings", "--set", "pairs", metavar="NAME=VALUE", multiple=True, help="One setting: --set frames.fps=2")
@option("Settings", "--learning-rate", type=float, metavar="RATE", help="[default: 1e-4]")
@option("Settings", "--batch-size", type=int, metavar="N", help="Clips a step. [default: 64]")
@option("Settings", "--max-steps", type=int, metavar="N", help="Steps, instead of epochs; tar shards need it.")
@option("Settings", "--epochs", type=float, metavar="N", help="Epochs of each stage. [default: 1]")
@option("Settings", "--early-stopping", type=int, metavar="N", help="Stop after N evaluations without a better one.")
@option("Settings", "--num-workers", type=int, metavar="N", help="Processes that decode. [default: 2]")
@option("Settings", "--seed", type=int, metavar="N", help="Random seed. [default: 0]")
@option("Settings", "--run-name", metavar="NAME", help="Name in TensorBoard, W&B, MLflow (report_to).")
@option("Settings", "--on-bad-sample", type=click.Choice(["skip", "error"]), metavar="WHAT", help="skip or error.")
@quantize_option
@model_options
@option("Model", "--attn-implementation", metavar="NAME", help="sdpa, flash_attention_2, eager.")
@adapter_options
def command(config: str | None, pairs: tuple[str, ...], **options: object) -> None:
    """Train as the options and the file of settings say."""
    run, settings = read_run(config, pairs, options, ("model", "data", "out"))
    _train(run, settings)


def _train(run: Run, settings: TrainingConfig) -> None:
    from sta_adapter.distributed import is_rank_zero
    from sta_adapter.training.two_stage import open_data, train

    if run["dry_run"]:
        from sta_adapter.cli.plan import describe, plan_run

        click.echo("\n".join(describe(plan_run(run, settings))))
        return
    require_reporters(settings.report_to)
    require_writable(Path(run["out"]))
    source = ModelSource.of(run, find_adapter(run["adapter"], run["adapter_revision"], run["any_base"]))
    processor = source.load_processor()

    opened = partial(open_data, format=run["format"], videos=run["videos"], cache=run["cache"])
    data = opened(run["data"], processor, settings)
    eval_data = opened(run["eval_data"], processor, settings, stream=False) if run["eval_data"] else None
    model = source.load(_device(run["quantize"]), is_trainable=True)
    try:
        result = train(
            model,
            data,
            output_dir=run["out"],
            stage=run["stage"],
            config=settings,
            eval_data=eval_data,
            overwrite=run["overwrite"],
        )
    except TrainingStopped as stopped:
        if is_rank_zero():
            _say_how_to_go_on(stopped, run)
        sys.exit(128 + stopped.signal)
    if is_rank_zero():
        _report(run["model"], result)


def _device(narrow: str | None) -> str:
    """Where the base is loaded: quantised weights can't move, others are moved by the trainer."""
    if narrow is None:
        return "cpu"
    from sta_adapter.training.arguments import join_processes

    return str(join_processes().device)


def _say_how_to_go_on(stopped: TrainingStopped, run: Run) -> None:
    """The same command, without what would throw the run away."""
    saved = (
        "No checkpoint was saved" if stopped.checkpoint is None else f"{shlex.quote(str(stopped.checkpoint))} is saved"
    )
    click.echo(f"Stopped by {signal.Signals(stopped.signal).name}. {saved}. To go on:", err=True)
    words = [word for word in given_words() if word != "--overwrite"]
    if run["overwrite"] and words == given_words():
        click.echo("  (without overwrite: true in the file of settings, which would throw it away)", err=True)
    launched = "" if "LOCAL_RANK" not in os.environ else "  # with the words of accelerate launch in front, as before"
    click.echo(f"  {shlex.join(['sta-adapter', *words])}{launched}", err=True)


def given_words() -> list[str]:
    """The words of the command line, the sub-command first."""
    return list(click.get_current_context().find_root().meta.get(WORDS, ()))


def _report(model: str, result: TrainingResult) -> None:
    before = result.finished_before
    for name, stage in result.stages.items():
        done = "was finished before: " if name in before else ""
        losses = [entry["loss"] for entry in stage["history"] if "loss" in entry]
        loss = f", loss {losses[0]:.3f} to {losses[-1]:.3f}" if losses else ""
        click.echo(
            f"stage {name}: {done}{stage['trainable_parameters']:,} parameters, {stage['steps']} steps, {stage['seconds']:.0f} s{loss}"
        )
    if result.bad_samples:
        click.secho(f"{len(result.bad_samples)} bad samples were skipped; stage*/result.json lists them.", fg="yellow")
    if len(before) == len(result.stages):
        click.echo("Nothing was trained. A larger --epochs or --max-steps goes on; --overwrite begins anew.")
    folder = shlex.quote(str(result.output_dir))
    click.echo(f"The adapter is in {folder}.")
    click.echo(f"Next: sta-adapter evaluate --model {shlex.quote(model)} --adapter {folder} --data FILE")
