"""ComRoPE: matrix exponentials that commute, and so are equivariant (Yu et al. 2025, eq. 8 and 10).

    rope = ComRoPE(head_dim=64, num_heads=6, kind="ld")  # one for each attention layer
    q, k = rope(q, k, pos)                               # q, k (B, H, T, D); pos (T, 2): x, y of each token

Positions span [-pi, pi] along each side of a training image, and more in a larger image. A token at p = (x, y) turns
each block of b = block_size channels of its query and key by exp(c B), B a skew-symmetric matrix and c a number:

    R(p) = diag(exp(c_0 B_0), exp(c_1 B_1), ...)      B_j = P_j - P_j^T, P_j learned for each head

torch.matrix_exp(c * B) computes the same, slowly. There are two kinds:

    ld    linearly dependent: c_j = theta_xj x + theta_yj y, theta learned and shared by the heads
    ap    axial partition: c_0 = x, c_1 = y, c_2 = x, and so on

    orthogonal     R(p)^T R(p) = I and R(0) = I: norms are kept, and tokens at 0 (class token, padding) do not turn
    equivariant    R(p)^T R(q) = R(q - p) for all positions p, q: multiples of one matrix commute
    oblique        ld: a block can respond to a direction that is not along an axis; ap: a block knows one axis only

What turns which channels (head_dim = 9, block_size = 4; leftover channels come last, unrotated):

    channel   0   1   2   3   4   5   6   7   8
             | exp(c_0 B_0)  | exp(c_1 B_1)  |free

P is initialised from N(0, 1 / (2 pi)^2), theta from N(0, 1); exempt blocks and theta from weight decay. To fine-tune a
model that was trained without ComRoPE, start with R = I: nn.init.zeros_(rope.blocks). For the backward pass, all steps
of the exponentials, one for each distinct coordinate (compiled: each token), are kept; torch.utils.checkpoint saves
that memory. All of this holds for M = pos_dim axes. Source: arXiv 2506.03737.
This file stands alone. It is part of "Rotary position encodings for vision" (MIT License).
"""

import math

import torch
from torch import nn
from torch.autograd.forward_ad import unpack_dual


class ComRoPE(nn.Module):
    """Rotates queries and keys by exponentials that commute. kind: "ap" or "ld"; block_size: channels per block."""

    def __init__(self, head_dim, num_heads, *, kind="ld", block_size=8, pos_dim=2):
        super().__init__()
        if kind not in ("ap", "ld"):
            raise ValueError(f"kind must be 'ap' or 'ld', got {kind!r}")
        if block_size not in range(2, head_dim + 1):
            raise ValueError(f"block_size must be from 2 to head_dim = {head_dim}, got {block_size}")
        K, b = head_dim // block_size, block_size
        if kind == "ap" and pos_dim > K:
            raise ValueError(f"head_dim must be at least pos_dim * block_size = {pos_dim * b} for 'ap', got {head_dim}")
        self.head_dim, self.num_heads, self.pos_dim, self.kind, self.block_size = head_dim, num_heads, pos_dim, kind, b
        self.blocks = nn.Parameter(torch.randn(num_heads, K, b, b) / (2 * math.pi))
        if kind == "ld":
            self.theta = nn.Parameter(torch.randn(pos_dim, K))

    def forward(self, q, k, pos):
        """q, k (B, H, T, D) and pos (T, M) or (B, T, M) -> q, k rotated, of the same shapes and dtypes.

        H is a multiple of num_heads (the number of key heads): each R(p) turns H / num_heads consecutive heads.
        """
        check(self, k, pos)
        R = self.block_rotations(q, pos)
        return turn(q, R), turn(k, R)

    def rotate(self, x, pos):
        """Rotate queries or keys x (B, H, T, D) alone: for cross-attention, or a cache of keys."""
        return turn(x, self.block_rotations(x, pos))

    def block_rotations(self, x, pos):
        """The blocks of R, (H, T, K, b, b) or (B, H, T, K, b, b), with K = D // b."""
        check(self, x, pos)
        dtype = torch.promote_types(x.dtype, torch.float32)
        P, theta = self.blocks.to(dtype), self.factors(dtype)
        B = P - P.mT  # (H, K, b, b)
        with no_autocast(x):
            if is_tracing(pos, B, theta) or is_differentiated(pos):
                return skew_exp(torch.einsum("...tm,mk,hkij->...htkij", pos.to(dtype), theta, B))  # exp(c B)
            return shared_exponentials(pos, theta, B)  # the same, but only once for each distinct coordinate

    def rotation(self, pos):
        """R(p) itself, float64 if pos is: pos (T, M) or (B, T, M) -> (num_heads, T, D, D), or (B, ...)."""
        if pos.dim() == 3:
            return torch.stack([self.rotation(p) for p in pos])
        basis = torch.eye(self.head_dim, dtype=torch.promote_types(pos.dtype, torch.float32), device=pos.device)
        basis = basis[:, None, None].expand(-1, self.num_heads, len(pos), -1)  # e_i, for each head and token
        return self.rotate(basis, pos).permute(1, 2, 3, 0)  # column i is R e_i

    def factors(self, dtype):
        """theta (M, K): learned for ld, 1 at each block's axis for ap."""
        if self.kind == "ld":
            return self.theta.to(dtype)
        K = self.blocks.shape[1]
        return torch.eye(self.pos_dim, dtype=dtype, device=self.blocks.device).repeat(1, K)[:, :K]

    def extra_repr(self):
        options = f"kind={self.kind!r}, block_size={self.block_size}"
        return f"head_dim={self.head_dim}, num_heads={self.num_heads}, {options}"


def turn(x, R):
    """R x for x (B, H * G, T, D) and the blocks R (H, T, K, b, b) or (B, H, T, K, b, b)."""
    H, K, b = R.shape[-5], R.shape[-3], R.shape[-1]
    with no_autocast(x):
        blocks = x[..., : K * b].to(R.dtype).unflatten(-1, (K, b)).unflatten(1, (H, -1))  # (B, H, G, T, K, b)
        blocks = torch.einsum("bhgtkj,bhtkij->bhgtki", blocks, R if R.dim() == 6 else R[None])
        blocks = blocks.flatten(1, 2).flatten(-2).type_as(x)
        return torch.cat([blocks, x[..., K * b :]], dim=-1) if K * b < x.shape[-1] else blocks


# What makes it fast and safe


def is_differentiated(pos):
    """Whether gradients or tangents flow through pos: then equal coordinates must not share an exponential."""
    return pos.requires_grad or unpack_dual(pos).tangent is not None


def shared_exponentials(pos, theta, B):
    """exp(theta_x x B) exp(theta_y y B), once for each distinct coordinate, x and -x together: a grid has few."""
    c, index = pos.abs().unique(return_inverse=True)
    index = index + len(c) * (pos < 0)
    E = skew_exp(torch.einsum("n,mk,hkij->mhnkij", c.to(B.dtype), theta, B))
    E = torch.cat([E, E.mT], dim=2)
    R, *others = (E_m.index_select(1, i.flatten()) for E_m, i in zip(E, index.unbind(-1), strict=True))
    for other in others:
        R = R @ other
    return R.unflatten(1, index.shape[:-1]).movedim(0, -5)


def skew_exp(A):
    """exp(A) for skew-symmetric A (..., b, b), by scaling and squaring: exp(A) = exp(A / 2^s)^(2^s).

    X = exp(A / 2^s) - I comes from its Taylor polynomial of degree 6. Squaring turns X into (I + X)^2 - I = X (X + 2I),
    which keeps a small X accurate, so that all matrices can share one s. The spectral norm of A is at most
    sqrt(|A^2|_F / sqrt(2)), as eigenvalues come in pairs. Where this bound is NaN or above 3200, too much for float32,
    the result is NaN; other matrices are not affected.
    """
    A2 = A @ A
    norm = (A2.detach().norm(dim=(-2, -1)) / math.sqrt(2)).sqrt()
    good = (norm <= 3200)[..., None, None]
    A, A2 = A.where(good, 0), A2.where(good, 0)
    A3 = A2 @ A
    largest = 3200 if is_tracing(A) or not norm.numel() else norm.where(norm <= 3200, 0).max().item()
    most = 0.008 if A.dtype == torch.float64 else 0.28  # |A / 2^s|^7 / 7! is below rounding
    s = max(0, math.frexp(largest / most)[1])
    c = [2.0 ** (-s * k) / math.factorial(k) for k in range(7)]
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    X = c[1] * A + c[2] * A2 + A3 @ (c[3] * eye + c[4] * A + c[5] * A2 + c[6] * A3)
    for _ in range(s):
        X = X @ (X + 2 * eye)
    return (X + eye).where(good, math.nan)


def is_tracing(*tensors):
    """Whether code cannot branch on the tensors' values: compiled or traced, in vmap, or on the meta device."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    try:
        sum(tensor.sum() for tensor in tensors).item()
        return False
    except RuntimeError:
        return True


def no_autocast(x):
    """A context without autocast. Compiled gradients also need torch._functorch.config.backward_pass_autocast="off"."""
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)


def check(rope, x, pos):
    """Raise a ValueError that names the expected shapes, unless x and pos have them."""
    H, D, M = rope.num_heads, rope.head_dim, rope.pos_dim
    if x.dim() != 4 or x.shape[1] % H or x.shape[3] != D:
        raise ValueError(f"q and k must be (B, a multiple of {H}, T, {D}), got {tuple(x.shape)}")
    B, _, T, _ = x.shape
    if tuple(pos.shape) not in ((T, M), (B, T, M)):
        raise ValueError(f"pos must be {(T, M)} or {(B, T, M)}, got {tuple(pos.shape)}")


if __name__ == "__main__":
    p, q = torch.randn(2, 100, 2, dtype=torch.float64)
    for kind in "ap", "ld":
        rope = ComRoPE(head_dim=64, num_heads=6, kind=kind)
        Rp, Rq = rope.rotation(p), rope.rotation(q)
        print(rope)
        print(f"  orthogonal:   |R(p)^T R(p) - I|        = {(Rp.mT @ Rp - torch.eye(64)).abs().max():.0e}")
        print(f"  equivariant:  |R(p)^T R(q) - R(q - p)| = {(Rp.mT @ Rq - rope.rotation(q - p)).abs().max():.0e}")
