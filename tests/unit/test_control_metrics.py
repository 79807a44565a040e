"""Agreement with control images: known answers by hand, SciPy's distances, and controls of other images."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import distance_transform_edt
from tiny_annotators import tiny_sam

from noisycond.data.annotation import Segmenter
from noisycond.data.controls import canny_edges, threshold_mask
from noisycond.data.sources import Digits
from noisycond.errors import InputError
from noisycond.evaluation import gallery
from noisycond.evaluation.control import (
    DrawnAfter,
    Obedience,
    boundary_f1,
    covering,
    edge_f1,
    intersection_over_union,
    mask_iou,
    near,
    others,
    regions,
)
from noisycond.evaluation.drawing import ImageSet
from noisycond.evaluation.images import Resize
from noisycond.evaluation.in_training import DrawnImages
from noisycond.evaluation.instruments import Extraction, Instruments
from noisycond.evaluation.options import MetricArguments
from noisycond.evaluation.suite import compute


CANNY = {"low": 100, "high": 200}


def line(column: int) -> np.ndarray:
    """A vertical line in 12 × 16 pixels."""
    pixels = np.zeros((12, 16), dtype=bool)
    pixels[:, column] = True
    return pixels


@pytest.mark.parametrize("tolerance", [0, 1, 2, 3])
def test_a_line_counts_up_to_the_tolerance_and_not_beyond(tolerance):
    for shift in range(5):
        expected = 1.0 if shift <= tolerance else 0.0
        assert boundary_f1(line(4), line(4 + shift), tolerance) == expected
        assert boundary_f1(line(4 + shift), line(4), tolerance) == expected


def test_precision_and_recall_by_hand():
    control, drawn = np.zeros((1, 20), dtype=bool), np.zeros((1, 20), dtype=bool)
    control[0, [2, 3, 4, 15]], drawn[0, [4, 10]] = True, True
    # One of two drawn pixels is at a control edge, and of the control's four 3 and 4 are next to it.
    assert boundary_f1(control, drawn, 1) == pytest.approx(2 * 0.5 * 0.5 / (0.5 + 0.5))
    assert boundary_f1(control, drawn, 0) == pytest.approx(2 * 0.5 * 0.25 / (0.5 + 0.25))


def test_images_without_an_edge():
    empty = np.zeros((12, 16), dtype=bool)
    assert boundary_f1(empty, empty, 1) == 1
    assert boundary_f1(line(3), empty, 1) == boundary_f1(empty, line(3), 1) == 0
    assert intersection_over_union(empty, empty) == 1 and intersection_over_union(line(3), empty) == 0
    nothing = np.zeros((2, 2), dtype=np.int64)
    assert covering(nothing, nothing) == 1
    assert covering(nothing + 1, nothing) == covering(nothing, nothing + 1) == 0


@pytest.mark.parametrize("tolerance", [0, 1, 2, 3, 5])
def test_nearness_is_the_euclidean_distance(tolerance):
    pixels = np.random.default_rng(0).random((40, 50)) < 0.02
    assert np.array_equal(near(pixels, tolerance), distance_transform_edt(~pixels) <= tolerance)


def test_the_rows_of_a_picture_are_spread_over_the_controls(monkeypatch, tmp_path):
    images = [Image.new("RGB", (8, 8), (20 * number,) * 3) for number in range(12)]
    source, shown = DrawnImages(images, None, None, controls=controls_of(images, "canny")), []
    grid = images[0]
    monkeypatch.setattr(gallery, "control_grid", lambda controls, *others: shown.extend(controls) or grid)
    gallery.draw_controlled(None, ImageSet("x", "x", "--images", source), tmp_path / "x.png")
    assert shown == [images[row] for row in (0, 1, 2, 3, 4, 6, 7, 8, 9, 10)]


def test_overlap_of_masks_by_hand():
    control, drawn = np.zeros((4, 4), dtype=bool), np.zeros((4, 4), dtype=bool)
    control[:2], drawn[:3, :2] = True, True  # 8 and 6 pixels, 4 of them common
    assert intersection_over_union(control, drawn) == 4 / 10


def test_covering_by_hand():
    control = np.array([[1, 1, 1, 1, 2, 2, 0, 0]])
    drawn = np.array([[7, 7, 7, 8, 8, 8, 8, 0]])
    # Of region 1 the best is 7, 3 of 4; of region 2 it is 8, 2 of 4. What is black counts for nothing.
    assert covering(control, drawn) == pytest.approx((4 * 3 / 4 + 2 * 2 / 4) / 6)
    assert covering(drawn, control) == pytest.approx((3 * 3 / 4 + 4 * 2 / 4) / 7)
    assert covering(control, control * 5) == 1


def test_regions_are_colours():
    image = Image.fromarray(np.array([[[0, 0, 0], [255, 0, 0], [0, 0, 255], [255, 0, 0]]], dtype=np.uint8))
    assert regions(image).tolist() == [[0, 0xFF0000, 0xFF, 0xFF0000]]


def controls_of(images, annotator, places=None) -> DrawnAfter:
    return DrawnAfter(list(range(len(images))) if places is None else places, images.__getitem__, annotator)


def test_the_other_control_is_the_next_that_differs():
    images = [Image.new("RGB", (2, 2), (value,) * 3) for value in (0, 0, 9, 9, 5)]
    assert others(controls_of(images, "canny")) == {0: 2, 1: 2, 2: 4, 3: 4, 4: 0}
    assert others(controls_of(images, "canny", [4, 0, 4, 1])) == {0: 4, 1: 4, 4: 0}
    with pytest.raises(InputError, match="at least two different control images are needed"):
        others(controls_of(images, "canny", [0, 1, 0]))


def test_images_are_annotated_as_their_controls_were(caplog):
    options = MetricArguments(sam_model="x", canny_low=90)
    options.annotate_as([{"canny_low": 50, "canny_high": 95, "sam_points_per_side": 8}, {}])
    assert (options.canny_low, options.canny_high, options.sam_points_per_side) == (90, 95, 8)
    assert "--canny_low is 90, but the controls were made with 50" in caplog.text and "canny_high" not in caplog.text
    with pytest.raises(InputError, match=r"--canny_low: the controls were made with different values \(50, 60\)"):
        MetricArguments().annotate_as([{"canny_low": 50}, {"canny_low": 60}])
    with pytest.raises(InputError, match="--canny_low is 150 and --canny_high 95"):
        MetricArguments(canny_low=150).annotate_as([{"canny_high": 95}])


@pytest.fixture(scope="module")
def digits() -> list[Image.Image]:
    source = Digits("test")
    return [source.read(number, 32) for number in range(40)]


def test_images_obey_their_own_edges_and_not_those_of_others(digits):
    controls = controls_of([canny_edges(image) for image in digits], "canny")
    found = edge_f1(Obedience(controls, digits.__getitem__), tolerance=1, **CANNY)
    assert found["edge_f1"].value == 1
    assert 0.1 < found["edge_f1_shuffled"].value < 0.8
    # Images that heed other controls: what is shuffled for one is what the next one drew.
    turned = edge_f1(Obedience(controls, lambda number: digits[(number + 1) % 40]), tolerance=1, **CANNY)
    assert turned["edge_f1_shuffled"].value == 1 and turned["edge_f1"].value < 0.8
    resampled = found["edge_f1_shuffled"].resample(torch.zeros(40, dtype=torch.int64))
    by_hand = [np.asarray(canny_edges(digits[place]).convert("L")) > 127 for place in (1, 0)]
    assert resampled == boundary_f1(*by_hand, 1)
    strict = edge_f1(Obedience(controls, digits.__getitem__), tolerance=1, low=700, high=900)
    assert strict["edge_f1"].value < 1


def test_drawn_images_come_to_the_size_of_their_control(digits):
    controls = controls_of([canny_edges(image) for image in digits], "canny")
    larger = [image.resize((64, 64), Image.Resampling.NEAREST) for image in digits]
    assert edge_f1(Obedience(controls, larger.__getitem__), tolerance=1, **CANNY)["edge_f1"].value > 0.95


def test_masks_and_segmentations(digits):
    inverted = [Image.eval(image, lambda value: 255 - value) for image in digits]
    masks = controls_of([threshold_mask(image) for image in digits], "mask")
    found = mask_iou(Obedience(masks, digits.__getitem__))
    assert found["mask_iou"].value == 1 and found["mask_iou_shuffled"].value < 0.7
    assert mask_iou(Obedience(masks, inverted.__getitem__))["mask_iou"].value < 0.05

    seen = []

    def annotate(images, numbers):  # in other colours than those of the controls
        seen.extend(numbers)
        return [Image.eval(threshold_mask(image), lambda value: value // 3) for image in images]

    segmented = controls_of(list(map(threshold_mask, digits)), "sam")
    covered = mask_iou(Obedience(segmented, digits.__getitem__, annotate))
    assert covered["mask_iou"].value == 1 and seen == list(range(40))
    assert covered["mask_iou_shuffled"].value == pytest.approx(found["mask_iou_shuffled"].value)


def test_images_are_segmented_as_the_controls_were(digits, tmp_path, accelerator, monkeypatch, caplog):
    every_mask = {"sam_points_per_side": 2, "sam_pred_iou_thresh": 0.0, "sam_stability_score_thresh": 0.0}
    options = MetricArguments(metrics=["mask_iou"], sam_model=tiny_sam(tmp_path / "sam"), **every_mask)
    controls = Segmenter(options.annotation)(digits[:4], range(4))
    extraction = Extraction(Instruments.open(options, True, torch.device("cpu")), options, Resize(), "cpu")
    assert extraction.settings()["segmenter"] == extraction.instruments.segmenter.fingerprint
    extraction.instruments.check_segmenter([{"SAM model": extraction.settings()["segmenter"]}, {}])
    assert "--sam_model is another" not in caplog.text
    extraction.instruments.check_segmenter([{"SAM model": "sha256:ab"}])
    assert "--sam_model is another" in caplog.text
    source = DrawnImages(digits[:4], None, None, controls=controls_of(controls, "sam"))
    found = compute(extraction.evidence("--images", source), options, "control_masks")
    assert found["mask_iou"].value == 1 > found["mask_iou_shuffled"].value

    def kept() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("segments/*/*.png")}

    # With a folder they are made before the metrics are computed, and only once.
    extraction = replace(extraction, folder=tmp_path / "features", accelerator=accelerator)
    seen = extraction.evidence("--images", source)
    made = kept()
    assert sorted(made) == [f"{number:06d}.png" for number in range(4)]
    next(tmp_path.glob("segments/*/000002.png")).unlink()
    seen = extraction.evidence("--images", source)
    assert {name for name, when in kept().items() if made[name] != when} == {"000002.png"}
    monkeypatch.setattr(Segmenter, "__call__", None)
    again = compute(seen, options, "control_masks")
    assert all(again[name].value == found[name].value for name in found)
    with pytest.raises(InputError, match="--sam_points_per_side has no effect without --sam_model"):
        MetricArguments(sam_points_per_side=2)
    with pytest.raises(InputError, match="--sam_pred_iou_thresh is 2.0"):
        MetricArguments(sam_model="x", sam_pred_iou_thresh=2.0)
