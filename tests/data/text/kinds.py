"""Tiny tokenizers with the pipelines, flags and settings of published ones, trained here."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, trainers

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = "user assistant system Frame Which colour is this picture answer the a of and red blue green yes no What Hello"
TEXTS = (
    [WORDS] * 9
    + [f" {word}" for word in WORDS.split()] * 9
    + [
        "assistant\n Yes",
        "\n\n",
        "\n  a",
        "  ",
        "   \n",
        "a\n\nb",
        "\n- a\n- b",
        ".\n\n",
        "?\n",
        "x = {'a': 1}\n    y",
        "\t",
    ]
    * 6
    + [f"Frame{number}: " for number in range(30)]
)
BYTES = [f"<0x{number:02X}>" for number in range(256)]


@lru_cache(maxsize=32)
def byte_level(*patterns: str, digits: bool = False, regex: bool = False, prefix: bool = False) -> str:
    """A byte-level BPE: some regular expressions, digits one by one, GPT-2's own expression, a blank put first."""
    tokenizer = Tokenizer(models.BPE())
    steps: list[Any] = [pre_tokenizers.Split(Regex(one), behavior="isolated") for one in patterns]
    steps += [pre_tokenizers.Digits(individual_digits=True)] * digits
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=regex)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer.to_str()


@lru_cache(maxsize=4)
def sentence_like(newlines: bool = False) -> str:
    """A BPE over characters with bytes for what it does not know, as converted from SentencePiece (Llama 2, Gemma)."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    special = ["<unk>", "<s>", "</s>", *BYTES, *(["\n", "\n\n", "▁▁", "▁▁▁"] if newlines else [])]
    trainer = trainers.BpeTrainer(vocab_size=460, min_frequency=2, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([line for text in TEXTS for line in text.replace("\t", " ").split("\n")], trainer)
    values = json.loads(tokenizer.to_str())
    values["added_tokens"] = []
    merges = [["▁", "▁"], ["▁▁", "▁"], ["\n", "\n"]] if newlines else []
    values["model"]["merges"] += merges
    return json.dumps(values)


def unigram() -> str:
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -3.0)]
    pieces += [(chr(number), -6.0) for number in range(33, 127)]
    tokenizer = Tokenizer(
        models.Unigram([*pieces, *((f"▁{word}", -5.0) for word in {**dict.fromkeys(WORDS.split()), "Yes.": 0})], 0)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    return tokenizer.to_str()


def template(*before: str, behind: Sequence[str] = ()) -> dict[str, Any]:
    """A post-processor that puts tokens before and behind a text; ids are filled in later."""
    single = [
        *({"SpecialToken": {"id": name, "type_id": 0}} for name in before),
        {"Sequence": {"id": "A", "type_id": 0}},
        *({"SpecialToken": {"id": name, "type_id": 0}} for name in behind),
    ]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {name: {"id": name, "ids": [name], "tokens": [name]} for name in (*before, *behind)},
    }


BYTE_POST = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
PREPEND = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ],
}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
NFC = {"type": "NFC"}


def metaspace(scheme: str, *, split: bool = False) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split}


@dataclass(frozen=True)
class Kind:
    """A published tokenizer in small."""

    base: Callable[[], str]
    special: Sequence[str | AddedToken] = ()
    """Added tokens in order; a plain name is special and has the usual flags."""
    config: dict[str, Any] = field(default_factory=dict)
    """tokenizer_config.json."""
    parts: dict[str, Any] = field(default_factory=dict)
    """What of tokenizer.json differs: normalizer, pre_tokenizer, post_processor, truncation …"""
    refused: str = ""
    """What the refusal says; empty where the tokenizer is accepted."""
    map: dict[str, Any] = field(default_factory=dict)
    """special_tokens_map.json."""

    def write(self, folder: Path) -> Path:
        """The folder as a publisher has it."""
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer: Any = Tokenizer.from_str(self.base())
        for one in self.special:
            token = AddedToken(one, special=True, normalized=False) if isinstance(one, str) else one
            (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
        values = json.loads(tokenizer.to_str())
        for name, part in self.parts.items():
            if name == "model":
                values["model"] |= part
            else:
                values[name] = _with_ids(part, tokenizer)
        (folder / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(self.config), encoding="utf-8")
        if self.map:
            (folder / "special_tokens_map.json").write_text(json.dumps(self.map), encoding="utf-8")
        return folder


def _with_ids(part: Any, tokenizer: Any) -> Any:
    """Post-processors name tokens and ids: names become ids here."""
    if isinstance(part, list):
        return [_with_ids(one, tokenizer) for one in part]
    if isinstance(part, dict):
        if "ids" in part:
            return {**part, "ids": [tokenizer.token_to_id(name) for name in part["ids"]]}
        return {key: _with_ids(one, tokenizer) for key, one in part.items()}
    return part


def _added(name: str, **flags: bool) -> AddedToken:
    return AddedToken(name, **{"special": True, "normalized": False, **flags})  # type: ignore[arg-type]


CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
BOS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
LLAMA = ("<unk>", "<s>", "</s>")
L3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
BYTE_AND = lambda *before: {"type": "Sequence", "processors": [BYTE_POST, template(*before)]}  # noqa: E731
DEEPSEEK = ("[\r\n]", r"\s?[A-Za-zÀ-ÿ]+", r"\s?[!-/:-~]+", r"\s+$", "[一-龥]+")


def qwen() -> str:
    return byte_level(QWEN2)


def gpt2() -> str:
    return byte_level(regex=True)


KINDS: dict[str, Kind] = {
    "Qwen2.5": Kind(
        qwen,
        CHATML,
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "add_bos_token": False,
            "split_special_tokens": False,
        },
        {"normalizer": NFC, "post_processor": BYTE_POST},
    ),
    "Qwen3": Kind(
        qwen,
        (*CHATML, AddedToken("<tool_call>", normalized=False), AddedToken("<think>", normalized=False)),
        {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>"},
        {"normalizer": NFC, "post_processor": BYTE_POST},
    ),
    "Llama 2": Kind(
        sentence_like,
        LLAMA,
        {**BOS, "tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True, "add_eos_token": False},
        {"normalizer": PREPEND, "pre_tokenizer": None, "post_processor": template("<s>")},
    ),
    "Llama 2, first tokens normalised": Kind(
        sentence_like,
        [_added(name, normalized=True) for name in LLAMA],
        {**BOS, "tokenizer_class": "LlamaTokenizerFast"},
        {"normalizer": PREPEND, "pre_tokenizer": None, "post_processor": template("<s>")},
    ),
    "Llama 2, saved by transformers": Kind(
        sentence_like,
        LLAMA,
        {**BOS, "tokenizer_class": "LlamaTokenizerFast", "legacy": False},
        {"pre_tokenizer": metaspace("first"), "post_processor": template("<s>")},
    ),
    "Llama 2, no beginning": Kind(
        sentence_like,
        LLAMA,
        {**BOS, "tokenizer_class": "LlamaTokenizerFast", "legacy": False, "add_bos_token": False},
        {"pre_tokenizer": metaspace("first")},
    ),
    "Llama 2, blank before every text": Kind(
        sentence_like,
        LLAMA,
        {**BOS, "tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True},
        {"pre_tokenizer": metaspace("always"), "post_processor": template("<s>")},
    ),
    "Llama 2, no blank": Kind(
        sentence_like,
        LLAMA,
        {**BOS, "add_prefix_space": False, "tokenizer_class": "LlamaTokenizer"},
        {"pre_tokenizer": metaspace("never"), "post_processor": template("<s>")},
    ),
    "Llama 2, words apart": Kind(
        sentence_like, LLAMA, BOS, {"pre_tokenizer": metaspace("first", split=True), "post_processor": template("<s>")}
    ),
    "Llama 2, end behind": Kind(
        sentence_like,
        LLAMA,
        {**BOS, "add_eos_token": True},
        {"pre_tokenizer": metaspace("first"), "post_processor": template("<s>", behind=["</s>"])},
        refused="puts </s> behind every text",
    ),
    "Llama 2, settings only": Kind(
        sentence_like,
        LLAMA,
        {**BOS, "add_bos_token": True, "add_eos_token": True, "tokenizer_class": "LlamaTokenizerFast"},
        {"pre_tokenizer": metaspace("first"), "post_processor": None},
    ),
    "Llama 3": Kind(
        lambda: byte_level(LLAMA3),
        L3,
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": L3[0],
            "eos_token": L3[2],
            "model_input_names": ["input_ids", "attention_mask"],
        },
        {"post_processor": BYTE_AND(L3[0]), "model": {"ignore_merges": True}},
    ),
    "Mistral v0.1": Kind(
        sentence_like,
        LLAMA,
        {**BOS, "tokenizer_class": "LlamaTokenizer", "legacy": True},
        {"normalizer": PREPEND, "pre_tokenizer": None, "post_processor": template("<s>")},
    ),
    "Mistral v0.3": Kind(
        sentence_like,
        (*LLAMA, "[INST]", "[/INST]"),
        {**BOS, "tokenizer_class": "LlamaTokenizer", "legacy": False, "add_prefix_space": True},
        {"pre_tokenizer": metaspace("first"), "post_processor": template("<s>")},
    ),
    "Mistral Nemo": Kind(
        lambda: byte_level(TEKKEN),
        (*LLAMA, "[INST]"),
        {**BOS, "tokenizer_class": "GPT2Tokenizer", "add_bos_token": True},
        {"post_processor": BYTE_AND("<s>")},
    ),
    "Gemma": Kind(
        lambda: sentence_like(True),
        (*LLAMA, _added("\n\n\n", special=False)),
        {**BOS, "tokenizer_class": "GemmaTokenizer"},
        {
            "normalizer": REPLACE,
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"String": " "},
                "behavior": "MergedWithPrevious",
                "invert": False,
            },
            "post_processor": template("<s>"),
        },
    ),
    "Phi-3": Kind(
        sentence_like,
        (
            _added("<unk>"),
            _added("<s>"),
            _added("</s>", rstrip=True, special=False),
            "<|endoftext|>",
            *(_added(name, rstrip=True) for name in ("<|assistant|>", "<|user|>", "<|end|>")),
        ),
        {**BOS, "eos_token": "<|endoftext|>", "tokenizer_class": "LlamaTokenizer", "legacy": False},
        {"normalizer": PREPEND, "pre_tokenizer": None, "post_processor": template()},
    ),
    "Phi-4": Kind(
        lambda: byte_level(LLAMA3),
        [_added(name, lstrip=True, rstrip=True) for name in CHATML],
        {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"},
        {"post_processor": BYTE_POST},
    ),
    "InternLM2": Kind(
        sentence_like,
        (*LLAMA, "<|im_start|>", "<|im_end|>"),
        {
            **BOS,
            "tokenizer_class": "InternLM2Tokenizer",
            "auto_map": {"AutoTokenizer": ["t.InternLM2Tokenizer", "t.InternLM2TokenizerFast"]},
            "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        },
        {"normalizer": PREPEND, "pre_tokenizer": None, "post_processor": template("<s>")},
    ),
    "GLM-4": Kind(
        lambda: byte_level(LLAMA3),
        ("<|endoftext|>", "[MASK]", "[gMASK]", "<sop>", "<|user|>", "<|assistant|>"),
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "do_lower_case": False},
        {"post_processor": BYTE_AND("[gMASK]", "<sop>")},
    ),
    "Yi": Kind(
        sentence_like,
        (_added("<unk>"), _added("<s>", normalized=True), _added("</s>", normalized=True)),
        {**BOS, "tokenizer_class": "LlamaTokenizer", "add_bos_token": False},
        {
            "normalizer": {"type": "Sequence", "normalizers": [REPLACE]},
            "pre_tokenizer": None,
            "post_processor": template(),
        },
    ),
    "DeepSeek": Kind(
        lambda: byte_level(*DEEPSEEK, digits=True),
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
        {
            "tokenizer_class": "LlamaTokenizerFast",
            "add_bos_token": True,
            "bos_token": {
                "__type": "AddedToken",
                "content": "<｜begin▁of▁sentence｜>",
                "lstrip": False,
                "normalized": True,
                "rstrip": False,
                "single_word": False,
            },
        },
        {"post_processor": BYTE_POST, "normalizer": {"type": "Sequence", "normalizers": []}},
    ),
    "GPT-2": Kind(
        gpt2,
        ["<|endoftext|>"],
        {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|endoftext|>"},
        {"post_processor": BYTE_POST},
    ),
    "OPT": Kind(
        gpt2,
        [_added("<pad>"), _added("</s>", normalized=True)],
        {"tokenizer_class": "GPT2Tokenizer", "bos_token": "</s>", "add_bos_token": True},
        {"post_processor": template("</s>")},
    ),
    "SmolLM2": Kind(
        lambda: byte_level(digits=True, regex=True),
        CHATML,
        {
            "tokenizer_class": "GPT2Tokenizer",
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "add_prefix_space": False,
        },
    ),
    "a blank before every word": Kind(
        lambda: byte_level(regex=True, prefix=True), ["<|endoftext|>"], {"add_prefix_space": True}
    ),
    "RoBERTa": Kind(
        gpt2,
        LLAMA,
        BOS,
        {
            "post_processor": {
                "type": "RobertaProcessing",
                "sep": ["</s>", 422],
                "cls": ["<s>", 421],
                "trim_offsets": True,
                "add_prefix_space": False,
            }
        },
        refused="behind every text",
    ),
    "T5": Kind(
        unigram,
        LLAMA,
        BOS,
        {"pre_tokenizer": metaspace("always", split=True), "post_processor": template(behind=["</s>"])},
        refused="puts </s> behind every text",
    ),
    "padding and truncation": Kind(
        qwen,
        CHATML,
        {},
        {
            "truncation": {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0},
            "padding": {
                "strategy": {"Fixed": 40},
                "direction": "Left",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "a",
            },
        },
    ),
    "special tokens split": Kind(qwen, CHATML, {"split_special_tokens": True, "clean_up_tokenization_spaces": True}),
    "single words": Kind(qwen, [_added(name, single_word=True) for name in CHATML], {}, {"normalizer": NFC}),
    "tokens in lower case": Kind(
        qwen, [_added(name, normalized=True) for name in CHATML], {}, {"normalizer": {"type": "Lowercase"}}
    ),
    "words that are not special": Kind(
        qwen,
        (
            *CHATML,
            AddedToken("<think>", lstrip=True, rstrip=True),
            AddedToken("Yes", single_word=True),
            AddedToken("été", normalized=True),
        ),
        {},
        {"normalizer": {"type": "NFKC"}},
    ),
    "chat tokens that are not special": Kind(
        qwen, [_added(name, special=False, normalized=True) for name in CHATML], {}, {"normalizer": NFC}
    ),
    "another map": Kind(
        qwen,
        CHATML,
        {"eos_token": "<|endoftext|>"},
        {},
        map={
            "eos_token": "<|im_end|>",
            "additional_special_tokens": ["<|im_start|>", "<new>"],
            "cls_token": {
                "content": "<cls>",
                "lstrip": True,
                "rstrip": False,
                "single_word": False,
                "normalized": False,
            },
        },
    ),
    "dropout": Kind(qwen, CHATML, {}, {"model": {"dropout": 0.1}}, refused="dropout"),
    "no newlines": Kind(
        unigram,
        LLAMA,
        BOS,
        {
            "normalizer": {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
            "pre_tokenizer": metaspace("always", split=True),
        },
        refused="becomes one token with",
    ),
    "blanks stripped": Kind(
        qwen, CHATML, {}, {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}}
    ),
}
