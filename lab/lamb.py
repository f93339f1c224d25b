"""LAMB: Adam with steps proportional to the norm of the weights (You et al. 2019, algorithm 2, arXiv 1904.00962).

An Adam step changes each weight by about lr, which is little for a layer with large weights and much for one with
small weights. LAMB takes the direction u from Adam and the length from the layer. For each tensor p with gradient g:

    m = beta1 m + (1 - beta1) g        m_hat = m / (1 - beta1^t)
    v = beta2 v + (1 - beta2) g^2      v_hat = v / (1 - beta2^t)
    u = m_hat / (sqrt(v_hat) + eps) + weight_decay p
    r = |p| / |u|                      the trust ratio, of Euclidean norms; 1 where one of them is 0
    p = p - lr r u

where t counts the gradients that p has had. The length of the step is lr |p|: lr is the relative change of a tensor,
whatever its scale. This allows a high lr, which large batches need, as they leave few steps.

This is the variant that trains DeiT III (Touvron et al. 2022, arXiv 2204.07118), FusedLAMB of NVIDIA's Apex: r is 1
where weight_decay is 0, so that biases, norms and tokens get plain Adam, and the paper's bounds on |p| are left out.
Apex also clips the global gradient norm to 1: here the training loop does that.
"""

import torch
from torch.optim.adam import adam


class LAMB(torch.optim.Optimizer):
    """Used like torch's optimizers. The parameters of a group must be on one device."""

    def __init__(self, params, lr=4e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0):
        for name, value in {"lr": lr, "eps": eps, "weight_decay": weight_decay}.items():
            if not value >= 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be at least 0 and below 1, got {betas}")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        # fused: makes load_state_dict move the steps t to the parameters' device, where adam needs them
        super().__init__(params, defaults | {"fused": True})

    @torch.no_grad()
    def step(self, closure=None):
        """Update the parameters that have a gradient. Returns the closure's loss, if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if group["weight_decay"] == 0:
                self.adam_step(group, params, params, group["lr"])
            elif params:  # _foreach_mul rejects an empty list
                u = torch._foreach_mul(params, group["weight_decay"])
                self.adam_step(group, params, u, -1.0)  # adds the rest of u
                p_norm, u_norm = (torch.stack(torch._foreach_norm(tensors)) for tensors in (params, u))
                r = torch.where((p_norm > 0) & (u_norm > 0), p_norm / u_norm, 1.0)
                torch._foreach_addcmul_(params, u, r.unbind(), value=-group["lr"])
        return loss

    def adam_step(self, group, params, targets, lr):
        """targets -= lr m_hat / (sqrt(v_hat) + eps), with the moments of params, in one pass over memory."""
        for p in params:
            if not self.state[p]:
                self.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                self.state[p]["exp_avg"] = torch.zeros_like(p)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
        g = [p.grad for p in params]
        m, v, t = ([self.state[p][name] for p in params] for name in ("exp_avg", "exp_avg_sq", "step"))
        beta1, beta2 = group["betas"]
        settings = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": group["eps"], "weight_decay": 0.0}
        adam(targets, g, m, v, [], t, fused=True, amsgrad=False, maximize=False, **settings)
