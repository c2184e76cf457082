"""MVBench: twenty tasks on clips of other data sets. `json/TASK.json`, clips below `video/` or beside `json/`.

The first release keeps whole clips, with the seconds that a question is about (of TVQA: folders of pictures, three a
second); the later one ("video" branch) keeps those seconds as clips of their own, in folders called `..._segment`. NTU
RGB+D's clips, for fine_grained_pose, are not part of the first. Prompt as in lmms-eval.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from sta_adapter.data.conversation import Sample
from sta_adapter.data.message import Record
from sta_adapter.errors import DataError
from sta_adapter.evaluation.benchmarks.base import (
    LETTERS,
    EvalSet,
    clip_file,
    find,
    options_field,
    question,
    read_annotations,
    seconds_field,
    text_field,
)

STAR = ("star/Charades_v1_480", "star/Charades_segment")
CLEVRER, PERCEPTION = ("clevrer/video_validation",), ("perception/videos",)
CLIPS = {
    **dict.fromkeys(("action_sequence", "action_prediction", "object_interaction"), STAR),
    **dict.fromkeys(("moving_direction", "moving_count", "moving_attribute"), CLEVRER),
    **dict.fromkeys(("object_existence", "counterfactual_inference"), CLEVRER),
    **dict.fromkeys(("object_shuffle", "action_count", "state_change", "character_order"), PERCEPTION),
    "action_antonym": ("ssv2_video", "ssv2_video_mp4"),
    "action_localization": ("sta/sta_video", "sta/sta_video_segment"),
    "fine_grained_action": ("Moments_in_Time_Raw/videos",),
    "unexpected_action": ("FunQA_test/test",),
    "scene_transition": ("scene_qa/video",),
    "fine_grained_pose": ("nturgbd", "nturgbd_convert"),
    "egocentric_navigation": ("vlnqa",),
    "episodic_reasoning": ("tvqa/frames_fps3_hq", "tvqa/video_fps3_hq_segment"),
}
FRAMES_A_SECOND = 3.0  # of the folders of pictures
ROOTS = ("video/", "", "video/data0613/", "data0613/")  # the last two hold clips that were added later


def load(folder: Path) -> EvalSet:
    """The questions of every task whose clips are there."""
    found, files = EvalSet(), [file for file in find(folder, "json/*", "*.json") if file.stem in CLIPS]
    if not files:
        raise DataError(f"{folder} holds no json/action_sequence.json or another task's; expected a copy of MVBench.")
    for file in files:
        rows, names = read_annotations(file), CLIPS[file.stem]
        places = [place for name in names for root in ROOTS if (place := folder / f"{root}{name}").is_dir()]
        if not places:
            found.notes.append(
                f"{file.stem}: {len(rows)} questions left out, as there is no folder {' or '.join(names)}."
            )
            continue
        found.add(file, rows, partial(_sample, places=places, task=file.stem))
    missing = sorted(CLIPS.keys() - {file.stem for file in files})
    if missing:
        found.notes.append(f"No annotations of {', '.join(missing)}.")
    return found


def _sample(row: Record, source: str, places: list[Path], task: str) -> Sample:
    asked, answer, name = (text_field(row, key, source) for key in ("question", "answer", "video"))
    options = options_field(row, "candidates", source)
    if answer not in options:
        raise DataError(f"{source}: the answer {answer!r} is none of the candidates {options!r}.")
    listed = "".join(f"({letter}) {option}\n" for letter, option in zip(LETTERS, options, strict=False))
    text = f"Question:{asked}\nOption:\n{listed}Only give the best option.\n"
    named = [(place, clip_file(place, name)) for place in places]
    place, clip = next((pair for pair in named if pair[1].exists()), named[0])
    settings: dict[str, float] = {}
    if not place.name.endswith("_segment") and row.get("start") is not None and row.get("end") is not None:
        start, end = (seconds_field(row, key, source) for key in ("start", "end"))
        if end <= start:
            raise DataError(f"{source}: 'end' ({end:g}) is not after 'start' ({start:g}).")
        settings = {"video_start": start, "video_end": end}
    if place.name.startswith("frames_"):
        settings["folder_fps"] = FRAMES_A_SECOND
    labels = LETTERS[: len(options)]
    return question(clip, text, labels, options, options.index(answer), source=source, category=task, settings=settings)
