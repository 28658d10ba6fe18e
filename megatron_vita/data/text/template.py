"""The chat template: the text and special tokens around the texts and media of a conversation.

The tokenizer folder's Jinja template is the only place that says so; training, chat and export render it. It is never
rendered on a user's words. Each text is replaced by a sentinel, so what comes back is a *skeleton* that depends on the
roles and the kinds of parts alone: it is cached, the special tokens in it are surely the template's own, and a text
that spells `<|im_end|>` cannot end its turn. (A template that trims or inspects the texts would see the sentinel.)
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import jinja2
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_vita.data.sample import Image, Message, TemplateOptions, Text, Video
from megatron_vita.errors import ConfigError

PartKind = Literal["text", "image", "video"]
MessageShape = tuple[str, tuple[PartKind, ...]]
"""A message's role and the kinds of its parts."""

_OWN = {"messages", "add_generation_prompt", "tools"}
"""Variables of a template that the conversation sets."""
_KEPT_PARTS = 256
"""Parts and messages of the largest skeleton that is kept: thousands of larger ones would fill the memory."""
_PLACEHOLDERS = {"<IMG_CONTEXT>": "image", "<video>": "video"}


@dataclass(frozen=True, slots=True)
class SkeletonPart:
    """One piece of a skeleton."""

    kind: Literal["literal", "token", "text", "image", "video"]
    """`literal`: text of the template's own; `token`: a special token; the others: a part of a message."""
    value: str = ""
    """The literal text or the special token's name."""
    message: int = -1
    """Index of the part's message."""
    part: int = -1
    """Index of the part in its message."""


def shape_of(messages: tuple[Message, ...]) -> tuple[MessageShape, ...]:
    """Roles and part kinds: all that a skeleton depends on."""
    kinds: dict[type, PartKind] = {Text: "text", Image: "image", Video: "video"}
    return tuple((message.role, tuple(kinds[type(part)] for part in message.parts)) for message in messages)


class ChatTemplate:
    """A Jinja chat template and the special tokens it may write."""

    def __init__(
        self, source: str, special_tokens: tuple[str, ...], *, where: str, named: Mapping[str, str] | None = None
    ) -> None:
        """Parse and check a template.

        Args:
            source: the Jinja text.
            special_tokens: names of the tokenizer's special tokens.
            where: tokenizer's path, for messages.
            named: tokens that the template may write as variables (`{{ bos_token }}`).

        Raises:
            ConfigError: not valid Jinja, or it does not write what the design needs: one `<IMG_CONTEXT>` or
                `<video>` and a newline for each part, every text in its place, `<|im_end|>` and a newline behind
                an answer.
        """
        self._where, self._named = where, dict(named or {})
        # trim_blocks and lstrip_blocks as transformers sets them, so that both render the same
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _raise
        environment.filters["tojson"] = _to_json
        try:
            self._template = environment.from_string(source)
            read = jinja2.meta.find_undeclared_variables(environment.parse(source))
        except jinja2.TemplateError as error:
            raise ConfigError(f"{where}: the chat template is not valid Jinja: {error}") from None
        self.options = frozenset(read) - _OWN - set(self._named) - set(environment.globals)
        """Names of the variables that a caller may set, such as `enable_thinking`."""
        names = sorted(special_tokens, key=len, reverse=True)
        self._pattern = re.compile("|".join(["\ue000\\d+:\\d+\ue001", *(re.escape(name) for name in names)]))
        self._cached = lru_cache(maxsize=4096)(self._skeleton)
        probe: tuple[MessageShape, ...] = (
            ("user", ("text", "image", "video", "text")),
            ("assistant", ("text",)),
            ("user", ("text",)),
            ("assistant", ("text",)),
        )
        self.skeleton(probe, False)

    def skeleton(
        self, shape: tuple[MessageShape, ...], generation_prompt: bool, options: TemplateOptions = ()
    ) -> tuple[SkeletonPart, ...]:
        """Pieces of a conversation in order; those of few parts are kept, for these come again.

        Args:
            shape: roles and kinds of parts.
            generation_prompt: end with the header of an answer to come.
            options: variables of the template, see `Sample`.

        Raises:
            ConfigError: the template does not place every part once and in order.
        """
        kept = sum(len(kinds) + 1 for _, kinds in shape) <= _KEPT_PARTS
        return (self._cached if kept else self._skeleton)(shape, generation_prompt, options)

    def _skeleton(
        self, shape: tuple[MessageShape, ...], generation_prompt: bool, options: TemplateOptions
    ) -> tuple[SkeletonPart, ...]:
        """Pieces of a conversation in order.

        Raises:
            ConfigError: the template does not place every part once and in order.
        """
        messages: list[dict[str, Any]] = []
        for number, (role, kinds) in enumerate(shape):
            if all(kind == "text" for kind in kinds):
                content: Any = "".join(f"\ue000{number}:{part}\ue001" for part in range(len(kinds)))
            else:
                content = [
                    {"type": "text", "text": f"\ue000{number}:{part}\ue001"} if kind == "text" else {"type": kind}
                    for part, kind in enumerate(kinds)
                ]
            messages.append({"role": role, "content": content})
        rendered = self.render(
            messages, generation_prompt, options={name: json.loads(value) for name, value in options}
        )
        expected = [(n, p, kind) for n, (_, kinds) in enumerate(shape) for p, kind in enumerate(kinds)]
        return tuple(self._parse(rendered, expected, shape))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        generation_prompt: bool,
        *,
        tools: Any = None,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """Render a conversation in transformers' form as stock code does.

        Args:
            messages: `{role, content}`, and `reasoning_content` and `tool_calls`.
            generation_prompt: end with the header of an answer to come.
            tools: functions that may be called.
            options: variables of the template; those that are not among `options` are left out.

        Raises:
            ConfigError: the template cannot render it.
        """
        try:
            return self._template.render(
                **{name: value for name, value in (options or {}).items() if name in self.options},
                **self._named,
                messages=messages,
                add_generation_prompt=generation_prompt,
                tools=tools,
            )
        except MemoryError:
            raise
        except Exception as error:  # a template may fail in any way: it is somebody's program
            raise ConfigError(f"{self._where}: the chat template cannot render roles and parts: {error}") from None

    def _parse(
        self, rendered: str, expected: list[tuple[int, int, PartKind]], shape: tuple[MessageShape, ...]
    ) -> list[SkeletonPart]:
        pieces: list[SkeletonPart] = []
        waiting = iter(expected)
        end = 0
        for match in self._pattern.finditer(rendered):
            if match.start() > end:
                pieces.append(SkeletonPart("literal", rendered[end : match.start()]))
            end = match.end()
            found = match.group()
            kind = "text" if found[0] == "\ue000" else _PLACEHOLDERS.get(found, "token")
            if kind == "token":
                pieces.append(SkeletonPart("token", found))
                continue
            message, part, wanted = next(waiting, (-1, -1, None))
            if wanted != kind or (kind == "text" and found != f"\ue000{message}:{part}\ue001"):
                raise ConfigError(f"{self._where}: the chat template leaves out, repeats or reorders parts of a turn.")
            pieces.append(SkeletonPart(wanted, message=message, part=part))
        if end < len(rendered):
            pieces.append(SkeletonPart("literal", rendered[end:]))
        if next(waiting, None) is not None:
            raise ConfigError(
                f"{self._where}: the chat template drops parts of a turn. It must write `<IMG_CONTEXT>` and a newline "
                "for a picture, `<video>` and a newline for a video, and every text."
            )
        self._check(pieces, shape)
        return pieces

    def _check(self, pieces: list[SkeletonPart], shape: tuple[MessageShape, ...]) -> None:
        for place, piece in enumerate(pieces):
            after = [(p.kind, p.value) for p in pieces[place + 1 : place + 3]]
            if piece.kind in ("image", "video") and not (after and after[0][0] == "literal" and after[0][1][0] == "\n"):
                raise ConfigError(f"{self._where}: the chat template must write a newline after a picture or video.")
            last_of_answer = (
                piece.kind == "text"
                and shape[piece.message][0] == "assistant"
                and piece.part == len(shape[piece.message][1]) - 1
            )
            if last_of_answer and after != [("token", "<|im_end|>"), ("literal", "\n")]:
                raise ConfigError(
                    f"{self._where}: the chat template must end an answer with `<|im_end|>` and a newline."
                )


def _to_json(value: Any, **options: Any) -> str:
    """The `tojson` filter of transformers: Jinja's own escapes HTML."""
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
