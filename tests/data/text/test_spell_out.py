"""Functions, calls, results and reasoning are taught as the chat template writes them, or the record is rejected."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_vita.data.example import IGNORE_INDEX
from megatron_vita.data.sample import Sample
from megatron_vita.data.sources import load_table, record_to_sample
from megatron_vita.data.sources.media_store.store import MediaRule, open_store
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.data.text.chat import build_example
from megatron_vita.data.text.spell_out import spell_out
from megatron_vita.data.text.tokenizer import DEFAULT_TEMPLATE, VitaTokenizer
from megatron_vita.errors import DataError
from tests.data.kit import blank, tokenizer_folder

SPEC = PreprocessSpec(image_size=16, patch_size=4)
BODY = """
{%- macro body(content) -%}
{%- if content is string -%}{{- content -}}{%- else -%}{%- for part in content -%}
{%- if part['type'] == 'image' -%}{{- '<IMG_CONTEXT>\n' -}}
{%- elif part['type'] == 'video' -%}{{- '<video>\n' -}}
{%- else -%}{{- part['text'] -}}{%- endif -%}{%- endfor -%}{%- endif -%}
{%- endmacro -%}
"""
ABLE = (
    BODY
    + """
{%- if tools -%}
{{- '<|im_start|>system\n' -}}
{%- if messages[0].role == 'system' -%}{{- messages[0].content + '\n\n' -}}{%- endif -%}
{{- '# Tools\n<tools>' -}}{%- for tool in tools -%}{{- '\n' -}}{{- tool | tojson -}}{%- endfor -%}
{{- '\n</tools><|im_end|>\n' -}}
{%- elif messages[0].role == 'system' -%}
{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{{- '<|im_start|>user\n' -}}{{- body(message.content) -}}{{- '<|im_end|>\n' -}}
{%- elif message.role == 'assistant' -%}
{{- '<|im_start|>assistant' -}}
{%- if message.reasoning_content and loop.last -%}
{{- '\n<think>\n' + message.reasoning_content + '\n</think>\n' -}}
{%- endif -%}
{%- if message.content -%}{{- '\n' + message.content -}}{%- endif -%}
{%- for call in message.tool_calls -%}
{{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' -}}
{{- call.function.arguments | tojson -}}{{- '}\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\n' -}}
{%- elif message.role == 'tool' -%}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
{{- '\n<tool_response>\n' + message.content + '\n</tool_response>' -}}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{- '<|im_end|>\n' -}}{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""
)
"""Functions as Qwen2.5 writes them, reasoning of the last answer as Qwen3 does, pictures as InternVL does."""


@pytest.fixture(scope="module")
def able(tmp_path_factory: pytest.TempPathFactory) -> VitaTokenizer:
    return VitaTokenizer.load(tokenizer_folder(tmp_path_factory.mktemp("able"), ABLE))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> VitaTokenizer:
    return VitaTokenizer.load(tokenizer_folder(tmp_path_factory.mktemp("plain"), DEFAULT_TEMPLATE.read_text()))


TOOL = {"type": "function", "function": {"name": "weather_now", "description": "Is it \"wet\"?",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}  # fmt: skip
CALL: dict[str, Any] = {
    "id": "1",
    "type": "function",
    "function": {"name": "weather_now", "arguments": '{"city": "K\u00f6ln"}'},
}
ASK, SAY = {"role": "user", "content": "Is it raining?"}, {"role": "assistant", "content": "Let me look."}


def sample_of(record: Any, row: str = "openai") -> Sample:
    sample, _ = record_to_sample(record, load_table()[row], store=open_store(MediaRule()), source="s", line=1)
    assert isinstance(sample, Sample)
    return sample


def stock(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as transformers asks for them: arguments as objects."""
    messages = copy.deepcopy(messages)
    for message in messages:
        for call in message.get("tool_calls") or ():
            call["function"] = {
                "name": call["function"]["name"],
                "arguments": json.loads(CALL["function"]["arguments"]),
            }
    return messages


CALLED = '<tool_call>\n{"name": "weather_now", "arguments": {"city": "K\u00f6ln"}}\n</tool_call>'
TALKS: list[tuple[list[dict[str, Any]], list[Any] | None, str]] = [
    ([ASK, SAY], [TOOL], "Let me look.<|im_end|>\n"),
    ([{"role": "system", "content": "Be brief."}, ASK, SAY], [TOOL], "Let me look.<|im_end|>\n"),
    ([ASK, {**SAY, "tool_calls": [CALL]}], [TOOL], f"Let me look.\n{CALLED}<|im_end|>\n"),
    ([ASK, {**SAY, "content": None, "tool_calls": [CALL, CALL]}, {"role": "tool", "content": "wet"},
      {"role": "tool", "content": "wet"}, {"role": "assistant", "content": "Yes."}], None,
     f"{CALLED}\n{CALLED}<|im_end|>\nYes.<|im_end|>\n"),
    ([ASK, {**SAY, "reasoning_content": "think hard"}], None,
     "<think>\nthink hard\n</think>\n\nLet me look.<|im_end|>\n"),
]  # fmt: skip


@pytest.mark.parametrize(("messages", "tools", "learnt"), TALKS)
def test_taught_as_the_template_writes_it(
    able: VitaTokenizer, messages: list[dict[str, Any]], tools: list[Any] | None, learnt: str
) -> None:
    sample = sample_of({"messages": messages, "tools": tools})
    example = build_example(spell_out(sample, able), [], [], tokenizer=able, spec=SPEC)
    wanted = able.template.render([{**m, "content": m["content"] or ""} for m in stock(messages)], False, tools=tools)
    assert able.decode(example.tokens, skip_special_tokens=False) == wanted
    labels = able.decode([one for one in example.labels if one != IGNORE_INDEX], skip_special_tokens=False)
    assert labels == learnt


FORMS: list[tuple[str, dict[str, Any]]] = [
    ("sharegpt", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
                  "tools": json.dumps([TOOL["function"]])}),
    ("sharegpt", {"conversations": [{"from": "human", "value": "q"},
                                    {"from": "function_call", "value": '{"name": "weather_now", "arguments": {}}'},
                                    {"from": "observation", "value": "wet"}, {"from": "gpt", "value": "a"}]}),
    ("openai", {"messages": [ASK, {**SAY, "function_call": CALL["function"]}]}),
    ("openai", {"messages": [ASK, SAY], "functions": [TOOL["function"]]}),
    ("openai", {"messages": [ASK, {**SAY, "reasoning": "think hard"}]}),
    ("alpaca", {"instruction": "q", "output": "a", "tools": [TOOL]}),
    ("openai", {"messages": [{"role": "user", "content": [
        {"type": "image", "image": {"bytes": b"x"}}, {"type": "text", "text": "\nq"}]}, SAY], "tools": [TOOL]}),
]  # fmt: skip


@pytest.mark.parametrize(("row", "record"), FORMS)
def test_forms_of_the_field(able: VitaTokenizer, plain: VitaTokenizer, row: str, record: dict[str, Any]) -> None:
    sample = sample_of(record, row)
    spelt = spell_out(sample, able)
    assert spelt.is_plain
    images = [blank(16, 16)] * len(sample.images)
    text = able.decode(build_example(spelt, images, [], tokenizer=able, spec=SPEC).tokens)
    assert "weather_now" in text or "think hard" in text
    with pytest.raises(DataError, match=r"^(tools|reasoning)_unread: .*leaves out|cannot render"):
        spell_out(sample, plain)
    with pytest.raises(DataError, match=r"^(tools|reasoning)_unread"):
        build_example(sample, images, [], tokenizer=able, spec=SPEC)


def test_a_plain_sample_is_left_as_it_is(able: VitaTokenizer) -> None:
    sample = sample_of({"messages": [ASK, SAY], "tools": []})
    assert spell_out(sample, able) is sample


def test_a_masked_answer_stays_masked(able: VitaTokenizer) -> None:
    talk = [ASK, {**SAY, "tool_calls": [CALL], "weight": 0}, {"role": "tool", "content": "wet"},
            {"role": "assistant", "content": "Yes."}]  # fmt: skip
    example = build_example(spell_out(sample_of({"messages": talk}), able), [], [], tokenizer=able, spec=SPEC)
    assert able.decode([one for one in example.labels if one != IGNORE_INDEX]) == "Yes.\n"


BAD: list[dict[str, Any]] = [
    {"messages": [ASK, SAY], "tools": [{**TOOL, "function": {"name": "f", "description": "x<|im_end|>"}}]},
    {"messages": [ASK, {**SAY, "function_call": {"name": "f", "arguments": '{"a": "<|im_start|>user"}'}}]},
    {"messages": [ASK, {**SAY, "function_call": {"name": "f", "arguments": "no json"}}]},
    {"messages": [ASK, {**SAY, "tool_calls": [{"id": "1"}]}]},
    {"messages": [ASK, SAY], "tools": "no json"},
    {"messages": [ASK, SAY], "tools": [TOOL], "functions": [TOOL]},
]


@pytest.mark.parametrize("record", BAD)
def test_what_cannot_be_kept_is_rejected(able: VitaTokenizer, record: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"^tools_unread: "):
        spell_out(sample_of(record), able)


def test_reasoning_that_the_template_leaves_out_is_not_lost(able: VitaTokenizer) -> None:
    early = [ASK, {**SAY, "reasoning_content": "think hard"}, ASK, SAY]  # written for the last answer alone
    with pytest.raises(DataError, match=r"^reasoning_unread: .*leaves out"):
        spell_out(sample_of({"messages": early}), able)
    with pytest.raises(DataError, match=r"^bad_role"):  # a result without a call
        sample_of({"messages": [ASK, SAY, {"role": "tool", "content": "wet"}, SAY]})
    twice = [ASK, {**SAY, "reasoning_content": "a", "thinking": "b"}]
    with pytest.raises(DataError, match=r"^reasoning_unread"):
        sample_of({"messages": twice})


@pytest.mark.parametrize("reasoning", ["hm", "\nhm\n", "\n\nhm", " hm "])
@pytest.mark.parametrize("strip", [".strip('\\n')", ".strip()", ""])
def test_blanks_that_a_template_strips_are_stripped_or_the_record_is_rejected(
    tmp_path: Path, reasoning: str, strip: str
) -> None:
    template = ABLE.replace("message.reasoning_content +", f"message.reasoning_content{strip} +")
    tok = VitaTokenizer.load(tokenizer_folder(tmp_path / "tok", template))
    talk = [ASK, {**SAY, "reasoning_content": reasoning}]
    rendered = tok.template.render(talk, False)
    try:
        spelt = spell_out(sample_of({"messages": talk}), tok)
    except DataError as error:
        assert (reasoning, strip) == (" hm ", ".strip()")
        assert "changes its words" in str(error)  # noqa: PT017
        return
    assert "".join(f"<|im_start|>{turn.role}\n{turn.parts[0].text}<|im_end|>\n" for turn in spelt.messages) == rendered
