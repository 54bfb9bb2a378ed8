"""Options of a fit: a misspelt one is refused by name before anything is simulated, and never reaches the model."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_sb.bridges import VSDM, LightSB
from pyro_sb.infer import AmortizedPosterior

CALLS = []


def model(scale=1.0):
    CALLS.append(scale)
    mu = pyro.sample("mu", dist.Normal(0.0, scale))
    pyro.sample("y", dist.Normal(mu, 0.5))


def model_of_keywords(**options):
    CALLS.append(options)
    model(options.get("spread", 1.0))


class Module(pyro.nn.PyroModule):
    def forward(self, scale=1.0):
        model(scale)


@pytest.fixture(autouse=True)
def no_calls():
    CALLS.clear()


@pytest.mark.parametrize(
    ("open_model", "options", "message"),
    [
        (model, {"num_simulatons": 500}, r"no option 'num_simulatons'.*Write num_simulations="),
        (model, {"num_update": 5}, r"no option 'num_update'.*Write num_updates="),
        (model_of_keywords, {"num_simulatons": 500}, r"no option 'num_simulatons'.*Write num_simulations="),
        (Module(), {"num_copie": 0}, r"no option 'num_copie'.*Write num_copies="),
        (functools.partial(model, scale=1.0), {"mising": 0.5}, r"no option 'mising'.*Write missing="),
        (model, {"colour": 3}, r"no option 'colour', and neither has the model.*the model's: \['scale'\]"),
        (model, {"batch_size": 64}, r"got 'batch_size'. Write bridge_options={'batch_size': \.\.\.}"),
        (model_of_keywords, {"patience": 4}, r"got 'patience'. Write bridge_options={'patience': \.\.\.}"),
        (
            model,
            {"bridge_options": {"learning_rat": 1.0}},
            "'learning_rat'. Did you mean 'learning_rate'",
        ),
        (
            model,
            {"bridge_options": {"colour": 1.0}},
            r"LightSB.fit .* no option 'colour'. It takes batch_",
        ),
    ],
)
def test_a_misspelt_option_is_refused_before_the_model_runs(open_model, options, message):
    with pytest.raises(TypeError, match=message):
        AmortizedPosterior(open_model, bridge="light").fit(**options)
    assert not CALLS


def test_an_option_must_be_known_to_every_bridge_that_is_tried():
    with pytest.raises(TypeError, match="VSDM.fit .* has no option 'solver'"):
        AmortizedPosterior(model).fit(bridge_options={"solver": "likelihood"})
    with pytest.raises(TypeError, match="LightSB.fit .* has no option 'epoch'"):
        AmortizedPosterior(model, bridge=LightSB).fit(bridge_options={"epoch": 3})


@pytest.mark.parametrize("name", ["context", "weights", "checkpoint", "held_out", "progress"])
@pytest.mark.parametrize("bridge", ["light", VSDM, lambda dim, context_dim: VSDM(dim, context_dim=context_dim)])
def test_an_option_that_the_posterior_gives_itself_is_refused_before_the_model_runs(name, bridge):
    CALLS.clear()
    with pytest.raises(TypeError, match=f"is given '{name}' by its caller"):
        AmortizedPosterior(model, bridge=bridge).fit(bridge_options={name: None})
    assert not CALLS


@pytest.mark.filterwarnings("ignore:.*has not converged")
def test_the_models_own_arguments_reach_it():
    small = {"num_simulations": 60, "num_updates": 5, "num_copies": 0, "progress": False}
    for open_model, options in (
        (model, {"scale": 2.0}),
        (model_of_keywords, {"spread": 2.0}),
        (Module(), {"scale": 2.0}),
    ):
        CALLS.clear()
        AmortizedPosterior(open_model, bridge="light").fit(**small, **options)
        assert CALLS and all(call in (2.0, {"spread": 2.0}) for call in CALLS)


@pytest.mark.filterwarnings("ignore:Pareto k", "ignore:.*has not converged")
def test_what_is_made_prints_itself():
    amortized = AmortizedPosterior(model, bridge="light")
    assert repr(amortized) == "AmortizedPosterior of model given y: not fitted, to learn with light"
    amortized.fit(num_simulations=60, num_updates=5, num_copies=0, progress=False)
    text = repr(amortized)
    assert "latents: mu ()" in text and "fitted: LightSB" in text and "on 60 simulations" in text
    assert repr(amortized.simulations) == "Simulations: 60 pairs of 1 unconstrained latents and 1 numbers observed"
    one, many = amortized.condition(torch.tensor(0.5)), amortized.condition(torch.zeros(3))
    assert "Posterior of mu ()" in repr(one) and "given one observation of y (1 numbers)" in repr(one)
    assert "given 3 observations" in repr(many)
    for posterior in (one, many):
        draws = repr(posterior.importance(200))
        assert draws.startswith("ImportanceDraws: 200 weighted draws of mu ()") and "Pareto k" in draws
    for text in (repr(amortized), repr(one), repr(many), draws):
        assert len(text.splitlines()) <= 10 and max(map(len, text.splitlines())) < 160
