"""The settings of examples/cluster: accelerate reads them as they are meant, and the page on clusters names them all."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CLUSTER = ROOT / "examples" / "cluster"
CONFIGS = sorted(path.name for path in CLUSTER.glob("*.yaml"))


def launch_arguments(name, *options):
    """What `accelerate launch` makes of a file of settings, its own checks included."""
    launch = pytest.importorskip("accelerate.commands.launch")
    command = ["--config_file", str(CLUSTER / name), *options, "--no_python", "sta-adapter", "train", "--model", "ID"]
    arguments, _, _ = launch._validate_launch_command(launch.launch_command_parser().parse_args(command))
    return arguments


def test_all_are_there():
    assert CONFIGS == ["ddp.yaml", "fsdp2.yaml", "zero2.yaml", "zero3.yaml"]


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_reads_them(name):
    found = launch_arguments(name)
    assert (found.num_processes, found.num_machines, found.mixed_precision) == (8, 1, "bf16")
    assert (found.training_script, found.training_script_args) == ("sta-adapter", ["train", "--model", "ID"])
    kind = {"multi_gpu": found.multi_gpu, "fsdp": found.use_fsdp, "deepspeed": found.use_deepspeed}
    expected = {"ddp": "multi_gpu", "fsdp2": "fsdp"}.get(name.partition(".")[0], "deepspeed")
    assert [key for key, value in kind.items() if value] == [expected]
    if expected == "deepspeed":
        assert str(found.zero_stage) == name[4]
        assert (found.gradient_accumulation_steps, found.gradient_clipping) == ("auto", "auto")
        assert str(found.zero3_init_flag).lower() == "false"


@pytest.mark.parametrize("name", CONFIGS)
def test_options_for_several_nodes(name):
    options = ("--num_machines", "4", "--num_processes", "32", "--machine_rank", "3", "--main_process_ip", "node0")
    found = launch_arguments(name, *options)
    assert (found.num_machines, found.num_processes, found.machine_rank) == (4, 32, 3)
    assert found.main_process_ip == "node0"


def test_fsdp2_is_what_the_settings_ask_for(monkeypatch):
    utils = pytest.importorskip("accelerate.utils")
    if not hasattr(utils.FullyShardedDataParallelPlugin, "fsdp_version"):
        pytest.skip("this version of accelerate has no FSDP2")
    from accelerate.utils.launch import prepare_multi_gpu_env

    for key, value in prepare_multi_gpu_env(launch_arguments("fsdp2.yaml")).items():
        if key.startswith("FSDP_"):
            monkeypatch.setenv(key, value)
    plugin = utils.FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert "transformer" in plugin.auto_wrap_policy.__name__
    assert not plugin.cpu_ram_efficient_loading


def test_slurm_script():
    script = CLUSTER / "slurm.sh"
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr
    assert "ddp.yaml" in script.read_text()


def test_the_page_names_every_file():
    page = (ROOT / "docs" / "multi-node.md").read_text(encoding="utf-8")
    assert [name for name in (*CONFIGS, "slurm.sh") if f"examples/cluster/{name}" not in page] == []
