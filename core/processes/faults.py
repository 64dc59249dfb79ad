"""What may end a run: a signal, broken images, an evaluation that fails, losses and gradients that are not finite.

Noticed by all processes at once.
"""

import contextlib
import datetime
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from core.base.errors import Failure, UserError
from core.base.terminal import reason_of
from core.checkpoints.position import Position
from core.logging import log
from core.processes.distributed import Agreement, gather_objects, rank, world_size
from core.processes.interrupt import SIGNALS, Failed, Interrupted, SignalFlags, Stopped
from core.processes.meeting import is_lost_exchange
from core.step import SMALLEST_SCALE, TrainStep


class FailedElsewhere(Failure):
    """Another process of the run cannot go on; that one tells more."""


class Images(Protocol):
    """What is trained with, for messages."""

    def path(self, index: int) -> str: ...


class Faults:
    """Watches a run. All methods but `met` are collective: every process calls them equally often.

    Within its context SIGINT and SIGTERM are held back until `poll`.
    """

    def __init__(
        self,
        position: Position,
        step: TrainStep,
        dataset: Images,
        *,
        skip_broken: int,
        remember: int,
        timeout: datetime.timedelta,
    ):
        """`skip_broken` images may be replaced; `remember` updates pass between two calls of `check_finite`;
        `timeout` is how long the other processes are waited for.
        """
        self.position, self.step, self.dataset, self.skip_broken = position, step, dataset, skip_broken
        self.signals = SignalFlags(patient=world_size() > 1)
        self.agree = Agreement(len(SIGNALS) + 2, timeout=timeout)
        self.broken: list[str] = []  # met by this process, not yet told to the others
        self.too_many: UserError | None = None  # broken images
        self.failing: Exception | None = None  # why this process cannot go on
        self.recent: deque[tuple[int, list[int]]] = deque(maxlen=remember + 1)  # (update, indices of its images)

    def __enter__(self) -> "Faults":
        self.signals.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self.signals.__exit__(kind, *error)
        if kind is None or issubclass(kind, Stopped):  # else the others may not be there any more
            self.agree.finish()

    def met(self, broken: list[str], update: int = 0, indices: list[int] | None = None) -> None:
        """Take note of a batch: its broken images, and which images an update sees."""
        self.broken += broken
        if indices is not None:
            self.recent.append((update, indices))

    def poll(self) -> None:
        """Raise `Interrupted` if any process has received a signal, `Failed` if any cannot go on.

        Of several processes each learns what the others said in the call before.
        """
        *signals, broken, failed = self.agree([*self.signals.counts(), len(self.broken), int(self.failing is not None)])
        if broken:
            self.count_broken()
        if failed:
            reasons = gather_objects(self.failing and reason_of(self.failing))
            number = next(number for number, reason in enumerate(reasons) if reason)
            elsewhere = FailedElsewhere(f"process {number} of the run cannot go on: {reasons[number]}")
            raise Failed(self.failing or elsewhere)
        self.check_broken()
        for number, count in zip(SIGNALS, signals, strict=True):
            if count:
                raise Interrupted(number)

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """What ends a process in here makes all raise `Failed`. A collective call.

        Meanwhile every process calls `poll` equally often, and twice before the processes exchange anything else.
        """
        try:
            yield
        except (Interrupted, Failed):
            raise
        except Exception as error:
            if is_lost_exchange(error):
                raise
            self.failing = error
            while True:
                self.poll()
        self.poll()
        self.poll()

    def watched(self, batches: Iterable) -> Iterator[Any]:
        """The batches; one that cannot be made makes all processes raise `Failed` before the same step.

        A collective call; every process calls `poll` before each step. Several processes make a batch ahead, for the
        others are in the next step when they learn that one is missing.
        """
        made: deque[Any] = deque()
        iterator, begun = iter(batches), False
        while True:
            try:
                while len(made) < min(world_size(), 2) and self.failing is None:
                    made.append(next(iterator))
            except StopIteration:
                pass
            except Exception as error:
                self.failing = error
            if not begun and world_size() > 1:  # nobody is in a step: whoever has no first batch says so now
                self.poll()
                self.poll()
            begun = True
            if not made:
                break
            yield made.popleft()
        while self.failing:
            self.poll()

    def check_broken(self) -> None:
        """Raise `Failed` if more images were replaced than allowed."""
        if self.too_many:
            raise Failed(self.too_many)

    def count_broken(self) -> None:
        """List the images that were replaced."""
        listed = self.position.broken
        new = [message for messages in gather_objects(self.broken) for message in messages]
        self.broken = []
        for message in dict.fromkeys(new):
            if message not in listed:
                listed.append(message)
                log(f"broken image {len(listed)}, replaced by the next of its list: {message}")
        if new and len(listed) > self.skip_broken:
            self.too_many = UserError(
                f"{len(listed)} broken images, DATA_LOADER.SKIP_BROKEN is {self.skip_broken}; the last is {listed[-1]}"
            )

    def check_finite(self, iterations: int) -> None:
        """Raise `FloatingPointError` if a loss or gradient was not finite; the weights are those from before it.

        `iterations` an epoch turn the number of an update into the place that is named.
        """
        update, process = self.step.first_bad.tolist()
        if not update:
            if self.step.scaler.is_enabled() and self.step.scaler.get_scale() < SMALLEST_SCALE:
                raise FloatingPointError("float16 gradients overflow at any scale: use TRAIN.PRECISION bf16 or fp32")
            return
        guilty = process - 1 if process else None
        mine = next((indices for number, indices in self.recent if number == update), [])
        paths = [self.dataset.path(index) for index in mine] if guilty in (None, rank()) else []
        images = ", ".join(path for names in gather_objects(paths) for path in names)
        epoch, iteration = divmod(update - 1, iterations)
        what = "gradient" if guilty is None else f"loss of process {guilty}"
        raise FloatingPointError(
            f"the {what} is not finite at epoch {epoch + 1}, iteration {iteration + 1}; the run ends before that "
            f"update. Lower OPTIM.BASE_LR, warm up longer or set OPTIM.CLIP_GRAD. Images: {images}"
        )
