"""On a GPU, compiled and in bfloat16, results are those of the CPU, and no training step makes the host wait."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import ROTARY, SMALL, as_flags, make_imagenet, weights

import train
from lab import benchmark, evaluate
from lab.data import Bearing
from lab.lamb import LAMB
from vit import ENCODINGS, ViT

DEVICE = "cuda"
SMALL = SMALL | {"device": DEVICE, "head-dim": 16, "epochs": 1, "out": "run"}
IMAGENET = "--dataset=imagenet --img-size=32 --patch-size=8 --workers=2 --augment=mix --micro-batch=8"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    torch.compiler.reset()
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)


def small(pe):
    return ViT(pe, depth=2, num_heads=3, head_dim=64, num_classes=10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pe", ROTARY)
def test_compiled_encodings_turn_q_and_k_as_in_float64_on_the_cpu(pe, dtype):
    model, eps = small(pe), torch.finfo(torch.float32).eps
    rope, pos = model.blocks[0].attn.rope.double(), model.positions(12, 12)
    q, k = torch.randn(2, 4, 3, len(pos), 64).to(dtype)
    exact, moved = (rope.rotation(pos.double() * s).expand(3, -1, -1, -1) @ q[..., None].double() for s in (1, 1 + eps))
    rounding = (moved - exact).abs().max().item() + eps * q.abs().max().item()  # of angles and products in float32
    got = torch.compile(rope.float().to(DEVICE), fullgraph=True)(q.to(DEVICE), k.to(DEVICE), pos.to(DEVICE))
    assert got[0].dtype == got[1].dtype == dtype and got[0].device.type == DEVICE
    torch.testing.assert_close(got[0].cpu().double()[..., None], exact, rtol=torch.finfo(dtype).eps, atol=30 * rounding)


@pytest.mark.parametrize("pe", ENCODINGS)
def test_a_compiled_vit_in_bfloat16_has_the_logits_and_gradients_of_the_cpu(pe):
    model, images, labels, passes = small(pe), torch.randn(8, 3, 32, 32), torch.arange(8), []
    for device, amp in ("cpu", False), (DEVICE, True):
        model.to(device).zero_grad()
        if amp:
            model.compile(fullgraph=True)
        with torch.autocast(device, torch.bfloat16, enabled=amp):
            logits = model(images.to(device))
            loss = torch.nn.functional.cross_entropy(logits, labels.to(device))
        loss.backward()
        passes.append([x.detach().float().cpu() for x in (logits, *(p.grad for p in model.parameters()))])
    for i, (exact, got) in enumerate(zip(*passes, strict=True)):
        tolerance = (13 if i else 4) * torch.finfo(torch.bfloat16).eps
        assert (got - exact).norm() <= tolerance * exact.norm() + 1e-6, i


@pytest.mark.parametrize("pe", ENCODINGS)
def test_no_step_keeps_the_host_waiting(monkeypatch, pe):
    def watched(self, step):  # in steps 2 to 4 all is compiled, and the epoch is not over: to wait is an error
        torch.cuda.set_sync_debug_mode("error" if 2 <= step < 5 else "default")
        return train_batch(self, step)

    train_batch = Bearing.train_batch
    monkeypatch.setattr(Bearing, "train_batch", watched)
    monkeypatch.setattr(Bearing, "train_size", 6 * SMALL["batch-size"])
    monkeypatch.setattr(train, "SHOW_SECONDS", math.inf)
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", math.inf)
    try:
        assert train.main(as_flags(SMALL | {"pe": pe})) == 0 and weights("run")["step"] == 6
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("options", ["", IMAGENET], ids=["bearing", "imagenet"])
def test_a_run_trains_resumes_and_is_evaluated(options):
    make_imagenet("data")
    flags = [*as_flags(SMALL), "--pe=spherical-learned", *options.split()]
    assert train.main(flags) == 0 and train.main([*flags, "--resume"]) == 0
    assert evaluate.main(["run", f"--device={DEVICE}"]) == 0
    found = json.loads(Path("run/evaluation.json").read_text(encoding="utf-8"))[
        "accuracies"
    ]  # by a model that is not compiled
    assert found["test"]["test"] == pytest.approx(weights("run")["log"][0]["test_accuracy"], abs=5)


def test_lamb_steps_as_on_the_cpu():
    ends = []
    for device in "cpu", DEVICE:
        torch.manual_seed(0)
        parameters = list(small("mixed").to(device).parameters())  # of size 1 at most, or a little more
        optimizer = LAMB(parameters, lr=1e-2, weight_decay=0.05)
        for _ in range(3):
            for p in parameters:
                p.grad = torch.randn(p.shape).to(device)
            optimizer.step()
        ends.append(torch.nn.utils.parameters_to_vector(parameters).cpu())
    torch.testing.assert_close(*ends, rtol=0, atol=100 * torch.finfo(torch.float32).eps)


def test_every_part_of_the_benchmark_runs():
    sizes = {"depth": 1, "heads": 2, "img-size": 64, "patch-size": 16, "batch-size": 4, "repeats": 2, "device": DEVICE}
    parts = [part for part in benchmark.PARTS if part != "decoding"]
    assert benchmark.main([*parts, *as_flags(sizes), "--json=costs.json", "--pe", "spherical", "liere"]) == 0
    rows = json.loads(Path("costs.json").read_text(encoding="utf-8"))["rows"]
    assert {row["part"] for row in rows} == set(parts) and all(row["ratio"] >= 0 for row in rows)
