"""The command line of tools/convert_ckpt.py. Exit status 0: done; 2: usage or settings; 130: interrupted; 1: everything
else."""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_vita import log as vita_log
from megatron_vita.config import ProjectorConfig
from megatron_vita.convert import exporter, importer, verify
from megatron_vita.convert.effort import Effort
from megatron_vita.convert.intact import check_bytes
from megatron_vita.convert.opening import OpenModel, OpenTower, open_any
from megatron_vita.convert.recipe import Recipe
from megatron_vita.convert.safetensors_writer import MAX_SHARD_BYTES
from megatron_vita.convert.text_files import image_token
from megatron_vita.convert.token_ids import tokens_that_differ
from megatron_vita.convert.values import type_name
from megatron_vita.errors import ConfigError, VitaError
from megatron_vita.files import no_room

log = logging.getLogger(__name__)

INTERRUPTED = 130
"""What shells report for Ctrl-C."""
LOGIT_TOLERANCE = 1e-4
_DTYPES = {type_name(one): one for one in (torch.float32, torch.bfloat16, torch.float16)}


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, do, and return the exit status. The last line on standard output says what was written or found."""
    arguments = _parser().parse_args(argv)
    vita_log.configure()
    try:
        status, last_line = arguments.act(arguments)
        sys.stdout.write(last_line + "\n")
        sys.stdout.flush()
    except VitaError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_status
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted. Nothing was published.\n")
        return INTERRUPTED
    except BrokenPipeError:  # `verify ... | head`: who read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        remedy = " Make room; TMPDIR names the folder of scratch files." if no_room(error) else ""
        sys.stderr.write(f"error: {error}.{remedy}\n")
        return 1
    return int(status)


def _import(arguments: argparse.Namespace) -> tuple[int, str]:
    if (arguments.llm is None) == (arguments.model is None):
        raise ConfigError("import: give either --llm (with --vision or without) or --model.")
    flags = _projector_flags(arguments)
    recipe = Recipe.read(arguments.config, flags) if arguments.config else None
    if arguments.model is not None:
        if arguments.vision:
            raise ConfigError("import --model takes a whole model: --vision belongs to --llm.")
        if flags:
            raise ConfigError(f"import --model takes a whole model with its projector: {flags[0]} belongs to --vision.")
        folder = importer.import_model(
            arguments.model,
            arguments.output,
            tokenizer=arguments.tokenizer,
            vocab_size=arguments.vocab_size,
            recipe=recipe,
            overwrite=arguments.overwrite,
            effort=_effort(arguments),
        )
    else:
        if arguments.vocab_size is not None:
            raise ConfigError("import --vocab-size belongs to --model and Long-VITA's Megatron layouts.")
        if flags and not arguments.vision:
            raise ConfigError(f"import {flags[0]} belongs to --vision: a decoder alone has no projector.")
        folder = importer.import_parts(
            arguments.llm,
            arguments.vision,
            arguments.output,
            tokenizer=arguments.tokenizer,
            projector=ProjectorConfig(
                ffn_hidden_size=arguments.projector_ffn_hidden_size, bias=arguments.projector_bias != "false"
            ),
            recipe=recipe,
            seed=arguments.seed,
            overwrite=arguments.overwrite,
            effort=_effort(arguments),
        )
    return 0, f"wrote {folder}"


def _projector_flags(arguments: argparse.Namespace) -> list[str]:
    """The given ones among the projector's settings, as a recipe takes them."""
    given = {
        "--projector-ffn-hidden-size": arguments.projector_ffn_hidden_size,
        "--projector-bias": arguments.projector_bias,
    }
    return [word for flag, value in given.items() if value is not None for word in (flag, str(value))]


def _effort(arguments: argparse.Namespace) -> Effort:
    return Effort(workers=arguments.workers, durable=arguments.fsync, progress=True)


def _export(arguments: argparse.Namespace) -> tuple[int, str]:
    if not 0 < arguments.max_shard_gb < math.inf:
        raise ConfigError(f"export: --max-shard-gb {arguments.max_shard_gb:g} must be a number above 0.")
    folder = exporter.export(
        arguments.checkpoint,
        arguments.output,
        arguments.format,
        tokenizer=arguments.tokenizer,
        dtype=_DTYPES[arguments.dtype] if arguments.dtype else None,
        max_shard_bytes=int(arguments.max_shard_gb * 1e9),
        vocabulary_multiple=arguments.make_vocab_size_divisible_by,
        overwrite=arguments.overwrite,
        effort=_effort(arguments),
    )
    return 0, f"wrote {folder}"


def _verify(arguments: argparse.Namespace) -> tuple[int, str]:
    if arguments.b is None:
        if arguments.logits or arguments.tolerance:
            raise ConfigError("verify: --logits and --tolerance compare two models. Name a second one.")
        return 0, check_bytes(Path(arguments.a), progress=True)
    a, b = open_any(arguments.a), open_any(arguments.b)
    if arguments.logits:
        _check_comparable(a, b)
    found = list(verify.compare_tensors(a.tensors, b.tensors, workers=arguments.workers, progress=True))
    different = [one for one in found if not one.equal]
    for one in different[: arguments.show]:
        note = f"  ({one.note})" if one.note else ""
        sys.stdout.write(f"{one.name}: max difference {one.max_difference:.3g}, cosine {one.cosine:.9f}{note}\n")
    if len(different) > arguments.show:
        sys.stdout.write(f"... and {len(different) - arguments.show} more (--show)\n")
    # what is no number is the worst difference; max alone would pass it over, for it compares with nothing
    worst = max((one.max_difference for one in found), key=lambda one: (one != one, one), default=0.0)
    line = f"{len(found)} tensors, {len(different)} differ, max difference {worst:.3g}"
    failed = bool(different) and not worst <= arguments.tolerance
    if isinstance(a, OpenModel) and isinstance(b, OpenModel):
        for difference in tokens_that_differ(a.tokenizer_dir, b.tokenizer_dir):
            sys.stdout.write(f"tokenizers differ: {difference}\n")
            failed = True
        if arguments.logits:
            gap = _logit_gap(a, b)
            line += f"; logits differ by {gap:.3g}"
            failed = failed or not gap <= LOGIT_TOLERANCE
    return int(failed), ("different: " if failed else "equal: ") + line


def _check_comparable(a: OpenModel | OpenTower, b: OpenModel | OpenTower) -> None:
    """Raises ConfigError for two models that have no logits of one prompt and one vocabulary."""
    if isinstance(a, OpenTower) or isinstance(b, OpenTower):
        raise ConfigError(f"--logits: {(a if isinstance(a, OpenTower) else b).path} is a vision tower, which has none.")
    if (a.model.vision is None) != (b.model.vision is None):
        raise ConfigError(f"--logits: only one of {a.path} and {b.path} has a vision tower. Compare the tensors alone.")
    if a.model.vocab_size != b.model.vocab_size:
        raise ConfigError(
            f"--logits: the vocabularies have {a.model.vocab_size} and {b.model.vocab_size} rows. Compare models "
            "of one vocabulary (export pads with --make-vocab-size-divisible-by)."
        )


def _logit_gap(a: OpenModel, b: OpenModel) -> float:
    from megatron_vita.convert import logits  # loads megatron-core, which the other commands do without

    prompt = logits.make_probe_prompt(a.model, image_token(a, b) if a.model.vision else -1)
    return (logits.run(a, prompt) - logits.run(b, prompt)).abs().max().item()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="convert_ckpt.py", description="Weights between Hugging Face and checkpoints.", allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, metavar="{import,export,verify}")

    command = commands.add_parser("import", help="Hugging Face folders -> a checkpoint", allow_abbrev=False)
    command.add_argument("--llm", type=_place, metavar="HF_DIR", help="decoder (Qwen2, Qwen2.5, Qwen3, Llama)")
    command.add_argument(
        "--vision", type=_place, metavar="HF_DIR", help="tower: InternViT (either publisher's names), SigLIP, CLIP"
    )
    command.add_argument(
        "--model", type=_place, metavar="DIR", help="whole model: native InternVL, Long-VITA in any of its formats"
    )
    command.add_argument("--output", type=_place, metavar="CKPT", required=True, help="folder of checkpoints to write")
    command.add_argument(
        "--tokenizer", type=_place, metavar="DIR", help="tokenizer folder (default: the model's or decoder's own)"
    )
    command.add_argument(
        "--config",
        type=_place,
        metavar="RUN.yaml",
        help="recipe to train with: its projector is made, its model section must fit",
    )
    command.add_argument("--projector-ffn-hidden-size", type=_count, metavar="N", help="default: the decoder's width")
    command.add_argument("--projector-bias", choices=("true", "false"), help="default: true; both lie over --config")
    command.add_argument(
        "--vocab-size", type=_count, metavar="N", help="rows that are no padding, where a Megatron layout has no config"
    )
    command.add_argument("--seed", type=_seed, default=1234, help="of the projector's initial weights")
    command.add_argument("--overwrite", action="store_true", help="replace an earlier import")
    _add_writing(command)
    command.set_defaults(act=_import)

    command = commands.add_parser("export", help="a checkpoint -> a Hugging Face folder", allow_abbrev=False)
    command.add_argument(
        "--checkpoint", type=_place, metavar="CKPT", required=True, help="checkpoint, or folder of them (newest)"
    )
    command.add_argument("--output", type=_place, metavar="HF_DIR", required=True, help="folder to write")
    command.add_argument("--format", choices=exporter.FORMATS, required=True)
    command.add_argument(
        "--tokenizer", type=_place, metavar="DIR", help="tokenizer folder (default: the checkpoint's own)"
    )
    command.add_argument("--dtype", choices=sorted(_DTYPES), help="convert the weights (default: as they are)")
    command.add_argument("--max-shard-gb", type=float, default=MAX_SHARD_BYTES / 1e9, help="size of one file")
    command.add_argument(
        "--make-vocab-size-divisible-by",
        type=_count,
        default=1,
        metavar="N",
        help="pad the vocabulary with rows of zeros (default: no row is padding)",
    )
    command.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    _add_writing(command)
    command.set_defaults(act=_export)

    command = commands.add_parser("verify", help="compare two models, or one with its digests", allow_abbrev=False)
    command.add_argument("a", type=_place, metavar="A", help="checkpoint or Hugging Face folder")
    command.add_argument(
        "b", type=_place, nargs="?", metavar="B", help="none: read every byte of A against its digests"
    )
    command.add_argument("--logits", action="store_true", help="run both as well (stock transformers where it can)")
    command.add_argument("--tolerance", type=_tolerance, default=0.0, help="largest difference that counts as equal")
    command.add_argument("--show", type=_number_of, default=20, help="different tensors to list")
    command.add_argument("--workers", type=_count, help="threads (default: one more than cores)")
    command.set_defaults(act=_verify)
    return parser


def _add_writing(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--workers", type=_count, help="threads (default: one more than cores); the bytes do not depend on it"
    )
    command.add_argument("--fsync", action="store_true", help="wait until the disk has everything, which cp does not")


def _place(text: str) -> str:
    """A file or folder. An empty name would be the current directory, or leave a flag out."""
    if not text:
        raise argparse.ArgumentTypeError("is empty. Is the variable that it comes from set?")
    return text


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 1 << 63:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 to {(1 << 63) - 1}")
    return int(text)


def _number_of(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 on")
    return int(text)


def _tolerance(text: str) -> float:
    if not float(text) >= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 on")
    return float(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)
