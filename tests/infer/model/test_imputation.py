"""``obs_mask``: what is missing is a latent and nothing else is, whatever the mask and the site."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_sb.infer.model.imputation import FreeEntries, Gap
from pyro_sb.infer.model.log_joint import log_joint
from pyro_sb.infer.model.matrices import CholeskyVector, PositiveDefiniteVector


@pytest.fixture(autouse=True)
def in_float64():
    torch.set_default_dtype(torch.float64)


LAWS = {
    "normal": (lambda a: dist.Normal(a, 2.0), lambda: torch.linspace(-1, 2, 4)),
    "positive": (lambda a: dist.Gamma(2.0, a.exp()), lambda: torch.linspace(0.3, 2, 4)),
    "bounds by entry": (
        lambda a: dist.Uniform(torch.arange(4.0), 2 + torch.arange(4.0)),
        lambda: torch.arange(4.0) + 0.7,
    ),
    "vectors": (
        lambda a: dist.Normal(a[..., None], torch.ones(3)).to_event(1),
        lambda: torch.linspace(0, 1, 12).view(4, 3),
    ),
    "shares": (lambda a: dist.Dirichlet(a.exp()[..., None] * torch.ones(3)), lambda: torch.full((4, 3), 1 / 3)),
    "correlated": (
        lambda a: dist.MultivariateNormal(a[..., None] * torch.ones(2), torch.eye(2) + 0.5),
        lambda: torch.linspace(-1, 1, 8).view(4, 2),
    ),
}
MASKS = {"some": [True, False, True, False], "all there": [True] * 4, "all missing": [False] * 4}


def followed_by_data(law, **given):
    """Entries of y, and data that depend on them."""
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 4):
        fn = law(a)
        y = pyro.sample("y", fn, **given)
        pyro.sample("x", dist.Normal(y.square().sum(-1) if fn.event_dim else y, 1.0), obs=torch.zeros(4))


@pytest.mark.parametrize("there", MASKS)
@pytest.mark.parametrize("name", LAWS)
def test_the_log_joint_does_not_care_which_entries_are_data(name, there):
    law, y, seen = LAWS[name][0], LAWS[name][1](), torch.tensor(MASKS[there])
    rows = (4, *[1] * (y.dim() - 1))
    joint = log_joint(
        followed_by_data, args=(law,), kwargs={"obs": y.where(seen.view(rows), torch.nan), "obs_mask": seen}
    )
    z = joint.start(3)
    value, grad = joint.value_and_grad(z)
    assert joint.route == "plate" and (grad != 0).all()
    for row, found in zip(z, value, strict=True):
        sites = joint.constrain(row)
        whole = sites.get("y_unobserved", y)
        assert torch.equal(whole[seen], y[seen])
        trace = poutine.trace(poutine.condition(followed_by_data, {"a": sites["a"], "y": whole})).get_trace(law)
        moved = sum(t.log_abs_det_jacobian(sites[k], joint.unpack(row)[k]).sum() for k, t in joint.transforms.items())
        torch.testing.assert_close(found, trace.log_prob_sum() - moved, rtol=1e-10, atol=1e-10)


def coins(y, seen):
    p = pyro.sample("p", dist.Beta(2.0, 1.0))
    with pyro.plate("data", len(y)):
        y = pyro.sample(
            "y", dist.Categorical(torch.stack([p / 2, p / 2, 1 - p], -1)[..., None, :]), obs=y, obs_mask=seen
        )
        pyro.deterministic("copy", 1.0 * y)
        pyro.sample("x", dist.Normal(y, 1.0), obs=torch.tensor([0.1, 1.2, 1.7]))


def test_masked_discrete_entries_are_no_sums():
    # density of y = (0, ., 2): the middle one summed over its three values, the others once
    joint = log_joint(coins, args=(torch.tensor([0, 0, 2]), torch.tensor([True, False, True])))
    p, x = torch.tensor(0.4), torch.tensor([0.1, 1.2, 1.7])
    share = torch.stack([p / 2, p / 2, 1 - p])
    seen = share[[0, 2]].log().sum() + dist.Normal(torch.tensor([0.0, 2.0]), 1.0).log_prob(x[[0, 2]]).sum()
    middle = (share.log() + dist.Normal(torch.arange(3.0), 1.0).log_prob(x[1])).logsumexp(0)
    expected = dist.Beta(2.0, 1.0).log_prob(p) + (p * (1 - p)).log() + seen + middle
    torch.testing.assert_close(joint.log_prob(p.logit().reshape(1, 1))[0], expected)


def test_discrete_draws_hold_the_data_and_agree_with_what_is_made_of_them():
    joint = log_joint(coins, args=(torch.tensor([0, 0, 2]), torch.tensor([True, False, True])))
    z = torch.zeros(4000, 1)
    drawn = joint.discrete(z)
    values = drawn["y_unobserved"]
    assert (values[:, 0] == 0).all() and (values[:, 2] == 2).all()
    torch.testing.assert_close(joint.deterministic(z, drawn)["copy"], values.double())
    weights = torch.tensor([0.25, 0.25, 0.5]).log() + dist.Normal(torch.arange(3.0), 1.0).log_prob(torch.tensor(1.2))
    share = torch.nn.functional.one_hot(values[:, 1], 3).double().mean(0)
    p = weights.softmax(0)
    assert ((share - p).abs() < 4.5 * (p * (1 - p) / 4000).sqrt()).all()


def counts(y, seen):
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Poisson(rate), obs=y, obs_mask=seen)


def test_counts_need_all_their_data():
    y = torch.tensor([1.0, 3.0])
    joint = log_joint(counts, args=(y, torch.tensor([True, True])))
    z = torch.linspace(-3, 3, 7)[:, None]
    torch.testing.assert_close(
        joint.log_prob(z).diff(), (6 * z[:, 0] - 3 * z[:, 0].exp()).diff()
    )  # Gamma(2 + 4, 1 + 2)
    with pytest.raises(NotImplementedError, match="'y_unobserved' must have a finite support"):
        log_joint(counts, args=(y, torch.tensor([True, False])))


@pytest.mark.parametrize("shape", [(3, 4), (4,), (3, 1)])
def test_masks_smaller_than_their_plates(shape):
    seen = torch.arange(torch.Size(shape).numel()).reshape(shape) % 2 == 0

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 3, dim=-2), pyro.plate("columns", 4, dim=-1):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y, obs_mask=seen)

    joint = log_joint(model, args=(torch.zeros(3, 4),))
    assert joint.dim == 1 + int((~seen).expand(3, 4).sum()) and joint.route == "plate"
    z = torch.randn(2, joint.dim)
    expected = -(z[:, 0] ** 2) / 2 - ((z[:, 1:] - z[:, :1]) ** 2).sum(-1) / 2 - (13 - joint.dim) * z[:, 0] ** 2 / 2
    torch.testing.assert_close(joint.log_prob(z).diff(), expected.diff())


def test_entries_that_a_mask_leaves_out_are_neither():
    def model(y, seen, counted):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 4), poutine.mask(mask=counted):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y, obs_mask=seen)

    args = torch.zeros(4), torch.tensor([True, False, True, False]), torch.tensor([True, True, False, False])
    assert log_joint(model, args=args).dim == 2  # mu, and the one entry that is missing and counts


def test_starts_may_hold_the_whole_site_or_its_missing_entries():
    law, y = LAWS["normal"][0], LAWS["normal"][1]()
    joint = log_joint(followed_by_data, args=(law,), kwargs={"obs": y, "obs_mask": torch.tensor(MASKS["some"])})
    whole, free = torch.randn(5, 4), torch.randn(5)
    expected = torch.stack([free, whole[:, 1], whole[:, 3]], -1)
    torch.testing.assert_close(joint.pack({"a": free, "y_unobserved": whole}), expected)
    torch.testing.assert_close(joint.pack({"a": free, "y_unobserved": whole[:, [1, 3]]}), expected)


def test_a_mask_that_moves_is_refused():
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            pyro.sample("y", dist.Normal(a, 1.0), obs=torch.zeros(3), obs_mask=torch.randn(3) + a > 0)

    pyro.set_rng_seed(0)
    with pytest.raises(NotImplementedError, match="'y_unobserved' must have the same obs_mask at every run"):
        log_joint(model)


INNERS = {
    "numbers": (torch.distributions.ExpTransform().inv, lambda: torch.arange(1.0, 4.0), [True, False, True]),
    "vectors": (torch.distributions.StickBreakingTransform().inv, lambda: torch.full((2, 3), 1 / 3), [False, True]),
    "matrices": (CholeskyVector().inv, lambda: torch.eye(2).expand(2, 2, 2), [True, False]),
}


@pytest.mark.parametrize("name", INNERS)
def test_free_entries_invert_and_have_their_jacobian(name):
    inner, make, free = INNERS[name]
    filled = make()
    t = FreeEntries(inner, Gap(torch.tensor(free), filled))
    u = torch.randn(t.forward_shape(filled.shape))
    x = t.inv(u)
    torch.testing.assert_close(t(x), u)
    torch.testing.assert_close(x[~torch.tensor(free)], filled[~torch.tensor(free)])
    alone = inner.log_abs_det_jacobian(x, inner(x))
    torch.testing.assert_close(t.log_abs_det_jacobian(x, u), alone[torch.tensor(free)].sum())
    many = torch.randn(5, 2, *u.shape)
    assert t.inv(many).shape == (5, 2, *filled.shape) and t.log_abs_det_jacobian(t.inv(many), many).shape == (5, 2)


@pytest.mark.parametrize("transform", [CholeskyVector(), PositiveDefiniteVector()])
@pytest.mark.parametrize("dim", [1, 2, 4])
def test_matrix_bijections_are_what_autograd_says(transform, dim):
    u = torch.randn(dim * (dim + 1) // 2)
    matrix = transform(u)
    assert transform.codomain.check(matrix)
    torch.testing.assert_close(transform.inv(matrix), u)
    rows, columns = torch.tril_indices(dim, dim)
    jacobian = torch.autograd.functional.jacobian(lambda v: transform(v)[rows, columns], u)
    torch.testing.assert_close(transform.log_abs_det_jacobian(u, matrix), jacobian.det().abs().log())


def ragged(y, lengths, prior=True):
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("series", 3):
        z = torch.zeros(3)
        for t in range(4):
            with poutine.mask(mask=t < lengths):
                z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
                pyro.sample(f"y_{t}", dist.Normal(z, scale), obs=y[:, t])


def test_states_beyond_the_end_of_a_series_are_no_latents():
    lengths, y = torch.tensor([4, 2, 3]), torch.randn(3, 4)
    joint = log_joint(ragged, args=(y, lengths))
    assert joint.dim == 1 + int(lengths.sum()) and joint.route == "plate"
    z = joint.start(2)
    sites = joint.constrain(z)
    scale = sites["scale"]
    expected = dist.HalfNormal(1.0).log_prob(scale) + scale.log()
    for i, length in enumerate(lengths.tolist()):
        path = torch.stack([sites[f"z_{t}"][:, i] for t in range(length)], -1)
        expected = expected + dist.Normal(0.0, 1.0).log_prob(path.diff(prepend=torch.zeros(2, 1))).sum(-1)
        expected = expected + dist.Normal(path, scale[:, None]).log_prob(y[i, :length]).sum(-1)
    torch.testing.assert_close(joint.log_prob(z), expected)


def test_masked_priors_of_what_the_data_depend_on_stay_flat():
    def model(y):
        with pyro.plate("data", 3):
            with poutine.mask(mask=torch.tensor([True, False, True])):
                mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    joint = log_joint(model, args=(torch.zeros(3),))
    z = torch.randn(4, 3)
    torch.testing.assert_close(joint.log_prob(z).diff(), -(z**2 * torch.tensor([1.0, 0.5, 1.0])).sum(-1).diff())


def test_masked_steps_of_a_discrete_chain_count_once():
    def model(num):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        for t in pyro.markov(range(4)):
            with poutine.mask(mask=torch.tensor(t < num)):
                pyro.sample(f"z_{t}", dist.Bernoulli(0.3))
                pyro.sample(f"y_{t}", dist.Normal(m, 1.0), obs=torch.tensor(0.5))

    z = torch.randn(3, 1)
    expected = dist.Normal(0.0, 1.0).log_prob(z[:, 0]) + 2 * dist.Normal(z[:, 0], 1.0).log_prob(torch.tensor(0.5))
    torch.testing.assert_close(log_joint(model, args=(2,)).log_prob(z), expected)
