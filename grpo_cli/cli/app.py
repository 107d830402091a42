"""The commands: parse, make one call into the core, hand the result to display.

Heavy imports stand inside the commands, so that help, completion and `gen-data` start at once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial, reduce
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from grpo_cli import __version__
from grpo_cli.cli.launch import place
from grpo_cli.cli.options import flags, give, settings_command
from grpo_cli.cli.signals import Signals
from grpo_cli.core.errors import CountdownError
from grpo_cli.ui import tables as display
from grpo_cli.ui import text as show

if TYPE_CHECKING:
    import torch

    from grpo_cli.core.config.resolve import Resolved
    from grpo_cli.core.config.settings import Plot, Settings
    from grpo_cli.core.dist.ranks import Solo
    from grpo_cli.core.evals.compare import SuitePaired
    from grpo_cli.core.evals.evaluate import SuiteResult
    from grpo_cli.core.model.policy import Policy
    from grpo_cli.core.perf.memory import Choices, MemoryPlan
    from grpo_cli.core.rl.session import Training
    from grpo_cli.core.run.folder import Run
    from grpo_cli.core.task.puzzle import Puzzle
    from grpo_cli.core.task.scoring import Score
    from grpo_cli.ui.account import Account
    from grpo_cli.ui.figures import Curves

_ASKED = ("task.style", "task.numbers", "eval.split")
_DECODED = ("eval.limit", "eval.samples", "eval.temperature", "eval.max_new_tokens")

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="settings file; default: ./config.toml", metavar="<file>")
]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object and nothing else")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace what is there")]


def main() -> None:
    """Run the command line; what a user can mend is shown as one sentence, never as a traceback."""
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch on Linux then keeps large tensors in huge pages
    if "PYTORCH_ALLOC_CONF" not in os.environ:  # its newer name
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # less is lost between blocks
    try:
        show.silence(place().rank > 0)
        try:
            app()
        finally:
            sys.stdout.flush()  # here, and not at the end of the interpreter, it may fail
    except CountdownError as problem:
        if getattr(problem, "tells", False):
            show.silence(False)
        show.error(problem)
        sys.exit(problem.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads on: leave without a word
        sys.exit(1)
    except ImportError as problem:
        show.error(CountdownError(f"a package cannot be loaded: {problem}", "install `countdown` again"))
        sys.exit(1)
    except OSError as problem:
        what = problem.strerror or str(problem)
        show.error(CountdownError(f"{what}: `{problem.filename}`" if problem.filename else what))
        sys.exit(1)


def _show_version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="show the version and exit", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Teach a language model to solve countdown puzzles with GRPO."""


@app.command("gen-data", cls=settings_command("task.numbers"))
def gen_data(
    ctx: typer.Context,
    split: Annotated[Literal["train", "val"] | None, typer.Option(help="one split alone; default: both")] = None,
    count: Annotated[int, typer.Option(min=0, help="puzzles to draw at random; 0 enumerates all", metavar="<int>")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="seed of the puzzles drawn", metavar="<int>")] = 0,
    out: Annotated[Path | None, typer.Option(help="file to write; default: stdout", metavar="<file>")] = None,
    overwrite: Overwrite = False,
    config: ConfigFile = None,
) -> None:
    """Write puzzles as JSON Lines, each with a solution.

    Example: countdown gen-data --split val --out val.jsonl
    """
    from grpo_cli.core.task.data import ENUMERABLE, enumerate_puzzles, generate, json_line, summarize, write_puzzles

    numbers = _resolve(ctx, config, has_cuda=lambda: False).settings.task.numbers
    if not count and numbers > ENUMERABLE:
        raise CountdownError(f"puzzles of {numbers} numbers are too many to enumerate", "draw some with `--count`")
    if count:
        puzzles = generate(count, numbers=numbers, split=split, seed=seed)
    else:
        puzzles = list(enumerate_puzzles(numbers=numbers, split=split))
    if out is None:
        for puzzle in puzzles:
            print(json_line(puzzle))
    else:
        write_puzzles(out, puzzles, overwrite=overwrite)
    display.gen_data_summary(summarize(puzzles), out)


@app.command(cls=settings_command("preset", "runs", "task", "model", "train", "loss", "ranks"))
def train(
    ctx: typer.Context,
    run: Annotated[
        str | None, typer.Option(help="name of the run; default: run-1, run-2, ...", metavar="<name>")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with --run from its last whole checkpoint")] = False,
    step: Annotated[
        int | None, typer.Option(min=1, help="with --resume: the checkpoint to go on from", metavar="<int>")
    ] = None,
    overwrite: Overwrite = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="show every setting, one prompt and the memory needed, train nothing")
    ] = False,
    batch_size_per_rank: Annotated[
        int | None, typer.Option(min=1, help="--batch-size by the process, under torchrun", metavar="<int>")
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="sample the starting model, say what there is to learn, train nothing")
    ] = False,
    config: ConfigFile = None,
) -> None:
    """Train a model by reinforcement.

    Ctrl-C saves and stops; SIGUSR1 saves after the step. Example: countdown train --run first --num-iterations 100
    """
    from grpo_cli.core.config import resolve as layers
    from grpo_cli.core.run.folder import Run

    if resume and (run is None or overwrite):
        raise CountdownError("`--resume` needs the name of a run, and no `--overwrite`", "say `--run NAME --resume`")
    if step is not None and not resume:
        raise CountdownError("`--step` names a checkpoint to go on from", "say `--run NAME --resume --step STEP`")
    if probe and resume:
        raise CountdownError(
            "`--probe` looks at the model that a training starts from", "leave out `--resume`, and name it by `--model`"
        )
    here = place()
    if batch_size_per_rank is not None and not here.restarts:
        if "train.batch_size" in flags(ctx):
            raise CountdownError(
                "`--batch-size` and `--batch-size-per-rank` exclude each other", "leave one of them out"
            )
        give(ctx, "train.batch_size", batch_size_per_rank * here.size)
    if here.max_restarts and run is None:
        raise CountdownError("a training that may be restarted must know its run", "name it with `--run`")
    resolved = _resolve(ctx, config)
    root = Path(resolved.settings.runs)
    if here.restarts and run is not None:
        overwrite, resume = True, Run(root / run).config_path.is_file()
    old = Run.open(root, run) if resume and run is not None else None
    if old is not None:
        given = {key: value for key, value in flags(ctx).items() if key != "runs"}
        resolved = layers.go_on(old.read_config(), old.config_path, flags=given)
    show.note(f"preset {resolved.settings.preset}: {resolved.preset_reason}")
    plan = _plan_of(resolved, root, resolved.settings.model.model)
    if resolved.settings.model.ref_model != "same":
        _source(root, resolved.settings.model.ref_model)
    if old is None:
        Run.check(root, run, overwrite=overwrite)
    if dry_run:
        _show(resolved, plan)
    if probe and here.rank == 0:
        _probe(plan)
    if dry_run or probe:
        return
    _need("matplotlib")
    with ExitStack() as held:
        ranks = _join(resolved.settings)
        _train(plan, old, step, lambda: Run.create(root, run, overwrite=overwrite), held, ranks)
        ranks.leave()


@app.command("eval", cls=settings_command("preset", "runs", "task", "model.device", "model.precision", "eval", "ranks"))
def evaluate_models(
    ctx: typer.Context,
    models: Annotated[
        list[str] | None, typer.Argument(metavar="[MODEL]...", help="runs, folders, hub ids, or `builtin`")
    ] = None,
    suite: Annotated[
        str | None, typer.Option(help="evaluate on the cells of this suite of the settings", metavar="<name>")
    ] = None,
    as_json: Json = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="print Markdown tables, for a report")] = False,
    out: Annotated[Path | None, typer.Option(help="file for every completion, JSON Lines", metavar="<file>")] = None,
    overwrite: Overwrite = False,
    config: ConfigFile = None,
) -> None:
    """Measure accuracy on all val puzzles; by default of the newest run's best model.

    Several models are evaluated as the first would be, and compared with it puzzle by puzzle. With --suite, --limit is
    puzzles per cell. Example: countdown eval builtin first --suite transfer
    """
    from grpo_cli.core.evals.compare import suite_paired

    if as_json and as_markdown:
        raise CountdownError("`--json` and `--markdown` exclude each other", "leave one of them out")
    if out is not None:
        _require_writable(out, overwrite=overwrite)
    weights = None if suite is None else _weights(ctx, config, suite)
    plans = [_plan(ctx, config, name) for name in models] if models else [_plan(ctx, config, None)]
    ranks = _join(plans[0].settings)
    results = _evaluate(plans, weights, quiet=as_json or ranks.rank > 0, ranks=ranks)
    ranks.leave()
    if ranks.rank > 0:
        return
    if out is not None:
        lines = [json.dumps(record) for result in results for cell in result.cells for record in cell.records()]
        out.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    pairs = [pair for result in results[1:] if (pair := suite_paired(results[0], result))]
    if len(results) > 1 and not pairs:
        show.note("several completions of a puzzle are not compared in pairs")
    display.leaks(results)
    if as_json:
        show.json_object(_evaluation_json(suite, results, pairs))
    elif as_markdown:
        display.markdown(suite, results, pairs)
    elif suite is not None:
        display.suite(suite, results)
        for pair in pairs:
            display.suite_paired(pair)
    elif len(results) == 1:
        display.evaluation(results[0].cells[0])
    else:
        display.comparison(results)
        for found in (found for pair in pairs for found in pair.cells.values()):
            display.paired(found)


@app.command(
    cls=settings_command(
        "preset", "runs", "task.style", "model.device", "model.precision", "eval.max_new_tokens", "eval.temperature"
    )
)
def solve(
    ctx: typer.Context,
    question: Annotated[str, typer.Argument(metavar="PUZZLE", help='"4 7 3 = 25", "4,7,3 -> 25", or a sentence')],
    model: Annotated[str | None, typer.Option(help="run, folder, hub id, or `builtin`", metavar="<name>")] = None,
    attempts: Annotated[int, typer.Option(min=1, help="completions to sample until one is right", metavar="<int>")] = 1,
    show_solution: Annotated[bool, typer.Option("--show-solution", help="show the solver's own solutions too")] = False,
    as_json: Json = False,
    config: ConfigFile = None,
) -> None:
    """Ask a model a puzzle; by default the newest run's best model.

    The first attempt is greedy, later ones are sampled. Example: countdown solve "4 7 3 = 25"
    """
    from grpo_cli.core.task.question import read_question
    from grpo_cli.core.task.solver import solve as all_solutions

    puzzle = read_question(question)
    solutions = all_solutions(puzzle)
    if not solutions:
        raise CountdownError(
            f"{show.question(puzzle.numbers, puzzle.target)} has no solution", "change a number", exit_code=1
        )
    plan = _plan(ctx, config, model)
    score, tried = _attempt(plan, puzzle, attempts, quiet=as_json)
    if as_json:
        found = {"numbers": list(puzzle.numbers), "target": puzzle.target, "answer": score.answer}
        found |= {"correct": score.correct, "reason": score.reason, "attempts": tried, "solutions": solutions}
        show.json_object(found)
    else:
        display.answer(score.answer or "")
        display.verdict(puzzle, score)
        if show_solution or not score.correct:
            display.solutions(puzzle, solutions)
    if not score.correct:
        raise typer.Exit(1)


@app.command("plot", cls=settings_command("runs", "plot"))
def plot_runs(
    ctx: typer.Context,
    runs: Annotated[
        list[str] | None, typer.Argument(metavar="[RUN]...", help="runs, or metrics files; default: the newest run")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="folder of the images; default: the run's, or . for several", metavar="<folder>")
    ] = None,
    report: Annotated[bool, typer.Option("--report", help="write report.html too: one page for people")] = False,
    config: ConfigFile = None,
) -> None:
    """Draw the training curve and the KL curve, of one run or of several overlaid.

    Example: countdown plot first second --smooth --report
    """
    from grpo_cli.core.run.folder import Run

    settings = _resolve(ctx, config, has_cuda=lambda: False).settings
    root, style = Path(settings.runs), settings.plot
    newest = Run.newest(root)
    names = runs or ([newest.name] if newest else [])
    if not names:
        raise CountdownError(f"no run in `{root}` yet", "train one with `countdown train`, or name a metrics file")
    chosen = [_curves(root, name) for name in names]
    folder = out or (chosen[0][1] if len(chosen) == 1 else Path("."))
    _need("matplotlib")
    _require_writable(folder / f"training_curve.{style.format}", overwrite=True)
    curves = [found for found, _ in chosen]
    page = folder / "report.html"
    if report:
        _require_writable(page, overwrite=True)
        _report([_account(root, name, found) for name, found in zip(names, curves, strict=True)], page, style)
    for path in [*_draw(curves, folder, style), *([page] * report)]:
        print(path)
    display.sparklines(curves)


# What the commands share


@dataclass(frozen=True)
class _Plan:
    """A model to load: where from, what to call it, and the settings to run it with."""

    source: str
    name: str
    settings: Settings


def _resolve(ctx: typer.Context, config_file: Path | None, *, has_cuda: Callable[[], bool] | None = None) -> Resolved:
    from grpo_cli.core.config import resolve as config

    def ask_torch() -> bool:
        import torch

        return torch.cuda.is_available()

    return config.resolve(flags=flags(ctx), environ=os.environ, config_file=config_file, has_cuda=has_cuda or ask_torch)


def _plan(ctx: typer.Context, config_file: Path | None, name: str | None) -> _Plan:
    """What to run for a model's name: a run's best model with that run's settings, or a model with a preset's."""
    from grpo_cli.core.config import resolve as config
    from grpo_cli.core.run.folder import Run

    resolved = _resolve(ctx, config_file)
    root = Path(resolved.settings.runs)
    if name is None:
        newest = Run.newest(root)
        name = newest.name if newest is not None else "builtin"
    run = _run_named(root, name)
    if run is not None:
        given = {key: value for key, value in flags(ctx).items() if key not in ("preset", "runs")}
        resolved = config.restore(run.read_config(), run.config_path, flags=given)
    elif name == "builtin" and "preset" not in flags(ctx):
        given = {**flags(ctx), "preset": "builtin"}
        resolved = config.resolve(flags=given, environ=os.environ, config_file=config_file, has_cuda=lambda: False)
    return _plan_of(resolved, root, name)


def _plan_of(resolved: Resolved, root: Path, name: str) -> _Plan:
    """The plan for a run's name, a folder, a hub id or `builtin`; what is missing is refused before anything loads."""
    return _Plan(_source(root, name), name, resolved.settings)


def _source(root: Path, name: str) -> str:
    """Where the model of a name is loaded from."""
    from grpo_cli.core.model.load import find

    run = _run_named(root, name)
    if run is None:
        find(name)
        return name
    if not run.model_path.is_dir():
        raise CountdownError(
            f"run `{name}` has no saved model yet", f"go on with `countdown train --run {name} --resume`"
        )
    return str(run.model_path)


def _run_named(root: Path, name: str) -> Run | None:
    from grpo_cli.core.run.folder import list_runs

    return next((run for run in list_runs(root) if run.name == name), None)


def _load(plan: _Plan, source: Path | None = None, choices: Choices | None = None) -> Policy:
    """The model of a plan, or of one of its checkpoints; to be trained as `choices` say, if there are any."""
    from grpo_cli.core.model.load import load

    model = plan.settings.model
    policy = load(
        plan.source if source is None else str(source),
        device=model.device,
        precision=model.precision,
        gradient_checkpointing=choices is not None and choices.checkpointing,
    )
    return replace(policy, name=plan.name, logit_chunk=choices.logit_chunk if choices else 0)


def _for_ranks(plan: _Plan, ranks: int) -> _Plan:
    """The plan as so many ranks carry it out: with an optimizer that knows sharded tensors, if there are to be some."""
    settings = plan.settings
    if not settings.ranks.shard:
        return plan
    if ranks == 1:
        raise CountdownError(
            "`--shard` spreads a model over several processes", "start them with torchrun, or give `--no-shard`"
        )
    if settings.train.optimizer == "adamw8bit":
        raise CountdownError("`adamw8bit` does not know sharded tensors", "use `--optimizer adamw` with `--shard`")
    train = settings.train.model_copy(update={"optimizer": "adamw"})
    return replace(plan, settings=settings.model_copy(update={"train": train}))


def _memory(plan: _Plan, device: torch.device, *, ranks: int, free: int = 0) -> MemoryPlan:
    """What a training by so many ranks takes up on the device of each, from the model's config and tokenizer alone.

    `free`: bytes, of which the settings may give others.
    """
    from functools import partial

    from grpo_cli.core.model.load import load_tokenizer
    from grpo_cli.core.model.policy import encode
    from grpo_cli.core.perf import memory
    from grpo_cli.core.rl.session import choose_optimizer
    from grpo_cli.core.rl.train import longest_prompt

    settings = plan.settings
    longest = longest_prompt(settings, partial(encode, load_tokenizer(plan.source)))
    optimizer = choose_optimizer(settings.train.optimizer, device)
    work = memory.Work.of(settings, device=device, optimizer=optimizer, prompt_tokens=longest, ranks=ranks)
    return memory.plan_for(plan.source, work, settings, free=free)


def _show(resolved: Resolved, plan: _Plan) -> None:
    """What `train` would do: every setting with its source, the first prompt as the model reads it, and the memory."""
    import torch

    from grpo_cli.core.model.load import detect_device, prompt_tokens
    from grpo_cli.core.rl.train import curriculum
    from grpo_cli.core.task.prompts import prompt

    plan = _for_ranks(plan, place().size)
    display.config_table(resolved)
    puzzle, style = curriculum(resolved.settings).prompts(1)[0]
    display.prompt_tokens(prompt_tokens(plan.source, prompt(puzzle, style)))
    model = plan.settings.model
    elsewhere = model.device == "cuda" and model.memory > 0  # a plan needs no GPU
    device = torch.device("cuda") if elsewhere else detect_device(model.device)
    display.memory_plan(_memory(plan, device, ranks=place().size))


def _probe(plan: _Plan) -> None:
    """Sample the starting model as training would, in every style, and show what there is to learn from."""
    from grpo_cli.core.perf.microbatch import MicroBatch
    from grpo_cli.core.rl import probe
    from grpo_cli.core.task.data import puzzle_set

    task, settings = plan.settings.task, plan.settings.train
    policy = _load(plan)
    with display.progress(f"probing {plan.name}", quiet=False) as advance:
        found = probe.probe(
            policy,
            probe.chosen_puzzles(puzzle_set(task.numbers, "train"), settings.seed),
            chosen=task.style,
            num_generations=settings.num_generations,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            batch_size=settings.batch_size * settings.num_generations,
            seed=settings.seed,
            fit=MicroBatch(told=show.note),
            progress=advance,
        )
    display.probe(found)


def _need(package: str) -> None:
    """Refuse to begin what will need a package that is not there."""
    if find_spec(package) is None:
        raise CountdownError(
            f"the package `{package}` is not installed", "install `countdown` again, with all it needs"
        )


def _require_writable(path: Path, *, overwrite: bool) -> None:
    """Raise CountdownError where a result could not be written later."""
    from grpo_cli.core.run.folder import can_write

    if not path.parent.is_dir():
        raise CountdownError(f"`{path.parent}` is no folder", "make it, or write elsewhere")
    if path.is_dir():
        raise CountdownError(f"`{path}` is a folder", "name a file in it")
    if path.exists() and not overwrite:
        raise CountdownError(f"`{path}` exists", "write elsewhere, or replace it with `--overwrite`")
    if not can_write(path if path.exists() else path.parent):
        raise CountdownError(f"`{path}` cannot be written", "write elsewhere, or change its permissions")


def _join(settings: Settings) -> Solo:
    """The processes that share the work: those that a launcher started, or this one by itself."""
    from grpo_cli.core.dist import ranks
    from grpo_cli.core.model.load import detect_device

    here = place()
    if here.size == 1:
        return ranks.Solo()
    device = detect_device(settings.model.device)
    if device.type == "cuda":
        import torch

        devices = torch.cuda.device_count()
        if here.local_rank >= devices:
            raise CountdownError(
                f"process {here.local_rank} of this machine has no device of its own: it has {devices}",
                "start one process for each device with `--nproc-per-node`",
            )
        torch.cuda.set_device(here.local_rank)
    timeout = settings.ranks.timeout
    return ranks.join(here.rank, here.size, device=device, timeout=timeout, attempt=here.restarts)


def _train(
    plan: _Plan, old: Run | None, wanted: int | None, create: Callable[[], Run], held: ExitStack, ranks: Solo
) -> None:
    """Go on with the run `old`, or start the one that `create` makes, which it does once the model has loaded.

    `held` keeps the run's lock; `wanted` is the step of the checkpoint to go on from, if not the newest.
    """
    from grpo_cli.core.dist import shards
    from grpo_cli.core.model.load import detect_device
    from grpo_cli.core.perf import memory
    from grpo_cli.core.rl import session as state
    from grpo_cli.core.rl.train import curriculum

    plan = _for_ranks(plan, ranks.size)
    settings = plan.settings
    device = detect_device(settings.model.device)
    if state.choose_optimizer(settings.train.optimizer, device) == "adamw8bit":
        _need("bitsandbytes")
    free = min(ranks.each(lambda: memory.free_memory(device)))  # so that all choose alike
    planned = ranks.own(lambda: _memory(plan, device, ranks=ranks.size, free=free))
    choices = planned.choices
    memory.limit(settings, device)
    step, checkpoint = 0, None
    if old:
        ranks.first(lambda: _lock(old, held))
        step, checkpoint = ranks.first(lambda: state.choose_checkpoint(old, settings, wanted, show.note))
    policy = ranks.own(lambda: _load(plan, checkpoint / "model" if checkpoint else None, choices))
    settings = state.settled(settings, policy)
    learner = ranks.own(lambda: shards.sharded(policy, ranks, device)) if settings.ranks.shard else None
    optimizer = state.build_optimizer(
        learner or policy, name=settings.train.optimizer, weight_decay=settings.train.weight_decay
    )
    training = state.Training(policy, optimizer, learner)
    puzzles = list(chain.from_iterable(curriculum(settings).puzzles.values()))

    def frozen() -> Policy | None:
        original = policy if checkpoint is None else _load(plan, None, choices) if settings.loss.beta > 0 else None
        reference = _reference(plan, original, choices) if original and settings.loss.beta > 0 else None
        if old and checkpoint:
            state.require_origin(old, original, reference, puzzles)
            training.restore(checkpoint)
        return reference

    reference = ranks.own(frozen)

    def begun() -> Run:
        if old is None:
            _lock(run := create(), held)
        else:
            run = old
        run.require_space(2 * training.checkpoint_bytes())
        run.write_config(settings.model_dump())
        run.write_environment(state.environment(policy) | {"ranks": ranks.size}, step=step)
        if checkpoint is None:
            run.write_origin(state.origin(policy, reference, puzzles))
        if old:
            run.go_back_to(step if checkpoint else -1, pending=training.pending is not None)
        return run

    run = replace(ranks.first(begun), writes=ranks.rank == 0)
    if reference and learner:
        reference = shards.sharded(reference, ranks, device)
    among = f", by {ranks.size} processes" if ranks.size > 1 else ""
    show.note(f"run {run.path}: {plan.name} on {policy.device}, {policy.precision}, from step {step}{among}")
    show.note(display.memory_line(planned))
    _learn(training, reference, run, settings, ranks, rows=choices.rows)


def _reference(plan: _Plan, starting: Policy, choices: Choices) -> Policy:
    """The frozen reference: `starting` as it is now, or the model that the settings name."""
    name, on_host = plan.settings.model.ref_model, choices.on_host or plan.settings.ranks.shard
    if name == "same":
        return starting.frozen_copy(on_host=on_host)
    other = _load(replace(plan, source=_source(Path(plan.settings.runs), name), name=name), None, choices)
    other = other.frozen_copy(on_host=on_host)
    if other.fingerprint()["tokenizer"] != starting.fingerprint()["tokenizer"]:
        raise CountdownError(
            f"`{name}` reads text in other tokens than `{plan.name}`", "take a `--ref-model` with the same tokenizer"
        )
    return other


def _learn(
    training: Training, reference: Policy | None, run: Run, settings: Settings, ranks: Solo, *, rows: int
) -> None:
    """Train to the end, or until a signal, with the live view and the run's images."""
    from grpo_cli.core.evals import contamination as leaks
    from grpo_cli.core.rl import train as core
    from grpo_cli.core.rl.summary import summary
    from grpo_cli.ui.live import TrainingView, Unseen

    class View(TrainingView):
        """The live view, which also redraws the run's images after each evaluation."""

        def evaluated(
            self, step: int, accuracy: float, count: int, interval: tuple[float, float], suite_mean: float | None = None
        ) -> None:
            super().evaluated(step, accuracy, count, interval, suite_mean)
            if step:
                try:
                    _draw([_curves_of(run)], run.path, settings.plot)
                except OSError as problem:
                    self.message(f"the curves were not drawn: {problem}")

    shown: TrainingView | Unseen = Unseen()
    if run.writes:
        shown = View(settings.train.num_iterations, start=training.step)
    with Signals(launched=ranks.size > 1) as signals, shown as view:
        try:
            stop, save = signals.should_stop, signals.should_save
            evaluation = core.train(
                training, reference, run, settings, view, rows=rows, should_stop=stop, should_save=save, ranks=ranks
            )
        except core.Interrupted:
            view.message(f"stopped after step {training.step}; go on: countdown train --run {run.name} --resume")
            sys.exit(128 + (signals.stop or signal.SIGTERM))
    if not run.writes:
        return
    seen = leaks.known(run.name, run.path.parent)
    found = summary(training, replace(evaluation, known=seen), run)
    run.write_summary(found)
    display.training_summary(found, run.path, overlap=seen.statement(evaluation.puzzles))


def _lock(run: Run, held: ExitStack) -> None:
    left_by = held.enter_context(run.locked())
    if left_by is not None:
        show.note(f"run {run.name} was left by process {left_by}, which no longer runs; taking it over")


def _weights(ctx: typer.Context, config_file: Path | None, suite: str) -> Mapping[str, float]:
    """The cells of a suite of this invocation's settings, with their weights."""
    from grpo_cli.core.config.resolve import flag, require_suite

    for key in _ASKED:
        if key in flags(ctx):
            raise CountdownError(f"`{flag(key)}` is what the cells of a suite say", "leave it out, or leave `--suite`")
    settings = _resolve(ctx, config_file).settings
    require_suite(settings, suite, "`--suite`")
    return settings.suite[suite]


def _evaluate(
    plans: Sequence[_Plan], weights: Mapping[str, float] | None, *, quiet: bool, ranks: Solo
) -> list[SuiteResult]:
    """Every model on the same puzzles, decoded as the first one's settings say; of one cell if there are no weights."""
    from grpo_cli.core.evals import contamination as leaks
    from grpo_cli.core.evals.evaluate import evaluate_suite, puzzles_of
    from grpo_cli.core.perf.microbatch import MicroBatch
    from grpo_cli.core.task.suite import Cell, cell

    task, settings = plans[0].settings.task, plans[0].settings.eval
    if weights is None:
        weights = {Cell(settings.split, task.numbers, task.style).name: 1.0}
        _note_differences(plans, _ASKED + _DECODED)
    else:
        _note_differences(plans, _DECODED)
    known = [leaks.known(plan.source, Path(plan.settings.runs)) for plan in plans]
    puzzles = {cell(name): puzzles_of(cell(name), settings.limit) for name in weights}
    results: list[SuiteResult] = []
    with display.progress("evaluating", quiet=quiet) as advance:

        def done(count: int, total: int) -> None:
            advance(len(results) * total + count, len(plans) * total)

        for plan, trained_on in zip(plans, known, strict=True):
            result = evaluate_suite(
                ranks.own(partial(_load, plan)),
                puzzles,
                weights=weights,
                max_new_tokens=settings.max_new_tokens,
                samples=settings.samples,
                temperature=settings.temperature,
                batch_size=settings.batch_size,
                fit=MicroBatch(told=show.note),
                ranks=ranks,
                known=trained_on,
                progress=done,
            )
            results.append(result)
    return results


def _note_differences(plans: Sequence[_Plan], keys: Sequence[str]) -> None:
    """Say where a model's own settings would have it evaluated otherwise than the first."""
    first, *others = [{key: reduce(getattr, key.split("."), plan.settings) for key in keys} for plan in plans]
    differing = [
        f"{plan.name} by itself with {key} {own[key]}, not {first[key]}"
        for plan, own in zip(plans[1:], others, strict=True)
        for key in keys
        if own[key] != first[key]
    ]
    if differing:
        show.note(f"all are evaluated as {plans[0].name} would be: {'; '.join(differing)}")


def _evaluation_json(
    suite: str | None, results: Sequence[SuiteResult], pairs: Sequence[SuitePaired]
) -> dict[str, object]:
    """One model's evaluation; several and what sets them apart; or a suite's."""
    if suite is not None:
        first = results[0]
        how = {"suite": suite, "decoding": first.decoding, "protocol": first.protocol, "weights": dict(first.weights)}
        compared = [found for pair in pairs for found in pair.to_json()]
        return {**how, "models": [result.to_json() for result in results], "paired": compared}
    found = [result.cells[0].to_json() for result in results]
    compared = [found.to_json() for pair in pairs for found in pair.cells.values()]
    return found[0] if len(found) == 1 else {"models": found, "paired": compared}


def _attempt(plan: _Plan, puzzle: Puzzle, attempts: int, *, quiet: bool) -> tuple[Score, int]:
    """Ask up to `attempts` times, the first greedily by default; the last score and how many it took."""
    from grpo_cli.core.sampling.rollout import stream, uniforms
    from grpo_cli.core.task.prompts import prompt
    from grpo_cli.core.task.scoring import score

    policy, settings, style = _load(plan), plan.settings.eval, plan.settings.task.style
    tokens = policy.encode(prompt(puzzle, style))
    limit = settings.max_new_tokens
    for attempt in range(attempts):
        temperature = settings.temperature or (1.0 if attempt else 0.0)
        uniform = uniforms(attempt, 0, [0], 1, limit) if temperature else None
        pieces = stream(policy, tokens, max_new_tokens=limit, temperature=temperature or 1.0, uniform=uniform)
        text = "".join(pieces) if quiet else display.reasoning(pieces)
        found = score(text, puzzle, style=style)
        if found.correct:
            break
    return found, attempt + 1


def _curves(root: Path, name: str) -> tuple[Curves, Path]:
    """The curves of a run or of a metrics file, and the folder that their images belong in."""
    from grpo_cli.ui import figures as plot

    run = _run_named(root, name)
    return (plot.load(Path(name)), Path(".")) if run is None else (_curves_of(run), run.path)


def _curves_of(run: Run) -> Curves:
    from grpo_cli.ui import figures as plot

    return plot.from_metrics(run.name, run.metrics())


def _draw(curves: Sequence[Curves], folder: Path, style: Plot) -> list[Path]:
    """Draw both figures into a folder; returns their paths."""
    from grpo_cli.ui import figures as plot

    drawn = {"training_curve": plot.training_curve, "kl_divergence": plot.kl_curve}
    paths = [folder / f"{name}.{style.format}" for name in drawn]
    for path, draw in zip(paths, drawn.values(), strict=True):
        draw(curves, path, smooth=style.smooth, window=style.window)
    return paths


def _account(root: Path, name: str, curves: Curves) -> Account:
    """What a report tells of a run, or of a metrics file."""
    from grpo_cli.core.config import resolve as config
    from grpo_cli.core.config.settings import values
    from grpo_cli.ui import account

    run = _run_named(root, name)
    if run is None:
        return account.Account(curves)
    return account.Account(
        curves,
        run.metrics(),
        run.evaluations(),
        run.samples(),
        values(config.restore(run.read_config(), run.config_path).settings),
        run.read_summary(),
        run.read_environment(),
    )


def _report(accounts: Sequence[Account], path: Path, style: Plot) -> None:
    from grpo_cli.core.config.resolve import defaults
    from grpo_cli.ui import report

    report.write(report.page(accounts, defaults=defaults(), smooth=style.smooth, window=style.window), path)
