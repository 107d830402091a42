"""Tiny random models of transformers' causal architectures, and how each runs: `python tests/architectures.py` writes
the tables of architectures.md."""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from grpo_cli.core.errors import CountdownError
from grpo_cli.core.model.load import fastest_path
from grpo_cli.core.model.policy import Policy, Sequences
from grpo_cli.core.rollout.engine import uniforms
from grpo_cli.core.rollout.local import LocalEngine
from grpo_cli.core.rollout.params import SamplingParams
from grpo_cli.core.rollout.selfcheck import PATHS, checked

KINDS = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
PAGE = Path(__file__).with_name("architectures.md")
START, END = "<!-- start: python tests/architectures.py -->", "<!-- end -->"
NOT_RUN = ("refused", "no tiny model")
SHORT = [[5, 9, 11, 44, 7], [8, 7, 60, 61, 3, 4, 9, 20, 21, 22, 13]]
WINDOW = 24  # longer than SHORT and its completions, shorter than LONG
LONG = [list(range(10, 42)), list(range(50, 63))]

WIDTHS = "hidden_size d_model n_embd dim_model embed_dim embedding_size attention_hidden_size"
INNER = "intermediate_size ffn_dim n_inner d_ff decoder_ffn_dim encoder_ffn_dim ffn_hidden_size"
LAYERS = (
    "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers num_encoder_layers"
)
HEADS = (
    "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads"
    " num_decoder_attention_heads num_encoder_attention_heads mamba_n_heads linear_num_value_heads"
    " num_experts num_local_experts n_routed_experts"
    " swa_num_attention_heads"
)
EIGHT = (
    "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim linear_key_head_dim linear_value_head_dim"
    " mamba_d_state state_size linear_head_dim index_head_dim swa_head_dim"
)
CONTEXTS = "max_position_embeddings n_positions max_target_positions max_seq_len context_length"
SIXTEEN = "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size q_lora_rank kv_lora_rank"
ONE = "n_shared_experts n_group topk_group first_k_dense_replace mamba_n_groups bos_token_id decoder_start_token_id"
TWO = "num_key_value_heads num_experts_per_tok top_k_experts linear_num_key_heads eos_token_id"
TWO += " linear_num_heads num_experts_per_token swa_num_key_value_heads index_n_heads num_kv_heads num_kv_shared_layers"
LIMITS = (  # lengths beyond which an architecture attends otherwise
    "sliding_window sliding_window_size window_size attention_window_size keep_window_size attention_chunk_size"
    " local_attention local_attention_window_len floor_scale log_scaling_n_floor index_topk"
)
SIZES = {32: WIDTHS, 48: INNER, 2: LAYERS + " " + TWO, 4: HEADS + " rotary_dim", 8: EIGHT, 256: CONTEXTS}
SIZES |= {
    16: SIXTEEN + " mamba_d_head",
    1: ONE,
    96: "vocab_size unpadded_vocab_size vocab_size_per_layer_input",
    64: "d_inner",
    0: "pad_token_id",
    WINDOW: LIMITS,
}
GEMMA4 = {
    "num_hidden_layers": 6,
    "head_dim": None,
    "per_layer_config": {5: {"head_dim": 16}},
    "num_kv_shared_layers": 0,
}
SPECIAL: dict[str, dict[str, Any]] = {  # None leaves a setting at its default
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "falcon": {"head_dim": None, "num_kv_heads": 4, "multi_query": False},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "moe_topk": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "gemma3n_text": {
        "intermediate_size": [48, 48],
        "activation_sparsity_pattern": [0.5, 0.0],
        "num_kv_shared_layers": 0,
    },
    "gemma4_text": GEMMA4,
    "gemma4_unified_text": GEMMA4,
    "bailing_hybrid": {"n_group": 1, "topk_group": 1},
    "dots3_note_text": {"per_layer_config": {}},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 1, "chunk_size": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"expert_ffn_hidden_size": 16, "zero_expert_num": 2, "moe_topk": 2},
    "xlm": {"emb_dim": 32, "n_words": 96},
}
TINY = {name: size for size, names in SIZES.items() for name in names.split()}
# For the tokenizer and the prompts of the tests.
TRAINABLE = TINY | dict.fromkeys([name for name, size in TINY.items() if size == 96], 832)
TRAINABLE |= dict.fromkeys([*CONTEXTS.split(), *LIMITS.split()], 1024)


@dataclass(frozen=True)
class Result:
    """How an architecture runs: its path, "refused" or "no tiny model", the largest difference from the model's own
    forward (log-probs), and the reason for refusing."""

    kind: str
    path: str
    gap: float = 0.0
    reason: str = ""


def tiny_model(kind: str, sizes: Mapping[str, int] = TINY) -> PreTrainedModel:
    """A model of the type `kind` and these sizes, its weights large enough for distributions far from uniform.

    Raises what transformers raises for configurations that no tiny model has, ValueError for models that stay large.
    """
    torch.manual_seed(1)
    config = tiny_config(CONFIG_MAPPING[kind], kind, sizes)
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


def tiny_config(cls: type[PreTrainedConfig], kind: str = "", sizes: Mapping[str, int] = TINY) -> PreTrainedConfig:
    """A config of small sizes, its text, vision and audio parts small as well."""
    defaults = cls()
    chosen: dict[str, Any] = {name: size for name, size in sizes.items() if _is_number(vars(defaults).get(name))}
    if "qk_rope_head_dim" in chosen:  # latent attention: every head has its own key
        chosen["num_key_value_heads"] = chosen["num_attention_heads"]
    if "logits_scaling" in vars(defaults):
        chosen["logits_scaling"] = 4.0
    parts = {name: getattr(defaults, name, None) for name in cls.sub_configs}
    chosen |= {name: tiny_config(type(part), sizes=sizes) for name, part in parts.items() if part is not None}
    chosen |= SPECIAL.get(kind or cls.model_type, {})
    return cls(**{name: value for name, value in chosen.items() if value is not None})


def loaded(model: PreTrainedModel) -> Policy:
    """A policy as `load` makes it."""
    return Policy(model, None, "a model", "float32", (2,), fastest_path(model))


def run(kind: str) -> Result:
    """Build a tiny model, check it, and compare longer sequences than the self-check's with the model's own forward."""
    try:
        model = tiny_model(kind)
    except Exception as error:  # what configurations raise has no common base
        return Result(kind, "no tiny model", reason=f"{type(error).__name__}: {error}".split("\n")[0][:100])
    oracle = copy.deepcopy(model)
    try:
        policy, outcome = checked(loaded(model), SHORT)
    except CountdownError as error:
        assert type(model).__name__ in error.message and "\n" not in error.message
        return Result(kind, "refused", reason=error.message.partition("cannot be used: ")[2])
    try:
        gap = largest_difference(policy, oracle, LONG)
    except CountdownError as error:
        assert "only rows of one length agree" in error.message
        gap = largest_difference(policy, oracle, SHORT)
    return Result(kind, outcome.path, gap)


def largest_difference(policy: Policy, oracle: PreTrainedModel, prompts: list[list[int]]) -> float:
    """Largest difference of sampled and trained log-probs, and of gradients relative to the largest one."""
    uniform = uniforms(1, 1, [0, 1], 3, 12)
    rollout = LocalEngine(policy).sample(prompts, SamplingParams(12, 1.3, 3), uniform=uniform)
    sequences = Sequences(prompts, rollout.completions, [0, 0, 0, 1, 1, 1])
    expected = torch.cat([
        (oracle(input_ids=torch.tensor([prompts[owner] + row]), use_cache=False).logits[0, -len(row) - 1 : -1] / 1.3)
        .float()
        .log_softmax(-1)
        .gather(-1, torch.tensor(row)[:, None])[:, 0]
        for row, owner in zip(rollout.completions, sequences.prompt_index, strict=True)
    ])  # fmt: skip
    sampled = torch.tensor([value for row in rollout.logprobs for value in row])
    logprobs = policy.logprobs(sequences, temperature=1.3)[0][sequences.mask()]
    weights = torch.linspace(-1, 1, len(expected))
    ours, theirs = (
        torch.autograd.grad((values * weights).sum(), model.get_input_embeddings().weight)[0]
        for values, model in ((logprobs, policy.model), (expected, oracle))
    )
    differences = [sampled - expected, logprobs - expected, (ours - theirs) / theirs.abs().max()]
    return max(float(difference.detach().abs().max()) for difference in differences)


def table(results: Sequence[Result]) -> str:
    """Markdown: architectures by outcome, then refusals by reason."""
    lines = ["| outcome | architectures | largest difference | |", "|---|---|---|---|"]
    for path in (*PATHS, *NOT_RUN):
        chosen = [result for result in results if result.path == path]
        if not chosen:  # unfused: CUDA alone has kernels to leave
            continue
        worst = "" if path in NOT_RUN else f"{max(result.gap for result in chosen):.0e}"
        lines.append(f"| {path} | {len(chosen)} | {worst} | {_names(chosen)} |")
    lines += ["", "| why refused | |", "|---|---|"]
    for reason in sorted({result.reason for result in results if result.path == "refused"}):
        lines.append(f"| {reason} | {_names([result for result in results if result.reason == reason])} |")
    return "\n".join(lines)


def documented() -> dict[str, str]:
    """The outcome of each architecture in architectures.md."""
    rows = [line.split("|") for line in PAGE.read_text("utf-8").splitlines() if line.startswith("|")]
    outcomes = {*PATHS, *NOT_RUN}
    return {
        kind: row[1].strip() for row in rows if row[1].strip() in outcomes for kind in re.findall("`(.+?)`", row[4])
    }


def _names(results: Sequence[Result]) -> str:
    return ", ".join(f"`{result.kind}`" for result in results)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | list) and not isinstance(value, bool)


if __name__ == "__main__":
    results = [run(kind) for kind in KINDS]
    before, _, rest = PAGE.read_text("utf-8").partition(START)
    PAGE.write_text(f"{before}{START}\n{table(results)}\n{END}{rest.partition(END)[2]}", "utf-8")
