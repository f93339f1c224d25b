"""The look of all pictures: matplotlib's defaults, whatever a matplotlibrc says, and our colours. A run's curves."""

import matplotlib.style
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from lab.files import atomic_write

# Okabe and Ito's palette, safe for colour-blind readers.
COLOURS = BLUE, ORANGE, RED, PURPLE, GREEN, SKY = "#0072b2", "#e69f00", "#d55e00", "#cc79a7", "#009e73", "#56b4e9"
GREY, PALE = "#777777", "#cccccc"
SIGNED = LinearSegmentedColormap.from_list("signed", [BLUE, "white", RED])
FROM_ZERO = LinearSegmentedColormap.from_list("from zero", ["white", ORANGE, RED, "black"])
STYLE = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "legend.frameon": False,
    "savefig.dpi": 150,
}


def style(**settings):
    """A context in which figures are made and saved."""
    return matplotlib.style.context(["default", settings])


def heading(figure, text):
    figure.suptitle(text, x=0.01, ha="left", fontsize=12, fontweight="bold")


def plot_curves(path, title, log):
    """Loss and accuracy over the epochs, a PNG."""
    with style(), atomic_write(path) as tmp:
        figure = Figure(figsize=(8, 3), layout="constrained")
        left, right = figure.subplots(1, 2)
        epochs = [row["epoch"] for row in log]
        left.plot(epochs, [row.get("train_loss") for row in log], ".-", color=BLUE)
        right.plot(epochs, [row.get("train_accuracy") for row in log], ".-", color="#999999", label="train")
        right.plot(epochs, [row.get("test_accuracy") for row in log], ".-", color=RED, label="test")
        for axes in left, right:
            axes.locator_params(axis="x", integer=True, min_n_ticks=1)
        left.set(xlabel="epoch", ylabel="training loss", ylim=(0, None))
        right.set(xlabel="epoch", ylabel="accuracy (%)", ylim=(0, 100))
        right.legend(frameon=False)
        figure.suptitle(title)
        figure.savefig(tmp, format="png", dpi=120)
