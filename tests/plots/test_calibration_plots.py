"""Pictures of calibration say which parameter is off, against the bands of its own number of data sets."""

import pytest
import torch

matplotlib = pytest.importorskip("matplotlib")

from pyro_sb.diagnostics import Calibration, ecdf_bands, tarp  # noqa: E402
from pyro_sb.plots import plot_coverage, plot_sbc  # noqa: E402

F64 = torch.float64


@pytest.fixture
def ax():
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    yield plt.subplots()[1]
    plt.close("all")


def calibration(scale, num=300, dim=1):
    truths, draws = torch.randn(num, dim, dtype=F64), scale * torch.randn(99, num, dim, dtype=F64)
    return Calibration.of(truths, draws), tarp(draws, truths)


def labels(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_parameters_outside_the_bands_can_be_told_apart(ax):
    plot_sbc(calibration(0.4, dim=9)[0], ax=ax)
    drawn = [line for line in ax.get_lines() if len(line.get_xdata()) == 100]
    assert len({(line.get_color(), line.get_linestyle()) for line in drawn}) == 9
    assert len(labels(ax)) == 1 + 5 + 1 and labels(ax)[-1] == "and 4 more"
    furthest = max(drawn, key=lambda line: abs(line.get_ydata()).max())
    assert furthest.get_label() == labels(ax)[1]


def test_exact_parameters_share_one_colour_and_have_no_name(ax):
    plot_sbc(calibration(1.0, dim=4)[0], ax=ax)
    assert len({line.get_color() for line in ax.get_lines()[:4]}) == 1 and len(labels(ax)) == 1


@pytest.mark.parametrize("scale", [0.4, 2.5], ids=["too narrow", "too wide"])
def test_the_legend_leaves_the_lines_free(ax, scale):
    found = calibration(scale, dim=3)[0]
    plot_sbc(found, ax=ax)
    ax.figure.canvas.draw()
    box = ax.get_legend().get_window_extent().transformed(ax.transData.inverted())
    for line in ax.get_lines()[:3]:
        x, y = line.get_data()
        assert not ((x > box.x0) & (x < box.x1) & (y > box.y0)).any()


def test_every_number_of_data_sets_has_its_own_bands(ax):
    few, many = calibration(1.0, 50)[0], calibration(1.0, 1000)[0]
    plot_coverage(many, few, ax=ax)
    heights = []
    for area in ax.collections:
        points = area.get_paths()[0].vertices
        middle = points[abs(points[:, 0] - 50 / 101) < 1e-9][:, 1]
        heights.append(float(middle.max() - middle.min()))
    for height, num in zip(heights, (50, 1000), strict=True):
        bands = ecdf_bands(num)
        assert abs(height - float(bands.upper[49] - bands.lower[49])) < 0.1 * height
    assert sum("50 data sets" in label for label in labels(ax)) == 2
    assert sum("1000 data sets" in label for label in labels(ax)) == 2


def test_many_parameters_are_not_dropped_without_a_word_and_the_worst_is_there(ax):
    truths, draws = torch.randn(200, 60, dtype=F64), torch.randn(99, 200, 60, dtype=F64)
    draws[..., 55] *= 0.2
    found = Calibration.of(truths, draws)
    plot_coverage(found, ax=ax)
    assert any("40 worst of 60" in label for label in labels(ax))
    worst = found.credibility[:, 55].sort().values
    drawn = [torch.as_tensor(line.get_xdata()) for line in ax.get_lines() if len(line.get_xdata()) == 200]
    assert len(drawn) == 40 and any(torch.equal(line, worst) for line in drawn)


@pytest.mark.parametrize(("scale", "first"), [(0.5, 1), (2.0, -1)], ids=["too narrow", "too wide"])
def test_balls_draw_an_s_and_intervals_one_side(scale, first):
    """What the docstring of `plot_coverage` reads off the lines."""
    centre, spread = torch.randn(3000, 3, dtype=F64), 0.2
    truths = centre + spread * torch.randn(3000, 3, dtype=F64)
    draws = centre + scale * spread * torch.randn(99, 3000, 3, dtype=F64)
    intervals, balls = Calibration.of(truths, draws), tarp(draws, truths)
    low, high = (balls.coverage([level])[0, 0] - level for level in (0.1, 0.9))
    assert low * first > 0.02 and high * first < -0.02
    for level in (0.2, 0.5, 0.8):
        assert ((intervals.coverage([level])[0] - level) * first < -0.02).all()
