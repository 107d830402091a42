"""The training loop: draw, sample, score, advantages, update, log.

`state.Training` holds the state of a checkpoint; prompts and samples of a step are functions of (seed, step). Unlike
the original system, the end-of-sequence token is trained on, evaluation is greedy over all val problems, and the saved
model is the best on dev, not the last.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from functools import partial
from itertools import chain

from torch import Tensor

from grpo_cli.core.config.settings import Settings
from grpo_cli.core.dist.parallel import NotFinite, parallel
from grpo_cli.core.dist.ranks import Passing, Solo
from grpo_cli.core.errors import CountdownError
from grpo_cli.core.evals.evaluate import Evaluation, Evaluator
from grpo_cli.core.evals.statistics import wilson
from grpo_cli.core.microbatch import MicroBatch, ran_out
from grpo_cli.core.model.reference import Reference
from grpo_cli.core.perf.utilization import Groups, Meter, operations
from grpo_cli.core.rl.batch import Batch
from grpo_cli.core.rl.clock import Clock
from grpo_cli.core.rl.collect import Collector
from grpo_cli.core.rl.grpo import advantages
from grpo_cli.core.rl.health import collapses, warnings
from grpo_cli.core.rl.observer import Control, Observer, Validated
from grpo_cli.core.rl.schedule import curriculum, learning_rate_at
from grpo_cli.core.rl.state import Training
from grpo_cli.core.rl.update import Diverged, Objective, reference_logprobs, update
from grpo_cli.core.rl.validate import Validation
from grpo_cli.core.run.folder import Run
from grpo_cli.core.sampling.params import SamplingParams
from grpo_cli.core.sampling.rollout import Engine
from grpo_cli.core.task.countdown import task_of

COMPARE_EVERY = 10  # steps between measurements of `logprob_gap`


class Interrupted(Passing):
    """Training was asked to stop; the last completed step is saved."""


def train(
    training: Training,
    reference: Reference | None,
    run: Run,
    settings: Settings,
    observer: Observer,
    *,
    fit: MicroBatch | None = None,
    control: Control | None = None,
    ranks: Solo | None = None,
) -> Evaluation:
    """Train from `training.step` to the end and return the last evaluation.

    Logs every step to the run and saves its best model and last checkpoints. `fit` is the micro-batch size of updates,
    by default that of the settings; its memory limit holds for sampling too. If `control` says stop, saves the last
    completed step and raises Interrupted. Raises CountdownError, with the last good step saved, if training cannot
    continue.

    With several `ranks`, each samples and learns from its share of a step's prompts; only the first writes the run.
    """
    fit = fit or MicroBatch(settings.train.micro_batch_size, report=observer.message)
    loop = _Loop(training, reference, run, settings, observer, fit, control or Control(), ranks or Solo())
    try:
        return loop.run()
    except Interrupted:
        loop.save()
        raise
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        hint = f"use a smaller model or batch; checkpoints of the run: {run.saved_steps}"
        raise CountdownError(f"memory ran out after step {training.step}", hint, exit_code=1) from error


class _Loop:
    def __init__(
        self,
        training: Training,
        reference: Reference | None,
        run: Run,
        settings: Settings,
        observer: Observer,
        fit: MicroBatch,
        control: Control,
        ranks: Solo,
    ) -> None:
        self.training, self.reference, self.run_folder, self.settings = training, reference, run, settings
        self.observer, self.fit, self.control, self.ranks = observer, fit, control, ranks
        self.parallel = parallel(training.policy, training.learner, ranks)
        engine, task, train = Engine(training.policy), task_of(settings), settings.train
        self.collector = Collector(
            engine, task, curriculum(settings), train, settings.reward, ranks, fit.whole(), self._sampled
        )
        evaluator = Evaluator(
            engine,
            SamplingParams(train.max_new_tokens, temperature=0.0),
            task,
            settings.eval.batch_size,
            fit=fit.whole(),
            ranks=ranks,
            on_token=lambda _: self._poll(),
        )
        self.validation = Validation(evaluator, settings, observer.progress)
        self.objective = Objective(
            settings.loss, train.temperature, train.max_new_tokens, train.num_inner_updates, train.clip_grad_norm
        )
        self.operations = operations(training.policy)
        self.warned: set[str] = set()
        self.saved_at = time.monotonic()

    def run(self) -> Evaluation:
        training = self.training
        if training.base_accuracy is not None:
            base, count = training.base_accuracy, self.validation.count
            self.observer.evaluated(Validated(0, base, count, wilson(base, count)))
        evaluation = self._finish_step()
        self.history = [line for line in self.ranks.first(self.run_folder.metrics) if line["step"] > 0]
        for step in range(training.step + 1, self.settings.train.num_iterations + 1):
            if self._out_of_patience():
                break
            self.ranks.doing = f"step {step}"
            clock, meter = Clock(self.ranks), Meter(training.policy, self.operations)
            with clock.phase("total"):
                batch, metrics = self._step(step, clock, meter)
            training.step = step
            self._log(batch, metrics, clock, meter)
            evaluation = self._finish_step()
            self._check_health()
        return evaluation or self.validation.evaluate(self.validation.val)

    def _step(self, step: int, clock: Clock, meter: Meter) -> tuple[Batch, dict[str, float]]:
        """One step of GRPO: its groups and metrics."""
        training, loss = self.training, self.settings.loss

        # 1. Draw prompts, sample a group of completions of each, score them.
        batch = self.collector.collect(step, clock, meter)

        # 2. Compare each completion with its group.
        everyone = advantages(batch.tally.rewards, scale=loss.scale_rewards)  # (P, G), of all ranks
        batch.set_advantages(everyone)

        # 3. Compute log-probabilities under the frozen reference.
        with clock.phase("reference"):
            ref_logprobs = None if self.reference is None else self._reference_logprobs(self.reference, batch)

        # 4. Make completions better than their group more likely.
        rate = self._set_learning_rate(step)
        with clock.phase("update"):
            try:
                updated = update(
                    self.parallel,
                    training.optimizer,
                    batch.examples(
                        ref_logprobs,
                        teaches=loss.beta > 0 or bool(everyone.any()),
                        compare=step % COMPARE_EVERY == 1,
                    ),
                    self.objective,
                    fit=self.fit,
                    poll=self._poll,
                    stepping=partial(clock.phase, "optimizer"),
                )
                training.bad_in_a_row = 0
                self.parallel.publish()
            except NotFinite as problem:
                updated = {}
                weights = self._fall_back(problem) if isinstance(problem, Diverged) else "are unchanged"
                self._skip(batch, problem, weights)
        return batch, {**batch.metrics, **updated, "learning_rate": rate, "bad_steps": training.bad_steps}

    def _reference_logprobs(self, reference: Reference, batch: Batch) -> Tensor:
        return reference_logprobs(
            reference,
            batch.sequences,
            temperature=self.objective.temperature,
            parallel=self.parallel,
            fit=self.fit,
            poll=self._poll,
        )

    def _set_learning_rate(self, step: int) -> float:
        train = self.settings.train
        rate = learning_rate_at(
            step,
            peak=train.learning_rate,
            schedule=train.schedule,
            warmup_steps=train.warmup_steps,
            num_iterations=train.num_iterations,
        )
        for group in self.training.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _log(self, batch: Batch, metrics: dict[str, float], clock: Clock, meter: Meter) -> None:
        """Add times and utilization to a step's metrics; pass them to the observer and the run's samples."""
        clock.seconds["time/update"] -= clock.seconds.get("time/optimizer", 0.0)
        times, records = self.ranks.report(clock.seconds, batch.shown())
        total = times["time/total"]
        metrics = {"step": batch.number, **metrics, **times, "tokens_per_second": batch.tokens / total}
        if self.ranks.rank == 0:  # of the first rank's share
            metrics |= meter.metrics(
                reference=_lengths(batch, learned=False) if self.reference else [],
                learned=_lengths(batch, learned=self.settings.loss.beta == 0),
                updates=self.objective.num_inner_updates,
                seconds=total,
            )
        pending = {key: value for key, value in metrics.items() if math.isfinite(value)}
        self.training.pending = pending
        self.history.append(pending)
        self.observer.step(pending, records[batch.number % len(records)])
        self.run_folder.log_samples(records)

    def _finish_step(self) -> Evaluation | None:
        """Evaluate, log and save the last step, as far as due and not done yet; returns the val evaluation."""
        training, settings, step = self.training, self.settings.train, self.training.step
        if training.pending is None:
            return None
        last, results = step == settings.num_iterations, dict[str, Evaluation]()
        if step % settings.eval_every == 0 or last:
            clock = Clock(self.ranks)
            results = self.validation.run(clock)
            metrics = self.validation.metrics(results)
            self._keep_best(metrics)
            slowest, _ = self.ranks.report(clock.seconds, [])
            training.pending |= metrics | {name: slowest[name] for name in clock.seconds}
            self.run_folder.log_evaluations([{"step": step, **result.record()} for result in results.values()])
        self.run_folder.log(training.pending)
        suite_mean, dev_accuracy = training.pending.get("suite_mean"), training.pending.get("dev_accuracy")
        training.pending = None
        val = results.get(self.validation.val.name)
        if val is not None:
            result = Validated(step, val.accuracy, val.count, val.interval, suite_mean, dev_accuracy)
            self.observer.evaluated(result)
        if self.ranks.first(self._is_due) or (step and step % settings.save_every == 0) or last:
            self.save()
        return val

    def _is_due(self) -> bool:
        """Whether a checkpoint was requested, or the last one is `save_minutes` old."""
        minutes = self.settings.train.save_minutes
        old = self.training.step > 0 and 0 < minutes * 60 <= time.monotonic() - self.saved_at
        return self.control.should_save() or old

    def _keep_best(self, metrics: Mapping[str, float]) -> None:
        """Save the model if it is the best on dev so far."""
        training, accuracy, score = self.training, metrics["val_accuracy"], metrics["dev_accuracy"]
        if training.step == 0:
            training.base_accuracy = accuracy
        elif training.best_score is None or score > training.best_score:
            training.best_score, training.best_accuracy, training.best_step = score, accuracy, training.step
            training.waited = 0
            self.ranks.first(lambda: training.save_best(self.run_folder))
        else:
            training.waited += 1

    def save(self) -> None:
        """Save a checkpoint of the last completed step."""
        self.parallel.check_equal()
        self.ranks.own(lambda: self.training.save_shards(self.run_folder))
        self.ranks.first(lambda: self.training.save(self.run_folder, self.settings))
        self.saved_at = time.monotonic()

    def _out_of_patience(self) -> bool:
        """Whether the last `patience` evaluations showed no improvement; the last step is then saved."""
        training, patience = self.training, self.settings.train.patience
        if not 0 < patience <= training.waited:
            return False
        if self.ranks.first(lambda: training.step not in dict(self.run_folder.checkpoints())):
            self.save()
        waited = f"{training.waited} evaluation{'s' if training.waited > 1 else ''} without improvement"
        best = f"the best is step {training.best_step}"
        self.observer.message(f"stopping after step {training.step}: {waited}; {best}")
        return True

    def _fall_back(self, problem: Diverged) -> str:
        """Restore the newest intact checkpoint and describe it; raises CountdownError if there is none."""
        folder, training = self.run_folder, self.training
        saved = self.ranks.first(lambda: [step for step, _ in folder.checkpoints() if folder.damage(step) is None])
        if not saved or training.learner:
            raise CountdownError(
                f"{problem}; checkpoints of the run: {folder.saved_steps}",
                "start again, or from a checkpoint with `--model`, with a smaller `--learning-rate`",
                exit_code=1,
            )
        self.ranks.own(lambda: training.fall_back(folder.checkpoint_path(saved[-1])))
        return f"are restored from step {saved[-1]}"

    def _skip(self, batch: Batch, problem: NotFinite, weights: str) -> None:
        """Save the batch of a failed update for a report; raises CountdownError after too many in a row."""
        training, limit, step = self.training, self.settings.train.max_bad_steps, batch.number
        training.bad_steps += 1
        training.bad_in_a_row += 1
        own = (
            [group.prompt for group in batch.groups],
            [
                {**group.record(step, sample), "tokens": tokens}
                for group in batch.groups
                for sample, tokens in enumerate(group.completions)
            ],
        )
        prompts, kept = (list(chain.from_iterable(parts)) for parts in zip(*self.ranks.each(lambda: own), strict=True))
        report = {"step": step, "problem": str(problem), "prompts": prompts, "completions": kept}
        path = self.run_folder.write_bad_step(step, report)
        self.observer.message(f"step {step}: {problem}; the weights {weights}, the batch is in {path}")
        if training.bad_in_a_row >= limit:
            self.save()
            good = self.run_folder.checkpoint_path(training.step) / "model"
            times = f"in {limit} steps in a row" if limit > 1 else f"in step {step}"
            raise CountdownError(
                f"{problem} {times}; the last good weights are in `{good}`",
                f"start from them with `--model {good}` and a smaller `--learning-rate`, or `--precision float32`",
                exit_code=1,
            )

    def _check_health(self) -> None:
        """Report each problem in the metrics once; end a collapsed training if `stop_on_collapse`."""
        collapsed = collapses(self.history)
        for sign, sentence in {**collapsed, **warnings(self.history)}.items():
            if sign in collapsed and self.settings.train.stop_on_collapse:
                self.save()
                hint = f"to continue anyway: `--run {self.run_folder.name} --resume --no-stop-on-collapse`"
                raise CountdownError(f"step {self.training.step}: {sentence}", hint, exit_code=1)
            if sign not in self.warned:
                self.warned.add(sign)
                self.observer.message(sentence if sign == "right" else f"warning: {sentence}")

    def _sampled(self, count: int) -> None:
        self.observer.progress("sampling token", count, self.settings.train.max_new_tokens)
        self._poll()

    def _poll(self) -> None:
        if self.control.should_stop():
            raise Interrupted


def _lengths(batch: Batch, *, learned: bool) -> Groups:
    """Tokens of this rank's prompts and completions; `learned`: only of completions with an advantage."""
    groups = []
    for group in batch.groups:
        rows = zip(group.completions, group.advantages.tolist(), strict=True)
        lengths = [len(tokens) for tokens, advantage in rows if advantage or not learned]
        groups += [(len(group.prompt), lengths)] if lengths else []
    return groups
