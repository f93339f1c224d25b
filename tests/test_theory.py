"""The papers' theory in numbers, statement by statement: what commuting generators give, and what giving them up costs.

Read it after test_equivariance.py, beside van de Geijn et al. 2025 ("the paper") and ../README.md. All is in float64.
"""

import pytest
import torch
from conftest import EQUIVARIANT, NOT_EQUIVARIANT, scores, small_vit

from comrope import ComRoPE
from liere import LieRE
from rope_axial import AxialRoPE
from rope_mixed import MixedRoPE
from rope_spherical import SphericalRoPE
from vit import ENCODINGS

pytestmark = pytest.mark.usefixtures("float64")
H, D, T = 2, 24, 9
QUARTER_TURN = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)


def skew(*batch, b):
    U = torch.randn(*batch, b, b).triu(1)
    return U - U.mT


def test_the_exponential_of_a_skew_symmetric_matrix_is_a_rotation():
    R = torch.matrix_exp(skew(b=8))
    torch.testing.assert_close(R.mT @ R, torch.eye(8))
    torch.testing.assert_close(torch.linalg.det(R), torch.tensor(1.0))
    a = torch.tensor(0.7)  # the angle of a pair of channels
    pair = torch.tensor([[a.cos(), -a.sin()], [a.sin(), a.cos()]])
    torch.testing.assert_close(torch.matrix_exp(a * QUARTER_TURN), pair)


# Commutators: R(p)^T R(q) = R(q - p), which ComRoPE's paper calls the RoPE Equation, where the generators commute, and
# only there


def commutator(rope):
    """The largest entry of A_x A_y - A_y A_x. The generators A_x and A_y are the derivatives of R at the origin."""
    h = 1e-5
    A_x, A_y = ((rope.rotation(h * e) - rope.rotation(-h * e)) / (2 * h) for e in torch.eye(2)[:, None])
    return (A_x @ A_y - A_y @ A_x).abs().max()


@pytest.mark.parametrize("pe", EQUIVARIANT)
def test_generators_of_equivariant_encodings_commute(pe):
    assert commutator(ENCODINGS[pe](D, H)) < 1e-8  # finite differences are no better


@pytest.mark.parametrize("pe", NOT_EQUIVARIANT)
def test_generators_of_other_encodings_do_not_commute(pe):
    assert commutator(ENCODINGS[pe](D, H)) > 0.1


def change_of_scores(rope, *shift):
    """How much a shift of all positions changes scores of random queries and keys."""
    (q, k), pos = torch.randn(2, 3, H, T, D), torch.randn(T, len(shift))
    return (scores(rope, q, k, pos + torch.tensor(shift)) - scores(rope, q, k, pos)).abs().max()


@pytest.mark.parametrize("encoding", [AxialRoPE, MixedRoPE, ComRoPE])
def test_equivariance_holds_in_three_dimensions(encoding):
    assert change_of_scores(encoding(D, H, pos_dim=3), 2.0, -3.0, 1.0) < 1e-10


def test_liere_is_equivariant_in_one_dimension_and_in_blocks_of_2():
    """One generator commutes with itself, and all rotations of a plane commute."""
    assert change_of_scores(LieRE(D, H, pos_dim=1), 2.0) < 1e-10
    assert change_of_scores(LieRE(D, H, block_size=2), 2.0, -3.0) < 1e-10
    assert change_of_scores(LieRE(D, H, block_size=3), 2.0, -3.0) > 0.1


@pytest.mark.parametrize("learned", [False, True])
def test_spherical_scores_survive_a_shift_along_x_because_the_yaw_comes_last(learned):
    """R(p)^T R(q) = roll(-v y_p) yaw(w (x_q - x_p)) roll(v y_q) has only the difference in x, but both values of y."""
    rope = SphericalRoPE(D, H, learned=learned)
    assert change_of_scores(rope, 2.0, 0.0) < 1e-10 and change_of_scores(rope, 0.0, 2.0) > 0.1


def test_spherical_takes_left_for_right_half_a_turn_down():
    """roll(-pi) yaw(a) roll(pi) = yaw(-a): scores are those of the image in a mirror, where x is -x."""
    rope, q, k, pos = SphericalRoPE(D, H, theta=1), *torch.randn(2, 1, H, T, D), torch.randn(T, 2)
    down, mirrored = pos + torch.tensor([0, torch.pi]), pos * torch.tensor([-1, 1])
    assert (scores(rope, q, k, down) - scores(rope, q, k, mirrored)).abs().max() < 1e-12
    assert (scores(rope, q, k, down) - scores(rope, q, k, pos)).abs().max() > 0.1


@pytest.mark.parametrize("axis", [0, 1])
def test_spherical_with_a_zero_frequency_is_equivariant(axis):
    rope = SphericalRoPE(D, H, learned=True)
    rope.freqs.data[:, axis] = 0
    assert change_of_scores(rope, 2.0, -3.0) < 1e-10


@pytest.mark.parametrize("encoding, head_dim, angle", [(SphericalRoPE, 3, torch.pi / 2), (LieRE, 4, 3.0)])
def test_counter_examples(encoding, head_dim, angle):
    """Spherical RoPE makes two quarter turns: R(p)^T R(q) yaws first, R(q - p) rolls first."""
    rope, p, q = encoding(head_dim, 1), torch.tensor([[0.0, angle]]), torch.tensor([[angle, 0.0]])
    assert (rope.rotation(p).mT @ rope.rotation(q) - rope.rotation(q - p)).abs().max() > 0.3


# Propositions 1 and 2: a LieRE whose generators commute is RoPE, seen in another basis


def rope_basis(A):
    """Invertible skew-symmetric A (b, b) -> an orthogonal V whose columns 2j and 2j + 1 span an invariant plane of A.

    An eigenvector u + iv of A with eigenvalue iw has A u = -w v and A v = w u: u and v span such a plane, in which A is
    w times a quarter turn.
    """
    _, vectors = torch.linalg.eigh(-1j * A)  # w ascending: the last half is positive, and conjugate to the first
    vectors = vectors[:, len(A) // 2 :]
    return torch.stack([vectors.imag, vectors.real], dim=-1).flatten(1) * 2**0.5


def assert_same_scores_in_another_basis(A, rope):
    """LieRE with generators A (H, M, D, D) gives rope's scores, once W_q and W_k have absorbed a change of basis."""
    M = A.shape[1]
    liere = LieRE(D, H, pos_dim=M)
    set_generators(liere, A[:, :, None])
    W_q, W_k = torch.randn(2, H, D, D)  # of x to q and k, for each head
    x, pos = torch.randn(3, H, T, D), torch.randn(T, M)
    expected = scores(liere, x @ W_q.mT, x @ W_k.mT, pos)
    for h in range(H):
        V = rope_basis(A[h, 0] + 0.37 * A[h, -1])  # the planes of a generic mix are planes of both
        rope.freqs.data[h] = (V.mT @ A[h] @ V)[:, 1::2, ::2].diagonal(dim1=1, dim2=2)  # blocks [[0, -w], [w, 0]]
        W_q[h], W_k[h] = V.mT @ W_q[h], V.mT @ W_k[h]
    torch.testing.assert_close(scores(rope, x @ W_q.mT, x @ W_k.mT, pos), expected, rtol=0, atol=1e-9)


def test_proposition_1_liere_in_one_dimension_is_learned_rope_in_another_basis():
    assert_same_scores_in_another_basis(skew(H, 1, b=D), AxialRoPE(D, H, learned=True, pos_dim=1))


def an_odd_polynomial():
    """A_y is a polynomial in A_x, whose frequencies all differ."""
    A_x = skew(H, b=D)
    return A_x, 0.5 * A_x - 0.1 * A_x @ A_x @ A_x


def factors_of_a_product():
    """A_x and A_y act on the two factors of a tensor product: frequencies repeat."""
    A, B, eye = skew(H, b=4), skew(H, b=6), torch.eye
    return torch.stack([torch.kron(a, eye(6)) for a in A]), torch.stack([torch.kron(eye(4), b) for b in B])


@pytest.mark.parametrize("commuting", [an_odd_polynomial, factors_of_a_product])
def test_proposition_2_liere_whose_generators_commute_is_mixed_rope_in_another_basis(commuting):
    A_x, A_y = commuting()
    assert (A_x @ A_y - A_y @ A_x).abs().max() < 1e-11
    assert_same_scores_in_another_basis(torch.stack([A_x, A_y], dim=1), MixedRoPE(D, H))


# Proposition 3: axial scores are f(x_i, x_j) + g(y_i, y_j)


def mixed_difference(rope):
    """s(x, y) - s(x, 0) - s(0, y) + s(0, 0) for a key at (x, y) and a fixed query: 0 if s = f(x) + g(y)."""
    pos = torch.tensor([[0.0, 0.0], [1.3, -0.7], [1.3, 0.0], [0.0, -0.7], [0.4, 0.9]])
    s = scores(rope, *torch.randn(2, 1, H, 1, D).expand(-1, -1, -1, 5, -1), pos)[..., 4, :]  # the query is the last
    return (s[..., 1] - s[..., 2] - s[..., 3] + s[..., 0]).abs().max()


@pytest.mark.parametrize("pe", ["axial", "uniform", "axial-learned", "comrope-ap"])
def test_proposition_3_axial_scores_split_into_x_and_y(pe):
    assert mixed_difference(ENCODINGS[pe](D, H)) < 1e-12


@pytest.mark.parametrize("pe", ["mixed", "comrope-ld", "spherical", "liere"])
def test_oblique_scores_do_not_split(pe):
    assert mixed_difference(ENCODINGS[pe](D, H)) > 0.05


# One encoding as a special case of another: equal rotations


def set_generators(liere, A):
    """The upper triangle of skew-symmetric A (H, M, K, b, b), which is what LieRE learns."""
    liere.generators.data[:] = A[..., *torch.triu_indices(A.shape[-1], A.shape[-1], 1)]


def assert_same_rotations(a, b, channels_a=range(D), channels_b=range(D)):
    """The rotations are equal, with a's channels in one order and b's in another."""
    pos = 3 * torch.randn(T, 2)
    A, B = (rope.rotation(pos).expand(H, T, D, D) for rope in (a, b))
    A, B = A[..., channels_a, :][..., channels_a], B[..., channels_b, :][..., channels_b]
    torch.testing.assert_close(A, B, rtol=0, atol=1e-12)


def test_axial_is_mixed_with_the_other_axis_at_0():
    axial, mixed = AxialRoPE(D, H, learned=True), MixedRoPE(D, H)
    x, y = axial.freqs.data.unbind(1)
    mixed.freqs.data[:] = torch.stack([torch.cat([x, 0 * x], dim=1), torch.cat([0 * y, y], dim=1)], dim=1)
    assert_same_rotations(mixed, axial)


def test_liere_with_blocks_of_2_is_mixed():
    liere, mixed = LieRE(D, H, block_size=2), MixedRoPE(D, H)
    set_generators(liere, mixed.freqs[..., None, None] * QUARTER_TURN)
    assert_same_rotations(liere, mixed)


def test_comrope_ap_with_blocks_of_2_is_learned_axial():
    comrope, axial = ComRoPE(D, H, kind="ap", block_size=2), AxialRoPE(D, H, learned=True)
    w = axial.freqs.mT.flatten(1)  # blocks 0, 2, ... belong to x, 1, 3, ... to y
    comrope.blocks.data[:] = w[..., None, None] * QUARTER_TURN / 2
    x_and_y = torch.arange(D).view(2, -1, 2).transpose(0, 1).flatten()  # the pairs of x and of y in turns
    assert_same_rotations(comrope, axial, channels_b=x_and_y)


def test_comrope_ld_is_liere_with_proportional_generators():
    comrope, liere = ComRoPE(D, H), LieRE(D, H, block_size=8)
    B = comrope.blocks - comrope.blocks.mT
    set_generators(liere, comrope.theta[:, :, None, None] * B[:, None])
    assert_same_rotations(comrope, liere)


def test_spherical_without_roll_is_a_mixed_pair_and_a_free_channel():
    spherical, mixed, n = SphericalRoPE(D, H, learned=True), MixedRoPE(D, H), D // 3
    spherical.freqs.data[:, 1] = 0
    mixed.freqs.data[:] = 0
    mixed.freqs.data[:, 0, :n] = spherical.freqs[:, 0]
    a_and_b = [c for c in range(D) if c % 3 < 2]
    assert_same_rotations(spherical, mixed, a_and_b + list(range(2, D, 3)))


@pytest.mark.parametrize("frequency, same", [(7 / 8, True), (2 * 7 / 8, True), (1, False)])
def test_with_a_period_of_the_whole_image_an_equivariant_vit_has_no_border(frequency, same):
    """Neighbours among 8 patches a side are 2 pi / 7 apart: a frequency of 7 / 8 has a period of 8 patches."""
    vit = small_vit("axial", theta=1, pos_scale=frequency, pool="mean")
    images = torch.randn(2, 3, 32, 32)
    difference = (vit(images) - vit(images.roll((4, 12), dims=(2, 3)))).abs().max()  # by 1 and 3 patches
    assert difference < 1e-12 if same else difference > 1e-3


@pytest.mark.parametrize("pe", ["comrope-ap", "comrope-ld"])
def test_a_vit_without_an_encoding_can_be_given_comrope_and_trains_from_there(pe):
    """With P = 0, R is the identity."""
    plain, vit = (small_vit(name, num_classes=5) for name in ("none", pe))
    vit.load_state_dict(plain.state_dict(), strict=False)
    for block in vit.blocks:
        block.attn.rope.blocks.data[:] = 0
    images, labels = torch.randn(8, 3, 32, 32), torch.randint(5, (8,))
    torch.testing.assert_close(vit(images), plain(images), rtol=0, atol=1e-12)
    optimizer, losses = torch.optim.AdamW(vit.parameters(), lr=3e-3), []
    for _ in range(30):
        losses.append(torch.nn.functional.cross_entropy(vit(images), labels))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    assert vit.blocks[0].attn.rope.blocks.abs().max() > 1e-3
