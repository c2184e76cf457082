"""How a run trains: accumulation, precision, quantised bases, checkpointed activations, logging, the best checkpoint."""

import json

import pytest
import tiny_bases
import tiny_qwen
import torch
from safetensors.torch import load_file
from test_training import AS_IS, FAST, dataset, folder, logits, losses, make_model, model, processor  # noqa: F401
from tiny_qwen import write_samples
from torch import nn
from transformers import Trainer

from sta_adapter import inject_sta
from sta_adapter.data import VideoDataset
from sta_adapter.errors import ConfigError, MissingExtraError
from sta_adapter.injection.fingerprint import fingerprint_model
from sta_adapter.injection.registry import locate
from sta_adapter.training import TrainingConfig, train
from sta_adapter.training.contexts import _require_gradient, activation_checkpointing, full_precision

ADAPTER = ("sta_adapter.safetensors", "adapter_model.safetensors")


def assert_close(one, other, tolerance, names=ADAPTER):
    for name in names:
        a, b = load_file(one / name), load_file(other / name)
        assert a.keys() == b.keys()
        assert all((a[key] - b[key]).abs().max() <= tolerance for key in a), name


# ---- gradient accumulation


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_accumulated_batches_are_one_large_batch(tmp_path, family):
    """Also when the answers differ in length: each token counts once, not each small batch."""
    if not hasattr(Trainer, "get_batch_samples"):
        pytest.skip("before 4.46, transformers averages over small batches, not over tokens")
    make = tiny_qwen if family == "qwen2_vl" else tiny_bases
    if make is tiny_bases and not tiny_bases.available(family):
        pytest.skip(f"this version of transformers has no {family}")
    names = () if make is tiny_qwen else (family,)
    parts = make.make_processor(*names, tmp_path / "tokenizer")
    file = write_samples(tmp_path / "data", 8)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for index, line in enumerate(lines):
        line["messages"][-1]["content"] += " and on" * index
    file.write_text("\n".join(map(json.dumps, lines)))
    uneven = VideoDataset(file, parts, frames=AS_IS, on_bad_sample="error", cache=True)
    found = {}
    for size in (4, 1):
        steps = {"max_steps": 3, "eval_steps": 3, "keep_best": False}
        config = TrainingConfig(**{**FAST, **steps, "learning_rate": 1e-4, "device_batch_size": size})
        net, how = make.make_model(*names, parts.tokenizer), {"output_dir": tmp_path / str(size), "progress": False}
        found[size] = train(net, uneven, stage="2", config=config, eval_data=uneven, **how)
    assert losses(found[4], "2") == pytest.approx(losses(found[1], "2"), rel=1e-5)
    assert losses(found[4], "2", "eval_loss") == pytest.approx(losses(found[1], "2", "eval_loss"), rel=1e-5)
    assert_close(tmp_path / "4", tmp_path / "1", 1e-5)


def test_an_evaluation_does_not_change_what_is_trained(tmp_path, processor, dataset):  # noqa: F811
    """Its loader draws a random number, as dropout does."""
    for name, measured in (("alone", None), ("measured", dataset)):
        more = {} if measured is None else {"eval_steps": 1, "keep_best": False}
        config = TrainingConfig(**{**FAST, "max_steps": 3, "lora_dropout": 0.3}, **more)
        how = {"stage": "2", "config": config, "eval_data": measured, "progress": False}
        train(make_model(processor.tokenizer), dataset, output_dir=tmp_path / name, **how)
    assert_close(tmp_path / "alone", tmp_path / "measured", 0)


def test_what_the_last_step_has_made_is_measured(tmp_path, model, dataset):  # noqa: F811
    config = TrainingConfig(**{**FAST, "max_steps": 3, "eval_steps": 2}, keep_best=False)
    train(model, dataset, output_dir=tmp_path, stage="1", config=config, eval_data=dataset, progress=False)
    history = json.loads(next(tmp_path.glob("stage1/checkpoint-3/trainer_state.json")).read_text())["log_history"]
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [2, 3]


# ---- precision


def test_bf16_on_the_cpu(tmp_path, model, dataset):  # noqa: F811
    handle = inject_sta(model)
    dtypes = set()
    handle.blocks[0].to_qkv.register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
    config = TrainingConfig(**FAST, precision="bf16")
    result = train(handle, dataset, output_dir=tmp_path, stage="1", config=config, progress=False)
    assert dtypes == {torch.bfloat16}
    assert {p.dtype for p in result.handle.parameters()} == {torch.float32}
    assert sum(losses(result, "1")[-2:]) < sum(losses(result, "1")[:2])  # all samples once


def test_fp16_is_not_silently_fp32(tmp_path, model, dataset, monkeypatch):  # noqa: F811
    monkeypatch.setattr("sta_adapter.training.arguments.has_accelerator", lambda: False)
    config = TrainingConfig(**FAST, precision="fp16")
    with pytest.raises(ConfigError, match="precision fp16 needs a GPU"):
        train(model, dataset, output_dir=tmp_path, stage="1", config=config, progress=False)


class QuantisedLinear(nn.Linear):
    """A linear layer with weights in whole numbers, as 8-bit bases have."""

    compute_dtype = torch.float32

    @classmethod
    def of(cls, linear):
        made = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        made.scale = linear.weight.detach().abs().max() / 127
        whole = (linear.weight.detach() / made.scale).round().add(128).to(torch.uint8)
        made.weight = nn.Parameter(whole, requires_grad=False)
        made.bias = linear.bias
        return made

    def forward(self, x):
        return nn.functional.linear(x, (self.weight.float() - 128) * self.scale, self.bias)


def test_quantised_base(tmp_path, model, dataset):  # noqa: F811
    for parent in [m for m in model.modules() if not isinstance(m, nn.Linear)]:
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and name != "lm_head":
                setattr(parent, name, QuantisedLinear.of(child))
    model.is_quantized = True
    before = {n: p.clone() for n, p in model.named_parameters() if p.dtype == torch.uint8}
    assert len(before) >= 20
    config = TrainingConfig(**FAST)
    first = train(model, dataset, output_dir=tmp_path / "1", stage="1", config=config, progress=False)
    assert "_hf_peft_config_loaded" not in vars(model)  # told to the trainer while it was made, no longer
    second = train(first.handle, dataset, output_dir=tmp_path / "2", stage="2", config=config, progress=False)
    trained = [p for p in second.model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {p.dtype for p in second.handle.parameters()} == {torch.float32}
    now = {n: p for n, p in second.model.get_base_model().named_parameters() if p.dtype == torch.uint8}
    assert [torch.equal(a, b) for a, b in zip(before.values(), now.values(), strict=True)] == [True] * len(before)
    for stage, result in (("1", first), ("2", second)):
        assert sum(losses(result, stage)[-2:]) < sum(losses(result, stage)[:2])  # all samples once


# ---- checkpointed activations


def test_activations_of_sta_are_not_kept(model, dataset):  # noqa: F811
    """With checkpointing, what the backward pass needs of STA is computed again."""
    from sta_adapter.data import Collator

    handle = inject_sta(model).freeze_base()
    if not any(hasattr(module, "gradient_checkpointing") for module in handle.encoder.modules()):
        pytest.skip("this version of transformers can't checkpoint Qwen2-VL's encoder")
    batch = Collator.of(dataset.processor)([dataset[0]])
    inputs = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
    calls = []
    handle.blocks[0].register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    kept = {}
    for kind in (False, True):
        calls.clear()
        sizes = []
        with (
            activation_checkpointing(model.train(), handle, kind),
            torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t),
        ):
            model(**inputs).loss.backward()
        kept[kind] = sum(sizes)
        assert len(calls) == (2 if kind else 1)
    assert kept[True] < kept[False]


@pytest.mark.parametrize("sta", [True, False], ids=["sta", "lora_alone"])
def test_re_entrant_checkpointing_gives_the_same_gradients(model, dataset, sta):  # noqa: F811
    """It gives none where no input requires one, as with a frozen base."""
    from peft import LoraConfig, get_peft_model

    from sta_adapter.data import Collator

    encoder = locate(model).encoder
    if not any(hasattr(module, "gradient_checkpointing") for module in encoder.modules()):
        pytest.skip("this version of transformers can't checkpoint Qwen2-VL's encoder")
    handle = inject_sta(model).freeze_base() if sta else None
    trained = model if sta else get_peft_model(model, LoraConfig(target_modules=r".*blocks.*\.qkv"))
    batch = Collator.of(dataset.processor)([dataset[0]])
    inputs = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
    found = {}
    for kind in (False, "reentrant"):
        with activation_checkpointing(trained.train(), handle, kind):
            trained(**inputs).loss.backward()
        found[kind] = [p.grad.clone() for p in trained.parameters() if p.requires_grad]
        trained.zero_grad()
    assert any(gradient.any() for gradient in found[False])
    assert _require_gradient not in encoder._forward_pre_hooks.values()
    for plain, checkpointed in zip(*found.values(), strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_what_an_encoder_is_given_requires_a_gradient_where_there_are_any():
    pixels, more, grid, unasked = torch.ones(2), torch.ones(2), torch.ones(2, dtype=torch.long), torch.ones(2)
    _require_gradient(nn.Identity(), (pixels, grid), {"more": more})
    with torch.no_grad():
        _require_gradient(nn.Identity(), (unasked,), {})
    assert [tensor.requires_grad for tensor in (pixels, more, grid, unasked)] == [True, True, False, False]


def test_what_trains_is_32_bit_wide_meanwhile_and_the_rest_stays():
    kinds = (torch.bfloat16, torch.float16, torch.float64)
    net = nn.Sequential(*(nn.Linear(2, 2).to(kind) for kind in kinds), nn.Linear(2, 2).bfloat16().requires_grad_(False))
    with full_precision(net):
        assert [layer.weight.dtype for layer in net] == [torch.float32, torch.float32, torch.float64, torch.bfloat16]
    assert [layer.weight.dtype for layer in net] == [*kinds, torch.bfloat16]


# ---- logging and the best checkpoint


def test_the_base_is_known_again_after_a_training(tmp_path, model, dataset):  # noqa: F811
    before, cache = fingerprint_model(model)["base"], getattr(model.config, "use_cache", None)
    trained = train(model, dataset, output_dir=tmp_path, config=TrainingConfig(**FAST), progress=False).model
    assert fingerprint_model(trained)["base"] == before
    assert getattr(trained.config, "use_cache", None) == cache


def test_logging_to_tensorboard(tmp_path, model, dataset):  # noqa: F811
    pytest.importorskip("tensorboard")
    config = TrainingConfig(**FAST, report_to="tensorboard")
    train(model, dataset, output_dir=tmp_path, stage="1", config=config, progress=False)
    written = list(tmp_path.rglob("events.out.tfevents.*"))
    assert written
    assert any(b"train/loss" in file.read_bytes() for file in written)


def test_logging_needs_its_package(tmp_path, model, dataset, monkeypatch):  # noqa: F811
    monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", list)
    config = TrainingConfig(**FAST, report_to="tensorboard")
    with pytest.raises(MissingExtraError, match="pip install tensorboard"):
        train(model, dataset, output_dir=tmp_path, stage="1", config=config, progress=False)


def test_best_checkpoint_outlives_newer_ones(tmp_path, model, dataset):  # noqa: F811
    scores = iter([0.9, 0.2, 0.4, 0.3, 0.5, 0.1])
    config = TrainingConfig(**{**FAST, "save_steps": 1}, eval_steps=1, keep_checkpoints=2)
    result = train(
        model,
        dataset,
        output_dir=tmp_path,
        stage="1",
        config=config,
        eval_fn=lambda net: {"a": next(scores)},
        progress=False,
    )
    left = sorted(path.name for path in (tmp_path / "stage1").glob("checkpoint-*"))
    assert left == ["checkpoint-1", "checkpoint-6"]
    best = load_file(tmp_path / "stage1" / "checkpoint-1" / "sta_adapter.safetensors")
    published = load_file(tmp_path / "sta_adapter.safetensors")
    assert all(torch.equal(best[key], published[key]) for key in best)
    assert result.stages["1"]["steps"] == 6


def test_a_run_can_end_early(tmp_path, model, dataset):  # noqa: F811
    """Evaluations that grow no better, and transformers' own callback; the best one is what comes out."""
    from transformers import EarlyStoppingCallback

    scores = iter([0.5, 0.9, 0.2, 0.3])
    result = train(
        model,
        dataset,
        output_dir=tmp_path,
        stage="1",
        config=TrainingConfig(**{**FAST, "save_steps": 1}, eval_steps=1),
        eval_fn=lambda net: {"a": next(scores)},
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
        progress=False,
    )
    assert result.stages["1"]["steps"] == 4
    best = load_file(tmp_path / "stage1" / "checkpoint-2" / "sta_adapter.safetensors")
    published = load_file(tmp_path / "sta_adapter.safetensors")
    assert all(torch.equal(best[key], published[key]) for key in best)


def test_lines_show_steps_and_losses(tmp_path, model, dataset, capsys):  # noqa: F811
    config = TrainingConfig(**FAST, eval_steps=3)
    train(model, dataset, output_dir=tmp_path, stage="1", config=config, eval_data=dataset)
    first, *_, last = capsys.readouterr().err.strip().splitlines()  # plain lines, as this is no terminal
    assert first == "stage 1"
    assert last.startswith("stage 1: step 6/6, eval_loss ")
