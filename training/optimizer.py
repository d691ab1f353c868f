"""Muon for the matrices, AdamW for the rest. Learning rates are device tensors, so that a step can live in a graph.

Shapes: n matrices of the same shape [r, c] are orthogonalised together.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

ADAM_PARTS = ("embed_tokens", "in_proj_a", "in_proj_b", "conv1d", "A_log", "dt_bias", "norm", "mlp.gate.",
              "shared_expert_gate")


def orthogonalise(g_nrc: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration towards the nearest semi-orthogonal matrix, in bfloat16."""
    x = g_nrc.bfloat16()
    wide = x.shape[-2] > x.shape[-1]
    x = x.mT if wide else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if wide else x


class Optimizer:
    def __init__(self, model: nn.Module, muon_lr: float, adam_lr: float, decay: float, device: str) -> None:
        self.base = (muon_lr, adam_lr)
        self.muon_lr, self.adam_lr = (torch.zeros((), device=device) for _ in range(2))
        self.decay = decay
        self.groups: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
        rest = []
        for name, p in model.named_parameters():
            if any(part in name for part in ADAM_PARTS):
                rest.append(p)
                continue
            r, c = p.shape[-2:]
            if "in_proj_qkv" in name:
                r //= 3
            elif "gate_up_proj" in name:
                r //= 2
            self.groups[(r, c)].append((p, torch.zeros_like(p)))
        cuda = device == "cuda"
        self.adam = torch.optim.AdamW(rest, lr=self.adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=cuda,
                                      capturable=cuda)

    def set_rate(self, scale: float) -> None:
        self.muon_lr.fill_(self.base[0] * scale)
        self.adam_lr.fill_(self.base[1] * scale)

    @torch.no_grad()
    def step(self) -> None:
        self.adam.step()
        for (r, c), group in self.groups.items():
            grads = [p.grad for p, _ in group]
            buffers = [b for _, b in group]
            torch._foreach_lerp_(buffers, grads, 0.05)
            ahead = torch._foreach_lerp(grads, buffers, 0.95)
            update = orthogonalise(torch.cat([u.view(-1, r, c) for u in ahead])).float() * max(1.0, r / c) ** 0.5
            sizes = [p.numel() // (r * c) for p, _ in group]
            for (p, _), u in zip(group, update.split(sizes), strict=True):
                p.mul_(1 - self.muon_lr * self.decay).sub_(u.reshape(p.shape) * self.muon_lr)

    def zero_grad(self) -> None:
        for p in [p for group in self.groups.values() for p, _ in group] + self.adam.param_groups[0]["params"]:
            p.grad = None
