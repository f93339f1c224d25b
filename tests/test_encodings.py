"""What each encoding promises, in float64, against rotation matrices that are built here entry by entry."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils.checkpoint import checkpoint

import comrope
import liere
from comrope import ComRoPE
from liere import LieRE
from rope_axial import AxialRoPE
from rope_mixed import MixedRoPE
from rope_spherical import SphericalRoPE

ROOT = Path(__file__).parents[1]
H, D, T = 3, 32, 7
ENCODINGS = {
    "axial": lambda: AxialRoPE(D, H),
    "axial-learned": lambda: AxialRoPE(D, H, learned=True),
    "uniform": lambda: AxialRoPE(D, H, uniform=True),
    "axial-1d": lambda: AxialRoPE(D, H, learned=True, pos_dim=1),
    "axial-3d": lambda: AxialRoPE(D, H, learned=True, pos_dim=3),
    "mixed": lambda: MixedRoPE(D, H),
    "mixed-uniform": lambda: MixedRoPE(D, H, init="uniform"),
    "mixed-3d": lambda: MixedRoPE(D, H, pos_dim=3),
    "comrope-ap": lambda: ComRoPE(D, H, kind="ap"),
    "comrope-ld": lambda: ComRoPE(D, H, kind="ld"),
    "comrope-1d": lambda: ComRoPE(D, H, kind="ap", pos_dim=1),
    "comrope-3d": lambda: ComRoPE(D, H, kind="ld", pos_dim=3, block_size=6),
    "liere-2": lambda: LieRE(D, H, block_size=2),
    "liere-1d": lambda: LieRE(D, H, pos_dim=1),
    "spherical": lambda: SphericalRoPE(D, H),
    "spherical-learned": lambda: SphericalRoPE(D, H, learned=True),
    "liere": lambda: LieRE(D, H),
    "liere-5": lambda: LieRE(D, H, block_size=5),
    "liere-3d": lambda: LieRE(D, H, block_size=8, pos_dim=3),
}
NOT_EQUIVARIANT = ["spherical", "spherical-learned", "liere", "liere-5", "liere-3d"]
EQUIVARIANT = [name for name in ENCODINGS if name not in NOT_EQUIVARIANT]
every_encoding = pytest.mark.parametrize("name", ENCODINGS)


def pos_dim(rope):
    if isinstance(rope, ComRoPE):
        return rope.pos_dim
    return (rope.generators if isinstance(rope, LieRE) else rope.freqs).shape[1]


def make(name, dtype=torch.float64):
    """An encoding and a way to draw positions (..., T, M) for it."""
    torch.manual_seed(0)
    rope = ENCODINGS[name]().to(dtype)
    return rope, lambda *shape: 3 * torch.randn(*shape, pos_dim(rope), dtype=dtype)


def plane(i, j, angle):
    """The D x D rotation by an angle in the plane of the coordinates i and j."""
    R = torch.eye(D, dtype=torch.float64)
    R[i, i] = R[j, j] = torch.cos(angle)
    R[i, j], R[j, i] = -torch.sin(angle), torch.sin(angle)
    return R


def exponential(A):
    """exp(A) of a skew-symmetric A from its eigenvalues iw, which is more exact than torch.matrix_exp."""
    w, V = torch.linalg.eigh(-1j * A)
    return ((V * torch.exp(1j * w)[..., None, :]) @ V.mH).real


def dense(rope, p, h):
    """R(p) of head h for one position p (M,): a product of rotations in single planes, or an exponential."""
    R = torch.eye(D, dtype=torch.float64)
    if isinstance(rope, LieRE):
        U = sum(x * torch.block_diag(*blocks.triu(1)) for x, blocks in zip(p, rope.generators[h], strict=True))
        used = len(U)
        R[:used, :used] = exponential(U - U.mT)
    elif isinstance(rope, ComRoPE):
        for j, P in enumerate(rope.blocks[h]):
            c = p[j % len(p)] if rope.kind == "ap" else sum(t * x for t, x in zip(rope.theta[:, j], p, strict=True))
            block = slice(j * len(P), (j + 1) * len(P))
            R[block, block] = exponential(c * (P - P.mT))
    else:
        w = rope.freqs[min(h, len(rope.freqs) - 1)]
        M, n = w.shape
        for d in range(n):
            if isinstance(rope, AxialRoPE):
                for m in range(M):
                    R = R @ plane(m * n + d, M * n + m * n + d, w[m, d] * p[m])
            elif isinstance(rope, MixedRoPE):
                R = R @ plane(d, n + d, w[:, d] @ p)
            else:
                R = R @ plane(d, n + d, w[0, d] * p[0]) @ plane(n + d, 2 * n + d, w[1, d] * p[1])  # yaw after roll
    return R.detach()


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


def equivariance_error(rope, draw):
    """max |R(p)^T R(q) - R(q - p)| over random p and q."""
    p, q = draw(200), draw(200)
    return (rope.rotation(p).mT @ rope.rotation(q) - rope.rotation(q - p)).abs().max()


@pytest.mark.parametrize("name", EQUIVARIANT)
def test_scores_know_the_difference_of_positions_only(name):
    assert equivariance_error(*make(name)) < 1e-10


@pytest.mark.parametrize("name", NOT_EQUIVARIANT)
def test_spherical_and_liere_are_not_equivariant(name):
    assert equivariance_error(*make(name)) > 0.1


@pytest.mark.parametrize("axis", [0, 1])
def test_spherical_with_a_zero_frequency_is_equivariant_in_the_other_direction(axis):
    rope, draw = make("spherical-learned")
    with torch.no_grad():
        rope.freqs[:, axis] = 0
    assert equivariance_error(rope, draw) < 1e-10


@pytest.mark.parametrize("head_dim", [6, 60, 63, 64])
def test_fixed_frequencies(head_dim):
    def ladder(n):
        return torch.tensor([100 ** (-2 * d / head_dim) for d in range(n)]).expand(1, 2, n)

    torch.testing.assert_close(AxialRoPE(head_dim, H).freqs, ladder(head_dim // 4))
    torch.testing.assert_close(SphericalRoPE(head_dim, H).freqs, ladder(head_dim // 3))
    assert torch.equal(AxialRoPE(head_dim, H, uniform=True).freqs, torch.ones(1, 2, head_dim // 4))


@pytest.mark.parametrize(
    "make, shapes",
    [
        (lambda: AxialRoPE(D, H), {}),
        (lambda: AxialRoPE(D, H, learned=True), {"freqs": (H, 2, D // 4)}),
        (lambda: MixedRoPE(D, H), {"freqs": (H, 2, D // 2)}),
        (lambda: SphericalRoPE(D, H), {}),
        (lambda: SphericalRoPE(D, H, learned=True), {"freqs": (H, 2, D // 3)}),
        (lambda: LieRE(D, H), {"generators": (H, 2, 1, D, D)}),
        (lambda: LieRE(D, H, block_size=5), {"generators": (H, 2, D // 5, 5, 5)}),
        (lambda: ComRoPE(D, H, kind="ap"), {"blocks": (H, D // 8, 8, 8)}),
        (lambda: ComRoPE(D, H, kind="ld"), {"blocks": (H, D // 8, 8, 8), "theta": (2, D // 8)}),
    ],
)
def test_what_is_learned_is_a_parameter_and_what_is_fixed_is_in_no_checkpoint(make, shapes):
    rope = make()
    assert {name: p.shape for name, p in rope.named_parameters()} == shapes
    assert {name: p.shape for name, p in rope.state_dict().items()} == shapes


def test_initialisations():
    torch.manual_seed(0)
    for freqs in (
        AxialRoPE(600, 100, learned=True).freqs,
        SphericalRoPE(600, 100, learned=True).freqs,
        MixedRoPE(600, 100, init="uniform").freqs,
        LieRE(60, 100).generators[..., *torch.triu_indices(60, 60, 1)],
    ):
        assert 0 <= freqs.min() < 0.01 and 0.99 < freqs.max() < 1 and abs(freqs.mean() - 0.5) < 0.01
    comrope = ComRoPE(800, 100)
    assert abs(comrope.blocks.std() * 2 * torch.pi - 1) < 0.01 and abs(comrope.blocks.mean()) < 0.001
    assert abs(ComRoPE(80_000, 1).theta.std() - 1) < 0.02


def test_mixed_begins_with_two_orthogonal_directions_a_head_and_a_ladder_of_magnitudes_along_each():
    torch.manual_seed(0)
    w = MixedRoPE(64, 500, grid=14).freqs.unflatten(-1, (2, 16)).permute(0, 2, 3, 1)  # (H, direction, d, 2)
    ladder = torch.tensor([10 ** (-4 * d / 64) for d in range(16)]) * 13 / (2 * torch.pi)
    torch.testing.assert_close(w.norm(dim=-1), ladder.expand(500, 2, 16))
    a, b = (w / w.norm(dim=-1, keepdim=True)).unbind(1)
    torch.testing.assert_close(a, a[:, :1].expand_as(a))
    torch.testing.assert_close(b, torch.stack([-a[..., 1], a[..., 0]], dim=-1))  # a quarter turn on
    angle = torch.atan2(a[:, 0, 1], a[:, 0, 0])
    assert torch.histc(angle, 8, -torch.pi, torch.pi).min() > 35  # any direction is as likely


@every_encoding
def test_gradients_agree_with_finite_differences(name):
    rope, draw = make(name)
    pos, q, k = draw(2), *(torch.randn(1, H, 2, D, dtype=torch.float64, requires_grad=True) for _ in range(2))
    names, values = zip(*rope.named_parameters(), strict=True) if list(rope.parameters()) else ((), ())

    def turned(q, k, *values):
        return torch.func.functional_call(rope, dict(zip(names, values, strict=True)), (q, k, pos))

    assert torch.autograd.gradcheck(turned, (q, k, *values), fast_mode=True)


@every_encoding
def test_a_checkpoint_that_computes_it_again_has_the_same_gradients(name):
    rope, draw = make(name)
    pos, q, k = draw(T), *(torch.randn(2, H, T, D, dtype=torch.float64, requires_grad=True) for _ in range(2))
    inputs = [q, k, *rope.parameters()]
    want = torch.autograd.grad(rope(q, k, pos), inputs, (k, q))
    got = torch.autograd.grad(checkpoint(rope, q, k, pos, use_reentrant=False), inputs, (k, q))
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


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
    pos, q, k = draw(T), *torch.randn(2, 2, H, T, D).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = rope(q, k, pos)
    exact = rope.double()(q.double(), k.double(), pos.double())
    for g, e in zip(got, exact, strict=True):
        assert g.dtype == dtype and g.shape == q.shape
        # a unit in the last place of the result, and what angles of dozens of radians have in float32
        torch.testing.assert_close(g.double(), e, rtol=torch.finfo(dtype).eps, atol=5e-5)


@pytest.mark.parametrize("name", ["axial-3d", "mixed", "spherical-learned", "comrope-ld", "liere-5"])
def test_compiles_into_one_graph_that_serves_every_image_size(name):
    rope, draw = make(name, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(rope, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for B, T in (5, 65), (5, 101), (7, 17):
            pos, q, k = draw(T), *torch.randn(2, B, H, T, D)
            for got, want in zip(compiled(q, k, pos), rope(q, k, pos), strict=True):
                torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", ["axial", "mixed", "spherical", "spherical-learned"])
def test_a_compiled_table_is_kept_for_the_backward_pass(name):
    """Otherwise a GPU would take every cosine anew for every image, in both passes: ten times the instructions."""
    rope, draw = make(name, torch.float32)
    forwards = []

    def keep(graph, inputs):
        forwards.append(graph)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=keep, partition_fn=min_cut_rematerialization_partition)
    q, k = torch.randn(2, 5, H, T, D).requires_grad_()
    pos = draw(T)
    torch.compile(rope, fullgraph=True, dynamic=False, backend=backend)(q, k, pos)
    *_, output = forwards[0].graph.nodes
    kept = [node.meta["val"] for node in output.args[0]]
    table = 2 * rope.angle(pos, torch.float32).numel()  # cos and sin
    assert sum(tensor.numel() for tensor in kept if len(tensor) != len(q)) >= table


@pytest.mark.filterwarnings("ignore")  # tracing warns of what is the same for all inputs
@pytest.mark.parametrize("name", ["axial", "mixed-3d", "spherical", "comrope-ap", "comrope-ld", "liere", "liere-5"])
def test_a_trace_serves_other_positions_and_sizes(name):
    rope, draw = make(name, torch.float32)
    traced = torch.jit.trace(rope, (*torch.randn(2, 5, H, T, D), draw(T)), check_trace=False)
    for B, tokens, scale in (5, T, 10), (2, T + 4, 1):
        q, k, pos = *torch.randn(2, B, H, tokens, D), scale * draw(tokens)
        for got, want in zip(traced(q, k, pos), rope(q, k, pos), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=5e-4)


@every_encoding
def test_a_changed_parameter_or_dtype_is_never_stale(name):
    rope, draw = make(name)
    pos = draw(T)
    before = rope.rotation(pos)
    for p in [*rope.parameters(), *rope.buffers()][:1]:
        p.data *= 2
        pos = pos / 2
    torch.testing.assert_close(rope.rotation(pos), before)
    torch.testing.assert_close(rope.float().rotation(pos.float()), before.float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["axial", "uniform", "spherical", "comrope-ap"])
def test_what_is_fixed_survives_the_meta_device(name):
    rope, draw = make(name)
    with torch.device("meta"):
        on_meta = ENCODINGS[name]()
    for way in on_meta, ENCODINGS[name]().to("meta"):
        back = way.to_empty(device="cpu").double()
        back.load_state_dict(rope.state_dict())
        pos = draw(T)
        assert torch.equal(back.rotation(pos), rope.rotation(pos))


@pytest.mark.parametrize("name", ["axial", "mixed", "spherical-learned"])
def test_shapes_can_be_had_from_the_meta_device(name):
    with torch.device("meta"):
        q, _ = ENCODINGS[name]()(torch.empty(2, H, T, D), torch.empty(2, H, T, D), torch.empty(T, 2))
    assert q.is_meta and q.shape == (2, H, T, D)


@every_encoding
def test_can_be_made_under_another_default_dtype(name):
    torch.set_default_dtype(torch.bfloat16)
    try:
        rope, q = ENCODINGS[name](), torch.randn(1, H, T, D)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.isfinite(rope(q, q, torch.zeros(T, pos_dim(rope)))[0]).all()


@pytest.mark.parametrize("name", ["axial", "uniform", "spherical"])
def test_a_bfloat16_model_keeps_its_fixed_frequencies_exact(name):
    rope, draw = make(name)
    pos, q = 4 * draw(T), torch.randn(1, H, T, D, dtype=torch.bfloat16)
    exact, _ = rope(q.double(), q.double(), pos)
    got, _ = rope.bfloat16()(q, q, pos.float())
    torch.testing.assert_close(got.double(), exact, rtol=2**-7, atol=1e-4)
    assert torch.equal(rope.double().freqs, ENCODINGS[name]().freqs)


@every_encoding
def test_wrong_shapes_are_refused(name):
    rope, draw = make(name)
    q, longer, M = torch.randn(1, H, T, D), torch.randn(1, H, T, D + 1), pos_dim(rope)
    with pytest.raises(ValueError, match=rf"must be \(B, {H}, T, {D}\), got .* and \(1, {H}, {T}, {D + 1}\)"):
        rope(q, longer, draw(T))
    with pytest.raises(ValueError, match=rf"must be \(B, {H}, T, {D}\), got \(1, 1, {T}, {D}\)"):
        rope(q[:, :1], q[:, :1], draw(T))
    with pytest.raises(ValueError, match=rf"pos must be \(\.\.\., T, {M}\), got \(5, {M + 1}\)"):
        rope.rotation(torch.zeros(5, M + 1))
    for pos in draw(T + 1), draw(1), draw(2, 1, T):  # class token forgotten, one position for all, a dimension too many
        with pytest.raises(ValueError, match=rf"pos must be .* with T = {T}, got \({', '.join(map(str, pos.shape))}\)"):
            rope(q, q, pos)


@every_encoding
def test_positions_can_be_learned(name):
    rope, draw = make(name)
    pos, q = draw(3).requires_grad_(), torch.randn(1, H, 3, D, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda pos: rope(q, q, pos), (pos,), fast_mode=True)


def test_positions_that_repeat_or_mirror_are_rotated_as_if_each_were_alone():
    """LieRE and ComRoPE exponentiate each position once, and p with -p."""
    grid = torch.cartesian_prod(*[torch.linspace(-3, 3, 6, dtype=torch.float64)] * 2)
    pos = torch.cat([torch.zeros(1, 2, dtype=torch.float64), grid, grid[:5], -grid[3:8]])
    for name in "liere", "liere-5", "comrope-ap", "comrope-ld":
        rope, _ = make(name)
        R = torch.stack([torch.stack([dense(rope, p, h) for p in pos]) for h in range(H)])
        torch.testing.assert_close(rope.rotation(pos), R, rtol=0, atol=1e-12)
        torch.testing.assert_close(rope.rotation(pos.expand(2, -1, -1))[1], R, rtol=0, atol=1e-12)


def skew(b, norm):
    U = torch.rand(20, b, b, dtype=torch.float64).triu(1)
    A = U - U.mT
    return A * norm / torch.linalg.matrix_norm(A, 2)[:, None, None]


@pytest.mark.parametrize("skew_exp", [liere.skew_exp, comrope.skew_exp])
@pytest.mark.parametrize("how", ["eager", "compiled"])
@pytest.mark.parametrize(
    "b, norm, atol",
    [(64, 2500, 5e-4), (64, 300, 1e-4), (64, 65, 1e-5), (8, 300, 1e-4), (8, 4, 1e-6), (8, 1e-4, 1e-7)],
)
def test_the_exponential_is_right_and_orthogonal_in_float32(skew_exp, how, b, norm, atol):
    torch.manual_seed(0)
    torch._dynamo.reset()
    if how == "compiled":
        skew_exp = torch.compile(skew_exp, fullgraph=True, backend="eager")
    A = skew(b, norm).float()
    R, exact = skew_exp(A).double(), exponential(A.double())
    assert (R - exact).abs().max() < atol
    assert (R.mT @ R - torch.eye(b)).abs().max() < atol
    assert (skew_exp(A.double()) - exact).abs().max() < 1e-11


@pytest.mark.parametrize("skew_exp", [liere.skew_exp, comrope.skew_exp])
def test_a_compiled_exponential_that_is_out_of_its_depth_says_so(skew_exp):
    torch._dynamo.reset()
    R = torch.compile(skew_exp, fullgraph=True, backend="eager")(skew(8, 4000).float())
    assert R.isnan().all()


def test_the_exponential_has_the_gradient_of_torchs_own_and_one_at_zero():
    torch.manual_seed(0)
    for A in skew(6, 20), 0 * skew(6, 1):
        A.requires_grad_()
        W = torch.randn_like(A)
        ours, torchs = (torch.autograd.grad((exp(A) * W).sum(), A)[0] for exp in (liere.skew_exp, torch.matrix_exp))
        torch.testing.assert_close(ours, torchs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "wrong, says",
    [
        (lambda: SphericalRoPE(2, 1), "at least 3"),
        (lambda: MixedRoPE(1, 1), "at least 2"),
        (lambda: MixedRoPE(8, 1, init="heo2"), "'heo' or 'uniform', got 'heo2'"),
        (lambda: LieRE(8, 1, block_size=1), "from 2 to head_dim = 8, got 1"),
        (lambda: LieRE(8, 1, block_size=9), "from 2 to head_dim = 8, got 9"),
        (lambda: ComRoPE(8, 1, block_size=1), "from 2 to head_dim = 8, got 1"),
        (lambda: ComRoPE(8, 1, block_size=9), "from 2 to head_dim = 8, got 9"),
        (lambda: ComRoPE(15, 1, kind="ap"), r"at least pos_dim \* block_size = 16 for 'ap', got 15"),
        (lambda: ComRoPE(8, 1, kind="apd"), "'ap' or 'ld', got 'apd'"),
        (lambda: AxialRoPE(3, 1), "at least 2 \\* pos_dim = 4"),
        (lambda: AxialRoPE(8, 1, learned=True, uniform=True), "not both"),
    ],
)
def test_a_wrong_argument_is_told_what_would_be_right(wrong, says):
    with pytest.raises(ValueError, match=says):
        wrong()


def test_a_file_copied_alone_works_and_shows_its_property(tmp_path):
    use = "import runpy, torch\nq, pos = torch.randn(2, 4, 9, 64), torch.randn(9, 2)\n"
    for cls in AxialRoPE, MixedRoPE, SphericalRoPE, LieRE, ComRoPE:
        folder = tmp_path / f"{cls.__module__}-alone"  # nothing that could be imported
        folder.mkdir()
        shutil.copy(ROOT / f"{cls.__module__}.py", folder)
        use += (
            f"file = runpy.run_path('{folder}/{cls.__module__}.py', run_name='__main__')\n"
            f"a, b = file['{cls.__name__}'](head_dim=64, num_heads=4)(q, q, pos)\n"
            "assert torch.equal(a, b) and a.shape == q.shape\nprint('---')\n"
        )
    run = subprocess.run([sys.executable, "-c", use], cwd=tmp_path, capture_output=True, text=True, check=True)
    shown = run.stdout.split("---\n")[:-1]
    assert len(shown) == 5 and all("orthogonal" in text and "equivariant" in text for text in shown)


def test_repr_tells_what_it_is():
    assert repr(SphericalRoPE(60, 6, learned=True)) == "SphericalRoPE(head_dim=60, num_heads=6, learned=True)"
    assert repr(AxialRoPE(60, 6)) == "AxialRoPE(head_dim=60, num_heads=6, learned=False, uniform=False)"
