"""Spherical RoPE: each triplet of channels turns on a sphere (van de Geijn et al. 2025, section 4 and appendix F).

RoPE in one dimension turns each pair of channels by an angle w x, where x is the token's position. Here each triplet
turns twice: its last two channels with y, then its first two with x. The turns share a channel, so their order matters,
and equivariance is lost. It was designed to test whether vision needs equivariance, against Mixed RoPE, which has it.

    x = torch.linspace(-torch.pi, torch.pi, 14)     # a training image of 14 x 14 patches: [-pi, pi] on each axis
    pos = torch.cartesian_prod(x, x).flip(-1)       # (T, 2): x, y of each patch, row by row
    rope = SphericalRoPE(head_dim=64, num_heads=6)  # one for each attention layer
    q, k = torch.randn(2, 8, 6, 196, 64)            # each (batch B, heads H, tokens T, head_dim D)
    q, k = rope(q, k, pos)                          # transpose (B, T, H, D) first

An image of 28 x 28 patches spans [-2 pi, 2 pi], and so on (arXiv 2511.08368): its patches are slightly closer together.

A token at p = (x, y) has its query and its key multiplied by

    R(p) = diag(yaw(w_0 x) roll(v_0 y), yaw(w_1 x) roll(v_1 y), ...)

              [cos u  -sin u  0]                [1    0       0  ]
    yaw(u) =  [sin u   cos u  0]     roll(t) =  [0  cos t  -sin t]
              [  0       0    1]                [0  sin t   cos t]

Both are exponentials: where RoPE's rot(t) is exp(t J), J = [[0, -1], [1, 0]], roll(t) and yaw(u) use larger
skew-symmetric matrices, which do not commute. The score of a query q at p and a key k at p' is q^T R(p)^T R(p') k. R is

    the identity at 0    R(0) = I: tokens at 0 (class token, padding) do not turn
    orthogonal           R(p)^T R(p) = I: norms are kept
    not equivariant      R(p)^T R(p') is not R(p' - p): in each triplet it is roll(-v y) yaw(w (x' - x)) roll(v y'), so
                         scores ignore a shift of all positions along x, but not along y (unless v = 0 or w = 0)
    oblique              a triplet can respond to a direction that is not along an axis

Channel layout (head_dim = 7; triplets are neighbours; free: left over, not turned):

    channel   0   1   2   3   4   5   6
    yaw, x   | w_0 x |   | w_1 x |  free
    roll, y      | v_0 y |   | v_1 y |

Frequencies w, v are in radians per unit of position:

    fixed      w_d = v_d = theta^(-2d / D), d = 0, 1, ..., D // 3 - 1, D = head_dim: the same for all heads
    learned    one for each head, axis and triplet, from U[0, 1); exempt freqs from weight decay, and keep it in float32

Source: arXiv 2511.08368, whose equations have this order of roll and yaw (the caption of its figure 2 has the other).
This file stands alone, needs torch 2.3 or newer, and is part of "Rotary position encodings for vision" (MIT License).
"""

import math

import torch
from torch import nn


class SphericalRoPE(nn.Module):
    """Rotates queries and keys on spheres, by yaw and roll. head_dim must be at least 3; positions are (x, y)."""

    def __init__(self, head_dim, num_heads, *, learned=False, theta=100.0, pos_dim=2):
        super().__init__()
        if head_dim < 3 or num_heads < 1:
            raise ValueError(f"head_dim must be at least 3 and num_heads 1, got {head_dim} and {num_heads}")
        if pos_dim != 2:
            raise ValueError(f"a sphere has two dimensions: pos_dim must be 2, got {pos_dim}")
        if not 0 < theta < math.inf:
            raise ValueError(f"theta must be above 0 and finite, got {theta}")
        if learned and theta != 100:
            raise ValueError("theta is for fixed frequencies: leave it out with learned=True")
        self.head_dim, self.num_heads, self.pos_dim = head_dim, num_heads, pos_dim
        self.learned, self.theta, self.triplets = learned, theta, head_dim // 3
        if learned:
            self.freqs = nn.Parameter(torch.empty(num_heads, 2, self.triplets))
        self.reset_parameters()

    def reset_parameters(self):
        """Draw freqs anew: transformers' from_pretrained and FSDP2's to_empty leave them uninitialised."""
        if self.learned:
            nn.init.uniform_(self.freqs)

    def forward(self, q, k, pos):
        """q, k (B, H, T, D) and pos (T, 2) or (B, T, 2) -> q, k rotated, of the same shapes and dtypes.

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
        """Cosine and sine of yaw and roll, u = w x and t = v y: (1 or num_heads, T, 2, triplets, 2), or (B, ...)."""
        dtype = torch.promote_types(dtype, torch.float32)
        freqs = self.frequencies(dtype, pos.device)
        angle = pos.to(dtype)[..., None, :, :, None] * freqs[:, None]
        return torch.stack([angle.cos(), angle.sin()], dim=-1)

    def frequencies(self, dtype=torch.float32, device=None):
        """w, v (1 or num_heads, 2, triplets). Fixed ones are not stored, so no cast can round them."""
        if self.learned:
            return self.freqs.to(dtype)
        d = torch.arange(self.triplets, dtype=dtype, device=device)
        return (self.theta ** (-2 * d / self.head_dim)).expand(1, 2, -1)

    def rotation(self, pos):
        """R(p) itself, float64 if pos is: pos (T, 2) or (B, T, 2) -> (num_heads, T, D, D), or (B, ...)."""
        p, dtype = pos.flatten(0, -2), torch.promote_types(pos.dtype, torch.float32)
        basis = torch.eye(self.head_dim, dtype=dtype, device=pos.device)[:, None, None]  # e_0, e_1, ...
        R = self.rotate(basis.expand(-1, self.num_heads, len(p), -1), p).permute(1, 2, 3, 0)  # column i is R e_i
        return R.unflatten(1, pos.shape[:-1]).movedim(0, -4)

    def extra_repr(self):
        kind = "learned=True" if self.learned else f"theta={self.theta:g}"
        return f"head_dim={self.head_dim}, num_heads={self.num_heads}, pos_dim={self.pos_dim}, {kind}"


def turn(x, table):
    """Turn each triplet (a, b, c) of x (B, H, T, D), first by roll(t), then by yaw(u)."""
    if 1 < table.shape[-5] < x.shape[1]:  # grouped-query attention
        table = table.repeat_interleave(x.shape[1] // table.shape[-5], dim=-5)
    n, D = 3 * table.shape[-2], x.shape[-1]
    triplets, free = x.split([n, D - n], dim=-1) if n < D else (x, None)
    triplets = triplets.unflatten(-1, (-1, 3))  # (B, H, T, triplets, 3)
    yaw, roll = table.unbind(-3)
    if torch.compiler.is_compiling():
        (a, b, c), (cos_u, sin_u), (cos_t, sin_t) = triplets.unbind(-1), yaw.unbind(-1), roll.unbind(-1)
        b, c = b * cos_t - c * sin_t, b * sin_t + c * cos_t  # roll
        a, b = a * cos_u - b * sin_u, a * sin_u + b * cos_u  # yaw
    else:  # the same in complex numbers, faster in eager mode: (b + ic) (cos t + i sin t), (a + ib) (cos u + i sin u)
        a, b, c = triplets.to(table.dtype).unbind(-1)
        bc = torch.complex(b, c) * torch.view_as_complex(roll)
        ab = torch.complex(a, bc.real) * torch.view_as_complex(yaw)
        a, b, c = ab.real, ab.imag, bc.imag
    triplets = torch.stack([a, b, c], dim=-1).flatten(-2).type_as(x)
    return triplets if free is None else torch.cat([triplets, free], dim=-1)


# What makes it safe


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
    rope = SphericalRoPE(head_dim=64, num_heads=6)
    R, R2 = rope.rotation(p), rope.rotation(p2)
    print(rope)
    print(f"orthogonal:       |R(p)^T R(p) - I|          = {(R.mT @ R - torch.eye(64)).abs().max():.0e}")
    print(f"not equivariant:  |R(p)^T R(p') - R(p' - p)| = {(R.mT @ R2 - rope.rotation(p2 - p)).abs().max():.0e}")
