"""Two processes on the CPU: a process whose batch has no video neither hangs nor diverges."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent


def free_port():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_two(*cases):
    """Standard output of process 0; both must end well within the time limit."""
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(FOLDER / "parallel_worker.py"), *cases],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=240) for process in processes]
    except subprocess.TimeoutExpired:
        pytest.fail(f"{cases}: a process waits forever")
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return outputs[0][0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_processes_with_and_without_video(kind):
    if kind == "fsdp2" and not hasattr(torch.distributed.fsdp, "fully_shard"):
        pytest.skip("this version of torch has no fully_shard")
    assert run_two(f"{kind}:", f"{kind}:1", f"{kind}:0").splitlines() == [
        f"{kind} text on {ranks}: agree True, moved True" for ranks in ([], [1], [0])
    ]
