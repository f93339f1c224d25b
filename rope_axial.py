"""Axial RoPE: each pair of channels turns with the position along one axis (Su et al. 2021; Heo et al. 2024).

RoPE in one dimension turns each pair of channels by an angle w x, where x is the token's position. In an image, half of
the pairs turn with x and the other half with y:

    x = torch.linspace(-torch.pi, torch.pi, 14)  # a training image of 14 x 14 patches: [-pi, pi] on each axis
    pos = torch.cartesian_prod(x, x).flip(-1)    # (T, 2): x, y of each patch, row by row
    rope = AxialRoPE(head_dim=64, num_heads=6)   # one for each attention layer
    q, k = torch.randn(2, 8, 6, 196, 64)         # each (batch B, heads H, tokens T, head_dim D)
    q, k = rope(q, k, pos)                       # transpose (B, T, H, D) first

An image of 28 x 28 patches spans [-2 pi, 2 pi], and so on (arXiv 2511.08368): its patches are slightly closer together.

A token at p = (x, y) has its query and its key multiplied by

    R(p) = diag(rot(w_0 x), rot(w_1 x), ..., rot(v_0 y), rot(v_1 y), ...)     rot(t) = [[cos t, -sin t], [sin t, cos t]]

rot(t) is exp(t J) for J = [[0, -1], [1, 0]]; the exponential of a larger skew-symmetric matrix turns more channels at
once. The score of a query q at p and a key k at p' is q^T R(p)^T R(p') k. R is

    the identity at 0    R(0) = I: tokens at 0 (class token, padding) do not turn
    orthogonal           R(p)^T R(p) = I: norms are kept
    equivariant          R(p)^T R(p') = R(p' - p) for all p and p': scores ignore a shift of all positions
    not oblique          a pair knows one axis only, and so a score is f(x' - x) + g(y' - y)

Channel layout (head_dim = 10; pairs are neighbours, not halves as in rotate_half; free: left over, not turned):

    channel   0   1   2   3   4   5   6   7   8   9
             | w_0 x | w_1 x | v_0 y | v_1 y |  free |

Frequencies w, v are in radians per unit of position:

    fixed      w_d = v_d = theta^(-2d / D), d = 0, 1, ..., D // 4 - 1, D = head_dim: the same for all heads
    uniform    w_d = v_d = 1: one turn across the training image
    learned    one for each head, axis and pair, from U[0, 1); exempt freqs from weight decay, and keep it in float32

Heo et al.'s RoPE-ViT has AxialRoPE(theta=100**2) with positions that count patches: its fastest pair turns by 1 radian
per patch. With [-pi, pi] that is 0.48 if training images have 14 patches per side, and 0.1 for 64. pos_dim=M gives M
axes.

Source: van de Geijn et al. 2025 (arXiv 2511.08368), section 2.4, proposition 3. This file stands alone, needs torch 2.3
or newer, and is part of "Rotary position encodings for vision" (MIT License).
"""

import math

import torch
from torch import nn


class AxialRoPE(nn.Module):
    """Rotates queries and keys, each pair of channels by one axis. head_dim must be at least 2 * pos_dim."""

    def __init__(self, head_dim, num_heads, *, learned=False, uniform=False, theta=100.0, pos_dim=2):
        super().__init__()
        if min(num_heads, pos_dim) < 1:
            raise ValueError(f"num_heads and pos_dim must be at least 1, got {num_heads} and {pos_dim}")
        if head_dim < 2 * pos_dim:
            raise ValueError(f"head_dim must be at least 2 * pos_dim = {2 * pos_dim}, got {head_dim}")
        if not 0 < theta < math.inf:
            raise ValueError(f"theta must be above 0 and finite, got {theta}")
        if [learned, uniform, theta != 100].count(True) > 1:
            raise ValueError("frequencies are learned=True, uniform=True or from theta: choose one")
        self.head_dim, self.num_heads, self.pos_dim = head_dim, num_heads, pos_dim
        self.learned, self.uniform, self.theta = learned, uniform, theta
        self.pairs = head_dim // (2 * pos_dim)  # for each axis
        if learned:
            self.freqs = nn.Parameter(torch.empty(num_heads, pos_dim, self.pairs))
        self.reset_parameters()

    def reset_parameters(self):
        """Draw freqs anew: transformers' from_pretrained and FSDP2's to_empty leave them uninitialised."""
        if self.learned:
            nn.init.uniform_(self.freqs)

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
        """Cosine and sine of each pair's angle w x or v y: (1 or num_heads, T, M * pairs, 2), or (B, ...)."""
        dtype = torch.promote_types(dtype, torch.float32)
        freqs = self.frequencies(dtype, pos.device)
        angle = (pos.to(dtype)[..., None, :, :, None] * freqs[:, None]).flatten(-2)
        return torch.stack([angle.cos(), angle.sin()], dim=-1)

    def frequencies(self, dtype=torch.float32, device=None):
        """w, v (1 or num_heads, M, pairs). Fixed ones are not stored, so no cast can round them."""
        if self.learned:
            return self.freqs.to(dtype)
        d = torch.arange(self.pairs, dtype=dtype, device=device)
        w = torch.ones_like(d) if self.uniform else self.theta ** (-2 * d / self.head_dim)
        return w.expand(1, self.pos_dim, -1)

    def rotation(self, pos):
        """R(p) itself, float64 if pos is: pos (T, M) or (B, T, M) -> (num_heads, T, D, D), or (B, ...)."""
        p, dtype = pos.flatten(0, -2), torch.promote_types(pos.dtype, torch.float32)
        basis = torch.eye(self.head_dim, dtype=dtype, device=pos.device)[:, None, None]  # e_0, e_1, ...
        R = self.rotate(basis.expand(-1, self.num_heads, len(p), -1), p).permute(1, 2, 3, 0)  # column i is R e_i
        return R.unflatten(1, pos.shape[:-1]).movedim(0, -4)

    def extra_repr(self):
        kind = "learned=True" if self.learned else "uniform=True" if self.uniform else f"theta={self.theta:g}"
        return f"head_dim={self.head_dim}, num_heads={self.num_heads}, pos_dim={self.pos_dim}, {kind}"


def turn(x, table):
    """Turn each pair (a, b) of x (B, H, T, D) by the angle whose cosine and sine are in the table."""
    if 1 < table.shape[-4] < x.shape[1]:  # grouped-query attention
        table = table.repeat_interleave(x.shape[1] // table.shape[-4], dim=-4)
    n, D = 2 * table.shape[-2], x.shape[-1]
    pairs, free = x.split([n, D - n], dim=-1) if n < D else (x, None)
    pairs = pairs.unflatten(-1, (-1, 2))  # (B, H, T, M * pairs, 2)
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
    rope = AxialRoPE(head_dim=64, num_heads=6)
    R, R2 = rope.rotation(p), rope.rotation(p2)
    print(rope)
    print(f"orthogonal:   |R(p)^T R(p) - I|          = {(R.mT @ R - torch.eye(64)).abs().max():.0e}")
    print(f"equivariant:  |R(p)^T R(p') - R(p' - p)| = {(R.mT @ R2 - rope.rotation(p2 - p)).abs().max():.0e}")
