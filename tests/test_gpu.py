"""On a GPU, compiled and in bfloat16, all does what it does on a CPU, and no step keeps the host waiting."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_train import SMALL, as_flags, make_imagenet, weights

import benchmark
import evaluate
import train
from lamb import LAMB
from vit import ENCODINGS, ViT

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ROTARY = [pe for pe, make in ENCODINGS.items() if make is not None]
SMALL = SMALL | {"device": DEVICE, "head-dim": 16}


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    torch.compiler.reset()
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)


def small(pe, **options):
    return ViT(pe, **{"depth": 2, "num_heads": 3, "head_dim": 64, "num_classes": 10} | options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pe", ROTARY)
def test_a_compiled_encoding_turns_q_and_k_as_in_float64_on_the_cpu(pe, dtype):
    model = small(pe)
    rope, pos = model.blocks[0].attn.rope, model.positions(12, 12)
    q, k = torch.randn(2, 4, 3, len(pos), 64).to(dtype)
    exact = torch.einsum("htij,bhtj->bhti", rope.double().rotation(pos.double()).expand(3, -1, -1, -1), q.double())
    compiled = torch.compile(rope.float().to(DEVICE), fullgraph=True)
    got = compiled(q.to(DEVICE), k.to(DEVICE), pos.to(DEVICE))
    assert got[0].dtype == got[1].dtype == dtype and got[0].device.type == DEVICE
    torch.testing.assert_close(got[0].cpu().double(), exact, rtol=torch.finfo(dtype).eps, atol=5e-4)


@pytest.mark.parametrize("pe", ENCODINGS)
def test_a_compiled_vit_in_bfloat16_has_the_logits_and_gradients_of_the_cpu(pe):
    model, images, labels = small(pe), torch.randn(8, 3, 32, 32), torch.arange(8)
    passes = []
    for device, amp in ("cpu", False), (DEVICE, True):
        model.zero_grad()
        model.to(device)
        if amp:
            model.compile(fullgraph=True)
        with torch.autocast(device, torch.bfloat16, enabled=amp):
            logits = model(images.to(device))
            loss = F.cross_entropy(logits, labels.to(device))
        loss.backward()
        passes.append((logits.detach().float().cpu(), {n: p.grad.float().cpu() for n, p in model.named_parameters()}))
    (logits, grads), (got, got_grads) = passes
    assert (got - logits).norm() < 0.03 * logits.norm()
    for name, grad in grads.items():
        assert (got_grads[name] - grad).norm() <= 0.1 * grad.norm() + 1e-6, name


@pytest.mark.parametrize("pe", ENCODINGS)
def test_no_step_keeps_the_host_waiting(pe):
    args = train.parse_args(as_flags(SMALL | {"pe": pe, "out": "run", "jitter": 0}))
    model, data, optimizer, state = train.set_up(args)
    batches = train.train_batches(args, data, state)
    for step in range(4):
        torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
        try:
            train.train_step(args, model, next(batches), optimizer, state, 4)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(state["totals"]).all()


@pytest.mark.parametrize("dataset", ["bearing", "imagenet"])
def test_a_run_trains_resumes_and_is_evaluated(dataset):
    flags = SMALL | {"pe": "spherical-learned", "epochs": 1, "out": "run", "dataset": dataset}
    if dataset == "imagenet":
        make_imagenet("data")
        flags |= {"img-size": 32, "patch-size": 8, "workers": 2, "augment": "mix", "micro-batch": 8}
    flags = as_flags(flags)
    assert train.main(flags) == 0 and train.main([*flags, "--resume"]) == 0
    saved = weights("run")
    assert saved["step"] == (48 * 4 if dataset == "bearing" else 1)
    assert evaluate.main(["run", f"--device={DEVICE}"]) == 0
    found = json.loads(Path("run/evaluation.json").read_text())["test"]["test"]  # by a model that is not compiled
    assert found == pytest.approx(saved["log"][-1]["test_accuracy"], abs=5)


def test_lamb_steps_as_on_the_cpu():
    ends = []
    for device in "cpu", DEVICE:
        torch.manual_seed(0)
        model = small("mixed")
        optimizer = LAMB(model.to(device).parameters(), lr=1e-2, weight_decay=0.05)
        for step in range(3):
            for i, p in enumerate(model.parameters()):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(99 * step + i)).to(device)
            optimizer.step()
        ends.append([p.detach().cpu() for p in model.parameters()])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_every_part_of_the_benchmark_runs():
    sizes = {"depth": 1, "heads": 2, "img-size": 64, "patch-size": 16, "batch-size": 4, "repeats": 2, "device": DEVICE}
    parts = [part for part in benchmark.PARTS if part != "decoding"]
    assert benchmark.main([*parts, *as_flags(sizes), "--json=costs.json", "--pe", "spherical", "liere"]) == 0
    rows = json.loads(Path("costs.json").read_text())["rows"]
    assert {row["part"] for row in rows} == set(parts) and all(row["ratio"] >= 0 for row in rows)
