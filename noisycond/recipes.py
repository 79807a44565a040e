"""Recipes: YAML files of flag values, which may build on one another and say of each value where it comes from.

A mark stands in the comment of a value's line: [seen] in the paper, [field] standard in public code, [inferred] ours.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from noisycond.errors import InputError, closest, flag_hint, require


RECIPES = Path(__file__).resolve().parent.parent / "recipes"
# Beside the recipes lie the launcher's configurations, which are none.
_ELSEWHERE = ("accelerate",)
_MARKED = re.compile(r"^(\w+)\s*:.*#.*\[(seen|field|inferred)\]")


@dataclass
class Recipe:
    """A recipe with those it builds on.

    Attributes:
        values: flag name to value; what a recipe says goes before what its base says.
        marks: flag name to `seen`, `field` or `inferred`, where the value's line says so.
    """

    values: dict = field(default_factory=dict)
    marks: dict[str, str] = field(default_factory=dict)


class _NoKeyTwice(yaml.SafeLoader):
    """YAML lets the last of two equal keys win in silence."""


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict:
    keys = [loader.construct_object(key) for key, _ in node.value]
    twice = next((key for place, key in enumerate(keys) if key in keys[:place]), None)
    if twice is not None:
        raise yaml.constructor.ConstructorError(None, None, f"{twice!r} stands there twice", node.start_mark)
    return loader.construct_mapping(node)


_NoKeyTwice.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def load_yaml(path: Path, option: str) -> object:
    """What a YAML file says.

    Args:
        option: what named the file, for messages.

    Raises:
        InputError: not YAML, not text, or a key that stands in one place twice.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_NoKeyTwice)  # noqa: S506 (a SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{option}: not valid YAML ({' '.join(str(error).split())}).") from error


def recipe_names() -> list[str]:
    """The names that `--recipe` takes: paths below recipes/ without their ending."""
    paths = [path.relative_to(RECIPES) for path in RECIPES.rglob("*.yaml")]
    return sorted(str(path.with_name(path.stem)) for path in paths if path.parts[0] not in _ELSEWHERE)


def find_recipe(name: str) -> Path:
    """The file of a recipe given by path, or by name in recipes/."""
    known = recipe_names()
    for path in (Path(name), RECIPES / f"{name}.yaml"):
        if path.is_file():
            return path
    raise InputError(
        f"--recipe {name}: neither a file nor one of {', '.join(known)}{closest(name, known)}."
        if known
        else f"--recipe {name}: there is no such file."
    )


def read_recipe(name: str, known: Iterable[str] | None) -> Recipe:
    """Reads a recipe and what it builds on.

    `base: OTHER` names a recipe by its path beside this file or by its name in recipes/; the values here go before
    those there, and an empty value brings back the flag's default.

    Args:
        name: see [`find_recipe`]. known: the keys there are; None takes any.

    Raises:
        InputError: no such recipe or base, a recipe that builds on itself, invalid YAML, or an unknown key.
    """
    return _read(find_recipe(name), None if known is None else list(known), ())


def _read(path: Path, known: list[str] | None, above: tuple[Path, ...]) -> Recipe:
    require(
        path.resolve() not in above,
        f"--recipe {path}: it builds on itself ({' → '.join(step.name for step in (*above, path))}).",
    )
    values = load_yaml(path, f"--recipe {path}") or {}
    require(isinstance(values, dict), f"--recipe {path}: expected `key: value` lines, one for each flag.")
    base = values.pop("base", None)
    for key in values:
        if known is not None and key not in known:  # the hint takes long
            raise InputError(f"--recipe {path}: unknown key {key!r}{flag_hint(str(key), [*known, 'base'])}.")
    marks = {
        match[1]: match[2] for match in map(_MARKED.match, path.read_text(encoding="utf-8").splitlines()) if match
    }
    if base is None:
        return Recipe(values, marks)
    below = _read(_find_base(path, base), known, (*above, path.resolve()))
    kept = {key: mark for key, mark in below.marks.items() if key not in values}
    return Recipe(below.values | values, kept | marks)


def _find_base(path: Path, base: object) -> Path:
    for candidate in (path.parent / f"{base}", path.parent / f"{base}.yaml", RECIPES / f"{base}.yaml"):
        if candidate.is_file():
            return candidate
    raise InputError(
        f"--recipe {path}: its base {base!r} is neither a file beside it nor one of {', '.join(recipe_names())}"
        f"{closest(str(base), recipe_names())}."
    )
