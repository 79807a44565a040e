"""Groups of similar classes, for asymmetric corruption."""

import json
from pathlib import Path

from noisycond.corruption import group_tables
from noisycond.errors import InputError, closest


def read_class_groups(path: str, class_names: list[str]) -> list[list[int]]:
    """Reads `--class_groups`.

    Args:
        path: a JSON file: a list of groups, or an object of them (its keys are names for the reader); a group is a
            list of class names or class ids.
        class_names: K names.

    Returns:
        Groups of class ids that cover 0 to K - 1, at least two in each.

    Raises:
        InputError: the file cannot be read, names an unknown class, misses one, or has a group of one.
    """
    try:
        groups = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"--class_groups {path}: cannot be read as JSON ({error}).") from error
    groups = list(groups.values()) if isinstance(groups, dict) else groups
    if not isinstance(groups, list) or not all(isinstance(group, list) for group in groups):
        raise InputError(f"--class_groups {path}: expected a list of lists of class names or ids.")
    places = {name: label for label, name in enumerate(class_names)}
    try:
        numbered = [[_label(entry, places) for entry in group] for group in groups]
        group_tables(numbered, len(class_names))
    except ValueError as error:
        raise InputError(f"--class_groups {path}: {str(error).removeprefix('class groups: ')}") from error
    return numbered


def _label(entry: object, places: dict[str, int]) -> int:
    if isinstance(entry, int) and not isinstance(entry, bool):
        return entry
    if not isinstance(entry, str) or entry not in places:
        raise ValueError(f"there is no class {entry!r}{closest(str(entry), places)}.")
    return places[entry]
