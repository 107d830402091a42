"""The training loop: collect, advantages, reference, update, log, evaluate if due, save if due.

Prompts and samples of a step are functions of (seed, step), so a checkpoint and the settings are all that resuming
needs. Unlike the original system, the end-of-sequence token is trained on, evaluation is greedy over all val problems,
and the saved model is the best on dev, not the last.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from grpo_cli.core.config.settings import Loss, Settings
from grpo_cli.core.errors import CountdownError
from grpo_cli.core.evals.evaluate import Evaluation
from grpo_cli.core.evals.statistics import wilson
from grpo_cli.core.fsdp import gather
from grpo_cli.core.microbatch import MicroBatch, ran_out
from grpo_cli.core.model.reference import Reference
from grpo_cli.core.perf.memory import MemoryPlan
from grpo_cli.core.rl.batch import Batch, Examples
from grpo_cli.core.rl.clock import Clock
from grpo_cli.core.rl.collect import Collector
from grpo_cli.core.rl.context import Context
from grpo_cli.core.rl.diagnostics import with_plain_logprobs
from grpo_cli.core.rl.grpo import advantages
from grpo_cli.core.rl.health import SAMPLER_GAP, collapses, warnings
from grpo_cli.core.rl.observer import Interrupted, Observer, Validated
from grpo_cli.core.rl.schedule import scheduled_rate
from grpo_cli.core.rl.state import State, newest_intact
from grpo_cli.core.rl.update import Diverged, NotFinite, Objective, Watch, reference_logprobs, update
from grpo_cli.core.rl.validate import Validation
from grpo_cli.core.rollout.engine import EngineLost
from grpo_cli.core.run.folder import Run
from grpo_cli.core.world import World

COMPARE_EVERY = 10  # steps between measurements of `logprob_gap`


@dataclass(frozen=True)
class StepResult:
    """The outcome of `Trainer.step`; `metrics` are the update's."""

    batch: Batch
    examples: Examples
    loss: Loss  # with the sampler's correction of this step
    metrics: Mapping[str, float]


@dataclass
class Trainer:
    """A training with all that it needs, built once by `build`.

    With several ranks, each samples and learns from its share of a step's prompts; only the first writes the run.
    """

    settings: Settings
    state: State
    reference: Reference | None
    collector: Collector
    validation: Validation
    run: Run
    context: Context
    clock: Clock
    memory: MemoryPlan | None
    micro_batch: MicroBatch  # of updates and reference passes
    history: list[Mapping[str, float]] = field(default_factory=list)  # metrics of all steps
    warned: set[str] = field(default_factory=set)
    saved_at: float = field(default_factory=time.monotonic)

    @property
    def world(self) -> World:
        return self.context.world

    @property
    def observer(self) -> Observer:
        return self.context.observer

    def train(self) -> Evaluation:
        """Train from the state's step to the end; returns the last evaluation of val.

        Logs every step to the run and saves its best model and last checkpoints. If `control` says stop, saves the last
        completed step and raises Interrupted. Raises CountdownError, with the last good step saved, if training cannot
        continue.
        """
        try:
            return self._train()
        except (Interrupted, EngineLost):
            self.save()
            raise
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            hint = f"use a smaller model or batch; checkpoints of the run: {self.run.saved_steps}"
            raise CountdownError(f"memory ran out after step {self.state.progress.step}", hint, exit_code=1) from error

    def _train(self) -> Evaluation:
        progress = self.state.progress
        self._announce()
        evaluation = self._finish_step()  # the starting model's, or one that was interrupted
        self.history = [line for line in self.world.first(self.run.metrics) if line["step"] > 0]
        for step in range(progress.step + 1, self.settings.train.num_iterations + 1):
            if self._out_of_patience():
                break
            result = self.step(step)
            # 5. Log the step; evaluate and save if due.
            self._log(result.batch, result.metrics)
            evaluation = self._finish_step() or evaluation
            if self.context.any_stopped():
                raise Interrupted
            self._check_health()
        return evaluation or self.validation.evaluate(self.validation.val)[self.validation.val.name]

    def step(self, number: int, watch: Watch | None = None) -> StepResult:
        """Take a step, but log and save nothing. `watch` receives the terms of its loss."""
        with self.clock.phase("total"):
            # 1. Draw prompts, sample a group of completions of each, score them.
            batch = self.collector.collect(number)
            # 2. Compute log-probabilities under the frozen reference.
            ref_logprobs = self._reference_logprobs(batch)
            # 3. Compare each completion with its group.
            loss = corrected(self.settings.loss, self.history)
            examples = self.examples(batch, ref_logprobs, loss)
            # 4. Make completions better than their group more likely.
            updated = self._update(batch, examples, loss, watch)
        self.state.progress.step = number
        return StepResult(batch, examples, loss, updated)

    @property
    def _is_remote(self) -> bool:
        """Whether weights are sharded and a server samples: only the first rank then has a full copy."""
        return self.state.learner.is_sharded and self.settings.model.rollout == "vllm"

    def _announce(self) -> None:
        """Announce the training, and the base accuracy of a resumed run."""
        self.observer.begin(self.run, self.state.progress.step)
        base, count = self.state.progress.base_accuracy, self.validation.count
        if base is not None:
            self.observer.evaluated(Validated(0, base, count, wilson(base, count)))

    def examples(self, batch: Batch, ref_logprobs: Tensor | None, loss: Loss) -> Examples:
        """The examples of an update under this loss; gives the batch its advantages, and the metrics of them."""
        rewards = batch.tally.rewards
        if ref_logprobs is not None and loss.kl_in == "reward":
            kl = torch.cat(self.world.gather(batch.kl_to(ref_logprobs)))  # of all ranks, in the order of prompts
            rewards = rewards - loss.beta * kl.view_as(rewards)
        everyone = advantages(  # (P, G), all ranks
            rewards, scale=loss.scale_rewards, baseline=loss.baseline, pass_at_k=loss.pass_at_k
        )
        batch.set_advantages(everyone)
        batch.metrics |= {"advantage": float(everyone.mean().abs())}
        batch.metrics |= {"group_advantage": float(everyone.mean(dim=1).abs().max())}
        has_gradient = bool(everyone.any()) or loss.always_has_gradient
        return batch.examples(ref_logprobs, has_gradient=has_gradient, mask_truncated=loss.mask_truncated)

    def _reference_logprobs(self, batch: Batch) -> Tensor | None:
        if self.reference is None:
            return None
        with self.clock.phase("reference"):
            return reference_logprobs(
                self.reference,
                batch.sequences,
                temperature=self.settings.train.temperature,
                world=self.world,
                micro_batch=self.micro_batch,
                poll=self.context.poll,
            )

    def _update(self, batch: Batch, examples: Examples, loss: Loss, watch: Watch | None) -> dict[str, float]:
        """Update the policy; returns the metrics, without those of the update if it is skipped."""
        state, train = self.state, self.settings.train
        rate = scheduled_rate(train, batch.number)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        with self.clock.phase("update"):
            if batch.number % COMPARE_EVERY == 1 and not self._is_remote:
                examples = with_plain_logprobs(examples, state.policy, loss, temperature=train.temperature)
            try:
                updated = update(
                    state.learner,
                    state.optimizer,
                    examples,
                    Objective.of(train, loss),
                    clock=self.clock,
                    micro_batch=self.micro_batch,
                    poll=self.context.poll,
                    watch=watch,
                )
                state.progress.bad_in_a_row = 0
                if state.learner.is_sharded:
                    gather(state.learner, state.policy)
            except NotFinite as problem:
                updated = {}
                self._skip(batch, problem)
        return {**updated, "learning_rate": rate, "bad_steps": state.progress.bad_steps}

    def _log(self, batch: Batch, updated: Mapping[str, float]) -> None:
        """Pass the metrics of a step to the observer, and its samples to the run."""
        times = self.clock.lap()
        times["time/update"] -= times.get("time/optimizer", 0.0)
        records, groups = (
            list(chain.from_iterable(self.world.gather(part)))
            for part in (batch.sample_records(), batch.group_records())
        )
        speed = batch.tokens / times["time/total"]
        metrics = {"step": batch.number, **batch.metrics, **updated, **times, "tokens_per_second": speed}
        metrics |= self.collector.meter.metrics(  # of the first rank's share
            reference=batch.lengths() if self.reference else [],
            learned=batch.lengths(learned=self.settings.loss.beta == 0),
            updates=self.settings.train.num_inner_updates,
            seconds=times["time/total"],
        )
        metrics = {key: value for key, value in metrics.items() if math.isfinite(value)}
        self.state.progress.unlogged = metrics
        self.history.append(metrics)
        shown, keep = batch.number % len(records), self.settings.train.keep_groups
        self.observer.step(metrics, {**records[shown], "group": groups[shown]["completions"]})
        self.run.log_samples(records)
        self.run.log_groups([group for group in groups if keep < 0 or group["prompt_index"] < keep])

    def _finish_step(self) -> Evaluation | None:
        """Evaluate the last step if due, log its metrics, save if due; returns the evaluation of val.

        Does nothing if the step is logged. If it is interrupted, a resumed run does it again.
        """
        progress, train = self.state.progress, self.settings.train
        if progress.unlogged is None:
            return None
        step, last = progress.step, progress.step == train.num_iterations
        results = self._evaluate() if step % train.eval_every == 0 or last else {}
        self.run.log(progress.unlogged)
        logged, progress.unlogged = progress.unlogged, None
        val = results.get(self.validation.val.name)
        if val is not None:
            means = (logged.get("suite_mean"), logged.get("dev_accuracy"))
            sampled = (logged["val_sampled"], logged["val_pass_at_k"]) if "val_sampled" in logged else None
            result = Validated(step, val.accuracy, val.count, val.interval, *means, sampled)
            self.observer.evaluated(result)
        if self.world.first(self._save_is_due) or (step and step % train.save_every == 0) or last:
            self.save()
        return val

    def _evaluate(self) -> dict[str, Evaluation]:
        """Evaluate every cell, keep the model if it is the best, and add the accuracies to the step's metrics."""
        progress = self.state.progress
        assert progress.unlogged is not None
        results = self.validation.run()
        metrics = self.validation.metrics(results) | self.validation.sampled()
        self._keep_best(metrics)
        for name, seconds in self.clock.lap().items():  # of waiting for other ranks, the step has some too
            progress.unlogged[name] = progress.unlogged.get(name, 0.0) + seconds
        progress.unlogged |= metrics
        self.run.log_evaluations([{"step": progress.step, **result.record()} for result in results.values()])
        return results

    def _keep_best(self, metrics: Mapping[str, float]) -> None:
        """Save the model if it is the best on dev so far."""
        progress, accuracy, score = self.state.progress, metrics["val_accuracy"], metrics["dev_accuracy"]
        if progress.step == 0:
            progress.base_accuracy = accuracy
        elif progress.best_score is None or score > progress.best_score:
            progress.best_score, progress.best_accuracy, progress.best_step = score, accuracy, progress.step
            progress.waited = 0
            if self.world.is_first:
                self.state.save_best(self.run)
        else:
            progress.waited += 1

    def _save_is_due(self) -> bool:
        """Whether a checkpoint was requested, or the last one is `save_minutes` old."""
        minutes = self.settings.train.save_minutes
        old = self.state.progress.step > 0 and 0 < minutes * 60 <= time.monotonic() - self.saved_at
        return self.context.control.should_save() or old

    def save(self) -> None:
        """Save a checkpoint of the last completed step."""
        state, world = self.state, self.world
        has_copies = world.size > 1 and not self._is_remote
        if has_copies and len({tuple(sums) for sums in world.gather(state.policy.sums())}) > 1:
            raise CountdownError("the ranks no longer have the same weights", "resume with `--resume`", exit_code=1)
        state.save_shards(self.run)
        world.gather(None)  # all shards are written
        if world.is_first:
            state.save(self.run, self.settings)
        self.saved_at = time.monotonic()

    def _out_of_patience(self) -> bool:
        """Whether the last `patience` evaluations showed no improvement; the last step is then saved."""
        progress, patience = self.state.progress, self.settings.train.patience
        if not 0 < patience <= progress.waited:
            return False
        if progress.step != self.world.first(self._newest_intact):
            self.save()
        waited = f"{progress.waited} evaluation{'s' if progress.waited > 1 else ''} without improvement"
        best = f"the best is step {progress.best_step}"
        self.observer.message(f"stopping after step {progress.step}: {waited}; {best}")
        return True

    def _newest_intact(self) -> int | None:
        """The step of the newest intact checkpoint; not of later ones, which a replayed run has."""
        return newest_intact(self.run, below=self.state.progress.step + 1)

    def _skip(self, batch: Batch, problem: NotFinite) -> None:
        """Save the batch of a failed update for a report; raises CountdownError after too many in a row."""
        progress, limit, step = self.state.progress, self.settings.train.max_bad_steps, batch.number
        weights = self._fall_back(problem) if isinstance(problem, Diverged) else "are unchanged"
        progress.bad_steps += 1
        progress.bad_in_a_row += 1
        groups = [group for part in self.world.gather(batch.groups) for group in part]
        completions = [
            {**group.sample_record(step, sample), "tokens": tokens}
            for group in groups
            for sample, tokens in enumerate(group.completions)
        ]
        prompts = [group.prompt for group in groups]
        report = {"step": step, "problem": str(problem), "prompts": prompts, "completions": completions}
        path = self.run.write_bad_step(step, report)
        self.observer.message(f"step {step}: {problem}; the weights {weights}, the batch is in {path}")
        if progress.bad_in_a_row >= limit:
            self.save()
            good = self.run.checkpoint_path(progress.step) / "model"
            times = f"in {limit} steps in a row" if limit > 1 else f"in step {step}"
            raise CountdownError(
                f"{problem} {times}; the last good weights are in `{good}`",
                f"start from them with `--model {good}` and a smaller `--learning-rate`, or `--precision float32`",
                exit_code=1,
            )

    def _fall_back(self, problem: Diverged) -> str:
        """Restore the newest intact checkpoint and describe it; raises CountdownError if there is none."""
        saved = self.world.first(self._newest_intact)
        if saved is None or self.state.learner.is_sharded:
            raise CountdownError(
                f"{problem}; checkpoints of the run: {self.run.saved_steps}",
                "start again, or from a checkpoint with `--model`, with a smaller `--learning-rate`",
                exit_code=1,
            )
        self.state.fall_back(self.run.checkpoint_path(saved))
        return f"are restored from step {saved}"

    def _check_health(self) -> None:
        """Report each problem in the metrics once; end a collapsed training if `stop_on_collapse`."""
        collapsed = collapses(self.history)
        for sign, sentence in {**collapsed, **warnings(self.history)}.items():
            if sign in collapsed and self.settings.train.stop_on_collapse:
                self.save()
                hint = f"to continue anyway: `{self.run.resume_command} --no-stop-on-collapse`"
                raise CountdownError(f"step {self.state.progress.step}: {sentence}", hint, exit_code=1)
            if sign not in self.warned:
                self.warned.add(sign)
                self.observer.message(sentence if sign == "right" else f"warning: {sentence}")


def corrected(loss: Loss, history: Sequence[Mapping[str, float]]) -> Loss:
    """The loss of the step after `history`, with the sampler's correction that `auto` means: by the last gap."""
    gaps = (line["sampler_gap"] for line in reversed(history) if "sampler_gap" in line)
    chosen = "truncate" if next(gaps, 0.0) > SAMPLER_GAP else "none"
    return loss.model_copy(update={"sampler_correction": chosen}) if loss.sampler_correction == "auto" else loss
