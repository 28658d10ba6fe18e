"""Reads a benchmark from local files, row by row; its pictures go into one file beside the results."""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast

from megatron_vita.data.media.names import locate
from megatron_vita.data.rejects import counted, reject
from megatron_vita.data.sample import MediaFile
from megatron_vita.errors import ConfigError, DataError
from megatron_vita.evaluation.benchmarks.item import Item, to_question
from megatron_vita.evaluation.benchmarks.prompts import STYLES, Style
from megatron_vita.evaluation.benchmarks.rows import read_rows
from megatron_vita.evaluation.benchmarks.table import BENCHMARKS, Benchmark, ImageReader
from megatron_vita.evaluation.benchmarks.videos import VideoReader
from megatron_vita.evaluation.pictures import MOST_REFERENCE, PictureFile, read_pictures
from megatron_vita.evaluation.questions import Question, QuestionSet
from megatron_vita.inference.answer_key import digest_of_parts

log = logging.getLogger(__name__)


def read_benchmark(
    name: str,
    root: Path,
    *,
    work: Path,
    style: Style = "long_vita",
    subtitles: bool = False,
    categories: Sequence[str] = (),
    limit: int | None = None,
) -> list[Question]:
    """The questions of a published benchmark.

    Args:
        name: a key of BENCHMARKS.
        root: folder that it was downloaded into, or one of its data files (another split or language).
        work: folder for a file of the pictures that tables hold; every rank must see it.
        style: how the prompt is worded, one of STYLES.
        subtitles: of videos: list the subtitles before the question.
        categories: only questions of these.
        limit: only the first so many questions.

    Returns:
        Questions in the files' order, each with its task, gold answers, options, and `category` and `duration` among
        its fields.

    Raises:
        ConfigError: an unknown name, style or category; no data file, or no medium, where it belongs.
        DataError: a damaged file or row, naming it.
    """
    benchmark = find_benchmark(name)
    _check_style(style)
    if subtitles and not benchmark.subtitles:
        raise ConfigError(f"{name} has no subtitles. Leave --subtitles out.")
    files = _files(name, benchmark, root)
    folder = _folder(benchmark, root)
    questions: Iterator[Question]
    if benchmark.media == "videos":
        questions = _videos(name, benchmark, files, folder, style, subtitles)
        found = _chosen(name, questions, categories, limit)
        _check_videos(name, benchmark, folder, found)
    else:
        read = digest_of_parts(*(str(file.resolve()) for file in files), sorted(categories), limit)[:8]
        with PictureFile(work / f"{name}-{read}.pictures") as pictures:  # another read must not shorten the file
            found = _chosen(name, _pictures(name, benchmark, files, folder, style, pictures), categories, limit)
    return found


def benchmark_set(
    name: str,
    root: Path,
    *,
    work: Path,
    style: Style = "long_vita",
    subtitles: bool = False,
    categories: Sequence[str] = (),
) -> QuestionSet:
    """The questions of a benchmark as a set; arguments as `read_benchmark`, which reads it.

    It is named by the benchmark, and by data file, subtitles, prompts and categories, if they are not the usual ones,
    so that their answers stand side by side.

    Raises:
        ConfigError: there is no such benchmark, or style.
    """
    find_benchmark(name)
    _check_style(style)

    def read(limit: int | None) -> list[Question]:
        return read_benchmark(
            name, root, work=work, style=style, subtitles=subtitles, categories=categories, limit=limit
        )

    named = [f"{name} with subtitles" if subtitles else name]
    named += [root.name] if root.is_file() else []
    named += [f"prompts of {style}"] if style != "long_vita" else []
    named += [f"only {' and '.join(categories)}"] if categories else []
    return QuestionSet(", ".join(named), read)


def find_benchmark(name: str) -> Benchmark:
    """A benchmark by name.

    Raises:
        ConfigError: there is none; the nearest name is given.
    """
    if name not in BENCHMARKS:
        close = difflib.get_close_matches(name.lower().replace("-", ""), BENCHMARKS, n=1)
        hint = f"Did you mean {close[0]}?" if close else f"Known: {', '.join(BENCHMARKS)}."
        raise ConfigError(f"no benchmark {name!r}. {hint}")
    return BENCHMARKS[name]


def _check_style(style: str) -> None:
    if style not in STYLES:
        raise ConfigError(f"prompt style {style!r} is not known. Choose one of {', '.join(STYLES)}.")


def _files(name: str, benchmark: Benchmark, root: Path) -> list[Path]:
    """Its data files."""
    if root.is_file():
        return [root]
    for pattern in benchmark.files:
        if found := sorted(path for path in root.glob(pattern) if path.is_file()):
            return found
    raise ConfigError(
        f"{root}: no data file of {name} ({', '.join(benchmark.files)}). Download {benchmark.source}; then give that "
        "folder, or a data file, with --root."
    )


def _folder(benchmark: Benchmark, root: Path) -> Path:
    """The folder that media are relative to: the root, or of a data file the one that its pattern starts in."""
    if not root.is_file():
        return root.resolve()
    depth = next((pattern.count("/") for pattern in benchmark.files if root.resolve().match(pattern)), 0)
    return root.resolve().parents[depth]


def _chosen(name: str, questions: Iterator[Question], categories: Sequence[str], limit: int | None) -> list[Question]:
    wanted = frozenset(categories)
    seen: set[str] = set()

    def some() -> Iterator[Question]:
        for question in questions:
            category = str(question.fields.get("category", ""))
            seen.add(category)
            if not wanted or category in wanted:
                yield question

    found = list(islice(some(), limit))
    if not found:
        raise ConfigError(
            f"{name}: no question in it{f' of {sorted(wanted)}; it has {sorted(seen)}' if wanted else ''}."
        )
    missing = wanted - seen
    if missing and (limit is None or len(found) < limit):  # else not all are read; another benchmark may have them
        log.warning("%s: no question of %s; it has %s", name, sorted(missing), sorted(seen))
    return found


def _pictures(
    name: str, benchmark: Benchmark, files: Sequence[Path], folder: Path, style: Style, pictures: PictureFile
) -> Iterator[Question]:
    """Questions of tables that hold their pictures."""
    read = cast(ImageReader, benchmark.read)
    by_index: dict[str, list[MediaFile]] = {}

    def find(path: str) -> MediaFile:
        found = locate(str(folder), path)
        if found is None:
            raise reject("media_missing", f"{path} does not exist under {folder}, and its row holds no picture.")
        return MediaFile(path=found, label=path)

    def question(number: int, where: str, item: Item, media: Sequence[MediaFile]) -> Question:
        try:
            return to_question(item, media, video=False, task=benchmark.task, source=name, line=number)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None

    waiting: list[tuple[int, str, Item | None, str | list[MediaFile]]] = []
    for number, where, row in read_rows(files):
        try:
            item = read(row, style)
            media = _cell(item.pictures if item else row.get("image"), pictures, find, os.path.basename(where))
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        if isinstance(media, str):
            media = by_index.get(media, media)
        if "index" in row and not isinstance(media, str):
            by_index[str(row["index"])] = media
        if waiting or isinstance(media, str):  # for a row that is still to come; questions keep their order
            waiting.append((number, where, item, media))
        elif item is not None:
            yield question(number, where, item, media)
    for number, where, item, media in waiting:
        if isinstance(media, str) and media not in by_index:
            raise DataError(
                f"{where}: its picture is that of row `{media}`, which does not hold one. Fetch the file again."
            )
        if item is not None:
            yield question(number, where, item, by_index[media] if isinstance(media, str) else media)


def _cell(cell: Any, pictures: PictureFile, find: Callable[[str], MediaFile], label: str) -> str | list[MediaFile]:
    """The pictures of a cell, or the index of the row that holds them (as VLMEvalKit writes them once)."""
    if isinstance(cell, str) and 0 < len(cell) <= MOST_REFERENCE and re.fullmatch(r"[\w.-]+", cell):
        return cell
    return read_pictures(cell, pictures, find, label)


def _videos(
    name: str, benchmark: Benchmark, files: Sequence[Path], folder: Path, style: Style, subtitles: bool
) -> Iterator[Question]:
    """Questions about videos in folders; one that is not there has no path yet, for all are named at once."""
    read = cast(VideoReader, benchmark.read)
    number = 0
    for file in files:
        for _, where, row in read_rows([file]):
            number += 1
            try:
                item, place = read(row, style, folder, subtitles, file)
                if not item.golds:
                    raise DataError("it has no answer. Splits without answers are scored by their publisher.")
                media = place.find(folder) or MediaFile(label=place.paths[0])
                yield to_question(item, [media], video=True, task=benchmark.task, source=name, line=number)
            except DataError as error:
                raise DataError(f"{where}: {error}") from None


def _check_videos(name: str, benchmark: Benchmark, folder: Path, questions: Sequence[Question]) -> None:
    """Raise a ConfigError that says which videos are missing and where they belong."""
    missing = {str(q.sample.videos[0].label): q for q in questions if q.sample.videos[0].path is None}
    if missing:
        first = next(iter(missing))
        categories = sorted({str(question.fields["category"]) for question in missing.values()})
        raise ConfigError(
            f"{name}: {counted(len(missing), 'video')} missing below {folder}, the first is {first} (categories: "
            f"{', '.join(categories)}). Download {benchmark.source}; or ask for other categories."
        )
