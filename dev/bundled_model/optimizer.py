"""Muon for the matrices, Adam for the rest, without host synchronisation (CUDA graph safe)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

NS = (3.4445, -4.7750, 2.0315)  # quintic Newton-Schulz coefficients of the Muon optimiser


def orthogonalise(g: Tensor) -> Tensor:
    """Nearest semi-orthogonal matrices, about; g: [n, rows, columns], rows <= columns."""
    x = g.to(torch.bfloat16) if g.is_cuda else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.transpose(-1, -2)
        x = NS[0] * x + (NS[1] * gram + NS[2] * gram @ gram) @ x
    return x.float()


def as_matrices(name: str, p: Tensor) -> Tensor:
    """A parameter as [n, rows, columns] with rows <= columns (a view)."""
    if name.endswith("gate_up_proj"):
        p = p.view(-1, p.shape[1] // 2, p.shape[2])
    elif p.ndim == 2:
        p = p.unsqueeze(0)
    return p if p.shape[1] <= p.shape[2] else p.transpose(1, 2)


def is_matrix(name: str, p: Tensor) -> bool:
    """Whether Muon handles it: projections and experts, no embeddings, routers, gates, norms."""
    return name.endswith(("_proj.weight", "_proj", "in_proj_qkv.weight", "in_proj_z.weight"))


class Optimizer:
    """Both rules over one model; the learning rate is a device scalar."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        named = list(model.named_parameters())
        self.matrices = [(n, p) for n, p in named if is_matrix(n, p)]
        self.others = [p for n, p in named if not is_matrix(n, p)]
        self.lr = torch.zeros((), device=device)
        self.step_count = torch.zeros((), device=device)
        self.momentum = [torch.zeros_like(p) for _, p in self.matrices]
        self.mean = [torch.zeros_like(p) for p in self.others]
        self.square = [torch.zeros_like(p) for p in self.others]
        shapes: dict[tuple[int, int], list[int]] = {}
        for i, (n, p) in enumerate(self.matrices):
            shapes.setdefault(tuple(as_matrices(n, p).shape[1:]), []).append(i)
        self.groups = list(shapes.values())

    def state(self) -> dict[str, Any]:
        """Everything to resume from."""
        return {
            "momentum": self.momentum,
            "mean": self.mean,
            "square": self.square,
            "step": self.step_count,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Copy a saved state in place."""
        for key, own in (("momentum", self.momentum), ("mean", self.mean), ("square", self.square)):
            for target, source in zip(own, state[key], strict=True):
                target.copy_(source)
        self.step_count.copy_(state["step"])

    @torch.no_grad()
    def step(self, decay: float = 0.1) -> None:
        """One update from the .grad of all parameters, after clipping their norm to 1."""
        self.step_count += 1
        grads = [p.grad for p in self.others]
        norm = torch.stack(torch._foreach_norm(grads)).norm()
        torch._foreach_mul_(grads, 1.0 / norm.clamp(min=1.0))
        torch._foreach_lerp_(self.mean, grads, 0.1)
        torch._foreach_mul_(self.square, 0.98)
        torch._foreach_addcmul_(self.square, grads, grads, 0.02)
        one, two = 1 - 0.9**self.step_count, 1 - 0.98**self.step_count
        bottom = torch._foreach_sqrt(self.square)
        torch._foreach_mul_(bottom, two.rsqrt())
        torch._foreach_add_(bottom, 1e-10)
        update = torch._foreach_div(self.mean, bottom)
        torch._foreach_mul_(update, -self.lr / one)
        torch._foreach_add_(self.others, update)
        self.step_matrices(decay)

    def step_matrices(self, decay: float) -> None:
        """Muon: Nesterov momentum, orthogonalised, scaled to the size of an Adam update."""
        grads = [p.grad for _, p in self.matrices]
        torch._foreach_lerp_(self.momentum, grads, 0.05)
        looked = torch._foreach_lerp(grads, self.momentum, 0.95)
        for group in self.groups:
            views = [as_matrices(self.matrices[i][0], looked[i]) for i in group]
            update = orthogonalise(torch.cat(views))
            update *= 0.2 * max(update.shape[1:]) ** 0.5
            parts = update.split([len(v) for v in views])
            for i, part in zip(group, parts, strict=True):
                name, p = self.matrices[i]
                view = as_matrices(name, p.data)
                view.mul_(1 - decay * self.lr)
                view.sub_(self.lr * part)
