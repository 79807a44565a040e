"""Reference statistics on disk: features of the real images with their moments and the settings they were made under,
and what others keep in such files (reference batches of the ADM evaluator, statistics of pytorch-fid).

Letters: N images, D pooled features, S spatial features, H × W the images' size.
"""

import json
import logging
import os
import uuid
import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch

from noisycond.errors import InputError, in_one_line, require, writing
from noisycond.evaluation.features import Features
from noisycond.evaluation.moments import Moments
from noisycond.evaluation.npz import IMAGES, check_batch, read_array, read_batch, save_npz


logger = logging.getLogger(__name__)
# The settings in which statistics and a run must agree for their figures to be comparable. The others (image format,
# number of images, source) are told, not compared.
MUST_AGREE = ("extractor", "weights", "resolution", "resize", "interpolation")
# What moments of others are of: their files do not say it, and all of them use these weights.
TENSORFLOW_INCEPTION, TENSORFLOW_INCEPTION_FEATURES = "inception-v3-compat", 2048
# The names that reference batches of the ADM evaluator gave to moments.
MEAN, COVARIANCE, SPATIAL_MEAN, SPATIAL_COVARIANCE = "mu", "sigma", "mu_s", "sigma_s"


@dataclass(frozen=True)
class Statistics:
    """What a statistics file holds; None for what it lacks or what is of no use under the run's extractor.

    Attributes:
        features: of the real images, read from the disk when they are used where they are not compressed.
        moments, spatial_moments: of the pooled and of the spatial features.
        settings: what the file says of how it was made.
        images [N, H, W, C]: uint8 in [0, 255], C 1 or 3; read from the disk when they are indexed, where they are not
            compressed. labels [N]: int64, the images' classes.
    """

    features: Features | None
    moments: Moments | None
    spatial_moments: Moments | None
    settings: dict
    images: np.ndarray | None = None
    labels: torch.Tensor | None = None


def save_statistics(path: Path | str, features: Features, settings: Mapping) -> None:
    """Writes features, their moments and settings into one `.npz`, whole or not at all.

    Args:
        path: ends in .npz; its folder is made.
        features: of N ≥ 2 images.
        settings: JSON values; those named in MUST_AGREE are compared when the file is read.

    Raises:
        InputError: another ending, too few images, or a failure to write.
    """
    path = Path(path)
    require(path.suffix == ".npz", f"--save_stats {path}: the name of a statistics file must end in .npz.")
    require(len(features) >= 2, f"Statistics need at least 2 images, but there were {len(features)}.")
    arrays = {name: value.numpy() for name, value in vars(features).items() if value is not None}
    arrays |= _moment_arrays(MEAN, COVARIANCE, features.pooled)
    if features.spatial is not None:
        arrays |= _moment_arrays(SPATIAL_MEAN, SPATIAL_COVARIANCE, features.spatial)
    making = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with writing(f"--save_stats {path}", "the statistics"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with making.open("wb") as file:
                save_npz(file, settings=json.dumps(dict(settings)), **arrays)
                file.flush()
                os.fsync(file.fileno())
            making.replace(path)
    finally:
        making.unlink(missing_ok=True)


def load_statistics(path: Path | str, settings: Mapping) -> Statistics:
    """Reads statistics, of this project or of others.

    Files of others (the ADM evaluator's reference batches, pytorch-fid's statistics) hold moments of the TensorFlow
    Inception's features and no word on how they were made: their moments serve with that extractor only. With another,
    a reference batch is left with its images, which are fewer than the moments were taken over. In the ADM evaluator's
    spatial moments the features are in the order height, width, channel.

    Args:
        settings: of the run; in the keys named in MUST_AGREE the file's must be the same.

    Raises:
        InputError: no such file, a damaged one, one of another kind; settings that differ; moments of another
            extractor and no images beside them.
    """
    path = Path(path)
    with _opened(path) as arrays:
        if "settings" in arrays:
            return _own(path, arrays, settings)
        return _of_others(path, arrays, settings)


def check_statistics(path: Path | str, settings: Mapping, unknown: Collection[str] = ()) -> None:
    """Raises where [`load_statistics`] would refuse a file for its settings or for what it lacks, without reading
    features, moments or images.

    Args:
        settings: of the run, as far as they are known. unknown: the keys of MUST_AGREE that are not compared yet.

    Raises:
        InputError: see [`load_statistics`].
    """
    path = Path(path)
    with _opened(path) as arrays:
        if "settings" in arrays:
            _compare(path, arrays, settings, unknown)
        else:
            _left_aside(path, arrays, settings)
            check_batch(f"Reference statistics {path}", path, arrays)


@contextmanager
def _opened(path: Path) -> Iterator[Mapping]:
    require(path.exists(), f"Reference statistics {path}: there is no such file.")
    try:
        require(
            path.is_file() and zipfile.is_zipfile(path),
            f"Reference statistics {path}: this is no whole .npz file; make one with --save_stats.",
        )
        with np.load(path, allow_pickle=False) as arrays:
            yield arrays
    except InputError:
        raise
    except Exception as error:  # NumPy, zipfile and zlib raise many types over a damaged file
        raise InputError(
            f"Reference statistics {path}: the file cannot be read ({type(error).__name__}: {in_one_line(error)}); "
            "make or download it again."
        ) from error


def _own(path: Path, arrays: Mapping, settings: Mapping) -> Statistics:
    saved = _compare(path, arrays, settings)
    features = Features(**{field.name: _features(path, arrays, field.name) for field in fields(Features)})
    moments = _moments(path, arrays, MEAN, COVARIANCE, len(features))
    spatial = _moments(path, arrays, SPATIAL_MEAN, SPATIAL_COVARIANCE, len(features))
    return Statistics(features, moments, spatial, saved)


def _compare(path: Path, arrays: Mapping, settings: Mapping, unknown: Collection[str] = ()) -> dict:
    """The settings of one of our files, which agree with those of the run."""
    saved, run = json.loads(str(arrays["settings"])), json.loads(json.dumps(dict(settings)))
    for key in MUST_AGREE:
        ours, theirs = run.get(key), saved.get(key)
        require(
            key in unknown or ours == theirs,
            f"Reference statistics {path}: made with {key} {_told(theirs)}, but this run has {_told(ours)}; run with "
            f"the same {key}, or make new statistics with --save_stats.",
        )
    require(
        "pooled" in arrays and MEAN in arrays,
        f"Reference statistics {path}: features or moments are missing in it; make new ones with --save_stats.",
    )
    return saved


def _told(value) -> str:
    return "none" if value is None else str(value)


def _of_others(path: Path, arrays: Mapping, settings: Mapping) -> Statistics:
    sentence = _left_aside(path, arrays, settings)
    images, labels = read_batch(f"Reference statistics {path}", path, arrays)
    labels = None if labels is None else torch.from_numpy(labels)
    if sentence is not None:
        logger.warning(
            "%s: they are left aside, and the %d images in the file are the reference.", sentence, len(images)
        )
        return Statistics(None, None, None, {}, images, labels)
    moments = _moments(path, arrays, MEAN, COVARIANCE, None)
    spatial = _moments(path, arrays, SPATIAL_MEAN, SPATIAL_COVARIANCE, None)
    known = {"extractor": TENSORFLOW_INCEPTION} if moments is not None else {}
    return Statistics(None, moments, spatial, known, images, labels)


def _left_aside(path: Path, arrays: Mapping, settings: Mapping) -> str | None:
    """Why moments of others are of no use under these settings, or None where they serve or there are none. Raises
    InputError where there are no images either."""
    has_moments, has_images = MEAN in arrays or COVARIANCE in arrays, IMAGES in arrays
    require(
        has_moments or has_images,
        f"Reference statistics {path}: neither moments (mu, sigma) nor images (arr_0) are in it, only "
        f"{', '.join(list(arrays)[:5]) or 'nothing'}.",
    )
    if not has_moments:
        return None
    sentence, dim = None, arrays[MEAN].size
    if settings.get("extractor") != TENSORFLOW_INCEPTION:
        sentence = (
            f"Reference statistics {path}: the moments in it are of {TENSORFLOW_INCEPTION}, and this run's extractor "
            f"is {_told(settings.get('extractor'))}"
        )
    elif dim != TENSORFLOW_INCEPTION_FEATURES:
        sentence = (
            f"Reference statistics {path}: the moments in it are of {dim} features, and those of "
            f"{TENSORFLOW_INCEPTION} are {TENSORFLOW_INCEPTION_FEATURES}"
        )
    require(
        sentence is None or has_images,
        f"{sentence}; run with that extractor, or give the real images as a folder as reference.",
    )
    return sentence


def _moment_arrays(mean: str, covariance: str, features: torch.Tensor) -> dict[str, np.ndarray]:
    moments = Moments.of(features)
    return {mean: moments.mean.numpy(), covariance: moments.covariance.numpy()}


def _moments(path: Path, arrays: Mapping, mean: str, covariance: str, count: int | None) -> Moments | None:
    if mean not in arrays and covariance not in arrays:
        return None
    moments = Moments(count, _tensor(arrays, mean), _tensor(arrays, covariance))
    dim = moments.mean.numel()
    require(
        moments.mean.shape == (dim,) and moments.covariance.shape == (dim, dim),
        f"Reference statistics {path}: {mean} {list(moments.mean.shape)} and {covariance} "
        f"{list(moments.covariance.shape)} are no mean [D] and covariance [D, D].",
    )
    require(
        moments.mean.isfinite().all() and moments.covariance.isfinite().all(),
        f"Reference statistics {path}: {mean} or {covariance} has numbers that are not finite; make them again.",
    )
    return moments


def _tensor(arrays: Mapping, name: str) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(arrays[name], dtype=np.float64))


def _features(path: Path, arrays: Mapping, name: str) -> torch.Tensor | None:
    return torch.from_numpy(read_array(path, arrays, name)) if name in arrays else None
