"""What every encoding must do; then what each one computes, against rotations built entry by entry."""

import copy
import inspect
import math
import pickle
import re
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import ROTARY
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from comrope import ComRoPE
from liere import LieRE
from rope_axial import AxialRoPE
from rope_mixed import MixedRoPE
from rope_spherical import SphericalRoPE
from vit import ENCODINGS

H, D, T = 3, 32, 7
CLASSES = AxialRoPE, MixedRoPE, SphericalRoPE, LieRE, ComRoPE
VARIANTS = {pe: ENCODINGS[pe] for pe in ROTARY} | {
    "axial-theta": partial(AxialRoPE, theta=10.0),
    "axial-1d": partial(AxialRoPE, learned=True, pos_dim=1),
    "axial-3d": partial(AxialRoPE, learned=True, pos_dim=3),
    "mixed-3d": partial(MixedRoPE, pos_dim=3),
    "comrope-1d": partial(ComRoPE, kind="ap", pos_dim=1),
    "comrope-3d": partial(ComRoPE, kind="ld", pos_dim=3, block_size=6),
    "liere-1d": partial(LieRE, pos_dim=1),
    "liere-3d": partial(LieRE, block_size=8, pos_dim=3),
    "liere-2": partial(LieRE, block_size=2),
    "liere-5": partial(LieRE, block_size=5),
}
OPTIONS = {name: getattr(make, "keywords", {}) for name, make in VARIANTS.items()}
every_encoding = pytest.mark.parametrize("name", VARIANTS)
float32, float64 = torch.float32, torch.float64


def make(name, head_dim=D):
    torch.manual_seed(0)
    return VARIANTS[name](head_dim, H).double()


def positions(name, *shape, dtype=float64):
    return 3 * torch.randn(*shape, OPTIONS[name].get("pos_dim", 2), dtype=dtype)


def inputs(name, tokens=T, *, batch=2, dtype=float64):
    """q and k (B, H, T, D) of a dtype, and pos (T, M) in float32 or better."""
    q, k = torch.randn(2, batch, H, tokens, D, dtype=dtype)
    return q, k, positions(name, tokens, dtype=torch.promote_types(dtype, float32))


close = partial(torch.testing.assert_close, rtol=0, atol=1e-12)


def angle_bounds(rope, pos):
    """No R(p) turns by more than |p_1| |A_1| + ... + |p_M| |A_M|, with the derivatives A of R at the origin."""
    h, rope = 1e-6, copy.deepcopy(rope).double()
    axes = h * torch.eye(pos.shape[-1], dtype=float64)
    norms = torch.linalg.matrix_norm(rope.rotation(axes) - rope.rotation(-axes), 2).amax(0) / (2 * h)
    return pos.double().abs() @ norms.detach()


def assert_exact(turned, name, rope, q, k, pos):
    """turned is rope(q, k, pos), up to rounding: of angles to float32 or better, of the result to its dtype."""
    exact = make(name)
    exact.load_state_dict(rope.state_dict())
    atol = 16 * torch.finfo(torch.promote_types(q.dtype, float32)).eps * (1 + angle_bounds(exact, pos).max().item())
    for got, z, want in zip(turned, (q, k), exact(q.double(), k.double(), pos.double()), strict=True):
        assert got.dtype == z.dtype and got.shape == z.shape
        close(got.double(), want, rtol=torch.finfo(z.dtype).eps, atol=atol * z.abs().max().item())


@every_encoding
def test_rotations_are_orthogonal_and_the_identity_at_the_origin(name):
    rope, pos = make(name), positions(name, 50)
    R, eye = rope.rotation(pos), torch.eye(D, dtype=float64)
    close(R.mT @ R, eye.expand_as(R))
    close(torch.linalg.det(R), torch.ones(R.shape[:-2], dtype=float64))
    close(rope.rotation(0 * pos), eye.expand_as(R))


@every_encoding
def test_each_token_is_multiplied_by_the_rotation_of_its_own_position(name):
    """Also next to images with other positions, and to equal and opposite positions, which share exponentials."""
    pos = torch.cat([p := positions(name, 2, 4).round(), -p, p[:, :2]], dim=1)
    rope, (q, k, _) = make(name), inputs(name, 10)
    alone = [[rope.rotation(p[None]).expand(H, 1, D, D) for p in image] for image in pos]
    R = torch.stack([torch.cat(image, dim=1) for image in alone])
    for own_or_shared in slice(None), 0:
        p, R_p = pos[own_or_shared], R[own_or_shared]
        close(rope.rotation(p).expand_as(R_p), R_p)
        for got, z in zip(rope(q, k, p), (q, k), strict=True):
            close(got, (R_p @ z[..., None]).squeeze(-1))


@every_encoding
@pytest.mark.parametrize("dtype", [float64, float32, torch.bfloat16, torch.float16])
def test_dtype_is_kept_and_angles_are_precise(name, dtype):
    rope = make(name).to(dtype)
    q, k, pos = inputs(name, dtype=dtype)
    assert_exact(rope(q, k, pos), name, rope, q, k, pos)


@every_encoding
@pytest.mark.parametrize("dtype", [float64, float32, torch.bfloat16])
def test_autocast_leaves_angles_precise(name, dtype):
    rope = make(name).to(float32)
    q, k, pos = inputs(name, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        turned = rope(q, k, pos)
    assert_exact(turned, name, rope, q, k, pos)


@every_encoding
def test_q_and_k_are_each_rotated_in_their_own_precision(name):
    rope, (q, k, pos) = make(name), inputs(name)
    for low in torch.bfloat16, float32:
        for a, b in (q.to(low), k), (q, k.to(low)):
            for got, z in zip(rope(a, b, pos), (a, b), strict=True):
                want = rope.rotate(z.double(), pos)
                close(got.double(), want, rtol=torch.finfo(z.dtype).eps, atol=1e-12 if z.dtype == float64 else 1e-4)
                assert got.dtype == z.dtype


@every_encoding
def test_another_default_dtype_does_no_harm(name, default_dtype):
    default_dtype(torch.bfloat16)
    rope, (q, k, pos) = VARIANTS[name](D, H), inputs(name, dtype=torch.bfloat16)
    assert_exact(rope(q, k, pos), name, rope, q, k, pos)


@every_encoding
@pytest.mark.parametrize("learned_positions", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_agree_with_finite_differences(name, learned_positions, checkpointing):
    rope, (q, k, pos) = make(name), inputs(name, 3, batch=1)
    pos[0] = 0
    leaves = q.requires_grad_(), k.requires_grad_(), pos.requires_grad_(learned_positions)
    parameters = dict(rope.named_parameters())

    def turned(q, k, pos, *values):
        return torch.func.functional_call(rope, dict(zip(parameters, values, strict=True)), (q, k, pos))

    function = partial(checkpoint, turned, use_reentrant=False) if checkpointing else turned
    assert torch.autograd.gradcheck(function, (*leaves, *parameters.values()), fast_mode=True)


def compiled(rope, *_):
    torch._dynamo.reset()
    return torch.compile(rope, fullgraph=True, dynamic=True, backend="aot_eager")


def traced(rope, *example):
    return torch.jit.trace(rope, example, check_trace=False)


@pytest.mark.filterwarnings("ignore")  # tracing warns of every check of a shape
@pytest.mark.parametrize("graph", [compiled, traced])
@pytest.mark.parametrize("name", [*ROTARY, "mixed-3d"])
def test_one_graph_serves_all_image_sizes_and_positions(name, graph):
    rope = make(name).float()
    rope_graph = graph(rope, *inputs(name, dtype=float32))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, tokens in (5, 65), (5, 101), (7, 17):
            q, k, pos = inputs(name, tokens, batch=batch, dtype=float32)
            assert_exact(rope_graph(q, k, tokens * pos / 20), name, rope, q, k, tokens * pos / 20)


@pytest.mark.filterwarnings("ignore")
@every_encoding
def test_a_trace_has_the_gradients_of_eager_mode(name):
    rope, (_, k, pos) = make(name, head_dim=D + 1), inputs(name)
    q, k = torch.randn(2, 2 * H, T, D + 1, dtype=float64), torch.randn(2, H, T, D + 1, dtype=float64)
    leaves = q.requires_grad_(), k.requires_grad_(), *rope.parameters()
    turned, want = traced(rope, q, k, pos)(q, k, pos), rope(q, k, pos)
    close(turned, want)
    weights = [torch.randn_like(z) for z in want]
    close(torch.autograd.grad(turned, leaves, weights), torch.autograd.grad(want, leaves, weights))


@every_encoding
def test_another_dtype_and_new_parameters_take_effect_at_once(name):
    rope, single = make(name).float(), inputs(name, dtype=float32)
    double = [z.double() for z in single]
    rope(*single)
    assert_exact(rope.double()(*double), name, rope, *double)
    torch.manual_seed(1)
    rope.load_state_dict(VARIANTS[name](D, H).state_dict())
    assert_exact(rope(*double), name, rope, *double)


@every_encoding
def test_reset_parameters_draws_what_the_constructor_draws(name):
    """transformers' from_pretrained and FSDP2 build modules on the meta device, and leave memory as they find it."""
    torch.manual_seed(0)
    want = VARIANTS[name](D, H).state_dict()
    with torch.device("meta"):
        rope = VARIANTS[name](D, H)
    rope = rope.to_empty(device="cpu")
    for p in rope.parameters():
        p.data.fill_(math.nan)
    torch.manual_seed(0)
    if want:
        rope.reset_parameters()
    close(rope.state_dict(), want, atol=0)


@pytest.fixture
def mesh():
    """This process as a group of one, which FSDP2 can shard modules over."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", [name for name in VARIANTS if list(make(name).parameters())])
def test_reset_parameters_draws_parameters_that_fsdp2_has_sharded(name, mesh):
    with torch.device("meta"):
        rope = fully_shard(VARIANTS[name](D, H), mesh=mesh)
    rope.to_empty(device="cpu").reset_parameters()
    q, k, pos = inputs(name, dtype=float32)
    assert all(0.1 < p.full_tensor().abs().max() < 10 for p in rope.parameters())
    close(rope(q, k, pos)[0].norm(dim=-1), q.norm(dim=-1), atol=1e-4)


@every_encoding
def test_copies_rotate_as_the_original(name):
    rope, pos = make(name), positions(name, T)
    with torch.device("meta"):
        on_meta = VARIANTS[name](D, H), make(name).to("meta")
    filled = [twin.to_empty(device="cpu").double() for twin in on_meta]
    for twin in filled:
        twin.load_state_dict(rope.state_dict())
    for twin in copy.deepcopy(rope), pickle.loads(pickle.dumps(rope)), *filled:
        close(twin.rotation(pos), rope.rotation(pos))


@pytest.mark.parametrize(
    "name, mode", [*((name, "eager") for name in VARIANTS), *((name, "compiled") for name in ROTARY)]
)
def test_a_bad_position_spoils_no_other_token(name, mode):
    """Padding tokens often hold uninitialised memory: NaN, infinity, huge numbers."""
    rope, (q, k, _) = make(name), inputs(name)
    pos = positions(name, 2, T)
    function = compiled(rope) if mode == "compiled" else rope
    want, others = rope(q, k, pos)[0], torch.ones(2, 1, T, 1, dtype=bool)
    others[1, 0, -1] = False
    for bad in math.nan, math.inf, -math.inf, 1e3, 1e12, 1e30:
        for coordinates in slice(None), 0:
            spoiled = pos.clone()
            spoiled[1, -1, coordinates] = bad
            got = function(q, k, spoiled)[0]
            close(got.where(others, 0), want.where(others, 0))


@every_encoding
def test_one_tensor_alone_and_grouped_queries(name):
    rope, (_, k, pos) = make(name), inputs(name)
    q = torch.randn(2, 2 * H, T, D, dtype=float64)
    for p in pos, torch.stack([pos, -pos]):
        turned = rope(q, k, p)
        close(turned[1], rope.rotate(k, p))
        for first_or_second in 0, 1:  # consecutive heads share a rotation
            close(turned[0][:, first_or_second::2], rope.rotate(q[:, first_or_second::2].contiguous(), p))


@every_encoding
def test_any_strides_and_empty_batches(name):
    rope, (q, k, pos) = make(name, head_dim=D + 1), inputs(name)
    wide = torch.randn(2, T, 3, H, D + 1, dtype=float64).permute(2, 0, 3, 1, 4)
    mixed_up = torch.randn(2, H, D + 3, T, dtype=float64).mT[..., 1:-1]
    for x in *wide, mixed_up, torch.randn(D + 1, dtype=float64).expand(2, H, T, D + 1):
        close(rope.rotate(x, pos), rope.rotate(x.contiguous(), pos))
    for batch, tokens in (0, T), (2, 0), (0, 0):
        q, k, pos = inputs(name, tokens, batch=batch)
        assert make(name)(q, k, pos)[0].shape == q.shape
        assert make(name)(q, k, pos.expand(batch, -1, -1))[0].shape == q.shape
        assert make(name).rotation(pos.expand(batch, -1, -1)).shape == (batch, H, tokens, D, D)
    rope = make(name).to(memory_format=torch.channels_last)
    close(rope.rotation(pos), make(name).rotation(pos))


@every_encoding
def test_transforms_of_functions(name):
    """vmap over stacked parameters (an ensemble) and over positions; forward-mode derivatives by positions."""
    rope, (q, k, pos) = make(name), inputs(name)
    ensemble = [copy.deepcopy(rope) for _ in range(3)]
    for factor, member in enumerate(ensemble, start=1):
        for p in member.parameters():
            p.data *= factor / 4
    if list(rope.parameters()):
        stacked = torch.func.stack_module_state(ensemble)
        got = torch.vmap(lambda *state: torch.func.functional_call(rope, state, (q, k, pos))[0])(*stacked)
        close(got, torch.stack([member(q, k, pos)[0] for member in ensemble]))
    many = positions(name, 4, T)
    close(torch.vmap(lambda p: rope.rotate(q, p))(many), torch.stack([rope.rotate(q, p) for p in many]))
    pos[1:3] = torch.stack([pos[0], -pos[0]])  # equal and opposite ones, which move apart
    step = torch.randn_like(pos)
    _, slope = torch.func.jvp(lambda p: rope.rotate(q, p), (pos,), (step,))
    h = 1e-6
    close(slope, (rope.rotate(q, pos + h * step) - rope.rotate(q, pos - h * step)) / (2 * h), atol=1e-7)


@every_encoding
def test_export_with_dynamic_batch_and_tokens(name):
    rope = make(name).eval()
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens")
    x = {0: batch, 2: tokens}
    exported = torch.export.export(rope, inputs(name), dynamic_shapes=(x, x, {0: tokens})).module()
    q, k, pos = inputs(name, 11, batch=5)
    close(exported(q, k, pos)[0], rope(q, k, pos)[0])


@pytest.mark.parametrize("name", ["axial-learned", "mixed", "spherical", "liere", "comrope-ld"])
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_a_graph_of_operators_can_be_recorded(name, mode):
    rope, (q, k, pos) = make(name), inputs(name)
    run = make_fx(partial(torch.func.functional_call, rope), tracing_mode=mode)
    state = {name: p.detach() for name, p in rope.named_parameters()}
    close(run(state, (q, k, pos))(state, (q, k, 3 * pos))[0], rope(q, k, 3 * pos)[0])


@every_encoding
def test_runs_without_values(name):
    """On the meta device and with fake tensors, which tools use to infer shapes."""
    rope, (q, k, pos) = make(name), inputs(name)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as fake:
        assert rope(*map(fake.from_tensor, (q, k, pos)))[0].shape == q.shape
    assert rope.to("meta")(q.to("meta"), k.to("meta"), pos.to("meta"))[0].shape == q.shape
    rope.load_state_dict(make(name).state_dict(), assign=True)
    close(rope.rotate(q, pos), make(name).rotate(q, pos))


@every_encoding
def test_wrong_shapes_are_refused(name):
    rope, (q, k, pos) = make(name), inputs(name)
    longer = torch.randn(2, H, T, D + 1)
    calls = [((q, longer, pos), longer), ((longer, longer, pos), longer)]
    # a class token forgotten, one position for all, a dimension too many, another number of images
    shapes = (T + 1,), (1,), (2, 1, T), (3, T)
    calls += [((q, k, pos), pos) for pos in (pos.repeat(1, 2), *(positions(name, *shape) for shape in shapes))]
    for arguments, wrong in calls:
        with pytest.raises(ValueError, match=rf"must be .* got .*\({', '.join(map(str, wrong.shape))}\)"):
            rope(*arguments)


@pytest.mark.parametrize("encoding", CLASSES)
def test_the_error_of_a_wrong_shape_names_the_layout(encoding):
    rope, pos = encoding(D, H), torch.randn(T, 2)
    for q, right in (
        ((2, T, H, D), "pos"),
        ((2, 1, T, D), f"a multiple of {H}"),
        ((2, 2 * H, H, D), f"{(H, 2)} or {(2, H, 2)}"),
        ((T, D), "(T, 2) or (B, T, 2)"),
    ):
        says = f"(B, H, T, D), H a multiple of {H}, D = {D}, and pos"
        with pytest.raises(ValueError) as error:
            rope.rotate(torch.randn(q), pos)
        assert all(part in str(error.value) for part in (says, right, f"got {q} and {(T, 2)}"))


@pytest.mark.parametrize("encoding", CLASSES)
def test_the_lines_of_use_in_a_docstring_run_as_they_stand(encoding):
    usage = re.search(r"(?:^    (?!R\().* = .*\n)+", inspect.getmodule(encoding).__doc__, re.MULTILINE)[0]
    assert usage.count("\n") == 5
    names = {"torch": torch, encoding.__name__: encoding}
    exec(inspect.cleandoc(usage), names)
    assert names["q"].shape == names["k"].shape == (8, 6, 196, 64)
    assert names["pos"][0].tolist() == pytest.approx([-math.pi, -math.pi]) and names["pos"][1, 0] > names["pos"][0, 0]


def test_a_file_copied_alone_works_and_shows_its_property(tmp_path):
    use = "import runpy, torch\nq, pos = torch.randn(2, 4, 9, 64), torch.randn(9, 2)\n"
    for cls in {type(make(pe)) for pe in ROTARY}:
        folder = tmp_path / cls.__name__  # there is nothing else in it to import
        folder.mkdir()
        file = shutil.copy(inspect.getsourcefile(cls), folder)
        use += f"rope = runpy.run_path({file!r}, run_name='__main__')[{cls.__name__!r}](64, 4)\n"
        use += "assert rope(q, q, pos)[0].shape == q.shape\n"
    shown = subprocess.run(
        [sys.executable, "-c", use], cwd=tmp_path, capture_output=True, encoding="utf-8", check=True
    ).stdout
    assert all(f"{cls.__name__}(head_dim=64, num_heads=6" in shown for cls in CLASSES)
    assert min(shown.count("orthogonal"), shown.count("equivariant")) >= len(CLASSES)


# What the encodings here compute


def generators(rope, M, *, theta=100.0, uniform=False, **_):
    """A_1, ..., A_M of each head: (H, M, D, D), or (1, M, D, D) if they are fixed."""
    D, learned = rope.head_dim, dict(rope.named_parameters())
    A = torch.zeros(rope.num_heads if learned else 1, M, D, D, dtype=float64)
    if isinstance(rope, LieRE | ComRoPE):
        if isinstance(rope, LieRE):
            b = rope.block_size
            blocks = torch.zeros(*rope.generators.shape[:-1], b, b, dtype=float64)
            blocks[..., *torch.triu_indices(b, b, 1)] = rope.generators.detach()  # U, row by row
            blocks = blocks - blocks.mT
        else:
            K = rope.blocks.shape[1]
            factors = learned.get("theta", torch.eye(M, dtype=float64).repeat(1, K)[:, :K])
            blocks = factors[..., None, None] * (rope.blocks - rope.blocks.mT)[:, None]
        for k, block in enumerate(blocks.unbind(2)):
            channels = slice(k * block.shape[-1], (k + 1) * block.shape[-1])
            A[..., channels, channels] = block
        return A
    n = D // {AxialRoPE: 2 * M, MixedRoPE: 2, SphericalRoPE: 3}[type(rope)]
    fixed = torch.tensor([1.0 if uniform else theta ** (-2 * d / D) for d in range(n)], dtype=float64)
    w = learned.get("freqs", fixed.expand(1, M, n))
    for d in range(n):
        if isinstance(rope, AxialRoPE):
            for m in range(M):
                i = 2 * (m * n + d)
                A[:, m, i + 1, i] = w[:, m, d]
        elif isinstance(rope, MixedRoPE):
            A[:, :, 2 * d + 1, 2 * d] = w[:, :, d]
        else:
            a, b, c = range(3 * d, 3 * d + 3)
            A[:, 0, b, a], A[:, 1, c, b] = w[:, 0, d], w[:, 1, d]  # yaw and roll
    return A - A.mT


def exponential(A):
    """exp(A) of a skew-symmetric A from its eigenvalues iw, which is more exact than torch.matrix_exp."""
    w, V = torch.linalg.eigh(-1j * A)
    return ((V * torch.exp(1j * w)[..., None, :]) @ V.mH).real


@torch.no_grad()
def formula(rope, pos, **options):
    """R(p) = exp(p_1 A_1 + ... + p_M A_M), or exp(p_1 A_1) exp(p_2 A_2) for Spherical RoPE: (H or 1, T, D, D)."""
    A = torch.einsum("tm,hmij->mhtij", pos, generators(rope, pos.shape[-1], **options))
    return exponential(A[0]) @ exponential(A[1]) if isinstance(rope, SphericalRoPE) else exponential(A.sum(0))


@pytest.mark.parametrize("name", [name for name in VARIANTS if isinstance(make(name), CLASSES)])
def test_rotations_are_those_of_the_formula(name):
    rope, pos = make(name, head_dim=35), positions(name, T)  # of 35 channels, most groups leave some over
    along_axes = torch.eye(pos.shape[-1], dtype=float64)
    pos = torch.cat([pos, along_axes, -along_axes])
    R = rope.rotation(pos)
    close(R, formula(rope, pos, **OPTIONS[name]).expand_as(R))


@pytest.mark.parametrize("block_size", [8, 64])
@pytest.mark.parametrize("encoding", [LieRE, ComRoPE])
@pytest.mark.parametrize("backend", [None, "eager"])
def test_exponentials_are_precise_for_angles_from_tiny_to_huge(encoding, block_size, backend):
    """A compiled graph cannot adapt to large angles: beyond some size it may give NaN, but never a wrong rotation."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    rope, pos = encoding(64, 1, block_size=block_size), torch.randn(20, 2)
    exact, pos = copy.deepcopy(rope).double(), pos / angle_bounds(rope, pos).float()[:, None]
    rotation = torch.compile(rope.rotation, fullgraph=True, backend=backend) if backend else rope.rotation
    for angle in 1e-4, 4, 65, 300, 1300, 40_000:
        want = formula(exact, (angle * pos).double())
        for dtype, atol in (float32, torch.finfo(float32).eps * (8 + 2 * angle)), (float64, 1e-14 * (100 + angle)):
            R = rotation((angle * pos).to(dtype)).double()
            close(R if angle < 3000 else R.where(~R.isnan(), want), want, atol=atol)


def test_checkpoints_hold_the_learned_parameters_alone():
    for name, shapes in {
        "axial": {},
        "axial-learned": {"freqs": (H, 2, D // 4)},
        "mixed": {"freqs": (H, 2, D // 2)},
        "spherical": {},
        "spherical-learned": {"freqs": (H, 2, D // 3)},
        "liere": {"generators": (H, 2, 1, D * (D - 1) // 2)},
        "liere-5": {"generators": (H, 2, D // 5, 10)},
        "comrope-ap": {"blocks": (H, D // 8, 8, 8)},
        "comrope-ld": {"blocks": (H, D // 8, 8, 8), "theta": (2, D // 8)},
    }.items():
        rope = make(name)
        assert {name: p.shape for name, p in rope.named_parameters()} == shapes
        assert {name: p.shape for name, p in rope.state_dict().items()} == shapes


def test_initial_frequencies_and_generators_are_uniform_and_those_of_comrope_normal():
    torch.manual_seed(0)
    for values in (
        AxialRoPE(600, 100, learned=True).freqs,
        SphericalRoPE(600, 100, learned=True).freqs,
        MixedRoPE(600, 100, init="uniform").freqs,
        LieRE(60, 100).generators,
    ):
        assert 0 <= values.min() < 0.01 and 0.99 < values.max() < 1 and abs(values.mean() - 0.5) < 0.01
    for values in 2 * torch.pi * ComRoPE(800, 100).blocks, ComRoPE(80_000, 1).theta:
        assert abs(values.std() - 1) < 0.02 and abs(values.mean()) < 0.02


def test_mixed_begins_with_two_orthogonal_directions_per_head_and_falling_magnitudes_along_each():
    torch.manual_seed(0)
    w = MixedRoPE(64, 500, grid=14).freqs.double().unflatten(-1, (2, 16)).permute(0, 2, 3, 1)  # (H, direction, d, 2)
    near = partial(close, atol=16 * torch.finfo(float32).eps)  # no magnitude is above 13 / (2 pi)
    magnitudes = torch.tensor([10 ** (-4 * d / 64) for d in range(16)], dtype=float64) * 13 / (2 * torch.pi)
    near(w.norm(dim=-1), magnitudes.expand(500, 2, 16))
    a, b = (w / w.norm(dim=-1, keepdim=True)).unbind(1)
    near(a, a[:, :1].expand_as(a))
    near(b, torch.stack([-a[..., 1], a[..., 0]], dim=-1))  # a quarter turn on
    angle = torch.atan2(a[:, 0, 1], a[:, 0, 0])
    assert torch.histc(angle, 8, -torch.pi, torch.pi).min() > 35  # any direction is as likely


@pytest.mark.parametrize(
    "encoding, head_dim, options, says",
    [
        (SphericalRoPE, 2, {}, "at least 3"),
        (MixedRoPE, 1, {}, "at least 2"),
        (MixedRoPE, 8, {"init": "heo2"}, "'heo' or 'uniform', got 'heo2'"),
        *((LieRE, 8, {"block_size": b}, f"from 2 to head_dim = 8, got {b}") for b in (1, 9, 4.5, 8.0)),
        *((ComRoPE, 8, {"block_size": b}, f"from 2 to head_dim = 8, got {b}") for b in (1, 9, 4.5, 8.0)),
        *(
            (rope, 8, {"theta": t}, f"above 0 and finite, got {t}")
            for rope in (AxialRoPE, MixedRoPE, SphericalRoPE)
            for t in (0, -1, math.nan, math.inf)
        ),
        *((MixedRoPE, 8, {"grid": g}, f"grid must be at least 1, or None .*, got {g}") for g in (0, -5, math.nan)),
        (MixedRoPE, 8, {"init": "uniform", "theta": 20}, "theta is for init='heo'"),
        (SphericalRoPE, 8, {"learned": True, "theta": 20}, "theta is for fixed frequencies"),
        *((AxialRoPE, 8, {kind: True, "theta": 20}, "choose one") for kind in ("learned", "uniform")),
        (SphericalRoPE, 8, {"pos_dim": 3}, "pos_dim must be 2, got 3"),
        *((rope, 8, {"pos_dim": 0}, "at least 1, got 1 and 0") for rope in (AxialRoPE, MixedRoPE, LieRE, ComRoPE)),
        (ComRoPE, 15, {"kind": "ap"}, r"at least pos_dim \* block_size = 16 for 'ap', got 15"),
        (ComRoPE, 8, {"kind": "apd"}, "'ap' or 'ld', got 'apd'"),
        (AxialRoPE, 3, {}, r"at least 2 \* pos_dim = 4"),
        (AxialRoPE, 8, {"learned": True, "uniform": True}, "choose one"),
    ],
)
def test_wrong_options_are_refused_with_the_right_ones(encoding, head_dim, options, says):
    with pytest.raises(ValueError, match=says):
        encoding(head_dim, 1, **options)


@pytest.mark.parametrize("encoding", CLASSES)
def test_an_encoding_has_at_least_one_head(encoding):
    with pytest.raises(ValueError, match=r"num_heads .* got .*\b0\b"):
        encoding(8, 0)
