"""A run whose newest checkpoint is damaged goes on from an older one, says so, and deletes nothing."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_vita import checkpoint
from megatron_vita.checkpoint.integrity import INTEGRITY_FILE
from megatron_vita.errors import ConfigError
from megatron_vita.training import ledger as ledgers
from megatron_vita.training.stages import run_stages
from tests.ranks import run_ranks
from tests.training.runs import make_shards, recipe

pytestmark = pytest.mark.slow

STAGES: tuple[dict[str, Any], ...] = (
    {"name": "one", "train": {"train_iters": 6}, "checkpoint": {"save_interval": 2}},
    {"name": "two", "train": {"train_iters": 2}, "checkpoint": {"save_interval": 1}},
)
STEPS = ("iter_0000002", "iter_0000004")


class Killed(BaseException):
    """Ends a run as a kill does, for what lies on the disk."""


def _train(folder: Path, save: str, last: int | None = None, refused: str = "", **options: Any) -> None:
    """Train to the end, until the line of step `last` is written, or until the run is refused; keep its log."""
    write = ledgers.Ledger.write
    records: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(f"{record.levelname} {record.getMessage()}")  # type: ignore[method-assign]
    logging.getLogger("megatron_vita").addHandler(handler)

    def dying(self: ledgers.Ledger, line: Mapping[str, Any]) -> None:
        write(self, line)
        if line["iteration"] == last:
            raise Killed

    stages = options.pop("stages", STAGES[:1])
    valid = {"valid_data_path": str(folder / "shards/train")}
    run = recipe(folder, save, stages, data=valid, **options)
    with mock.patch.object(ledgers.Ledger, "write", dying):
        if refused:
            with pytest.raises(ConfigError, match=refused):
                run_stages(run)
        else:
            try:
                run_stages(run)
                assert last is None
            except Killed:
                assert last is not None
    (folder / f"{save}.log").write_text("\n".join(records))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards; a whole run and one that was killed in step 5."""
    folder = tmp_path_factory.mktemp("made")
    make_shards(folder)
    run_ranks(1, _train, folder, "whole")
    run_ranks(1, _train, folder, "killed", 5)
    return folder


def copied(made: Path, name: str) -> Path:
    """A copy of the killed run, to be damaged; its stage's folder."""
    shutil.copytree(made / "killed", made / name)
    return made / name / "one"


def lines(path: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in line.items() if key != "seconds"}
        for line in map(json.loads, path.read_text().splitlines())
    ]


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def flip(path: Path) -> None:
    """Change one byte in the middle; the size stays."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def flip_every_piece(step: Path) -> None:
    """Change a byte of every tensor: the next stage reads the weights only."""
    for name, entry in json.loads((step / INTEGRITY_FILE).read_text())["files"].items():
        data, start = bytearray((step / name).read_bytes()), 0
        for length, _ in entry.get("pieces", ()):
            data[start + length // 2] ^= 1
            start += length
        (step / name).write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _largest_tensor_file(step: Path) -> Path:
    return max(step.glob("*.distcp"), key=lambda path: path.stat().st_size)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "tensors flipped": lambda step: flip(_largest_tensor_file(step)),
    "tensors missing": lambda step: _largest_tensor_file(step).unlink(),
    "tensors cut": lambda step: cut(_largest_tensor_file(step)),
    "metadata flipped": lambda step: flip(step / ".metadata"),
    "run.json flipped": lambda step: flip(step / "run.json"),
    "run.json missing": lambda step: (step / "run.json").unlink(),
    "integrity flipped": lambda step: flip(step / INTEGRITY_FILE),
    "integrity missing": lambda step: (step / INTEGRITY_FILE).unlink(),
    "plain values flipped": lambda step: flip(next(step.glob("common.*"))),
}


def check_recovered(made: Path, name: str, damaged: list[str], last: int, kept: list[str]) -> str:
    """The run ended as the whole one did; the one line at error level says how it came to."""
    whole, stage = made / "whole/one", made / name / "one"
    assert lines(stage / "ledger.jsonl") == lines(whole / "ledger.jsonl")
    assert lines(stage / "validation.jsonl") == lines(whole / "validation.jsonl")
    assert checkpoint.tensor_digests(checkpoint.resolve(stage)) == checkpoint.tensor_digests(checkpoint.resolve(whole))
    assert sorted(path.name for path in stage.glob("*.damaged")) == [f"{one}.damaged" for one in damaged]
    assert sorted(path.name for path in stage.glob("*.after_*")) == kept
    (error,) = [text for text in (made / f"{name}.log").read_text().splitlines() if text.startswith("ERROR")]
    for part in (*(f"{one}.damaged" for one in damaged), *kept, *([STEPS[last // 2 - 1]] if last else ["beginning"])):
        assert part in error
    return error


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_run_goes_on_from_the_step_before_the_damaged_one(made: Path, kind: str) -> None:
    name = kind.replace(" ", "_")
    stage = copied(made, name)
    DAMAGE[kind](stage / STEPS[1])
    damaged = content(stage / STEPS[1])
    run_ranks(1, _train, made, name)
    check_recovered(made, name, [STEPS[1]], 2, ["ledger.after_0000002.jsonl"])
    assert content(stage / f"{STEPS[1]}.damaged") == damaged
    assert [line["iteration"] for line in lines(stage / "ledger.after_0000002.jsonl")] == [3, 4, 5]


def test_a_stage_without_an_intact_step_starts_from_its_beginning(made: Path) -> None:
    stage = copied(made, "none_left")
    for step, kind in zip(STEPS, ("tensors flipped", "tensors cut"), strict=True):
        DAMAGE[kind](stage / step)
    run_ranks(1, _train, made, "none_left")
    kept = ["ledger.after_0000000.jsonl", "validation.after_0000000.jsonl"]
    check_recovered(made, "none_left", list(STEPS), 0, kept)


def test_all_ranks_fall_back_where_one_finds_the_damage(made: Path) -> None:
    stage = copied(made, "two_ranks")
    flip(_largest_tensor_file(stage / STEPS[1]))
    layout = ({**STAGES[0], "parallel": {"pipeline_model_parallel_size": 2}},)
    run_ranks(2, partial(_train, stages=layout), made, "two_ranks")
    assert [line["iteration"] for line in lines(stage / "ledger.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert (stage / f"{STEPS[1]}.damaged").is_dir()


def test_a_damaged_step_is_refused_on_request_and_nothing_is_touched(made: Path) -> None:
    stage = copied(made, "strict")
    flip(_largest_tensor_file(stage / STEPS[1]))
    refuse = partial(_train, refused=rf"{STEPS[1]}.*on_damage=fallback: the stage then goes on from .*{STEPS[0]}")
    before = content(stage)
    run_ranks(1, partial(refuse, checkpoint={"on_damage": "fail"}), made, "strict")
    assert content(stage) == before


def _of_a_later_release(step: Path) -> None:
    path = step / INTEGRITY_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 99}))


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (_of_a_later_release, {}, "format version 99 is not known"),
        (lambda step: None, {"optimizer": {"weight_decay": 0.1}}, "weight_decay was 0.0 and is 0.1"),
        (lambda step: None, {"model": {"ffn_hidden_size": 64}}, "ffn_hidden_size was 48 and is 64"),
    ],
    ids=["later release", "settings", "model"],
)
def test_what_is_not_damage_is_refused_and_never_renamed(
    made: Path, spoil: Callable[[Path], None], options: dict[str, Any], message: str
) -> None:
    name = message.split()[0]
    stage = copied(made, name)
    spoil(stage / STEPS[1])
    before = content(stage)
    run_ranks(1, partial(_train, refused=message, **options), made, name)
    assert content(stage) == before


def test_a_stage_that_went_on_is_not_refused_when_the_one_before_is_made_again(made: Path) -> None:
    save = made / "both"
    shutil.copytree(made / "whole", save)
    run_ranks(1, partial(_train, stages=STAGES), made, "both")
    two = content(save / "two")
    DAMAGE["tensors missing"](save / "one/iter_0000006")
    run_ranks(1, partial(_train, stages=STAGES), made, "both")
    assert (save / "one/iter_0000006").is_dir()
    assert content(save / "two") == two


def test_a_stage_whose_last_weights_are_damaged_is_trained_to_its_end_again(made: Path) -> None:
    save = made / "chain"
    shutil.copytree(made / "whole", save)
    flip_every_piece(save / "one/iter_0000006")
    run_ranks(1, partial(_train, stages=STAGES), made, "chain")
    assert checkpoint.read_state(save / "two").iteration == 2
    assert (save / "one/iter_0000006.damaged").is_dir()
    check_recovered(
        made, "chain", ["iter_0000006"], 4, ["ledger.after_0000004.jsonl", "validation.after_0000004.jsonl"]
    )
