"""Ask a model one question about text, pictures or a video.

    python tools/chat.py --model HF_DIR_or_CKPT [--image FILE ...] [--video FILE ...] "question"

The answer goes to standard output, everything else to standard error. Exit status 2 for a usage error (a missing file,
a text-only model asked about a picture), 1 for a file or checkpoint that cannot be read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_vita import log
from megatron_vita.data.sample import Image, MediaFile, Message, Part, Sample, Text, Video
from megatron_vita.errors import ConfigError, VitaError


def question_sample(question: str, images: Sequence[str], videos: Sequence[str]) -> Sample:
    """One user turn: the pictures, then the videos, then the question.

    Raises:
        ConfigError: an empty question, or a file that does not exist.
    """
    if not question.strip():
        raise ConfigError("the question is empty. Say what you want to know.")
    for path in (*images, *videos):
        if not Path(path).exists():
            raise ConfigError(f"{path}: no such file. Check --image and --video.")
    parts: list[Part] = [Image(number) for number in range(len(images))]
    parts += [Video(number) for number in range(len(videos))]
    text = "\n" + question if parts else question  # as the open datasets write it: <image>, a newline, the question
    return Sample(
        messages=(Message("user", (*parts, Text(text))),),
        images=tuple(MediaFile(path=path) for path in images),
        videos=tuple(MediaFile(path=path) for path in videos),
        source="chat",
        line=1,
    )


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("question", nargs="?", help="what to ask")
    parser.add_argument("--model", required=True, help="checkpoint folder, or exported Hugging Face folder")
    parser.add_argument("--image", nargs="+", action="extend", default=[], help="pictures, in order")
    parser.add_argument("--video", nargs="+", action="extend", default=[], help="video, or folder of frames")
    parser.add_argument("--video-backend", choices=("auto", "pyav", "decord"), default="auto", help="decodes the video")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token always")
    parser.add_argument("--top-k", type=int, default=0, help="draw among the k likeliest tokens; 0: all")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw among the likeliest tokens of this total share")
    parser.add_argument("--seed", type=int, default=1234, help="of the draw")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="to compute in")
    given = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(given)
    if args.question is None:
        # `--image a.png b.png "question"`: argparse takes all three as pictures, but the last word is the question.
        files = next((files for files in (args.image, args.video) if len(files) > 1 and files[-1] == given[-1]), None)
        if files is None:
            parser.error("no question. Put it last, in quotes.")
        args.question = files.pop()
    if args.max_new_tokens < 1:
        parser.error(f"--max-new-tokens {args.max_new_tokens}: must be at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Answer; 0 on success, 2 for a usage error, 1 otherwise."""
    args = arguments(argv)
    log.configure()
    try:
        sample = question_sample(args.question, args.image, args.video)
        if not Path(args.model).is_dir():
            raise ConfigError(f"{args.model}: no such folder. Give a checkpoint or a Hugging Face folder with --model.")
        # Only once the question is sound: importing torch takes seconds.
        from megatron_vita.inference.engine import Engine
        from megatron_vita.inference.sampling import SamplingConfig
        from megatron_vita.inference.settings import EngineSettings

        sampling = SamplingConfig(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed)
        engine = Engine.load(args.model, EngineSettings(dtype=args.dtype), video_backend=args.video_backend)
        answer = engine.generate([sample], max_new_tokens=args.max_new_tokens, sampling=sampling)[0]
    except VitaError as error:
        print(f"chat: {error}", file=sys.stderr)
        return error.exit_status
    print(answer.text.strip())
    if not answer.finished:
        print(f"chat: cut after {len(answer.ids)} tokens; allow more with --max-new-tokens", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
