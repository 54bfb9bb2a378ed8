"""Figures that a document quotes, and whether a result file has them."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
NUMBER = re.compile(r"(?<![\w.,^])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:e[-+]?\d+)?(?![\w])(?: ?%)?")


@dataclass(frozen=True)
class Quote:
    """A passage whose figures stand in a result file, perhaps to fewer digits.

    Args:
        start: How it begins; it ends with the line of a table, or with the paragraph or list item.
        file: Under results/.
        after: Text that comes before, where the same beginning comes more often.
        until: Where it ends sooner.
        rows: Pattern of the file's lines that have the figures; default: all.
        section: First line of the file's section that has them; it ends with the next line that begins with "##".
        beside: Numbers of the passage that are no figures of the file, separated by blanks.
        where: The document.
    """

    start: str
    file: str
    after: str = ""
    until: str = ""
    rows: str = ""
    section: str = ""
    beside: str = ""
    where: str = "README.md"

    def passage(self) -> str:
        """The text, without line breaks; empty if the document has it not."""
        text = (ROOT / self.where).read_text()
        if self.after not in text:
            return ""
        text = text[text.index(self.after) + len(self.after) :]
        blocks = [" ".join(block.split()) for block in re.split(r"\n(?=\s*(?:\n|\||- ))", text)]
        table = self.start.startswith("|")  # of a table the line must begin so
        places = [(block, block.find(self.start)) for block in blocks]
        rest = next((block[i:] for block, i in places if i == 0 or i > 0 and not table), "")
        return rest[: rest.index(self.until)] if self.until and self.until in rest else rest

    def lines(self) -> str:
        """The part of the file that is searched."""
        text = (RESULTS / self.file).read_text()
        if self.section:
            text = text[text.index(f"\n{self.section}") + 1 :]
            text = text.split("\n##", 1)[0]
        return "\n".join(line for line in text.splitlines() if re.search(self.rows, line))

    def missing(self) -> list[str]:
        """Faults: figures that the file has not, or a passage that is not there."""
        passage = self.passage()
        if not passage:
            return [f"{self.where} must have the passage {self.start!r}"]
        values = [parsed(number)[0] for number in numbers(self.lines())]
        beside = self.beside.split()
        figures = [figure for figure in numbers(passage) if figure not in beside]
        if not figures:
            return [f"{self.where}, {self.start!r}: no figures"]
        lost = [figure for figure in figures if not any(rounds_to(value, figure) for value in values)]
        return [f"{self.where}, {self.start!r}: {figure} must be in {self.file}" for figure in lost]


def numbers(text: str) -> list[str]:
    """The numbers of a text as they are written, a per cent sign included."""
    text = re.sub(r"`[^`]*`|\]\([^)]*\)", " ", text)  # code and addresses
    return [found.group().rstrip() for found in NUMBER.finditer(text) if re.search(r"\d", found.group())]


def parsed(number: str) -> tuple[float, float]:
    """Value, and half a unit of its last digit."""
    plain = number.rstrip("% ").replace(",", "")
    mantissa, _, exponent = plain.partition("e")
    power = int(exponent or 0)
    return float(plain), 0.5 * 10.0 ** (power - len(mantissa.partition(".")[2]))


def rounds_to(value: float, figure: str) -> bool:
    """Whether a value, or its hundredfold where the figure is in per cent, is the figure to its digits."""
    target, half = parsed(figure)
    signed = figure[0] in "+-"
    scales = (1.0, 100.0) if figure.endswith("%") else (1.0,)
    shown = [scale * value if signed else abs(scale * value) for scale in scales]
    return any(abs(one - target) <= half * (1 + 1e-9) for one in shown)
