"""`sta-adapter demo`."""

from __future__ import annotations

from pathlib import Path

import click

from sta_adapter.errors import MissingExtraError

HELP = """\b
Example: sta-adapter demo --out sta-demo

Writes clips of ten movements that no single frame tells apart, trains a
tiny Qwen2-VL on them with STA and with LoRA alone, compares the two, and
writes a report. Takes minutes on a CPU.
"""


@click.command(help=HELP)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("sta-demo"), show_default=True,
              help="Folder for the report, the adapter, the clips and the runs.")  # fmt: skip
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True, help="How many seeds to repeat it with.")
@click.option("--seed", type=int, default=0, show_default=True, help="The first of them.")
@click.option("--quick", is_flag=True, help="A few steps on a few clips: shows every step, proves nothing.")
def command(out: Path, seeds: int, seed: int, quick: bool) -> None:
    """Run the comparison and write its report."""
    try:
        from sta_adapter.demo.report import print_table, write_report
        from sta_adapter.demo.run import DemoSettings, run_demo
    except ImportError as error:
        raise MissingExtraError(
            f"the demo needs more packages ({error}): pip install 'sta-adapter[train,viz]'"
        ) from error
    _quiet()
    settings = DemoSettings.quick() if quick else DemoSettings()
    results, handle, test = run_demo(out, settings, range(seed, seed + seeds), click.echo)
    print_table(results)
    page = write_report(out, results, handle, test)
    click.echo(f"report: {page}\nadapter: {out / 'adapter'}")


def _quiet() -> None:
    """Leave the terminal to the demo's own bars: a tiny model is loaded often, and peft uses what transformers deprecates."""
    import warnings

    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\..*")
