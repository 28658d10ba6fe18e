"""What people see of a shard set."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from megatron_vita.data.example import Example, MediaItem, TileSlot
from megatron_vita.data.inspect import text as inspect
from megatron_vita.data.shards.manifest import Reject, SourceCounts, TokenizerInfo
from megatron_vita.data.shards.reader import ShardSet
from megatron_vita.data.shards.writer.in_memory import ShardWriter
from megatron_vita.data.text.tokenizer import REQUIRED_TOKENS, VitaTokenizer
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


@pytest.mark.slow
def test_statistics_plot_verification_and_sheet(
    made: Path, tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sheet, plot = tmp_path / "new" / "sheet.png", tmp_path / "plot.png"
    assert tool.main([str(made), "--verify", "--pictures", str(sheet), "--plot", str(plot)]) == 0
    text = capsys.readouterr().out
    assert "packs        1 of 64 tokens" in text
    assert "samples      2" in text
    assert "animals" in text
    assert "there is nothing to balance over 8 ranks" in text
    assert text.endswith(f"wrote 1 tile to {sheet}\n")
    with Image.open(sheet) as picture:
        assert picture.getpixel((70, 70)) == (3, 0, 99)
    assert plot.stat().st_size > 1000
    assert tool.main([str(made), "--sample", "1", "--pictures", str(sheet)]) == 0
    assert "wrote 3 tiles" in capsys.readouterr().out


def test_a_pack_is_listed(made: Path, tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sheet = tmp_path / "sheet.png"
    assert tool.main([str(made), "--pack", "0", "--pictures", str(sheet)]) == 0
    text = capsys.readouterr().out
    shards = ShardSet(made)
    length = shards.pack_length(0)
    assert f"pack 0 of 1: 2 samples, 3 tiles\n{length} of 64 tokens ({length / 64:.2%} full)" in text
    assert f"{1:>9} {shards.samples[0]['length']:>10}" in text, "the second sample begins where the first ends"
    assert "animals, record 6" in text
    assert "wrote 3 tiles" in text
    assert tool.main([str(made), "--pack", "1"]) == 2
    assert "--pack 1: the set holds packs 0 to 0" in capsys.readouterr().err


class Page(HTMLParser):
    """Tags, and the text inside `mark`."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.marked, self.words, self._inside = "", "", 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside += tag == "mark"

    def handle_endtag(self, tag: str) -> None:
        self._inside -= tag == "mark"

    def handle_data(self, data: str) -> None:
        self.words += data
        self.marked += data if self._inside else ""


def test_the_page_stands_alone_and_marks_what_carries_loss(made: Path, tool: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "new" / "page.html"
    assert tool.main([str(made), "--sample", "1", "--html", str(out)]) == 0
    page = Page(out.read_text(encoding="utf-8"))
    assert page.marked == "marked" + "a cat<|im_end|>"
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == 3
    assert all(str(one["src"]).startswith("data:image/jpeg;base64,") for one in pictures)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    assert sum(tag == "svg" for tag, _ in page.tags) == 4
    for words in ("tokens (logarithmic)", "million query-key pairs", "part of the sequence length, %", "animals"):
        assert words in page.words


@pytest.mark.slow
def test_what_datasets_say_cannot_become_part_of_the_page(tmp_path: Path, tool: ModuleType) -> None:
    """A name, a message and a set without media, without a tokenizer, with rejects."""
    evil = "<script>alert(1)</script>"
    tokens = np.array([9, 9, 9], dtype=np.int32)
    with ShardWriter(
        tmp_path / "set", spec=packed.SPEC, seq_length=8, tokenizer=packed.TOKENIZER, template_sha256="c" * 64
    ) as writer:
        writer.add_pack([Example(tokens, np.full(3, -100, dtype=np.int32))], [(0, 1)])
        writer.finish(
            [SourceCounts(name=evil, read=2, used=1, rejected={"bad_json": 1})], [Reject(evil, 2, "bad_json", evil)]
        )
    assert tool.main([str(tmp_path / "set"), "--html", str(tmp_path / "page.html")]) == 0
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.words.count(evil) == 4  # sources, rejects twice, the sample's title
    assert "bad_json" in page.words


def test_balance_is_told_for_both_kinds_of_stages(tmp_path: Path) -> None:
    packed.write(tmp_path / "set", packed.examples(60))
    lines = inspect.balance(ShardSet(tmp_path / "set"))
    assert [line.split(":")[0] for line in lines] == [
        "8 packs a step on 8 ranks, with reset", "8 packs a step on 8 ranks, without",
    ]  # fmt: skip
    for line in lines:
        ratios = [float(word) for word in line.split() if word.startswith("1.")]
        assert len(ratios) == 2
        assert all(1 <= ratio < 2 for ratio in ratios)


@pytest.mark.slow
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
        ("--html", "x.txt", "--html x.txt: name a .html file"),
        ("--plot", "x.foo", "--plot x.foo: name a .png file"),
        ("--pictures", "x.jpg", "--pictures x.jpg: name a .png file"),
    ):
        assert tool.main([str(made), flag, path]) == 2
        printed = capsys.readouterr()
        assert message in printed.err
        assert not printed.out  # reported before anything is read


def test_a_pack_says_what_each_sample_costs(tmp_path: Path) -> None:
    """Attention and tower together, as the samples table has it: what makes a pack dear is seen."""
    packed.write(tmp_path / "set", packed.examples(12))
    shards = ShardSet(tmp_path / "set")
    lines = inspect.pack_report(shards, 0).splitlines()
    costs = shards.samples["cost"][list(shards.pack_samples(0))]
    shown = [float(line.split("%")[0].split()[-1]) for line in lines[5:]]
    assert shown == [round(100 * cost / costs.sum(), 1) for cost in costs]
