"""The ViT: timm's names and outputs, images of any size, and encodings in every layer."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from conftest import EQUIVARIANT, ROTARY, small_vit
from torch import nn

from vit import ENCODINGS, DropPath, ViT


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("pe", ENCODINGS)
def test_takes_any_image_whose_sides_are_multiples_of_the_patch(pe, pool):
    vit = small_vit(pe, pool=pool)
    for height, width in (32, 32), (48, 64), (4, 24):
        assert vit(torch.randn(2, 3, height, width)).shape == (2, 10)
    with pytest.raises(ValueError, match="multiples of patch_size = 4, got 30 x 32"):
        vit(torch.randn(2, 3, 30, 32))


@pytest.mark.parametrize(
    "wrong, error, says",
    [
        ({"pe": "rope"}, ValueError, "one of none, ape, axial, .*got 'rope'"),
        ({"pool": "max"}, ValueError, "'cls' or 'mean'"),
        ({"pos_unit": "pixel"}, ValueError, "pos_unit must be 'image' or 'patch', got 'pixel'"),
        ({"patch_size": 5}, ValueError, "img_size must be a multiple of patch_size = 5, got 32"),
        ({"img_size": (32, 64)}, ValueError, r"img_size must be a whole number, at least 1, got \(32, 64\)"),
        *(({name: 0}, ValueError, f"{name} must be .* got 0") for name in ("img_size", "patch_size", "num_heads")),
        *(({"drop_path": rate}, ValueError, f"below 1, got {rate}") for rate in (-0.1, 1.0, 2, math.nan)),
        ({"pe": "mixed", "init": "uniform", "theta": 20}, ValueError, "theta is for init='heo'"),
        ({"head_dim": 2}, ValueError, "head_dim must be at least 3"),
        *(({"pe": pe, "drop_paht": 0.1}, TypeError, "drop_paht") for pe in ("none", "ape", "axial")),
    ],
)
def test_wrong_arguments_are_refused_with_the_right_ones(wrong, error, says):
    with pytest.raises(error, match=says):
        ViT(**wrong)


def test_state_dict_has_the_names_and_shapes_of_timm():
    """Those of timm's VisionTransformer(img_size=32, patch_size=4, embed_dim=48, depth=1, init_values=1e-4)."""
    layers = {"patch_embed.proj": (48, 3, 4, 4), "norm": (48,), "head": (10, 48)}
    layers |= {"blocks.0.norm1": (48,), "blocks.0.attn.qkv": (144, 48), "blocks.0.attn.proj": (48, 48)}
    layers |= {"blocks.0.norm2": (48,), "blocks.0.mlp.fc1": (192, 48), "blocks.0.mlp.fc2": (48, 192)}
    shapes = {f"{layer}.weight": shape for layer, shape in layers.items()}
    shapes |= {f"{layer}.bias": shape[:1] for layer, shape in layers.items()}
    shapes |= {"cls_token": (1, 1, 48), "pos_embed": (1, 65, 48)} | {f"blocks.0.ls{i}.gamma": (48,) for i in (1, 2)}
    vit = small_vit("ape", depth=1, layer_scale=1e-4)
    assert {name: tuple(p.shape) for name, p in vit.state_dict().items()} == shapes
    mean = {name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name for name in shapes}
    assert small_vit("ape", depth=1, layer_scale=1e-4, pool="mean").state_dict().keys() == mean - {"cls_token"}


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_computes_what_torchs_own_pre_norm_transformer_computes(pool, float64):
    vit, images = small_vit("ape", pool=pool, layer_scale=0.3), torch.randn(2, 3, 32, 32)
    patches = nn.functional.unfold(images, 4, stride=4).mT
    x = nn.functional.linear(patches, vit.patch_embed.proj.weight.flatten(1), vit.patch_embed.proj.bias)
    if pool == "cls":
        x = torch.cat([vit.cls_token.expand(2, 1, -1), x], dim=1)
    x = x + vit.pos_embed
    for block in vit.blocks:
        layer = nn.TransformerEncoderLayer(48, 2, 192, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True)
        names = {"self_attn.in_proj_": "attn.qkv.", "self_attn.out_proj.": "attn.proj.", "linear1.": "mlp.fc1."}
        names |= {"linear2.": "mlp.fc2.", "norm1.": "norm1.", "norm2.": "norm2."}
        for (theirs, ours), p in itertools.product(names.items(), ("weight", "bias")):
            layer.get_parameter(theirs + p).data.copy_(block.get_parameter(ours + p))
        for branch_end, scale in (layer.self_attn.out_proj, block.ls1), (layer.linear2, block.ls2):
            branch_end.weight.data *= scale.gamma[:, None]
            branch_end.bias.data *= scale.gamma
        x = layer(x)
    features = vit.norm(x[:, 0]) if pool == "cls" else vit.fc_norm(x.mean(1))
    torch.testing.assert_close(vit(images), vit.head(features), rtol=0, atol=1e-12)


def test_positions_span_minus_pi_to_pi_on_the_training_grid_and_grow_with_the_image():
    vit, eps = small_vit("axial"), torch.finfo(torch.float32).eps
    for height, width in (8, 8), (4, 12):
        pos = vit.positions(height, width).double()
        x, y = (torch.linspace(-n / 8 * math.pi, n / 8 * math.pi, n, dtype=pos.dtype) for n in (width, height))
        rows = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).flatten(0, 1)
        torch.testing.assert_close(pos, torch.cat([torch.zeros(1, 2), rows]), rtol=0, atol=8 * eps)
        assert torch.equal(pos[1:], -pos[1:].flip(0)), "symmetric to the bit"
    assert torch.equal(small_vit("axial", pool="mean").positions(1, 1), torch.zeros(1, 2))


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_positions_in_patches_count_from_the_first_at_any_size(pool):
    vit = small_vit("axial", pos_unit="patch", pos_scale=0.5, pool=pool)
    counted = [[0, 0]] * vit.num_prefix_tokens + [[x, y] for y in range(4) for x in range(12)]
    assert torch.equal(vit.positions(4, 12), torch.tensor(counted) / 2) and vit.spacing == 0.5


def test_mixed_frequencies_are_per_patch_if_positions_are():
    a, b = (small_vit("mixed", pos_unit=unit) for unit in ("image", "patch"))
    for of_a, of_b in zip(a.blocks, b.blocks, strict=True):  # small_vit draws the same
        torch.testing.assert_close(of_a.attn.rope.freqs * a.spacing, of_b.attn.rope.freqs)


@pytest.mark.parametrize("pe", EQUIVARIANT)
def test_the_unit_of_positions_is_a_scale_and_an_origin(pe, float64):
    """Equivariant encodings ignore the origin. At other sizes, neighbours keep their distance in one unit only."""
    vit, images = small_vit(pe, pool="mean"), torch.randn(2, 3, 32, 32)
    scaled = small_vit(pe, pool="mean", pos_unit="patch", pos_scale=vit.spacing)
    scaled.load_state_dict(vit.state_dict())
    assert (scaled(images) - vit(images)).abs().max() < 1e-11
    larger = torch.randn(2, 3, 48, 48)
    assert (scaled(larger) - vit(larger)).abs().max() > 1e-4


def test_an_absolute_embedding_adds_to_a_rotary_one(float64):
    both, rotary, images = small_vit("axial", ape=True), small_vit("axial"), torch.randn(2, 3, 32, 48)
    weights = both.state_dict()
    assert weights.pop("pos_embed").shape == (1, 65, 48)
    rotary.load_state_dict(weights)
    assert (both(images) - rotary(images)).abs().max() > 1e-4
    both.pos_embed.data.zero_()
    assert torch.equal(both(images), rotary(images))
    same = small_vit("none", ape=True).state_dict(), small_vit("ape").state_dict()
    torch.testing.assert_close(*same, rtol=0, atol=0)


@pytest.mark.parametrize("pe", ROTARY)
def test_an_image_may_have_other_positions_than_those_of_its_grid(pe, float64):
    vit, images = small_vit(pe), torch.randn(2, 3, 32, 32)
    grid = vit.positions(8, 8)
    change = (vit(images, torch.stack([grid, grid.flip(1)])) - vit(images)).abs()
    assert change[0].max() < 1e-12 and change[1].max() > 1e-4


def test_pos_scale_multiplies_positions_and_what_is_measured_in_patches():
    scaled, plain = small_vit("axial", pos_scale=0.5), small_vit("axial")
    assert torch.equal(scaled.positions(4, 12), plain.positions(4, 12) / 2) and scaled.spacing == plain.spacing / 2


@pytest.mark.parametrize("pe", ["none", *ROTARY])
def test_only_an_encoding_knows_where_patches_are(pe, float64):
    vit, images = small_vit(pe, pool="mean"), torch.randn(2, 3, 32, 32)
    turned = torch.rot90(images.unflatten(2, (8, 4)).unflatten(4, (8, 4)), dims=(2, 4)).flatten(4).flatten(2, 3)
    change = (vit(images) - vit(turned)).abs().max()
    assert change < 1e-12 if pe == "none" else change > 1e-4


def test_learned_embedding_is_resampled_to_other_grids_but_for_the_class_token(float64):
    vit = small_vit("ape")
    vit.pos_embed.data[0, 1:] = torch.arange(8.0).repeat(8)[:, None]  # column c holds c
    assert torch.equal(vit.interpolated_pos_embed(8, 8), vit.pos_embed)
    resampled = vit.interpolated_pos_embed(4, 16)
    assert torch.equal(resampled[:, 0], vit.pos_embed[:, 0])
    grid = resampled[0, 1:].view(4, 16, -1)
    inner = torch.arange(4, 12) / 2 - 0.25  # where the ramp's ends do not reach
    torch.testing.assert_close(grid[:, 4:-4], inner[:, None].expand(4, 8, 48), rtol=0, atol=1e-12)


def test_drop_path_drops_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    y = DropPath(0.25)(torch.ones(20_000, 2, 3))
    assert torch.equal(y, y[:, :1, :1].expand_as(y)), "a sample is dropped whole"
    assert y.unique().tolist() == pytest.approx([0, 4 / 3])
    assert abs(y.mean() - 1) < 0.02


def test_dropout_and_drop_path_come_after_the_layers_they_belong_to():
    vit, calls = small_vit("none", depth=3, dropout=0.1, drop_path=0.4).train(), []
    for module in vit.modules():
        if isinstance(module, nn.Dropout | DropPath):
            module.register_forward_hook(lambda module, *_: calls.append(type(module)))
    vit(torch.randn(2, 3, 32, 32))
    block = [nn.Dropout, DropPath, nn.Dropout, nn.Dropout, DropPath]  # attention; GELU, MLP
    assert calls == [nn.Dropout] + 3 * block
    assert [b.drop_path.rate for b in vit.blocks] == [0.4] * 3


@pytest.mark.parametrize("options", [{"dropout": 0.5}, {"drop_path": 0.5}])
def test_dropout_and_drop_path_rest_in_evaluation(options):
    vit, images = small_vit("axial", **options), torch.randn(2, 3, 32, 32)
    assert torch.equal(vit(images), vit(images))
    vit.train()
    assert not torch.equal(vit(images), vit(images))


def test_defaults_and_initialisation():
    vit = ViT("ape", layer_scale=1e-4)
    for weight in vit.blocks[0].attn.qkv.weight, vit.blocks[0].mlp.fc1.weight, vit.pos_embed:
        assert abs(weight.std() - 0.02) < 1e-3
    assert abs(vit.cls_token.std() - 0.02) < 3e-3
    assert len(vit.blocks) == 12 and not vit.blocks[0].mlp.fc1.bias.any()
    assert torch.equal(vit.blocks[0].ls1.gamma, torch.full((360,), 1e-4))


@pytest.mark.parametrize("options", [{}, {"pool": "mean", "layer_scale": 0.1}])
@pytest.mark.parametrize("pe", ENCODINGS)
def test_reset_parameters_draws_what_the_constructor_draws(pe, options):
    def build():
        torch.manual_seed(0)
        return ViT(pe, depth=2, num_heads=2, head_dim=24, **options)

    want = build().state_dict()
    with torch.device("meta"):
        vit = build()
    vit.to_empty(device="cpu")
    for p in vit.parameters():
        p.data.fill_(math.nan)
    torch.manual_seed(0)
    vit.reset_parameters()
    torch.testing.assert_close(vit.state_dict(), want, rtol=0, atol=0)


def test_sizes_may_be_integers_of_numpy():
    sizes = {"img_size": 32, "patch_size": 4, "depth": 1, "num_heads": 2, "head_dim": 24, "block_size": 8}
    vit = ViT("liere", **{name: np.int64(size) for name, size in sizes.items()})
    assert vit(IMAGES).shape == (2, 100)


def test_options_reach_the_encoding_of_every_layer(float64):
    pos = torch.randn(9, 2)
    for block in small_vit("axial", theta=10.0).blocks:
        assert torch.equal(block.attn.rope.rotation(pos), ENCODINGS["axial"](24, 2, theta=10.0).rotation(pos))
    a, b = (block.attn.rope.freqs for block in small_vit("mixed", init="uniform").blocks)  # as in the paper
    assert a.min() >= 0 and a.max() < 1 and not torch.equal(a, b)
    a, b = (block.attn.rope.freqs for block in small_vit("mixed", img_size=56).blocks)  # 14 patches a side
    assert a.norm(dim=1).max().item() == pytest.approx(13 / (2 * math.pi), rel=1e-5) and not torch.equal(a, b)


def assert_precise(vit, compiled, images):
    """The error of compiled against float64 is at most a few times that of vit."""
    exact = copy.deepcopy(vit).double()(images.double())
    error = (vit(images) - exact).abs().max() + 16 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert (compiled(images) - exact).abs().max() < 4 * error


@torch.no_grad()
@pytest.mark.parametrize("pe", ENCODINGS)
def test_one_compiled_graph_serves_all_blocks(pe):
    vit = small_vit(pe, depth=3, drop_path=0.1)
    compiled = copy.deepcopy(vit)
    torch._dynamo.reset()
    compiled.compile(fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_precise(vit, compiled, torch.randn(2, 3, 32, 32))


@torch.no_grad()
@pytest.mark.parametrize("pe", ["ape", "spherical"])
def test_one_compiled_graph_serves_all_image_sizes(pe):
    vit = small_vit(pe, depth=1)
    torch._dynamo.reset()
    compiled = torch.compile(vit, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for height, width in (40, 48), (64, 56), (72, 36):
            assert_precise(vit, compiled, torch.randn(3, 3, height, width))


def test_compiled_under_autocast_exponentials_keep_their_precise_gradients():
    vit, images = small_vit("comrope-ld", depth=1), torch.randn(4, 3, 32, 32)

    def gradients():
        with torch.autocast("cpu", torch.bfloat16):
            logits = vit(images)
        return torch.autograd.grad(logits.float().square().sum(), vit.blocks[0].attn.rope.parameters())

    want = gradients()
    vit.compile(backend="aot_eager")
    for got, grad in zip(gradients(), want, strict=True):
        assert (got - grad).norm() < torch.finfo(torch.bfloat16).eps / 32 * grad.norm()


# A ViT is a module like any other


every_vit = pytest.mark.parametrize("pe", ENCODINGS)
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@every_vit
def test_its_head_can_be_replaced_and_its_weights_quantized(pe):
    vit = small_vit(pe)
    quantized = torch.ao.quantization.quantize_dynamic(vit, {nn.Linear})
    assert quantized(IMAGES).shape == (2, 10)
    for head, width in (nn.Identity(), 48), (nn.Sequential(nn.Linear(48, 3)), 3):
        vit.head = head
        assert vit(IMAGES).shape == (2, width)


@every_vit
def test_its_weights_can_be_elsewhere_until_they_are_needed(pe):
    """Like hooks that offload weights: a module's own weights are on the meta device except during its forward pass."""
    vit = small_vit(pe)
    want = vit(IMAGES)

    def fetch(module, *_):
        module._parameters.update(kept[module])

    def release(module, *_):
        module._parameters.update({name: nn.Parameter(p.to("meta")) for name, p in kept[module].items()})

    kept = {m: dict(m._parameters) for m in vit.modules() if m is not vit and any(True for _ in m.parameters(False))}
    for module in kept:
        release(module)
        module.register_forward_pre_hook(fetch)
        module.register_forward_hook(release)
    assert torch.equal(vit(IMAGES), want)


@every_vit
@pytest.mark.filterwarnings("ignore")  # tracing warns of every check of a shape
def test_export_and_traces_serve_other_batches_and_sizes(pe, float64):
    vit, images = small_vit(pe), torch.randn(5, 3, 24, 64)
    traced = torch.jit.trace(vit, IMAGES.double(), check_trace=False)
    square = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(traced(square), vit(square), rtol=0, atol=1e-10)
    batch, height, width = (
        torch.export.Dim("batch"),
        torch.export.Dim("height", max=32),
        torch.export.Dim("width", max=32),
    )
    example = (torch.randn(2, 3, 40, 48),)
    exported = torch.export.export(vit, example, dynamic_shapes=({0: batch, 2: 4 * height, 3: 4 * width},)).module()
    torch.testing.assert_close(exported(images), vit(images), rtol=0, atol=1e-10)
    torch.testing.assert_close(exported(square), vit(square), rtol=0, atol=1e-10)


@every_vit
def test_it_can_be_built_on_meta_and_run_without_images(pe):
    vit = small_vit(pe)
    with torch.device("meta"):
        built = ViT(pe, num_classes=10, depth=2, num_heads=2, head_dim=24).eval()
    assert built(IMAGES.to("meta")).shape == (2, 10)
    built.load_state_dict(vit.state_dict(), assign=True)
    assert torch.equal(built(IMAGES), vit(IMAGES))
    assert vit(torch.randn(0, 3, 32, 32)).shape == (0, 10)


def test_positions_are_float32_at_least(default_dtype):
    default_dtype(torch.bfloat16)
    assert ViT("axial", depth=1).positions(8, 8).dtype == torch.float32
    default_dtype(torch.float64)
    assert ViT("axial", depth=1).positions(8, 8).dtype == torch.float64
