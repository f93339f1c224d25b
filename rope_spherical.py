"""Spherical RoPE: each triplet of channels turns on a sphere (van de Geijn et al. 2025, section 4 and appendix F).

    rope = SphericalRoPE(head_dim=63, num_heads=6)  # one for each attention layer
    q, k = rope(q, k, pos)                          # q, k (B, H, T, D); pos (T, 2): x, y of each token

Positions span [-pi, pi] along each side of a training image, and more in a larger image. A token at p = (x, y) turns
each triplet (a, b, c) of its query and key as a vector in space, first by a roll proportional to y, then by a yaw
proportional to x:

    R(p) = diag(yaw(w_0 x) roll(v_0 y), yaw(w_1 x) roll(v_1 y), ...)

              [cos u  -sin u  0]                [1    0       0  ]
    yaw(u) =  [sin u   cos u  0]     roll(t) =  [0  cos t  -sin t]
              [  0       0    1]                [0  sin t   cos t]

Roll and yaw share the coordinate b, so their order matters. This gives up equivariance on purpose.

    orthogonal         R(p)^T R(p) = I and R(0) = I: norms are kept, and tokens at 0 (class token, padding) do not turn
    not equivariant    R(p)^T R(q) = roll(-v y_p) yaw(w (x_q - x_p)) roll(v y_q) does not depend on q - p alone:
                       scores ignore a shift of all positions along x, but not along y (unless w = 0 or v = 0)
    oblique            a triplet mixes x and y, and can respond to a direction that is not along an axis

What turns which channels (head_dim = 7; leftover channels come last, unrotated):

    channel   0   1   2   3   4   5   6
    yaw, x   | w_0 x |   | w_1 x |  free
    roll, y      | v_0 y |   | v_1 y |

Frequencies w, v are in radians per unit of position:

    fixed      w_d = v_d = theta^(-2d / D), D = head_dim, the same for all heads
    learned    one for each head, axis and triplet, initialised from U[0, 1); exempt freqs from weight decay

Source: arXiv 2511.08368. (The caption of its figure 2 has the other order; its equations have this one.)
This file stands alone. It is part of "Rotary position encodings for vision" (MIT License).
"""

import torch
from torch import nn


class SphericalRoPE(nn.Module):
    """Rotates queries and keys on spheres, by yaw and roll. head_dim must be at least 3; positions are (x, y)."""

    pos_dim = 2

    def __init__(self, head_dim, num_heads, *, learned=False, theta=100.0):
        super().__init__()
        self.triplets = head_dim // 3
        if self.triplets < 1:
            raise ValueError(f"head_dim must be at least 3, got {head_dim}")
        if theta <= 0:
            raise ValueError(f"theta must be above 0, got {theta}")
        self.head_dim, self.num_heads, self.learned, self.theta = head_dim, num_heads, learned, theta
        if learned:
            self.freqs = nn.Parameter(torch.rand(num_heads, 2, self.triplets))

    def forward(self, q, k, pos):
        """q, k (B, H, T, D) and pos (T, 2) or (B, T, 2) -> q, k rotated, of the same shapes and dtypes.

        H is a multiple of num_heads (the number of key heads): each R(p) turns H / num_heads consecutive heads.
        """
        check(self, k, pos)
        table = self.table(q, pos)
        return turn(q, table), turn(k, table)

    def rotate(self, x, pos):
        """Rotate queries or keys x (B, H, T, D) alone: for cross-attention, or a cache of keys."""
        return turn(x, self.table(x, pos))

    def table(self, x, pos):
        """Cosine and sine of yaw and roll, u = w x and t = v y: (1 or num_heads, T, 2, triplets, 2), or (B, ...)."""
        check(self, x, pos)
        dtype = torch.promote_types(x.dtype, torch.float32)
        w = self.frequencies(dtype, pos.device)
        angle = pos.to(dtype)[..., None, :, :, None] * w[:, None]
        return torch.stack([angle.cos(), angle.sin()], dim=-1)

    def frequencies(self, dtype=torch.float32, device=None):
        """w and v (1 or num_heads, 2, triplets). The fixed ones are not stored: no cast can round them."""
        if self.learned:
            return self.freqs.to(dtype)
        d = torch.arange(self.triplets, dtype=dtype, device=device)
        return (self.theta ** (-2 * d / self.head_dim)).expand(1, 2, -1)

    def rotation(self, pos):
        """R(p) itself, float64 if pos is: pos (T, 2) or (B, T, 2) -> (num_heads, T, D, D), or (B, ...)."""
        if pos.dim() == 3:
            return torch.stack([self.rotation(p) for p in pos])
        basis = torch.eye(self.head_dim, dtype=torch.promote_types(pos.dtype, torch.float32), device=pos.device)
        basis = basis[:, None, None].expand(-1, self.num_heads, len(pos), -1)  # e_i, for each head and token
        return self.rotate(basis, pos).permute(1, 2, 3, 0)  # column i is R e_i

    def extra_repr(self):
        return f"head_dim={self.head_dim}, num_heads={self.num_heads}, theta={self.theta:g}, learned={self.learned}"


def turn(x, table):
    """Turn each triplet (a, b, c) of x (B, H, T, D) by the table's roll, then by its yaw."""
    if 1 < table.shape[-5] < x.shape[1]:  # grouped-query attention
        table = table.repeat_interleave(x.shape[1] // table.shape[-5], dim=-5)
    yaw, roll = table.unbind(-3)
    n = 3 * table.shape[-2]
    triplets = x[..., :n].to(table.dtype).unflatten(-1, (-1, 3))  # (B, H, T, triplets, 3)
    if torch.jit.is_tracing() or (torch.compiler.is_compiling() and x.device.type != "cpu"):
        triplets = turn_at_once(triplets, yaw, roll)
    else:
        a, b, c = triplets.unbind(-1)
        b, c = turn_plane(b, c, roll)
        a, b = turn_plane(a, b, yaw)
        triplets = torch.stack([a, b, c], dim=-1)
    triplets = triplets.flatten(-2).type_as(x)
    with torch.autocast("cpu", enabled=False):  # CPU autocast cannot concatenate float16
        return torch.cat([triplets, x[..., n:]], dim=-1) if n < x.shape[-1] else triplets


def turn_plane(a, b, table):
    """Turn the vectors (a, b) by the angle whose cosine and sine are in the table (..., 2)."""
    if torch.compiler.is_compiling():
        cos, sin = table.unbind(-1)
        return a * cos - b * sin, a * sin + b * cos
    z = torch.complex(a, b) * torch.view_as_complex(table)  # the same, faster in eager mode
    return z.real, z.imag


# What makes it fast and safe


def turn_at_once(z, yaw, roll):
    """R z for R = yaw(u) roll(t), by its diagonals R_k[i] = R[i, (i + k) % 3]: fewer instructions on a GPU."""
    (cu, su), (ct, st) = yaw.unbind(-1), roll.unbind(-1)
    R = cu, cu * ct, ct, -su * ct, -cu * st, torch.zeros_like(cu), su * st, su, st
    R0, R1, R2 = torch.stack(R, dim=-1).unflatten(-1, (3, 3)).unbind(-2)
    return R0 * z + R1 * z.roll(-1, dims=-1) + R2 * z.roll(-2, dims=-1)


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
    rope = SphericalRoPE(head_dim=64, num_heads=6)
    Rp, Rq = rope.rotation(p), rope.rotation(q)
    print(rope)
    print(f"orthogonal:       |R(p)^T R(p) - I|        = {(Rp.mT @ Rp - torch.eye(64)).abs().max():.0e}")
    print(f"not equivariant:  |R(p)^T R(q) - R(q - p)| = {(Rp.mT @ Rq - rope.rotation(q - p)).abs().max():.0e}")
