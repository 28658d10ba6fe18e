"""Guided decoding: what a token costs with a vocabulary of Qwen2.5's size (made up), in seconds of computing."""

from __future__ import annotations

import argparse
import json
import os
import random
import string
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from megatron_vita.data.text.backends import BYTES
from megatron_vita.data.text.tokenizer import VitaTokenizer
from megatron_vita.inference.grammar import ANY_OBJECT, _try_out
from megatron_vita.inference.guide import Guide, Guides
from megatron_vita.inference.sampling import SamplingConfig, SequenceSampler, sample
from tests.data.kit import tokenizer_folder

WORDS, WIDTH = 151_643, 152_064
"""Qwen2.5's tokens without special ones; its padded embedding."""
SCHEMAS = {
    "any object": ANY_OBJECT,
    "ten fields": json.dumps({
        "type": "object",
        "properties": {f"p{n}": [{"type": "number"}, {"type": "string", "maxLength": 40}][n % 2] for n in range(10)},
        "required": [f"p{n}" for n in range(10)],
        "additionalProperties": False,
    }),
}  # fmt: skip


def vocabulary(folder: Path) -> VitaTokenizer:
    """A tokenizer of as many tokens: letters, blanks, punctuation, Chinese characters."""
    path = tokenizer_folder(folder / "tokenizer") / "tokenizer.json"
    content = json.loads(path.read_text())
    special = [token["content"] for token in content["added_tokens"]]
    names = dict.fromkeys(name for name in content["model"]["vocab"] if name not in special)
    written, draw = {byte: name for name, byte in BYTES.items()}, random.Random(0)
    kinds = (
        string.ascii_lowercase,
        string.ascii_letters,
        string.punctuation + " \n",
        "".join(map(chr, range(0x4E00, 0x9FA0))),
    )
    while len(names) < WORDS:
        word = draw.choice(("", " ")) + "".join(draw.choices(draw.choice(kinds), k=draw.randint(1, 9)))
        names[("".join(written[byte] for byte in word.encode()))] = None
    content["model"]["vocab"] = {name: number for number, name in enumerate(names)}
    for number, token in enumerate(content["added_tokens"]):
        token["id"] = len(names) + number
    path.write_text(json.dumps(content))
    return VitaTokenizer.load(path.parent)


def seconds(act: Callable[[], object]) -> float:
    """Of computing, by all threads."""
    start = time.process_time()
    act()
    return time.process_time() - start


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--tokens", type=int, default=200, help="of each answer")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = vocabulary(Path(scratch))
    ends = frozenset((tokenizer.eos_id, tokenizer.pad_id))
    guides = Guides(tokenizer, ends)
    print(f"vocabulary of {tokenizer.vocab_size}, once an engine: {seconds(lambda: guides.learn(ANY_OBJECT)):.2f} s")
    for name, schema in SCHEMAS.items():
        print(f"-- {name}: tried out in {1e3 * seconds(lambda schema=schema: _try_out(schema)):.0f} ms")  # type: ignore[misc]
        for rows in (1, 8):
            configs = [SamplingConfig(guide=schema, temperature=1, seed=seed) for seed in range(rows)]
            begin = lambda one: SequenceSampler(one, (), WIDTH, ends, guides.begin(one.guide))  # noqa: E731
            guided = [begin(one) for one in configs]
            free = [SequenceSampler(SamplingConfig(temperature=1), (), WIDTH, ends) for _ in configs]
            spent = {"masks": 0.0, "guided": 0.0, "free": 0.0}
            draw = torch.Generator().manual_seed(1)
            for _ in range(args.tokens):
                logits = 3 * torch.randn(rows, WIDTH, generator=draw)
                now = [one.guide for one in guided if one.guide is not None]
                spent["masks"] += seconds(lambda now=now: Guide.allowed(now, WIDTH, torch.device("cpu")))  # type: ignore[misc]
                spent["free"] += seconds(lambda logits=logits, free=free: sample(logits, free))  # type: ignore[misc]
                start = time.process_time()
                chosen = sample(logits, guided)
                spent["guided"] += time.process_time() - start
                guided = [
                    begin(old.config) if one.complete or one.token in ends else old
                    for one, old in zip(chosen, guided, strict=True)
                ]
            each = {what: f"{1e3 * spent[what] / args.tokens / rows:.2f} ms" for what in spent}
            print(f"{rows} answers at once, a token: {', '.join(f'{what} {cost}' for what, cost in each.items())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
