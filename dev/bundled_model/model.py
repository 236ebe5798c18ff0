"""A small PyTorch Qwen3.5 MoE for training: plain operations that a CUDA graph can record.

Parameter names and layouts are those of transformers' Qwen3_5MoeForCausalLM, and `python model.py`
checks that both give the same logits. Rows may hold several documents: attention is masked and
the GatedDeltaNet state is reset (a decay of e^-30) where a document starts.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RESET = -30.0  # log decay at the first token of a document
CHUNK = 64


@dataclass
class Config:
    """Sizes, under the names of the Hugging Face config."""

    vocab_size: int = 4096
    hidden_size: int = 192
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    linear_num_key_heads: int = 2
    linear_num_value_heads: int = 4
    linear_key_head_dim: int = 128
    linear_value_head_dim: int = 64
    linear_conv_kernel_dim: int = 4
    moe_intermediate_size: int = 64
    shared_expert_intermediate_size: int = 512
    num_experts: int = 100
    num_experts_per_tok: int = 4
    full_attention_interval: int = 4
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6

    def to_hf(self) -> dict[str, Any]:
        """The text config as a published checkpoint has it."""
        sizes = asdict(self)
        theta = sizes.pop("rope_theta")
        kinds = ["linear_attention"] * (self.full_attention_interval - 1) + ["full_attention"]
        return {
            **sizes,
            "model_type": "qwen3_5_moe_text",
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "attn_output_gate": True,
            "initializer_range": 0.02,
            "norm_topk_prob": True,
            "tie_word_embeddings": True,
            "max_position_embeddings": 4096,
            "router_aux_loss_coef": 0.001,
            "layer_types": kinds * (self.num_hidden_layers // self.full_attention_interval),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": theta,
                "partial_rotary_factor": 0.25,
                "mrope_interleaved": True,
                "mrope_section": [4, 2, 2],
            },
        }


class Linear(nn.Linear):
    """float32 weights, computed in the dtype of the input."""

    def __init__(self, n_in: int, n_out: int, scale: float = 0.5) -> None:
        super().__init__(n_in, n_out, bias=False)
        nn.init.normal_(self.weight, std=scale / math.sqrt(n_in))

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., n_in]."""
        return F.linear(x, self.weight.to(x.dtype))


class Norm(nn.Module):
    """RMS norm with a weight of 1 + w, from the float32 residual to `dtype`."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(size)), eps

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """x: [..., size]."""
        y = F.rms_norm(x.float(), x.shape[-1:], 1.0 + self.weight, self.eps)
        return y.to(dtype or x.dtype)


class GatedNorm(nn.Module):
    """RMS norm of x, times weight, times silu(gate)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """x, gate: [..., size]."""
        return F.rms_norm(x.float(), x.shape[-1:], self.weight, self.eps) * F.silu(gate.float())


class UnitLowerInverse(torch.autograd.Function):
    """inverse(I + A) for strictly lower triangular A [..., CHUNK, CHUNK], by matmuls alone.

    Diagonal blocks of 16 by the product (I - A)(I + A^2)(I + A^4)(I + A^8), then merged twice.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        """Blockwise inverse."""
        n, size = a.shape[-1], 16
        blocks = a.unflatten(-2, (n // size, size)).unflatten(-1, (n // size, size))
        diagonal = -torch.diagonal(blocks, dim1=-4, dim2=-2).movedim(-1, -3)
        eye = torch.eye(size, device=a.device, dtype=a.dtype)
        inverse, power = eye + diagonal, diagonal
        for _ in range(3):
            power = power @ power
            inverse = inverse + inverse @ power
        while size < n:
            pairs = a.unflatten(-2, (-1, 2 * size)).unflatten(-1, (n // (2 * size), 2 * size))
            corner = torch.diagonal(pairs, dim1=-4, dim2=-2).movedim(-1, -3)[..., size:, :size]
            top, bottom = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
            merged = torch.zeros(*top.shape[:-2], 2 * size, 2 * size, device=a.device)
            merged[..., :size, :size], merged[..., size:, size:] = top, bottom
            merged[..., size:, :size] = -(bottom @ corner @ top)
            inverse, size = merged, 2 * size
        inverse = inverse.squeeze(-3)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """d inverse = -inverse dA inverse."""
        (inverse,) = ctx.saved_tensors
        turned = inverse.transpose(-1, -2)
        return -(turned @ grad @ turned).tril(-1)


def delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Chunked gated delta rule in float32.

    q, k: [B, H, T, Dk] (normalised, q scaled); v: [B, H, T, Dv]; g (log decay), beta: [B, H, T].
    """
    length = q.shape[2]
    q, k, v = (x.unflatten(2, (-1, CHUNK)) for x in (q, k, v))
    g, beta = (x.unflatten(2, (-1, CHUNK)) for x in (g, beta))
    total = g.cumsum(-1)
    keep = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).tril()
    decay = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(~keep, -1e4).exp()
    k_beta = k * beta.unsqueeze(-1)
    solve = UnitLowerInverse.apply(((k_beta @ k.transpose(-1, -2)) * decay).tril(-1))
    new_v = solve @ (v * beta.unsqueeze(-1))
    read = solve @ (k_beta * total.exp().unsqueeze(-1))
    within = (q @ k.transpose(-1, -2)) * decay
    q = q * total.exp().unsqueeze(-1)
    write = (k * (total[..., -1:] - total).exp().unsqueeze(-1)).transpose(-1, -2)
    fade = total[..., -1].exp()[..., None, None]
    state = torch.zeros(*k.shape[:2], k.shape[-1], v.shape[-1], device=q.device)
    out = []
    for i in range(length // CHUNK):
        fresh = new_v[:, :, i] - read[:, :, i] @ state
        out.append(q[:, :, i] @ state + within[:, :, i] @ fresh)
        state = state * fade[:, :, i] + write[:, :, i] @ fresh
    return torch.cat(out, dim=2)


class GatedDeltaNet(nn.Module):
    """Linear attention with a decaying state, a short convolution and an output gate."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        self.key, self.value = (
            c.linear_num_key_heads * c.linear_key_head_dim,
            c.linear_num_value_heads * c.linear_value_head_dim,
        )
        channels, heads = 2 * self.key + self.value, c.linear_num_value_heads
        self.in_proj_qkv = Linear(c.hidden_size, channels)
        self.in_proj_z = Linear(c.hidden_size, self.value)
        self.in_proj_b, self.in_proj_a = Linear(c.hidden_size, heads), Linear(c.hidden_size, heads)
        self.conv1d = nn.Conv1d(
            channels, channels, c.linear_conv_kernel_dim, groups=channels, bias=False
        )
        step = torch.exp(torch.linspace(math.log(1e-3), math.log(1e-1), heads))
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))
        self.A_log = nn.Parameter(torch.log(torch.linspace(1, 8, heads)))
        self.norm = GatedNorm(c.linear_value_head_dim, c.rms_norm_eps)
        self.out_proj = Linear(self.value, c.hidden_size, 0.25)

    def convolve(self, x: Tensor, starts: Tensor) -> Tensor:
        """Causal depthwise convolution over time that stops where a document starts."""
        weight = self.conv1d.weight.to(x.dtype).squeeze(1)
        document = starts.cumsum(1)
        out = x * weight[:, -1]
        for back in range(1, weight.shape[1]):
            same = (document[:, back:] == document[:, :-back]).unsqueeze(-1)
            earlier = F.pad(x[:, :-back] * same, (0, 0, back, 0))
            out = out + earlier * weight[:, -1 - back]
        return F.silu(out)

    def forward(self, x: Tensor, starts: Tensor) -> Tensor:
        """x: [B, T, hidden]; starts: [B, T], True at the first token of a document."""
        c, (b, t, _) = self.c, x.shape
        mixed = self.convolve(self.in_proj_qkv(x), starts).float()
        q, k, v = mixed.split([self.key, self.key, self.value], -1)
        q, k = (y.view(b, t, c.linear_num_key_heads, -1).transpose(1, 2) for y in (q, k))
        v = v.view(b, t, c.linear_num_value_heads, -1).transpose(1, 2)
        q, k = (y * torch.rsqrt((y * y).sum(-1, keepdim=True) + 1e-6) for y in (q, k))
        repeat = c.linear_num_value_heads // c.linear_num_key_heads
        q, k = (y.repeat_interleave(repeat, 1) for y in (q * c.linear_key_head_dim**-0.5, k))
        beta = self.in_proj_b(x).float().sigmoid().transpose(1, 2)
        g = -self.A_log.exp() * F.softplus(self.in_proj_a(x).float() + self.dt_bias)
        g = g.masked_fill(starts.unsqueeze(-1), RESET).transpose(1, 2)
        out = delta_rule(q, k, v, g, beta).transpose(1, 2)
        out = self.norm(out, self.in_proj_z(x).view(b, t, c.linear_num_value_heads, -1))
        return self.out_proj(out.reshape(b, t, -1).to(x.dtype))


class Attention(nn.Module):
    """Grouped-query attention with q/k norm, partial rotary embedding and an output gate."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        self.q_proj = Linear(c.hidden_size, 2 * c.num_attention_heads * c.head_dim)
        self.k_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim)
        self.v_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim)
        self.o_proj = Linear(c.num_attention_heads * c.head_dim, c.hidden_size, 0.25)
        self.q_norm, self.k_norm = (Norm(c.head_dim, c.rms_norm_eps) for _ in "qk")

    def rotate(self, x: Tensor) -> Tensor:
        """Rotary embedding on the first quarter of each head; x: [B, H, T, D]."""
        size = x.shape[-1] // 4
        speed = self.c.rope_theta ** (-torch.arange(0, size, 2, device=x.device) / size)
        angle = torch.arange(x.shape[2], device=x.device)[:, None] * speed
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        a, b, rest = x.split([size // 2, size // 2, x.shape[-1] - size], -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x: [B, T, hidden]; mask: [B, 1, T, T], True where a query may look."""
        c, (b, t, _) = self.c, x.shape
        q, gate = self.q_proj(x).view(b, t, c.num_attention_heads, -1).chunk(2, -1)
        k, v = (p(x).view(b, t, c.num_key_value_heads, -1) for p in (self.k_proj, self.v_proj))
        q, k = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2)
        groups = c.num_attention_heads // c.num_key_value_heads
        k, v = (y.repeat_interleave(groups, 1) for y in (self.rotate(k), v.transpose(1, 2)))
        out = F.scaled_dot_product_attention(self.rotate(q), k, v, attn_mask=mask)
        return self.o_proj((out.transpose(1, 2) * gate.sigmoid()).reshape(b, t, -1))
