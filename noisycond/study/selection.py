"""What the tables and the figures of a study choose alike: the order of cells, which of them stand for a method, and
the guidance scale of what is shown at one. All of it is chosen by the settings of cells, none of it by their results.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from noisycond.study.methods import Method


if TYPE_CHECKING:
    from noisycond.study.definition import Study


Cells = Mapping[str, Method]  # of one block: label to method
PAPER_GAMMA = 1.0  # of CEP, the paper's default: what stands for CEP where one γ is to
RATIO_DIGITS = 9  # after the point of a logarithm: 0.1 and 10 are equally far from 1


def seeds_decide(study: "Study") -> str:
    """What a seed of the study decides: training, drawing, or both. Images are drawn with the run's own seed, unless
    the study names `seeds` for that."""
    trains = any(cell.stages for cell in study.cells)
    draws = "seeds" not in study.evaluation.values
    return " and ".join(["training"] * trains + ["drawing"] * (draws or not trains))


def places(scales: Iterable[float | None], wanted: float | None) -> list[float | None]:
    """Guidance scales as they are shown, that of the report first: the nearest to the wanted one, of two the smaller;
    if none is wanted, what has no guidance scale (None), else the smallest. The others follow in order, None last."""
    scales = set(scales)
    ordered = sorted(scales - {None}) + [None] * (None in scales)
    if not ordered:
        return []
    if wanted is not None and scales != {None}:
        first = min(scales - {None}, key=lambda scale: (abs(scale - wanted), scale))
    else:
        first = None if None in scales else ordered[0]
    return [first, *(scale for scale in ordered if scale != first)]


def clean_of(cells: Cells) -> dict[str, Method]:
    return {cell: method for cell, method in cells.items() if method.kind == "clean"}


def in_families(cells: Cells) -> dict[str, Method]:
    """Clean first, then family by family (kind, type and mode) as they come, each by strength."""
    found: dict[Method, list[str]] = {}
    for cell, method in cells.items():
        found.setdefault(replace(method, strength=0.0), []).append(cell)
    ordered = sorted(found, key=lambda how: how.kind != "clean")
    return {cell: cells[cell] for how in ordered for cell in sorted(found[how], key=lambda cell: cells[cell].strength)}


def of_kind(cells: Cells, kind: str, type: str | None = None, mode: str | None = None) -> dict[str, Method]:
    return {
        cell: method
        for cell, method in cells.items()
        if method.kind == kind and type in (None, method.type) and mode in (None, method.mode)
    }


def nearest_gamma(cells: Cells) -> dict[str, Method]:
    """Those of the γ nearest to the paper's, by ratio: γ = 0.5 is as far from 1 as γ = 2 is; of two, the smaller."""

    def far(gamma: float) -> tuple[float, float]:
        return round(abs(math.log(gamma / PAPER_GAMMA)), RATIO_DIGITS), gamma

    nearest = min((method.strength for method in cells.values()), key=far, default=None)
    return {cell: method for cell, method in cells.items() if method.strength == nearest}


def slightest(cells: Cells) -> dict[str, Method]:
    """Those of the least share, fixed ones where there are any."""
    least = min((method.strength for method in cells.values()), default=None)
    found = {cell: method for cell, method in cells.items() if method.strength == least}
    return {cell: method for cell, method in found.items() if method.mode != "random"} or found


def regularizers(cells: Cells) -> dict[str, dict[str, Method]]:
    """What a comparison of regularizers shows, by name: clean, each baseline, each type of CEP drawn anew at the γ
    nearest to the paper's, and the slightest corruption; empty where there is no more than clean and corruption."""
    found = {
        "dropout": of_kind(cells, "embedding_dropout"),
        "label smoothing": of_kind(cells, "label_smoothing"),
        "input perturbation": of_kind(cells, "input_perturbation"),
        "CEP-U": nearest_gamma(of_kind(cells, "cep", "uniform", "random")),
        "CEP-G": nearest_gamma(of_kind(cells, "cep", "gaussian", "random")),
    }
    if not any(found.values()):
        return {}
    return {"clean": clean_of(cells), **found, "corruption": slightest(of_kind(cells, "corruption"))}


def pairs_of_modes(cells: Iterable[tuple[str, Method]]) -> list[tuple[str, str]]:
    """Cells that are alike in kind, type and strength, one fixed and one random, in this order. Where there are
    several of either, what else they differ in is not known here, and they are left out."""
    found: dict[Method, list[str]] = {}
    for cell, method in cells:
        found.setdefault(method, []).append(cell)
    pairs = []
    for method, labels in found.items():
        fixed, random = found.get(replace(method, mode="fixed"), []), labels
        if method.mode == "random" and len(fixed) == len(random) == 1:
            pairs.append((fixed[0], random[0]))
    return pairs
