"""`sta-adapter evaluate`: how often a model is right, with and without its adapter, also on frames out of order."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import click

from sta_adapter.cli.measurement import (
    ENGINES,
    AskOptions,
    EngineReport,
    Measurement,
    ask_engine,
    check_options,
    sentences,
)
from sta_adapter.cli.model_source import ModelSource
from sta_adapter.cli.options import (
    Grouped,
    adapter_options,
    data_options,
    find_adapter,
    frame_rate,
    model_options,
    option,
    quantize_option,
)
from sta_adapter.errors import ConfigError, DataError
from sta_adapter.evaluation.benchmarks import BENCHMARKS
from sta_adapter.requirements import require_device, require_packages, require_writable
from sta_adapter.visualization.local_paths import public_name, without_folders

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from sta_adapter.compatibility.processors import Processor
    from sta_adapter.data.conversation import Sample
    from sta_adapter.data.dataset import VideoDataset
    from sta_adapter.evaluation.comparison import Report

    class Options(AskOptions):
        """Those of the command, but for the ones that it names itself."""

        data: str
        benchmark: str | None
        format: str | None
        videos: str | None
        category: str | None
        frames: str
        overwrite: bool
        batch_size: int | None
        max_new_tokens: int
        num_workers: int
        fps: float | None
        nframes: int | None
        seed: int
        on_bad_sample: str
        adapter_revision: str | None
        any_base: bool
        revision: str | None
        trust_remote_code: bool
        dtype: str | None

    class About(TypedDict, total=False):
        """What results.json says of itself."""

        model: str
        adapter_id: str | None
        adapter_sha256: str  # `weights_digest`
        data: str
        benchmark: str | None
        seed: int
        engine: EngineReport

    class Results(Report, About, total=False):
        """What it holds."""


ORDERS = ("ordered", "shuffled", "reversed")
FRAMES = click.Choice([*ORDERS, "all"])
BAD = click.Choice(["skip", "error"])


HELP = """\b
Example: sta-adapter evaluate --model Qwen/Qwen2-VL-2B-Instruct \\
             --adapter my-adapter --data test.jsonl --base --out results
"""


@click.command(cls=Grouped, needs={"train": ("torchvision", "PIL", "tqdm")}, help=HELP)
@option("Run", "--model", metavar="ID", required=True, help="Model on the Hub, or its folder.")
@option("Run", "--adapter", metavar="ID", help="Adapter on the Hub, or its folder.")
@option("Run", "--base", is_flag=True, help="Also measure the model without the adapter.")
@option("Run", "--data", metavar="PATH", required=True, help="Samples, tar shards, or a benchmark's folder.")
@option("Run", "--benchmark", type=click.Choice(BENCHMARKS), metavar="NAME", help=f"{', '.join(BENCHMARKS)}.")
@data_options
@option("Run", "--category", metavar="FIELD", help="Field to group by. [default: category]")
@option("Run", "--frames", type=FRAMES, metavar="ORDER", default="ordered", help="ordered, shuffled, reversed or all.")
@option("Run", "--out", metavar="FOLDER", help="Gets results and a plot; resumes what is in it.")
@option("Run", "--overwrite", is_flag=True, help="Discard the predictions in FOLDER.")
@option("Run", "--json", "as_json", is_flag=True, help="Print JSON, not a table.")
@option("How", "--batch-size", type=click.IntRange(1), metavar="N", help="Samples at a time. [default: 8; vllm: 64]")
@option(
    "How", "--max-new-tokens", type=click.IntRange(1), metavar="N", default=32, help="Longest answer. [default: 32]"
)
@option("How", "--stop-at-letter", is_flag=True, help="Stop an answer after its option's letter.")
@option(
    "How", "--num-workers", type=click.IntRange(0), metavar="N", default=2, help="Processes that decode. [default: 2]"
)
@option("How", "--cache", metavar="FOLDER", help="Keep encoded samples here for later runs.")
@option("How", "--fps", type=float, metavar="RATE", help="Frames a second. [default: as trained]")
@option("How", "--nframes", type=int, metavar="N", help="The same number of frames of every clip.")
@option(
    "How", "--seed", type=click.IntRange(0), metavar="N", default=0, help="For shuffling and intervals. [default: 0]"
)
@option("How", "--on-bad-sample", type=BAD, metavar="WHAT", default="skip", help="skip or error. [default: skip]")
@option(
    "How", "--engine", type=click.Choice(ENGINES), default="transformers", metavar="NAME", help="transformers or vllm."
)
@option("How", "--engine-options", metavar="JSON", help="Further arguments of vllm.LLM.")
@option("How", "--check", type=click.IntRange(0), metavar="N", help="Samples to check by transformers. [default: 16]")
@option("How", "--device", metavar="DEVICE", help="cpu, cuda:1, ... [default: CUDA if it is there]")
@quantize_option
@model_options
@adapter_options
def command(
    model: str, adapter: str | None, base: bool, out: str | None, as_json: bool, **options: Unpack[Options]
) -> None:
    """Evaluate and print the outcome."""
    from sta_adapter.adapter.format import weights_digest
    from sta_adapter.distributed import is_rank_zero
    from sta_adapter.evaluation.comparison import as_text, chance, clips_of, compare

    about: About = {  # without folders of this machine, as such files are published
        "model": public_name(model),
        "adapter_id": None if adapter is None else public_name(adapter),
        "data": public_name(options["data"]),
        "benchmark": options["benchmark"],
        "seed": options["seed"],
    }
    require_device(options["device"])
    check_options(options)
    if options["overwrite"] and not out:
        raise ConfigError("--overwrite: there is no --out.")
    if options["stop_at_letter"] and not options["benchmark"]:
        raise ConfigError("--stop-at-letter needs --benchmark, where answers are written; here options are scored.")
    shared = _joined(options)
    if options["engine"] == "vllm":
        require_packages("--engine vllm", {"vllm": ("vllm",)})
    runs = [*(["base"] if base or adapter is None else []), *(["adapter"] if adapter is not None else [])]
    if out:
        _require_results_free(Path(out), about, runs, options)
    samples, notes = _samples(options)
    folder = find_adapter(adapter, options["adapter_revision"], options["any_base"])
    if folder is not None:
        about["adapter_sha256"] = weights_digest(folder)
    source = ModelSource.of({"model": model, **options}, folder)
    dataset = _dataset(samples, model, source.load_processor(), folder, options)

    kept, how = Path(out) if out else None, _arguments(options, shared)
    measurement = Measurement(
        source, dataset, runs, _orders(options), options["device"], kept, options["overwrite"], how
    )
    if options["engine"] == "vllm":
        results, engine = ask_engine(measurement, options)
        about["engine"], notes = engine, [*notes, *sentences(engine)]
    else:
        results = measurement.ask_model()
    for result in (result for orders in results.values() for result in orders.values()):
        if not result.predictions:
            first = result.bad_samples[0] if result.bad_samples else "there is none"
            raise DataError(f"none of the {len(samples)} samples could be used. The first: {first}")
    if not is_rank_zero():
        return
    compared = compare(results, clips_of(samples), seed=options["seed"])
    report: Results = {**compared, **about, "chance": chance(samples), "notes": notes}
    public = without_folders(report, [options["videos"] or "", options["data"], Path(options["data"]).parent])
    if out:
        _write(public, Path(out))
    click.echo(json.dumps(public, indent=1) if as_json else as_text(report))


def _arguments(options: Options, shared: bool) -> dict[str, object]:
    """Those of `sta_adapter.evaluation.evaluate` that are the same for all runs."""
    return {
        "seed": options["seed"],
        "batch_size": options["batch_size"] or (64 if options["engine"] == "vllm" else 8),
        "max_new_tokens": options["max_new_tokens"],
        "choose": "generate" if options["benchmark"] else "loglikelihood",
        "num_workers": options["num_workers"],
        "stop_at_letter": options["stop_at_letter"],
        "shared": shared,
    }


def _joined(options: Options) -> bool:
    """Whether this is one of several processes that share the samples, each of which then works on a device of its own."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return False
    if options["engine"] == "vllm":
        raise ConfigError("--engine vllm is one process, which shares its work by itself (tensor_parallel_size).")
    if options["device"] not in (None, "cpu"):
        raise ConfigError("--device and several processes exclude each other: each takes the GPU of its number.")
    require_packages("sta-adapter evaluate in several processes", {"train": ("accelerate",)})
    from sta_adapter.training.stage import join_processes

    device = str(join_processes().device)
    options["device"] = options["device"] or device
    return True


def _require_results_free(folder: Path, about: About, planned: list[str], options: Options) -> None:
    """Refuse to replace results that this evaluation will not hold as well."""
    require_writable(folder)
    file = folder / "results.json"
    if not file.exists() or options["overwrite"]:
        return
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        runs = {(name, order) for name in ("base", "adapter") for order in found.get(name) or {}}
        differ = sorted(key for key, value in about.items() if key != "seed" and found[key] != value)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        runs, differ = set(), ["its form"]
    lost = runs - {(name, order) for name in planned for order in _orders(options)}
    differ += [f"{name}, {order} frames" for name, order in sorted(lost)]
    if differ:
        raise ConfigError(
            f"{file} holds results of another evaluation, which would be lost (it differs in {'; '.join(differ)}). Take "
            "another folder, or discard them with --overwrite."
        )


def _orders(options: Options) -> tuple[str, ...]:
    return ORDERS if options["frames"] == "all" else (options["frames"],)


def _samples(options: Options) -> tuple[list[Sample], list[str]]:
    """What to ask, and what was left out of it."""
    from sta_adapter.data.sample_keys import printable
    from sta_adapter.data.samples import open_samples, require_usable
    from sta_adapter.evaluation.benchmarks import load_benchmark

    if options["benchmark"]:
        given = "--format" if options["format"] else "--videos" if options["videos"] else ""
        if given:
            raise ConfigError(f"{given} and --benchmark exclude each other; the layout of a benchmark is fixed.")
        found = load_benchmark(options["benchmark"], options["data"])
        samples, notes = found.samples, found.notes
    else:
        opened = open_samples(
            options["data"],
            format=options["format"],
            videos=options["videos"],
            on_bad_sample=options["on_bad_sample"],
        )
        samples, notes = list(require_usable(opened)), []
    field = options["category"]
    if field is None or field == "category":
        return samples, notes
    if not any(field in sample.extra for sample in samples):
        fields = {name for sample in samples for name in sample.extra} - {"option_texts"}
        if not options["benchmark"]:  # which names its own groups so
            fields |= {"category" for sample in samples if sample.category is not None}
        known = sorted(fields)
        raise ConfigError(f"--category {field}: no sample has that field; there are: {', '.join(known) or 'none'}.")
    return [replace(sample, category=printable(sample.extra.get(field, "other"))) for sample in samples], notes


def _dataset(
    samples: list[Sample], model: str, processor: Processor, adapter: Path | None, options: Options
) -> VideoDataset:
    """The data, with the frames that the adapter was trained with unless options say otherwise."""
    from sta_adapter.data.dataset import VideoDataset
    from sta_adapter.loading import frames_in_force

    frames = frames_in_force(model, adapter, frame_rate(options["fps"], options["nframes"]))
    bad, cache = options["on_bad_sample"], options["cache"] or False
    return VideoDataset(samples, processor, frames=frames, on_bad_sample=bad, cache=cache)


def _write(report: Results, folder: Path) -> None:
    """results.json and results.png; where it can't be drawn, the reason in its place."""
    from sta_adapter.evaluation.plot import draw

    (folder / "results.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (folder / "results.png").unlink(missing_ok=True)  # of results before
    try:
        draw(report, folder / "results.png")
    except Exception as error:  # a picture must not cost the outcome of hours, whatever its library can't draw
        click.secho(f"No results.png: {error}", fg="yellow", err=True)
