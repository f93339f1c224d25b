"""A run's folder: config.json, log.csv, curves.png, last.pt, and the results of train.py and lab.evaluate."""

import io
import json
import sys
import zipfile

import torch

from lab.checkpoint import from_bytes, give_back, not_finite, snapshot, to_bytes, unreadable
from lab.errors import UserError, first_line
from lab.files import atomic_write, plain, read_json
from lab.imagenet import IMAGENET_1K, imagenet_classes
from vit import ViT


def check_folder(folder, resume):
    """Raise a UserError if there is no run to resume, or if a new one would overwrite something."""
    last = folder / "last.pt"
    if resume and not last.is_file():
        raise UserError(f"there is no {last} to continue: leave --resume out, or name a run's folder with --out")
    if not resume and last.exists():
        raise UserError(f"{folder} holds a run: add --resume to continue it, or choose another folder with --out")
    if not resume and "pe" not in read_json(folder / "config.json"):  # a killed run left that
        for name in "config.json", "log.csv", "curves.png", "result.json", "evaluation.json":
            if (folder / name).exists():
                raise UserError(f"{folder / name} does not belong to a run: choose another folder with --out")


def save_checkpoint(folder, state, config, **about):
    """Write last.pt and curves.png: the state, the flags that determine the result, and what readers need to know.

    What is written has been read back: there is always a last.pt that can be read. Weights that are not finite are not
    saved.
    """
    if found := not_finite(state["model"], state["optimizer"]):
        raise UserError(f"{found} became NaN or infinite: try a lower --lr", code=1)
    about |= {"config": plain(config), "parameters": optimized_names(state)}
    if taken := sorted(state.keys() & about.keys()):
        raise UserError(f"a checkpoint cannot hold state[{taken[0]!r}]: it has a part of that name, choose another")
    saved = snapshot(state) | about
    try:
        content = to_bytes(saved)
        from_bytes(content)
    except Exception as e:  # objects can fail in any way
        raise UserError(f"a checkpoint cannot hold {unreadable(saved)}: make it a number, text or a tensor") from e
    for name in "result.json", "evaluation.json":  # they describe the weights that are replaced here
        (folder / name).unlink(missing_ok=True)
    with atomic_write(folder / "last.pt") as tmp:
        tmp.write_bytes(content)
    if state["log"]:
        try:
            from lab.pictures import plot_curves  # here because matplotlib takes half a second

            plot_curves(folder / "curves.png", "{pe} on {dataset}, seed {seed}".format(**config), state["log"])
        except Exception as e:  # no run depends on its picture, nor on matplotlib
            print(f"warning: {folder / 'curves.png'} could not be drawn: {first_line(e)}", file=sys.stderr)


def load_checkpoint(folder, state, config):
    """Give back what save_checkpoint saved. Raises UserError if it is of another configuration or does not fit."""
    path, saved, config = folder / "last.pt", read_checkpoint(folder), plain(config)
    for name in config.keys() - saved["config"].keys():
        print(f"{path} is older than {flag(name)}, which is {config[name]} from here on")
    if changed := differing(saved["config"], config):
        pairs = (f"{flag(name)} was {saved['config'][name]}, is {config[name]}" for name in changed)
        raise UserError(f"{path} has another configuration: {', '.join(pairs)}")
    if missing := state.keys() - saved.keys():
        raise UserError(f"{path} has no {', '.join(sorted(missing))}: start another run, with another --out")
    for name, x in state.items():
        try:
            state[name] = give_back(x, saved[name])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as e:
            raise UserError(f"{path} does not fit this {name}, which has changed since: {e}") from e
    if saved.get("parameters", optimized_names(state)) != optimized_names(state):
        raise UserError(f"{path} does not fit this optimizer: its parameters were others, or in another order")
    read_of_run(folder / "result.json", config)


def optimized_names(state):
    """The optimizer's parameters, in order: its own state knows them by number alone."""
    names = {p: name for name, p in state["model"].named_parameters()}
    return [names.get(p) for group in state["optimizer"].param_groups for p in group["params"]]


def read_checkpoint(folder):
    """The content of last.pt, on the CPU. Raises UserError if there is none or it cannot be read."""
    path = folder / "last.pt"
    if not path.is_file():
        raise UserError(f"there is no {path}: name folders that train.py has written")
    content = path.read_bytes()
    try:
        damaged = zipfile.ZipFile(io.BytesIO(content)).testzip()  # torch does not verify checksums
    except zipfile.BadZipFile as e:
        damaged = e
    if damaged:
        raise UserError(f"{path} is corrupt ({damaged}): restore it from a copy")
    try:
        saved = from_bytes(content)
        saved["config"], saved["model"], saved["vit"], saved["data"], saved["log"]
    except Exception as e:  # other content can fail in any way
        raise UserError(f"{path} is not a checkpoint of train.py ({first_line(e)}): move it away") from e
    return saved


def read_run(folder, device="cpu"):
    """A run's folder -> the content of its last.pt, and its model."""
    saved = read_checkpoint(folder)
    try:
        model = ViT(**saved["vit"])
        model.load_state_dict(saved["model"])
    except (RuntimeError, TypeError, ValueError) as e:
        raise UserError(f"{folder / 'last.pt'} does not fit the model, which has changed since ({e})") from e
    return saved, model.to(device)


def class_labels(run, data, trained_on):
    """The model's label for each class of the data: by name if it knows ImageNet's classes, and else the same."""
    if trained_on == IMAGENET_1K:
        label = {name: i for i, name in enumerate(imagenet_classes())}
        if others := [name for name in data.classes if name not in label]:
            fix = f"name folders as ImageNet's (n01440764 ...), or fine-tune with train.py --init {run}"
            raise UserError(f"{run} knows ImageNet's classes, {data.root} has others, such as {others[0]}: {fix}")
        return torch.tensor([label[name] for name in data.classes])
    if trained_on != data.fingerprint:
        raise UserError(f"{run} was trained on {trained_on}, {data.root} has {data.fingerprint}: change --data-dir")
    return torch.arange(data.num_classes)


def read_of_run(path, config):
    """A result of the run of this configuration, from a JSON file that names it; {} if there is none."""
    found = read_json(path)
    if other := differing(found, config):
        names = ", ".join(f"{name} {found[name]}" for name in other)
        raise UserError(f"{path} belongs to another run ({names}): delete it, and generate it again")
    return found


def differing(a, b):
    """The names whose values differ in two dicts of plain values, where both have them. (NaN is NaN.)"""
    return [name for name in a if name in b and json.dumps(a[name]) != json.dumps(b[name])]


def flag(name):
    return "the data set" if name == "data_set" else f"--{name.replace('_', '-')}"
