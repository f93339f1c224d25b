"""LAMB against the paper's algorithm 2, written out weight by weight, and against Adam where it is to be Adam."""

import io
import math

import pytest
import torch

from lab.lamb import LAMB


@pytest.fixture(autouse=True)
def float64():
    """Everything below is drawn and computed in float64, but where a test says otherwise."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Reference:
    """Algorithm 2 for one parameter, on lists of Python's floats."""

    def __init__(self, x):
        self.x, self.t = x.flatten().tolist(), 0
        self.m, self.v = [0.0] * len(self.x), [0.0] * len(self.x)

    def step(self, gradient, lr, betas, eps, weight_decay):
        self.t += 1
        update = []
        for i, g in enumerate(gradient.flatten().tolist()):
            self.m[i] = betas[0] * self.m[i] + (1 - betas[0]) * g
            self.v[i] = betas[1] * self.v[i] + (1 - betas[1]) * g**2
            m_hat, v_hat = self.m[i] / (1 - betas[0] ** self.t), self.v[i] / (1 - betas[1] ** self.t)
            update.append(m_hat / (math.sqrt(v_hat) + eps) + weight_decay * self.x[i])
        x_norm, update_norm = math.hypot(*self.x), math.hypot(*update)
        ratio = x_norm / update_norm if weight_decay and x_norm and update_norm else 1
        self.x = [x - lr * ratio * u for x, u in zip(self.x, update, strict=True)]


def parameters(*shapes):
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def set_gradients(params):
    for p in params:
        p.grad = torch.randn_like(p)


def two_groups():
    """Three parameters, and groups of them with and without decay."""
    params = parameters((4, 3), (5,), (2, 3))
    return params, [{"params": params[:2], "weight_decay": 0.05}, {"params": params[2:], "weight_decay": 0.0}]


def assert_close(p, x):
    torch.testing.assert_close(p.detach().flatten(), torch.tensor(x), rtol=1e-12, atol=0)


def test_steps_are_those_of_the_papers_algorithm():
    matrix, vector, number, free = params = parameters((4, 3), (5,), (), (2, 3))
    references = {p: Reference(p) for p in params}
    groups = [
        {"params": [matrix, vector], "weight_decay": 0.3, "lr": 0.02},
        {"params": [number], "weight_decay": 2.0, "betas": (0.5, 0.9), "eps": 0.1},
        {"params": [free], "weight_decay": 0.0, "betas": (0.7, 0.8)},
    ]
    optimizer = LAMB(groups, lr=0.1)
    for _ in range(20):
        set_gradients(params)
        for group in optimizer.param_groups:
            group["lr"] *= 1.1
            for p in group["params"]:
                references[p].step(p.grad, *(group[name] for name in ("lr", "betas", "eps", "weight_decay")))
        optimizer.step()
        for p in params:
            assert_close(p, references[p].x)


def test_defaults_are_those_of_the_recipe():
    recipe = {"lr": 4e-3, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.0}
    assert recipe.items() <= LAMB(parameters(1)).defaults.items()


def test_without_decay_it_is_adam():
    params = parameters((4, 3), (5,))
    copies = [p.detach().clone().requires_grad_() for p in params]
    lamb = LAMB(params, lr=0.01, betas=(0.8, 0.95), eps=1e-3)
    adam = torch.optim.Adam(copies, lr=0.01, betas=(0.8, 0.95), eps=1e-3, foreach=False)
    for _ in range(10):
        set_gradients(params)
        for p, copy in zip(params, copies, strict=True):
            copy.grad = p.grad.clone()
        lamb.step()
        adam.step()
    for p, copy in zip(params, copies, strict=True):
        torch.testing.assert_close(p, copy, rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", [1e-6, 1, 1e6])
def test_with_decay_a_step_is_lr_times_as_long_as_the_parameter(scale):
    params = [(scale * p.detach()).requires_grad_() for p in parameters((4, 3), (5,))]
    optimizer = LAMB(params, lr=0.01, weight_decay=0.05)
    for _ in range(5):
        set_gradients(params)
        before = [p.detach().clone() for p in params]
        optimizer.step()
        for p, old in zip(params, before, strict=True):
            torch.testing.assert_close((p.detach() - old).norm() / old.norm(), torch.tensor(0.01), rtol=1e-8, atol=0)


def test_the_scale_of_weights_and_of_gradients_does_not_matter():
    """(p, decay) -> (p / 8, 8 decay) takes all of p's path to 1/8; the gradients' scale leaves it alone if eps is 0."""
    (p,) = parameters((4, 3))
    small = (p.detach() / 8).requires_grad_()
    optimizers = LAMB([p], weight_decay=0.05, eps=0), LAMB([small], weight_decay=0.4, eps=0)
    for _ in range(5):
        set_gradients([p])
        small.grad = 1000 * p.grad
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(p, 8 * small, rtol=1e-12, atol=0)


def test_the_trust_ratio_is_1_where_a_norm_is_0():
    """Parameters of 0 leave it as Adam does; where the direction is 0, all stays, without a NaN."""
    zero, still = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    zero.grad, still.grad = torch.tensor([1.0, -2.0, 0.0]), torch.zeros(3)
    LAMB([zero, still], lr=0.1, eps=1.0, weight_decay=0.05).step()
    assert_close(zero, [-0.1 * 1 / 2, 0.1 * 2 / 3, 0.0])
    assert still.tolist() == [0, 0, 0]

    p = torch.full((3,), 0.25, requires_grad=True)
    p.grad = torch.zeros(3)
    LAMB([p], lr=0.1, weight_decay=5e-324).step()  # the decay is so small that its product with p is 0
    assert p.tolist() == [0.25] * 3


def test_a_saved_state_goes_on_to_the_very_same_weights():
    params, groups = two_groups()
    optimizer = LAMB(groups, lr=0.1)
    for _ in range(3):
        set_gradients(params)
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.03
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)

    copies = [p.detach().clone().requires_grad_() for p in params]
    loaded = LAMB([{"params": copies[:2]}, {"params": copies[2:]}])
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    for _ in range(3):
        set_gradients(params)
        for p, copy in zip(params, copies, strict=True):
            copy.grad = p.grad.clone()
        optimizer.step()
        loaded.step()
        for p, copy in zip(params, copies, strict=True):
            assert torch.equal(p, copy)


def test_a_state_moves_to_the_device_of_the_parameters_that_load_it():
    params, groups = two_groups()
    optimizer = LAMB(groups)
    set_gradients(params)
    optimizer.step()
    elsewhere = [p.detach().to("meta").requires_grad_() for p in params]
    loaded = LAMB([{"params": elsewhere[:2]}, {"params": elsewhere[2:]}])
    loaded.load_state_dict(optimizer.state_dict())
    assert {value.device.type for state in loaded.state.values() for value in state.values()} == {"meta"}


def test_no_step_waits_for_the_device():
    """A tensor on "meta" has no values: to ask for one, as .item() and `if` do, is an error."""
    params = [torch.zeros(3, device="meta", requires_grad=True) for _ in range(3)]
    set_gradients(params)
    LAMB([{"params": params[:2], "weight_decay": 0.05}, {"params": params[2:]}]).step()


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_parameters_without_gradients_stay_out_of_it(weight_decay):
    with_gradient, without = params = parameters((4, 3), (4, 3))
    before = without.detach().clone()
    optimizer = LAMB(params, weight_decay=weight_decay)
    optimizer.step()  # none has a gradient
    assert not optimizer.state
    set_gradients([with_gradient])
    optimizer.step()
    assert torch.equal(without, before)
    assert set(optimizer.state) == {with_gradient}


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_a_late_first_gradient_is_a_first_gradient(weight_decay):
    """Its bias correction counts the parameter's own gradients, not the optimizer's steps."""
    early, late = parameters((4, 3), (4, 3))
    expected = Reference(late)
    optimizer = LAMB([early, late], lr=0.1, weight_decay=weight_decay)
    for step in range(6):
        set_gradients([early, late] if step >= 3 else [early])
        if step >= 3:
            expected.step(late.grad, 0.1, (0.9, 0.999), 1e-6, weight_decay)
        optimizer.step()
    assert_close(late, expected.x)


def test_a_group_may_hold_several_dtypes():
    params = [torch.randn(50, dtype=d, requires_grad=True) for d in (torch.float32, torch.bfloat16, torch.float64)]
    before = [p.detach().clone() for p in params]
    optimizer = LAMB(params, lr=0.1, weight_decay=0.05)
    set_gradients(params)
    optimizer.step()
    for p, old, tolerance in zip(params, before, (1e-5, 0.05, 1e-12), strict=True):
        assert ((p.detach() - old).norm() / old.norm()).item() == pytest.approx(0.1, rel=tolerance)


def test_it_finds_a_minimum():
    weights, targets = parameters((4, 3), (3,)), (torch.randn(4, 3), torch.randn(3))
    groups = [{"params": [p], "weight_decay": wd} for p, wd in zip(weights, (1e-4, 0.0), strict=True)]
    optimizer = LAMB(groups, lr=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, total_iters=100)
    losses = []
    for _ in range(100):
        loss = sum(((p - target) ** 2).sum() for p, target in zip(weights, targets, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    assert losses[-1] < 1e-3 * losses[0]


def test_gradients_are_left_as_they_are():
    params, groups = two_groups()
    set_gradients(params)
    before = [p.grad.clone() for p in params]
    LAMB(groups).step()
    for p, gradient in zip(params, before, strict=True):
        assert torch.equal(p.grad, gradient)


def test_step_returns_the_closures_loss():
    (p,) = parameters((3,))
    optimizer = LAMB([p], weight_decay=0.05)
    before = p.detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == pytest.approx((before**2).sum().item())
    assert not torch.equal(p, before)
    assert optimizer.step() is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lr": -1e-3}, "lr must be at least 0, got -0.001"),
        ({"eps": -1e-8}, "eps must be at least 0, got -1e-08"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0, got -0.1"),
        ({"lr": math.nan}, "lr must be at least 0, got nan"),
        ({"betas": (1.0, 0.999)}, r"betas must be at least 0 and below 1, got \(1.0, 0.999\)"),
        ({"betas": (0.9, -0.1)}, r"betas must be at least 0 and below 1, got \(0.9, -0.1\)"),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        LAMB(parameters(1), **wrong)
