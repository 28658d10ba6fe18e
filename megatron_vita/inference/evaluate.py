"""Evaluate models on questions of JSONL files and score the answers; every answer is written as soon as it is known."""

from __future__ import annotations

import json
import logging
import multiprocessing
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from megatron_vita.convert import open_model
from megatron_vita.data.media.video.open import decoder_name
from megatron_vita.errors import ConfigError, DataError, VitaError
from megatron_vita.files import write_atomic
from megatron_vita.inference.answer_key import QuestionKeys, model_key, run_key
from megatron_vita.inference.engine import Engine, model_name
from megatron_vita.inference.prompt import Request
from megatron_vita.inference.questions import Question, read_questions
from megatron_vita.inference.results import Result, ResultFile
from megatron_vita.inference.sampling import GREEDY, SamplingConfig
from megatron_vita.inference.score import RIGHT, TASKS, UNREADABLE, WRONG, summarise
from megatron_vita.inference.settings import EngineSettings

log = logging.getLogger(__name__)

DTYPE = torch.float32
"""Of weights and activations."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalSettings:
    """Settings that determine an answer, besides the model and the question."""

    task: str = "exact_match"
    """Task that scores answers, a key of score.TASKS."""
    zero_tiles: bool = False
    """Replace every tile with black, to measure answers without vision."""
    max_new_tokens: int = 32
    """Maximum tokens of an answer."""
    sampling: SamplingConfig = GREEDY
    """Sampling of tokens."""
    video_backend: str = "auto"
    """Video decoder, see `open_video`; another version of it counts as another setting."""
    batch_tokens: int = 4096
    """Prompt tokens of one packed sequence; affects speed and memory, not answers."""

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ConfigError(f"task {self.task!r} is not known. Choose one of {', '.join(TASKS)}.")
        for name in ("max_new_tokens", "batch_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1.")

    def deciding(self) -> dict[str, Any]:
        """The settings that determine answers or verdicts."""
        deciding = {key: value for key, value in asdict(self).items() if key != "batch_tokens"}
        return {**deciding, "video_backend": decoder_name(self.video_backend)}


@dataclass(frozen=True, slots=True)
class _Part:
    """One model and its unanswered questions."""

    model: str
    """The path as it was given."""
    name: str
    questions: tuple[tuple[str, str, Question], ...]
    """(key of the answer, data file as it was given, question)."""


def evaluate(
    models: Sequence[str],
    data: Sequence[str],
    output: Path,
    settings: EvalSettings,
    *,
    media_root: Path | None = None,
    limit: int | None = None,
    workers: int = 1,
) -> list[dict[str, Any]]:
    """Answer every question by every model, except those in `output/results.jsonl`; then write `output/summary.json`.

    An answer on disk counts only while all that decides it is what it was (`answer_key`): the model, how it reads text
    and pictures, the settings, the question with its media. What could not be read is tried again.

    Args:
        models: checkpoints or Hugging Face folders.
        data: JSONL files in Long-VITA's messages form; the last assistant turn is the reference answer.
        output: folder of the results.
        settings: what decides an answer.
        media_root: folder that media paths are relative to; by default each data file's own.
        limit: only the first so many lines of each file.
        workers: processes that share the questions; each loads the model.

    Returns:
        A summary row (see `summarise`) for each model and data file of this call, over all answers so far.

    Raises:
        ConfigError, CheckpointError, DataError: a missing path, a file that is no JSONL of messages, a foreign results
            file. A single damaged question is not raised but counted (verdict `unreadable`).
    """
    names = _names(models)
    known = {model: model_key(open_model(model), DTYPE) for model in names}
    results = ResultFile(output / "results.jsonl")
    try:
        files: dict[str, list[tuple[str, Question]]] = {}
        keys = QuestionKeys()
        for path in dict.fromkeys(data):
            read = read_questions(Path(path), media_root=media_root, limit=results.limit_for(path, limit))
            files[path] = [(keys.key(question), question) for question in read]
        current = {
            (m, d, settings.zero_tiles): {q.line: run_key(known[m], settings.deciding(), key) for key, q in files[d]}
            for m in names
            for d in files
        }
        stale, unread = results.forget(current)
        if stale:
            log.info("%s: dropped %d answers given under another model, question or setting", results.path, stale)
        if unread:
            log.info("%s: %d questions that could not be read are tried again", results.path, unread)
        finished = results.finished()
        parts = []
        total = 0
        for model, name in names.items():
            runs = {d: current[model, d, settings.zero_tiles] for d in files}
            wanted = [(runs[d][q.line], d, q) for d, questions in files.items() for _, q in questions[:limit]]
            parts.append(_Part(model, name, tuple(w for w in wanted if (w[0], w[1], w[2].line) not in finished)))
            total += len(wanted)
        _ask(parts, results, settings, total, workers)
    finally:
        results.close()
    summary = summarise(results.results)
    write_atomic(output / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    return [row for row in summary if (row["model"], row["data"], row["zero_tiles"]) in current]


def _ask(parts: Sequence[_Part], results: ResultFile, settings: EvalSettings, total: int, workers: int) -> None:
    """Answer all remaining questions, appending each answer; a progress bar on standard error."""
    parts = [part for part in parts if part.questions]
    left = sum(len(part.questions) for part in parts)
    if left < total:
        log.info("%s: %d of %d answers are there already", results.path, total - left, total)
    if not left:
        return
    workers = max(1, min(workers, max(len(part.questions) for part in parts)))
    if workers == 1:
        answers = _answer(parts, settings)
    else:
        answers = _in_processes(workers, lambda rank: _answer([_share(p, rank, workers) for p in parts], settings))
    with tqdm(total=total, initial=total - left, unit="q", smoothing=0.1, mininterval=0.5) as bar:
        right = 0
        for asked, result in enumerate(answers, 1):
            results.add(result)
            right += result["verdict"] == RIGHT
            bar.set_description(result["name"], refresh=False)
            bar.set_postfix_str(f"right {right / asked:.1%}", refresh=False)
            bar.update()


def _share(part: _Part, rank: int, workers: int) -> _Part:
    """Every `workers`-th question: neighbours in a file cost alike, so this balances the workers."""
    return _Part(part.model, part.name, part.questions[rank::workers])


def _answer(parts: Sequence[_Part], settings: EvalSettings) -> Iterator[Result]:
    """Load each model in turn and answer its questions."""
    judge = TASKS[settings.task]
    for part in parts:
        if not part.questions:
            continue
        engine = Engine.load(part.model, EngineSettings(dtype="float32"), video_backend=settings.video_backend)
        requests = (
            Request(str(index), question.sample, settings.sampling, settings.max_new_tokens, settings.zero_tiles)
            for index, (_, _, question) in enumerate(part.questions)
        )
        for request, outcome in engine.run(requests):
            key, data, question = part.questions[int(request.id)]
            result: Result = {"run": key, "model": part.model, "name": part.name, "task": settings.task}
            result |= {"data": data, "line": question.line, "zero_tiles": settings.zero_tiles}
            if isinstance(outcome, DataError):
                result |= {"answer": "", "expected": question.expected, "verdict": UNREADABLE, "finished": True}
                result |= {"error": str(outcome), "fields": question.fields}
            elif isinstance(outcome, VitaError):
                raise outcome
            else:
                verdict = RIGHT if judge(outcome.text, question.expected) else WRONG
                result |= {"answer": outcome.text.strip(), "expected": question.expected, "verdict": verdict}
                result |= {"finished": outcome.finished, "fields": question.fields}
            yield result
        engine.close()


def _in_processes(workers: int, work: Callable[[int], Iterator[Result]]) -> Iterator[Result]:
    """Run `work(rank)` in forked processes and yield their results as they arrive.

    Forked, so that the slow imports are paid once. A worker's failure ends all of them and is raised here.

    Raises:
        ConfigError: a model was loaded in this process before: gloo does not survive a fork.
    """
    if dist.is_initialized():
        raise ConfigError("several evaluation processes must start before any model is loaded. Use workers=1 here.")
    context = multiprocessing.get_context("fork")
    receivers: list[Connection] = []
    processes = []
    for rank in range(workers):
        receiver, sender = context.Pipe(duplex=False)
        receivers.append(receiver)
        # The list as it is now: a child must hold no reading end, or it would not notice that the parent was killed.
        process = context.Process(target=_worker, args=(rank, sender, list(receivers), work), daemon=True)
        process.start()
        sender.close()
        processes.append(process)
    try:
        speaking = dict(enumerate(receivers))
        while speaking:
            ready = wait(list(speaking.values()))
            for rank, receiver in [(rank, one) for rank, one in speaking.items() if one in ready]:
                try:
                    kind, content = receiver.recv()
                except EOFError:
                    raise VitaError(
                        f"evaluation process {rank} died (out of memory?). Run again to continue."
                    ) from None
                if kind == "error":
                    raise content
                if kind == "done":
                    del speaking[rank]
                else:
                    yield content
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _worker(
    rank: int,
    sender: Connection,
    inherited: Sequence[Connection],
    work: Callable[[int], Iterator[Result]],
) -> None:
    for one in inherited:
        one.close()
    torch.set_num_threads(1)  # more would wait for the parent's pool, which the fork did not copy
    try:
        for result in work(rank):
            sender.send(("result", result))
        sender.send(("done", None))
    except BrokenPipeError:
        pass  # the parent was killed; what it had received is on disk
    except KeyboardInterrupt:
        pass  # the parent got the same signal and says so
    except VitaError as error:
        sender.send(("error", error))
    except BaseException:
        sender.send(("error", VitaError(f"evaluation process {rank} failed:\n{traceback.format_exc()}")))


def _names(models: Sequence[str]) -> dict[str, str]:
    """Path -> name of the model in tables: its stage or folder name, or its path where that is not unique."""
    names = {model: model_name(model) for model in models}
    unique = {name for name in names.values() if list(names.values()).count(name) == 1}
    return {model: name if name in unique else model for model, name in names.items()}
