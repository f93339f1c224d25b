"""Mixed RoPE: each pair of channels turns along a direction of its own, which is learned (Heo et al. 2024).

RoPE in one dimension turns each pair of channels by an angle w x, where x is the token's position. In an image, the
position is a vector p = (x, y), as is each frequency w: the angle becomes w . p = w_x x + w_y y.

    x = torch.linspace(-torch.pi, torch.pi, 14)          # a training image of 14 x 14 patches: [-pi, pi] on each axis
    pos = torch.cartesian_prod(x, x).flip(-1)            # (T, 2): x, y of each patch, row by row
    rope = MixedRoPE(head_dim=64, num_heads=6, grid=14)  # one for each attention layer
    q, k = torch.randn(2, 8, 6, 196, 64)                 # each (batch B, heads H, tokens T, head_dim D)
    q, k = rope(q, k, pos)                               # transpose (B, T, H, D) first

An image of 28 x 28 patches spans [-2 pi, 2 pi], and so on (arXiv 2511.08368): its patches are slightly closer together.

A token at p has its query and its key multiplied by

    R(p) = diag(rot(w_0 . p), rot(w_1 . p), ...)     rot(t) = [[cos t, -sin t], [sin t, cos t]]

rot(t) is exp(t J) for J = [[0, -1], [1, 0]]; the exponential of a larger skew-symmetric matrix turns more channels at
once. The score of a query q at p and a key k at p' is q^T R(p)^T R(p') k. R is

    the identity at 0    R(0) = I: tokens at 0 (class token, padding) do not turn
    orthogonal           R(p)^T R(p) = I: norms are kept
    equivariant          R(p)^T R(p') = R(p' - p) for all p and p': scores ignore a shift of all positions
    oblique              a pair can respond to a direction that is not along an axis

Every equivariant R(p) = exp(x A_x + y A_y), A_x and A_y skew-symmetric, is Mixed RoPE in another basis of the channels
(van de Geijn et al. 2025, proposition 2). In Axial RoPE, each pair has w_x = 0 or w_y = 0.

Channel layout (head_dim = 7; pairs are neighbours, not halves as in rotate_half; free: left over, not turned):

    channel   0   1   2   3   4   5   6
             |w_0 . p|w_1 . p|w_2 . p|free

Frequencies w, in radians per unit of position, are learned for each head and pair. They start as

    heo        two orthogonal directions per head, turned at random; along either, pair d = 0, 1, ... has
               |w| = theta^(-4d / D) radians per patch, times (grid - 1) / (2 pi) patches per unit of position
    uniform    U[0, 1), as in van de Geijn et al.

grid is the number of patches per side of a training image (8 by default), or None if positions count patches, as in
RoPE-ViT. Exempt freqs from weight decay, and keep it in float32. pos_dim=M gives M axes, M directions, and |w| =
theta^(-2Md / D).

Source: arXiv 2403.13298; proposition 2: arXiv 2511.08368. This file stands alone, needs torch 2.3 or newer, and is part
of "Rotary position encodings for vision" (MIT License).
"""

import math

import torch
from torch import nn


class MixedRoPE(nn.Module):
    """Rotates queries and keys by angles linear in the position. head_dim must be at least 2."""

    def __init__(self, head_dim, num_heads, *, init="heo", theta=10.0, grid=8, pos_dim=2):
        super().__init__()
        if min(num_heads, pos_dim) < 1:
            raise ValueError(f"num_heads and pos_dim must be at least 1, got {num_heads} and {pos_dim}")
        if head_dim < 2:
            raise ValueError(f"head_dim must be at least 2, got {head_dim}")
        if init not in ("heo", "uniform"):
            raise ValueError(f"init must be 'heo' or 'uniform', got {init!r}")
        if not 0 < theta < math.inf:
            raise ValueError(f"theta must be above 0 and finite, got {theta}")
        if init == "uniform" and theta != 10:
            raise ValueError("theta is for init='heo': leave it out")
        if grid is not None and not 1 <= grid < math.inf:
            raise ValueError(f"grid must be at least 1, or None if positions count patches, got {grid}")
        self.head_dim, self.num_heads, self.pos_dim = head_dim, num_heads, pos_dim
        self.init, self.theta, self.grid = init, theta, grid
        self.freqs = nn.Parameter(torch.empty(num_heads, pos_dim, head_dim // 2))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        """Draw freqs anew: transformers' from_pretrained and FSDP2's to_empty leave them uninitialised."""
        if self.init == "uniform":
            self.freqs.uniform_()
            return
        H, M, pairs = self.freqs.shape
        angle = 2 * math.pi * torch.rand(H, M, M, dtype=torch.float64, device="cpu").tril(-1)
        directions = torch.matrix_exp(angle - angle.mT)  # as columns; [[cos a, -sin a], [sin a, cos a]] if M = 2
        d = torch.arange(pairs, device="cpu")
        along = math.ceil(pairs / M)  # pairs along each direction
        freqs = directions[..., d // along] * self.theta ** (-2 * M * (d % along) / self.head_dim)  # radians per patch
        if self.grid is not None:
            freqs *= (self.grid - 1) / (2 * math.pi)
        if hasattr(self.freqs, "placements"):  # sharded by FSDP2
            from torch.distributed.tensor import distribute_tensor

            freqs = distribute_tensor(freqs, self.freqs.device_mesh, self.freqs.placements)
        self.freqs.copy_(freqs)

    def forward(self, q, k, pos):
        """q, k (B, H, T, D) and pos (T, M) or (B, T, M) -> q, k rotated, of the same shapes and dtypes.

        H is a multiple of num_heads: each R(p) turns H / num_heads consecutive heads. With grouped-query attention,
        num_heads is the number of key heads.
        """
        check(self, pos, q, k)
        table = self.table(pos, torch.promote_types(q.dtype, k.dtype))
        return turn(q, table), turn(k, table)

    def rotate(self, x, pos):
        """Rotate queries or keys x (B, H, T, D) alone: for cross-attention, or a cache of keys."""
        check(self, pos, x)
        return turn(x, self.table(pos, x.dtype))

    def table(self, pos, dtype):
        """Cosine and sine of each pair's angle w . p: (num_heads, T, pairs, 2) or (B, num_heads, T, pairs, 2)."""
        dtype = torch.promote_types(dtype, torch.float32)
        w = self.freqs.to(dtype)
        angle = (pos.to(dtype)[..., None, :, :, None] * w[:, None]).sum(dim=-2)  # w . p; autocast would round a matmul
        return torch.stack([angle.cos(), angle.sin()], dim=-1)

    def rotation(self, pos):
        """R(p) itself, float64 if pos is: pos (T, M) or (B, T, M) -> (num_heads, T, D, D), or (B, ...)."""
        p, dtype = pos.flatten(0, -2), torch.promote_types(pos.dtype, torch.float32)
        basis = torch.eye(self.head_dim, dtype=dtype, device=pos.device)[:, None, None]  # e_0, e_1, ...
        R = self.rotate(basis.expand(-1, self.num_heads, len(p), -1), p).permute(1, 2, 3, 0)  # column i is R e_i
        return R.unflatten(1, pos.shape[:-1]).movedim(0, -4)

    def extra_repr(self):
        kind = f"theta={self.theta:g}, grid={self.grid}" if self.init == "heo" else "init='uniform'"
        return f"head_dim={self.head_dim}, num_heads={self.num_heads}, pos_dim={self.pos_dim}, {kind}"


def turn(x, table):
    """Turn each pair (a, b) of x (B, H, T, D) by the angle whose cosine and sine are in the table."""
    if 1 < table.shape[-4] < x.shape[1]:  # grouped-query attention
        table = table.repeat_interleave(x.shape[1] // table.shape[-4], dim=-4)
    n, D = 2 * table.shape[-2], x.shape[-1]
    pairs, free = x.split([n, D - n], dim=-1) if n < D else (x, None)
    pairs = pairs.unflatten(-1, (-1, 2))  # (B, H, T, pairs, 2)
    if torch.compiler.is_compiling():
        (a, b), (cos, sin) = pairs.unbind(-1), table.unbind(-1)
        pairs = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
    else:  # the same in complex numbers, faster in eager mode: (a + ib) (cos + i sin)
        pairs = torch.view_as_real(as_complex(pairs.to(table.dtype)) * torch.view_as_complex(table))
    pairs = pairs.flatten(-2).type_as(x)
    return pairs if free is None else torch.cat([pairs, free], dim=-1)


# What makes it fast and safe


def as_complex(z):
    """View z (..., 2) as complex numbers (...); copy it only if torch.view_as_complex refuses its strides or offset."""
    odd = z.stride(-1) != 1 or any(n % 2 for n in (z.storage_offset(), *z.stride()[:-1]))
    return torch.view_as_complex(z.clone(memory_format=torch.contiguous_format) if odd else z)


def check(rope, pos, *tensors):
    """Raise a ValueError that names the expected shapes, unless pos and the tensors have them."""
    heads, D, M = rope.num_heads, rope.head_dim, rope.pos_dim
    for x in tensors:
        B, H, T, channels = x.shape if x.dim() == 4 else ("B", "H", "T", "D")
        if channels != D or H % heads or tuple(pos.shape) not in ((T, M), (B, T, M)):
            expected = f"(B, H, T, D), H a multiple of {heads}, D = {D}, and pos ({T}, {M}) or ({B}, {T}, {M})"
            raise ValueError(f"q or k must be {expected}, got {tuple(x.shape)} and {tuple(pos.shape)}")


if __name__ == "__main__":
    p, p2 = 3 * torch.randn(2, 100, 2, dtype=torch.float64)  # p and p'
    rope = MixedRoPE(head_dim=64, num_heads=6)
    R, R2 = rope.rotation(p), rope.rotation(p2)
    print(rope)
    print(f"orthogonal:   |R(p)^T R(p) - I|          = {(R.mT @ R - torch.eye(64)).abs().max():.0e}")
    print(f"equivariant:  |R(p)^T R(p') - R(p' - p)| = {(R.mT @ R2 - rope.rotation(p2 - p)).abs().max():.0e}")
