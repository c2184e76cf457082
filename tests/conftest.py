"""Settings that all tests share."""

import functools
import gc
import os
import sys
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import HealthCheck, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start
sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)
settings.register_profile(
    "default",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("default")


def pytest_collection_modifyitems(config, items):
    """Skip, in one place, what this machine can't run."""
    without_gpu = pytest.mark.skip(reason="needs a CUDA device")
    without_code = pytest.mark.skip(reason="STA_REAL_CODE names no folder with the published model files")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(without_gpu)
        if "real_code" in item.keywords and not os.environ.get("STA_REAL_CODE"):
            item.add_marker(without_code)


def pytest_collection_finish(session):
    """What all tests have imported stays; each collection of garbage would look through it again, a quarter of all time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _one_thread():
    """Who changes the number of threads slows all tests that come later, many times over."""
    yield
    assert torch.get_num_threads() == 1


@pytest.fixture(autouse=True)
def _alike_in_each_forward(request, monkeypatch):
    """On transformers 4.47 and 4.48 Qwen2-VL numbers its tokens otherwise from its second forward on, as test_text_positions shows."""
    if not transformers.__version__.startswith(("4.47.", "4.48.")) or request.module.__name__ == "test_text_positions":
        return
    head = transformers.Qwen2VLForConditionalGeneration
    forward = head.forward

    @functools.wraps(forward)
    def counted(self, *args, **kwargs):
        if kwargs.get("past_key_values") is None:
            self.rope_deltas = None
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(head, "forward", counted)
