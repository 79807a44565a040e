"""Arrays in .npz files: mapped into memory instead of read where they can be, and batches of images among them.

Letters: N images of H × W pixels, C channels (1 or 3).
"""

import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

import numpy as np

from noisycond.errors import require


# The names that sample and reference batches of the ADM evaluator have for their arrays.
IMAGES, IMAGE_LABELS = "arr_0", "arr_1"
# Bytes; an array that starts at a multiple of this is as fast, and summed in the same order, as one that torch made.
ALIGNMENT = 64
# Of a member's local header in a zip file: the fixed part, and the field with sizes of 64 bits that zipfile adds.
HEADER_BYTES, ZIP64_BYTES = 30, 20
PADDING_FIELD = 0xD935  # the header id that Android's zipalign registered for alignment


def save_npz(file: IO[bytes], **arrays: np.ndarray) -> None:
    """As `np.savez`, but each array starts at a multiple of ALIGNMENT bytes, so that it can be mapped."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            info = zipfile.ZipInfo(f"{name}.npy")
            gap = -(file.tell() + HEADER_BYTES + len(info.filename.encode()) + ZIP64_BYTES + 4) % ALIGNMENT
            info.extra = struct.pack("<HH", PADDING_FIELD, gap) + bytes(gap)
            with archive.open(info, "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)


def read_array(path: Path, arrays: Mapping, name: str) -> np.ndarray:
    """An array of an .npz: mapped, after a pass over its checksum, where the file has it uncompressed, aligned and in
    row order; else read whole. Writing to it leaves the file as it is.

    Args:
        arrays: the opened file (`np.load`).
    """
    array = _mapped(path, f"{name}.npy")
    return arrays[name] if array is None or not array.flags.aligned else array


def read_batch(where: str, path: Path, arrays: Mapping) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The images of an .npz, uint8 [N, H, W, C], and their classes, int64 [N], or None for what it lacks.

    Args:
        where: how a message starts. arrays: the opened file.

    Raises:
        InputError: the arrays are of another kind.
    """
    labels = check_batch(where, path, arrays)
    return (read_array(path, arrays, IMAGES) if IMAGES in arrays else None), labels


def check_batch(where: str, path: Path, arrays: Mapping) -> np.ndarray | None:
    """Raises as [`read_batch`] does, without reading the images; returns their classes."""
    if IMAGES not in arrays:
        return None
    with zipfile.ZipFile(path) as archive, archive.open(f"{IMAGES}.npy") as stream:
        header = _read_header(stream)
    # Of a header that is none of these NumPy says more.
    shape, dtype = (arrays[IMAGES].shape, arrays[IMAGES].dtype) if header is None else (header[0], header[2])
    require(
        dtype == np.uint8 and len(shape) == 4 and shape[-1] in (1, 3) and 0 not in shape,
        f"{where}: {IMAGES} is {dtype} {list(shape)}; images must be uint8 [N, H, W, 3].",
    )
    if IMAGE_LABELS not in arrays:
        return None
    labels = arrays[IMAGE_LABELS]
    require(
        labels.shape == shape[:1] and labels.dtype.kind in "iu",
        f"{where}: {IMAGE_LABELS} must be one class for each of the {shape[0]} images.",
    )
    return labels.astype(np.int64)


def _read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype] | None:
    """Shape, whether columns are contiguous, and type; None where only NumPy may read it."""
    headers: dict[tuple[int, int], Callable] = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    version = np.lib.format.read_magic(stream)
    header = headers[version](stream) if version in headers else None
    return None if header is None or header[2].hasobject else header


def _mapped(path: Path, member: str) -> np.ndarray | None:
    with zipfile.ZipFile(path) as archive, archive.open(member) as stream:
        info, header = archive.getinfo(member), _read_header(stream)
        if header is None or info.compress_type != zipfile.ZIP_STORED:
            return None
        shape, fortran_order, dtype = header
        if fortran_order or 0 in shape:
            return None
        header_bytes = stream.tell()
        while stream.read(1 << 20):  # zipfile compares the checksum at the end
            pass
    with path.open("rb") as file:
        file.seek(info.header_offset + 26)
        name_bytes, extra_bytes = (int.from_bytes(file.read(2), "little") for _ in range(2))
    offset = info.header_offset + HEADER_BYTES + name_bytes + extra_bytes + header_bytes
    return np.memmap(path, dtype, mode="c", offset=offset, shape=shape)
