"""The rows of `benchmarks.posteriors.ordinary`: names, data by code of our own with a stated seed, known moments."""

import gzip
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_breast_cancer

from benchmarks.lib.ordinary.quantities import names_of
from pyro_sb.datasets.originals import Reference, read_posterior

Arrays = dict[str, np.ndarray]
Moments = dict[str, tuple[float, float, float]]


@dataclass(frozen=True, eq=False)
class Row:
    """A posterior, as a Pyro and as a NumPyro model.

    Attributes:
        name: Of it.
        model: Its key in both tables of models.
        data: The models' arguments, in order.
        sites: Sites whose numbers are looked at; of more than `quantities.MOST` numbers as many, evenly spread.
        float64: Whether all samplers run in double precision; else in single.
        dim: Unconstrained numbers.
        exact: Moments in closed form, by quantity: mean, sd, standard error of the mean. None: by a long run.
        reference: Row whose long run it shares; default: its own.
        long: Draws a chain of the long run.
        small: Whether Pyro's NUTS is tried.
    """

    name: str
    dim: int
    model: str
    data: Callable[[], Arrays]
    sites: tuple[str, ...]
    float64: bool = False
    exact: Callable[[], Moments] | None = None
    reference: str = ""
    long: int = 5000
    small: bool = False


def autoregression(dim: int) -> Row:
    """x of a stationary series: rho .9, sds 1."""
    exact, name = dict.fromkeys(names_of("x", dim), (0.0, 1.0, 0.0)), f"AR(1), d {dim}"
    return Row(name, dim, "autoregression", lambda: zeros(dim), ("x",), exact=lambda: exact, small=dim <= 20)


def zeros(dim: int) -> Arrays:
    return {"zero": np.zeros(dim)}


def cancer() -> Arrays:
    """Breast cancer, as scikit-learn ships it, standardised, with an intercept."""
    x, y = load_breast_cancer(return_X_y=True)
    x = (x - x.mean(0)) / x.std(0)
    return {"x": np.concatenate([np.ones((len(x), 1)), x], 1), "y": y.astype(float)}


def logistic(num: int, dim: int = 100, seed: int = 1) -> Arrays:
    """Independent normal covariates, coefficients N(0, .3^2)."""
    draw = np.random.default_rng(seed)
    x, beta = draw.normal(size=(num, dim)), 0.3 * draw.normal(size=dim)
    return {"x": x, "y": (draw.uniform(size=num) < 1 / (1 + np.exp(-x @ beta))).astype(float)}


def groups(seed: int = 2) -> Arrays:
    """100 groups of 5 rows, effects N(1, .5^2), noise 1: neither parametrisation is the right one throughout."""
    draw = np.random.default_rng(seed)
    return {"y": 1.0 + 0.5 * draw.normal(size=100) + draw.normal(size=(5, 100))}


def slopes(seed: int = 3) -> Arrays:
    """30 groups of 10 rows: intercepts and slopes with sds .8 and .4, correlation .5; noise .6."""
    draw = np.random.default_rng(seed)
    root = np.linalg.cholesky(np.array([[0.64, 0.16], [0.16, 0.16]]))
    effects = np.array([1.0, -0.5]) + draw.normal(size=(30, 2)) @ root.T
    x = draw.normal(size=(10, 30))
    return {"x": x, "y": effects[:, 0] + effects[:, 1] * x + 0.6 * draw.normal(size=x.shape)}


def items(seed: int = 4) -> Arrays:
    """Answers of 200 people to 30 items (2PL)."""
    draw = np.random.default_rng(seed)
    ability, slope, difficulty = draw.normal(size=(200, 1)), np.exp(0.3 * draw.normal(size=30)), draw.normal(size=30)
    share = 1 / (1 + np.exp(-slope * (ability - difficulty)))
    return {"y": (draw.uniform(size=share.shape) < share).astype(float)}


def process(seed: int = 5) -> Arrays:
    """Counts at 50 places on (0, 10) around a smooth curve."""
    draw = np.random.default_rng(seed)
    x = np.linspace(0, 10, 50)
    return {"x": x, "y": draw.poisson(np.exp(1.0 + np.sin(x) * 0.8)).astype(float)}


def volatility(length: int = 200, seed: int = 6) -> Arrays:
    """Returns whose log variance follows an AR(1) of rho .95 about -1, steps .25."""
    draw = np.random.default_rng(seed)
    h = np.empty(length)
    h[0] = draw.normal() * 0.25 / math.sqrt(1 - 0.95**2)
    for t in range(1, length):
        h[t] = 0.95 * h[t - 1] + 0.25 * draw.normal()
    return {"y": np.exp((h - 1.0) / 2) * draw.normal(size=length)}


def sparse(seed: int = 7) -> Arrays:
    """100 rows, 100 covariates, of which five matter."""
    draw = np.random.default_rng(seed)
    beta = np.zeros(100)
    beta[:5] = [3.0, -2.0, 1.5, 1.0, -0.7]
    x = draw.normal(size=(100, 100))
    return {"x": x, "y": x @ beta + draw.normal(size=100)}


def curve(seed: int = 8) -> Arrays:
    """100 rows of a smooth function of three covariates, noise .2, and 20 further points."""
    draw = np.random.default_rng(seed)
    x = draw.uniform(-1, 1, size=(120, 3))
    f = np.sin(2 * x[:, 0]) + x[:, 1] * x[:, 2]
    return {"x": x[:100], "y": f[:100] + 0.2 * draw.normal(size=100), "at": x[100:]}


def modes(dim: int) -> Moments:
    """Of unit normals at -5 and 5 on the first axis, weights .3 and .7."""
    sds = [math.sqrt(1 + 0.21 * 100)] + [1.0] * (dim - 1)
    return {name: (2.0 if i == 0 else 0.0, sds[i], 0.0) for i, name in indexed("x", dim)}


def unlike(dim: int) -> Moments:
    """Of the two at the same places whose covariances are an AR(1)'s (rho .9, sds 1) and diagonal (sds .3 to 2)."""
    variances = 0.3 + 0.7 * np.geomspace(0.3, 2.0, dim) ** 2
    variances[0] += 0.21 * 100
    return {name: (2.0 if i == 0 else 0.0, math.sqrt(variances[i]), 0.0) for i, name in indexed("x", dim)}


def indexed(site: str, dim: int) -> list[tuple[int, str]]:
    """Quantities of a vector and their places in it."""
    return [(int(name.split("[")[1][:-1]) - 1, name) for name in names_of(site, dim)]


def mixtures(dim: int) -> list[Row]:
    return [
        Row(f"two modes, d {dim}", dim, "modes", lambda: zeros(dim), ("x",), exact=lambda: modes(dim), small=dim <= 50),
        Row(f"two unlike modes, d {dim}", dim, "unlike", lambda: zeros(dim), ("x",), exact=lambda: unlike(dim)),
    ]


# posteriordb: what its folder has, by the names there


def stored(name: str) -> tuple[dict[str, Any], Reference]:
    """Data and reference, from posteriordb's checkout, or from a flat folder and its folder `more`."""
    folder = Path(os.environ["PYRO_SB_POSTERIORDB"]).expanduser() / "more"
    if not (folder / f"{name}.npz").is_file():
        return read_posterior(name, None)
    data = json.loads(gzip.decompress((folder / f"{name}.data.json.gz").read_bytes()))
    with np.load(folder / f"{name}.npz") as file:
        moments, num = (file["reference_mean"], file["reference_sd"]), int(file["n_reference"])
        return data, Reference(tuple(map(str, file["params"])), file["draws"].astype(float), *moments, num)


def published(name: str, dim: int, title: str, model: str, take: Callable[..., Arrays], *sites: str) -> Row:
    """A posterior of posteriordb in double precision: `take` makes the models' arguments of its data."""

    def data() -> Arrays:
        return take({key: np.asarray(value) for key, value in stored(name)[0].items()})

    def exact() -> Moments:
        reference = stored(name)[1]
        mean, sd, error = reference.mean, reference.sd, reference.sd / math.sqrt(reference.num_draws)
        if model == "low_dim_gauss_mix_unordered":
            return mirrored(reference)
        return {key: (float(mean[i]), float(sd[i]), float(error[i])) for i, key in enumerate(reference.parameters)}

    return Row(title, dim, model, data, sites, float64=True, exact=exact, small=name != "diamonds-diamonds")


def mirrored(reference: Reference) -> Moments:
    """Of the mixture without its ordering: one half its mirror image, which swaps components; theta to 1 - theta."""
    swap = [1, 0, 3, 2, 4]
    mean, sd, draws = reference.mean, reference.sd, reference.draws
    other, flipped = mean[swap], draws[:, swap]
    other[4], flipped[:, 4] = 1 - mean[4], 1 - draws[:, 4]
    spread = np.sqrt((sd**2 + sd[swap] ** 2) / 2 + (mean - other) ** 2 / 4)
    error = ((draws + flipped) / 2).std(0) / math.sqrt(reference.num_draws)
    centre = (mean + other) / 2
    return {key: (float(centre[i]), float(spread[i]), float(error[i])) for i, key in enumerate(reference.parameters)}


def design(*columns: Any) -> np.ndarray:
    """Covariates after an intercept."""
    columns = tuple(np.asarray(column, dtype=float) for column in columns)
    return np.stack([np.ones_like(columns[0]), *columns], 1)


def schools(data: Arrays) -> Arrays:
    return {"sigma": data["sigma"].astype(float), "y": data["y"].astype(float)}


def series(data: Arrays) -> Arrays:
    y, order = data["y"].astype(float), int(data["K"])
    return {"lags": np.stack([y[order - k : len(y) - k] for k in range(1, order + 1)], 1), "y": y[order:]}


def plain(data: Arrays) -> Arrays:
    return {"x": data["X"].astype(float), "y": data["y"].astype(float)}


def observations(data: Arrays) -> Arrays:
    return {"y": data["y"].astype(float)}


def mesquite(data: Arrays) -> Arrays:
    log = {key: np.log(data[key]) for key in ("diam1", "diam2", "canopy_height", "total_height", "weight")}
    area = log["diam1"] + log["diam2"]
    columns = (area + log["canopy_height"], area, log["diam1"] - log["diam2"], log["total_height"], data["group"])
    return {"x": design(*columns), "y": log["weight"]}


def election(data: Arrays) -> Arrays:
    ages = [(data["age_discrete"] == k).astype(float) for k in (2, 3, 4)]
    first, last = (data["real_ideo"], data["race_adj"]), (data["educ1"], data["gender"], data["income"])
    return {"x": design(*first, *ages, *last), "y": data["partyid7"].astype(float)}


def garch(data: Arrays) -> Arrays:
    return {"y": data["y"].astype(float), "first": data["sigma1"].astype(float)}


def counts(data: Arrays) -> Arrays:
    return {"x": data["x"].astype(float), "k": data["k"].astype(float)}


def diamonds(data: Arrays) -> Arrays:
    x = data["X"][:, 1:].astype(float)
    return {"x": x - x.mean(0), "y": data["Y"].astype(float)}


def scores(data: Arrays) -> Arrays:
    return {"x": design(data["mom_hs"], data["mom_iq"]), "y": data["kid_score"].astype(float)}


def centred_scores(data: Arrays) -> Arrays:
    school, iq = data["mom_hs"] - 0.5, data["mom_iq"] - 100.0
    return {"x": design(school, iq, school * iq), "y": data["kid_score"].astype(float)}


def interacting_scores(data: Arrays) -> Arrays:
    return {"x": design(data["mom_hs"], data["mom_iq"], data["mom_hs"] * data["mom_iq"]), "y": scores(data)["y"]}


def earnings(*columns: str, base: float = math.e) -> Callable[[Arrays], Arrays]:
    """Log earnings on columns, of which ``"a*b"`` is a product."""

    def take(data: Arrays) -> Arrays:
        parts = [np.prod([data[name].astype(float) for name in column.split("*")], 0) for column in columns]
        return {"x": design(*parts), "y": np.log(data["earn"]) / math.log(base)}

    return take


def from_posteriordb() -> list[Row]:
    """The seven posteriors of today and twelve further ones; none where no folder is named."""
    if not os.environ.get("PYRO_SB_POSTERIORDB"):
        return []
    eight, mix = "eight_schools-eight_schools_noncentered", "low_dim_gauss_mix-low_dim_gauss_mix"
    effects, line = ("theta", "mu", "tau"), ("beta", "sigma")
    mixed, by_both = ("mu", "sigma", "theta"), earnings("height", "male")
    crossed, by_height = earnings("height", "male", "height*male"), earnings("height", base=10.0)
    centred = "kidiq_with_mom_work-kidscore_interaction_c2"
    return [
        published(eight, 10, "eight schools, non-centred", "eight_schools_noncentered", schools, *effects),
        published(eight, 10, "eight schools, centred", "eight_schools_centered", schools, *effects),
        published(mix, 5, "low_dim_gauss_mix", "low_dim_gauss_mix", observations, *mixed),
        published(mix, 5, "low_dim_gauss_mix_unordered", "low_dim_gauss_mix_unordered", observations, *mixed),
        published("arK-arK", 7, "arK", "ark", series, "alpha", *line),
        published("earnings-logearn_interaction", 5, "logearn_interaction", "flat_line", crossed, *line),
        published("kidiq-kidscore_interaction", 5, "kidscore_interaction", "cauchy_line", interacting_scores, *line),
        published("sblri-blr", 6, "blr", "normal_line", plain, *line),
        published("mesquite-logmesquite_logvash", 7, "logmesquite_logvash", "flat_line", mesquite, *line),
        published("nes1976-nes", 10, "nes1976", "flat_line", election, *line),
        published("nes2000-nes", 10, "nes2000", "flat_line", election, *line),
        published("garch-garch11", 4, "garch11", "garch", garch, "mu", "alpha0", "alpha1", "beta1"),
        published("hmm_example-hmm_example", 4, "hmm_example", "hmm", observations, "theta1", "theta2", "mu"),
        published("gp_pois_regr-gp_pois_regr", 13, "gp_pois_regr", "gp_pois", counts, "rho", "alpha", "f"),
        published("diamonds-diamonds", 26, "diamonds", "diamonds", diamonds, "b", "Intercept", "sigma"),
        published("earnings-log10earn_height", 3, "log10earn_height", "flat_line", by_height, *line),
        published("earnings-logearn_height_male", 4, "logearn_height_male", "flat_line", by_both, *line),
        published("kidiq-kidscore_momhsiq", 4, "kidscore_momhsiq", "cauchy_line", scores, *line),
        published(centred, 5, "kidscore_interaction_c2", "flat_line", centred_scores, *line),
    ]


def all_rows() -> list[Row]:
    """All of them, in the table's order."""
    effects = ("mu", "tau", "sigma", "theta")
    return [
        *(autoregression(dim) for dim in (5, 20, 50, 100, 200, 500, 1000)),
        Row("breast cancer", 31, "logistic", cancer, ("beta",), small=True),
        Row("logistic, n 1,000", 100, "logistic", lambda: logistic(1000), ("beta",)),
        Row("logistic, n 50,000", 100, "logistic", lambda: logistic(50_000), ("beta",), long=1000),
        Row("100 groups, centred", 103, "hierarchy_centred", groups, effects, reference="100 groups, non-centred"),
        Row("100 groups, non-centred", 103, "hierarchy", groups, effects),
        Row("varying slopes, LKJ", 66, "slopes", slopes, ("mu", "scale", "rho", "sigma", "effects")),
        Row("item response, 2PL", 260, "items", items, ("slope", "difficulty", "ability"), long=3000),
        Row("GP, 50 latents", 53, "process", process, ("length", "amplitude", "level", "f"), float64=True),
        Row("stochastic volatility, T 200", 203, "volatility", volatility, ("mu", "phi", "sigma", "h"), long=3000),
        Row("regularised horseshoe", 203, "horseshoe", sparse, ("sigma", "beta"), long=3000),
        Row("network", 100, "network", curve, ("f",), long=3000),
        *(row for dim in (50, 100, 200) for row in mixtures(dim)),
        *from_posteriordb(),
    ]
