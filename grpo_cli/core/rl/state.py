"""The state of a training: the contents of a checkpoint, how it is restored, and the hashes of a run's origin.

Puzzles and random numbers are functions of (seed, step), so a checkpoint and the settings are all that resuming needs.
"""

from __future__ import annotations

import logging
import math
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from grpo_cli.core import fsdp
from grpo_cli.core.config.settings import Settings, digest
from grpo_cli.core.errors import CountdownError
from grpo_cli.core.model import lora
from grpo_cli.core.model.master_weights import MasterWeights
from grpo_cli.core.model.policy import Policy
from grpo_cli.core.perf.utilization import peak_tflops
from grpo_cli.core.run.folder import Run, require_space


@dataclass
class Progress:
    """How far a training is. `unlogged`: metrics of `step` that wait for an evaluation that was interrupted."""

    step: int = 0
    unlogged: dict[str, float] | None = None
    base_accuracy: float | None = None  # of the starting model, greedy on val
    best_score: float | None = None  # dev accuracy of the best model
    best_accuracy: float | None = None  # its val accuracy
    best_step: int = 0
    waited: int = 0  # evaluations since the best
    bad_steps: int = 0  # skipped steps: loss or gradient not finite
    bad_in_a_row: int = 0


@dataclass
class State:
    """What a checkpoint holds: weights, moments and progress; with the settings, all that resuming needs."""

    policy: Policy
    optimizer: torch.optim.Optimizer
    learner: Policy  # is trained: the policy itself, or its sharded version, of which `policy` is then a full copy
    progress: Progress = field(default_factory=Progress)
    resumed_from: int | None = None

    def save_shards(self, run: Run) -> None:
        """Write this rank's sharded weights and moments to the folder that `save` collects."""
        if self.learner.is_sharded:
            fsdp.save_shards(run.shards_path, self.learner.model, self.optimizer)

    def save(self, run: Run, settings: Settings) -> None:
        """Write a checkpoint of this step atomically, and remove old ones.

        Raises CountdownError if it cannot be written; earlier checkpoints stay intact.
        """
        require_space(run.path, self.checkpoint_bytes())
        facts = {
            "step": self.progress.step,
            "config": digest(settings),
            "model": type(self.policy.model).__name__,
            "optimizer": type(getattr(self.optimizer, "inner", self.optimizer)).__name__,
            "torch": torch.__version__,
            "transformers": version("transformers"),
        }
        if facts["optimizer"] == "AdamW8bit":
            facts["bitsandbytes"] = version("bitsandbytes")
        with self.reported(run), run.saving(run.checkpoint_path(self.progress.step), facts) as folder:
            if self.policy.adapter:
                lora.save_adapter(self.policy.model, folder / "model")
            else:
                self.policy.save(folder / "model")
            state: dict[str, Any] = {"progress": asdict(self.progress)}
            if self.learner.is_sharded:
                run.shards_path.rename(folder / "shards")
            else:
                state["optimizer"] = self.optimizer.state_dict()
            torch.save(state, folder / "state.pt")
        run.prune_checkpoints(settings.train.keep_last, also=self.resumed_from)

    def save_best(self, run: Run) -> None:
        """Save the current model as the run's best; raises as `save` does."""
        with self.reported(run), run.saving(run.model_path) as folder:
            self.policy.save(folder)
        if self.policy.adapter:
            with self.reported(run), run.saving(run.adapter_path) as folder:
                lora.save_adapter(self.policy.model, folder)
                self.policy.tokenizer.save_pretrained(folder)

    @contextmanager
    def reported(self, run: Run) -> Iterator[None]:
        """Turn the libraries' errors on a full disk into one sentence."""
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            raise CountdownError(
                f"cannot save step {self.progress.step} in `{run.path}`: {' '.join(str(error).split())}",
                f"free some space, then continue with `--resume`; checkpoints: {run.saved_steps}",
                exit_code=1,
            ) from error

    def checkpoint_bytes(self) -> int:
        """Approximate size of a checkpoint: weights, two moments each, and masters if there are any."""
        weights: int = sum(3 * weight.numel() * weight.element_size() for weight in self.policy.trainable)
        masters = self.optimizer.masters if isinstance(self.optimizer, MasterWeights) else []
        return weights + sum(master.numel() * master.element_size() for master in masters)

    def restore(self, folder: Path) -> None:
        """Load the state of a checkpoint whose model is already loaded."""
        if self.policy.adapter:
            lora.load_adapter(self.policy.model, folder / "model")
        self.progress = self._restore_moments(folder)
        self.resumed_from = self.progress.step

    @torch.no_grad()
    def fall_back(self, folder: Path) -> None:
        """Restore weights and optimizer of a checkpoint, but keep the progress. Not for sharded weights."""
        if self.policy.adapter:
            lora.load_adapter(self.policy.model, folder / "model")
        else:
            saved = _weights(folder / "model")
            for name, weight in self.policy.model.named_parameters():
                weight.copy_(saved[name])
        self._restore_moments(folder)

    def _restore_moments(self, folder: Path) -> Progress:
        # Load to the host: the optimizer moves its state, so a GPU never holds it twice.
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        if "optimizer" not in state:
            fsdp.load_shards(folder / "shards", self.learner.model, self.optimizer)
        elif self.learner.is_sharded:
            fsdp.spread(self.learner.model, self.optimizer, state["optimizer"])
        else:
            self._restore_optimizer(state["optimizer"], folder / "model")
        return Progress(**state["progress"])

    @torch.no_grad()
    def _restore_optimizer(self, state: dict[str, Any], model: Path) -> None:
        """Float32 weights and float32 masters are interchangeable, so a run can resume on another device."""
        if isinstance(self.optimizer, MasterWeights) and "masters" not in state:
            saved = _weights(model)
            state = {"masters": [saved[name] for name, _ in self.policy.model.named_parameters()], "inner": state}
        elif not isinstance(self.optimizer, MasterWeights) and "masters" in state:
            for weight, master in zip(self.policy.model.parameters(), state["masters"], strict=True):
                weight.copy_(master)
            state = state["inner"]
        self.optimizer.load_state_dict(state)


def _weights(model: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in model.glob("*.safetensors") for name, tensor in load_file(path).items()}


def choose_optimizer(name: str, device: torch.device) -> str:
    """The optimizer for `name`; "auto" is 8-bit on CUDA."""
    if name == "adamw8bit" and device.type == "mps":
        raise CountdownError("`adamw8bit` does not run on MPS", "use `--optimizer adamw`")
    return name if name != "auto" else "adamw8bit" if device.type == "cuda" else "adamw"


def build_optimizer(policy: Policy, *, name: str, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW of torch, or of bitsandbytes with 8-bit state. The learning rate is set per step."""

    def build(weights: Iterable[torch.Tensor]) -> torch.optim.Optimizer:
        if choose_optimizer(name, policy.device) == "adamw8bit":
            logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # silences warnings about unused 4-bit kernels
            import bitsandbytes  # imported late: searches for native kernels

            return _without_waits(bitsandbytes.optim.AdamW8bit(weights, weight_decay=weight_decay))
        return torch.optim.AdamW(weights, weight_decay=weight_decay)

    weights = policy.trainable
    return MasterWeights(weights, build) if policy.has_masters else build(weights)


def _without_waits(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """An optimizer of bitsandbytes that does not wait for the GPU after each weight.

    Its kernels run on torch's stream, which orders them. Only paged optimizers need the wait.
    """
    module = import_module("bitsandbytes.optim.optimizer")
    wait = module.sync_gpu
    optimizer.register_step_pre_hook(lambda *_: setattr(module, "sync_gpu", lambda _: None))
    optimizer.register_step_post_hook(lambda *_: setattr(module, "sync_gpu", wait))
    return optimizer


def settled(settings: Settings, policy: Policy) -> Settings:
    """The settings with `auto` resolved, so a run resumes the same way on another machine."""
    optimizer = choose_optimizer(settings.train.optimizer, policy.device)
    model = settings.model.model_copy(update={"precision": policy.precision})
    train = settings.train.model_copy(update={"optimizer": optimizer})
    return settings.model_copy(update={"model": model, "train": train})


def newest_intact(run: Run, *, below: float = math.inf, skipped: Callable[[str], None] = lambda _: None) -> int | None:
    """The step of the newest intact checkpoint before step `below`; `skipped` receives a sentence on damaged ones."""
    for step, _ in reversed(run.checkpoints()):
        if step < below:
            if (problem := run.damage(step)) is None:
                return step
            skipped(f"skipping the checkpoint of step {step}: {problem}")
    return None


def choose_checkpoint(
    run: Run, settings: Settings, step: int | None, skipped: Callable[[str], None]
) -> tuple[int, Path | None]:
    """The step and folder of the checkpoint of `step`, or of the newest intact one; `skipped` as for `newest_intact`.

    (0, None) if the run stopped before its first checkpoint. Raises CountdownError if all are damaged, if that of
    `step` is damaged, if the run's settings have changed since it was saved, or if the step is beyond the run's last.
    """
    checkpoints = dict(run.checkpoints())
    if not checkpoints and step is None:
        return 0, None
    chosen = newest_intact(run, skipped=skipped) if step is None else step
    if chosen is None:
        hint = "start the run again with `--overwrite`"
        raise CountdownError(f"run `{run.name}` has no intact checkpoint", hint, exit_code=1)
    if chosen not in checkpoints:
        hint = f"choose one of: {run.saved_steps}" if checkpoints else "leave out `--step`"
        raise CountdownError(f"run `{run.name}` has no checkpoint of step {step}", hint)
    if step is not None and (problem := run.damage(step)):
        hint = "leave out `--step` to continue from the newest intact one"
        raise CountdownError(f"the checkpoint of step {step} is damaged: {problem}", hint, exit_code=1)
    if run.manifest(chosen).get("config") != digest(settings):
        raise CountdownError(
            f"`{run.config_path}` has changed since step {chosen} was saved",
            "restore it, or start a new run to train with other settings",
        )
    if chosen > (last := settings.train.num_iterations):
        hint = f"give a larger one, or `--step` with one of: {run.saved_steps}"
        raise CountdownError(f"step {chosen} of run `{run.name}` is beyond `--num-iterations {last}`", hint)
    return chosen, checkpoints[chosen]


def require_origin(run: Run, current: Mapping[str, object], *, model: str, reference: str) -> None:
    """Raise CountdownError unless the run started from this origin; names of models are for the message."""
    saved = run.read_origin()
    changed = [name for name in current if saved.get(name) != current[name]]
    if changed:
        start = f"this `{model}`" if {*changed} & {"weights", "tokenizer", "warm_start"} else "these puzzles"
        if changed == ["reference"]:
            start = f"`{reference}` as its reference"
        if all(name.endswith(" file") for name in changed):
            start = "these files"
        raise CountdownError(
            f"run `{run.name}` did not start from {start}: other {' and '.join(changed)}",
            "restore it, or start a new run",
        )


def environment(policy: Policy) -> dict[str, object]:
    """Versions and hardware that a run's numbers may depend on."""
    device = policy.device
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "precision": policy.precision,
        "parameters": sum(parameter.numel() for parameter in policy.model.parameters()),
        "peak_tflops": peak_tflops(device, policy.precision),
    }
