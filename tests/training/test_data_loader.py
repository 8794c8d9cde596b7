"""The loader: every clip once an epoch, the same order everywhere, and on from the exact clip after a stop."""

from __future__ import annotations

import json
import pickle
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from encodeddata import clip, write_folder

from prfl_fast.training.data import BadDataWarning, BucketBatchSampler, LatentDataset, LatentLoader
from prfl_fast.training.data.findings import BadEntryError

COUNT = 13  # nine lying, four upright


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "data", COUNT)


def take(loader: LatentLoader, count: int) -> list[tuple[int, ...]]:
    stream = loader.forever()
    return [next(stream).indices for _ in range(count)]


def test_a_batch_is_its_clips(folder: Path) -> None:
    dataset = LatentDataset(folder)
    assert dataset.label_names == ("motion", "sharp")
    assert [*dataset.buckets.values()] == [[0, 1, 3, 4, 6, 7, 9, 10, 12], [2, 5, 8, 11]]
    for batch in LatentLoader(dataset, 3):
        clips = [clip(number) for number in batch.indices]
        assert len(batch) == len(clips)
        assert torch.equal(batch.latents, torch.cat([c["latents"] for c in clips]))
        text = [c["conditioning"]["encoder_hidden_states"] for c in clips]
        assert torch.equal(batch.conditioning["encoder_hidden_states"], torch.cat(text))
        tables = zip(batch.conditioning["image_rotary_emb"], clips[0]["conditioning"]["image_rotary_emb"], strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in tables)
        assert batch.conditioning["num_frames"] == 2
        assert batch.prompts == tuple(c["prompt"] for c in clips)
        assert batch.labels["motion"].tolist() == [c["labels"]["motion"] for c in clips]
        assert batch.labels["sharp"].dtype == torch.float32
        assert batch.condition is None
        moved = batch.to("meta")
        assert moved.latents.device.type == moved.labels["motion"].device.type == "meta"
        assert moved.conditioning["image_rotary_emb"][1].device.type == "meta"


@pytest.mark.gpu
def test_batches_are_pinned(folder: Path) -> None:
    batch = next(iter(LatentLoader(LatentDataset(folder), 3, num_workers=1)))
    assert batch.latents.is_pinned()
    assert batch.labels["motion"].is_pinned()
    assert batch.conditioning["image_rotary_emb"][0].is_pinned()
    assert torch.equal(batch.to("cuda").latents.cpu(), batch.latents)


def test_chosen_labels(folder: Path) -> None:
    assert [*LatentDataset(folder, labels=("sharp",))[3].labels.items()] == [("sharp", 0.3)]
    assert LatentDataset(folder, labels=())[3].labels == {}
    with pytest.raises(ValueError, match=r"labels: 0.mkv@0.000 has no label 'beauty'; it has motion, sharp"):
        LatentDataset(folder, labels=("motion", "beauty"))


@pytest.mark.parametrize("batch_size", [1, 2, 4, 20])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("drop_last", [False, True])
def test_ranks_share_an_epoch_without_a_clip_twice(batch_size: int, world_size: int, drop_last: bool) -> None:
    buckets = [list(range(0, 31)), list(range(31, 38)), list(range(38, 40))]

    def sampler(rank: int) -> BucketBatchSampler:
        return BucketBatchSampler(buckets, batch_size, seed=3, rank=rank, world_size=world_size, drop_last=drop_last)

    if drop_last and batch_size * world_size > 31:
        with pytest.raises(ValueError, match="no batch for"):
            sampler(0)
        return
    ranks = [sampler(rank) for rank in range(world_size)]
    where = {number: place for place, bucket in enumerate(buckets) for number in bucket}
    orders = []
    for epoch in range(12):
        plans = [rank.plan(epoch) for rank in ranks]
        dealt = Counter(number for plan in plans for batch in plan for number in batch)
        assert set(dealt.values()) == {1}
        for bucket in buckets:
            got = sum(number in dealt for number in bucket)
            whole = len(bucket) // (batch_size * world_size) * (batch_size * world_size)
            assert got == (whole if drop_last else len(bucket) // world_size * world_size)
        assert {len(plan) for plan in plans} == {len(ranks[0])}
        for batches in zip(*plans, strict=True):  # at one time all ranks have one shape and one size
            assert len({where[number] for batch in batches for number in batch}) == 1
            assert len({len(batch) for batch in batches}) == 1
        orders.append(str(plans[0]))
    assert len(set(orders)) == 12
    # What waits is not always the same clip.
    if not drop_last:
        seen = {n for e in range(40) for rank in ranks for batch in rank.plan(e) for n in batch}
        assert seen >= set(range(38))


def test_the_order_is_a_function_of_seed_and_epoch(folder: Path) -> None:
    dataset = LatentDataset(folder)
    first = take(LatentLoader(dataset, 2, seed=1), 21)
    torch.manual_seed(99)
    assert take(LatentLoader(dataset, 2, seed=1), 21) == first
    assert take(LatentLoader(dataset, 2, seed=2), 21) != first
    per_epoch = [sorted(n for batch in first[begin : begin + 7] for n in batch) for begin in (0, 7, 14)]
    assert per_epoch == [list(range(COUNT))] * 3
    assert len({str(first[begin : begin + 7]) for begin in (0, 7, 14)}) == 3


def test_iterating_leaves_the_global_random_state(folder: Path) -> None:
    loader = LatentLoader(LatentDataset(folder), 2)
    before = torch.get_rng_state()
    take(loader, 16)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("workers", "resumed_workers"), [(0, 0), (2, 2), (2, 0)])
def test_a_stop_at_any_batch_loses_none_and_repeats_none(workers: int, resumed_workers: int, folder: Path) -> None:
    dataset = LatentDataset(folder)
    unbroken = take(LatentLoader(dataset, 2, seed=7), 17)
    stopped = LatentLoader(dataset, 2, seed=7, num_workers=workers)
    resumed = LatentLoader(dataset, 2, seed=7, num_workers=resumed_workers)
    stream = stopped.forever()
    for done in range(15):  # over the ends of two epochs; state taken with a batch in hand, others fetched ahead
        state = json.loads(json.dumps(stopped.state_dict()))
        resumed.load_state_dict(state)
        go_on = resumed.forever()
        assert [next(go_on).indices for _ in range(2)] == unbroken[done : done + 2]
        assert next(stream).indices == unbroken[done]


def test_leaving_a_loop_and_coming_back(folder: Path) -> None:
    dataset = LatentDataset(folder)
    for workers in (0, 2):
        unbroken = take(LatentLoader(dataset, 2, seed=7), 14)
        loader = LatentLoader(dataset, 2, seed=7, num_workers=workers)
        seen = []
        for batch in loader:
            seen.append(batch.indices)
            if len(seen) == 3:
                break
        for _ in range(2):
            seen += [batch.indices for batch in loader]
        assert seen == unbroken
        assert len(loader) == 7


def test_a_state_of_other_data_or_arguments_is_refused(folder: Path, tmp_path: Path) -> None:
    dataset = LatentDataset(folder)
    state = LatentLoader(dataset, 2, seed=1).state_dict()
    for other, name in (
        (LatentLoader(dataset, 3, seed=1), "batch_size=2, here it is 3"),
        (LatentLoader(dataset, 2, seed=2), "seed=1, here it is 2"),
        (LatentLoader(dataset, 2, seed=1, world_size=2), "world_size=1, here it is 2"),
        (LatentLoader(dataset, 2, seed=1, drop_last=True), "drop_last=False, here it is True"),
        (LatentLoader(LatentDataset(write_folder(tmp_path / "b", 12)), 2, seed=1), "data="),
    ):
        with pytest.raises(ValueError, match=f"state: was saved with {name}"):
            other.load_state_dict(state)
    with pytest.raises(ValueError, match="expected a batch below 7"):
        LatentLoader(dataset, 2, seed=1).load_state_dict({**state, "batch": 7})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected a whole number from 1"),
        ({"rank": 2, "world_size": 2}, "rank: expected 0 to world_size - 1 = 1, got 2"),
        ({"rank": -1}, "rank: expected 0"),
        ({"world_size": 40}, "no batch for 40 ranks of 2 from buckets of these sizes: 9, 4"),
    ],
)
def test_arguments_that_are_refused(arguments: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        LatentLoader(LatentDataset(folder), **{"batch_size": 2, **arguments})


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_turns_bad_is_told_once_and_replaced_by_the_next_of_its_shape(workers: int, folder: Path) -> None:
    dataset = LatentDataset(folder)
    unbroken = take(LatentLoader(dataset, 1, seed=7), 3 * COUNT)
    loader = LatentLoader(dataset, 1, seed=7, num_workers=workers)
    assert take(loader, 2) == unbroken[:2]
    state = loader.state_dict()
    path = folder / "shard-00002.safetensors"  # clips 8 to 11
    good = path.read_bytes()
    path.write_bytes(b"")
    # 8 and 11 are upright: the next upright one is 2, and after the last comes the first. 9 and 10 give way to 12.
    # Clip 12 and the others lie elsewhere, but what shares a prompt with a clip of that shard is bad too.
    bad = {n for n in range(COUNT) if fails(dataset, n)}
    assert bad >= {8, 9, 10, 11}
    lying, upright = dataset.buckets.values()

    def stand_in(number: int) -> int:
        bucket = lying if number in lying else upright
        place = bucket.index(number)
        return next(n for n in bucket[place:] + bucket[:place] if n not in bad)

    expected = [(stand_in(batch[0]),) for batch in unbroken[2:]]
    with pytest.warns(BadDataWarning) as told:
        assert take(loader, 3 * COUNT - 2) == expected
    assert sorted(str(w.message).split("@")[0] for w in told) == sorted(f"{n}.mkv" for n in bad)
    # A run resumed from before it turned bad goes the same way; one that was told does not tell again.
    resumed = LatentLoader(dataset, 1, seed=7)
    resumed.load_state_dict(state)
    with pytest.warns(BadDataWarning):
        assert take(resumed, 3 * COUNT - 2) == expected
    later = LatentLoader(dataset, 1, seed=7)
    later.load_state_dict(resumed.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        take(later, COUNT)
    path.write_bytes(good)
    assert dataset[8].index == 8


def fails(dataset: LatentDataset, number: int) -> bool:
    try:
        dataset.items[number].load()
    except BadEntryError:
        return True
    return False


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shape_without_a_good_clip_is_an_error(workers: int, folder: Path) -> None:
    dataset = LatentDataset(folder)
    for path in folder.glob("shard-*"):
        path.unlink()
    with pytest.raises(ValueError, match="none of the . clips of a shape can be read"):
        take(LatentLoader(dataset, 2, num_workers=workers), 1)


def test_an_error_of_a_worker_can_be_handed_over() -> None:
    error = pickle.loads(pickle.dumps(BadEntryError("broken", "file", "detail")))
    assert (error.kind, error.file, error.detail, str(error)) == ("broken", "file", "detail", "file: detail")
