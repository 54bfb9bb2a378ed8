"""The training loop: what it keeps, what it says, and what it refuses."""

import math
import warnings

import pytest
import torch
from torch import nn

from pyro_sb.training import Average, Best, EarlyChecks, FitHistory, cosine, train


def judged(keep_best, *losses):
    """Held-out losses in turn; where the best is kept, the start is judged first, and is the worst."""
    return iter([9.0] * keep_best + list(losses))


def parameter(value=1.0):
    return nn.Parameter(torch.tensor(value, dtype=torch.float64))


def quiet(parameters, loss, **options):
    return train(parameters, loss, **({"num_updates": 100, "learning_rate": 0.05, "progress": False} | options))


def test_it_finds_the_minimum():
    x = parameter(3.0)
    history = quiet([x], lambda: (x - 1) ** 2, num_updates=500, learning_rate=0.1)
    assert abs(float(x.detach()) - 1) < 1e-4
    assert history.converged and history.iterations == 500 and history.seconds > 0
    assert len(history.losses) == 20 and not history.validation_losses
    assert history.losses[0] > history.losses[-1]


def test_the_learning_rate_follows_a_cosine():
    # On a slope without end Adam's every update is its learning rate: the way made is their sum
    x = parameter(0.0)
    with pytest.warns(RuntimeWarning, match="converged"):
        quiet([x], lambda: -x, num_updates=50, learning_rate=0.1, final_rate=0.25)
    rates = [0.1 * cosine(step / 50, 0.25) for step in range(1, 51)]
    assert float(x.detach()) == pytest.approx(sum(rates), rel=1e-6)
    assert cosine(0.0, 0.25) == 1.0 and cosine(2.0, 0.25) == 0.25
    assert all(a > b for a, b in zip(rates, rates[1:]))


def test_the_gradient_is_clipped_over_all_parameters():
    # After a gradient of any size the next ordinary one must not be lost in Adam's second moment
    x, y, norms = parameter(0.0), parameter(0.0), []
    scale = iter([1e9] + [1.0] * 29)
    original = nn.utils.clip_grad_norm_

    def seen(parameters, clip, **options):
        original(parameters, clip, **options)
        norms.append(math.sqrt(sum(float(p.grad) ** 2 for p in parameters)))

    with pytest.MonkeyPatch.context() as patch, pytest.warns(RuntimeWarning, match="converged"):
        patch.setattr(nn.utils, "clip_grad_norm_", seen)
        quiet([x, y], lambda: -next(scale) * (3 * x + 4 * y), num_updates=30, clip=2.0, tolerance=0.01)
    assert max(norms) <= 2.0 * (1 + 1e-6) and len(norms) == 30
    assert float(x.detach()) == pytest.approx(float(y.detach()), rel=1e-4)  # one norm for all: directions are kept


@pytest.mark.parametrize("keep_best", [True, False])
def test_of_finite_data_the_lowest_validation_loss_is_kept(keep_best):
    x, losses = parameter(0.0), judged(keep_best, 3.0, 1.0, 2.0, 2.0)
    seen = []

    def validate():
        seen.append(float(x.detach()))
        return next(losses)

    history = quiet(
        [x], lambda: (x - 5) ** 2, num_updates=40, num_checks=4, validate=validate, keep_best=keep_best, tolerance=9.0
    )
    assert history.validation_losses == [3.0, 1.0, 2.0, 2.0]
    assert float(x.detach()) == seen[2 if keep_best else 3]


def test_a_start_that_nothing_betters_is_kept():
    x, losses = parameter(0.0), iter([1.0, 2.0, 3.0, 2.0, 2.0])
    quiet([x], lambda: (x - 5) ** 2, num_updates=40, num_checks=4, validate=lambda: next(losses), keep_best=True)
    assert float(x.detach()) == 0.0


def test_patience_ends_a_fit_that_no_longer_falls():
    x, losses = parameter(), judged(True, 3.0, 1.0, 2.0, 2.0, 2.0, 0.0)
    history = quiet(
        [x], lambda: x**2, num_updates=60, num_checks=6, validate=lambda: next(losses), keep_best=True, patience=3
    )
    assert len(history.validation_losses) == 5 and history.iterations == 50 and history.converged


def test_every_check_calls_back():
    x, calls = parameter(), []
    quiet([x], lambda: x**2, num_updates=45, num_checks=4, on_check=lambda: calls.append(1))
    assert len(calls) == 5  # every 11 updates, and at the end


def test_more_checks_than_updates_is_a_check_an_update():
    x = parameter()
    assert len(quiet([x], lambda: x**2, num_updates=3, tolerance=9.0).losses) == 3


def test_recorded_losses_are_means_since_the_last_check():
    values = iter(range(1, 11))
    x = parameter()
    history = quiet([x], lambda: 0 * x + next(values), num_updates=10, num_checks=3, tolerance=99.0)
    assert history.losses == [2.0, 5.0, 8.0, 10.0]


def test_a_fit_that_still_falls_warns_with_its_figure_and_the_knob():
    x, losses = parameter(), iter([8.0, 6.0, 4.0, 2.0])
    with pytest.warns(RuntimeWarning, match=r"mine has not converged.* 2 > 0\.05 nats.*Raise num_updates \(now 40\)"):
        history = quiet(
            [x], lambda: x**2, num_updates=40, num_checks=4, validate=lambda: next(losses), description="mine"
        )
    assert not history.converged


@pytest.mark.parametrize("keep_best", [True, False])
def test_a_loss_that_is_not_finite_raises_and_puts_the_checked_parameters_back(keep_best):
    x, checked, steps = parameter(3.0), [], iter(range(1, 100))

    def loss():
        return x**2 * (math.nan if next(steps) == 37 else 1.0)

    held_out = judged(keep_best, 1.0, 2.0, 3.0)  # the last checked, not the best, where the best is not asked for
    with pytest.raises(RuntimeError, match=r"finite, got nan at step 37.*learning_rate \(now 0\.05\)"):
        options = {"validate": lambda: next(held_out), "keep_best": keep_best}
        quiet([x], loss, num_checks=10, on_check=lambda: checked.append(float(x.detach())), **options)
    assert float(x.detach()) == checked[0 if keep_best else 2] and len(checked) == 3


def test_a_loss_that_is_not_finite_at_once_leaves_the_start():
    x = parameter(3.0)
    with pytest.raises(RuntimeError, match="finite, got inf at step 1"):
        quiet([x], lambda: x * math.inf)
    assert float(x.detach()) == 3.0


@pytest.mark.parametrize("keep_best", [True, False])
def test_ctrl_c_keeps_what_was_learnt_and_says_so(keep_best):
    x, steps, seen = parameter(3.0), iter(range(1, 100)), []

    def loss():
        if next(steps) == 46:
            raise KeyboardInterrupt
        seen.append(float(x.detach()))
        return (x - 1) ** 2

    held_out = judged(keep_best, 5.0, 1.0, 2.0, 3.0)
    with pytest.warns(RuntimeWarning, match="interrupted: 45 of 100 updates of mine"):
        history = quiet(
            [x], loss, num_checks=10, validate=lambda: next(held_out), keep_best=keep_best, description="mine"
        )
    assert history.iterations == 45 and not history.converged and history.seconds > 0
    assert float(x.detach()) == seen[20] if keep_best else float(x.detach()) < seen[-1]


def test_ctrl_c_before_the_first_check_keeps_the_last_update():
    x, steps = parameter(3.0), iter(range(1, 100))

    def loss():
        if next(steps) == 4:
            raise KeyboardInterrupt
        return x**2

    with pytest.warns(RuntimeWarning, match="interrupted: 3 of 100"):
        quiet([x], loss, keep_best=True)
    assert float(x.detach()) < 3.0 - 2 * 0.04


@pytest.mark.parametrize(
    "options", [{"num_updates": 0}, {"learning_rate": 0.0}, {"learning_rate": math.inf}, {"learning_rate": math.nan}]
)
def test_options_without_sense_are_refused(options):
    x = parameter()
    with pytest.raises(ValueError, match="num_updates must be at least 1|learning_rate must be positive"):
        quiet([x], lambda: x**2, **options)


def test_the_best_values_are_the_first_of_the_lowest_loss():
    x = parameter(1.0)
    best = Best([x])
    for value, loss, kept in ((2.0, 5.0, True), (3.0, 5.0, False), (4.0, math.nan, False), (5.0, 1.0, True)):
        with torch.no_grad():
            x.fill_(value)
        assert best.offer(loss) is kept
    with torch.no_grad():
        x.fill_(9.0)
    best.restore()
    assert float(x.detach()) == 5.0 and best.loss == 1.0


def test_a_history_without_residuals_has_none():
    assert math.isnan(FitHistory().residual) and FitHistory(residuals=[2.0, 1.0]).residual == 1.0


def test_a_quiet_fit_prints_nothing(capfd):
    x = parameter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet([x], lambda: x**2, tolerance=9.0)
    assert capfd.readouterr() == ("", "")


def test_the_average_follows_the_parameters_and_is_what_is_left():
    # constant gradient: x falls by its rate a step, and the average's lag settles at decay / (1 - decay) steps
    x, seen = parameter(0.0), []
    with pytest.warns(RuntimeWarning, match="converged"):
        quiet([x], lambda: seen.append(float(x.detach())) or -x, num_updates=400, final_rate=1.0, ema=0.9)
    last = seen[-1] + 0.05
    assert float(x.detach()) == pytest.approx(last - 0.05 * 0.9 / 0.1, rel=1e-3)


def test_an_early_average_weighs_recent_values_more():
    x = parameter(0.0)
    average = Average([x], 0.999)
    with torch.no_grad():
        x.fill_(1.0)
    average.update()
    assert float(average.values[0]) == pytest.approx(1 - 2 / 11)
    with average.inside():
        assert float(x.detach()) == pytest.approx(1 - 2 / 11)
    assert float(x.detach()) == 1.0
    with pytest.raises(ValueError, match="ema must lie"):
        Average([x], 1.0)


@pytest.mark.parametrize("keep_best", [True, False])
@pytest.mark.parametrize("ema", [None, 0.9])
def test_a_state_goes_on_bit_for_bit(ema, keep_best):
    def run(stop=None, resume=None):
        x, y = parameter(3.0), nn.Parameter(torch.zeros(2, dtype=torch.float64))
        states, count = [], 0 if resume is None else resume["history"]["iterations"]

        def loss():
            nonlocal count
            count += 1
            if count == stop:
                raise OSError
            return (x - torch.randn(())) ** 2 + (y - torch.randn(2)).square().sum()

        options = {"ema": ema, "keep_best": keep_best, "validate": lambda: float((x**2).detach()), "tolerance": 99.0}
        try:
            history = quiet([x, y], loss, num_checks=10, on_state=states.append, resume=resume, **options)
        except OSError:
            return states[-1]
        return x.detach().clone(), y.detach().clone(), history

    torch.manual_seed(3)
    whole = run()
    torch.manual_seed(3)
    state = run(stop=57)
    assert state["history"]["iterations"] == 50
    torch.manual_seed(4)
    rest = run(resume=state)
    assert torch.equal(whole[0], rest[0]) and torch.equal(whole[1], rest[1])
    assert whole[2].losses == rest[2].losses and rest[2].iterations == 100


def test_a_state_whose_patience_was_spent_ends_at_once():
    x, states = parameter(), []
    losses = judged(True, 3.0, 1.0, 2.0, 2.0, 2.0)
    options = {"num_updates": 60, "num_checks": 6, "keep_best": True, "patience": 3}
    whole = quiet([x], lambda: x**2, validate=lambda: next(losses), on_state=states.append, **options)
    y = parameter()
    again = quiet([y], lambda: y**2, validate=lambda: 0.0, resume=states[-1], **options)
    assert again.iterations == whole.iterations == 50 and torch.equal(x, y)


# Early checks


@pytest.mark.parametrize(("best", "updates"), [(1, 2), (2, 4), (3, 8), (4, 16)])
def test_the_best_early_look_is_gone_back_to(best, updates):
    x = nn.Parameter(torch.zeros(()))
    losses = iter([5.0] + [4.0 if k != best else 1.0 for k in range(1, 5)])
    checks = EarlyChecks([x], lambda: next(losses), every=32)
    checks.validate()  # the start
    for _ in range(32):  # a loop that counts its updates
        checks.look()
        x.data += 1
    checks.settle(FitHistory(validation_losses=[2.0]))
    assert x.item() == updates


@pytest.mark.parametrize(("start", "later"), [(0.5, 2.0), (5.0, 0.5)])
def test_early_looks_give_way_to_the_start_and_to_the_loop(start, later):
    x = nn.Parameter(torch.zeros(()))
    losses = iter([start, 1.0, 1.0, 1.0, 1.0])
    checks = EarlyChecks([x], lambda: next(losses), every=32)
    checks.validate()
    for _ in range(32):
        checks.look()
        x.data += 1
    checks.settle(FitHistory(validation_losses=[later]))
    assert x.item() == 32


def test_a_history_prints_its_numbers_and_how_it_ended():
    history = FitHistory(losses=[2.0, 1.5], validation_losses=[1.75], iterations=20, seconds=3.0)
    assert repr(history) == "FitHistory: 20 updates in 3 s, last loss 1.5, last held-out loss 1.75, not converged"
    assert repr(FitHistory(interrupted=True)).endswith("interrupted") and len(repr(FitHistory()).splitlines()) == 1
