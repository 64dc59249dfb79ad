"""SIGINT and SIGTERM during training: noted when they come, obeyed between two steps."""

import signal
import sys
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """All processes have agreed to stop here, because of signal `number`."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class Failed(Exception):
    """All processes have agreed to save and end here, because of `error`; every one has its own."""

    def __init__(self, error: Exception):
        super().__init__(str(error))
        self.error = error


class Stopped(SystemExit):
    """All processes end, with code 128 + signal, because their state is saved."""

    def __init__(self, number: int):
        super().__init__(128 + number)


class SignalFlags:
    """Within this context a signal is noted instead of ending the process.

    A second one ends it at once, unless `patient`: of several processes each must be, for a terminal sends a signal to
    all of them and their parent hands it on once more.
    """

    def __init__(self, *, patient: bool):
        self.patient = patient
        self.received: list[int] = []
        self.before: dict[int, Any] = {}  # handlers

    def __enter__(self) -> "SignalFlags":
        self.before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)
        if self.patient:
            return
        if len(self.received) > 1:
            sys.exit(128 + number)
        name = signal.Signals(number).name
        print(f"\n{name}: saving; once more stops at once, without saving", file=sys.stderr, flush=True)

    def counts(self) -> list[int]:
        """For each of SIGNALS 1 if it was the first to come, else 0."""
        first = self.received[0] if self.received else None
        return [int(number == first) for number in SIGNALS]
