"""Plots of few and of many layers, of one and of many evaluations and variants: all that they show fits and reads."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from xlayer_systems.bypass.plots import plot_projectors, plot_reconstruction
from xlayer_systems.hyper_lm.plots import plot_layers
from xlayer_systems.lformer.plots import plot_paths
from xlayer_systems.reporting.plots import plot_curves, plot_depth, plot_losses
from xlayer_systems.telepathy.plots import PANELS, plot_bridges
from xlayer_systems.xlrb import plot_usage

pytestmark = pytest.mark.filterwarnings("error::UserWarning")  # "constrained_layout not applied": it did not fit
SIZES = [(4, 3), (4, 1), (30, 3), (30, 1)]  # layers, evaluations


def curve(layer: int, epoch: int) -> float:
    return 0.1 + 0.02 * layer * (1 - math.exp(-epoch))


def by_layer(layers: int, epoch: int, prefix: str = "") -> dict[str, float]:
    return {f"{prefix}{layer}": curve(layer, epoch) for layer in range(layers)}


def records(layers: int, epochs: int, offset: float = 0.0) -> list[dict[str, Any]]:
    """Makes evaluations with everything that some plot draws."""
    found: list[dict[str, Any]] = []
    for epoch in range(1, epochs + 1):
        found.append({"event": "train", "step": 10 * epoch, "epoch": epoch, "loss_ema": 2 / epoch + offset})
        usage = {
            "projectors": by_layer(layers, epoch),
            "gates": by_layer(layers, epoch),
            "movement": by_layer(layers, epoch),
            "similarity": by_layer(2 * layers, epoch, "layers."),
        }
        values = {"accuracy": 0.5 + 0.1 * epoch + offset, "r2_mean": 0.5, "similarity": 0.3, "perplexity": 7.0}
        found.append(
            {"event": "eval", "step": 10 * epoch, "epoch": epoch, **values, "usage": usage,
             "gradient_norms": by_layer(layers, epoch, "layers.")}
        )  # fmt: skip
    return found


def evaluations(layers: int, epochs: int, offset: float = 0.0) -> list[dict[str, Any]]:
    return [record for record in records(layers, epochs, offset) if record["event"] == "eval"]


def usage(layers: int, epoch: int) -> dict[str, Any]:
    """Makes what a bridge on so many target layers reports."""
    kinds = ("attn", "hdim")
    names = ("gate", "norm", "gate_variance_over_eps")
    return {
        "layers": {
            str(layer): {
                **{f"{name}_{kind}": curve(layer, epoch) + at for name in names for at, kind in enumerate(kinds)},
                "router_entropy": curve(layer, epoch),
                "sources": [1 + (layer + source) % 5 for source in range(layer + 1)],
            }
            for layer in range(layers)
        }
    }


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Figure]]:
    """Checks, as a figure is saved, that legends lie inside the page and names below an axis do not overlap."""
    figures: list[Figure] = []
    save: Callable[..., None] = Figure.savefig

    def checked(figure: Figure, *arguments: Any, **options: Any) -> None:
        save(figure, *arguments, **options)
        figure.canvas.draw()
        page = figure.bbox.padded(2)
        legends = [axis.get_legend() for axis in figure.axes if axis.get_legend()] + figure.legends
        for legend in legends:
            box = legend.get_window_extent()
            assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
        for axis in figure.axes:
            assert min(axis.get_window_extent().size) > 8  # pixels; the thinnest are colour bars
            for text in (axis.xaxis, axis.yaxis):
                places = [label.get_window_extent() for label in text.get_ticklabels() if label.get_text()]
                low, high = ("x0", "x1") if text.axis_name == "x" else ("y0", "y1")
                rotated = any(label.get_rotation() for label in text.get_ticklabels())
                for first, second in itertools.pairwise(places) if not rotated else ():
                    assert getattr(first, high) <= getattr(second, low) or getattr(second, high) <= getattr(first, low)
        figures.append(figure)

    monkeypatch.setattr(Figure, "savefig", checked)
    yield figures
    assert figures


@pytest.mark.parametrize(("layers", "epochs"), SIZES)
def test_plots_of_layers(drawn: list[Figure], tmp_path: Path, layers: int, epochs: int) -> None:
    name = f"{layers}-{epochs}.png"
    history = evaluations(layers, epochs)
    plot_usage([usage(layers, epoch) for epoch in range(1, epochs + 1)], tmp_path / f"usage-{name}")
    assert plot_projectors(history, tmp_path / f"projectors-{name}")
    assert plot_paths({"": [history]}, tmp_path / f"paths-{name}")
    plot_layers(history, tmp_path / f"layers-{name}")
    scores = [curve(layer, 1) for layer in range(layers)]
    plot_reconstruction(scores, scores, history, tmp_path / f"reconstruction-{name}")
    plot_depth({"plain": history[-1:], "dhc": history[-1:]}, tmp_path / f"depth-{name}")
    plot_curves({"H9": [records(layers, epochs)]}, tmp_path / f"curves-{name}", 0.4)
    for figure in drawn:
        for axis in figure.axes:
            colors = [line.get_color() for line in axis.get_lines() if len(line.get_xdata())]
            if layers == 30 and epochs == 3 and len(colors) > 20:
                assert len(set(map(str, colors))) >= 20  # no colour stands for two layers


@pytest.mark.parametrize("variants", [2, 30])
@pytest.mark.parametrize("epochs", [1, 3])
def test_plots_of_sweeps(drawn: list[Figure], tmp_path: Path, variants: int, epochs: int) -> None:
    file = f"{variants}-{epochs}.png"
    names = [f"H{index}:router_weight=full_softmax" for index in range(variants)]
    runs = {name: [records(4, epochs, 0.01 * index)] for index, name in enumerate(names)}
    plot_curves(runs, tmp_path / f"sweep-{file}", 0.4)
    evaluated = {name: [[record for record in seeds[0] if record["event"] == "eval"]] for name, seeds in runs.items()}
    plot_bridges(evaluated, tmp_path / f"bridges-{file}")
    assert [axis.get_ylabel() for axis in drawn[-1].axes] == [label for _, label in PANELS]
    plot_paths(evaluated, tmp_path / f"paths-{file}")
    curves = {name: [[(100 * e, 3 / e + 0.01 * i) for e in range(1, epochs + 1)]] for i, name in enumerate(names)}
    plot_losses(curves, tmp_path / f"losses-{file}", 1.0)


def test_a_single_evaluation_is_a_dot_with_its_value(drawn: list[Figure], tmp_path: Path) -> None:
    plot_curves({"H9": [records(4, 1)]}, tmp_path / "curves.png")
    (line,) = drawn[0].axes[1].get_lines()
    assert line.get_marker() == "o" and line.get_markersize() > 5
    assert [text.get_text() for text in drawn[0].axes[1].texts] == ["0.6"]
    low, high = drawn[0].axes[1].get_xlim()
    assert [tick for tick in drawn[0].axes[1].get_xticks() if low <= tick <= high] == [1.0]


def test_a_run_without_a_step_has_a_plot(drawn: list[Figure], tmp_path: Path) -> None:
    plot_losses({"plain": [[(0, 3.0)]]}, tmp_path / "losses.png")
