"""Tiny random models of the causal architectures that transformers has."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

WIDTHS = "hidden_size d_model n_embd dim_model embed_dim embedding_size attention_hidden_size"
INNER = "intermediate_size ffn_dim n_inner d_ff decoder_ffn_dim encoder_ffn_dim ffn_hidden_size"
LAYERS = (
    "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers num_encoder_layers"
)
HEADS = (
    "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads"
    " num_decoder_attention_heads num_encoder_attention_heads mamba_n_heads linear_num_value_heads"
    " num_experts num_local_experts n_routed_experts"
)
EIGHT = (
    "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim linear_key_head_dim linear_value_head_dim"
    " mamba_d_state state_size"
)
CONTEXTS = "max_position_embeddings n_positions max_target_positions max_seq_len context_length"
SIXTEEN = "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size q_lora_rank kv_lora_rank"
ONE = "n_shared_experts n_group topk_group first_k_dense_replace mamba_n_groups bos_token_id decoder_start_token_id"
TWO = "num_key_value_heads num_experts_per_tok top_k_experts linear_num_key_heads eos_token_id"
SIZES = {32: WIDTHS, 48: INNER, 2: LAYERS + " " + TWO, 4: HEADS + " rotary_dim", 8: EIGHT, 256: CONTEXTS}
SIZES |= {16: SIXTEEN + " mamba_d_head", 1: ONE, 96: "vocab_size", 64: "d_inner", 0: "pad_token_id"}
TINY = {name: size for size, names in SIZES.items() for name in names.split()}


def tiny_model(kind: str) -> PreTrainedModel:
    """A model of the type `kind`, its weights large enough for distributions far from uniform.

    Raises what transformers raises for configurations that no tiny model has, ValueError for models that stay large.
    """
    cls = CONFIG_MAPPING[kind]
    defaults = cls()
    chosen: dict[str, Any] = {name: size for name, size in TINY.items() if _is_number(getattr(defaults, name, None))}
    if "qk_rope_head_dim" in chosen:  # latent attention: every head has its own key
        chosen["num_key_value_heads"] = chosen["num_attention_heads"]
    config = cls(**chosen, **({"logits_scaling": 4.0} if hasattr(defaults, "logits_scaling") else {}))
    with torch.device("meta"):
        size = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
    if size > 15_000_000:
        raise ValueError(f"{size:,} weights")
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.25)
    return model


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | list) and not isinstance(value, bool)
