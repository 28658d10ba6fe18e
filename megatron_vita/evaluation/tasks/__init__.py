"""Tasks: functions that judge an answer by its question's gold answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from megatron_vita.evaluation.questions import Question
from megatron_vita.evaluation.tasks.mmmu import mmmu
from megatron_vita.evaluation.tasks.multiple_choice import check_gold, multiple_choice
from megatron_vita.evaluation.tasks.numbers import relaxed_accuracy
from megatron_vita.evaluation.tasks.score import Score
from megatron_vita.evaluation.tasks.text import anls, exact_match, needle, ocrbench

__all__ = ["TASKS", "Score", "Task", "check_gold"]

Task = Callable[[str, Question], Score]
"""Judges an answer (with the white space that the model gave it) by its question."""

TASKS: Mapping[str, Task] = {
    "exact_match": exact_match,
    "anls": anls,
    "relaxed_accuracy": relaxed_accuracy,
    "multiple_choice": multiple_choice,
    "mmmu": mmmu,
    "ocrbench": ocrbench,
    "needle": needle,
}
"""Task name -> judge."""
