"""Agreement with the control image: do the edges of a drawn image lie where those of its control do, and its regions?

Letters: N images, H × W the size of a control image, t the tolerance in pixels.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from noisycond.data.annotation import Annotate
from noisycond.data.controls import canny_edges, threshold_mask
from noisycond.errors import require
from noisycond.evaluation.estimates import Estimate


WHITE = 127  # a pixel of edges or of a mask is set above this grey value; a resized one has others than 0 and 255
KEPT = 256  # control images in memory
ANNOTATED = 16  # drawn images that are segmented at a time


@dataclass(frozen=True)
class DrawnAfter:
    """The control images that a set of images was drawn after.

    Attributes:
        places [N]: which control each image has. read: a place to its control image, RGB.
        annotator: what made them (`canny`, `mask`, `sam`); None where that is not known.
        made_with: the flags and values that they were made with, as far as known; see
            [`noisycond.control_set.ControlSet`].
    """

    places: Sequence[int]
    read: Callable[[int], Image.Image]
    annotator: str | None
    made_with: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Obedience:
    """What the control metrics of a set are computed from.

    Attributes:
        controls: of the images. drawn: an image's number to the image, RGB.
        annotate: makes segmentations, for controls that are such, as [`noisycond.data.annotation.Segmenter`] does;
            None where there is no segmenter.
    """

    controls: DrawnAfter
    drawn: Callable[[int], Image.Image]
    annotate: Annotate | None = None


def set_pixels(image: Image.Image) -> np.ndarray:
    """Which pixels of an image of edges, or of a mask, are set: bool [H, W]."""
    return np.asarray(image.convert("L")) > WHITE


def near(pixels: np.ndarray, tolerance: int) -> np.ndarray:
    """Which pixels lie at a Euclidean distance of at most t from a set one: bool [H, W] of bool [H, W].

    A dilation by a disk of radius t, as DAVIS does it (Perazzi et al., CVPR 2016).
    """
    import cv2

    steps = np.arange(-tolerance, tolerance + 1)
    disk = (steps[:, None] ** 2 + steps[None, :] ** 2 <= tolerance**2).astype(np.uint8)
    return cv2.dilate(pixels.astype(np.uint8), disk).astype(bool)


def boundary_f1(control: np.ndarray, drawn: np.ndarray, tolerance: int) -> float:
    """F of the edges of an image against those of its control, in [0, 1].

    F = 2PR / (P + R); precision P is the share of drawn edge pixels within t pixels of one of the control, recall R
    the share of the control's within t pixels of a drawn one. The boundary F-measure of Martin, Fowlkes and Malik
    (PAMI 26, 2004), which matches pixels one to one, with the dilation of Perazzi et al. (CVPR 2016) in the place of
    the matching. Where neither image has an edge F is 1, where only one has it is 0.

    Args:
        control, drawn: bool [H, W].
    """
    if not control.any() or not drawn.any():
        return float(control.any() == drawn.any())
    precision = (drawn & near(control, tolerance)).sum() / drawn.sum()
    recall = (control & near(drawn, tolerance)).sum() / control.sum()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def intersection_over_union(control: np.ndarray, drawn: np.ndarray) -> float:
    """|control ∩ drawn| / |control ∪ drawn| of two masks, bool [H, W]; 1 where both are empty."""
    union = (control | drawn).sum()
    return float((control & drawn).sum() / union) if union else 1.0


def regions(segmentation: Image.Image) -> np.ndarray:
    """The region of each pixel, int64 [H, W], by its colour; 0 is black, which is no region."""
    red, green, blue = np.asarray(segmentation.convert("RGB"), dtype=np.int64).transpose(2, 0, 1)
    return (red << 16) | (green << 8) | blue


def covering(control: np.ndarray, drawn: np.ndarray) -> float:
    """The covering of a segmentation by another, Σ_R |R| max_R' O(R, R') / Σ_R |R| over the regions R of the control
    and R' of the drawn image, O the intersection over union (Arbeláez et al., PAMI 33, 2011, Section 2.3.1). Pixels
    that are of no region count for none. Where neither has a region it is 1, where only one has it is 0.

    Args:
        control, drawn: regions, int64 [H, W], 0 where there is none.
    """
    if not control.any() or not drawn.any():
        return float(control.any() == drawn.any())
    sizes = dict(zip(*np.unique(drawn, return_counts=True), strict=True))
    covered = counted = 0.0
    for region, size in zip(*np.unique(control, return_counts=True), strict=True):
        if region == 0:
            continue
        inside = zip(*np.unique(drawn[control == region], return_counts=True), strict=True)
        overlaps = [common / (size + sizes[other] - common) for other, common in inside if other != 0]
        covered += size * max(overlaps, default=0.0)
        counted += size
    return float(covered / counted)


def others(controls: DrawnAfter) -> dict[int, int]:
    """For each control that is in use the next one, in a circle, with other pixels: what a control that has nothing to
    do with an image is compared by.

    Raises:
        InputError: all controls are alike.
    """
    places, read = sorted(set(controls.places)), functools.lru_cache(KEPT)(_array_of(controls))
    found = {}
    for position, place in enumerate(places):
        circle = (places[(position + step) % len(places)] for step in range(1, len(places)))
        found[place] = next((other for other in circle if not np.array_equal(read(place), read(other))), None)
        require(found[place] is not None, "at least two different control images are needed, but all are alike.")
    return found


def _array_of(controls: DrawnAfter) -> Callable[[int], np.ndarray]:
    return lambda place: np.asarray(controls.read(place))


def edge_f1(
    obedience: Obedience, *, tolerance: int, low: float, high: float, progress: bool = False
) -> dict[str, Estimate]:
    """The mean over images of [`boundary_f1`] of the control and the Canny edges of the image at the control's size;
    and that of another image's control and these edges, which images that heed no control reach.

    Args:
        low, high: thresholds of [`noisycond.data.controls.canny_edges`].
    """

    def of_drawn(images: Sequence[Image.Image], numbers: Sequence[int]) -> list[np.ndarray]:
        return [set_pixels(canny_edges(image, low, high)) for image in images]

    def score(control: np.ndarray, drawn: np.ndarray) -> float:
        return boundary_f1(control, drawn, tolerance)

    return _compared(obedience, "edge_f1", set_pixels, of_drawn, score, progress)


def mask_iou(obedience: Obedience, *, progress: bool = False) -> dict[str, Estimate]:
    """The mean over images of how far the regions of the control are those of the image at the control's size, and the
    same of another image's control.

    Controls by `mask`: [`intersection_over_union`] of the foregrounds, the image's by Otsu's threshold. Controls by
    `sam`: [`covering`] of the control's regions by those of the segmented image.
    """
    if obedience.controls.annotator == "sam":

        def segmented(images: Sequence[Image.Image], numbers: Sequence[int]) -> list[np.ndarray]:
            return [regions(segmentation) for segmentation in obedience.annotate(images, numbers)]

        return _compared(obedience, "mask_iou", regions, segmented, covering, progress)

    def thresholded(images: Sequence[Image.Image], numbers: Sequence[int]) -> list[np.ndarray]:
        return [set_pixels(threshold_mask(image)) for image in images]

    return _compared(obedience, "mask_iou", set_pixels, thresholded, intersection_over_union, progress)


def _compared(
    obedience: Obedience,
    name: str,
    of_control: Callable[[Image.Image], np.ndarray],
    of_drawn: Callable[[Sequence[Image.Image], Sequence[int]], list[np.ndarray]],
    score: Callable[[np.ndarray, np.ndarray], float],
    progress: bool,
) -> dict[str, Estimate]:
    controls = obedience.controls
    other, read = others(controls), functools.lru_cache(KEPT)(controls.read)
    scores: dict[str, list[float]] = {name: [], f"{name}_shuffled": []}
    starts = range(0, len(controls.places), ANNOTATED)
    for first in tqdm(starts, desc=name, unit="batch", delay=2, leave=False, disable=not progress):
        places = controls.places[first : first + ANNOTATED]
        numbers = range(first, first + len(places))
        drawn = [
            _sized(obedience.drawn(number), read(place).size) for number, place in zip(numbers, places, strict=True)
        ]
        for place, found in zip(places, of_drawn(drawn, numbers), strict=True):
            scores[name].append(score(of_control(read(place)), found))
            scores[f"{name}_shuffled"].append(score(of_control(read(other[place])), found))
    return {key: Estimate.mean(torch.tensor(values, dtype=torch.float64)) for key, values in scores.items()}


def drawn_at_the_size_of_its_control(obedience: Obedience, number: int) -> Image.Image:
    """A drawn image as the metrics look at it."""
    controls = obedience.controls
    return _sized(obedience.drawn(number), controls.read(controls.places[number]).size)


def _sized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)
