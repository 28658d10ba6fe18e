"""Make the two datasets that Long-VITA's authors made themselves.

    python tools/build_dataset.py movienet --keyframes 240P --meta meta.v1.zip --output DIR
    python tools/build_dataset.py comic9k --summary summary.jsonl --pages images.tar.gz.aa --output DIR

Writes DIR/summary.jsonl in Long-VITA's form, and DIR/summary.rejects.jsonl with what is incomplete, and why. In a data
mix: `source: movienet` or `source: comic9k`. What is not verified of the inputs: docs/datasets.md.
Exit status 2 for a usage error, 1 if nothing could be written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_vita import log
from megatron_vita.data.sources.builders import SUMMARY
from megatron_vita.data.sources.builders_comic import build_comic
from megatron_vita.data.sources.builders_movienet import MOVIE_PROMPT, build_movienet
from megatron_vita.errors import VitaError


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    datasets = out.add_subparsers(dest="dataset", required=True, metavar="{movienet,comic9k}")
    movie = datasets.add_parser("movienet", help="MovieNet-Summary, from MovieNet's key frames and synopses")
    add = movie.add_argument
    add("--keyframes", required=True, type=Path, metavar="240P", help="folder with a folder or tar for each film")
    add("--meta", required=True, type=Path, metavar="ZIP_or_DIR", help="meta.v1.zip, or the folder in it")
    add("--form", choices=("images", "video"), default="images", help="a list of pictures, or the folder as a video")
    add("--max-images", type=int, default=1024, metavar="N", help="pictures of a film at most (form images)")
    add("--text-fields", nargs="+", default=["synopsis"], metavar="NAME", help="fields that may hold the synopsis")
    add("--gaps", action="store_true", help="take films with shots that have no key frame")
    add("--prompt", default=MOVIE_PROMPT, help="what the user asks")
    add("--output", required=True, type=Path, metavar="DIR", help="folder to write to")
    comic = datasets.add_parser("comic9k", help="Comic-9K, from its tar's parts")
    add = comic.add_argument
    add("--summary", required=True, type=Path, metavar="JSONL", help="the published summary.jsonl")
    add("--pages", required=True, type=Path, metavar="PART_or_DIR", help="images.tar.gz.aa, or a folder of pages")
    add("--output", required=True, type=Path, metavar="DIR", help="folder to write to")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    log.configure()
    try:
        if args.dataset == "movienet":
            built = build_movienet(
                args.keyframes,
                args.meta,
                args.output,
                form=args.form,
                most=args.max_images,
                text_fields=args.text_fields,
                gaps=args.gaps,
                prompt=args.prompt,
            )
        else:
            built = build_comic(args.summary, args.pages, args.output)
    except VitaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    why = ", ".join(f"{count} {code}" for code, count in sorted(built.refused.items()))
    if built.unsorted:
        print(f"{built.unsorted} books have pages out of the order of their names; they are written as they are")
    print(
        f"wrote {args.output / SUMMARY}: {built.written} of {built.read} records, {built.images} pictures"
        + (f"; refused: {why}" if why else "")
    )
    return 0 if built.written else 1


if __name__ == "__main__":
    sys.exit(main())
