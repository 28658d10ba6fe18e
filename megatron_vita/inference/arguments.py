"""Command-line flags that tools share: layout and scheduling of the engine, sampling. Nothing here imports torch."""

from __future__ import annotations

import argparse
from dataclasses import fields

from megatron_vita.config import rope_scaling_json
from megatron_vita.inference.sampling_config import SamplingConfig
from megatron_vita.inference.settings import DTYPES, LM_HEADS, EngineSettings


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each field of EngineSettings; `engine_settings` reads them."""
    default = EngineSettings()
    group = parser.add_argument_group("engine (several ranks: start with torchrun)")
    add = group.add_argument
    add("--tensor-model-parallel-size", type=int, default=1, help="ranks that split each weight matrix (default: 1)")
    add("--context-parallel-size", type=int, default=1, help="ranks that split prompts and their cache (default: 1)")
    add("--pipeline-model-parallel-size", type=int, default=1, help="ranks that hold a run of layers (default: 1)")
    add("--dtype", choices=DTYPES, default=default.dtype, help="to compute in (default: %(default)s)")
    add(
        "--kv-cache-memory", help="keys and values of a rank: share of free memory, or size such as 4GiB (default: 0.5)"
    )
    add("--block-size", type=int, default=default.block_size, help="tokens of a cache block (default: %(default)s)")
    add(
        "--chunked-prefill-size",
        type=int,
        default=default.chunked_prefill_size,
        help="most prompt tokens of a step on a context-parallel rank (default: %(default)s)",
    )
    add(
        "--max-num-seqs",
        type=int,
        default=default.max_num_seqs,
        help="most sequences decoded together (default: %(default)s)",
    )
    add(
        "--lm-head",
        choices=LM_HEADS,
        default=default.lm_head,
        help="rows of the vocabulary product: only those asked for, or all for comparison (default: %(default)s)",
    )
    add("--enable-prefix-caching", action="store_true", help="requests that begin alike share keys and values")
    add(
        "--video-timeout",
        type=float,
        default=default.video_timeout,
        help="seconds that decoding one video may take (default: %(default)s)",
    )
    add = parser.add_argument_group("model (default: as it was trained)").add_argument
    add(
        "--rope-scaling",
        type=rope_scaling_json,
        metavar="JSON",
        help="""for prompts beyond the trained length, e.g. '{"rope_type": "yarn", "factor": 4.0}'""",
    )
    add("--rotary-base", type=float, help="base of the rotary embedding (rope_theta)")
    add("--max-position-embeddings", type=int, help="tokens of the longest prompt with its answer")
    add("--max-frames", type=int, help="most frames taken from a video")


def engine_settings(args: argparse.Namespace) -> EngineSettings:
    """The settings that the flags of `add_engine_arguments` say.

    Raises:
        ConfigError: a value that cannot work.
    """
    return EngineSettings(**{field.name: getattr(args, field.name) for field in fields(EngineSettings)})


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `sampling_config` reads; by default the likeliest token is taken always."""
    add = parser.add_argument_group("sampling").add_argument
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest token always (default)")
    add("--top-k", type=int, default=0, help="draw among the k likeliest tokens; 0: all")
    add("--top-p", type=float, default=1.0, help="draw among the likeliest tokens of this total share")
    add("--min-p", type=float, default=0.0, help="draw among tokens at least this times as likely as the likeliest")
    add("--repetition-penalty", type=float, default=1.0, help="makes tokens of prompt and answer less likely; 1: none")
    add("--presence-penalty", type=float, default=0.0, help="makes tokens of the answer less likely; -2 to 2")
    add("--frequency-penalty", type=float, default=0.0, help="the same for each time that a token is in the answer")
    add("--seed", type=int, default=1234, help="of the draw")
    add("--stop", action="append", default=[], help="string that ends the answer; may be given several times")
    add("--stop-token-id", type=int, action="append", default=[], help="id of a token that does so; likewise")
    add("--ignore-eos", action="store_true", help="go on behind the model's own end of an answer")
    add("--min-tokens", type=int, default=0, help="nothing ends the answer before it has so many tokens")


def sampling_config(args: argparse.Namespace) -> SamplingConfig:
    """How tokens are chosen by the flags of `add_sampling_arguments`.

    Raises:
        ConfigError: a value that cannot work.
    """
    return SamplingConfig(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        presence_penalty=args.presence_penalty,
        frequency_penalty=args.frequency_penalty,
        seed=args.seed,
        stop=tuple(args.stop),
        stop_token_ids=tuple(args.stop_token_id),
        ignore_eos=args.ignore_eos,
        min_tokens=args.min_tokens,
    )
