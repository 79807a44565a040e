"""Batches in a global order that is a pure function of (seed, step): any step can be started at, on any number of
processes and workers.

The examples form one endless stream, epoch after epoch, each epoch in a fresh order; global batch s takes the examples
s·G to (s+1)·G - 1 of it, so every batch is full and no example is dropped. Letters: G the global batch size, N the
dataset size.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from noisycond import randomness
from noisycond.randomness import Purpose
from noisycond.signals import ignore_in_worker


def collate(examples: list[dict] | dict) -> dict:
    """Examples to a batch: numbers become int64 [B], tensors are stacked, lists are joined. A batch stays one."""
    if isinstance(examples, dict):
        return examples
    batch = {}
    for name, value in examples[0].items():
        values = [example[name] for example in examples]
        if torch.is_tensor(value):
            batch[name] = torch.stack(values)
        elif isinstance(value, list):
            batch[name] = [item for items in values for item in items]
        else:
            batch[name] = torch.tensor(values, dtype=torch.int64)
    return batch


class _StepSampler(Sampler):
    """Lists of (index, epoch, position in the global batch), one list per batch of this process, without end."""

    def __init__(self, owner: "Batches", start_step: int):
        self.owner, self.start_step = owner, start_step
        self.order_epoch, self.order = -1, None

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        owner = self.owner
        step = self.start_step
        while True:
            for accumulation in range(owner.accumulation_steps):
                first = (accumulation * owner.num_processes + owner.process_index) * owner.batch_size
                positions = np.arange(first, first + owner.batch_size)
                yield self._examples(step * owner.global_batch_size + positions, positions)
            step += 1

    def _examples(self, places: np.ndarray, positions: np.ndarray) -> list[tuple[int, int, int]]:
        size = len(self.owner.dataset)
        epochs, offsets = np.divmod(places, size)
        index = np.empty_like(places)
        for epoch in range(epochs[0], epochs[-1] + 1):
            if epoch != self.order_epoch:
                order = randomness.permutation(self.owner.seed, Purpose.DATA_ORDER, size, epoch)
                self.order_epoch, self.order = epoch, order.numpy()
            here = epochs == epoch
            index[here] = self.order[offsets[here]]
        return list(zip(index.tolist(), epochs.tolist(), positions.tolist(), strict=True))


class Batches:
    """The training batches of this process.

    Args:
        dataset: map-style; asked for (index, epoch, position) and answering with a dict that holds them.
        batch_size: per process and accumulation step.
        accumulation_steps, num_processes, process_index: how the global batch is divided.
        seed: seed of the order.
        num_workers: processes that load data.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        accumulation_steps: int = 1,
        num_processes: int = 1,
        process_index: int = 0,
        seed: int = 0,
        num_workers: int = 0,
    ):
        self.dataset, self.batch_size, self.accumulation_steps = dataset, batch_size, accumulation_steps
        self.num_processes, self.process_index = num_processes, process_index
        self.seed, self.num_workers = seed, num_workers

    @property
    def global_batch_size(self) -> int:
        """G, the number of examples in one optimizer step."""
        return self.batch_size * self.accumulation_steps * self.num_processes

    @property
    def num_examples(self) -> int | None:
        """N, the examples of an epoch; None where nobody knows, as in a stream."""
        return len(self.dataset)

    def state(self) -> object:
        """What a checkpoint must hold to go on from here, as JSON values: nothing, the step tells it all. All
        processes take part."""
        return None

    def load_state(self, state: object) -> None:
        """Takes up what [`state`] gave; to be followed by [`starting_at`]."""

    def starting_at(self, step: int) -> Iterator[dict]:
        """Endless batches from this attempted optimizer step on, `accumulation_steps` of them per step."""
        return iter(
            DataLoader(
                self.dataset,
                batch_sampler=_StepSampler(self, step),
                collate_fn=collate,
                num_workers=self.num_workers,
                worker_init_fn=ignore_in_worker,
                pin_memory=torch.cuda.is_available(),
            )
        )
