"""A run: its data set, its model and its accuracy; what train.py writes into its folder, and all scripts read there."""

import io
import math
from contextlib import contextmanager

import torch
from matplotlib.figure import Figure

from lab.cli import UserError
from lab.data import CIFAR100, Bearing, BearingCorner
from lab.distributed import total
from lab.files import replacing
from lab.imagenet import ImageNet
from vit import ViT

DATASETS = {"cifar100": CIFAR100, "imagenet": ImageNet, "bearing": Bearing, "bearing-corner": BearingCorner}


def make_vit(**options):
    """A ViT; its own word on an option that cannot be is a UserError."""
    try:
        return ViT(**options)
    except (TypeError, ValueError) as e:
        raise UserError(e) from e


@torch.no_grad()
def accuracy(model, batches, amp, pos=lambda: None):
    """The percentage of the batches' images that the model gets right, all ranks' batches taken together.

    pos() gives each batch's positions (T, 2).
    """
    model.eval()
    count = torch.zeros(2, dtype=torch.int64, device=next(model.parameters()).device)  # correct, tested
    for images, labels in batches:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
            correct = (model(images, pos()).argmax(dim=1) == labels).sum()
        count += torch.stack([correct, torch.full_like(correct, len(labels))])
    correct, tested = total(count).tolist()
    return 100 * correct / tested if tested else math.nan


def save_checkpoint(folder, config, model, optimizer, state):
    """Write last.pt and curves.png. config is what decides the run's result, state a dict that is kept as it is."""
    (folder / "evaluation.json").unlink(missing_ok=True)  # of the weights that are replaced here
    saved = {"config": config, "model": model.state_dict(), "optimizer": optimizer.state_dict()} | state
    buffer = io.BytesIO()
    torch.save(saved, buffer)  # not to the disk: if that is full, torch.save hides it behind a RuntimeError
    with replacing(folder / "last.pt") as tmp:
        tmp.write_bytes(buffer.getbuffer())
    if state["log"]:
        plot_curves(folder / "curves.png", "{pe} on {dataset}, seed {seed}".format(**config), state["log"])


def load_checkpoint(folder, config, model, optimizer, state):
    """Fill in model, optimizer and state from last.pt, or raise a UserError that says why not."""
    path = folder / "last.pt"
    if not path.exists():
        raise UserError(f"there is no {path} to continue: leave --resume out, or name the run's folder with --out")
    with reading(path, "delete it and start again without --resume"):
        saved = torch.load(path, map_location=state["totals"].device, weights_only=True)
        changed = [name for name, value in config.items() if saved["config"].get(name) != value]
        if changed:
            flags = (f"--{k.replace('_', '-')} was {saved['config'].get(k)}, is {config[k]}" for k in changed)
            raise UserError(f"{path} is of another configuration: {', '.join(flags)}")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        state.update((name, saved[name]) for name in state)


def read_run(folder, device="cpu"):
    """The folder of a run -> what its last.pt holds, and its model."""
    path = folder / "last.pt"
    if not path.exists():
        raise UserError(f"there is no {path}: name folders that train.py has written")
    with reading(path, "train it again"):
        saved = torch.load(path, map_location=device, weights_only=True)
        model = make_vit(**saved["vit"]).to(device)
        model.load_state_dict(saved["model"])
    return saved, model


@contextmanager
def reading(path, advice):
    """What fails in the block, fails because the checkpoint at `path` is corrupt: a UserError says so."""
    try:
        yield
    except Exception as e:  # a corrupt file can fail in any way
        if isinstance(e, UserError | torch.OutOfMemoryError) or getattr(e, "filename", None):  # it cannot be opened
            raise
        raise UserError(f"{path} is corrupt, or not a checkpoint of train.py: {advice}") from e


def plot_curves(path, title, log):
    """Loss and accuracy over the epochs, a PNG."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, name, colour in (
        (left, "train_loss", "#0072b2"),
        (right, "train_accuracy", "#999999"),
        (right, "test_accuracy", "#d55e00"),
    ):
        axes.plot(
            [row["epoch"] for row in log], [row[name] for row in log], ".-", color=colour, label=name.split("_")[0]
        )
        axes.locator_params(axis="x", integer=True, min_n_ticks=1)
    left.set(xlabel="epoch", ylabel="training loss", ylim=(0, None))
    right.set(xlabel="epoch", ylabel="accuracy (%)", ylim=(0, 100))
    right.legend(frameon=False)
    figure.suptitle(title)
    with replacing(path) as tmp:
        figure.savefig(tmp, format="png", dpi=120)
