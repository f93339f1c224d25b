"""LAMB against the paper's algorithm 2, written out weight by weight; without weight decay it is Adam."""

import io
import math
import re

import pytest
import torch

from lab.lamb import LAMB

pytestmark = pytest.mark.usefixtures("float64")


class Reference:
    """Algorithm 2 for one parameter, on lists of Python floats, with the defaults of DeiT III's optimizer."""

    def __init__(self, x):
        self.x, self.t = x.flatten().tolist(), 0
        self.m, self.v = [0.0] * len(self.x), [0.0] * len(self.x)

    def step(self, gradient, lr=4e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0):
        self.t += 1
        update = []
        for i, g in enumerate(gradient.flatten().tolist()):
            self.m[i] = betas[0] * self.m[i] + (1 - betas[0]) * g
            self.v[i] = betas[1] * self.v[i] + (1 - betas[1]) * g**2
            m_hat, v_hat = self.m[i] / (1 - betas[0] ** self.t), self.v[i] / (1 - betas[1] ** self.t)
            update.append(m_hat / (math.sqrt(v_hat) + eps) + weight_decay * self.x[i])
        x_norm, update_norm = math.hypot(*self.x), math.hypot(*update)
        ratio = x_norm / update_norm if weight_decay and x_norm and update_norm else 1  # Adam's
        self.x = [x - lr * ratio * u for x, u in zip(self.x, update, strict=True)]


def parameters(*shapes):
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def set_gradients(*models):
    """The same for the parameters of each model."""
    for same in zip(*models, strict=True):
        gradient = torch.randn(same[0].shape)
        for p in same:
            p.grad = gradient.to(p, copy=True)


def test_steps_are_those_of_the_papers_algorithm():
    """Every parameter misses some gradients, including the first; t counts the gradients it has had."""
    tensors = [parameters((4, 3), (5,)), parameters((2, 3)), parameters(()), parameters((3,))]
    settings = [
        {"lr": 0.02, "weight_decay": 0.3},
        {"lr": 0.03, "weight_decay": 2.0, "betas": (0.5, 0.9), "eps": 0.1},
        {"lr": 0.04, "betas": (0.7, 0.8)},
        {},
    ]
    optimizer = LAMB([{"params": params} | given for params, given in zip(tensors, settings, strict=True)])
    references = {p: Reference(p) for params in tensors for p in params}
    for step in range(20):
        for group, given in zip(optimizer.param_groups, settings, strict=True):
            if "lr" in given:  # as a schedule does
                group["lr"] = given["lr"] = 1.1 * given["lr"]
            for p in group["params"]:
                p.grad = torch.randn_like(p) if step and torch.rand(()) < 0.7 else None
                if p.grad is not None:
                    references[p].step(p.grad, **given)
        optimizer.step()
        for p, reference in references.items():
            assert p.flatten().tolist() == pytest.approx(reference.x, rel=1e-12, abs=0)


@pytest.mark.parametrize("scale", [1e-6, 1, 1e6])
def test_with_decay_a_step_is_lr_times_as_long_as_the_parameter(scale):
    """In a group of several dtypes. Rounding p adds up to eps / 2 of its norm; u and r, a few eps of the step's."""
    lr, dtypes = 0.1, (torch.float32, torch.bfloat16, torch.float64)
    params = [(scale * torch.randn(50)).to(dtype).requires_grad_() for dtype in dtypes]
    optimizer = LAMB(params, lr=lr, weight_decay=0.05)
    for _ in range(3):
        set_gradients(params)
        before = [(p.detach().to(torch.float64, copy=True), p.grad.clone()) for p in params]
        optimizer.step()
        for p, (old, gradient) in zip(params, before, strict=True):
            length = ((p.detach().double() - old).norm() / old.norm()).item()
            assert length == pytest.approx(lr, rel=2 * torch.finfo(p.dtype).eps / lr)
            assert torch.equal(p.grad, gradient)


@pytest.mark.parametrize("x, gradient, decay, after", [(0, 1, 0.05, -0.05), (0, 0, 0.05, 0), (0.25, 0, 5e-324, 0.25)])
def test_the_trust_ratio_is_1_where_a_norm_is_0(x, gradient, decay, after):
    """A parameter of 0 takes Adam's step. Without a gradient, or with a decay that underflows, it stays."""
    p = torch.full((3,), float(x), requires_grad=True)
    p.grad = torch.full((3,), float(gradient))
    LAMB([p], lr=0.1, eps=1.0, weight_decay=decay).step()
    assert p.tolist() == pytest.approx([after] * 3, rel=1e-12)


def test_a_loaded_state_continues_with_the_very_same_weights():
    params, buffer = parameters((4, 3), (5,)), io.BytesIO()
    optimizer = LAMB(params, weight_decay=0.05)
    for _ in range(3):
        set_gradients(params)
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.03
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    copies = [p.detach().clone().requires_grad_() for p in params]
    loaded = LAMB(copies)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    for _ in range(3):
        set_gradients(params, copies)
        optimizer.step()
        loaded.step()
    assert all(torch.equal(p, copy) for p, copy in zip(params, copies, strict=True))


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_a_state_loads_onto_another_device_and_no_step_waits_for_it(weight_decay):
    """A tensor on "meta" has no values: reading one, as .item() and `if` do, is an error."""
    params = parameters((4, 3), (5,))
    elsewhere = [p.detach().to("meta").requires_grad_() for p in params]
    optimizer, loaded = LAMB(params, weight_decay=weight_decay), LAMB(elsewhere, weight_decay=weight_decay)
    set_gradients(params, elsewhere)
    loaded.step()
    optimizer.step()
    loaded.load_state_dict(optimizer.state_dict())
    loaded.step()
    assert all(x.is_meta for state in loaded.state_dict()["state"].values() for x in state.values())


def test_a_closure_and_a_schedule_lead_to_a_minimum():
    (p,), target = parameters((4, 3)), torch.randn(4, 3)
    optimizer = LAMB([p], lr=0.1, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, total_iters=100)

    def closure():
        optimizer.zero_grad()
        loss = ((p - target) ** 2).sum()
        loss.backward()
        return loss

    losses = []
    for _ in range(100):
        losses.append(optimizer.step(closure).item())
        schedule.step()
    assert losses[-1] < 1e-3 * losses[0] and optimizer.step() is None


@pytest.mark.parametrize(
    "name, value",
    [("lr", -1e-3), ("lr", math.nan), ("eps", -1e-8), ("weight_decay", -0.1), ("betas", (1, 0.9)), ("betas", (0, -1))],
)
def test_wrong_settings_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be at least 0.* got {re.escape(str(value))}$"):
        LAMB(parameters(1), **{name: value})
