"""Mixed RoPE: each pair of channels turns along a direction of its own, which is learned (Heo et al. 2024).

A token at position p = (x, y) turns every pair of channels of its query and key by an angle that is linear in p:

    R(p) = diag(rot(w_0 . p), rot(w_1 . p), ...)    w . p = w_x x + w_y y    rot(a) = [[cos a, -sin a], [sin a, cos a]]

    orthogonal     R(p)^T R(p) = I, and R(0) = I: norms survive, a class token at 0 is left alone
    equivariant    R(p)^T R(q) = R(q - p): a shift of all positions leaves every score as it was
    oblique        a pair can respond to a direction that is not along an axis

It is all that equivariance allows: any exponentials that are equivariant are Mixed RoPE in another basis (van de Geijn
et al. 2025, proposition 2, arXiv 2511.08368). Axial RoPE is the case where w_x or w_y is 0. Frequencies are learned for
each head, in radians per unit of position, on a grid that spans [-pi, pi]. They begin as

    heo        orthogonal directions turned at random, half of the pairs along each, by theta^(-4d / D) a patch
    uniform    U[0, 1) for each axis and pair, as in van de Geijn et al.

Channel order: the first coordinates of all pairs, the second ones, then what no pair needs, which passes unrotated.
"""

import math

import torch
from torch import nn


class MixedRoPE(nn.Module):
    """Rotates queries and keys by angles linear in the position. At least 2 channels a head.

    init="heo" needs to know the grid, its patches a side in training, because it counts whole patches.
    """

    def __init__(self, head_dim, num_heads, *, init="heo", theta=10.0, grid=8, pos_dim=2):
        super().__init__()
        n = head_dim // 2  # pairs
        if n < 1:
            raise ValueError(f"head_dim must be at least 2, got {head_dim}")
        if init not in ("heo", "uniform"):
            raise ValueError(f"init must be 'heo' or 'uniform', got {init!r}")
        self.head_dim, self.num_heads, self.init = head_dim, num_heads, init
        freqs = torch.rand(num_heads, pos_dim, n)
        if init == "heo":
            directions = torch.randn(num_heads, pos_dim, pos_dim, dtype=torch.float32)
            basis, upper = torch.linalg.qr(directions)  # columns: a head's directions
            basis *= upper.diagonal(dim1=-2, dim2=-1).sign()[:, None]  # any direction is as likely
            basis[..., -1] *= torch.linalg.det(basis).sign()[:, None]  # turned, not mirrored
            d = torch.arange(n)
            along = math.ceil(n / pos_dim)  # pairs along each direction
            magnitude = theta ** (-2 * pos_dim * (d % along) / head_dim) * (grid - 1) / (2 * math.pi)
            freqs = basis[..., d // along] * magnitude
        self.freqs = nn.Parameter(freqs)

    def forward(self, q, k, pos):
        """q, k (B, H, T, D) and pos (T, M) or (B, T, M) -> q, k rotated, of the same shape and dtype."""
        if q.shape != k.shape or q.shape[1] != self.num_heads or q.shape[-1] != self.head_dim:
            sizes = f"{tuple(q.shape)} and {tuple(k.shape)}"
            raise ValueError(f"q and k must be (B, {self.num_heads}, T, {self.head_dim}), got {sizes}")
        if pos.dim() not in (2, 3) or pos.shape[-2] != q.shape[2]:
            raise ValueError(f"pos must be (T, M) or (B, T, M) with T = {q.shape[2]}, got {tuple(pos.shape)}")
        angle = self.angle(pos, torch.promote_types(q.dtype, torch.float32))
        cos, sin = torch.stack([angle.cos(), angle.sin()])  # a table: compiled, it is made once, not for each image
        return rotate(q, cos, sin), rotate(k, cos, sin)

    def rotation(self, pos):
        """pos (T, M) or (B, T, M) -> R (H, T, D, D) or (B, H, T, D, D); float64 where pos is."""
        angle = self.angle(pos, torch.promote_types(pos.dtype, torch.float32)).unsqueeze(-2)
        basis = torch.eye(self.head_dim, dtype=angle.dtype, device=angle.device)
        return rotate(basis.expand(*angle.shape[:-2], -1, -1), angle.cos(), angle.sin()).mT  # column i is R e_i

    def angle(self, pos, dtype):
        """pos (..., T, M) -> the angle of every pair, (..., H, T, n)."""
        if pos.shape[-1] != self.freqs.shape[1]:
            raise ValueError(f"pos must be (..., T, {self.freqs.shape[1]}), got {tuple(pos.shape)}")
        return (pos.to(dtype)[..., None, :, :, None] * self.freqs.to(dtype)[:, None]).sum(dim=-2)

    def extra_repr(self):
        return f"head_dim={self.head_dim}, num_heads={self.num_heads}, init={self.init!r}"


def rotate(z, cos, sin):
    """Turn the pairs (z_i, z_{n+i}) of z (..., D) by angles whose cos and sin are (..., n)."""
    n = cos.shape[-1]
    a, b, rest = z.split([n, n, z.shape[-1] - 2 * n], dim=-1)
    a, b = a * cos - b * sin, a * sin + b * cos
    with torch.autocast("cpu", enabled=False):  # there it would refuse to concatenate float16
        return torch.cat([a.type_as(z), b.type_as(z), rest], dim=-1)


if __name__ == "__main__":
    torch.manual_seed(0)
    p, q = 3 * torch.randn(2, 100, 2, dtype=torch.float64)
    for init in "heo", "uniform":
        rope = MixedRoPE(head_dim=64, num_heads=6, init=init)
        Rp, Rq = rope.rotation(p), rope.rotation(q)
        print(rope)
        print(f"  orthogonal:   |R(p)^T R(p) - I|        = {(Rp.mT @ Rp - torch.eye(64)).abs().max():.0e}")
        print(f"  equivariant:  |R(p)^T R(q) - R(q - p)| = {(Rp.mT @ Rq - rope.rotation(q - p)).abs().max():.0e}")
