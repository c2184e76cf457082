"""Two processes on the CPU train what one does, also when the batch of one has no video, and save one adapter."""

import json
from types import SimpleNamespace

import pytest
import torch
from cases import make_qwen2_vl, seeded
from pairs import pairs_of
from parallel_worker import EPOCHS, Trial, prompt, run_training
from safetensors.torch import load_file
from tiny_qwen import write_samples
from torch.distributed import fsdp
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from sta_adapter import distributed, load_sta
from sta_adapter.errors import InjectionError
from sta_adapter.injection import data_parallel as parallel
from sta_adapter.injection import hooks
from sta_adapter.training.checkpoints import last_checkpoint


@pytest.fixture(scope="module")
def pairs():
    with pairs_of("parallel_worker.py") as made:
        yield made


@pytest.fixture
def run_two(pairs, tmp_path):
    """A function that runs cases in two processes; standard output of process 0."""
    return lambda *cases: pairs.run(tmp_path, str(tmp_path), *cases)


def assert_close(one, two, *names):
    for name in names:
        a, b = load_file(one / name), load_file(two / name)
        assert a.keys() == b.keys()
        assert all((a[key] - b[key]).abs().max() <= 1e-5 for key in a), name


def measured(folder):
    """The losses on the evaluation data."""
    history = [e for n in (1, 2) for e in json.loads((folder / f"stage{n}" / "result.json").read_text())["history"]]
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert len(losses) == 2
    return losses


STA, LORA = "sta_adapter.safetensors", "adapter_model.safetensors"
CONTENTS = ("clip|clip", "clip|text", "text|clip", "picture+clip|clip", "text|picture+clip")


def test_a_process_alone_is_all_there_are():
    assert not distributed.is_parallel()
    assert distributed.is_rank_zero()
    assert not distributed.is_sharded([torch.zeros(1)])
    assert distributed.is_sharded([torch.zeros(1), SimpleNamespace(ds_id=3)])  # ZeRO-3
    assert distributed.is_sharded([SimpleNamespace(full_tensor=None)])  # FSDP2


class _Sharded:
    """What FSDP2 leaves of a parameter: on a device of a mesh, or offloaded from there."""

    is_meta = False

    def __init__(self, device, mesh):
        self.device, self.device_mesh = torch.device(device), SimpleNamespace(device_type=mesh)

    def to(self, device):
        return _Sharded(device, self.device_mesh.device_type)

    def full_tensor(self):
        return self.device.type


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("mesh", ["cpu", "cuda"])
def test_what_is_offloaded_is_gathered_where_its_processes_gather(device, mesh):
    assert distributed.full_tensor(_Sharded(device, mesh)) == mesh


def test_processes_agree_and_wait_for_process_0(monkeypatch):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        assert distributed.agree([3, 1], [distributed.Group(None, torch.device("cpu"))]) == [3, 1]
        assert distributed.average([3.0, 1.0], torch.device("cpu")) == [3, 1]
        with monkeypatch.context() as two:  # the other one adds nothing
            two.setattr(torch.distributed, "get_world_size", lambda: 2)
            assert distributed.average([3.0, 1.0], torch.device("cpu")) == [1.5, 0.5]
        monkeypatch.setattr(distributed, "is_parallel", lambda: True)
        assert distributed.is_rank_zero()
        written = []
        distributed.on_rank_zero(lambda: written.append("whole"))
        assert written == ["whole"]
    finally:
        torch.distributed.destroy_process_group()


def other_process(monkeypatch, ways):
    """A model with STA, a batch of text, and its logits; from then on the process takes itself for one of several."""
    model, handle = Trial.parse(f"{ways}:text|text").make()
    batch = prompt(0, 0, "text")
    with handle.disabled():
        expected = model(**batch).logits
    assert not expected.requires_grad
    assert torch.equal(model(**batch).logits, expected)
    monkeypatch.setattr(parallel, "is_parallel", lambda: True)
    return model, handle, batch, expected


@pytest.mark.parametrize("ways", ["one", "tokens", "position"])
def test_a_batch_without_video_reaches_the_branch_with_weight_zero(monkeypatch, ways):
    """What the processes below do, seen in one: the encoder runs on a dummy clip, and nothing changes."""
    model, handle, batch, expected = other_process(monkeypatch, ways)
    for _ in range(2):
        found = model(**batch).logits
        assert torch.equal(found, expected)
        found.square().mean().backward()
        assert all(p.grad is not None and not p.grad.any() for p in handle.parameters())
        handle.model.zero_grad()
    assert not model.get_input_embeddings()._forward_hooks


class Interrupted(Exception):
    """Of a step."""


def fail_once(model):
    """A forward that ends between encoder and language model, as for lack of memory."""

    def fail(*_):
        raise Interrupted

    hook = model.get_decoder().register_forward_pre_hook(fail, prepend=True)
    with pytest.raises(Interrupted):
        model(**prompt(0, 0, "clip"))
    hook.remove()


def checkpoint_encoder(model):
    """A step whose backward runs the whole encoder again."""
    parent = next(module for module in model.modules() if "visual" in module._modules)
    parent.visual = checkpoint_wrapper(parent.visual)
    model(**prompt(0, 0, "clip")).loss.backward()
    model.zero_grad()


@pytest.mark.parametrize(
    "before",
    [fail_once, checkpoint_encoder, lambda model: model.get_decoder().eval(), torch.nn.Module.eval],
    ids=["failed", "run again", "language model in eval mode", "eval mode"],
)
def test_a_batch_without_video_reaches_the_branch_whatever_came_before(monkeypatch, before):
    model, handle, batch, _ = other_process(monkeypatch, "one")
    before(model)
    model(**batch).logits.square().mean().backward()
    assert all(p.grad is not None and not p.grad.any() for p in handle.parameters())


def test_a_batch_without_video_reaches_the_branch_past_the_hooks_of_the_model(monkeypatch):
    """PEFT before 0.21 calls the model's `forward` itself, where LoRA has the task type CAUSAL_LM."""
    model, handle, batch, expected = other_process(monkeypatch, "one")
    found = model.forward(**batch).logits
    assert torch.equal(found, expected)
    found.square().mean().backward()
    assert all(p.grad is not None and not p.grad.any() for p in handle.parameters())


def test_two_runs_of_the_encoder_under_re_entrant_checkpointing_are_refused_with_ddp(monkeypatch):
    """Each has backwards of its own, and DDP would average the gradients of one alone: silently, with its default settings."""
    model, _, _, _ = other_process(monkeypatch, "one")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    ddp = SimpleNamespace(find_unused_parameters=False, static_graph=False)
    monkeypatch.setattr(hooks, "active_ddp", lambda: ddp)
    for _ in range(2):
        model(**prompt(0, 0, "clip")).loss.backward()
    with pytest.raises(InjectionError, match=r"runs more than once in one step, .*Checkpoint with use_reentrant=False"):
        model(**prompt(0, 0, "picture+clip"))
    ddp.static_graph = True
    model(**prompt(0, 0, "picture+clip")).loss.backward()


def test_a_language_model_that_embeds_nothing_can_not_join_in(monkeypatch):
    """It would leave the others waiting in the backward: it is told in the forward, and keeps no hook."""
    model, _, batch, _ = other_process(monkeypatch, "tokens+hidden")
    with pytest.raises(InjectionError, match="did not embed tokens by itself"):
        model(**batch)
    assert not model.get_decoder().unused._forward_hooks


def require(kind):
    if kind != "ddp" and not hasattr(fsdp, "fully_shard"):
        pytest.skip("this version of torch has no fully_shard")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "root", "units"])
def test_two_processes_train_what_one_does(run_two, tmp_path, kind):
    """Whatever their batches hold, and whatever is sharded."""
    require(kind)
    cases = [f"{kind}:{contents}" for contents in CONTENTS] + [f"{kind}+lora:{c}" for c in CONTENTS[-3:]]
    lines = run_two(*cases).splitlines()
    assert lines == [f"{case} agree True, moved 100%, as one process True" for case in cases]
    for case in cases:
        assert_close(tmp_path / case / "one", tmp_path / case / "two", STA, *([LORA] if "lora" in case else []))
    folder = tmp_path / f"{kind}+lora:text|clip" / "two"
    handle = load_sta(seeded(make_qwen2_vl), folder)
    saved = load_file(folder / STA)
    assert all(torch.equal(value, saved[f"blocks.0.{key}"]) for key, value in handle.blocks[0].state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "units"])
def test_without_any_clip_nothing_moves(run_two, kind):
    require(kind)
    case = f"{kind}:text|text"
    assert run_two(case) == f"{case} agree True, moved 0%, as one process True\n"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_what_trains_beside_the_encoder_and_what_a_model_never_uses(run_two, kind):
    """A projector trains, and the encoder's last block, with STA, is not reached: 6 of 22 tensors."""
    require(kind)
    cases = [f"{kind}+llava:{contents}" for contents in ("clip|clip", "clip|text", "text|clip")]
    lines = run_two(*cases).splitlines()
    assert lines == [f"{case} agree True, moved 73%, as one process True" for case in cases]


@pytest.mark.slow
def test_a_language_model_that_is_given_tokens_takes_part(run_two):
    """Some models embed text alone inside of their language model, where no dummy clip could be added before."""
    kinds = [kind for kind in ("ddp", "fsdp2") if kind == "ddp" or hasattr(fsdp, "fully_shard")]
    cases = [f"{kind}+tokens:{contents}" for kind in kinds for contents in ("clip|text", "text|picture+clip")]
    lines = run_two(*cases).splitlines()
    assert lines == [f"{case} agree True, moved 100%, as one process True" for case in cases]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("ddp+undummied:clip|text", "backbone 'undummied' has no dummy_inputs"),
        ("fsdp2+undummied:text|clip", "backbone 'undummied' has no dummy_inputs"),
        ("units+undummied:picture+clip|clip", "backbone 'undummied' has no dummy_inputs"),
        ("fsdp2+llava+between:text|clip", "layers between vision encoder and language model are sharded"),
        ("root+llava+between:clip|text", "layers between vision encoder and language model are sharded"),
        ("ddp+tokens+unembedded:clip|text", "was called without inputs_embeds, and has no get_input_embeddings"),
        ("fsdp2+tokens+unembedded:text|clip", "was called without inputs_embeds, and has no get_input_embeddings"),
        ("ddp+later:clip|text", "2 of STA's 18 parameters that train were unfrozen after DistributedDataParallel"),
        ("ddp+tokens+unembedded:clip|clip", "nothing"),
        ("units+undummied:clip|clip", "nothing"),
        ("fsdp2+llava+between:clip|clip", "nothing"),
    ],
)
def test_what_would_wait_for_ever_or_train_alone_is_refused_in_both_processes(run_two, case, reason):
    require(case.partition("+")[0])
    line = run_two(f"refused={case}")
    assert line.startswith(f"refused={case} alike True: ")
    assert reason in line


@pytest.mark.slow
def test_training_in_two_processes_gives_the_adapter_of_one(run_two, tmp_path):
    """Both stages; a process has nothing to train on at times: two samples are bad, or an epoch's last step has three for two pairs.

    Where answers are of unequal length, each token counts once.
    """
    counts = {"uneven": 8, "spoilt": 8, "odd": 7}
    for name, count in counts.items():
        write_samples(tmp_path / name, count)
    for number in (1, 2):
        (tmp_path / "spoilt" / f"{number}.mp4").write_text("no video")
    lines = [json.loads(line) for line in (tmp_path / "uneven" / "data.jsonl").read_text().splitlines()]
    for index, line in enumerate(lines):
        line["messages"][-1]["content"] += " and on" * index
    (tmp_path / "uneven" / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    cases = [f"train={name}" for name in counts]
    expected = [f"train={name} steps [3, 3], bad {2 * (name == 'spoilt')}" for name in counts]
    assert run_two(*cases).splitlines() == expected
    assert [run_training(case, tmp_path) for case in cases] == expected
    for name in counts:
        one, two = tmp_path / name / "one", tmp_path / name / "two"
        assert_close(one, two, STA, LORA, "stage1/trained.safetensors", "stage2/checkpoint-2/trained.safetensors")
        assert measured(two) == pytest.approx(measured(one), rel=1e-5)
        assert last_checkpoint(two / "stage2").name == "checkpoint-3"
        assert len(list((two / "stage2" / "checkpoint-3").glob("rng_state_*.pth"))) == 2


def test_a_signal_to_one_of_two_processes_stops_both_at_the_same_step(tmp_path, run_two):
    """A cluster's signal may reach them at different moments, or one alone; there is one checkpoint all the same."""
    write_samples(tmp_path / "data", 8)
    assert run_two("stop=data") == "stop=data alike True: signal 15, checkpoint-2\n"
    (checkpoint,) = (tmp_path / "data" / "two" / "stage1").glob("checkpoint-*")
    assert checkpoint == last_checkpoint(checkpoint.parent)
    assert len(list(checkpoint.glob("rng_state_*.pth"))) == 2


@pytest.mark.slow
def test_two_processes_go_on_within_an_epoch_as_if_nothing_had_been(tmp_path, run_two):
    """With the samples that are left of it, which is not the first."""
    write_samples(tmp_path / "data", 12)
    line = "steps [6, 6], bad 0"
    assert run_two("go_on=data") == f"go_on=data {line}\n"
    assert run_training("go_on=data", tmp_path, **EPOCHS) == f"go_on=data {line}"
    assert_close(tmp_path / "data" / "one", tmp_path / "data" / "two", STA, LORA, "stage1/trained.safetensors")


def test_one_score_of_several_processes_counts(tmp_path, run_two):
    """Else each would keep a checkpoint of its own, or end at a step of its own."""
    write_samples(tmp_path / "data", 8)
    assert run_two("scores=data") == "scores=data alike True\n"


def test_the_loss_that_is_shown_and_judged_is_that_of_all_processes(run_two):
    told = "2 3 3; stage 1: the loss is not finite (nan) at step 0"
    assert run_two("losses=all") == f"losses=all {[told, told]}\n"
