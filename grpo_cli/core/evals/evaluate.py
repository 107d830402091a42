"""Accuracy of a policy on a set of puzzles, with the data to see why it fails.

By default the set is *all* val puzzles and decoding is greedy, so models are compared on the same puzzles without
sampling error.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice

from grpo_cli.core.errors import CountdownError
from grpo_cli.core.evals.contamination import Known, overlap
from grpo_cli.core.evals.statistics import clustered
from grpo_cli.core.microbatch import MicroBatch
from grpo_cli.core.rollout.engine import Engine, uniforms
from grpo_cli.core.rollout.params import SamplingParams
from grpo_cli.core.task.countdown import Countdown
from grpo_cli.core.task.suite import Cell, cell_name, weighted_mean
from grpo_cli.core.task.task import Problem, Score, Split, Task
from grpo_cli.core.world import World

COUNTDOWN = Countdown()
Progress = Callable[[int, int], None]
EXAMPLES = 4  # completions in an evaluation's record, of the same puzzles every time


@dataclass(frozen=True)
class Completion:
    """A scored completion. `length` is in tokens; `truncated` means that it reached the token limit."""

    puzzle: Problem
    text: str
    length: int
    truncated: bool
    score: Score


@dataclass(frozen=True)
class Evaluation:
    """All completions of one model on one set of puzzles, a list of `samples` per puzzle."""

    model: str
    split: Split
    style: str
    numbers: int
    samples: int
    temperature: float
    max_new_tokens: int
    seed: int
    completions: list[list[Completion]]
    known: Known | None = None  # what the model was trained on
    task: Task = COUNTDOWN

    @cached_property
    def _all(self) -> list[Completion]:
        return [completion for row in self.completions for completion in row]

    @property
    def cell(self) -> str:
        """Name of the cell, as in suites: `val 3 one-shot`."""
        return cell_name(self.split, self.numbers, self.style)

    @property
    def decoding(self) -> dict[str, float]:
        """Decoding settings; the seed is included if completions are sampled."""
        settings = {"samples": self.samples, "temperature": self.temperature, "max_new_tokens": self.max_new_tokens}
        return {**settings, "seed": self.seed} if self.temperature else settings

    @property
    def protocol(self) -> str:
        """Hash of problems, prompts and decoding: results are comparable if it is equal."""
        asked: list[object] = [self.task.prompt(puzzle, self.style) for puzzle in self.puzzles]
        asked += [problem.record() for problem in self.puzzles if not problem.size]  # a prompt holds all of a puzzle
        content = json.dumps([asked, self.decoding], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @property
    def count(self) -> int:
        """Number of puzzles."""
        return len(self.completions)

    @property
    def puzzles(self) -> list[Problem]:
        return [row[0].puzzle for row in self.completions]

    @property
    def overlap(self) -> int | None:
        """Puzzles that the model was trained on; None if unknown."""
        return None if self.known is None else overlap(self.puzzles, self.known)

    @property
    def accuracy(self) -> float:
        """Share of completions that are correct."""
        return _mean([completion.score.correct for completion in self._all])

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the accuracy over puzzles; completions of one puzzle are not independent."""
        return clustered([_mean([one.score.correct for one in row]) for row in self.completions], self.samples)

    @property
    def lenient_accuracy(self) -> float:
        """Share that is correct in any notation; never a reward."""
        return _mean([completion.score.lenient for completion in self._all])

    @property
    def format_rate(self) -> float:
        """Share of completions with both tag pairs."""
        return _mean([completion.score.well_formed for completion in self._all])

    @property
    def mean_length(self) -> float:
        """Mean tokens of a completion."""
        return _mean([completion.length for completion in self._all])

    @property
    def reasons(self) -> dict[str, int]:
        """Number of completions by the reason of their score."""
        return dict(Counter(completion.score.reason for completion in self._all))

    @property
    def cheats(self) -> dict[str, int]:
        """Number of cheating completions by kind."""
        return dict(Counter(completion.score.cheat for completion in self._all if completion.score.cheat))

    @property
    def pass_at_k(self) -> float | None:
        """Share of puzzles that at least one of several samples solves."""
        if self.samples == 1:
            return None
        return _mean([any(completion.score.correct for completion in row) for row in self.completions])

    @property
    def _figures(self) -> dict[str, object]:
        return {
            "accuracy": self.accuracy,
            "interval": list(self.interval),
            "lenient_accuracy": self.lenient_accuracy,
            "format_rate": self.format_rate,
            "mean_length": self.mean_length,
            "reasons": self.reasons,
        }

    @property
    def behaviour(self) -> dict[str, float]:
        """Mean of each kind of behaviour over completions; {} if the task observes none."""
        names = dict.fromkeys(name for one in self._all for name in one.score.behaviour)
        return {name: _mean([one.score.behaviour.get(name, 0.0) for one in self._all]) for name in names}

    def to_json(self) -> dict[str, object]:
        """The machine-readable result."""
        return {
            "model": self.model,
            "split": self.split,
            "style": self.style,
            "numbers": self.numbers,
            "count": self.count,
            "decoding": self.decoding,
            "protocol": self.protocol,
            **self._figures,
            "cheats": self.cheats,
            "behaviour": self.behaviour,
            "pass_at_k": self.pass_at_k,
            "overlap": self.overlap,
            "files": dict(self.task.files),
        }

    def record(self) -> dict[str, object]:
        """The record in a run's log: figures, which puzzles were solved, in order, and a few examples."""
        rows = self.completions
        few = [rows[index * (len(rows) - 1) // max(1, EXAMPLES - 1)][0] for index in range(min(EXAMPLES, len(rows)))]
        return {
            "cell": self.cell,
            "count": self.count,
            "puzzles": hashlib.sha256("\n".join(puzzle.key for puzzle in self.puzzles).encode()).hexdigest()[:16],
            **self._figures,
            "solved": "".join("1" if row[0].score.correct else "0" for row in rows),
            "examples": [_shown(completion) for completion in few],
        }

    def records(self) -> Iterator[dict[str, object]]:
        """Every completion as a JSON object."""
        return ({"model": self.model, "cell": self.cell, **_shown(completion)} for completion in self._all)


def _shown(completion: Completion) -> dict[str, object]:
    """A completion as a JSON object."""
    puzzle, score = completion.puzzle, completion.score
    return {
        **puzzle.record(),
        "completion": completion.text,
        "length": completion.length,
        "reward": score.reward,
        "reason": score.reason,
        "answer": score.answer,
    }


@dataclass(frozen=True)
class SuiteResult:
    """One model on the cells of a suite, `weights` by cell name, and the seconds it took."""

    model: str
    cells: list[Evaluation]
    weights: Mapping[str, float]
    seconds: float

    @property
    def mean(self) -> float:
        """Weighted mean accuracy of the cells."""
        return weighted_mean({result.cell: result.accuracy for result in self.cells}, self.weights)

    @property
    def decoding(self) -> dict[str, float]:
        """Decoding settings, the same in every cell."""
        return self.cells[0].decoding

    @property
    def protocol(self) -> str:
        """Hash of the protocols of all cells; a single cell's own."""
        hashes = [result.protocol for result in self.cells]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()[:16]

    @property
    def puzzles(self) -> list[Problem]:
        """All puzzles, each once, whatever the number of styles."""
        return list(dict.fromkeys(puzzle for result in self.cells for puzzle in result.puzzles))

    def to_json(self) -> dict[str, object]:
        """The machine-readable result."""
        cells = [result.to_json() for result in self.cells]
        return {"model": self.model, "mean": self.mean, "seconds": self.seconds, "cells": cells}


def puzzles_of(cell: Cell, limit: int = 0, task: Task = COUNTDOWN, *, sized: bool = False) -> list[Problem]:
    """The problems of a cell, or a fixed sample of `limit` of them; 0 is all.

    `sized` leaves out a file's puzzles of other sizes; raises CountdownError if none are left.
    """
    puzzles = list(task.problems(cell.split, cell.numbers))
    if sized:
        puzzles = [puzzle for puzzle in puzzles if puzzle.size in (0, cell.numbers)]
    if not puzzles:
        raise CountdownError(f"there are no puzzles for the cell `{cell.name}`", "leave it out of the suite")
    if not 0 < limit < len(puzzles):
        return puzzles
    return [puzzles[index] for index in sorted(random.Random(0).sample(range(len(puzzles)), limit))]


def common_size(puzzles: Sequence[Problem]) -> int:
    """The size of all puzzles; 0 if they differ."""
    sizes = {puzzle.size for puzzle in puzzles}
    return sizes.pop() if len(sizes) == 1 else 0


@dataclass(frozen=True)
class Evaluator:
    """Completes and scores puzzles, greedily or with several samples, as `params` says.

    `batch_size` completions are decoded at once, fewer if `micro_batch` finds that too many. The ranks of a `world`
    share the puzzles; each returns the full result. `known`: what the model was trained on.
    """

    engine: Engine
    params: SamplingParams
    task: Task = COUNTDOWN
    batch_size: int = 64
    seed: int = 0
    micro_batch: MicroBatch = field(default_factory=MicroBatch)
    world: World = field(default_factory=World)
    known: Known | None = None
    on_token: Callable[[int], None] | None = None  # receives the length of the unfinished rows; it may raise

    def evaluate(
        self,
        puzzles: Sequence[Problem],
        *,
        style: str,
        split: Split,
        numbers: int | None = None,
        progress: Progress = lambda *_: None,
    ) -> Evaluation:
        """Evaluate on puzzles; `progress` receives the number of puzzles done and their total.

        `numbers` is the size in the cell's name, by default that of all puzzles.
        """
        cell = Cell(split, common_size(puzzles) if numbers is None else numbers, style)
        return self.evaluate_cells({cell: puzzles}, progress=progress)[cell]

    def evaluate_cells(
        self, puzzles: Mapping[Cell, Sequence[Problem]], *, progress: Progress = lambda *_: None
    ) -> dict[Cell, Evaluation]:
        """Evaluate on the puzzles of several cells, which share batches."""
        model, params = self.engine.policy.name, self.params
        asked = [(cell.style, index, puzzle) for cell, own in puzzles.items() for index, puzzle in enumerate(own)]
        mine, size = self.world.share(len(asked)), max(1, self.batch_size // params.num_generations)

        def complete() -> list[list[Completion]]:
            done: list[list[Completion]] = []
            for start in range(0, len(mine), size):
                done += self._complete([asked[place] for place in mine[start : start + size]])
                progress(min(len(done) * self.world.size, len(asked)), len(asked))
            return done

        self.engine.update_weights()
        rows = iter(row for part in self.world.gather(self.world.agree(complete)) for row in part)
        decoding = (params.num_generations, params.temperature, params.max_new_tokens, self.seed)

        def result(cell: Cell, count: int) -> Evaluation:
            named = (model, cell.split, cell.style, cell.numbers)
            return Evaluation(*named, *decoding, list(islice(rows, count)), self.known, self.task)

        return {cell: result(cell, len(own)) for cell, own in puzzles.items()}

    def evaluate_suite(
        self,
        puzzles: Mapping[Cell, Sequence[Problem]],
        weights: Mapping[str, float],
        *,
        progress: Progress = lambda *_: None,
    ) -> SuiteResult:
        """Evaluate every cell; `progress` counts the puzzles of all cells."""
        start = time.perf_counter()
        cells = [*self.evaluate_cells(puzzles, progress=progress).values()]
        return SuiteResult(self.engine.policy.name, cells, weights, time.perf_counter() - start)

    def _complete(self, asked: Sequence[tuple[str, int, Problem]]) -> list[list[Completion]]:
        """The scored completions of each (style, index in its cell, puzzle)."""
        params, encode, prompt = self.params, self.engine.policy.encode, self.task.prompt
        indices, tokens = [index for _, index, _ in asked], params.max_new_tokens
        rollout = self.engine.sample(
            [encode(prompt(puzzle, style)) for style, _, puzzle in asked],
            params,
            uniform=None if params.greedy else uniforms(self.seed, 0, indices, params.num_generations, tokens),
            micro_batch=self.micro_batch,
            on_token=self.on_token,
        )
        rows = zip(rollout.completions, rollout.truncated, strict=True)
        return [
            [self._score(puzzle, style, *next(rows)) for _ in range(params.num_generations)]
            for style, _, puzzle in asked
        ]

    def _score(self, puzzle: Problem, style: str, tokens: list[int], truncated: bool) -> Completion:
        text = self.engine.policy.decode(tokens)
        score = self.task.score(text, puzzle, style=style, truncated=truncated)
        return Completion(puzzle, text, len(tokens), truncated, score)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
