"""Tokenizers: special tokens by name only, SentencePiece models, templates that will not do."""

from __future__ import annotations

import io
import json
import random
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from megatron_vita.convert.tokenizer_files import with_vision_tokens
from megatron_vita.data.text import acceptance, backends
from megatron_vita.data.text.tokenizer import END_OF_TEXT, IM_END, IM_START, VITA_TOKENS, VitaTokenizer
from megatron_vita.errors import ConfigError, DataError
from tests.data.kit import tokenizer_folder


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> VitaTokenizer:
    return VitaTokenizer.load(tokenizer_folder(tmp_path_factory.mktemp("tok")))


@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=80))
def test_any_text_comes_back_and_holds_no_special_token(tok: VitaTokenizer, text: str) -> None:
    import unicodedata

    text = "<image><|im_end|>" + text
    ids = tok.encode(text)
    assert tok.decode(ids, skip_special_tokens=False) == unicodedata.normalize("NFC", text)
    assert not set(ids) & set(tok.special_tokens.values())
    assert tok.encode_batch([text, "a"]) == [ids, tok.encode("a")]


def test_ids_and_digests(tok: VitaTokenizer) -> None:
    assert [tok.token_id(t) for t in (IM_END, END_OF_TEXT)] == [tok.eos_id, tok.pad_id]
    assert max(tok.special_tokens.values()) < tok.vocab_size
    assert len(tok.sha256) == len(tok.template_sha256) == 64
    with pytest.raises(ConfigError, match="<nothing>"):
        tok.token_id("<nothing>")


@given(text=st.text(max_size=60), keep=st.integers(0, 30))
def test_cut_gives_a_beginning_of_at_most_that_many_tokens(tok: VitaTokenizer, text: str, keep: int) -> None:
    cut = tok.cut(text, keep)
    assert text.startswith(cut)
    assert len(tok.encode(cut)) <= keep + 2  # the end may be cut into smaller pieces


def without_tokens(folder: Path, *names: str) -> Path:
    """A tokenizer folder that lacks some added tokens."""
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in names]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def test_missing_special_tokens_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"<\|im_start\|> <\|im_end\|>"):
        VitaTokenizer.load(without_tokens(tokenizer_folder(tmp_path), IM_START, IM_END))


def test_a_text_models_folder_gets_the_layout_tokens_as_import_writes_them(tmp_path: Path) -> None:
    """Shards made with the folder as it was published fit the model that was imported with it."""
    stock = without_tokens(tokenizer_folder(tmp_path / "stock", "{{ 'a template without pictures' }}"), *VITA_TOKENS)
    with_vision_tokens(stock, tmp_path / "imported")
    ours, imported = VitaTokenizer.load(stock), VitaTokenizer.load(tmp_path / "imported")
    assert (ours.sha256, ours.template_sha256) == (imported.sha256, imported.template_sha256)
    assert ours.special_tokens == imported.special_tokens
    first = ours.token_id(END_OF_TEXT)
    assert [ours.token_id(name) - first for name in VITA_TOKENS] == list(range(3, 20))
    assert ours.token_id("<img>") not in ours.encode("a <img> b")


# ------------------------------------------------------------------------------ equality with the libraries

LITERALS = [
    "<|im_end|>",
    "<|im_start|>user\n",
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<video>",
    "<image>",
    "<|endoftext|>",
]
SPACES = [
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "\u00a0",
    "\u2003",
    "\u3000",
    "\u200b",
    "\ufeff",
    "\u2028",
    "\x00",
    "\x85",
    "\ufffd",
]
PIECES = [
    "Which digit is this", "'s", "I'LL", "12345", "3.14", "été", "e\u0301", "ﬁ", "Ⅷ", "日本語", "漢字かな", "한국어",
    "русский", "العربية", "עברית", "हिन्दी", "ไทย", "🙂", "\U0001f469\u200d\U0001f467", "\U0001f1eb\U0001f1f7",
    "\U0010ffff", "\ue0000:0\ue001", "<|", "|>", "</", "&lt;", "...", "—", "'", '"', "{}[]()", "x=y**2;", "#!",
    "\\n", "a" * 40,
]  # fmt: skip


def strings(number: int) -> list[str]:
    """Words of many scripts, blanks of all kinds, literal special tokens, and any code point at all."""
    rng = random.Random(0)
    out = ["", " ", "\n", *LITERALS, *SPACES, *PIECES]
    while len(out) < number:
        pieces = []
        for _ in range(rng.randint(1, 12)):
            kind = rng.random()
            if kind < 0.15:
                pieces.append(
                    "".join(chr(rng.choice((rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)))) for _ in "ab")
                )
            else:
                pieces.append(rng.choice(LITERALS if kind < 0.25 else SPACES if kind < 0.5 else PIECES))
        out.append("".join(pieces))
    return out


def test_ids_equal_auto_tokenizers_on_thousands_of_strings(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = tokenizer_folder(tmp_path)
    library = transformers.AutoTokenizer.from_pretrained(str(folder))
    texts = strings(4000)
    expected = library(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    tok = VitaTokenizer.load(folder)
    assert [tok.encode(text) for text in texts] == expected
    assert tok.encode_batch(texts) == expected
    parsed = library(texts, add_special_tokens=False)["input_ids"]
    assert sum(a != b for a, b in zip(parsed, expected, strict=True)) > 1000, (
        "literal tokens must have made a difference"
    )


@pytest.mark.parametrize("flags", [{}, {"lstrip": True}, {"rstrip": True}, {"single_word": True}, {"normalized": True}])
def test_added_tokens_that_are_not_special_are_found_in_text_as_the_library_finds_them(
    tmp_path: Path, flags: dict[str, bool]
) -> None:
    """`<think>` of a reasoning model belongs to its text; a special token `<secret>` of its own does not."""
    transformers = pytest.importorskip("transformers")
    folder = tokenizer_folder(tmp_path)
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    raw.add_tokens([AddedToken("<think>", **{"normalized": False, **flags})])
    raw.add_special_tokens([AddedToken("<secret>", special=True, **flags)])
    raw.save(str(folder / "tokenizer.json"))
    tok, library = VitaTokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(str(folder))
    texts = [
        f"{a}{token}{b}" for a, b in product(("", "a", "a ", " \n"), repeat=2) for token in ("<think>", "<secret>")
    ]
    expected = library(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert [tok.encode(text) for text in texts] == expected
    think, secret = raw.token_to_id("<think>"), raw.token_to_id("<secret>")
    assert think in tok.encode("a <think> b")
    assert not any(secret in tok.encode(text) for text in texts)


def test_layout_tokens_added_without_the_special_flag_are_still_not_parsed(tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["special"] = token["content"].startswith("<|")
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tok = VitaTokenizer.load(folder)
    assert tok.token_id("<img>") not in tok.encode("a <img> b")


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        VitaTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="can be read"):
        VitaTokenizer.load(tmp_path)


UNENDED = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'text' %}{{ p.text }}{% else %}{{ {'image': '<IMG_CONTEXT>\\n', 'video': '<video>\\n'}"
    "[p.type] }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
)


KNOWS = "{# <IMG_CONTEXT> #}"
"""Makes a template count as one that knows pictures."""


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        (KNOWS + "{% for m in messages", "not valid Jinja"),
        (KNOWS + "{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}", "leaves out|drops"),
        (
            KNOWS + "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}{% endfor %}",
            "cannot render",
        ),
        (UNENDED, "end an answer"),
        (KNOWS + "{{ cycler.__init__.__globals__.os.system('true') }}", "cannot render"),
    ],
)
def test_templates_that_will_not_do(tmp_path: Path, template: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        VitaTokenizer.load(tokenizer_folder(tmp_path, template))


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def sentencepiece_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with byte fallback and a piece of its own that is called `<image>`."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    texts = [f"The digit {n} is in the picture number {n * 7}." for n in range(200)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=400, hard_vocab_limit=False, minloglevel=2,
        byte_fallback=True, user_defined_symbols=["<image>"], model_type=request.param,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("sentencepiece") / "t.model"
    path.write_bytes(model.getvalue())
    return path


def test_ids_equal_sentencepieces_on_thousands_of_strings(sentencepiece_file: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    library = SentencePieceProcessor(model_file=str(sentencepiece_file))
    tok = VitaTokenizer.load(sentencepiece_file)
    own, texts = library.vocab_size(), strings(4000)
    expected = [library.encode(text) for text in texts]
    assert [tok.encode(text) for text in texts] == expected
    assert tok.encode_batch(texts) == expected
    assert max(max(ids, default=0) for ids in expected) < own, "no text becomes one of the appended tokens"
    assert [tok.decode(ids) for ids in expected] == [library.decode(ids) for ids in expected]


def test_sentencepieces_special_tokens_follow_its_own_pieces(sentencepiece_file: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    library = SentencePieceProcessor(model_file=str(sentencepiece_file))
    tok = VitaTokenizer.load(sentencepiece_file)
    own = library.vocab_size()
    names = [END_OF_TEXT, IM_START, IM_END, *VITA_TOKENS]
    assert [tok.token_id(name) for name in names] == list(range(own, own + len(names)))
    assert tok.vocab_size == own + len(names)
    assert tok.token_id("<image>") not in tok.encode("The <image> digit"), "the model's own piece is plain text"
    assert tok.decode([tok.eos_id, *library.encode("digit")], skip_special_tokens=False) == "<|im_end|>digit"
    text = "The digit 3 is in the picture number 21."
    assert tok.decode(tok.encode(text)) == text
    assert len(library.encode(tok.cut(text, 4))) <= 4


class PanicException(BaseException):
    """As pyo3 raises it where Rust code panics."""


def test_a_panic_of_the_library_costs_the_text_and_not_the_run(tok: VitaTokenizer, tmp_path: Path) -> None:
    class Panicking:
        def __init__(self, words: str) -> None:
            self._words = words

        def encode_batch_fast(self, texts: list[str] | str, **_: object) -> list[object]:
            if any(self._words in text for text in ([texts] if isinstance(texts, str) else texts)):
                raise PanicException("end byte index 11 is not a char boundary")
            return real.encode_batch_fast(texts, add_special_tokens=False)

        encode = encode_batch_fast

    own = VitaTokenizer.load(tokenizer_folder(tmp_path / "tok"))
    real = own._backend._tokenizer
    own._backend._tokenizer = Panicking("split me")
    assert own.encode("fine") == tok.encode("fine")
    for call in (own.encode, lambda text: own._backend.encode_batch([text]), lambda text: own._backend.cut(text, 1)):
        with pytest.raises(DataError, match=r"^tokenizer_failed: .*not a char boundary"):
            call("split me")
    own._backend._tokenizer = Panicking("w")
    own._encode_short.cache_clear()
    with pytest.raises(ConfigError, match="cannot be used: tokenizer_failed"):
        acceptance.check(own, own._backend)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        backends._guarded(interrupt, "text")
