"""Targets, sources and options are checked in one place, with messages that name the cure."""

import numpy as np
import pytest
import torch
from torch.distributions import Independent, MultivariateNormal, Normal

from pyro_sb.bridges import (
    DSB,
    VSDM,
    AutoencoderCodec,
    Bridge,
    KernelLangevinBridge,
    LatentBridge,
    LightSB,
    PCACodec,
    TailMatched,
)
from pyro_sb.bridges.base import FitOptions
from pyro_sb.bridges.data import read_source, read_target
from pyro_sb.bridges.options import keyword_names
from pyro_sb.files import read_file, write_file

LAW = MultivariateNormal(torch.zeros(2), torch.eye(2))


def test_rows_without_weight_go_with_their_context_and_mark():
    x, mask = torch.arange(8.0).reshape(4, 2), torch.tensor([True, False, False, True])
    read = read_target(
        2, 1, x, context=x[:, :1] + 1, weights=torch.tensor([1.0, 0.0, 1.0, 2.0]), num_law_draws=10, held_out=mask
    )
    assert torch.equal(read.points, x[[0, 2, 3]]) and torch.equal(read.context, x[[0, 2, 3], :1] + 1)
    assert read.held_out.tolist() == [True, False, True] and read.law is None
    torch.testing.assert_close(read.weights, torch.tensor([0.25, 0.25, 0.5]))


def test_contexts_are_standardised_by_weight_and_constant_ones_left():
    context = torch.tensor([[0.0, 7.1], [2.0, 7.1]], dtype=torch.float64)
    weights = torch.tensor([1.0, 3.0])
    read = read_target(1, 2, torch.randn(2, 1, dtype=torch.float64), context=context, weights=weights, num_law_draws=10)
    rows, location, scale = read.contexts()
    assert scale[1] == 1 and abs(float(read.weights @ rows[:, 0])) < 1e-15
    assert abs(float(read.weights @ rows[:, 0].square()) - 1) < 1e-14
    raw, location, scale = read.raw_contexts()
    assert torch.equal(raw, context) and not location.any() and bool((scale == 1).all())


def test_a_law_gives_as_many_draws_as_asked_for():
    read = read_target(2, 0, LAW, num_law_draws=17)
    assert read.points.shape == (17, 2) and read.law is LAW and bool((read.shares == 1 / 17).all())


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        (LAW, {"weights": torch.ones(3)}, r"weights go with draws.*target.sample"),
        (LAW, {"context": torch.ones(3, 1)}, "target must be draws where there is a context"),
        (LAW, {"held_out": torch.ones(3, dtype=torch.bool)}, "must be a share where the target is a distribution"),
        (Normal(torch.zeros(2), 1.0), {}, r"batch and event shapes \(\) and \(2,\)"),
        (torch.zeros(3, 2), {"context": torch.ones(3, 1)}, "context needs context_dim > 0"),
    ],
    ids=["weights", "context", "mask", "shape", "dim"],
)
def test_what_does_not_go_with_a_target_is_refused(target, options, message):
    with pytest.raises(ValueError, match=message):
        read_target(2, 0, target, num_law_draws=10, **options)


def test_sources_are_none_laws_draws_or_points():
    like = torch.zeros(1, dtype=torch.float64)
    assert read_source(None, 2, like) is None and read_source(LAW, 2, like) is LAW
    point, draws = read_source([1, 2], 2, like), read_source([[1, 2], [3, 4]], 2, like)
    assert point.shape == (1, 2) and draws.shape == (2, 2) and point.dtype == draws.dtype == torch.float64
    with pytest.raises(ValueError, match=r"shape \(draws, 2\)"):
        read_source([1.0, 2.0], 2, like, point=False)
    with pytest.raises(ValueError, match="to_event"):
        read_source(Independent(Normal(torch.zeros(3), 1.0), 1), 2, like)
    with pytest.raises(ValueError, match="source must be finite"):
        read_source([0.0, float("nan")], 2, like)


KEEPERS = {
    "langevin": (lambda: KernelLangevinBridge(2, num_steps=2), {}),
    "light": (lambda: LightSB(2, num_components=2), {"num_updates": 2}),
    "dsb": (lambda: DSB(2, hidden=(4,), num_steps=2), {"num_updates": 2, "num_iterations": 1, "num_pairs": 30}),
}


@pytest.mark.filterwarnings("ignore:.*has not converged")
@pytest.mark.parametrize("name", KEEPERS)
def test_what_a_bridge_keeps_is_its_own(name):
    make, options = KEEPERS[name]
    bridge, x, source = make(), np.random.default_rng(0).normal(size=(40, 2)), torch.randn(40, 2, dtype=torch.float64)
    bridge.fit(x, source, progress=False, **options)
    draws = []
    for _ in range(2):
        torch.manual_seed(0)
        draws.append(bridge().sample((9,)))
        x[:], source[:] = 1e6, 1e6
    assert torch.equal(*draws)


def test_the_data_are_described():
    draws = torch.randn(30, 2)
    read = read_target(2, 0, draws, num_law_draws=10)
    assert read.describe(None) == "30 draws, from its own source" and read.describe(draws) == "30 draws, from 30 draws"
    assert read.describe(draws[0]) == "30 draws, from a point"
    assert read_target(2, 0, LAW, num_law_draws=10).describe(LAW) == "a MultivariateNormal, from a MultivariateNormal"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_updates": 0}, "num_updates must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"num_law_draws": 1}, "num_law_draws must be at least 2"),
        ({"learning_rate": float("inf")}, "learning_rate must be positive"),
        ({"ema": -0.1}, r"ema must lie in \[0, 1\)"),
    ],
)
def test_options_that_no_fit_can_use_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        FitOptions(1, 1, 1e-3, None, 10, False, None)._replace(**change).read()


MISSPELT = {
    "latent": (lambda: LatentBridge(VSDM(2)).fit(torch.randn(9, 2), num_update=1), "Did you mean 'num_updates'"),
    "own": (lambda: LatentBridge(VSDM(2)).fit(torch.randn(9, 2), refit=True), "no option 'refit'.*refit_codec"),
    "default": (lambda: LatentBridge().fit(torch.randn(9, 2), batchsize=1), "Did you mean 'batch_size'"),
    "codec_options": (
        lambda: LatentBridge(VSDM(2)).fit(torch.randn(9, 2), codec_options={"num_step": 1}),
        "AutoencoderCodec.fit .codec_options. has no option 'num_step'.*num_updates",
    ),
    "codec": (lambda: AutoencoderCodec(1).fit(torch.randn(9, 2), epochs=3), "no option 'epochs'.*batch_size, ema"),
    "pca": (lambda: PCACodec(1).fit(torch.randn(9, 2), ema=0.9), "no option 'ema'. It takes none"),
    "tails": (lambda: TailMatched(LightSB(2)).fit(torch.randn(9, 2), patients=3), "Did you mean 'patience'"),
    "nested": (
        lambda: LatentBridge(TailMatched(VSDM(2)), PCACodec(2)).fit(torch.randn(9, 2), tail_draw=9),
        "Did you mean 'tail_draws'",
    ),
}


@pytest.mark.parametrize("name", MISSPELT)
def test_an_option_that_is_passed_on_is_checked_at_the_door(name):
    call, message = MISSPELT[name]
    with pytest.raises(TypeError, match=message):
        call()


def test_names_of_options_are_those_that_are_passed_on_too():
    class Mine(DSB):
        def fit(self, target, more=1, **options):
            return super().fit(target, **options)

    assert keyword_names(Mine, "fit") == keyword_names(DSB, "fit") | {"more"}
    assert "num_iterations" in LatentBridge(DSB(2)).fit_options() and "source" not in LatentBridge().fit_options()


EARLIER = {
    "VSDM": (
        lambda: VSDM(2, drift_matrix="tolerance", source_law="conditional", step_covariance="analytic", hidden=(8,)),
        {"drift_matrix": "drift", "source_law": "start", "step_covariance": "covariance"},
    ),
    "DSB": (lambda: DSB(2, num_steps=7, hidden=(8,)), {"num_steps": "chain_steps"}),
}


@pytest.mark.parametrize("name", EARLIER)
@pytest.mark.parametrize("wrapped", [False, True], ids=["alone", "in a latent bridge"])
def test_files_with_the_earlier_names_of_arguments_load(name, wrapped, tmp_path):
    make, names = EARLIER[name]
    quick = {"num_iterations": 1, "num_pairs": 50} if name == "DSB" else {}
    bridge = LatentBridge(make(), PCACodec(2)) if wrapped else make()
    bridge.fit(torch.randn(40, 2), num_updates=2, progress=False, **quick)
    saved = bridge.contents()
    config = saved["config"]["inner"][1] if wrapped else saved["config"]
    for present, earlier in names.items():
        config[earlier] = config.pop(present)
    del saved["fitted_to"]
    write_file(saved, tmp_path / "earlier.pt")
    loaded = Bridge.load(tmp_path / "earlier.pt")
    assert loaded.config() == bridge.config() and read_file(tmp_path / "earlier.pt")["config"] != bridge.config()
