"""A small Vision Transformer, and the table of position encodings by name.

The model is standard (Dosovitskiy et al. 2020; Touvron et al. 2022): pre-norm blocks, a class token, and, if asked for,
LayerScale and stochastic depth. Parameters have timm's names: with pe="ape" a timm ViT's state dict loads unchanged and
gives the same outputs. (timm's global_pool="avg" with class_token=False is pool="mean".)

A rotary encoding rotates q and k in each attention layer, given the positions of the tokens. The patch grid of a
training image spans [-pi, pi] on each axis, end points included. The class token sits at (0, 0), the centre, where
every rotation is the identity. Other image sizes keep the patch size: n patches per side, n0 in training, span
[-(n / n0) pi, (n / n0) pi]. (So neighbours are slightly closer together in larger images.)

That is pos_unit="image". With pos_unit="patch", as in RoPE-ViT (Heo et al. 2024), positions count patches from the
first one, at (0, 0), at any size, and the class token sits there too. RoPE-ViT's public weights need this unit.
"""

import math
from functools import partial
from inspect import signature

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import nn

from comrope import ComRoPE
from liere import LieRE
from rope_axial import AxialRoPE
from rope_mixed import MixedRoPE
from rope_spherical import SphericalRoPE

# A new encoding is one file and one line here. Its class is called once per layer with head_dim and num_heads and has
# forward(q, k, pos), rotate(x, pos) and rotation(pos), like the others, and reset_parameters() if it learns something.
# Options are keyword-only; an option named grid receives the patches per side, or None if positions count patches. The
# file's docstring says whether it is equivariant, and the tests check that. "none" and "ape" (a learned absolute
# embedding) leave q and k alone.
ENCODINGS = {
    "none": None,
    "ape": None,
    "axial": AxialRoPE,
    "axial-learned": partial(AxialRoPE, learned=True),
    "uniform": partial(AxialRoPE, uniform=True),
    "mixed": MixedRoPE,
    "spherical": SphericalRoPE,
    "spherical-learned": partial(SphericalRoPE, learned=True),
    "liere": LieRE,
    "comrope-ap": partial(ComRoPE, kind="ap"),
    "comrope-ld": partial(ComRoPE, kind="ld"),
}


class ViT(nn.Module):
    """A ViT of width num_heads * head_dim. Its default sizes are those of van de Geijn et al. 2025 for CIFAR-100.

    pe            a name in ENCODINGS; pe_options go to that encoding's constructor
    img_size      side of the training images in pixels, which sets the scale of positions: keep it to test at other
                  sizes; forward takes any sides that are multiples of patch_size
    pool          "cls": the head reads the class token; "mean": the mean of all patches, without a class token
    dropout       rate, after the position embedding, the attention projection and both MLP layers
    drop_path     stochastic depth: rate of dropping a residual branch, the same in all blocks, as in DeiT III
    layer_scale   initial value of LayerScale's gamma, None for no LayerScale
    pos_unit      "image": a training image spans [-pi, pi]; "patch": positions count patches
    pos_scale     factor on all positions, equivalent to a factor on all frequencies of the encoding
    ape           add a learned absolute embedding to another encoding
    """

    def __init__(
        self,
        pe="spherical",
        *,
        img_size=32,
        patch_size=4,
        num_classes=100,
        depth=12,
        num_heads=6,
        head_dim=60,
        pool="cls",
        mlp_ratio=4,
        dropout=0.0,
        drop_path=0.0,
        layer_scale=None,
        pos_unit="image",
        pos_scale=1.0,
        ape=False,
        **pe_options,
    ):
        super().__init__()
        if pe not in ENCODINGS:
            raise ValueError(f"pe must be one of {', '.join(ENCODINGS)}, got {pe!r}")
        if pool not in ("cls", "mean"):
            raise ValueError(f"pool must be 'cls' or 'mean', got {pool!r}")
        if pos_unit not in ("image", "patch"):
            raise ValueError(f"pos_unit must be 'image' or 'patch', got {pos_unit!r}")
        sizes = {"img_size": img_size, "patch_size": patch_size, "num_heads": num_heads, "head_dim": head_dim}
        for name, size in sizes.items():  # one img_size, although forward takes images that are not square
            if not hasattr(size, "__index__") or size < 1:
                raise ValueError(f"{name} must be a whole number, at least 1, got {size}")
        if img_size % patch_size:
            raise ValueError(f"img_size must be a multiple of patch_size = {patch_size}, got {img_size}")
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path must be at least 0 and below 1, got {drop_path}")
        dim, self.grid = num_heads * head_dim, img_size // patch_size
        self.pos_unit, self.pos_scale = pos_unit, pos_scale
        self.patch_embed = PatchEmbed(dim, patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if pool == "cls" else None
        tokens = self.num_prefix_tokens + self.grid**2
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, dim)) if ape or pe == "ape" else None
        self.pos_drop = nn.Dropout(dropout)
        make_rope = ENCODINGS[pe]
        if make_rope is None and pe_options:
            raise TypeError(f"{pe} has no options, got {', '.join(pe_options)}")
        known = signature(make_rope).parameters.keys() if make_rope else set()
        if taken := sorted(known & signature(ViT).parameters.keys() - {"num_heads", "head_dim"}):
            raise ValueError(f"ViT has an option {taken[0]}, too, and would take it for itself: rename that of {pe}")
        if "grid" in known:  # for initial frequencies per patch
            pe_options = {"grid": self.grid if pos_unit == "image" else None} | pe_options
        options = {"mlp_ratio": mlp_ratio, "dropout": dropout, "drop_path": drop_path, "layer_scale": layer_scale}
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, make_rope and make_rope(head_dim, num_heads, **pe_options), **options)
            for _ in range(depth)
        )
        # timm's two names: norm is applied before the class token is read, fc_norm after the mean is taken
        self.norm = nn.LayerNorm(dim, eps=1e-6) if pool == "cls" else nn.Identity()
        self.fc_norm = nn.LayerNorm(dim, eps=1e-6) if pool == "mean" else nn.Identity()
        self.head = nn.Linear(dim, num_classes)
        self.init_weights()

    def reset_parameters(self):
        """Draw all parameters anew, as the constructor does: for wrappers that build a model on the meta device."""
        for module in list(self.modules())[1:]:  # all but self
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        self.init_weights()

    def init_weights(self):
        """Initialise weights as in timm, where that differs from torch's defaults."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for p in self.cls_token, self.pos_embed:
            if p is not None:
                nn.init.trunc_normal_(p, std=0.02)

    @property
    def num_prefix_tokens(self):
        """Tokens in front of the patches: 1 with a class token, else 0."""
        return 0 if self.cls_token is None else 1

    @property
    def spacing(self):
        """Distance between neighbouring patches of a training image, in units of position."""
        return self.pos_scale * (2 * math.pi / max(self.grid - 1, 1) if self.pos_unit == "image" else 1)

    def positions(self, height, width, device=None):
        """Positions (x, y) of all tokens of an image of height x width patches, class token first: (T, 2)."""
        device = self.patch_embed.proj.weight.device if device is None else device
        n0 = self.grid if self.pos_unit == "image" else None
        x, y = (grid_axis(n, n0, device) for n in (width, height))
        pos = self.pos_scale * torch.stack([x.repeat(height), y.repeat_interleave(width)], dim=-1)
        return torch.cat([pos.new_zeros(self.num_prefix_tokens, 2), pos])

    def compile(self, **options):
        """torch.compile the blocks one by one: they share a graph, so it is compiled only once."""
        # For the whole process: otherwise gradients of matrix exponentials would be computed in the forward pass's
        # bfloat16, although loss.backward() is called outside autocast.
        torch._functorch.config.backward_pass_autocast = "off"
        for block in self.blocks:
            block.compile(**options)

    def forward(self, images, pos=None):
        """images (B, 3, height, width) -> logits (B, num_classes).

        pos (T, 2) or (B, T, 2), class token first, replaces the positions given to a rotary encoding.
        """
        x = self.patch_embed(images)
        height, width = x.shape[-2:]
        if pos is None:
            pos = self.positions(height, width, x.device)
        x = x.flatten(2).mT  # (B, height * width, dim)
        if self.num_prefix_tokens:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        if self.pos_embed is not None:
            x = x + self.interpolated_pos_embed(height, width)
        x = self.pos_drop(x)
        for block in self.blocks:
            x = block(x, pos)
        x = self.norm(x)
        return self.head(self.fc_norm(x[:, 0] if self.num_prefix_tokens else x.mean(dim=1)))

    def interpolated_pos_embed(self, height, width):
        """The learned position embedding (1, T, dim), resampled to another grid as in timm."""
        if not torch.compiler.is_compiling() and (height, width) == (self.grid, self.grid):  # compiled: one graph
            return self.pos_embed
        prefix, grid = self.pos_embed[:, : self.num_prefix_tokens], self.pos_embed[:, self.num_prefix_tokens :]
        grid = grid.mT.unflatten(-1, (self.grid, self.grid))
        grid = F.interpolate(grid, size=(height, width), mode="bicubic", antialias=True)
        return torch.cat([prefix, grid.flatten(2).mT], dim=1)


def grid_axis(n, n0, device=None):
    """n coordinates, centred on 0, that span [-(n / n0) pi, (n / n0) pi]; 0 if n = 1. Without n0: 0, 1, ..., n - 1."""
    dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)  # bfloat16 would round positions
    if n0 is None:
        return torch.arange(n, dtype=dtype, device=device)
    steps = 2 * torch.arange(n, dtype=dtype, device=device) - (n - 1)
    return steps * (math.pi * n / (n0 * (n - 1 or 1)))


class PatchEmbed(nn.Module):
    def __init__(self, dim, patch_size):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, patch_size)

    def forward(self, images):
        height, width = images.shape[-2:]
        patch = self.proj.stride[0]
        if height % patch or width % patch:
            raise ValueError(f"an image's sides must be multiples of patch_size = {patch}, got {height} x {width}")
        return self.proj(images)


class Block(nn.Module):
    def __init__(self, dim, num_heads, rope, *, mlp_ratio, dropout, drop_path, layer_scale):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, rope, dropout)
        self.ls1 = LayerScale(dim, layer_scale) if layer_scale is not None else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, int(mlp_ratio * dim), dropout)
        self.ls2 = LayerScale(dim, layer_scale) if layer_scale is not None else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x, pos):
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x), pos)))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class Attention(nn.Module):
    def __init__(self, dim, num_heads, rope, dropout):
        super().__init__()
        self.num_heads, self.rope = num_heads, rope
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, x, pos):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        if self.rope is not None:
            q, k = self.rope(q, k, pos)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class MLP(nn.Module):
    def __init__(self, dim, hidden, dropout):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x):
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class LayerScale(nn.Module):
    """Multiplies each channel of a residual branch by a learned factor (Touvron et al. 2021, CaiT)."""

    def __init__(self, dim, init):
        super().__init__()
        self.init, self.gamma = init, nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.constant_(self.gamma, self.init)

    def forward(self, x):
        return x * self.gamma


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): drops the branch of random samples and scales up the others."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if not self.training:
            return x
        keep = 1 - self.rate
        return x * x.new_empty(x.shape[0], 1, 1).bernoulli_(keep).div_(keep)
