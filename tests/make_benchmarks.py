"""Writes tiny copies of benchmarks in their published layouts, with real clips."""

import json
from pathlib import Path

import numpy as np
from tiny_qwen import moving_square, write_video

TEN_IDS = {"101": "Picking [something] up", "102": "[Something] falling like a rock", "103": "Holding [something]"}


def clip(path: Path, label: str = "left", start: int = 0, seconds: int = 1) -> Path:
    return write_video(path, moving_square(label, start, count=8 * seconds) if seconds == 1 else _long(seconds))


def _long(seconds: int) -> np.ndarray:
    """Eight frames a second, each second of another grey."""
    return np.stack([np.full((16, 16, 3), 20 * (index // 8), np.uint8) for index in range(8 * seconds)])


def pictures(folder: Path, count: int) -> None:
    from PIL import Image

    folder.mkdir(parents=True)
    for index in range(count):
        Image.fromarray(np.full((16, 16, 3), 10 * index, np.uint8)).save(folder / f"{index + 1:05d}.png")


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_parquet(path: Path, rows: list) -> None:
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def mvbench(folder: Path, layout: str = "first") -> Path:
    """Whole clips with seconds and pictures ("first"), or clips cut already ("segments")."""
    whole = layout == "first"
    videos = folder / "video" if whole else folder
    asked = {"question": "What came first?", "candidates": ["Sat down.", "Stood up.", "Left."], "answer": "Stood up."}
    bounds = {"start": 2.0, "end": 5.0}
    write_json(folder / "json/action_sequence.json", [{"video": "A1.mp4", **asked, **bounds}])
    write_json(folder / "json/episodic_reasoning.json", [{"video": "castle_s01", **asked, "start": 1.0, "end": 3.0}])
    moving = {"question": "Which way?", "candidates": ["left", "right"], "answer": "left"}
    write_json(folder / "json/action_antonym.json", [{"video": "7.webm", **moving}])
    write_json(folder / "json/fine_grained_pose.json", [{"video": "S1.avi", **moving}] * 2)
    star = "star/Charades_v1_480" if whole else "star/Charades_segment"
    clip(videos / star / "A1.mp4", seconds=6 if whole else 1)
    clip(videos / ("ssv2_video" if whole else "ssv2_video_mp4") / "7.mp4")  # the annotation says .webm
    if whole:
        pictures(videos / "tvqa/frames_fps3_hq/castle_s01", 12)
    else:
        clip(videos / "tvqa/video_fps3_hq_segment/castle_s01.mp4")
    return folder


def vitatecs(folder: Path, layout: str = "repository") -> Path:
    true, false = "a man moves to the left", "a man moves to the right"
    for aspect in ("Direction", "Intensity"):
        rows = [
            {"src_dataset": "MSRVTT", "video_name": "video1.mp4", "caption": true, "counterfactual": false},
            {"src_dataset": "VATEX", "video_name": "x_0_1.mp4", "caption": false, "counterfactual": true},
        ]
        rows = [{**row, "aspect": aspect} for row in rows]
        if layout == "repository":
            (folder / "data").mkdir(parents=True, exist_ok=True)
            (folder / f"data/{aspect}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            write_parquet(folder / f"{aspect}/test-00000-of-00001.parquet", rows)
    videos = folder / "videos" if layout == "repository" else folder
    clip(videos / "MSRVTT/video1.mp4", "left")
    clip(videos / "VATEX/x_0_1.mp4", "right")
    return folder


def tempcompass(folder: Path, layout: str = "repository") -> Path:
    kinds = {
        "multi-choice": ("Which way?\nA. left\nB. right\nC.  up ", "A. left"),
        "yes_no": ("Does it move to the left?", "yes"),
        "caption_matching": (
            "Which fits?\nOption 1: It moves right.\nOption 2: It moves left.",
            "Option 2: It moves left.",
        ),
        "captioning": ("Describe it.\nInformation A: left\nGenerated Caption:", "A. left"),
    }
    for kind, (question, answer) in kinds.items():
        if layout == "repository":
            asked = [{"question": question, "answer": answer}]
            write_json(folder / f"questions/{kind}.json", {"11": {"direction": asked, "speed": asked}})
        else:
            rows = [
                {"video_id": "11", "question": question, "answer": answer, "dim": d} for d in ("direction", "speed")
            ]
            write_parquet(folder / f"{kind}/test-00000-of-00001.parquet", rows)
    clip(folder / "videos/11.mp4")
    return folder


def videomme(folder: Path) -> Path:
    rows = [
        {
            "video_id": "001", "duration": ("short", "long")[number % 2], "domain": "Knowledge",
            "sub_category": "Astronomy", "url": "", "videoID": f"yt-{number // 2}", "question_id": f"001-{number}",
            "task_type": ("Temporal Reasoning", "Action Recognition")[number % 2], "question": "Which way?",
            "options": ["A. Left.", "B. Right.", "C. Up.", "D. Down."], "answer": "AB"[number % 2],
        }
        for number in range(4)
    ]  # fmt: skip
    write_parquet(folder / "videomme/test-00000-of-00001.parquet", rows)
    for number in range(2):
        clip(folder / f"data/yt-{number}.mp4", start=number)
    return folder


def ssv2_t10(folder: Path) -> Path:
    entries = [
        {"id": name, "label": "", "template": template, "placeholders": []} for name, template in TEN_IDS.items()
    ]
    write_json(folder / "labels/validation.json", entries)
    for name in TEN_IDS:
        clip(folder / f"20bn-something-something-v2/{name}.mp4")
    return folder
