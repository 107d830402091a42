"""Suggest a setting for an unknown name: synonyms of other tools first, then similar spelling."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

# Names in TRL, verl, unsloth and torch's habits, by the setting that they mean here.
_OTHERS = {
    "adapter": "lora",
    "batch_size": "bs batch train_batch_size per_device_train_batch_size prompts_per_step",
    "beta": "kl kl_coef kl_coeff kl_beta kl_loss_coef kl_penalty",
    "clip_grad_norm": "max_grad_norm grad_clip gradient_clipping max_norm",
    "correct_reward": "accuracy_reward",
    "device": "gpu cuda cpu use_cpu no_cuda",
    "epsilon": "eps clip clip_range cliprange clip_ratio clip_eps",
    "epsilon_high": "clip_ratio_high cliprange_high",
    "eval_every": "eval_steps eval_interval test_freq",
    "eval_puzzles": "eval_limit limit",
    "eval_suite": "suite",
    "gradient_checkpointing": "use_gradient_checkpointing activation_checkpointing",
    "keep_last": "save_total_limit",
    "learning_rate": "lr",
    "limit": "eval_puzzles max_samples n_puzzles num_puzzles count",
    "lora_alpha": "alpha",
    "lora_rank": "lora lora_r r rank",
    "lora_targets": "target_modules lora_target_modules",
    "loss_type": "loss algorithm",
    "max_new_tokens": "max_tokens max_length max_completion_length max_response_length response_length",
    "micro_batch_size": "ppo_micro_batch_size mini_batch_size",
    "model": "model_name model_name_or_path model_path base_model",
    "num_generations": "group_size n num_samples num_return_sequences rollout_n",
    "num_inner_updates": "ppo_epochs inner_epochs mu",
    "num_iterations": "epochs epoch steps max_steps total_steps num_steps num_epochs num_train_epochs iterations iters",
    "optimizer": "optim",
    "out": "output output_file",
    "precision": "dtype torch_dtype bf16 fp16 fp32",
    "puzzles": "data dataset train_file train_files data_path",
    "quantize": "load_in_4bit load_in_8bit qlora nf4",
    "resume": "resume_from_checkpoint continue",
    "reward": "reward_funcs reward_fn reward_function",
    "prompt_style": "style",
    "run": "run_name output_dir experiment_name name",
    "samples": "k pass_k",
    "save_every": "save_steps save_freq save_interval",
    "scale_rewards": "whiten_rewards norm_adv",
    "schedule": "lr_scheduler lr_scheduler_type lr_schedule scheduler",
    "seed": "random_seed",
    "style": "prompt_style",
    "suite": "eval_suite",
    "temperature": "temp",
    "tracker": "report_to logger wandb use_wandb",
    "warm_start": "sft",
    "warmup_steps": "warmup lr_warmup_steps",
    "weight_decay": "wd",
}
_MEANT = {other: name for name, others in _OTHERS.items() for other in others.split()}
_CLOSE = 0.7  # similarity from which spelling is a suggestion


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The one of `known` that `name` probably means, if any; the first one if several tables have it.

    Names are options (`--batch-size`), keys (`train.batch_size`), or keys without their table.
    """
    settings = list(known)
    table, _, bare = _plain(name).rpartition(".")
    meant = bare if bare in map(_bare, settings) else _MEANT.get(bare, bare)
    same = [one for one in settings if _bare(one) == meant]
    if same:
        return next((one for one in same if _plain(one) == f"{table}.{meant}"), same[0])
    spelled = map(_plain if table else _bare, settings)
    close = get_close_matches(_plain(name), spelled, n=1, cutoff=_CLOSE)
    return nearest(close[0], settings) if close else None


def _bare(name: str) -> str:
    return _plain(name).rpartition(".")[2]


def _plain(name: str) -> str:
    return name.lstrip("-").lower().replace("-", "_")
