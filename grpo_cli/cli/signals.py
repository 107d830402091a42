"""What a running training is asked from outside: to stop and save, or to save and go on."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any, Self

from grpo_cli.ui import text as show


class Signals:
    """Remembers a SIGINT or SIGTERM, of which a second one ends the process, and a SIGUSR1, while it is entered.

    Under a `launched` training the second one may be the same one, passed on by the launcher: it ends nothing.
    """

    def __init__(self, *, launched: bool = False) -> None:
        self._launched = launched
        self.stop: int | None = None
        self._save = self._told = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        handlers = {signal.SIGINT: self._stopped, signal.SIGTERM: self._stopped, signal.SIGUSR1: self._asked}
        self._before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stopped(self, number: int, _: FrameType | None) -> None:
        self.stop = number
        for stopping in () if self._launched else (signal.SIGINT, signal.SIGTERM):
            signal.signal(stopping, signal.SIG_DFL)
        if os.isatty(2):
            os.write(2, b"\x1b[?25h")  # the cursor, which the view hides and may not get to show again

    def _asked(self, _: int, __: FrameType | None) -> None:
        self._save = True

    def should_stop(self) -> bool:
        if self.stop is not None and not self._told:
            self._told = True
            show.note("stopping after saving the last completed step; press Ctrl-C again to leave at once")
        return self.stop is not None

    def should_save(self) -> bool:
        asked, self._save = self._save, False
        return asked
