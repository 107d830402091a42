"""The training loop, which reads like the algorithm: draw, sample, score, update, log.

Everything that a checkpoint must hold lives in `state.Training`; which prompts a step sees (`curriculum`) and what it
samples are functions of (seed, step) alone. Unlike the original system, the end-of-sequence token is trained on,
evaluation is greedy over all val puzzles, whatever the training is shown, and the model kept is the best on them or on
a suite of cells, not the last. Knows neither tags nor terminals nor file names.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, reduce
from itertools import chain, pairwise
from operator import add
from typing import Protocol

import torch

from grpo_cli.core.config.settings import Settings
from grpo_cli.core.dist.ranks import Passing, Solo
from grpo_cli.core.dist.shards import gather
from grpo_cli.core.errors import CountdownError
from grpo_cli.core.evals.evaluate import Evaluation, evaluate, puzzles_of
from grpo_cli.core.evals.statistics import wilson
from grpo_cli.core.microbatch import MicroBatch, ran_out
from grpo_cli.core.model.policy import Policy, Sequences
from grpo_cli.core.perf.cost import Work
from grpo_cli.core.perf.meter import Meter
from grpo_cli.core.rl.batch import Batch, Tally
from grpo_cli.core.rl.grpo import Step, advantages, zero_variance
from grpo_cli.core.rl.health import collapses, warnings
from grpo_cli.core.rl.state import Training
from grpo_cli.core.rl.update import Diverged, NotFinite, extra_passes, reference_logprobs, update
from grpo_cli.core.run.folder import Run
from grpo_cli.core.sampling.rollout import sample, uniforms
from grpo_cli.core.task.countdown import task_of
from grpo_cli.core.task.curriculum import Curriculum, schedule
from grpo_cli.core.task.prompts import STYLES
from grpo_cli.core.task.suite import SIZES, Cell, cell, weighted_mean
from grpo_cli.core.task.task import Message, Problem, Score, Task

PLANNED_STEPS = 4  # whose prompts are looked at when memory is planned


class Observer(Protocol):
    """Whoever watches a training."""

    def progress(self, phase: str, done: int, total: int) -> None: ...
    def evaluated(
        self, step: int, accuracy: float, count: int, interval: tuple[float, float], suite_mean: float | None
    ) -> None: ...
    def step(self, metrics: Mapping[str, float], sample: Mapping[str, object]) -> None: ...
    def message(self, text: str) -> None: ...


class Interrupted(Passing):
    """Training was asked to stop; the last completed step has been saved."""


def learning_rate_at(step: int, *, peak: float, schedule: str, warmup_steps: int, num_iterations: int) -> float:
    """Learning rate of a step, from 1: a linear warm-up to `peak`, then constant or falling to 0 at the end."""
    if step <= warmup_steps:
        return peak * step / warmup_steps
    done = (step - 1 - warmup_steps) / max(1, num_iterations - warmup_steps)
    shapes = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
    return peak * shapes[schedule]


def curriculum(settings: Settings) -> Curriculum:
    """The prompts of a training with these settings."""
    task, wanted = settings.task, settings.train
    numbers = schedule(_or_task(wanted.prompt_numbers, str(task.numbers)), [str(size) for size in SIZES])
    style = schedule(_or_task(wanted.prompt_style, task.style), STYLES)
    puzzles = {size: task_of(settings).problems("train", size) for size in map(int, numbers.choices)}
    return Curriculum(puzzles, numbers, style, wanted.batch_size, wanted.seed)


def _or_task(text: str, of_task: str) -> str:
    return of_task if text == "task" else text


def longest_prompt(settings: Settings, encode: Callable[[Sequence[dict[str, str]]], list[int]]) -> int:
    """Tokens of the longest prompt of a few steps."""
    steps = range(1, min(PLANNED_STEPS, settings.train.num_iterations) + 1)
    drawn = (item for step in steps for item in curriculum(settings).prompts(step))
    return max(len(encode(task_of(settings).prompt(puzzle, style))) for puzzle, style in drawn)


def prompt(problem: Problem, style: str, *, task: Task) -> list[Message]:
    """The task's prompt for a problem."""
    return task.prompt(problem, style)


def score(completion: str, problem: Problem, *, style: str, truncated: bool, task: Task) -> Score:
    """The task's score of a completion."""
    return task.score(completion, problem, style=style, truncated=truncated)


@dataclass
class Clock:
    """Seconds by phase of one step."""

    seconds: dict[str, float] = field(default_factory=dict)
    ranks: Solo = field(default_factory=Solo)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of a block, but for what was spent on other ranks; `total` has all of it."""
        start, spent = time.perf_counter(), self.ranks.spent
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        spent = 0.0 if name == "total" else self.ranks.spent - spent
        self.seconds[f"time/{name}"] = self.seconds.get(f"time/{name}", 0.0) + time.perf_counter() - start - spent


def train(
    training: Training,
    reference: Policy | None,
    run: Run,
    settings: Settings,
    observer: Observer,
    *,
    rows: int = 0,
    memory_limit: int = 0,
    should_stop: Callable[[], bool] = lambda: False,
    should_save: Callable[[], bool] = lambda: False,
    ranks: Solo | None = None,
) -> Evaluation:
    """Train from `training.step` to the end and return the last evaluation.

    `rows` completions are learned from at once, or all if that is 0, where the settings leave it open; fewer once the
    process would hold more than `memory_limit` bytes, if that is not 0.

    Logs every step to the run, keeps its best model and its last checkpoints. `should_stop` is asked between tokens,
    micro-batches and phases; once it says yes the last completed step is saved and Interrupted is raised. `should_save`
    is asked after each step. Raises CountdownError, with the last good step saved, where going on makes no sense.

    Of several `ranks` each samples and learns from its share of a step's prompts, and all go the same way. The run of
    all but the first is one that does not write.
    """
    loop = _Loop(
        training, reference, run, settings, observer, should_stop, should_save, ranks or Solo(), rows, memory_limit
    )
    try:
        return loop.run()
    except Interrupted:
        loop.save()
        raise
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        hint = f"take a smaller model or batch; checkpoints of the run: {run.saved_steps}"
        raise CountdownError(f"memory ran out after step {training.step}", hint, exit_code=1) from error


@dataclass
class _Loop:
    training: Training
    reference: Policy | None
    run_folder: Run
    settings: Settings
    observer: Observer
    should_stop: Callable[[], bool]
    should_save: Callable[[], bool]
    ranks: Solo
    rows: int = 0
    memory_limit: int = 0
    warned: set[str] = field(default_factory=set)
    saved_at: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        train_settings, task = self.settings.train, self.settings.task
        self.curriculum, self.task = curriculum(self.settings), task_of(self.settings)
        self.val = Cell("val", task.numbers, task.style)
        suite = self.settings.suite.get(train_settings.eval_suite, {})
        cells = {self.val.name: self.val, **{name: cell(name) for name in suite}}
        self.puzzles = {one: puzzles_of(one, train_settings.eval_puzzles, self.task) for one in cells.values()}
        self.suite = suite
        fit = partial(MicroBatch, limit=self.memory_limit, report=self.observer.message)
        self.sampling, self.evaluating = fit(), fit()
        self.learning = fit(train_settings.micro_batch_size or self.rows)

    def run(self) -> Evaluation:
        training = self.training
        if training.base_accuracy is not None:
            base, count = training.base_accuracy, len(self.puzzles[self.val])
            self.observer.evaluated(0, base, count, wilson(base, count), None)
        self.history = [line for line in self.ranks.first(self.run_folder.metrics) if line["step"] > 0]
        evaluation = self._close()
        for step in range(training.step + 1, self.settings.train.num_iterations + 1):
            if self._out_of_patience():
                break
            clock, meter = Clock(ranks=self.ranks), Meter(training.policy, training.optimizer)
            self.ranks.doing = f"step {step}"
            with clock.phase("total"):
                metrics, batch, advantage = self._step(step, clock, meter)
            clock.seconds["time/update"] -= clock.seconds.get("time/optimizer", 0.0)
            training.step = step
            tokens = metrics.pop("tokens") + metrics.pop("tokens_refilled", 0)
            times, records = self.ranks.report(clock.seconds, batch.shown())
            metrics |= {**times, "tokens_per_second": tokens / times["time/total"]}
            if self.ranks.rank == 0:  # which speaks for one device of all
                metrics |= meter.metrics(self._work(batch, advantage), seconds=times["time/total"])
            training.pending = {key: value for key, value in metrics.items() if math.isfinite(value)}
            self.history.append(training.pending)
            self.observer.step(training.pending, records[step % len(records)])
            self.run_folder.log_samples(records)
            evaluation = self._close()
            self._guard()
        return evaluation or self._evaluate(self.val)

    def _out_of_patience(self) -> bool:
        """Whether the last `patience` evaluations found no better model; then the last step is saved."""
        training, patience = self.training, self.settings.train.patience
        if not 0 < patience <= training.waited:
            return False
        if self.ranks.first(lambda: training.step not in dict(self.run_folder.checkpoints())):
            self.save()
        waited = f"{training.waited} evaluation{'s' if training.waited > 1 else ''} no better"
        best = f"the best is that of step {training.best_step}"
        self.observer.message(f"stopping after step {training.step}: {waited}; {best}")
        return True

    def _step(self, step: int, clock: Clock, meter: Meter) -> tuple[dict[str, float], Batch, torch.Tensor]:
        """One step of GRPO: its metrics, this rank's completions, and their advantages (B,)."""
        policy, settings = self.training.policy, self.settings.train

        # 1. Sample a group of completions of each prompt.  2. Score them, and compare each with its group.
        batch, tally = self._sample(step, clock, meter, range(settings.batch_size))
        described = tally.describe() | self.curriculum.shares(self.curriculum.prompts(step))
        tally, refilled = self._dynamic_sampling(batch, tally, clock, meter)
        described |= refilled
        everyone = advantages(torch.tensor(tally.rewards), scale=self.settings.loss.scale_rewards)
        advantage = everyone[batch.places].flatten()  # (B,), of this rank's completions
        teaches = self.settings.loss.beta > 0 or bool(everyone.any())

        # 3. Ask the frozen reference how likely it finds them.
        prompt_index = [index for index in range(len(batch.prompts)) for _ in range(settings.num_generations)]
        sequences = Sequences(batch.prompts, batch.rollout.completions, prompt_index)
        ref_logprobs = None
        with clock.phase("reference"):
            if self.reference is not None:
                likelihood = partial(reference_logprobs, self.reference, sequences, temperature=settings.temperature)
                likelihood = partial(likelihood, fit=self.learning)
                if self.reference.is_sharded:
                    extra = extra_passes(self.ranks, range(len(prompt_index)), self.learning.rows)
                    ref_logprobs = self.ranks.own(partial(likelihood, extra=extra))
                else:
                    ref_logprobs = self.ranks.own(partial(likelihood, poll=self._poll))

        # 4. Make what did better than its group more likely.
        with clock.phase("update"):
            rate = self._learning_rate(step)
            for group in self.training.optimizer.param_groups:
                group["lr"] = rate
            try:
                updated = update(
                    self.training.learns,
                    self.training.optimizer,
                    sequences,
                    advantage,
                    loss=self.settings.loss,
                    temperature=settings.temperature,
                    max_new_tokens=settings.max_new_tokens,
                    num_inner_updates=settings.num_inner_updates,
                    clip_grad_norm=settings.clip_grad_norm,
                    fit=self.learning,
                    ref_logprobs=ref_logprobs,
                    sampled_logprobs=batch.rollout.logprobs,
                    ranks=self.ranks,
                    step=Step(everyone.numel(), tally.tokens, teaches),
                    poll=self._poll,
                    stepping=partial(clock.phase, "optimizer"),
                )
                self.training.bad_in_a_row = 0
                if self.training.learner:
                    gather(self.training.learner, policy)
            except NotFinite as problem:
                updated = {}
                weights = self._fall_back(problem) if isinstance(problem, Diverged) else "stay as they are"
                self._skip(batch, problem, weights)
        bad = self.training.bad_steps
        return {"step": step, **described, **updated, "learning_rate": rate, "bad_steps": bad}, batch, advantage

    def _sample(
        self, step: int, clock: Clock, meter: Meter, places: Sequence[int], *, turn: int = 0
    ) -> tuple[Batch, Tally]:
        """This rank's completions of the prompts at `places` in a step, scored, and the tally of all ranks'.

        Later turns have other prompts.
        """
        share = [place for place in self.ranks.share(self.settings.train.batch_size) if place in places]
        kept: list[Batch] = []

        def work() -> Tally:
            kept.append(self._sample_share(step, clock, meter, share, turn))
            return kept[0].tally()

        tallies = self.ranks.each(work)
        return kept[0], reduce(add, tallies)

    def _sample_share(self, step: int, clock: Clock, meter: Meter, places: list[int], turn: int) -> Batch:
        policy, settings = self.training.policy, self.settings.train
        drawn = self.curriculum.prompts(step, turn=turn)
        puzzles, styles = [drawn[place][0] for place in places], [drawn[place][1] for place in places]
        prompts = [
            policy.encode(prompt(puzzle, style, task=self.task)) for puzzle, style in zip(puzzles, styles, strict=True)
        ]
        groups = (len(places), settings.num_generations)
        with clock.phase("rollout"):
            indices = [turn * settings.batch_size + place for place in places]
            rollout = sample(
                policy,
                prompts,
                num_generations=groups[1],
                max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                uniform=uniforms(settings.seed, step, indices, groups[1], settings.max_new_tokens),
                fit=self.sampling,
                on_token=self._sampled,
            )
        meter.sampled(prompts, rollout)
        for name, seconds in rollout.seconds.items():
            clock.seconds[f"time/{name}"] = clock.seconds.get(f"time/{name}", 0.0) + seconds
        with clock.phase("score"):
            texts = [policy.decode(tokens) for tokens in rollout.completions]
            scores = []
            for row, (text, cut) in enumerate(zip(texts, rollout.truncated, strict=True)):
                index = row // groups[1]
                scores.append(score(text, puzzles[index], style=styles[index], truncated=cut, task=self.task))
            rewards = torch.tensor([found.reward for found in scores]).view(groups)  # (P, G)
        return Batch(step, places, puzzles, styles, prompts, rollout, texts, scores, rewards)

    def _dynamic_sampling(
        self, batch: Batch, tally: Tally, clock: Clock, meter: Meter
    ) -> tuple[Tally, dict[str, float]]:
        """Put groups that tell their samples apart where all are rewarded alike, as DAPO does (arXiv 2503.14476).

        They are of puzzles in an order of their own, so those of later steps stay what they are. At most
        `dynamic_sampling` times; what is then still alike stays. Returns the new tally. Metrics describe what was
        drawn first: the others are not chosen fairly.
        """
        turns, tokens = self.settings.train.dynamic_sampling, 0
        first = flat = zero_variance(torch.tensor(tally.rewards))
        for turn in range(1, turns + 1):
            places = flat.nonzero()[:, 0].tolist()
            if not places:
                break
            other, drawn = self._sample(batch.step, clock, meter, places, turn=turn)
            tokens += drawn.tokens
            batch.take(other)
            tally = reduce(add, self.ranks.each(batch.tally))
            flat = zero_variance(torch.tensor(tally.rewards))
        if not turns:
            return tally, {}
        return tally, {"refilled": float(first.sum() - flat.sum()) / len(flat), "tokens_refilled": tokens}

    def _work(self, batch: Batch, advantage: torch.Tensor) -> Work:
        """What this rank computes in the step of a batch with its advantages (B,), as `cost` prices it."""
        settings = self.settings.train
        return Work(
            list(map(len, batch.prompts)),
            list(map(len, batch.rollout.completions)),
            settings.num_generations,
            reference=self.reference is not None,
            learned=None if self.settings.loss.beta else advantage.nonzero()[:, 0].tolist(),
            updates=settings.num_inner_updates,
        )

    def _fall_back(self, problem: Diverged) -> str:
        """Restore the newest whole checkpoint, and say so; raises CountdownError if there is none."""
        folder, training = self.run_folder, self.training
        saved = self.ranks.first(lambda: [step for step, _ in folder.checkpoints() if folder.damage(step) is None])
        if not saved or training.learner:
            raise CountdownError(
                f"{problem}; checkpoints of the run: {folder.saved_steps}",
                "start again, or from a checkpoint with `--model`, with a smaller `--learning-rate`",
                exit_code=1,
            )
        self.ranks.own(lambda: training.fall_back(folder.checkpoint_path(saved[-1])))
        return f"are those of step {saved[-1]} again"

    def _skip(self, batch: Batch, problem: NotFinite, weights: str) -> None:
        """Count a bad step, keep its batch for a report, and give up after too many in a row."""
        training, limit = self.training, self.settings.train.max_bad_steps
        training.bad_steps += 1
        training.bad_in_a_row += 1
        rows = enumerate(batch.rollout.completions)
        own = batch.prompts, [{**batch.record(row), "tokens": tokens} for row, tokens in rows]
        prompts, kept = (list(chain.from_iterable(parts)) for parts in zip(*self.ranks.each(lambda: own), strict=True))
        report = {"step": batch.step, "problem": str(problem), "prompts": prompts, "completions": kept}
        path = self.run_folder.write_bad_step(batch.step, report)
        self.observer.message(f"step {batch.step}: {problem}; the weights {weights}, the batch is in {path}")
        if training.bad_in_a_row >= limit:
            self.save()
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
                self.save()
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
        found: dict[str, Evaluation] = {}
        clock, last = Clock(ranks=self.ranks), step == settings.num_iterations
        if step % settings.eval_every == 0 or last:
            with clock.phase("eval"):
                found[self.val.name] = self._evaluate(self.val)
                with clock.phase("suite"):
                    found |= {one.name: self._evaluate(one) for one in self.puzzles if one != self.val}
            slowest, _ = self.ranks.report(clock.seconds, [])
            training.pending |= self._judge(found) | {name: slowest[name] for name in clock.seconds}
            self.run_folder.log_evaluations([{"step": step, **one.record()} for one in found.values()])
        self.run_folder.log(training.pending)
        suite_mean, training.pending = training.pending.get("suite_mean"), None
        val = found.get(self.val.name)
        if val is not None:
            self.observer.evaluated(step, val.accuracy, val.count, val.interval, suite_mean)
        if self.ranks.first(self._is_due) or (step and step % settings.save_every == 0) or last:
            self.save()
        return val

    def _is_due(self) -> bool:
        """Whether a checkpoint was requested, or the last one is `save_minutes` old."""
        minutes = self.settings.train.save_minutes
        old = self.training.step > 0 and 0 < minutes * 60 <= time.monotonic() - self.saved_at
        return self.should_save() or old

    def save(self) -> None:
        """Write a checkpoint of the last completed step, once, of weights that are the same on all ranks."""
        if any(other != sums for sums, other in pairwise(self.ranks.each(self.training.policy.sums))):
            raise CountdownError("the ranks no longer have the same weights", "go on with `--resume`", exit_code=1)
        self.ranks.own(lambda: self.training.save_shards(self.run_folder))
        self.ranks.first(lambda: self.training.save(self.run_folder, self.settings))
        self.saved_at = time.monotonic()

    def _judge(self, found: Mapping[str, Evaluation]) -> dict[str, float]:
        """Metrics of an evaluation. The model is kept if it is the best so far, unless training starts from it.

        The best has the highest weighted mean over the suite, or the highest val accuracy where there is none.
        """
        training, accuracy = self.training, found[self.val.name].accuracy
        metrics = {"val_accuracy": accuracy}
        if self.suite:
            values = {name: found[name].accuracy for name in self.suite}
            metrics |= {f"suite/{name}": value for name, value in values.items()}
            metrics["suite_mean"] = weighted_mean(values, self.suite)
        judged = metrics.get("suite_mean", accuracy)
        if training.step == 0:
            training.base_accuracy = accuracy
        elif training.best_score is None or judged > training.best_score:
            training.best_score, training.best_accuracy, training.best_step = judged, accuracy, training.step
            training.waited = 0
            self.ranks.first(lambda: training.save_best(self.run_folder))
        else:
            training.waited += 1
        return metrics

    def _evaluate(self, one: Cell) -> Evaluation:
        settings = self.settings
        return evaluate(
            self.training.policy,
            self.puzzles[one],
            style=one.style,
            split=one.split,
            task=self.task,
            max_new_tokens=settings.train.max_new_tokens,
            batch_size=settings.eval.batch_size,
            fit=self.evaluating,
            ranks=self.ranks,
            progress=partial(self.observer.progress, f"evaluating {one.name}: puzzle"),
            on_token=self._evaluated_token,
        )

    def _sampled(self, done: int) -> None:
        self.observer.progress("sampling token", done, self.settings.train.max_new_tokens)
        self.sampling.check()
        self._poll()

    def _evaluated_token(self, _: int) -> None:
        self.evaluating.check()
        self._poll()

    def _poll(self) -> None:
        if self.should_stop():
            raise Interrupted
