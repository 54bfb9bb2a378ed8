"""Log-sum-exp of quadratics: derivatives against autograd; batches and every route to the Hessian agree."""

import pytest
import torch
from torch.func import jacrev, vmap

from pyro_sb.ops.log_quadratic import SMALL_DIM, LogSumQuadratic

F64 = {"dtype": torch.float64}
FORMS = [(1, False), (SMALL_DIM, False), (SMALL_DIM + 2, False), (1, True), (3, True), (6, True)]
forms = pytest.mark.parametrize("dim, full", FORMS, ids=[f"{d}-{'full' if f else 'diagonal'}" for d, f in FORMS])


def random_function(dim, full, batch=(), num=5):
    quadratic = torch.randn(*batch, num, dim, *[dim] * full, **F64)
    quadratic = quadratic + quadratic.mT if full else quadratic
    return LogSumQuadratic(torch.randn(*batch, num, **F64), torch.randn(*batch, num, dim, **F64), quadratic)


def at_one_point(function):
    return lambda y: function.value(y[None])[0]


@forms
def test_gradient_and_hessian_are_those_of_the_value(dim, full):
    function, y = random_function(dim, full), torch.randn(7, dim, **F64)
    gradient = vmap(jacrev(at_one_point(function)))(y)
    second = vmap(jacrev(jacrev(at_one_point(function))))(y)
    torch.testing.assert_close(function.gradient(y), gradient, rtol=1e-12, atol=1e-12)
    for found in (function.gradient_and_hessian(y), function.second_order(y)[1:]):
        torch.testing.assert_close(found[0], gradient, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found[1], second, rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(function.second_order(y)[0], function.value(y), rtol=1e-13, atol=1e-13)


@forms
def test_the_product_is_the_hessian_without_its_matrix(dim, full):
    function, y, v = random_function(dim, full), torch.randn(7, dim, **F64), torch.randn(7, dim, **F64)
    value, gradient, matrix = function.second_order(y)
    product = function.hessian_product(y)
    torch.testing.assert_close(product.value, value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(product.gradient, gradient, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(product(v), (matrix @ v[..., None])[..., 0], rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(product.diagonal(), matrix.diagonal(dim1=-2, dim2=-1), rtol=1e-12, atol=1e-11)


@forms
def test_gates_are_the_derivative_by_the_constants(dim, full):
    function, y = random_function(dim, full), torch.randn(7, dim, **F64)
    gates = jacrev(lambda constant: function._replace(constant=constant).value(y))(function.constant)
    torch.testing.assert_close(function.gates(y), gates, rtol=1e-13, atol=1e-14)


@forms
def test_a_batch_is_its_members_one_by_one(dim, full):
    batch, y, v = random_function(dim, full, (2, 3)), torch.randn(2, 3, 7, dim, **F64), torch.randn(2, 3, 7, dim, **F64)
    assert batch.diagonal is not full
    for i in range(2):
        for j in range(3):
            one = LogSumQuadratic(*(part[i, j] for part in batch))
            pairs = [
                (batch.value(y), one.value(y[i, j])),
                (batch.gates(y), one.gates(y[i, j])),
                (batch.gradient(y), one.gradient(y[i, j])),
                (batch.gradient_and_hessian(y)[1], one.gradient_and_hessian(y[i, j])[1]),
                (batch.hessian_product(y)(v), one.hessian_product(y[i, j])(v[i, j])),
                (batch.hessian_product(y).diagonal(), one.hessian_product(y[i, j]).diagonal()),
            ]
            for together, alone in pairs:
                torch.testing.assert_close(together[i, j], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("full", [False, True], ids=["diagonal", "full"])
def test_a_single_quadratic_is_itself(full):
    function, y = random_function(3, full, num=1), torch.randn(7, 3, **F64)
    slope = function.gradient(torch.zeros(1, 3, **F64))
    matrix = torch.diag(function.quadratic[0]) if not full else function.quadratic[0]
    torch.testing.assert_close(function.gradient(y) - slope, y @ matrix, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(function.second_order(y)[2], matrix.expand(7, 3, 3), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dim", [2, 6])
def test_large_exponents_neither_overflow_nor_lose_their_differences(dim):
    function, y = random_function(dim, False), torch.randn(7, dim, **F64)
    raised = function._replace(constant=function.constant + 1e4)
    torch.testing.assert_close(raised.value(y) - 1e4, function.value(y), rtol=1e-10, atol=1e-10)
    for found, expected in zip(raised.second_order(y)[1:], function.second_order(y)[1:]):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_far_from_the_origin_the_small_route_keeps_its_digits():
    # Second moments by one product cancel where slopes are large: the price must stay small beside the slopes
    function = random_function(2, False)
    y = 30 * torch.randn(50, 2, **F64)
    small, centred = function._second_order_small(y), function._gates_and_slopes(y)
    slopes = centred[2] - function.gradient(y)[:, None]
    expected = (centred[1][..., None] * slopes).mT @ slopes + torch.diag_embed(centred[1] @ function.quadratic)
    size = function.gradient(y).square().sum(-1)[:, None, None]
    assert ((small[2] - expected).abs() / (1 + size)).max() < 1e-14
