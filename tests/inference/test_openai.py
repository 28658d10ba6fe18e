"""Bodies of OpenAI's chat completions: what is read, what is refused, what is answered."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vita.data.media.video.open import open_video
from megatron_vita.data.rejects import reject
from megatron_vita.data.sample import Image, MediaFile, Text, Video
from megatron_vita.errors import ConfigError
from megatron_vita.inference.openai import ApiRequest, ReadOptions, RequestError, chat_response, error_object
from megatron_vita.inference.openai import chat_request as read_chat
from megatron_vita.inference.openai import messages as messages_module
from megatron_vita.inference.openai.sampling import seed_of
from megatron_vita.inference.prompt import Generation, TokenLogprob
from megatron_vita.inference.sampling import SamplingConfig
from tests.data.kit import picture

USER = [{"role": "user", "content": "Why?"}]


def body(**more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": USER, **more}


def chat_request(body: Any, *, id: str, **options: Any) -> ApiRequest:
    """As a line of a batch file is read."""
    return read_chat(body, id=id, options=ReadOptions(strict=True, **options))


def refused(body: Any, **more: Any) -> RequestError:
    with pytest.raises(RequestError) as error:
        chat_request(body, id="r", **more)
    return error.value


# ---- sampling ----


def test_defaults_are_openais() -> None:
    (request,) = chat_request({"messages": USER}, id="r").requests
    assert request.id == "r-0"
    assert request.max_new_tokens is None
    assert request.sampling == SamplingConfig(temperature=1.0, seed=seed_of("r"))


def test_every_field_is_read() -> None:
    chat = chat_request(
        body(
            max_tokens=7, temperature=0.5, top_p=0.9, top_k=5, min_p=0.1, seed=3, stop=["\n", "END"],
            stop_token_ids=[4, 5], ignore_eos=True, min_tokens=2, presence_penalty=0.25, frequency_penalty=-0.5,
            repetition_penalty=1.5, logit_bias={"17": -100, "3": 2.5}, logprobs=True, top_logprobs=4, prompt_logprobs=1,
            user="u", metadata={"a": "b"}, tools=[], tool_choice="none", response_format={"type": "text"}, stream=False,
            service_tier=None,
        ),
        id="r",
    )  # fmt: skip
    (request,) = chat.requests
    assert (chat.model, chat.stream, request.max_new_tokens) == ("m", False, 7)
    assert request.sampling == SamplingConfig(
        temperature=0.5, top_p=0.9, top_k=5, min_p=0.1, seed=3, stop=("\n", "END"), stop_token_ids=(4, 5),
        ignore_eos=True, min_tokens=2, presence_penalty=0.25, frequency_penalty=-0.5, repetition_penalty=1.5,
        logit_bias=((17, -100.0), (3, 2.5)), logprobs=4, prompt_logprobs=1,
    )  # fmt: skip


def test_null_means_the_default() -> None:
    names = ("temperature", "top_p", "stop", "seed", "max_tokens", "n", "logit_bias", "logprobs", "tools", "anything")
    assert chat_request(body(**dict.fromkeys(names)), id="r") == chat_request(body(), id="r")


def test_one_stop_string_minus_one_of_top_k_and_the_new_name_of_the_limit() -> None:
    (request,) = chat_request(body(stop="x", top_k=-1, max_completion_tokens=9, logprobs=True), id="r").requests
    assert (request.sampling.stop, request.sampling.top_k) == (("x",), 0)
    assert (request.sampling.logprobs, request.max_new_tokens) == (0, 9)


def test_without_a_seed_it_is_derived_from_the_name() -> None:
    seeds = [chat_request(body(), id=name).requests[0].sampling.seed for name in ("a", "b", "a")]
    assert seeds[0] == seeds[2] != seeds[1]


def test_choices_differ_in_their_seeds_alone() -> None:
    requests = chat_request(body(n=3, seed=2**63 - 2), id="r").requests
    assert [one.id for one in requests] == ["r-0", "r-1", "r-2"]
    assert [one.sampling.seed for one in requests] == [2**63 - 2, 2**63 - 1, -(2**63)]
    assert len({one.sample for one in requests}) == 1


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"temperature": -1}, "temperature"), ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"), ({"temperature": 10**400}, "temperature"), ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"), ({"top_k": -2}, "top_k"), ({"top_k": 1.5}, "top_k"), ({"min_p": 2}, "min_p"),
        ({"seed": 2**63}, "seed"), ({"seed": "1"}, "seed"), ({"stop": [""]}, "stop"), ({"stop": [1]}, "stop"),
        ({"stop": {}}, "stop"), ({"stop_token_ids": [99]}, "stop_token_ids"),
        ({"stop_token_ids": 3}, "stop_token_ids"), ({"ignore_eos": 1}, "ignore_eos"),
        ({"min_tokens": -1}, "min_tokens"), ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": "x"}, "frequency_penalty"), ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {"x": 1}}, "logit_bias"), ({"logit_bias": {"99": 1}}, "logit_bias"),
        ({"logit_bias": []}, "logit_bias"), ({"logit_bias": {"3": 101}}, "logit_bias"),
        ({"logit_bias": {"3": 1, "03": 2}}, "logit_bias"), ({"logprobs": 3}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"), ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"), ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 2.0}, "max_tokens"), ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"min_tokens": 4, "max_tokens": 3}, "min_tokens"), ({"n": 0}, "n"), ({"n": 129}, "n"),
        ({"stream": 1}, "stream"), ({"model": 3}, "model"), ({"model": "\ud800"}, "model"),
        ({"tools": [{}]}, "tools"), ({"tool_choice": "required"}, "tool_choice"), ({"functions": [{}]}, "functions"),
        ({"response_format": {"type": "grammar"}}, "response_format"), ({"modalities": ["audio"]}, "modalities"),
        ({"best_of": 3}, "best_of"), ({"reasoning_effort": "low"}, "reasoning_effort"), ({"echo": True}, "echo"),
        ({"messages": []}, "messages"), ({"messages": None}, "messages"), ({"messages": "Why?"}, "messages"),
    ],
)  # fmt: skip
def test_a_bad_field_is_refused_by_its_name(more: dict[str, Any], param: str) -> None:
    error = refused(body(**more), vocab_size=99)
    assert error.param is not None
    assert error.param == param or error.param.startswith((f"{param}[", f"{param}."))
    assert param in str(error)
    assert error_object(error) == {
        "message": str(error), "type": "invalid_request_error", "param": error.param, "code": error.code
    }  # fmt: skip


def test_the_body_is_an_object() -> None:
    for one in (None, [], "x", 3):
        assert refused(one).param == "body"


# ---- messages ----


def test_roles_and_parts(tmp_path: Path) -> None:
    for name in ("a.png", "b c.png", "v.mp4"):
        (tmp_path / name).touch()
    talk = [
        {"role": "developer", "content": "Be brief.", "name": "boss"},
        {"role": "user", "content": [
            {"type": "text", "text": "Look: "},
            {"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}},
            {"type": "image_url", "image_url": {"url": (tmp_path / "b c.png").as_uri()}},
            {"type": "text", "text": "What"},
            {"type": "text", "text": " is it?"},
        ]},
        {"role": "assistant", "content": "A dog.", "refusal": None, "tool_calls": [], "annotations": []},
        {"role": "user", "content": [
            {"type": "video_url", "video_url": {"url": str(tmp_path / "v.mp4")}}, {"type": "text", "text": "\nAnd?"},
        ]},
    ]  # fmt: skip
    sample = chat_request({"messages": talk}, id="r", media_root=tmp_path, source="f", line=3).requests[0].sample
    assert [one.role for one in sample.messages] == ["system", "user", "assistant", "user"]
    assert sample.messages[1].parts == (Text("Look: "), Image(0), Image(1), Text("\nWhat is it?"))
    assert sample.messages[3].parts == (Video(0), Text("\nAnd?"))
    root = os.path.realpath(tmp_path)
    assert [file.path for file in sample.images] == [f"{root}/a.png", f"{root}/b c.png"]
    assert sample.videos[0].path == f"{root}/v.mp4"
    assert sample.id == "f:3"


def test_a_data_uri_is_the_picture() -> None:
    png = picture(4, 4, seed=1)
    uri = "data:image/png;base64," + base64.b64encode(png).decode()
    parts = [{"type": "image_url", "image_url": {"url": uri}}]
    sample = chat_request({"messages": [{"role": "user", "content": parts}]}, id="r").requests[0].sample
    assert sample.images == (MediaFile(data=png, label="messages[0].content[0].image_url.url"),)


def test_a_data_uri_may_hold_frames() -> None:
    frames = [picture(8, 8, seed=seed, kind="JPEG") for seed in range(3)]
    uri = "data:video/jpeg;base64," + ",".join(base64.b64encode(one).decode() for one in frames)
    parts = [{"type": "video_url", "video_url": {"url": uri}}]
    (video,) = chat_request({"messages": [{"role": "user", "content": parts}]}, id="r").requests[0].sample.videos
    assert [one.data for one in video.frames] == frames
    with open_video(video) as opened:
        assert opened.total == 3


def ask_about(url: Any, kind: str = "image_url", **more: Any) -> RequestError:
    parts = [{"type": kind, kind: {"url": url}}, {"type": "text", "text": "?"}]
    return refused({"messages": [{"role": "user", "content": parts}]}, **more)


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("https://example.org/a.png", "media_remote"), ("HTTP://x", "media_remote"),
        ("file://elsewhere/a.png", "media_remote"), ("../secret.png", "path_escape"), ("/etc/passwd", "path_escape"),
        ("file:///etc/passwd", "path_escape"), ("file:///etc/%70asswd", "path_escape"), ("link.png", "path_escape"),
        ("way/secret.png", "path_escape"), ("gone.png", "media_missing"), ("a\0b", "media_missing"),
        ("", "media_missing"), (3, "invalid_type"), ("data:image/png,abc", "media_broken"),
        ("data:image/png;base64,####", "media_broken"), ("data:image/png;base64", "media_broken"),
        ("data:text/html;base64,QQ==", "media_broken"), ("data:video/mp4;base64,QQ==", "media_broken"),
        ("data:image/png;base64,QQ", "media_broken"),
    ],
)  # fmt: skip
def test_what_is_no_picture_below_the_root_is_refused(tmp_path: Path, url: Any, code: str) -> None:
    root = tmp_path / "media"
    root.mkdir()
    (tmp_path / "secret.png").touch()
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "way").symlink_to(tmp_path)
    error = ask_about(url, media_root=root)
    assert (error.code, error.param) == (code, "messages[0].content[0].image_url.url")


def test_no_path_is_opened_without_a_root(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    assert "--media-root" in str(ask_about(str(tmp_path / "a.png")))


def test_large_data_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages_module, "MAX_DATA_BYTES", 30)
    uri = "data:video/mp4;base64," + "A" * 40
    sample = {"role": "user", "content": [{"type": "video_url", "video_url": {"url": uri}}]}
    assert len(chat_request({"messages": [sample]}, id="r").requests[0].sample.videos[0].data or b"") == 30
    assert ask_about(uri + "AAAA", "video_url").code == "media_bomb"


@pytest.mark.parametrize(
    ("talk", "param"),
    [
        ([{"role": "tool", "content": "3"}], "messages[0].role"),
        ([{"role": 3, "content": "3"}], "messages[0].role"),
        (["Why?"], "messages[0]"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": 3}], "messages[0].content"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content[0]"),
        ([{"role": "user", "content": "x", "weight": 1}], "messages[0].weight"),
        ([{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": [{"type": "text", "text": "x", "uuid": "1"}]}], "messages[0].content[0].uuid"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "a"}]}], "messages[0].content[0].image_url"),
        ([{"role": "user", "content": "half \ud800"}], "messages[0].content[0].text"),
        ([{"role": "user", "content": " "}], "messages"),
        ([{"role": "system", "content": "x"}], "messages"),
        ([*USER, *USER], "messages"),
        ([*USER, {"role": "assistant", "content": "So."}], "messages"),
        ([{"role": "user", "content": "x", "tool_calls": [{}]}], "messages[0].tool_calls"),
    ],
)
def test_bad_messages_name_the_place(talk: list[Any], param: str) -> None:
    error = refused({"messages": talk})
    assert error.param == param
    assert "input_audio" in str(error) or "input_audio" not in json.dumps(talk)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
names = st.sampled_from([
    "messages", "model", "n", "stop", "logit_bias", "seed", "temperature", "logprobs", "tools", "stop_token_ids", "x",
    "max_tokens", "top_k", "stream", "metadata", "response_format",
])  # fmt: skip


@given(more=st.dictionaries(names, json_values, max_size=4), content=json_values)
def test_any_json_is_read_or_refused(more: dict[str, Any], content: Any) -> None:
    for one in (body(**more), {"messages": [{"role": "user", "content": content}], **more}, content):
        try:
            chat_request(one, id="r")
        except RequestError as error:
            json.dumps(error_object(error)).encode()
            str(error).encode()


# ---- responses ----


def spell(token: int) -> bytes:
    """Letters; 300 is half a character."""
    return b"\xc3" if token == 300 else chr(token).encode()


def test_a_response_has_openais_fields() -> None:
    answers = [
        Generation("ab", (97, 98), "stop", "c", 10, 4, None, None),
        Generation("abc", (97, 98, 99), "length", None, 10, 4, None, None),
    ]
    got = chat_response(answers, model="m", spell=spell)
    assert got.pop("id").startswith("chatcmpl-")
    assert isinstance(got.pop("created"), int)
    assert got == {
        "object": "chat.completion",
        "model": "m",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": "ab", "refusal": None}, "logprobs": None,
             "finish_reason": "stop", "stop_reason": "c"},
            {"index": 1, "message": {"role": "assistant", "content": "abc", "refusal": None}, "logprobs": None,
             "finish_reason": "length", "stop_reason": None},
        ],
        "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15,
                  "prompt_tokens_details": {"cached_tokens": 4}},
    }  # fmt: skip


def test_log_probabilities_spell_their_tokens() -> None:
    tokens = (TokenLogprob(32, -0.5, ((32, -0.5), (233, -1.0))), TokenLogprob(300, float("-inf"), ()))
    prompt = (None, TokenLogprob(97, -2.0, ((98, -0.1), (97, -2.0))), TokenLogprob(97, -3.0, ((98, -0.1),)))
    got = chat_response([Generation(" ", (32, 300), "stop", None, 3, 0, tokens, prompt)], model="m", spell=spell)
    json.dumps(got, allow_nan=False)
    assert got["choices"][0]["logprobs"] == {
        "content": [
            {"token": " ", "logprob": -0.5, "bytes": [32], "top_logprobs": [
                {"token": " ", "logprob": -0.5, "bytes": [32]}, {"token": "é", "logprob": -1.0, "bytes": [195, 169]},
            ]},
            {"token": "\ufffd", "logprob": -9999.0, "bytes": [195], "top_logprobs": []},
        ],
        "refusal": None,
    }  # fmt: skip
    b = {"logprob": -0.1, "rank": 1, "decoded_token": "b"}
    assert got["prompt_logprobs"] == [
        None,
        {"97": {"logprob": -2.0, "rank": 2, "decoded_token": "a"}, "98": b},
        {"97": {"logprob": -3.0, "rank": None, "decoded_token": "a"}, "98": b},
    ]


def test_errors_of_the_engine_have_openais_names() -> None:
    long = error_object(reject("overlong", "f:1: a prompt of 9 tokens"))
    assert (long["code"], long["message"]) == ("context_length_exceeded", "f:1: a prompt of 9 tokens")
    assert error_object(reject("media_bomb", "a.png: too many"))["code"] == "media_bomb"
    assert error_object(ConfigError("a text-only model: sorry")) == {
        "message": "a text-only model: sorry", "type": "invalid_request_error", "param": None, "code": None
    }  # fmt: skip
