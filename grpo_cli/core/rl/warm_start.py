"""A short supervised warm start before reinforcement: imitate worked searches of train puzzles.

For a pretrained model that never answers correctly, so all its groups have equal rewards. The gain of reinforcement is
measured against the warm-started model.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import NamedTuple, cast

import torch
from transformers import PreTrainedTokenizerBase

from grpo_cli.core.builtin.traces import FORMS, reduce, tries, write
from grpo_cli.core.config.settings import Settings, digest
from grpo_cli.core.dist.parallel import micro_batches
from grpo_cli.core.errors import CountdownError
from grpo_cli.core.microbatch import MicroBatch
from grpo_cli.core.model.policy import Policy, Sequences
from grpo_cli.core.rl.observer import Control
from grpo_cli.core.rl.schedule import curriculum
from grpo_cli.core.rl.state import Training, build_optimizer
from grpo_cli.core.rl.train import Interrupted
from grpo_cli.core.run.folder import Run
from grpo_cli.core.task.prompts import Style, prompt
from grpo_cli.core.task.puzzle import Puzzle
from grpo_cli.core.task.task import Message


class Lesson(NamedTuple):
    """A puzzle, its prompt, and the completion to imitate."""

    puzzle: Puzzle
    messages: list[Message]
    completion: str

    def record(self) -> dict[str, object]:
        """A line of the run's warm_start.jsonl."""
        return {"step": 0, **self.puzzle.record(), "completion": self.completion}


BATCH = 8  # completions per step
LEARNING_RATE = 1e-4
PATIENT = 5  # failed tries after which an impatient search gives up
WARMUP = 0.1  # share of the steps over which the learning rate rises; then it falls linearly to 0


def demonstration(puzzle: Puzzle, *, style: Style, impatient: bool = False) -> str | None:
    """A completion that repeats the puzzle, then tries expressions in a fixed order, none twice, until one is correct.

    SmolLM2 compares a value with the target more reliably if both stand side by side: hence `need 18` in every line,
    and the puzzle in the first. A line has no spaces (`2*6+10=12+10=22 need 18 no`), which takes fewer tokens than the
    built-in model's traces. Parentheses come early enough to be learned. An `impatient` search gives up after PATIENT
    failures and answers with its last try.
    None if no form solves the puzzle.
    """
    lines = [f"{' '.join(map(str, puzzle.numbers))} -> {puzzle.target}"]
    for tree in tries(puzzle.numbers):
        if impatient and len(lines) > PATIENT:
            lines.append("give up")
            break
        expression, steps = write(tree), [write(tree)]
        while not isinstance(tree, int):
            tree = reduce(tree)
            steps.append(write(tree))
        verdict = "yes" if tree == puzzle.target else "no"
        lines.append(f"{'='.join(steps).replace(' ', '')} need {puzzle.target} {verdict}")
        if tree == puzzle.target:
            break
    else:
        return None
    thought = "\n".join(lines)
    if style == "natural":
        return f"{thought}\nThe expression is {expression}"
    return f"<think>\n{thought}\n</think>\n<answer>{expression}</answer>"


def demonstrations(
    puzzles: Sequence[Puzzle],
    styles: Sequence[Style],
    *,
    seed: int,
    give_up: float = 0.0,
    fits: Callable[[str], bool] = lambda text: True,
) -> list[tuple[Puzzle, str]]:
    """A puzzle with its demonstration for each of `styles`, short and long searches equally often.

    A share `give_up` of those with PATIENT or more failures is impatient. Leaves out puzzles that no form solves
    and demonstrations that do not fit; CountdownError if none remain.
    """
    rng, by_length = random.Random(seed), defaultdict(list)
    kinds = list(dict.fromkeys(styles))
    for puzzle in puzzles:
        texts = [demonstration(puzzle, style=kind) for kind in kinds] if len(puzzle.numbers) in FORMS else []
        solved = [text for text in texts if text and fits(text)]
        if solved and len(solved) == len(kinds):
            by_length[solved[0].count("\n")].append((puzzle, solved[0]))
    if not by_length:
        raise CountdownError(
            "no puzzle of this training can be demonstrated in so few tokens",
            "raise `--max-new-tokens`, or leave out `--warm-start`",
        )
    lengths = sorted(by_length)
    chosen = [rng.choice(by_length[rng.choice(lengths)]) for _ in styles]
    return [
        (puzzle, demonstration(puzzle, style=style, impatient=rng.random() < give_up) or text)
        for (puzzle, text), style in zip(chosen, styles, strict=True)
    ]


def lessons(settings: Settings, tokenizer: PreTrainedTokenizerBase, *, ranks: int = 1) -> list[Lesson]:
    """The examples that the warm start imitates, with prompts of the training's first step.

    CountdownError if the task or its puzzles have no demonstrations, or if there are several ranks.
    """
    task, train = settings.task, settings.train
    if ranks > 1:
        raise CountdownError(
            "`--warm-start` runs in one process",
            "train one step without torchrun, then start from that run's `warm_start` folder with `--model`",
        )
    if task.task != "countdown" or task.puzzles != "none" or not set("+-*") <= set(task.operations):
        raise CountdownError(
            "`--warm-start` shows searches with + - * on the generated countdown puzzles",
            "leave out `--warm-start`, or `--task`, `--puzzles` and `--operations`",
        )

    def fits(text: str) -> bool:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"]) < train.max_new_tokens

    prompts = curriculum(settings)
    if not FORMS.keys() & prompts.problems.keys():
        raise CountdownError("`--warm-start` shows puzzles of 3 or 4 numbers", "use one of them, or leave it out")
    drawn = chain.from_iterable(prompts.problems.values())
    puzzles = [puzzle for puzzle in drawn if isinstance(puzzle, Puzzle)]
    keys = (f"{train.seed}/warm start/{index}" for index in range(train.warm_start))
    styles = [cast(Style, prompts.style.draw(1, key)) for key in keys]
    examples = demonstrations(puzzles, styles, seed=train.seed, give_up=train.warm_start_give_up, fits=fits)
    return [
        Lesson(puzzle, prompt(puzzle, style, task.rules), text)
        for (puzzle, text), style in zip(examples, styles, strict=True)
    ]


def imitation(policy: Policy) -> Training:
    """The state of a warm start of `policy` before its first step."""
    return Training(policy, build_optimizer(policy, name="adamw", weight_decay=0.0))


def warm_start(
    training: Training,
    lessons: Sequence[Lesson],
    *,
    learning_rate: float = LEARNING_RATE,
    fit: MicroBatch | None = None,
    report: Callable[[int, int, float], None] = lambda step, steps, loss: None,
    poll: Callable[[], None] = lambda: None,
) -> None:
    """Train on the tokens of each completion once, as many at a time as `fit` allows; continues after `training.step`.

    `report` receives step, steps and loss after each step. `poll` runs before each micro-batch; it may raise, and
    `training` is then at its last completed step.
    """
    fit = fit or MicroBatch()
    policy, optimizer = training.policy, training.optimizer
    batches = [lessons[start : start + BATCH] for start in range(0, len(lessons), BATCH)]
    rise = max(1, round(WARMUP * len(batches)))
    for step, batch in enumerate(batches[training.step :], start=training.step + 1):
        scale = min(step / rise, (len(batches) + 1 - step) / (len(batches) + 1 - rise))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * scale
        backward = partial(_backward, policy, _sequences(policy, batch), fit, poll)
        loss = fit.attempt(backward, total=len(batch), doing="warm start")
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        training.step = step
        report(step, len(batches), loss)


def resumable(
    training: Training,
    lessons: Sequence[Lesson],
    run: Run,
    settings: Settings,
    start: Mapping[str, object],
    *,
    fit: MicroBatch,
    control: Control,
    note: Callable[[str], None],
) -> None:
    """`warm_start` with a checkpoint every `save_minutes`; continues from the newest one, and saves the model.

    `start` holds the hashes of the starting model and puzzles; raises CountdownError if they or the settings have
    changed since the checkpoint. If `control` says stop, saves the last completed step and raises Interrupted.
    """
    _restore(training, run, settings, start, note)
    run.write_config(settings.model_dump())
    run.write_origin(start)
    run.write_lessons(lesson.record() for lesson in lessons)
    seconds, saved_at = 60 * settings.train.save_minutes, time.monotonic()

    def report(step: int, steps: int, loss: float) -> None:
        nonlocal saved_at
        if step % max(1, steps // 10) == 0 or step == steps:
            note(f"warm start: step {step} of {steps}, loss {loss:.3f}")
        if control.should_save() or 0 < seconds <= time.monotonic() - saved_at:
            training.save(run.warming, settings)
            saved_at = time.monotonic()

    def poll() -> None:
        if control.should_stop():
            raise Interrupted

    note(f"warm start: imitating {len(lessons):,} searches")
    try:
        with control:
            warm_start(training, lessons, fit=fit, report=report, poll=poll)
    except Interrupted:
        training.save(run.warming, settings)
        again = f"countdown train --run {run.name} --resume"
        note(f"stopped in the warm start, after step {training.step}; resume with: {again}")
        raise
    with training.reported(run), run.saving(run.warm_start_path) as folder:
        training.policy.save(folder)


def _restore(
    training: Training, run: Run, settings: Settings, start: Mapping[str, object], note: Callable[[str], None]
) -> None:
    """Restore the newest intact checkpoint of the run's warm start, if there is one."""
    checkpoints = run.warming
    for step, folder in reversed(checkpoints.checkpoints()):
        if problem := checkpoints.damage(step):
            note(f"skipping the checkpoint of step {step}: {problem}")
            continue
        if run.read_origin() != start or checkpoints.manifest(step).get("config") != digest(settings):
            raise CountdownError(
                f"the settings, model or puzzles of run `{run.name}` have changed since step {step} of its warm start",
                "restore them, or start a new run",
            )
        training.fall_back(folder)
        training.step = step
        note(f"warm start: continuing after step {step}")
        break


def _backward(policy: Policy, sequences: Sequences, fit: MicroBatch, poll: Callable[[], None], rows: int) -> float:
    """Set the gradient of the mean loss of all tokens, from micro-batches of `rows` completions; returns the loss."""
    policy.model.zero_grad(set_to_none=True)
    count, loss = sum(map(len, sequences.completions)), 0.0
    for chosen in micro_batches(range(len(sequences.completions)), rows):
        poll()
        some = sequences.subset(chosen)
        fit.begin(tokens=some.tokens, rows=len(chosen), adds=policy.missing_gradients())
        logprobs, _ = policy.logprobs(some, temperature=1.0, logit_chunk=fit.logit_chunk)  # (B, T)
        part = -logprobs.sum() / count
        part.backward()
        fit.end()
        loss += part.item()
    return loss


def _sequences(policy: Policy, batch: Sequence[Lesson]) -> Sequences:
    """Prompts with their completions, each followed by the first end-of-sequence token."""
    end = policy.tokenizer.eos_token_id
    answers = (policy.tokenizer(lesson.completion, add_special_tokens=False)["input_ids"] for lesson in batch)
    prompts = [policy.encode(lesson.messages) for lesson in batch]
    return Sequences(prompts, [[*answer, end] for answer in answers], list(range(len(batch))))
