"""State to bytes and back, to the very same objects.

    state = {"model": model, "optimizer": optimizer, "step": 0, "log": [], ...}
    content = to_bytes(snapshot(state))
    give_back(state, from_bytes(content))

Saving calls state_dict() where there is one, and takes the rest as it is. Reading runs no code from the file.
"""

import io
import warnings

import torch


def to_bytes(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)  # not to disk: torch.save hides a full disk behind a RuntimeError
    return buffer.getvalue()


def from_bytes(content):
    with warnings.catch_warnings(action="ignore"):
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def unreadable(x, name="state"):
    """The name and type of the innermost part that cannot be saved and read back."""
    parts = x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list | tuple) else ()
    for key, part in parts:
        try:
            from_bytes(to_bytes(part))
        except Exception:
            return unreadable(part, f"{name}[{key!r}]")
    return f"{name}, a {type(x).__module__}.{type(x).__qualname__}"


def snapshot(x):
    """What of x is saved: its state_dict, if it has one."""
    if hasattr(x, "state_dict"):
        return x.state_dict()
    if isinstance(x, dict):
        return {name: snapshot(part) for name, part in x.items()}
    if isinstance(x, list):
        return [snapshot(part) for part in x]
    return x


@torch.no_grad()
def give_back(x, saved):
    """The inverse: restore x from its snapshot, in place wherever possible."""
    if isinstance(x, torch.optim.Optimizer):
        x.load_state_dict(saved)
        restore_moments(x, saved["state"])
    elif hasattr(x, "load_state_dict"):
        x.load_state_dict(saved)
    elif isinstance(x, torch.Tensor):
        if (x.shape, x.dtype) != (saved.shape, saved.dtype):  # it was replaced during training
            return saved.to(x.device)
        x.copy_(saved)
    elif isinstance(x, dict):
        new = {name: give_back(x[name], part) if name in x else part for name, part in saved.items()}
        x.clear()
        x.update(new)
    elif isinstance(x, list):
        x[:] = [give_back(x[i], part) if i < len(x) else part for i, part in enumerate(saved)]
    else:
        return saved
    return x


def restore_moments(optimizer, saved):
    """Give an optimizer's tensors the dtype they had, and moments the memory layout of their parameters.

    load_state_dict casts all to the parameters' dtype, and fused kernels check neither shapes nor strides. An optimizer
    does not say which tensors are moments: here, a name counts if most of its tensors have their parameter's shape.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    fused = any(group.get("fused") for group in optimizer.param_groups)
    tensors = {}  # by name: parameter, and tensor
    for i, of_p in saved.items():
        for name, x in of_p.items() if i in range(len(parameters)) else ():
            if isinstance(x, torch.Tensor):
                tensors.setdefault(name, []).append((parameters[i], x))
    for name, pairs in tensors.items():
        wrong = [x for p, x in pairs if x.shape != p.shape]
        if fused and 0 < len(wrong) < len(pairs) / 2:
            raise ValueError(f"{name} has the shape {tuple(wrong[0].shape)}, which is not its parameter's")
        for p, x in pairs:
            state = optimizer.state[p]
            if x.dtype != state[name].dtype:
                state[name] = x.to(state[name].device)
            if x.shape == p.shape and x.stride() != p.stride():
                state[name] = torch.empty_like(p, dtype=x.dtype).copy_(x)


def not_finite(model, optimizer):
    """The name of a parameter, or of its moment in the optimizer, that holds NaN or infinity; None if none does."""
    for name, p in model.named_parameters():
        tensors = {name: p} | {f"{key} of {name}": x for key, x in optimizer.state.get(p, {}).items()}
        for what, x in tensors.items():
            if isinstance(x, torch.Tensor) and x.shape == p.shape and not x.isfinite().all():
                return what
    return None
