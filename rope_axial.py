"""Axial RoPE: each pair of channels turns with the position along one axis (Su et al. 2021; Heo et al. 2024).

A token at position p = (x, y) turns the pairs of channels of its query and key, half of them with x, half with y:

    R(p) = diag(rot(w_0 x), rot(w_1 x), ..., rot(w_0 y), rot(w_1 y), ...)     rot(a) = [[cos a, -sin a], [sin a, cos a]]

A score q_i^T R(p_i)^T R(p_j) k_j turns one token back and the other forth. What is left is the difference, so R is

    orthogonal     R(p)^T R(p) = I, and R(0) = I: norms survive, a class token at 0 is left alone
    equivariant    R(p)^T R(q) = R(q - p): a shift of all positions leaves every score as it was
    not oblique    a pair knows one axis only, and so a score is f(x_i, x_j) + g(y_i, y_j)

The last line is proposition 3 of van de Geijn et al. 2025 (arXiv 2511.08368). All of it holds for M axes as for two.
Frequencies w are in radians per unit of position, on a grid that spans [-pi, pi]:

    fixed      w_d = theta^(-2d / D), D = head_dim, theta = 100: one ladder for all heads and axes (their section 2.4)
    uniform    w_d = 1: one turn across the training image
    learned    one for each head, axis and pair, drawn from U[0, 1)

Channel order: the first coordinates of all pairs, the second ones, then what no pair needs, which passes unrotated.
"""

import torch
from torch import nn


class AxialRoPE(nn.Module):
    """Rotates queries and keys, one axis for each pair of channels. At least 2 * pos_dim channels a head."""

    def __init__(self, head_dim, num_heads, *, learned=False, uniform=False, theta=100.0, pos_dim=2):
        super().__init__()
        n = head_dim // (2 * pos_dim)  # pairs for each axis
        if n < 1:
            raise ValueError(f"head_dim must be at least 2 * pos_dim = {2 * pos_dim}, got {head_dim}")
        if learned and uniform:
            raise ValueError("uniform frequencies are fixed: choose learned=True or uniform=True, not both")
        self.head_dim, self.num_heads, self.pos_dim = head_dim, num_heads, pos_dim
        self.learned, self.uniform, self.theta = learned, uniform, 1.0 if uniform else theta
        if learned:
            self.freqs = nn.Parameter(torch.rand(num_heads, pos_dim, n))
        else:
            self.register_buffer("freqs", self.ladder(), persistent=False)

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
        """pos (T, M) or (B, T, M) -> R (H or 1, T, D, D) or (B, H or 1, T, D, D); float64 where pos is."""
        angle = self.angle(pos, torch.promote_types(pos.dtype, torch.float32)).unsqueeze(-2)
        basis = torch.eye(self.head_dim, dtype=angle.dtype, device=angle.device)
        return rotate(basis.expand(*angle.shape[:-2], -1, -1), angle.cos(), angle.sin()).mT  # column i is R e_i

    def angle(self, pos, dtype):
        """pos (..., T, M) -> the angle of every pair, (..., H or 1, T, P) with P = M * n."""
        if pos.shape[-1] != self.freqs.shape[1]:
            raise ValueError(f"pos must be (..., T, {self.freqs.shape[1]}), got {tuple(pos.shape)}")
        return (pos.to(dtype)[..., None, :, :, None] * self.freqs.to(dtype)[:, None]).flatten(-2)

    def ladder(self, device=None):
        """The fixed frequencies (1, M, n), n pairs for each axis."""
        d = torch.arange(self.head_dim // (2 * self.pos_dim), dtype=torch.float32, device=device)
        return (self.theta ** (-2 * d / self.head_dim)).repeat(1, self.pos_dim, 1)

    def _apply(self, fn, recurse=True):
        exact = self.freqs
        super()._apply(fn, recurse)
        if not self.learned:  # .bfloat16() must not round what is fixed, nor a stay on the meta device lose it
            device = self.freqs.device
            self.freqs = self.ladder(device) if exact.is_meta else exact.to(device)
        return self

    def extra_repr(self):
        return f"head_dim={self.head_dim}, num_heads={self.num_heads}, learned={self.learned}, uniform={self.uniform}"


def rotate(z, cos, sin):
    """Turn the pairs (z_i, z_{P+i}) of z (..., D) by angles whose cos and sin are (..., P)."""
    P = cos.shape[-1]
    a, b, rest = z.split([P, P, z.shape[-1] - 2 * P], dim=-1)
    a, b = a * cos - b * sin, a * sin + b * cos
    with torch.autocast("cpu", enabled=False):  # there it would refuse to concatenate float16
        return torch.cat([a.type_as(z), b.type_as(z), rest], dim=-1)


if __name__ == "__main__":
    torch.manual_seed(0)
    p, q = 3 * torch.randn(2, 100, 2, dtype=torch.float64)
    for options in {}, {"uniform": True}, {"learned": True}:
        rope = AxialRoPE(head_dim=64, num_heads=6, **options)
        Rp, Rq = rope.rotation(p), rope.rotation(q)
        print(rope)
        print(f"  orthogonal:   |R(p)^T R(p) - I|        = {(Rp.mT @ Rp - torch.eye(64)).abs().max():.0e}")
        print(f"  equivariant:  |R(p)^T R(q) - R(q - p)| = {(Rp.mT @ Rq - rope.rotation(q - p)).abs().max():.0e}")
