"""The training loop, which reads like the algorithm: draw, sample, score, update, log.

Everything that a checkpoint must hold lives in `Training`; which puzzles a step sees and what it samples are
functions of (seed, step) alone. Unlike the original system, the end-of-sequence token is trained on, evaluation is
greedy over all val puzzles, and the model kept is the best on them, not the last. Knows neither tags nor terminals
nor file names.
"""

from __future__ import annotations

import math
import platform
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
import transformers
from safetensors import SafetensorError

from grpo_cli.core.errors import CountdownError
from grpo_cli.core.evaluate import Evaluation, evaluate, puzzle_set, wilson
from grpo_cli.core.grpo import advantages, reference_logprobs, update, zero_variance
from grpo_cli.core.policy import Policy, Sequences
from grpo_cli.core.puzzle import Puzzle
from grpo_cli.core.rollout import Rollout, draws, sample
from grpo_cli.core.run import Run
from grpo_cli.core.settings import Settings
from grpo_cli.core.task import Score, prompt, score


class Observer(Protocol):
    """Whoever watches a training."""

    def progress(self, phase: str, done: int, total: int) -> None: ...
    def evaluated(self, step: int, accuracy: float, count: int, interval: tuple[float, float]) -> None: ...
    def step(self, metrics: Mapping[str, float], sample: Mapping[str, object]) -> None: ...


class Interrupted(Exception):
    """Training was asked to stop; the last completed step has been saved."""


@dataclass
class Training:
    """The state of a training: with the run's settings, all that going on from a checkpoint needs."""

    policy: Policy
    optimizer: torch.optim.Optimizer
    step: int = 0
    base_accuracy: float | None = None  # of the starting model, greedy on the val puzzles
    accuracy: float | None = None  # at the last evaluation
    best_accuracy: float | None = None
    best_step: int = 0
    resumed_from: int | None = None

    def save(self, run: Run, *, keep: int) -> None:
        """Write a checkpoint of this step, whole or not at all, and drop all but the last `keep`.

        Raises CountdownError, with what was there before intact, if it cannot be written.
        """
        run.require_space(self.checkpoint_bytes())
        facts = {
            "step": self.step,
            "model": type(self.policy.model).__name__,
            "optimizer": type(self.optimizer).__name__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        try:
            with run.saving(run.checkpoint_path(self.step), facts) as folder:
                self.policy.save(folder / "model")
                torch.save(
                    {"optimizer": self.optimizer.state_dict(), "progress": self._progress()}, folder / "state.pt"
                )
        except (OSError, RuntimeError, SafetensorError) as error:
            kept = ", ".join(str(step) for step, _ in run.checkpoints()) or "none"
            raise CountdownError(
                f"cannot save step {self.step} in `{run.path}`: {' '.join(str(error).split())}",
                f"make room, then go on with `--run {run.name} --resume`; checkpoints: {kept}",
                exit_code=1,
            ) from error
        run.prune_checkpoints(keep, also=self.resumed_from)

    def checkpoint_bytes(self) -> int:
        """About how large a checkpoint is: the weights, and two moments of each."""
        return sum(3 * parameter.numel() * parameter.element_size() for parameter in self.policy.model.parameters())

    def restore(self, folder: Path) -> None:
        """Take up the state of a checkpoint whose model is already loaded."""
        state = torch.load(folder / "state.pt", map_location=self.policy.device, weights_only=True)
        self.optimizer.load_state_dict(state["optimizer"])
        for name, value in state["progress"].items():
            setattr(self, name, value)
        self.resumed_from = self.step

    def _progress(self) -> dict[str, float | int | None]:
        names = ("step", "base_accuracy", "accuracy", "best_accuracy", "best_step")
        return {name: getattr(self, name) for name in names}


def build_optimizer(policy: Policy, *, name: str, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW, of torch or with 8-bit state of bitsandbytes ("auto": on CUDA). The learning rate is set per step."""
    parameters = policy.model.parameters()
    if name == "adamw8bit" or (name == "auto" and policy.device.type == "cuda"):
        import bitsandbytes  # imported late: it looks for native kernels

        return bitsandbytes.optim.AdamW8bit(parameters, weight_decay=weight_decay)  # type: ignore[no-any-return]
    return torch.optim.AdamW(parameters, weight_decay=weight_decay)


def learning_rate_at(step: int, *, peak: float, schedule: str, warmup_steps: int, num_iterations: int) -> float:
    """Learning rate of a step, from 1: a linear warm-up to `peak`, then constant or falling to 0 at the end."""
    if step <= warmup_steps:
        return peak * step / warmup_steps
    done = (step - 1 - warmup_steps) / max(1, num_iterations - warmup_steps)
    shapes = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
    return peak * shapes[schedule]


def puzzles_of_step(puzzles: Sequence[Puzzle], step: int, *, batch_size: int, seed: int) -> list[Puzzle]:
    """The puzzles of a step, from 1: every epoch goes through all puzzles once, in an order of its own."""
    places = range((step - 1) * batch_size, step * batch_size)
    orders: dict[int, list[int]] = {}
    drawn = []
    for epoch, index in (divmod(place, len(puzzles)) for place in places):
        if epoch not in orders:
            orders[epoch] = random.Random(f"{seed}/{epoch}").sample(range(len(puzzles)), len(puzzles))
        drawn.append(puzzles[orders[epoch][index]])
    return drawn


@dataclass
class Clock:
    """Seconds by phase of one step."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[f"time/{name}"] = time.perf_counter() - start


def train(
    training: Training,
    reference: Policy | None,
    run: Run,
    settings: Settings,
    observer: Observer,
    *,
    should_stop: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Train from `training.step` to the end and return the last evaluation.

    Logs every step to the run, keeps its best model and its last checkpoints. `should_stop` is asked between tokens and
    between phases; once it says yes the last completed step is saved and Interrupted is raised.
    """
    loop = _Loop(training, reference, run, settings, observer, should_stop)
    try:
        return loop.run()
    except Interrupted:
        training.save(run, keep=settings.train.keep_last)
        raise


@dataclass
class _Loop:
    training: Training
    reference: Policy | None
    run_folder: Run
    settings: Settings
    observer: Observer
    should_stop: Callable[[], bool]

    def __post_init__(self) -> None:
        train_settings, task = self.settings.train, self.settings.task
        self.puzzles = puzzle_set(task.numbers, "train")
        self.val_puzzles = puzzle_set(task.numbers, "val")
        if 0 < train_settings.eval_puzzles < len(self.val_puzzles):
            chosen = random.Random(train_settings.seed).sample(
                range(len(self.val_puzzles)), train_settings.eval_puzzles
            )
            self.val_puzzles = [self.val_puzzles[index] for index in sorted(chosen)]

    def run(self) -> Evaluation:
        training, settings = self.training, self.settings.train
        evaluation = None
        if training.base_accuracy is None:
            evaluation = self._evaluate({"step": 0})
        else:
            base, count = training.base_accuracy, len(self.val_puzzles)
            self.observer.evaluated(0, base, count, wilson(base, count))
        for step in range(training.step + 1, settings.num_iterations + 1):
            clock = Clock()
            started = time.perf_counter()
            metrics, records = self._step(step, clock)
            training.step = step
            metrics |= {**clock.seconds, "time/total": time.perf_counter() - started}
            metrics["tokens_per_second"] = metrics.pop("tokens") / metrics["time/total"]
            self.observer.step(metrics, records[step % len(records)])
            self.run_folder.log_samples(records)
            evaluation = None
            if step % settings.eval_every == 0 or step == settings.num_iterations:
                evaluation = self._evaluate(metrics)
            else:
                self.run_folder.log(metrics)
            if step % settings.save_every == 0 or step == settings.num_iterations:
                training.save(self.run_folder, keep=settings.keep_last)
        return evaluation or self._evaluation()

    def _step(self, step: int, clock: Clock) -> tuple[dict[str, float], list[dict[str, object]]]:
        """One step of GRPO: its metrics, and one record of a completion for each prompt."""
        policy, settings, style = self.training.policy, self.settings.train, self.settings.task.style
        groups = (settings.batch_size, settings.num_generations)

        # 1. Sample a group of completions of each prompt.
        puzzles = puzzles_of_step(self.puzzles, step, batch_size=settings.batch_size, seed=settings.seed)
        prompts = [policy.encode(prompt(puzzle, style)) for puzzle in puzzles]
        owners = [index for index in range(groups[0]) for _ in range(groups[1])]
        with clock.phase("rollout"):
            uniform = draws(settings.seed, step, range(groups[0]), groups[1], settings.max_new_tokens)
            rollout = sample(
                policy,
                prompts,
                num_generations=groups[1],
                max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                uniform=uniform,
                on_token=partial(self._token, "sampling token", settings.max_new_tokens),
            )

        # 2. Score them, and compare each with its group.
        with clock.phase("score"):
            texts = [policy.decode(tokens) for tokens in rollout.completions]
            rows = zip(texts, owners, rollout.truncated, strict=True)
            scores = [score(text, puzzles[owner], style=style, truncated=cut) for text, owner, cut in rows]
            rewards = torch.tensor([found.reward for found in scores]).view(groups)  # (P, G)
            advantage = advantages(rewards, scale=self.settings.loss.scale_rewards)  # (P, G)

        # 3. Ask the frozen reference how likely it finds them.
        sequences = Sequences(prompts, rollout.completions, owners)
        ref_logprobs = None
        with clock.phase("reference"):
            self._poll()
            if self.reference is not None:
                ref_logprobs = reference_logprobs(
                    self.reference,
                    sequences,
                    temperature=settings.temperature,
                    micro_batch_size=settings.micro_batch_size,
                )

        # 4. Make what did better than its group more likely.
        with clock.phase("update"):
            self._poll()
            rate = self._learning_rate(step)
            for group in self.training.optimizer.param_groups:
                group["lr"] = rate
            updated = update(
                policy,
                self.training.optimizer,
                sequences,
                advantage.flatten(),
                loss=self.settings.loss,
                temperature=settings.temperature,
                max_new_tokens=settings.max_new_tokens,
                num_inner_updates=settings.num_inner_updates,
                clip_grad_norm=settings.clip_grad_norm,
                micro_batch_size=settings.micro_batch_size,
                ref_logprobs=ref_logprobs,
                sampled_logprobs=rollout.logprobs,
            )
        described = _describe(rollout, scores, zero_variance(rewards))
        metrics = {"step": step, **described, **updated, "learning_rate": rate}
        return metrics, _records(step, puzzles, texts, scores, groups[1])

    def _learning_rate(self, step: int) -> float:
        settings = self.settings.train
        return learning_rate_at(
            step,
            peak=settings.learning_rate,
            schedule=settings.schedule,
            warmup_steps=settings.warmup_steps,
            num_iterations=settings.num_iterations,
        )

    def _evaluate(self, metrics: dict[str, float]) -> Evaluation:
        """Evaluate, log `metrics` with the result, and keep the model if it is the best so far."""
        training, step = self.training, int(metrics["step"])
        clock = Clock()
        with clock.phase("eval"):
            evaluation = self._evaluation()
        training.accuracy = evaluation.accuracy
        if step == 0:
            training.base_accuracy = evaluation.accuracy
        elif training.best_accuracy is None or evaluation.accuracy > training.best_accuracy:
            training.best_accuracy, training.best_step = evaluation.accuracy, step
            with self.run_folder.saving(self.run_folder.model_path) as folder:
                training.policy.save(folder)
        self.run_folder.log({**metrics, "val_accuracy": evaluation.accuracy, **clock.seconds})
        self.observer.evaluated(step, evaluation.accuracy, evaluation.count, evaluation.interval)
        return evaluation

    def _evaluation(self) -> Evaluation:
        settings = self.settings
        return evaluate(
            self.training.policy,
            self.val_puzzles,
            style=settings.task.style,
            max_new_tokens=settings.train.max_new_tokens,
            batch_size=settings.eval.batch_size,
            progress=partial(self.observer.progress, "evaluating puzzle"),
            on_token=lambda _: self._poll(),
        )

    def _token(self, phase: str, total: int, done: int) -> None:
        self.observer.progress(phase, done, total)
        self._poll()

    def _poll(self) -> None:
        if self.should_stop():
            raise Interrupted


def _describe(rollout: Rollout, scores: Sequence[Score], same: torch.Tensor) -> dict[str, float]:
    """What the completions of a step were like; shares are from 0 to 1."""
    count = len(scores)
    tokens = sum(map(len, rollout.completions))
    return {
        "reward": sum(found.reward for found in scores) / count,
        "accuracy": sum(found.correct for found in scores) / count,
        "format_rate": sum(found.well_formed for found in scores) / count,
        "completion_length": tokens / count,
        "truncated": sum(rollout.truncated) / count,
        "zero_variance": float(same.float().mean()),
        "tokens": tokens,
    }


def _records(
    step: int, puzzles: Sequence[Puzzle], texts: Sequence[str], scores: Sequence[Score], num_generations: int
) -> list[dict[str, object]]:
    """One completion of each prompt, another one of its group every step."""
    records: list[dict[str, object]] = []
    for index, puzzle in enumerate(puzzles):
        sample_index = step % num_generations
        row = index * num_generations + sample_index
        found = scores[row]
        records.append(
            {
                "step": step,
                "numbers": list(puzzle.numbers),
                "target": puzzle.target,
                "prompt_index": index,
                "sample_index": sample_index,
                "completion": texts[row],
                "reward": found.reward,
                "reason": found.reason,
                "answer": found.answer,
            }
        )
    return records


def summary(training: Training, evaluation: Evaluation) -> dict[str, object]:
    """What a finished training came to."""
    return {
        "steps": training.step,
        "puzzles": evaluation.count,
        "base_accuracy": training.base_accuracy,
        "final_accuracy": evaluation.accuracy,
        "final_interval": list(evaluation.interval),
        "best_accuracy": training.best_accuracy,
        "best_step": training.best_step,
    }


def environment(policy: Policy) -> dict[str, object]:
    """What the numbers of a run may depend on beside its settings."""
    device = policy.device
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "precision": policy.precision,
        "parameters": sum(parameter.numel() for parameter in policy.model.parameters()),
    }


def choose_checkpoint(run: Run, step: int | None, skipped: Callable[[str], None]) -> tuple[int, Path | None]:
    """The step and folder of the checkpoint of `step`, or of the newest one that is whole; `skipped` is told of others.

    (0, None) if the run was stopped before its first. Raises CountdownError if all are damaged, or that of `step` is:
    there is no falling back from a step that was asked for.
    """
    found = dict(run.checkpoints())
    if step is not None and step not in found:
        steps = ", ".join(map(str, found)) or "none"
        raise CountdownError(f"run `{run.name}` has no checkpoint of step {step}", f"choose one of: {steps}")
    for candidate in sorted(found, reverse=True) if step is None else [step]:
        problem = run.damage(candidate)
        if problem is None:
            return candidate, found[candidate]
        if step is not None:
            hint = "leave out `--step` to go on from the newest that is whole"
            raise CountdownError(f"the checkpoint of step {step} is damaged: {problem}", hint, exit_code=1)
        skipped(f"skipping the checkpoint of step {candidate}: {problem}")
    if found:
        hint = "start the run again with `--overwrite`"
        raise CountdownError(f"no checkpoint of run `{run.name}` is whole", hint, exit_code=1)
    return 0, None
