"""Rows without data: as long as the recipe says, packed, and sliced as the loader slices."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vita.config import DataConfig, ModelConfig, ParallelConfig, StageConfig, TrainConfig, VisionConfig
from megatron_vita.dryrun.kinds import coords_of, kinds, rank_of
from megatron_vita.dryrun.rows import made_rows


def stage(length: int, *, reset: bool, tower: bool = True, **train: int) -> StageConfig:
    return StageConfig(
        model=ModelConfig(vision=VisionConfig() if tower else None),
        data=DataConfig(seq_length=length, reset_per_document=reset),
        train=TrainConfig(**train),
    )


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(64, 40_000), reset=st.booleans(), tower=st.booleans(), packs=st.integers(1, 3),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_rows_fill_the_sequence(length: int, reset: bool, tower: bool, packs: int, seed: int) -> None:
    one = stage(length, reset=reset, tower=tower, seed=seed, micro_batch_size=packs, global_batch_size=packs)
    for row in made_rows(one, 2):
        assert sum(row.documents) == length * packs
        assert min(row.documents) > 0
        starts = np.cumsum((0, *row.documents))
        first = np.searchsorted(starts, row.first_token, side="right")
        last = np.searchsorted(starts, row.first_token + 255, side="right")
        assert (first == last).all()  # a tile lies in one document
        assert (np.diff(row.first_token) >= 256).all()
        assert tower or not len(row.first_token)
        assert all(0 <= start < stop <= length * packs for start, stop in row.answers)
        assert all(a[1] <= b[0] for a, b in zip(row.answers, row.answers[1:], strict=False))


@pytest.mark.parametrize(("reset", "documents", "tiles"), [(True, (8, 40), (60, 125)), (False, (2, 2), (450, 500))])
def test_rows_look_like_the_stage(reset: bool, documents: tuple[int, int], tiles: tuple[int, int]) -> None:
    (row,) = made_rows(stage(32_768 if reset else 131_072, reset=reset), 1)
    assert documents[0] <= len(row.documents) <= documents[1]
    assert tiles[0] <= len(row.first_token) <= tiles[1]


def test_the_ranks_of_a_group_share_the_row() -> None:
    one = stage(8192, reset=True)
    parallel = ParallelConfig(tensor_model_parallel_size=2, context_parallel_size=2, sequence_parallel=True)
    one = dataclasses.replace(one, parallel=parallel)
    (row,) = made_rows(one, 1)
    batches = [row.batch(coords_of(one, 4, rank), 256, 8) for rank in range(4)]
    assert sum(len(batch.tiles) for batch in batches) == len(row.first_token)
    assert {batch.tokens.shape for batch in batches} == {(1, 4096)}
    labelled = sum(int((batches[rank].labels >= 0).sum()) for rank in (0, 2))
    assert labelled == sum(stop - start for start, stop in row.answers)


def test_coordinates_of_ranks() -> None:
    parallel = ParallelConfig(
        tensor_model_parallel_size=2, context_parallel_size=3, pipeline_model_parallel_size=4, sequence_parallel=True
    )
    one = dataclasses.replace(stage(8192, reset=True), parallel=parallel)
    for rank in range(48):
        at = coords_of(one, 48, rank)
        pp = rank // 12
        assert rank_of(one, 48, tp=at.tp_rank, cp=at.cp_rank, dp=at.dp_rank, pp=pp) == rank
        assert at.holds_tower == (pp == 0)
    assert kinds(one, 48) == [0, 5, 24, 29, 36, 41]
    assert kinds(stage(8192, reset=True), 1) == [0]
