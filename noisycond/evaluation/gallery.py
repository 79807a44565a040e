"""The pictures of an evaluation: samples of all runs side by side, memorized samples, circular walks."""

from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator

from noisycond.evaluation.drawing import ImageSet, file_name
from noisycond.evaluation.figures import (
    circular_walk,
    enlarging,
    first_of_classes,
    nearest_neighbours,
    save_walk,
    side_by_side,
)
from noisycond.evaluation.images import Resize, read_image
from noisycond.evaluation.neighbours import nearest
from noisycond.evaluation.references import RealImages
from noisycond.evaluation.suite import Evidence
from noisycond.generation import open_for_drawing
from noisycond.pictures import control_grid
from noisycond.prompts import Prompts
from noisycond.sampling import image_size, is_consistency_sampler


CANDIDATES = 2000  # generated images among which the most memorized are looked for
ROWS, NEIGHBOURS = 6, 4
GRIDS = 8  # sample grids side by side
CONTROLS, RESULTS = 10, 4  # controls in a grid of them, and at most so many images drawn after each


def draw_figures(
    args,
    sets: Sequence[ImageSet],
    evidence: Sequence[Evidence],
    train: RealImages | None,
    folder: Path,
    resize: Resize,
    prompts: Prompts | None = None,
) -> list[Path]:
    """Draws samples.png, of every label and guidance scale, memorized-<label>.png where there are training images,
    controls-<label>.png where images were drawn after controls, and walk-<label>.png and .webp of each pipeline; all
    of the first run and seed, and all but samples.png of the first scale.

    Args:
        args: the arguments of evaluate_model.py. evidence: of each set. prompts: of text-to-image pipelines.

    Returns:
        What was written.
    """
    # Of each label, and of each of its guidance scales, the first run and seed.
    first, first_of_scale = {}, {}
    for image_set, seen in zip(sets, evidence, strict=True):
        first.setdefault(image_set.label, (image_set, seen))
        first_of_scale.setdefault((image_set.label, image_set.guidance_scale), image_set)
    written = [draw_samples(list(first_of_scale.values())[:GRIDS], folder / "samples.png")]
    for label, (image_set, seen) in first.items():
        place = file_name(label)
        if train is not None and train.source is not None and seen.train is not None:
            written.append(draw_memorized(image_set, seen, train, resize, folder / f"memorized-{place}.png"))
        if image_set.source.controls is not None:
            written.append(draw_controlled(args, image_set, folder / f"controls-{place}.png"))
        if image_set.option == "--pipeline":
            written += draw_walk(args, image_set, folder / f"walk-{place}.png", prompts)
    return written


def draw_samples(sets: Sequence[ImageSet], path: Path) -> Path:
    """The first images of at most ten classes of each set, a row per class; without labels, the first images."""
    per_class, shown = 5, {}
    count = min(len(image_set.source) for image_set in sets)
    for image_set in sets:
        labels = image_set.source.labels
        numbers = list(range(min(count, 10 * per_class)))
        if labels is not None:
            numbers = [number for group in first_of_classes(labels[:count], 10, per_class) for number in group]
        name = str(image_set)
        shown[name] = [read_image(image_set.option, image_set.source, number, Resize()) for number in numbers]
    fewest = min(map(len, shown.values()))
    columns = min(per_class, fewest)
    side_by_side({name: images[:fewest] for name, images in shown.items()}, columns).save(path)
    return path


def draw_memorized(image_set: ImageSet, seen: Evidence, train: RealImages, resize: Resize, path: Path) -> Path:
    """The samples whose nearest training image is nearest in relation to the second, with their nearest ones."""
    points = seen.train.features.pooled
    k = min(NEIGHBOURS, len(points))
    distances, indices = nearest(
        queries=seen.generated.pooled[:CANDIDATES], points=points, k=k, device=seen.device, progress=True
    )
    ratio = distances[:, 0] / distances[:, min(1, k - 1)].clamp(min=1e-12)
    chosen = ratio.argsort(stable=True)[:ROWS].tolist()
    samples = [read_image(image_set.option, image_set.source, number, resize) for number in chosen]
    neighbours = [
        [read_image(train.option, train.source, number, resize) for number in indices[place].tolist()]
        for place in chosen
    ]
    nearest_neighbours(samples, neighbours, [distances[place].tolist() for place in chosen]).save(path)
    return path


def draw_controlled(args, image_set: ImageSet, path: Path) -> Path:
    """A row for each of some controls, spread over all: the control, the real image where it is known, and the images
    drawn after it, of which there are several where there are more images than controls."""
    source, controls = image_set.source, image_set.source.controls
    numbers: dict[int, list[int]] = {}
    for number, place in enumerate(controls.places):
        numbers.setdefault(place, []).append(number)
    count = min(CONTROLS, len(numbers))
    shown = dict(list(numbers.items())[row * len(numbers) // count] for row in range(count))
    fewest = min(RESULTS, *(len(drawn) for drawn in shown.values()))
    results = [
        [read_image(image_set.option, source, number, Resize()) for number in drawn[:fewest]]
        for drawn in shown.values()
    ]
    targets = None
    if image_set.controls is not None:
        examples = image_set.controls.places(len(source), args.class_sampling, image_set.seed)
        side = results[0][0].width
        targets = [image_set.controls.target(examples[drawn[0]], side) for drawn in shown.values()]
    grid = control_grid([controls.read(place) for place in shown], targets, results, enlarging(results[0][0], 48))
    grid.save(path)
    return path


def draw_walk(args, image_set: ImageSet, path: Path, prompts: Prompts | None = None) -> list[Path]:
    """A circular walk of the class --walk_class, or of the prompt --walk_prompt (by default the first), as a strip and
    as an animation; with controls that of the first control, and its class or prompt."""
    opened = open_for_drawing(image_set.member, args, Accelerator(), prompts, image_set.controls)
    condition = args.walk_class if prompts is None else args.walk_prompt or prompts.texts[0]
    controlled = {}
    if opened.controls is not None:
        condition = int(opened.control_labels[0]) if prompts is None else prompts.texts[0]
        control = opened.controls.control(0, image_size(opened.pipeline))
        controlled = {"control": control, "conditioning_scale": opened.controls.scale}
    # A consistency model is good at the number of steps that it is measured with.
    steps = {"num_inference_steps": args.num_inference_steps}
    images = circular_walk(
        opened.pipeline,
        condition,
        seed=image_set.seed,
        guidance_scale=image_set.guidance_scale,
        **controlled,
        **(steps if is_consistency_sampler(opened.pipeline.scheduler) else {}),
    )
    save_walk(images, path, path.with_suffix(".webp"))
    return [path, path.with_suffix(".webp")]
