"""Tests that need lmms-eval, which has an environment of its own: `make test-lmms-eval`. Elsewhere they are not collected."""

import importlib.util
import os

import pytest
import torch

if importlib.util.find_spec("lmms_eval") is None:
    collect_ignore_glob = ["test_*.py"]
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

LABELS = ("left", "right", "up", "down")
TASK = """task: local_task
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/data.jsonl
  cache_dir: {folder}/cache
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  max_new_tokens: 6
process_results: !function utils.results
metric_list:
  - metric: exact
    aggregation: mean
    higher_is_better: true
"""
UTILS = """def visual(doc):
    return [doc["video"]]


def results(doc, results):
    return {"exact": float(results[0].strip() == doc["answer"])}
"""


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A task of lmms-eval made of four tiny clips: `task/`, `data.jsonl` and the clips."""
    import json

    from sta_adapter.demo.clips import render
    from sta_adapter.video import write_clip

    place = tmp_path_factory.mktemp("local")
    (place / "task").mkdir()
    (place / "task/local_task.yaml").write_text(TASK.format(folder=place))
    (place / "task/utils.py").write_text(UTILS)
    rows = []
    for index, label in enumerate(LABELS):
        clip = write_clip(place / f"{index}.mp4", render(label, index, frames=8, size=32), fps=8)
        rows.append({"video": str(clip), "question": "Which movement does the clip show?", "answer": label})
    (place / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


@pytest.fixture(scope="session")
def make_adapter(tmp_path_factory):
    """Saves an adapter with strong random weights for a model, and gives its folder."""

    def make(model):
        from sta_adapter import STAConfig, inject_sta

        torch.manual_seed(0)
        handle = inject_sta(model, STAConfig(init="normal"))
        for parameter in handle.parameters():
            parameter.data.normal_(0, 0.3)
        place = tmp_path_factory.mktemp("adapter")
        handle.save_pretrained(place)
        return place

    return make
