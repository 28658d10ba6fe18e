"""Make Comic-9K of its published parts: one split tar of pages, and summary.jsonl.

    python tools/datasets/comic9k.py --summary summary.jsonl --pages images.tar.gz.aa --output DIR

Writes DIR/summary.jsonl in Long-VITA's form, and DIR/summary.rejects.jsonl with what is incomplete, and why. In a data
mix: `source: comic9k`. Exit status 2 for a usage error, 1 if nothing could be written.

Not verified: the keys of summary.jsonl (messages and turns are taken), and what its paths begin with (a page is found
by the end of its path, book and page at least).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from common import Built, run, write_records

from megatron_vita.data.media.names import natural_key
from megatron_vita.data.rejects import counted, reject
from megatron_vita.data.sources.fixes import IMAGE_TAG
from megatron_vita.data.sources.mappers import map_messages
from megatron_vita.data.sources.media_store import open_archive, unpack
from megatron_vita.data.sources.media_store.members import REJECTED
from megatron_vita.data.sources.readers import open_reader
from megatron_vita.errors import ConfigError, DataError

PAGES = "images.tar"


def build_comic(summary: Path, pages: Path, output: Path) -> Built:
    """Write `summary.jsonl` with the pages' real paths, and the pages as one tar that is read where it lies.

    Args:
        summary: the published summary.jsonl.
        pages: the first part of the published archive (`images.tar.gz.aa`), or a folder with the pages.
        output: folder to write to. An archive is unpacked to `images.tar` there, unless that is there already; from a
            folder nothing is copied, and paths are relative to it.

    Raises:
        ConfigError: an input is not there, or the output is the folder of the published archive.
        DataError: the archive is damaged.
    """
    if not summary.is_file():
        raise ConfigError(f"{summary}: no such file. Fetch VITA-MLLM/Comic-9K.")
    if output.resolve() == summary.resolve().parent:
        raise ConfigError(f"{output} is the published dataset's own folder. Choose another for the output.")
    known = _known_by(_page_names(pages, output))
    built = Built()

    def records() -> Iterator[tuple[int, Callable[[], dict[str, Any]]]]:
        reader = open_reader(summary)
        for line, published in reader.read(reader.index()):
            yield line, lambda published=published: record(published)  # type: ignore[misc]

    def record(published: Any) -> dict[str, Any]:
        if isinstance(published, DataError):
            raise published
        draft = map_messages(published, {})
        names = published.get("images") if isinstance(published, dict) else None
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise reject("media_missing", "`images` must be a list of pages.")
        found = [_page(known, name) for name in names]
        talk: list[tuple[str, str]] = []
        for turn in draft.turns:
            if turn.known_role is None or not isinstance(turn.content, str):
                code = "bad_role" if turn.known_role is None else "bad_record"
                raise reject(code, f"a turn of {turn.role!r} with {turn.content!r:.40}.")
            talk.append((turn.known_role, turn.content))
        asked = "".join(text for role, text in talk if role == "user")
        if IMAGE_TAG not in asked:
            talk = _with_tags(talk, len(found))
        elif asked.count(IMAGE_TAG) != len(found):
            raise reject(
                "media_count", f"{counted(len(found), 'page')}, but {counted(asked.count(IMAGE_TAG), 'placeholder')}."
            )
        if not talk or talk[-1][0] != "assistant" or not talk[-1][1].strip():
            raise reject("no_answer", "there is no summary.")
        built.unsorted += found != sorted(found, key=natural_key)
        return {"messages": [{"role": role, "content": text} for role, text in talk], "images": found}

    return write_records(output, records(), built)


def _with_tags(talk: list[tuple[str, str]], count: int) -> list[tuple[str, str]]:
    """All pages before the first question."""
    for number, (role, text) in enumerate(talk):
        if role == "user":
            return [*talk[:number], (role, f"{IMAGE_TAG * count}\n{text}"), *talk[number + 1 :]]
    return talk


def _page_names(pages: Path, output: Path) -> list[str]:
    """Paths of all pages, relative to the folder or in the archive."""
    if pages.is_dir():
        found = [Path(folder, name) for folder, _, names in os.walk(pages) for name in names]
        return [path.relative_to(pages).as_posix() for path in found]
    if not pages.is_file():
        raise ConfigError(f"{pages}: no such archive or folder. Name images.tar.gz.aa.")
    target = output / PAGES
    if not target.exists():
        output.mkdir(parents=True, exist_ok=True)
        partial = output / f".{PAGES}.partial"
        unpack(pages, partial)
        partial.replace(target)
    return [member.name for member in open_archive(target).members() if member.kind not in REJECTED]


def _known_by(names: Iterable[str]) -> dict[str, str | None]:
    """Every end of a page's path (book and page at least) -> the path; none where several end so."""
    known: dict[str, str | None] = {}
    for name in names:
        parts = name.split("/")
        for start in range(max(1, len(parts) - 1)):
            end = "/".join(parts[start:])
            known[end] = None if end in known else name
    return known


def _page(known: dict[str, str | None], reference: str) -> str:
    parts = [part for part in reference.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise reject("path_escape", f"{reference} leaves the folder.")
    for start in range(max(1, len(parts) - 1)):
        end = "/".join(parts[start:])
        if end in known:
            name = known[end]
            if name is None:
                raise reject("media_ambiguous", f"several pages are called {end}.")
            return name
    raise reject("media_missing", f"{reference} is no page of the archive.")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = out.add_argument
    add("--summary", required=True, type=Path, metavar="JSONL", help="the published summary.jsonl")
    add("--pages", required=True, type=Path, metavar="PART_or_DIR", help="images.tar.gz.aa, or a folder of pages")
    add("--output", required=True, type=Path, metavar="DIR", help="folder to write to")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return run(lambda: build_comic(args.summary, args.pages, args.output), args.output)


if __name__ == "__main__":
    sys.exit(main())
