"""LieRE: learned rotations of a head's channels, or of blocks of them, by matrix exponentials (Ostmeier et al. 2024).

    rope = LieRE(head_dim=64, num_heads=6, block_size=8)  # one for each attention layer
    q, k = rope(q, k, pos)                                # q, k (B, H, T, D); pos (T, 2): x, y of each token

Positions span [-pi, pi] along each side of a training image, and more in a larger image. A token at p = (x, y) turns
its query and key by the exponential of a skew-symmetric matrix that is linear in p:

    R(p) = exp(x A_x + y A_y)      A_m = U_m - U_m^T, U_m strictly upper triangular and learned for each head

torch.matrix_exp(x * A_x + y * A_y) computes the same, slowly. A_m consists of blocks of block_size = b channels. R is

    orthogonal         R(p)^T R(p) = I and R(0) = I: norms are kept, and tokens at 0 (class token, padding) do not turn
    not equivariant    R(p)^T R(q) = R(q - p) for all p, q only if A_x and A_y commute: blocks of 2 do, others rarely
    oblique            a block mixes x and y, and can respond to a direction that is not along an axis

What turns which channels (head_dim = 9, block_size = 4; leftover channels come last, unrotated):

    channel   0   1   2   3   4   5   6   7   8
             | first block   | second block  |free

In one dimension there is only one A, and LieRE is learned RoPE in another basis; if A_x and A_y commute, it is Mixed
RoPE in another basis; with blocks of 2 it is Mixed RoPE (van de Geijn et al. 2025, propositions 1 and 2, arXiv
2511.08368). Entries of U start uniform in [0, 1), in radians per unit of position; exempt generators from weight decay.
For the backward pass, all steps of the exponentials, one for each distinct position (compiled: each token), are kept;
torch.utils.checkpoint saves that memory. All of this holds for M = pos_dim axes. Source: arXiv 2406.10322.
This file stands alone. It is part of "Rotary position encodings for vision" (MIT License).
"""

import math

import torch
from torch import nn
from torch.autograd.forward_ad import unpack_dual


class LieRE(nn.Module):
    """Rotates queries and keys by matrix exponentials. block_size: channels per block, None for the whole head."""

    def __init__(self, head_dim, num_heads, *, block_size=None, pos_dim=2):
        super().__init__()
        b = head_dim if block_size is None else block_size
        if b not in range(2, head_dim + 1):
            raise ValueError(f"block_size must be from 2 to head_dim = {head_dim}, got {b}")
        self.head_dim, self.num_heads, self.pos_dim, self.block_size = head_dim, num_heads, pos_dim, b
        self.generators = nn.Parameter(torch.rand(num_heads, pos_dim, head_dim // b, b * (b - 1) // 2))  # U, row by row

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
        A = self.matrices(torch.promote_types(x.dtype, torch.float32))
        with no_autocast(x):
            if is_tracing(pos, A) or is_differentiated(pos):
                return skew_exp(torch.einsum("...tm,hmkij->...htkij", pos.to(A.dtype), A))  # exp(x A_x + y A_y)
            return shared_exponentials(pos, A)  # the same, but only once for each distinct position

    def matrices(self, dtype=torch.float32):
        """A_m = U_m - U_m^T of each block: (H, M, K, b, b)."""
        b = self.block_size
        U = self.generators.new_zeros(*self.generators.shape[:-1], b, b, dtype=dtype)
        i, j = torch.triu_indices(b, b, 1, device=U.device)
        U[..., i, j] = self.generators.to(dtype)
        return U - U.mT

    def rotation(self, pos):
        """R(p) itself, float64 if pos is: pos (T, M) or (B, T, M) -> (num_heads, T, D, D), or (B, ...)."""
        if pos.dim() == 3:
            return torch.stack([self.rotation(p) for p in pos])
        basis = torch.eye(self.head_dim, dtype=torch.promote_types(pos.dtype, torch.float32), device=pos.device)
        basis = basis[:, None, None].expand(-1, self.num_heads, len(pos), -1)  # e_i, for each head and token
        return self.rotate(basis, pos).permute(1, 2, 3, 0)  # column i is R e_i

    def extra_repr(self):
        return f"head_dim={self.head_dim}, num_heads={self.num_heads}, block_size={self.block_size}"


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
    """Whether gradients or tangents flow through pos: then equal positions must not share an exponential."""
    return pos.requires_grad or unpack_dual(pos).tangent is not None


def shared_exponentials(pos, A):
    """exp(x A_x + y A_y), once for each distinct position, and for p and -p together: R(-p) = R(p)^T."""
    p, index = distinct(pos)
    R = skew_exp(torch.einsum("nm,hmkij->hnkij", p.to(A.dtype), A))
    R = torch.cat([R, R.mT], dim=1).index_select(1, index.flatten()).unflatten(1, index.shape)
    return R.movedim(0, -5)


def distinct(pos):
    """pos (..., M) -> its distinct positions up to sign, p (N, M), and an index (...): n for p[n], N + n for -p[n]."""
    sign = pos.sign()
    sign = sign.gather(-1, sign.abs().argmax(dim=-1, keepdim=True))  # that of the first nonzero coordinate
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
    for block_size in 8, 2:
        rope = LieRE(head_dim=64, num_heads=6, block_size=block_size)
        Rp, Rq = rope.rotation(p), rope.rotation(q)
        print(rope)
        print(f"  orthogonal:    |R(p)^T R(p) - I|        = {(Rp.mT @ Rp - torch.eye(64)).abs().max():.0e}")
        print(f"  equivariant?   |R(p)^T R(q) - R(q - p)| = {(Rp.mT @ Rq - rope.rotation(q - p)).abs().max():.0e}")
