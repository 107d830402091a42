"""Log a training to a tracker: TensorBoard, Trackio or Weights & Biases.

Metrics carry the names that TRL's users know, so that dashboards of both can be overlaid. A tracker that fails is
dropped with one warning; training goes on. Trackers stay offline unless their own environment variables say otherwise;
for Weights & Biases the command line sets WANDB_MODE=offline where it is not set.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from textwrap import indent
from typing import Any

from grpo_cli.core.config.settings import Settings, values
from grpo_cli.core.errors import CountdownError
from grpo_cli.core.rl.observer import Observer, Validated
from grpo_cli.core.run.folder import Run

PROJECT = "countdown"
GROUPS = ("time/", "suite/", "eval/")  # metrics that keep their group; all others are `train/...`
NAMES = {  # ours -> TRL's
    "completion_length": "train/completions/mean_length",
    "truncated": "train/completions/clipped_ratio",
    "zero_variance": "train/frac_reward_zero_std",
    "clip_fraction": "train/clip_ratio/region_mean",
    "time/total": "train/step_time",
}
COLUMNS = ("step", "problem", "completion", "reward", "reason")
CODE = " " * 4  # Markdown shows indented lines as they are
Row = tuple[int, str, str, str, str]  # of COLUMNS


class TensorBoard:
    """Event files in the run's folder; `tensorboard --logdir runs` shows them."""

    def __init__(self, folder: Path, config: Mapping[str, Any], *, start: int) -> None:
        module = import_module("torch.utils.tensorboard")
        self.writer = module.SummaryWriter(str(folder), purge_step=start + 1 if start else None)
        if not start:
            for part in import_module("torch.utils.tensorboard.summary").hparams(dict(config), {"eval/accuracy": 0.0}):
                self.writer.file_writer.add_summary(part)

    def scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def samples(self, step: int, rows: Sequence[Row]) -> None:
        parts = [
            f"step {number}: {problem}, reward {reward}, {reason}\n\n{indent(completion, CODE)}"
            for number, problem, completion, reward, reason in rows
        ]
        self.writer.add_text("samples", "\n\n".join(parts), step)

    def close(self) -> None:
        self.writer.close()


class Dashboard:
    """Trackio's local store, which `trackio show` opens, or a W&B run in the run's folder, for `wandb sync`."""

    def __init__(self, name: str, identity: str, folder: Path, config: Mapping[str, Any]) -> None:
        self.module, self.is_wandb = import_module(name), name == "wandb"
        options: dict[str, Any] = {"embed": False, "auto_log_cpu": False}
        if self.is_wandb:
            folder.mkdir(exist_ok=True)
            quiet = self.module.Settings(silent=True, console="off", disable_git=True, save_code=False)
            options = {"id": identity, "dir": str(folder), "settings": quiet}
        with redirect_stdout(io.StringIO()):  # stdout is data
            self.run = self.module.init(project=PROJECT, name=identity, config=dict(config), resume="allow", **options)
        if self.is_wandb:
            self.run.define_metric("*", step_metric="step")  # its own steps never go back, those of a resumed run do

    def scalars(self, step: int, metrics: Mapping[str, Any]) -> None:
        if self.is_wandb:
            self.run.log({"step": step, **metrics})
        else:
            self.run.log(dict(metrics), step=step)

    def samples(self, step: int, rows: Sequence[Row]) -> None:
        table = self.module.Table(columns=list(COLUMNS), data=[list(row) for row in rows])
        self.scalars(step, {"samples": table})

    def close(self) -> None:
        with redirect_stdout(io.StringIO()):
            self.module.finish()


def require_tracker(name: str) -> None:
    """Raise CountdownError if the tracker's package is not installed."""
    if name != "none" and find_spec(name) is None:
        raise CountdownError(f"`--tracker {name}` needs the extra `{name}`", f"pip install 'countdown-grpo[{name}]'")


@dataclass
class Tracked(Observer):
    """Logs metrics, and samples as a table at each evaluation, to the tracker `name`; `report` receives its failure."""

    name: str
    settings: Settings
    report: Callable[[str], None]
    rows: list[Row] = field(default_factory=list)
    tracker: TensorBoard | Dashboard | None = None
    run: Run | None = None
    start: int = 0

    def begin(self, run: Run, step: int) -> None:
        self.run, self.start = run, step
        with self._tolerated():
            folder, config = run.path / self.name, values(self.settings)
            if self.name == "tensorboard":
                self.tracker = TensorBoard(folder, config, start=step)
            else:
                self.tracker = Dashboard(self.name, run.tracker_id(), folder, config)

    def step(self, metrics: Mapping[str, float], sample: Mapping[str, Any]) -> None:
        with self._tolerated():
            self.rows.append(_row(sample))
            if self.tracker:
                named = {_named(key): value for key, value in metrics.items() if key != "step"}
                self.tracker.scalars(int(metrics["step"]), named)

    def evaluated(self, result: Validated) -> None:
        with self._tolerated():
            if self.tracker and result.step >= self.start:  # a resumed run reports its base again
                self.tracker.scalars(result.step, self._evaluation(result))
                self._send_samples(result.step)

    def close(self) -> None:
        with self._tolerated():
            if self.tracker:
                self._send_samples(self.rows[-1][0] if self.rows else 0)
                self.tracker.close()

    def _evaluation(self, result: Validated) -> dict[str, float]:
        """Accuracy on the val and dev puzzles, and that of each cell that the run logged at this step."""
        means = {"eval/suite_mean": result.suite_mean, "eval/dev_accuracy": result.dev_accuracy}
        metrics = {"eval/accuracy": result.accuracy, **{name: mean for name, mean in means.items() if mean is not None}}
        if result.sampled:
            metrics["eval/sampled_accuracy"], metrics["eval/pass_at_k"] = result.sampled
        for cell, steps in (self.run.evaluations() if self.run else {}).items():
            if measured := steps.get(result.step):
                metrics[f"eval/{cell}/accuracy"] = measured.accuracy
                if measured.mean_length is not None:
                    metrics[f"eval/{cell}/mean_length"] = measured.mean_length
        return metrics

    def _send_samples(self, step: int) -> None:
        if self.tracker and self.rows:
            self.tracker.samples(step, self.rows)
            self.rows = []

    @contextmanager
    def _tolerated(self) -> Iterator[None]:
        """Drop the tracker, with one warning, for whatever it raises: its errors have no common base."""
        try:
            yield
        except Exception as error:
            self.tracker = None
            reason = " ".join(str(error).split()) or type(error).__name__
            self.report(f"warning: {self.name} failed and is off for the rest of this run: {reason[:200]}")


def _named(key: str) -> str:
    return NAMES.get(key) or (key if key.startswith(GROUPS) else f"train/{key}")


def _row(sample: Mapping[str, Any]) -> Row:
    problem = sample.get("problem") or f"{sample.get('numbers')} -> {sample.get('target')}"
    return sample["step"], problem, sample["completion"], str(sample["reward"]), sample["reason"]
