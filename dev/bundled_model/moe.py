"""The mixture of experts and the whole language model (see model.py)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from model import Attention, Config, GatedDeltaNet, Linear, Norm
from torch import Tensor, nn


class Permute(torch.autograd.Function):
    """Rows in another order; the gradient goes back by the inverse order, without atomics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        """x: [N, D]."""
        ctx.save_for_backward(inverse, order)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """The inverse permutation."""
        inverse, _ = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


def grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x [N, in] sorted by expert, weight [E, out, in], ends [E]: each row times its expert."""
    weight = weight.to(x.dtype).transpose(1, 2)
    if x.is_cuda:
        return torch._grouped_mm(x, weight, offs=ends)
    counts = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
    return torch.cat([part @ w for part, w in zip(x.split(counts), weight, strict=True)])


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden: int, size: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = Linear(hidden, size), Linear(hidden, size)
        self.down_proj = Linear(size, hidden, 0.25)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., hidden]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """All experts of a layer, fused as Hugging Face stores them."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        e, m, h = c.num_experts, c.moe_intermediate_size, c.hidden_size
        self.gate_up_proj = nn.Parameter(torch.randn(e, 2 * m, h) * 0.5 * h**-0.5)
        self.down_proj = nn.Parameter(torch.randn(e, h, m) * 0.25 * m**-0.5)


class MoE(nn.Module):
    """Top-k routed experts and a gated shared expert; keeps its balance loss and counts."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        self.gate = Linear(c.hidden_size, c.num_experts)
        self.experts = Experts(c)
        self.shared_expert = MLP(c.hidden_size, c.shared_expert_intermediate_size)
        self.shared_expert_gate = Linear(c.hidden_size, 1)
        self.balance = torch.zeros(())
        self.counts = torch.zeros(c.num_experts)

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, hidden]."""
        c, k = self.c, self.c.num_experts_per_tok
        logits = self.gate(x.float())
        probs = logits.softmax(-1)
        top, chosen = probs.topk(k, -1)
        top = (top / top.sum(-1, keepdim=True)).to(x.dtype)
        flat = chosen.flatten()
        ranked, order = torch.sort(flat, stable=True)
        inverse = torch.empty_like(order).scatter_(
            0, order, torch.arange(len(order), device=x.device)
        )
        edges = torch.arange(1, c.num_experts + 1, device=x.device)
        ends = torch.searchsorted(ranked, edges).int()
        self.counts = torch.diff(ends, prepend=ends.new_zeros(1)).float()
        share = self.counts / len(flat)
        self.balance = c.num_experts * (share * probs.mean(0)).sum()
        self.balance = self.balance + 1e-3 * logits.logsumexp(-1).square().mean()
        rows = x.unsqueeze(1).expand(-1, k, -1).reshape(-1, c.hidden_size)
        rows = Permute.apply(rows, order, inverse)
        gate, up = grouped(rows, self.experts.gate_up_proj, ends).chunk(2, -1)
        rows = grouped(F.silu(gate) * up, self.experts.down_proj, ends)
        rows = Permute.apply(rows, inverse, order).view(-1, k, c.hidden_size)
        routed = (rows * top.unsqueeze(-1)).sum(1)
        return routed + self.shared_expert_gate(x).sigmoid() * self.shared_expert(x)


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, c: Config, index: int) -> None:
        super().__init__()
        self.linear = (index + 1) % c.full_attention_interval != 0
        if self.linear:
            self.linear_attn = GatedDeltaNet(c)
        else:
            self.self_attn = Attention(c)
        self.mlp = MoE(c)
        self.input_layernorm = Norm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = Norm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x: Tensor, starts: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
        """x: [B, T, hidden], the float32 residual."""
        y = self.input_layernorm(x, dtype)
        x = x + (self.linear_attn(y, starts) if self.linear else self.self_attn(y, mask))
        y = self.post_attention_layernorm(x, dtype)
        return x + self.mlp(y.flatten(0, 1)).view_as(y)


class LanguageModel(nn.Module):
    """Tied embeddings around the layers."""

    def __init__(self, c: Config, end_of_text: int) -> None:
        super().__init__()
        self.c, self.end_of_text = c, end_of_text
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        self.layers = nn.ModuleList(Layer(c, i) for i in range(c.num_hidden_layers))
        self.norm = Norm(c.hidden_size, c.rms_norm_eps)

    def forward(self, tokens: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """tokens: [B, T], T a multiple of 64 -> logits [B, T, vocab] in `dtype`."""
        starts = F.pad(tokens[:, :-1] == self.end_of_text, (1, 0))
        document = starts.cumsum(1)
        mask = (document[:, None, :, None] == document[:, None, None, :]).tril()
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, starts, mask, dtype)
        return F.linear(self.norm(x, dtype), self.embed_tokens.weight.to(dtype))

    def balance(self) -> Tensor:
        """Mean balance loss of the layers, 1 when every expert is used equally."""
        return torch.stack([layer.mlp.balance for layer in self.layers]).mean()


def check_against_transformers() -> None:
    """Same weights, same logits as Qwen3_5MoeForCausalLM, and documents do not see each other."""
    from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

    torch.manual_seed(0)
    config = Config(vocab_size=128, num_experts=9)
    ours = LanguageModel(config, end_of_text=0)
    for p in ours.parameters():
        p.data += 0.05 * torch.randn_like(p)
    theirs = Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**config.to_hf())).eval()
    state = {f"model.{k}": v for k, v in ours.state_dict().items()}
    missing, extra = theirs.load_state_dict(state, strict=False)
    assert missing == ["lm_head.weight"] and not extra, (missing, extra)
    theirs.tie_weights()
    tokens = torch.randint(1, 128, (2, 192))
    with torch.no_grad():
        expected = theirs(tokens).logits
        error = (ours(tokens) - expected).abs().max().item()
        split = tokens.clone()
        split[:, 63] = 0
        second = theirs(split[:, 64:]).logits[:, 8:]
        leak = (ours(split)[:, 72:] - second).abs().max().item()
    print(f"largest logit {expected.abs().max():.2f}, difference {error:.2e}, leak {leak:.2e}")
    assert error < 1e-3, f"logits differ from transformers' by {error}"


if __name__ == "__main__":
    check_against_transformers()
