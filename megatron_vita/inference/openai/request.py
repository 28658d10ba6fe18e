"""Bodies of OpenAI's chat completions and completions requests -> requests of the engine.

Names, defaults and ranges are OpenAI's; `top_k`, `min_p`, `repetition_penalty`, `stop_token_ids`, `ignore_eos`,
`min_tokens`, `prompt_logprobs`, `media_io_kwargs` and `mm_processor_kwargs` are vLLM's additions, `max_dynamic_patch`
is lmdeploy's. Read strictly (batch files), a field that is not read is refused by name, unless it changes no answer.
Read leniently (servers), it is ignored with a warning, unless the client cannot do without it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_vita.data.sample import Sample, TemplateOptions
from megatron_vita.inference.openai import fields as read
from megatron_vita.inference.openai import sampling
from megatron_vita.inference.openai.errors import RequestError
from megatron_vita.inference.openai.fields import Unread
from megatron_vita.inference.openai.limits import Limits
from megatron_vita.inference.openai.media import Fetch
from megatron_vita.inference.openai.messages import MediaOptions, conversation
from megatron_vita.inference.prompt import RawPrompt, Request

MAX_CHOICES = 128
"""Most choices of a request, as OpenAI has it."""
COMPLETION_TOKENS = 16
"""Most tokens of a completion whose request does not say, as OpenAI has it."""

_HARMLESS = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "request_id", "session_id", "priority", "cache_salt", "parallel_tool_calls", "return_token_ids",
)  # fmt: skip
"""Fields that change no answer: who asks, where it is kept, in which order it is computed."""
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "tools": ([],), "functions": ([],), "tool_choice": ("none", "auto"), "function_call": ("none", "auto"),
    "modalities": (["text"],), "use_beam_search": (False,), "length_penalty": (1, 1.0),
    "include_stop_str_in_output": (False,), "skip_special_tokens": (True,), "spaces_between_special_tokens": (True,),
    "add_generation_prompt": (True,), "continue_final_message": (False,), "echo": (False,),
    "add_special_tokens": (False,), "bad_words": ([],), "suffix": ("",),
}  # fmt: skip
"""Fields that ask for what there is not, with the values under which they ask for nothing."""
_REFUSED = ("tool_choice", "function_call", "continue_final_message", "suffix")
"""Those of them without which an answer is of no use: also a lenient reader refuses them."""
_COMMON = ("model", "n", "stream", *sampling.FIELDS)
_CHAT = ("messages", "logprobs", "top_logprobs", *_COMMON)
_COMPLETION = ("prompt", "logprobs", "echo", *_COMMON)
_LENIENT = ("stream_options",)
_LENIENT_CHAT = (*_LENIENT, "media_io_kwargs", "mm_processor_kwargs", "chat_template_kwargs")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadOptions:
    """How bodies are read."""

    strict: bool
    """Refuse fields that are not read, rather than warn of them."""
    media_root: Path | None = None
    """Folder that media paths are relative to, and that none may leave; None: no path is opened."""
    limits: Limits | None = None
    """What one request may hold."""
    vocab_size: int | None = None
    """Ids of tokens must be below it; None: not checked."""
    fetch: Fetch | None = None
    """Downloads http(s) addresses; None: they are refused."""
    template_options: Collection[str] = ()
    """Variables of the chat template that `chat_template_kwargs` may set."""
    source: str = "request"
    """File that requests come from, for messages."""
    line: int = 1
    """Line of the request in it."""


@dataclass(frozen=True, slots=True)
class ApiRequest:
    """One request of a client."""

    requests: tuple[Request, ...]
    """One for each choice, alike but for ids, seeds and prompts; their ids are `ID-0`, `ID-1`, ... All choices of the
    first prompt, then those of the second."""
    model: str | None
    """Name of the model as the client calls it."""
    stream: bool
    """Send the answer as it comes."""
    include_usage: bool = False
    """The stream ends with what was used."""
    warnings: tuple[str, ...] = ()
    """What was ignored."""
    prompts: int = 1
    """Prompts of a completion."""
    echo: tuple[str, ...] = ()
    """The text of each of `requests` that its answer begins with, if that is asked for."""
    seeded: bool = False
    """The body has a seed, so the same body has the same answers."""


def chat_request(body: Any, *, id: str, options: ReadOptions) -> ApiRequest:
    """Read the body of a request to /v1/chat/completions; no medium is opened.

    Args:
        body: parsed JSON; see `parse_body`.
        id: names the request; where the body has no `seed`, the seed is derived from it, so that a batch repeats.
        options: how it is read.

    Raises:
        RequestError: a field that is missing or wrong, or one that cannot be done without and is not supported; its
            `param` names it.
    """
    unread = Unread(strict=options.strict)
    given = _given(body, (*_CHAT, *_HARMLESS, *(() if options.strict else _LENIENT_CHAT)), unread)
    top = sampling.most_alternatives(given.get("top_logprobs", 0), "top_logprobs")
    logprobs = read.boolean(given.get("logprobs", False), "logprobs")
    if top and not logprobs:
        raise RequestError("top_logprobs needs logprobs: true.", param="top_logprobs", code="invalid_value")
    media = MediaOptions(media_root=options.media_root, fetch=options.fetch, limits=options.limits)
    frames = None
    if not options.strict:
        media = replace(media, max_tiles=_most_tiles(given, options, unread))
        frames = _most_frames(given, options, unread)

    def prompts() -> Sequence[Sample]:
        sample = conversation(given.get("messages"), media, unread, source=options.source, line=options.line)
        return [
            sample if options.strict else replace(sample, template_options=_template_options(given, options, unread))
        ]

    return _request(given, id, prompts, top if logprobs else None, options, unread, max_frames=frames)


def completion_request(body: Any, *, id: str, options: ReadOptions) -> ApiRequest:
    """Read the body of a request to /v1/completions: texts that the model continues, without a chat template.

    Args:
        body: parsed JSON; see `parse_body`. `prompt` is a text, an array of texts, token ids, or arrays of token ids.
        id: see `chat_request`.
        options: see `chat_request`.

    Raises:
        RequestError: see `chat_request`.
    """
    unread = Unread(strict=options.strict)
    given = _given(body, (*_COMPLETION, *_HARMLESS, *(() if options.strict else _LENIENT)), unread)
    logprobs = given.get("logprobs")
    if logprobs is False:
        logprobs = None
    elif logprobs is not None:
        logprobs = sampling.most_alternatives(logprobs, "logprobs")
    if not {"max_tokens", "max_completion_tokens"} & set(given):
        given["max_tokens"] = COMPLETION_TOKENS
    prompts = _prompts(given.get("prompt"), options)
    asked = _request(given, id, lambda: prompts, logprobs, options, unread)
    if not read.boolean(given.get("echo", False), "echo"):
        return asked
    if logprobs is not None or any(one.ids is not None for one in prompts):
        raise RequestError(
            "echo: neither with logprobs nor of token ids. `prompt_logprobs` has those of the prompt.",
            param="echo",
            code="unsupported_parameter",
        )
    each = len(asked.requests) // len(prompts)
    return replace(asked, echo=tuple(one.text for one in prompts for _ in range(each)))


def _given(body: Any, known: tuple[str, ...], unread: Unread) -> dict[str, Any]:
    """Fields that are not null, without those that are not read."""
    given = {name: value for name, value in read.mapping(body, "body").items() if value is not None}
    for name, allowed in _ONLY.items():
        if name in known or name not in given or given[name] in allowed:
            continue
        if unread.strict or name in _REFUSED:
            raise RequestError(f"{name} is not supported. Remove it.", param=name, code="unsupported_parameter")
        unread.field(name)
    unread.keys(given, (*known, *_ONLY), "")
    return given


def _request(
    given: Mapping[str, Any],
    id: str,
    read_prompts: Callable[[], Sequence[Sample | RawPrompt]],
    logprobs: int | None,
    options: ReadOptions,
    unread: Unread,
    *,
    max_frames: int | None = None,
) -> ApiRequest:
    """The request; its prompts, which may take long, are read once all else is known to be right."""
    model = read.text(given["model"], "model") if "model" in given else None
    stream = read.boolean(given.get("stream", False), "stream")
    include_usage = False
    if not options.strict and "stream_options" in given:
        stream_options = read.mapping(given["stream_options"], "stream_options")
        unread.keys(stream_options, ("include_usage", "include_obfuscation"), "stream_options")
        if stream_options.get("include_usage") is not None:
            include_usage = read.boolean(stream_options["include_usage"], "stream_options.include_usage")
    limit = sampling.most_tokens(given, strict=options.strict)
    chosen = sampling.read_sampling(given, id, logprobs=logprobs, vocab_size=options.vocab_size, limits=options.limits)
    if limit is not None and chosen.min_tokens > limit:
        raise RequestError(
            f"min_tokens={chosen.min_tokens} is more than max_tokens={limit}.", param="min_tokens", code="invalid_value"
        )
    choices = read.whole(given.get("n", 1), "n", 1, MAX_CHOICES)
    prompts = read_prompts()
    if options.limits is not None:
        options.limits.check("choices", choices * len(prompts), param="n")
        media = sum(len(prompt.images) + len(prompt.videos) for prompt in prompts)
        options.limits.check("opened", choices * media, param="n")
    requests = tuple(
        Request(
            f"{id}-{place * choices + choice}",
            prompt,
            # a client's seed gives equal prompts equal answers; without one they are drawn independently
            replace(chosen, seed=sampling.wrapped(chosen.seed + choice + (0 if "seed" in given else place * choices))),
            limit,
            max_frames=max_frames,
            clamp_length=not options.strict,
        )
        for place, prompt in enumerate(prompts)
        for choice in range(choices)
    )
    return ApiRequest(
        requests, model, stream, include_usage and stream, unread.warnings, len(prompts), seeded="seed" in given
    )


def _prompts(prompt: Any, options: ReadOptions) -> list[RawPrompt]:
    """One or several prompts: texts, or token ids."""
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and not isinstance(prompt[0], str | list)):
        return [_prompt(prompt, "prompt", options)]
    if not read.array(prompt, "prompt", "a string or an array"):
        raise RequestError("prompt: there is none.", param="prompt", code="invalid_value")
    limits = options.limits
    if limits is not None:
        limits.check("choices", len(prompt), param="prompt")
        limits.check("text_characters", sum(len(one) for one in prompt if isinstance(one, str | list)), param="prompt")
    return [_prompt(one, f"prompt[{number}]", options) for number, one in enumerate(prompt)]


def _prompt(prompt: Any, place: str, options: ReadOptions) -> RawPrompt:
    if options.limits is not None and isinstance(prompt, str | list):
        options.limits.check("text_characters", len(prompt), param="prompt")
    if isinstance(prompt, str):
        return RawPrompt(text=read.text(prompt, place), source=options.source, line=options.line)
    most = sampling.MOST if options.vocab_size is None else options.vocab_size - 1
    ids = read.array(prompt, place)
    if not all(type(one) is int and 0 <= one <= most for one in ids):
        for one in ids:
            read.whole(one, f"{place}: token id", 0, most, param="prompt")
    return RawPrompt(ids=tuple(ids), source=options.source, line=options.line)


def _most_frames(given: Mapping[str, Any], options: ReadOptions, unread: Unread) -> int | None:
    """`media_io_kwargs.video.num_frames`; -1 is vLLM's "all"."""
    video = _part_of(given, "media_io_kwargs", "video", ("num_frames",), unread)
    if video.get("num_frames") in (None, -1):
        return None
    most = options.limits.frames if options.limits is not None else sampling.MOST
    return read.whole(video["num_frames"], "media_io_kwargs.video.num_frames", 1, most)


def _most_tiles(given: Mapping[str, Any], options: ReadOptions, unread: Unread) -> int | None:
    """`mm_processor_kwargs.max_dynamic_patch`: of pictures that do not say it themselves."""
    kwargs = read.mapping(given.get("mm_processor_kwargs", {}), "mm_processor_kwargs")
    unread.keys(kwargs, ("max_dynamic_patch",), "mm_processor_kwargs")
    if kwargs.get("max_dynamic_patch") is None:
        return None
    most = options.limits.picture_tiles if options.limits is not None else 1 << 10
    return read.whole(kwargs["max_dynamic_patch"], "mm_processor_kwargs.max_dynamic_patch", 1, most)


def _template_options(given: Mapping[str, Any], options: ReadOptions, unread: Unread) -> TemplateOptions:
    """`chat_template_kwargs`, as far as the template reads them."""
    kwargs = read.mapping(given.get("chat_template_kwargs", {}), "chat_template_kwargs")
    for name in kwargs:
        if name not in options.template_options:
            unread.field(f"chat_template_kwargs.{read.shown(name)}", "the chat template has no such option")
    known = sorted(name for name in kwargs if name in options.template_options)
    values = (json.dumps(kwargs[name], ensure_ascii=False, default=str) for name in known)
    return tuple(
        (name, read.text(value, f"chat_template_kwargs.{name}")) for name, value in zip(known, values, strict=True)
    )


def _part_of(
    given: Mapping[str, Any], name: str, part: str, known: tuple[str, ...], unread: Unread
) -> Mapping[str, Any]:
    outer = read.mapping(given.get(name, {}), name)
    unread.keys(outer, (part,), name)
    inner = read.mapping(outer.get(part) or {}, f"{name}.{part}")
    unread.keys(inner, known, f"{name}.{part}")
    return inner
