"""One of two processes of tests/test_parallel.py: trains a tiny model, and the same in one process to compare with."""

import contextlib
import dataclasses
import inspect
import itertools
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import torch
from cases import Clip, make_qwen2_vl, randomize, seeded, token_types
from cases_transformers import llava_prompt, llava_settings, transformers_class
from pairs import serve
from tiny_qwen import make_model, make_processor
from torch import distributed
from transformers import TrainerCallback, TrainerControl, TrainerState

from sta_adapter import get_sta, inject_sta
from sta_adapter.data import FrameSettings, VideoDataset
from sta_adapter.distributed import end_processes, full_tensor
from sta_adapter.errors import DivergenceError, InjectionError, TrainingStopped
from sta_adapter.injection.data_parallel import LanguageModelBegin
from sta_adapter.injection.registry import get_backbone
from sta_adapter.training import TrainingConfig, train
from sta_adapter.training.watch import Watch

STEPS = 3
SETTINGS = {
    **{"batch_size": 4, "device_batch_size": 1, "max_steps": 3, "save_steps": 2, "eval_steps": 3, "keep_best": False},
    **{"learning_rate": 1e-4, "logging_steps": 1, "max_grad_norm": 0.5},
}
EPOCHS = {"max_steps": None, "epochs": 2, "save_steps": 100, "eval_steps": 6}  # of twelve samples, three steps each


@dataclasses.dataclass(frozen=True)
class Trial:
    """One case of the command line, `ways:contents|contents`: such as `units+lora:picture+clip|text`.

    Ways of wrapping: `ddp`; `fsdp2`, the encoder's blocks and the model sharded each; `root`, the model alone; `units`,
    every part a unit of its own. Beside them `lora` (stage two), `llava` (a model with a projector that trains, and an
    encoder whose last block is not used), `between` (that projector is a unit), `undummied` (a backbone without dummy clip),
    `later` (some of STA trains after that), `tokens` and `position` (see `pass_otherwise`), with them `unembedded` (a language model that doesn't say how it embeds
    tokens) and `hidden` (one that says it wrongly).
    """

    ways: frozenset[str]
    contents: tuple[str, str]

    @classmethod
    def parse(cls, case):
        ways, _, contents = case.partition(":")
        return cls(frozenset(ways.split("+")), tuple(contents.split("|")))

    def prompt(self, step, rank):
        """A process's training batch of one step."""
        return prompt(step, rank, self.contents[rank], llava_prompt if "llava" in self.ways else None)

    def make(self):
        """A model and its STA."""
        model = seeded(make_llava if "llava" in self.ways else make_qwen2_vl).train()
        spec = dataclasses.replace(get_backbone("qwen2_vl"), name="undummied", dummy_inputs=None)
        if self.ways & {"tokens", "position"}:
            pass_otherwise(model, self.ways)
        handle = inject_sta(model, backbone=spec if "undummied" in self.ways else None)
        for module in handle.blocks.values():
            randomize(module)
        handle.freeze_base()
        if self.ways & {"unembedded", "hidden"}:
            model.get_decoder().unused = torch.nn.Identity()
            found = model.get_decoder().unused if "hidden" in self.ways else None
            hooks = model.get_decoder()._forward_pre_hooks.values()
            next(h for h in hooks if isinstance(h, LanguageModelBegin)).agreement.embedding = lambda: found
        if "llava" in self.ways:
            projector(model).requires_grad_(True)
        if "lora" in self.ways:
            from peft import get_peft_model

            torch.manual_seed(0)
            model = get_peft_model(model, handle.lora_config(r=2, lora_alpha=4))
            handle = get_sta(model)
        return model, handle

    def wrap(self, model, handle):
        """The model for two processes."""
        if "ddp" in self.ways:
            return torch.nn.parallel.DistributedDataParallel(model)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        base = handle.model.get_base_model() if "lora" in self.ways else handle.model
        units = [] if "root" in self.ways else list(handle.encoder.get_submodule(handle._injection.spec.blocks))
        if "units" in self.ways:
            language_model = base.get_decoder()
            units += [handle.encoder, *language_model.layers, base.get_input_embeddings(), base.get_output_embeddings()]
            units += [language_model]
        if "between" in self.ways:
            units.append(projector(model))
        for unit in units:
            fully_shard(unit, mesh=mesh)
        return fully_shard(model, mesh=mesh)


def prompt(step, rank, contents, clip_prompt=None):
    """A batch of text alone, a clip, or a picture and a clip (two runs of the encoder)."""
    frames = 2 + step + rank
    if contents == "text":
        tokens = torch.tensor([[5, 6, 7, 8, 9 + step]])
        batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    elif clip_prompt is not None:
        batch = clip_prompt(frames)
    else:
        tokens = [152, *[151] * (frames * 4), 153, 5, 6]
        batch = {"pixel_values_videos": Clip(frames).pixels(16, 96).flatten(0, 1)}
        batch["video_grid_thw"] = torch.tensor([[frames, 4, 4]])
        if contents == "picture+clip":
            tokens = [152, *[150] * 4, 153, *tokens]
            batch |= {"pixel_values": Clip(1, seed=1).pixels(16, 96).flatten(0, 1)}
            batch |= {"image_grid_thw": torch.tensor([[1, 4, 4]])}
        batch |= {"input_ids": torch.tensor([tokens]), "attention_mask": torch.ones(1, len(tokens), dtype=torch.long)}
        batch |= token_types(tokens, video=151, image=150)
    return {**batch, "labels": batch["input_ids"]}


def make_llava():
    """A tiny LLaVA-OneVision that takes the output of the encoder's last block but one."""
    config = transformers_class("LlavaOnevisionConfig")(**{**llava_settings(), "vision_feature_layer": -2})
    return transformers_class("LlavaOnevisionForConditionalGeneration")(config)


def pass_otherwise(model, ways):
    """Let a model call its language model otherwise where there is no clip: with tokens, or all by position."""
    decoder, given = model.get_decoder(), {}
    names = list(inspect.signature(decoder.forward).parameters)

    def look(module, args, kwargs):
        given["tokens"] = kwargs["input_ids"] if "pixel_values_videos" not in kwargs else None

    class Otherwise(type(decoder)):
        def __call__(self, **kwargs):  # in front of all hooks
            if given["tokens"] is None:
                return super().__call__(**kwargs)
            if "position" in ways:
                first = names[: names.index("inputs_embeds") + 1]
                args = [kwargs.pop(name, None) for name in first]
                return super().__call__(*args, **kwargs)
            return super().__call__(**{**kwargs, "inputs_embeds": None, "input_ids": given["tokens"]})

    decoder.__class__ = Otherwise
    model.register_forward_pre_hook(look, with_kwargs=True)


def projector(model):
    """What lies between LLaVA-OneVision's encoder and its language model."""
    return next(m for name, m in model.named_modules() if name.endswith("multi_modal_projector"))


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def optimise(model, losses):
    """Steps of gradient descent on the losses that a function gives for each step."""
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    for step in range(STEPS):
        losses(step).backward()
        optimizer.step()
        optimizer.zero_grad()


def compare(case, out):
    """Train in two processes and in one; a line for process 0 to print."""
    trial = Trial.parse(case)
    rank = distributed.get_rank()
    one, single = trial.make()
    start = [p.detach().clone() for p in trained(one)]
    if set(trial.contents) != {"text"}:  # of which nothing reaches what trains
        optimise(one, lambda step: sum(one(**trial.prompt(step, r)).loss for r in range(2)) / 2)
    model, handle = trial.make()
    parallel = trial.wrap(model, handle)
    optimise(parallel, lambda step: parallel(**trial.prompt(step, rank)).loss)
    values = [full_tensor(p).detach() for p in trained(model)]
    both = [torch.zeros_like(torch.cat([v.flatten() for v in values])) for _ in range(2)]
    distributed.all_gather(both, torch.cat([v.flatten() for v in values]))
    moved = sum(bool((a - b).abs().max() > 0) for a, b in zip(values, start, strict=True)) / len(start)
    error = max((a - b).abs().max() for a, b in zip(values, trained(one), strict=True))
    changed = "llava" in trial.ways  # its projector trains, and is kept by nobody here
    handle.save_pretrained(out / case / "two", base_changed=changed)  # on both processes
    if rank == 0:
        single.save_pretrained(out / case / "one", base_changed=changed)  # on one process alone
    same_logits = evaluate_alike(trial, parallel, one) if "ddp" not in trial.ways else True
    return f"{case} agree {torch.equal(*both) and same_logits}, moved {moved:.0%}, as one process {bool(error < 1e-5)}"


@torch.no_grad()
def evaluate_alike(trial, parallel, one):
    """Whether both processes get the logits of one, without gradients."""
    batch = trial.prompt(0, distributed.get_rank())
    error = (parallel.eval()(**batch).logits - one.eval()(**batch).logits).abs().max()
    distributed.all_reduce(error, op=distributed.ReduceOp.MAX)
    return bool(error < 1e-4)


def refuse(case, out):
    """What both processes are told in the place of a training step."""
    trial = Trial.parse(case.removeprefix("refused="))
    model, handle = trial.make()
    later = list(handle.parameters())[3:5] if "later" in trial.ways else []
    for parameter in later:
        parameter.requires_grad_(False)
    parallel = trial.wrap(model, handle)
    for parameter in later:
        parameter.requires_grad_(True)
    told = [None, None]
    try:
        parallel(**trial.prompt(0, distributed.get_rank())).loss.backward()
        message = "nothing"
    except InjectionError as error:
        message = str(error)
    distributed.all_gather_object(told, message)
    return f"{case} alike {told[0] == told[1]}: {told[0]}"


def train_on(case, out, into, callbacks=(), eval_fn=None, **changes):
    """`sta_adapter.training.two_stage.train` on the samples in the folder `case` names, whole or spoilt."""
    data = out / case.partition("=")[2]
    rank = distributed.get_rank() if distributed.is_initialized() else 0
    processor = make_processor(data / f"tokenizer{rank}")
    frames = FrameSettings(min_tokens=None, max_tokens=None)
    dataset = VideoDataset(data / "data.jsonl", processor, frames=frames, cache=True)
    odd = {"device_batch_size": 2, "gradient_checkpointing": "reentrant"} if data.name == "odd" else {}
    config = TrainingConfig(**{**SETTINGS, **odd, **changes})
    model = make_model(processor.tokenizer)
    how = {"config": config, "callbacks": callbacks, "eval_fn": eval_fn, "eval_data": None if eval_fn else dataset}
    return train(model, dataset, output_dir=data / into, progress=False, **how)


def run_training(case, out, **more):
    """How many steps that took."""
    result = train_on(case, out, "two" if distributed.is_initialized() else "one", **more)
    return f"{case} steps {[s['steps'] for s in result.stages.values()]}, bad {len(result.bad_samples)}"


class SignalToOne(TrainerCallback):
    """SIGTERM to process 1 alone, in the step after `steps`."""

    def __init__(self, steps=1):
        self.steps = steps

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.steps and distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def stop_training(case, out):
    """The same with a signal to one of them: what both are told."""
    told = [None, None]
    try:
        message = run_training(case, out, callbacks=[SignalToOne()])
    except TrainingStopped as stopped:
        message = f"signal {stopped.signal}, {stopped.checkpoint.name}"
    distributed.all_gather_object(told, message)
    return f"{case} alike {told[0] == told[1]}: {told[0]}"


def go_on(case, out):
    """The same within the second epoch, and then to the end."""
    with contextlib.suppress(TrainingStopped):
        run_training(case, out, callbacks=[SignalToOne(4)], **EPOCHS)
    return run_training(case, out, **EPOCHS)


def score_otherwise(case, out):
    """Scores that rise in process 0 and fall in the other: whether both end with the same weights."""
    told, scores = [None, None], itertools.count(0, -1 if distributed.get_rank() else 1)
    how = {"eval_fn": lambda model: {"score": next(scores)}, "eval_steps": 1, "save_steps": 1, "keep_best": True}
    result = train_on(case, out, "scored", **how)
    distributed.all_gather_object(told, [p.tolist() for p in result.handle.parameters()])
    return f"{case} alike {told[0] == told[1]}"


def watch_losses(case, out):
    """The loss of a step that is 1 on one process and 3 on the other, and of one that is no number on one, as both see them."""
    told = [None, None]
    watch = Watch("stage 1", TrainingConfig(), out)
    arguments = SimpleNamespace(device=torch.device("cpu"))
    state, control = TrainerState(max_steps=9), TrainerControl()
    watch.add(torch.tensor(1.0 + 2 * distributed.get_rank()))
    watch.on_step_end(arguments, state, control)
    first = f"{watch.loss:g}"
    watch.add(torch.tensor(0.0 if distributed.get_rank() else 6.0), usable=distributed.get_rank() == 0)
    watch.on_step_end(arguments, state, control)
    shares = f"{watch.loss:g}"
    watch.add(torch.tensor(0.0), usable=False)
    watch.on_step_end(arguments, state, control)
    shares += f" {watch.loss:g}"
    watch.add(torch.tensor(float("nan") if distributed.get_rank() else 1.0))
    try:
        watch.on_step_end(arguments, state, control)
        message = "no error"
    except DivergenceError as error:
        message = str(error).partition(",")[0]
    distributed.all_gather_object(told, f"{first} {shares}; {message}")
    return f"{case} {told}"


def main(folder, *cases):
    """Every case, such as `ddp:clip|text` or `train=data`; a line of each for process 0 to print."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    for case in cases:
        kind = case.partition("=")[0] if "=" in case else ""
        runs = {
            "train": run_training,
            "stop": stop_training,
            "go_on": go_on,
            "scores": score_otherwise,
            "losses": watch_losses,
            "refused": refuse,
            "": compare,
        }
        line = runs[kind](case, Path(folder))
        if distributed.get_rank() == 0:
            print(line, flush=True)
    end_processes()


if __name__ == "__main__":
    from sta_adapter.training import stage  # noqa: F401  # with peft and accelerate, once for all pairs

    for case in ("lora:text|text", "llava:text|text"):  # and transformers' models
        Trial.parse(case).make()
    serve(main)
