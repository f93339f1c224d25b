"""What things cost: encodings in a ViT's training step, exponentials against torch's own, and the recipe's other parts.

    python benchmark.py step                         # ViT-S, 32 x 32, patch 4, batch 32: ratios to --pe none
    python benchmark.py step --img-size 224 --patch-size 16 --batch-size 256 --device cuda --compile --amp
    python benchmark.py exponential                  # generators -> R -> q and k, against torch.matrix_exp
    python benchmark.py recipe --batch-size 64       # a batch's augmentation against its step, LAMB against AdamW

What is compared takes turns, so that a machine's moods hit all alike; medians of the ratios, with their quartiles.
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

import comrope
import liere
from augment import mix, three_augment
from common import autocast
from comrope import ComRoPE
from lamb import LAMB
from liere import LieRE
from vit import ENCODINGS, ViT


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["step", "exponential", "recipe"])
    parser.add_argument("--pe", nargs="+", choices=ENCODINGS, default=list(ENCODINGS), help="encodings (all)")
    parser.add_argument("--img-size", type=int, default=32)
    parser.add_argument("--patch-size", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--head-dim", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    args = parser.parse_args()
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads")
    if args.what == "exponential":
        exponential(args.repeats)
    elif args.what == "recipe":
        recipe(args)
    else:
        step(args)


def step(args):
    """Each encoding beside none, two at a time: that is what a user of it would compare."""
    none = training_step("none", args)
    for pe in args.pe:
        if pe != "none":
            report(pe, "none", training_step(pe, args), none, args)


def training_step(pe, args):
    images = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=args.device)
    labels = torch.randint(100, (args.batch_size,), device=args.device)
    model = ViT(pe, img_size=args.img_size, patch_size=args.patch_size, head_dim=args.head_dim).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    if args.compile:
        model.compile()

    def run():
        with autocast(args.device, args.amp):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def recipe(args):
    """What the CIFAR-100 recipe adds to a training step of ViT-S."""
    images = torch.randint(256, (args.batch_size, 3, 32, 32), dtype=torch.uint8, device=args.device)
    labels = torch.randint(100, (args.batch_size,), device=args.device)
    report("augmentation", "step", lambda: mix(three_augment(images), labels, 100), training_step("axial", args), args)

    def update(optimizer, **options):
        parameters = [p.detach().clone().requires_grad_() for p in ViT("axial").to(args.device).parameters()]
        for p in parameters:
            p.grad = torch.randn_like(p)
        return optimizer(parameters, weight_decay=0.05, **options).step

    report("LAMB", "fused AdamW", update(LAMB), update(torch.optim.AdamW, fused=True), args)


def exponential(repeats, B=8, H=6, T=196, D=64):
    """Forward and backward through generators -> R -> rotated q and k, with q, k (B, H, T, D) on a 14 x 14 grid."""
    q, k, *grads = torch.randn(4, B, H, T, D)
    pos = ViT("none", img_size=14, patch_size=1, depth=1, pool="mean").positions(14, 14)

    def torchs(rope):
        """The same with an exponential for each token, as it is written in the papers."""
        if isinstance(rope, LieRE):
            U = rope.generators.triu(1)
            A, rotate = torch.einsum("tm,hmkij->htkij", pos, U - U.mT), liere.rotate
        else:
            P = rope.blocks
            A, rotate = torch.einsum("tm,mk,hkij->htkij", pos, rope.theta, P - P.mT), comrope.rotate
        R = torch.matrix_exp(A.contiguous())
        return rotate(q, R), rotate(k, R)

    def passes(forward, rope):
        return lambda: torch.autograd.grad(forward(), list(rope.parameters()), grads)

    for name, rope in {
        "liere": LieRE(D, H),
        "liere, blocks of 8": LieRE(D, H, block_size=8),
        "comrope-ap": ComRoPE(D, H, kind="ap"),
        "comrope-ld": ComRoPE(D, H, kind="ld"),
    }.items():
        ours, theirs = passes(lambda rope=rope: rope(q, k, pos), rope), passes(lambda rope=rope: torchs(rope), rope)
        report("torch.matrix_exp", name, theirs, ours, argparse.Namespace(repeats=repeats, device="cpu"))


def report(name, base_name, run, base, args):
    """Time run and base in turns, and print what the one takes of the other."""
    for f in (run, base) * 2:  # warm up, and compile
        f()
    times = []
    for _ in range(args.repeats):
        times.append([seconds(f, args.device) for f in (run, base)])
    ratios = [a / b for a, b in times]
    low, median, high = statistics.quantiles(ratios, n=4)
    a, b = (1e3 * statistics.median(t) for t in zip(*times, strict=True))
    print(
        f"{name:18} {a:8.1f} ms   {base_name:18} {b:8.1f} ms   ratio {median:.3f} ({low:.3f} to {high:.3f})", flush=True
    )


def seconds(f, device):
    synchronize = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    synchronize()
    start = time.perf_counter()
    f()
    synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
