"""Train the quickstart's tokenizer and save it as a Hugging Face folder.

    python examples/quickstart/make_tokenizer.py --data DIR --output DIR [--vocab-size 1024]

A byte-level BPE with Qwen2.5's normaliser (NFC) and pre-tokenisation (words with their leading space, one digit at a
time), trained on the text of every training file under `--data`. Its special tokens stand in the order of the large
model: Qwen2.5's three, then the seventeen that Long-VITA adds. The folder holds

    tokenizer.json            vocabulary, merges, special tokens
    tokenizer_config.json     class Qwen2Tokenizer; the tokens that transformers' InternVL classes ask for by name
    chat_template.jinja       ChatML, no default system turn; a picture is `<IMG_CONTEXT>` and a newline, a video
                              `<video>` and a newline, which is what stock transformers searches for and expands
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from megatron_vita.data.text.tokenizer import DEFAULT_TEMPLATE, END_OF_TEXT, IM_END, IM_START, NAMED_TOKENS, VITA_TOKENS

QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def training_text(data: Path) -> Iterator[str]:
    """Every turn of every training file (held-out files are named eval_* and valid_*), without media placeholders.

    What the chat template and the layout write and no file spells out is added as often as it will be read: the role
    of each turn, and the `FrameN: ` that announces a frame.
    """
    frames = 0
    for path in sorted(data.glob("*.json*")):
        if path.name.startswith(("eval_", "valid_", "split")):
            continue
        with path.open(encoding="utf-8") as file:
            records = json.load(file) if path.suffix == ".json" else [json.loads(line) for line in file]
        for record in records:
            for turn in record.get("messages") or record["conversations"]:
                text = turn.get("content", turn.get("value"))
                yield text.replace("<image>", "").replace("<video>", "")
                yield "user\nassistant\n"
            frames += 8 * len(record.get("videos", ()))
        yield "system\n"
    for number in range(frames):
        yield f"Frame{number % 64 + 1}: \n"


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of `vocab_size` entries, the special tokens last and not among the merges."""
    special = [END_OF_TEXT, IM_START, IM_END, *VITA_TOKENS]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(special),
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def save_folder(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the Hugging Face folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "add_bos_token": False,
        "bos_token": None,
        "eos_token": IM_END,
        "pad_token": END_OF_TEXT,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": False,
        "errors": "replace",
        "model_max_length": 131072,
        "extra_special_tokens": NAMED_TOKENS,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(DEFAULT_TEMPLATE, folder / "chat_template.jinja")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train a small Qwen2.5-style tokenizer.", allow_abbrev=False)
    parser.add_argument("--data", type=Path, required=True, help="folder written by make_data.py")
    parser.add_argument("--output", type=Path, required=True, help="Hugging Face folder to write")
    parser.add_argument("--vocab-size", type=int, default=1024, help="entries, special tokens included")
    args = parser.parse_args(argv)
    if not (args.data / "text.jsonl").is_file():
        parser.error(f"{args.data} holds no text.jsonl; run make_data.py --output {args.data} first")
    tokenizer = train_tokenizer(training_text(args.data), args.vocab_size)
    save_folder(tokenizer, args.output)
    print(f"wrote {args.output}: {tokenizer.get_vocab_size()} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
