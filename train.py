"""Train a small ViT with the position encoding of your choice.

    python train.py --pe spherical --dataset bearing    # a minute or two on a laptop's CPU, nothing to download
    python train.py --pe spherical                      # CIFAR-100, best on a GPU
    python train.py --pe spherical --dataset imagenet --data-dir DIR    # ImageNet: DIR/train/<class>/, DIR/val/<class>/
    python train.py --init runs/a --out runs/b          # start from the weights of a run, or of a published model
    torchrun --nproc_per_node=8 train.py ...            # the same on eight GPUs, which split each batch

A run writes config.json, log.csv (one row per epoch), curves.png, last.pt and finally result.json to
runs/<dataset>-<pe>-s<seed>/. Ctrl-C or SIGTERM stops it after the current step. The same command with --resume
continues it, also after a crash, and with any number of GPUs. On a CPU, the result is the same, bit for bit.
"""

import argparse
import math
import random
import sys
import time
from functools import partial
from inspect import signature
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from lab.accuracy import accuracy
from lab.augment import noisy_positions
from lab.cli import Parser, add_device_flags, folder, number, parse_options
from lab.datasets import DATASETS
from lab.distributed import RANK, WORLD_SIZE, Stop, all_reduce_sum, cleanup, init, on_signals
from lab.environment import environment
from lab.errors import UserError, one_line_errors, user_errors
from lab.files import locked, write_csv, write_json
from lab.lamb import LAMB
from lab.run import check_folder, load_checkpoint, save_checkpoint
from lab.weights import adopt_flags, read_weights, start_from
from vit import ENCODINGS, ViT

COUNT, POSITIVE, NOT_NEGATIVE, RATE = number(int, least=1), number(float), number(float, 0), number(float, 0, 0.9)
OPTIMIZERS = {  # with default lr
    "lamb": (LAMB, 4e-3),
    "adamw": (partial(torch.optim.AdamW, fused=True), 1e-3),
}

FLAGS = {  # whose defaults depend on the data set or --init: type or choices, default without a recipe, help
    "pe": (ENCODINGS, "spherical", "position encoding"),
    "epochs": (COUNT, 10, "passes over the training images"),
    "batch_size": (COUNT, 64, "images per step"),
    "fraction": (number(float, most=1), 1.0, "part of the training images to use; the number of steps stays the same"),
    "augment": (("none", "3", "mix"), "none", "3: DeiT III's 3-Augment; mix: also Mixup or CutMix"),
    "opt": (OPTIMIZERS, "adamw", "optimizer"),
    "lr": (POSITIVE, None, "peak learning rate; lamb 0.004, adamw 0.001; --init: a tenth, too low for a new --pe"),
    "warmup_epochs": (NOT_NEGATIVE, 1, "epochs of linear warm-up, at most a fifth of --epochs"),
    "weight_decay": (NOT_NEGATIVE, 0.05, "of linear layers"),
    "jitter": (NOT_NEGATIVE, 0.0, "s.d. of a random offset per patch, in patches"),
    "shift": (NOT_NEGATIVE, 0.0, "s.d. of one random offset for all tokens, in patches"),
    "patch_size": (COUNT, 4, "patch size in pixels"),
    "depth": (COUNT, 2, "blocks"),
    "heads": (COUNT, 4, "attention heads"),
    "head_dim": (COUNT, 24, "channels per head"),
    "dropout": (RATE, 0.0, "dropout rate after embedding, attention and MLP"),
    "drop_path": (RATE, 0.0, "stochastic depth: rate of dropping a residual branch"),
    "layer_scale": (NOT_NEGATIVE, 0.0, "initial LayerScale value, 0 for none"),
    "pool": (("cls", "mean"), "cls", "what the classifier reads"),
    "pos_unit": (("image", "patch"), "image", "an image spans [-pi, pi], or positions count patches"),
    "pos_scale": (POSITIVE, 1.0, "factor on all positions"),
    "img_size": (COUNT, None, "side of the training images in pixels"),
    "limit_classes": (COUNT, None, "imagenet: use only this many classes, first by name"),
    "workers": (number(int, 0), None, "image-decoding processes per GPU"),
}
# van de Geijn et al. 2025, tables 5 and 6, after DeiT III (Touvron et al. 2022). bearing's is ours.
DEIT_III = {"opt": "lamb", "warmup_epochs": 5, "depth": 12, "heads": 6, "layer_scale": 1e-4}
CIFAR100 = {"epochs": 400, "batch_size": 1024, "augment": "mix", "head_dim": 60, "dropout": 0.1, "drop_path": 0.1}
IMAGENET = {"epochs": 200, "batch_size": 512, "augment": "3", "head_dim": 64, "patch_size": 16}
RECIPES = {
    "cifar100": DEIT_III | CIFAR100,
    "imagenet": DEIT_III | IMAGENET | {"img_size": 224, "workers": 8},
    "bearing": {"lr": 2e-3},
    "bearing-corner": {"lr": 2e-3},
}
DATA_FLAGS = "batch_size", "seed", "fraction", "augment"
FOLDER_FLAGS = "img_size", "limit_classes", "workers", "skip_corrupt"  # for data sets whose class takes them
VIT_FLAGS = "pe", "patch_size", "depth", "head_dim", "pool", "pos_unit", "pos_scale", "ape", "dropout", "drop_path"
FREE_TO_CHANGE = "data_dir", "device", "out", "resume", "compile", "amp", "workers", "skip_corrupt", "micro_batch"
CHECKPOINT_SECONDS = 60  # the most work that a killed run loses
SHOW_SECONDS = 0.5  # between progress-bar updates, because reading the loss waits for the GPU


def parse_args(argv=None):
    """Parse the command line; flags that are not given come from the data set's recipe."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--pe-options", nargs="+", default=[], metavar="NAME=VALUE", help="options of --pe, such as theta=50")
    drawn = "bearing is drawn here: which way is blue from red? bearing-corner: the same, trained in one quarter"
    add("--dataset", choices=DATASETS, default="cifar100", help=f"data set (%(default)s); {drawn}")
    add("--seed", type=number(int, 0), default=0, help="random seed (%(default)s)")
    add("--out", type=folder, help="run folder (runs/<dataset>-<pe>-s<seed>)")
    add("--resume", action="store_true", help="continue the run in --out")
    add("--init", type=Path, help="start from the model in a run's folder or a file (see lab.pretrained), of any --pe")
    add("--data-dir", type=folder, default=Path("data"), help="folder of the data sets and downloads (%(default)s)")
    add("--skip-corrupt", action="store_const", const=True, help="imagenet: skip images that cannot be read")
    add("--micro-batch", type=COUNT, help="images per forward pass and process (the per-rank batch)")
    add("--ape", action=argparse.BooleanOptionalAction, help="add a learned absolute embedding (no)")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the model (on CUDA only)")
    for name, (kind, default, what) in FLAGS.items():
        shown = [f"{of} {recipe[name]}" for of, recipe in RECIPES.items() if name in recipe]
        shown += [f"else {default}" if shown else f"{default}"] * (default is not None)
        options = {"type": kind} if callable(kind) else {"choices": kind}
        add(f"--{name.replace('_', '-')}", help=what + f" ({', '.join(shown)})" * bool(shown), **options)
    add_device_flags(parser)

    args = parser.parse_args(argv)
    for name in FOLDER_FLAGS:
        if getattr(args, name) is not None and name not in signature(DATASETS[args.dataset]).parameters:
            parser.error(f"--dataset {args.dataset} takes no --{name.replace('_', '-')}: leave it out")
    defaults = {name: default for name, (_, default, _) in FLAGS.items()} | RECIPES.get(args.dataset, {})
    defaults |= dict.fromkeys(("compile", "amp"), args.device.startswith("cuda")) | {"ape": False}
    if args.init:
        adopt_flags(args)
    default_lr = args.lr is None
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.out = args.out or Path("runs", f"{args.dataset}-{args.pe}-s{args.seed}")
    args.lr = (args.lr or OPTIMIZERS[args.opt][1]) / (10 if args.init and default_lr else 1)
    args.pe_options = parse_options(args.pe_options, args.pe, ENCODINGS[args.pe])
    if (args.jitter or args.shift) and ENCODINGS[args.pe] is None:
        parser.error(f"--pe {args.pe} has no positions to move: leave --jitter and --shift out")
    return args


@one_line_errors
def main(argv=None):
    args = parse_args(argv)
    with locked(args.out):  # one run at a time writes there
        return train(args)


def train(args):
    device = init(args.device)
    about = environment(device)
    check_folder(args.out, args.resume)
    if device.type == "cpu" and args.dataset in ("cifar100", "imagenet"):
        print(f"{args.dataset} is slow without a GPU: --dataset bearing takes a minute or two on a CPU.")

    # The data: held on the device, except ImageNet, which worker processes read
    data_options = {name: x for name in DATA_FLAGS + FOLDER_FLAGS if (x := getattr(args, name)) is not None}
    data = DATASETS[args.dataset](args.data_dir, device=device, rank=RANK, world_size=WORLD_SIZE, **data_options).load()
    steps_per_epoch = max(1, data.train_size // args.batch_size)
    micro_batch = args.micro_batch or data.rank_batch_size
    accumulation_steps, rest = divmod(data.rank_batch_size, micro_batch)
    if rest:
        raise UserError(f"--micro-batch must divide the {data.rank_batch_size} images per process")

    # The model and its optimizer
    reseed(args.seed, 0)
    vit_options = {name: getattr(args, name) for name in VIT_FLAGS} | args.pe_options
    vit_options |= {"num_heads": args.heads, "layer_scale": args.layer_scale or None}
    vit_options |= {"img_size": data.img_size, "num_classes": int(data.num_classes)}
    if args.init:  # positions refer to that model's img_size, even for images of another size
        start, weights = read_weights(args.out if args.resume else args.init, args.heads)
        vit_options |= {name: start[name] for name in ("img_size", "mlp_ratio") if name in start}
        if data.img_size % args.patch_size:
            raise UserError(f"images must be of a multiple of {args.patch_size} pixels, not {data.img_size}")
    with user_errors(args):
        model = ViT(**vit_options).to(device)
    if args.init and not args.resume:
        start_from(model, weights, args.pe == start["pe"])
    optimizer = make_optimizer(args, model)
    peak_rates = [group["lr"] for group in optimizer.param_groups]

    # The whole run: all of this is saved, and given back by --resume
    state = {"model": model, "optimizer": optimizer, "step": 0, "seconds": 0.0, "log": []}
    state["sums"] = torch.zeros(2, device=device)  # this epoch's sums of loss and accuracy
    config = {name: value for name, value in vars(args).items() if name not in FREE_TO_CHANGE}
    config["data_set"] = data.fingerprint
    if args.resume:
        load_checkpoint(args.out, state, config)
    elif RANK == 0:
        write_json(args.out / "config.json", vars(args) | about)

    def save():
        epoch_means(state, steps_per_epoch)  # raises UserError if the loss is not finite
        if RANK == 0:
            save_checkpoint(args.out, state, config, vit=vit_options, data=data_options)

    if args.compile:
        model.compile()
    ddp_model = DistributedDataParallel(model, gradient_as_bucket_view=True) if WORLD_SIZE > 1 else model
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{args.pe} on {args.dataset}: {parameters / 1e6:.2f} M parameters on {about['device']}, to {args.out}/")

    # The loop: a training step, or the test at the end of an epoch. What a step draws depends on the seed and the step.
    images_in_all, seen = args.epochs * steps_per_epoch * args.batch_size, state["step"] * args.batch_size
    progress = {"total": images_in_all, "initial": seen, "unit": "img", "unit_scale": True, "disable": RANK > 0 or None}
    last_save = shown = time.perf_counter()
    waited, stop = 0.0, Stop()
    with on_signals(stop.interrupt), tqdm(**progress) as bar:
        while (epoch := len(state["log"])) < args.epochs and not stop.asked():
            step, start = state["step"], time.perf_counter()
            if step < (epoch + 1) * steps_per_epoch:
                reseed(args.seed, 1 + step)
                images, targets = data.train_batch(step)
                waited += time.perf_counter() - start

                # Forward and backward, one micro-batch at a time
                model.train()
                pos = None
                if args.jitter or args.shift:
                    pos = noisy_positions(model, data.img_size // args.patch_size, args.jitter, args.shift)
                reseed(args.seed, 1 + step, 1 + RANK)  # dropout differs between ranks, as their images do
                totals = torch.zeros(2, device=device)  # loss, accuracy
                micro_batches = zip(images.split(micro_batch), targets.split(micro_batch), strict=True)
                for i, (x, y) in enumerate(micro_batches, 1):
                    ddp_model.require_backward_grad_sync = i == accumulation_steps  # DDP averages gradients once a step
                    with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                        logits = ddp_model(x, pos)
                        loss = F.cross_entropy(logits, y) / accumulation_steps
                    loss.backward()
                    labels = y if y.dim() == 1 else y.argmax(dim=1)
                    correct = (logits.argmax(dim=1) == labels).float().mean() / accumulation_steps
                    totals += torch.stack([loss.detach(), correct])

                # The optimizer
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                for group, peak in zip(optimizer.param_groups, peak_rates, strict=True):
                    group["lr"] = learning_rate(args, peak, step, steps_per_epoch)
                optimizer.step()
                optimizer.zero_grad()
                state["sums"] += all_reduce_sum(totals) / WORLD_SIZE
                state["step"] = step + 1

                # The progress bar and the checkpoint
                bar.update(args.batch_size)
                if RANK == 0 and ((since := time.perf_counter() - shown) > SHOW_SECONDS or step == 0):
                    loss, correct = epoch_means(state, steps_per_epoch)
                    waiting = "" if args.workers is None else f", waiting for images {waited / since:.0%}"
                    bar.set_postfix_str(f"epoch {epoch + 1}, loss {loss:.3f}, accuracy {correct:.1%}{waiting}")
                    shown, waited = time.perf_counter(), 0.0
                state["seconds"] += time.perf_counter() - start
                if time.perf_counter() - last_save > CHECKPOINT_SECONDS:
                    save()
                    last_save = time.perf_counter()
            else:
                # The end of the epoch: test, and add a row to the log
                loss, correct = epoch_means(state, steps_per_epoch)
                state["seconds"] += time.perf_counter() - start  # waiting for the GPU to finish training
                test_accuracy = accuracy(model, stop.until(data.test_batches()), args.amp)
                if stop.asked():
                    continue  # --resume tests again
                if math.isnan(test_accuracy):
                    raise UserError("no test image could be read: check --data-dir")
                row = {
                    "epoch": epoch + 1,
                    "lr": optimizer.param_groups[0]["lr"],
                    "train_loss": round(loss, 4),
                    "train_accuracy": round(100 * correct, 2),
                    "test_accuracy": round(test_accuracy, 2),
                    "seconds": round(state["seconds"], 2),
                }
                state["log"].append(row)
                state["sums"].zero_()
                if RANK == 0:
                    write_csv(args.out / "log.csv", state["log"])
                if epoch + 1 in (1, args.epochs):
                    save()
                bar.clear()
                accuracies = f"training {row['train_accuracy']:.2f} %   test {row['test_accuracy']:.2f} %"
                print(f"epoch {epoch + 1:3}   loss {loss:.3f}   {accuracies}   {row['seconds']:.0f} s")
                shown, waited = time.perf_counter(), 0.0

    if stop.signal and len(state["log"]) < args.epochs:
        save()
        if RANK == 0:
            again = about["command"] + " --resume" * (not args.resume)
            print(f"Stopped after step {state['step']}. To continue: {again}", file=sys.stderr)
        cleanup()
        return 128 + stop.signal

    # The result
    result = config | {
        "test_accuracy": state["log"][-1]["test_accuracy"],
        "skipped_images": all_reduce_sum(torch.tensor(len(data.corrupt))).item(),
        "train_seconds": round(state["seconds"], 2),
        "images_per_second": round(images_in_all / state["seconds"], 1),
        "parameters": parameters,
    }
    if RANK == 0 and not (args.out / "result.json").exists():  # else this resumed a finished run
        write_json(args.out / "result.json", result | about)
    print(
        "{pe} on {dataset}, seed {seed}: {test_accuracy} % test accuracy after {epochs} epochs; "
        "{train_seconds:.0f} s of training, {images_per_second:.0f} images/s".format(**result)
    )
    if result["skipped_images"]:
        print("corrupt images skipped: {skipped_images}".format(**result))
    cleanup()


def reseed(*key):
    """Seed the generators of torch, numpy and Python with a key of integers >= 0."""
    seed = np.random.SeedSequence(key)
    torch.manual_seed(int(seed.generate_state(1, np.uint64)[0]))
    np.random.seed(seed.generate_state(4))
    random.seed(seed.generate_state(4).tobytes())


def make_optimizer(args, model):
    """Weight decay applies to weights of linear layers, not to biases, norms, tokens, embeddings and frequencies.

    A group's lr is its peak learning rate.
    """
    decayed = {m.weight for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    groups = [
        {"params": [p for p in model.parameters() if p in decayed], "weight_decay": args.weight_decay, "lr": args.lr},
        {"params": [p for p in model.parameters() if p not in decayed], "weight_decay": 0.0, "lr": args.lr},
    ]
    return OPTIMIZERS[args.opt][0](groups)


def learning_rate(args, peak, step, steps_per_epoch):
    """Linear warm-up, then cosine decay to 0."""
    warmup = min(args.warmup_epochs, args.epochs / 5) * steps_per_epoch
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return peak * (1 + math.cos(math.pi * (step - warmup) / (args.epochs * steps_per_epoch - warmup))) / 2


def epoch_means(state, steps_per_epoch):
    """This epoch's mean loss and accuracy so far. Raises UserError if the loss is not finite."""
    steps = state["step"] - len(state["log"]) * steps_per_epoch
    loss, correct = (x / max(steps, 1) for x in state["sums"].tolist())
    if not math.isfinite(loss):
        why = "became NaN or infinite: try a lower --lr"
        if state["step"] == 1:
            why = "is NaN or infinite at the first step: change --pos-scale, --pe-options or the data"
        raise UserError(f"the loss {why}", code=1)
    return loss, correct


if __name__ == "__main__":
    sys.exit(main())
