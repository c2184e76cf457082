"""Pairs of processes that work together: forks of one that has imported everything, so that a pair starts at once."""

import contextlib
import faulthandler
import gc
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

LIMIT = 300  # seconds, after which a process says where it waits, and ends


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def serve(work):
    """Of a worker's script: for each line of standard input, two forks call `work` with the texts that it names.

    Both think that `torchrun` started them, write to files `out0`, `errors0` and so on in the folder of that line, and
    end as a process of their own would; their exit codes, below zero for a signal, are the answer.
    """
    gc.freeze()  # what is imported: no fork needs to look through it
    for line in sys.stdin:
        request = json.loads(line)
        children = []
        for rank in range(2):
            child = os.fork()
            if not child:
                become(rank, request)
                work(*request["given"])
                return
            children.append(child)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)


def become(rank, request):
    """Make a fork one of two processes."""
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(request["port"])}
    for name, stream in (("out", sys.stdout), ("errors", sys.stderr)):
        with Path(request["folder"], f"{name}{rank}").open("w") as file:
            os.dup2(file.fileno(), stream.fileno())
    faulthandler.enable()
    faulthandler.dump_traceback_later(LIMIT, exit=True)


class Pairs:
    """Starts pairs of a worker's script."""

    def __init__(self, script):
        settings = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
        self.server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name(script))],
            env={**os.environ, **settings},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, folder, *given):
        """Standard output of process 0; both must end well."""
        request = {"folder": str(folder), "port": free_port(), "given": given}
        print(json.dumps(request), file=self.server.stdin, flush=True)
        codes = json.loads(self.server.stdout.readline())
        errors = [Path(folder, f"errors{rank}").read_text()[-3000:] for rank in range(2)]
        assert codes == [0, 0], "\n".join(f"process {rank}: {text}" for rank, text in enumerate(errors))
        return Path(folder, "out0").read_text()


@contextlib.contextmanager
def pairs_of(script):
    """Pairs of a script, whose server ends with the context."""
    made = Pairs(script)
    try:
        yield made
    finally:
        made.server.stdin.close()
        made.server.stdout.close()
        made.server.wait()
