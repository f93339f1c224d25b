"""ComRoPE: matrix exponentials that commute, and so are equivariant (Yu et al. 2025, arXiv 2506.03737, eq. 8 and 10).

A token at position p turns each block of b channels of its query and key by a power of one rotation of that block:

    R(p) = diag(exp(c_1 B_1), ..., exp(c_K B_K))      B_j = P_j - P_j^T, P_j learned for each head

    ld    linearly dependent: c_j = theta_1j p_1 + ... + theta_Mj p_M, theta learned and shared by the heads
    ap    axial partition: the blocks belong to the M axes in turn; theta_mj is 1 for block j's axis m, and else 0

    orthogonal     R(p)^T R(p) = I, and R(0) = I: norms survive, a class token at 0 is left alone
    equivariant    R(p)^T R(q) = R(q - p): all that meets in a block commutes
    oblique        with ld, as Mixed RoPE; with ap a block knows one axis only

P = 0 makes R = I: a model that was trained without it can be given ComRoPE, and fine-tuned. On a grid that spans
[-pi, pi], P begins in N(0, 1 / (2 pi)^2) and theta in N(0, 1). blocks is P, (H, K, b, b), with K = D // b.

Channel order: block after block, then what no block needs, which passes unrotated.

The exponential is what costs. exp(theta_1 x B + theta_2 y B) = exp(theta_1 x B) exp(theta_2 y B), so it is taken of a
grid's coordinates, not of its points: once of each distinct one, and of x for -x too, since exp(-A) = exp(A)^T. How
many there are depends on the data, which no compiled graph should wait for: torch.compile and torch.jit.trace have it
taken of all points.
"""

import math

import torch
from torch import nn


class ComRoPE(nn.Module):
    """Rotates queries and keys by exponentials that commute. kind: "ap" or "ld"; block_size: channels a block."""

    def __init__(self, head_dim, num_heads, *, kind="ld", block_size=8, pos_dim=2):
        super().__init__()
        if kind not in ("ap", "ld"):
            raise ValueError(f"kind must be 'ap' or 'ld', got {kind!r}")
        if not 2 <= block_size <= head_dim:
            raise ValueError(f"block_size must be from 2 to head_dim = {head_dim}, got {block_size}")
        K, b = head_dim // block_size, block_size
        if kind == "ap" and pos_dim > K:
            raise ValueError(f"head_dim must be at least pos_dim * block_size = {pos_dim * b} for 'ap', got {head_dim}")
        self.head_dim, self.num_heads, self.pos_dim = head_dim, num_heads, pos_dim
        self.kind, self.block_size = kind, b
        self.blocks = nn.Parameter(torch.randn(num_heads, K, b, b) / (2 * math.pi))
        if kind == "ld":
            self.theta = nn.Parameter(torch.randn(pos_dim, K))

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
        """pos (..., T, M) -> the blocks of R, (..., H, T, K, b, b)."""
        if pos.shape[-1] != self.pos_dim:
            raise ValueError(f"pos must be (..., T, {self.pos_dim}), got {tuple(pos.shape)}")
        P, theta = self.blocks.to(dtype), self.factors(dtype)
        B = P - P.mT
        with torch.autocast(pos.device.type, enabled=False):
            if recorded() or pos.requires_grad:
                return skew_exp(torch.einsum("...tm,mk,hkij->...htkij", pos.to(dtype), theta, B))
            x, index = pos.abs().unique(return_inverse=True)
            index = index + len(x) * (pos < 0)
            E = skew_exp(torch.einsum("n,mk,hkij->mhnkij", x.to(dtype), theta, B))
            E = torch.cat([E, E.mT], dim=2)
            R, *others = (E_m.index_select(1, i.flatten()) for E_m, i in zip(E, index.unbind(-1), strict=True))
            for other in others:
                R = R @ other
            return R.unflatten(1, index.shape[:-1]).movedim(0, -5)

    def factors(self, dtype):
        """theta (M, K): learned for ld, 1 at each block's axis for ap."""
        if self.kind == "ld":
            return self.theta.to(dtype)
        K = self.blocks.shape[1]
        return torch.eye(self.pos_dim, dtype=dtype, device=self.blocks.device).repeat(1, K)[:, :K]

    def extra_repr(self):
        options = f"kind={self.kind!r}, block_size={self.block_size}"
        return f"head_dim={self.head_dim}, num_heads={self.num_heads}, {options}"


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
    for kind in "ap", "ld":
        rope = ComRoPE(head_dim=64, num_heads=6, kind=kind)
        Rp, Rq = rope.rotation(p), rope.rotation(q)
        print(rope)
        print(f"  orthogonal:   |R(p)^T R(p) - I|        = {(Rp.mT @ Rp - torch.eye(64)).abs().max():.0e}")
        print(f"  equivariant:  |R(p)^T R(q) - R(q - p)| = {(Rp.mT @ Rq - rope.rotation(q - p)).abs().max():.0e}")
