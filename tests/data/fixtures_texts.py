"""Fixtures: text datasets, in their publishers' schemas and with their quirks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from tests.data.fixtures_kit import (
    Good,
    Pairs,
    Promise,
    array,
    fill,
    lines,
    messages,
    parquet,
    put,
    put_zip,
    qa,
    turns,
)

CODE = "print('<image>', \"<video>\", '<|im_start|>', '<box>')"
"""Text that must not become special tokens."""


def openhermes(root: Path) -> Iterator[Promise]:
    """A system turn, or a field for it, or both; weights of any type; code."""

    def row(talk: list[dict[str, Any]], system: str | None = None) -> dict[str, Any]:
        return {"conversations": talk, "source": "demo", "category": None, "system_prompt": system}

    brief = [{"from": "system", "value": "Be brief.", "weight": None}]
    asked = [{"from": "human", "value": "2+2?", "weight": 0.0}, {"from": "gpt", "value": "4", "weight": 1}]
    shown = [("system", "Be brief."), ("user", "2+2?"), ("assistant", "4")]
    pairs: Pairs = [
        (row([*brief, *asked]), Good(shown)),
        (row(asked, "Be brief."), Good(shown)),
        (row([*brief, *asked], "Be verbose."), Good(shown)),
        (row(asked, " "), qa("2+2?", "4")),
        (row(turns(f"Explain {CODE}", CODE)), qa(f"Explain {CODE}", CODE)),
        (row([*asked, *brief]), "bad_order"),
        (row([{"from": "tool", "value": "x"}, *asked]), "bad_role"),
        (row([]), "bad_order"),
    ]
    path = root / "teknium/OpenHermes-2.5/openhermes2_5.json"
    yield array(path, "openhermes", fill(pairs, [(row(asked), qa("2+2?", "4"))] * 9, 12))


def lima(root: Path) -> Iterator[Promise]:
    talk = Good([("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")])
    pairs: Pairs = [
        ({"conversations": ["q", "a"], "source": "demo"}, qa()),
        ({"conversations": ["a", "b", "c", "d"], "source": "multi_turn"}, talk),
        ({"conversations": ["q", "a", "left over"], "source": "demo"}, qa()),
        ({"conversations": ["no answer"], "source": "demo"}, "bad_order"),
    ]
    yield lines(root / "GAIR/lima/train.jsonl", "lima", fill(pairs, [pairs[0]] * 9))
    put(root / "GAIR/lima/test.jsonl", b'{"conversations": ["no answers here"], "source": "demo"}\n')


def dolly(root: Path) -> Iterator[Promise]:
    def row(context: str, response: Any = "Ada.") -> dict[str, Any]:
        return {"instruction": "Who?", "context": context, "response": response, "category": "closed_qa"}

    pairs: Pairs = [
        (row("By Ada.[3]"), qa("Who?\n\nBy Ada.[3]", "Ada.")),
        (row(""), qa("Who?", "Ada.")),
        (row("", ""), "empty_turn"),
        (row("", None), "bad_record"),
    ]
    path = root / "databricks/databricks-dolly-15k/databricks-dolly-15k.jsonl"
    yield lines(path, "dolly", fill(pairs, [pairs[1]] * 9))


def mathematics(root: Path) -> Iterator[Promise]:
    """MetaMathQA, MathInstruct, orca-math, atlas, goat, camel: two fields each, and what stands beside them."""
    meta = [
        (
            {"type": "GSM", "query": "3*2?", "original_question": "Four?", "response": "6\n#### 6"},
            qa("3*2?", "6\n#### 6"),
        )
    ]
    yield array(root / "meta-math/MetaMathQA/MetaMathQA-395K.json", "metamath", [*meta * 10])
    instruct: Pairs = [({"source": "data/PoT/demo.json", "instruction": "5!?", "output": CODE}, qa("5!?", CODE))] * 10
    yield array(root / "TIGER-Lab/MathInstruct/MathInstruct.json", "mathinstruct", instruct)
    schema = pa.schema([("question", pa.string()), ("answer", pa.string())])
    orca: Pairs = [({"question": f"{n} jars?", "answer": "24."}, qa(f"{n} jars?", "24.")) for n in range(7)]
    for part in (0, 1):
        path = root / f"microsoft/orca-math-word-problems-200k/data/train-0000{part}-of-00002.parquet"
        yield parquet(path, "orca_math", orca[:7] if part == 0 else orca[:5], schema)

    def atlas(text: str, extra: Any, output: Any) -> dict[str, Any]:
        return {"instruction": text, "input": extra, "output": output, "answer": 42}

    sets: Pairs = [
        (atlas("Compute the sum.", "12 + 30", 42), qa("Compute the sum.\n\n12 + 30", "42")),
        (atlas("Compute 12 + 30", "12 + 30", 42.0), qa("Compute 12 + 30", "42")),
        (atlas("Half of it", 5, 2.5), qa("Half of it\n\n5", "2.5")),
        (atlas("None", None, None), "bad_record"),
    ]
    path = root / "AtlasUnified/atlas-math-sets/data/atlas-math-train.jsonl"
    yield lines(path, "atlas_math", fill(sets, [sets[0]] * 9, 12))
    goat = {"instruction": "Work out 12 + 7.", "input": "12 + 7", "output": "12 + 7 = 19", "answer": "19"}
    yield array(root / "tiedong/goat/dataset.json", "goat", [(goat, qa("Work out 12 + 7.", "12 + 7 = 19"))] * 10)
    yield camel(root)


def camel(root: Path) -> Promise:
    """A zip of one file for each problem, and what macOS leaves in zips."""
    members: dict[str, bytes] = {"math/": b"", "__MACOSX/math/._001.json": b"x", "math/.DS_Store": b"x"}
    wanted: list[Any] = []
    for number in range(10, 21):
        problem = {"role_1": "Mathematician_RoleType.ASSISTANT", "topic;": "Algebra", "sub_topic": "Linear",
                   "message_1": f"Solve {number}x=6.", "message_2": "x=3."}  # fmt: skip
        members[f"math/{number:03}.json"] = json.dumps(problem).encode()
        wanted.append(qa(f"Solve {number}x=6.", "x=3."))
    members["math/021.json"] = b'{"message_1": "cut'
    path = put_zip(root / "camel-ai/math/math.zip", members)
    return Promise("camel_math", path, (*wanted, "bad_json"))


_LONG_INSTRUCTION = """
booksum_en multi_doc_qa_en_paraphrasing sharegpt_en
short_instruction_from_alpaca_en single_doc_qa_en_paraphrasing translation_en2zh
booksum_zh multi_doc_qa_zh_paraphrasing sharegpt_zh
short_instruction_from_llama_chinese single_doc_qa_zh_paraphrasing
"""
LONG_INSTRUCTION = _LONG_INSTRUCTION.split()


def long_instruction(root: Path) -> Iterator[Promise]:
    """Messages, a context with questions, or ChatML text; older ones in zips."""
    root = root / "yuyijiong/Long-Instruction-with-Paraphrasing"
    chatml = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>"
    )
    talk = Good([("user", "c\n\nq"), ("assistant", "a"), ("user", "r"), ("assistant", "b")])
    good = Good([("system", "Be brief."), ("user", "q"), ("assistant", "a")])
    pairs: Pairs = [
        ({"messages": messages("报告……什么坏了？", "'阀门 3'。")}, qa("报告……什么坏了？", "'阀门 3'。")),
        ({"context": "c", "questions": ["q", "r"], "answers": ["a", "b"]}, talk),
        ({"chatml": chatml}, good),
        ({"context": "c", "questions": ["q"], "answers": [" "]}, "empty_turn"),
        ({"context": "c", "questions": ["q"], "answers": []}, "bad_record"),
        ({"text": "no ChatML"}, "bad_record"),
    ]
    for name in LONG_INSTRUCTION:
        yield lines(root / f"{name}.jsonl", "long_instruction", [*pairs, ({"messages": messages(name, "a")}, qa(name))])
    members = {f"en/{n}.json": json.dumps(record).encode() for n, (record, _) in enumerate(pairs)}
    path = put_zip(root / "legacy/Long-instruction-en.zip", members)
    yield Promise("long_instruction_legacy", path, tuple(wanted for _, wanted in pairs))


def long_texts(root: Path) -> Iterator[Promise]:
    """LongForm, LongAlign, LongCite, LongWriter, LongQLoRA, LongAlpaca, Long-Data-Collections."""
    schema = pa.schema([(name, pa.string()) for name in ("input", "output", "source", "subset")])
    form: Pairs = [({"input": "Rain.", "output": "A gauge.", "source": "demo"}, qa("Rain.", "A gauge."))] * 3
    yield parquet(root / "akoksal/LongForm/data/train-00000-of-00001.parquet", "longform", form, schema)
    align: Pairs = [
        ({"messages": messages("Document.", "\u200bReply\ufeff."), "length": 9000}, qa("Document.", "Reply.")),
        ({"messages": messages("Document.", "Reply.", "left over"), "length": 1}, qa("Document.", "Reply.")),
        ({"messages": [*messages("Document."), {"role": "assistant", "content": None}], "length": 1}, "bad_record"),
    ]
    yield lines(root / "THUDM/LongAlign-10k/long.jsonl", "longalign", align)
    cited = "<statement>Ada.<cite>[0-0]</cite></statement>"
    cite: Pairs = [
        ({"prompt": "<C0>Ada.<C1>1843.", "response": cited, "pages": "x" * 5_000_000}, qa("<C0>Ada.<C1>1843.", cited)),
        ({"prompt": "<C0>Ada.", "response": cited}, qa("<C0>Ada.", cited)),
        ({"prompt": "q"}, "bad_record"),
    ]  # fmt: skip
    yield lines(root / "THUDM/LongCite-45k/long.jsonl", "longcite", cite)
    good = Good([("system", "s"), ("user", "Write."), ("assistant", "Chapter 1")])
    writer: Pairs = [
        ({"messages": messages("Write.", "Chapter 1")}, qa("Write.", "Chapter 1")),
        ({"messages": [{"role": "system", "content": "s"}, *messages("Write.", "Chapter 1")]}, good),
    ]
    yield lines(root / "THUDM/LongWriter-6k/long.jsonl", "longwriter", writer)
    qlora: Pairs = [({"input": "Long text.", "output": "Summary."}, qa("Long text.", "Summary."))] * 2
    yield lines(root / "YeungNLP/LongQLoRA-Dataset/LongQLoRA-SFT-Data-39k.jsonl", "longqlora", qlora)
    put(root / "YeungNLP/LongQLoRA-Dataset/LongQLoRA-Pretrain-Data-54k.jsonl", b'{"text": "never read"}\n')
    alpaca: Pairs = [
        ({"instruction": "A paper.\nNow answer.", "input": "", "output": "Answer: New.", "file": "x.txt"},
         qa("A paper.\nNow answer.", "New.")),
        ({"instruction": "A paper.", "input": "More.", "output": "Not Answer: that"},
         qa("A paper.\n\nMore.", "Not Answer: that")),
    ]  # fmt: skip
    yield array(root / "Yukang/LongAlpaca-12k/LongAlpaca-12k.json", "longalpaca", alpaca)
    for name in ("natural_questions_10_200_docs", "booksum"):
        record = {
            "text": "Docs Q? Answer: ink",
            "prompt": f"Docs {name}?",
            "completion": " Answer: ink\nLong Answer: it",
        }
        pairs: Pairs = [(record, qa(f"Docs {name}?", "Answer: ink\nLong Answer: it"))] * 3
        path = root / f"togethercomputer/Long-Data-Collections/fine-tune/{name}.jsonl.zst"
        yield lines(path, "long_data_collections", pairs)


TEXTS = (openhermes, lima, dolly, mathematics, long_instruction, long_texts)
