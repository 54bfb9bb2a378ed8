"""Every public call, an argument at a time, against every value of its pool; a seeded share of them daily."""

import random

import pytest

from tests.fuzz.calls import CALLS
from tests.fuzz.outcome import GOOD, tried

SHARE = 4  # of the cases of calls that learn, the daily run tries one in so many


def cases():
    """Name of the call, argument, value: all of the quick calls, and a seeded share of the slow ones."""
    chosen = random.Random(0)
    for name, call in CALLS.items():
        for argument, values in call.tried.items():
            for value in values:
                if not call.slow or value.bad or chosen.randrange(SHARE) == 0:
                    yield name, argument, value


@pytest.mark.parametrize("name", CALLS)
def test_every_value_is_taken_or_refused_in_words(name):
    found, call = [], CALLS[name]
    for each, argument, value in cases():
        if each != name:
            continue
        came = tried(call, {argument: value}, seed=0)
        if came.kind not in GOOD:
            found.append(f"{name}({argument}={value.name}): {came.kind} {came.words}")
    assert not found, "\n".join(found)
