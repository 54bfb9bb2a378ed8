"""Codecs: principal components, autoencoder, a user's pair, and the report that chooses a dimension."""

import math
import warnings

import pytest
import torch
from sklearn.decomposition import PCA
from torch import nn

from pyro_sb.bridges import AutoencoderCodec, Codec, PairCodec, PCACodec, reconstruction_report
from pyro_sb.bridges.codecs.base import check_pair
from pyro_sb.bridges.codecs.rows import numerical_rank

F64 = {"dtype": torch.float64}


def rows(num=300, dim=5, rank=5, noise=0.0):
    return 3 + torch.randn(num, rank, **F64) @ torch.randn(rank, dim, **F64) + noise * torch.randn(num, dim, **F64)


def fitted(codec, x, **options):
    codec.fit(x, progress=False, **options)
    return codec


def test_components_are_those_of_scikit_learn():
    x = rows()
    theirs = PCA(3).fit(x.numpy())
    codec = fitted(PCACodec(3, whiten=False), x)
    overlap = codec.components.T @ torch.as_tensor(theirs.components_.T)
    torch.testing.assert_close(overlap.abs(), torch.eye(3, **F64), rtol=1e-8, atol=1e-8)
    z = codec.encode(x)
    torch.testing.assert_close(z.var(0), torch.as_tensor(theirs.explained_variance_), rtol=1e-9, atol=0)
    back = torch.as_tensor(theirs.inverse_transform(theirs.transform(x.numpy())))
    torch.testing.assert_close(codec.decode(z), back, rtol=1e-9, atol=1e-9)
    noise = math.sqrt(theirs.noise_variance_ * (len(x) - 1) / len(x))
    assert float(codec.residual_scale) == pytest.approx(noise, rel=1e-9)


def test_integer_weights_are_repeated_rows():
    x, counts = rows(40), torch.randint(0, 4, (40,))
    weighted, repeated = fitted(PCACodec(2), x, weights=counts), fitted(PCACodec(2), x.repeat_interleave(counts, 0))
    torch.testing.assert_close(weighted.encode(x), repeated.encode(x), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("whiten", [True, False])
def test_with_all_dimensions_it_is_a_bijection_with_this_determinant(whiten):
    x = rows()
    codec = fitted(PCACodec(5, whiten=whiten), x)
    z = codec.encode(x)
    assert codec.bijective
    torch.testing.assert_close(codec.decode(z), x, rtol=1e-9, atol=1e-9)
    jacobian = torch.autograd.functional.jacobian(codec.decode, z[0])
    expected = torch.linalg.slogdet(jacobian).logabsdet.expand(len(x))
    torch.testing.assert_close(codec.log_abs_det(z), expected, rtol=1e-9, atol=1e-9)
    if whiten:
        torch.testing.assert_close(z.T.cov(correction=0), torch.eye(5, **F64), rtol=1e-9, atol=1e-9)


def test_the_residual_fills_the_dropped_directions_alone():
    x = rows(2000, noise=0.5)
    codec = fitted(PCACodec(2, residual=True), x)
    z = codec.encode(x)
    drawn = codec.draw(z)
    torch.testing.assert_close(codec.encode(drawn), z, rtol=1e-9, atol=1e-9)
    gap, dropped = drawn - codec.decode(z), x - codec.decode(z)
    assert float(gap.square().sum() / dropped.square().sum()) == pytest.approx(1, abs=4 * math.sqrt(2 / 6000))
    assert torch.equal(fitted(PCACodec(2), x).draw(z), codec.decode(z))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rank_is_told_from_rounding_and_thin_directions_count(dtype):
    thin = torch.tensor([1.0, 1e-3, 1e-3], dtype=dtype)
    x = 5 + torch.randn(20_000, 3, dtype=dtype) * thin
    assert numerical_rank(x) == 3
    flat = x @ torch.randn(3, 7, dtype=dtype)  # rounded seven times over
    assert numerical_rank(flat) == 3
    shares = torch.rand(2000, 4, dtype=dtype)
    assert numerical_rank(shares / shares.sum(1, keepdim=True)) == 3
    metres = torch.tensor([5e5, 5.4e6], dtype=dtype) + 3 * torch.randn(1000, 2, dtype=dtype)
    assert numerical_rank(metres) == 2  # each column has its own rounding
    money = torch.stack([3e5 * torch.randn(1000, dtype=dtype).exp(), torch.rand(1000, dtype=dtype)], 1)
    assert numerical_rank(money) == 2
    assert numerical_rank(1e9 + torch.zeros(50, 3, dtype=dtype)) == 0


def test_rows_that_only_rounding_tells_apart_are_named_so():
    x = 2e9 + 10 * torch.randn(100, 2)
    with pytest.raises(ValueError, match="no more than their rounding: subtract offsets"):
        PCACodec(2).fit(x)


def test_a_dimension_above_the_rank_is_refused_and_the_rank_named():
    x = rows(rank=3)
    assert numerical_rank(x) == 3
    for codec in (PCACodec(4), AutoencoderCodec(4)):
        with pytest.raises(ValueError, match="numerical rank 3"):
            codec.fit(x, progress=False)
    with pytest.raises(ValueError, match="latent_dim must be at most"):
        PCACodec(6).fit(rows(), progress=False)
    with pytest.raises(ValueError, match="numerical rank 4"):
        PCACodec(5).fit(rows(5), progress=False)


def test_what_is_not_fitted_or_misshapen_says_so():
    for codec in (PCACodec(2), AutoencoderCodec(2)):
        with pytest.raises(RuntimeError, match="must be fitted first"):
            codec.encode(torch.zeros(3, 5))
    codec = fitted(PCACodec(2), rows())
    with pytest.raises(ValueError, match=r"x must have shape \(\*, 5\), got \(3, 4\)"):
        codec.encode(torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"z must have shape \(\*, 2\)"):
        codec.decode(torch.zeros(3, 4))
    with pytest.raises(NotImplementedError, match=r"PCACodec\(5\)"):
        codec.log_abs_det(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="finite"):
        PCACodec(2).fit(torch.full((9, 3), math.nan))
    with pytest.raises(ValueError, match=r"\(N, data_dim\)"):
        PCACodec(2).fit(torch.zeros(9))
    with pytest.raises(ValueError, match="latent_dim must be at least 1"):
        PCACodec(0)


def test_the_report_counts_what_is_lost_on_rows_held_out():
    x = rows(4000, dim=8, rank=3, noise=0.1)
    report = reconstruction_report(x, PCACodec, dims=(4, 1, 2, 3, 8), progress=False)
    assert report.dims == [1, 2, 3, 4, 8] and report.num_rows + report.num_held_out == 4000
    values = torch.linalg.eigvalsh(x.T.cov()).flip(0)
    expected = values.cumsum(0)[torch.tensor(report.dims) - 1] / values.sum()
    torch.testing.assert_close(torch.tensor(report.explained, **F64), expected, rtol=0, atol=0.02)
    left = (values.sum() - values.cumsum(0)[torch.tensor(report.dims[:4]) - 1]) / 8
    torch.testing.assert_close(torch.tensor(report.rmse[:4], **F64), left.sqrt(), rtol=0.05, atol=0)
    assert report.rmse[-1] < 1e-12
    assert report.choose() == next(d for d, e in zip(report.dims, report.explained) if e >= 0.95)
    assert report.choose(1.0) == 8
    lines = str(report).splitlines()
    assert len(lines) == 6 and "variance explained" in lines[0] and lines[1].split()[0] == "1"


@pytest.mark.parametrize(
    "learn",
    [
        lambda x, **options: PCACodec(2).fit(x, progress=False, **options),
        lambda x, **options: reconstruction_report(x, PCACodec, progress=False, **options),
    ],
    ids=["fit", "report"],
)
def test_weights_that_are_none_are_refused(learn):
    x, ones = rows(), torch.ones(300)
    for weights, message in (
        (torch.ones(3), r"shape \(300,\)"),
        (-ones, "got 300 negative"),
        (torch.where(torch.arange(300) < 9, math.nan, ones), "9 NaN"),
        (0 * ones, "not all be zero"),
    ):
        with pytest.raises(ValueError, match=message):
            learn(x, weights=weights)


def test_the_report_leaves_out_rows_of_no_weight():
    x, weights = torch.cat([rows(dim=4), rows(dim=4) + 99]), torch.cat([torch.full((300,), 5.0), torch.zeros(300)])
    reports = []
    for options in ({"x": x, "weights": weights}, {"x": x[:300]}):
        torch.manual_seed(1)
        reports.append(reconstruction_report(codec=PCACodec, dims=(1, 2), progress=False, **options))
    assert reports[0].num_rows + reports[0].num_held_out == 300
    assert reports[0].explained == pytest.approx(reports[1].explained, abs=1e-9)


def test_the_report_stops_where_asked_and_warns_where_nothing_suffices():
    x = rows(400, dim=8, rank=3, noise=0.01)
    report = reconstruction_report(x, PCACodec, stop_at=0.999, progress=False)
    assert report.dims == [1, 2, 3]
    few = reconstruction_report(x, PCACodec, dims=(1,), progress=False)
    with pytest.warns(RuntimeWarning, match="1 is best"):
        assert few.choose(0.999) == 1
    for share in (0.0, 1.5):
        with pytest.raises(ValueError, match="share"):
            report.choose(share)
    with pytest.raises(ValueError, match="dims"):
        reconstruction_report(x, PCACodec, dims=(0, 1), progress=False)
    with pytest.raises(ValueError, match="held_out"):
        reconstruction_report(x, PCACodec, held_out=1.0, progress=False)


def test_a_dimension_that_is_not_given_is_the_report_s():
    x = rows(400, dim=8, rank=3, noise=0.01)
    codec = fitted(PCACodec(), x)
    torch.manual_seed(0)
    assert codec.latent_dim == reconstruction_report(x, PCACodec, progress=False).choose() <= 3
    assert codec.given_dim is None and not codec.bijective


def test_components_that_are_not_given_are_the_fewest_of_all_numbers():
    x = torch.randn(500, 20, **F64) * torch.tensor([10.0] * 5 + [0.1] * 15, **F64)
    for options in ({}, {"weights": torch.rand(500, **F64)}):
        torch.manual_seed(1)
        codec = fitted(PCACodec(), x, **options)
        torch.manual_seed(1)
        report = reconstruction_report(x, PCACodec, dims=range(1, 21), progress=False, **options)
        assert codec.latent_dim == report.choose() == 5
    with pytest.raises(ValueError, match="held_out must leave rows"):
        PCACodec().fit(rows(2), progress=False)
    with pytest.raises(ValueError, match="rows must vary"):
        PCACodec().fit(torch.ones(20, 3), progress=False)


def curve(num=400):
    angle = 3 * torch.rand(num, 1, **F64)
    return torch.cat([angle.cos(), angle.sin(), 0.3 * angle], 1)


def test_an_autoencoder_follows_a_curve_that_no_line_does():
    train, test = curve(), curve()
    shares = []
    for codec in (PCACodec(1), AutoencoderCodec(1, hidden=(32, 32), latent_noise=0.02)):
        fitted(codec, train, **({} if isinstance(codec, PCACodec) else {"num_updates": 600}))
        with torch.no_grad():
            back = codec.decode(codec.encode(test))
        shares.append(float(1 - (back - test).square().sum() / (test - train.mean(0)).square().sum()))
    assert shares[1] > 0.98 > 0.95 > shares[0]


def test_an_autoencoder_s_latents_have_unit_moments_and_it_is_the_same_in_both_modes():
    x, weights = curve(), torch.rand(400, **F64)
    codec = fitted(AutoencoderCodec(2, hidden=(16,)), x, num_updates=20, weights=weights)
    z = codec.encode(x).detach()
    weights = weights / weights.sum()
    torch.testing.assert_close(weights @ z, torch.zeros(2, **F64), rtol=0, atol=1e-9)
    torch.testing.assert_close(weights @ z.square(), torch.ones(2, **F64), rtol=1e-4, atol=1e-4)
    assert torch.equal(codec.train().encode(x), codec.eval().encode(x))
    assert not codec.bijective and z.dtype == torch.float64


def test_weights_say_what_an_autoencoder_learns():
    x = torch.zeros(200, 2, **F64)
    x[:100, 0], x[100:, 1] = torch.randn(100, **F64), torch.randn(100, **F64)
    weights = torch.cat([torch.full((100,), 1000.0), torch.ones(100)])
    codec = fitted(AutoencoderCodec(1, hidden=(16,), latent_noise=0.0), x, weights=weights, num_updates=300)
    with torch.no_grad():
        errors = (codec.decode(codec.encode(x)) - x).square().sum(1)
    assert errors[:100].mean() < 0.05 < 0.5 < errors[100:].mean()  # of variances about 1


def test_an_autoencoder_s_dimension_is_chosen_on_rows_held_out():
    codec = AutoencoderCodec(hidden=(32,), latent_noise=0.0, share=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        codec.fit(curve(), num_updates=400, progress=False)
    assert codec.latent_dim in (1, 2)


@pytest.mark.parametrize("make", [lambda: PCACodec(2, residual=True), lambda: AutoencoderCodec(2, hidden=(16,))])
def test_a_fresh_codec_takes_a_saved_state(make):
    x = curve()
    codec = fitted(make(), x, **({"num_updates": 5} if isinstance(make(), AutoencoderCodec) else {}))
    fresh = type(codec).from_config(codec.config())
    fresh.load_state_dict(codec.state_dict())
    assert torch.equal(fresh.encode(x), codec.encode(x)) and (fresh.data_dim, fresh.latent_dim) == (3, 2)
    assert fresh.float().decode(codec.float().encode(x.float())).dtype == torch.float32


def test_a_pair_whose_shapes_do_not_meet_is_refused_with_both():
    x = torch.randn(9, 5)
    with pytest.raises(ValueError, match=r"encode must return shape \(9, 2\) for \(9, 5\), got \(9, 3\).*\(n, 2\)"):
        check_pair(PairCodec(nn.Linear(5, 3), nn.Linear(2, 5), 5, 2), x)
    with pytest.raises(ValueError, match=r"decode failed on shape \(9, 2\).*\(n, 5\) to \(n, 2\)"):
        check_pair(PairCodec(nn.Linear(5, 2), nn.Linear(3, 5), 5, 2), x)
    with pytest.raises(ValueError, match=r"decode must return shape \(9, 5\) for \(9, 2\), got \(9, 4\)"):
        check_pair(PairCodec(nn.Linear(5, 2), nn.Linear(2, 4), 5, 2), x)


def test_a_pair_takes_rows_of_another_dtype_and_is_the_same_at_each_call():
    x = torch.randn(9, 5, **F64)
    codec = PairCodec(nn.Sequential(nn.Linear(5, 2), nn.Dropout()), nn.Sequential(nn.Linear(2, 5)), 5, 2)
    assert codec.encode(x).dtype == torch.float32 and codec.decode(codec.encode(x).double()).shape == (9, 5)
    assert torch.equal(codec.encode(x), codec.encode(x))
    norm = nn.BatchNorm1d(5)
    before = norm.running_mean.clone()
    PairCodec(norm, norm, 5, 5).encode(x + 9)
    assert torch.equal(norm.running_mean, before)
    assert PairCodec(torch.log, torch.exp, 5, 5).decode(x).dtype == torch.float64


def test_an_error_of_the_pair_s_own_names_what_was_asked():
    for wrong in (lambda x: x[:, 7:8][0, 3], lambda x: len(x) + None, lambda x: None):
        with pytest.raises(ValueError, match=r"encode (failed|must return).*\(9, 5\).*\(n, 5\) to \(n, 2\)"):
            PairCodec(wrong, wrong, 5, 2).encode(torch.randn(9, 5))


def test_a_pair_must_be_finite_and_as_bijective_as_it_says():
    x = torch.randn(9, 2)
    with pytest.raises(ValueError, match="finite, got NaN or infinity in"):
        check_pair(PairCodec(torch.log, torch.exp, 2, 2), x)
    with pytest.raises(ValueError, match="give its data back"):
        check_pair(PairCodec(torch.abs, torch.abs, 2, 2, bijective=True, log_abs_det=lambda z: z.sum(-1)), x)
    with pytest.raises(ValueError, match="log_abs_det and equal sizes"):
        PairCodec(torch.exp, torch.log, 2, 2, bijective=True)
    with pytest.raises(ValueError, match="log_abs_det and equal sizes"):
        PairCodec(torch.exp, torch.log, 3, 2, bijective=True, log_abs_det=torch.sum)
    with pytest.raises(NotImplementedError, match="train your encoder"):
        PairCodec(torch.exp, torch.log, 2, 2).fit(x)
    with pytest.raises(NotImplementedError, match="lossy"):
        PairCodec(torch.exp, torch.log, 2, 2).log_abs_det(x)


def pair(encode, decode, log_abs_det):
    return PairCodec(encode, decode, 2, 2, bijective=True, log_abs_det=log_abs_det)


@pytest.mark.parametrize("kept, location, scale", [(1, [0, 3000], [1, 1]), (0, [0, 0], [1, 5e-4])])
def test_a_bijection_gives_back_every_column_in_its_own_units(kept, location, scale):
    x = torch.tensor(location, **F64) + torch.tensor(scale, **F64) * torch.randn(100, 2, **F64)
    keep = torch.eye(2, **F64)[kept]
    lossy = pair(lambda x: x, lambda z: z * keep, lambda z: 0 * z.sum(-1))
    with pytest.raises(ValueError, match=f"give its data back.*column {1 - kept}"):
        check_pair(lossy, x)
    constant = torch.cat([x[:, :1], torch.full_like(x[:, :1], 7.1)], 1)
    for ends in (x, constant, constant.float()):  # rounding of a constant column is no loss
        check_pair(pair(lambda x: x / 3, lambda z: z * 3, lambda z: 0 * z.sum(-1) + 2 * math.log(3)), ends)


def test_a_log_determinant_that_is_not_decode_s_is_refused():
    x = torch.randn(50, 2, **F64).exp()
    check_pair(pair(torch.log, torch.exp, lambda z: z.sum(-1)), x)
    for wrong in (lambda z: -z.sum(-1), lambda z: z.sum(-1) + 0.1, lambda z: z.sum(-1) / 0):
        with pytest.raises(ValueError, match="log_abs_det must be log"):
            check_pair(pair(torch.log, torch.exp, wrong), x)
    with pytest.raises(ValueError, match=r"log_abs_det must return shape \(4,\) for \(4, 2\), got \(4, 2\)"):
        check_pair(pair(torch.log, torch.exp, lambda z: z), x)
    unseen = pair(lambda x: x.log(), lambda z: torch.as_tensor(z.detach().numpy()).exp(), lambda z: z.sum(-1))
    check_pair(unseen, x)  # autograd cannot judge it


def test_a_codec_of_one_s_own_needs_no_more_than_the_recipe_says():
    with pytest.raises(NotImplementedError, match="Codec has no fit"):
        Codec(1).fit(rows())


def test_a_codec_prints_its_sizes_and_whether_it_is_fitted():
    codec = PCACodec(2)
    assert repr(codec).startswith("PCACodec(latent_dim=2, data_dim=of the data") and repr(codec).endswith("not fitted")
    codec.fit(rows())
    assert f"latent_dim=2, data_dim={codec.data_dim}" in repr(codec) and repr(codec).endswith(": fitted")
    assert "chosen in fit" in repr(AutoencoderCodec())
