"""One of two processes of tests/test_shared_evaluation.py: the command, as `torchrun` would start it, once for each line of words."""

import json
import sys
from unittest import mock

from sta_adapter.cli import cli
from sta_adapter.distributed import end_processes
from sta_adapter.evaluation import answering

try:
    for line in sys.argv[1:]:
        given = json.loads(line)
        write = answering.Answerer.write

        def fails(self, *args, given=given, write=write, **named):
            import os

            if os.environ["RANK"] == given.get("failing"):
                raise RuntimeError("out of memory, say")
            return write(self, *args, **named)

        with mock.patch.object(answering.Answerer, "write", fails):
            try:
                cli(given["words"], standalone_mode=False)
            except Exception as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr)
finally:
    end_processes()
