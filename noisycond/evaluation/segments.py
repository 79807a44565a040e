"""Segmentations of drawn images, made once, on all processes, and kept on disk, for metrics that compare them.

segments.json    whose segmentations these are; other images, weights or choices have another folder
NNNNNN.png       by the number of the image
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator
from PIL import Image
from tqdm import tqdm

from noisycond.data.annotation import Annotate
from noisycond.data.sources import ImageSource
from noisycond.errors import writing
from noisycond.evaluation.control import Obedience, drawn_at_the_size_of_its_control
from noisycond.generation import save_image
from noisycond.processes import on_all, on_main
from noisycond.run_folder import write_atomically


def segment(
    source: ImageSource, seen: Obedience, annotate: Annotate, settings: dict, folder: Path, accelerator: Accelerator
) -> Annotate:
    """Segments all drawn images of a set, each process its share of those that the folder lacks.

    Args:
        source: the images. seen: their controls, of whose sizes they are segmented. annotate: what segments.
        settings: what decides the result beside the images, as JSON values. folder: where folders of segmentations are
            kept; this one is named by what it depends on.

    Returns:
        What reads them, by the numbers of the images.

    Raises:
        InputError: an image cannot be read, or no space is left.
    """
    about = {"images": source.fingerprint, "version": source.version, "count": len(source), **settings}
    text = json.dumps(about, indent=2, sort_keys=True, default=str)
    folder = folder / hashlib.sha256(text.encode()).hexdigest()[:16]

    def lacking() -> list[int]:
        with writing(f"--output_dir {folder}", "segmentations"):
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / "segments.json", text + "\n")
        here = {path.name for path in folder.glob("*.png")}
        return [number for number in range(len(source)) if _file(folder, number).name not in here]

    mine = on_main(accelerator, lacking)[accelerator.process_index :: accelerator.num_processes]

    def work() -> None:
        silent = not accelerator.is_main_process or not mine
        for number in tqdm(mine, desc="segmenting", unit="image", delay=1, disable=silent):
            (found,) = annotate([drawn_at_the_size_of_its_control(seen, number)], [number])
            save_image(found, _file(folder, number), f"--output_dir {folder}")

    on_all(accelerator, work)

    def read(images: Sequence[Image.Image], numbers: Sequence[int]) -> list[Image.Image]:
        return [_read(_file(folder, number)) for number in numbers]

    return read


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.png"


def _read(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")
