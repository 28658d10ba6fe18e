"""Bodies and chunks of responses: OpenAI's types, and streams that say what the whole says."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from megatron_vita.inference.openai import Chunks, Kind, response
from megatron_vita.inference.prompt import Generation, Output, TokenLogprob

BYTES = (b"a", b" ", b"\xc3", b"\xa9", b"\xe2\x82", b"\xac", "é€".encode(), b"<|im_end|>")
KINDS: list[Kind] = ["chat", "completion"]


def spell(token: int) -> bytes:
    """A few tokens, some of them parts of characters."""
    return BYTES[token]


token = st.integers(0, len(BYTES) - 1)
value = st.floats(max_value=0, allow_nan=False)
logprob = st.builds(TokenLogprob, token, value, st.lists(st.tuples(token, value), max_size=3).map(tuple))


@st.composite
def streams(draw: st.DrawFn, wanted: bool) -> tuple[list[Output], Generation]:
    """What an engine may give of an answer, piece by piece, and the whole."""
    pieces = [
        Output("r", text, None, logprobs if wanted else ())
        for text, logprobs in draw(
            st.lists(st.tuples(st.text(max_size=3), st.lists(logprob, max_size=3).map(tuple)), min_size=1, max_size=5)
        )
    ]
    tokens = tuple(one for piece in pieces for one in piece.logprobs)
    answer = Generation(
        "".join(piece.text for piece in pieces),
        tuple(one.id for one in tokens),
        draw(st.sampled_from(["stop", "length"])),
        draw(st.none() | st.text() | st.integers(0, 9)),
        prompt_tokens=draw(st.integers(1, 99)),
        cached_tokens=1,
        logprobs=tokens if wanted else None,
    )
    return [*pieces[:-1], replace(pieces[-1], outcome=answer)], answer


def checked(kind: Kind, body: Mapping[str, Any], *, chunk: bool = False) -> None:
    """Refuse what is no JSON or not of OpenAI's type, coerced values included."""
    text = json.dumps(body, allow_nan=False)
    if kind == "chat":
        (ChatCompletionChunk if chunk else ChatCompletion).model_validate_json(text, strict=True)
        return
    if chunk:  # the package has one type for both forms, but only the last chunk can say why the text ends
        for choice in body["choices"]:
            assert choice["finish_reason"] in (None, "stop", "length")
        choices = [{**choice, "finish_reason": choice["finish_reason"] or "stop"} for choice in body["choices"]]
        text = json.dumps({**body, "choices": choices})
    Completion.model_validate_json(text, strict=True)


def joined(kind: Kind, chunks: Sequence[Mapping[str, Any]], index: int) -> dict[str, Any]:
    """A choice of a response, put together from its chunks as clients do it."""
    mine = [one for chunk in chunks for one in chunk["choices"] if one["index"] == index]
    assert [one["finish_reason"] is None for one in mine] == [True] * (len(mine) - 1) + [False]
    parts = [one["logprobs"] for one in mine if one["logprobs"] is not None]
    logprobs: dict[str, Any] | None = None
    if parts:
        names = [name for name, values in parts[0].items() if isinstance(values, list)]
        logprobs = {**parts[0], **{name: [one for part in parts for one in part[name]] for name in names}}
    ending = {name: mine[-1][name] for name in ("finish_reason", "stop_reason")}
    if kind == "completion":
        return {"index": index, "text": "".join(one["text"] for one in mine), "logprobs": logprobs, **ending}
    assert [one["delta"].get("role") for one in mine] == ["assistant"] + [None] * (len(mine) - 1)
    content = "".join(one["delta"].get("content", "") for one in mine)
    message = {"role": "assistant", "content": content, "refusal": None}
    return {"index": index, "message": message, "logprobs": logprobs, **ending}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(data=st.data())
def test_the_chunks_of_all_choices_are_the_response(kind: Kind, data: st.DataObject) -> None:
    wanted, with_usage = data.draw(st.booleans()), data.draw(st.booleans())
    choices = data.draw(st.lists(streams(wanted), min_size=1, max_size=3))
    prompts = data.draw(st.sampled_from([1, len(choices)]))
    answers = [answer for _, answer in choices]
    body = response(kind, answers, id="x", model="m", spell=spell, prompts=prompts)
    checked(kind, body)

    write = Chunks(kind, id="x", model="m", spell=spell, include_usage=with_usage, prompts=prompts)
    made = [write.open(index) for index in range(len(choices))]
    rest = {index: list(outputs) for index, (outputs, _) in enumerate(choices)}
    while rest:
        index = data.draw(st.sampled_from(sorted(rest)))
        made.append(write.piece(index, rest[index].pop(0)))
        if not rest[index]:
            made.append(write.close(index, answers[index]))
            del rest[index]
    chunks = [one for one in made if one is not None]
    assert all(("usage" in one) == with_usage and not one.get("usage") for one in chunks)
    last = write.usage(answers)
    for one in [*chunks, *([last] if last else [])]:
        checked(kind, one, chunk=True)
        assert (one["id"], one["model"], one["created"]) == ("x", "m", chunks[0]["created"])
    assert (last or body)["usage"] == body["usage"]
    assert (last is not None) == with_usage
    for index, choice in enumerate(body["choices"]):
        got = joined(kind, chunks, index)
        if not answers[index].ids:  # no token, so nothing was said of any
            got["logprobs"] = choice["logprobs"]
        assert got == choice


def test_a_completion_may_begin_with_its_prompt() -> None:
    answers = [Generation("b", (98,), "stop"), Generation("d", (100,), "stop")]
    body = response("completion", answers, id="x", model="m", spell=spell, prompts=2, echo=("a", "c"))
    assert [choice["text"] for choice in body["choices"]] == ["ab", "cd"]
    assert body["usage"]["completion_tokens"] == 2
    opened = Chunks("completion", id="x", model="m", spell=spell, prompts=2, echo=("a", "c")).open(1)
    assert opened is not None
    assert opened["choices"][0] == {"index": 1, "text": "c", "logprobs": None, "finish_reason": None}


def test_a_completion_has_its_own_logprobs() -> None:
    tokens = (
        TokenLogprob(0, -0.5, ((0, -0.5), (1, -1.5))), TokenLogprob(2, -2.0, ((0, -0.25),)),
        TokenLogprob(3, float("-inf"), ()), TokenLogprob(1, -1.0, ((2, -3.0), (3, -4.0))),
    )  # fmt: skip
    answer = Generation("aé ", (0, 2, 3, 1), "length", logprobs=tokens, prompt_logprobs=(None, TokenLogprob(0, -1, ())))
    (choice,) = response("completion", [answer], id="x", model="m", spell=spell)["choices"]
    assert choice["logprobs"] == {
        "tokens": ["a", "bytes:\\xc3", "bytes:\\xa9", " "],
        "token_logprobs": [-0.5, -2.0, -9999.0, -1.0],
        "top_logprobs": [
            {"a": -0.5, " ": -1.5}, {"bytes:\\xc3": -2.0, "a": -0.25}, {"bytes:\\xa9": -9999.0},
            {" ": -1.0, "bytes:\\xc3": -3.0, "bytes:\\xa9": -4.0},
        ],
        "text_offset": [0, 1, 1, 2],
    }  # fmt: skip
    assert choice["prompt_logprobs"] == [None, {"0": {"logprob": -1, "rank": None, "decoded_token": "a"}}]


def test_tokens_of_several_prompts_are_counted_once_each() -> None:
    answers = [Generation("a", (0,), "stop", None, prompt_tokens=n, cached_tokens=2) for n in (5, 5, 7, 7)]
    body = response("completion", answers, id="x", model="m", spell=spell, prompts=2)
    assert body["usage"] == {
        "prompt_tokens": 12, "completion_tokens": 4, "total_tokens": 16, "prompt_tokens_details": {"cached_tokens": 4}
    }  # fmt: skip
