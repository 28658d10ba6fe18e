"""Ask models questions and score the answers: files of questions, published benchmarks, needles in haystacks.

    python tools/evaluate.py --model HF_DIR_or_CKPT [...] --data FILE [...] [--task exact_match] --output DIR
    python tools/evaluate.py --model ... --data videos.jsonl --frames 8 64 256 --output DIR
    python tools/evaluate.py --model ... --benchmark mmmu videomme --root DOWNLOADS --output DIR
    python tools/evaluate.py --model ... --needle visual --frames 8 64 4096 --depths 11 --output DIR
    python tools/evaluate.py --model ... --needle text --lengths 4096 131072 --output DIR
    torchrun --nproc-per-node 2 tools/evaluate.py --context-parallel-size 2 --model ... --data ... --output DIR

A data file holds one record a line in Long-VITA's `messages` form; its last assistant turn is the reference answer, its
media paths are relative to the file (or to --media-root). Other keys of a record (`category`, `duration`, ...) go along
into the results, and the report has a table by each of these two.

A benchmark is read from the files that its publisher (or VLMEvalKit) gives, and its answers are judged as the field
does.

A needle is a picture of a video, or a sentence of a text, that is asked for. Without --needles and --haystack they are
drawn and written by the program. docs/evaluate.md has the forms of the files.

Writes DIR/results.jsonl, a line an answer as it comes, then DIR/summary.json, DIR/report.md and its plots. Run again
after a kill, and only what is not answered yet is asked, and what could not be read. Where anything changed that
decides an answer (model, tokenizer, template, preprocessing, settings, question, media, packages), it is asked anew.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vita import log
from megatron_vita.errors import VitaError
from megatron_vita.inference.arguments import (
    add_engine_arguments,
    add_sampling_arguments,
    engine_settings,
    sampling_config,
)
from megatron_vita.inference.leader import fail, leads

if TYPE_CHECKING:
    from megatron_vita.evaluation.questions import QuestionSet


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--model", nargs="+", action="extend", required=True, help="checkpoints or Hugging Face folders"
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder for results.jsonl, summary.json and report.md")
    add("--media-root", type=Path, help="folder of the media (default: each data file's own)")
    add("--frames", type=int, nargs="+", default=[], help="most frames of each video; every number is asked in turn")
    add("--zero-tiles", action="store_true", help="show black tiles: what is known without looking?")
    add("--video-backend", choices=("auto", "pyav", "decord"), default="auto", help="decodes videos")
    add("--limit", type=int, help="only the first so many questions of each set")
    add("--max-new-tokens", type=int, help="longest answer (default: 32; with --benchmark 128)")
    add("--workers", type=int, default=1, help="processes that share the questions")
    add = parser.add_argument_group("files of questions").add_argument
    add("--data", nargs="+", action="extend", default=[], help="JSONL, or parquet")
    add("--task", help="how answers are judged (default: exact_match)")
    add = parser.add_argument_group("published benchmarks").add_argument
    add("--benchmark", nargs="+", action="extend", default=[], metavar="NAME", help="see docs/evaluate.md")
    add("--root", type=Path, help="where they lie: DIR/NAME, DIR, or a data file of the benchmark")
    add("--prompt-style", help="long_vita (default), vlmevalkit or lmms_eval")
    add("--subtitles", action="store_true", help="list the subtitles before the question")
    add("--category", nargs="+", action="extend", default=[], help="only questions of these categories")
    add = parser.add_argument_group("needles in haystacks").add_argument
    add("--needle", nargs="+", choices=("visual", "text"), default=[], help="a frame of a video, a sentence of a text")
    add("--lengths", type=int, nargs="+", default=[], help="tokens of the texts; of videos see --frames")
    add("--depths", type=float, nargs="+", default=[], help="a number of depths, or depths from 0 to 1 (default: 11)")
    add("--samples", type=int, help="needles of each length and depth (default: 5)")
    add("--needles", type=Path, help="JSONL of {image or text, question, answer} (default: generated)")
    add("--haystack", type=Path, help="folder of frames or video; or text file (default: generated)")
    add_sampling_arguments(parser)
    add_engine_arguments(parser)
    args = parser.parse_args(argv)
    for name in ("limit", "max_new_tokens", "workers", "samples"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value}: must be at least 1")
    if not args.data and not args.needle and not args.benchmark:
        parser.error("nothing to ask: give --data, --benchmark or --needle")
    if bool(args.benchmark) != bool(args.root):
        parser.error("--benchmark and --root, the folder that it was downloaded into, go together")
    if not args.benchmark and (args.subtitles or args.category or args.prompt_style):
        parser.error("--subtitles, --category and --prompt-style go with --benchmark")
    if args.task and not args.data:
        parser.error("--task goes with --data: benchmarks and needles are judged by tasks of their own")
    if args.media_root and not (args.data or "visual" in args.needle):
        parser.error("--media-root goes with --data and --needle visual; media of a benchmark lie below --root")
    if args.frames and not (args.data or args.benchmark or "visual" in args.needle):
        parser.error("--frames: texts have none. Give their tokens with --lengths")
    if "visual" in args.needle and not args.frames:
        parser.error("--needle visual: give the lengths of the clips with --frames")
    if ("text" in args.needle) != bool(args.lengths):
        parser.error("--needle text and --lengths, the tokens of its texts, go together")
    if not args.needle and (args.needles or args.haystack or args.depths or args.samples):
        parser.error("--needles, --haystack, --depths and --samples go with --needle")
    if len(args.needle) > 1 and (args.needles or args.haystack):
        parser.error("--needles and --haystack fit one kind of needle: give --needle visual or --needle text")
    return args


def question_sets(args: argparse.Namespace) -> list[QuestionSet]:
    """What the command line asks; nothing is read yet. Raises ConfigError for a grid that cannot be."""
    from megatron_vita.evaluation.benchmarks import benchmark_set
    from megatron_vita.evaluation.needle.grid import Grid, depths_of
    from megatron_vita.evaluation.needle.sets import text_sets, visual_sets
    from megatron_vita.evaluation.questions import data_file

    work = args.output / "media"
    sets = [data_file(path, args.media_root, work) for path in args.data]
    worded = {"style": args.prompt_style or "long_vita", "subtitles": args.subtitles, "categories": args.category}
    for name in args.benchmark:
        root = args.root / name if (args.root / name).is_dir() else args.root
        sets.append(benchmark_set(name, root, work=work, **worded))
    if args.frames:
        sets = [one for whole in sets for one in whole.sweep(args.frames)]
    if args.needle:
        grid = Grid(depths=depths_of(args.depths or [11]), samples=args.samples or 5, seed=args.seed)
        given = {"haystack": args.haystack, "needles": args.needles}
        if "visual" in args.needle:
            sets += visual_sets(args.frames, grid, work, media_root=args.media_root, **given)
        if "text" in args.needle:
            sets += text_sets(args.lengths, grid, args.model, **given)
    return sets


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
        from megatron_vita.evaluation.report.summary import table

        settings = EvalSettings(
            task=args.task or "exact_match",
            zero_tiles=args.zero_tiles,
            video_backend=args.video_backend,
            max_new_tokens=args.max_new_tokens or (128 if args.benchmark else 32),
            sampling=sampling,
            engine=engine,
        )
        rows = evaluate(args.model, question_sets(args), args.output, settings, limit=args.limit, workers=args.workers)
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
            f"evaluate: {unreadable} questions could not be read or are too long, and count as wrong (see `error` in "
            "the results)",
            file=sys.stderr,
        )
    print(f"wrote {', '.join(str(args.output / name) for name in ('results.jsonl', 'summary.json', 'report.md'))}")
    return 1 if unreadable else 0


if __name__ == "__main__":  # the guard matters where processes are spawned
    sys.exit(main())
