"""The table of claims: scripts, results and quoted figures are where it says."""

import random

import pytest

from benchmarks.__main__ import forgotten, problems
from benchmarks.claims import QUOTES
from benchmarks.lib import quotes
from benchmarks.lib.quotes import Quote, numbers, parsed, rounds_to


def test_quoted_figures_stand_in_the_result_files():
    assert list(problems()) == []


def test_scripts_that_no_claim_names_are_found(tmp_path):
    run = 'if __name__ == "__main__":\n    main()\n'
    files = {
        "light/planar.py": f"from benchmarks.light.helper import row\nfrom benchmarks.light.other import line\n{run}",
        "light/helper.py": "row = 1\n",
        "light/other.py": f"line = 2\n{run}",
        "light/unused.py": "value = 3\n",
        "lib/unused.py": "value = 4\n",
        "light/__init__.py": "",
        "__main__.py": run,
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = [line.split()[0] for line in forgotten(tmp_path)]
    assert found == ["benchmarks/light/other.py", "benchmarks/light/unused.py"]


@pytest.mark.parametrize(
    ("value", "figure"),
    [(63986.0, "63,986"), (0.0335, ".03"), (7.9e-5, "8e-5"), (-0.0084, ".008"), (0.0212, "2 %"), (-3.7771, "-3.777")],
)
def test_a_figure_is_its_value_rounded(value, figure):
    assert rounds_to(value, figure)


@pytest.mark.parametrize(("value", "figure"), [(63987.0, "63,986"), (0.0351, ".03"), (3.777, "-3.777"), (0.0212, "2")])
def test_another_value_is_not_the_figure(value, figure):
    assert not rounds_to(value, figure)


def test_names_and_code_are_no_figures():
    text = "W2 of `LightSB(16)` at t(3), d^.14: .0015 to 14 % ([rows](results/3.txt)), 1,169 in e^129,000"
    assert numbers(text) == ["3", ".0015", "14 %", "1,169"]


def test_a_figure_that_the_file_lacks_is_found(tmp_path, monkeypatch):
    (tmp_path / "rows.txt").write_text("ours  0.0259  12\npeer  0.7  3\n")
    (tmp_path / "text.md").write_text("# Figures\n\nOurs has .026 of 12,\nthe peer .71.\n\nElsewhere 5.\n")
    monkeypatch.setattr(quotes, "ROOT", tmp_path)
    monkeypatch.setattr(quotes, "RESULTS", tmp_path)
    quote = Quote("Ours has", "rows.txt", where="text.md")
    assert quote.missing() == ["text.md, 'Ours has': .71 must be in rows.txt"]
    assert Quote("Ours has", "rows.txt", until="the peer", rows="ours", where="text.md").missing() == []
    assert Quote("Theirs", "rows.txt", where="text.md").missing() == ["text.md must have the passage 'Theirs'"]


def test_most_changes_of_a_last_digit_are_noticed():
    # how sharp the check is: of the README's own figures with another last digit, how many would it let pass
    draw, changed, noticed = random.Random(0), 0, 0
    for quote in QUOTES:
        values = [parsed(number)[0] for number in numbers(quote.lines())]
        for figure in numbers(quote.passage()):
            digits = [i for i, letter in enumerate(figure) if letter.isdigit()]
            if len(digits) < 3:
                continue
            other = (int(figure[digits[-1]]) + draw.randint(1, 9)) % 10
            wrong = figure[: digits[-1]] + str(other) + figure[digits[-1] + 1 :]
            changed, noticed = changed + 1, noticed + (not any(rounds_to(value, wrong) for value in values))
    assert changed > 150
    assert noticed > 0.8 * changed, (noticed, changed)
