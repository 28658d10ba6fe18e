"""Bodies as a server reads them: what clients of the field send is taken, with a warning where it changes nothing."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vita.data.sample import Image, MediaFile, Sample, Text
from megatron_vita.inference.openai import (
    ApiRequest,
    LimitError,
    Limits,
    ReadOptions,
    RequestError,
    chat_request,
    completion_request,
    data_url,
    error_object,
    parse_body,
    status_of,
)
from megatron_vita.inference.prompt import RawPrompt
from tests.data.kit import picture

USER = [{"role": "user", "content": "Why?"}]
PNG = picture(4, 4, seed=1)
URL = "data:image/png;base64," + base64.b64encode(PNG).decode()


def chat(body: dict[str, Any], **options: Any) -> ApiRequest:
    return chat_request(body, id="r", options=ReadOptions(strict=False, limits=Limits(), **options))


def ask(*content: Any, **more: Any) -> ApiRequest:
    return chat({"messages": [{"role": "user", "content": list(content)}], **more})


def refused(body: dict[str, Any], **options: Any) -> RequestError:
    with pytest.raises(RequestError) as error:
        chat(body, **options)
    assert status_of(error.value) == error.value.status
    return error.value


def shows(url: Any = URL, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **more}}


def says(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


# ---- turns ----


def test_turns_of_one_role_in_a_row_are_one_turn() -> None:
    talk = [
        {"role": "system", "content": "Be"}, {"role": "system", "content": "brief."},
        {"role": "user", "content": [says("Look:"), shows()]}, {"role": "user", "content": "What"},
        {"role": "user", "content": [shows(), says("is it?")]},
        {"role": "assistant", "content": "A dog."}, {"role": "user", "content": "And?"},
    ]  # fmt: skip
    read = chat({"messages": talk})
    sample = read.requests[0].sample
    assert isinstance(sample, Sample)
    assert [one.role for one in sample.messages] == ["system", "user", "assistant", "user"]
    assert sample.messages[0].parts == (Text("Be\nbrief."),)
    assert sample.messages[1].parts == (Text("Look:"), Image(0), Text("\nWhat"), Image(1), Text("\nis it?"))
    assert any("in a row" in warning for warning in read.warnings)
    with pytest.raises(RequestError):
        chat_request({"messages": talk}, id="r", options=ReadOptions(strict=True))


# ---- fields ----


def test_what_the_harnesses_send_is_taken() -> None:
    read = chat(
        {
            "model": "m", "messages": USER, "n": 1, "max_tokens": 32768, "max_completion_tokens": 20, "temperature": 0,
            "top_k": 5, "repetition_penalty": 1.2, "min_p": 0.1, "stop": ["\n"], "seed": 1, "logprobs": True,
            "top_logprobs": 3, "stream": True, "stream_options": {"include_usage": True},
            "response_format": {"type": "text"}, "tools": [{"type": "function"}], "tool_choice": "auto",
            "chat_template_kwargs": {"enable_thinking": False}, "media_io_kwargs": {"video": {"num_frames": 4}},
            "retry": 3,
        }
    )  # fmt: skip
    (request,) = read.requests
    assert (request.max_new_tokens, request.clamp_length, request.max_frames) == (20, True, 4)
    assert (request.sampling.temperature, request.sampling.logprobs, request.sampling.guide) == (0, 3, None)
    assert (read.stream, read.include_usage) == (True, True)
    named = {warning.partition("'")[2].partition("'")[0] for warning in read.warnings}
    assert named == {"tools", "chat_template_kwargs.enable_thinking", "retry"}


def test_options_of_the_chat_template_are_passed_on() -> None:
    read = chat(
        {"messages": USER, "chat_template_kwargs": {"thinking": False, "x": 1, "budget": {"a": [1]}}},
        template_options={"thinking", "budget"},
    )
    (request,) = read.requests
    assert isinstance(request.sample, Sample)
    assert request.sample.template_options == (("budget", '{"a": [1]}'), ("thinking", "false"))
    assert read.warnings == ("'chat_template_kwargs.x': the chat template has no such option; it is ignored.",)
    raw = b'{"chat_template_kwargs": {"thinking": {"url": "data:image/png;base64,AA=="}}, "messages": [%s]}'
    (request,) = chat(parse_body(raw % json.dumps(USER[0]).encode()), template_options={"thinking"}).requests
    assert isinstance(request.sample, Sample)
    assert request.sample.template_options == (("thinking", '{"url": "data:image/png;base64,AA=="}'),)
    for wrong in (3, {"thinking": "\ud800"}):
        error = refused({"messages": USER, "chat_template_kwargs": wrong}, template_options={"thinking"})
        assert (error.param or "").startswith("chat_template_kwargs")


def test_an_answer_in_json_follows_a_schema() -> None:
    assert chat({"messages": USER, "response_format": {"type": "json_object"}}).requests[0].sampling.guide == (
        '{"type": "object"}'
    )
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert json.loads(chat({"messages": USER, "response_format": wanted}).requests[0].sampling.guide or "") == schema
    wanted["json_schema"] = {"name": "x", "schema": {"type": "telex"}}
    with pytest.raises(RequestError, match="cannot guide an answer: Invalid type: telex") as error:
        chat({"messages": USER, "response_format": wanted})
    assert error.value.param == "response_format.json_schema"


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"response_format": {"type": "grammar"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"media_io_kwargs": {"video": {"num_frames": 0}}}, "media_io_kwargs.video.num_frames"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": [*USER, {"role": "assistant", "content": "x", "tool_calls": [{}]}, *USER]},
         "messages[1].tool_calls"),
        ({"messages": [*USER, {"role": "tool", "content": "x"}]}, "messages[1].role"),
    ],
)  # fmt: skip
def test_what_a_client_cannot_do_without_is_refused(more: dict[str, Any], param: str) -> None:
    assert refused({"messages": USER, **more}).param == param


# ---- pictures ----


def test_each_marker_takes_the_next_picture() -> None:
    other = "data:image/webp;base64," + base64.b64encode(b"other").decode()
    read = ask(shows(), shows(other), says("Image-1: <IMAGE_TOKEN>\nImage-2: <img><IMAGE_TOKEN></img>\nSame?"))
    sample = read.requests[0].sample
    assert sample.messages[0].parts == (
        Text("Image-1: "), Image(0), Text("\nImage-2: "), Image(1), Text("\nSame?"),
    )  # fmt: skip
    assert [file.data for file in sample.images] == [PNG, b"other"]


def test_markers_and_pictures_must_be_equally_many() -> None:
    error = refused({"messages": [{"role": "user", "content": [shows(), says("<IMAGE_TOKEN> <IMAGE_TOKEN>")]}]})
    assert (error.param, error.code) == ("messages[0].content", "media_count")
    read = ask(says("What is <IMAGE_TOKEN>?"))
    assert read.requests[0].sample.messages[0].parts == (Text("What is <IMAGE_TOKEN>?"),)
    assert len(read.warnings) == 1


def test_pictures_say_their_most_tiles() -> None:
    read = ask(
        shows(max_dynamic_patch=3, detail="low"), {**shows(), "max_dynamic_patch": 4, "uuid": "x"}, shows(), says("?"),
        mm_processor_kwargs={"max_dynamic_patch": 2},
    )  # fmt: skip
    assert [file.max_tiles for file in read.requests[0].sample.images] == [3, 4, 2]
    assert read.warnings == ("'messages[].content[].uuid': this field is not supported; it is ignored.",)
    error = refused({"messages": [{"role": "user", "content": [shows(max_dynamic_patch=41)]}]})
    assert error.param == "messages[0].content[0].image_url.max_dynamic_patch"


def test_an_address_is_fetched_only_if_that_is_allowed() -> None:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": [shows("https://x/a.png"), says("?")]}]}
    assert refused(body).code == "media_remote"
    sample = chat(body, fetch=lambda url, kind: f"{kind} {url}".encode()).requests[0].sample
    assert sample.images[0].data == b"image https://x/a.png"

    def gone(url: str, kind: str) -> bytes:
        raise RequestError("gone", code="media_remote")

    assert str(refused(body, fetch=gone)) == "messages[0].content[0].image_url.url: gone"
    for name in ("fetches", "fetched_bytes"):
        options = ReadOptions(strict=False, limits=Limits(**{name: 1}), fetch=lambda url, kind: b"x")
        body["messages"][0]["content"] = [shows("HTTP://x/a.png"), shows("http://x/b.png")]
        with pytest.raises(LimitError, match=f"{name}=1 is the limit"):
            chat_request(body, id="r", options=options)


# ---- limits ----


@pytest.mark.parametrize(
    ("limits", "content", "more"),
    [
        ({"pictures": 2}, [shows(), shows(), shows()], {}),
        ({"videos": 1}, [{"type": "video_url", "video_url": {"url": "data:video/mp4;base64,QQ=="}}] * 2, {}),
        ({"frames": 2},
         [{"type": "video_url", "video_url": {"url": "data:video/jpeg;base64,QQ==,QQ==,QQ=="}}], {}),
        ({"text_characters": 3}, [says("four")], {}),
        ({"messages": 1}, [], {"messages": USER * 2}),
        ({"parts": 1}, [shows(), says("four")], {}),
        ({"list_entries": 1}, [says("x")], {"stop": ["a", "b"]}),
        ({"stop_characters": 1}, [says("x")], {"stop": "ab"}),
        ({"choices": 2}, [says("x")], {"n": 3}),
        ({"text_characters": 2}, [says("")], {"prompt": "abc"}),
        ({"text_characters": 2}, [says("")], {"prompt": ["ab", [1]]}),
        ({"choices": 1}, [says("")], {"prompt": ["ab", [1]]}),
        ({"opened": 5}, [shows(), shows()], {"n": 3}),
    ],
)  # fmt: skip
def test_limits_are_named_before_anything_is_decoded(
    limits: dict[str, int], content: list[Any], more: dict[str, Any]
) -> None:
    options = ReadOptions(strict=False, limits=Limits(**limits))
    read = completion_request if "prompt" in more else chat_request
    with pytest.raises(LimitError) as error:
        read({"messages": [{"role": "user", "content": content}], **more}, id="r", options=options)
    ((name, value),) = limits.items()
    assert f"{name}={value} is the limit" in str(error.value)
    assert error_object(error.value)["code"] == f"{name}_limit"


def test_media_are_decoded_once_all_else_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_url, "decoded", lambda _: pytest.fail("decoded"))
    body = {"messages": [{"role": "user", "content": [shows(), says("?")]}]}
    for more in ({"temperature": -1}, {"n": 0}, {"max_tokens": 0}, {"model": 3}, {"response_format": {"type": "x"}}):
        refused({**body, **more})


# ---- completions ----


def complete(body: Any, **options: Any) -> ApiRequest:
    return completion_request(body, id="r", options=ReadOptions(strict=False, limits=Limits(), **options))


def test_a_completion_continues_texts_or_ids() -> None:
    (one,) = complete({"prompt": "Once"}).requests
    assert (one.sample, one.max_new_tokens) == (RawPrompt(text="Once", source="request", line=1), 16)
    several = complete({"prompt": ["a", [1, 2]], "n": 2, "logprobs": 0, "seed": 5})
    assert [request.id for request in several.requests] == ["r-0", "r-1", "r-2", "r-3"]
    assert [request.sampling.seed for request in several.requests] == [5, 6, 5, 6]
    assert (several.prompts, several.requests[0].sampling.logprobs) == (2, 0)
    assert complete({"prompt": [1, 2]}).requests[0].sample == RawPrompt(ids=(1, 2), source="request", line=1)


def test_a_completion_begins_with_its_prompt_if_asked_to() -> None:
    assert complete({"prompt": ["a", "b"], "n": 2, "echo": True}).echo == ("a", "a", "b", "b")
    assert complete({"prompt": "a", "echo": False}).echo == ()
    for more in ({"logprobs": 1}, {"prompt": [1, 2]}):
        with pytest.raises(RequestError) as error:
            complete({"prompt": "a", "echo": True, **more})
        assert error.value.param == "echo"


@pytest.mark.parametrize("prompt", [None, [], 3, {}, [{}], [True], [1, "x"], ["x", 1], [[1.5]], [99], "\ud800"])
def test_what_is_no_prompt_is_refused(prompt: Any) -> None:
    with pytest.raises(RequestError) as error:
        complete({"prompt": prompt}, vocab_size=99)
    assert (error.value.param or "").startswith("prompt")


# ---- the bytes of a body ----


def test_a_data_url_stays_in_the_body() -> None:
    raw = json.dumps({"messages": [{"role": "user", "content": [shows(), says("x")]}], "stop": [URL]}).encode()
    body = parse_body(raw)
    assert body["stop"] == [URL]
    assert body["messages"][0]["content"][0]["image_url"]["url"].content.obj is raw
    assert chat(body).requests[0].sample.images == (MediaFile(data=PNG, label="messages[0].content[0].image_url.url"),)


def test_a_data_url_may_have_its_slashes_escaped() -> None:
    raw = b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "%s"}}]}]}'
    content = base64.b64encode(bytes(range(256)) * 9)
    for url in (b"data:image\\/png;base64,%s", b"data:image/png;base64,%s"):
        read = chat(parse_body(raw % (url % content.replace(b"/", b"\\/"))))
        assert read.requests[0].sample.images[0].data == bytes(range(256)) * 9


def test_json_has_a_limit_that_media_do_not_count_for() -> None:
    raw = json.dumps({"messages": [{"role": "user", "content": [shows()]}]}).encode()
    small = len(raw) - len(URL) + 50
    assert parse_body(raw, Limits(json_bytes=small))
    with pytest.raises(LimitError, match=f"json_bytes={small} is the limit") as error:
        parse_body(raw + b" " * 100, Limits(json_bytes=small))
    assert status_of(error.value) == 413


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"\xff", b"{", b"[]", b"3", b'{"a": NaN}', b'{"a": -Infinity}', b'{"a": 1e999}',
        b'{"a": ' + b"9" * 50 + b"}",
        b'{"a": 1, "a": 2}', b"[" * 100_000, b'{"a":' * 70 + b"1" + b"}" * 70, b'\xef\xbb\xbf{}',
        b'{"url":"data:image/png;base64,AAAA', b'{"url":"data:image/png;base64,AA\\', b'["a"url":"data:x,AAAA"]',
    ],
)  # fmt: skip
def test_a_bad_body_is_named(raw: bytes) -> None:
    with pytest.raises(RequestError) as error:
        parse_body(raw)
    assert (error.value.code, len(str(error.value)) < 300) == ("invalid_json", True)


@given(raw=st.binary(max_size=40) | st.text(alphabet='{}[]":,\\ url0deltima/;bs64A', max_size=60).map(str.encode))
def test_any_bytes_are_a_body_or_refused(raw: bytes) -> None:
    try:
        assert parse_body(raw) == json.loads(raw)
    except RequestError as error:
        json.dumps(error_object(error)).encode()


leaves = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8)
    | st.sampled_from([
        "user", "text", "image_url", "video_url", URL, "data:", "data:,", "data:image/png;base64,A", "https://[",
        "<IMAGE_TOKEN>", "file:///etc/passwd", "json_schema", -1, 0, 1, 10**30, "data:video/jpeg;base64,QQ==,,QQ==",
    ])
)  # fmt: skip
FIELDS = [
    "messages", "model", "n", "stop", "logit_bias", "seed", "temperature", "logprobs", "top_logprobs", "tools", "x",
    "tool_choice", "functions", "stop_token_ids", "max_tokens", "max_completion_tokens", "top_k", "top_p", "min_p",
    "min_tokens", "stream", "stream_options", "metadata", "response_format", "chat_template_kwargs", "media_io_kwargs",
    "mm_processor_kwargs", "prompt", "echo", "suffix", "best_of", "modalities", "repetition_penalty", "ignore_eos",
    "role", "content", "type", "text", "image_url", "video_url", "url", "detail", "max_dynamic_patch", "tool_calls",
    "name", "include_usage", "video", "num_frames", "json_schema", "schema", "17",
]  # fmt: skip
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=8,
)
parts = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("type", "text", "image_url", "video_url", "max_dynamic_patch", "x"), values)
) | st.builds(lambda text: says(text), leaves) | st.builds(shows, leaves, max_dynamic_patch=values)  # fmt: skip
talks = st.lists(
    st.fixed_dictionaries(
        {"role": st.just("user") | leaves, "content": st.lists(parts, max_size=3) | values}, optional={"x": values}
    ),
    max_size=2,
)


@given(
    more=st.dictionaries(st.sampled_from(FIELDS), values, max_size=4),
    messages=talks | values,
    prompt=values | st.lists(st.integers(), max_size=3) | st.lists(st.text(max_size=3), max_size=3),
)
def test_any_json_is_read_or_refused(more: dict[str, Any], messages: Any, prompt: Any) -> None:
    options = ReadOptions(
        strict=False, limits=Limits(), vocab_size=99, media_root=Path(__file__).parent, template_options=FIELDS
    )
    for read, body in ((chat_request, {"messages": messages}), (completion_request, {"prompt": prompt})):
        raw = json.dumps({**body, **more}).encode()
        try:
            asked = read(parse_body(raw), id="r", options=options)
        except RequestError as error:
            json.dumps(error_object(error)).encode()
            seen = status_of(error), str(error)
        else:
            seen = 200, "".join(asked.warnings)
        assert seen[0] in (200, 400)
        seen[1].encode()


@settings(max_examples=40)
@given(
    content=st.binary(max_size=40),
    head=st.sampled_from(["image/png;base64", "image/jpeg;charset=x;base64", "IMAGE/webp;base64"]),
    piece=st.sampled_from([4, 8, 1 << 20]),
)
def test_base64_is_decoded_alike_in_pieces_and_at_once(content: bytes, head: str, piece: int) -> None:
    url = f"data:{head},{base64.b64encode(content).decode()}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_url, "_PIECE", piece)
        for body in (
            parse_body(json.dumps({"messages": [{"role": "user", "content": [shows(url)]}]}).encode()),
            {"messages": [{"role": "user", "content": [shows(url)]}]},
        ):
            if content:
                assert chat(body).requests[0].sample.images[0].data == content
            else:
                refused(body)
        for wrong in (url[:-1] + "!", url + "A", url[:-4] + "=" + url[-3:]):
            with pytest.raises(RequestError):
                ask(shows(wrong), says("?"))


def test_turns_that_do_not_alternate_are_joined() -> None:
    said = [
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": [shows(), says("two")]},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "three"},
    ]
    read = chat({"messages": said})
    system, user = read.requests[0].sample.messages  # type: ignore[union-attr]
    assert (system.role, system.parts) == ("system", (Text("Be brief.\nBe kind."),))
    assert (user.role, user.parts) == ("user", (Text("one"), Image(0), Text("\ntwo\nthree")))
    assert read.warnings.count("messages: an empty answer is left out.") == 1
    alternating = [said[0], said[2], {"role": "assistant", "content": "1"}, said[4]]
    assert [m.role for m in chat({"messages": alternating}).requests[0].sample.messages] == [  # type: ignore[union-attr]
        "system", "user", "assistant", "user",
    ]  # fmt: skip
    for wrong in (said[2:4], [said[3]], [said[2], said[0], said[4]], [{"role": "user", "content": " "}]):
        assert refused({"messages": wrong}).param == "messages"
    with pytest.raises(RequestError, match="turn 2 says nothing"):
        chat_request({"messages": said[2:5]}, id="r", options=ReadOptions(strict=True))


def test_equal_prompts_are_drawn_independently_without_a_seed() -> None:
    def seeds(**more: Any) -> list[int]:
        return [one.sampling.seed for one in complete({"prompt": ["a", "a"], "n": 2, **more}).requests]

    assert len(set(seeds())) == 4
    assert seeds(seed=7) == [7, 8, 7, 8]


def test_a_wrong_type_is_named_with_what_the_field_takes() -> None:
    ask = {"messages": [{"role": "user", "content": "hi"}]}
    assert "a string or an array" in str(refused({**ask, "stop": 5}))
    assert "not 3.5" in str(refused({**ask, "max_tokens": 3.5}))
    assert "--allow-fetch" in str(refused({"messages": [{"role": "user", "content": [shows("http://x.org/a.png")]}]}))
