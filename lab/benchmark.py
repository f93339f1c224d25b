"""Benchmark the encodings: time and memory, in a ViT and alone, as tokens grow.

    python -m lab.benchmark                              # the first four parts
    python -m lab.benchmark step inference --pe axial spherical --json costs.json
    python -m lab.benchmark step --pe spherical --img-size 1024 --patch-size 16 --batch-size 4 --head-dim 64

    step           a training step of ViT-S: forward, loss, backward, fused AdamW
    inference      a pass without gradients
    memory         the peak of a training step; the peak of one layer's encoding at 4096 tokens
    tokens         one layer's encoding of q and k (B, H, T, D), forward and backward, at 64 to 4096 tokens per image,
                   the same number in total
    peers          alone, eager and compiled, against other implementations: complex numbers, torch.matrix_exp per
                   token, timm and rotary-embedding-torch, if installed (pip install timm rotary-embedding-torch)
    decoding       reading photographs (--photos DIR) at 224 pixels as lab/imagenet.py does, against Pillow's open,
                   convert and resize of the whole image

All results are ratios: of a ViT to one without an encoding (none to none shows the precision), of an encoding alone to
scaled_dot_product_attention of the same q, k, v. The two take turns, so that fluctuations of the machine affect both
alike; short functions are called many times per turn. A row has the median and quartiles of the turns' ratios, and the
median time of a call. The default on CUDA is the setup of van de Geijn et al. 2025, table 9, compiled and in bfloat16.

Memory is the peak, beyond what was allocated before: in a training step, activations and gradients. For an encoding
alone, forward and backward, it is the excess over a stand-in that copies q and k, in units of q and k together.
"""

import argparse
import gc
import importlib
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.profiler import ProfilerActivity, profile

import comrope
import liere
from comrope import ComRoPE
from lab.cli import Parser, add_device_flags, number, parse_options
from lab.distributed import usable_device
from lab.environment import environment
from lab.errors import UserError, one_line_errors, user_errors
from lab.files import read_json, write_json
from lab.imagenet import SUFFIXES, load
from liere import LieRE
from vit import ENCODINGS, ViT

DEFAULTS = {  # on a CPU, on CUDA
    "img_size": (32, 224),
    "patch_size": (4, 16),
    "batch_size": (32, 256),
    "head_dim": (60, 64),
    "repeats": (5, 20),
    "amp": (False, True),
    "compile": (False, True),
}
SIDES = 8, 16, 32, 64  # of square grids of 64 to 4096 tokens


@one_line_errors
def main(argv=None):
    args = parse_args(argv)
    rows = []
    if usable_device(args.device).type not in ("cpu", "cuda"):
        raise UserError(f"--device {args.device} cannot be benchmarked: use cpu or cuda")
    about = environment(args.device) | {"settings": {k: v for k, v in vars(args).items() if k != "json"}}
    print("{device}, torch {torch}".format(**about))
    torch.manual_seed(0)
    for part in args.parts:
        for row in PARTS[part](args):
            row = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in row.items()}
            rows.append({"part": part} | row)
            show(**row)
            if args.json:
                write_json(args.json, about | {"rows": rows})
    if not rows:
        raise UserError(f"--pe {' '.join(args.pe)} has nothing to measure in {' '.join(args.parts)}: choose others")


def parse_args(argv):
    parser = Parser(__doc__)
    add, count = parser.add_argument, number(int, least=1)
    add("parts", nargs="*", metavar="PART", help=f"what to measure: {', '.join(PARTS)} (the first four)")
    add("--pe", nargs="+", choices=ENCODINGS, default=list(ENCODINGS), help="encodings (all)")
    add("--img-size", type=count, help="side of the images in pixels (32, on CUDA 224)")
    add("--patch-size", type=count, help="patch size in pixels (4, on CUDA 16)")
    add("--batch-size", type=count, help="images per batch (32, on CUDA 256)")
    add("--depth", type=count, default=12, help="layers (%(default)s)")
    add("--heads", type=count, default=6, help="attention heads (%(default)s)")
    add("--head-dim", type=count, help="channels per head (60, on CUDA 64)")
    add("--pe-options", nargs="+", default=[], metavar="NAME=VALUE", help="options of the encodings' constructors")
    add("--repeats", type=number(int, least=2), help="turns per comparison (5, on CUDA 20)")
    add_device_flags(parser)
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile models and encodings (on CUDA only)")
    add("--photos", type=Path, metavar="DIR", help="decoding: a folder of images, searched recursively")
    add("--json", type=Path, metavar="FILE", help="write each row to FILE as soon as it is measured")
    args = parser.parse_args(argv)
    for name, values in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, values[args.device.startswith("cuda")])
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(unknown)}: choose from {', '.join(PARTS)}")
    if args.img_size % args.patch_size:
        parser.error(f"--img-size must be a multiple of --patch-size = {args.patch_size}, not {args.img_size}")
    if args.json and args.json.is_dir():
        parser.error(f"--json must be a file, not the folder {args.json}")
    if args.json and args.json.exists() and "rows" not in read_json(args.json):
        parser.error(f"{args.json} is not a file of lab.benchmark: choose another --json")
    if args.json and not args.json.parent.is_dir():
        parser.error(f"there is no folder {args.json.parent}: create it, or choose another --json")
    args.parts = args.parts or list(PARTS)[:4]
    args.pe_options = {pe: parse_options(args.pe_options, pe, ENCODINGS[pe]) for pe in args.pe}
    if "decoding" in args.parts and not (args.photos and images_below(args.photos)):
        parser.error("decoding needs images: name a folder of them with --photos")
    return args


def show(what, pe, base, ratio, low=None, high=None, milliseconds=None, megabytes=None, **sizes):
    print(f"{what:38} {pe:18} {ratio:8.3f} of {base:23}", end="")
    print(f"{megabytes:9.1f} MB" if low is None else f"({low:.3f} to {high:.3f}) {milliseconds:9.2f} ms", end="")
    print("".join(f"   {name} {size}" for name, size in sizes.items()), flush=True)


# The parts. Each yields rows: what was measured, of which encoding, and relative to what.


def beside_none(what, make, args):
    """Each encoding against none, in pairs: the comparison that matters to its user."""
    none = make("none", args)
    for pe in args.pe:
        yield {"what": what, "pe": pe, "base": "none"} | compare(make(pe, args), none, args)


def tokens(args):
    for side in SIDES:
        for layer in layers(args, side):
            encode, attend = layer.with_backward(layer.encode), layer.with_backward(layer.attend)
            yield layer.row("encoding, forward and backward", "attention") | compare(encode, attend, args)


def memory(args):
    none = peak_memory(training_step("none", args), args)
    for pe in args.pe:
        peak = peak_memory(training_step(pe, args), args)
        row = {"what": "training step, memory", "pe": pe, "base": "none"}
        yield row | {"ratio": peak / none, "megabytes": peak / 1e6}
    for layer in layers(args, SIDES[-1]):
        copy, encode = (peak_memory(layer.with_backward(f), args) for f in (layer.copy, layer.encode))
        added, unit = max(encode - copy, 0), layer.q.nbytes + layer.k.nbytes
        yield layer.row("encoding, memory", "q and k") | {"ratio": added / unit, "megabytes": added / 1e6}


def peers(args):
    """Each encoding against other implementations, called as their authors recommend."""
    if args.head_dim % 4:
        raise UserError(f"--head-dim must be a multiple of 4 for peers, not {args.head_dim}")
    for layer in layers(args):
        for base, encode, parameters in others(layer):
            for mode, prepare in ("eager", lambda f: f), ("compiled", partial(torch.compile, dynamic=False)):
                torch.compiler.reset()
                ours, theirs = prepare(layer.encode), prepare(encode)
                row = compare(torch.no_grad()(ours), torch.no_grad()(theirs), args)
                yield layer.row(f"forward, {mode}", base) | row
                row = compare(layer.with_backward(ours), layer.with_backward(theirs, parameters), args)
                yield layer.row(f"forward and backward, {mode}", base) | row


def others(layer):
    """Yield a name, a function that rotates the layer's q and k, and the list of its parameters."""
    pe, rope, q, k = layer.pe, layer.rope, layer.q, layer.k
    (_, H, T, D), learned = q.shape, list(rope.parameters())
    if pe in ("axial", "mixed"):
        yield "complex numbers", partial(encode_by_complex_numbers, layer), learned
    if isinstance(rope, LieRE | ComRoPE):
        yield "torch.matrix_exp", partial(encode_by_matrix_exp, layer), learned
    shape = [math.isqrt(T)] * 2
    if pe == "axial" and (timm := installed("timm.layers")):  # one table for all calls
        table = timm.RotaryEmbeddingCat(D, in_pixels=False, feat_shape=shape).to(q.device).get_embed()
        yield "timm", lambda: [timm.apply_rot_embed_cat(x, table) for x in (q, k)], []
    if pe == "mixed" and (timm := installed("timm.layers")):
        theirs = timm.RotaryEmbeddingMixed(H * D, 1, H, feat_shape=shape).to(q.device)

        def encode():
            table = theirs.get_embed()[0]
            return [timm.apply_rot_embed_cat(x, table) for x in (q, k)]

        yield "timm", encode, list(theirs.parameters())
    if pe == "axial" and (rotary := installed("rotary_embedding_torch")):
        theirs = rotary.RotaryEmbedding(D // 2, freqs_for="pixel").to(q.device)

        def encode():
            table = theirs.get_axial_freqs(*shape).flatten(0, 1)
            return [rotary.apply_rotary_emb(table, x) for x in (q, k)]

        yield "rotary-embedding-torch", encode, []


def installed(name):
    """The module, or None if its package is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def encode_by_complex_numbers(layer):
    """The same with complex numbers, as in RoPE-ViT's and LLaMA's code."""
    w = layer.rope.frequencies(layer.pos.dtype) if layer.pe == "axial" else layer.rope.freqs
    angle = layer.pos[:, :, None] * w[:, None]  # (H or 1, T, M, pairs)
    angle = angle.flatten(-2) if layer.pe == "axial" else angle.sum(-2)
    z = torch.polar(torch.ones_like(angle), angle)
    pairs = (torch.view_as_complex(x.to(angle.dtype).unflatten(-1, (-1, 2))) for x in (layer.q, layer.k))
    return [torch.view_as_real(x * z).flatten(-2).type_as(layer.q) for x in pairs]


def encode_by_matrix_exp(layer):
    """The same with one matrix exponential per token, as in the papers."""
    rope, pos = layer.rope, layer.pos
    if isinstance(rope, LieRE):
        A, turn = torch.einsum("tm,hmkij->htkij", pos, rope.matrices(pos.dtype)), liere.turn
    else:
        P = rope.blocks
        A, turn = torch.einsum("tm,mk,hkij->htkij", pos, rope.factors(pos.dtype), P - P.mT), comrope.turn
    R = torch.compiler.disable(torch.matrix_exp)(A.contiguous())  # inductor passes strides that it rejects
    return turn(layer.q, R), turn(layer.k, R)


def decoding(args):
    paths = images_below(args.photos)

    def plain():
        for path in paths:
            with Image.open(path) as image:
                np.asarray(image.convert("RGB").resize((224, 224), Image.BICUBIC))

    def ours(random):
        for path in paths:
            load(path, 224, random)

    row = {"pe": "-", "base": "Pillow", "images": len(paths)}
    yield {"what": "random crop"} | row | compare(lambda: ours(np.random.default_rng(0)), plain, args)
    yield {"what": "centre crop"} | row | compare(lambda: ours(None), plain, args)


def images_below(folder):
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)


# What is measured.


def vit_of(pe, args, **shape):
    flags = {name: getattr(args, name) for name in ("img_size", "patch_size", "depth", "head_dim")}
    with user_errors(args):
        return ViT(pe=pe, num_heads=args.heads, **flags | shape | args.pe_options.get(pe, {})).to(args.device)


def autocast(args):
    return torch.autocast(args.device.partition(":")[0], torch.bfloat16, enabled=args.amp)


def batch(args):
    images = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=args.device)
    return images, torch.randint(100, (args.batch_size,), device=args.device)


def training_step(pe, args):
    """-> a function that runs a training step."""
    model, (images, labels) = vit_of(pe, args), batch(args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    if args.compile:
        model.compile(dynamic=False)

    def run():
        with autocast(args):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def inference_pass(pe, args):
    """-> a function that runs an inference pass."""
    model, (images, _) = vit_of(pe, args).eval(), batch(args)
    if args.compile:
        model.compile(dynamic=False)

    @torch.no_grad()
    def run():
        with autocast(args):
            model(images)

    return run


def layers(args, side=None):
    """A layer of each rotary encoding, for the batch's images or as many tokens in grids of side x side."""
    grid = args.img_size // args.patch_size
    B = max(SIDES[-1] ** 2, args.batch_size * grid**2) // side**2 if side else args.batch_size
    for pe in args.pe:
        if ENCODINGS[pe]:
            yield Layer(pe, args, side or grid, B)


class Layer:
    """An encoding with its inputs: positions of a square grid, and q and k in the layout of a ViT's attention."""

    def __init__(self, pe, args, side, batch_size):
        model = vit_of(pe, args, img_size=side, patch_size=1, depth=1, pool="mean")
        self.pe, self.rope, self.pos = pe, model.blocks[0].attn.rope, model.positions(side, side)
        if args.compile:
            self.rope.compile(dynamic=False)
        self.autocast = partial(autocast, args)
        dtype = torch.bfloat16 if args.amp else torch.float32
        qkv = torch.randn(batch_size, side**2, 3, args.heads, args.head_dim, dtype=dtype, device=args.device)
        self.q, self.k, self.v = (z.requires_grad_() for z in qkv.permute(2, 0, 3, 1, 4))  # (B, H, T, D)

    def row(self, what, base):
        B, _, T, D = self.q.shape
        return {"what": what, "pe": self.pe, "base": base, "tokens": T, "head_dim": D, "batch_size": B}

    def encode(self):
        with self.autocast():
            return self.rope(self.q, self.k, self.pos)

    def attend(self):
        return (F.scaled_dot_product_attention(self.q, self.k, self.v),)

    def copy(self):
        return self.q * 1, self.k * 1

    def with_backward(self, f, parameters=None):
        inputs = [self.q, self.k, self.v, *(self.rope.parameters() if parameters is None else parameters)]

        def run():
            out = f()
            torch.autograd.grad(out, inputs, [z.detach() for z in out], allow_unused=True)

        return run


# How it is measured.


def now():
    """The time in seconds, once the GPU has finished its work."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def compare(run, base, args):
    """Time run and base in turns -> the ratio run / base, its quartiles, and run's milliseconds."""
    if args.compile:
        torch.compiler.reset()  # else one function would be recompiled too often
    run(), base()  # warm up, and compile
    calls = [math.ceil(0.02 / seconds(f, 1)) for f in (run, base)]
    turns = [[seconds(f, n) for f, n in zip((run, base), calls, strict=True)] for _ in range(args.repeats)]
    low, ratio, high = statistics.quantiles((a / b for a, b in turns), n=4, method="inclusive")
    milliseconds = 1e3 * statistics.median(a for a, _ in turns)
    return {"ratio": ratio, "low": low, "high": high, "milliseconds": milliseconds}


def seconds(f, calls):
    """The time per call, over many calls in a row."""
    start = now()
    for _ in range(calls):
        f()
    return (now() - start) / calls


def peak_memory(f, args):
    """The most bytes that f holds at any time, beyond what was allocated before."""
    if args.compile:
        torch.compiler.reset()
    f()  # what it keeps for later calls does not count
    gc.collect()  # so that nothing else is released meanwhile
    if args.device.startswith("cuda"):
        before = torch.cuda.memory_allocated(args.device)
        torch.cuda.reset_peak_memory_stats(args.device)
        f()
        return torch.cuda.max_memory_allocated(args.device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        f()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = [e for e in json.loads(path.read_text(encoding="utf-8"))["traceEvents"] if e["name"] == "[memory]"]
    sizes = [e["args"]["Bytes"] for e in sorted(events, key=lambda e: e["ts"])]  # negative for a release
    return max(itertools.accumulate(sizes, initial=0))


PARTS = {
    "step": partial(beside_none, "training step", training_step),
    "inference": partial(beside_none, "inference", inference_pass),
    "memory": memory,
    "tokens": tokens,
    "peers": peers,
    "decoding": decoding,
}


if __name__ == "__main__":
    sys.exit(main())
