"""Real images, or statistics of them, by the name that a user gives; opened before an image is drawn."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from noisycond.data.sources import ImageSource
from noisycond.errors import require
from noisycond.evaluation.images import BatchImages, choose_split, open_images
from noisycond.evaluation.instruments import Extraction, Instruments
from noisycond.evaluation.statistics import check_statistics, load_statistics, save_statistics
from noisycond.evaluation.suite import Reference


@dataclass
class RealImages:
    """Real images to compare with, or a file of statistics or of images.

    Attributes:
        option: the flag. name: as the user named it. split: of digits or of a dataset with splits, else None.
        source: None where the name is a file (.npz).
    """

    option: str
    name: str
    split: str | None
    source: ImageSource | None

    @property
    def identity(self) -> str:
        """A string that changes with the images or the file."""
        if self.source is not None:
            return f"{self.source.fingerprint} {self.source.version}".rstrip()
        status = Path(self.name).stat()
        return f"{self.name} {status.st_size} {status.st_mtime_ns}"

    def settings(self) -> dict:
        """What the report says of it."""
        about = {"name": self.name} | ({} if self.split is None else {"split": self.split})
        return about | ({} if self.source is None else {"images": len(self.source)})

    def check(self, instruments: Instruments, resolution: int | None = None, interpolation: str | None = None) -> None:
        """Looks at the settings of statistics, before anything is drawn.

        Args:
            resolution, interpolation: of the run; None where they are not known yet, and then they are not compared.

        Raises:
            InputError: statistics were made with another extractor, other weights, another size or interpolation, or
                the file holds nothing to compare with.
        """
        if self.source is None:
            resize = {"resolution": resolution, "interpolation": interpolation}
            unknown = [key for key, value in resize.items() if value is None]
            check_statistics(self.name, instruments.extractor.settings() | resize, unknown)

    def measure(self, extraction: Extraction, wanted: Sequence[str] | None = None) -> Reference:
        """Features of the images, or what the file holds.

        Args:
            wanted: which features are extracted; None is all that metrics of generated images need.

        Raises:
            InputError: an image cannot be read, or the statistics were made with other choices.
        """
        if self.source is not None:
            features = extraction.features(self.option, self.source, wanted)
            return Reference(self.name, features, class_names=self.source.class_names, identity=self.identity)
        statistics = load_statistics(self.name, extraction.statistics_settings())
        features = statistics.features
        if features is None and statistics.images is not None:
            # A reference batch of ADM: images, and moments that may be of more of them.
            labels = None if statistics.labels is None else statistics.labels.numpy()
            batch = BatchImages(self.option, Path(self.name), statistics.images, labels)
            features = extraction.features(self.option, batch, wanted)
        names = statistics.settings.get("class_names")
        moments, spatial = statistics.moments, statistics.spatial_moments
        return Reference(self.name, features, moments, spatial, names, self.identity)

    def save(self, path: Path, reference: Reference, extraction: Extraction) -> None:
        """Writes features and moments of the images to a file that can stand in for them.

        Raises:
            InputError: this is such a file, or no space is left.
        """
        require(self.source is not None, f"--save_stats: {self.name} holds statistics already; name its images.")
        told = {"source": self.settings(), "class_names": reference.class_names}
        save_statistics(path, reference.features, extraction.statistics_settings() | told)


def open_real(option: str, name: str | None, split: str | None) -> RealImages | None:
    """Real images by name; None where none is given.

    Args:
        split: of digits (by default `test`) or of a dataset with splits (by default `validation`).

    Raises:
        InputError: there is no such thing.
    """
    if name is None:
        return None
    if name.endswith(".npz"):
        require(Path(name).is_file(), f"{option} {name}: there is no such file.")
        return RealImages(option, name, None, None)
    return RealImages(option, name, choose_split(name, split), open_images(option, name, split))
