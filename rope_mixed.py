"""Mixed RoPE: each pair of channels turns along a direction of its own, which is learned (Heo et al. 2024).

    rope = MixedRoPE(head_dim=64, num_heads=6, grid=14)  # one for each attention layer; 14 x 14 patches in training
    q, k = rope(q, k, pos)                               # q, k (B, H, T, D); pos (T, 2): x, y of each token

Positions span [-pi, pi] along each side of a training image, and more in a larger image. A token at p = (x, y) turns
every pair of channels of its query and key by an angle that is linear in p:

    R(p) = diag(rot(w_0 . p), rot(w_1 . p), ...)    w . p = w_x x + w_y y    rot(a) = [[cos a, -sin a], [sin a, cos a]]

    orthogonal     R(p)^T R(p) = I and R(0) = I: norms are kept, and tokens at 0 (class token, padding) do not turn
    equivariant    R(p)^T R(q) = R(q - p) for all positions p, q: scores ignore a shift of all positions
    oblique        a pair can respond to a direction that is not along an axis

What turns which channels (head_dim = 7; leftover channels come last, unrotated):

    channel   0   1   2   3   4   5   6
             |w_0 . p|w_1 . p|w_2 . p|free

No equivariant R(p) = exp(x A_x + y A_y) is more general: each is Mixed RoPE in another basis (van de Geijn et al. 2025,
proposition 2, arXiv 2511.08368). Axial RoPE is the case where w_x or w_y is 0. Frequencies, in radians per unit of
position, are learned for each head, axis and pair; exempt freqs from weight decay. They start as

    heo        for each head two orthogonal directions, turned at random; the d-th pair along either direction has the
               frequency theta^(-4d / D) radians per patch, times (grid - 1) / (2 pi) patches per unit of position
    uniform    U[0, 1), as in van de Geijn et al.

With M = pos_dim axes there are M directions, and theta^(-2Md / D) radians per patch. Source: arXiv 2403.13298.
This file stands alone. It is part of "Rotary position encodings for vision" (MIT License).
"""

import math

import torch
from torch import nn


class MixedRoPE(nn.Module):
    """Rotates queries and keys by angles linear in the position. head_dim must be at least 2."""

    def __init__(self, head_dim, num_heads, *, init="heo", theta=10.0, grid=8, pos_dim=2):
        super().__init__()
        pairs = head_dim // 2
        if pairs < 1:
            raise ValueError(f"head_dim must be at least 2, got {head_dim}")
        if init not in ("heo", "uniform"):
            raise ValueError(f"init must be 'heo' or 'uniform', got {init!r}")
        if theta <= 0:
            raise ValueError(f"theta must be above 0, got {theta}")
        self.head_dim, self.num_heads, self.pos_dim = head_dim, num_heads, pos_dim
        self.init, self.theta, self.grid = init, theta, grid
        freqs = torch.rand(num_heads, pos_dim, pairs)  # init="uniform"
        if init == "heo":
            directions = torch.randn(num_heads, pos_dim, pos_dim, dtype=torch.float32)
            basis, upper = torch.linalg.qr(directions)  # columns: a head's directions
            basis *= upper.diagonal(dim1=-2, dim2=-1).sign()[:, None]  # else QR would choose the signs
            basis[..., -1] *= torch.linalg.det(basis).sign()[:, None]  # turned, not mirrored
            d = torch.arange(pairs)
            along = math.ceil(pairs / pos_dim)  # pairs along each direction
            magnitude = theta ** (-2 * pos_dim * (d % along) / head_dim) * (grid - 1) / (2 * math.pi)
            freqs = basis[..., d // along] * magnitude
        self.freqs = nn.Parameter(freqs)

    def forward(self, q, k, pos):
        """q, k (B, H, T, D) and pos (T, M) or (B, T, M) -> q, k rotated, of the same shapes and dtypes.

        H is a multiple of num_heads (the number of key heads): each R(p) turns H / num_heads consecutive heads.
        """
        check(self, k, pos)
        table = self.table(q, pos)
        return turn(q, table), turn(k, table)

    def rotate(self, x, pos):
        """Rotate queries or keys x (B, H, T, D) alone: for cross-attention, or a cache of keys."""
        return turn(x, self.table(x, pos))

    def table(self, x, pos):
        """Cosine and sine of each pair's angle w . p: (num_heads, T, pairs, 2) or (B, num_heads, T, pairs, 2)."""
        check(self, x, pos)
        dtype = torch.promote_types(x.dtype, torch.float32)
        angle = (pos.to(dtype)[..., None, :, :, None] * self.freqs.to(dtype)[:, None]).sum(dim=-2)  # w . p
        return torch.stack([angle.cos(), angle.sin()], dim=-1)

    def rotation(self, pos):
        """R(p) itself, float64 if pos is: pos (T, M) or (B, T, M) -> (num_heads, T, D, D), or (B, ...)."""
        if pos.dim() == 3:
            return torch.stack([self.rotation(p) for p in pos])
        basis = torch.eye(self.head_dim, dtype=torch.promote_types(pos.dtype, torch.float32), device=pos.device)
        basis = basis[:, None, None].expand(-1, self.num_heads, len(pos), -1)  # e_i, for each head and token
        return self.rotate(basis, pos).permute(1, 2, 3, 0)  # column i is R e_i

    def extra_repr(self):
        options = f"init={self.init!r}, theta={self.theta:g}, grid={self.grid}"
        return f"head_dim={self.head_dim}, num_heads={self.num_heads}, {options}"


def turn(x, table):
    """Turn each pair (a, b) of x (B, H, T, D) by the angle whose cosine and sine are in the table."""
    if 1 < table.shape[-4] < x.shape[1]:  # grouped-query attention
        table = table.repeat_interleave(x.shape[1] // table.shape[-4], dim=-4)
    n = 2 * table.shape[-2]
    pairs = x[..., :n].unflatten(-1, (-1, 2))  # (B, H, T, pairs, 2)
    with torch.autocast("cpu", enabled=False):  # CPU autocast cannot concatenate float16
        pairs = product(pairs, table)  # a cos - b sin, a sin + b cos
        pairs = pairs.flatten(-2).type_as(x)
        return torch.cat([pairs, x[..., n:]], dim=-1) if n < x.shape[-1] else pairs


# What makes it fast and safe


def product(z, w):
    """(a + ib) (cos + i sin), for z and w (..., 2): as complex numbers, or as real ones, which compilers can fuse."""
    if not torch.compiler.is_compiling() and not torch.jit.is_tracing():
        return torch.view_as_real(as_complex(z.to(w.dtype)) * torch.view_as_complex(w))
    (a, b), (cos, sin) = z.unbind(-1), w.unbind(-1)
    if torch.compiler.is_compiling() and z.device.type == "cpu":
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
    iz = torch.stack([-b, a], dim=-1)  # cos z + sin iz takes fewer instructions on a GPU
    return torch.stack([cos, cos], dim=-1) * z + torch.stack([sin, sin], dim=-1) * iz


def as_complex(z):
    """View z (..., 2) as complex numbers (...); copy it only if torch.view_as_complex refuses its strides or offset."""
    odd = z.stride(-1) != 1 or any(place % 2 for place in (z.storage_offset(), *z.stride()[:-1]))
    return torch.view_as_complex(z.clone(memory_format=torch.contiguous_format) if odd else z)


def check(rope, x, pos):
    """Raise a ValueError that names the expected shapes, unless x and pos have them."""
    H, D, M = rope.num_heads, rope.head_dim, rope.pos_dim
    if x.dim() != 4 or x.shape[1] % H or x.shape[3] != D:
        raise ValueError(f"q and k must be (B, a multiple of {H}, T, {D}), got {tuple(x.shape)}")
    B, _, T, _ = x.shape
    if tuple(pos.shape) not in ((T, M), (B, T, M)):
        raise ValueError(f"pos must be {(T, M)} or {(B, T, M)}, got {tuple(pos.shape)}")


if __name__ == "__main__":
    p, q = 3 * torch.randn(2, 100, 2, dtype=torch.float64)
    rope = MixedRoPE(head_dim=64, num_heads=6)
    Rp, Rq = rope.rotation(p), rope.rotation(q)
    print(rope)
    print(f"orthogonal:   |R(p)^T R(p) - I|        = {(Rp.mT @ Rp - torch.eye(64)).abs().max():.0e}")
    print(f"equivariant:  |R(p)^T R(q) - R(q - p)| = {(Rp.mT @ Rq - rope.rotation(q - p)).abs().max():.0e}")
