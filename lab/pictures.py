"""Pictures in files, with matplotlib's own defaults, whatever a matplotlibrc says."""

import matplotlib.style
from matplotlib.figure import Figure

from lab.files import atomic_write


def style(**settings):
    """A context in which figures are made and saved."""
    return matplotlib.style.context(["default", settings])


def plot_curves(path, title, log):
    """Loss and accuracy over the epochs, a PNG."""
    with style(), atomic_write(path) as tmp:
        curves(title, log).savefig(tmp, format="png", dpi=120)


def curves(title, log):
    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in log]
    left.plot(epochs, [row["train_loss"] for row in log], ".-", color="#0072b2")
    right.plot(epochs, [row["train_accuracy"] for row in log], ".-", color="#999999", label="train")
    right.plot(epochs, [row["test_accuracy"] for row in log], ".-", color="#d55e00", label="test")
    for axes in left, right:
        axes.locator_params(axis="x", integer=True, min_n_ticks=1)
    left.set(xlabel="epoch", ylabel="training loss", ylim=(0, None))
    right.set(xlabel="epoch", ylabel="accuracy (%)", ylim=(0, 100))
    right.legend(frameon=False)
    figure.suptitle(title)
    return figure
