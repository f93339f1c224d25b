"""A run: its data set, model and accuracy, and the files in its folder, which train.py writes and all scripts read."""

import io
import itertools
import math
import warnings
import zipfile
from contextlib import contextmanager

import torch

from lab.cli import UserError, first_line, is_out_of_memory
from lab.data import CIFAR100, Bearing, BearingCorner
from lab.distributed import total
from lab.files import read_json, replacing, write_json
from lab.imagenet import ImageNet
from vit import ViT

DATASETS = {"cifar100": CIFAR100, "imagenet": ImageNet, "bearing": Bearing, "bearing-corner": BearingCorner}


def make_vit(**options):
    """A ViT; an invalid option raises a UserError with the ViT's own message."""
    try:
        return ViT(**options)
    except (TypeError, ValueError) as e:
        raise UserError(e) from e


@torch.no_grad()
def accuracy(model, batches, amp, pos=lambda: None):
    """Accuracy (%) of the model on the batches of all ranks together; NaN if there are no images.

    pos() returns each batch's positions (T, 2), or None for the model's own.
    """
    model.eval()
    count = torch.zeros(2, dtype=torch.int64, device=next(model.parameters()).device)  # correct, tested
    for images, labels in batches:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
            correct = (model(images, pos()).argmax(dim=1) == labels).sum()
        count += torch.stack([correct, torch.full_like(correct, len(labels))])
    correct, tested = total(count).tolist()
    return 100 * correct / tested if tested else math.nan


def check_folder(folder):
    """Raise a UserError if a new run would overwrite existing files."""
    if (folder / "last.pt").exists():
        raise UserError(f"{folder} holds a run: add --resume to continue it, or choose another folder with --out")
    for path in folder / "config.json", folder / "result.json":  # also left by a run killed before its first checkpoint
        if path.exists() and "pe" not in read_json(path):
            raise UserError(f"{path} does not belong to a run: choose another folder with --out")


def then_resume(folder):
    """The end of a message, if there is something to resume."""
    return ", then continue with --resume" if (folder / "last.pt").exists() else ""


def write_config(folder, config):
    check_folder(folder)
    write_json(folder / "config.json", config)
    for name in "result.json", "evaluation.json":  # left by a run whose checkpoint is gone
        (folder / name).unlink(missing_ok=True)


def write_result(folder, result, log):
    plot_curves(folder / "curves.png", "{pe} on {dataset}, seed {seed}".format(**result), log)
    write_json(folder / "result.json", result)


def finite(weights):
    """Whether all weights of a state dict are finite."""
    return all(bool(weight.isfinite().all()) for weight in weights.values())


def save_checkpoint(folder, config, model, optimizer, state):
    """Write last.pt and curves.png. config holds what determines the result; state is a dict saved as is."""
    (folder / "evaluation.json").unlink(missing_ok=True)  # it describes the weights that are replaced here
    saved = {"config": config, "model": model.state_dict(), "optimizer": optimizer.state_dict()} | state
    buffer = io.BytesIO()
    torch.save(saved, buffer)  # not to disk: torch.save hides a full disk behind a RuntimeError
    with replacing(folder / "last.pt") as tmp:
        tmp.write_bytes(buffer.getbuffer())
    if state["log"]:
        plot_curves(folder / "curves.png", "{pe} on {dataset}, seed {seed}".format(**config), state["log"])


def load_checkpoint(folder, config, model, optimizer, state):
    """Load model, optimizer and state from last.pt, or raise a UserError."""
    if not (folder / "last.pt").is_file():
        raise UserError(
            f"there is no {folder}/last.pt to continue: leave --resume out, or name a run's folder with --out"
        )
    saved = read_checkpoint(folder, state["totals"].device)
    if changed := [name for name, value in config.items() if saved["config"].get(name) != value]:
        names = ("the data set" if name == "data_set" else f"--{name.replace('_', '-')}" for name in changed)
        pairs = (f"was {saved['config'].get(name)}, is {config[name]}" for name in changed)
        differ = ", ".join(map(" ".join, zip(names, pairs, strict=True)))
        raise UserError(f"{folder / 'last.pt'} has another configuration: {differ}")
    with reading(folder / "last.pt"):
        model.load_state_dict(saved["model"])
        groups = optimizer.state_dict()["param_groups"]  # this run's
        optimizer.load_state_dict({"state": saved["optimizer"]["state"], "param_groups": groups})
        for p in itertools.chain(*(group["params"] for group in optimizer.param_groups)) if saved["step"] else ():
            moments = optimizer.state[p]
            for name, like in ("step", torch.zeros((), device=p.device)), ("exp_avg", p), ("exp_avg_sq", p):
                if moments[name].shape != like.shape:  # fused kernels check neither shapes nor strides
                    raise ValueError(f"{name} is {tuple(moments[name].shape)}, not {tuple(like.shape)}")
                moments[name] = torch.zeros_like(like).copy_(moments[name])
        saved["totals"] = state["totals"].copy_(saved["totals"])
        state.update((name, saved[name]) for name in state)


def read_run(folder, device="cpu"):
    """A run's folder -> the content of its last.pt, and its model."""
    saved = read_checkpoint(folder, device)
    with reading(folder / "last.pt"):
        model = make_vit(**saved["vit"]).to(device)
        model.load_state_dict(saved["model"])
    return saved, model


# What the files of train.py and lab.evaluate must contain: names, and the types or names of their values.
NUMBER = int, float
CHECKPOINT = {
    "config": {"pe": str, "dataset": str, "seed": int, "epochs": int, "pe_options": dict, "data_set": str},
    "model": dict,
    "optimizer": {"state": dict},
    "vit": dict,
    "data": dict,
    "log": [{"epoch": int} | dict.fromkeys(("train_loss", "train_accuracy", "test_accuracy"), NUMBER)],
    "step": int,
    "seconds": NUMBER,
    "totals": torch.Tensor,
}
RESULT = {"device": str, "torch": str, "epochs": int}
RESULT |= dict.fromkeys(("test_accuracy", "train_seconds", "images_per_second"), NUMBER)


def checkpoint(folder):
    """The path of last.pt, or a UserError."""
    if not (path := folder / "last.pt").is_file():
        raise UserError(f"there is no {path}: name folders that train.py has written")
    return path


def read_checkpoint(folder, device):
    """The content of last.pt. Raises a UserError if it is corrupt or its weights are not finite."""
    path = checkpoint(folder)
    content = io.BytesIO(path.read_bytes())
    with reading(path), warnings.catch_warnings(action="ignore"):
        if corrupt := zipfile.ZipFile(content).testzip():  # torch does not verify checksums
            raise ValueError(f"bad checksum of {corrupt}")
        content.seek(0)
        saved = torch.load(content, map_location=device, weights_only=True)
        require(saved, CHECKPOINT)
        if not finite(saved["model"]):
            raise UserError(f"{path} holds weights that are not finite: train again with a lower --lr")
    return saved


def read_result(folder):
    """The content of result.json; {} if the run has not finished."""
    path = folder / "result.json"
    with reading(path):
        result = require(read_json(path), RESULT) if path.exists() else {}
        if result and not result["images_per_second"] > 0:
            raise ValueError("images_per_second is not positive")
        return result


def read_evaluation(folder):
    """The content of evaluation.json, {kind: {which: accuracy}}; {} if the run has not been evaluated."""
    path = folder / "evaluation.json"
    with reading(path):
        found = read_json(path)
        if found:
            require(found, {kind: dict.fromkeys(found[kind], NUMBER) for kind in found} | {"test": {"test": NUMBER}})
            for kind, name in (int, "size"), (float, "shift"), (float, "patch shift"):
                list(map(kind, found.get(name, {})))
        return found


def require(content, pattern):
    """Return content if it has the pattern's names and types, else raise TypeError, KeyError or ValueError."""
    if isinstance(pattern, dict):
        for name, of_value in pattern.items():
            require(content[name], of_value)
    elif isinstance(pattern, list):
        for item in content:
            require(item, *pattern)
    elif not isinstance(content, pattern) or (pattern is NUMBER and not math.isfinite(content)):
        raise TypeError(f"unexpected value {content!r:.20}")
    return content


@contextmanager
def reading(path):
    """Turn any error in the block into a UserError that says that the file at `path`, read there, is corrupt."""
    try:
        yield
    except Exception as e:  # a corrupt file can fail in any way
        if isinstance(e, UserError) or is_out_of_memory(e):
            raise
        raise UserError(f"{path} is corrupt, or of another version ({first_line(e)}): restore it from a copy") from e


def plot_curves(path, title, log):
    """Loss and accuracy over the epochs, a PNG."""
    from matplotlib.figure import Figure  # here because it takes half a second

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
