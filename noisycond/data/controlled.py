"""Training examples with the control image of each: cut and mirrored as the image is.

Letters: B examples, R the resolution.
"""

from dataclasses import replace

import torch
from torch.utils.data import Dataset

from noisycond.data.batches import collate
from noisycond.data.images import UNREADABLE, Transform
from noisycond.data.sources import ImageSource
from noisycond.errors import InputError, in_one_line, require


LOOKED_AT = 32  # examples, when a run starts
THIN = ("canny",)  # lines of a pixel fade or break when they are resized
FLAT = ("mask", "sam")  # areas of one value or colour each: interpolation would mix them at their borders


class Controls:
    """The control images of a source. Edges are used at the size they were found at; masks are resized to the nearest
    pixel, others by linear interpolation.

    Args:
        source: the images. column: where their controls stand. transform: that of the images. option: for messages.

    Raises:
        InputError: there is no such column, or a control of the first examples is not of its image's size, or has
            edges and would have to be resized.
    """

    def __init__(self, source: ImageSource, column: str, transform: Transform, option: str = "--control_column"):
        source.check_control(column, option)
        self.source, self.column = source, column
        # Others overshoot at sharp edges, of which controls consist.
        self.transform = replace(transform, interpolation="nearest" if column in FLAT else "bilinear")
        for index in range(min(LOOKED_AT, len(source))):
            try:
                sizes = self.sizes(index)
            except UNREADABLE:  # it is named when its turn comes
                continue
            require(
                sizes[0] == sizes[1],
                f"{option} {column}: the control of {source.name(index)} is {_size(sizes[1])}, but the image "
                f"{_size(sizes[0])}; annotate the images as they are, for example with prepare_dataset.py.",
            )
            require(
                self._is_kept(sizes[1]),
                f"{option} {column}: the control of {source.name(index)} is {_size(sizes[1])}, but "
                f"{transform.resolution} a side are needed, and resizing would wipe out edges; prepare the images at "
                f"that size: prepare_dataset.py --resolution {transform.resolution}.",
            )

    def sizes(self, index: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Width and height of the image and of its control. Raises what [`ImageSource.read`] raises."""
        resolution = self.transform.resolution
        return self.source.size(index, resolution), self.source.control(self.column, index, resolution).size

    def _is_kept(self, size: tuple[int, int]) -> bool:
        """Whether a control of this size keeps what it shows."""
        return self.column not in THIN or min(size) == self.transform.resolution

    def read(self, index: int, epoch: int) -> torch.Tensor:
        """The control of an example as its image comes in this epoch: float32 [3, R, R] in [0, 1].

        Raises:
            OSError, ValueError, SyntaxError: it cannot be decoded, is not of its image's size, or has edges and would
                have to be resized.
        """
        resolution = self.transform.resolution
        control = self.source.control(self.column, index, resolution)
        size = self.source.size(index, resolution)
        if control.size != size:
            raise ValueError(f"its control is {_size(control.size)}, but the image {_size(size)}")
        if not self._is_kept(size):
            raise ValueError(f"its edges are {_size(size)}, but {resolution} a side are needed")
        return (self.transform(control, index, epoch) + 1.0) / 2.0


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} × {size[1]} pixels"


class Controlled(Dataset):
    """Training examples with `control`, float32 [3, R, R] in [0, 1].

    An example whose control cannot be read gives way to the next one, as one with an unreadable image does, and is
    named in `bad_images`.

    Args:
        dataset: [`noisycond.data.images.LabelledImages`] or [`noisycond.data.latent_cache.CachedLatents`].
        controls: of the same source.
    """

    def __init__(self, dataset: Dataset, controls: Controls):
        self.dataset, self.controls = dataset, controls

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: tuple[int, int, int]) -> dict:
        return {name: value if name == "bad_images" else value[0] for name, value in self.__getitems__([item]).items()}

    def __getitems__(self, items: list[tuple[int, int, int]]) -> dict:
        """A whole batch at once, as torch's data loader asks for it."""
        bad: list[str] = []
        while True:
            batch = self._batch(items)
            found = [
                self._next_readable(*place)
                for place in zip(batch["index"].tolist(), batch["epoch"].tolist(), strict=True)
            ]
            bad += [*batch.get("bad_images", []), *(name for _, _, skipped in found for name in skipped)]
            if not any(skipped for _, _, skipped in found):
                controls = torch.stack([control for control, _, _ in found])
                return batch | {"control": controls, "bad_images": bad}
            # What stands in may have an unreadable image in its turn.
            require(len(bad) < 2 * len(self) * len(items), f"no image has a control that can be read: {bad[:1]}.")
            items = [(index, *item[1:]) for (_, index, _), item in zip(found, items, strict=True)]

    def _batch(self, items: list[tuple[int, int, int]]) -> dict:
        whole = getattr(self.dataset, "__getitems__", None)
        return collate(whole(items) if whole else [self.dataset[item] for item in items])

    def _next_readable(self, index: int, epoch: int) -> tuple[torch.Tensor, int, list[str]]:
        """The control of this example or of the next one that has one, whose it is, and the names of those without."""
        skipped: list[str] = []
        for candidate in range(index, index + len(self)):
            candidate %= len(self)
            try:
                return self.controls.read(candidate, epoch), candidate, skipped
            except UNREADABLE as error:
                skipped.append(f"{self.controls.source.name(candidate)} ({in_one_line(error)})")
        raise InputError(f"none of the {len(self)} control images can be read, for example {skipped[0]}.")
