"""Batches: a global order that does not depend on processes, accumulation, workers or where one starts."""

import itertools

import pytest
import torch
from torch.utils.data import Dataset

from noisycond.data.batches import Batches, collate


class Numbers(Dataset):
    """Examples that say what was asked for."""

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, item):
        index, epoch, position = item
        bad = [f"bad {index}"] if index % 5 == 0 else []
        return {"index": index, "epoch": epoch, "position": position, "pixels": torch.full((2,), index), "names": bad}


def take(batches: Batches, count: int, start: int = 0) -> list[dict]:
    return list(itertools.islice(batches.starting_at(start), count))


def rows(batches: list[dict]) -> list[tuple[int, int, int]]:
    """(index, epoch, position) of every example, in order."""
    return [
        row
        for batch in batches
        for row in zip(*(batch[name].tolist() for name in ("index", "epoch", "position")), strict=True)
    ]


def test_every_epoch_is_a_permutation_and_flows_into_the_next():
    # 10 examples in batches of 4: batches 2 and 7 straddle two epochs.
    batches = take(Batches(Numbers(10), 4), 10)
    assert all(len(batch["index"]) == 4 for batch in batches)
    examples = rows(batches)
    orders = []
    for epoch in range(4):
        part = examples[10 * epoch : 10 * (epoch + 1)]
        assert [row[1] for row in part] == [epoch] * 10
        orders.append([row[0] for row in part])
        assert sorted(orders[-1]) == list(range(10))
    assert len({tuple(order) for order in orders}) == 4 and list(range(10)) not in orders
    assert batches[2]["epoch"].tolist() == [0, 0, 1, 1]


def test_positions_count_through_the_global_batch():
    assert all(batch["position"].tolist() == [0, 1, 2, 3] for batch in take(Batches(Numbers(10), 4), 5))
    two = take(Batches(Numbers(10), 2, accumulation_steps=2, num_processes=2, process_index=1), 2)
    assert [batch["position"].tolist() for batch in two] == [[2, 3], [6, 7]]


def test_the_order_depends_on_the_seed():
    first, again, other = (rows(take(Batches(Numbers(50), 10, seed=seed), 5)) for seed in (0, 0, 1))
    assert first == again and first != other


@pytest.mark.parametrize("start", [1, 3, 6, 25])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_starting_later_gives_the_tail(start, accumulation):
    batches = Batches(Numbers(7), 3, accumulation_steps=accumulation, seed=5)
    whole = rows(take(batches, (start + 4) * accumulation))
    assert rows(take(batches, 4 * accumulation, start)) == whole[-4 * 3 * accumulation :]


@pytest.mark.parametrize(
    ("size", "accumulation", "processes"), [(2, 1, 6), (3, 2, 2), (3, 4, 1), (1, 4, 3), (6, 1, 2), (12, 1, 1)]
)
def test_processes_and_accumulation_share_one_global_batch(size, accumulation, processes):
    single = rows(take(Batches(Numbers(17), 12), 5))
    parts = [Batches(Numbers(17), size, accumulation, processes, rank) for rank in range(processes)]
    assert all(part.global_batch_size == 12 for part in parts)
    taken = [row for part in parts for step in range(5) for row in rows(take(part, accumulation, step))]
    together = []
    for step in range(5):
        union = [row for part in parts for row in rows(take(part, accumulation, step))]
        together += sorted(union, key=lambda row: row[2])
    assert together == single
    assert len(taken) == len(single) and sorted(taken) == sorted(single)


def test_a_dataset_smaller_than_a_batch():
    examples = rows(take(Batches(Numbers(3), 8), 3))
    assert [row[1] for row in examples] == [place // 3 for place in range(24)]
    assert sorted(row[0] for row in examples) == sorted(list(range(3)) * 8)


def test_workers_change_nothing():
    options = {"batch_size": 3, "accumulation_steps": 2, "num_processes": 2, "process_index": 1, "seed": 2}
    alone = take(Batches(Numbers(11), **options), 9, start=2)
    shared = take(Batches(Numbers(11), **options, num_workers=2), 9, start=2)
    assert rows(alone) == rows(shared)
    for first, second in zip(alone, shared, strict=True):
        assert (first["pixels"] - second["pixels"]).abs().max() == 0 and first["names"] == second["names"]


def test_collate_makes_numbers_tensors_and_joins_lists():
    dataset = Numbers(9)
    batch = collate([dataset[(5, 1, 0)], dataset[(2, 1, 1)], dataset[(0, 1, 2)]])
    assert batch["index"].tolist() == [5, 2, 0] and batch["index"].dtype == torch.int64
    assert batch["pixels"].shape == (3, 2) and batch["pixels"][:, 0].tolist() == [5, 2, 0]
    assert batch["names"] == ["bad 5", "bad 0"]
