"""Ask models the questions of JSONL files and count the right answers.

    python tools/evaluate.py --model HF_DIR_or_CKPT [...] --task exact_match --data FILE [...] --output DIR
    torchrun --nproc-per-node 2 tools/evaluate.py --context-parallel-size 2 --model ... --data ... --output DIR

A data file holds one record a line in Long-VITA's `messages` form; its last assistant turn is the reference answer, its
media paths are relative to the file (or to --media-root). Other keys of a record (`frames`, `depth`, ...) go along into
the results.

Writes DIR/results.jsonl, a line an answer as it comes, and DIR/summary.json. Run again after a kill, and only what is
not answered yet is asked, and what could not be read. Where anything changed that decides an answer (model, tokenizer,
template, preprocessing, settings, question, media, packages), it is asked anew.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_vita import log
from megatron_vita.errors import VitaError
from megatron_vita.inference.arguments import (
    add_engine_arguments,
    add_sampling_arguments,
    engine_settings,
    sampling_config,
)
from megatron_vita.inference.leader import fail, leads


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--model", nargs="+", action="extend", required=True, help="checkpoints or Hugging Face folders"
    )
    parser.add_argument("--task", default="exact_match", help="how answers are judged")
    parser.add_argument("--data", nargs="+", action="extend", required=True, help="JSONL files of questions")
    parser.add_argument("--output", type=Path, required=True, help="folder for results.jsonl and summary.json")
    parser.add_argument("--media-root", type=Path, help="folder of the media (default: each data file's own)")
    parser.add_argument("--zero-tiles", action="store_true", help="show black tiles: what is known without looking?")
    parser.add_argument("--video-backend", choices=("auto", "pyav", "decord"), default="auto", help="decodes videos")
    parser.add_argument("--limit", type=int, help="only the first so many lines of each file")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="longest answer")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the questions")
    add_sampling_arguments(parser)
    add_engine_arguments(parser)
    args = parser.parse_args(argv)
    for name in ("limit", "max_new_tokens", "workers"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value}: must be at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate; 0 on success, 2 for a usage error, 1 otherwise, also if a question could not be read."""
    args = arguments(argv)
    if args.workers > 1:
        # Before torch is imported: a process forked while OpenMP's threads exist may wait for them for ever.
        os.environ["OMP_NUM_THREADS"] = "1"
    log.configure()
    try:
        sampling, engine = sampling_config(args), engine_settings(args)
        from megatron_vita.evaluation.evaluate import EvalSettings, evaluate
        from megatron_vita.evaluation.score import table

        settings = EvalSettings(
            task=args.task,
            zero_tiles=args.zero_tiles,
            video_backend=args.video_backend,
            max_new_tokens=args.max_new_tokens,
            sampling=sampling,
            engine=engine,
        )
        rows = evaluate(
            args.model,
            args.data,
            args.output,
            settings,
            media_root=args.media_root,
            limit=args.limit,
            workers=args.workers,
        )
    except VitaError as error:
        return fail("evaluate", error)
    except KeyboardInterrupt:
        print(
            f"evaluate: stopped; the answers so far are kept in {args.output}, run again to continue", file=sys.stderr
        )
        return 1
    if not leads():
        return 0
    print(table(rows))
    unreadable = sum(row["unreadable"] for row in rows)
    if unreadable:
        print(
            f"evaluate: {unreadable} questions could not be read and count as wrong (see `error` in the results)",
            file=sys.stderr,
        )
    print(f"wrote {args.output / 'results.jsonl'} and {args.output / 'summary.json'}")
    return 1 if unreadable else 0


if __name__ == "__main__":  # the guard matters where processes are spawned
    sys.exit(main())
