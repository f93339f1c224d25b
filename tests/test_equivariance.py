"""Equivariance: a score knows how far apart two tokens are, and nothing else about where they are.

A rotary encoding turns a query at position p by R(p) and a key at position q by R(q), so that their score is

    (R(p) query) . (R(q) key)  =  query^T R(p)^T R(q) key

All that it knows of the positions is R(p)^T R(q). The encoding is equivariant if that depends on q - p alone:

    R(p)^T R(q) = R(q - p)    for all p and q

Then a shift of all positions leaves every score as it was, and with the scores the logits of a whole ViT. The docstring
of each encoding says whether it is equivariant. If so, this holds up to rounding in float64; if not, it fails visibly.
"""

import pytest
import torch
from conftest import EQUIVARIANT, NOT_EQUIVARIANT, ROTARY, scores, small_vit

from vit import ENCODINGS

pytestmark = pytest.mark.usefixtures("float64")
equivariant = pytest.mark.parametrize("pe", EQUIVARIANT)
not_equivariant = pytest.mark.parametrize("pe", NOT_EQUIVARIANT)
H, D, T = 2, 24, 50
SHIFT = torch.tensor([0.9, -1.7])


def error_of_rotations(pe):
    rope, (p, q) = ENCODINGS[pe](D, H), 3 * torch.randn(2, T, 2)
    return (rope.rotation(p).mT @ rope.rotation(q) - rope.rotation(q - p)).abs().max()


def change_of_scores(pe):
    rope, (q, k), pos = ENCODINGS[pe](D, H), torch.randn(2, 1, H, T, D), torch.randn(T, 2)
    return (scores(rope, q, k, pos + SHIFT) - scores(rope, q, k, pos)).abs().max()


def change_of_logits(pe):
    vit, images = small_vit(pe), torch.randn(2, 3, 32, 32)
    pos = vit.positions(8, 8)  # of the class token and of 8 x 8 patches
    return (vit(images, pos + SHIFT) - vit(images, pos)).abs().max()


@pytest.mark.parametrize("pe", ROTARY)
def test_docstring_says_whether_it_is_equivariant(pe):
    assert pe in EQUIVARIANT + NOT_EQUIVARIANT


@equivariant
def test_rotations_depend_on_the_difference_of_positions(pe):
    assert error_of_rotations(pe) < 1e-10


@not_equivariant
def test_rotations_depend_on_more_than_the_difference(pe):
    assert error_of_rotations(pe) > 0.1


@equivariant
def test_shift_leaves_scores_unchanged(pe):
    assert change_of_scores(pe) < 1e-10


@not_equivariant
def test_shift_changes_scores(pe):
    assert change_of_scores(pe) > 0.1


@equivariant
def test_shift_leaves_logits_unchanged(pe):
    assert change_of_logits(pe) < 1e-10


@not_equivariant
def test_shift_changes_logits(pe):
    assert change_of_logits(pe) > 0.01
