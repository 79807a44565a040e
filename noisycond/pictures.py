"""Pictures beside the numbers: sample grids and curves."""

import functools
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageFont


def image_grid(images: Sequence[Image.Image], columns: int, gap: int = 2, scale: int = 1) -> Image.Image:
    """Images of one size in rows of `columns`, on white, each `scale` times as large (nearest neighbour)."""
    width, height = (side * scale for side in images[0].size)
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        place = (gap + column * (width + gap), gap + row * (height + gap))
        grid.paste(image.convert("RGB").resize((width, height), Image.Resampling.NEAREST), place)
    return grid


def control_grid(
    controls: Sequence[Image.Image],
    targets: Sequence[Image.Image] | None,
    results_per_row: Sequence[Sequence[Image.Image]],
    scale: int = 1,
) -> Image.Image:
    """A row per control: the control image, the real image that it was made from, and the images drawn after it.

    Args:
        controls: one per row. targets: one per row, or None where the real images are not known.
        results_per_row: for each control as many images, all of one size, in which controls and targets are shown.
        scale: see [`image_grid`].
    """
    size = results_per_row[0][0].size
    beside = [controls] if targets is None else [controls, targets]
    rows = [[*given, *results] for *given, results in zip(*beside, results_per_row, strict=True)]
    shown = [image.convert("RGB").resize(size, Image.Resampling.NEAREST) for row in rows for image in row]
    return image_grid(shown, len(rows[0]), scale=scale)


@functools.cache
def caption_font(size: int) -> ImageFont.FreeTypeFont:
    """The font that comes with matplotlib, in pixels: Pillow's own has no Greek letters, and labels do (γ, η)."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), size)


def plain_numbers():
    """A matplotlib formatter of logarithmic axes: 0.3 for 3·10⁻¹, easier to read and drawn in half the time."""
    from matplotlib.ticker import LogFormatter

    class PlainNumbers(LogFormatter):
        def __call__(self, x, pos=None):
            return f"{x:g}" if super().__call__(x, pos) else ""

    return PlainNumbers()


def plot_over_steps(rows: Sequence[dict], folder: Path) -> None:
    """A panel per metric over training steps, to evaluation.png in a folder.

    Args:
        rows: evaluated rows with `step` and the metrics by what a panel's title says.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name in rows[0] if name != "step"]
    figure, panels = plt.subplots(1, len(names), figsize=(3.2 * len(names), 3), squeeze=False)
    for name, axes in zip(names, panels[0], strict=True):
        shown = [row for row in rows if row.get(name) is not None]
        axes.plot([row["step"] for row in shown], [row[name] for row in shown], marker=".")
        axes.set(title=name, xlabel="optimizer step")
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(folder / "evaluation.png", dpi=120)
    plt.close(figure)


def plot_loss(rows: Sequence[dict], path: Path) -> None:
    """The loss over steps, as it is and averaged over a window of a twentieth of the run, to a PNG.

    Args:
        rows: logged rows with `step` and `loss`.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    steps, losses = np.array([row["step"] for row in rows]), np.array([row["loss"] for row in rows])
    figure, axes = plt.subplots(figsize=(7, 4))
    axes.plot(steps, losses, linewidth=0.6, alpha=0.4, label="loss")
    window = max(1, len(losses) // 20)
    if window > 1:
        mean = np.convolve(losses, np.ones(window) / window, mode="valid")
        axes.plot(steps[window - 1 :], mean, label=f"mean of {window} logged steps")
    axes.set(xlabel="optimizer step", ylabel="training loss", yscale="log")
    axes.yaxis.set_major_formatter(plain_numbers())
    axes.yaxis.set_minor_formatter(plain_numbers())
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
