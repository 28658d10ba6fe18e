"""Guided decoding without a model: whatever the logits are, the answer is JSON that matches its schema."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vita.data.text.tokenizer import VitaTokenizer
from megatron_vita.errors import ConfigError
from megatron_vita.inference.grammar import ANY_OBJECT, MAX_CHARACTERS, _try_out, check_guide, library
from megatron_vita.inference.guide import Guides
from megatron_vita.inference.sampling import Sampled, SamplingConfig, SequenceSampler, sample
from tests.data.kit import tokenizer_folder

jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("llguidance")

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5, "description": "as in the passport"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["cat", "d\u00f6g", None]},
        "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "maxItems": 2},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
    "$defs": {"tag": {"type": "string", "pattern": "^[a-z]{1,3}$"}},
}
HEAVY = json.dumps({"type": "string", "pattern": "^((a{1000}){1000}){1000}$"})
TEMPERATURES = st.sampled_from([0.0, 0.7, 3.0])


@lru_cache(maxsize=1)
def kit() -> tuple[VitaTokenizer, frozenset[int], Guides]:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = VitaTokenizer.load(tokenizer_folder(Path(folder)))
    ends = frozenset((tokenizer.eos_id, tokenizer.pad_id))
    return tokenizer, ends, Guides(tokenizer, ends)


def answer(config: SamplingConfig, seed: int, limit: int = 150) -> tuple[list[int], Sampled]:
    """Tokens of an answer to random logits without its end token, and the last thing that was sampled."""
    tokenizer, ends, guides = kit()
    width = tokenizer.vocab_size + 37  # an embedding is padded
    sampler = SequenceSampler(config, (), width, ends, guides.begin(config.guide or ""))
    draw = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    while True:
        logits = 5 * torch.randn(1, width, generator=draw)
        logits[0, tokenizer.vocab_size :] += 50
        logits[0, sorted(ends)] += 10
        (one,) = sample(logits, [sampler])
        if one.error or one.token in ends:
            return ids, one
        ids.append(one.token)
        if one.complete or len(ids) == limit:
            return ids, one


CLOSED = {"type": "object", "additionalProperties": False}
leaves = st.sampled_from([
    {"type": "boolean"}, {"type": "null"}, {"type": "integer", "minimum": -3, "maximum": 1200}, {"const": "x y"},
    {"type": "string", "maxLength": 4}, {"enum": [1, "\u00e9\"", [True]]}, {"type": "string", "pattern": "^a+b?$"},
    {"type": ["integer", "null"], "maximum": 9, "minimum": 0},
])  # fmt: skip
schemas = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(lambda one, most: {"type": "array", "items": one, "maxItems": most}, inner, st.integers(0, 2)),
        st.builds(lambda some: {"anyOf": some}, st.lists(inner, min_size=1, max_size=2)),
        st.builds(
            lambda some: {
                "type": "object",
                "properties": some,
                "required": sorted(some),
                "additionalProperties": False,
            },
            st.dictionaries(st.sampled_from(["a", "\u00fc", "c d"]), inner, max_size=2),
        ),
    ),
    max_leaves=5,
)


@settings(max_examples=50)
@given(schema=schemas, seed=st.integers(0, 999), temperature=TEMPERATURES)
def test_an_answer_matches_its_schema(schema: dict[str, Any], seed: int, temperature: float) -> None:
    config = SamplingConfig(guide=json.dumps(schema), temperature=temperature, seed=seed)
    ids, last = answer(config, seed, 400)
    assert last.error is None
    text = kit()[0].decode(ids)
    if len(ids) < 400:
        jsonschema.validate(json.loads(text), schema)


def test_any_object() -> None:
    found = [answer(SamplingConfig(guide=ANY_OBJECT), seed) for seed in range(12)]
    whole = [json.loads(kit()[0].decode(ids)) for ids, _ in found if len(ids) < 150]
    assert len(whole) > 3
    assert all(isinstance(one, dict) for one in whole)


def test_an_answer_goes_on_where_the_grammar_does() -> None:
    """Ids of digits may follow a number for ever: only an end token ends it. A bracket ends an object at once."""
    number = SamplingConfig(guide='{"type": "integer"}')
    ids, last = answer(number, 1)
    assert last.token in kit()[1]
    assert last.complete
    int(kit()[0].decode(ids))
    _, last = answer(SamplingConfig(guide=json.dumps(PERSON)), 1)
    assert last.complete
    assert kit()[0].decode([last.token]).endswith("}")


@pytest.mark.parametrize("least", [3, 12])
def test_too_short_an_answer_goes_on_unless_it_cannot(least: int) -> None:
    for seed in range(5):
        ids, _ = answer(SamplingConfig(guide='{"type": "integer"}', min_tokens=least), seed)
        assert len(ids) >= least
        ids, _ = answer(SamplingConfig(guide='{"enum": [true]}', min_tokens=least), seed)
        assert kit()[0].decode(ids) == "true"


@pytest.mark.parametrize(("seed", "temperature"), [(1, 0.0), (2, 0.7), (3, 3.0)])
def test_everything_else_works_beside_it(seed: int, temperature: float) -> None:
    """Penalties, biases and filters move the choice; tokens of the answer and logits as they were are reported."""
    config = SamplingConfig(
        guide=json.dumps(PERSON), temperature=temperature, seed=seed, top_k=3, min_p=0.1, logprobs=2,
        repetition_penalty=1.3, frequency_penalty=1, logit_bias=((kit()[0].eos_id, 100.0), (0, -100.0)),
    )  # fmt: skip
    ids, last = answer(config, seed, 60)
    assert (ids, last) == answer(config, seed, 60)
    assert last.logprob is not None
    assert len(last.top) == 2
    if len(ids) < 60:
        jsonschema.validate(json.loads(kit()[0].decode(ids)), PERSON)


def test_company_changes_nothing() -> None:
    tokenizer, ends, guides = kit()
    configs = [
        SamplingConfig(guide=json.dumps(PERSON), temperature=1, seed=3), SamplingConfig(),
        SamplingConfig(guide=ANY_OBJECT), SamplingConfig(temperature=1, seed=4),
    ]  # fmt: skip
    width = tokenizer.vocab_size

    def begin() -> list[SequenceSampler]:
        return [
            SequenceSampler(one, (), width, ends, None if one.guide is None else guides.begin(one.guide))
            for one in configs
        ]

    together, alone = begin(), begin()
    for step in range(20):
        logits = torch.randn(len(configs), width, generator=torch.Generator().manual_seed(step))
        both = sample(logits.clone(), together)
        assert both == [sample(row[None], [one])[0] for row, one in zip(logits, alone, strict=True)]
        assert both[1].token == logits[1].argmax()
        alone = [  # what has ended begins again
            fresh if got.complete else old for fresh, old, got in zip(begin(), alone, both, strict=True)
        ]
        together = [fresh if got.complete else old for fresh, old, got in zip(begin(), together, both, strict=True)]


def test_too_much_work_for_a_token_ends_the_answer_with_an_error() -> None:
    _, last = answer(SamplingConfig(guide=HEAVY), 0)
    assert last.error is not None
    assert "too many" in last.error


def nested(depth: int) -> str:
    return '{"items":' * depth + "{}" + "}" * depth


MALFORMED = [
    ("{", "Expecting"), ("[]", "no object"), ('{"type": "foo"}', "foo"),
    ('{"type": "string", "format": "telex"}', "telex"), ('{"$ref": "file:///etc/passwd"}', "not fetch"),
    ('{"not": {}}', "not"), ('{"minimum": NaN}', ""), ('{"type": "array", "uniqueItems": true}', "uniqueItems"),
    ('{"$ref": "#/$defs/gone"}', "gone"), ('{"$ref": "#"}', "no text matches"),
    ('{"$ref": "http://127.0.0.1:9/x.json"}', "not fetch"), (nested(200), "recursion"), (nested(6_000), "nested"),
    ('{"allOf": [{"type": "string"}, {"type": "integer"}]}', "incompatible"),
    (json.dumps({"type": "string", "pattern": "(" * 5000 + "a" + ")" * 5000}), "regex"),
    (json.dumps({"allOf": [{"anyOf": [{"properties": {f"a{i}": {"const": j}}} for j in range(2)]}
                           for i in range(20)]}), "too large"),
]  # fmt: skip
ENDLESS = {
    "multiple": {"type": "integer", "multipleOf": 10_000_019},
    "multiples": {"anyOf": [{"type": "integer", "multipleOf": one} for one in range(900, 960)]},
    "patterns": {"allOf": [{"type": "string", "pattern": f".*{one}.*"} for one in range(30)]},
}


def refused(schema: str) -> str:
    with pytest.raises(ConfigError, match="cannot guide") as error:
        check_guide(schema)
    assert len(str(error.value)) < 500
    return str(error.value)


def test_what_cannot_guide_is_refused() -> None:
    for schema, why in MALFORMED:
        said = _try_out(schema)  # what the child does
        assert said is not None, schema
        assert why in said
        assert len(said) < 400
    assert "characters" in refused(" " * (MAX_CHARACTERS + 1))


def test_a_child_tries_schemas_out() -> None:
    check_guide(json.dumps(PERSON))
    assert refused(HEAVY) == refused(HEAVY)
    assert "too many" in refused(HEAVY)


def test_a_trial_that_a_busy_machine_cut_short_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*_: Any, timeout: float, **__: Any) -> Any:
        raise subprocess.TimeoutExpired("child", timeout)

    schema = '{"const": "asked twice"}'
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", late)
        with pytest.raises(ConfigError, match="try again"):
            check_guide(schema)
    check_guide(schema)


@pytest.mark.slow
@pytest.mark.parametrize("name", ENDLESS)
def test_what_takes_too_long_is_refused(name: str) -> None:
    assert "seconds of computing" in refused(json.dumps(ENDLESS[name]))


def test_what_pydantic_writes_is_taken() -> None:
    from pydantic import BaseModel, Field

    class Part(BaseModel):
        label: str = Field(max_length=3)
        score: float | None = None

    class Whole(BaseModel):
        parts: list[Part] = Field(max_length=2)
        step: int = Field(multiple_of=5, ge=0, le=10)

    schema = json.dumps(Whole.model_json_schema())
    assert _try_out(schema) is None
    ids, _ = answer(SamplingConfig(guide=schema), 5, 400)
    Whole.model_validate_json(kit()[0].decode(ids))


def test_options_of_llguidance_in_a_schema_are_not_obeyed() -> None:
    schema = {"enum": [[1, 2]], "x-guidance": {"item_separator": ";", "whitespace_pattern": "(a{1000}){1000}"}}
    for seed in range(5):
        ids, _ = answer(SamplingConfig(guide=json.dumps(schema)), seed)
        assert json.loads(kit()[0].decode(ids)) == [1, 2]


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    library.cache_clear()
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ConfigError, match="pip install"):
        check_guide(ANY_OBJECT)
    monkeypatch.undo()
    check_guide(ANY_OBJECT)


class _Odd(VitaTokenizer):
    """Changes what it encodes."""

    def encode(self, text: str, *, first: bool = False) -> list[int]:
        return super().encode(f" {text}", first=first)


def test_a_tokenizer_that_changes_texts_spells_them_by_longest_tokens() -> None:
    tokenizer, ends, _ = kit()
    odd = object.__new__(_Odd)
    odd.__dict__.update(tokenizer.__dict__)
    guide = Guides(odd, ends).begin('{"enum": ["which digit", "which picture"]}')
    sampler = SequenceSampler(SamplingConfig(), (), tokenizer.vocab_size, ends, guide)
    ids: Sequence[Sampled] = []
    while not ids or not ids[-1].complete:
        ids = [*ids, *sample(torch.zeros(1, tokenizer.vocab_size), [sampler])]
    assert json.loads(tokenizer.decode(one.token for one in ids)) in ("which digit", "which picture")


def test_a_guide_is_a_schema_as_text() -> None:
    with pytest.raises(ConfigError, match="guide="):
        replace(SamplingConfig(), guide={"type": "object"})  # type: ignore[arg-type]
