"""Pictures show the numbers that they are of, draw into the axes they are given, and leave the rest alone."""

import subprocess
import sys

import numpy as np
import pytest
import torch

matplotlib = pytest.importorskip("matplotlib")

from pyro_sb.bridges import KernelLangevinBridge, LightSB  # noqa: E402
from pyro_sb.diagnostics import Calibration, Line, Report, bridge_report, mode_audit, psis, tarp  # noqa: E402
from pyro_sb.diagnostics.export.container import ChainFigures  # noqa: E402
from pyro_sb.diagnostics.reports.lines import Panel  # noqa: E402
from pyro_sb.infer.model.log_joint import LogJoint  # noqa: E402
from pyro_sb.plots import (  # noqa: E402
    plot_chains,
    plot_coverage,
    plot_history,
    plot_marginal,
    plot_marginals,
    plot_modes,
    plot_paths,
    plot_report,
    plot_sbc,
    plot_weights,
)
from pyro_sb.training import FitHistory  # noqa: E402

F64 = torch.float64


@pytest.fixture(autouse=True)
def backend():
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    yield
    plt.close("all")


@pytest.fixture
def ax():
    import matplotlib.pyplot as plt

    return plt.subplots()[1]


@pytest.fixture
def bridge():
    made = LightSB(2, num_components=2)
    made.fit(torch.randn(200, 2, dtype=F64) + 3, solver="moments", progress=False)
    return made


def calibration(scale=1.0):
    theta = torch.randn(300, 2, dtype=F64)
    y = theta + torch.randn(300, 2, dtype=F64)
    draws = y / 2 + scale * 0.5**0.5 * torch.randn(50, 300, 2, dtype=F64)
    return Calibration.of(theta, draws, ("a", "b")), tarp(draws, theta)


def draw(ax=None, **options):
    """Every picture by name."""
    torch.manual_seed(0)
    bridge = LightSB(2, num_components=2)
    bridge.fit(torch.randn(100, 2, dtype=F64), solver="moments", progress=False)
    ranks, regions = calibration()
    audit = mode_audit(LogJoint.from_batched(lambda z: -(z.abs() - 5).square().sum(-1) / 2, 1), num_particles=200)
    figures = ChainFigures(["a"], np.array([1.0]), np.array([500.0]), np.array([400.0]), 4, 100, 0)
    return {
        "paths": lambda: plot_paths(bridge, 5, 10, ax=ax, **options),
        "marginal": lambda: plot_marginal(torch.randn(50, 1), torch.randn(50, 1), ax=ax, **options),
        "history": lambda: plot_history(FitHistory(losses=[2.0, 1.0], iterations=10), ax=ax, **options),
        "sbc": lambda: plot_sbc(ranks, ax=ax, **options),
        "coverage": lambda: plot_coverage(ranks, regions, ax=ax, **options),
        "modes": lambda: plot_modes(audit, ax=ax, **options),
        "weights": lambda: plot_weights(psis(torch.randn(100)), ax=ax, **options),
        "chains": lambda: plot_chains(figures, ax=ax, **options),
    }


NAMES = ["paths", "marginal", "history", "sbc", "coverage", "modes", "weights", "chains"]


@pytest.mark.parametrize("name", NAMES)
def test_axes_that_are_given_are_drawn_into_and_returned(ax, name):
    import matplotlib.pyplot as plt

    pictures = draw(ax)
    before = plt.get_fignums()
    assert pictures[name]() is ax and ax.has_data()
    assert plt.get_fignums() == before
    ax.figure.canvas.draw()


@pytest.mark.parametrize("name", NAMES)
def test_without_axes_a_figure_is_made(name):
    import matplotlib.pyplot as plt

    pictures = draw()
    before = len(plt.get_fignums())
    made = pictures[name]()
    assert len(plt.get_fignums()) == before + 1 and made.figure.number in plt.get_fignums()


def test_paths_begin_at_the_source_and_end_at_the_target(ax, bridge):
    plot_paths(bridge, 30, 20, axis=0, ax=ax)
    lines = [line.get_xydata() for line in ax.get_lines()]
    assert len(lines) == 30 and all(line[0, 0] == 0 and line[-1, 0] == 1 for line in lines)
    starts = torch.tensor([line[0, 1] for line in lines])
    torch.testing.assert_close(starts, starts[:1].expand(30), rtol=0, atol=1e-12)  # a point, by default
    with pytest.raises(ValueError, match="context must be one"):
        conditional = KernelLangevinBridge(2, context_dim=1)
        conditional.fit(torch.randn(50, 2), context=torch.randn(50, 1), progress=False)
        plot_paths(conditional, 3, 3, torch.zeros(4, 1), ax=ax)


def test_marginals_are_histograms_of_every_coordinate_asked_for(bridge):
    axes = plot_marginals(bridge, torch.randn(300, 2) + 3, torch.randn(300, 2), num_draws=500)
    assert [one.get_xlabel() for one in axes] == ["x[0]", "x[1]"]
    assert {text.get_text() for text in axes[0].get_legend().get_texts()} == {"generated", "target", "source"}
    assert len(plot_marginals(torch.randn(50, 5), coords=[4])) == 1
    with pytest.raises(ValueError, match="at least 2, one a picture, got 1"):
        plot_marginals(bridge, axes=axes[:1])


def test_the_ecdfs_of_the_calibration_are_drawn_and_those_outside_named(ax):
    narrow, _ = calibration(0.4)
    plot_sbc(narrow, ax=ax)
    points = torch.arange(1, 101, dtype=F64) / 101
    expected = narrow.ecdf_difference(points)
    for i in range(2):
        torch.testing.assert_close(torch.from_numpy(ax.get_lines()[i].get_ydata()), expected[:, i], rtol=0, atol=1e-12)
    assert {"a", "b"} <= {text.get_text() for text in ax.get_legend().get_texts()}
    with pytest.raises(ValueError, match=r"got \['c'\]"):
        plot_sbc(narrow, names=["c"], ax=ax)


def test_coverage_rises_from_nothing_to_all(ax):
    ranks, regions = calibration(0.4)
    plot_coverage(ranks, regions, ax=ax)
    step = next(line for line in ax.get_lines() if line.get_label() == "intervals of a parameter")
    x, share = step.get_data()
    at = float(share[x <= 0.9].max())
    assert at == pytest.approx(float(ranks.coverage([0.9])[0, 0]), abs=0.02) and share[-1] == 1
    with pytest.raises(ValueError, match="at least one Calibration"):
        plot_coverage()


def test_bars_are_the_shares_and_a_missing_mode_is_marked(ax):
    joint = LogJoint.from_batched(lambda z: -(z.abs() - 5).square().sum(-1) / 2, 1)
    audit = mode_audit(5 + torch.randn(4, 200, 1, dtype=F64), joint, num_particles=200)
    assert audit.plot(ax=ax) is ax
    heights = [bar.get_height() for bar in ax.patches]
    assert heights[:2] == audit.shares[0].tolist() and heights[4:] == audit.chain_shares.tolist()
    assert "no draw" in [text.get_text() for text in ax.texts]


def test_the_word_for_a_missing_mode_stands_on_the_axis_and_no_share_is_over_one(ax):
    joint = LogJoint.from_batched(lambda z: -(z.abs() - 5).square().sum(-1) / 2, 1)
    audit = mode_audit(5 + torch.randn(4, 200, 1, dtype=F64), joint, num_particles=200)
    plot_modes(audit, ax=ax)
    ax.figure.canvas.draw()
    frame = ax.get_window_extent()
    for text in ax.texts:
        box = text.get_window_extent()
        assert frame.y0 <= box.y0 and box.y1 <= frame.y1 and frame.x0 <= box.x0 and box.x1 <= frame.x1
    assert max(ax.get_yticks()) <= 1
    legend = ax.get_legend().get_window_extent()
    assert frame.x0 <= legend.x0 and legend.x1 <= frame.x1


def test_places_of_modes_are_under_their_bars_and_named_once(ax):
    joint = LogJoint.from_batched(lambda z: -(z.abs() - 5).square().sum(-1) / 2, 1)
    audit = mode_audit(joint, num_particles=200)
    plot_modes(audit, ax=ax)
    shown = [label.get_text().split("\n") for label in ax.get_xticklabels()]
    assert [(int(k), float(value)) for k, value in shown] == [
        (k, pytest.approx(float(audit.centres[k, 0]), abs=0.01)) for k in range(2)
    ]
    assert ax.get_xlabel() == "mode, and z[0] there"


def test_what_a_report_says_below_its_pictures_stays_inside_the_figure():
    line = Line("draws", "mode 1: share 0.000, populations 0.272, z -38.5", "bad", "use another move, " * 8)
    figure = Report("title", [line], [Panel("a", lambda ax: ax.plot([0, 1]))]).plot()[0].figure
    figure.canvas.draw()
    frame, words = figure.get_window_extent(), figure._supxlabel.get_window_extent()
    assert frame.x0 <= words.x0 and words.x1 <= frame.x1


@pytest.mark.parametrize(("low", "high"), [(410, 900), (300, 4000), (20, 60000)])
def test_labels_of_chains_stay_apart_and_inside(low, high):
    names = [f"theta[{i}]" for i in range(8)]
    ess = np.geomspace(low, high, 8)
    ax = plot_chains(ChainFigures(names, np.linspace(1.0, 1.02, 8), ess, ess, 4, 100, 0), figsize=(4.6, 3.6))
    ax.figure.canvas.draw()
    left, right = ax.get_xlim()
    boxes = [
        label.get_window_extent()
        for value, label in zip(ax.get_xticks(), ax.get_xticklabels())
        if label.get_text() and left <= value <= right
    ]
    assert len(boxes) >= 2 and all(a.x1 < b.x0 for a, b in zip(boxes, boxes[1:]))
    assert all(not label.get_text() for label in ax.get_xticklabels(minor=True))
    word, frame = ax.texts[0].get_window_extent(), ax.get_window_extent()
    assert ax.texts[0].get_text() == "theta[7]" and frame.x0 <= word.x0 and word.x1 <= frame.x1


# ---- options ----


@pytest.mark.parametrize("name", NAMES)
def test_a_size_is_the_new_figures(name, ax):
    made = draw(figsize=(3, 2))[name]()
    assert made.figure.get_size_inches().tolist() == [3, 2]
    with pytest.raises(ValueError, match="figsize is a new figure's, got ax too"):
        draw(ax, figsize=(3, 2))[name]()


@pytest.mark.parametrize("name", NAMES)
def test_keywords_reach_the_main_artist_however_they_are_spelt(name):
    ax = draw(color="red", lw=3)[name]()
    artists = [*ax.get_lines(), *ax.patches, *ax.collections]
    found = [any(matplotlib.colors.same_color(one, "red") for one in _colours(artist)) for artist in artists]
    widths = {float(np.max(one.get_linewidth())) for one, red in zip(artists, found) if red}
    assert any(found) and widths == {3.0}


def _colours(artist):
    """Of a line, or of a shape's face and edge, without their transparency."""
    asked = ("get_color",) if hasattr(artist, "get_color") else ("get_facecolor", "get_edgecolor")
    rows = [row for ask in asked for row in matplotlib.colors.to_rgba_array(getattr(artist, ask)())]
    return [tuple(row[:3]) for row in rows]


# ---- what is none ----


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: plot_marginals(torch.randn(50)), ValueError, r"draws must have shape \(draws, 1\).*\[:, None\]"),
        (lambda: plot_marginals(torch.randn(50, 2), torch.randn(50, 3)), ValueError, r"target must have shape"),
        (lambda: plot_marginals(torch.randn(50, 2), coords=[2]), ValueError, r"coords must be.*0 to 1, got \[2\]"),
        (lambda: plot_marginals(torch.randn(50, 2), coords=[]), ValueError, "coords must be"),
        (lambda: plot_marginal(torch.randn(50, 2), coord=5), ValueError, r"coord must be.*got \[5\]"),
        (lambda: plot_marginal(torch.full((50, 1), torch.nan)), ValueError, "draws must be finite"),
        (lambda: plot_marginals("draws"), TypeError, "draws must hold numbers, got 'draws'"),
        (lambda: plot_marginals(None), TypeError, "draws must hold numbers, got None"),
        (lambda: plot_marginals(torch.randn(50, 2), context=torch.zeros(1)), ValueError, "context is a conditional"),
        (lambda: plot_paths(torch.randn(50, 2)), TypeError, "bridge must be a Bridge, got Tensor"),
        (lambda: plot_history([1.0]), TypeError, "history must be a FitHistory, got list"),
        (lambda: plot_modes(3), TypeError, r"audit must be a ModeAudit, got int. Write mode_audit\("),
        (lambda: plot_weights(torch.randn(100)), TypeError, r"result must be a PSIS.*psis\("),
        (lambda: plot_chains({}), TypeError, "figures must be a ChainFigures"),
        (lambda: plot_sbc(torch.zeros(3)), TypeError, "calibration must be a Calibration"),
        (lambda: plot_coverage(torch.zeros(3)), TypeError, "calibrations must be a Calibration"),
        (lambda: plot_report(3), TypeError, "report must be a Report"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_words(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_coordinate_that_a_bridge_has_not_is_refused(bridge):
    for axis in (2, (0, 3), (0, 1, 1)):
        with pytest.raises(ValueError, match="axis must be"):
            plot_paths(bridge, axis=axis)
    conditional = KernelLangevinBridge(2, context_dim=1)
    conditional.fit(torch.randn(50, 2), context=torch.randn(50, 1), progress=False)
    with pytest.raises(ValueError, match="context must be one"):
        plot_marginals(conditional, context=torch.zeros(4, 1))


def test_arrays_distributions_points_and_constants_are_drawn():
    law = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
    axes = plot_marginals(np.random.default_rng(0).normal(size=(50, 2)), law, np.full((5, 2), 9.0))
    assert len(axes) == 2 and all(one.get_xlim()[1] > 9 for one in axes)  # the point is in the picture
    assert plot_marginal(np.ones((50, 1)), np.ones((20, 1))).has_data()
    far = plot_marginal(torch.randn(3, 1), 1e4 + torch.randn(50000, 1))
    low, high = far.get_xlim()
    assert low < 3 and high > 1e4


def test_a_history_shows_losses_and_residuals(ax):
    history = FitHistory(losses=[3.0, 2.0], validation_losses=[3.1, 2.1], residuals=[0.1, 0.01], iterations=40)
    plot_history(history, ax=ax)
    assert [list(line.get_ydata()) for line in ax.get_lines()] == [[3.0, 2.0], [3.1, 2.1]]
    assert "40 updates" in ax.get_title() and ax.get_lines()[0].get_xdata()[-1] == 40
    assert plot_history(FitHistory(residuals=[1.0, 1e-9], iterations=2)).get_yscale() == "log"
    with pytest.raises(ValueError, match="losses or residuals, got neither"):
        plot_history(FitHistory(), ax=ax)


def test_a_report_is_one_figure_with_a_picture_a_panel(bridge):
    report = bridge_report(bridge, torch.randn(300, 2, dtype=F64) + 3)
    axes = report.plot()
    assert len(axes) == 2 and all(one.has_data() for one in axes)
    assert report.verdict in axes[0].figure.get_suptitle()
    axes[0].figure.canvas.draw()
    with pytest.raises(ValueError, match="has no pictures"):
        plot_report(Report("title", [Line("a", "", "ok")]))


def test_matplotlib_is_imported_by_the_first_picture_alone():
    code = "import sys, pyro_sb.plots; print('matplotlib.pyplot' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pip install 'pyro-sb\[plot\]'"):
        plot_weights(psis(torch.randn(100)))
