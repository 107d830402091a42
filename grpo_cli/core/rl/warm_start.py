"""A short supervised warm start before reinforcement: imitate worked searches of train puzzles.

For a pretrained model that never answers correctly, so all its groups have equal rewards. The gain of reinforcement is
measured against the warm-started model. It may learn to search completely first, and then, gently, to give up: whether
to go on is a decision that reinforcement teaches quickly.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import NamedTuple, TypeVar, cast

import torch
from transformers import PreTrainedTokenizerBase

from grpo_cli.core.builtin.traces import FORMS, reduce, tries, write
from grpo_cli.core.config.settings import Settings, digest
from grpo_cli.core.errors import CountdownError
from grpo_cli.core.microbatch import MicroBatch
from grpo_cli.core.model.policy import Policy, Sequences
from grpo_cli.core.rl.context import Context
from grpo_cli.core.rl.observer import Interrupted, no_poll
from grpo_cli.core.rl.schedule import Problems
from grpo_cli.core.rl.state import State, build_optimizer, newest_intact
from grpo_cli.core.rl.update import Diverged, NotFinite, optimizer_step
from grpo_cli.core.run.folder import Run
from grpo_cli.core.task.prompts import Style, prompt
from grpo_cli.core.task.puzzle import Puzzle
from grpo_cli.core.task.task import Message
from grpo_cli.core.world import World


class Lesson(NamedTuple):
    """A puzzle, its prompt, and the completion to imitate."""

    puzzle: Puzzle
    messages: list[Message]
    completion: str

    def record(self) -> dict[str, object]:
        """A line of the run's warm_start.jsonl."""
        return {"step": 0, **self.puzzle.record(), "completion": self.completion}


class Stage(NamedTuple):
    """Lessons that are imitated once, in this order, with an optimizer of their own."""

    lessons: Sequence[Lesson]
    learning_rate: float  # its peak

    @property
    def batches(self) -> list[Sequence[Lesson]]:
        """The lessons of each step."""
        return [self.lessons[start : start + BATCH] for start in range(0, len(self.lessons), BATCH)]


T = TypeVar("T")

BATCH = 8  # completions per step
LEARNING_RATE = 1e-4  # peak, for complete searches
GENTLE = 2e-5  # peak, for impatient searches: at 1e-4 SmolLM2 forgets how to search
IMPATIENT = 0.9  # share of the impatient searches' long ones that give up
CLIP = 1.0  # gradient norm
GIVE_UP = 5  # failed tries of an impatient search
WARMUP = 0.1  # share of the steps over which the learning rate rises; then it falls linearly to 0


def demonstration(puzzle: Puzzle, *, style: Style, impatient: bool = False) -> str | None:
    """A completion that repeats the puzzle, then tries expressions in a fixed order, none twice, until one is correct.

    SmolLM2 compares a value with the target more reliably if both stand side by side: hence `need 18` in every line,
    and the puzzle in the first. A line has no spaces (`2*6+10=12+10=22 need 18 no`), which takes fewer tokens than the
    built-in model's traces. Parentheses come early enough to be learned. An `impatient` search gives up after GIVE_UP
    failures and answers with its last try.
    None if no form solves the puzzle.
    """
    lines = [f"{' '.join(map(str, puzzle.numbers))} -> {puzzle.target}"]
    for tree in tries(puzzle.numbers):
        if impatient and len(lines) > GIVE_UP:
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

    No puzzle comes twice while there are others.

    A share `give_up` of those with GIVE_UP or more failures is impatient. Leaves out puzzles that no form solves
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
    chosen = _drawn(by_length, len(styles), rng)
    return [
        (puzzle, demonstration(puzzle, style=style, impatient=rng.random() < give_up) or text)
        for (puzzle, text), style in zip(chosen, styles, strict=True)
    ]


def _drawn(by_length: Mapping[int, Sequence[T]], count: int, rng: random.Random) -> list[T]:
    """Draw from all lengths equally often, none twice before all were drawn once."""
    left: dict[int, list[T]] = {}
    drawn = []
    for _ in range(count):
        left = left or {length: rng.sample(own, len(own)) for length, own in sorted(by_length.items())}
        length = rng.choice(list(left))
        drawn.append(left[length].pop())
        if not left[length]:
            del left[length]
    return drawn


def stages_of(settings: Settings, problems: Problems, tokenizer: PreTrainedTokenizerBase) -> list[Stage]:
    """What the warm start imitates, with prompts of the training's first step: complete searches, then impatient ones.

    CountdownError if the task or its puzzles have no demonstrations.
    """
    task, train, prompts = settings.task, settings.train, problems.curriculum
    if task.task != "countdown" or task.puzzles != "none" or not set("+-*") <= set(task.operations):
        raise CountdownError(
            "`--warm-start` shows searches with + - * on the generated countdown puzzles",
            "train without it: `--warm-start 0`",
        )

    def fits(text: str) -> bool:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"]) < train.max_new_tokens

    if not FORMS.keys() & prompts.problems.keys():
        raise CountdownError("`--warm-start` shows puzzles of 3 or 4 numbers", "use one of them, or leave it out")
    drawn = chain.from_iterable(prompts.problems.values())
    puzzles = [puzzle for puzzle in drawn if isinstance(puzzle, Puzzle)]

    def shown(count: int, *, give_up: float) -> list[Lesson]:
        keys = (f"{train.seed}/warm start/{index}" for index in range(count))
        styles = [cast(Style, prompts.style.draw(1, key)) for key in keys]
        examples = demonstrations(puzzles, styles, seed=train.seed, give_up=give_up, fits=fits)
        return [
            Lesson(puzzle, prompt(puzzle, style, task.rules), text)
            for (puzzle, text), style in zip(examples, styles, strict=True)
        ]

    complete = Stage(shown(train.warm_start, give_up=0.0), LEARNING_RATE)
    if not train.warm_start_impatient:
        return [complete]
    return [complete, Stage(shown(train.warm_start_impatient, give_up=IMPATIENT), GENTLE)]


def warm_start(
    state: State,
    stages: Sequence[Stage],
    run: Run,
    settings: Settings,
    origin: Mapping[str, object],
    *,
    micro_batch: MicroBatch,
    context: Context,
) -> dict[str, object]:
    """Imitate with a checkpoint every `save_minutes`, and save the model; returns `origin` with its hash.

    Continues from the newest intact checkpoint. Raises CountdownError if the settings or `origin`, hashes of the
    starting model and puzzles, have changed since then, or if the loss or the weights are not finite. If `control` says
    stop, saves the last completed step and raises Interrupted.
    """
    checkpoints, world, control, note = run.warming, context.world, context.control, context.note
    _restore(state, run, settings, origin, note)
    if world.is_first:
        run.write_config(settings.model_dump())
        run.write_origin(origin)
        run.write_lessons(lesson.record() for stage in stages for lesson in stage.lessons)
    note(f"warm start: imitating {sum(len(stage.lessons) for stage in stages):,} searches")
    seconds, saved_at = 60 * settings.train.save_minutes, time.monotonic()
    try:
        with control:
            for step, steps, loss in imitate(state, stages, micro_batch=micro_batch, world=world, poll=context.poll):
                context.observer.progress(f"warm start: loss {loss:.3f}, step", step, steps)
                if step == steps:
                    note(f"warm start: step {step} of {steps}, loss {loss:.3f}")
                if world.gather(control.should_save() or 0 < seconds <= time.monotonic() - saved_at)[0]:
                    if world.is_first:
                        state.save(checkpoints, settings)
                    saved_at = time.monotonic()
                if context.any_stopped():
                    raise Interrupted
    except Interrupted:
        if world.is_first:
            state.save(checkpoints, settings)
        step = state.progress.step
        note(f"stopped in the warm start, after step {step}; resume with: {run.resume_command}")
        raise
    if world.is_first:
        with state.reported(run), run.saving(run.warm_start_path) as folder:
            state.policy.save(folder)
    return {**origin, "warm_start": state.policy.fingerprint()["weights"]}


def imitate(
    state: State,
    stages: Sequence[Stage],
    *,
    world: World | None = None,
    micro_batch: MicroBatch | None = None,
    poll: Callable[[], None] = no_poll,
) -> Iterator[tuple[int, int, float]]:
    """Train on the tokens of each completion once, after the state's step; yields step, steps and loss of each step.

    Each rank of `world` computes its share of a step. `poll` is called before each micro-batch; it may raise, and
    `state` is then at its last completed step.
    """
    world, micro_batch = world or World(), micro_batch or MicroBatch()
    steps, done = sum(len(stage.batches) for stage in stages), state.progress.step
    step = 0
    for stage in stages:
        rise, count = max(1, round(WARMUP * len(stage.batches))), len(stage.batches)
        for index, batch in enumerate(stage.batches, start=1):
            step += 1
            if step <= done:
                continue
            if index == 1 and stage is not stages[0]:
                state.optimizer = optimizer_of(state.policy)
            scale = min(index / rise, (count + 1 - index) / (count + 1 - rise))
            loss = _step(state, batch, stage.learning_rate * scale, world=world, micro_batch=micro_batch, poll=poll)
            state.progress.step = step
            yield step, steps, loss


def _step(
    state: State,
    batch: Sequence[Lesson],
    learning_rate: float,
    *,
    world: World,
    micro_batch: MicroBatch,
    poll: Callable[[], None],
) -> float:
    """Take one step; returns its loss."""
    policy, optimizer = state.policy, state.optimizer
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    sequences = _sequences(policy, batch)
    rows, count = world.share(len(batch)), sum(map(len, sequences.completions))
    for attempt in micro_batch.attempts(len(rows), "warm start"):
        with attempt:
            optimizer.zero_grad(set_to_none=True)
            loss = 0.0
            for some in micro_batch.split(rows):
                poll()
                loss += _backward(policy, sequences.subset(some), count, micro_batch)
    loss = sum(world.gather(loss))
    try:
        optimizer_step(policy, optimizer, loss, CLIP, world)
    except NotFinite as problem:
        weights = "" if isinstance(problem, Diverged) else "; the weights are unchanged since the step before"
        raise CountdownError(
            f"step {state.progress.step + 1} of the warm start: {problem}{weights}",
            "use `--precision float32`, or leave out `--warm-start`",
            exit_code=1,
        ) from None
    finally:
        optimizer.zero_grad(set_to_none=True)
    return loss


def optimizer_of(policy: Policy) -> torch.optim.Optimizer:
    """A new optimizer of the warm start."""
    return build_optimizer(policy, name="adamw", weight_decay=0.0)


def _restore(
    state: State, run: Run, settings: Settings, origin: Mapping[str, object], note: Callable[[str], None]
) -> None:
    """Restore the newest intact checkpoint of the run's warm start, if there is one."""
    checkpoints = run.warming
    step = newest_intact(checkpoints, skipped=note)
    if step is None:
        return
    if run.read_origin() != origin or checkpoints.manifest(step).get("config") != digest(settings):
        raise CountdownError(
            f"the settings, model or puzzles of run `{run.name}` have changed since step {step} of its warm start",
            "restore them, or start a new run",
        )
    state.fall_back(checkpoints.checkpoint_path(step))
    state.progress.step = step
    note(f"warm start: continuing after step {step}")


def _backward(policy: Policy, sequences: Sequences, count: int, micro_batch: MicroBatch) -> float:
    """Add the gradient of these rows' part of the mean loss of `count` tokens; returns that part."""
    with micro_batch.watched(len(sequences.completions)):
        logprobs, _ = policy.logprobs(sequences, temperature=1.0, logit_chunk=micro_batch.logit_chunk)  # (B, T)
        loss = -logprobs.sum() / count
        loss.backward()
    return loss.item()


def _sequences(policy: Policy, batch: Sequence[Lesson]) -> Sequences:
    """Prompts with their completions, each followed by the first end-of-sequence token."""
    end = policy.end_id
    answers = (policy.encode_completion(lesson.completion) for lesson in batch)
    prompts = [policy.encode(lesson.messages) for lesson in batch]
    return Sequences(prompts, [[*answer, end] for answer in answers], list(range(len(batch))))
