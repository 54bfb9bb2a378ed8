"""Solvers of light bridges: their losses, their start and stops, what they judge by, and how they end early."""

import itertools
import math
import warnings
from contextlib import nullcontext

import pytest
import torch

from pyro_sb.bridges import Bridge, LightSB, LightSBBM, LightSBM
from pyro_sb.bridges.light import fit as light_fit
from pyro_sb.bridges.light import process as mixture_start
from pyro_sb.bridges.light.fit import find_solver
from pyro_sb.bridges.light.solvers import SOLVERS
from pyro_sb.ops import mixture as mixture_module
from pyro_sb.ops.mixture import MixturePotential, likelihood_loss, matching_loss
from tests.bridges.light.fits import (
    CENTRES,
    clusters,
    either,
    full_or_not,
    pairs,
    quick,
    quiet_fit,
    standard_normal,
    z_of_means,
)
from tests.ops.potentials import F64, random_potential

KEPT = "kept its start, which does not use the context"


def short_fit(**options):
    """A bridge with a network, on draws whose mean is the context's."""
    context = torch.randn(60, 3, dtype=torch.float64)
    target = context[:, :2] + 0.5 * torch.randn(60, 2, dtype=torch.float64)
    bridge = LightSB(2, num_components=2, context_dim=3, covariance="full")
    history = bridge.fit(target, context=context, progress=False, **options)
    return bridge, history


def judged(monkeypatch, losses):
    """Held-out losses as given, from the start's on."""
    losses = itertools.chain(losses, itertools.repeat(9.0))
    monkeypatch.setattr(light_fit, "held_out_loss", lambda process, ends, num=0: next(losses))


# The losses


def test_the_loss_is_the_likelihood_under_any_coupling():
    # -E log pi(x1 | x0) + E <x0, x1> / eps is the same for every pairing of the same points, and is L
    potential, x0, x1 = random_potential(2, full=True), torch.randn(64, 2, **F64), clusters(64)
    loss = likelihood_loss(potential, x0, x1)
    for _ in range(4):
        paired = x1[torch.randperm(64)]
        found = -potential.plan_log_prob(paired, x0).mean() + (x0 * paired).sum(-1).mean() / potential.epsilon
        torch.testing.assert_close(found, loss, rtol=1e-12, atol=1e-12)


@full_or_not
def test_matching_has_the_slope_of_the_likelihood(covariance, monkeypatch):
    # In expectation, at any parameters, once the cut of time is moved to where its bias is below the noise
    monkeypatch.setattr(mixture_module, "LAST_TIME", 1 - 1e-4)
    potential = random_potential(2, 3, full=covariance == "full")
    leaves = [part.clone().requires_grad_() for part in potential[:3]]
    potential = MixturePotential(*leaves, potential.epsilon)
    x0, x1 = torch.randn(512, 2, **F64), clusters(512)

    def slopes(loss):
        parts = list(torch.autograd.grad(loss, leaves))
        if covariance == "full":  # S is symmetric: only so much of its slope counts
            parts[2] = (parts[2] + parts[2].mT).tril()
        return torch.cat([part[part != 0] for part in parts])

    expected = slopes(likelihood_loss(potential, x0, x1))
    found = [slopes(matching_loss(potential, x0[torch.randperm(512)], x1[torch.randperm(512)])) for _ in range(300)]
    z = z_of_means(torch.stack(found), expected)
    assert z.abs().max() < 4
    assert (expected.abs() / torch.stack(found).std(0) * math.sqrt(300)).max() > 50  # and the slope is far from zero


def test_both_losses_have_one_slope_for_a_batch_of_contexts():
    # A row of contexts each: the mean over rows of each row's own potential
    batch, x0, x1 = random_potential(2, 3, batch=(5,)), torch.randn(5, 1, 2, **F64), torch.randn(5, 1, 2, **F64)
    rows = [
        likelihood_loss(MixturePotential(*(part[i] for part in batch[:3]), batch.epsilon), x0[i], x1[i])
        for i in range(5)
    ]
    torch.testing.assert_close(likelihood_loss(batch, x0, x1), torch.stack(rows).mean(), rtol=1e-12, atol=1e-12)


def test_the_loss_is_minus_the_density_of_what_was_held_out():
    target, context = pairs()
    held = torch.arange(400) % 4 == 0
    bridge = LightSB(2, num_components=3, epsilon=0.5, context_dim=3, covariance="full", hidden=(16, 16))
    history = quiet_fit(bridge, target, context=context, held_out=held)
    # units of the bridge are those of the data over a scale: the losses differ by dim log scale
    mean = float(bridge(context[held]).log_prob(target[held]).mean()) + 2 * float(bridge.scale.log())
    assert min(history.validation_losses) == pytest.approx(-mean, abs=1e-6)


# Moment steps


@full_or_not
def test_moment_steps_give_the_training_moments_exactly(covariance):
    # Where they stand still the plan carries the source's draws to the mean and the variances of the target's
    target, source = clusters(500), 0.5 + torch.randn(400, 2, **F64)
    bridge = LightSB(2, num_components=3, epsilon=0.5, covariance=covariance)
    history = bridge.fit(target, source, solver="moments", held_out=0.0, progress=False)
    assert history.converged and history.iterations == len(history.losses) == len(history.validation_losses)
    mean, cov = bridge.plan_moments(source)
    torch.testing.assert_close(mean.mean(0), target.mean(0), rtol=0, atol=5e-3)
    total = (cov + mean[:, :, None] * mean[:, None, :]).mean(0)
    second = target.T @ target / len(target)
    if covariance == "diagonal":
        total, second = total.diagonal(), second.diagonal()
    torch.testing.assert_close(total, second, rtol=0, atol=2e-2)


def test_moment_steps_and_adam_agree():
    target, source, losses = clusters(3000), torch.randn(3000, 2, **F64), []
    for solver, steps in (("likelihood", 400), ("moments", None)):
        torch.manual_seed(1)  # the same draws are held out
        bridge = LightSB(2, num_components=3, epsilon=0.5)
        history = bridge.fit(target, source, solver=solver, num_updates=steps, learning_rate=0.02, progress=False)
        losses.append(min(history.validation_losses))
    assert abs(losses[0] - losses[1]) < 0.01


@pytest.mark.parametrize("solver", ["moments", "likelihood"])
def test_weights_are_duplicated_rows(solver):
    target, source = clusters(200), torch.randn(200, 2, **F64)
    counts = torch.randint(0, 4, (200,))
    counts[target[:, 0] > 0] *= 3  # far from equal between the clusters
    options = {"solver": solver, "held_out": 0.0, "num_updates": 100, "num_law_draws": 4000}
    torch.manual_seed(1)
    weighted = quick(LightSB(2, num_components=3, epsilon=0.5), target, source, weights=counts.double(), **options)
    torch.manual_seed(1)
    repeated = quick(LightSB(2, num_components=3, epsilon=0.5), target.repeat_interleave(counts, 0), source, **options)
    torch.testing.assert_close(weighted.location, repeated.location, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weighted.scale, repeated.scale, rtol=1e-12, atol=1e-12)
    x0 = torch.randn(50, 2, **F64)
    gap = weighted.plan_moments(x0)[0].mean(0) - repeated.plan_moments(x0)[0].mean(0)
    assert gap.abs().max() < (0.15 if solver == "moments" else 0.3)
    draws = [bridge().sample((4000,)) for bridge in (weighted, repeated)]
    shares = [(torch.cdist(d, CENTRES).argmin(1) == 0).double().mean() for d in draws]
    wanted = counts[target[:, 0] > 0].sum() / counts.sum()
    assert all(abs(share - wanted) < 0.06 for share in shares)


def test_with_nothing_held_out_the_judge_goes_by_the_weights():
    # held_out=0 judges by all draws, by their weights: the loss of duplicated rows, up to the judge's resampling
    target, source = clusters(3000), torch.randn(300, 2, **F64)
    counts = torch.ones(3000, dtype=torch.long)
    counts[target[:, 0] > 0] = 9
    losses = []
    for draws, weights in ((target, counts.double()), (target.repeat_interleave(counts, 0), None)):
        bridge = LightSB(2, num_components=1, epsilon=0.5)  # one component: the same potential for both
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            options = {"weights": weights, "solver": "moments", "held_out": 0.0, "num_updates": 2}
            history = bridge.fit(draws, source, progress=False, **options)
        assert history.losses[-1] == pytest.approx(losses[0][0] if losses else history.losses[-1], abs=1e-8)
        losses.append((history.losses[-1], history.validation_losses[-1]))
    assert losses[1][1] == pytest.approx(losses[1][0], abs=1e-8)  # all draws, however many
    assert losses[0][1] == pytest.approx(losses[0][0], abs=1e-8)


@pytest.mark.parametrize("epsilon", [1e-2, 1e-8])
def test_one_component_is_exact_at_any_epsilon(epsilon):
    z = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(400, **F64) + 0.5) / 400)[:, None]
    bridge = LightSB(1, num_components=1, epsilon=epsilon)
    with pytest.warns(RuntimeWarning) if epsilon < 1e-3 else nullcontext():
        bridge.fit(2 * z, z, solver="moments", held_out=0.0, progress=False)
    assert abs(bridge.transport(z).std() / (2 * z).std() - 1) < 0.02


def test_a_saturated_epsilon_warns():
    with pytest.warns(RuntimeWarning, match=r"epsilon is .* below 0.001: gates saturate.*Raise epsilon"):
        LightSB(1, num_components=2, epsilon=1e-5).fit(
            torch.randn(99, 1), torch.randn(99, 1), num_updates=2, progress=False
        )


# Stops and checks


@either
def test_ctrl_c_keeps_what_was_learnt(make, tmp_path, monkeypatch):
    kind = type(make.solvers[make.default_solver])
    bridge, original, calls = make(2, num_components=3, epsilon=0.5), kind.loss, iter(range(1, 1000))

    def loss(self, *args):
        if next(calls) == 60:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(kind, "loss", loss)
    with pytest.warns(RuntimeWarning, match=rf"interrupted: 59 of 200 updates of {make.__name__}"):
        history = bridge.fit(
            clusters(300), standard_normal(), num_updates=200, checkpoint=tmp_path / "stopped.pt", progress=False
        )
    assert history.iterations == 59 and not history.converged
    loaded = Bridge.load(tmp_path / "stopped.pt")
    x = torch.randn(5, 2, **F64)
    assert torch.equal(loaded.drift(0.5, x), bridge.drift(0.5, x))
    assert torch.isfinite(bridge().draws((10,)).log_q).all()


@either
def test_a_loss_that_is_not_finite_raises_and_leaves_a_bridge_that_works(make, monkeypatch):
    kind = type(make.solvers[make.default_solver])
    bridge, original, calls = make(2, num_components=3, epsilon=0.5), kind.loss, iter(range(1, 1000))

    def loss(self, *args):
        return original(self, *args) * (math.nan if next(calls) == 30 else 1.0)

    monkeypatch.setattr(kind, "loss", loss)
    with pytest.raises(RuntimeError, match="finite, got nan at step 30.*learning_rate"):
        bridge.fit(clusters(300), num_updates=100, progress=False)
    assert all(bool(torch.isfinite(p).all()) for p in bridge.parameters())
    assert torch.isfinite(bridge().draws((10,)).log_q).all()


def test_a_checkpoint_is_the_fitted_bridge(tmp_path):
    for solver in ("likelihood", "moments"):
        path = tmp_path / f"{solver}.pt"
        bridge = quick(LightSB(2, num_components=3, epsilon=0.5, covariance="full"), solver=solver, checkpoint=path)
        x = torch.randn(5, 2, **F64)
        assert torch.equal(Bridge.load(path)().log_prob(x), bridge().log_prob(x))


def test_a_fit_that_has_not_converged_says_by_how_much_and_what_to_do():
    with pytest.warns(RuntimeWarning, match="moment steps have not converged.*after 3.*Raise num_updates"):
        LightSB(2, num_components=3, epsilon=0.5).fit(
            clusters(300), standard_normal(), solver="moments", num_updates=3, progress=False
        )
    context = torch.randn(300, 1, **F64)
    with pytest.warns(
        RuntimeWarning, match=r"LightSB has not converged: its loss fell by .* Raise num_updates \(now 40\)"
    ):
        LightSB(1, num_components=2, epsilon=0.1, context_dim=1).fit(
            3 * context + 0.1 * torch.randn(300, 1, **F64),
            context=context,
            num_updates=40,
            learning_rate=0.02,
            progress=False,
        )


@pytest.mark.parametrize("options", [{"num_updates": 0}, {"learning_rate": 0.0}, {"batch_size": 0}], ids=str)
def test_a_refused_fit_leaves_the_bridge_as_it_was(options):
    bridge = LightSB(2, num_components=2)
    bridge.fit(torch.randn(100, 2), num_updates=5, progress=False)
    before = {key: value.clone() for key, value in bridge.state_dict().items() if torch.is_tensor(value)}
    with pytest.raises(ValueError, match=next(iter(options))):
        bridge.fit(5 + torch.randn(100, 2), progress=False, **options)
    assert all(torch.equal(before[key], bridge.state_dict()[key]) for key in before)


def test_a_fit_that_fails_before_it_learns_leaves_the_bridge_as_it_was(monkeypatch):
    bridge = LightSBBM(2, num_components=2, beta=4.0)
    bridge.fit(torch.randn(100, 2, **F64), num_updates=5, progress=False)
    x = torch.randn(4, 2, **F64)
    before = bridge().log_prob(x)

    def fails(*args, **kwargs):
        raise RuntimeError("no clusters")

    monkeypatch.setattr(mixture_start, "_clusters", fails)
    with pytest.raises(RuntimeError, match="no clusters"):
        bridge.fit(7 + torch.randn(100, 2, **F64), torch.randn(100, 2, **F64), progress=False)
    assert bridge.density == "marginal"
    torch.testing.assert_close(bridge().log_prob(x), before, rtol=0, atol=0)


def test_a_bridge_that_kept_its_start_says_so_with_figures_and_knobs(monkeypatch):
    judged(monkeypatch, [1.5, 2.5])
    with pytest.warns(RuntimeWarning, match=KEPT) as caught:
        bridge, _ = short_fit(num_updates=40, learning_rate=0.02)
    said = next(str(w.message) for w in caught if KEPT in str(w.message))
    for part in ("1.5 nats", "11 checks, at best 2.5", "54 draws", "dropout 0", "learning_rate 0.02", "num_updates 40"):
        assert part in said
    assert caught[0].filename == __file__
    one, other = torch.randn(2, 3, dtype=torch.float64)
    points = torch.randn(5, 2, dtype=torch.float64)
    torch.testing.assert_close(bridge(one).log_prob(points), bridge(other).log_prob(points))  # what the text claims


@pytest.mark.parametrize("losses", [[1.5, 1.0], [1.5, 2.0, 2.0, 1.0]])
def test_a_bridge_that_learnt_something_keeps_silent(losses, monkeypatch):
    judged(monkeypatch, losses)
    bridge, _ = short_fit(num_updates=100)
    one, other = torch.randn(2, 3, dtype=torch.float64)
    points = torch.randn(5, 2, dtype=torch.float64)
    assert not torch.equal(bridge(one).log_prob(points), bridge(other).log_prob(points))


def test_a_context_that_tells_nothing_is_no_cause_to_warn(monkeypatch):
    judged(monkeypatch, [1.5, *[1.54] * 50])
    short_fit(num_updates=40)


def test_a_bridge_without_context_keeps_its_start_in_silence(monkeypatch):
    judged(monkeypatch, [1.5, 2.5])
    LightSB(2, num_components=1).fit(torch.randn(60, 2), num_updates=40, progress=False)


def test_early_looks_leave_the_loop_as_it_is(monkeypatch):
    runs = []
    for shares in ((2, 4, 8, 16), ()):
        monkeypatch.setattr("pyro_sb.training.SHARES", shares)
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            runs.append(short_fit(num_updates=160)[1])
    assert runs[0].losses == runs[1].losses and runs[0].validation_losses == runs[1].validation_losses


def test_patience_ends_a_fit_that_gets_no_better(monkeypatch):
    judged(monkeypatch, [1.5, 1.0])  # checks of the loop, one in five updates, are all worse than its start
    assert short_fit(num_updates=100, patience=3)[1].iterations == 15
    with pytest.raises(ValueError, match="patience must be at least 1, got 0"):
        short_fit(num_updates=10, patience=0)


# What is refused


def test_what_has_no_network_refuses_a_context():
    options = {"context": torch.randn(100, 1, **F64), "progress": False}
    with pytest.raises(ValueError, match='solver="moments" has no network'):
        LightSB(2, num_components=3, context_dim=1).fit(clusters(100), solver="moments", **options)
    with pytest.raises(ValueError, match="target must be draws where there is a context"):
        LightSB(2, num_components=3, context_dim=1).fit(standard_normal(), **options)


@pytest.mark.parametrize("make", [LightSB, LightSBM, LightSBBM])
def test_solvers_serve_the_bridges_that_name_them_and_old_names_say_the_new_ones(make):
    bridge, default = make(2), make.default_solver
    own = ["moments", "dual", "alternating"] if make is LightSBBM else ["likelihood", "matching", "moments"]
    assert find_solver(bridge, None).name == default
    for name, solver in SOLVERS.items():
        if name in own:
            assert find_solver(bridge, name) is solver and solver.name == name
        else:
            with pytest.raises(ValueError, match=f"{make.__name__}'s solver must be one of .* got '{name}'"):
                find_solver(bridge, name)
    for old, new in {"em": "moments", "batch": "moments", "adam": default}.items():
        with pytest.raises(ValueError, match=f"got '{old}'. Write solver=\"{new}\""):
            bridge.fit(clusters(50), solver=old)


@pytest.mark.parametrize("make", [LightSB, LightSBM, LightSBBM])
def test_a_misspelt_option_is_an_error(make):
    for option in ("num_steps", "num_draws", "lr"):
        with pytest.raises(TypeError, match=option):
            make(2).fit(clusters(50), **{option: 3})


@pytest.mark.parametrize("solver", ["likelihood", "matching", "moments"])
def test_a_solver_makes_the_same_bridge_of_every_class(solver):
    target, x, found = clusters(100), torch.randn(5, 2, **F64), []
    for make in (LightSB, LightSBM):
        torch.manual_seed(1)
        found.append(quick(make(2, num_components=3), target, solver=solver)().log_prob(x))
    assert torch.equal(*found)
