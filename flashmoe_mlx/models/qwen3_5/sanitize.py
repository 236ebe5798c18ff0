"""Convert checkpoint tensors of every published layout to the model's names and shapes."""

import mlx.core as mx

from ...custom_kernels.device import activation_dtype
from ...errors import FlashMoEError
from ...format.names import canonical, fused_expert, is_expert, layer_prefix, single_expert
from .args import ModelArgs

_SHIFTED_NORMS = (
    ".input_layernorm.weight",
    ".post_attention_layernorm.weight",
    ".model.norm.weight",
    ".q_norm.weight",
    ".k_norm.weight",
)


def sanitize(
    weights: dict[str, mx.array], args: ModelArgs, *, streamed: bool
) -> dict[str, mx.array]:
    """Rename, reshape and drop tensors so that strict loading succeeds.

    Args:
        weights: lazily loaded tensors, under the checkpoint's names.
        args: the architecture.
        streamed: drop the routed experts unread, and on a CPU use float32 activations, because
            MLX's CPU back-end is slow and inexact in bfloat16.
    """
    names = {key: name for key in weights if (name := canonical(key))}
    if args.tie_word_embeddings:
        names = {k: n for k, n in names.items() if not n.startswith("language_model.lm_head.")}
    trunk = {name: weights[key] for key, name in names.items() if not is_expert(key)}
    _from_hugging_face(trunk)
    if not streamed:
        return trunk | _experts({key: weights[key] for key in names if is_expert(key)}, args)
    for name, tensor in trunk.items():
        # A linear layer's scales are widened exactly in use; an embedding's would give bfloat16
        # activations.
        kept = name.endswith((".scales", ".biases")) and ".embed_tokens." not in name
        if mx.issubdtype(tensor.dtype, mx.floating) and not kept:
            trunk[name] = tensor.astype(activation_dtype(tensor.dtype))
    return trunk


def _from_hugging_face(trunk: dict[str, mx.array]) -> None:
    """Undo transformers' conventions: conv1d `[C, 1, 4]`, and norms that store w for 1 + w."""
    convs = {n for n, t in trunk.items() if n.endswith("conv1d.weight") and t.shape[-1] != 1}
    for name in convs:
        trunk[name] = trunk[name].moveaxis(2, 1)
    if convs:
        for name in trunk:
            if name.endswith(_SHIFTED_NORMS):
                trunk[name] = trunk[name] + 1.0


def _experts(weights: dict[str, mx.array], args: ModelArgs) -> dict[str, mx.array]:
    """Stack experts into `switch_mlp` tensors `[experts, out, in]`."""
    stacked: dict[str, mx.array] = {}
    single: dict[tuple[int, str], dict[int, mx.array]] = {}
    for key, tensor in weights.items():
        if found := single_expert(key):
            layer, expert, projection = found
            single.setdefault((layer, projection), {})[expert] = tensor
        elif fused := fused_expert(key):
            prefix = f"{layer_prefix(fused[0])}.mlp.switch_mlp"
            if fused[1] == "gate_up_proj":
                gate, up = mx.split(tensor, 2, axis=-2)
                stacked[f"{prefix}.gate_proj.weight"] = gate
                stacked[f"{prefix}.up_proj.weight"] = up
            else:
                stacked[f"{prefix}.down_proj.weight"] = tensor
        else:
            stacked[str(canonical(key))] = tensor
    for (layer, projection), experts in single.items():
        if absent := [e for e in range(args.num_experts) if e not in experts]:
            raise FlashMoEError(
                f"checkpoint: layer {layer} {projection} has no expert {absent[0]} "
                f"({len(absent)} of {args.num_experts} missing). Download it again."
            )
        name = f"{layer_prefix(layer)}.mlp.switch_mlp.{projection}.weight"
        stacked[name] = mx.stack([experts[e] for e in range(args.num_experts)])
    return stacked
