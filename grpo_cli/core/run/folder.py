"""A run's folder: the only place that knows its file names.

runs/<name>/  config.json  origin.json  environment.json  summary.json  metrics.jsonl  evaluations.jsonl
              tracker.json  tensorboard/  wandb/  samples.jsonl  groups.jsonl.gz  why/  report.html
              training_curve.png  kl_divergence.png
              model/  adapter/  checkpoints/step-50/  bad_steps/  warm_start/  warm_start.jsonl  warming/  .lock
"""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import re
import secrets
import shlex
import shutil
import stat
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import chain, count
from pathlib import Path
from typing import Any, Self

from grpo_cli.core.config.resolve import defaults, restore, shipped_presets
from grpo_cli.core.config.settings import Settings
from grpo_cli.core.errors import CountdownError
from grpo_cli.core.files import append_lines, can_write, read_json, write, write_json, write_lines
from grpo_cli.core.run import checkpoint
from grpo_cli.core.run.groups import GroupLog
from grpo_cli.core.run.logs import Evaluated, Log, evaluated, numbers, problem_key

_FROM_STEP = "from step "
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_CHECKPOINT = re.compile(r"step-([0-9]+)")
_LOCK = ".lock"
RESERVED = frozenset({"auto", "builtin", "none", "same"})  # names that settings give to models


@dataclass(frozen=True)
class Run:
    """A run, known by its folder; made by `create`, `open` or `newest`."""

    path: Path
    writes: bool = True  # False on all ranks but the first

    @classmethod
    def create(cls, root: Path, name: str | None = None, *, overwrite: bool = False) -> Self:
        """Create an empty run in `root`; without a name the first free one of run-1, run-2, ...

        A name is free if no run ever started under it. Raises CountdownError for a bad name, and for a taken one unless
        `overwrite` removes that run. Only runs are removed, never other folders or symbolic links.
        """
        with _reported(f"cannot create a run in `{root}`"):
            root.mkdir(parents=True, exist_ok=True)
            if name is None:
                return next(cls(path) for path in (root / f"run-{number}" for number in count(1)) if _make(path))
            cls.check(root, name, overwrite=overwrite)
            path = root / run_name(root, name)
            if path.exists():
                with cls(path).locked():
                    checkpoint.discard(path)
            if _make(path):
                return cls(path)
        raise _taken(root, name)

    @staticmethod
    def check(root: Path, name: str | None, *, overwrite: bool = False) -> None:
        """Raise the errors of `create` for this name, but change nothing."""
        require_outside_runs(root)
        place = _existing(root)
        if not place.is_dir() or not can_write(place):
            why = "cannot be written" if place.is_dir() else "is not a folder"
            raise CountdownError(f"cannot create a run in `{root}`: `{place}` {why}", "choose another with `--runs`")
        if name is None:
            return
        path = root / (name := run_name(root, name))
        if name in RESERVED | shipped_presets():
            raise CountdownError(f"`{name}` cannot name a run: settings use that word", "choose another with `--run`")
        if _is_free(path):
            return
        if path.is_symlink() or not (path / "config.json").is_file():
            raise CountdownError(f"`{path}` is not a run, so it is not overwritten", "choose another name with `--run`")
        if not overwrite:
            raise _taken(root, name)

    @classmethod
    def open(cls, root: Path, name: str) -> Self:
        """Open the run `name` of `root` for writing; raises CountdownError if there is none."""
        run = cls(root / run_name(root, name))
        if not run.config_path.is_file():
            hint = suggestion(root, run.name) or f"list runs with `countdown runs{at(root)}`"
            if run.name not in RESERVED | shipped_presets() and _is_free(run.path):
                hint += f"{',' * (hint[-1] != '?')} or train one with `countdown train --run {run.name}{at(root)}`"
            raise CountdownError(f"no run `{run.name}` in `{root}`", hint)
        for path in (run.path, *sorted(run.path.iterdir())):
            if path.is_symlink():
                raise CountdownError(
                    f"`{path}` is a symbolic link, and a run writes to its own files alone",
                    "put the file or folder itself there; `--runs` may name any folder",
                )
            if path.name in ("model", "adapter", "checkpoints") and not path.is_dir():
                raise CountdownError(f"`{path}` is not a folder", "put the folder back, or start a new run")
        return run

    def delete(self) -> None:
        """Remove the run's folder; raises CountdownError if another process is writing it, or for a symbolic link."""
        if self.path.is_symlink():
            raise CountdownError(f"`{self.path}` is a symbolic link", "delete the run that it points to")
        with self.locked():
            checkpoint.discard(self.path)

    @classmethod
    def newest(cls, root: Path) -> Self | None:
        """The run with a saved model that logged last."""
        runs = [cls(run.path) for run in list_runs(root) if run.model_path.is_dir() and run._metrics.path.is_file()]
        return max(runs, key=lambda run: run._metrics.path.stat().st_mtime_ns, default=None)

    @classmethod
    def require_newest(cls, root: Path) -> Self:
        """The newest run; raises CountdownError if there is none."""
        if (run := cls.newest(root)) is None:
            raise CountdownError(f"no run in `{root}` yet", f"train one with `countdown train{at(root)}`")
        return run

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def resume_command(self) -> str:
        """The command that resumes the run."""
        return f"countdown train --run {self.name}{at(self.path.parent)} --resume"

    # Model and checkpoints

    @property
    def model_path(self) -> Path:
        """Folder of the best model so far, in Hugging Face format."""
        return self.path / "model"

    @property
    def adapter_path(self) -> Path:
        """Folder of the best model's adapter, in peft's format; a training of all weights has none."""
        return self.path / "adapter"

    @property
    def shards_path(self) -> Path:
        """Folder where the ranks write their parts of the next checkpoint."""
        return self.path / ".shards"

    @property
    def warm_start_path(self) -> Path:
        """Folder of the warm-started model, which reinforcement started from."""
        return self.path / "warm_start"

    @property
    def warming(self) -> Self:
        """The checkpoints of an unfinished warm start, in a folder of this run."""
        return type(self)(self.path / "warming", self.writes)

    def checkpoint_path(self, step: int) -> Path:
        """Folder of the checkpoint of a step; write it through `saving`."""
        return self.path / "checkpoints" / f"step-{step}"

    def checkpoints(self) -> list[tuple[int, Path]]:
        """(step, folder) of every checkpoint, in order of steps."""
        folders = (self.path / "checkpoints").glob("step-*")
        matches = [(_CHECKPOINT.fullmatch(folder.name), folder) for folder in folders]
        return sorted((int(match[1]), folder) for match, folder in matches if match)

    @property
    def saved_steps(self) -> str:
        """The steps of all checkpoints, for people to read."""
        return ", ".join(str(step) for step, _ in self.checkpoints()) or "none"

    def saving(self, path: Path, facts: Mapping[str, object] | None = None) -> AbstractContextManager[Path]:
        """Yield a temporary folder that then replaces `path` atomically; see `checkpoint.saving`."""
        return checkpoint.saving(path, facts)

    def manifest(self, step: int) -> dict[str, object]:
        """The facts saved with the checkpoint of a step."""
        return checkpoint.read_manifest(self.checkpoint_path(step))

    def damage(self, step: int, *, contents: bool = True) -> str | None:
        """What is damaged in the checkpoint of a step, or None. Without `contents`, compare only file sizes."""
        return checkpoint.damage(self.checkpoint_path(step), step, contents=contents)

    def prune_checkpoints(self, keep: int, *, also: int | None = None) -> None:
        """Remove all checkpoints except the last `keep` intact ones and that of step `also`.

        Damaged ones are kept for inspection, as are those that cannot be removed.
        """
        whole = [step for step, _ in self.checkpoints() if self.damage(step, contents=False) is None]
        for step in whole[: max(0, len(whole) - keep)]:
            if step != also:
                with suppress(OSError):
                    checkpoint.discard(self.checkpoint_path(step))

    # Start, lock, resume

    @contextmanager
    def locked(self) -> Iterator[int | None]:
        """Lock the run for writing; yield the process that left a stale lock, if any.

        Raises CountdownError while another process holds the lock. The system releases it when that process ends.
        """
        with _reported(f"cannot write `{self.path}`"):
            descriptor = _open_lock(self.path / _LOCK)
        with os.fdopen(descriptor, "r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CountdownError(
                    f"run `{self.name}` is being written by process {file.read(20).strip() or '?'}",
                    "wait until it ends, or choose another name with `--run`",
                ) from None
            left = file.read(20)
            file.truncate(0)
            file.seek(0)
            file.write(str(os.getpid()))
            file.flush()
            try:
                yield int(left) if left.isdecimal() else None
            finally:
                file.truncate(0)

    @contextmanager
    def starting(self) -> Iterator[None]:
        """Remove this new run if the block fails, so that a failed start leaves nothing."""
        try:
            yield
        except BaseException:
            with suppress(OSError):
                checkpoint.discard(self.path)
            raise

    def end_warming(self) -> None:
        """Remove the checkpoints of the warm start."""
        if self.warming.path.exists():
            checkpoint.discard(self.warming.path)

    def go_back_to(self, step: int, *, pending: bool = False) -> list[str]:
        """Remove metrics, samples and checkpoints of later steps; the resumed training writes them again.

        With `pending`, the evaluation and metrics of `step` itself are still to be logged too. Damaged lines of a log
        are moved to a file beside it; returns a sentence for each log that had some, or that is gone.
        """
        checkpoint.settle(self.model_path)
        for later, folder in self.checkpoints():
            if later > step:
                checkpoint.discard(folder)
        cuts = [(log.path, log.cut(step - pending)) for log in (self._metrics, self._evaluations)]
        cuts.append((self._samples.path, self._samples.cut(step)))
        cuts.append((self._groups.path, self._groups.cut(step)))
        gone = [path for path in (self._metrics.path, self._evaluations.path) if step > 0 and not path.exists()]
        return [f"`{path}` is gone: the steps up to {step} are missing in it" for path in gone] + [
            f"moved {damaged} damaged line{'s' * (damaged > 1)} of `{path}` to `{path.name}.damaged`"
            for path, damaged in cuts
            if damaged
        ]

    # Settings and facts

    @property
    def config_path(self) -> Path:
        """The file of the resolved settings."""
        return self.path / "config.json"

    def write_config(self, config: Mapping[str, object]) -> None:
        write_json(self.config_path, config)

    def read_config(self) -> dict[str, object]:
        return read_json(self.config_path)

    @property
    def settings(self) -> Settings:
        """The settings of the run."""
        return restore(self.read_config(), self.config_path).settings

    def write_origin(self, origin: Mapping[str, object]) -> None:
        write_json(self.path / "origin.json", origin)

    def read_origin(self) -> dict[str, object]:
        """Hashes of what the run started from."""
        return read_json(self.path / "origin.json")

    @property
    def has_origin(self) -> bool:
        return (self.path / "origin.json").exists()

    def tracker_id(self) -> str:
        """The run's name with a random suffix, the same for all its processes: another run may have its name later."""
        path = self.path / "tracker.json"
        if not path.exists():
            write_json(path, {"id": f"{self.name}-{secrets.token_hex(3)}"})
        saved = read_json(path).get("id")
        if not isinstance(saved, str):
            raise CountdownError(f"`{path}` has no `id`", "remove it: the tracker then shows a new run")
        return saved

    def write_environment(self, environment: Mapping[str, object], *, step: int) -> None:
        """Record the environment from `step` on, keeping the records of earlier steps."""
        known = self.read_environment() if step else {}
        earlier = {key: known[key] for key in known if int(key.removeprefix(_FROM_STEP)) < step}
        write_json(self._environment, {**earlier, f"{_FROM_STEP}{step}": environment})

    def read_environment(self) -> dict[str, object]:
        """The environments written by `write_environment`, by first step."""
        known = read_json(self._environment) if self._environment.exists() else {}
        for key, facts in known.items():
            if not re.fullmatch(rf"{_FROM_STEP}\d+", key) or not isinstance(facts, dict):
                raise CountdownError(f"`{key}` in `{self._environment}` is not the environment of a step")
        return known

    def write_summary(self, summary: Mapping[str, object]) -> None:
        write_json(self._summary, summary)

    def read_summary(self) -> dict[str, object] | None:
        """The summary, or None if the run has not ended."""
        return read_json(self._summary) if self._summary.exists() else None

    # Logs

    def write_lessons(self, records: Iterable[Mapping[str, object]]) -> None:
        """Write what the warm start imitates, one line per completion, to warm_start.jsonl."""
        write_lines(self._lessons, [json.dumps(record) for record in records])

    def log(self, metrics: Mapping[str, float]) -> None:
        """Append one line of finite numbers, `step` among them, to metrics.jsonl."""
        self._append(self._metrics.path, [metrics])

    def log_samples(self, samples: Iterable[Mapping[str, object]]) -> None:
        """Append one line per completion, each with its `step`, to samples.jsonl."""
        self._append(self._samples.path, samples)

    def log_groups(self, groups: Sequence[Mapping[str, object]]) -> None:
        """Append the groups of one step, each an object with its `step` and `completions`, to groups.jsonl.gz."""
        if self.writes:
            self._groups.append(groups)

    def log_evaluations(self, records: Iterable[Mapping[str, object]]) -> None:
        """Append one line per evaluated cell, each with its `step`, to evaluations.jsonl."""
        self._append(self._evaluations.path, records)

    def _append(self, path: Path, records: Iterable[Mapping[str, object]]) -> None:
        if self.writes:
            append_lines(path, records)

    def write_bad_step(self, step: int, batch: Mapping[str, object]) -> Path:
        """Keep the batch of a skipped step, and return its file."""
        path = self.path / "bad_steps" / f"step-{step}.json"
        if self.writes:
            path.parent.mkdir(exist_ok=True)
            write_json(path, batch)
        return path

    def metrics(self) -> list[dict[str, float]]:
        """Every logged line, [] before the first; raises CountdownError naming a line that is not all numbers."""
        return list(self._metrics.read())

    def evaluations(self) -> dict[str, dict[int, Evaluated]]:
        """Every evaluation by cell, then by step, in order; {} before the first."""
        by_cell: dict[str, dict[int, Evaluated]] = {}
        for record in self._evaluations.read():
            by_cell.setdefault(record.cell, {})[record.step] = record
        return by_cell

    def groups(self, step: int) -> list[dict[str, Any]]:
        """The groups that were kept of a step; [] if there are none."""
        return list(self._groups.read(step))

    def write_replay(self, step: int, content: bytes) -> None:
        """Keep the replay of a step in the folder why/."""
        path = self._replay(step)
        path.parent.mkdir(exist_ok=True)
        write(path, gzip.compress(content, mtime=0))

    def read_replay(self, step: int) -> bytes | None:
        """The replay of a step as it was written, or None if there is none that can be read."""
        try:
            return gzip.decompress(self._replay(step).read_bytes())
        except (OSError, EOFError, zlib.error):
            return None

    def _replay(self, step: int) -> Path:
        return self.path / "why" / f"step-{step}.json.gz"

    def trained_on(self) -> Iterator[str]:
        """The key of the problem of every sample and of the warm start, without the damaged lines."""
        return chain.from_iterable(log.readable() for log in self._problems)

    def damaged_samples(self) -> int:
        """The number of lines that `trained_on` leaves out."""
        return sum(log.damaged() for log in self._problems)

    @property
    def _metrics(self) -> Log[dict[str, float]]:
        return Log(self.path / "metrics.jsonl", numbers)

    @property
    def _evaluations(self) -> Log[Evaluated]:
        return Log(self.path / "evaluations.jsonl", evaluated)

    @property
    def _samples(self) -> Log[str]:
        return Log(self.path / "samples.jsonl", problem_key)

    @property
    def _groups(self) -> GroupLog:
        return GroupLog(self.path / "groups.jsonl.gz")

    @property
    def _problems(self) -> list[Log[str]]:
        return [self._samples, Log(self._lessons, problem_key)]

    @property
    def _lessons(self) -> Path:
        return self.path / "warm_start.jsonl"

    @property
    def _environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def _summary(self) -> Path:
        return self.path / "summary.json"


def list_runs(root: Path) -> list[Run]:
    """The runs in `root`, by name; none if the folder is missing. Symbolic links are not followed."""
    return [
        Run(path.parent)
        for path in sorted(root.glob("*/config.json"))
        if _NAME.fullmatch(path.parent.name) and not path.parent.is_symlink() and path.is_file()
    ]


def find_run(root: Path, name: str) -> Run | None:
    """The run called `name` in `root`, or the run whose folder is `name`; a reserved word is never a run."""
    if name in RESERVED or "\0" in name:
        return None
    if _NAME.fullmatch(name):
        return _run_at(root / name, "config.json")
    folder = Path(name)
    return _run_at(folder, "config.json" if _is_in(root, folder) else "origin.json")  # models have a config.json too


def _run_at(folder: Path, file: str) -> Run | None:
    return Run(folder) if os.path.isfile(folder / file) and not folder.is_symlink() else None


def at(root: Path) -> str:
    """The option that names the folder of the runs in a command, unless it is the default."""
    return "" if str(root) == defaults()["runs"] else f" --runs {shlex.quote(str(root))}"


def require_outside_runs(path: Path, *, own: Run | None = None) -> None:
    """Raise CountdownError if `path` is in a run other than `own`: only a run's training writes there."""
    place = Path(os.path.realpath(path))
    for folder in (place, *place.parents):
        is_run = os.path.isfile(folder / "origin.json") or (os.path.isfile(folder / _LOCK) and _only_begun(folder))
        if is_run and not (own and own.path.samefile(folder)):
            raise CountdownError(
                f"`{path}` is in the run `{folder}`, where only its training writes", "write elsewhere"
            )


def require_space(folder: Path, size: int) -> None:
    """Raise CountdownError unless `size` bytes are free on the disk of `folder`, which need not exist."""
    free = shutil.disk_usage(_existing(folder)).free
    if free < size:
        raise CountdownError(
            f"`{folder}` has {free / 1e6:,.0f} MB free, and a checkpoint needs {size / 1e6:,.0f} MB",
            "make room, or choose another folder with `--runs`",
            exit_code=1,
        )


def _existing(folder: Path) -> Path:
    """The folder, or its nearest parent that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def suggestion(root: Path, name: str) -> str | None:
    """The question "did you mean ...?" for a mistyped name, if a run has a similar one."""
    close = get_close_matches(name, [run.name for run in list_runs(root)], n=1)
    return f"did you mean `{close[0]}`?" if close else None


def run_of(model: Path) -> Run | None:
    """The run whose best, warm-started or checkpoint's model is the folder `model`."""
    folder = model.resolve()
    for run in map(Run, folder.parents[:3]):
        models = (run.model_path, run.warm_start_path, *(path / "model" for _, path in run.checkpoints()))
        if run.config_path.is_file() and folder in models:
            return run
    return None


def run_name(root: Path, name: str) -> str:
    """The name of a run given by name or by its folder in `root`."""
    if "/" in name and "\0" not in name and _is_in(root, Path(name)):
        name = Path(name).name
    if not _NAME.fullmatch(name):
        own = [part for part in Path(name).parts if _NAME.fullmatch(part) and (root / part / "config.json").is_file()]
        rule = "use 1 to 64 letters, digits, dots, dashes and underscores, a letter or digit first"
        raise CountdownError(f"`{name}` cannot name a run", f"name the run: `{own[0]}`" if own else rule)
    return name


def _is_in(root: Path, folder: Path) -> bool:
    return os.path.realpath(folder.parent) == os.path.realpath(root)


def _only_begun(path: Path) -> bool:
    """Whether the start of this run was interrupted before anything was written."""
    if path.is_symlink() or not path.is_dir():
        return False
    return all(item.name == _LOCK or item.name.endswith(".tmp") for item in path.iterdir())


def _open_lock(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CountdownError(f"`{path}` is not a regular file", "remove it")
    return descriptor


@contextmanager
def _reported(failure: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CountdownError(f"{failure}: {error.strerror}") from None


def _make(path: Path) -> bool:
    """Create a folder, unless its name is taken."""
    try:
        path.mkdir()
    except FileExistsError:
        return False
    return True


def _is_free(path: Path) -> bool:
    """Whether no run ever started in this folder, and nothing else is there."""
    return not os.path.lexists(path) or _only_begun(path)


def _taken(root: Path, name: str) -> CountdownError:
    return CountdownError(
        f"run `{name}` already exists in `{root}`",
        "resume it with `--resume`, replace it with `--overwrite`, or choose another name with `--run`",
    )
