"""Opens a folder of many images twice: the first time it is walked, the second time its list comes from the cache.

python benchmarks/folder_index.py --folder /tmp/imagenet-sized --images 1281167 --classes 1000
"""

import argparse
import os
import resource
import shutil
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from noisycond.data.folder_index import SETTLED, open_folder


def simulate(folder: Path, images: int, classes: int) -> None:
    """Empty files with names like ImageNet's, spread evenly over the classes."""
    for number in tqdm(range(classes), desc="making files", unit="class"):
        (folder / f"n{number:08d}").mkdir(parents=True)
        for image in range(number, images, classes):
            os.close(os.open(folder / f"n{number:08d}" / f"n{number:08d}_{image}.JPEG", os.O_CREAT | os.O_WRONLY))


def measured(folder: Path, cache: Path) -> tuple[float, str]:
    began = time.perf_counter()
    index = open_folder(str(folder), cache, kept_from=0)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{len(index.names)} images in {len(index.class_names)} classes: {seconds:.2f} s, peak {peak:.0f} MiB")
    return seconds, index.fingerprint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="an existing folder, or where to simulate one")
    parser.add_argument("--images", type=int, default=1_281_167)
    parser.add_argument("--classes", type=int, default=1000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = args.folder or Path(made) / "images"
        if not folder.exists():
            simulate(folder, args.images, args.classes)
            time.sleep(SETTLED + 1)
        cache = Path(made) / "cache"
        (first, one), (second, other) = measured(folder, cache), measured(folder, cache)
        assert one == other
        print(f"first {first:.2f} s, second {second:.2f} s: {first / second:.0f} times faster")
        shutil.rmtree(cache)


if __name__ == "__main__":
    main()
