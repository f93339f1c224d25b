"""LieRE: a learned rotation for each position, of a head's channels or of blocks of them (Ostmeier et al. 2024).

A token at position p = (x, y) turns its query and key by the exponential of a skew-symmetric matrix linear in p:

    R(p) = exp(x A_x + y A_y)      A_m = U_m - U_m^T, U_m strictly upper triangular and learned for each head

    orthogonal         R(p)^T R(p) = I, and R(0) = I: norms survive, a class token at 0 is left alone
    not equivariant    R(p)^T R(q) = R(q - p) only if A_x A_y = A_y A_x: always in blocks of 2, rarely in larger ones
    oblique            a block mixes x and y as it likes

In one dimension there is only one A, and LieRE is learned RoPE in another basis; if A_x and A_y commute, it is Mixed
RoPE in another basis; with blocks of 2 it is Mixed RoPE (van de Geijn et al. 2025, propositions 1 and 2, arXiv
2511.08368). generators is (H, M, K, b, b), K = D // b blocks of b, of which the strict upper triangle, U, counts. Its
entries begin uniform in [0, 1), in radians per unit of position, on a grid that spans [-pi, pi].

Channel order: block after block, then what no block needs, which passes unrotated. (arXiv 2406.10322)

The exponential is what costs. It is taken once of each distinct position, and of p for -p too, since R(-p) = R(p)^T: on
a symmetric grid that halves the work. How many there are depends on the data, which no compiled graph should wait for:
torch.compile and torch.jit.trace have it taken of all positions.
"""

import math

import torch
from torch import nn


class LieRE(nn.Module):
    """Rotates queries and keys by matrix exponentials. block_size: channels a block, None for all of a head in one."""

    def __init__(self, head_dim, num_heads, *, block_size=None, pos_dim=2):
        super().__init__()
        b = head_dim if block_size is None else block_size
        if not 2 <= b <= head_dim:
            raise ValueError(f"block_size must be from 2 to head_dim = {head_dim}, got {b}")
        self.head_dim, self.num_heads, self.block_size = head_dim, num_heads, b
        self.generators = nn.Parameter(torch.rand(num_heads, pos_dim, head_dim // b, b, b).triu(1))

    def forward(self, q, k, pos):
        """q, k (B, H, T, D) and pos (T, M) or (B, T, M) -> q, k rotated, of the same shape and dtype."""
        if q.shape != k.shape or q.shape[1] != self.num_heads or q.shape[-1] != self.head_dim:
            sizes = f"{tuple(q.shape)} and {tuple(k.shape)}"
            raise ValueError(f"q and k must be (B, {self.num_heads}, T, {self.head_dim}), got {sizes}")
        if pos.dim() not in (2, 3) or pos.shape[-2] != q.shape[2]:
            raise ValueError(f"pos must be (T, M) or (B, T, M) with T = {q.shape[2]}, got {tuple(pos.shape)}")
        R = self.block_rotations(pos, torch.promote_types(q.dtype, torch.float32))
        return rotate(q, R), rotate(k, R)

    def rotation(self, pos):
        """pos (T, M) or (B, T, M) -> R (H, T, D, D) or (B, H, T, D, D); float64 where pos is."""
        blocks = self.block_rotations(pos, torch.promote_types(pos.dtype, torch.float32))
        R = torch.eye(self.head_dim, dtype=blocks.dtype, device=pos.device).repeat(*blocks.shape[:-3], 1, 1)
        for j in range(blocks.shape[-3]):
            block = slice(j * self.block_size, (j + 1) * self.block_size)
            R[..., block, block] = blocks[..., j, :, :]
        return R

    def block_rotations(self, pos, dtype):
        """pos (..., T, M) -> the blocks of R, (..., H, T, K, b, b) with K = D // b."""
        if pos.shape[-1] != self.generators.shape[1]:
            raise ValueError(f"pos must be (..., T, {self.generators.shape[1]}), got {tuple(pos.shape)}")
        U = self.generators.to(dtype).triu(1)
        A = U - U.mT
        with torch.autocast(pos.device.type, enabled=False):
            if recorded() or pos.requires_grad:
                return skew_exp(torch.einsum("...tm,hmkij->...htkij", pos.to(dtype), A))
            p, index = distinct(pos)
            R = skew_exp(torch.einsum("nm,hmkij->hnkij", p.to(dtype), A))
            R = torch.cat([R, R.mT], dim=1).index_select(1, index.flatten()).unflatten(1, index.shape)
            return R.movedim(0, -5)

    def extra_repr(self):
        return f"head_dim={self.head_dim}, num_heads={self.num_heads}, block_size={self.block_size}"


def distinct(pos):
    """pos (..., M) -> its distinct positions up to sign, p (N, M), and an index (...): n for p[n], N + n for -p[n]."""
    sign = pos.sign()
    sign = sign.gather(-1, sign.abs().argmax(dim=-1, keepdim=True))  # of the first coordinate that is not 0
    key = 0
    for coordinate in (pos * sign).unbind(-1):
        values, index = coordinate.unique(return_inverse=True)
        key = key * len(values) + index
    values, index = key.unique(return_inverse=True)
    p = pos.new_empty(len(values), pos.shape[-1])
    p[index] = pos * sign
    return p, index + len(p) * (sign < 0).squeeze(-1)


def skew_exp(A):
    """exp(A) for skew-symmetric A (..., b, b), by scaling and squaring: exp(A) = exp(A / 2^s)^(2^s).

    X = exp(A / 2^s) - I is Taylor's polynomial of degree 6. Squaring goes from X to (I + X)^2 - I = X (X + 2I), which
    loses nothing of a small X, so that one s serves all norms up to the largest. The spectral norm of A is at most the
    square root of |A^2| / sqrt(2), in Frobenius' norm, as eigenvalues come in pairs. To read that off makes the host
    wait for a GPU: a compiled graph allows for up to 3200 instead, and gives NaN beyond, before R ceases to be
    a rotation. (Products in TF32 instead of float32 would make R less exact.)
    """
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    A2 = A @ A
    A3 = A2 @ A
    norm = (A2.detach().norm(dim=(-2, -1)).max() / math.sqrt(2)).sqrt()
    most = 3200 if recorded() else norm.item()
    s = max(0, math.frexp(most / (0.008 if A.dtype == torch.float64 else 0.28))[1])
    c = [2.0 ** (-s * k) / math.factorial(k) for k in range(7)]
    X = c[1] * A + c[2] * A2 + A3 @ (c[3] * eye + c[4] * A + c[5] * A2 + c[6] * A3)
    for _ in range(s):
        X = X @ (X + 2 * eye)
    R = X + eye
    return R.where(norm <= most, math.nan) if recorded() else R


def recorded():
    """Whether this runs only to be compiled or traced: then no step may depend on the data."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def rotate(z, R):
    """R z for z (B, H, T, D) and the blocks R (H, T, K, b, b) or (B, H, T, K, b, b)."""
    K, b = R.shape[-3], R.shape[-1]
    turning, rest = z.split([K * b, z.shape[-1] - K * b], dim=-1)
    with torch.autocast(z.device.type, enabled=False):
        turning = turning.to(R.dtype).unflatten(-1, (K, b))
        turning = torch.einsum("bhtkj,bhtkij->bhtki", turning, R if R.dim() == 6 else R[None])
        return torch.cat([turning.flatten(-2).type_as(z), rest], dim=-1)


if __name__ == "__main__":
    torch.manual_seed(0)
    p, q = torch.randn(2, 100, 2, dtype=torch.float64)
    for block_size in None, 8, 2:
        rope = LieRE(head_dim=64, num_heads=6, block_size=block_size)
        Rp, Rq = rope.rotation(p), rope.rotation(q)
        print(rope)
        print(f"  orthogonal:    |R(p)^T R(p) - I|        = {(Rp.mT @ Rp - torch.eye(64)).abs().max():.0e}")
        print(f"  equivariant?   |R(p)^T R(q) - R(q - p)| = {(Rp.mT @ Rq - rope.rotation(q - p)).abs().max():.0e}")
