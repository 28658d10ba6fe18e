"""Rows of the video benchmarks: MVBench, LongVideoBench, Video-MME."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_vita.data.media.names import VIDEO_SUFFIXES, locate
from megatron_vita.data.sample import MediaFile
from megatron_vita.errors import DataError
from megatron_vita.evaluation.benchmarks import prompts
from megatron_vita.evaluation.benchmarks.item import LETTERS, Item, needed, text, texts, without_letters
from megatron_vita.evaluation.benchmarks.prompts import Style
from megatron_vita.evaluation.benchmarks.rows import Row
from megatron_vita.evaluation.benchmarks.subtitles import read_subtitles

MVBENCH_FRAME_RATE = 3.0
"""Pictures a second of TVQA's folders of frames."""
_WATCH = (
    "Carefully watch the video and pay attention to the cause and sequence of events, the detail and movement of "
    "objects, and the action and pose of persons. Based on your observations, select the best option that accurately "
    "addresses the question.\n"
)
_SELECT = (
    "Select the best answer to the following multiple-choice question based on the video. "
    "Respond with only the letter (A, B, C, or D) of the correct option.\n"
)
_SELECT_LMMS = (
    "Select the best answer to the following multiple-choice question based on the video and the subtitles. "
    "Respond with only the letter (A, B, C, or D) of the correct option.\n"
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where the videos of a row may lie below the root, in order of preference."""

    paths: tuple[str, ...]
    start: float = 0.0
    end: float | None = None

    def find(self, root: Path) -> MediaFile | None:
        """The first that is there.

        Raises:
            DataError: path_escape.
        """
        for path in self.paths:
            if found := locate(str(root), path):
                file = MediaFile(path=found, label=path)
                if Path(found).is_dir():
                    file = replace(file, frame_rate=MVBENCH_FRAME_RATE)
                # a file of a folder of segments was cut already
                return file if "_segment/" in path else replace(file, start=self.start, end=self.end)
        return None


@dataclass(frozen=True, slots=True)
class _Task:
    """One of MVBench's twenty tasks."""

    folders: tuple[str, ...]
    """As OpenGVLab/MVBench and VLMEvalKit have it below `video/`; as lmms-eval has it (revision `video`), below the
    root."""
    cut: bool = False
    """Its rows name a part of a video."""


_STAR = _Task(("star/Charades_v1_480", "star/Charades_segment"), cut=True)
_CLEVRER, _PERCEPTION = _Task(("clevrer/video_validation",)), _Task(("perception/videos",))
MVBENCH = {
    "action_sequence": _STAR,
    "action_prediction": _STAR,
    "action_antonym": _Task(("ssv2_video", "ssv2_video_mp4")),
    "fine_grained_action": _Task(("Moments_in_Time_Raw/videos",)),
    "unexpected_action": _Task(("FunQA_test/test",)),
    "object_existence": _CLEVRER,
    "object_interaction": _STAR,
    "object_shuffle": _PERCEPTION,
    "moving_direction": _CLEVRER,
    "action_localization": _Task(("sta/sta_video", "sta/sta_video_segment"), cut=True),
    "scene_transition": _Task(("scene_qa/video",)),
    "action_count": _PERCEPTION,
    "moving_count": _CLEVRER,
    "moving_attribute": _CLEVRER,
    "state_change": _PERCEPTION,
    "fine_grained_pose": _Task(("nturgbd", "nturgbd_convert")),
    "character_order": _PERCEPTION,
    "egocentric_navigation": _Task(("vlnqa",)),
    "episodic_reasoning": _Task(("tvqa/frames_fps3_hq", "tvqa/video_fps3_hq_segment"), cut=True),
    "counterfactual_inference": _CLEVRER,
}
"""json/NAME.json -> its videos. Two hundred questions each."""


def mvbench(row: Row, style: Style, root: Path, subtitles: bool, file: Path) -> tuple[Item, Place]:
    """MVBench: video, question, candidates, answer (one of them), start and end in seconds for some tasks."""
    task = MVBENCH.get(file.stem)
    if task is None:
        raise DataError(f"{file.name} is no task of MVBench. Known: {', '.join(MVBENCH)}.")
    options = texts(row, "candidates")
    listed = prompts.listed(options, "({}) {}")
    prompt: tuple[str | int, ...]
    if style == "lmms_eval":
        prompt = (0, f"Question:{needed(row, 'question')}\nOption:\n{listed}\nOnly give the best option.\n")
    else:
        behind = "Answer with the letter." if style == "long_vita" else "Only give the best option.Best option:("
        prompt = (f"{_WATCH}Question: {needed(row, 'question')}\nOptions:\n{listed}", 0, f"\n{behind}")
    item = Item(prompt=prompt, golds=_one_of(row, options), options=options, fields={"category": file.stem})
    video = needed(row, "video")
    names = dict.fromkeys((video, *(os.path.splitext(video)[0] + suffix for suffix in (".mp4", ".webm", ".avi"))))
    folders = [
        f"{above}{folder}" for folder in task.folders for above in ("video/", "", "video/data0613/", "data0613/")
    ]
    paths = tuple(f"{folder}/{name}" for folder in folders for name in names)
    if not task.cut:
        return item, Place(paths)
    start, end = _seconds(row, "start"), _seconds(row, "end")
    return item, Place(paths, start or 0.0, end)


def longvideobench(row: Row, style: Style, root: Path, subtitles: bool, file: Path) -> tuple[Item, Place]:
    """LongVideoBench: id, video_path, question, candidates (or option0 to option4), correct_choice (from 0),
    question_category, topic_category, duration_group, subtitle_path."""
    options = texts(row, "candidates") or tuple(
        option for number in range(5) if (option := text(row, f"option{number}")) and option != "N/A"
    )
    choice = row.get("correct_choice")
    if not isinstance(choice, int) or not 0 <= choice < len(options):
        raise DataError(f"`correct_choice` {choice!r} is no number of one of {len(options)} options.")
    asked = f"{needed(row, 'question')}\n{prompts.listed(options)}\n{prompts.OPTION_LETTER}"
    asked += {"long_vita": prompts.SHORT, "vlmevalkit": "", "lmms_eval": "\n"}[style]
    spoken = _spoken(root, subtitles, f"subtitles/{text(row, 'subtitle_path')}")
    fields = {
        "id": text(row, "id"),
        "category": text(row, "question_category"),
        "topic": text(row, "topic_category"),
        "duration": row.get("duration_group"),  # seconds of the longest of the group: 15, 60, 600, 3600
    }
    item = Item(prompt=(0, spoken + asked), golds=(LETTERS[choice],), options=options, fields=fields)
    return item, Place((f"videos/{needed(row, 'video_path')}",))


def videomme(row: Row, style: Style, root: Path, subtitles: bool, file: Path) -> tuple[Item, Place]:
    """Video-MME: videoID, question_id, question, options (each with its letter), answer (a letter), domain,
    sub_category, task_type, duration (short, medium, long)."""
    options, name = texts(row, "options"), needed(row, "videoID")
    spoken = _spoken(root, subtitles, f"subtitle/{name}.srt")
    asked = needed(row, "question") + "\n" + "\n".join(options)
    if style == "lmms_eval":
        prompt = (
            spoken + _SELECT_LMMS + asked + "\n" + ("The best answer is:" if spoken else f"\n{prompts.OPTION_LETTER}")
        )
    else:
        prompt = f"\nThese are the frames of a video. {spoken}{_SELECT}Question: {asked}\n"
        prompt += prompts.SHORT if style == "long_vita" else "Answer: "
    fields = {
        "id": text(row, "question_id"),
        "category": text(row, "domain"),
        "sub_category": text(row, "sub_category"),
        "task_type": text(row, "task_type"),
        "duration": text(row, "duration"),
    }
    item = Item(prompt=(0, prompt), golds=texts(row, "answer"), options=without_letters(options), fields=fields)
    suffixes = dict.fromkeys((".mp4", ".MP4", ".mkv", *VIDEO_SUFFIXES))
    return item, Place(tuple(f"{folder}/{name}{suffix}" for folder in ("data", "video") for suffix in suffixes))


VideoReader = Callable[[Row, Style, Path, bool, Path], tuple[Item, Place]]
"""(row, style, root, with subtitles, file of the row) -> the item and where its video may lie."""


def _one_of(row: Row, options: Sequence[str]) -> tuple[str, ...]:
    answer = text(row, "answer")
    if answer not in options:
        raise DataError(f"`answer` {answer!r} is none of its options.")
    return (LETTERS[options.index(answer)],)


def _seconds(row: Row, name: str) -> float | None:
    value: Any = row.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e6:
        raise DataError(f"`{name}` {value!r} is no time in seconds.")
    return float(value)


def _spoken(root: Path, wanted: bool, path: str) -> str:
    """What is said before a question with subtitles; a video without any gets "No subtitles available"."""
    if not wanted:
        return ""
    found = locate(str(root), path)
    lines = read_subtitles(Path(found)) if found else ["No subtitles available"]
    return "This video's subtitles are listed below:\n" + "\n".join(lines) + "\n"
