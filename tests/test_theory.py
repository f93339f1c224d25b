"""The papers' theory, each statement as numbers that can be followed: what commuting buys, and what giving it up costs.

Written to be read beside van de Geijn et al. 2025 ("the paper") and ../README.md. Everything is in float64. (That the
encodings' own exponential is right is tested in test_encodings.py.)
"""

import pytest
import torch

from comrope import ComRoPE
from liere import LieRE
from rope_axial import AxialRoPE
from rope_mixed import MixedRoPE
from rope_spherical import SphericalRoPE
from vit import ViT

H, D, T = 2, 12, 9


@pytest.fixture(autouse=True)
def float64():
    """Everything below is drawn and computed in float64."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def scores(rope, q, k, pos):
    """Every query's score with every key: (B, H, T, T)."""
    q, k = rope(q, k, pos)
    return q @ k.mT


def set_(parameter, value):
    with torch.no_grad():
        parameter.copy_(value)


def pair_channels(n):
    """The order of channels in which pair j is (j, n + j), as seen by blocks, whose pair j is (2j, 2j + 1)."""
    return torch.arange(2 * n).view(2, n).T.flatten()


# The exponential map: from skew-symmetric generators to rotations


def test_the_exponential_of_a_skew_symmetric_matrix_is_a_rotation():
    U = torch.randn(8, 8).triu(1)
    R = torch.matrix_exp(U - U.mT)
    torch.testing.assert_close(R.mT @ R, torch.eye(8))
    torch.testing.assert_close(torch.linalg.det(R), torch.tensor(1.0))


def test_a_pair_of_channels_turned_by_an_angle_is_the_exponential_of_that_angle():
    """RoPE's building block: exp([[0, -a], [a, 0]]) = [[cos a, -sin a], [sin a, cos a]]."""
    a = torch.tensor(0.7)
    R = torch.matrix_exp(torch.tensor([[0.0, -a], [a, 0.0]]))
    torch.testing.assert_close(R, torch.tensor([[a.cos(), -a.sin()], [a.sin(), a.cos()]]))


# Commutators: where the generators commute, and only there, R(p)^T R(q) = R(q - p)


def generators(rope):
    """A_x, A_y (H, D, D) of any encoding: the derivatives of R at the origin."""
    h = 1e-5
    for e in torch.eye(2):
        yield (rope.rotation(h * e[None]) - rope.rotation(-h * e[None])).squeeze(-3) / (2 * h)


COMMUTING = {
    "axial": lambda: AxialRoPE(D, H),
    "uniform": lambda: AxialRoPE(D, H, uniform=True),
    "axial-learned": lambda: AxialRoPE(D, H, learned=True),
    "mixed": lambda: MixedRoPE(D, H),
    "mixed-uniform": lambda: MixedRoPE(D, H, init="uniform"),
    "liere-2": lambda: LieRE(D, H, block_size=2),
    "comrope-ap": lambda: ComRoPE(D, H, kind="ap", block_size=4),
    "comrope-ld": lambda: ComRoPE(D, H, kind="ld", block_size=4),
}
NOT_COMMUTING = {
    "spherical": lambda: SphericalRoPE(D, H),
    "spherical-learned": lambda: SphericalRoPE(D, H, learned=True),
    "liere": lambda: LieRE(D, H),
    "liere-4": lambda: LieRE(D, H, block_size=4),
}


@pytest.mark.parametrize("make", COMMUTING.values(), ids=COMMUTING)
def test_generators_commute_where_scores_are_relative(make):
    rope = make()
    A_x, A_y = generators(rope)
    assert (A_x @ A_y - A_y @ A_x).abs().max() < 1e-8  # the derivatives are finite differences
    p, q = torch.randn(2, T, 2)
    assert (rope.rotation(p).mT @ rope.rotation(q) - rope.rotation(q - p)).abs().max() < 1e-10
    q, k, pos = *torch.randn(2, 3, H, T, D), torch.randn(T, 2)
    shifted = scores(rope, q, k, pos + torch.tensor([2.0, -3.0]))
    torch.testing.assert_close(shifted, scores(rope, q, k, pos), rtol=0, atol=1e-10)


@pytest.mark.parametrize("make", NOT_COMMUTING.values(), ids=NOT_COMMUTING)
def test_generators_that_do_not_commute_break_it(make):
    rope = make()
    A_x, A_y = generators(rope)
    assert (A_x @ A_y - A_y @ A_x).abs().max() > 0.1
    q, k, pos = *torch.randn(2, 3, H, T, D), torch.randn(T, 2)
    change = scores(rope, q, k, pos + torch.tensor([2.0, -3.0])) - scores(rope, q, k, pos)
    assert change.abs().max() > 0.1


@pytest.mark.parametrize("name", ["spherical", "spherical-learned"])
def test_spherical_scores_survive_a_shift_along_x_because_the_yaw_comes_last(name):
    """R(p)^T R(q) = roll(-v y_p) yaw(w (x_q - x_p)) roll(v y_q): of x it knows the difference only, of y more."""
    rope = NOT_COMMUTING[name]()
    q, k, pos = *torch.randn(2, 3, H, T, D), torch.randn(T, 2)
    along_x, along_y = (scores(rope, q, k, pos + shift) - scores(rope, q, k, pos) for shift in 2 * torch.eye(2))
    assert along_x.abs().max() < 1e-10 and along_y.abs().max() > 0.1


@pytest.mark.parametrize(
    "make, p, q",
    [
        # A quarter turn of yaw and one of roll: R(p)^T R(q) yaws first, R(q - p) rolls first
        (lambda: SphericalRoPE(3, 1), [0.0, torch.pi / 2], [torch.pi / 2, 0.0]),
        (lambda: LieRE(4, 1), [0.0, 3.0], [3.0, 0.0]),
    ],
    ids=["spherical", "liere"],
)
def test_counter_examples(make, p, q):
    """Two positions for which R(p)^T R(q) and R(q - p) are visibly different rotations."""
    rope, p, q = make(), torch.tensor([p]), torch.tensor([q])
    assert (rope.rotation(p).mT @ rope.rotation(q) - rope.rotation(q - p)).abs().max() > 0.3


# Proposition 1: in one dimension every LieRE is RoPE, seen in another basis


def rope_basis(A):
    """Skew-symmetric A (b, b), invertible -> an orthogonal V whose columns 2j and 2j + 1 span a plane that A keeps.

    An eigenvector u + iv of A with eigenvalue iw has A u = -w v and A v = w u: u and v span such a plane, in which A is
    w times a quarter turn.
    """
    _, vectors = torch.linalg.eigh(-1j * A)  # w ascending: the last half is positive, and conjugate to the first
    vectors = vectors[:, len(A) // 2 :]
    return torch.stack([vectors.imag, vectors.real], dim=-1).flatten(1) * 2**0.5


def quarter_turns(planes):
    """The w of matrices (..., b, b) that are made of blocks [[0, -w], [w, 0]] and nothing else: (..., b // 2)."""
    w = planes[..., 1::2, ::2].diagonal(dim1=-2, dim2=-1)
    made = torch.zeros_like(planes)
    made[..., 1::2, ::2], made[..., ::2, 1::2] = w.diag_embed(), -w.diag_embed()
    torch.testing.assert_close(made, planes, rtol=0, atol=1e-10)
    return w


def test_proposition_1_liere_in_one_dimension_is_learned_rope_in_another_basis():
    liere = LieRE(D, H, pos_dim=1)
    rope = AxialRoPE(D, H, learned=True, pos_dim=1)
    W_q, W_k = torch.randn(2, H, D, D)  # of x to q and k, for each head
    x, pos = torch.randn(3, H, T, D), torch.randn(T, 1)
    wanted = scores(liere, x @ W_q.mT, x @ W_k.mT, pos)

    U = liere.generators[:, 0, 0].triu(1)
    order = pair_channels(D // 2)
    for h, A in enumerate((U - U.mT).detach()):
        V = rope_basis(A)
        set_(rope.freqs[h, 0], quarter_turns(V.mT @ A @ V))
        basis = torch.empty(D, D)
        basis[order] = V.mT  # channel j and D/2 + j of RoPE are the planes' coordinates
        W_q[h], W_k[h] = basis @ W_q[h], basis @ W_k[h]  # the weights absorb the basis
    got = scores(rope, x @ W_q.mT, x @ W_k.mT, pos)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)


# Proposition 2: in two dimensions every LieRE whose generators commute is Mixed RoPE, seen in another basis


def skew(b):
    U = torch.randn(H, b, b).triu(1)
    return U - U.mT


def an_odd_polynomial():
    """What commutes with an A_x whose frequencies all differ."""
    A_x = skew(D)
    return A_x, 0.5 * A_x - 0.1 * A_x @ A_x @ A_x


def factors_of_a_product():
    """On the products of coordinates of two spaces, one space each: frequencies repeat, and of A_y some are 0."""
    A, B, eye = skew(4), skew(3), torch.eye
    return torch.stack([torch.kron(a, eye(3)) for a in A]), torch.stack([torch.kron(eye(4), b) for b in B])


@pytest.mark.parametrize("commuting", [an_odd_polynomial, factors_of_a_product])
def test_proposition_2_liere_whose_generators_commute_is_mixed_rope_in_another_basis(commuting):
    A_x, A_y = commuting()
    A = torch.stack([A_x, A_y], dim=1)  # (H, 2, D, D)
    assert (A_x @ A_y - A_y @ A_x).abs().max() < 1e-11

    liere, mixed = LieRE(D, H), MixedRoPE(D, H)
    set_(liere.generators[:, :, 0], A.triu(1))
    W_q, W_k = torch.randn(2, H, D, D)
    x, pos = torch.randn(3, H, T, D), torch.randn(T, 2)
    wanted = scores(liere, x @ W_q.mT, x @ W_k.mT, pos)

    order = pair_channels(D // 2)
    for h in range(H):
        V = rope_basis(A_x[h] + 0.37 * A_y[h])  # the planes of a generic mix are planes of both
        set_(mixed.freqs[h], quarter_turns(V.mT @ A[h] @ V))
        basis = torch.empty(D, D)
        basis[order] = V.mT
        W_q[h], W_k[h] = basis @ W_q[h], basis @ W_k[h]
    got = scores(mixed, x @ W_q.mT, x @ W_k.mT, pos)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9)


# Proposition 3: axial scores are f(x_i, x_j) + g(y_i, y_j)


def mixed_difference(rope):
    """s(x, y) - s(x, 0) - s(0, y) + s(0, 0) for a key at (x, y), and a query somewhere: 0 if s = f + g."""
    pos = torch.tensor([[0.0, 0.0], [1.3, -0.7], [1.3, 0.0], [0.0, -0.7], [0.4, 0.9]])
    s = scores(rope, *torch.randn(2, 1, H, 1, D).expand(-1, -1, -1, 5, -1), pos)[..., 4, :]  # the query is the last
    return (s[..., 1] - s[..., 2] - s[..., 3] + s[..., 0]).abs().max()


@pytest.mark.parametrize("name", ["axial", "uniform", "axial-learned", "comrope-ap"])
def test_proposition_3_scores_of_an_encoding_that_is_not_oblique_split_into_x_and_y(name):
    assert mixed_difference(COMMUTING[name]()) < 1e-12


@pytest.mark.parametrize("name", ["mixed", "comrope-ld", "spherical", "liere"])
def test_scores_of_an_oblique_encoding_do_not(name):
    assert mixed_difference((COMMUTING | NOT_COMMUTING)[name]()) > 0.05


# One encoding as a special case of another: equal rotations


def same_rotations(a, b, order=None):
    pos = 3 * torch.randn(T, 2)
    A, B = a.rotation(pos).expand(H, -1, -1, -1), b.rotation(pos).expand(H, -1, -1, -1)
    B = B if order is None else B[..., order, :][..., order]
    torch.testing.assert_close(A, B, rtol=0, atol=1e-12)


def test_axial_is_mixed_with_the_other_axis_at_0():
    axial, mixed = AxialRoPE(D, H, learned=True), MixedRoPE(D, H)
    n = D // 4
    set_(mixed.freqs, torch.zeros(H, 2, 2 * n))
    set_(mixed.freqs[:, 0, :n], axial.freqs[:, 0])
    set_(mixed.freqs[:, 1, n:], axial.freqs[:, 1])
    same_rotations(mixed, axial)


def test_liere_with_blocks_of_2_is_mixed():
    liere, mixed = LieRE(D, H, block_size=2), MixedRoPE(D, H)
    set_(liere.generators[..., 0, 1], -mixed.freqs)  # A = [[0, -w], [w, 0]]
    same_rotations(liere, mixed, order=pair_channels(D // 2))


def test_comrope_ap_with_blocks_of_2_is_learned_axial():
    comrope, axial = ComRoPE(D, H, kind="ap", block_size=2), AxialRoPE(D, H, learned=True)
    set_(comrope.blocks, torch.zeros(H, D // 2, 2, 2))
    set_(comrope.blocks[:, 0::2, 1, 0], axial.freqs[:, 0])  # blocks 0, 2, ... belong to x, 1, 3, ... to y
    set_(comrope.blocks[:, 1::2, 1, 0], axial.freqs[:, 1])
    n = D // 4
    pair = torch.stack([torch.arange(n), n + torch.arange(n)], dim=-1).flatten()  # axial's pair of each block
    same_rotations(comrope, axial, order=torch.stack([pair, 2 * n + pair], dim=-1).flatten())


def test_comrope_ld_is_liere_with_proportional_generators():
    comrope, liere = ComRoPE(D, H, block_size=4), LieRE(D, H, block_size=4)
    B = comrope.blocks - comrope.blocks.mT
    set_(liere.generators, comrope.theta[:, :, None, None] * B[:, None])
    same_rotations(comrope, liere)


def test_comrope_ap_is_comrope_ld_with_theta_1_on_one_axis_and_0_on_the_other():
    ap, ld = ComRoPE(D, H, kind="ap", block_size=4), ComRoPE(D, H, kind="ld", block_size=4)
    set_(ld.blocks, ap.blocks)
    set_(ld.theta, torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]))
    same_rotations(ap, ld)


@pytest.mark.parametrize("kind", ["ap", "ld"])
def test_comrope_with_p_0_is_no_encoding(kind):
    rope = ComRoPE(D, H, kind=kind, block_size=4)
    set_(rope.blocks, torch.zeros_like(rope.blocks))
    q, k = torch.randn(2, 3, H, T, D)
    turned = rope(q, k, torch.randn(T, 2))
    assert torch.equal(turned[0], q) and torch.equal(turned[1], k)


def test_spherical_without_roll_is_a_mixed_pair_and_a_free_channel():
    spherical, mixed = SphericalRoPE(D, H, learned=True), MixedRoPE(D, H)
    n = D // 3
    set_(spherical.freqs[:, 1], torch.zeros(H, n))
    set_(mixed.freqs, torch.zeros(H, 2, D // 2))
    set_(mixed.freqs[:, 0, :n], spherical.freqs[:, 0])
    # mixed's channels in the order of spherical's: its first n pairs are the a and b, what does not turn is the c
    paired = torch.cat([torch.arange(n), D // 2 + torch.arange(n)])
    rest = torch.tensor([c for c in range(D) if c not in paired])
    same_rotations(spherical, mixed, order=torch.cat([paired, rest]))


def test_the_other_order_of_yaw_and_roll_is_another_encoding():
    """Order matters: R(-p)^T is roll after yaw, and it differs from R(p), which is yaw after roll.

    (In another basis it is Spherical RoPE with x and y exchanged: what changes is which axis keeps its shifts.)
    """
    rope = SphericalRoPE(3, 1, learned=True)
    pos = torch.tensor([[1.0, 1.0]])
    assert (rope.rotation(pos) - rope.rotation(-pos).mT).abs().max() > 0.1


# Fine-tuning from no encoding at all


@pytest.mark.parametrize("pe", ["comrope-ap", "comrope-ld"])
def test_a_vit_without_an_encoding_can_be_given_comrope_and_trains_from_there(pe):
    sizes = {"num_classes": 5, "depth": 2, "num_heads": 2, "head_dim": 16}
    plain, vit = ViT("none", **sizes), ViT(pe, **sizes)
    vit.load_state_dict(plain.state_dict(), strict=False)
    for block in vit.blocks:
        set_(block.attn.rope.blocks, torch.zeros_like(block.attn.rope.blocks))
    images, labels = torch.randn(8, 3, 32, 32), torch.randint(5, (8,))
    torch.testing.assert_close(vit(images), plain(images), rtol=0, atol=1e-12)
    optimizer = torch.optim.AdamW(vit.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(vit(images), labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in vit.parameters() if p.grad is not None)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert vit.blocks[0].attn.rope.blocks.abs().max() > 1e-3
