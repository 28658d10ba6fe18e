"""The loader: ranks' slices make up the row, every tile is decoded once, the stream does not know the layout."""

from __future__ import annotations

import hashlib
import itertools
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_vita.config import DataConfig, ModelConfig, StageConfig, TrainConfig, VisionConfig
from megatron_vita.data.example import Example
from megatron_vita.data.loading.batch import Batch
from megatron_vita.data.loading.compatible import check_compatible
from megatron_vita.data.loading.loader import PackLoader, RankCoords, StepBatches, mask_samples
from megatron_vita.data.shards.manifest import load_manifest
from megatron_vita.data.shards.reader import ShardSet
from megatron_vita.errors import ConfigError
from tests.data import packed

LENGTH = packed.SEQ_LENGTH


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Example]]:
    items = packed.examples(60)
    prefix = tmp_path_factory.mktemp("made") / "train"
    packed.write(prefix, items)
    return prefix, items


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A set in which the pictures of one sample cannot be decoded, and its sample id."""
    items = packed.examples(60)
    bad = next(index for index, item in enumerate(items) if len(item.tiles) == 3)
    media = tuple(packed.MediaItem(one.data[:20], 16, 16) for one in items[bad].media)
    items[bad] = packed.Example(items[bad].tokens, items[bad].labels, items[bad].tiles, media)
    prefix = tmp_path_factory.mktemp("broken") / "train"
    _, packs = packed.write(prefix, items)
    return prefix, [index for one in packs for index in one].index(bad)


def loader(
    prefix: Path, coords: RankCoords | None = None, *, step: int = 4, micro: int = 1, consumed: int = 0, **data: object
) -> PackLoader:
    return PackLoader(
        DataConfig(data_path=str(prefix), seq_length=LENGTH, **{"num_workers": 0, **data}),  # type: ignore[arg-type]
        TrainConfig(global_batch_size=step, micro_batch_size=micro),
        coords or RankCoords(),
        consumed_packs=consumed,
    )


def one_step(*args: object, **kw: object) -> StepBatches:
    with loader(*args, **kw) as steps:  # type: ignore[arg-type]
        return next(steps)


def expected_row(items: list[Example], sample_ids: tuple[int, ...], prefix: Path) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and labels that the row's samples say, padded."""
    shards = loader(prefix).shards
    lines = shards.samples["line"][list(sample_ids)] - 1
    tokens = np.concatenate([items[line].tokens for line in lines])
    labels = np.concatenate([items[line].labels for line in lines])
    rest = -len(tokens) % LENGTH
    return np.pad(tokens, (0, rest), constant_values=7), np.pad(labels, (0, rest), constant_values=-100)


@pytest.mark.slow
@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize(("cp", "tp", "sp"), [(1, 1, False), (2, 1, False), (2, 2, True), (2, 2, False), (4, 1, False)])
def test_slices_of_all_ranks_are_the_row_and_every_tile_is_decoded_once(
    made: tuple[Path, list[Example]], cp: int, tp: int, sp: bool, reset: bool
) -> None:
    prefix, items = made
    for micro in (1, 2):
        ranks = {
            (c, t): one_step(
                prefix,
                RankCoords(cp_rank=c, cp_size=cp, tp_rank=t, tp_size=tp, sequence_parallel=sp),
                micro=micro,
                reset_per_document=reset,
            )
            for c, t in itertools.product(range(cp), range(tp))
        }
        for number, first in enumerate(ranks[0, 0].micro_batches):
            tokens, labels = expected_row(items, first.sample_ids, prefix) if micro == 1 else (None, None)
            row_tokens = torch.full((LENGTH * micro,), -1)
            row_labels = torch.full((LENGTH * micro,), -1)
            row_positions = torch.full((LENGTH * micro,), -1)
            for (c, _), step in ranks.items():
                batch = step.micro_batches[number]
                assert batch.layout == first.layout
                assert batch.tokens.shape == batch.labels.shape == batch.positions.shape == (1, LENGTH * micro // cp)
                assert batch.tokens.dtype == batch.labels.dtype == batch.positions.dtype == torch.int64
                local = batch.layout.local_positions(c)
                row_tokens[local], row_labels[local] = batch.tokens[0], batch.labels[0]
                row_positions[local] = batch.positions[0]
            if tokens is not None and labels is not None:
                np.testing.assert_array_equal(row_tokens, tokens)
                np.testing.assert_array_equal(row_labels, labels)
            documents = first.layout.documents
            np.testing.assert_array_equal(row_positions, np.concatenate([np.arange(n) for n in documents]))

            batches = [ranks[c, t].micro_batches[number] for c, t in itertools.product(range(cp), range(tp))]
            ids = torch.cat([batch.tile_ids for batch in batches])
            tiles = torch.cat([batch.tiles for batch in batches])
            row = ranks[0, 0].packed[number]
            np.testing.assert_array_equal(ids, row.tile_ids)
            counts = [len(batch.tiles) for batch in batches]
            assert max(counts) - min(counts) <= 1
            owners = loader(prefix).shards.sample_of_tile(ids.numpy())
            records = loader(prefix).shards.tiles(ids.numpy())
            for tile, sample, media in zip(tiles, owners, records["media"], strict=True):
                line = int(loader(prefix).shards.samples["line"][sample]) - 1
                first_media = min(records["media"][owners == sample])
                value = 10 * line + int(media - first_media)
                assert tile[0].unique().tolist() == [value % 256]
                assert tile[1].unique().tolist() == [value // 256]
            context = row_tokens[torch.from_numpy(row.first_token)[:, None] + torch.arange(4)]
            assert (context == packed.CONTEXT).all()
            assert (row_tokens == packed.CONTEXT).sum() == 4 * len(ids)


@pytest.mark.parametrize("micro", [1, 2])
def test_documents_are_samples_with_reset_and_packs_without(made: tuple[Path, list[Example]], micro: int) -> None:
    prefix, _ = made
    shards = loader(prefix).shards
    step = one_step(prefix, micro=micro, reset_per_document=True)
    for batch, row in zip(step.micro_batches, step.packed, strict=True):
        samples = shards.samples["length"][list(batch.sample_ids)].tolist()
        rest = LENGTH * micro - sum(samples)
        assert list(batch.layout.documents) == samples + [rest] * (rest > 0)
        assert len(row.packs) == micro
    step = one_step(prefix, micro=micro)
    for batch, row in zip(step.micro_batches, step.packed, strict=True):
        packs = [shards.pack_length(pack) for pack in row.packs]
        rest = LENGTH * micro - sum(packs)
        assert list(batch.layout.documents) == packs + [rest] * (rest > 0)


def test_the_global_batch_does_not_know_the_layout(made: tuple[Path, list[Example]]) -> None:
    """Samples, packs and labels of a step under every division of the work."""
    prefix, items = made
    for consumed in (0, 4, 16, 24):
        whole = one_step(prefix, consumed=consumed)
        for dp, cp, micro in ((2, 1, 1), (2, 2, 2), (4, 1, 1), (1, 4, 4)):
            steps = [
                one_step(prefix, RankCoords(dp_rank=r, dp_size=dp, cp_size=cp), consumed=consumed, micro=micro)
                for r in range(dp)
            ]
            held = [sample for step in steps for batch in step.micro_batches for sample in batch.sample_ids]
            assert sorted(held) == sorted(whole.sample_ids)
            for step in steps:
                assert (step.pack_ids, step.sample_ids, step.num_labels, step.consumed_packs) == (
                    whole.pack_ids,
                    whole.sample_ids,
                    whole.num_labels,
                    consumed + 4,
                )
                assert sum(len(row.packs) for row in step.packed) == 4 // dp
        lines = loader(prefix).shards.samples["line"][list(whole.sample_ids)] - 1
        assert whole.num_labels == sum(int((items[line].labels != -100).sum()) for line in lines)


def consumed_samples(prefix: Path, steps: int, consumed: int, dp: int, cp: int, micro: int, workers: int) -> list:
    """What all ranks of a layout really get, step by step: each sample's id with the tokens and labels of its span."""
    stream = []
    ranks = [[RankCoords(dp_rank=d, dp_size=dp, cp_rank=c, cp_size=cp) for c in range(cp)] for d in range(dp)]
    loaders = [[loader(prefix, one, micro=micro, num_workers=workers, consumed=consumed) for one in g] for g in ranks]
    try:
        for _ in range(steps):
            held: dict[int, bytes] = {}
            for group in loaders:
                parts = [next(one) for one in group]
                for number, row in enumerate(parts[0].packed):
                    whole = np.full((2, row.length), -1)
                    for rank, part in enumerate(parts):
                        batch = part.micro_batches[number]
                        whole[:, batch.layout.local_positions(rank)] = torch.cat([batch.tokens, batch.labels]).numpy()
                    for index, sample in enumerate(parts[0].micro_batches[number].sample_ids):
                        assert sample not in held, "two ranks were given one sample"
                        held[sample] = whole[:, row.sample_starts[index] : row.sample_starts[index + 1]].tobytes()
            consumed = parts[0].consumed_packs
            stream.append((consumed, sorted(held.items())))
    finally:
        for group in loaders:
            for one in group:
                one.close()
    return stream


@pytest.mark.slow
def test_resuming_with_other_sizes_gives_the_same_stream(tmp_path: Path) -> None:
    """DP 2 -> 1 -> 4 with other CP, micro-batch and worker counts, cut in mid-epoch and over the ends of epochs."""
    prefix = tmp_path / "set"
    packed.write(prefix, packed.examples(64))
    packs = len(loader(prefix).shards)
    assert 2 * packs < 60, "15 steps of 4 packs cover two ends of an epoch"
    assert packs % 4, "and the steps there hold packs of both"
    whole = consumed_samples(prefix, 15, 0, dp=1, cp=1, micro=1, workers=0)
    for sizes in ((4, 6, 5), (7, 1, 7)):
        stream: list = []
        for steps, (dp, cp, micro, workers) in zip(sizes, ((2, 1, 1, 0), (1, 2, 2, 2), (4, 4, 1, 1)), strict=True):
            stream += consumed_samples(prefix, steps, stream[-1][0] if stream else 0, dp, cp, micro, workers)
        assert digest_of(stream) == digest_of(whole)
    ids = [sample for _, held in whole for sample, _ in held]
    assert set(ids) == set(range(64))


def digest_of(stream: list) -> str:
    return hashlib.sha256(repr(stream).encode()).hexdigest()


def test_a_rank_reads_its_own_packs_and_pictures_only(
    made: tuple[Path, list[Example]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every picture is read once per rank that has a tile of it, and by no other; so with the packs' tokens."""
    prefix, _ = made
    read: dict[str, list[int]] = {"media": [], "tokens": []}
    media_bytes, tokens = ShardSet.media_bytes, ShardSet.tokens
    monkeypatch.setattr(ShardSet, "media_bytes", lambda s, item: read["media"].append(item) or media_bytes(s, item))
    monkeypatch.setattr(ShardSet, "tokens", lambda s, pack, at: read["tokens"].append(pack) or tokens(s, pack, at))
    total: list[int] = []
    for dp, cp, tp in itertools.product(range(2), range(2), range(2)):
        coords = RankCoords(dp_rank=dp, dp_size=2, cp_rank=cp, cp_size=2, tp_rank=tp, tp_size=2)
        read["media"].clear()
        read["tokens"].clear()
        with loader(prefix, coords) as steps:
            step = next(steps)
            own = torch.cat([batch.tile_ids for batch in step.micro_batches]).numpy()
            assert sorted(read["media"]) == sorted(set(steps.shards.tiles(own)["media"].tolist()))
            assert read["tokens"] == [pack for row in step.packed for pack in row.packs]
            total += own.tolist()
    assert len(total) == len(set(total)), "a tile was decoded twice"


@pytest.mark.parametrize("workers", [1, 3])
def test_worker_threads_change_nothing(made: tuple[Path, list[Example]], workers: int) -> None:
    prefix, _ = made
    with loader(prefix) as plain, loader(prefix, num_workers=workers) as ahead:
        for _ in range(8):
            one, other = next(plain), next(ahead)
            assert one.pack_ids == other.pack_ids
            for a, b in zip(one.micro_batches, other.micro_batches, strict=True):
                assert a.sample_ids == b.sample_ids
                assert all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("tokens", "labels", "tiles", "tile_ids"))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_prepared_where_they_are_made_and_again_unprepared_once_masked(
    broken: tuple[Path, int], workers: int
) -> None:
    prefix, bad = broken
    threads, shapes = set(), []

    def prepare(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        threads.add(threading.current_thread())
        return batch.labels, batch.labelled

    def allocate(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        shapes.append(shape)
        return torch.full(shape, 7, dtype=dtype)

    data = DataConfig(data_path=str(prefix), seq_length=LENGTH, num_workers=workers)
    with PackLoader(data, TrainConfig(global_batch_size=4), RankCoords(), prepare=prepare, allocate=allocate) as steps:
        pack = steps.shards.pack_of_sample(bad)
        step = next(step for step in steps if pack in step.pack_ids)
    assert (threading.main_thread() in threads) == (workers == 0)
    for batch in step.micro_batches:
        labels, labelled = batch.prepared
        assert labels is batch.labels
        assert torch.equal(labelled, (labels[0] >= 0).nonzero().squeeze(1))
        assert tuple(batch.tiles.shape) in shapes
    assert any((batch.tiles == 0).all(dim=(1, 2, 3)).any() for batch in step.micro_batches), "failed tiles are zero"
    for batch, row in zip(mask_samples(step, step.failed).micro_batches, step.packed, strict=True):
        assert (batch.prepared is None) == (bad in row.sample_ids)


def test_only_ranks_with_a_tower_read_pictures(broken: tuple[Path, int]) -> None:
    prefix, _ = broken
    with loader(prefix, RankCoords(holds_tower=False)) as steps:
        for _ in range(8):
            step = next(steps)
            assert step.failed == ()
            for batch, row in zip(step.micro_batches, step.packed, strict=True):
                assert batch.tiles.shape == (0, 3, 16, 16)
                assert not len(batch.tile_ids)
                assert batch.routes.num_tiles == len(row.tile_ids)


@pytest.mark.parametrize(("cp", "reset"), [(1, True), (2, True), (2, False)])
def test_failed_pictures_are_zero_and_their_sample_is_masked_on_every_rank(
    broken: tuple[Path, int], cp: int, reset: bool
) -> None:
    prefix, bad = broken
    pack = loader(prefix).shards.pack_of_sample(bad)
    all_failed: set[int] = set()
    steps = []
    for rank in range(cp):
        with loader(prefix, RankCoords(cp_rank=rank, cp_size=cp), reset_per_document=reset) as made_steps:
            step = next(s for s in made_steps if pack in s.pack_ids)
        all_failed |= set(step.failed)
        steps.append(step)
    assert all_failed == {bad}
    shards = loader(prefix).shards
    lost = int(shards.samples["labels"][bad])
    kept = []
    for rank, step in enumerate(steps):
        masked = mask_samples(step, all_failed)
        assert masked.num_labels == step.num_labels - lost
        assert masked.failed == step.failed
        assert mask_samples(masked, all_failed) is masked
        assert mask_samples(step, [10**6]) is step
        for before, after, row in zip(step.micro_batches, masked.micro_batches, step.packed, strict=True):
            local = after.layout.local_positions(rank)
            of_sample = np.searchsorted(row.sample_starts, local, side="right") - 1
            inside = of_sample < len(row.sample_ids)
            gone = np.zeros(len(local), dtype=bool)
            gone[inside] = row.sample_ids[of_sample[inside]] == bad
            assert (after.labels[0, gone] == -100).all()
            assert torch.equal(after.labels[0, ~gone], before.labels[0, ~gone])
            kept.append(int((after.labels != -100).sum()))
            owners = shards.sample_of_tile(after.tile_ids.numpy())
            assert (after.tiles[owners == bad] == 0).all()
            assert all(tile.any() for tile in after.tiles[owners != bad])
    assert sum(kept) == masked.num_labels


def test_text_only_shards(tmp_path: Path) -> None:
    packed.write(tmp_path / "text", packed.examples(12, pictures=False))
    step = one_step(tmp_path / "text", RankCoords(holds_tower=False), step=1)
    assert step.micro_batches[0].routes.num_tiles == 0
    step = one_step(tmp_path / "text", step=1)
    assert step.micro_batches[0].tiles.shape == (0, 3, 16, 16)


def test_validation_reads_its_own_shards_in_one_order(made: tuple[Path, list[Example]], tmp_path: Path) -> None:
    packed.write(tmp_path / "valid", packed.examples(9, seed=5))
    data = DataConfig(data_path=str(made[0]), valid_data_path=str(tmp_path / "valid"), seq_length=LENGTH)
    ids = set()
    for seed in (1, 2):
        with PackLoader(data, TrainConfig(global_batch_size=2, seed=seed), RankCoords(), valid=True) as steps:
            assert steps.shards.num_samples == 9
            ids.add(next(steps).pack_ids)
    assert len(ids) == 1


def test_refusals(made: tuple[Path, list[Example]], tmp_path: Path) -> None:
    prefix, _ = made
    with pytest.raises(ConfigError, match="not a multiple"):
        loader(prefix, RankCoords(dp_size=3))
    with pytest.raises(ConfigError, match="must not be negative"):
        loader(prefix, consumed=-1)
    with pytest.raises(ConfigError, match="no packed shards"):
        loader(tmp_path / "none")
    with pytest.raises(ConfigError, match="data_path is not set"):
        PackLoader(DataConfig(seq_length=LENGTH), TrainConfig(), RankCoords())
    with pytest.raises(ConfigError, match=f"packed to {LENGTH} tokens"):
        PackLoader(DataConfig(data_path=str(prefix), seq_length=LENGTH - 1), TrainConfig(), RankCoords())


def test_shards_that_do_not_fit_the_stage_are_refused_with_both_values(
    made: tuple[Path, list[Example]], tmp_path: Path
) -> None:
    manifest = load_manifest(made[0])

    def stage(model: dict | None = None, **data: object) -> StageConfig:
        vision = VisionConfig(image_size=16, patch_size=4, hidden_size=64, num_attention_heads=4)
        return StageConfig(
            model=ModelConfig(**{"vocab_size": 500, "vision": vision, **(model or {})}),  # type: ignore[arg-type]
            data=DataConfig(**{"seq_length": LENGTH, **data}),  # type: ignore[arg-type]
        )

    check_compatible(manifest, stage())
    check_compatible(manifest, stage({"vocab_size": 512}))
    other = VisionConfig(image_size=32, patch_size=4, hidden_size=64, num_attention_heads=4, image_norm="clip")
    for wrong, messages in (
        (stage(seq_length=128), ["96 in the shards", "data.seq_length is 128", "--seq-length"]),
        (stage(layout="long_vita"), ["internvl in the shards", "long_vita"]),
        (stage({"vocab_size": 400}), ["reach up to 499", "model.vocab_size is 400"]),
        (stage({"vision": None}), ["model.vision is not set"]),
        (stage({"vision": other}), ["tile size is 16", "32", "tokens per tile is 4", "16", "pixel mean", "clip"]),
    ):
        with pytest.raises(ConfigError) as caught:
            check_compatible(manifest, wrong)
        assert all(message in str(caught.value) for message in messages), str(caught.value)

    class OtherTokenizer:
        path, sha256, template_sha256 = Path("other"), "x", "c" * 64

    with pytest.raises(ConfigError, match=r"tokenizer's SHA-256 is ttt.* that of other is x"):
        check_compatible(manifest, stage(), OtherTokenizer())  # type: ignore[arg-type]
    text, _ = packed.write(tmp_path / "text", packed.examples(3, pictures=False))
    check_compatible(text, stage({"vision": None}, layout="long_vita"))
