"""Train a small ViT with the position encoding of your choice.

    python train.py --pe spherical --dataset bearing    # a minute or two on a laptop's CPU, nothing to download
    python train.py --pe spherical                      # CIFAR-100, which wants a GPU
    python train.py --pe spherical --dataset imagenet --data-dir DIR    # ImageNet: DIR/train/<class>/, DIR/val/<class>/

A run writes runs/<dataset>-<pe>-s<seed>/: config.json, log.csv (a row an epoch), curves.png, last.pt and, at its end,
result.json. Ctrl-C stops a run; the same command with --resume goes on with it, also after a crash, and on a CPU to the
very same weights: all that is random in a step is drawn from generators that the seed and the step's number determine.
"""

import argparse
import csv
import json
import math
import signal
import sys
import time
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

from common import (
    DATASETS,
    Parser,
    accuracy,
    add_device_flags,
    autocast,
    command,
    device_name,
    environment,
    failed,
    number,
    reading,
    usable_device,
    write_json,
)
from data import AUGMENT, DataError, replacing
from lamb import LAMB
from vit import ENCODINGS, ViT

RECIPES = {
    "cifar100": {  # van de Geijn et al. 2025, tables 5 and 6, after DeiT III (Touvron et al. 2022)
        "epochs": 400,
        "batch_size": 1024,
        "opt": "lamb",
        "warmup_epochs": 5,
        "augment": "mix",
        "patch_size": 4,
        "depth": 12,
        "heads": 6,
        "head_dim": 60,
        "dropout": 0.1,
        "drop_path": 0.1,
        "layer_scale": 1e-4,
    },
    "imagenet": {
        "epochs": 200,
        "batch_size": 512,
        "opt": "lamb",
        "warmup_epochs": 5,
        "augment": "3",
        "patch_size": 16,
        "depth": 12,
        "heads": 6,
        "head_dim": 64,
        "dropout": 0.0,
        "drop_path": 0.0,
        "layer_scale": 1e-4,
    },
    "bearing": {
        "epochs": 10,
        "batch_size": 64,
        "opt": "adamw",
        "lr": 2e-3,
        "warmup_epochs": 1,
        "augment": "none",
        "patch_size": 4,
        "depth": 2,
        "heads": 4,
        "head_dim": 24,
        "dropout": 0.0,
        "drop_path": 0.0,
        "layer_scale": 0.0,
    },
}
RECIPES["bearing-corner"] = RECIPES["bearing"]
OPTIMIZERS = {"lamb": LAMB, "adamw": partial(torch.optim.AdamW, fused=True)}
LEARNING_RATES = {"lamb": 4e-3, "adamw": 1e-3}  # where a recipe has none
IMAGENET = {"img_size": 224, "eval_size": None, "workers": 8, "limit_classes": None, "skip_damaged": False}  # its flags
FREE_TO_CHANGE = {"data_dir", "device", "out", "resume", "compile", "amp", "workers", "skip_damaged"}  # to resume
CHECKPOINT_SECONDS = 60  # the work that a killed run can lose


def main(argv=None):
    """Run the command line; returns the exit code."""
    args = parse_args(argv)
    try:
        model, data, optimizer, state = set_up(args)
    except (DataError, OSError, ValueError) as e:  # what a user can mend
        return failed(e)
    except KeyboardInterrupt:
        print("Stopped before the training began.", file=sys.stderr)
        return 130
    try:
        if not train(args, model, data, optimizer, state):
            print(f"Stopped after step {state['step']}. To go on: {command(resume=True)}", file=sys.stderr)
            return 130
    except Diverged as e:
        return failed(e, 1)
    except DataError as e:  # an image that cannot be read
        return failed(f"{e}; then go on with --resume")
    except torch.OutOfMemoryError:
        return failed(f"the GPU's memory is full: try a --batch-size below {args.batch_size}")
    except OSError as e:
        return failed(f"cannot write to {args.out} ({e.strerror}): make room, and go on with --resume")
    return 0


def parse_args(argv):
    """The command line, completed by the data set's recipe."""
    parser = Parser(__doc__)
    add = parser.add_argument

    def add_from_recipe(flag, kind, what, **options):
        key = flag.strip("-").replace("-", "_")
        defaults = ", ".join(f"{name} {RECIPES[name][key]}" for name in ("cifar100", "imagenet", "bearing"))
        add(flag, type=kind, help=f"{what} ({defaults})", **options)

    add("--pe", choices=ENCODINGS, default="spherical", help="position encoding (%(default)s)")
    add("--dataset", choices=RECIPES, default="cifar100", help="what to learn (%(default)s)")
    add(
        "--fraction",
        type=number(float, most=1),
        default=1.0,
        help="train on this part of the images, for as many steps",
    )
    add_from_recipe("--epochs", number(int, least=1), "passes over the training images")
    add_from_recipe("--batch-size", number(int, least=1), "images a step")
    add_from_recipe("--augment", str, "3: crop, flip, 3-Augment, color jitter; mix: and Mixup, CutMix", choices=AUGMENT)
    add_from_recipe("--opt", str, "optimizer", choices=OPTIMIZERS)
    rates = ", ".join(f"{name} {lr}" for name, lr in LEARNING_RATES.items())
    add("--lr", type=number(float), help=f"highest learning rate ({rates}; bearing {RECIPES['bearing']['lr']})")
    add("--weight-decay", type=number(float, least=0), default=0.05, help="of linear maps (%(default)s)")
    add_from_recipe("--warmup-epochs", number(float, least=0), "epochs of linear warm-up, at most a fifth of all")
    add_from_recipe("--depth", number(int, least=1), "blocks")
    add_from_recipe("--heads", number(int, least=1), "attention heads")
    add_from_recipe("--head-dim", number(int, least=1), "channels a head")
    rate = number(float, least=0, most=0.9)
    add_from_recipe("--dropout", rate, "chance to drop a channel, after embedding, attention and MLP")
    add_from_recipe("--drop-path", rate, "stochastic depth: chance to skip the last block")
    add_from_recipe("--layer-scale", number(float, least=0), "LayerScale's initial value, 0 for none")
    add_from_recipe("--patch-size", number(int, least=1), "side of a patch in pixels")
    add("--block-size", type=number(int, least=2), help="channels a block of liere (all), comrope-ap, comrope-ld (8)")
    add("--jitter", type=number(float, least=0), default=0.0, help="noise on positions in training, in patches (0)")
    add("--pool", choices=["cls", "mean"], default="cls", help="what the classifier reads (%(default)s)")
    add("--img-size", type=number(int, least=1), help="imagenet: side of the training images in pixels (224)")
    add("--eval-size", type=number(int, least=1), help="imagenet: side of the test images in pixels (as in training)")
    add("--limit-classes", type=number(int, least=1), help="imagenet: the first so many classes only (all)")
    add("--workers", type=number(int, least=0), help="imagenet: processes that decode images (8)")
    add("--skip-damaged", action="store_const", const=True, help="imagenet: leave out files that cannot be read")
    add("--seed", type=number(int, least=0), default=0, help="decides all that is random (%(default)s)")
    add("--out", type=Path, help="the run's folder (runs/<dataset>-<pe>-s<seed>)")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the model (if on CUDA)")
    add_device_flags(parser)

    args = parser.parse_args(argv)
    for name, value in IMAGENET.items():
        if getattr(args, name) is None:
            setattr(args, name, value if args.dataset == "imagenet" else None)
        elif args.dataset != "imagenet":
            flag = f"--{name.replace('_', '-')}"
            parser.error(f"{flag} is for --dataset imagenet: leave it out")
    on_cuda = args.device.startswith("cuda")
    out = Path("runs") / f"{args.dataset}-{args.pe}-s{args.seed}"
    for name, value in ({"out": out, "compile": on_cuda, "amp": on_cuda} | RECIPES[args.dataset]).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.lr = args.lr or LEARNING_RATES[args.opt]
    return args


def set_up(args):
    """All that a run needs -> model, data, optimizer, state. Nothing is written before everything is found right."""
    device = usable_device(args.device)
    if args.block_size and not args.pe.startswith(("liere", "comrope")):
        raise ValueError(
            f"--pe {args.pe} has no blocks: leave --block-size out, or take liere, comrope-ap or comrope-ld"
        )
    if args.jitter and args.pe in ("none", "ape"):
        raise ValueError(f"--pe {args.pe} is told no positions: leave --jitter out, or take another encoding")
    data_options = {name: getattr(args, name) for name in ("batch_size", "seed", "fraction", "augment")}
    if args.dataset == "imagenet":
        data_options |= {name: getattr(args, name) for name in IMAGENET if name != "eval_size"}
    data = DATASETS[args.dataset](args.data_dir, device=device, **data_options)
    options = {
        "pe": args.pe,
        "img_size": data.img_size,
        "patch_size": args.patch_size,
        "num_classes": data.num_classes,
        "depth": args.depth,
        "num_heads": args.heads,
        "head_dim": args.head_dim,
        "pool": args.pool,
        "dropout": args.dropout,
        "drop_path": args.drop_path,
        "layer_scale": args.layer_scale or None,
    } | ({} if args.block_size is None else {"block_size": args.block_size})
    reseed(args.seed, 0)
    model = ViT(**options).to(device)
    optimizer = make_optimizer(args, model)
    state = {  # what a run is beside weights and optimizer
        "step": 0,
        "seconds": 0.0,
        "log": [],
        "totals": torch.zeros(4, device=device),  # steps, loss, hits and gradient norm, summed over this epoch
        "vit": options,
        "data": data_options,
        "made": environment(args.device),
    }
    if args.resume:
        load(args, model, optimizer, state)
    elif (args.out / "last.pt").exists():
        raise ValueError(f"{args.out} holds a run: add --resume to go on with it, or --out to put this one elsewhere")
    if device.type == "cpu" and args.dataset in ("cifar100", "imagenet"):
        estimate(args, model, data, args.epochs - len(state["log"]))
    data.load()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        if not args.resume:
            write_json(args.out / "config.json", vars(args) | state["made"])
            for name in "result.json", "evaluation.json":  # of a run whose checkpoint is gone
                (args.out / name).unlink(missing_ok=True)
    except OSError as e:
        raise ValueError(f"cannot write to {args.out} ({e.strerror}): choose another folder with --out") from e
    if args.compile:
        model.compile()
    return model, data, optimizer, state


def reseed(*key):
    """Make all that torch draws from here on a function of the key, some integers >= 0."""
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))


def make_optimizer(args, model):
    """Weight decay is for the weights of linear maps: not for biases, norms, tokens, embeddings and frequencies."""
    decayed = {m.weight for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    groups = [
        {"params": [p for p in model.parameters() if p in decayed], "weight_decay": args.weight_decay},
        {"params": [p for p in model.parameters() if p not in decayed], "weight_decay": 0.0},
    ]
    return OPTIMIZERS[args.opt](groups)


def estimate(args, model, data, epochs):
    """Say how long the run will take on this CPU, going by one step with a few images."""
    images = torch.zeros(16, 3, data.img_size, data.img_size)
    for _ in range(2):  # the first one warms up
        start = time.perf_counter()
        with autocast(args.device, args.amp):
            model(images).sum().backward()
        seconds = (time.perf_counter() - start) / len(images) * data.train_size * epochs
    model.zero_grad()
    size, unit = next((s, u) for s, u in ((86400, "days"), (3600, "hours"), (60, "minutes")) if seconds > s or s == 60)
    print(f"On this CPU {epochs} epochs will take about {seconds / size:.1f} {unit}.", end=" ")
    print(f"For a result in a minute or two: python train.py --pe {args.pe} --dataset bearing", flush=True)


def train(args, model, data, optimizer, state):
    """Train from `state` to the end, and write the result. False if Ctrl-C came first; all is saved then.

    Wherever Ctrl-C comes, model, optimizer and state belong together: they change in one piece after each step.
    """
    steps_per_epoch = max(1, data.train_size // args.batch_size)
    parameters = sum(p.numel() for p in model.parameters())
    made_on = device_name(args.device)
    print(f"{args.pe} on {args.dataset}: {parameters / 1e6:.2f} M parameters on {made_on}, to {args.out}/")
    images = args.epochs * steps_per_epoch * args.batch_size
    with tqdm(total=images, initial=state["step"] * args.batch_size, unit="img", unit_scale=True, disable=None) as bar:
        try:
            run(args, model, data, optimizer, state, steps_per_epoch, bar)
        except (KeyboardInterrupt, DataError) as e:
            with suppress(KeyboardInterrupt):  # another Ctrl-C does not hinder the saving
                save(args, model, optimizer, state)
            if isinstance(e, DataError):
                raise
            return False

    result_path = args.out / "result.json"
    if not result_path.exists():  # else this resumed a finished run
        result = {
            "pe": args.pe,
            "dataset": args.dataset,
            "seed": args.seed,
            "epochs": args.epochs,
            "test_accuracy": state["log"][-1]["test_accuracy"],
            "train_seconds": round(state["seconds"], 2),
            "images_per_second": round(images / state["seconds"], 1),
            "parameters": parameters,
        }
        write_json(result_path, result | state["made"])
    print(
        "{pe} on {dataset}, seed {seed}: {test_accuracy} % test accuracy after {epochs} epochs; "
        "{train_seconds:.0f} s of training, {images_per_second:.0f} images/s".format(
            **json.loads(result_path.read_text())
        )
    )
    if data.damaged:
        print(f"{data.damaged} damaged images were left out")
    return True


def run(args, model, data, optimizer, state, steps_per_epoch, bar):
    """Step after step, epoch after epoch."""
    saved = shown = time.perf_counter()
    while (epoch := len(state["log"])) < args.epochs:
        start = time.perf_counter()
        if state["step"] < (epoch + 1) * steps_per_epoch:
            train_step(args, model, data, optimizer, state, steps_per_epoch)
            bar.update(args.batch_size)
            if start - shown > 0.5:  # not at every step: to read a number is to wait for the GPU
                shown = start
                loss, hits = epoch_means(args, state)
                bar.set_description(f"epoch {epoch + 1}/{args.epochs}", refresh=False)
                bar.set_postfix_str(f"loss {loss:.3f}, accuracy {hits:.1%}")
            state["seconds"] += time.perf_counter() - start
        else:
            row = finish_epoch(args, model, data, optimizer, state)
            tqdm.write(
                f"epoch {row['epoch']:3}   loss {row['train_loss']:.3f}   training {row['train_accuracy']:.2f} %   "
                f"test {row['test_accuracy']:.2f} %   {row['seconds']:.0f} s"
            )
        if time.perf_counter() - saved > CHECKPOINT_SECONDS or len(state["log"]) == args.epochs:
            save(args, model, optimizer, state)
            saved = time.perf_counter()


def train_step(args, model, data, optimizer, state, steps_per_epoch):
    model.train()
    reseed(args.seed, 1 + state["step"])
    images, targets = data.train_batch(state["step"])
    with autocast(args.device, args.amp):
        logits = model(images, jittered(model, args.jitter) if args.jitter else None)
        loss = F.cross_entropy(logits, targets)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    labels = targets if targets.dim() == 1 else targets.argmax(dim=1)
    hits = (logits.argmax(dim=1) == labels).float().mean()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(args, state["step"], steps_per_epoch)
    with uninterrupted():
        optimizer.step()
        optimizer.zero_grad()
        state["totals"] += torch.stack([torch.ones_like(norm), loss.detach(), hits, norm])
        state["step"] += 1


def jittered(model, sigma):
    """Training positions (T, 2), each moved by noise of sigma patches, but not out of its patch (ComRoPE, 3.4.2).

    Drawn anew at each step for the whole batch; a class token stays where it is.
    """
    pos = model.positions(model.grid, model.grid)
    noise = (sigma * torch.randn_like(pos)).clamp(-0.5, 0.5) * model.spacing
    noise[: model.prefix] = 0
    return pos + noise


def learning_rate(args, step, steps_per_epoch):
    """Linear warm-up, then half a cosine down to 0."""
    warmup = min(args.warmup_epochs, args.epochs / 5) * steps_per_epoch
    if step < warmup:
        return args.lr * (step + 1) / (warmup + 1)
    return args.lr * (1 + math.cos(math.pi * (step - warmup) / (args.epochs * steps_per_epoch - warmup))) / 2


def finish_epoch(args, model, data, optimizer, state):
    """Test, and put a row into the log."""
    start = time.perf_counter()
    loss, hits = epoch_means(args, state)  # waits for the GPU, which belongs to the training's time
    waited = time.perf_counter() - start
    row = {
        "epoch": len(state["log"]) + 1,
        "lr": optimizer.param_groups[0]["lr"],
        "train_loss": round(loss, 4),
        "train_accuracy": round(100 * hits, 2),
        "test_accuracy": round(accuracy(model, data.test_batches(img_size=args.eval_size), args.amp), 2),
        "seconds": round(state["seconds"] + waited, 2),
    }
    with uninterrupted():
        state["log"].append(row)
        state["totals"].zero_()
        state["seconds"] += waited
        with replacing(args.out / "log.csv") as tmp, open(tmp, "w", newline="") as f:
            writer = csv.DictWriter(f, row)
            writer.writeheader()
            writer.writerows(state["log"])
    return row


class Diverged(Exception):
    """The loss or the gradient is not finite any more."""


def epoch_means(args, state):
    """Mean loss and share of hits over this epoch's steps so far. Raises Diverged where they are not finite."""
    steps, loss, hits, norm = state["totals"].tolist()
    if not math.isfinite(loss + norm):
        last = args.out / "last.pt"
        kept = f"{last} is the last good checkpoint" if last.exists() else "there was no checkpoint yet"
        raise Diverged(f"the loss or its gradient became NaN or infinite: try a lower --lr ({kept})")
    return loss / max(steps, 1), hits / max(steps, 1)


@contextmanager
def uninterrupted():
    """Ctrl-C waits until the block is done."""
    interrupts = []
    handler = signal.signal(signal.SIGINT, lambda *_: interrupts.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if interrupts:
        raise KeyboardInterrupt


def save(args, model, optimizer, state):
    """Write last.pt and curves.png, unless the run has diverged."""
    with uninterrupted():
        epoch_means(args, state)
        with replacing(args.out / "last.pt") as tmp:
            weights = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({"config": config(args)} | weights | state, tmp)
        if state["log"]:
            plot(args, state["log"])


def load(args, model, optimizer, state):
    """Go on where last.pt is: fill in model, optimizer and state, or raise a ValueError that says why not."""
    path = args.out / "last.pt"
    if not path.exists():
        raise ValueError(f"there is no {path} to go on with: leave --resume out, or name the run's folder with --out")
    with reading(path, "delete it and begin without --resume"):
        saved = torch.load(path, map_location=args.device, weights_only=True)
        was, now = saved["config"], config(args)
        changed = [f"--{k.replace('_', '-')} was {was.get(k)}, is {now[k]}" for k in now if was.get(k) != now[k]]
        if not changed:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            state.update((name, saved[name]) for name in state)
    if changed:
        raise ValueError(f"{path} is of another configuration: {', '.join(changed)}")


def config(args):
    """What decides the result of a run."""
    return {name: value for name, value in vars(args).items() if name not in FREE_TO_CHANGE}


def plot(args, log):
    """curves.png: loss and accuracy over the epochs."""
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
    left.set(xlabel="epoch", ylabel="training loss", ylim=(0, None))
    right.set(xlabel="epoch", ylabel="accuracy (%)", ylim=(0, 100))
    right.legend(frameon=False)
    figure.suptitle(f"{args.pe} on {args.dataset}, seed {args.seed}")
    with replacing(args.out / "curves.png") as tmp:
        figure.savefig(tmp, format="png", dpi=120)


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # so that a log file shows each epoch when it is done
    sys.exit(main())
