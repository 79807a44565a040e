"""Datasets that are read from beginning to end, shard by shard: WebDataset tars, and what `datasets` streams.

A shard is a file (or what `datasets` makes of one); it can be opened at any time and is always read in the same order,
so that a place in a stream is a shard and a number. What cannot be read ends neither the shard nor the run.
"""

import bz2
import glob
import gzip
import hashlib
import io
import json
import lzma
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from urllib.parse import urlparse

import fsspec
from PIL import Image

from noisycond.arguments import StreamArguments
from noisycond.captions import Caption
from noisycond.data.shard_names import redacted, shard_name
from noisycond.data.sources import NO_UTF8, is_utf8, read_class_names, stored_texts
from noisycond.errors import InputError, closest, in_one_line, require


PEEKED = 64  # examples of a shard that are looked at when a stream is opened
SHARDS_PEEKED = 8  # shards whose ids are compared then
COMPARED = 8  # examples whose content tells one WebDataset from another of the same file names
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "ppm", "pgm", "gif")
COMPRESSED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}  # by how a file begins
TEXT = {"text": "txt"}  # the extension that a column also stands for
BLOCK = 512  # bytes, the unit of a tar


@dataclass(frozen=True)
class RawExample:
    """An example as it lies in its shard, not decoded.

    Attributes:
        name: what a message calls it.
        id: a string that stays with the example wherever its shard lies; None where it has none.
        image: the bytes of an image file, or a path or URL that `fsspec` opens.
        label: as stored, or None where labels are not asked for. problem: why it is known to be of no use.
        captions: as stored, where they are asked for. rewritten: rewritings of each of them.
        caption: the one to train with, once it is drawn.
    """

    name: str
    id: str | None
    image: bytes | str | None
    label: object
    problem: str | None = None
    captions: tuple[str, ...] = ()
    rewritten: tuple[str, ...] = ()
    caption: Caption | None = None


@dataclass(frozen=True)
class Broken:
    """What of a shard could not be read, as a message names it."""

    name: str


class StreamSource:
    """Labelled images in shards.

    Attributes:
        shards: S names, independent of where the shards lie; their order is fixed.
        class_names: K names, in the order of the labels; none where labels are not asked for.
        fingerprint: a string that tells one dataset from another, wherever it lies; a resumed run must share it.
        has_ids: whether its examples carry stable ids, each its own as far as was looked. ids_needed: without one an
            example is of no use.
        captioning: gives examples, in the order of their shard, of this name, the captions to train with in an epoch.
    """

    shards: list[str]
    class_names: list[str]
    fingerprint: str
    has_ids: bool
    ids_needed: bool = False
    captioning: Callable[[Iterator[RawExample | Broken], str, int], Iterator[RawExample | Broken]] | None = None

    def examples(self, shard: int, epoch: int) -> Iterator[RawExample | Broken]:
        """What [`read`] gives, in the same order, with captions as they are drawn in this epoch."""
        items = self.read(shard)
        return items if self.captioning is None else self.captioning(items, self.shards[shard], epoch)

    def read(self, shard: int) -> Iterator[RawExample | Broken]:
        """The examples of a shard, always in the same order. Raises nothing: where the shard cannot be read (further),
        the last item says so."""
        raise NotImplementedError

    def peek(self, shard: int, count: int) -> list[RawExample | Broken]:
        """The first items of a shard."""
        with closing(self.read(shard)) as items:
            return list(islice(items, count))

    def decode(self, raw: RawExample) -> tuple[Image.Image, int]:
        """The image, RGB, and its label in [0, K), 0 where there are no classes. Raises OSError, ValueError or
        SyntaxError (as Pillow does) where there is none."""
        if raw.problem is not None:
            raise ValueError(raw.problem)
        if self.ids_needed and raw.id is None:
            raise ValueError("it has no stable id")
        label = label_number(raw.label, self.class_names) if self.class_names else 0
        if raw.image is None:
            raise ValueError("it has no image")
        content = raw.image if isinstance(raw.image, bytes) else _fetch(raw.image)
        with Image.open(io.BytesIO(content)) as image:
            return image.convert("RGB"), label


def _fetch(path: str) -> bytes:
    try:
        with fsspec.open(path, "rb") as file:
            return file.read()
    except Exception as error:  # each protocol has its own
        raise OSError(_reason(error)) from error


def stable_key(name: str) -> int:
    """A key in [0, 2^63) for the draws of what goes by this name: its blake2b hash."""
    return (
        int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little") >> 1
    )


def label_number(value: object, class_names: list[str]) -> int:
    """A stored label, class name or number (as such, or as text or bytes), as a number in [0, K).

    Raises:
        ValueError: it is neither, or out of range.
    """
    if isinstance(value, bytes):
        value = value.decode("utf-8").strip()
    if isinstance(value, str) and value in class_names:
        return class_names.index(value)
    try:
        if isinstance(value, (bool, float)):
            raise TypeError
        label = int(value)
    except (TypeError, ValueError):
        raise ValueError(f"its label is {value!r}, neither a class name nor a number") from None
    if not 0 <= label < len(class_names):
        raise ValueError(f"its label is {label}, but there are {len(class_names)} classes")
    return label


class WebDatasetShards(StreamSource):
    """Tar files in the convention of WebDataset: files of one name and several extensions are one example, its
    `__key__` that name. The image is a file with a usual extension, the label one named `cls` or a field of `json`.

    Args:
        pattern: as `--train_shards`. class_names: K names; none without labels.
        image_column: an extension, or `image` for any usual one.
        label_column: an extension, or a field of `json`; `label` also stands for `cls`. None: there are no labels.
        caption_column, rewritten_column: the same; `text` also stands for `txt`. None: they are not asked for.

    Raises:
        InputError: the pattern names no file, one that is not there, a command that names no tar file, or two shards
            of one file name.
    """

    has_ids = True

    def __init__(
        self,
        pattern: str,
        class_names: list[str],
        image_column: str = "image",
        label_column: str | None = "label",
        caption_column: str | None = None,
        rewritten_column: str | None = None,
    ):
        self.urls = _expand(pattern)
        shown = redacted(pattern)
        require(self.urls, f"--train_shards {shown}: it names no shard.")
        self.shards = [shard_name(url) for url in self.urls]
        require(
            all(self.shards),
            f"--train_shards {shown}: keys rest on the names of tar files, and a shard of it has none; end a "
            "command that names none with `# NAME.tar`.",
        )
        # The file name alone: with folders before it, ids would change with what other shards are read beside them.
        name, times = Counter(self.shards).most_common(1)[0]
        require(
            times == 1,
            f"--train_shards {shown}: {name} is named more than once, and keys rest on the shards' file names; give "
            "each its own.",
        )
        self.class_names = class_names
        self.image_column, self.label_column = image_column, label_column
        self.caption_column, self.rewritten_column = caption_column, rewritten_column
        self.fingerprint = self._fingerprint()
        self._require_columns()

    def _require_columns(self) -> None:
        """Raises InputError where none of the first examples has the column of captions, or of rewritten ones."""
        asked = {"--caption_column": self.caption_column, "--rewritten_caption_column": self.rewritten_column}
        missing = {option: column for option, column in asked.items() if column is not None}
        count, known = 0, {}
        for shard in range(min(SHARDS_PEEKED, len(self.shards))):
            if not missing:
                return
            with closing(self._samples(shard)) as items:
                for raw, sample in islice(items, PEEKED):
                    if isinstance(raw, Broken):
                        continue
                    count, fields = count + 1, _Fields(sample)
                    missing = {option: column for option, column in missing.items() if not fields.has(column, TEXT)}
                    known |= dict.fromkeys(fields.names())
                    if not missing:
                        return
        for option, column in missing.items() if count else ():
            raise InputError(
                f"{option} {column}: none of the first {count} examples of --train_shards has it; they have the "
                f"extensions and fields of `json` {', '.join(known) or 'none'}{closest(column, known)}."
            )

    def _fingerprint(self) -> str:
        """A hash of the shards' names, their sizes where they are files, and the first examples of one."""
        content = hashlib.sha256()
        for name, url in zip(self.shards, self.urls, strict=True):
            size = os.path.getsize(url) if os.path.isfile(url) else ""
            content.update(f"{name}\0{size}\n".encode())
        for shard in range(min(SHARDS_PEEKED, len(self.shards))):
            first = [item for item in self.peek(shard, COMPARED) if isinstance(item, RawExample)]
            if first:
                content.update(_content(first))
                break
        return content.hexdigest()

    def read(self, shard: int) -> Iterator[RawExample | Broken]:
        with closing(self._samples(shard)) as items:
            for item, _ in items:
                yield item

    def _samples(self, shard: int) -> Iterator[tuple[RawExample | Broken, dict]]:
        """The items of a shard, each with what `webdataset` made of its files."""
        # Two seconds of imports, for those who need them.
        from webdataset.tariterators import group_by_keys, tar_file_expander, url_opener

        problems: list[str] = []

        def note(error: Exception) -> bool:
            problems.append(_reason(error))
            return True

        count, last = 0, None  # the last example and its files
        for opened in url_opener([{"url": self.urls[shard]}], handler=note):
            stream = opened["stream"]
            try:
                tar = opened["stream"] = _TarStream(stream)
                for sample in group_by_keys(tar_file_expander([opened], handler=note), handler=note):
                    if last is not None:
                        yield last
                        count += 1
                    last = self._raw(sample, self.shards[shard]), sample
                if not problems and not tar.ended_well():
                    problems.append("it ends without the end mark of a tar file, or a header within is damaged")
                while not problems and stream.read(1 << 20):  # who is still writing into a pipe would fail
                    pass
                stream.close()
            except OSError as error:  # a process at the other end of a pipe says only now that it failed
                problems.insert(0, _reason(error))
            finally:
                with suppress(OSError):
                    stream.close()
        if last is not None and (not problems or last[0].problem is None):  # a break may have cut it in two
            yield last
            count += 1
        if problems:
            yield Broken(f"the shard {self.shards[shard]} after {count} examples ({problems[0]})"), {}

    def _raw(self, sample: dict, shard: str) -> RawExample:
        key = f"{shard}/{sample['__key__']}"
        extensions = IMAGE_EXTENSIONS if self.image_column == "image" else (self.image_column,)
        image = next((sample[extension] for extension in extensions if extension in sample), None)
        files = ", ".join(name for name in sample if not name.startswith("__")) or "none"
        problem, label, captions, rewritten = None, None, (), ()
        if image is None:
            problem = f"it has no image: its files are {files}"
        try:
            fields = _Fields(sample)
            if self.label_column is not None:
                label = fields.get(self.label_column, {"label": "cls"})
                if label is None:
                    problem = problem or f"it has no label: its files are {files}"
            captions, rewritten = self._texts(fields, self.caption_column), self._texts(fields, self.rewritten_column)
            if self.caption_column is not None and not any(captions):
                problem = problem or f"its caption is empty or missing: its files are {files}"
            captions, rewritten = _writable(captions), _writable(rewritten)
            if self.caption_column is not None and not any(captions):
                problem = problem or f"its caption is {NO_UTF8}"
        except ValueError as error:
            problem = problem or str(error)
        return RawExample(key, key, image, label, problem, captions, rewritten)

    @staticmethod
    def _texts(fields: "_Fields", column: str | None) -> tuple[str, ...]:
        return () if column is None else tuple(stored_texts(fields.get(column, TEXT)))


def _writable(texts: tuple[str, ...]) -> tuple[str, ...]:
    """The texts, each in its place, without those that cannot be written in UTF-8."""
    return tuple(text if is_utf8(text) else "" for text in texts)


class _Fields:
    """What an example of a shard has beside its image."""

    def __init__(self, sample: dict):
        self.sample, self.json = sample, None

    def get(self, column: str, also: dict[str, str]) -> object:
        """The file of this extension, or the one that the column also stands for, or a field of `json`; None where
        there is none. Raises ValueError where the `json` cannot be read."""
        for extension in (column, also[column]) if column in also else (column,):
            if extension in self.sample:
                return self.sample[extension]
        return self._of_json().get(column)

    def _of_json(self) -> dict:
        if self.json is None:
            try:
                self.json = json.loads(self.sample["json"]) if "json" in self.sample else {}
            except ValueError as error:
                raise ValueError(f"its json cannot be read: {_reason(error)}") from error
        return self.json if isinstance(self.json, dict) else {}

    def names(self) -> list[str]:
        """Extensions and fields; of a `json` that cannot be read the extension alone."""
        names = [name for name in self.sample if not name.startswith("__")]
        with suppress(ValueError):
            names += self._of_json()
        return names

    def has(self, column: str, also: dict[str, str]) -> bool:
        """Whether there is a file or field that [`get`] gives, be it empty."""
        return not {column, also.get(column, column)}.isdisjoint(self.names())


class _TarStream:
    """A stream of bytes, unpacked, that is handed out in blocks of a tar, so that the last one read is the one at
    which the reading of the tar ended: of zeros, the end mark, or else something broke off. Python's tarfile takes a
    damaged or cut header, and the end of a cut gzip file, for the end and says nothing."""

    def __init__(self, stream):
        self.last = b""
        head = stream.read(BLOCK)
        unpack = next((open_ for magic, open_ in COMPRESSED.items() if head.startswith(magic)), None)
        self.content = unpack(_Prefixed(head, stream)) if unpack else _Prefixed(head, stream)

    def read(self, size: int = BLOCK) -> bytes:
        self.last = self.content.read(min(size, BLOCK))
        return self.last

    def ended_well(self) -> bool:
        return self.last == bytes(BLOCK)


class _Prefixed:
    """A stream whose first bytes were read before, given back."""

    def __init__(self, head: bytes, stream):
        self.head, self.stream = head, stream

    def read(self, size: int = -1) -> bytes:
        if self.head and size >= 0:
            part, self.head = self.head[:size], self.head[size:]
            return part
        part, self.head = self.head, b""
        return part + self.stream.read(size)


def _reason(error: Exception) -> str:
    """The error in one line, without what `webdataset` adds: the stream it was reading, and a command, which may hold
    an access token."""
    if failed := re.search(r"exit (-?\d+) \(read\)", str(error)):
        return f"its command ended with status {failed[1]}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = in_one_line(Exception(*error.args[:1])) if error.args else type(error).__name__
    return text.removesuffix(" @")


def _expand(pattern: str) -> list[str]:
    from webdataset.shardlists import expand_urls

    urls: list[str] = []
    for url in expand_urls(pattern):
        if urlparse(url).scheme not in ("", "file"):
            urls.append(url)
            continue
        path = os.path.expanduser(url.removeprefix("file://").removeprefix("file:"))
        found = [path] if Path(path).is_file() else sorted(glob.glob(path, recursive=True))
        shown = "…" if "pipe:" in pattern else path  # `::` within a command divides it
        require(found, f"--train_shards {redacted(pattern)}: there is no file {shown}.")
        urls += found
    return urls


def _content(examples: list[RawExample]) -> bytes:
    """What tells these examples from others: ids, labels, captions, and images where they are at hand."""
    lines = []
    for raw in examples:
        image = raw.image if isinstance(raw.image, bytes) else b""
        texts = "".join(f"\0{text}" for text in (*raw.captions, *raw.rewritten))
        lines.append(f"{raw.id}\0{raw.label}\0{hashlib.sha256(image).hexdigest()}{texts}\n")
    return "".join(lines).encode("utf-8", "surrogatepass")


class HubStream(StreamSource):
    """What `datasets` streams: a dataset on the Hub, or a local folder that it opens.

    Raises:
        InputError: it cannot be opened or its first examples cannot be read, a column does not exist, or the classes
            are not known.
    """

    def __init__(self, args: StreamArguments):
        import datasets

        name = args.dataset_name
        for file in ("dataset_info.json", "dataset_dict.json"):
            require(
                not (Path(name) / file).is_file(),
                f"--streaming has no effect on {name}, which save_to_disk wrote: it is read from disk as it is needed;"
                " leave it off.",
            )
        try:
            dataset = datasets.load_dataset(
                name, args.dataset_config_name, split=args.dataset_split, cache_dir=args.cache_dir, streaming=True
            )
            columns = dataset.column_names or list(next(iter(dataset)))
        except Exception as error:  # `datasets` raises a dozen unrelated types for a name it cannot open
            raise InputError(f"--dataset_name {name}: `datasets` cannot stream it ({in_one_line(error)}).") from error
        # Of captions only some scripts' arguments speak.
        options = ("image_column", "label_column", "id_column", "caption_column", "rewritten_caption_column")
        for option in options:
            column = getattr(args, option, None)
            require(
                column is None or column in columns,
                f"--{option} {column}: the dataset {name} has the columns {', '.join(columns)}"
                f"{closest(str(column), columns)}.",
            )
        features = dataset.features or {}
        require(
            isinstance(features.get(args.image_column), datasets.Image),
            f"--image_column {args.image_column}: this column of {name} holds no images.",
        )
        self.class_names = [] if args.label_column is None else _class_names(features[args.label_column], args)
        self.title, self.root = name, os.path.abspath(name) if Path(name).is_dir() else None
        self.image_column, self.label_column, self.id_column = args.image_column, args.label_column, args.id_column
        self.caption_column = getattr(args, "caption_column", None)
        self.rewritten_column = getattr(args, "rewritten_caption_column", None)
        columns = {getattr(args, option, None) for option in options} - {None}
        # Decoded here and not by `datasets`, so that a broken image does not end the stream.
        dataset = dataset.cast_column(self.image_column, datasets.Image(decode=False))
        self.dataset = dataset.select_columns(sorted(columns))
        # Without the name, which may be a path: where there are no ids, keys rest on these.
        self.shards = [f"shard {number}" for number in range(self.dataset.num_shards)]
        self._look_at_the_first()

    def _look_at_the_first(self) -> None:
        """Learns from the first examples of several shards whether there are stable ids, and tells the dataset by
        those of one."""
        first, ids, broken = [], [], []
        for shard in range(len(self.shards)):
            found = self.peek(shard, PEEKED)
            examples = [item for item in found if isinstance(item, RawExample)]
            broken += [item.name for item in found if isinstance(item, Broken)]
            first = first or examples
            ids += [raw.id for raw in examples]
            if first and shard + 1 >= SHARDS_PEEKED:
                break
        require(
            first,
            f"--dataset_name {self.title}: no example can be read"
            + (f", for example {broken[-1]}." if broken else f" in its {len(self.shards)} shards."),
        )
        # What holds its images often names them by files whose names begin anew in every class or shard.
        self.has_ids = None not in ids and len(set(ids)) == len(ids)
        content = hashlib.sha256(f"{len(self.shards)}\0{self.dataset.features}\n".encode())
        content.update(_content(first))
        self.fingerprint = content.hexdigest()

    def read(self, shard: int) -> Iterator[RawExample | Broken]:
        count = 0
        try:
            for row in self.dataset.shard(len(self.shards), shard):
                yield self._raw(row, f"{self.shards[shard]} example {count}")
                count += 1
        except Exception as error:  # of pyarrow, of a dozen file formats, of the network
            yield Broken(f"{self.title} {self.shards[shard]} after {count} examples ({_reason(error)})")

    def _raw(self, row: dict, place: str) -> RawExample:
        entry = row[self.image_column] or {}
        path = _relative(entry["path"], self.root) if entry.get("path") else None
        stable = path if self.id_column is None else row[self.id_column]
        name = f"{place} ({path})" if path else place
        image = entry.get("bytes") if entry.get("bytes") is not None else entry.get("path")
        label = None if self.label_column is None else row[self.label_column]
        problem, captions, rewritten = None, (), ()
        try:
            captions, rewritten = self._texts(row, self.caption_column), self._texts(row, self.rewritten_column)
            if self.caption_column is not None and not any(captions):
                problem = "its caption is empty or missing"
            captions, rewritten = _writable(captions), _writable(rewritten)
            if self.caption_column is not None and not any(captions):
                problem = problem or f"its caption is {NO_UTF8}"
        except ValueError as error:
            problem = str(error)
        return RawExample(name, None if stable is None else str(stable), image, label, problem, captions, rewritten)

    @staticmethod
    def _texts(row: dict, column: str | None) -> tuple[str, ...]:
        return () if column is None else tuple(stored_texts(row[column]))


def _class_names(feature: object, args: StreamArguments) -> list[str]:
    known = getattr(feature, "names", None)
    if args.class_names is None:
        require(
            known is not None,
            f"--class_names FILE is needed: the stream {args.dataset_name} does not say which classes its column "
            f"{args.label_column} ({feature}) has.",
        )
        return list(known)
    require(known is None, f"--class_names has no effect: the stream {args.dataset_name} knows its classes.")
    return read_class_names("--class_names", args.class_names)


def _relative(path: str, root: str | None) -> str:
    """A path without what tells where the dataset lies: its folder, or repository and revision on the Hub."""
    links = [re.sub(r"^hf://datasets/[^@]+@[^/]+/", "", link) for link in path.split("::")]
    return "::".join(link.removeprefix(f"{root}{os.sep}") if root else link for link in links)


def open_stream(args: StreamArguments) -> StreamSource:
    """The stream that the flags name.

    Raises:
        InputError: see [`WebDatasetShards`] and [`HubStream`].
    """
    if args.train_shards is None:
        return HubStream(args)
    class_names = [] if args.class_names is None else read_class_names("--class_names", args.class_names)
    captions = (getattr(args, name, None) for name in ("caption_column", "rewritten_caption_column"))
    return WebDatasetShards(args.train_shards, class_names, args.image_column, args.label_column, *captions)


def require_ids(source: StreamSource, flags: str) -> None:
    """Raises InputError where examples carry no stable ids, which these flags need; from here on one without is of no
    use."""
    require(
        source.has_ids,
        f"{flags} needs examples with stable ids, but this stream has none, or some of them repeat: name a column of "
        "unique ids with --id_column, or choose `random`.",
    )
    source.ids_needed = True
