"""What the grids hold, what filters mean, and that the packs are what their names promise."""

from __future__ import annotations

import dataclasses
import functools
from itertools import combinations

import numpy as np
import pytest

from megatron_vita.checks.grid import excluded, make_cases, parse_spec
from megatron_vita.checks.jobs import recipe_jobs, recipe_world
from megatron_vita.checks.options import Case, free_options, layout_options, layouts, shown, why_not
from megatron_vita.checks.tiny import IMAGES, TOKENS, make_packs, tiny_model
from megatron_vita.config import ModelConfig, ParallelConfig, StageConfig, TrainConfig, VisionConfig
from megatron_vita.errors import ConfigError
from megatron_vita.layout import SequenceLayout

WORLDS = (1, 2, 4)


@functools.cache
def cases(grid: str, worlds: tuple[int, ...] = WORLDS) -> list[Case]:
    return make_cases(parse_spec(grid, worlds), worlds)


def pairs(case: Case, names: list[str]) -> set[tuple[tuple[str, object], ...]]:
    return set(combinations([(name, getattr(case, name)) for name in names], 2))


@pytest.mark.slow
def test_the_full_grid_holds_every_pair_that_goes_together() -> None:
    found = cases("full")
    assert len(found) >= 40
    assert all(case.world_size <= 4 and why_not(case) is None for case in found)
    bound, free = list(layout_options(WORLDS)), free_options()
    held = set().union(*(pairs(case, [*bound, *free]) for case in found))
    strict = [case for case in found if case.freeze == "none" and case.dtype == "float64"]
    held_strictly = set().union(*(pairs(case, [*bound, *free]) for case in strict))
    for layout in (case for case, reason in layouts(WORLDS) if reason is None):
        for pair in pairs(layout, bound):
            assert pair in held_strictly, pair
        for name in bound:
            for other, values in free.items():
                for value in values:
                    assert ((name, getattr(layout, name)), (other, value)) in held


@pytest.mark.slow
def test_idle_ranks_are_tried_in_every_combination() -> None:
    found = set(cases("full"))
    asked = "cp=2 comm=p2p,all_gather,a2a images=one-rank,one-batch,none freeze=stage-1 recompute=none,full"
    assert len(cases(asked)) == 18
    assert found.issuperset(cases(asked))


@pytest.mark.slow
def test_the_small_grid_holds_every_value() -> None:
    found = cases("small")
    assert len(found) < 15
    for name, values in {**layout_options(WORLDS), **free_options()}.items():
        assert {getattr(case, name) for case in found} == set(values), name


@pytest.mark.slow
def test_a_filter_asks_for_one_case_and_for_products() -> None:
    (case,) = cases("tp=2 cp=2 comm=p2p")
    assert case == Case(tp=2, cp=2, comm="p2p")
    assert str(case) == "tp=2 cp=2 comm=p2p"
    assert {(one.tp, one.dtype) for one in cases("tp=1,2 dtype=float32,bf16")} == {
        (tp, dtype) for tp in (1, 2) for dtype in ("float32", "bf16")
    }
    assert all(one.cp == 2 for one in cases("full cp=2"))
    assert {one.comm for one in cases("full cp=2")} == {"p2p", "all_gather", "a2a"}
    assert cases("") == cases("full")


@pytest.mark.slow
def test_a_cluster_gets_cases_of_its_own_size() -> None:
    found = cases("full tp=8", (8,))
    assert found
    assert all(case.tp == case.world_size == 8 for case in found)
    assert {case.world_size for case in cases("small", (8,))} == {8}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tq=2", "Did you mean tp?"),
        ("smal", "Did you mean small?"),
        ("cp=3", "choose of 1, 2, 4"),
        ("tp=2 tp=4", "tp is given twice. Write tp=A,B"),
        ("tp=4 cp=2", "1 or 2 or 4 ranks"),
        ("sp=on tp=1", "tensor_model_parallel_size above 1"),
    ],
)
def test_a_filter_that_cannot_be_says_why(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match="--grid") as caught:
        cases(text)
    assert says in str(caught.value)


@pytest.mark.slow
def test_what_is_excluded_has_a_reason() -> None:
    reasons = excluded(parse_spec("full", WORLDS), WORLDS)
    texts = {text: reason for reason, found in reasons.items() for text in found}
    assert "sequence_parallel needs" in texts["tp=1 sp=on"]
    assert "ranks" in texts["tp=4 cp=2"]
    assert "comm says nothing at cp=1" in texts["cp=1 comm=p2p"]
    held = [case for case, reason in layouts(WORLDS) if reason is None]
    for text in texts:
        (first, a), (second, b) = (word.split("=") for word in text.split())
        assert not any(shown(getattr(one, first)) == a and shown(getattr(one, second)) == b for one in held), text


@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize(("cp", "sp"), [(1, 2), (2, 1), (2, 2), (4, 1)])
def test_tiles_stand_where_the_names_say(cp: int, sp: int, reset: bool) -> None:
    model = tiny_model()
    assert model.vision is not None
    for images in IMAGES:
        owners, cut = [], 0
        for pack in make_packs(model, 4, images):
            documents = pack.documents if reset else (TOKENS,)
            layout = SequenceLayout((*documents, 64 - TOKENS), cp=cp, sp=sp)
            rank, index = layout.owner
            owner = rank * sp + index // (layout.local_length // sp)
            of_tiles = [set(owner[first : first + model.vision.tokens_per_tile]) for first in pack.first_token]
            owners.append(set().union(*of_tiles))
            cut += sum(len(one) > 1 for one in of_tiles)
        if images == "one-rank":
            assert all(len(one) == 1 for one in owners)
        elif images == "one-batch":
            assert [bool(one) for one in owners] == [True, True, False, False]
        elif images == "none":
            assert not any(owners)
        else:
            assert all(len(one) == cp * sp for one in owners)
        if images == "straddling":
            assert cut >= 4


def test_packs_differ_in_nothing_but_their_tiles() -> None:
    model = tiny_model()
    few, many = make_packs(model, 2, "none"), make_packs(model, 4, "everywhere")
    for one, other in zip(few, many, strict=False):
        assert np.array_equal(one.tokens, other.tokens)
        assert np.array_equal(one.labels, other.labels)


def test_a_recipe_lends_its_layout_to_a_small_model() -> None:
    parallel = ParallelConfig(
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        pipeline_model_parallel_size=2,
        recompute_granularity="selective",
    )
    model = ModelConfig(num_layers=6, hidden_size=640, num_attention_heads=10, vision=VisionConfig(), vocab_size=1000)
    stage = StageConfig(
        name="two", model=model, parallel=parallel, train=TrainConfig(freeze_vision_model=True, global_batch_size=8)
    )
    assert recipe_world(stage) == 8
    jobs = list(recipe_jobs(stage, 8, None))
    assert {job.images for job in jobs} == set(IMAGES)
    assert all(job.stage.parallel == parallel and job.stage.model.num_layers == 4 for job in jobs)
    assert all(job.stage.train.freeze_vision_model and job.stage.model.hidden_size <= 64 for job in jobs)
    heads = dataclasses.replace(parallel, context_parallel_size=4, cp_comm_type="a2a")
    with pytest.raises(ConfigError, match=r"num_query_groups=2 .*Use context_parallel_size=1"):
        next(recipe_jobs(dataclasses.replace(stage, parallel=heads), 16, None))
    other = dataclasses.replace(model, add_qkv_bias=False, qk_layernorm=True, rope_scaling_factor=8.0)
    lent = next(recipe_jobs(dataclasses.replace(stage, model=other), 4, None)).stage.model
    assert (lent.add_qkv_bias, lent.qk_layernorm, lent.rope_scaling_factor) == (False, True, 8.0)
    units = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 3}
    uniform = next(recipe_jobs(dataclasses.replace(stage, parallel=dataclasses.replace(parallel, **units)), 4, None))
    assert uniform.stage.parallel.recompute_num_layers == 2, "units of 3 do not fit the two layers of a smaller stage"
    uneven = dataclasses.replace(parallel, pipeline_model_parallel_layout="Et|t*5L")
    assert next(recipe_jobs(dataclasses.replace(stage, parallel=uneven), 4, None)).stage.model.num_layers == 6
    with pytest.raises(ConfigError, match="multiple of 4"):
        list(recipe_jobs(stage, 6, None))
    large = dataclasses.replace(stage, parallel=ParallelConfig(tensor_model_parallel_size=32))
    with pytest.raises(ConfigError, match="torchrun"):
        recipe_world(large)
