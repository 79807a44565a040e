"""What a study is: cells, runs and stages; see `reading` for the file that says it.

A *cell* is one setting, a line of the tables. A *run* is a cell with a seed. A *block* is what cells share that are
compared with one another.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from noisycond.errors import closest, require
from noisycond.recipes import read_recipe
from noisycond.study.methods import Method


BEFORE = "{before}"  # in a stage's settings: the folder that the stage before left


@dataclass(frozen=True)
class Stage:
    """A training of a cell, or its evaluation.

    Attributes:
        script: the name of a script at the root, without its ending. values: flag to value, `recipe` among them.
    """

    script: str
    values: Mapping[str, object]

    def arguments(self) -> list[str]:
        """The flags of the stage, as words of a command line."""
        words = []
        for name, value in self.values.items():
            if value is not None:
                words += [f"--{name}", *map(as_word, value if isinstance(value, list) else [value])]
        return words

    def with_recipe(self) -> dict[str, object]:
        """The values, with those of the recipe that they do not replace.

        Raises:
            InputError: the recipe cannot be read.
        """
        recipe = self.values.get("recipe")
        below = {} if recipe in (None, "none") else read_recipe(str(recipe), None).values
        return {name: value for name, value in (below | dict(self.values)).items() if value is not None}


def as_word(value: object) -> str:
    """A flag's value on a command line. YAML reads a bare `no` as False: yes and no are what any flag takes."""
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


@dataclass(frozen=True)
class StudyCell:
    """A setting.

    Attributes:
        block: what it shares with those it is compared with; "" where a study has one block. label: the cell's name.
        method: what it does to conditions. settings: the flag values that the study gives it beyond what all have.
        stages: its trainings, one after the other; none where `pipeline` names what is only evaluated.
        pipeline: a pipeline folder or Hub id that is only evaluated, or None.
    """

    block: str
    label: str
    method: Method
    settings: Mapping[str, object]
    stages: tuple[Stage, ...]
    pipeline: str | None = None

    def __str__(self) -> str:
        return f"{self.block}, {self.label}" if self.block else self.label


@dataclass(frozen=True)
class StudyRun:
    """A cell with a seed, and how it is evaluated."""

    cell: StudyCell
    seed: int
    evaluation: Stage

    @property
    def name(self) -> str:
        """What its files are called."""
        parts = [part for part in (self.cell.block, self.cell.label, f"seed-{self.seed}") if part]
        return re.sub(r"[^\w.+-]+", "_", "-".join(parts))

    def __str__(self) -> str:
        return f"{self.cell}, seed {self.seed}"


@dataclass(frozen=True)
class Study:
    """A study as its file says it.

    Attributes:
        path: the file. evaluation: of every cell, by evaluate_model.py. report_guidance_scale: of the tables and
            figures at one guidance scale. processes: of every launch, each with a GPU where there are any; a step's
            images are those of one process times their number. launch: words for `accelerate launch` beside them.
    """

    path: Path
    title: str
    seeds: tuple[int, ...]
    cells: tuple[StudyCell, ...]
    evaluation: Stage
    report_guidance_scale: float | None = None
    processes: int = 1
    launch: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def blocks(self) -> list[str]:
        return list(dict.fromkeys(cell.block for cell in self.cells))

    def runs(
        self, labels: Sequence[str] = (), seeds: Sequence[int] = (), blocks: Sequence[str] = ()
    ) -> list[StudyRun]:
        """The runs, seed by seed, so that each seed that is done is a whole table.

        Args:
            labels, seeds, blocks: those alone; all where empty.

        Raises:
            InputError: there is no such cell, seed or block; names the flag and the nearest.
        """
        for option, wanted, known in (
            ("cells", labels, [cell.label for cell in self.cells]),
            ("seeds", seeds, self.seeds),
            ("blocks", blocks, self.blocks),
        ):
            for value in wanted:
                there = ", ".join(dict.fromkeys(map(str, known)))
                require(
                    value in known,
                    f"--{option} {value}: {self.path} has no such one{closest(str(value), map(str, known))}; it has "
                    f"{there}.",
                )
        return [
            StudyRun(cell, seed, self.evaluation)
            for seed in self.seeds
            for cell in self.cells
            if (not seeds or seed in seeds)
            and (not labels or cell.label in labels)
            and (not blocks or cell.block in blocks)
        ]
