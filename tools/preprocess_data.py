"""Compile open datasets into packed shards.

python tools/preprocess_data.py --data-config MIX.yaml --tokenizer DIR --output DIR/PREFIX --seq-length N
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Sequence

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the work is parallel over processes

from megatron_vita import log
from megatron_vita.config import IMAGE_NORMS, LAYOUTS
from megatron_vita.data.compile import rejected
from megatron_vita.data.compile.engines import ENGINES
from megatron_vita.data.compile.run import Options, run
from megatron_vita.data.media.video.open import BACKENDS, VideoLimits
from megatron_vita.data.rejects import counted
from megatron_vita.data.sources.lint import lint
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.errors import VitaError

LIMITS = VideoLimits()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(description="Compile open datasets into packed shards.", allow_abbrev=False)
    add = out.add_argument
    add("--data-config", required=True, metavar="MIX.yaml", help="data mix: files, forms, ratios")
    add("--lint", action="store_true", help="say what is missing from the mix, or twice in it, and end: status 1 if so")
    add("--tokenizer", metavar="DIR_or_MODEL", help="Hugging Face folder or SentencePiece model")
    add("--output", metavar="DIR/PREFIX", help="shards to write")
    add("--seq-length", type=int, metavar="N", help="tokens of a pack")
    add("--layout", choices=LAYOUTS, default="internvl", help="token layout of pictures and videos")
    add("--image-size", type=int, default=448, help="side of a tile in pixels")
    add("--patch-size", type=int, default=14, help="side of a patch in pixels")
    add("--min-tiles", type=int, default=1, help="fewest tiles of a picture")
    add("--max-tiles", type=int, default=12, help="most tiles of a picture, thumbnail not counted")
    add("--image-norm", choices=sorted(IMAGE_NORMS), default="imagenet", help="pixel mean and deviation")
    add("--max-frames", type=int, default=128, help="most frames of a video")
    add("--max-fps", type=float, default=1.0, help="most frames a second")
    add("--video-timestamps", action="store_true", help="tell when each frame of a video is shown (internvl only)")
    add("--video-timeout", type=float, default=LIMITS.timeout, metavar="SECONDS", help="decoding one video may take")
    add("--video-memory", type=int, default=LIMITS.memory, metavar="MIB", help="decoding one video may hold")
    add("--video-backend", choices=BACKENDS, default="auto", help="auto: pyav; decord: only where it is proven exact")
    add("--overlong", choices=("reject", "truncate", "reduce-frames"), default="reduce-frames", help="policy")
    add("--seed", type=int, default=0, help="decides which records a ratio takes, and their order")
    add("--media", choices=("embed", "reference"), default="embed", help="store pictures, or refer to their files")
    add("--verify-media", choices=("structure", "decode"), default="structure", help="how closely pictures are checked")
    add("--max-rejected", type=float, metavar="SHARE", help="of a source's records; more refuse the run (default 0.5)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes, on all machines together")
    add("--resume", action="store_true", help="go on where a killed run stopped; reuse an older set")
    add("--engine", choices=ENGINES, default="local", help="this machine, or a ray cluster with one file system")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    commands = parser()
    args = commands.parse_args(argv)
    if args.lint:
        return _lint(args.data_config)
    needed = {"--tokenizer": args.tokenizer, "--output": args.output, "--seq-length": args.seq_length}
    missing = [flag for flag, value in needed.items() if value is None]
    if missing:
        commands.error(f"the following arguments are required: {', '.join(missing)}")
    log.configure()
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex")  # megatron-core's, and no news here
    signal.signal(signal.SIGTERM, _stop)  # so that processes are ended
    try:
        spec = PreprocessSpec(
            layout=args.layout,
            image_size=args.image_size,
            patch_size=args.patch_size,
            min_tiles=args.min_tiles,
            max_tiles=args.max_tiles,
            image_norm=args.image_norm,
            max_frames=args.max_frames,
            max_fps=args.max_fps,
            video_timestamps=args.video_timestamps,
        )
        limits = VideoLimits(timeout=args.video_timeout, memory=args.video_memory)
        names = ("data_config", "tokenizer", "output", "seq_length", "overlong", "seed", "media", "verify_media")
        more = ("video_backend", "workers", "resume", "engine", "max_rejected")
        given = {name: getattr(args, name) for name in (*names, *more)}
        manifest = run(Options(spec=spec, video_limits=limits, **given))
    except VitaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("error: stopped; nothing was published. Run again with --resume to go on", file=sys.stderr)
        return 1
    totals = manifest.totals
    print("\n".join([*rejected.warnings(manifest.sources), rejected.total(manifest.sources)]))
    print(
        f"wrote {args.output}: {counted(totals['samples'], 'sample')} of {counted(totals['read'], 'record')} "
        f"({totals['rejected']} rejected) in {counted(totals['packs'], 'pack')} of {args.seq_length}, "
        f"{100 * manifest.packing['fill']:.1f}% full, "
        f"{totals['tokens']} tokens, {counted(totals['tiles'], 'tile')}"
    )
    return 0


def _lint(mix: str) -> int:
    try:
        report = lint(mix)
    except VitaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    print(report)
    return 1 if report.wrong else 0


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def _utf8_names() -> None:
    """Start again where the locale would spell file names otherwise: a mix means the same files everywhere."""
    if sys.getfilesystemencoding() != "utf-8":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


if __name__ == "__main__":
    _utf8_names()
    sys.exit(main())
