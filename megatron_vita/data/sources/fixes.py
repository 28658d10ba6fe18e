"""Fixes: small repairs of a Draft for known defects of a publisher's records. A table row lists them in order."""

from __future__ import annotations

from collections.abc import Callable

from megatron_vita.data.rejects import reject
from megatron_vita.data.sources.draft import ROLES, Draft
from megatron_vita.errors import ConfigError

IMAGE_TAG, VIDEO_TAG = "<image>", "<video>"
_ZERO_WIDTH = str.maketrans("", "", "\u200b\u200c\u200d\ufeff")


def _each_text(change: Callable[[str, str], str]) -> Callable[[Draft], None]:
    def fix(draft: Draft) -> None:
        for turn in draft.turns:
            if isinstance(turn.content, str):
                turn.content = change(turn.role, turn.content)

    return fix


def _in_questions(change: Callable[[str], str]) -> Callable[[Draft], None]:
    return _each_text(lambda role, text: text if ROLES.get(role) == "assistant" else change(text))


def _drop_leading_nonuser(draft: Draft) -> None:
    while draft.turns and draft.turns[0].known_role not in ("user", "system"):
        del draft.turns[0]


def _drop_trailing_user(draft: Draft) -> None:
    while draft.turns and draft.turns[-1].known_role != "assistant":
        del draft.turns[-1]


def _drop_bad_role(draft: Draft) -> None:
    draft.turns = [turn for turn in draft.turns if turn.known_role is not None]


def _relabel_alternating_if_bad(draft: Draft) -> None:
    """Relabel turns whose roles do not alternate: user first, then alternating."""
    turns = draft.turns[1:] if draft.turns and draft.turns[0].known_role == "system" else draft.turns
    wanted = [("user", "assistant")[number % 2] for number in range(len(turns))]
    if any(turn.known_role != role for turn, role in zip(turns, wanted, strict=True)):
        for turn, role in zip(turns, wanted, strict=True):
            turn.role = role


def _alias_image_tag_to_video(draft: Draft) -> None:
    """Replace `<image>` by `<video>` in questions of records that have videos only."""
    if draft.videos and not draft.images:
        _in_questions(lambda text: text.replace(IMAGE_TAG, VIDEO_TAG))(draft)


def _ensure_placeholder(draft: Draft) -> None:
    """Put placeholders before the first question of records that have media and no placeholder."""
    asked = "".join(t.content for t in draft.turns if isinstance(t.content, str) and t.known_role != "assistant")
    tags = ""
    if draft.images and IMAGE_TAG not in asked:
        tags += f"{IMAGE_TAG}\n" * len(draft.images)
    if draft.videos and VIDEO_TAG not in asked:
        tags += f"{VIDEO_TAG}\n" * len(draft.videos)
    for turn in draft.turns:
        if tags and turn.known_role == "user" and isinstance(turn.content, str):
            turn.content = tags + turn.content
            return


def _dedupe_placeholder(draft: Draft) -> None:
    """Keep the first of several placeholders of a single picture."""
    if len(draft.images) != 1:
        return
    seen = False
    for turn in draft.turns:
        if not isinstance(turn.content, str) or turn.known_role == "assistant" or IMAGE_TAG not in turn.content:
            continue
        before, _, after = turn.content.partition(IMAGE_TAG)
        turn.content = before + ("" if seen else IMAGE_TAG) + after.replace(IMAGE_TAG, "")
        seen = True


def _strip_orphan_placeholder(draft: Draft) -> None:
    """Remove the placeholders of a kind of media that the record does not have."""
    for tag, media in ((IMAGE_TAG, draft.images), (VIDEO_TAG, draft.videos)):
        for turn in draft.turns:
            if not media and turn.known_role == "user" and isinstance(turn.content, str):
                turn.content = turn.content.replace(f"{tag}\n", "").replace(tag, "")


def _default_prompt(prompt: str) -> Callable[[Draft], None]:
    def fix(draft: Draft) -> None:
        for turn in draft.turns:
            if turn.known_role == "user" and isinstance(turn.content, str):
                if not turn.content.replace(IMAGE_TAG, "").replace(VIDEO_TAG, "").strip():
                    turn.content = f"{turn.content.rstrip()}\n{prompt}"
                return

    return fix


_SIMPLE: dict[str, Callable[[Draft], None]] = {
    "strip": _each_text(lambda role, text: text.strip()),
    "strip_zero_width": _each_text(lambda role, text: text.translate(_ZERO_WIDTH)),
    "drop_leading_nonuser": _drop_leading_nonuser,
    "drop_trailing_user": _drop_trailing_user,
    "drop_bad_role": _drop_bad_role,
    "relabel_alternating_if_bad": _relabel_alternating_if_bad,
    "alias_image_tag_to_video": _alias_image_tag_to_video,
    "ensure_placeholder": _ensure_placeholder,
    "dedupe_placeholder": _dedupe_placeholder,
    "strip_orphan_placeholder": _strip_orphan_placeholder,
}
_WITH_ARGUMENT: dict[str, Callable[[str], Callable[[Draft], None]]] = {
    "strip_prefix": lambda prefix: _each_text(
        lambda role, text: text.removeprefix(prefix) if ROLES.get(role) == "assistant" else text
    ),
    "default_prompt": _default_prompt,
}


def find_fix(name: str) -> Callable[[Draft], None]:
    """A fix by its name in the table; `strip_prefix:X` and `default_prompt:X` take an argument.

    Raises:
        ConfigError: there is no such fix.
    """
    if name in _SIMPLE:
        return _SIMPLE[name]
    head, colon, argument = name.partition(":")
    if colon and head in _WITH_ARGUMENT:
        return _WITH_ARGUMENT[head](argument)
    raise ConfigError(f"no fix {name!r}. Known: {', '.join([*_SIMPLE, *(f'{n}:TEXT' for n in _WITH_ARGUMENT)])}.")


def unwrap(record: object) -> object:
    """The record itself of a list of one record (some revisions of LLaVA-Video-178K)."""
    if isinstance(record, list) and len(record) == 1 and isinstance(record[0], dict):
        if "role" in record[0] or "from" in record[0]:
            raise reject("bad_order", "a conversation of one turn.")
        return record[0]
    return record
