"""The ViT: timm's names and numbers, positions of any image, and what a shift of all positions does."""

import math

import pytest
import torch
from torch import nn

from vit import ENCODINGS, DropPath, ViT

ROTARY = [pe for pe in ENCODINGS if pe not in ("none", "ape")]
EQUIVARIANT = [pe for pe in ROTARY if not pe.startswith(("spherical", "liere"))]


def small(pe, **options):
    torch.manual_seed(0)
    sizes = {"num_classes": 10, "depth": 2, "num_heads": 2, "head_dim": 24}
    return ViT(pe, **sizes | options).eval()


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("pe", ENCODINGS)
def test_takes_any_image_whose_sides_are_multiples_of_the_patch(pe, pool):
    model = small(pe, pool=pool)
    for height, width in (32, 32), (48, 64), (4, 24):
        assert model(torch.randn(2, 3, height, width)).shape == (2, 10)
    with pytest.raises(ValueError, match="multiples of patch_size = 4, got 30 x 32"):
        model(torch.randn(2, 3, 30, 32))


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"pe": "rope"}, "one of none, ape, axial, .*got 'rope'"),
        ({"pool": "max"}, "'cls' or 'mean'"),
        ({"patch_size": 5}, "img_size must be a multiple of patch_size = 5, got 32"),
        ({"head_dim": 2}, "head_dim must be at least 3"),
    ],
)
def test_a_wrong_argument_is_told_what_would_be_right(wrong, says):
    with pytest.raises(ValueError, match=says):
        ViT(**wrong)


def test_an_option_that_no_one_takes_is_not_swallowed():
    for pe in "none", "ape", "axial":
        with pytest.raises(TypeError, match="drop_paht"):
            ViT(pe, drop_paht=0.1)


def test_state_dict_has_the_names_and_shapes_of_timm():
    """Those of timm's VisionTransformer(img_size=32, patch_size=4, embed_dim=48, depth=1, init_values=1e-4)."""
    block = {
        "norm1.weight": (48,),
        "norm1.bias": (48,),
        "attn.qkv.weight": (144, 48),
        "attn.qkv.bias": (144,),
        "attn.proj.weight": (48, 48),
        "attn.proj.bias": (48,),
        "ls1.gamma": (48,),
        "norm2.weight": (48,),
        "norm2.bias": (48,),
        "mlp.fc1.weight": (192, 48),
        "mlp.fc1.bias": (192,),
        "mlp.fc2.weight": (48, 192),
        "mlp.fc2.bias": (48,),
        "ls2.gamma": (48,),
    }
    expected = {
        "cls_token": (1, 1, 48),
        "pos_embed": (1, 65, 48),
        "patch_embed.proj.weight": (48, 3, 4, 4),
        "patch_embed.proj.bias": (48,),
        **{f"blocks.0.{name}": shape for name, shape in block.items()},
        "norm.weight": (48,),
        "norm.bias": (48,),
        "head.weight": (10, 48),
        "head.bias": (10,),
    }
    model = small("ape", depth=1, layer_scale=1e-4)
    assert {name: tuple(p.shape) for name, p in model.state_dict().items()} == expected
    mean = {name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name for name in expected}
    assert small("ape", depth=1, layer_scale=1e-4, pool="mean").state_dict().keys() == mean - {"cls_token"}


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_computes_what_torchs_own_pre_norm_transformer_computes(pool):
    model = small("ape", pool=pool, layer_scale=0.3).double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    x = nn.functional.unfold(images, 4, stride=4).mT @ model.patch_embed.proj.weight.flatten(1).T
    x = x + model.patch_embed.proj.bias
    if pool == "cls":
        x = torch.cat([model.cls_token.expand(2, 1, -1), x], dim=1)
    x = x + model.pos_embed
    for block in model.blocks:
        layer = nn.TransformerEncoderLayer(48, 2, 192, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True).double()
        names = {"self_attn.in_proj_": "attn.qkv.", "self_attn.out_proj.": "attn.proj.", "linear1.": "mlp.fc1."}
        names |= {"linear2.": "mlp.fc2.", "norm1.": "norm1.", "norm2.": "norm2."}
        for theirs, ours in names.items():
            for p in "weight", "bias":
                layer.get_parameter(theirs + p).data.copy_(block.get_parameter(ours + p))
        for branch_end, scale in (layer.self_attn.out_proj, block.ls1), (layer.linear2, block.ls2):
            branch_end.weight.data *= scale.gamma[:, None]
            branch_end.bias.data *= scale.gamma
        x = layer(x)
    norm = model.norm if pool == "cls" else model.fc_norm
    pooled = norm(x[:, 0] if pool == "cls" else x.mean(1))
    torch.testing.assert_close(model(images), model.head(pooled), rtol=0, atol=1e-12)


def test_positions_span_minus_pi_to_pi_on_the_training_grid_and_grow_with_the_image():
    model = small("axial")
    pos = model.positions(8, 8)
    assert torch.equal(pos[0], torch.zeros(2))
    grid = pos[1:].view(8, 8, 2)  # rows, columns, (x, y)
    axis = torch.linspace(-math.pi, math.pi, 8)
    torch.testing.assert_close(grid[..., 0], axis.expand(8, 8))
    torch.testing.assert_close(grid[..., 1], axis[:, None].expand(8, 8))
    wide = model.positions(4, 12)[1:].view(4, 12, 2)
    torch.testing.assert_close(wide[0, :, 0], torch.linspace(-1.5 * math.pi, 1.5 * math.pi, 12))
    torch.testing.assert_close(wide[:, 0, 1], torch.linspace(-0.5 * math.pi, 0.5 * math.pi, 4))
    assert torch.equal(pos[1:], -pos[1:].flip(0)), "symmetric to the bit"
    assert torch.equal(small("axial", pool="mean").positions(1, 1), torch.zeros(1, 2))


@pytest.mark.parametrize("pe", ROTARY)
def test_the_shift_of_all_positions(pe):
    """Equivariant encodings do not notice it, class token included; spherical ones and LieRE do."""
    model = small(pe).double()
    nn.init.normal_(model.blocks[0].attn.qkv.weight)  # attention that is far from uniform
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    pos = model.positions(8, 8).double()
    torch.testing.assert_close(model(images, pos.expand(2, -1, -1)), model(images), rtol=0, atol=1e-6)
    change = (model(images, pos + torch.tensor([0.9, -1.7])) - model(images, pos)).abs().max()
    assert change < 1e-10 if pe in EQUIVARIANT else change > 1e-3


@pytest.mark.parametrize("pe", ["none", *ROTARY])
def test_only_an_encoding_knows_where_patches_are(pe):
    model = small(pe, pool="mean")
    nn.init.normal_(model.blocks[0].attn.qkv.weight)
    images = torch.randn(2, 3, 32, 32)
    turned = torch.rot90(images.unflatten(2, (8, 4)).unflatten(4, (8, 4)), dims=(2, 4)).flatten(4).flatten(2, 3)
    change = (model(images) - model(turned)).abs().max()
    assert change < 1e-5 if pe == "none" else change > 1e-4


def test_learned_embedding_is_resampled_as_a_picture_and_the_class_tokens_is_kept():
    model = small("ape")
    ramp = torch.arange(8.0)
    with torch.no_grad():
        model.pos_embed[0, 1:] = ramp.repeat(8)[:, None]  # column c holds c
    assert model.interpolated_pos_embed(8, 8) is model.pos_embed
    resampled = model.interpolated_pos_embed(4, 16)
    assert torch.equal(resampled[:, 0], model.pos_embed[:, 0])
    grid = resampled[0, 1:].view(4, 16, -1)
    inner = torch.arange(4, 12) / 2 - 0.25  # where the ramp's ends do not reach
    torch.testing.assert_close(grid[:, 4:-4], inner[:, None].expand(4, 8, 48), rtol=0, atol=1e-4)


def test_drop_path_drops_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.ones(20_000, 2, 3)
    y = DropPath(0.25)(x)
    assert torch.equal(y, y[:, :1, :1].expand_as(y)), "a sample is dropped whole"
    assert y.unique().tolist() == pytest.approx([0, 4 / 3])
    assert abs(y.mean() - 1) < 0.02
    assert torch.equal(DropPath(0.25).eval()(x), x)


def test_dropout_and_drop_path_are_where_they_belong():
    model = small("none", depth=3, dropout=0.1, drop_path=0.4).train()
    calls = []
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout | DropPath):
            module.register_forward_hook(lambda module, *_: calls.append(type(module)))
    model(torch.randn(2, 3, 32, 32))
    block = [torch.nn.Dropout, DropPath, torch.nn.Dropout, torch.nn.Dropout, DropPath]  # attention; GELU, MLP
    assert calls == [torch.nn.Dropout] + 3 * block
    assert [b.drop_path.rate for b in model.blocks] == [0.4] * 3


def test_dropout_and_drop_path_rest_in_evaluation():
    model = small("axial", dropout=0.5, drop_path=0.5)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images), model(images))
    model.train()
    assert not torch.equal(model(images), model(images))


def test_initialisation():
    model = ViT("ape", depth=1)
    for weight in model.blocks[0].attn.qkv.weight, model.blocks[0].mlp.fc1.weight, model.pos_embed:
        assert abs(weight.std() - 0.02) < 1e-3
    assert abs(model.cls_token.std() - 0.02) < 3e-3 and len(ViT().blocks) == 12
    assert not model.blocks[0].mlp.fc1.bias.any()
    assert torch.equal(ViT(depth=1, layer_scale=1e-4).blocks[0].ls1.gamma, torch.full((360,), 1e-4))


def test_options_reach_the_encoding():
    freqs = small("axial", theta=10.0).blocks[1].attn.rope.freqs
    torch.testing.assert_close(freqs, 10.0 ** (-2 * torch.arange(6) / 24).expand(1, 2, 6))
    a, b = (block.attn.rope.freqs for block in small("mixed", img_size=56).blocks[:2])  # 14 patches a side
    assert a.norm(dim=1).max().item() == pytest.approx(13 / (2 * torch.pi)) and a is not b


@pytest.mark.parametrize("pe", ["none", "mixed", "comrope-ld"])
def test_all_blocks_compile_into_one_graph(pe):
    model, images, graphs = small(pe, depth=3, drop_path=0.1), torch.randn(2, 3, 32, 32), []
    logits = model(images)
    torch._dynamo.reset()

    def backend(graph, _):
        graphs.append(graph)
        return lambda *args: calls.append(1) or graph(*args)

    calls = []
    model.compile(fullgraph=True, backend=backend)
    torch.testing.assert_close(model(images), logits, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1 and len(calls) == 3


def test_compiled_under_autocast_an_exponential_keeps_its_exact_gradient():
    model, images = ViT("comrope-ld", depth=1, num_heads=2, head_dim=16, img_size=16), torch.randn(4, 3, 16, 16)

    def gradients():
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images)
        return torch.autograd.grad(logits.float().square().sum(), model.blocks[0].attn.rope.parameters())

    want = gradients()
    model.compile(backend="aot_eager")
    for got, grad in zip(gradients(), want, strict=True):
        assert (got - grad).norm() < 1e-5 * grad.norm()


@torch.no_grad()
@pytest.mark.parametrize("pe", ["ape", "spherical"])
def test_compiles_into_one_graph_for_any_image(pe):
    model = small(pe, depth=1)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for i, (height, width) in enumerate([(40, 48), (64, 56), (72, 36)]):
        images = torch.randn(3, 3, height, width)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-5)
