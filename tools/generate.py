"""Answer a file of requests in the format of OpenAI's batch API, as `vllm run-batch` takes it.

    python tools/generate.py --model HF_DIR_or_CKPT --input requests.jsonl --output answers.jsonl [--media-root DIR]
    torchrun --nproc-per-node 2 tools/generate.py --context-parallel-size 2 --model ... --input ... --output ...

A line of the input is {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [...]}};
the body takes OpenAI's fields and vLLM's additions (top_k, min_p, repetition_penalty, stop_token_ids, ignore_eos,
min_tokens, prompt_logprobs). Pictures and videos ("image_url", "video_url") are paths below --media-root or data URIs.
Without `max_tokens` an answer is as long as fits; without `seed` the seed follows from custom_id, so a run repeats.

Each request gets one line of the output, {"id", "custom_id", "response": {"status_code", "request_id", "body"},
"error"}, as soon as it is finished, so not in the order of the input. One that cannot be answered gets status code 400
and OpenAI's error object, and stops nobody.

Run again after a kill, and only what is not answered yet is asked, and what failed. A request that has changed since,
or whose media, model, dtype or decoder have, is asked anew.

Exit status 0 if every request has its answer, 1 if one failed or the run broke off, 2 for a usage error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_vita import log
from megatron_vita.errors import ConfigError, VitaError
from megatron_vita.inference.arguments import add_engine_arguments, engine_settings
from megatron_vita.inference.leader import fail, leads


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="checkpoint folder, or exported Hugging Face folder")
    parser.add_argument("--input", type=Path, required=True, help="requests, a JSON object a line")
    parser.add_argument("--output", type=Path, required=True, help="answers; gone on with if it is there")
    parser.add_argument("--media-root", type=Path, help="folder of the media (default: that of the input)")
    parser.add_argument("--video-backend", choices=("auto", "pyav", "decord"), default="auto", help="decodes videos")
    add_engine_arguments(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Answer; 0 if all is answered, 2 for a usage error, 1 otherwise."""
    args = arguments(argv)
    log.configure()
    try:
        settings = engine_settings(args)
        if not Path(args.model).is_dir():
            raise ConfigError(f"{args.model}: no such folder. Give a checkpoint or a Hugging Face folder with --model.")
        if not args.input.is_file():
            raise ConfigError(f"{args.input}: no such file. Check --input.")
        from megatron_vita.inference.generate import generate  # only now: importing torch takes seconds

        done = generate(
            args.model,
            args.input,
            args.output,
            settings,
            media_root=args.media_root,
            video_backend=args.video_backend,
        )
    except VitaError as error:
        return fail("generate", error)
    except KeyboardInterrupt:
        if leads():
            print(f"generate: stopped; the answers so far are in {args.output}, run again to continue", file=sys.stderr)
        return 1
    if done is None:
        return 0
    if done.failed:
        print(f"generate: {done.failed} requests failed (see `error` in the answers)", file=sys.stderr)
    print(f"wrote {args.output}: {done.answered} answered, {done.kept} kept, {done.failed} failed")
    return 1 if done.failed else 0


if __name__ == "__main__":
    sys.exit(main())
