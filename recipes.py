"""The recipes of training, and the command line that completes them."""

import argparse
from pathlib import Path

from common import Parser, add_device_flags, number
from data import AUGMENT
from vit import ENCODINGS

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
LEARNING_RATES = {"lamb": 4e-3, "adamw": 1e-3}  # where a recipe has none
IMAGENET = {"img_size": 224, "eval_size": None, "workers": 8, "limit_classes": None, "skip_damaged": False}  # its flags


def parse_args(argv, description):
    """The command line of train.py, completed by the data set's recipe."""
    parser = Parser(description)
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
    add(
        "--micro-batch", type=number(int, least=1), help="images a process takes at once (its whole share of the batch)"
    )
    add_from_recipe("--augment", str, "3: crop, flip, 3-Augment, color jitter; mix: and Mixup, CutMix", choices=AUGMENT)
    add_from_recipe("--opt", str, "optimizer", choices=LEARNING_RATES)
    rates = ", ".join(f"{name} {lr}" for name, lr in LEARNING_RATES.items())
    add("--lr", type=number(float), help=f"highest learning rate ({rates}; bearing {RECIPES['bearing']['lr']})")
    add("--weight-decay", type=number(float, least=0), default=0.05, help="of linear maps (%(default)s)")
    add_from_recipe("--warmup-epochs", number(float, least=0), "epochs of linear warm-up, at most a fifth of all")
    add_from_recipe("--depth", number(int, least=1), "blocks")
    add_from_recipe("--heads", number(int, least=1), "attention heads")
    add_from_recipe("--head-dim", number(int, least=1), "channels a head")
    rate = number(float, least=0, most=0.9)
    add_from_recipe("--dropout", rate, "chance to drop a channel, after embedding, attention and MLP")
    add_from_recipe("--drop-path", rate, "stochastic depth: chance to drop a residual branch")
    add_from_recipe("--layer-scale", number(float, least=0), "LayerScale's initial value, 0 for none")
    add_from_recipe("--patch-size", number(int, least=1), "side of a patch in pixels")
    add("--block-size", type=number(int, least=2), help="channels a block of liere (all), comrope-ap, comrope-ld (8)")
    add("--jitter", type=number(float, least=0), default=0.0, help="noise on positions in training, in patches (0)")
    add("--pool", choices=["cls", "mean"], default="cls", help="what the classifier reads (%(default)s)")
    add("--img-size", type=number(int, least=1), help="imagenet: side of the training images in pixels (224)")
    add("--eval-size", type=number(int, least=1), help="imagenet: side of the test images in pixels (as in training)")
    add("--limit-classes", type=number(int, least=1), help="imagenet: the first so many classes only (all)")
    add("--workers", type=number(int, least=0), help="imagenet: processes that decode images, for each GPU (8)")
    add("--skip-damaged", action="store_const", const=True, help="imagenet: leave out files that cannot be read")
    add("--seed", type=number(int, least=0), default=0, help="decides all that is random (%(default)s)")
    add("--out", type=Path, help="the run's folder (runs/<dataset>-<pe>-s<seed>)")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--profile", type=number(int, least=1), metavar="N", help="print where the time of N steps goes, and no more")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the model (if on CUDA)")
    add("--data-dir", type=Path, default=Path("data"), help="where data sets are or are downloaded to (%(default)s)")
    add_device_flags(parser)

    args = parser.parse_args(argv)
    for name, value in IMAGENET.items():
        if getattr(args, name) is None:
            setattr(args, name, value if args.dataset == "imagenet" else None)
        elif args.dataset != "imagenet":
            parser.error(f"--{name.replace('_', '-')} is for --dataset imagenet: leave it out")
    on_cuda = args.device.startswith("cuda")
    out = Path("runs") / f"{args.dataset}-{args.pe}-s{args.seed}"
    for name, value in ({"out": out, "compile": on_cuda, "amp": on_cuda} | RECIPES[args.dataset]).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.lr = args.lr or LEARNING_RATES[args.opt]
    if args.block_size and not args.pe.startswith(("liere", "comrope")):
        parser.error(f"--pe {args.pe} has no blocks: leave --block-size out, or take liere, comrope-ap or comrope-ld")
    if args.jitter and args.pe in ("none", "ape"):
        parser.error(f"--pe {args.pe} is told no positions: leave --jitter out, or take another encoding")
    if args.eval_size and args.eval_size % args.patch_size:
        parser.error(f"--eval-size must be a multiple of --patch-size {args.patch_size}, not {args.eval_size}")
    return args
