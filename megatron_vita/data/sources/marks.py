"""Reads loss marks of turns and records: which answers carry loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from megatron_vita.data.rejects import counted, reject
from megatron_vita.data.sources import fields as names
from megatron_vita.data.sources.draft import ROLES, Draft

MARKS = names.WEIGHTS | names.LEARNT | names.MASKED | names.LEARNT_SPANS
"""Names of fields of a turn that say whether it is learnt, as `fields.plain` writes them."""
_WORDS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


def is_mark(key: str, value: Any) -> bool:
    """Whether a field of a turn is a loss mark. (The `mask` of a picture is a picture.)"""
    return names.plain(key) in MARKS and names.find_medium(value) is None


def turn_learnt(turn: Mapping[str, Any], role: str, draft: Draft) -> bool:
    """Whether an answer carries loss, by the marks of its turn.

    OpenAI's `weight`, axolotl's `train`, `loss` of LLaMA-Factory, ms-swift and XTuner, and their like.

    Raises:
        DataError: loss_weight, if a mark cannot be kept: a weight between 0 and 1, a question to be learnt.
    """
    said: dict[bool, str] = {}
    answer = ROLES.get(role) == "assistant"
    for key, value in turn.items():
        name = names.plain(str(key))
        if is_mark(key, value) and key not in draft.ignore and not _absent(value):
            learnt = _learnt(name, value, key)
            if answer or name not in names.WEIGHTS:  # a weight weighs the loss of answers alone
                said[learnt] = key
    if len(said) == 2:
        raise reject("loss_weight", f"`{said[True]}` says that a turn is learnt, `{said[False]}` that it is not.")
    if True in said and not answer:
        raise reject(
            "loss_weight", f"`{said[True]}` marks a turn of {role!r} to be learnt; loss lies on answers alone."
        )
    return False not in said


def mark_turns(record: Mapping[str, Any], draft: Draft) -> set[str]:
    """Apply the marks of a record to its turns: one for all, or a list with one for each.

    Returns:
        Names of the fields that were read.

    Raises:
        DataError: loss_weight; no_answer, for a plain text that is not to be learnt.
    """
    read: set[str] = set()
    for key, value in record.items():
        name = names.plain(str(key))
        if key in draft.ignore or not (name in names.LAST_ONLY or is_mark(key, value)):
            continue
        read.add(key)
        if _absent(value):
            continue
        if (
            isinstance(value, str) and name in names.MASKED and value.lower() in ROLES
        ):  # NeMo: whose turns carry no loss
            _apply(draft, (turn.known_role != ROLES[value.lower()] for turn in draft.turns))
        elif name in names.LAST_ONLY:
            last = max((n for n, turn in enumerate(draft.turns) if turn.known_role == "assistant"), default=-1)
            if _learnt(name, value, key):
                _apply(draft, (n == last for n in range(len(draft.turns))))
        elif isinstance(value, list | tuple):
            if len(value) != len(draft.turns):
                raise reject(
                    "loss_weight", f"`{key}` marks {counted(len(value), 'turn')}, but there are {len(draft.turns)}."
                )
            marks = [_absent(one) or _learnt(name, one, key) for one in value]
            for turn, one, mark in zip(draft.turns, value, marks, strict=True):
                if mark and turn.known_role != "assistant" and not _absent(one) and name not in names.WEIGHTS:
                    raise reject("loss_weight", f"`{key}` marks a question to be learnt; loss lies on answers alone.")
            _apply(draft, marks)
        else:
            learnt = _learnt(name, value, key)
            if draft.text is not None and not learnt:
                raise reject("no_answer", f"`{key}: {value}` says that the text is not to be learnt.")
            _apply(draft, (learnt for _ in draft.turns))
    return read


def _apply(draft: Draft, marks: Iterable[bool]) -> None:
    for turn, learnt in zip(draft.turns, marks, strict=True):
        turn.learnt = turn.learnt and learnt


def _absent(value: Any) -> bool:
    return value is not False and names.is_empty(value)


def _learnt(name: str, value: Any, key: str) -> bool:
    if isinstance(value, str):
        value = _WORDS.get(value.strip().lower(), value)
    number_says = name not in names.MASKED  # `mask: 1` means either, depending on who wrote it
    if isinstance(value, bool):
        return value != (name in names.MASKED)
    if name not in names.LEARNT_SPANS and number_says and isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    raise reject(
        "loss_weight",
        f"`{key}: {str(value)[:40]}`: an answer is learnt or not; nothing keeps other weights. If the field says "
        "something else, list it under `fields: {ignore: [...]}` in the data mix.",
    )
