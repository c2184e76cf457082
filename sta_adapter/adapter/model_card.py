"""The page of a published adapter: what it is for, how to load it, how it was trained, how good it is."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sta_adapter.adapter.format import WEIGHTS, Description, weights_digest
from sta_adapter.adapter.run_file import (
    RUN_FILE,
    VARIANTS,
    Results,
    Run,
    Variant,
    read_about,
    read_frames,
    read_results,
    read_run_file,
    read_settings,
    read_stage,
)
from sta_adapter.config import STAConfig
from sta_adapter.errors import CheckpointError

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

RESULT_FILE, RESULTS_FILE = "result.json", "results.json"
OTHER_RESULTS = "{file} {whose}, and is no part of the card; evaluate again, or name a file of results (--results)."
OTHER_RECIPE = (
    "{run} is of a training that ended in other weights than are there now, and its recipe is no part of the card."
)
PAPER = "[arXiv 2510.26027](https://arxiv.org/abs/2510.26027)"
METHOD = (
    "In every block of the vision encoder, each patch position attends over the frames of its clip (stacked temporal "
    f"attention, {PAPER}), before the language model sees a token."
)
ANSWERED = ("qwen2_vl", "videorope", "qwen2_5_vl", "qwen3_vl", "glm4v", "video_llama_3", "internvl", "llava_onevision")
SERVED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "llava_onevision")  # by vLLM
SERVED_POSITIONS = (None, "original")  # of text
# settings of a run that say something to readers, and how the card calls them
RECIPE = {
    "stage": "stage (1: STA; 2: STA and LoRA)",
    "learning_rate": "learning rate",
    "sta_learning_rate": "learning rate of STA",
    "schedule": "schedule",
    "warmup": "warm-up, share of the steps",
    "weight_decay": "weight decay",
    "batch_size": "clips a step",
    "epochs": "epochs",
    "max_steps": "most steps",
    "precision": "precision",
    "seed": "seed",
    "lora_targets": "LoRA on",
    "lora_rank": "LoRA rank",
    "lora_alpha": "LoRA alpha",
    "lora_qkv_rank": "LoRA rank of the encoder's qkv",
}


@dataclass(frozen=True)
class CardFacts:
    """What a card tells beyond the adapter's own configuration."""

    repo_id: str  # where it is published
    base_model: str | None = None  # Hub id of the base model; None where it has none
    license: str | None = None  # identifier such as "apache-2.0"
    datasets: Sequence[str] = ()  # Hub ids of what it was trained on
    parameters: int = 0  # how many numbers STA adds
    lora: bool = False  # whether LoRA weights lie beside
    run: Run = field(default_factory=Run)  # what `read_run` found


def read_run(folder: Path, results: Path | None = None) -> Run:
    """What training and evaluation have left in a folder; each part of it may be empty.

    Where the folder holds an adapter, files that are of another one are left out.

    Args:
        folder: the output of `sta-adapter train`, or any other.
        results: `results.json` of `sta-adapter evaluate`, or the folder that holds it; None looks for one in `folder`.

    Raises:
        CheckpointError: a file is no JSON, holds something else than a run leaves, there is no `results` where they
            were said to be, or they are of another adapter.
    """
    digest = weights_digest(folder) if (folder / WEIGHTS).exists() else None
    scores, notes = _results(folder, results, digest)
    run = folder / RUN_FILE
    if _of_another(folder, digest):
        return {"results": scores, "left_out": [OTHER_RECIPE.format(run=run), *notes]}
    found = read_run_file(run)
    parts = {name: part for name in ("1", "2") if isinstance(part := found.get(f"stage{name}"), Mapping)}
    files = {name: folder / f"stage{name}" / RESULT_FILE for name in ("1", "2")}
    stages = {name: read_stage(read_run_file(file), file) for name, file in files.items()}
    return {
        "settings": read_settings(found, RECIPE, run),
        "of_stages": {name: read_settings(part, RECIPE, run) for name, part in parts.items()},
        "stages": {name: values for name, values in stages.items() if values},
        "results": scores,
        "left_out": notes,
    }


def _results(folder: Path, given: Path | None, digest: str | None) -> tuple[Results, list[str]]:
    """The scores of an evaluation, and why those in the folder are left out."""
    file = folder / RESULTS_FILE if given is None else given / RESULTS_FILE if given.is_dir() else given
    if given is not None and not file.exists():
        raise CheckpointError(f"there are no results of an evaluation in {str(file)!r}.")
    found = read_results(read_run_file(file), file)
    of = found.get("adapter_sha256")
    if not found or digest is None or of == digest or (of is None and given is not None):
        return found, []
    whose = "does not say of which adapter it is" if of is None else "is of another adapter"
    if given is None:
        return {}, [OTHER_RESULTS.format(file=file, whose=whose)]
    raise CheckpointError(
        f"{file} {whose}, whose weights are not those in {folder}: evaluate this one (sta-adapter evaluate --adapter {folder})."
    )


def _of_another(folder: Path, digest: str | None) -> bool:
    """Whether the stages of the training in a folder ended in other weights than are there now, as far as they can be read."""
    ends = []
    for name in ("1", "2") if digest is not None else ():
        with contextlib.suppress(CheckpointError):
            ends.append(weights_digest(folder / f"stage{name}"))
    return bool(ends) and digest not in ends


def make_card(description: Description, facts: CardFacts) -> str:
    """The card as Markdown with its metadata in front."""
    from huggingface_hub import ModelCard

    description = read_about(description)
    sections = (_title(description, facts), _use(description, facts), _training(facts), _evaluation(facts))
    body = "\n\n".join([*(section for section in sections if section), _files(description, facts)])
    return str(ModelCard(f"---\n{_metadata(facts).to_yaml()}\n---\n\n{body}\n"))


def _metadata(facts: CardFacts) -> ModelCardData:
    from huggingface_hub import EvalResult, ModelCardData

    scores = _scores(facts, "adapter")
    benchmark = facts.run.get("results", {}).get("benchmark")
    measured = [
        EvalResult(
            task_type="video-text-to-text",
            dataset_type=str(benchmark or "own"),
            dataset_name=f"{benchmark or 'own clips'}, frames {order}",
            metric_type="accuracy",
            metric_value=round(score["accuracy"], 4),
            dataset_args={"frames": order, "samples": score["total"]},
        )
        for order, score in scores.items()
    ]
    return ModelCardData(
        library_name="sta-adapter",
        pipeline_tag="video-text-to-text",
        base_model=facts.base_model,
        base_model_relation="adapter" if facts.base_model else None,
        license=facts.license,
        datasets=list(facts.datasets) or None,
        metrics=["accuracy"] if measured else None,
        model_name=facts.repo_id.split("/")[-1] if measured else None,
        eval_results=measured or None,
        tags=["sta-adapter", "stacked-temporal-attention", "video", *(["lora"] if facts.lora else [])],
    )


def _title(description: Description, facts: CardFacts) -> str:
    base = f"[{facts.base_model}](https://huggingface.co/{facts.base_model})" if facts.base_model else "its base model"
    beside = ", and LoRA weights that were trained with it" if facts.lora else ""
    return (
        f"# {facts.repo_id.split('/')[-1]}\n\nStacked temporal attention for {base}: {facts.parameters:,} parameters in "
        f"the vision encoder (`{description['backbone']}`){beside}. {METHOD}"
    )


def _use(description: Description, facts: CardFacts) -> str:
    base = f'"{facts.base_model or "path/to/the/base/model"}"'
    asks, positions = description["backbone"] in ANSWERED, description.get("positions")
    lines = [
        "from sta_adapter import load_sta",
        f"from sta_adapter.loading import load_model{', load_processor' if asks else ''}",
        *(["from sta_adapter.text_positions import use_positions"] if positions else []),
        *(["from sta_adapter.video import read_clip"] if asks else []),
        "",
        f"model = load_model({base})",
        *([f'use_positions(model, "{positions}")  # of text, as in training'] if positions else []),
        f'handle = load_sta(model, "{facts.repo_id}")',
        _question(description, base) if asks else "model = handle.model  # the model to go on with",
    ]
    code = "\n".join(lines)
    use = f"## Use\n\n`pip install 'sta-adapter[train]'`, then\n\n```python\n{code}\n```"
    return "\n\n".join([use, *_serving(description, facts)])


def _serving(description: Description, facts: CardFacts) -> list[str]:
    """How vLLM serves it, where it does; with LoRA weights beside STA, that takes an export first."""
    if description["backbone"] not in SERVED or description.get("positions") not in SERVED_POSITIONS:
        return []
    base, adapter = facts.base_model or "path/to/the/base/model", facts.repo_id
    lines = [f"sta-adapter serve --model {base} --adapter {adapter}"]
    if facts.lora:
        lines = [
            f"sta-adapter export {adapter} served --merge-lora {base}",
            "sta-adapter serve --model served/base --adapter served/sta",
        ]
    return ["## Serve", "`pip install 'sta-adapter[vllm]'`, then\n\n```bash\n" + "\n".join(lines) + "\n```"]


def _question(description: Description, base: str) -> str:
    frames = read_frames(description.get("frames") or {}, Path("sta_config.json"))
    known = {"fps": frames.get("fps"), "num_frames": frames.get("nframes")}
    if known["num_frames"] is not None:
        known = {"num_frames": known["num_frames"]}
    else:
        known |= {"min_frames": frames.get("min_frames"), "max_frames": frames.get("max_frames")}
    sampling = "".join(f", {name}={value}" for name, value in known.items() if value is not None)
    return f'''processor = load_processor({base})

frames = read_clip("clip.mp4"{sampling}).frames  # (T, H, W, 3)
content = [{{"type": "video"}}, {{"type": "text", "text": "What happens in the video?"}}]
text = processor.apply_chat_template([{{"role": "user", "content": content}}], add_generation_prompt=True)
inputs = processor(text=[text], videos=[frames], return_tensors="pt").to(model.device)
tokens = handle.model.generate(**inputs, max_new_tokens=32)
print(processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0])'''


def _training(facts: CardFacts) -> str:
    settings = facts.run.get("settings", {})
    frames = settings.get("frames")
    own = {
        stage: values
        for stage, values in facts.run.get("of_stages", {}).items()
        if settings.get("stage") in (stage, "both")
    }
    rows = []
    for name, label in RECIPE.items():
        idle = not facts.lora if name.startswith("lora_") else name == "epochs" and "max_steps" in settings
        rows += [(label, settings[name])] if name in settings and not idle else []
        rows += [(f"{label}, stage {stage}", values[name]) for stage, values in own.items() if name in values]
    if isinstance(frames, Mapping):
        rows += [(f"frames: {name}", value) for name, value in frames.items() if value is not None]
    for name, result in facts.run.get("stages", {}).items():
        losses = [entry["loss"] for entry in result["history"]]
        loss = f", loss {losses[0]:.3f} to {losses[-1]:.3f}" if losses else ""
        rows.append((f"stage {name}", f"{result['trainable_parameters']:,} parameters, {result['steps']} steps{loss}"))
    if facts.datasets:
        rows.insert(0, ("data", ", ".join(facts.datasets)))
    return f"## Training\n\n{_table(('setting', 'value'), rows)}" if rows else ""


def _scores(facts: CardFacts, variant: Variant) -> dict[str, dict[str, float]]:
    """Overall scores of the base or the adapter by the order of frames."""
    return {order: run["overall"] for order, run in facts.run.get("results", {}).get(variant, {}).items()}


def _evaluation(facts: CardFacts) -> str:
    rows = [
        (variant, order, f"{100 * s['accuracy']:.1f} [{100 * s['low']:.1f}, {100 * s['high']:.1f}]", s["total"])
        for variant in VARIANTS
        for order, s in _scores(facts, variant).items()
    ]
    if not rows:
        return ""
    results = facts.run["results"]
    on = f"On {results['benchmark']}.\n\n" if results.get("benchmark") else ""
    table = _table(("model", "frames", "right, % [95 % interval]", "questions"), rows)
    said = "".join(f"\n- {line}" for line in results.get("reading", []))
    return f"## Evaluation\n\n{on}{table}" + (f"\n{said}" if said else "")


def _files(description: Description, facts: CardFacts) -> str:
    config, encoder = STAConfig.from_dict(description["config"]), description["encoder"]
    layers = encoder["depth"] if config.layers == "all" else len(config.layers)
    rows = [
        ("blocks with STA", f"{layers} of {encoder['depth']}, {encoder['width']} wide"),
        ("heads of STA", f"{encoder['num_heads']} of {encoder['head_dim']}"),
        ("order", config.order),
        ("RoPE over frames", "none" if config.rope_theta is None else f"{config.rope_theta:g}"),
        ("parameters of STA", f"{facts.parameters:,}"),
        ("LoRA beside it", "yes" if facts.lora else "no"),
        ("made with", f"sta-adapter {description.get('sta_adapter_version', '')}".strip()),
    ]
    return f"## The adapter\n\n{_table(('', ''), rows)}\n\nAll weights are safetensors; no file runs code."


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |" for line in lines)
