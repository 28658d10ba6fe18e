"""Tokenisation: our worker processes against `tokenizers`' own batch encoding on all cores.

    python benchmarks/tokenisation.py [--tokenizer FOLDER] [--megabytes 12] [--repeats 5]

The texts are cut from the sources and documents of the installed Python packages, to the lengths of a realistic mix of
conversations: captions (a common question, an answer of about 900 characters), short questions and answers of
several turns, instructions, and now and then a long document. Without --tokenizer a byte-level BPE of 32,768 tokens
that splits text as Qwen2.5's does is trained on them first.

    texts           every turn's text. Ours: `VitaTokenizer.encode`, one process a core, as preprocess_data.py works.
                    tokenizers: one call of `encode_batch`, rayon on all cores.
    conversations   ours: `build_example` (template, ids, labels). tokenizers: `encode_batch` of conversations that were
                    rendered beforehand, outside the clock; it makes no labels.

Both sides return the ids as Python lists. Interleaved, minimum of the repeats; the ratio is tokenizers : ours, above 1
where ours takes less. Wall time is fair only on an idle machine.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from megatron_vita.data.sample import Message, Sample, Text
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.data.text.chat import build_example
from megatron_vita.data.text.tokenizer import END_OF_TEXT, IM_END, IM_START, VITA_TOKENS, VitaTokenizer

SPLIT = (  # Qwen2.5's
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QUESTIONS = (
    "Describe this picture in detail.",
    "Please provide a thorough description of this image.",
    "What is shown here?",
    "Answer the question using a single word or phrase.",
    "Answer with the option's letter from the given choices directly.",
)
SPEC = PreprocessSpec()
CHUNK = 64


def corpus(megabytes: int) -> str:
    """Text of installed packages, always the same on one machine."""
    root = Path(sysconfig.get_path("purelib"))
    pieces, left = [], megabytes << 20
    for path in sorted(file for ending in ("md", "rst", "py", "txt") for file in root.rglob(f"*.{ending}")):
        text = path.read_text(encoding="utf-8", errors="ignore")
        pieces.append(text)
        left -= len(text)
        if left < 0:
            break
    random.Random(0).shuffle(pieces)
    return "\n".join(pieces)


def train(text: str) -> bytes:
    """A tokenizer.json of 32,768 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=32768, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text[at : at + 10_000] for at in range(0, len(text), 10_000)], trainer)
    special = [END_OF_TEXT, IM_START, IM_END, *VITA_TOKENS]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer.to_str().encode()


def conversations(text: str) -> list[Sample]:
    """Cut a corpus into conversations."""
    rng, at, samples = random.Random(1), 0, []

    def take(median: float, spread: float) -> str:
        nonlocal at
        at, start = at + max(2, int(median * rng.lognormvariate(0, spread))), at
        return text[start:at].strip() or "x"

    while at < len(text):
        kind = rng.choices(("caption", "vqa", "text", "long"), (37, 34, 11, 0.5))[0]
        if kind == "caption":
            turns = [(rng.choice(QUESTIONS), take(900, 0.5))]
        elif kind == "vqa":
            turns = [(f"{take(60, 0.5)}\n{rng.choice(QUESTIONS)}", take(30, 1.0)) for _ in range(rng.randint(1, 5))]
        elif kind == "text":
            turns = [(take(400, 0.9), take(1500, 0.8))]
        else:
            turns = [(take(40_000, 0.7), take(1000, 0.5))]
        samples.append(
            Sample(
                tuple(Message(role, (Text(said),)) for pair in turns for role, said in zip(ROLES, pair, strict=True))
            )
        )
    return samples


ROLES = ("user", "assistant")


def render(sample: Sample) -> str:
    """A conversation of texts with its special tokens spelt out."""
    turns = [(m.role, "".join(part.text for part in m.parts if isinstance(part, Text))) for m in sample.messages]
    return "".join(f"{IM_START}{role}\n{text}{IM_END}\n" for role, text in turns)


class Workers:
    """One process a core, each with the tokenizer; the work lies in memory they inherit."""

    def __init__(self, functions: dict[str, Callable[[int], int]]) -> None:
        global _FUNCTIONS
        _FUNCTIONS = functions
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as preprocess_data.py sets it for its processes
        self._pool = multiprocessing.get_context("fork").Pool(os.cpu_count())
        os.environ["TOKENIZERS_PARALLELISM"] = "true"

    def run(self, name: str, number: int) -> tuple[float, float, int]:
        """CPU-seconds of all processes, wall time, ids."""
        start = time.perf_counter()
        parts = [(name, first, min(first + CHUNK, number)) for first in range(0, number, CHUNK)]
        answers = self._pool.map(_part, parts, chunksize=4)
        return sum(cpu for cpu, _ in answers), time.perf_counter() - start, sum(ids for _, ids in answers)

    def close(self) -> None:
        self._pool.terminate()


_FUNCTIONS: dict[str, Callable[[int], int]] = {}


def _part(job: tuple[str, int, int]) -> tuple[float, int]:
    name, first, last = job
    start = time.process_time()
    ids = sum(_FUNCTIONS[name](index) for index in range(first, last))
    return time.process_time() - start, ids


def batch(tokenizer: Any, texts: Sequence[str]) -> tuple[float, float, int]:
    """`encode_batch` of everything at once: CPU-seconds, wall time, ids."""
    cpu, wall = time.process_time(), time.perf_counter()
    ids = [one.ids for one in tokenizer.encode_batch(texts, add_special_tokens=False)]
    return time.process_time() - cpu, time.perf_counter() - wall, sum(map(len, ids))


def main() -> None:
    """Print both comparisons."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--tokenizer", type=Path, help="a Hugging Face folder")
    parser.add_argument("--megabytes", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    text = corpus(args.megabytes)
    with tempfile.TemporaryDirectory() as folder:
        path = args.tokenizer or Path(folder)
        if args.tokenizer is None:
            os.environ["TOKENIZERS_PARALLELISM"] = "true"
            (path / "tokenizer.json").write_bytes(train(text[: 8 << 20]))
        ours = VitaTokenizer.load(path)
        reference: Any = Tokenizer.from_file(str(path / "tokenizer.json"))
    samples = conversations(text)
    texts = [
        part.text for one in samples for message in one.messages for part in message.parts if isinstance(part, Text)
    ]
    rendered = [render(one) for one in samples]
    print(f"{len(text) / 1e6:.1f} million characters: {len(samples)} conversations, {len(texts)} texts")
    workers = Workers(
        {
            "texts": lambda index: len(ours.encode(texts[index])),
            "conversations": lambda index: len(build_example(samples[index], [], [], tokenizer=ours, spec=SPEC).tokens),
        }
    )
    try:
        for name, number, strings in (("texts", len(texts), texts), ("conversations", len(samples), rendered)):
            best = {"ours": (1e9, 1e9, 0), "tokenizers": (1e9, 1e9, 0)}
            for _ in range(args.repeats):
                for side, got in (("ours", workers.run(name, number)), ("tokenizers", batch(reference, strings))):
                    best[side] = (min(best[side][0], got[0]), min(best[side][1], got[1]), got[2])
            (cpu, wall, ids), (other_cpu, other_wall, other_ids) = best["ours"], best["tokenizers"]
            print(
                f"{name:<14} ours {ids / cpu / 1e6:.2f}, tokenizers {other_ids / other_cpu / 1e6:.2f} million ids a "
                f"CPU-second: {other_cpu / cpu:.2f}; wall on {os.cpu_count()} cores {wall:.2f} s, tokenizers "
                f"{other_wall:.2f} s: {other_wall / wall:.2f}  ({ids} ids, tokenizers {other_ids})"
            )
    finally:
        workers.close()


if __name__ == "__main__":
    main()
