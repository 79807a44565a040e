"""What the figures of a study say in words: headings, what bars are, over how many seeds, and the main numbers for
those who do not see the picture."""

from collections.abc import Collection, Iterable, Mapping, Sequence

from noisycond.evaluation.metrics import METRICS
from noisycond.markdown import listed
from noisycond.study.figure_data import Difference, Line, Pair
from noisycond.study.figure_drawing import Panel
from noisycond.study.methods import Method


UNITS = {"entropy": "nats"}


def heading(metric: str) -> str:
    """With the arrow to the better side, and the unit where there is one."""
    unit = f" [{UNITS[metric]}]" if metric in UNITS else ""
    return METRICS[metric].heading + unit


def number(metric: str, value: float) -> str:
    return f"{value:{METRICS[metric].form(value)}}"


def titles(metrics: Iterable[str]) -> str:
    return listed(METRICS[metric].title for metric in metrics)


def at_scale(scale: float | None) -> str:
    return "" if scale is None else f" at guidance scale {scale:g}"


def of(how: Method) -> str:
    """A corruption without its strength: "symmetric, fixed corruption"."""
    return f"{', '.join(filter(None, (how.type, how.mode)))} corruption"


def mode_of(families: Iterable[Method]) -> str:
    """What is drawn at random as usual needs no word; the rest does."""
    modes = list(dict.fromkeys(how.mode for how in families if how.mode))
    return f" ({listed(modes)})" if modes else ""


def seeds(counts: Collection[int]) -> str:
    """ "5 seeds", "3 to 5 seeds" where cells differ, "1 seed"."""
    low, high = min(counts), max(counts)
    return f"{low} seed{'s' * (low != 1)}" if low == high else f"{low} to {high} seeds"


def counts(lines: Sequence[Line]) -> set[int]:
    """How many seeds the points of lines have."""
    return {len(point.values) for line in lines for point in line.points}


def bars(counts: Collection[int], decided: str, word: str = "bars", small: str = "") -> str:
    """What points and bars are, as a sentence of a caption.

    Args:
        decided: what a seed decides. word: what shows the spread. small: what else is drawn where there are several
            seeds.
    """
    if max(counts) == 1:
        return f"One seed each, of {decided}, so no spread is drawn."
    also = f"; {small}" if small else ""
    return f"Mean over {seeds(counts)}, of {decided}; {word}: ± the sample standard deviation over them{also}."


def constants(metrics: Mapping[str, float]) -> str:
    """A sentence on the metrics that have one value only, which is here; empty of none."""
    found = [f"{METRICS[metric].title} is {number(metric, value)}" for metric, value in metrics.items()]
    return f"Not drawn, for it is the same throughout: {listed(found)}." if found else ""


def curve_choices(choices: Sequence[Mapping]) -> str:
    """How models were measured while they trained, as a sentence; empty where it is not known.

    Args:
        choices: settings of each run's evaluations.
    """
    forms = {"num_images": "{:,} images", "num_inference_steps": "{:,} steps", "guidance_scale": "guidance scale {:g}"}
    found = []
    for name, form in forms.items():
        told = {each[name] for each in choices if each.get(name) is not None}
        if len(told) == 1:
            found.append(form.format(*told))
        elif told:
            found.append(f"{name} that differ between runs")
    return f"Measured with {', '.join(found)}: compare among these curves, not with final models." if found else ""


def note(counts: Collection[int], scale: float | None = None) -> str:
    """In small print below the picture, so that it can stand alone."""
    spread = "1 seed" if max(counts) == 1 else f"mean ± standard deviation over {seeds(counts)}"
    return spread + ("" if scale is None else f", guidance scale {scale:g}")


def all_numbers(panels: Mapping[str, Panel], place: str) -> str:
    """The means of all lines.

    Args:
        place: how a place is said, "η = {:g} %".
    """
    return " ".join(
        f"{METRICS[metric].title} of {line.title}: "
        + ", ".join(f"{number(metric, point.mean)} at {place.format(point.x)}" for point in line.points)
        + "."
        for metric, panel in panels.items()
        for line in panel.lines
    )


def level_numbers(panels: Mapping[str, Panel]) -> str:
    return " ".join(
        f"{METRICS[metric].title} across: "
        + ", ".join(f"{title} {number(metric, level.mean)}" for title, level in panel.levels.items())
        + "."
        for metric, panel in panels.items()
        if panel.levels
    )


def best_numbers(metric: str, lines: Sequence[Line], place: str) -> str:
    """Of each line its best point; its highest where neither side is better."""
    word, choose = ("Lowest", min) if METRICS[metric].better == "lower" else ("Highest", max)
    best = [(line.title, choose(line.points, key=lambda point: point.mean)) for line in lines]
    found = "; ".join(f"{title} {number(metric, point.mean)} at {place} {point.x:g}" for title, point in best)
    return f"{word} {METRICS[metric].title}: {found}."


def trade_numbers(metric: str, other: str, lines: Sequence[Line]) -> str:
    """Of each line of two metrics both, at its smallest and its largest guidance scale."""

    def said(line: Line) -> str:
        ends = line.points[0], line.points[-1]
        return ", ".join(
            f"{number(metric, end.mean)} and {number(other, end.x)} at guidance {end.scale:g}" for end in ends
        )

    found = "; ".join(f"{line.title} {said(line)}" for line in lines)
    return f"{METRICS[metric].title} and {METRICS[other].title}: {found}."


def last_numbers(metric: str, lines: Sequence[Line]) -> str:
    found = {line.title: line.points[-1] for line in lines}
    last = "; ".join(f"{title} {number(metric, point.mean)} at {point.x:g}" for title, point in found.items())
    return f"Last {METRICS[metric].title}: {last}."


def pair_numbers(metric: str, pairs: Sequence[Pair]) -> str:
    both = (
        f"{pair.title} fixed {number(metric, pair.fixed.mean)}, random {number(metric, pair.random.mean)}"
        for pair in pairs
    )
    return f"{METRICS[metric].title}: {'; '.join(both)}."


def difference_numbers(metric: str, differences: Sequence[Difference], titles: Mapping[str, str]) -> str:
    def said(each: Difference) -> str:
        interval = f" [{number(metric, each.low)}, {number(metric, each.high)}]" if each.low == each.low else ""
        verdict = f", {each.verdict}" if each.verdict else ""
        return f"{titles[each.cell]} {number(metric, each.mean)}{interval}{verdict}"

    return f"{METRICS[metric].title} minus clean's: {'; '.join(map(said, differences))}."
