"""What each encoding promises, in float64, against rotation matrices that are built here entry by entry."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rope_axial import AxialRoPE
from rope_spherical import SphericalRoPE

ROOT = Path(__file__).parents[1]
H, D, T = 3, 32, 7
ENCODINGS = {
    "axial": lambda **o: AxialRoPE(D, H, **o),
    "axial-learned": lambda **o: AxialRoPE(D, H, learned=True, **o),
    "uniform": lambda **o: AxialRoPE(D, H, uniform=True, **o),
    "axial-1d": lambda **o: AxialRoPE(D, H, learned=True, pos_dim=1, **o),
    "axial-3d": lambda **o: AxialRoPE(D, H, learned=True, pos_dim=3, **o),
    "spherical": lambda **o: SphericalRoPE(D, H, **o),
    "spherical-learned": lambda **o: SphericalRoPE(D, H, learned=True, **o),
}
EQUIVARIANT = [name for name in ENCODINGS if not name.startswith("spherical")]
every_encoding = pytest.mark.parametrize("name", ENCODINGS)


def make(name, dtype=torch.float64):
    """An encoding and a way to draw positions (..., T, M) for it."""
    torch.manual_seed(0)
    rope = ENCODINGS[name]().to(dtype)
    return rope, lambda *shape: 3 * torch.randn(*shape, rope.freqs.shape[1], dtype=dtype)


def plane(i, j, angle):
    """The D x D rotation by an angle in the plane of the coordinates i and j."""
    R = torch.eye(D, dtype=torch.float64)
    R[i, i] = R[j, j] = torch.cos(angle)
    R[i, j], R[j, i] = -torch.sin(angle), torch.sin(angle)
    return R


def dense(rope, p, head):
    """R(p) for one position p (M,), as the product of rotations in single planes."""
    w, R = rope.freqs[min(head, len(rope.freqs) - 1)], torch.eye(D, dtype=torch.float64)
    axes, n = w.shape
    for d in range(n):
        if isinstance(rope, AxialRoPE):
            for m in range(axes):
                pair = m * n + d
                R = R @ plane(pair, axes * n + pair, w[m, d] * p[m])
        else:
            yaw, roll = plane(d, n + d, w[0, d] * p[0]), plane(n + d, 2 * n + d, w[1, d] * p[1])
            R = R @ yaw @ roll
    return R


@every_encoding
def test_rotates_as_the_dense_matrices_do(name):
    rope, draw = make(name)
    pos, q, k = draw(T), *torch.randn(2, 2, H, T, D, dtype=torch.float64)
    R = torch.stack([torch.stack([dense(rope, p, h) for p in pos]) for h in range(H)])
    torch.testing.assert_close(rope.rotation(pos).expand(H, T, D, D), R, rtol=0, atol=1e-12)
    for got, z in zip(rope(q, k, pos), (q, k), strict=True):
        torch.testing.assert_close(got, torch.einsum("htij,bhtj->bhti", R, z), rtol=0, atol=1e-12)


@every_encoding
def test_is_a_rotation_and_the_identity_at_the_origin(name):
    rope, draw = make(name)
    pos = draw(100)
    R, eye = rope.rotation(pos), torch.eye(D, dtype=torch.float64)
    assert (R.mT @ R - eye).abs().max() < 1e-12
    assert (torch.linalg.det(R) - 1).abs().max() < 1e-12
    assert torch.equal(rope.rotation(0 * pos), eye.expand_as(R))
    q, k = torch.randn(2, 2, H, 100, D, dtype=torch.float64)
    for got, z in zip(rope(q, k, pos), (q, k), strict=True):
        torch.testing.assert_close(got.norm(dim=-1), z.norm(dim=-1), rtol=0, atol=1e-12)


def equivariance_error(name):
    """max |R(p)^T R(q) - R(q - p)| over random p and q."""
    rope, draw = make(name)
    p, q = draw(200), draw(200)
    return (rope.rotation(p).mT @ rope.rotation(q) - rope.rotation(q - p)).abs().max()


@pytest.mark.parametrize("name", EQUIVARIANT)
def test_scores_know_the_difference_of_positions_only(name):
    assert equivariance_error(name) < 1e-10


@pytest.mark.parametrize("name", ["spherical", "spherical-learned"])
def test_spherical_is_not_equivariant(name):
    assert equivariance_error(name) > 0.1


@pytest.mark.parametrize("axis", [0, 1])
def test_spherical_with_a_zero_frequency_is_equivariant_in_the_other_direction(axis):
    rope, draw = make("spherical-learned")
    with torch.no_grad():
        rope.freqs[:, axis] = 0
    p, q = draw(50), draw(50)
    assert (rope.rotation(p).mT @ rope.rotation(q) - rope.rotation(q - p)).abs().max() < 1e-10


def mixed_difference(name):
    """How far scores are from f(x) + g(y): s(x, y) - s(x, 0) - s(0, y) + s(0, 0), with the query at the origin."""
    rope, _ = make(name)
    x, y = torch.tensor([1.3, 0.0], dtype=torch.float64), torch.tensor([0.0, -0.7], dtype=torch.float64)
    pos = torch.stack([x + y, x, y, 0 * x])
    q, k = torch.randn(2, 1, H, 1, D, dtype=torch.float64).expand(-1, -1, -1, 4, -1)
    q, k = rope(q, k, pos)
    score = (q[:, :, 3:] * k).sum(-1)
    return (score * torch.tensor([1, -1, -1, 1])).sum(-1).abs().max()


@pytest.mark.parametrize("name", ["axial", "axial-learned", "uniform"])
def test_axial_scores_split_into_x_and_y(name):
    assert mixed_difference(name) < 1e-12


def test_spherical_scores_do_not_split():
    assert mixed_difference("spherical") > 0.1


@pytest.mark.parametrize("head_dim", [6, 60, 63, 64])
def test_fixed_frequencies(head_dim):
    def ladder(n):
        return torch.tensor([100 ** (-2 * d / head_dim) for d in range(n)]).expand(1, 2, n)

    torch.testing.assert_close(AxialRoPE(head_dim, H).freqs, ladder(head_dim // 4))
    torch.testing.assert_close(SphericalRoPE(head_dim, H).freqs, ladder(head_dim // 3))
    assert torch.equal(AxialRoPE(head_dim, H, uniform=True).freqs, torch.ones(1, 2, head_dim // 4))


def test_frequencies_are_parameters_if_learned_and_no_part_of_a_checkpoint_if_not():
    for make_rope, n in (AxialRoPE, D // 4), (SphericalRoPE, D // 3):
        assert not make_rope(D, H).state_dict()
        assert [(k, v.shape) for k, v in make_rope(D, H, learned=True).named_parameters()] == [("freqs", (H, 2, n))]
        freqs = make_rope(600, 100, learned=True).freqs
        assert 0 <= freqs.min() < 0.01 and 0.99 < freqs.max() < 1 and abs(freqs.mean() - 0.5) < 0.01


@every_encoding
def test_gradients_agree_with_finite_differences(name):
    rope, draw = make(name)
    pos, q, k = draw(2), *(torch.randn(1, H, 2, D, dtype=torch.float64, requires_grad=True) for _ in range(2))
    names, values = zip(*rope.named_parameters(), strict=True) if list(rope.parameters()) else ((), ())

    def turned(q, k, *values):
        return torch.func.functional_call(rope, dict(zip(names, values, strict=True)), (q, k, pos))

    assert torch.autograd.gradcheck(turned, (q, k, *values))


@every_encoding
def test_each_image_of_a_batch_can_have_its_own_positions(name):
    rope, draw = make(name)
    pos, q, k = draw(2, T), *torch.randn(2, 2, H, T, D, dtype=torch.float64)
    together = rope(q, k, pos)
    for b in range(2):
        for got, want in zip(together, rope(q[b : b + 1], k[b : b + 1], pos[b]), strict=True):
            torch.testing.assert_close(got[b : b + 1], want, rtol=0, atol=1e-14)
        torch.testing.assert_close(rope.rotation(pos)[b], rope.rotation(pos[b]), rtol=0, atol=1e-14)


@every_encoding
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_dtype_and_shape_come_back_and_angles_are_precise(name, dtype, autocast):
    rope, draw = make(name, torch.float32)
    pos, q, k = 10 * draw(T), *torch.randn(2, 2, H, T, D).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = rope(q, k, pos)
    exact = rope.double()(q.double(), k.double(), pos.double())
    for g, e in zip(got, exact, strict=True):
        assert g.dtype == dtype and g.shape == q.shape
        # half a unit in the last place for rounding the result, and angles of up to 100 in float32 at the least
        torch.testing.assert_close(g.double(), e, rtol=torch.finfo(dtype).eps, atol=2e-5)


@every_encoding
def test_compiles_into_one_graph_that_serves_every_image_size(name):
    rope, draw = make(name, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(rope, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for B, T in (5, 65), (5, 101), (7, 17):
            pos, q, k = draw(T), *torch.randn(2, B, H, T, D)
            for got, want in zip(compiled(q, k, pos), rope(q, k, pos), strict=True):
                torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", ["spherical", "axial"])
def test_a_moved_or_changed_module_is_never_stale(name):
    rope, draw = make(name)
    pos = draw(T)
    before = rope.rotation(pos)
    rope.freqs.data *= 2
    assert (rope.rotation(pos) - before).abs().max() > 0.1
    torch.testing.assert_close(rope.rotation(pos / 2), before)


@pytest.mark.parametrize(
    "wrong, says",
    [
        (lambda: SphericalRoPE(2, 1), "at least 3"),
        (lambda: AxialRoPE(3, 1), "at least 2 \\* pos_dim = 4"),
        (lambda: AxialRoPE(8, 1, learned=True, uniform=True), "not both"),
        (lambda: AxialRoPE(8, 1).rotation(torch.zeros(5, 3)), r"pos must be \(..., T, 2\)"),
        (lambda: SphericalRoPE(8, 1).rotation(torch.zeros(5, 3)), r"pos must be \(..., T, 2\)"),
        (lambda: AxialRoPE(8, 2)(*torch.zeros(2, 1, 3, 5, 8), torch.zeros(5, 2)), r"q must be \(B, 2, T, 8\)"),
        (lambda: SphericalRoPE(8, 2)(*torch.zeros(2, 1, 2, 5, 9), torch.zeros(5, 2)), r"q must be \(B, 2, T, 8\)"),
    ],
)
def test_a_wrong_argument_is_told_what_would_be_right(wrong, says):
    with pytest.raises(ValueError, match=says):
        wrong()


@pytest.mark.parametrize("file, cls", [("rope_axial.py", "AxialRoPE"), ("rope_spherical.py", "SphericalRoPE")])
def test_a_file_copied_alone_works_and_shows_its_property(file, cls, tmp_path):
    shutil.copy(ROOT / file, tmp_path)
    shown = subprocess.run([sys.executable, file], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert "orthogonal" in shown and "equivariant" in shown
    use = (
        f"import torch; from {file[:-3]} import {cls}; q = torch.randn(2, 4, 9, 64); pos = torch.randn(9, 2)\n"
        f"a, b = {cls}(head_dim=64, num_heads=4)(q, q, pos); assert torch.equal(a, b) and a.shape == q.shape"
    )
    subprocess.run([sys.executable, "-c", use], cwd=tmp_path, check=True)


def test_repr_tells_what_it_is():
    assert repr(SphericalRoPE(60, 6, learned=True)) == "SphericalRoPE(head_dim=60, num_heads=6, learned=True)"
    assert repr(AxialRoPE(60, 6)) == "AxialRoPE(head_dim=60, num_heads=6, learned=False, uniform=False)"
