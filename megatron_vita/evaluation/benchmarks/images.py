"""Rows of the picture benchmarks, in the columns of VLMEvalKit's tables and of the Hugging Face parquet files."""

from __future__ import annotations

import ast
from typing import Any

from megatron_vita.errors import DataError
from megatron_vita.evaluation.benchmarks import prompts
from megatron_vita.evaluation.benchmarks.item import LETTERS, Item, lettered, needed, text, texts
from megatron_vita.evaluation.benchmarks.prompts import Style
from megatron_vita.evaluation.benchmarks.rows import Row

_CIRCLE = 1_000_000
"""VLMEvalKit numbers the copies of an MMBench question whose options are rotated in steps of a million."""
_FORMULA = "Handwritten Mathematical Expression Recognition"


def mmbench(row: Row, style: Style) -> Item:
    """MMBench: columns index, hint, question, A to D, answer, category, l2-category, image."""
    question, options, hint = needed(row, "question"), lettered(row), text(row, "hint")
    if style == "lmms_eval":
        body = f"{question} There are several options:\n{prompts.listed(options)}"
        prompt = f"{hint} {body}" if hint else body
        prompt += f"\n\n{prompts.OPTION_LETTER}"
    else:
        prompt = prompts.choice(style, question, options, hint)
    fields = _fields(row, id="index", category="category", l2_category="l2-category|L2-category", split="split")
    if str(fields.get("id", "")).isdigit():
        fields["circle"] = int(fields["id"]) % _CIRCLE
    return Item(
        prompt=prompts.pictured(style, prompt),
        golds=_golds(row),
        options=options,
        fields=fields,
        pictures=row.get("image"),
    )


def ai2d(row: Row, style: Style) -> Item:
    """AI2D: columns question, A to D, answer (a letter), image; or options, answer (a number from 0), image."""
    question, options, golds = needed(row, "question"), lettered(row), _golds(row)
    if not options:
        options = texts(row, "options")
        if not golds[0].isdigit() or int(golds[0]) >= len(options):
            raise DataError(f"`answer` {golds[0]!r} is no number of one of {len(options)} options.")
        golds = (LETTERS[int(golds[0])],)
    if style == "lmms_eval":
        prompt = f"{question}\n{prompts.listed(options)}\n{prompts.OPTION_LETTER}"
    else:
        prompt = prompts.choice(style, question, options)
    return Item(
        prompt=prompts.pictured(style, prompt),
        golds=golds,
        options=options,
        fields=_fields(row, id="index", category="category"),
        pictures=row.get("image"),
    )


def mmmu(row: Row, style: Style) -> Item | None:
    """MMMU: columns id, question, options (a text that spells a list), answer, image_1 to image_7, question_type, or
    VLMEvalKit's question, A, B, ..., answer, image (a list). Questions of the `dev` split are examples: None."""
    if text(row, "split") == "dev":
        return None
    question, options = needed(row, "question"), lettered(row)
    cells: Any = row.get("image")
    if not options and "options" in row:
        options = _spelt(row["options"])
    if "image" not in row:
        cells = [cell for number in range(1, 8) if (cell := row.get(f"image_{number}")) is not None]
    if style == "lmms_eval":
        asked = f"{prompts.listed(options)}\n\n{prompts.OPTION_LETTER}" if options else f"\n{prompts.PHRASE}"
        body = f"{question}\n{asked}"
        named = prompts.named_pictures(body) or range(_count(cells))
        prompt: tuple[str | int, ...] = (*named, body)
    else:
        body = prompts.choice(style, question, options, text(row, "hint"), prompts.OPTION_LETTER)
        prompt = prompts.interleaved(style, body, _count(cells))
    fields = _fields(row, id="id|index", category="category|subfield", l2_category="l2-category", split="split")
    subject = str(fields.get("id", "")).split("_", 1)
    if subject[0] in ("validation", "test") and len(subject) == 2:  # validation_Art_Theory_7
        fields["category"] = subject[1].rsplit("_", 1)[0]
    return Item(prompt=prompt, golds=_golds(row), options=options, fields=fields, pictures=cells)


def ocrbench(row: Row, style: Style) -> Item:
    """OCRBench: columns question, answer (a list), category, image; or question_type and dataset."""
    question = needed(row, "question")
    if style == "long_vita":
        question += "\nAnswer this question using the text in the image directly without any other context."
    return Item(
        prompt=prompts.pictured(style, question.strip() if style == "lmms_eval" else question),
        golds=_golds(row),
        fields=_fields(row, id="index", category="category|question_type", dataset="dataset"),
        pictures=row.get("image"),
    )


def chartqa(row: Row, style: Style) -> Item:
    """ChartQA: columns question, answer, type (human_test or augmented_test) or split, image."""
    return _phrase(row, style, golds=_golds(row), category="type|split")


def docvqa(row: Row, style: Style) -> Item:
    """DocVQA: columns questionId, question, answers (a list), question_types, image; or question, answer, image."""
    item = _phrase(row, style, golds=_golds(row, "answers", "answer"), id="questionId|index", docId="docId")
    kinds = texts(row, "question_types")
    return Item(
        prompt=item.prompt,
        golds=item.golds,
        fields={**item.fields, **({"category": kinds[0]} if kinds else {})},
        pictures=item.pictures,
    )


def _phrase(row: Row, style: Style, *, golds: tuple[str, ...], **names: str) -> Item:
    prompt = f"{needed(row, 'question')}\n{prompts.PHRASE}"
    fields = _fields(row, **{"id": "index", **names})
    return Item(prompt=prompts.pictured(style, prompt), golds=golds, fields=fields, pictures=row.get("image"))


def _golds(row: Row, *names: str) -> tuple[str, ...]:
    golds = texts(row, *(names or ("answer",)))
    if not golds:
        raise DataError("it has no answer. Splits without answers are scored by their publisher: take the other one.")
    return golds


def _fields(row: Row, **names: str) -> dict[str, Any]:
    """Fields of the results: name -> the first of the columns (separated by |) that the row has."""
    found = {name: text(row, *columns.split("|")) for name, columns in names.items()}
    return {name: value for name, value in found.items() if value}


def _spelt(value: Any) -> tuple[str, ...]:
    """A list, or the text that Python writes for one; numbers in it are texts."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, RecursionError):
            raise DataError(f"`options` {value[:80]!r} spells no list.") from None
    if not isinstance(value, list):
        raise DataError("`options` is no list.")
    return tuple(str(one) for one in value)


def _count(cells: Any) -> int:
    """Pictures in a cell."""
    if isinstance(cells, list):
        return len(cells)
    return len(texts({"cells": cells}, "cells")) if isinstance(cells, str) else int(cells is not None)
