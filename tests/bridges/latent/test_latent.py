"""The latent bridge: change of variables, what passes through which codec, pre-training, files, and what it refuses."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.distributions import Independent, MultivariateNormal, Normal

from pyro_sb.bridges import (
    DSB,
    VSDM,
    AutoencoderCodec,
    Bridge,
    KernelLangevinBridge,
    LatentBridge,
    LightSB,
    PairCodec,
    PCACodec,
    SmoothedBridge,
)

F64 = {"dtype": torch.float64}
TURN = torch.tensor([[1.0, 0.6], [-0.5, 2.0]], **F64)


def rows(num=300):
    return torch.randn(num, 2, **F64) @ TURN + torch.tensor([3.0, -1.0], **F64)


def wide(num=200, dim=6):
    torch.manual_seed(8)
    return torch.randn(num, 2, **F64) @ torch.randn(2, dim, **F64) + 0.05 * torch.randn(num, dim, **F64)


def light(dim=2, **options):
    return LightSB(dim, num_components=3, epsilon=0.5, **options)


def fitted(bridge, target, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        bridge.fit(target, progress=False, **({"num_updates": 30} | options))
    return bridge


def small(dim=2, **options):
    return SmoothedBridge(dim, hidden=(8,), **options)


def test_its_density_integrates_to_one_over_the_data_space():
    bridge = fitted(LatentBridge(light(), PCACodec(2)), rows())
    axis = torch.linspace(-14, 14, 701, **F64)
    grid = torch.cartesian_prod(axis + 3, axis - 1)
    total = float(bridge().log_prob(grid).exp().sum() * (axis[1] - axis[0]) ** 2)
    assert total == pytest.approx(1, abs=1e-6)


def test_its_density_is_that_of_its_draws():
    bridge = fitted(LatentBridge(light(), PCACodec(2)), rows())
    value, log_q = bridge().draws((4000,))
    torch.testing.assert_close(bridge().log_prob(value), log_q)
    box = (value - value.mean(0)).abs().amax(1) < 1.0  # share of draws in a box, against the density's integral
    axis = torch.linspace(-1, 1, 401, **F64)
    axis = 0.5 * (axis[1:] + axis[:-1])
    grid = torch.cartesian_prod(axis, axis) + value.mean(0)
    share = float(bridge().log_prob(grid).exp().sum() * (2 / 400) ** 2)
    assert abs(float(box.double().mean()) - share) < 4 * math.sqrt(share * (1 - share) / 4000)


def test_a_user_s_bijection_corrects_by_its_own_determinant():
    codec = PairCodec(torch.log, torch.exp, 2, 2, bijective=True, log_abs_det=lambda z: z.sum(-1))
    bridge = fitted(LatentBridge(light(), codec), torch.randn(300, 2, **F64).exp())
    axis = torch.linspace(0.005, 40, 4000, **F64)  # the law of a marginal by quadrature over the other axis
    grid = torch.cartesian_prod(torch.tensor([0.5, 2.0], **F64), axis)
    marginal = bridge().log_prob(grid).exp().reshape(2, -1).sum(1) * (axis[1] - axis[0])
    value = bridge().sample((20_000,))[:, 0]
    for at, density in zip((0.5, 2.0), marginal):
        share = float(((value - at).abs() < 0.1).double().mean())
        assert abs(share - 0.2 * float(density)) < 4 * math.sqrt(share / 20_000) + 0.005


def test_path_weights_pass_through_a_bijective_codec():
    bridge = fitted(LatentBridge(small(epsilon=3.0), PCACodec(2)), rows())
    with torch.no_grad():
        bridge.bridge.net.mean.head.weight.normal_(0, 0.02)
    assert bridge.density == "path"
    value, log_q = bridge().draws((20_000,))
    weights = (MultivariateNormal(value.mean(0), 0.4 * value.T.cov()).log_prob(value) - log_q).exp()
    assert abs(weights.mean() - 1) < 4 * weights.std() / math.sqrt(20_000)


def test_before_its_fit_it_says_what_density_that_may_give():
    path, marginal = VSDM(2), light()
    split = KernelLangevinBridge(2, scheme="split-step")
    assert (
        LatentBridge(marginal, PCACodec(2)).density == "marginal" and LatentBridge(path, PCACodec(2)).density == "path"
    )
    assert LatentBridge(codec=PCACodec(2)).density == LatentBridge(codec=PCACodec()).density == "path"
    assert LatentBridge(split, PCACodec(2)).density is LatentBridge(codec=AutoencoderCodec(2)).density is None
    assert [LatentBridge(codec=codec).whole_dim for codec in (PCACodec(2), PCACodec())] == [2, None]
    assert LatentBridge(marginal, PCACodec()).whole_dim == 2
    lossy = fitted(LatentBridge(marginal, PCACodec(2)), wide())
    assert lossy.density is None and lossy.whole_dim == lossy.dim == 6


def test_its_drift_is_the_push_forward_of_the_inner_one():
    bridge, x = fitted(LatentBridge(light(), PCACodec(2)), rows()), rows(5)
    z = bridge.codec.encode(x)
    _, expected = torch.autograd.functional.jvp(bridge.codec.decode, z, bridge.bridge.drift(0.3, z))
    torch.testing.assert_close(bridge.drift(0.3, x), expected, rtol=1e-9, atol=1e-9)


def test_a_source_is_encoded():
    x0 = rows(100) + 5
    for source in (x0[0], x0, Independent(Normal(torch.zeros(2, **F64), torch.ones(2, **F64)), 1)):
        bridge = fitted(LatentBridge(light(), PCACodec(2)), rows(), source=source)
        assert bridge.transport(x0).shape == x0.shape
    assert bridge.density == "path" and bridge.source is source
    start = bridge.paths(4000, 2)[1][0]  # its paths leave from the law that was given
    assert (start.mean(0).abs() < 4 / math.sqrt(4000)).all() and ((start.var(0) - 1).abs() < 0.1).all()
    lossy = fitted(LatentBridge(light(), PCACodec(2)), wide(), source=wide() + 1)
    assert lossy.density is None and lossy.transport(wide()).shape == (200, 6)
    with pytest.raises(ValueError, match="smoothed by noise"):
        fitted(LatentBridge(small(), PCACodec(2)), rows(), source=x0)


INNER = {
    "light": light,
    "vsdm": lambda dim: VSDM(dim, hidden=(8,), covariance_hidden=(8,)),
    "smoothed": small,
    "langevin": lambda dim: KernelLangevinBridge(dim, num_steps=3),
}


@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("codec", [PCACodec(2), AutoencoderCodec(2, hidden=(16,))], ids=["pca", "autoencoder"])
def test_through_a_lossy_codec_every_bridge_draws_and_promises_no_density(name, codec, tmp_path):
    options = {"num_updates": 5} if isinstance(codec, AutoencoderCodec) else {}
    target = wide()
    bridge = LatentBridge(INNER[name](2), codec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        own = {} if name == "langevin" else {"num_updates": 5}
        bridge.fit(target, progress=False, codec_options=options, **own)
    draws = bridge().sample((7,))
    assert draws.shape == (7, 6) and bridge.density is None
    torch.testing.assert_close(codec.decode(codec.encode(draws)), draws, rtol=1, atol=1)
    assert bridge.paths(3, 3)[1].shape == (4, 3, 6)
    for ask in (lambda: bridge().draws((2,)), lambda: bridge().log_prob(draws)):
        with pytest.raises(NotImplementedError, match=r"lossy.*sample\(\).*PCACodec\(6\)"):
            ask()
    with pytest.raises(NotImplementedError, match="affine bijective"):
        bridge.drift(0.5, draws)
    bridge.save(tmp_path / "bridge.pt")
    loaded = Bridge.load(tmp_path / "bridge.pt")
    for each in (bridge, loaded):
        torch.manual_seed(1)
        last, draws = draws, each().sample((3,))
    assert torch.equal(last, draws)


def test_by_default_all_is_chosen_and_goes_through_a_file(tmp_path):
    target = wide(400)
    bridge = LatentBridge(codec=PCACodec())
    with pytest.raises(RuntimeError, match="fitted first"):
        bridge()
    with pytest.raises(RuntimeError, match="fitted first"):
        _ = LatentBridge().dim
    assert isinstance(LatentBridge().codec, AutoencoderCodec)
    fitted(bridge, target, num_updates=3)
    assert isinstance(bridge.bridge, SmoothedBridge) and bridge.bridge.dim == bridge.codec.latent_dim == 2
    bridge.save(tmp_path / "bridge.pt")
    loaded, fresh = Bridge.load(tmp_path / "bridge.pt"), LatentBridge(codec=PCACodec())
    fresh.load_state_dict(bridge.state_dict())
    draws = []
    for each in (bridge, loaded, fresh):
        torch.manual_seed(1)
        draws.append(each().sample((3,)))
    assert torch.equal(draws[0], draws[1]) and torch.equal(draws[0], draws[2])
    fitted(loaded, torch.randn(300, 4, **F64), refit_codec=True, num_updates=3)  # other sizes: all is made again
    assert loaded.dim == 4 and loaded.bridge.dim == loaded.codec.latent_dim == 4


def test_transport_has_gradients_where_the_inner_bridge_s_draws_do(monkeypatch):
    def pair():
        return PairCodec(nn.Linear(6, 2).double(), nn.Linear(2, 6).double(), 6, 2)

    x = wide()
    bridge = fitted(LatentBridge(light(), pair()), x)
    assert not bridge.transport(x).requires_grad
    monkeypatch.setattr(LightSB, "has_rsample", True)
    assert bridge.transport(x).requires_grad


def test_both_ways_and_pairs_are_the_inner_bridge_s_decoded():
    x = rows()
    bridge = LatentBridge(DSB(2, hidden=(8,), num_steps=3), PCACodec(2))
    fitted(bridge, x, source=x + 20, num_iterations=1)
    asked = []
    for ask in (
        lambda: bridge.transport_back(x),
        lambda: bridge.codec.decode(bridge.bridge.transport_back(bridge.codec.encode(x))),
        lambda: torch.stack(bridge.coupling(50)),
        lambda: bridge.codec.decode(torch.stack(bridge.bridge.coupling(50))),
    ):
        torch.manual_seed(1)
        asked.append(ask())
    torch.testing.assert_close(asked[0], asked[1])
    torch.testing.assert_close(asked[2], asked[3])
    assert (asked[2][0].mean(0) - x.mean(0) - 20).abs().max() < 2  # pairs start at the source, 20 away
    one_way = fitted(LatentBridge(light(), PCACodec(2)), x)
    for ask in (lambda: one_way.transport_back(x), lambda: one_way.coupling(3)):
        with pytest.raises(NotImplementedError, match="LightSB has none"):
            ask()


def test_a_context_reaches_the_inner_bridge():
    context = torch.randn(300, 1, **F64)
    target = context * torch.tensor([2.0, -1.0], **F64) + 0.1 * torch.randn(300, 2, **F64)
    bridge = fitted(LatentBridge(codec=PCACodec(2), context_dim=1), target, context=context, num_updates=5)
    means = bridge(torch.tensor([[-1.0], [1.0]], **F64)).sample((500,)).mean(0)
    expected = torch.tensor([[-2.0, 1.0], [2.0, -1.0]], **F64)
    torch.testing.assert_close(means, expected, rtol=0, atol=0.2)
    with pytest.raises(ValueError, match="context_dim is the inner bridge's"):
        LatentBridge(light(), PCACodec(2), context_dim=1)


def test_weights_reach_the_codec_and_the_inner_bridge():
    target = torch.cat([rows(100), rows(100) + 40])
    weights = torch.cat([torch.ones(100), torch.zeros(100)])
    bridge = fitted(LatentBridge(light(), PCACodec(2)), target, weights=weights)
    alone = fitted(LatentBridge(light(), PCACodec(2)), target[:100])
    torch.testing.assert_close(bridge.codec.location, alone.codec.location, rtol=1e-9, atol=1e-9)
    assert (bridge().sample((200,)).mean(0) - target[:100].mean(0)).abs().max() < 2


def test_a_codec_that_is_fitted_stays_unless_asked():
    other, target = wide() * 2 + 5, wide()
    codec = PCACodec(2)
    codec.fit(other)
    bridge = fitted(LatentBridge(light(), codec), target)
    torch.testing.assert_close(codec.location, other.mean(0))
    seen = codec.decode(codec.encode(target)).mean(0)  # all of the target that this codec lets through
    torch.testing.assert_close(bridge().sample((2000,)).mean(0), seen, rtol=0, atol=0.6)
    fitted(bridge, target, refit_codec=True)
    torch.testing.assert_close(codec.location, target.mean(0))
    fitted(bridge, target, pretrain=other)
    torch.testing.assert_close(codec.location, other.mean(0))
    fitted(bridge, MultivariateNormal(torch.zeros(6, **F64), torch.eye(6, **F64)), num_law_draws=500)
    torch.testing.assert_close(codec.location, other.mean(0))


@pytest.mark.parametrize(
    "codec",
    [
        lambda: PCACodec(5),  # its pre-training rows have six directions, the target two
        lambda: PCACodec(6),
        lambda: PairCodec(nn.Linear(6, 5), nn.Linear(5, 6), 6, 5),
    ],
)
def test_more_latents_than_the_target_has_directions_are_refused(codec):
    flat = torch.randn(300, 2) @ torch.randn(2, 6)
    bridge = LatentBridge(codec=codec())
    options = {} if isinstance(bridge.codec, PairCodec) else {"pretrain": torch.randn(300, 6)}
    with pytest.raises(ValueError, match=r"got [56] latents with numerical rank 2.*latent_dim=2 or fewer"):
        fitted(bridge, flat, **options)


def test_rows_without_weight_have_no_say_in_the_rank():
    flat, other = torch.randn(100, 2) @ torch.randn(2, 6), torch.randn(200, 6)
    weights = torch.cat([torch.ones(100), torch.zeros(200)])
    with pytest.raises(ValueError, match="numerical rank 2 on 100 rows"):
        fitted(LatentBridge(small(6), PCACodec(6)), torch.cat([flat, other]), pretrain=other, weights=weights)


def test_rows_too_few_to_tell_a_rank_are_taken():
    codec = PCACodec(6)
    codec.fit(torch.randn(300, 6))
    fitted(LatentBridge(small(6), codec), torch.randn(6, 6), num_updates=2)


def test_a_bound_carries_no_gradient_of_the_determinant_alone():
    pair = PairCodec(
        torch.asinh, torch.sinh, 2, 2, bijective=True, log_abs_det=lambda z: z.cosh().log().sum(-1)
    )  # fmt: skip
    bridge = fitted(LatentBridge(DSB(2, hidden=(8,), num_steps=3), pair), rows(), num_iterations=1, num_pairs=100)
    assert not bridge.path_log_prob(torch.zeros(2, requires_grad=True)).requires_grad


def test_a_pair_with_more_latents_than_data_is_refused():
    with pytest.raises(ValueError, match="at most data_dim, got 7 and 4"):
        PairCodec(nn.Linear(4, 7), nn.Linear(7, 4), 4, 7)


def test_between_gaussians_the_bound_through_a_bijection_is_the_density():
    target = rows(4000)
    bridge = LatentBridge(DSB(2, hidden=(8,), num_steps=3), PCACodec(2))
    fitted(bridge, target, num_iterations=1, num_pairs=4000, held_out=0.0)
    for half in (bridge.bridge.ahead, bridge.bridge.back):  # as before they learnt: exact between the moments
        half.net.reset()
        half.log_spread = torch.zeros_like(half.log_spread)
    law = MultivariateNormal(target.mean(0), target.T.cov(correction=0))
    x = target[:5]
    torch.testing.assert_close(bridge.path_log_prob(x, num_paths=1), law.log_prob(x), rtol=0, atol=1e-3)
    lossy = fitted(LatentBridge(DSB(2, hidden=(8,), num_steps=3), PCACodec(2)), wide(), num_iterations=1)
    with pytest.raises(NotImplementedError, match="PCACodec.*lossy"):
        lossy.path_log_prob(torch.zeros(6))


def test_a_codec_of_one_s_own_is_put_into_eval_mode():
    codec = AutoencoderCodec(2)
    codec.encoder = nn.Dropout()
    LatentBridge(light(), codec)
    assert not codec.training and not codec.encoder.training


def test_what_does_not_fit_together_is_refused():
    with pytest.raises(ValueError, match=r"dim must be the codec's latent_dim, got 3 and 2.*LightSB\(2\)"):
        LatentBridge(light(3), PCACodec(2))
    with pytest.raises(ValueError, match="got 3 and 2"):
        fitted(LatentBridge(light(3), PCACodec()), wide(400))
    with pytest.raises(ValueError, match="bridge must be a Bridge"):
        LatentBridge(PCACodec(2))
    with pytest.raises(ValueError, match="codec must be a Codec"):
        LatentBridge(light(), nn.Identity())
    with pytest.raises(ValueError, match="numerical rank 2"):
        fitted(LatentBridge(light(3), PCACodec(3)), rows())
    with pytest.raises(ValueError, match=r"got \(200, 4\)"):
        fitted(LatentBridge(light(), PairCodec(nn.Linear(6, 4), nn.Linear(2, 6), 6, 2)), wide().float())
    with pytest.raises(ValueError, match="finite, got NaN"):
        fitted(LatentBridge(light(), PairCodec(torch.log, torch.exp, 2, 2)), rows())
    x = torch.rand(300, 2, **F64) + 0.1
    with pytest.raises(ValueError, match=r"constant latents \[1\] of 2.*Lower latent_dim"):
        fitted(LatentBridge(light(), PairCodec(lambda x: x * x.new_tensor([1, 0]), lambda z: z, 2, 2)), x)
    with pytest.raises(ValueError, match=r"NaN or infinity in 300 of 300 rows of the source\. Fit the codec on"):
        fitted(LatentBridge(light(), PairCodec(torch.log, torch.exp, 2, 2)), x, source=-x)
    with pytest.raises(ValueError, match="go with draws"):
        law = MultivariateNormal(torch.zeros(2), torch.eye(2))
        fitted(LatentBridge(light(), PCACodec(2)), law, weights=torch.ones(3))
    bad = PairCodec(lambda x: x, lambda z: z / (z.abs() < 5), 2, 2)
    bridge = fitted(LatentBridge(light(), bad), torch.rand(300, 2, **F64))
    bridge.codec.decoder = lambda z: z / 0
    with pytest.raises(RuntimeError, match="decoded draws must be finite"):
        bridge().sample((3,))


def test_a_user_s_pair_cannot_be_rebuilt_from_a_file_but_takes_its_state(tmp_path):
    def build():
        torch.manual_seed(2)
        return LatentBridge(light(), PairCodec(nn.Linear(6, 2).double(), nn.Linear(2, 6).double(), 6, 2))

    bridge, path = fitted(build(), wide()), tmp_path / "bridge.pt"
    bridge.save(path)
    with pytest.raises(ValueError, match="functions cannot be rebuilt"):
        Bridge.load(path)
    fresh = build()
    with torch.no_grad():
        fresh.codec.encoder.weight.zero_()
    fresh.load_state_dict(torch.load(path, weights_only=True)["state"])
    assert torch.equal(fresh.codec.encode(wide()), bridge.codec.encode(wide()))


@pytest.mark.parametrize("kind", ["rows", "law"])
@pytest.mark.parametrize("update", [0, 31], ids=["before", "after"])  # the inner bridge's first checkpoint
def test_a_fit_that_was_cut_short_goes_on_with_its_codec(update, kind, tmp_path, monkeypatch):
    path = tmp_path / "bridge.pt"
    target = wide() if kind == "rows" else MultivariateNormal(torch.zeros(6, **F64), torch.eye(6, **F64))
    monkeypatch.setattr("pyro_sb.bridges.diffusion.fit.PATIENCE", 1000)

    def fit(checkpoint, seed=4):
        torch.manual_seed(seed)
        bridge = LatentBridge(small(), AutoencoderCodec(2, hidden=(8,)))
        options = {"num_updates": 60, "codec_options": {"num_updates": 5}, "num_law_draws": 200}
        return fitted(bridge, target, checkpoint=checkpoint, **options).state_dict()

    whole, original, calls = fit(None), SmoothedBridge.goal, iter(range(10_000))

    def broken(self, *args):
        if torch.is_grad_enabled() and next(calls) == update:
            raise OSError("the disk is full")
        return original(self, *args)

    monkeypatch.setattr(SmoothedBridge, "goal", broken)
    with pytest.raises(OSError, match="disk"):
        fit(path)
    monkeypatch.setattr(SmoothedBridge, "goal", original)
    assert not path.exists() and len(list(tmp_path.iterdir())) == (2 if update else 1)
    with pytest.raises(ValueError, match="other data"):
        fitted(LatentBridge(small(), AutoencoderCodec(2, hidden=(8,))), wide() + 1, checkpoint=path)
    resumed = fit(path, seed=9)
    assert [p.name for p in tmp_path.iterdir()] == ["bridge.pt"]
    flat = {k: v for k, v in whole.items() if torch.is_tensor(v)}
    assert all(torch.equal(v, resumed[k]) for k, v in flat.items())
    assert isinstance(Bridge.load(path), LatentBridge)


def test_a_fit_of_another_codec_is_not_gone_on_from(tmp_path, monkeypatch):
    monkeypatch.setattr(SmoothedBridge, "fit", lambda *args, **options: 1 / 0)
    x, path = wide(), tmp_path / "bridge.pt"
    as_it_was = {"pretrain": x + 100, "weights": torch.arange(200) + 1, "codec_options": {}}

    def fit(codec=None, **changed):
        codec = PCACodec(2) if codec is None else codec
        LatentBridge(small(), codec).fit(x, progress=False, checkpoint=path, **(as_it_was | changed))
        return codec

    def refused(codec=None, **changed):
        with pytest.raises(ValueError, match="other data, codec or codec options"):
            fit(codec, **changed)

    def goes_on(codec=None, **changed):
        with pytest.raises(ZeroDivisionError):
            fit(codec, **changed)

    goes_on(), goes_on()
    for changed in ({"pretrain": x - 100}, {"pretrain": None}, {"weights": None}, {"refit_codec": True}):
        refused(**changed)
    refused(weights=torch.arange(200).flip(0) + 1)
    refused(PCACodec(2, whiten=False))
    refused(AutoencoderCodec(2))
    path.with_name("bridge.pt.codec").unlink()
    goes_on(AutoencoderCodec(2, hidden=(4,)), codec_options={"num_updates": 2})
    refused(AutoencoderCodec(2, hidden=(4,)), codec_options={"num_updates": 3})
    path.with_name("bridge.pt.codec").unlink()
    codecs = [PCACodec(2), PCACodec(2)]
    for codec, rows in zip(codecs, (x, x + 1)):
        codec.fit(rows)
    goes_on(codecs[0], pretrain=None), goes_on(codecs[0], pretrain=None)
    refused(codecs[1], pretrain=None)  # fitted already, and another
    refused(PairCodec(lambda x: x[:, :2], lambda z: z.repeat(1, 3), 6, 2), pretrain=None)
    torch.testing.assert_close(codecs[1].location, x.mean(0) + 1)
