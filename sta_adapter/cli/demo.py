"""`sta-adapter demo`."""

from __future__ import annotations

from pathlib import Path

import click

from sta_adapter.cli.options import Grouped, option
from sta_adapter.requirements import require_free, require_writable

NEEDS = {"train": ("peft", "accelerate", "torchvision", "PIL", "tqdm", "yaml", "rich"), "viz": ("matplotlib",)}
MADE = ("results.json", "index.html", "adapter", "base")

HELP = """\b
Example: sta-adapter demo --out sta-demo

Writes clips of ten movements that no single frame tells apart, trains a
tiny Qwen2-VL on them with STA and with LoRA alone, compares the two, and
writes a report. Takes minutes on a CPU.
"""


@click.command(cls=Grouped, needs=NEEDS, help=HELP)
@option("Run", "--out", type=click.Path(file_okay=False, path_type=Path), default=Path("sta-demo"), metavar="FOLDER",
        help="Gets the report, adapter, clips and runs. [default: sta-demo]")  # fmt: skip
@option("Run", "--overwrite", is_flag=True, help="Replace the report and the adapter in FOLDER.")
@option("Run", "--seeds", type=click.IntRange(1), default=1, metavar="N", help="Number of seeds. [default: 1]")
@option("Run", "--seed", type=click.IntRange(0), default=0, metavar="N", help="First seed. [default: 0]")
@option("Run", "--lora-language", is_flag=True, help="Also train LoRA on the language model alone.")
@option("Run", "--quick", is_flag=True, help="A few steps on a few clips: runs everything, proves nothing.")
def command(out: Path, overwrite: bool, seeds: int, seed: int, lora_language: bool, quick: bool) -> None:
    """Run the comparison and write its report."""
    require_free(out, MADE, overwrite)
    require_writable(out)
    from sta_adapter.demo.methods import METHODS, SHOWN, DemoSettings
    from sta_adapter.demo.reader import ReaderSettings
    from sta_adapter.demo.report import print_table, write_report
    from sta_adapter.demo.run import run_demo

    _quiet()
    settings, reader = (DemoSettings.quick(), ReaderSettings.quick()) if quick else (DemoSettings(), ReaderSettings())
    if quick:
        click.echo(
            f"a quick run of {settings.steps} steps on {settings.train_clips} clips: it shows every step and proves nothing"
        )
    methods = tuple(METHODS) if lora_language else SHOWN
    results, handle, test = run_demo(out, settings, reader, range(seed, seed + seeds), click.echo, methods=methods)
    print_table(results)
    page = write_report(out, results, handle, test)
    click.echo(f"report: {page}\nadapter: {out / 'adapter'}")


def _quiet() -> None:
    """Leave the terminal to the demo's own bars: a tiny model is loaded often, and peft uses what transformers deprecates."""
    import warnings

    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\..*")
