"""Values to try, by kind of argument: those that must be refused, and those of which either is right."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from pyro_sb.bridges import LightSB


class Value(NamedTuple):
    """A value to try.

    Args:
        name: Of it.
        make: Makes a new one.
        bad: Whether it must be refused.
    """

    name: str
    make: Callable[[], Any]
    bad: bool = True


def bad(**makers: Any) -> list[Value]:
    return [Value(name, make if callable(make) else lambda make=make: make) for name, make in makers.items()]


def open_values(**makers: Any) -> list[Value]:
    return [value._replace(bad=False) for value in bad(**makers)]


NONSENSE = bad(
    text="text",
    bytes=b"bytes",
    complex=1j,
    list=lambda: [[1.0], [2.0, 3.0]],
    dict=lambda: {"a": 1},
    function=lambda: len,
    kind=lambda: LightSB,
    module=lambda: math,
    law=lambda: torch.distributions.Normal(0.0, 1.0),
    object=object,
)
NO_NUMBER = NONSENSE + bad(
    true=True,
    nan=math.nan,
    two=lambda: torch.ones(2),
    array=lambda: np.ones((2, 2)),
    nan_tensor=lambda: torch.tensor(math.nan),
    series=lambda: pd.Series([1.0, 2.0]),
)
COUNT = NO_NUMBER + bad(
    zero=0,
    minus=-1,
    half=2.5,
    infinite=math.inf,
    minus_infinite=-math.inf,
    huge=1e300,
    minus_zero=-0.0,
)
COUNT += open_values(
    one=1, three=3, whole=3.0, numpy=lambda: np.int32(2), tensor=lambda: torch.tensor(2), unsigned=lambda: np.uint8(4)
)
LEAST0 = [value for value in COUNT if value.name not in ("zero", "minus_zero")] + open_values(zero=0)
POSITIVE = NO_NUMBER + bad(zero=0.0, minus=-1.0, infinite=math.inf, none_at_all=lambda: np.float64(-0.0))
POSITIVE += open_values(
    half=0.5, one=1, tiny=1e-20, large=1e20, numpy=lambda: np.float32(0.7), tensor=lambda: torch.tensor(2.0)
)
SHARE = NO_NUMBER + bad(minus=-0.1, one=1.0, infinite=math.inf, above=1.5)
SHARE += open_values(half=0.5, tiny=1e-12, numpy=lambda: np.float32(0.2))
CHOICE = bad(
    other="other",
    number=3,
    list=lambda: ["a"],
    empty="",
    dict=lambda: {},
    bytes=b"a",
    true=True,
    tensor=lambda: torch.ones(2),
)
FLAG = bad(one=1, text="yes", zero=0.0, none=None, list=lambda: [], tensor=lambda: torch.ones(2))
FLAG += open_values(true=True, false=False)
TIME = NO_NUMBER + bad(before=-0.1, after=1.1, infinite=math.inf)
TIME += open_values(start=0.0, end=1, half=0.5, tensor=lambda: torch.tensor(0.3), numpy=lambda: np.float32(0.2))
SHAPE = bad(
    number=5,
    minus=lambda: (-1,),
    half=lambda: (2.5,),
    infinite=lambda: (math.inf,),
    text="ab",
    none=None,
    dict=lambda: {"a": 1},
    nested=lambda: ((2,),),
    true=lambda: (True,),
)
SHAPE += open_values(
    empty=(), list=lambda: [2], size=lambda: torch.Size([2, 1]), none_of_them=(0,), numpy=lambda: (np.int64(2),)
)
GENERATOR = bad(
    number=3, text="a", law=lambda: torch.distributions.Normal(0.0, 1.0), numpy=lambda: np.random.default_rng(0)
)
GENERATOR += open_values(none=None, torch=torch.Generator)
WIDTHS = bad(
    number=64,
    zero=lambda: (0,),
    empty=(),
    half=lambda: (2.5,),
    text="ab",
    minus=lambda: (-3,),
    infinite=lambda: (math.inf,),
    nested=lambda: ((8,),),
    none=None,
)
WIDTHS += open_values(list=lambda: [4], one=(1,), three=(4, 3, 4))
PATH = bad(number=3, folder="/", absent="/absent-folder/fit.pt", list=lambda: ["a"])
ANY = NONSENSE + open_values(none=None)


def rows(dim: int, num: int = 40) -> torch.Tensor:
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(dim + num))


def points(dim: int) -> list[Value]:
    """Points ``(*, dim)``."""
    x = rows(dim, 6)
    values = NONSENSE + bad(
        complex_rows=lambda: x + 1j,
        nan=lambda: x.clone().fill_diagonal_(math.nan),
        infinite=lambda: x.clone().fill_diagonal_(math.inf),
        wide=lambda: rows(dim + 1, 6),
        number=0.5,
        none=None,
        objects=lambda: np.array([[None] * dim] * 3, dtype=object),
        masked=lambda: np.ma.masked_greater(x.numpy(), 0.0),
        words=lambda: [["a"] * dim],
        mixed=lambda: pd.DataFrame({f"{i}": ["a", "b"] for i in range(dim)}),
        dates=lambda: np.zeros((2, dim), dtype="M8[s]"),
    )
    return values + open_values(
        frame=lambda: pd.DataFrame(x.numpy()),
        reversed=lambda: x.numpy()[::-1],
        big_endian=lambda: x.numpy().astype(">f4"),
        tensors=lambda: list(x),
        lists=lambda: x.tolist(),
        double=lambda: x.double(),
        whole=lambda: x.long(),
        booleans=lambda: x > 0,
        half=lambda: x.half(),
        empty=lambda: x[:0],
        one=lambda: x[0],
        batch=lambda: x.reshape(2, 3, dim),
        read_only=lambda: np.broadcast_to(x.numpy(), (2, 6, dim)),
        far=lambda: 1e6 * x,
        gradient=lambda: x.clone().requires_grad_(),
        sparse=lambda: x.to_sparse(),
    )


def draws(dim: int, num: int = 40) -> list[Value]:
    """Draws ``(N, dim)`` to learn from."""
    x = rows(dim, num)
    fine = ("frame", "reversed", "big_endian", "tensors", "lists", "double", "half", "sparse", "gradient")
    values = [value for value in points(dim) if value.bad]
    return (
        values
        + bad(
            one=lambda: x[:1],
            empty=lambda: x[:0],
            flat=lambda: x[0],
            batch=lambda: x.reshape(2, num // 2, dim),
            same=lambda: torch.ones(num, dim),
        )
        + open_values(
            frame=lambda: pd.DataFrame(x.numpy()),
            reversed=lambda: x.numpy()[::-1],
            big_endian=lambda: x.numpy().astype(">f4"),
            tensors=lambda: list(x),
            lists=lambda: x.tolist(),
            double=lambda: x.double(),
            half=lambda: x.half(),
            few=lambda: x[:3],
            booleans=lambda: x > 0,
            whole=lambda: (10 * x).long(),
            large=lambda: 1e12 * x,
            small=lambda: 1e-12 * x,
            twice=lambda: x.repeat(2, 1)[:num],
            outlier=lambda: torch.cat([x[:-1], 1e8 + x[-1:]]),
            law=lambda: torch.distributions.Independent(torch.distributions.Normal(torch.zeros(dim), 1.0), 1),
        )
        if fine
        else values
    )


def weights(num: int) -> list[Value]:
    """Weights of so many draws."""
    one = torch.ones(num)
    return (
        NONSENSE
        + bad(
            negative=lambda: -one,
            nan=lambda: one * math.nan,
            infinite=lambda: one * math.inf,
            zero=lambda: 0 * one,
            short=lambda: one[:-1],
            single=lambda: torch.eye(num)[0],
            matrix=lambda: one[:, None],
            number=1.0,
            complex_rows=lambda: one + 1j,
            masked=lambda: np.ma.masked_greater(np.arange(num), 2),
        )
        + open_values(
            none=None,
            series=lambda: pd.Series(one.numpy()),
            list=lambda: [1.0] * num,
            whole=lambda: one.long(),
            booleans=lambda: torch.arange(num) < num - 3,
            tiny=lambda: 1e-30 * one,
        )
    )


def log_weights(num: int) -> list[Value]:
    """Log weights of so many draws."""
    x = rows(1, num)[:, 0]
    return (
        NONSENSE
        + bad(
            nan=lambda: x * math.nan,
            infinite=lambda: x + math.inf,
            matrix=lambda: x[:, None],
            number=1.0,
            empty=lambda: x[:0],
            none=None,
            complex_rows=lambda: x + 1j,
        )
        + open_values(
            series=lambda: pd.Series(x.numpy()),
            list=lambda: x.tolist(),
            whole=lambda: x.long(),
            far=lambda: 1e6 * x,
            single=lambda: x[:1],
            equal=lambda: 0 * x,
            half_zero=lambda: torch.where(x > 0, x, -math.inf),
            large=lambda: x + 1e30,
            all_zero=lambda: x - math.inf,
        )
    )
