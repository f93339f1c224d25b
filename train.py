"""Train a small ViT with the position encoding of your choice.

    python train.py --pe spherical --dataset bearing    # a minute or two on a laptop's CPU, nothing to download
    python train.py --pe spherical                      # CIFAR-100, best on a GPU
    python train.py --pe spherical --dataset imagenet --data-dir DIR    # ImageNet: DIR/train/<class>/, DIR/val/<class>/
    torchrun --nproc_per_node=8 train.py ...            # the same on eight GPUs, which split each batch

A run writes config.json, log.csv (one row per epoch), curves.png, last.pt and finally result.json to
runs/<dataset>-<pe>-s<seed>/. Ctrl-C or SIGTERM stops it after the current step. The same command with --resume
continues it, also after a crash and with any number of GPUs: on a CPU, to the same result, bit for bit.
"""

import lab  # noqa: F401  # isort: skip  (first: from here on Ctrl-C shows no traceback)
import argparse
import math
import signal
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from lab import cli, runs
from lab.augment import jitter_positions
from lab.cli import Parser, UserError, add_device_flags, folder, number, one_line_errors, parse_options, usable_device
from lab.data import AUGMENT
from lab.distributed import RANK, WORLD_SIZE, Stop, Stopped, cleanup, init, on_signals, rank_0_first, total, union
from lab.environment import command, device_name, environment
from lab.files import locked, write_csv
from lab.lamb import LAMB
from lab.runs import DATASETS, accuracy, make_vit
from vit import ENCODINGS

COUNT, POSITIVE, NOT_NEGATIVE, RATE = number(int, least=1), number(float), number(float, 0), number(float, 0, 0.9)
OPTIMIZERS = {"lamb": (LAMB, 4e-3), "adamw": (partial(torch.optim.AdamW, fused=True), 1e-3)}  # with default lr

# van de Geijn et al. 2025, tables 5 and 6, after DeiT III (Touvron et al. 2022). bearing and its recipe are ours.
RECIPES = {
    # flag            type          cifar100 imagenet bearing
    "epochs":        (COUNT,        400,     200,     10,     "passes over the training images"),
    "batch_size":    (COUNT,        1024,    512,     64,     "images per step"),
    "augment":       (AUGMENT,      "mix",   "3",     "none", "3: DeiT III's 3-Augment; mix: also Mixup or CutMix"),
    "opt":           (OPTIMIZERS,   "lamb",  "lamb",  "adamw", "optimizer"),
    "lr":            (POSITIVE,     None,    None,    2e-3,   "peak learning rate; None: lamb 0.004, adamw 0.001"),
    "warmup_epochs": (NOT_NEGATIVE, 5,       5,       1,      "epochs of linear warm-up, at most a fifth of --epochs"),
    "patch_size":    (COUNT,        4,       16,      4,      "patch size in pixels"),
    "depth":         (COUNT,        12,      12,      2,      "blocks"),
    "heads":         (COUNT,        6,       6,       4,      "attention heads"),
    "head_dim":      (COUNT,        60,      64,      24,     "channels per head"),
    "dropout":       (RATE,         0.1,     0.0,     0.0,    "dropout rate after embedding, attention and MLP"),
    "drop_path":     (RATE,         0.1,     0.0,     0.0,    "stochastic depth: rate of dropping a residual branch"),
    "layer_scale":   (NOT_NEGATIVE, 1e-4,    1e-4,    0.0,    "initial LayerScale value, 0 for none"),
}  # fmt: skip
COLUMN = {"cifar100": 0, "imagenet": 1, "bearing": 2, "bearing-corner": 2}
IMAGENET = {  # flags for --dataset imagenet alone
    "img_size": (COUNT, 224, "side of the training images in pixels"),
    "eval_size": (COUNT, None, "side of the test images in pixels, if different"),
    "limit_classes": (COUNT, None, "use only this many classes, first by name"),
    "workers": (number(int, 0), 8, "image-decoding processes per GPU"),
    "skip_corrupt": (bool, False, "skip images that cannot be read"),
}
VIT_FLAGS = "patch_size", "depth", "head_dim", "pool", "pos_scale", "dropout", "drop_path"
FREE_TO_CHANGE = "data_dir", "device", "out", "resume", "compile", "amp", "workers", "skip_corrupt", "micro_batch"
CHECKPOINT_SECONDS = 60  # the most work that a killed run loses
SHOW_SECONDS = 0.5  # between progress-bar updates, because reading the loss waits for the GPU


def parse_args(argv=None):
    """Parse the command line; flags that are not given come from the data set's recipe."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--pe", choices=ENCODINGS, default="spherical", help="position encoding (%(default)s)")
    add("--pe-options", nargs="+", default=[], metavar="NAME=VALUE", help="its options, such as block_size=4 theta=50")
    add("--dataset", choices=DATASETS, default="cifar100", help="data set (%(default)s)")
    add("--seed", type=number(int, 0), default=0, help="random seed (%(default)s)")
    add("--out", type=folder, help="run folder (runs/<dataset>-<pe>-s<seed>)")
    add("--resume", action="store_true", help="continue the run in --out")
    add("--data-dir", type=folder, default=Path("data"), help="folder of the data sets and downloads (%(default)s)")
    add("--fraction", type=number(float, most=1), default=1.0, help="train on part of the images, for as many steps")
    add("--micro-batch", type=COUNT, help="images per forward pass and process (the per-rank batch)")
    add("--weight-decay", type=NOT_NEGATIVE, default=0.05, help="of linear layers (%(default)s)")
    add("--jitter", type=NOT_NEGATIVE, default=0.0, help="noise on training positions, in patches (%(default)s)")
    add("--pos-scale", type=POSITIVE, default=1.0, help="factor on all positions (%(default)s)")
    add("--pool", choices=["cls", "mean"], default="cls", help="what the classifier reads (%(default)s)")
    for name, (kind, *defaults, what) in RECIPES.items():
        options = {"type": kind} if callable(kind) else {"choices": kind}
        shown = ", ".join(f"{dataset} {value}" for dataset, value in zip(COLUMN, defaults, strict=False))
        add(f"--{name.replace('_', '-')}", help=f"{what} ({shown})", **options)
    for name, (kind, default, what) in IMAGENET.items():
        options = {"action": "store_const", "const": True} if kind is bool else {"type": kind}
        add(f"--{name.replace('_', '-')}", help=f"imagenet: {what} ({default})", **options)
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the model (if on CUDA)")
    add_device_flags(parser)

    args = parser.parse_args(argv)
    for name in IMAGENET if args.dataset != "imagenet" else ():
        if getattr(args, name) is not None:
            parser.error(f"--{name.replace('_', '-')} is for --dataset imagenet: leave it out")
    defaults = {name: row[1 + COLUMN[args.dataset]] for name, row in RECIPES.items()}
    defaults |= {name: row[1] for name, row in IMAGENET.items() if args.dataset == "imagenet"}
    defaults |= dict.fromkeys(("compile", "amp"), args.device.startswith("cuda"))
    defaults["out"] = Path("runs", f"{args.dataset}-{args.pe}-s{args.seed}")
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.lr = args.lr or OPTIMIZERS[args.opt][1]
    args.pe_options = parse_options(args.pe_options, args.pe, ENCODINGS[args.pe])
    if args.jitter and ENCODINGS[args.pe] is None:
        parser.error(f"--pe {args.pe} has no positions to jitter: leave --jitter out, or choose another encoding")
    if args.eval_size and args.eval_size % args.patch_size:
        parser.error(f"--eval-size must be a multiple of --patch-size {args.patch_size}, not {args.eval_size}")
    return args


@one_line_errors
def main(argv=None):
    args = parse_args(argv)
    device = usable_device(args.device)
    init(device)
    if device.type == "cpu" and args.dataset in ("cifar100", "imagenet"):
        print(f"{args.dataset} is slow without a GPU: --dataset bearing takes a minute or two on a CPU.", flush=True)

    # The data: held on the device, except ImageNet, which worker processes read
    data_options = {name: getattr(args, name) for name in ("batch_size", "seed", "fraction", "augment")}
    if args.dataset == "imagenet":
        data_options |= {name: getattr(args, name) for name in IMAGENET if name != "eval_size"}
    data = DATASETS[args.dataset](args.data_dir, device=device, rank=RANK, world_size=WORLD_SIZE, **data_options)
    steps_per_epoch = max(1, data.train_size // args.batch_size)
    micro_batch = args.micro_batch or data.rank_batch_size
    parts, rest = divmod(data.rank_batch_size, micro_batch)
    if rest:
        fits = max(n for n in range(1, min(micro_batch, data.rank_batch_size + 1)) if data.rank_batch_size % n == 0)
        raise UserError(f"--micro-batch must divide the {data.rank_batch_size} images per process: try {fits}")

    # The model and its optimizer
    reseed(args.seed, 0)
    vit_options = {
        "pe": args.pe,
        "img_size": data.img_size,
        "num_classes": data.num_classes,
        "num_heads": args.heads,
        "layer_scale": args.layer_scale or None,
        **{name: getattr(args, name) for name in VIT_FLAGS},
        **args.pe_options,
    }
    model = make_vit(**vit_options).to(device)
    optimizer = make_optimizer(args, model)

    # The rest of the run's state. totals are this epoch's sums of steps, loss, correct and gradient norm.
    state = {"step": 0, "seconds": 0.0, "log": [], "totals": torch.zeros(4, device=device)}
    config = {name: value for name, value in vars(args).items() if name not in FREE_TO_CHANGE}
    config["data_set"] = data.contents
    with locked(args.out):  # while no other run writes there
        runs.load_checkpoint(args.out, config, model, optimizer, state) if args.resume else runs.check_folder(args.out)
    with rank_0_first():  # rank 0 downloads
        data.load()
    if args.compile:
        model.compile()
    net = DistributedDataParallel(model, gradient_as_bucket_view=True) if WORLD_SIZE > 1 else model
    parameters, about = sum(p.numel() for p in model.parameters()), f"{args.pe} on {args.dataset}"
    print(f"{about}: {parameters / 1e6:.2f} M parameters on {device_name(device)}, to {args.out}/", flush=True)

    def save():
        epoch_means(args, state, model)  # raises UserError if anything is not finite: such weights are not saved
        if RANK == 0:
            runs.save_checkpoint(args.out, config, model, optimizer, state | {"vit": vit_options, "data": data_options})

    # The loop. The random draws of a step depend only on the seed and the step number.
    images_in_all, seen = args.epochs * steps_per_epoch * args.batch_size, state["step"] * args.batch_size
    stop, saved = Stop(), time.perf_counter()
    progress = {"total": images_in_all, "initial": seen, "unit": "img", "unit_scale": True, "disable": RANK > 0 or None}
    with locked(args.out), tqdm(**progress) as bar, on_signals(stop.interrupt):
        if RANK == 0 and not args.resume:
            runs.write_config(args.out, vars(args) | environment(device))
        batches = stop.watch(train_batches(args, data, state["step"]))
        try:
            for epoch in range(len(state["log"]), args.epochs):
                shown, waited = time.perf_counter(), 0.0
                for step in range(state["step"], (epoch + 1) * steps_per_epoch):
                    start = time.perf_counter()
                    batch = next(batches, None)  # None only if the next line raises
                    stop.raise_if_stopped()
                    images, targets = batch
                    waited += time.perf_counter() - start

                    # Forward and backward, one micro-batch at a time
                    model.train()
                    pos = jitter_positions(model, args.jitter) if args.jitter else None
                    reseed(args.seed, 1 + step, 1 + RANK)  # dropout differs between ranks, as their images do
                    totals = torch.zeros(2, device=device)  # loss, correct
                    for i, (x, y) in enumerate(
                        zip(images.split(micro_batch), targets.split(micro_batch), strict=True), 1
                    ):
                        net.require_backward_grad_sync = i == parts  # DDP averages gradients once per step
                        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                            logits = net(x, pos)
                            loss = F.cross_entropy(logits, y) / parts
                        loss.backward()
                        labels = y if y.dim() == 1 else y.argmax(dim=1)
                        correct = (logits.argmax(dim=1) == labels).float().mean() / parts
                        totals += torch.stack([loss.detach(), correct])

                    # The optimizer
                    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                    for group in optimizer.param_groups:
                        group["lr"] = learning_rate(args, step, steps_per_epoch)
                    optimizer.step()
                    optimizer.zero_grad()
                    state["totals"] += torch.stack([torch.ones_like(norm), *total(totals) / WORLD_SIZE, norm])
                    state["step"] = step + 1

                    # The progress bar and the checkpoint
                    bar.update(args.batch_size)
                    if RANK == 0 and (since := time.perf_counter() - shown) > SHOW_SECONDS:
                        loss, correct = epoch_means(args, state)
                        waiting = "" if args.workers is None else f", waiting for images {waited / since:.0%}"
                        bar.set_postfix_str(f"epoch {epoch + 1}, loss {loss:.3f}, accuracy {correct:.1%}{waiting}")
                        shown, waited = time.perf_counter(), 0.0
                    state["seconds"] += time.perf_counter() - start
                    if time.perf_counter() - saved > CHECKPOINT_SECONDS:
                        save()
                        saved = time.perf_counter()

                # The end of the epoch: test, and add a row to the log
                start = time.perf_counter()
                loss, correct = epoch_means(args, state)
                state["seconds"] += time.perf_counter() - start  # waiting for the GPU to finish training
                test_accuracy = accuracy(model, stop.watch(data.test_batches(img_size=args.eval_size)), args.amp)
                stop.raise_if_stopped()
                if math.isnan(test_accuracy):
                    raise UserError(f"no test image could be read: check --data-dir{runs.then_resume(args.out)}")
                row = {
                    "epoch": epoch + 1,
                    "lr": learning_rate(args, state["step"] - 1, steps_per_epoch),
                    "train_loss": round(loss, 4),
                    "train_accuracy": round(100 * correct, 2),
                    "test_accuracy": round(test_accuracy, 2),
                    "seconds": round(state["seconds"], 2),
                }
                state["log"].append(row)
                state["totals"].zero_()
                if RANK == 0:
                    write_csv(args.out / "log.csv", state["log"], row)
                tqdm.write(
                    "epoch {epoch:3}   loss {train_loss:.3f}   training {train_accuracy:.2f} %   "
                    "test {test_accuracy:.2f} %   {seconds:.0f} s".format(**row)
                )
                if epoch + 1 in (1, args.epochs):
                    save()
        except Stopped as e:  # all ranks, between two steps
            if state["step"] or not cli.is_out_of_memory(e.__cause__):
                save()
            cleanup()
            if e.__cause__ and not isinstance(e.__cause__, UserError | OSError):
                raise e.__cause__ from None
            if e.args:  # an image that some rank cannot read
                raise UserError(f"{e.args[0]}{runs.then_resume(args.out)}") from e
            if RANK == 0:
                print(f"Stopped after step {state['step']}. To continue: {command(resume=True)}", file=sys.stderr)
            return 128 + (stop.signal or signal.SIGINT)
        except OSError as e:  # a full disk, most likely
            raise UserError(f"{e}: fix that{runs.then_resume(args.out)}") from e

    # The result
    result = {name: getattr(args, name) for name in ("pe", "dataset", "seed", "epochs")} | {
        "test_accuracy": state["log"][-1]["test_accuracy"],
        "train_seconds": round(state["seconds"], 2),
        "images_per_second": round(images_in_all / state["seconds"], 1),
        "parameters": parameters,
    }
    if RANK == 0 and not (args.out / "result.json").exists():  # else this resumed a finished run
        runs.write_result(args.out, result | environment(device), state["log"])
    print(
        "{pe} on {dataset}, seed {seed}: {test_accuracy} % test accuracy after {epochs} epochs; "
        "{train_seconds:.0f} s of training, {images_per_second:.0f} images/s".format(**result)
    )
    if corrupt := len(union(data.corrupt)):
        print(f"corrupt images skipped: {corrupt}")
    cleanup()


def reseed(*key):
    """Seed torch's generators with a key of integers >= 0."""
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))


def make_optimizer(args, model):
    """Weight decay applies to weights of linear layers, not to biases, norms, tokens, embeddings and frequencies."""
    decayed = {m.weight for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    groups = [
        {"params": [p for p in model.parameters() if p in decayed], "weight_decay": args.weight_decay},
        {"params": [p for p in model.parameters() if p not in decayed], "weight_decay": 0.0},
    ]
    return OPTIMIZERS[args.opt][0](groups)


def train_batches(args, data, step):
    """Yield this rank's part of the batch of each step from `step` on. All ranks make the same random draws."""
    while True:
        reseed(args.seed, 1 + step)
        yield data.train_batch(step)
        step += 1


def learning_rate(args, step, steps_per_epoch):
    """Linear warm-up, then cosine decay to 0."""
    warmup = min(args.warmup_epochs, args.epochs / 5) * steps_per_epoch
    if step < warmup:
        return args.lr * (step + 1) / (warmup + 1)
    return args.lr * (1 + math.cos(math.pi * (step - warmup) / (args.epochs * steps_per_epoch - warmup))) / 2


def epoch_means(args, state, model=None):
    """This epoch's mean loss and accuracy so far. Raises UserError if loss, gradient or weights are not finite."""
    steps, loss, correct, norm = state["totals"].tolist()
    if not math.isfinite(loss + norm) or (model and not runs.finite(model.state_dict())):
        last = args.out / "last.pt"
        kept = f"{last} is the last good checkpoint" if last.exists() else "there was no checkpoint yet"
        raise UserError(f"loss, gradient or weights became NaN or infinite: try a lower --lr ({kept})", code=1)
    return loss / max(steps, 1), correct / max(steps, 1)


if __name__ == "__main__":
    sys.exit(main())
