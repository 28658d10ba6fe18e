"""What people see of a shard set."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from megatron_vita.data import inspect
from megatron_vita.data.example import Example, MediaItem, TileSlot
from megatron_vita.data.manifest import SourceCounts, TokenizerInfo
from megatron_vita.data.shard_writer import ShardWriter
from megatron_vita.data.shards import ShardSet
from megatron_vita.data.tokenizer import REQUIRED_TOKENS, VitaTokenizer
from tests.data import packed
from tests.scripts import load_script


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_script("tools/inspect_data.py")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One sample in words, with a picture of 2 tiles and a thumbnail; its tokenizer lies in the folder beside."""
    folder = tmp_path_factory.mktemp("made")
    letters = {letter: index for index, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    raw = Tokenizer(models.BPE(vocab=letters, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(token, special=True) for token in REQUIRED_TOKENS])
    (folder / "tokenizer").mkdir()
    raw.save(str(folder / "tokenizer" / "tokenizer.json"))
    tokenizer = VitaTokenizer.load(folder / "tokenizer")

    context = tokenizer.token_id("<IMG_CONTEXT>")
    head = [tokenizer.token_id("<img>")]
    question = [*head, *[context] * 12, tokenizer.token_id("</img>"), *tokenizer.encode("who?")]
    answer = [*tokenizer.encode("a cat"), tokenizer.eos_id]
    tokens = np.array(question + answer + tokenizer.encode("\n"), dtype=np.int32)
    labels = np.full(len(tokens), -100, dtype=np.int32)
    labels[len(question) - 1 : len(question) + len(answer) - 1] = answer
    slots = tuple(
        TileSlot(1 + 4 * index, 0, 0, 0 if thumbnail else index, 1, 2, thumbnail)
        for index, thumbnail in enumerate((False, False, True))
    )
    item = Example(tokens, labels, slots, (MediaItem(packed.png(3, side=32), 32, 32),))
    with ShardWriter(
        folder / "shards" / "train",
        spec=packed.SPEC,
        seq_length=64,
        tokenizer=TokenizerInfo(sha256=tokenizer.sha256, vocab_size=tokenizer.vocab_size, pad_id=tokenizer.pad_id),
        template_sha256=tokenizer.template_sha256,
    ) as writer:
        plain = Example(tokens[14:], labels[14:])
        writer.add_pack([plain, item], [(0, 5), (0, 6)])
        writer.finish([SourceCounts(name="animals", read=2, used=2)])
    return folder / "shards" / "train"


def test_text_shows_what_carries_loss(made: Path, tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main([str(made), "--sample", "1"]) == 0
    text = capsys.readouterr().out
    assert "sample 1 of 2: animals, record 6; pack 0" in text
    assert "<img><IMG_CONTEXT>×12</img>who?⟦a cat<|im_end|>⟧\n" in text
    assert "1..4" in text
    assert "1,2 of 1x2" in text
    assert "thumbnail" in text
    assert tool.main([str(made), "--sample", "0"]) == 0
    assert "who?⟦a cat<|im_end|>⟧\n" in capsys.readouterr().out


def test_statistics_plot_verification_and_sheet(
    made: Path, tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sheet, plot = tmp_path / "new" / "sheet.png", tmp_path / "plot.png"
    assert tool.main([str(made), "--verify", "--pictures", str(sheet), "--plot", str(plot)]) == 0
    text = capsys.readouterr().out
    assert "1 packs, 2 samples" in text
    assert "animals" in text
    assert text.endswith(f"wrote 1 tiles to {sheet}\n")
    with Image.open(sheet) as picture:
        assert picture.getpixel((70, 70)) == (3, 0, 99)
    assert plot.stat().st_size > 1000
    assert tool.main([str(made), "--sample", "1", "--pictures", str(sheet)]) == 0
    assert "wrote 3 tiles" in capsys.readouterr().out


def test_a_tokenizer_of_another_digest_is_not_taken(tmp_path: Path) -> None:
    packed.write(tmp_path / "set", packed.examples(3))
    shards = ShardSet(tmp_path / "set")
    assert inspect.find_tokenizer(shards) is None
    assert "3 3 3 3" in "".join(inspect.sample_text(shards, index, None) for index in range(3))


def test_usage_errors(made: Path, tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main([str(made), "--sample", "2"]) == 2
    assert "samples 0 to 1" in capsys.readouterr().err
    assert tool.main([str(tmp_path / "none")]) == 2
    assert tool.main([str(made), "--sample", "0", "--pictures", str(tmp_path / "x.png")]) == 2
    assert "no picture" in capsys.readouterr().err
    for flag, path, message in (
        ("--plot", "/dev/null/x.png", "--plot /dev/null/x.png: cannot be written"),
        ("--pictures", "/dev/null/x.png", "--pictures /dev/null/x.png: cannot be written"),
        ("--plot", "x.foo", "--plot x.foo: name a .png file"),
        ("--pictures", "x.jpg", "--pictures x.jpg: name a .png file"),
    ):
        assert tool.main([str(made), flag, path]) == 2
        printed = capsys.readouterr()
        assert message in printed.err
        assert not printed.out  # told before anything is read
