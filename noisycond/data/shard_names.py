"""What shards are called in keys, logs, `run.json` and model cards: never with what opens them, for an address may be
signed, and a command may hold an access token.
"""

import dataclasses
import re


TAR_NAME = re.compile(r"[\w.,{}*+%-]+\.(?:tar|tgz)(?:\.\w+)?(?![\w.-])")


def redacted(address: str) -> str:
    """A shard's address, or a pattern of several, that may be shown: of a URL neither query nor user, of a `pipe:`
    command only the names of tar files."""
    if "pipe:" in address:
        return "pipe: " + (" ".join(_tar_names(address)) or "…")
    return "::".join(_without_secrets(part) for part in address.split("::"))


def _tar_names(command: str) -> list[str]:
    command = re.sub(r"(://[^\s'\"?#]+)[?#][^\s'\"]*", r"\1", command)
    return list(dict.fromkeys(match[0] for match in TAR_NAME.finditer(command)))


def _without_secrets(url: str) -> str:
    if "://" not in url or url.startswith("file:"):
        return url
    # To the end, and to the last @: among braces nothing tells where a query or a user ends.
    return re.sub(r"[?#].*", "", re.sub(r"://[^/]*@", "://", url))


def shard_name(url: str) -> str:
    """What one shard is called wherever it lies: its file name, of a command the tar files it names; "" where there is
    none."""
    if url.startswith("pipe:"):
        return "+".join(_tar_names(url))
    return _without_secrets(url).split("/")[-1]


def public_settings(args) -> dict:
    """The fields of a dataclass of arguments, as they may be written down."""
    settings = dataclasses.asdict(args)
    if settings.get("train_shards") is not None:
        settings["train_shards"] = redacted(settings["train_shards"])
    return settings
