"""Train a small ViT with the position encoding of your choice.

    python train.py --pe spherical --dataset bearing    # a minute or two on a laptop's CPU, nothing to download
    python train.py --pe spherical                      # CIFAR-100, which wants a GPU
    python train.py --pe spherical --dataset imagenet --data-dir DIR    # ImageNet: DIR/train/<class>/, DIR/val/<class>/
    torchrun --nproc_per_node=8 train.py ...            # the same on eight GPUs, which share each batch

A run writes runs/<dataset>-<pe>-s<seed>/: config.json, log.csv (a row an epoch), curves.png, last.pt and, at its end,
result.json. Ctrl-C stops a run after the step that it is in; the same command with --resume goes on with it, also after
a crash, with any number of GPUs, and on a CPU to the very same weights: all that is random in a step is drawn from
generators that the seed and the step's number determine.
"""

import math
import sys
import time
from contextlib import nullcontext
from datetime import datetime, timedelta
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import recipes
from common import (
    DATASETS,
    accuracy,
    autocast,
    command,
    device_name,
    environment,
    failed,
    reading,
    usable_device,
    write_csv,
    write_json,
)
from data import DataError, replacing
from distributed import RANK, WORLD_SIZE, Stop, Stopped, join, leave, total, union, wait
from lamb import LAMB
from stopwatch import now, timed
from vit import ViT

OPTIMIZERS = {"lamb": LAMB, "adamw": partial(torch.optim.AdamW, fused=True)}
FREE_TO_CHANGE = {  # when a run is resumed
    "data_dir", "device", "out", "resume", "compile", "amp", "workers", "skip_damaged", "micro_batch", "profile",
}  # fmt: skip
CHECKPOINT_SECONDS = 60  # the work that a killed run can lose
FIRST_STEPS = 5  # which compile, and fill caches: not counted where speed is
SPEED_SECONDS = 20  # after which the speed can be told

parse_args = partial(recipes.parse_args, description=__doc__)


def main(argv=None):
    """Run the command line; returns the exit code."""
    args = parse_args(argv)
    try:
        return execute(args)
    except torch.OutOfMemoryError:
        return failed("the GPU's memory is full: try --micro-batch, or a smaller one, or a smaller model")
    except RuntimeError as e:
        if any(lack in str(e) for lack in ("No working C++ compiler", "Failed to find C compiler")):
            return failed("torch.compile needs a C++ compiler: install one, or add --no-compile")
        if WORLD_SIZE > 1 and "by peer" in str(e):  # another process is gone, and has said why
            return 1
        raise


def execute(args):
    try:
        args.device = join(args.device)
        model, data, optimizer, state = set_up(args)
    except (DataError, OSError, ValueError) as e:  # what a user can mend
        return failed(e)
    except KeyboardInterrupt:
        return stopped("Stopped before the training began.")
    code = 0
    try:
        (profile if args.profile else train)(args, model, data, optimizer, state)
    except Stopped:
        code = stopped(f"Stopped after step {state['step']}. To go on: {command(resume=True)}")
    except KeyboardInterrupt:
        return stopped("Stopped." if args.profile else "Stopped at once: what came after the last save is lost.")
    except DataError as e:  # an image that cannot be read
        if args.profile:
            return failed(e)
        code = failed(f"{e}; then go on with --resume")
    except Diverged as e:
        return failed(e, 1)
    except OSError as e:  # a full disk, most likely
        return failed(f"{e}: mend that, and go on with --resume")
    leave()
    return code


def stopped(why):
    if RANK == 0:
        print(why, file=sys.stderr)
    return 130


def set_up(args):
    """All that a run needs -> model, data, optimizer, state. Nothing is written before everything is found right."""
    device = usable_device(args.device)
    data_options = {name: getattr(args, name) for name in ("batch_size", "seed", "fraction", "augment")}
    if args.dataset == "imagenet":
        data_options |= {name: getattr(args, name) for name in recipes.IMAGENET if name != "eval_size"}
    data = DATASETS[args.dataset](args.data_dir, device=device, rank=RANK, world_size=WORLD_SIZE, **data_options)
    if args.micro_batch and data.share % args.micro_batch:
        below = next(n for n in range(min(args.micro_batch, data.share), 0, -1) if data.share % n == 0)
        raise ValueError(f"--micro-batch must divide the {data.share} images of a process: try {below}")
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
    elif (args.out / "last.pt").exists() and not args.profile:
        raise ValueError(f"{args.out} holds a run: add --resume to go on with it, or --out to put this one elsewhere")
    if RANK == 0:  # it downloads, and writes, and the others wait for it
        if device.type == "cpu" and args.dataset in ("cifar100", "imagenet") and not args.profile:
            estimate(args, model, data, args.epochs - len(state["log"]))
        data.load()
        if not args.profile:
            prepare_folder(args, state)
    wait()
    if RANK:
        data.load()
    if args.compile:
        model.compile()
    if WORLD_SIZE > 1:
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    return model, data, optimizer, state


def prepare_folder(args, state):
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        if not args.resume:
            write_json(args.out / "config.json", vars(args) | state["made"])
            for name in "result.json", "evaluation.json":  # of a run whose checkpoint is gone
                (args.out / name).unlink(missing_ok=True)
    except OSError as e:
        raise ValueError(f"cannot write to {args.out} ({e.strerror}): choose another folder with --out") from e


def bare(model):
    """The ViT itself, where it is wrapped for several processes."""
    return getattr(model, "module", model)


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
        seconds = (time.perf_counter() - start) / len(images) * data.train_size * epochs / WORLD_SIZE
    model.zero_grad()
    size, unit = next((s, u) for s, u in ((86400, "days"), (3600, "hours"), (60, "minutes")) if seconds > s or s == 60)
    print(f"On this CPU {epochs} epochs will take about {seconds / size:.1f} {unit}.", end=" ")
    print(f"For a result in a minute or two: python train.py --pe {args.pe} --dataset bearing", flush=True)


def train(args, model, data, optimizer, state):
    """Train from `state` to the end, and write the result. Raises Stopped or DataError where a stop came first."""
    parameters = sum(p.numel() for p in model.parameters())
    size = f"{parameters / 1e6:.2f} M parameters"
    print(f"{args.pe} on {args.dataset}: {size} on {device_name(args.device)}, to {args.out}/")
    images = args.epochs * steps_per_epoch(args, data) * args.batch_size
    done = state["step"] * args.batch_size
    with tqdm(total=images, initial=done, unit="img", unit_scale=True, disable=RANK > 0 or None) as bar, Stop() as stop:
        try:
            run(args, model, data, optimizer, state, bar, stop)
        except (Stopped, DataError):
            save(args, model, optimizer, state)
            raise

    damaged = len(union(data.damaged))
    if RANK:
        return
    result_path = args.out / "result.json"
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
    if not result_path.exists():  # else this resumed a finished run
        write_json(result_path, result | state["made"])
    print(
        "{pe} on {dataset}, seed {seed}: {test_accuracy} % test accuracy after {epochs} epochs; "
        "{train_seconds:.0f} s of training, {images_per_second:.0f} images/s".format(**result)
    )
    if damaged:
        print(f"{damaged} damaged images were left out")


def run(args, model, data, optimizer, state, bar, stop):
    """Step after step, epoch after epoch."""
    steps = steps_per_epoch(args, data)
    batches = stop.before(train_batches(args, data, state))
    saved = shown = time.perf_counter()
    first, since = state["step"] + FIRST_STEPS, None
    while (epoch := len(state["log"])) < args.epochs:
        start = time.perf_counter()
        if state["step"] < (epoch + 1) * steps:
            batch = next(batches, None)  # None if there is a reason to stop
            stop.heed()
            train_step(args, model, batch, optimizer, state, steps)
            bar.update(args.batch_size)
            if RANK == 0 and start - shown > 0.5:  # not at every step: to read a number is to wait for the GPU
                shown = start
                loss, hits = epoch_means(args, state)
                bar.set_description(f"epoch {epoch + 1}/{args.epochs}", refresh=False)
                bar.set_postfix_str(f"loss {loss:.3f}, accuracy {hits:.1%}")
            state["seconds"] += time.perf_counter() - start
            if state["step"] == first:
                since = state["seconds"]
            elif since is not None and state["seconds"] - since > SPEED_SECONDS:
                rate = (state["step"] - first) / (state["seconds"] - since)  # steps a second
                left = timedelta(seconds=round((args.epochs * steps - state["step"]) / rate))
                end = f"{datetime.now() + left:%a %d %b %H:%M}"
                tqdm.write(f"{rate * args.batch_size:.0f} images/s: about {left} to go, until {end}")
                since = None
        else:
            row = finish_epoch(args, model, data, optimizer, state, stop)
            tqdm.write(
                f"epoch {row['epoch']:3}   loss {row['train_loss']:.3f}   training {row['train_accuracy']:.2f} %   "
                f"test {row['test_accuracy']:.2f} %   {row['seconds']:.0f} s"
            )
        if time.perf_counter() - saved > CHECKPOINT_SECONDS or len(state["log"]) == args.epochs:
            save(args, model, optimizer, state)
            saved = time.perf_counter()


def steps_per_epoch(args, data):
    return max(1, data.train_size // args.batch_size)


def train_batches(args, data, state):
    """This process's part of the batch of each step from `state` on. All that is random in it is the same for all."""
    while True:
        reseed(args.seed, 1 + state["step"])
        yield data.train_batch(state["step"])


def train_step(args, model, batch, optimizer, state, steps):
    """Forward and backward, a micro-batch after the other, then one step of the optimizer."""
    model.train()
    pos = jittered(bare(model), args.jitter) if args.jitter else None
    reseed(args.seed, 1 + state["step"], 1 + RANK)  # dropout is drawn for each process's images anew
    parts = list(zip(*(part.split(args.micro_batch or len(part)) for part in batch), strict=True))
    sums = []
    for i, (images, targets) in enumerate(parts, start=1):
        summing = i == len(parts) or WORLD_SIZE == 1
        with nullcontext() if summing else model.no_sync():  # gradients are averaged over the processes once a step
            with timed("forward"), autocast(args.device, args.amp):
                logits = model(images, pos)
                loss = F.cross_entropy(logits, targets) / len(parts)
            with timed("backward"):
                loss.backward()
        labels = targets if targets.dim() == 1 else targets.argmax(dim=1)
        sums.append(torch.stack([loss.detach(), (logits.argmax(dim=1) == labels).float().mean() / len(parts)]))
    with timed("optimizer"):
        loss, hits = total(torch.stack(sums).sum(dim=0)) / WORLD_SIZE
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, state["step"], steps)
        optimizer.step()
        optimizer.zero_grad()
    state["totals"] += torch.stack([torch.ones_like(norm), loss, hits, norm])
    state["step"] += 1


def jittered(model, sigma):
    """Training positions (T, 2), each moved by noise of sigma patches, but not out of its patch (ComRoPE, 3.4.2).

    Drawn anew at each step for the whole batch; a class token stays where it is.
    """
    pos = model.positions(model.grid, model.grid)
    noise = (sigma * torch.randn_like(pos)).clamp(-0.5, 0.5) * model.spacing
    noise[: model.prefix] = 0
    return pos + noise


def learning_rate(args, step, steps):
    """Linear warm-up, then half a cosine down to 0. steps are those of an epoch."""
    warmup = min(args.warmup_epochs, args.epochs / 5) * steps
    if step < warmup:
        return args.lr * (step + 1) / (warmup + 1)
    return args.lr * (1 + math.cos(math.pi * (step - warmup) / (args.epochs * steps - warmup))) / 2


def finish_epoch(args, model, data, optimizer, state, stop):
    """Test, and put a row into the log."""
    start = time.perf_counter()
    loss, hits = epoch_means(args, state)
    state["seconds"] += time.perf_counter() - start  # spent waiting for the GPU, which belongs to the training
    test_accuracy = accuracy(bare(model), stop.before(data.test_batches(img_size=args.eval_size)), args.amp)
    stop.heed()
    row = {
        "epoch": len(state["log"]) + 1,
        "lr": optimizer.param_groups[0]["lr"],
        "train_loss": round(loss, 4),
        "train_accuracy": round(100 * hits, 2),
        "test_accuracy": round(test_accuracy, 2),
        "seconds": round(state["seconds"], 2),
    }
    state["log"].append(row)
    state["totals"].zero_()
    if RANK == 0:
        write_csv(args.out / "log.csv", state["log"], row)
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


def save(args, model, optimizer, state):
    """Write last.pt and curves.png, unless the run has diverged."""
    epoch_means(args, state)
    if RANK:
        return
    (args.out / "evaluation.json").unlink(missing_ok=True)  # of the weights that are replaced here
    weights = {"model": bare(model).state_dict(), "optimizer": optimizer.state_dict()}
    with replacing(args.out / "last.pt") as tmp, open(tmp, "wb") as f:  # given a path, torch.save hides what went wrong
        torch.save({"config": config(args)} | weights | state, f)
    if state["log"]:
        plot(args, state["log"])


def load(args, model, optimizer, state):
    """Go on where last.pt is: fill in model, optimizer and state, or raise a ValueError that says why not."""
    path = args.out / "last.pt"
    if not path.exists():
        raise ValueError(f"there is no {path} to go on with: leave --resume out, or name the run's folder with --out")
    with reading(path, "delete it and begin without --resume"):
        saved = torch.load(path, map_location=args.device, weights_only=True)
        was, new = saved["config"], config(args)
        changed = [f"--{k.replace('_', '-')} was {was.get(k)}, is {new[k]}" for k in new if was.get(k) != new[k]]
        if not changed:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            here = state["made"]
            state.update((name, saved[name]) for name in state if name not in ("vit", "data"))  # these flags made them
            for what in "device", "torch", "commit":
                if str(state["made"][what]).split(", then ")[-1] != str(here[what]):
                    state["made"][what] = f"{state['made'][what]}, then {here[what]}"
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
        axes.locator_params(axis="x", integer=True, min_n_ticks=1)
    left.set(xlabel="epoch", ylabel="training loss", ylim=(0, None))
    right.set(xlabel="epoch", ylabel="accuracy (%)", ylim=(0, 100))
    right.legend(frameon=False)
    figure.suptitle(f"{args.pe} on {args.dataset}, seed {args.seed}")
    with replacing(args.out / "curves.png") as tmp:
        figure.savefig(tmp, format="png", dpi=120)


def profile(args, model, data, optimizer, state):
    """Print how fast the training is and where a step's time goes. Nothing is written."""
    N, steps = args.profile, steps_per_epoch(args, data)
    batches = train_batches(args, data, state)

    def seconds(n):
        start = now()
        for _ in range(n):
            train_step(args, model, next(batches), optimizer, state, steps)
        return now() - start

    seconds(FIRST_STEPS)
    rate = N * args.batch_size / seconds(N)
    images = args.epochs * steps * args.batch_size
    where = f"{args.pe} on {args.dataset}, {device_name(args.device)}"
    print(f"{where}: {rate:.0f} images/s in {N} steps of {args.batch_size}")
    left = timedelta(seconds=round(images / rate))
    print(f"{args.epochs} epochs of {images // args.epochs} images would take {left}, tests not included")
    timed.start()
    whole = seconds(N)
    parts = timed.seconds | {"the rest": whole - sum(timed.seconds.values())}
    timed.stop()
    print("Each part waiting for the one before, a step takes")
    for name, taken in (parts | {"in all": whole}).items():
        print(f"  {name:24} {1e3 * taken / N:8.1f} ms {taken / whole:7.1%}")


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # so that a log file shows each epoch when it is done
    sys.exit(main())
