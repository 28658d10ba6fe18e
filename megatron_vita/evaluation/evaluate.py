"""Evaluate models on questions and score the answers; every answer is written as soon as it is known."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_vita.data.media.video.open import decoder_name
from megatron_vita.errors import ConfigError, DataError
from megatron_vita.evaluation.processes import in_processes
from megatron_vita.evaluation.question_key import QuestionKeys
from megatron_vita.evaluation.questions import Question, QuestionSet, data_file
from megatron_vita.evaluation.report.summary import summarise
from megatron_vita.evaluation.report.write import write_report
from megatron_vita.evaluation.results import Part, Result, ResultFile, part_of
from megatron_vita.evaluation.score import UNREADABLE, score_of, verdict
from megatron_vita.evaluation.tasks import TASKS, check_gold
from megatron_vita.files import write_atomic
from megatron_vita.inference.answer_key import model_key, run_key
from megatron_vita.inference.engine import Engine, model_name
from megatron_vita.inference.leader import from_leader, leads
from megatron_vita.inference.opening import open_for_inference
from megatron_vita.inference.prompt import Generation, Request
from megatron_vita.inference.sampling_config import GREEDY, SamplingConfig
from megatron_vita.inference.settings import DEFAULT_KV_CACHE_SHARE, EngineSettings

log = logging.getLogger(__name__)

MEDIA = "media"
"""Folder below the results for pictures that tables hold."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalSettings:
    """Settings that determine an answer, besides the model and the question."""

    task: str = "exact_match"
    """Task that scores answers of questions that name none, a key of tasks.TASKS."""
    zero_tiles: bool = False
    """Replace every tile with black, to measure answers without vision."""
    max_new_tokens: int = 32
    """Maximum tokens of an answer."""
    sampling: SamplingConfig = GREEDY
    """Sampling of tokens."""
    video_backend: str = "auto"
    """Video decoder, see `open_video`; another version of it counts as another setting."""
    engine: EngineSettings = field(default_factory=EngineSettings)
    """Layout over ranks, dtype, cache and scheduling; the dtype and the overrides affect answers."""

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ConfigError(f"task {self.task!r} is not known. Choose one of {', '.join(TASKS)}.")
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens={self.max_new_tokens} must be at least 1.")

    def deciding(self) -> dict[str, Any]:
        """The settings that determine answers or verdicts, but the engine's: dtype and overrides are the model's."""
        deciding = {key: value for key, value in asdict(self).items() if key != "engine"}
        return {**deciding, "video_backend": decoder_name(self.video_backend)}


@dataclass(frozen=True, slots=True)
class _Asked:
    """A question that has no answer yet."""

    run: str
    """Key of the answer."""
    line: int
    set: QuestionSet
    questions: Sequence[Question]
    """Those of the set."""
    index: int

    @property
    def question(self) -> Question:
        """The question, which may be made only now: all long texts together would not fit into memory."""
        return self.questions[self.index]


@dataclass(frozen=True, slots=True)
class _Model:
    """One model and its unanswered questions."""

    path: str
    """As it was given."""
    name: str
    asked: tuple[_Asked, ...]


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is to be asked."""

    results: ResultFile
    models: tuple[_Model, ...]
    total: int
    """Questions, answered ones included."""
    parts: frozenset[Part]
    """Of this evaluation."""


def evaluate(
    models: Sequence[str],
    data: Sequence[str | QuestionSet],
    output: Path,
    settings: EvalSettings,
    *,
    media_root: Path | None = None,
    limit: int | None = None,
    workers: int = 1,
) -> list[dict[str, Any]]:
    """Answer every question by every model, except those in `output/results.jsonl`; then write `output/summary.json`
    and `output/report.md` with its plots.

    An answer on disk counts only while all that decides it is what it was (`answer_key`): the model, how it reads text
    and pictures, the settings, the question with its media. What could not be read is tried again.

    Args:
        models: checkpoints or Hugging Face folders.
        data: question sets (each name once with a number of frames), or paths of files that `read_questions` reads.
        output: folder of the results.
        settings: what decides an answer.
        media_root: of data files: folder that media paths are relative to; by default each file's own.
        limit: only the first so many questions of each set.
        workers: processes that share the questions; each loads the model.

    Returns:
        A summary row (see `summarise`) for each model and set of this call, over all answers so far; on ranks
        other than the first, nothing. Every rank of a layout calls it.

    Raises:
        ConfigError, CheckpointError, DataError: a missing path, a file that is no JSONL of messages, a foreign results
            file. A single damaged question is not raised but counted (verdict `unreadable`).
    """
    plans: list[_Plan] = []

    def prepare() -> list[str]:
        sets = [one if isinstance(one, QuestionSet) else data_file(one, media_root, output / MEDIA) for one in data]
        plans.append(_plan(models, sets, output, settings, limit))
        return [model.path for model in plans[0].models if model.asked]

    if workers > 1 and settings.engine.world_size > 1:
        raise ConfigError(
            f"workers={workers}: each has one rank, but the layout has {settings.engine.world_size}. Leave one out."
        )
    loaded = from_leader(prepare)
    if not leads():
        _follow(loaded, settings)
        return []
    plan = plans[0]
    try:
        _ask(plan, settings, workers)
    finally:
        plan.results.close()
    summary = summarise(plan.results.results)
    write_atomic(output / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    write_report(output, plan.results.results)
    return [row for row in summary if part_of(row) in plan.parts]


def _plan(
    models: Sequence[str], sets: Sequence[QuestionSet], output: Path, settings: EvalSettings, limit: int | None
) -> _Plan:
    """Read questions and results, and drop what no longer holds. Raises as `evaluate` does."""
    names = _names(models)
    known = {model: model_key(open_for_inference(model, settings.engine), settings.engine.dtype) for model in names}
    with ExitStack() as stack:
        results = stack.enter_context(closing(ResultFile(output / "results.jsonl")))
        current: dict[Part, dict[int, str]] = {}
        wanted: dict[str, list[_Asked]] = {model: [] for model in names}
        keys = QuestionKeys(output / MEDIA / "digests.jsonl")
        for one in {(one.name, one.max_frames): one for one in sets}.values():
            questions = one.read(results.limit_for(one.name, limit))
            digests = []
            for question in questions:
                check_gold(question, settings.task)
                digests.append((question.line, keys.key(question)))
            deciding = settings.deciding() | {"max_frames": one.max_frames}
            for model in names:
                runs = {line: run_key(known[model], deciding, digest) for line, digest in digests}
                current[model, one.name, settings.zero_tiles, one.max_frames] = runs
                lines = enumerate(line for line, _ in digests[:limit])
                wanted[model] += [_Asked(runs[line], line, one, questions, index) for index, line in lines]
        stale, unread = results.forget(current)
        if stale:
            log.info("%s: dropped %d answers given under another model, question or setting", results.path, stale)
        if unread:
            log.info("%s: %d questions that could not be read are tried again", results.path, unread)
        finished = results.finished()
        left = [
            _Model(path, name, tuple(a for a in wanted[path] if (a.run, a.set.name, a.line) not in finished))
            for path, name in names.items()
        ]
        stack.pop_all()
    return _Plan(results, tuple(left), sum(map(len, wanted.values())), frozenset(current))


def _ask(plan: _Plan, settings: EvalSettings, workers: int) -> None:
    """Answer all remaining questions, appending each answer; a progress bar on standard error."""
    results, total = plan.results, plan.total
    models = [model for model in plan.models if model.asked]
    left = sum(len(model.asked) for model in models)
    if left < total:
        log.info("%s: %d of %d answers are there already", results.path, total - left, total)
    if not left:
        return
    workers = max(1, min(workers, max(len(model.asked) for model in models)))
    if workers == 1:
        answers = _answer(models, settings)
    else:
        if settings.engine.kv_cache_memory is None:
            share = str(float(DEFAULT_KV_CACHE_SHARE / workers))
            settings = replace(settings, engine=replace(settings.engine, kv_cache_memory=share))
        answers = in_processes(workers, lambda rank: _answer([_share(m, rank, workers) for m in models], settings))
    with tqdm(total=total, initial=total - left, unit="q", smoothing=0.1, mininterval=0.5) as bar:
        score, warned = 0.0, set()
        for asked, result in enumerate(answers, 1):
            results.add(result)
            if result["verdict"] == UNREADABLE and result["data"] not in warned:
                warned.add(result["data"])  # a set's others have often the same reason
                bar.clear()
                log.warning("%s, question %d, counts as wrong: %s", result["data"], result["line"], result["error"])
            score += score_of(result)
            bar.set_description(result["name"], refresh=False)
            bar.set_postfix_str(f"score {score / asked:.1%}", refresh=False)
            bar.update()


def _share(model: _Model, rank: int, workers: int) -> _Model:
    """Every `workers`-th question: neighbours in a set cost alike, so this balances the workers."""
    return replace(model, asked=model.asked[rank::workers])


def _answer(models: Sequence[_Model], settings: EvalSettings) -> Iterator[Result]:
    """Load each model in turn and answer its questions; in the order in which they are finished."""
    for model in models:
        if not model.asked:
            continue
        engine = Engine.load(model.path, settings.engine, video_backend=settings.video_backend)
        requests = (
            Request(
                str(index),
                asked.question.sample,
                settings.sampling,
                settings.max_new_tokens,
                settings.zero_tiles,
                max_frames=asked.set.max_frames,
            )
            for index, asked in enumerate(model.asked)
        )
        for request, outcome in engine.run(requests):
            asked = model.asked[int(request.id)]
            question = asked.question
            task = question.task or settings.task
            result: Result = {"run": asked.run, "model": model.path, "name": model.name, "task": task}
            result |= {"data": asked.set.name, "line": question.line, "zero_tiles": settings.zero_tiles}
            result |= {"max_frames": asked.set.max_frames, "overrides": settings.engine.overrides}
            if isinstance(outcome, Generation):
                score = TASKS[task](outcome.text, question)
                result |= {"answer": outcome.text.strip(), "expected": question.expected}
                result |= {"verdict": verdict(score.value), "score": score.value, "extracted": score.extracted}
                result |= {"finished": outcome.finished, "fields": question.fields}
                result |= {"prompt_tokens": outcome.prompt_tokens, "prefill_seconds": outcome.prefill_seconds}
            elif isinstance(outcome, DataError):
                result |= {"answer": "", "expected": question.expected, "verdict": UNREADABLE, "finished": True}
                result |= {"error": str(outcome), "fields": question.fields}
            else:
                raise outcome
            yield result
        engine.close()


def _follow(models: Sequence[str], settings: EvalSettings) -> None:
    """Take part in the answers to rank 0's questions."""
    for model in models:
        engine = Engine.load(model, settings.engine, video_backend=settings.video_backend)
        for _ in engine.run(()):
            pass
        engine.close()


def _names(models: Sequence[str]) -> dict[str, str]:
    """Path -> name of the model in tables: its stage or folder name, or its path where that is not unique."""
    names = {model: model_name(model) for model in models}
    unique = {name for name in names.values() if list(names.values()).count(name) == 1}
    return {model: name if name in unique else model for model, name in names.items()}
