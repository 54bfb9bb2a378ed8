"""Lines of a report, each with a verdict in words, and the table that shows them.

Needs the standard library alone, so that it can be used on a Python that has no torch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any, NamedTuple

__all__ = ["Line", "Panel", "Report", "as_html", "as_text", "graded", "worst"]

ORDER = ("-", "ok", "look", "bad")
"""Verdicts from best to worst; ``"-"`` says that a line does not apply."""
COLOURS = {"-": "#888888", "ok": "#2a7f3f", "look": "#b8860b", "bad": "#b22222"}


WORDS = {
    "ok": "nothing found",
    "look": "something to look at",
    "bad": "wrong",
    "-": "nothing was looked at",
}


@dataclass(frozen=True)
class Line:
    r"""One claim of a report.

    Attributes:
        name: What was looked at.
        value: What came, as text with its unit.
        verdict: ``"ok"``, ``"look"``, ``"bad"``, or ``"-"`` where the line does not apply.
        note: What the value means; what to do about one that is not ok.
        short: Whether more draws would settle it, where it is not ok.

    Example:
        >>> print(as_text("A run", [Line("R-hat", "1.20 (mu)", "bad", "run longer")]))
        A run
        verdict  what   value      note
        -------  -----  ---------  ----------
        bad      R-hat  1.20 (mu)  run longer
    """

    name: str
    value: str
    verdict: str
    note: str = ""
    short: bool = False

    def __post_init__(self) -> None:
        assert self.verdict in ORDER, self.verdict


def graded(value: float, ok: float, look: float, *, high_is_good: bool = False) -> str:
    """Verdict of a figure: "ok" up to ``ok``, "look" up to ``look``, "bad" beyond it and for NaN.

    Example:
        >>> graded(1.02, 1.01, 1.05), graded(500, 400, 100, high_is_good=True), graded(float("nan"), 1, 2)
        ('look', 'ok', 'bad')
    """
    if high_is_good:
        value, ok, look = -value, -ok, -look
    return "ok" if value <= ok else "look" if value <= look else "bad"


def worst(lines: Sequence[Line]) -> str:
    """The worst verdict; "-" if no line applies."""
    return max((line.verdict for line in lines), key=ORDER.index, default="-")


def as_text(title: str, lines: Sequence[Line]) -> str:
    """Title and table, notes last on each line."""
    rows = [("verdict", "what", "value", "note"), *((x.verdict, x.name, x.value, x.note) for x in lines)]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    rule = tuple("-" * width for width in widths)
    shown = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in (rows[0], rule, *rows[1:])]
    return "\n".join([title, *(line.rstrip() for line in shown)])


def as_html(title: str, lines: Sequence[Line]) -> str:
    """The same for a notebook, each verdict in its colour."""
    head = "".join(f"<th style='text-align:left'>{name}</th>" for name in ("verdict", "what", "value", "note"))
    body = "".join(
        f"<tr><td style='color:{COLOURS[x.verdict]}'><b>{x.verdict}</b></td>"
        + "".join(f"<td style='text-align:left'>{escape(cell)}</td>" for cell in (x.name, x.value, x.note))
        + "</tr>"
        for x in lines
    )
    return f"<p>{escape(title)}</p><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


class Panel(NamedTuple):
    """A picture of a report: its title, and a function that draws it into axes."""

    title: str
    draw: Callable[[Any], Any]


@dataclass(frozen=True, eq=False, repr=False)
class Report:
    r"""Lines with a verdict in words each, and a cure where it is not ok.

    Attributes:
        title: What the report is of.
        lines: The table.
        panels: The figure's pictures.
        details: What the lines were read from, by name: a `ModeAudit`, a `Calibration`, draws.

    Example:
        >>> print(Report("A run", [Line("R-hat", "1.00", "ok")]))
        A run: ok, nothing found
        verdict  what   value  note
        -------  -----  -----  ----
        ok       R-hat  1.00
    """

    title: str
    lines: Sequence[Line]
    panels: Sequence[Panel] = ()
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """The worst of the lines: "ok", "look" or "bad"."""
        return worst(self.lines)

    @property
    def reason(self) -> str:
        """The verdict in words: what is wrong or to be looked at, or that there are not enough draws yet."""
        serious = [line for line in self.lines if ORDER.index(line.verdict) > 1 and not line.short]
        if self.verdict not in ("look", "bad"):
            return WORDS[self.verdict]
        if not serious:
            return "not enough draws yet"
        grave = worst(serious)
        names = [line.name for line in serious if line.verdict == grave]
        early = "not enough draws yet, and " if grave != self.verdict else ""
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        return f"{early}{WORDS[grave]} ({shown})"

    @property
    def colour(self) -> str:
        """Colour of the verdict."""
        return COLOURS[self.verdict]

    def __getitem__(self, name: str) -> Line:
        """The line of this name."""
        for line in self.lines:
            if line.name == name:
                return line
        raise KeyError(f"{name!r} is no line of this report; it has {[line.name for line in self.lines]}.")

    def __repr__(self) -> str:
        return as_text(f"{self.title}: {self.verdict}, {self.reason}", self.lines)

    def _repr_html_(self) -> str:
        return as_html(f"{self.title}: {self.verdict}, {self.reason}", self.lines)

    def plot(self, axes: Any = None, **kwargs: Any) -> Any:
        """The panels side by side: `pyro_sb.plots.plot_report`, with its ``figsize``. Returns the axes."""
        from pyro_sb.plots import plot_report

        return plot_report(self, axes=axes, **kwargs)
