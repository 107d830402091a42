"""A run's folder: what each file is called, how it is written, and how it is read back.

Nothing else knows a file name of a run. What the numbers, weights and tensors mean is not known here.

runs/<name>/  config.json  origin.json  environment.json  summary.json  metrics.jsonl  evaluations.jsonl
              samples.jsonl  training_curve.png  kl_divergence.png  report.html
              model/  checkpoints/step-50/  bad_steps/  .lock
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar, cast

from pydantic import Field, TypeAdapter, ValidationError

from grpo_cli.core.errors import CountdownError

Share = Annotated[float, Field(ge=0, le=1)]
_Record = TypeVar("_Record")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_CHECKPOINT = re.compile(r"step-([0-9]+)")
_FROM_STEP = re.compile(r"from step ([0-9]+)")
_LOCK = ".lock"
_MANIFEST = "manifest.json"
_FORMAT = 4  # of a checkpoint; one of another format is not taken up


@dataclass(frozen=True)
class Example:
    """A completion that a run keeps, and its score. Those of an evaluation have its step, not one of their own."""

    numbers: list[int]
    target: int
    completion: str
    reward: float | str
    reason: str
    answer: str | None = None
    step: int = 0


@dataclass(frozen=True)
class Evaluated:
    """What a run keeps of an evaluation of one cell; `Evaluation.record` says what each is."""

    step: Annotated[int, Field(ge=0)]
    cell: str
    count: Annotated[int, Field(ge=0)]
    accuracy: Share
    interval: tuple[Share, Share] | None
    lenient_accuracy: Share | None
    format_rate: Share | None
    mean_length: Annotated[float, Field(ge=0)] | None
    reasons: dict[str, Annotated[int, Field(ge=0)]]
    solved: Annotated[str, Field(pattern="^[01]*$")]
    examples: list[Example]


_EXAMPLE, _EVALUATED = TypeAdapter(Example), TypeAdapter(Evaluated)


@dataclass(frozen=True)
class Run:
    """One run, known by its folder; made by `create`, `open` or `newest`."""

    path: Path
    writes: bool = True  # not where another process of the same training does

    @classmethod
    def create(cls, root: Path, name: str | None = None, *, overwrite: bool = False) -> Self:
        """A new, empty run in `root`; without a name the first free of run-1, run-2, ...

        Raises CountdownError for a bad name, and for a name that is taken unless `overwrite` clears the run away. What
        is no run, or a symbolic link, is never cleared away.
        """
        with _reported(f"cannot make a run in `{root}`"):
            root.mkdir(parents=True, exist_ok=True)
            if name is None:
                return next(cls(path) for path in (root / f"run-{number}" for number in count(1)) if _make(path))
            cls.check(root, name, overwrite=overwrite)
            path = root / name
            if path.exists():
                with cls(path).locked():
                    _discard(path)
            if _make(path):
                return cls(path)
        raise _taken(root, name)

    @staticmethod
    def check(root: Path, name: str | None, *, overwrite: bool = False) -> None:
        """Raise what `create` would for this name, and change nothing."""
        place = next(folder for folder in (root, *root.absolute().parents) if folder.exists())
        if not place.is_dir() or not can_write(place):
            why = "cannot be written" if place.is_dir() else "is no folder"
            raise CountdownError(f"cannot make a run in `{root}`: `{place}` {why}", "choose another with `--runs`")
        if name is None or not os.path.lexists(path := root / _checked(name)):
            return
        if not overwrite:
            raise _taken(root, name)
        begun = path.is_dir() and all(item.name == _LOCK for item in path.iterdir())
        is_run = begun or (path / "config.json").is_file()
        if path.is_symlink() or not is_run:
            raise CountdownError(f"`{path}` is no run, so it is not overwritten", "choose another name with `--run`")

    @classmethod
    def open(cls, root: Path, name: str) -> Self:
        """The run `name` of `root`; raises CountdownError where there is none."""
        run = cls(root / _checked(name))
        if not run.config_path.is_file():
            raise CountdownError(
                f"no run `{name}` in `{root}`",
                f"list runs with `ls {root}`, or train one with `countdown train --run {name}`",
            )
        return run

    @classmethod
    def newest(cls, root: Path) -> Self | None:
        """The run with a saved model whose metrics were written last."""
        runs = [cls(run.path) for run in list_runs(root) if run.model_path.is_dir() and run._metrics.is_file()]
        return max(runs, key=lambda run: run._metrics.stat().st_mtime_ns, default=None)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def model_path(self) -> Path:
        """Folder of the best model so far, in Hugging Face format."""
        return self.path / "model"

    def curve_path(self, curve: Literal["training_curve", "kl_divergence"], format: str = "png") -> Path:
        """Image file of a curve."""
        return self.path / f"{curve}.{format}"

    def checkpoint_path(self, step: int) -> Path:
        """Folder of the checkpoint of a step; write it through `saving`."""
        return self.path / "checkpoints" / f"step-{step}"

    @property
    def shards_path(self) -> Path:
        """Folder in which the ranks leave their parts of the next checkpoint."""
        return self.path / ".shards"

    def checkpoints(self) -> list[tuple[int, Path]]:
        """(step, folder) of every complete checkpoint, in order of steps."""
        folders = (self.path / "checkpoints").glob("step-*")
        matches = [(_CHECKPOINT.fullmatch(folder.name), folder) for folder in folders]
        return sorted((int(match[1]), folder) for match, folder in matches if match)

    @property
    def saved_steps(self) -> str:
        """The steps of all checkpoints, to be read by people."""
        return ", ".join(str(step) for step, _ in self.checkpoints()) or "none"

    def damage(self, step: int, *, contents: bool = True) -> str | None:
        """What is wrong with the checkpoint of a step by its manifest, or None; by sizes alone without `contents`."""
        folder = self.checkpoint_path(step)
        try:
            manifest = self.manifest(step)
        except CountdownError as problem:
            return problem.message
        written = manifest.pop("sha256", None)
        listed = manifest.get("files")
        if manifest.get("format") != _FORMAT or manifest.get("step") != step or not isinstance(listed, dict):
            return f"`{folder / _MANIFEST}` is not of step {step}, in format {_FORMAT}"
        if written != _digest(manifest):
            return f"`{folder / _MANIFEST}` is not what was saved"
        present = _describe(folder, contents=contents)
        for name in sorted(listed.keys() | present.keys()):
            found, saved = present.get(name), listed.get(name)
            if found is None or not isinstance(saved, dict) or not found.items() <= saved.items():
                return f"`{folder / name}` " + ("is missing" if found is None else "is not what was saved")
        return None

    def manifest(self, step: int) -> dict[str, object]:
        """What `saving` was told of the checkpoint of a step, and its files."""
        return _read_json(self.checkpoint_path(step) / _MANIFEST)

    def prune_checkpoints(self, keep: int, *, also: int | None = None) -> None:
        """Remove all checkpoints but the last `keep` whole ones and that of the step `also`.

        What cannot be removed stays, and what is damaged is left for its owner to look at.
        """
        whole = [step for step, _ in self.checkpoints() if self.damage(step, contents=False) is None]
        for step in whole[: max(0, len(whole) - keep)]:
            if step != also:
                with suppress(OSError):
                    _discard(self.checkpoint_path(step))

    @contextmanager
    def locked(self) -> Iterator[int | None]:
        """Keep other processes from writing this run; yields the process whose lock was left behind, if there is one.

        Raises CountdownError while another process holds it. The system gives a lock back when its process ends.
        """
        with _reported(f"cannot write `{self.path}`"):
            opened = (self.path / _LOCK).open("a+")
        with opened as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                owner = file.read()
                raise CountdownError(
                    f"run `{self.name}` is being written by process {owner or '?'}",
                    "wait until it ends, or choose another name with `--run`",
                ) from None
            file.seek(0)
            left = file.read()
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            try:
                yield int(left) if left.isdigit() else None
            finally:
                file.truncate(0)

    def require_space(self, size: int) -> None:
        """Raise CountdownError unless `size` bytes are free where the run is."""
        free = shutil.disk_usage(self.path).free
        if free < size:
            raise CountdownError(
                f"`{self.path}` has {free / 1e6:,.0f} MB free, and a checkpoint needs {size / 1e6:,.0f} MB",
                "make room, or choose another folder with `--runs`",
                exit_code=1,
            )

    @contextmanager
    def saving(self, path: Path, facts: Mapping[str, object] | None = None) -> Iterator[Path]:
        """A folder to fill that becomes `path`, replacing what was there, once the block ends without an exception.

        So what stands at `path` is always whole and on disk, whenever the process or the machine stops. With `facts`,
        a manifest says besides them what was saved, so that later damage is seen.
        """
        staged, old = _hidden(path, "tmp"), _hidden(path, "old")
        _settle(path)
        staged.mkdir(parents=True)
        try:
            yield staged
            if facts is not None:
                manifest = {"format": _FORMAT, **facts, "files": _describe(staged)}
                _write_json(staged / _MANIFEST, {**manifest, "sha256": _digest(manifest)})
            _sync(staged)
            if path.exists():
                path.rename(old)
            staged.rename(path)
            _sync_entry(path.parent)
        finally:
            _settle(path)

    def write_config(self, config: Mapping[str, object]) -> None:
        _write_json(self.config_path, config)

    def read_config(self) -> dict[str, object]:
        return _read_json(self.config_path)

    def write_origin(self, origin: Mapping[str, object]) -> None:
        _write_json(self.path / "origin.json", origin)

    def read_origin(self) -> dict[str, object]:
        """Hashes of what the run started from."""
        return _read_json(self.path / "origin.json")

    def write_environment(self, environment: Mapping[str, object], *, step: int) -> None:
        """Where the run is computed from `step` on; what was written of earlier steps stays."""
        known = self.read_environment() if step else {}
        steps = {key: _FROM_STEP.fullmatch(key) for key in known}
        earlier = {key: known[key] for key, match in steps.items() if match and int(match[1]) < step}
        _write_json(self._environment, {**earlier, f"from step {step}": environment})

    def read_environment(self) -> dict[str, object]:
        """What `write_environment` wrote, by the step that it holds from."""
        return _read_json(self._environment) if self._environment.exists() else {}

    def write_summary(self, summary: Mapping[str, object]) -> None:
        _write_json(self._summary, summary)

    def read_summary(self) -> dict[str, object] | None:
        """The summary, or None while the run has not ended."""
        return _read_json(self._summary) if self._summary.exists() else None

    def log(self, metrics: Mapping[str, float]) -> None:
        """Append one line of finite numbers, `step` among them, to metrics.jsonl."""
        self._append(self._metrics, [metrics])

    def log_samples(self, samples: Iterable[Mapping[str, object]]) -> None:
        """Append one line per completion, each with its `step`, to samples.jsonl."""
        self._append(self._samples, samples)

    def log_evaluations(self, records: Iterable[Mapping[str, object]]) -> None:
        """Append one line per cell evaluated, each with its `step`, to evaluations.jsonl."""
        self._append(self._evaluations, records)

    def _append(self, path: Path, records: Iterable[Mapping[str, object]]) -> None:
        if self.writes:
            _append(path, records)

    def prompts(self) -> Iterator[tuple[list[int], int]]:
        """Numbers and target of every sample, one by one; raises CountdownError naming the line that has none."""
        for line in _lines(self._samples):
            numbers, target = line.record.get("numbers"), line.record.get("target")
            if not isinstance(numbers, list) or any(type(number) is not int for number in (*numbers, target)):
                raise CountdownError(f"{line.place} has no puzzle in `numbers` and `target`")
            yield numbers, cast(int, target)

    def write_bad_step(self, step: int, batch: Mapping[str, object]) -> Path:
        """Keep the batch of a step that was skipped, and say where."""
        path = self.path / "bad_steps" / f"step-{step}.json"
        if self.writes:
            path.parent.mkdir(exist_ok=True)
            _write_json(path, batch)
        return path

    def metrics(self) -> list[dict[str, float]]:
        """Every logged line, [] before the first; raises CountdownError naming the line that is not one of numbers."""
        return [_numbers(line) for line in _lines(self._metrics)]

    def evaluations(self) -> dict[str, dict[int, Evaluated]]:
        """What was evaluated: by cell, then by step, in order; {} before the first."""
        found: dict[str, dict[int, Evaluated]] = {}
        for line in _lines(self._evaluations):
            one = _checked_as(_EVALUATED, line)
            if len(one.solved) != one.count:
                raise CountdownError(f"`solved` in {line.place} does not have a character for each of `count` puzzles")
            found.setdefault(one.cell, {})[one.step] = one
        return found

    def samples(self) -> list[Example]:
        """Every completion logged, [] before the first."""
        return [_checked_as(_EXAMPLE, line) for line in _lines(self._samples)]

    def go_back_to(self, step: int, *, pending: bool = False) -> None:
        """Forget metrics, samples and checkpoints of later steps, which a training that goes on makes again.

        With `pending`, the evaluation and metrics of `step` itself are still to be logged too.
        """
        _settle(self.model_path)
        for later, folder in self.checkpoints():
            if later > step:
                _discard(folder)
        for path in (self._metrics, self._evaluations, self._samples):
            last = step - (pending and path != self._samples)
            kept = [line.raw for line in _lines(path) if line.step <= last]
            if path.exists():
                _write(path, b"".join(kept))

    @property
    def config_path(self) -> Path:
        """File of the resolved settings."""
        return self.path / "config.json"

    @property
    def _environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def _summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def _metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def _evaluations(self) -> Path:
        return self.path / "evaluations.jsonl"

    @property
    def _samples(self) -> Path:
        return self.path / "samples.jsonl"


def can_write(path: Path) -> bool:
    """Whether this process may write to a file or folder that exists."""
    return os.access(path, os.W_OK, effective_ids=os.access in os.supports_effective_ids)


def list_runs(root: Path) -> list[Run]:
    """The runs in `root`, by name; none where there is no such folder."""
    return [Run(path.parent) for path in sorted(root.glob("*/config.json")) if _NAME.fullmatch(path.parent.name)]


def run_of(model: Path) -> Run | None:
    """The run whose best model, or whose model of a checkpoint, is in the folder `model`."""
    folder = model.resolve()
    for run in map(Run, folder.parents[:3]):
        if run.config_path.is_file() and folder in (run.model_path, *(path / "model" for _, path in run.checkpoints())):
            return run
    return None


@dataclass(frozen=True)
class _Line:
    place: str
    raw: bytes
    record: dict[str, object]
    step: int


def _lines(path: Path) -> Iterator[_Line]:
    """The lines of a log, one by one; what an interruption left of a last line is not one."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            place = f"line {number} of `{path}`"
            try:
                record = json.loads(raw)
            except (ValueError, RecursionError):
                if not raw.endswith(b"\n"):
                    return
                raise CountdownError(f"{place} is not valid JSON") from None
            step = record.get("step") if isinstance(record, dict) else None
            if not isinstance(step, int):
                raise CountdownError(f"{place} is not an object with a `step`")
            yield _Line(place, raw.rstrip() + b"\n", record, step)


def _numbers(line: _Line) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for name, value in line.record.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CountdownError(f"`{name}` in {line.place} is not a number")
        if isinstance(value, int) and value.bit_length() > 64:
            raise CountdownError(f"`{name}` in {line.place} is too large")
        numbers[name] = value
    return numbers


def _checked_as(kind: TypeAdapter[_Record], line: _Line) -> _Record:
    try:
        return kind.validate_python(line.record)
    except ValidationError as problem:
        first = problem.errors()[0]
        raise CountdownError(f"`{'.'.join(map(str, first['loc']))}` in {line.place}: {first['msg']}") from None


def _append(path: Path, records: Iterable[Mapping[str, object]]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(f"{json.dumps(dict(record), allow_nan=False)}\n" for record in records))


def _write(path: Path, content: bytes) -> None:
    """Replace a file as a whole: a reader sees the old content or the new."""
    staged = _hidden(path, "tmp")
    staged.write_bytes(content)
    _sync_entry(staged)
    staged.replace(path)
    _sync_entry(path.parent)


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    _write(path, json.dumps(dict(content), indent=2, allow_nan=False).encode() + b"\n")


def _read_json(path: Path) -> dict[str, object]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise CountdownError(f"cannot read `{path}`: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise CountdownError(f"`{path}` is not valid JSON") from None
    if not isinstance(content, dict):
        raise CountdownError(f"`{path}` is not a JSON object")
    return content


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise CountdownError(
            f"`{name}` cannot name a run",
            "use 1 to 64 letters, digits, dots, dashes and underscores, a letter or digit first",
        )
    return name


@contextmanager
def _reported(failure: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CountdownError(f"{failure}: {error.strerror}") from None


def _make(path: Path) -> bool:
    """Make a folder, unless its name is taken."""
    try:
        path.mkdir()
    except FileExistsError:
        return False
    return True


def _taken(root: Path, name: str) -> CountdownError:
    return CountdownError(
        f"run `{name}` already exists in `{root}`",
        "go on with it by `--resume`, replace it by `--overwrite`, or choose another name with `--run`",
    )


def _discard(path: Path) -> None:
    """Remove a folder without ever leaving a part of it under its name."""
    old = _hidden(path, "old")
    shutil.rmtree(old, ignore_errors=True)
    path.rename(old)
    shutil.rmtree(old)


def _settle(path: Path) -> None:
    """Undo a `saving` that was interrupted, or clear up after one that was not."""
    old = _hidden(path, "old")
    if old.exists() and not path.exists():
        old.rename(path)
    for leftover in (old, _hidden(path, "tmp")):
        shutil.rmtree(leftover, ignore_errors=True)


def _hidden(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{suffix}")


def _describe(folder: Path, *, contents: bool = True) -> dict[str, dict[str, object]]:
    """Size, and SHA-256 if `contents` matter, of every file in a folder but its manifest."""
    described: dict[str, dict[str, object]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != _MANIFEST:
            facts: dict[str, object] = {"bytes": path.stat().st_size}
            if contents:
                with path.open("rb") as file:
                    facts["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
            described[path.relative_to(folder).as_posix()] = facts
    return described


def _digest(content: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(dict(content), sort_keys=True).encode()).hexdigest()


def _sync(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        _sync_entry(path)


def _sync_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
