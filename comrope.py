"""ComRoPE: equivariant rotations by matrix exponentials that commute (Yu et al. 2025, equations 8 and 10).

RoPE in one dimension turns pairs of channels: rot(w x) = exp(w x J), J = [[0, -1], [1, 0]], at position x. ComRoPE
replaces J with a larger, learned skew-symmetric matrix A, which turns a block of channels at once.

    x = torch.linspace(-torch.pi, torch.pi, 14)          # a training image of 14 x 14 patches: [-pi, pi] on each axis
    pos = torch.cartesian_prod(x, x).flip(-1)            # (T, 2): x, y of each patch, row by row
    rope = ComRoPE(head_dim=64, num_heads=6, kind="ld")  # one for each attention layer
    q, k = torch.randn(2, 8, 6, 196, 64)                 # each (batch B, heads H, tokens T, head_dim D)
    q, k = rope(q, k, pos)                               # transpose (B, T, H, D) first

An image of 28 x 28 patches spans [-2 pi, 2 pi], and so on (arXiv 2511.08368): its patches are slightly closer together.

A token at p = (x, y) has its query and its key multiplied by

    R(p) = diag(exp(c_0 A_0), exp(c_1 A_1), ...)      A_j = P_j - P_j^T, P_j (b, b) learned for each head

b is block_size. kind says what c_j is (theta is a factor here; in other encodings, it is the base of frequencies):

    ld    linearly dependent: c_j = theta_xj x + theta_yj y, theta learned and shared by the heads
    ap    axial partition: c_0 = x, c_1 = y, c_2 = x, and so on

The score of a query q at p and a key k at p' is q^T R(p)^T R(p') k. R is

    the identity at 0    R(0) = I: tokens at 0 (class token, padding) do not turn
    orthogonal           R(p)^T R(p) = I: norms are kept
    equivariant          R(p)^T R(p') = R(p' - p) for all p and p', Yu et al.'s RoPE Equation: multiples of one matrix
                         commute, and so scores ignore a shift of all positions
    oblique              ld: a block can respond to a direction that is not along an axis; ap: it knows one axis only

Channel layout (head_dim = 9, block_size = 4; free: left over, not turned):

    channel   0   1   2   3   4   5   6   7   8
             | exp(c_0 A_0)  | exp(c_1 A_1)  |free

ComRoPE is Mixed RoPE in a learned basis: exp(c A) = V diag(rot(c l_0), rot(c l_1), ...) V^T, where +-i l are the
eigenvalues of A. The projections of q and k can absorb V, and the pairs of a block share a direction, the same in all
heads. So it can express less; it may train differently.

Parameters are blocks, P (num_heads, D // b, b, b) from N(0, 1 / (2 pi)^2), and theta (M, D // b) from N(0, 1). Exempt
both from weight decay, and keep them in float32. pos_dim=M gives M axes, of which block j of ap has axis j mod M. To
fine-tune a model that was trained without ComRoPE, start with R = I: rope.blocks.data.zero_().

The backward pass keeps all steps of one exponential per axis and distinct |coordinate| (compiled, or off a grid: per
token); torch.utils.checkpoint trades that memory for time. Compiled under autocast, exponentials have bfloat16
gradients unless you set torch._functorch.config.backward_pass_autocast = "off".

Source: arXiv 2506.03737. This file stands alone, needs torch 2.3 or newer, and is part of "Rotary position encodings
for vision" (MIT License).
"""

import math

import torch
from torch import nn
from torch.autograd.forward_ad import unpack_dual


class ComRoPE(nn.Module):
    """Rotates queries and keys by exponentials that commute. kind: "ap" or "ld"; block_size: channels per block."""

    def __init__(self, head_dim, num_heads, *, kind="ld", block_size=8, pos_dim=2):
        super().__init__()
        b = block_size
        if min(num_heads, pos_dim) < 1:
            raise ValueError(f"num_heads and pos_dim must be at least 1, got {num_heads} and {pos_dim}")
        if kind not in ("ap", "ld"):
            raise ValueError(f"kind must be 'ap' or 'ld', got {kind!r}")
        if not hasattr(b, "__index__") or not 2 <= b <= head_dim:
            raise ValueError(f"block_size must be a whole number from 2 to head_dim = {head_dim}, got {b}")
        if kind == "ap" and pos_dim * b > head_dim:
            raise ValueError(f"head_dim must be at least pos_dim * block_size = {pos_dim * b} for 'ap', got {head_dim}")
        self.head_dim, self.num_heads, self.pos_dim, self.kind, self.block_size = head_dim, num_heads, pos_dim, kind, b
        self.blocks = nn.Parameter(torch.empty(num_heads, head_dim // b, b, b))  # P
        if kind == "ld":
            self.theta = nn.Parameter(torch.empty(pos_dim, head_dim // b))
        self.reset_parameters()

    def reset_parameters(self):
        """Draw blocks and theta anew: transformers' from_pretrained and FSDP2's to_empty leave them uninitialised."""
        nn.init.normal_(self.blocks, std=1 / (2 * math.pi))
        if self.kind == "ld":
            nn.init.normal_(self.theta)

    def forward(self, q, k, pos):
        """q, k (B, H, T, D) and pos (T, M) or (B, T, M) -> q, k rotated, of the same shapes and dtypes.

        H is a multiple of num_heads: each R(p) turns H / num_heads consecutive heads. With grouped-query attention,
        num_heads is the number of key heads.
        """
        check(self, pos, q, k)
        R = self.block_rotations(pos, torch.promote_types(q.dtype, k.dtype))
        return turn(q, R), turn(k, R)

    def rotate(self, x, pos):
        """Rotate queries or keys x (B, H, T, D) alone: for cross-attention, or a cache of keys."""
        check(self, pos, x)
        return turn(x, self.block_rotations(pos, x.dtype))

    def block_rotations(self, pos, dtype):
        """The blocks of R, (H, T, K, b, b) or (B, H, T, K, b, b), with K = D // b."""
        dtype = torch.promote_types(dtype, torch.float32)
        p, P, theta = pos.to(dtype), self.blocks.to(dtype), self.factors(dtype)
        A = P - P.mT  # (H, K, b, b)
        with no_autocast(pos):
            if has_few_coordinates(p):
                R = shared_exponentials(p, theta, A)  # the same in fewer exponentials, for positions on a grid
            else:
                S = torch.einsum("...tm,mk,hkij->...htkij", p, theta, A)  # c A
                R = skew_exp(S)  # torch.matrix_exp(S.contiguous()), but about twice as fast
        return R

    def factors(self, dtype):
        """theta (M, K): learned for ld, 1 at each block's axis for ap."""
        if self.kind == "ld":
            return self.theta.to(dtype)
        K = self.blocks.shape[1]
        return torch.eye(self.pos_dim, dtype=dtype, device=self.blocks.device).repeat(1, K)[:, :K]

    def rotation(self, pos):
        """R(p) itself, float64 if pos is: pos (T, M) or (B, T, M) -> (num_heads, T, D, D), or (B, ...)."""
        p, dtype = pos.flatten(0, -2), torch.promote_types(pos.dtype, torch.float32)
        basis = torch.eye(self.head_dim, dtype=dtype, device=pos.device)[:, None, None]  # e_0, e_1, ...
        R = self.rotate(basis.expand(-1, self.num_heads, len(p), -1), p).permute(1, 2, 3, 0)  # column i is R e_i
        return R.unflatten(1, pos.shape[:-1]).movedim(0, -4)

    def extra_repr(self):
        options = f"kind={self.kind!r}, block_size={self.block_size}, pos_dim={self.pos_dim}"
        return f"head_dim={self.head_dim}, num_heads={self.num_heads}, {options}"


def turn(x, R):
    """R x for x (B, H * G, T, D) and the blocks R (H, T, K, b, b) or (B, H, T, K, b, b)."""
    H, K, b, D = R.shape[-5], R.shape[-3], R.shape[-1], x.shape[-1]
    turned, free = x.split([K * b, D - K * b], dim=-1) if K * b < D else (x, None)
    with no_autocast(x):
        blocks = turned.to(R.dtype).unflatten(-1, (K, b)).unflatten(1, (H, -1))  # (B, H, G, T, K, b)
        blocks = torch.einsum("bhgtkj,bhtkij->bhgtki", blocks, R if R.dim() == 6 else R[None])
    blocks = blocks.flatten(1, 2).flatten(-2).type_as(x)
    return blocks if free is None else torch.cat([blocks, free], dim=-1)


# What makes it fast and safe


def has_few_coordinates(p):
    """Whether p is constant, with fewer distinct |x| and |y| than tokens, as on a grid."""
    return is_constant(p) and p.shape[-1] * len(p.abs().unique()) < p[..., 0].numel()


def shared_exponentials(p, theta, A):
    """exp(theta_x x A) exp(theta_y y A), from one exponential for each axis and distinct |x| or |y|."""
    M, (r, index) = p.shape[-1], p.abs().unique(return_inverse=True)
    E = skew_exp(torch.einsum("n,mk,hkij->mhnkij", r, theta, A))
    E = torch.cat([E, E.mT], dim=2)  # exp(-S) = exp(S)^T
    index = index + len(r) * (p < 0)
    R = E[0].index_select(1, index[..., 0].flatten())
    for m in range(1, M):
        R = R @ E[m].index_select(1, index[..., m].flatten())
    return R.unflatten(1, p.shape[:-1]).movedim(0, -5)


def skew_exp(S):
    """exp(S) for skew-symmetric S (..., b, b), by scaling and squaring: exp(S) = exp(S / 2^s)^(2^s).

    X = exp(S / 2^s) - I comes from its Taylor polynomial of degree 6. Squaring turns X into (I + X)^2 - I = X (X + 2I),
    which keeps a small X accurate, so that all matrices can share one s. The spectral norm of S is at most
    sqrt(|S^2|_F / sqrt(2)), as eigenvalues come in pairs. Where this bound is NaN or above 3200, too much for float32,
    the result is NaN; other matrices are not affected.
    """
    S2 = S @ S
    norm = (S2.detach().norm(dim=(-2, -1), keepdim=True) / math.sqrt(2)).sqrt()
    good = norm <= 3200
    largest = norm.where(good, 0).max().item() if is_constant(norm) and norm.numel() else 3200
    small = 0.008 if S.dtype == torch.float64 else 0.28  # small^7 / 7! is below rounding
    s = max(0, math.frexp(largest / small)[1])
    S, S2 = S.where(good, 0), S2.where(good, 0)
    t = [2.0 ** (-s * k) / math.factorial(k) for k in range(7)]
    eye = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
    S3 = S2 @ S
    X = t[1] * S + t[2] * S2 + S3 @ (t[3] * eye + t[4] * S + t[5] * S2 + t[6] * S3)
    for _ in range(s):
        X = X @ (X + 2 * eye)
    return (X + eye).where(good, math.nan)


def is_constant(x):
    """Whether x has no derivatives and Python can read its values. False if compiled, traced, in vmap, fake or meta."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or x.requires_grad or unpack_dual(x).tangent is not None:
        return False
    try:
        return bool(x.new_ones(()))
    except RuntimeError:
        return False


def no_autocast(x):
    """A context without autocast: in bfloat16 an exponential would be wrong."""
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)


def check(rope, pos, *tensors):
    """Raise a ValueError that names the expected shapes, unless pos and the tensors have them."""
    heads, D, M = rope.num_heads, rope.head_dim, rope.pos_dim
    for x in tensors:
        B, H, T, channels = x.shape if x.dim() == 4 else ("B", "H", "T", "D")
        if channels != D or H % heads or tuple(pos.shape) not in ((T, M), (B, T, M)):
            expected = f"(B, H, T, D), H a multiple of {heads}, D = {D}, and pos ({T}, {M}) or ({B}, {T}, {M})"
            raise ValueError(f"q or k must be {expected}, got {tuple(x.shape)} and {tuple(pos.shape)}")


if __name__ == "__main__":
    p, p2 = torch.randn(2, 100, 2, dtype=torch.float64)  # p and p'
    for kind in "ap", "ld":
        rope = ComRoPE(head_dim=64, num_heads=6, kind=kind)
        R, R2 = rope.rotation(p), rope.rotation(p2)
        print(rope)
        print(f"  orthogonal:   |R(p)^T R(p) - I|          = {(R.mT @ R - torch.eye(64)).abs().max():.0e}")
        print(f"  equivariant:  |R(p)^T R(p') - R(p' - p)| = {(R.mT @ R2 - rope.rotation(p2 - p)).abs().max():.0e}")
