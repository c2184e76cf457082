"""One of two processes of tests/test_shared_evaluation.py: the command, as `torchrun` would start it, once for each line of words."""

import os
import sys
from unittest import mock

from pairs import serve
from transformers import Qwen2VLForConditionalGeneration  # noqa: F401  # once for all pairs

from sta_adapter.cli import cli
from sta_adapter.distributed import end_processes
from sta_adapter.evaluation import answering

WRITE = answering.Answerer.write


def main(*runs):
    for run in runs:

        def write(self, *args, failing=run.get("failing"), **named):
            if os.environ["RANK"] == failing:
                raise RuntimeError("out of memory, say")
            return WRITE(self, *args, **named)

        with mock.patch.object(answering.Answerer, "write", write):
            try:
                cli(run["words"], standalone_mode=False)
            except Exception as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr)
    end_processes()


if __name__ == "__main__":
    serve(main)
