"""Checkpoints move between layouts, resume exactly, and exist whole or not at all."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from megatron_vita import checkpoint
from megatron_vita.checkpoint import folder as folders
from megatron_vita.checkpoint.integrity import Integrity
from megatron_vita.config import ParallelConfig
from megatron_vita.errors import CheckpointError
from megatron_vita.models.build import build_model
from megatron_vita.parallel.groups import build_groups, destroy_groups
from tests.checkpoint.tiny import Trainer, smaller, stage, state
from tests.ranks import run_ranks

TP2 = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
PP2 = ParallelConfig(pipeline_model_parallel_size=2)
CP2 = ParallelConfig(context_parallel_size=2)
DP2 = ParallelConfig()


def _save_then_load_elsewhere(root: str, bf16: bool) -> None:
    for number, parallel in enumerate((TP2, PP2, CP2, DP2, TP2)):
        trainer = Trainer(stage(parallel, seed=number, bf16=bf16))  # other fresh weights, all of which are overwritten
        models, optimizer, scheduler = trainer.models, trainer.optimizer, trainer.scheduler
        if number:
            checkpoint.load_training(f"{root}/{number - 1}", models, optimizer, scheduler)
        else:
            trainer.step()
        run = state(trainer.stage)
        checkpoint.save(f"{root}/{number}", trainer.wrapped, optimizer, scheduler, run, trainer.groups)
        assert not psutil.Process().children(), "a save must leave no helper process"
        destroy_groups()


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
def test_weights_and_optimizer_move_between_layouts_to_the_bit(tmp_path: Path, bf16: bool) -> None:
    run_ranks(2, _save_then_load_elsewhere, str(tmp_path), bf16)
    first = checkpoint.read_tensors(tmp_path / "0")
    assert first.shape("language_model.output_layer.weight") == (37, 24)
    assert len(first) == (4 if bf16 else 3) * len(checkpoint.tensor_digests(tmp_path / "0"))
    for number in range(1, 5):
        moved = checkpoint.read_tensors(tmp_path / str(number))
        assert set(moved) == set(first)
        for key in first:
            assert torch.equal(moved[key], first[key]), key
        assert (moved.folder / "common.json").read_text() == (first.folder / "common.json").read_text()


def _resume(root: str) -> None:
    trainer = Trainer(stage(DP2))
    for _ in range(2):
        trainer.step()
    run = state(trainer.stage, 2, consumed_packs=7, manifest_digest="d" * 8, extra={"note": [1, 2]})
    checkpoint.save(root, trainer.wrapped, trainer.optimizer, trainer.scheduler, run, trainer.groups)
    wanted = [trainer.step() for _ in range(3)]
    weights = {name: one.detach().clone() for name, one in trainer.models[0].named_parameters()}
    destroy_groups()

    resumed = Trainer(stage(DP2, seed=9))
    back = checkpoint.load_training(root, resumed.models, resumed.optimizer, resumed.scheduler)
    assert back == run
    assert [resumed.step() for _ in range(3)] == wanted
    for name, one in resumed.models[0].named_parameters():
        assert torch.equal(one, weights[name]), name
    destroy_groups()

    for parallel in (TP2, PP2):
        moved = Trainer(stage(parallel, seed=9))
        checkpoint.load_training(root, moved.models, moved.optimizer, moved.scheduler)
        norms = [moved.step() for _ in range(3)]
        # the norm counts a replicated tower once, whatever the layout
        torch.testing.assert_close(norms, wanted, rtol=1e-5, atol=0)
        checkpoint.save(f"{root}/moved", moved.models, None, None, state(moved.stage, 5), moved.groups)
        destroy_groups()

    again = Trainer(stage(DP2))
    with pytest.raises(CheckpointError, match="holds weights only"):
        checkpoint.load_training(f"{root}/moved", again.models, again.optimizer, again.scheduler)
    destroy_groups()


@pytest.mark.slow
def test_a_resumed_run_steps_as_the_uninterrupted_one(tmp_path: Path) -> None:
    run_ranks(2, _resume, str(tmp_path))


def _save_before_the_first_step(root: str) -> None:
    trainer = Trainer(stage(DP2))
    trainer.scheduler.step(1)  # as a step without labels does: the rate is up, the optimizer has not moved
    before = {name: one.detach().clone() for name, one in trainer.models[0].named_parameters()}
    run = state(trainer.stage, 1)
    checkpoint.save(root, trainer.wrapped, trainer.optimizer, trainer.scheduler, run, trainer.groups)
    assert all(torch.equal(one, before[name]) for name, one in trainer.models[0].named_parameters())
    trainer.step()
    steps = {state["step"].item() for state in trainer.optimizer.chained_optimizers[0].optimizer.state.values()}
    assert steps == {1.0}, "saving must not count as a step"


@pytest.mark.slow
def test_saving_an_optimizer_that_never_stepped_moves_nothing(tmp_path: Path) -> None:
    run_ranks(2, _save_before_the_first_step, str(tmp_path))


def _a_stage_without_anything_to_train(root: str) -> None:
    frozen = {"freeze_vision_model": True, "freeze_language_model": True}
    trainer = Trainer(stage(PP2, **frozen))
    trainer.step()
    run = state(trainer.stage, 1)
    checkpoint.save(root, trainer.wrapped, trainer.optimizer, trainer.scheduler, run, trainer.groups)
    wanted = [trainer.step() for _ in range(2)]
    destroy_groups()
    for parallel in (PP2, DP2):
        resumed = Trainer(stage(parallel, seed=9, **frozen))
        checkpoint.load_training(root, resumed.models, resumed.optimizer, resumed.scheduler)
        torch.testing.assert_close([resumed.step() for _ in range(2)], wanted, rtol=1e-5, atol=0)
        destroy_groups()


@pytest.mark.slow
def test_a_pipeline_stage_may_have_nothing_to_train(tmp_path: Path) -> None:
    run_ranks(2, _a_stage_without_anything_to_train, str(tmp_path))


def _refusals(root: str) -> None:
    settings = stage(TP2)
    groups = build_groups(TP2)
    models = build_model(settings, groups)
    folder = checkpoint.save(root, models, None, None, state(settings), groups)
    destroy_groups()
    for parallel, changes, message in (
        (
            PP2,
            {"ffn_hidden_size": 44},
            r"linear_fc1.weight has shape \(80, 24\) in the checkpoint and \(88, 24\) in the",
        ),
        (DP2, {"num_layers": 1}, r"decoder.layers.1.*not in the model"),
        (PP2, {"num_layers": 4}, r"decoder.layers.2.*is missing"),
        (DP2, {"vocab_size": 36}, r"vocab_size=37.*36"),
        (TP2, {"vocab_size": 38}, r"vocab_size=37.*38"),
        (TP2, {"num_query_groups": 4, "num_attention_heads": 4, "kv_channels": 6}, "num_query_groups=2.*4"),
        (DP2, {"num_attention_heads": 2, "num_query_groups": 1}, "num_attention_heads"),
    ):
        groups = build_groups(parallel)
        other = build_model(stage(parallel, model=smaller(**changes)), groups)
        before = [one.detach().clone() for one in other[0].parameters()]
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load_weights(folder, other)
        assert all(torch.equal(a, b) for a, b in zip(before, other[0].parameters(), strict=True))
        destroy_groups()
    groups = build_groups(TP2)
    other = build_model(settings, groups)
    read_file = Integrity.read_file
    for name in (".metadata", "run.json"):  # whichever of them one rank cannot read, no other waits for it

        def broken(integrity: Integrity, asked: str, name: str = name) -> bytes:
            if asked == name and dist.get_rank() == 1:
                raise CheckpointError(f"a disk that fails at {name}")
            return read_file(integrity, asked)

        Integrity.read_file = broken  # type: ignore[method-assign]
        with pytest.raises(CheckpointError, match=f"a disk that fails at {name}"):
            checkpoint.load_weights(folder, other)
    Integrity.read_file = read_file  # type: ignore[method-assign]
    if dist.get_rank() == 0:
        path = folder / "run.json"
        path.write_text(path.read_text().replace('"iteration": 1', '"iteration": 2'))
    dist.barrier()
    with pytest.raises(CheckpointError, match=r"run\.json: its content has changed"):
        checkpoint.load_weights(folder, other)


@pytest.mark.slow
def test_another_shape_is_refused_on_every_rank_before_loading(tmp_path: Path) -> None:
    run_ranks(2, _refusals, str(tmp_path))


def _one_rank_cannot_write(root: str) -> None:
    settings = stage(TP2)
    groups = build_groups(TP2)
    models = build_model(settings, groups)
    if dist.get_rank() == 1:
        (weight,) = (one for name, one in models[0].named_parameters() if name.endswith("word_embeddings.weight"))
        weight.data = weight.data.to(torch.complex64)
    with pytest.raises(CheckpointError, match=r"word_embeddings\.weight: a tensor of type torch\.complex64 cannot"):
        checkpoint.save(root, models, None, None, state(settings), groups)
    dist.barrier()
    assert os.listdir(root) == []


def test_a_failed_write_fails_everywhere_and_leaves_nothing(tmp_path: Path) -> None:
    run_ranks(2, _one_rank_cannot_write, str(tmp_path))


def _save(root: str, iteration: int, kill: bool) -> None:
    if kill:
        folders.write_integrity = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
    settings = stage()
    groups = build_groups(settings.parallel)
    checkpoint.save(root, build_model(settings, groups), None, None, state(settings, iteration), groups)


def test_a_killed_save_leaves_the_last_checkpoint_in_force(tmp_path: Path) -> None:
    run_ranks(1, _save, str(tmp_path), 1, False)
    with pytest.raises(AssertionError, match="died"):
        run_ranks(1, _save, str(tmp_path), 2, True)
    assert (tmp_path / ".writing-iter_0000002").is_dir()
    newest = checkpoint.latest(tmp_path)
    assert newest is not None
    assert newest.name == "iter_0000001"
    for _ in range(2):  # saving a step again replaces it
        run_ranks(1, _save, str(tmp_path), 3, False)
        assert sorted(os.listdir(tmp_path)) == ["iter_0000001", "iter_0000003", "latest_checkpointed_iteration.txt"]
    assert checkpoint.resolve(tmp_path).name == "iter_0000003"


def _stock_loader(root: str) -> None:
    trainer = Trainer(stage(TP2, seed=3))
    trainer.step()
    run, models = state(trainer.stage), trainer.models
    folder = checkpoint.save(root, trainer.wrapped, trainer.optimizer, trainer.scheduler, run, trainer.groups)
    ours = checkpoint.read_tensors(folder)
    theirs = {key: torch.empty(ours.shape(key), dtype=ours.dtype(key)) for key in ours}
    dcp.load(theirs, storage_reader=dcp.FileSystemReader(folder))
    for key, one in theirs.items():
        assert torch.equal(one, ours[key]), key
    rows = slice(trainer.groups.tp_rank * 19, min(37, trainer.groups.tp_rank * 19 + 19))
    own = models[0].state_dict()["language_model.output_layer.weight"]
    assert torch.equal(own[: rows.stop - rows.start], theirs["language_model.output_layer.weight"][rows])
    assert not theirs["optimizer.state.exp_avg.language_model.output_layer.weight"].eq(0).all()


@pytest.mark.slow
def test_torch_reads_our_format_with_its_own_loader(tmp_path: Path) -> None:
    run_ranks(2, _stock_loader, str(tmp_path))
