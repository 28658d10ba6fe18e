"""Ask a model one question about text, pictures or a video.

    python tools/chat.py --model HF_DIR_or_CKPT [--image FILE ...] [--video FILE ...] "question"
    torchrun --nproc-per-node 2 tools/chat.py --context-parallel-size 2 --model HF_DIR_or_CKPT ... "question"

The answer goes to standard output as it comes, everything else to standard error. Exit status 2 for a usage error (a
missing file, a text-only model asked about a picture), 1 for a file or checkpoint that cannot be read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vita import log
from megatron_vita.data.sample import Image, MediaFile, Message, Part, Sample, Text, Video
from megatron_vita.errors import ConfigError, VitaError
from megatron_vita.inference.arguments import (
    add_engine_arguments,
    add_sampling_arguments,
    engine_settings,
    sampling_config,
)
from megatron_vita.inference.leader import fail

if TYPE_CHECKING:
    from megatron_vita.inference.engine import Engine
    from megatron_vita.inference.prompt import Generation, Request


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
    add_sampling_arguments(parser)
    add_engine_arguments(parser)
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


def say(engine: Engine, request: Request) -> Generation:
    """Print an answer as it comes, without the white space at its ends.

    Raises:
        VitaError: why there is none.
    """
    held, begun = "", False
    engine.add(request)
    while engine.busy:
        for output in engine.step():
            if isinstance(output.outcome, VitaError):
                raise output.outcome
            text = held + output.text if begun else output.text.lstrip()
            words = text.rstrip()
            held, begun = text[len(words) :], begun or bool(words)
            print(words, end="", flush=True)
            if output.outcome is not None:
                print()
                return output.outcome
    raise AssertionError("the engine has nothing to do, but has not answered")


def main(argv: Sequence[str] | None = None) -> int:
    """Answer; 0 on success, 2 for a usage error, 1 otherwise."""
    args = arguments(argv)
    log.configure()
    try:
        sample = question_sample(args.question, args.image, args.video)
        sampling, settings = sampling_config(args), engine_settings(args)
        if not Path(args.model).is_dir():
            raise ConfigError(f"{args.model}: no such folder. Give a checkpoint or a Hugging Face folder with --model.")
        from megatron_vita.inference.engine import Engine  # only once the question is sound: importing takes seconds
        from megatron_vita.inference.prompt import Request

        engine = Engine.load(args.model, settings, video_backend=args.video_backend)
        if not engine.leader:
            engine.follow()
            return 0
        try:
            answer = say(engine, Request("chat", sample, sampling, args.max_new_tokens))
        except VitaError:
            engine.pause()  # not after any other error: who knows where the other ranks are
            raise
        engine.pause()
    except VitaError as error:
        return fail("chat", error)
    if not answer.finished:
        print(f"chat: cut after {len(answer.ids)} tokens; allow more with --max-new-tokens", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
