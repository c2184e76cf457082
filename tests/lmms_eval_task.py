"""A task of lmms-eval made of four tiny clips."""

import json

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


def write_task(place):
    """`task/`, `data.jsonl` and the clips, in a new folder."""
    from sta_adapter.demo.clips import render
    from sta_adapter.video import write_clip

    (place / "task").mkdir(parents=True)
    (place / "task/local_task.yaml").write_text(TASK.format(folder=place))
    (place / "task/utils.py").write_text(UTILS)
    rows = []
    for index, label in enumerate(LABELS):
        clip = write_clip(place / f"{index}.mp4", render(label, index, frames=8, size=32), fps=8)
        rows.append({"video": str(clip), "question": "Which movement does the clip show?", "answer": label})
    (place / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place
