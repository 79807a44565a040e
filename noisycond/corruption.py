"""Condition corruption: a class label becomes another one, for a given share of the examples.

Section 3.1 of arXiv:2405.20494. Needs torch and `randomness.py` only. Letters: B examples, K classes.
"""

from collections.abc import Mapping, Sequence

import torch

from noisycond import randomness
from noisycond.randomness import Purpose


CORRUPTION_MODES = ("fixed", "random")


def check_ratio(name: str, value: float) -> None:
    """Raises ValueError unless value lies in [0, 1]; `name` is what the message calls it."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} is {value}, but a share must lie between 0 and 1.")


def group_tables(groups: Sequence[Sequence[int]], num_classes: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Lookup tables of class groups for [`corrupt_labels`].

    Args:
        groups: disjoint lists of class ids that together cover 0 to K - 1, at least two in each.
        num_classes: K.

    Returns:
        Three int64 tensors: members [G, largest group] (padded with 0), and for each class [K] its group and its
        place in that group.

    Raises:
        ValueError: a class is missing, unknown or listed twice, or a group has fewer than two classes.
    """
    members = torch.zeros(len(groups), max((len(group) for group in groups), default=0), dtype=torch.int64)
    group_of = torch.full((num_classes,), -1, dtype=torch.int64)
    place_of = torch.zeros(num_classes, dtype=torch.int64)
    for number, group in enumerate(groups):
        if len(group) < 2:
            raise ValueError(f"class groups: group {number} is {list(group)}, but a group needs at least two classes.")
        for place, label in enumerate(group):
            if not 0 <= label < num_classes:
                raise ValueError(f"class groups: there is no class {label}; classes are 0 to {num_classes - 1}.")
            if group_of[label] >= 0:
                raise ValueError(f"class groups: class {label} is listed twice.")
            members[number, place], group_of[label], place_of[label] = label, number, place
    missing = torch.nonzero(group_of < 0).flatten().tolist()
    if missing:
        shown = ", ".join(map(str, missing[:10])) + (", …" if len(missing) > 10 else "")
        raise ValueError(f"class groups: class {shown} is in no group; every class needs one.")
    return members, group_of, place_of


def corrupt_labels(
    class_labels: torch.Tensor,
    index: torch.Tensor,
    *,
    ratio: float,
    num_classes: int,
    seed: int = 0,
    groups: Sequence[Sequence[int]] | None = None,
    epoch: torch.Tensor | int = 0,
) -> torch.LongTensor:
    """Replaces a share of the labels by another class (Section 3.1 of arXiv:2405.20494).

    A corrupted label never equals the true one, so `ratio` is the share of wrong labels that comes out. The result for
    an example depends on (seed, index, epoch) alone: not on its batch, worker or process.

    Args:
        class_labels [B]: int64, the true labels in [0, K).
        index [B]: int64, each example's own key (its position in the dataset).
        ratio: share of corrupted labels, in [0, 1].
        num_classes: K, at least 2 where ratio > 0.
        seed: another seed corrupts other examples.
        groups: asymmetric corruption: the new class comes from the true one's group. See [`group_tables`].
        epoch: 0 for fixed corruption; the epoch (int or int64 [B]) for corruption that is drawn anew each time.

    Returns:
        int64 [B].

    Raises:
        ValueError: ratio outside [0, 1], labels outside [0, K), fewer than two classes, or groups that do not cover
            the classes.
    """
    corruption = LabelCorruption(ratio, num_classes, seed=seed, groups=groups, mode="random")
    return corruption(class_labels, index, epoch=epoch)


class LabelCorruption:
    """[`corrupt_labels`] with its settings checked once, which counts what it has done.

    Args:
        ratio, num_classes, seed, groups: as in [`corrupt_labels`].
        mode: `fixed` ignores the epoch (the same examples stay corrupted in the same way), `random` uses it.

    Attributes:
        counts [K, 2]: int64, examples seen and examples corrupted, by true class. Filled by [`count`] alone.
    """

    def __init__(
        self,
        ratio: float,
        num_classes: int,
        *,
        seed: int = 0,
        groups: Sequence[Sequence[int]] | None = None,
        mode: str = "fixed",
    ):
        check_ratio("corruption ratio", ratio)
        if mode not in CORRUPTION_MODES:
            raise ValueError(f"corruption mode is {mode!r}, but it must be one of {', '.join(CORRUPTION_MODES)}.")
        if ratio > 0 and num_classes < 2:
            raise ValueError(f"label corruption needs at least two classes, but there is {num_classes}.")
        self.ratio, self.num_classes, self.seed, self.mode = ratio, num_classes, seed, mode
        self.tables = None
        if groups is not None:
            tables = group_tables(groups, num_classes)
            self.tables = (*tables, torch.bincount(tables[1]))
        self.counts = torch.zeros(num_classes, 2, dtype=torch.int64)

    def __call__(
        self, class_labels: torch.Tensor, index: torch.Tensor, epoch: torch.Tensor | int = 0
    ) -> torch.LongTensor:
        """True labels int64 [B] and keys int64 [B] to corrupted labels int64 [B]; see [`corrupt_labels`]."""
        class_labels = class_labels.to(torch.int64)
        # On a GPU the look at the values would wait for it; an embedding table refuses what is out of range there.
        if len(class_labels) and class_labels.device.type == "cpu":
            lowest, highest = int(class_labels.min()), int(class_labels.max())
            if not 0 <= lowest <= highest < self.num_classes:
                raise ValueError(
                    f"class labels lie in [{lowest}, {highest}], but must lie in [0, {self.num_classes - 1}]."
                )
        if self.ratio == 0.0:
            return class_labels.clone()
        epoch = 0 if self.mode == "fixed" else epoch
        corrupted = randomness.bernoulli(self.seed, Purpose.CORRUPTED, index, self.ratio, epoch)
        return torch.where(corrupted, self._other_class(class_labels, index, epoch), class_labels)

    def _other_class(self, class_labels: torch.Tensor, index: torch.Tensor, epoch: torch.Tensor | int) -> torch.Tensor:
        if self.tables is None:
            size, place = self.num_classes, class_labels
        else:
            self.tables = tuple(table.to(class_labels.device) for table in self.tables)
            members, group_of, place_of, group_size = self.tables
            group, place = group_of[class_labels], place_of[class_labels]
            size = group_size[group]
        # A shift by 1 to size - 1 places: uniform over the others, never the class itself.
        shift = 1 + randomness.randint(self.seed, Purpose.CORRUPTED_VALUE, index, size - 1, epoch)
        place = (place + shift) % size
        return place if self.tables is None else members[group, place]

    def count(self, class_labels: torch.Tensor, corrupted_labels: torch.Tensor) -> None:
        """Adds a batch, true and corrupted labels int64 [B], to `counts`."""
        self.counts = self.counts.to(class_labels.device)
        rows = torch.stack([torch.ones_like(class_labels), (class_labels != corrupted_labels).long()], dim=1)
        self.counts.index_add_(0, class_labels, rows)

    def summary(self, counts: torch.Tensor | None = None) -> Mapping[str, object]:
        """The realized ratio and the counts per class, as plain numbers for a log or a JSON file."""
        counts = self.counts if counts is None else counts
        seen, corrupted = counts.sum(0).tolist()
        return {
            "examples_seen": seen,
            "examples_corrupted": corrupted,
            "realized_ratio": corrupted / max(seen, 1),
            "seen_per_class": counts[:, 0].tolist(),
            "corrupted_per_class": counts[:, 1].tolist(),
        }
