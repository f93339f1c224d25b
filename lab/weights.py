"""Weights to start from: those of a run, or of a ViT for ImageNet in a file that others have published.

    vit, weights = read_weights(Path("model.safetensors"))
    model = ViT(**vit)
    model.load_state_dict(weights)

Files may be timm's or those of RoPE-ViT's authors (Heo et al. 2024, arXiv 2403.13298). Names and shapes tell which
model it is: axial or mixed, with or without an absolute embedding, or a plain ViT (pe="ape"). Reading runs no code.
"""

import argparse
import json
import math
import pickle
import re
from inspect import signature

import torch

from lab.checkpoint import from_bytes
from lab.cli import parse_options
from lab.datasets import DATASETS
from lab.errors import UserError, first_line
from lab.run import flag, read_checkpoint
from vit import ENCODINGS, ViT

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_weights(path, heads=None, pe=None):
    """A run's folder, or a file of weights -> the options of their ViT, and its state dict.

    heads: their number, needed unless they have 64 channels; pe: which encoding it is, if names and shapes fit two.
    """
    if path.is_dir() or path.name == "last.pt":
        saved = read_checkpoint(path if path.is_dir() else path.parent)
        return saved["vit"], saved["model"]
    if not path.is_file():
        raise UserError(f"there is no {path}: name a run's folder, or a file of weights")
    content = path.read_bytes()
    try:
        weights = read_safetensors(content) if content[8:9] == b"{" else read_pickle(content)
        weights = {name: x.float() for name, x in weights.items()}
    except Exception as e:  # other content can fail in any way
        raise UserError(f"{path} holds no weights that can be read ({first_line(e)}): download it again") from e
    if bad := [name for name, x in weights.items() if not x.isfinite().all()]:
        raise UserError(f"{path} holds NaN or infinity, in {bad[0]}: download it again")
    try:
        return recognise(weights, heads, pe)
    except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as e:
        why = f"it has {some(weights)}, but no {e}" if isinstance(e, KeyError) else first_line(e)
        raise UserError(f"{path} is not a ViT that is known here: {why}") from e


def read_safetensors(content):
    """A .safetensors file: 8 bytes that say how long the header is, the header (JSON), raw little-endian numbers."""
    start = 8 + int.from_bytes(content[:8], "little")
    header, data, tensors = json.loads(content[8:start]), memoryview(content)[start:], {}
    header.pop("__metadata__", None)
    for name, about in header.items():
        shape, (begin, end) = about["shape"], about["data_offsets"]
        if about["dtype"] not in DTYPES:
            raise ValueError(f"{name} has the unknown dtype {about['dtype']}")
        dtype = DTYPES[about["dtype"]]
        if not 0 <= begin < end <= len(data) or end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} {shape} cannot be bytes {begin} to {end} of {len(data)}")
        tensors[name] = torch.frombuffer(bytearray(data[begin:end]), dtype=dtype).view(shape)
    return tensors


def read_pickle(content):
    """A .pth or .bin file: a state dict, or one that has it as "model" or "state_dict"."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the authors' files hold their flags
            content = from_bytes(content)
    except pickle.UnpicklingError as e:  # which advises to run the file's code
        raise ValueError("neither .safetensors nor a pickle of tensors alone") from e
    return content.get("model") or content.get("state_dict") or content


def recognise(weights, heads, pe):
    """A published state dict -> the options of its ViT, and the state dict under our names."""
    dim, _, patch, _ = weights["patch_embed.proj.weight"].shape
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    freqs = weights.get("rope.freqs", weights.get("freqs"))  # timm's (2, depth, H, D/2), the authors' (2, depth, H D/2)
    if freqs is not None and freqs.dim() == 4:
        if heads not in (None, freqs.shape[2]):
            raise ValueError(f"rope.freqs is of {freqs.shape[2]} heads, --heads says {heads}")
        heads = freqs.shape[2]
    heads = heads or max(dim // 64, 1)
    if dim % heads:
        raise ValueError(f"{heads} heads cannot share a width of {dim}: add --heads N")
    gamma = {"gamma_1", "ls1"} & {part for name in weights for part in name.split(".")}
    if freqs is not None and pe:
        raise ValueError(f"it has the frequencies of mixed, --pe says {pe}")
    pe = "mixed" if freqs is not None else pe or ("axial" if "gamma_1" in gamma else "ape")
    vit = {
        "pe": pe,
        "img_size": 14 * patch,
        "patch_size": patch,
        "num_classes": len(weights["head.weight"]),
        "depth": depth,
        "num_heads": heads,
        "head_dim": dim // heads,
        "pool": "cls" if "cls_token" in weights else "mean",
        "mlp_ratio": len(weights["blocks.0.mlp.fc1.weight"]) / dim,
        "layer_scale": 1e-5 if gamma else None,
        "pos_unit": "patch",
    }
    if pe == "axial":
        vit["theta"] = 100.0**2  # theirs is 100, to a power twice as large
    drop = "rope.freqs", "freqs", "freqs_t_x", "freqs_t_y"
    weights = {re.sub(r"\bgamma_([12])$", r"ls\1.gamma", name): x for name, x in weights.items() if name not in drop}
    if freqs is not None:
        for i, w in enumerate(freqs.view(2, depth, heads, -1).permute(1, 2, 0, 3)):
            weights[f"blocks.{i}.attn.rope.freqs"] = w.contiguous()
    if (embed := weights.get("pos_embed")) is not None:
        side = math.isqrt(embed.shape[1])
        vit |= {"ape": pe != "ape", "img_size": side * patch}
        if vit["pool"] == "cls" and embed.shape[1] == side**2:  # the class token has none
            weights["pos_embed"] = torch.cat([torch.zeros(1, 1, dim), embed], dim=1)
    with torch.device("meta"):
        want = {f"{name} {tuple(x.shape)}" for name, x in ViT(**vit).state_dict().items()}
    found = {f"{name} {tuple(x.shape)}" for name, x in weights.items()}
    if found != want:
        raise ValueError(f"it looks like pe={pe}, but has {some(found - want)} and lacks {some(want - found)}")
    return vit, weights


def adopt_flags(args):
    """Give train.py's flags the values of the model in --init. Other values are an error, but not another --pe.

    A run that resumes takes them from its own folder: it never reads --init again.
    """
    if not args.out:
        raise UserError("--init needs a folder for the new run: add --out")
    vit, _ = read_weights(args.out if args.resume else args.init, args.heads)
    default = {name: p.default for name, p in signature(ViT).parameters.items()}
    pe_options = {name: value for name, value in vit.items() if name not in default}
    vit = default | vit
    flags = {name: vit[name] for name in ("patch_size", "depth", "head_dim", "pool", "pos_unit", "pos_scale", "ape")}
    flags |= {"heads": vit["num_heads"], "layer_scale": vit["layer_scale"] or 0.0}
    if ENCODINGS.get(vit["pe"], ViT) is None:  # another encoding may have any positions, and keep an absolute embedding
        flags = {name: flags[name] for name in flags.keys() - {"pos_unit", "pos_scale", "ape"}}
    args.pe = args.pe or vit["pe"]
    if args.pe not in ENCODINGS:
        raise UserError(f"{args.init} has --pe {args.pe}, which vit.py does not know: choose another")
    if args.pe == vit["pe"]:
        words, args.pe_options = args.pe_options, [f"{name}={value}" for name, value in pe_options.items()]
        if words and parse_options(words, args.pe, ENCODINGS[args.pe]) != pe_options:
            raise UserError(f"{args.init} has --pe-options {' '.join(args.pe_options)}: leave them out")
    for name, value in flags.items():
        if getattr(args, name) not in (None, value):
            raise UserError(f"{args.init} has {flag(name)} {value}, not {getattr(args, name)}: leave it out")
        setattr(args, name, value)
    if args.img_size is None and "img_size" in signature(DATASETS[args.dataset]).parameters:
        args.img_size = vit["img_size"]


def start_from(model, weights, same_pe):
    """Load weights into a model. A head for other classes and the parameters of another encoding stay as drawn."""
    own = model.state_dict()
    same = {name for name, x in weights.items() if name in own and x.shape == own[name].shape}
    taken = {name: weights[name] for name in same if same_pe or ".rope." not in name}
    model.load_state_dict(own | taken)
    print(f"Weights loaded: {len(taken)} of {len(own)}; newly drawn: {some(own.keys() - taken.keys())}")


def some(names):
    """The first names, as text."""
    return ", ".join([*sorted(names)[:3], *["..."] * (len(names) > 3)]) or "nothing"
