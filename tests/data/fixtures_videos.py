"""Fixtures: datasets with videos, in their publishers' schemas and with their quirks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.data.fixtures_kit import Good, Pairs, Promise, array, clip, fill, jpg, put, put_tar, qa, turns

VIDEOGPT = {
    "caption_videochat": "webvid", "classification_k710": "k710", "classification_ssv2": "ssv2",
    "conversation_videochat1": "videochat_it", "conversation_videochatgpt": "Activity_Videos",
    "reasoning_clevrer_mc": "clevrer", "reasoning_clevrer_qa": "clevrer", "reasoning_next_qa": "NExTQA",
    "vcg_human_annotated": "Activity_Videos", "vcg-plus_112K": "Activity_Videos", "vqa_webvid_qa": "webvid",
}  # fmt: skip
"""Annotation file -> folder of its videos."""
HOUND = "ShareGPTVideo/train_video_and_instruction/train_300k"
LENGTHS = ("0_30_s", "1_2_m", "2_3_m", "30_60_s")


def _row(video: Any, *texts: str, first: str = "human", **extra: Any) -> dict[str, Any]:
    return {"id": "v", "video": video, "conversations": turns(*texts, first=first), **extra}


def frames_of(name: str) -> list[bytes]:
    """The frames of one of LLaVA-Hound's videos."""
    return [jpg(50 + 3 * int(name[-1]) + n) for n in range(3)]


def hound_frames(root: Path) -> None:
    """Folders of frames in numbered archives; `v9` alone lies there unpacked."""
    for part in range(2):
        names = [f"v{n}" for n in range(9) if n % 2 == part]
        members = {f"{name}/c01_{n:04}.jpeg": data for name in names for n, data in enumerate(frames_of(name))}
        put_tar(root / HOUND / f"chunk_{part}.tar.gz", members)
    for n, data in enumerate(frames_of("v9")):
        put(root / HOUND / f"v9/c01_{n:04}.jpeg", data)


def m4_video(root: Path) -> Iterator[Promise]:
    """Bare ids, and `<image>` for the video."""
    pairs: Pairs = [(_row(f"v{n}", "<image>\nq", "a"), qa("[v0]\nq", videos=[frames_of(f"v{n}")])) for n in range(10)]
    pairs += [(_row("v77", "<image>\nq", "a"), "media_missing"), (_row(None, "<image>\nq", "a"), "media_missing")]
    yield array(root / "lmms-lab/M4-Instruct-Data/m4_instruct_video.json", "m4_video", pairs, root / HOUND)


def videogpt_plus(root: Path) -> Iterator[Promise]:
    """Eleven files, seven folders of videos, some packed; three ways to write the placeholder."""
    root = root / "MBZUAI/VideoGPT-plus_Training_Dataset"
    videos = root / "instruction_tuning"
    put_tar(videos / "webvid/webvid_1.tgz", {"webvid.mp4": clip(1)})
    put_tar(videos / "videochat_it.tgz", {"videochat_it/videochat_it.mp4": clip(1)})
    for folder in ("k710", "ssv2", "Activity_Videos", "clevrer", "NExTQA"):
        put(videos / folder / f"{folder}.mp4", clip(1))
    seen = [qa("[v0]\nq", videos=[clip(1)])] * 99
    for name, folder in VIDEOGPT.items():
        video = f"{folder}.mp4"
        plain = [_row(video, text, "a", dataset=name) for text in ("<video>\nq", "<image>\nq", "q")] * 9
        odd: Pairs = [
            (_row("2.mp4", "<video>\nq", "a"), "media_missing"),
            (_row(video, "<video><video>", "a"), "media_count"),
        ]
        yield array(root / f"annotations/{name}.json", "videogpt_plus", fill(odd, zip(plain, seen, strict=False)))


def sharegemini(root: Path) -> Iterator[Promise]:
    """Videos of others, found by name in whatever folder; the field may be another."""
    root = root / "Share14/ShareGemini"
    media = root / "videos"
    put(media / "k400/train/k400_demo_1.mp4", clip(2))
    put(media / "webvid/000/77.mp4", clip(3))
    one, other = qa("[v0]\nq", videos=[clip(2)]), qa("[v0]\nq", videos=[clip(3)])
    talk = turns("<video>\nq", "a")
    pairs: Pairs = [
        ({"video": "k400_demo_1.mp4", "conversations": talk}, one),
        ({"video": "k400_demo_1", "conversations": talk}, one),
        ({"id": "k400_demo_1", "conversations": turns("q", "a")}, one),
        ({"video": "k400/train/k400_demo_1.mp4", "conversations": talk}, one),
        ({"video": "dead", "conversations": talk}, "media_missing"),
        ({"conversations": talk}, "media_missing"),
    ]
    more = [({"video": "77.mp4", "conversations": talk}, other)] * 9
    yield array(root / "sharegemini_k400.json", "sharegemini", fill(pairs, more), media)
    yield array(root / "sharegemini_webvid_core100k.json", "sharegemini", fill([], [*more, *more]), media)


def llava_video(root: Path) -> Iterator[Promise]:
    """Videos in archives beside each file; `<image>` stands for them; records wrapped in lists; parquet twins."""
    base = root / "lmms-lab/LLaVA-Video-178K"
    for length in LENGTHS:
        own = ["v0_1_cap", "mc_v0_1_qa", "oe_v0_1_qa"]
        files = {"academic": own, "youtube": own, "activitynetqa": ["oe_qa"], "nextqa": ["mc_qa", "oe_qa"]}
        if length in ("0_30_s", "30_60_s"):
            files["perceptiontest"] = ["mc_qa"]
        for source, kinds in files.items():
            suffix = "_v0_1" if source in ("academic", "youtube") else ""
            folder = base / f"{length}_{source}{suffix}"
            put_tar(folder / f"{folder.name}_videos_1.tar.gz", {f"{source}_source/demo/1.mp4": clip(4)})
            for kind in kinds:
                yield _llava_video_file(folder / f"{length}_{source}_{kind}_processed.json", source)
    put(base / "0_30_s_nextqa/oe-00000-of-00001.parquet", b"a twin of a JSON file, in some revisions")
    talk = [("user", "[v0]\nq"), ("assistant", "a"), ("user", "r"), ("assistant", "b")]
    pairs: Pairs = [
        (_row(f"v{n}", "<image>\nq", "a", "r", "b"), Good(talk, videos=[frames_of(f"v{n}")])) for n in (0, 1, 9)
    ]
    pairs.append((_row("v78", "<image>\nq", "a"), "media_missing"))
    yield array(base / "llava_hound/sharegptvideo_qa_255k_processed.json", "llava_hound", pairs, root / HOUND)


def _llava_video_file(path: Path, source: str) -> Promise:
    video = f"{source}_source/demo/1.mp4"
    seen = [clip(4)]
    pairs: Pairs = [
        (_row(video, "<image>\nWhat?\nA. cup", "A."), qa("[v0]\nWhat?\nA. cup", "A.", videos=seen)),
        ([_row(video, "<image>\nq", "a")], qa("[v0]\nq", videos=seen)),
        (_row(video, "Hello.", "<image>\nq", "a", first="gpt"), qa("[v0]\nq", videos=seen)),
        (_row(f"{source}_source/demo/2.mp4", "<image>\nq", "a"), "media_missing"),
        (_row(None, "<image>\nq", "a"), "media_missing"),
        (_row(video, "q", "a", data_source=path.stem), "media_count"),
    ]
    return array(path, "llava_video", pairs)


VIDEOS = (m4_video, videogpt_plus, sharegemini, llava_video)
