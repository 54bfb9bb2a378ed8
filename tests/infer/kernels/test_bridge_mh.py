"""BridgeMH: exact posteriors from any bridge, Pyro's contract, and errors that help."""

import math
import pickle
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pyro.infer.mcmc.api as pyro_mcmc
import pytest
import torch
from torch import Tensor

from pyro_sb.bridges import (
    VSDM,
    AutoencoderCodec,
    KernelLangevinBridge,
    LatentBridge,
    LightSB,
    PairCodec,
    PCACodec,
    Sampler,
    SmoothedBridge,
    TailMatched,
)
from pyro_sb.bridges.codecs.base import Codec
from pyro_sb.infer import MCMC, AmortizedPosterior, BridgeMH, KernelLangevin
from pyro_sb.infer.kernels.bridge_mh import BridgeMH as Defined
from pyro_sb.infer.kernels.warmup import ChainStart
from pyro_sb.training import FitHistory
from tests.infer import open_models
from tests.infer.kernels.test_kernels import Y, conjugate, posterior, share_of_first_mode, two_modes_potential

F64 = torch.float64


def run(kernel: BridgeMH, *args: Tensor, **options: object) -> MCMC:
    mcmc = MCMC(kernel, **({"num_samples": 200, "num_chains": 64, "disable_progbar": True} | options))
    mcmc.run(*args)
    return mcmc


def light(draws: Tensor, components: int = 1) -> LightSB:
    bridge = LightSB(draws.shape[1], num_components=components, covariance="full")
    bridge.fit(draws, solver="moments", progress=False, num_updates=1000)
    return bridge


def off(num: int = 500) -> LightSB:
    """A bridge for `conjugate`, off by half a standard deviation and too wide by a half."""
    mean, sd = posterior()
    return light(mean + 0.5 * sd + 1.5 * sd * torch.randn(num, 1, dtype=F64))


def check_posterior_of_conjugate(mcmc: MCMC) -> None:
    draws, (mean, sd) = mcmc.get_samples()["mu"], posterior()
    n_eff = float(mcmc.diagnostics()["mu"]["n_eff"])
    assert n_eff > 1500
    assert abs(float(draws.mean()) - mean) < 4 * sd / math.sqrt(n_eff)
    assert abs(float(draws.std()) / sd - 1) < 4 / math.sqrt(2 * n_eff)


@pytest.mark.parametrize("local", ["hmc", "mala", None])
def test_a_fitted_bridge_is_used_as_it_is(local: str | None) -> None:
    bridge = off()
    before = {name: value.clone() for name, value in bridge.state_dict().items() if isinstance(value, Tensor)}
    kernel = BridgeMH(conjugate, bridge, local=local)
    mcmc = run(kernel, Y)
    check_posterior_of_conjugate(mcmc)
    assert kernel.population is None and kernel.proposals.bridge is bridge
    assert all(torch.equal(value, bridge.state_dict()[name]) for name, value in before.items())
    assert set(kernel.frozen.moves) == ({"bridge"} if local is None else {"bridge", "local"})
    evidence = float(dist.MultivariateNormal(torch.zeros(4).double(), torch.eye(4).double() + 4.0).log_prob(Y))
    value, error = kernel.pilot.log_evidence
    assert abs(value - evidence) < 4 * error


@pytest.mark.parametrize("which", ["default", "function", "template", "path"])
def test_a_bridge_that_is_not_fitted_is_fitted_to_the_population(which: str) -> None:
    template = KernelLangevinBridge(1, scheme="plain", num_steps=3) if which == "path" else LightSB(1, num_components=2)
    given = {
        "default": None,
        "function": lambda dim: LightSB(dim, num_components=2),
        "template": template,
        "path": template,
    }[which]
    options = {"num_updates": 30} if which in ("function", "template") else {}
    kernel = BridgeMH(conjugate, given, fit_options=options, num_particles=400)
    mcmc = run(kernel, Y)
    check_posterior_of_conjugate(mcmc)
    assert kernel.population is not None and kernel.frozen.acceptance["bridge"] > 0.6
    assert not template.fitted  # a copy was fitted
    first = kernel.proposals.bridge
    mcmc.run(Y + 3.0)  # other data: another fit
    assert kernel.proposals.bridge is not first
    assert abs(float(mcmc.get_samples()["mu"].mean()) - posterior()[0] - 12 / 4.25) < 0.1


def pca() -> PCACodec:
    """Fitted to other rows than any posterior's."""
    codec = PCACodec(1)
    codec.fit(5 + 3 * torch.randn(50, 1, dtype=F64))
    return codec


def sinh() -> PairCodec:
    """A bijection that stretches: its determinant is another at each point."""
    return PairCodec(torch.asinh, torch.sinh, 1, 1, bijective=True, log_abs_det=lambda z: z.cosh().log().sum(-1))


def latent(codec: Codec) -> LatentBridge:
    return LatentBridge(LightSB(codec.latent_dim or 1, num_components=2), codec)


@pytest.mark.parametrize(
    "make, options",
    [
        (lambda: latent(PCACodec(1)), {"num_updates": 30}),
        (lambda: latent(PCACodec()), {"num_updates": 30}),
        (lambda: latent(pca()), {"num_updates": 30}),
        (lambda: latent(sinh()), {"num_updates": 30}),
        (lambda: lambda dim: latent(PCACodec(dim)), {"num_updates": 30}),
        (lambda: LatentBridge(KernelLangevinBridge(1, scheme="plain", num_steps=3), PCACodec(1)), {}),
        (lambda: LatentBridge(KernelLangevinBridge(1, scheme="plain", num_steps=3), sinh()), {}),
    ],
    ids=["codec unfitted", "no size", "codec fitted", "a pair", "function", "paths", "paths, a pair"],
)
def test_a_latent_bridge_is_fitted_to_the_weighted_population_its_codec_too(make: Callable, options: dict) -> None:
    given = make()
    kernel = BridgeMH(conjugate, given, fit_options=options, num_particles=400)
    mcmc = run(kernel, Y)
    check_posterior_of_conjugate(mcmc)
    used, (mean, sd) = kernel.proposals.bridge, posterior()
    assert kernel.frozen.acceptance["bridge"] > 0.6 and kernel.population is not None
    if isinstance(given, LatentBridge):
        assert used is not given and not given.fitted and given.codec.fitted == (given.codec.location.numel() > 0)
    if isinstance(used.codec, PCACodec):  # its mean is the weighted population's, or stays that of its own rows
        own = given.codec.location if isinstance(given, LatentBridge) and given.codec.fitted else None
        expected = mean if own is None else float(own)
        assert abs(float(used.codec.location) - expected) < 0.2 * sd


def test_a_codec_learns_from_the_population_s_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    points, weights = torch.tensor([[0.0], [1.0], [5.0]], dtype=F64).repeat(100, 1), torch.tensor([0.5, 0.4, 0.1])
    begin = ChainStart(points, (weights / 100).double().repeat(100), None)
    monkeypatch.setattr("pyro_sb.infer.kernels.bridge_mh.start_of_population", lambda population: begin)
    kernel = BridgeMH(conjugate, latent(PCACodec(1)), local=None, fit_options={"num_updates": 2}, num_particles=100)
    run(kernel, Y, num_samples=2)
    codec = kernel.proposals.bridge.codec
    torch.testing.assert_close(codec.location, torch.tensor([0.9], dtype=F64))
    torch.testing.assert_close(codec.scales, torch.tensor([(2.9 - 0.81) ** 0.5], dtype=F64))


@pytest.mark.parametrize("options", [{}, {"num_proposals": 4}, {"local": None}])
def test_modes_with_the_wrong_shares_are_repaired(options: dict) -> None:
    draws = torch.randn(1000, 2, dtype=F64)
    draws[:, 0] += torch.where(torch.arange(1000) < 800, -5.0, 5.0)  # the truth has 30 % there
    kernel = BridgeMH(potential_fn=two_modes_potential, bridge=light(draws, 2), **options)
    start = {"z": draws[:64].clone()}
    mcmc = run(kernel, initial_params=start)
    n_eff = float(mcmc.diagnostics()["z"]["n_eff"][0])
    assert abs(share_of_first_mode(mcmc) - 0.3) < 4 * math.sqrt(0.21 / n_eff)
    if "num_proposals" in options:
        assert float(mcmc.diagnostics()["acceptance bridge"]["chain 0"]) > 0.6


def test_a_poor_bridge_starts_from_a_population_and_warns() -> None:
    kernel = BridgeMH(conjugate, light(40.0 + torch.randn(200, 1, dtype=F64)))
    with pytest.warns(RuntimeWarning, match=r"The bridge's own move accepts 0\.0"):
        mcmc = run(kernel, Y)
    check_posterior_of_conjugate(mcmc)
    assert kernel.population is not None and kernel.frozen.probabilities["bridge"] == pytest.approx(0.1)


def test_statistics_and_figures_of_each_move() -> None:
    kernel = BridgeMH(conjugate, off(), bridge_probability=0.7)
    mcmc = run(kernel, Y)
    moves = mcmc.sample_stats["move"][0]
    assert set(moves.tolist()) == {0, 2} and abs(float((moves == 0).double().mean()) - 0.7) < 0.15
    figures = mcmc.diagnostics()
    assert 0.5 < figures["acceptance bridge"]["chain 3"] < 1.0 and 0.5 < figures["acceptance local"]["chain 3"] <= 1.0
    assert figures["probability bridge"]["chain 0"] == 0.7
    assert 0.3 < figures["effective share"]["chain 0"] <= 1 and figures["k_hat"]["chain 0"] < 0.7
    assert "bridge: effective share" in kernel.describe() and "before" in BridgeMH(conjugate).describe()
    assert mcmc.evaluations.density > 200 * 64 * 0.6


def test_a_float32_bridge_and_single_steps() -> None:
    mean, sd = posterior()
    bridge = light(mean + 1.3 * sd * torch.randn(500, 1))
    seen = []
    mcmc = run(BridgeMH(conjugate, bridge), Y, num_samples=100, hook_fn=lambda *args: seen.append(args[3]))
    assert mcmc.get_samples()["mu"].dtype == F64 and len(seen) == 132
    assert abs(float(mcmc.get_samples()["mu"].mean()) - mean) < 0.1 * sd


def test_one_chain_in_pyros_own_runner() -> None:
    kernel = BridgeMH(conjugate, off())
    mcmc = pyro_mcmc.MCMC(kernel, num_samples=300, warmup_steps=10, disable_progbar=True)
    mcmc.run(Y)
    mean, sd = posterior()
    assert abs(float(mcmc.get_samples()["mu"].mean()) - mean) < 0.35 * sd
    assert {"acceptance bridge", "k_hat", "divergences"} <= set(mcmc.diagnostics())


def test_a_kernel_travels() -> None:
    kernel = BridgeMH(conjugate, off())
    run(kernel, Y, num_samples=5)
    again = pickle.loads(pickle.dumps(kernel))
    assert again.frozen.probabilities == kernel.frozen.probabilities
    check_posterior_of_conjugate(run(again, Y))


@pytest.mark.filterwarnings("ignore:.*has not converged:RuntimeWarning")  # the model corrects any fit
@pytest.mark.parametrize("kind", ["light", pytest.param("vsdm", marks=pytest.mark.slow)])
def test_a_conditioned_posterior_proposes(kind: str) -> None:
    torch.set_default_dtype(F64)
    amortised = AmortizedPosterior(open_models.iid, bridge=kind)
    amortised.fit(num_simulations=400, progress=False, num_updates=150, num_copies=0)
    if kind == "vsdm":
        amortised.bridge.sampler = Sampler(path_steps=4)
    y = torch.tensor([0.3, -0.4, 1.0, 0.6, 0.5])
    conditioned = amortised.condition(y)
    kernel = BridgeMH(bridge=conditioned)
    mcmc = run(kernel, num_samples=60)
    mean, sd = 20 / 21 * float(y.mean()), 21**-0.5  # as in test_refresh
    n_eff = float(mcmc.diagnostics()["mu"]["n_eff"])
    assert abs(float(mcmc.get_samples()["mu"].mean()) - mean) < 4 * sd / math.sqrt(n_eff)
    assert kernel.frozen.acceptance["bridge"] > 0.3
    if kind == "light":
        with pytest.raises(ValueError, match="one observation, got a posterior of 2"):
            BridgeMH(bridge=amortised.condition(torch.stack([y, y])))
        with pytest.raises(ValueError, match="latent sites, got 1 numbers .mu 1. for a model of 2 .a 1, b 1."):
            run(BridgeMH(two_sites, conditioned))


def two_sites() -> None:
    pyro.sample("a", dist.Normal(torch.zeros((), dtype=F64), 1.0))
    pyro.sample("b", dist.Normal(torch.zeros((), dtype=F64), 1.0))


def test_a_conditional_bridge_takes_one_context() -> None:
    mean, sd = posterior()
    context = torch.randn(400, 1, dtype=F64)
    bridge = LightSB(1, num_components=2, context_dim=1, hidden=(16,))
    with pytest.raises(ValueError, match="must be fitted before"):
        BridgeMH(conjugate, bridge, context=[0.0])
    bridge.fit(mean + context + sd * torch.randn(400, 1, dtype=F64), context=context, num_updates=100, progress=False)
    with pytest.raises(ValueError, match=r"context_dim 1, got no context. Write BridgeMH\(model, bridge, context=y\)"):
        BridgeMH(conjugate, bridge)
    with pytest.raises(ValueError, match=r"one context of shape \(1,\), got \(3, 1\)"):
        BridgeMH(conjugate, bridge, context=torch.zeros(3, 1))
    with pytest.raises(ValueError, match="context_dim 0, got a context"):
        BridgeMH(conjugate, off(), context=[0.0])
    kernel = BridgeMH(conjugate, bridge, context=[0.0])
    check_posterior_of_conjugate(run(kernel, Y))
    assert kernel.frozen.acceptance["bridge"] > 0.5


def test_a_bridge_of_another_dimension_is_refused_with_both_numbers_and_the_sites() -> None:
    with pytest.raises(ValueError, match="got dim 3 for a model of 2: a 1, b 1"):
        run(BridgeMH(two_sites, LightSB(3)))
    with pytest.raises(ValueError, match="got dim 1 for a model of 2: a 1, b 1"):
        run(BridgeMH(two_sites, off()))
    with pytest.raises(ValueError, match="got dim 5 for a model of 2"):
        run(BridgeMH(two_sites, lambda dim: LightSB(5)))


def test_a_latent_bridge_that_cannot_keep_the_model_whole_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for made in (latent(PCACodec(3)), LatentBridge(LightSB(3), PCACodec())):
        with pytest.raises(
            ValueError, match=r"dim 3 for a model of 2: a 1, b 1. Write LatentBridge\(LightSB\(2\), PCA"
        ):
            run(BridgeMH(two_sites, made))
    codec = PCACodec(1)
    codec.fit(torch.randn(50, 2, dtype=F64))
    for lossy in (LatentBridge(LightSB(1), codec), LatentBridge(LightSB(2), AutoencoderCodec(2)), LatentBridge()):
        with pytest.raises(NotImplementedError, match=r"Codec.* is lossy.*PCACodec\(.*Bridges that have one: LightSB"):
            BridgeMH(two_sites, lossy)
    monkeypatch.setattr(SmoothedBridge, "fit", lambda *args, **options: FitHistory())
    unscaled = LatentBridge(codec=PCACodec())  # keeps one direction of two, which only its fit can tell
    with pytest.raises(NotImplementedError, match=r"PCACodec \(2 to 1 dimensions\) is lossy.*: PCACodec\(2\)"):
        run(BridgeMH(uneven, unscaled, num_particles=100))


def uneven() -> None:
    pyro.sample("a", dist.Normal(torch.zeros((), dtype=F64), 1.0))
    pyro.sample("b", dist.Normal(torch.zeros((), dtype=F64), 100.0))


def test_bridges_without_a_density_are_refused_by_names_of_those_with_one() -> None:
    with pytest.raises(NotImplementedError, match='data-aware.*scheme="plain".*LightSB, LightSBM.*VSDM, SGM, Smoo'):
        BridgeMH(conjugate, KernelLangevinBridge(1))
    with pytest.raises(NotImplementedError, match='data-aware.* and PCACodec has none. Of its schemes only "plain"'):
        BridgeMH(conjugate, LatentBridge(KernelLangevinBridge(1), PCACodec(1)))
    from_draws = LightSB(1, num_components=2)
    from_draws.fit(torch.randn(100, 1), torch.randn(100, 1), num_updates=2, progress=False)
    with pytest.raises(NotImplementedError, match="Give a distribution as source, or omit the source"):
        BridgeMH(conjugate, from_draws)
    with pytest.raises(NotImplementedError, match="LatentBridge with a bijective codec"):
        run(BridgeMH(conjugate, KernelLangevinBridge), Y)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"local": "nuts"}, 'local must be "hmc", "mala" or None'),
        ({"num_proposals": 0}, "num_proposals must be a whole number of at least 1, got 0"),
        ({"num_paths": 1.5}, "num_paths must be a whole number"),
        ({"num_particles": 10}, "num_particles must be a whole number of at least 50"),
        ({"bridge_probability": 1.0}, r"bridge_probability must lie in \(0, 1\)"),
        ({"bridge_probability": 0.5, "local": None}, "beside a local move"),
        ({"start": "here"}, "start must be"),
        ({"reparam": "always"}, "reparam must be"),
        ({"bridge": "LightSB"}, "bridge must be a Bridge, a function from the dimension"),
    ],
)
def test_bad_options_are_refused_at_the_door(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BridgeMH(conjugate, **options)


def test_options_that_a_bridge_would_not_use_are_refused() -> None:
    """A law instead of its bridge; options of a fit that is over; paths of a bridge that has none."""
    bridge = off(200)
    with pytest.raises(ValueError, match=r"not BridgeMH\(model, bridge\(\)\)"):
        BridgeMH(conjugate, bridge())
    with pytest.raises(ValueError, match=r"got \['num_updates'\] for one that is fitted"):
        BridgeMH(conjugate, bridge, fit_options={"num_updates": 5})
    with pytest.raises(ValueError, match="num_paths averages the weights of paths, got 4"):
        BridgeMH(conjugate, bridge, num_paths=4)
    for unfitted in (None, LightSB(1, num_components=2)):
        with pytest.raises(ValueError, match="num_paths averages the weights of paths, got 4"):
            BridgeMH(conjugate, unfitted, num_paths=4)
    with pytest.raises(ValueError, match="num_paths averages the weights of paths, got 4"):
        run(
            BridgeMH(
                conjugate,
                lambda dim: LightSB(dim, num_components=2),
                num_paths=4,
                num_particles=50,
                fit_options={"num_updates": 5},
            ),
            Y,
        )
    with pytest.raises(ValueError, match=r"lambda dim: LatentBridge\("):
        BridgeMH(conjugate, LatentBridge)


def test_a_model_must_come_from_somewhere() -> None:
    with pytest.raises(ValueError, match=r"Exactly one of model and potential_fn.*BridgeMH\(model\)"):
        BridgeMH(bridge=VSDM(1))
    assert Defined is BridgeMH


def a_potential(params: dict[str, Tensor]) -> Tensor:
    return params["z"].square().sum()


def test_a_potential_in_the_wrong_place_is_told_where_to_go() -> None:
    start = {"z": torch.zeros(64, 1, dtype=F64)}
    for kernel in (BridgeMH, KernelLangevin):
        with pytest.raises(ValueError, match=rf"none for 'params'. Write run\(params\); or.*{kernel.__name__}\(pot"):
            run(kernel(a_potential), initial_params=start)
    with pytest.raises(ValueError, match=r"got neither, and a function as bridge.*BridgeMH\(potential_fn=...\)"):
        BridgeMH(None, a_potential)
    with pytest.raises(ValueError, match=r"a_potential, which raised TypeError at 1.*BridgeMH\(potential_fn=...\)"):
        run(BridgeMH(conjugate, a_potential), Y)
    with pytest.raises(ValueError, match=r"which gives a int at 1.*BridgeMH\(potential_fn=...\)"):
        run(BridgeMH(conjugate, lambda dim: dim + 1), Y)
    with pytest.raises(TypeError, match="positional"):
        BridgeMH(None, None, a_potential)  # a third place would be guessed wrong
    with pytest.raises(ValueError, match=r"got a LightSB. Write BridgeMH\(model, bridge\)"):
        BridgeMH(LightSB(1))


def test_a_function_makes_one_bridge_a_run_and_a_copy_of_it_is_fitted():
    made = []

    def make(dim):
        made.append(LightSB(dim, num_components=1))
        return made[-1]

    kernel = run(BridgeMH(conjugate, make, fit_options={"num_updates": 5}), Y).kernel
    assert len(made) == 1 and not made[0].fitted and kernel.proposals.bridge.fitted


@pytest.mark.parametrize(
    "make",
    [
        lambda: None,
        lambda: LightSB(1),
        lambda: VSDM,
        lambda: latent(PCACodec(1)),
        lambda: TailMatched(LightSB(1)),
        lambda: lambda dim: LightSB(dim),
    ],
)
def test_misspelt_options_of_the_fit_are_refused_by_name_before_any_work(make: Callable) -> None:
    with pytest.raises(TypeError, match=r"\.fit .* has no option 'num_update'. Did you mean 'num_updates'"):
        kernel = BridgeMH(conjugate, make(), fit_options={"num_update": 3, "num_updates": 2})
        kernel.setup(0, Y)
    with pytest.raises(TypeError, match="is given 'weights' by its caller"):  # the kernel gives them
        kernel = BridgeMH(conjugate, make(), fit_options={"weights": None})
        kernel.setup(0, Y)
