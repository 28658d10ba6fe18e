"""Texts far too long for a pack cost no more than their beginnings, and come out as if they had been read whole."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_vita.data.compile.record import Compiler, Rules
from megatron_vita.data.sample import Document, Message, Sample, Text
from megatron_vita.data.sources import load_mix
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.data.text import long_text
from megatron_vita.data.text.long_text import beginnings
from megatron_vita.data.text.tokenizer import VitaTokenizer
from megatron_vita.errors import DataError
from tests.data.kit import tokenizer_folder

ROOT = Path(__file__).parents[3]
WORDS = "".join(f"word {n}, \n\n  Wörter — {n * 7919 % 1000} 文字\U0001f600" for n in range(400))
LIMIT = 60


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> VitaTokenizer:
    return VitaTokenizer.load(tokenizer_folder(tmp_path_factory.mktemp("tok")))


RECORDS: list[dict[str, Any]] = [
    {"text": WORDS},
    {"messages": [{"role": "user", "content": WORDS}, {"role": "assistant", "content": "seven"}]},
    {"messages": [{"role": "user", "content": "Which"}, {"role": "assistant", "content": WORDS}]},
    {"messages": [{"role": "system", "content": WORDS}, {"role": "user", "content": WORDS + "?"},
                  {"role": "assistant", "content": "seven"}]},
]  # fmt: skip


@pytest.mark.parametrize("overlong", ["truncate", "reduce-frames"])
@pytest.mark.parametrize("record", RECORDS)
def test_a_long_text_is_cut_as_if_it_had_been_tokenised_whole(
    tokenizer: VitaTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: dict[str, Any], overlong: str
) -> None:
    (tmp_path / "r.jsonl").write_text(json.dumps(record))
    source = {"source": "text" if "text" in record else "openai", "data_paths": [str(tmp_path / "r.jsonl")]}
    (tmp_path / "mix.yaml").write_text(json.dumps({"dataset": {"one": source}}))
    (file,) = load_mix(tmp_path / "mix.yaml")
    spec = PreprocessSpec(image_size=16, patch_size=4)
    compiler = Compiler(tokenizer, Rules(spec=spec, seq_length=LIMIT, overlong=overlong))

    def outcome() -> Any:
        try:
            made = compiler.compile(record, file, 1)
        except DataError as error:
            return str(error).partition(":")[0]
        return made.example.tokens.tolist(), made.example.labels.tolist(), made.shortened

    whole = outcome()
    seen: list[int] = []
    encode = VitaTokenizer.encode

    def watched(self: VitaTokenizer, text: str, **first: bool) -> list[int]:
        ids = encode(self, text, **first)
        seen.append(len(ids))
        return ids

    monkeypatch.setattr(VitaTokenizer, "encode", watched)
    monkeypatch.setattr(long_text, "SHORT", 50)
    assert outcome() == whole
    two_long = len(record.get("messages", ())) == 3  # of which one alone is cut: nothing to learn is left
    assert (whole == "overlong") == (overlong != "truncate" or two_long)
    assert max(seen) < 6 * LIMIT < len(encode(tokenizer, WORDS))


def test_what_may_fit_is_left_as_it_is(tokenizer: VitaTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_text, "SHORT", 50)
    sample = Sample((Message("user", (Text(WORDS),)), Message("assistant", (Text("a"),))))
    document = Document(WORDS, "s", 1)
    tokens = len(tokenizer.encode(WORDS))
    for limit in (tokens, tokens // 2 + 1):
        assert beginnings(sample, limit, tokenizer) == sample
        assert beginnings(document, limit, tokenizer) is document
    cut = beginnings(document, 100, tokenizer)
    assert isinstance(cut, Document)
    ids, whole = tokenizer.encode(cut.text), tokenizer.encode(WORDS)
    assert 200 < len(ids) < len(whole)
    assert np.array_equal(ids[:100], whole[:100])


_CHILD = """
import re, sys
from pathlib import Path
from megatron_vita.data.compile.run import Options, run
from megatron_vita.data.spec import PreprocessSpec
where = Path(sys.argv[1])
run(Options(data_config=str(where / "mix.yaml"), tokenizer=str(where / "tok"), output=str(where / "out/set"),
            seq_length=4096, spec=PreprocessSpec(image_size=16, patch_size=4), overlong="truncate", progress=False))
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_line_of_100_mb_is_compiled_within_a_gibibyte(tmp_path: Path) -> None:
    tokenizer_folder(tmp_path / "tok")
    words = "Wörter und mehr ".encode()
    (tmp_path / "r.jsonl").write_bytes(
        b'{"text": "short"}\n{"text": "' + words * ((100 << 20) // len(words)) + b'"}\n{"text": "short"}\n'
    )
    mix = {"dataset": {"long": {"source": "text", "data_paths": [str(tmp_path / "r.jsonl")]}}}
    (tmp_path / "mix.yaml").write_text(json.dumps(mix))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _CHILD, str(tmp_path)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    most = int(re.findall(r"\d+", done.stdout)[-1])
    assert most < 1 << 20, f"{most / 1024:.0f} MiB"
