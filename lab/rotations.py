"""What the encodings do, in numbers."""

import math

import torch

from comrope import ComRoPE
from liere import LieRE
from rope_axial import AxialRoPE
from rope_mixed import MixedRoPE
from rope_spherical import SphericalRoPE
from vit import ENCODINGS


def encodings(head_dim, num_heads=1):
    """{name: encoding} of all rotary encodings at initialisation, the equivariant ones first."""
    ropes = {}
    for pe, make in ENCODINGS.items():
        torch.manual_seed(18)  # a seed at which every group in attention() turns visibly
        if make is LieRE:  # without blocks, its head is a single group
            ropes["liere, b = 8"] = LieRE(head_dim, num_heads, block_size=8)
        if make is not None:
            ropes[pe] = make(head_dim, num_heads)
    return dict(sorted(ropes.items(), key=lambda item: not equivariant(item[1])))


def grid(n, half=math.pi):
    """n x n positions (n * n, 2) over the square of [-half, half], row by row."""
    x = torch.linspace(-half, half, n, dtype=torch.float64)
    return torch.cartesian_prod(x, x).flip(-1)


@torch.no_grad()
def channel_groups(rope):
    """The channels that R mixes with each other: a list of indices for each group of more than one.

    An entry of R that is not 0 links two channels; groups are the connected components.
    """
    R = rope.rotation(torch.randn(16, 2, dtype=torch.float64))  # (H or 1, T, D, D)
    linked = R.abs().amax(dim=(0, 1)) > 1e-9
    linked = torch.linalg.matrix_power(linked.double(), len(linked)) > 0  # by paths of any length
    groups = {tuple(row.nonzero().flatten().tolist()) for row in linked}
    return [list(group) for group in sorted(groups) if len(group) > 1]


@torch.no_grad()
def patterns(rope, pos):
    """Scores of a random query at 0 with itself as the key at pos (T, 2): (groups + 1, T), the last for the whole head.

    They are the cosine of the angle by which R turns it.
    """
    R = rope.rotation(pos)[0]  # (T, D, D), of the first head
    q = torch.randn(R.shape[-1], dtype=R.dtype)
    return torch.stack([scores(q, R @ q, group) for group in [*channel_groups(rope), range(len(q))]])


def scores(query, keys, group):
    """Scores of a query (D,) with keys (T, D) in a group of channels, relative to its squared norm there: (T,)."""
    query, keys = query[list(group)], keys[:, list(group)]
    return keys @ query / query.square().sum()


@torch.no_grad()
def equivariance_error(rope, p, q):
    """|R(p)^T R(q) - R(q - p)| for p (2,) and q (T, 2): (T,) spectral norms, from 0 to 2, of the worst head.

    The largest difference between the score of a query and a key of norm 1 at p and q and their score at 0 and q - p.
    """
    difference = rope.rotation(p[None]).mT @ rope.rotation(q) - rope.rotation(q - p)
    return torch.linalg.matrix_norm(difference, ord=2).amax(dim=0)


def equivariant(rope):
    """Whether R(p)^T R(q) = R(q - p), at random positions."""
    p, q = torch.randn(2, 16, 2, dtype=torch.float64)
    return bool(equivariance_error(rope, p[0], q).max() < 1e-6)


def symmetry(rope):
    return "equivariant" if equivariant(rope) else "not equivariant"


@torch.no_grad()
def walk(rope, z, *steps):
    """The path of z (D,) as R(s step), s from 0 to 1, turns it by each step (2,) in turn: (steps, 60, D)."""
    s, paths = torch.linspace(0, 1, 60, dtype=torch.float64)[:, None], []
    for step in steps:
        paths.append(rope.rotation(s * torch.tensor(step, dtype=torch.float64))[0] @ z)
        z = paths[-1][-1]
    return torch.stack(paths)


@torch.no_grad()
def frequencies(rope):
    """(w_x, w_y) of each head's groups (H or 1, 2, groups) in radians per unit of position; None if it has none.

    A ComRoPE block is b / 2 pairs in another basis; its frequencies are the eigenvalues of theta_x A and theta_y A.
    """
    if isinstance(rope, ComRoPE):
        w = torch.linalg.eigvalsh(1j * (rope.blocks - rope.blocks.mT))[..., (rope.block_size + 1) // 2 :]  # of w and -w
        return torch.einsum("mk,hkl->hmkl", rope.factors(w.dtype), w).flatten(2)
    if isinstance(rope, AxialRoPE):  # half of the pairs encode x, the others y
        return torch.stack([torch.block_diag(*w) for w in rope.frequencies()[:, :, None].unbind()])
    if isinstance(rope, SphericalRoPE):
        return rope.frequencies().clone()
    return rope.freqs.clone() if isinstance(rope, MixedRoPE) else None
