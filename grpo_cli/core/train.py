"""The training loop, which reads like the algorithm: draw, sample, score, update, log.

Everything that a checkpoint must hold lives in `state.Training`; which puzzles a step sees and what it samples are
functions of (seed, step) alone. Unlike the original system, the end-of-sequence token is trained on, evaluation is
greedy over all val puzzles, and the model kept is the best on them, not the last. Knows neither tags nor terminals
nor file names.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch

from grpo_cli.core.errors import CountdownError
from grpo_cli.core.evaluate import Evaluation, evaluate, puzzle_set, wilson
from grpo_cli.core.grpo import NotFinite, advantages, reference_logprobs, update, zero_variance
from grpo_cli.core.guards import collapses, warnings
from grpo_cli.core.memory import Fit, ran_out
from grpo_cli.core.policy import Policy, Sequences
from grpo_cli.core.puzzle import Puzzle
from grpo_cli.core.rollout import Rollout, draws, sample
from grpo_cli.core.run import Run
from grpo_cli.core.settings import Settings
from grpo_cli.core.state import Training
from grpo_cli.core.task import CHEATS, Score, prompt, score


class Observer(Protocol):
    """Whoever watches a training."""

    def progress(self, phase: str, done: int, total: int) -> None: ...
    def evaluated(self, step: int, accuracy: float, count: int, interval: tuple[float, float]) -> None: ...
    def step(self, metrics: Mapping[str, float], sample: Mapping[str, object]) -> None: ...
    def message(self, text: str) -> None: ...


class Interrupted(Exception):
    """Training was asked to stop; the last completed step has been saved."""


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
    should_save: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Train from `training.step` to the end and return the last evaluation.

    Logs every step to the run, keeps its best model and its last checkpoints. `should_stop` is asked between tokens,
    micro-batches and phases; once it says yes the last completed step is saved and Interrupted is raised. `should_save`
    is asked after each step. Raises CountdownError, with the last good step saved, where going on makes no sense.
    """
    loop = _Loop(training, reference, run, settings, observer, should_stop, should_save)
    try:
        return loop.run()
    except Interrupted:
        training.save(run, settings)
        raise
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        hint = f"take a smaller model or batch; checkpoints of the run: {run.saved_steps}"
        raise CountdownError(f"memory ran out after step {training.step}", hint, exit_code=1) from error


@dataclass
class _Batch:
    """The completions of a step, P prompts by G, and what they are worth."""

    step: int
    puzzles: list[Puzzle]
    prompts: list[list[int]]
    rollout: Rollout
    texts: list[str]
    scores: list[Score]
    rewards: torch.Tensor  # (P, G)

    def record(self, row: int) -> dict[str, object]:
        """One completion, as samples.jsonl keeps it."""
        prompt_index, sample_index = divmod(row, self.rewards.shape[1])
        puzzle, found = self.puzzles[prompt_index], self.scores[row]
        return {
            "step": self.step,
            "numbers": list(puzzle.numbers),
            "target": puzzle.target,
            "prompt_index": prompt_index,
            "sample_index": sample_index,
            "completion": self.texts[row],
            "reward": found.reward if math.isfinite(found.reward) else str(found.reward),
            "reason": found.reason,
            "answer": found.answer,
        }

    def shown(self) -> list[dict[str, object]]:
        """A completion of each prompt, another one of its group every step."""
        prompts, generations = self.rewards.shape
        return [self.record(index * generations + self.step % generations) for index in range(prompts)]

    def describe(self) -> dict[str, float]:
        """What the completions were like; shares are from 0 to 1."""
        count = len(self.scores)
        tokens = sum(map(len, self.rollout.completions))
        return {
            "reward": sum(found.reward for found in self.scores) / count,
            "accuracy": sum(found.correct for found in self.scores) / count,
            "format_rate": sum(found.well_formed for found in self.scores) / count,
            "completion_length": tokens / count,
            "truncated": sum(self.rollout.truncated) / count,
            "zero_variance": float(zero_variance(self.rewards).float().mean()),
            "lenient_accuracy": sum(found.lenient for found in self.scores) / count,
            **{f"cheat/{kind}": sum(found.cheat == kind for found in self.scores) / count for kind in CHEATS},
            "tokens": tokens,
        }


@dataclass
class _Loop:
    training: Training
    reference: Policy | None
    run_folder: Run
    settings: Settings
    observer: Observer
    should_stop: Callable[[], bool]
    should_save: Callable[[], bool]
    warned: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        train_settings, task = self.settings.train, self.settings.task
        self.puzzles = puzzle_set(task.numbers, "train")
        self.val_puzzles = puzzle_set(task.numbers, "val")
        if 0 < train_settings.eval_puzzles < len(self.val_puzzles):
            chosen = random.Random(train_settings.seed).sample(
                range(len(self.val_puzzles)), train_settings.eval_puzzles
            )
            self.val_puzzles = [self.val_puzzles[index] for index in sorted(chosen)]
        told = self.observer.message
        self.sampling, self.evaluating = Fit(told=told), Fit(told=told)
        self.learning = Fit(train_settings.micro_batch_size, told=told)

    def run(self) -> Evaluation:
        training = self.training
        if training.base_accuracy is not None:
            base, count = training.base_accuracy, len(self.val_puzzles)
            self.observer.evaluated(0, base, count, wilson(base, count))
        self.history = [line for line in self.run_folder.metrics() if line["step"] > 0]
        evaluation = self._close()
        for step in range(training.step + 1, self.settings.train.num_iterations + 1):
            clock = Clock()
            with clock.phase("total"):
                metrics, batch = self._step(step, clock)
            training.step = step
            metrics |= {**clock.seconds, "tokens_per_second": metrics.pop("tokens") / clock.seconds["time/total"]}
            training.pending = {key: value for key, value in metrics.items() if math.isfinite(value)}
            self.history.append(training.pending)
            records = batch.shown()
            self.observer.step(training.pending, records[step % len(records)])
            self.run_folder.log_samples(records)
            evaluation = self._close()
            self._guard()
        return evaluation or self._evaluation()

    def _step(self, step: int, clock: Clock) -> tuple[dict[str, float], _Batch]:
        """One step of GRPO: its metrics and its completions."""
        policy, settings = self.training.policy, self.settings.train
        groups = (settings.batch_size, settings.num_generations)

        # 1. Sample a group of completions of each prompt.
        puzzles = puzzles_of_step(self.puzzles, step, batch_size=settings.batch_size, seed=settings.seed)
        prompts = [policy.encode(prompt(puzzle, self.settings.task.style)) for puzzle in puzzles]
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
                fit=self.sampling,
                on_token=partial(self._token, "sampling token", settings.max_new_tokens),
            )

        # 2. Score them, and compare each with its group.
        with clock.phase("score"):
            texts = [policy.decode(tokens) for tokens in rollout.completions]
            rows = zip(texts, owners, rollout.truncated, strict=True)
            style = self.settings.task.style
            scores = [score(text, puzzles[owner], style=style, truncated=cut) for text, owner, cut in rows]
            rewards = torch.tensor([found.reward for found in scores]).view(groups)  # (P, G)
            advantage = advantages(rewards, scale=self.settings.loss.scale_rewards)  # (P, G)
        batch = _Batch(step, puzzles, prompts, rollout, texts, scores, rewards)

        # 3. Ask the frozen reference how likely it finds them.
        sequences = Sequences(prompts, rollout.completions, owners)
        ref_logprobs = None
        with clock.phase("reference"):
            if self.reference is not None:
                ref_logprobs = reference_logprobs(
                    self.reference, sequences, temperature=settings.temperature, fit=self.learning, poll=self._poll
                )

        # 4. Make what did better than its group more likely.
        with clock.phase("update"):
            rate = self._learning_rate(step)
            for group in self.training.optimizer.param_groups:
                group["lr"] = rate
            try:
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
                    fit=self.learning,
                    ref_logprobs=ref_logprobs,
                    sampled_logprobs=rollout.logprobs,
                    poll=self._poll,
                )
                self.training.bad_in_a_row = 0
            except NotFinite as problem:
                updated = {}
                self._skip(batch, problem)
        bad = self.training.bad_steps
        return {"step": step, **batch.describe(), **updated, "learning_rate": rate, "bad_steps": bad}, batch

    def _skip(self, batch: _Batch, problem: NotFinite) -> None:
        """Leave the weights as they are, keep the batch for a report, and give up after too many in a row."""
        training, limit = self.training, self.settings.train.max_bad_steps
        training.bad_steps += 1
        training.bad_in_a_row += 1
        rows = range(len(batch.texts))
        kept = [{**batch.record(row), "tokens": batch.rollout.completions[row]} for row in rows]
        report = {"step": batch.step, "problem": str(problem), "prompts": batch.prompts, "completions": kept}
        path = self.run_folder.write_bad_step(batch.step, report)
        self.observer.message(f"step {batch.step}: {problem}; the weights stay as they are, the batch is in {path}")
        if training.bad_in_a_row >= limit:
            training.save(self.run_folder, self.settings)
            good = self.run_folder.checkpoint_path(training.step) / "model"
            times = f"in {limit} steps in a row" if limit > 1 else f"in step {batch.step}"
            raise CountdownError(
                f"{problem} {times}; the last good weights are in `{good}`",
                f"start from them with `--model {good}` and a smaller `--learning-rate`, or `--precision float32`",
                exit_code=1,
            )

    def _guard(self) -> None:
        """Tell once of each sign in the metrics; end a training gone wrong for good if that was asked for."""
        gone = collapses(self.history)
        for sign, sentence in {**gone, **warnings(self.history)}.items():
            if sign in gone and self.settings.train.stop_on_collapse:
                self.training.save(self.run_folder, self.settings)
                hint = f"to go on all the same: `--run {self.run_folder.name} --resume --no-stop-on-collapse`"
                raise CountdownError(f"step {self.training.step}: {sentence}", hint, exit_code=1)
            if sign not in self.warned:
                self.warned.add(sign)
                self.observer.message(sentence if sign == "right" else f"warning: {sentence}")

    def _learning_rate(self, step: int) -> float:
        settings = self.settings.train
        return learning_rate_at(
            step,
            peak=settings.learning_rate,
            schedule=settings.schedule,
            warmup_steps=settings.warmup_steps,
            num_iterations=settings.num_iterations,
        )

    def _close(self) -> Evaluation | None:
        """Evaluate, log and save as the last step demands, unless that is done."""
        training, settings, step = self.training, self.settings.train, self.training.step
        if training.pending is None:
            return None
        evaluation, clock, last = None, Clock(), step == settings.num_iterations
        if step % settings.eval_every == 0 or last:
            with clock.phase("eval"):
                evaluation = self._evaluation()
            self._keep_best(evaluation.accuracy)
            training.pending |= {"val_accuracy": evaluation.accuracy, **clock.seconds}
        self.run_folder.log(training.pending)
        training.pending = None
        if evaluation is not None:
            self.observer.evaluated(step, evaluation.accuracy, evaluation.count, evaluation.interval)
        if (step and step % settings.save_every == 0) or last or self.should_save():
            training.save(self.run_folder, self.settings)
        return evaluation

    def _keep_best(self, accuracy: float) -> None:
        """Keep the model if it is the best so far; the one that training starts from is not kept."""
        training = self.training
        if training.step == 0:
            training.base_accuracy = accuracy
        elif training.best_accuracy is None or accuracy > training.best_accuracy:
            training.best_accuracy, training.best_step = accuracy, training.step
            training.save_best(self.run_folder)

    def _evaluation(self) -> Evaluation:
        settings = self.settings
        return evaluate(
            self.training.policy,
            self.val_puzzles,
            style=settings.task.style,
            max_new_tokens=settings.train.max_new_tokens,
            batch_size=settings.eval.batch_size,
            fit=self.evaluating,
            progress=partial(self.observer.progress, "evaluating puzzle"),
            on_token=lambda _: self._poll(),
        )

    def _token(self, phase: str, total: int, done: int) -> None:
        self.observer.progress(phase, done, total)
        self._poll()

    def _poll(self) -> None:
        if self.should_stop():
            raise Interrupted


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
        "bad_steps": training.bad_steps,
    }
