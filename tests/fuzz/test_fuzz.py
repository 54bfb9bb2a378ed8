"""Public calls against values that are right, wrong and absurd: a seeded share daily, all of it by `make fuzz`."""

import random

import pytest

from tests.fuzz.beyond import CALLS
from tests.fuzz.outcome import GOOD, tried

DAILY, DAILY_FITS = 2400, 60  # cases that are refused or quick, and fits


def daily():
    """Some argument and value of each call, by its name."""
    chosen, cases = random.Random(0), {name: [] for name in CALLS}
    every = [(n, a, v, c.slow and not v.bad) for n, c in CALLS.items() for a, values in c.tried.items() for v in values]
    for learns, number in ((False, DAILY), (True, DAILY_FITS)):
        some = [case[:3] for case in every if case[3] == learns]
        for name, argument, value in chosen.sample(some, number):
            cases[name].append((argument, value))
    return cases


@pytest.mark.parametrize(("name", "cases"), daily().items(), ids=list(CALLS))
def test_every_value_is_taken_or_refused_in_words(name, cases):
    found = []
    for argument, value in cases:
        came = tried(CALLS[name], {argument: value}, seed=0)
        if came.kind not in GOOD:
            found.append(f"{name}({argument}={value.name}): {came.kind} {came.words}")
    assert not found, "\n".join(found)
