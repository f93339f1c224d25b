"""Spherical RoPE: each triplet of channels turns on a sphere (van de Geijn et al. 2025, section 4 and appendix F).

A token at position p = (x, y) cuts its query and key into triplets (a, b, c) and turns each as a vector in space, first
by a roll that grows with y, then by a yaw that grows with x:

    R(p) = diag(yaw(w_0 x) roll(v_0 y), yaw(w_1 x) roll(v_1 y), ...)

              [cos u  -sin u  0]                [1    0       0  ]
    yaw(u) =  [sin u   cos u  0]     roll(t) =  [0  cos t  -sin t]
              [  0       0    1]                [0  sin t   cos t]

Roll and yaw share the coordinate b, so their order matters. That is the point: RoPE in the plane without equivariance.

    orthogonal         R(p)^T R(p) = I, and R(0) = I: norms survive, a class token at 0 is left alone
    not equivariant    R(p)^T R(q) = roll(-v y_p) yaw(w (x_q - x_p)) roll(v y_q) knows more of y than y_q - y_p: scores
                       survive a shift of all positions along x, and change with one along y (but for w = 0 or v = 0)
    oblique            a triplet mixes x and y, and can respond to a direction that is not along an axis

Frequencies w, v are in radians per unit of position, on a grid that spans [-pi, pi]:

    fixed      w_d = v_d = theta^(-2d / D), D = head_dim, theta = 100: one ladder shared by all heads
    learned    one for each head, axis and triplet, drawn from U[0, 1)

Channel order: all a, all b, all c, then the one or two that no triplet needs, which pass unrotated: a head of 64 has 21
triplets and a free channel. It costs eight multiplications a triplet; no 3 x 3 matrix is ever built.
(arXiv 2511.08368. The caption of its figure 2 has the order the other way round; its equations have it as here.)
"""

import torch
from torch import nn


class SphericalRoPE(nn.Module):
    """Rotates queries and keys on spheres, by yaw and roll. At least 3 channels a head; positions are (x, y)."""

    def __init__(self, head_dim, num_heads, *, learned=False, theta=100.0):
        super().__init__()
        n = head_dim // 3  # triplets
        if n < 1:
            raise ValueError(f"head_dim must be at least 3, got {head_dim}")
        self.head_dim, self.num_heads, self.learned, self.theta = head_dim, num_heads, learned, theta
        if learned:
            self.freqs = nn.Parameter(torch.rand(num_heads, 2, n))
        else:
            self.register_buffer("freqs", self.ladder(), persistent=False)

    def forward(self, q, k, pos):
        """q, k (B, H, T, D) and pos (T, 2) or (B, T, 2) -> q, k rotated, of the same shape and dtype."""
        if q.shape != k.shape or q.shape[1] != self.num_heads or q.shape[-1] != self.head_dim:
            sizes = f"{tuple(q.shape)} and {tuple(k.shape)}"
            raise ValueError(f"q and k must be (B, {self.num_heads}, T, {self.head_dim}), got {sizes}")
        if pos.dim() not in (2, 3) or pos.shape[-2] != q.shape[2]:
            raise ValueError(f"pos must be (T, 2) or (B, T, 2) with T = {q.shape[2]}, got {tuple(pos.shape)}")
        angle = self.angle(pos, torch.promote_types(q.dtype, torch.float32))
        cos, sin = torch.stack([angle.cos(), angle.sin()])  # a table: compiled, it is made once, not for each image
        return rotate(q, cos, sin), rotate(k, cos, sin)

    def rotation(self, pos):
        """pos (T, 2) or (B, T, 2) -> R (H or 1, T, D, D) or (B, H or 1, T, D, D); float64 where pos is."""
        angle = self.angle(pos, torch.promote_types(pos.dtype, torch.float32)).unsqueeze(-3)
        basis = torch.eye(self.head_dim, dtype=angle.dtype, device=angle.device)
        return rotate(basis.expand(*angle.shape[:-3], -1, -1), angle.cos(), angle.sin()).mT  # column i is R e_i

    def angle(self, pos, dtype):
        """pos (..., T, 2) -> yaw and roll of every triplet, (..., H or 1, T, 2, n)."""
        if pos.shape[-1] != 2:
            raise ValueError(f"pos must be (..., T, 2), got {tuple(pos.shape)}")
        return pos.to(dtype)[..., None, :, :, None] * self.freqs.to(dtype)[:, None]

    def ladder(self, device=None):
        """The fixed frequencies (1, 2, n), n triplets."""
        d = torch.arange(self.head_dim // 3, dtype=torch.float32, device=device)
        return (self.theta ** (-2 * d / self.head_dim)).repeat(1, 2, 1)

    def _apply(self, fn, recurse=True):
        exact = self.freqs
        super()._apply(fn, recurse)
        if not self.learned:  # .bfloat16() must not round what is fixed, nor a stay on the meta device lose it
            device = self.freqs.device
            self.freqs = self.ladder(device) if exact.is_meta else exact.to(device)
        return self

    def extra_repr(self):
        return f"head_dim={self.head_dim}, num_heads={self.num_heads}, learned={self.learned}"


def rotate(z, cos, sin):
    """Turn the triplets (z_i, z_{n+i}, z_{2n+i}) of z (..., D) by yaw and roll, whose cos and sin are (..., 2, n)."""
    n = cos.shape[-1]
    a, b, c, rest = z.split([n, n, n, z.shape[-1] - 3 * n], dim=-1)
    (cos_u, cos_t), (sin_u, sin_t) = cos.unbind(-2), sin.unbind(-2)
    b, c = b * cos_t - c * sin_t, b * sin_t + c * cos_t  # roll
    a, b = a * cos_u - b * sin_u, a * sin_u + b * cos_u  # yaw
    with torch.autocast("cpu", enabled=False):  # there it would refuse to concatenate float16
        return torch.cat([a.type_as(z), b.type_as(z), c.type_as(z), rest], dim=-1)


if __name__ == "__main__":
    torch.manual_seed(0)
    p, q = 3 * torch.randn(2, 100, 2, dtype=torch.float64)
    for learned in False, True:
        rope = SphericalRoPE(head_dim=64, num_heads=6, learned=learned)
        Rp, Rq = rope.rotation(p), rope.rotation(q)
        print(rope)
        print(f"  orthogonal:       |R(p)^T R(p) - I|        = {(Rp.mT @ Rp - torch.eye(64)).abs().max():.0e}")
        print(f"  not equivariant:  |R(p)^T R(q) - R(q - p)| = {(Rp.mT @ Rq - rope.rotation(q - p)).abs().max():.2f}")
