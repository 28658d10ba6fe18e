"""The slicing rules against the textbook form of each rearrangement, whole and in part."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from megatron_vita.checkpoint.tensors import TensorsInMemory
from megatron_vita.convert import rules
from megatron_vita.convert.coverage import Coverage
from megatron_vita.convert.rules import Copy, Named, Rule
from megatron_vita.convert.views import HfView, McoreView
from megatron_vita.errors import CheckpointError


def _numbers(*shape: int, start: int = 1) -> Tensor:
    return torch.arange(start, start + int(torch.tensor(shape).prod()), dtype=torch.float64).reshape(shape)


def _both_ways(rule: Rule, hf: dict[str, Tensor], mcore: Tensor) -> None:
    """Forward, inverse, and every part of either read alone equal the whole."""
    assert rule.mcore is not None
    name = rule.mcore.name
    forward = McoreView([rule], TensorsInMemory(hf), "here")
    assert torch.equal(forward[name], mcore)
    back = HfView([rule], TensorsInMemory({name: mcore}), "here")
    for named in rule.hf:
        whole = back[named.name]
        assert torch.equal(whole, hf[named.name])
        for start, stop in itertools.combinations(range(0, whole.shape[-2] + 1 if whole.dim() > 1 else 0, 3), 2):
            part = (*(slice(0, n) for n in whole.shape[:-2]), slice(start, stop), slice(0, whole.shape[-1]))
            assert torch.equal(back.read(named.name, part), whole[part])
    for start, stop in itertools.combinations(range(0, len(mcore) + 1, 5), 2):
        slices = (slice(start, stop), *(slice(0, n) for n in mcore.shape[1:]))
        assert torch.equal(forward.read(name, slices), mcore[slices])


@pytest.mark.parametrize(("heads", "groups", "head_dim"), [(6, 2, 3), (5, 5, 2), (4, 1, 3), (12, 4, 1)])
@pytest.mark.parametrize("columns", [None, 7])
def test_grouped_qkv(heads: int, groups: int, head_dim: int, columns: int | None) -> None:
    rest = () if columns is None else (columns,)
    q = _numbers(heads * head_dim, *rest)
    k, v = (_numbers(groups * head_dim, *rest, start=10_000 * i) for i in (1, 2))
    ratio = heads // groups
    blocks = [
        q.reshape(groups, ratio * head_dim, *rest),
        k.reshape(groups, head_dim, *rest),
        v.reshape(groups, head_dim, *rest),
    ]
    fused = torch.cat(blocks, 1).reshape(-1, *rest)
    rule = rules.grouped_qkv("x", ["q", "k", "v"], heads=heads, groups=groups, head_dim=head_dim, columns=columns)
    _both_ways(rule, {"q": q, "k": k, "v": v}, fused)


def test_joint_qkv() -> None:
    heads, head_dim, columns = 3, 4, 5
    joint = _numbers(3 * heads * head_dim, columns)
    fused = joint.reshape(3, heads, head_dim, columns).transpose(0, 1).reshape(-1, columns)
    rule = rules.joint_qkv("x", "qkv", heads=heads, head_dim=head_dim, columns=columns)
    _both_ways(rule, {"qkv": joint}, fused)


def test_stacked_and_renamed() -> None:
    gate, up = _numbers(4, 3), _numbers(4, 3, start=100)
    _both_ways(rules.stacked("x", ["g", "u"], (4, 4), 3), {"g": gate, "u": up}, torch.cat([gate, up]))
    table = _numbers(5, 3)
    _both_ways(rules.rename("x", "p", (5, 3), hf_shape=(1, 5, 3)), {"p": table[None]}, table)
    kernel = _numbers(4, 3, 2, 2)
    _both_ways(rules.rename("x", "c", (4, 3, 2, 2)), {"c": kernel}, kernel)


def test_zero_padding_is_cut_on_the_way_in_and_filled_on_the_way_out() -> None:
    small = _numbers(2, 3)
    large = torch.zeros(4, 5, dtype=small.dtype)
    large[:2, :3] = small
    rule = rules.zero_padded("x", "y", (2, 3), (4, 5))
    _both_ways(rule, {"y": large}, small)
    assert rule.uncovered(0) == 14
    zeros = rules.all_zero("b", (3,))
    assert torch.equal(HfView([zeros], TensorsInMemory({}), "here")["b"], torch.zeros(3))
    assert zeros.uncovered(0) == 3


def test_a_table_that_does_not_use_everything_once_is_refused() -> None:
    both = (slice(0, 2),)
    with pytest.raises(CheckpointError, match="two rules"):
        rules.prove([rules.rename("x", "a", (2,)), rules.rename("x", "b", (2,))])
    with pytest.raises(CheckpointError, match=r"x: .*fill every element once"):
        rules.prove([Rule(Named("x", (3,)), (Named("a", (2,)),), (Copy(0, both, both),))])
    twice = (Copy(0, both, both), Copy(0, both, (slice(2, 4),)))
    with pytest.raises(CheckpointError, match=r"a: .*twice"):
        rules.prove([Rule(Named("x", (4,)), (Named("a", (2,)),), twice)])


@pytest.mark.parametrize(
    ("unused_keys", "initialised_keys", "wanted"),
    [
        ({}, {}, "3 source tensors, 24 bytes: 3 used, 8 bytes, each element once. 1 targets, 8 bytes"),
        ({"copy": "a copy"}, {}, "2 used, 8 bytes, each element once; 1 unused, each for a reason. 1 targets"),
        (
            {"copy": "a copy", "a": "zeros"},
            {"x": "zeros"},
            "and a part of 1 of the used ones. 1 targets, 8 bytes: each element filled once; 1 of them initialised",
        ),
    ],
)
def test_the_summary_says_what_is_used_and_what_is_not(
    unused_keys: dict[str, str], initialised_keys: dict[str, str], wanted: str
) -> None:
    account = Coverage(
        source_tensors=3,
        source_bytes=24,
        used_bytes=8,
        target_bytes=8,
        parts={"x": ["a", "b"]},
        initialised_keys=initialised_keys,
        unused_keys=unused_keys,
    )
    assert wanted in account.summary()
