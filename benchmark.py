"""What an encoding costs: a ViT's training step against one without encoding, and exponentials against torch's own.

    python benchmark.py step                         # ViT-S, 32 x 32, patch 4, batch 32: ratios to --pe none
    python benchmark.py step --img-size 224 --patch-size 16 --batch-size 256 --device cuda --compile --amp
    python benchmark.py exponential                  # generators -> R -> q and k, against torch.matrix_exp

What is compared takes turns, so that a machine's moods hit all alike; medians of the ratios, with their quartiles.
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

import comrope
import liere
from comrope import ComRoPE
from liere import LieRE
from vit import ENCODINGS, ViT


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["step", "exponential"])
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
    else:
        step(args)


def step(args):
    """Each encoding beside none, two at a time: that is what a user of it would compare."""
    images = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=args.device)
    labels = torch.randint(100, (args.batch_size,), device=args.device)

    def training_step(pe):
        model = ViT(pe, img_size=args.img_size, patch_size=args.patch_size, head_dim=args.head_dim).to(args.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        if args.compile:
            model.compile()

        def run():
            with torch.autocast(args.device.partition(":")[0], torch.bfloat16, enabled=args.amp):
                loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    none = training_step("none")
    for pe in args.pe:
        if pe != "none":
            report(pe, "none", training_step(pe), none, args)


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
