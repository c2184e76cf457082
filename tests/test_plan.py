"""What a plan says, against what a step takes: the peaks of torch's profiler, on the CPU, at several widths."""

import io
import json
import tarfile
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from tiny_qwen import make_model, make_processor, write_samples
from torch.profiler import ProfilerActivity, profile

from sta_adapter import inject_sta
from sta_adapter.cli import cli
from sta_adapter.data import Collator
from sta_adapter.demo import TINY_BASE
from sta_adapter.errors import ConfigError, DataError
from sta_adapter.training import TrainingConfig, open_data
from sta_adapter.training import plan as planning
from sta_adapter.training.contexts import activation_checkpointing
from sta_adapter.training.plan import Machine, plan_stage, sample_lengths
from sta_adapter.training.stage import Stage

pytest.importorskip("transformers", minversion="4.57")
FRAMES = {"min_tokens": None, "max_tokens": None}
HERE = Machine(1e12, False, "fp32", torch.float32)


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    return write_samples(tmp_path_factory.mktemp("data"), 4)


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return make_processor(tmp_path_factory.mktemp("tokenizer"))


def settings(**values):
    return TrainingConfig.from_dict({"frames": FRAMES, "batch_size": 4, "num_workers": 0, **values})


def wider(processor, width):
    """The tiny base, `width` times as wide."""
    made = make_model(processor.tokenizer)
    config = made.config
    text = getattr(config, "text_config", config)
    text.hidden_size, text.intermediate_size = 32 * width, 64 * width
    config.vision_config.embed_dim = config.vision_config.hidden_size = 32 * width
    config.vision_config.hidden_size = 32 * width
    scaling = {"type": "mrope", "rope_type": "default", "mrope_section": [2 * width, width, width]}
    for name in ("rope_scaling", "rope_parameters"):
        if getattr(text, name, None):
            setattr(text, name, {**getattr(text, name), **scaling})
    return config


def measured_peak(model, batch):
    """Bytes of weights, inputs and AdamW's moments, and the most that is allocated beside them in forward and backward."""
    tensors = [*model.parameters(), *model.buffers(), *(v for v in batch.values() if isinstance(v, torch.Tensor))]
    there = sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())
    moments = 8 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model(**batch).loss.backward()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return there + moments + most


@pytest.mark.parametrize(
    ("name", "checkpointing", "width"),
    [("1", False, 1), ("1", True, 4), ("2", False, 2), ("2", True, 1), ("2", False, 4)],
)
def test_the_estimate_is_what_a_step_takes(samples, processor, name, checkpointing, width):
    from transformers import Qwen2VLForConditionalGeneration

    config = settings(device_batch_size=4, gradient_checkpointing=checkpointing)
    dataset = open_data(samples, processor, config)
    lengths = sample_lengths(dataset, 4)
    shape = wider(processor, width)

    def empty():
        with torch.device("meta"):
            return Qwen2VLForConditionalGeneration(shape)

    found = plan_stage(name, config, empty, dataset, lengths, HERE)
    stage = Stage(name, config, samples.parent, dataset)
    handle = inject_sta(Qwen2VLForConditionalGeneration(shape))
    model, handle = stage.prepare(handle.model, handle)
    batch = Collator.of(processor)([lengths.longest] * 4)
    del batch["bad_samples"]
    with activation_checkpointing(model.train(), handle, checkpointing):
        measured = measured_peak(model, batch)
    assert found["needs"] == sum(found["parts"].values())
    assert found["needs"] == pytest.approx(measured, rel=0.2)
    assert found["trainable"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["parts"]["weights"] >= sum(4 * p.numel() for p in model.parameters())


def test_what_fits(samples, processor, monkeypatch):
    accumulates = []

    def one_clip(*args):
        accumulates.append(args[-1])
        return PEAKS[bool(args[-2])], {"trainable": 5, "parameters": 9}

    monkeypatch.setattr(planning, "_one_clip", one_clip)
    config = settings(batch_size=8)
    dataset = open_data(samples, processor, config)

    def plan(memory, **machine):
        kind = Machine(memory, **{"cuda": False, "precision": "fp32", "dtype": torch.float32, **machine})
        return plan_stage("1", config, None, dataset, sample_lengths(dataset, 4), kind)

    roomy = plan(10_000)
    assert (roomy["fits"], roomy["steps"], roomy["device_batch_size"], roomy["accumulation"]) == (True, 1, 4, 2)
    assert roomy["needs"] == 1000 + 10 + 20 + 4 * (500 + 100)
    assert roomy["suggested"] == {"device_batch_size": 8, "gradient_checkpointing": False}
    tight = plan(1030 + 2 * 600)
    assert not tight["fits"]
    assert tight["suggested"] == {"device_batch_size": 2, "gradient_checkpointing": False}
    assert [choice["device_batch_size"] for choice in tight["choices"]] == [2, 8]
    assert plan(1030 + 150)["suggested"] == {"device_batch_size": 1, "gradient_checkpointing": True}
    assert plan(1030)["suggested"] is None
    assert plan(1e10, cuda=True)["needs"] == pytest.approx(1.05 * roomy["needs"] + 1.5e9)
    assert plan(1e10, processes=2)["accumulation"] == 1
    assert all(accumulates)
    assert plan(1e10, processes=8)["accumulation"] == 1
    assert accumulates[-2:] == [False, False]  # one clip a step: there are no gradients of earlier parts
    assert plan(1e10, processes=4)["batch_size"] == 8
    assert accumulates[-2:] == [True, True]  # two, which may come one by one


PEAKS = {
    False: {"weights": 1000, "gradients": 10, "optimizer": 20, "activations": 500, "logits": 100},
    True: {"weights": 1000, "gradients": 10, "optimizer": 20, "activations": 50, "logits": 100},
}


def test_a_gpu_computes_in_16_bit(samples, processor):
    from transformers import Qwen2VLForConditionalGeneration

    shape, config = wider(processor, 1), settings()
    dataset = open_data(samples, processor, config)
    sample = sample_lengths(dataset, 4).longest

    def parts(machine):
        def empty():
            with torch.device("meta"):
                return Qwen2VLForConditionalGeneration(shape)

        return planning._one_clip(Stage("1", config, samples.parent, dataset), empty, sample, machine, False, False)[0]

    wide, gpu = parts(HERE), parts(Machine(24e9, True, "bf16", torch.bfloat16))
    assert gpu["weights"] < 0.6 * wide["weights"]
    assert gpu["activations"] < 0.9 * wide["activations"]
    narrow = parts(Machine(24e9, True, "bf16", torch.bfloat16, quantize="4bit"))
    base = Qwen2VLForConditionalGeneration(shape)
    output = base.get_output_embeddings()
    frozen = sum(m.weight.numel() for m in base.modules() if isinstance(m, torch.nn.Linear) and m is not output)
    assert gpu["weights"] - narrow["weights"] == round(frozen * (2 - 0.52))


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_step_is_measured_in_its_precision(samples, processor, monkeypatch, precision, dtype):
    """fp16 is for GPUs alone; which type it asks for shows on the CPU as well."""
    monkeypatch.setattr(planning, "precision_of", lambda name: name)
    config = settings(precision=precision)
    seen = []

    class Model(torch.nn.Linear):
        def forward(self, x):
            seen.append(super().forward(x).dtype)
            return SimpleNamespace(loss=self.weight.sum())

    stage = Stage("1", config, samples.parent, open_data(samples, processor, config))
    planning._timed(Model(2, 2), {"x": torch.ones(1, 2)}, torch.device("cpu"), stage)
    assert seen == [dtype]


def test_a_step_is_measured_where_the_model_was_loaded(samples, processor, monkeypatch):
    """8-bit weights can't be moved: their `to` is an error before transformers 5."""
    stage, model = (
        Stage("1", settings(), samples.parent, open_data(samples, processor, settings())),
        make_model(processor.tokenizer),
    )

    def to(*_):
        raise ValueError("`.to` is not supported for `8-bit` bitsandbytes models.")

    monkeypatch.setattr(model, "to", to)
    longest = sample_lengths(stage.dataset, 2).longest
    assert planning.measure_step(stage, model, longest, 1)["seconds"] > 0


def test_the_command_and_the_dry_run(samples, tmp_path):
    words = ["--model", str(TINY_BASE), "--data", str(samples), "--stage", "1", "--set", "num_workers=0"]
    words += ["--set", "frames.min_tokens=null", "--set", "frames.max_tokens=null"]
    done = CliRunner().invoke(cli, ["plan", *words, "--measure", "--json"], catch_exceptions=False)
    report = json.loads(done.stdout)
    assert (report["machine"]["precision"], report["machine"]["processes"]) == ("fp32", 1)
    assert report["data"]["looked_at"] == 4
    stage = report["stages"]["1"]
    assert stage["hours"] == pytest.approx(stage["measured"]["seconds"] * stage["steps"] * stage["accumulation"] / 3600)
    file = tmp_path / "train.yaml"  # of train, which plan takes as well
    file.write_text(f"out: {tmp_path / 'out'}\ncache: {tmp_path / 'cache'}\ndry_run: true\nattn_implementation: sdpa\n")
    words += ["--config", str(file)]
    assert CliRunner().invoke(cli, ["plan", *words], catch_exceptions=False).exit_code == 0
    dry = CliRunner().invoke(cli, ["train", *words], catch_exceptions=False)
    assert dry.exit_code == 0, dry.output
    assert "fits, gradient checkpointing off" in dry.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [["plan"], ["train", "--dry-run", "--out", "never"]], ids=["plan", "dry run"])
@pytest.mark.parametrize(
    ("words", "error", "reason"),
    [
        (["eval_steps=5"], ConfigError, "eval_steps is 5, but there is nothing to evaluate"),
        (["shuffle_buffer=5"], ConfigError, "shuffle_buffer applies to tar shards"),
        (["sta_config.single_frames=false"], DataError, "nothing of it would be trained"),
    ],
)
def test_what_train_would_refuse_is_not_planned(tmp_path, command, words, error, reason):
    Image.new("RGB", (56, 56)).save(tmp_path / "a.png")
    samples = tmp_path / "data.jsonl"
    samples.write_text('{"image": "a.png", "question": "What is it?", "answer": "black"}')
    words = [word for pair in words for word in ("--set", pair)]
    with pytest.raises(error, match=reason):
        CliRunner().invoke(
            cli, [*command, "--model", str(TINY_BASE), "--data", str(samples), *words], catch_exceptions=False
        )


def test_shards_are_planned_with_the_steps_that_train_needs(tmp_path):
    pytest.importorskip("webdataset")
    write_samples(tmp_path, 2)
    records = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text().splitlines()]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for record in records:
            clip = record["messages"][0]["content"][0]["video"]
            tar.add(tmp_path / clip, clip)
            info = tarfile.TarInfo(f"{clip.split('.')[0]}.json")
            info.size = len(text := json.dumps(record).encode())
            tar.addfile(info, io.BytesIO(text))
    words = [
        "plan",
        "--model",
        str(TINY_BASE),
        "--data",
        str(tmp_path / "a.tar"),
        "--stage",
        "1",
        "--set",
        "num_workers=0",
    ]
    with pytest.raises(ConfigError, match="set the number of steps"):
        CliRunner().invoke(cli, words, catch_exceptions=False)
    done = CliRunner().invoke(
        cli, [*words, "--set", "max_steps=3", "--set", "shuffle_buffer=5", "--json"], catch_exceptions=False
    )
    assert json.loads(done.stdout)["stages"]["1"]["steps"] == 3


def test_a_plan_takes_flags_of_the_file_as_train_does(samples, tmp_path):
    file = tmp_path / "train.yaml"
    file.write_text('trust_remote_code: "no"\n')
    words = ["plan", "--model", str(TINY_BASE), "--data", str(samples), "--config", str(file)]
    with pytest.raises(ConfigError, match=r"train\.yaml: trust_remote_code is 'no', expected true or false"):
        CliRunner().invoke(cli, words, catch_exceptions=False)


def test_what_is_measured_is_what_one_of_several_processes_takes(samples, monkeypatch):
    sizes = []
    monkeypatch.setattr(planning, "_timed", lambda model, inputs, *rest: sizes.append(len(inputs["input_ids"])) or 1.0)
    words = ["--model", str(TINY_BASE), "--data", str(samples), "--stage", "1", "--measure", "--processes", "4"]
    words += ["--set", "num_workers=0", "--set", "batch_size=4", "--json"]
    words += ["--set", "frames.min_tokens=null", "--set", "frames.max_tokens=null"]
    report = json.loads(CliRunner().invoke(cli, ["plan", *words], catch_exceptions=False).stdout)
    assert set(sizes) == {report["stages"]["1"]["device_batch_size"]} == {1}
