"""Tables in Markdown, as reports of evaluations and of studies hold them.

They are padded, so that they also read well as plain text."""

from collections.abc import Collection, Iterable, Sequence


MISSING = "–"  # no value
INCONCLUSIVE = "≈"  # a value whose difference may be chance
WIDE = 8  # more metrics than these beside each other are wider than a page


def escaped(text: object) -> str:
    """Text that may stand in a table: in one line, its bars escaped."""
    return " ".join(str(text).split()).replace("|", "\\|")


def listed(words: Iterable[str]) -> str:
    """ "a, b and c"; at least one."""
    *before, last = words
    return f"{', '.join(before)} and {last}" if before else last


def markdown_table(head: Sequence[str], lines: Sequence[Sequence[str]], left: Collection[int]) -> str:
    """A table.

    Args:
        head: what the columns say. lines: a text per column, escaped. left: numbers of the columns that are aligned to
            the left; the others, numbers, to the right.
    """
    widths = [max(3, *(len(line[n]) for line in [head, *lines])) for n in range(len(head))]

    def padded(line):
        cells = [text.ljust(widths[n]) if n in left else text.rjust(widths[n]) for n, text in enumerate(line)]
        return "| " + " | ".join(cells) + " |"

    rule = ["-" * width if n in left else "-" * (width - 1) + ":" for n, width in enumerate(widths)]
    return "\n".join([padded(head), padded(rule), *(padded(line) for line in lines)])
