"""Axial RoPE: each pair of channels turns with the position along one axis (Su et al. 2021; Heo et al. 2024).

    rope = AxialRoPE(head_dim=64, num_heads=6)  # one for each attention layer
    q, k = rope(q, k, pos)                      # q, k (B, H, T, D); pos (T, 2): x, y of each token

Positions span [-pi, pi] along each side of a training image, and more in a larger image. A token at p = (x, y) turns
the pairs of channels of its query and key, half of them with x, half with y:

    R(p) = diag(rot(w_0 x), rot(w_1 x), ..., rot(w_0 y), rot(w_1 y), ...)     rot(a) = [[cos a, -sin a], [sin a, cos a]]

In a score q_i^T R(p_i)^T R(p_j) k_j the key turns by p_j and back by p_i, so that only p_j - p_i matters. R is

    orthogonal     R(p)^T R(p) = I and R(0) = I: norms are kept, and tokens at 0 (class token, padding) do not turn
    equivariant    R(p)^T R(q) = R(q - p) for all positions p, q: scores ignore a shift of all positions
    not oblique    a pair knows one axis only, and so a score is f(x_j - x_i) + g(y_j - y_i)

What turns which channels (head_dim = 10; leftover channels come last, unrotated):

    channel   0   1   2   3   4   5   6   7   8   9
             | w_0 x | w_1 x | w_0 y | w_1 y |  free |

Frequencies w are in radians per unit of position:

    fixed      w_d = theta^(-2d / D), D = head_dim, the same for all heads and axes
    uniform    w_d = 1: one turn across the training image
    learned    one for each head, axis and pair, initialised from U[0, 1); exempt freqs from weight decay

All of this holds for M = pos_dim axes. Source: van de Geijn et al. 2025 (arXiv 2511.08368), section 2.4, proposition 3.
This file stands alone. It is part of "Rotary position encodings for vision" (MIT License).
"""

import torch
from torch import nn


class AxialRoPE(nn.Module):
    """Rotates queries and keys, each pair of channels by one axis. head_dim must be at least 2 * pos_dim."""

    def __init__(self, head_dim, num_heads, *, learned=False, uniform=False, theta=100.0, pos_dim=2):
        super().__init__()
        self.pairs = head_dim // (2 * pos_dim)  # for each axis
        if self.pairs < 1:
            raise ValueError(f"head_dim must be at least 2 * pos_dim = {2 * pos_dim}, got {head_dim}")
        if learned and uniform:
            raise ValueError("uniform frequencies are fixed: choose learned=True or uniform=True, not both")
        if theta <= 0:
            raise ValueError(f"theta must be above 0, got {theta}")
        self.head_dim, self.num_heads, self.pos_dim = head_dim, num_heads, pos_dim
        self.learned, self.uniform, self.theta = learned, uniform, 1.0 if uniform else theta
        if learned:
            self.freqs = nn.Parameter(torch.rand(num_heads, pos_dim, self.pairs))

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
        """Cosine and sine of each pair's angle w x or w y: (1 or num_heads, T, M * pairs, 2), or (B, ...)."""
        check(self, x, pos)
        dtype = torch.promote_types(x.dtype, torch.float32)
        w = self.frequencies(dtype, pos.device)
        angle = (pos.to(dtype)[..., None, :, :, None] * w[:, None]).flatten(-2)
        return torch.stack([angle.cos(), angle.sin()], dim=-1)

    def frequencies(self, dtype=torch.float32, device=None):
        """w (1 or num_heads, M, pairs). The fixed ones are not stored: no cast can round them."""
        if self.learned:
            return self.freqs.to(dtype)
        d = torch.arange(self.pairs, dtype=dtype, device=device)
        return (self.theta ** (-2 * d / self.head_dim)).expand(1, self.pos_dim, -1)

    def rotation(self, pos):
        """R(p) itself, float64 if pos is: pos (T, M) or (B, T, M) -> (num_heads, T, D, D), or (B, ...)."""
        if pos.dim() == 3:
            return torch.stack([self.rotation(p) for p in pos])
        basis = torch.eye(self.head_dim, dtype=torch.promote_types(pos.dtype, torch.float32), device=pos.device)
        basis = basis[:, None, None].expand(-1, self.num_heads, len(pos), -1)  # e_i, for each head and token
        return self.rotate(basis, pos).permute(1, 2, 3, 0)  # column i is R e_i

    def extra_repr(self):
        return f"head_dim={self.head_dim}, num_heads={self.num_heads}, theta={self.theta:g}, learned={self.learned}"


def turn(x, table):
    """Turn each pair (a, b) of x (B, H, T, D) by the angle whose cosine and sine are in the table."""
    if 1 < table.shape[-4] < x.shape[1]:  # grouped-query attention
        table = table.repeat_interleave(x.shape[1] // table.shape[-4], dim=-4)
    n = 2 * table.shape[-2]
    pairs = x[..., :n].unflatten(-1, (-1, 2))  # (B, H, T, M * pairs, 2)
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
    rope = AxialRoPE(head_dim=64, num_heads=6)
    Rp, Rq = rope.rotation(p), rope.rotation(q)
    print(rope)
    print(f"orthogonal:   |R(p)^T R(p) - I|        = {(Rp.mT @ Rp - torch.eye(64)).abs().max():.0e}")
    print(f"equivariant:  |R(p)^T R(q) - R(q - p)| = {(Rp.mT @ Rq - rope.rotation(q - p)).abs().max():.0e}")
