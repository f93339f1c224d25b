"""Evaluate trained models under other conditions than those of training.

    python -m lab.evaluate runs/*                  # all of the following
    python -m lab.evaluate runs/* --sizes          # images of other sizes, same patch size; or --sizes 24 64 (pixels)
    python -m lab.evaluate runs/* --shift          # all positions shifted by a random offset; or --shift 1 4 (patches)
    python -m lab.evaluate runs/* --patch-shift    # the same, but the class token stays at 0
    python -m lab.evaluate runs/* --shuffle        # the patches of each image in random order
    python -m lab.evaluate runs/* --regions        # bearing: both squares in one quarter; see below

Prints accuracies (%) and saves them in each run's evaluation.json.

Shifts are drawn from N(0, rho^2) for x and y (rho in patches), one for every five images, from the run's seed.
Equivariant encodings ignore a shift of all positions (Yu et al. 2025, figure 5), but not if the class token, the point
of reference, stays behind. The accuracy lost to shuffling shows how much a model relies on positions (Ostmeier et al.
2024, table 5).

--regions tests bearing in each quarter. In the lower left one it also counts the answers that would be right in a
mirror ("left for right"). On the run's own test set it moves all positions ("all moved"), and not the squares, so that
the border stays where it is: half an image to the right; half an image, one patch or two patches down. In the lower
right quarter it moves the class token alone ("token moved"), as far as the squares are from the upper left one.

A model for ImageNet-1k (lab.pretrained) takes a folder of any of its classes, named as ImageNet's are: n01440764 ...
Its answer is one of all 1000.
"""

import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from lab.accuracy import accuracy
from lab.cli import Parser, add_device_flags, folder, number
from lab.data import REGIONS, Bearing
from lab.datasets import DATASETS
from lab.distributed import WORLD_SIZE, usable_device
from lab.errors import UserError, one_line_errors, user_errors
from lab.files import locked, write_json
from lab.run import class_labels, read_of_run, read_run

SIZES = 0.75, 0.875, 1, 1.25, 1.5, 1.75, 2  # times the training size
SHIFTS = 1, 2, 4, 8, 16  # patches


@one_line_errors
def main(argv=None):
    args = parse_args(argv)
    if WORLD_SIZE > 1:
        raise UserError("lab.evaluate runs in one process: start it with python, not with torchrun")
    usable_device(args.device)
    for run in args.runs:
        if not run.is_dir():
            raise UserError(f"there is no {run}/last.pt: name folders that train.py has written")
        with locked(run):  # a run still in training would replace the weights meanwhile
            evaluate(run, args)


def parse_args(argv):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=folder, metavar="RUN", help="folders that train.py has written")
    add("--sizes", nargs="*", type=number(int, least=1), metavar="S", help="sides of test images (0.75 to 2 times)")
    add("--shift", nargs="*", type=number(float, least=0), metavar="RHO", help=f"shift all positions {SHIFTS}")
    add("--patch-shift", nargs="*", type=number(float, least=0), metavar="RHO", help="shift all but the class token's")
    add("--shuffle", action="store_true", help="the patches of each image in random order")
    add("--regions", action="store_true", help="bearing: both squares in one quarter of the image")
    add("--data-dir", type=folder, default=Path("data"), help="folder of the data sets and downloads (%(default)s)")
    add("--workers", type=number(int, least=0), help="imagenet: image-decoding processes (as in training)")
    add_device_flags(parser)
    args = parser.parse_args(argv)
    if args.amp is None:
        args.amp = args.device.startswith("cuda")
    asked = args.sizes, args.shift, args.patch_shift, args.shuffle or None, args.regions or None
    if all(a is None for a in asked):
        args.sizes, args.shift, args.patch_shift, args.shuffle, args.regions = [], [], [], True, True
    return args


def evaluate(run, args):
    """Evaluate one run, print the results and add them to its evaluation.json."""
    saved, model = read_run(run, args.device)
    config, path = saved["config"], run / "evaluation.json"
    if args.workers is not None and "workers" in saved["data"]:
        saved["data"]["workers"] = args.workers
    try:
        data = DATASETS[config["dataset"]](args.data_dir, device=args.device, **saved["data"])
    except (KeyError, TypeError) as e:
        raise UserError(f"{run} does not fit its data set, which has changed since ({e}): train it again") from e
    data.load()
    labels = class_labels(run, data, config["data_set"]).to(args.device)
    about = "{pe} on {dataset}, seed {seed}, epoch {epoch} of {epochs}".format(epoch=len(saved["log"]), **config)
    print(f"{run}: {about}", flush=True)
    results = read_of_run(path, config).get("accuracies", {})
    for name, found in evaluations(model, data, labels, config["seed"], args):
        if any(map(math.isnan, found.values())):
            raise UserError(f"no test image in {args.data_dir} could be read: fix the files")
        results[name] = results.get(name, {}) | {key: round(value, 2) for key, value in found.items()}
        print(f"  {name:16}" + "   ".join(f"{key}: {results[name][key]:.1f}" for key in found), flush=True)
        write_json(path, config | {"accuracies": results, "skipped_images": len(data.corrupt)})
    if data.corrupt:
        print(f"corrupt images skipped: {len(data.corrupt)}")


def evaluations(model, data, labels, seed, args):
    """Yield each kind of evaluation: its name and a dict of accuracies (%).

    labels: the model's label for each class of the data; seed: for random draws
    """
    patch, rotary = model.patch_embed.proj.stride[0], model.blocks[0].attn.rope is not None
    grid = data.img_size // patch  # patches per side

    def test(pos=lambda n: None, change=lambda images: images, answers=labels, **which):
        torch.manual_seed(seed)
        batches = ((change(images), answers[i]) for images, i in data.test_batches(**which))
        return accuracy(model, batches, args.amp, pos)

    def shifted(rho, first=0):
        def pos(n):
            pos = model.positions(grid, grid).repeat(n, 1, 1)
            offsets = torch.randn(n, 1, 2, device=pos.device)[torch.arange(n) // 5]  # LieRE pays for each
            pos[:, first:] += rho * model.spacing * offsets
            return pos

        return test(pos, batch_size=50)

    def moved(tokens, *offset):  # x, y in patches
        pos = model.positions(grid, grid)
        pos[tokens] += model.spacing * pos.new_tensor(offset)
        return lambda n: pos

    yield "test", {"test": test()}
    if args.sizes is not None:
        with user_errors(()):  # the model's, about sizes
            found = {str(size): test(img_size=size) for size in args.sizes or [patch * round(x * grid) for x in SIZES]}
        yield "size", found
    if args.shift is not None and rotary:
        yield "shift", {f"{rho:g}": shifted(rho) for rho in args.shift or SHIFTS}
    if args.patch_shift is not None and rotary and model.num_prefix_tokens:
        yield "patch shift", {f"{rho:g}": shifted(rho, model.num_prefix_tokens) for rho in args.patch_shift or SHIFTS}
    if args.shuffle:
        yield "patches", {"shuffled": test(change=lambda images: shuffled(images, patch))}
    if args.regions and isinstance(data, Bearing):
        half = grid / 2
        yield "region", {region: test(region=region) for region in REGIONS}
        left_for_right = (4 - labels) % 8  # labels count eighths of a turn from "right"
        yield "left for right", {"lower left": test(answers=left_for_right, region="lower left")}
        if rotary:
            offsets = {"right": (half, 0), "down": (0, half), "down 1": (0, 1), "down 2": (0, 2)}
            yield "all moved", {name: test(moved(..., *offset)) for name, offset in offsets.items()}
        if rotary and model.num_prefix_tokens:
            token = moved(slice(model.num_prefix_tokens), half, half)
            yield "token moved", {"lower right": test(token, region="lower right")}


def shuffled(images, patch):
    """Images (B, 3, H, W) with the patches of each one in its own random order."""
    patches = F.unfold(images, patch, stride=patch)  # (B, 3 * patch^2, N)
    order = torch.rand(len(patches), 1, patches.shape[-1], device=images.device).argsort(dim=-1)
    return F.fold(patches.gather(-1, order.expand_as(patches)), images.shape[-2:], patch, stride=patch)


if __name__ == "__main__":
    sys.exit(main())
