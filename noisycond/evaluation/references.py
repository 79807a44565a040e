"""Real images, or statistics of them, by the name that a user gives; opened before an image is drawn."""

from dataclasses import dataclass
from pathlib import Path

from noisycond.data.sources import ImageSource
from noisycond.errors import InputError, require
from noisycond.evaluation.images import open_batch, open_images
from noisycond.evaluation.instruments import Extraction
from noisycond.evaluation.statistics import Statistics, holds_statistics, load_statistics, save_statistics
from noisycond.evaluation.suite import Reference


@dataclass
class RealImages:
    """Real images to compare with, or statistics of them.

    Attributes:
        option: the flag. name: as the user named it. source: None where the name is a file of statistics.
    """

    option: str
    name: str
    split: str | None
    source: ImageSource | None

    @property
    def identity(self) -> str:
        """A string that changes with the images or the file."""
        if self.source is not None:
            return self.source.fingerprint
        status = Path(self.name).stat()
        return f"{self.name} {status.st_size} {status.st_mtime_ns}"

    def settings(self) -> dict:
        """What the report says of it."""
        about = {"name": self.name}
        if self.name == "digits" or (self.source is not None and not Path(self.name).exists()):
            about["split"] = self.split
        return about | ({} if self.source is None else {"images": len(self.source)})

    def measure(self, extraction: Extraction) -> Reference:
        """Features and moments: of the images, or as the file holds them.

        Raises:
            InputError: an image cannot be read, or the statistics were made with other choices.
        """
        if self.source is not None:
            return extraction.reference(self.option, self.name, self.source)
        statistics = load_statistics(Path(self.name), extraction.statistics_settings())
        reference = statistics_as_reference(self.name, statistics)
        if reference.features is None and statistics.images is not None:
            # A reference batch of ADM: moments of the whole set, and some of its images.
            batch = open_batch(self.option, Path(self.name))
            reference.features = extraction.features(self.option, batch)
        return reference

    def save(self, path: Path, reference: Reference, extraction: Extraction) -> None:
        """Writes features and moments of the images to a file that can stand in for them."""
        require(
            self.source is not None and reference.features is not None,
            f"--save_stats: {self.name} holds statistics already; name its images.",
        )
        settings = extraction.statistics_settings() | {"source": self.settings(), "class_names": reference.class_names}
        save_statistics(path, reference.features, settings)


def statistics_as_reference(name: str, statistics: Statistics) -> Reference:
    """What a file of statistics holds."""
    return Reference(
        name,
        statistics.features,
        statistics.moments,
        statistics.spatial_moments,
        statistics.settings.get("class_names"),
    )


def open_real(option: str, name: str | None, split: str | None) -> RealImages | None:
    """Real images by name; None where none is given.

    Args:
        split: of digits (by default `test`) or of a Hub dataset (by default `validation`).

    Raises:
        InputError: there is no such thing.
    """
    if name is None:
        return None
    if name.endswith(".npz"):
        if not Path(name).is_file():
            raise InputError(f"{option} {name}: there is no such file.")
        if holds_statistics(Path(name)):
            return RealImages(option, name, None, None)
    split = split or ("test" if name == "digits" else "validation")
    return RealImages(option, name, split, open_images(option, name, split))
