"""The benchmarks that are read, and what is known of each.

Facts are those of lmms-eval and VLMEvalKit (their readers and task files) and of the publishers' pages. Not verified:
no published file was at hand when this was written, so columns and folders are as that code expects them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from megatron_vita.evaluation.benchmarks import images, videos
from megatron_vita.evaluation.benchmarks.item import Item
from megatron_vita.evaluation.benchmarks.prompts import Style
from megatron_vita.evaluation.benchmarks.rows import Row

ImageReader = Callable[[Row, Style], Item | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """A published benchmark."""

    title: str
    task: str
    """What judges its answers, a key of TASKS."""
    questions: int
    """Published number, of the files that come first."""
    files: tuple[str, ...]
    """Patterns of its data files below the root; the first that finds any counts."""
    source: str
    """What to download, and where media belong."""
    read: ImageReader | videos.VideoReader
    media: Literal["pictures", "videos"] = "pictures"
    subtitles: bool = False
    """It comes with subtitles."""
    category: str = ""
    """What `category` is."""


BENCHMARKS: dict[str, Benchmark] = {
    "mvbench": Benchmark(
        title="MVBench",
        task="multiple_choice",
        questions=4000,
        files=("json/*.json",),
        source="OpenGVLab/MVBench from Hugging Face: json/*.json, and the archives of video/ unpacked there "
        "(video/star/Charades_v1_480/, video/clevrer/video_validation/, ...); NTU RGB+D (video/nturgbd/) from its site",
        read=videos.mvbench,
        media="videos",
        category="one of twenty tasks",
    ),
    "longvideobench": Benchmark(
        title="LongVideoBench (validation)",
        task="multiple_choice",
        questions=1337,
        files=("lvb_val.json", "validation-*.parquet", "*/validation-*.parquet"),
        source="longvideobench/LongVideoBench from Hugging Face: lvb_val.json, videos.tar (its parts joined) and "
        "subtitles.tar unpacked as videos/ and subtitles/",
        read=videos.longvideobench,
        media="videos",
        category="question category (17)",
        subtitles=True,
    ),
    "videomme": Benchmark(
        title="Video-MME",
        task="multiple_choice",
        questions=2700,
        files=("videomme/test-*.parquet", "test-*.parquet"),
        source="lmms-lab/Video-MME from Hugging Face: videomme/test-*.parquet, the archives of videos unpacked as "
        "data/ or video/, subtitle.zip as subtitle/",
        subtitles=True,
        read=videos.videomme,
        media="videos",
        category="domain (6)",
    ),
    "mmmu": Benchmark(
        title="MMMU (validation)",
        task="mmmu",
        questions=900,
        files=("MMMU_DEV_VAL.tsv", "validation-*.parquet", "*/validation-*.parquet"),
        source="MMMU_DEV_VAL.tsv of VLMEvalKit, or validation-*.parquet of lmms-lab/MMMU or MMMU/MMMU",
        read=images.mmmu,
        category="subject (30)",
    ),
    "mmbench": Benchmark(
        title="MMBench (English, dev)",
        task="multiple_choice",
        questions=4329,
        files=("MMBench_DEV_EN.tsv", "MMBench_DEV_EN_V11.tsv", "en/dev-*.parquet", "dev-*.parquet"),
        source="MMBench_DEV_EN.tsv of VLMEvalKit (other languages and versions: give the file itself), or "
        "en/dev-*.parquet of lmms-lab/MMBench",
        read=images.mmbench,
        category="ability (20)",
    ),
    "ocrbench": Benchmark(
        title="OCRBench",
        task="ocrbench",
        questions=1000,
        files=("OCRBench.tsv", "test-*.parquet", "*/test-*.parquet"),
        source="OCRBench.tsv of VLMEvalKit, or data/test-*.parquet of echo840/OCRBench",
        read=images.ocrbench,
        category="question type (10)",
    ),
    "chartqa": Benchmark(
        title="ChartQA (test)",
        task="relaxed_accuracy",
        questions=2500,
        files=("ChartQA_TEST.tsv", "test-*.parquet", "*/test-*.parquet"),
        source="ChartQA_TEST.tsv of VLMEvalKit, or data/test-*.parquet of lmms-lab/ChartQA",
        read=images.chartqa,
        category="human or augmented",
    ),
    "docvqa": Benchmark(
        title="DocVQA (validation)",
        task="anls",
        questions=5349,
        files=("DocVQA_VAL.tsv", "DocVQA/validation-*.parquet", "validation-*.parquet"),
        source="DocVQA_VAL.tsv of VLMEvalKit, or DocVQA/validation-*.parquet of lmms-lab/DocVQA",
        read=images.docvqa,
        category="first question type",
    ),
    "ai2d": Benchmark(
        title="AI2D (test)",
        task="multiple_choice",
        questions=3088,
        files=("AI2D_TEST.tsv", "test-*.parquet", "*/test-*.parquet"),
        source="AI2D_TEST.tsv of VLMEvalKit, or data/test-*.parquet of lmms-lab/ai2d",
        read=images.ai2d,
        category="category, where the table has one",
    ),
}
"""Name -> benchmark."""
