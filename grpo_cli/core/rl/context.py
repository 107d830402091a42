"""What surrounds a training: other ranks, an observer, and the control that can stop it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from grpo_cli.core.rl.observer import Control, Observer, no_poll
from grpo_cli.core.world import World


@dataclass(frozen=True)
class Context:
    """By default a single process that nobody observes and nothing stops."""

    world: World = field(default_factory=World)
    observer: Observer = field(default_factory=Observer)
    control: Control = field(default_factory=Control)

    def note(self, text: str) -> None:
        """A sentence for the user."""
        self.observer.message(text)

    @property
    def poll(self) -> Callable[[], None]:
        """Raises Interrupted between tokens and micro-batches; several ranks decide together, by `any_stopped`."""
        return self.control.poll if self.world.size == 1 else no_poll

    def any_stopped(self) -> bool:
        """Whether any of several ranks is asked to stop; a collective, at the end of a step."""
        return self.world.size > 1 and any(self.world.gather(self.control.should_stop()))
