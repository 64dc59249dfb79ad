"""Descriptors that are made as they are read, so that no copy of a database is held."""

from collections.abc import Callable, Sequence

import numpy as np

from revisitop.scores import Rows


class Stacked:
    """Arrays [N, D] of one dimension behind one another, read as one by slices and by arrays of indices."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self._parts, self._ends = list(parts), np.cumsum([part.shape[0] for part in parts])
        self.shape = (int(self._ends[-1]), int(parts[0].shape[1]))

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """float32 [n, D]."""
        if isinstance(rows, slice):
            start, stop, step = rows.indices(self.shape[0])
            assert step == 1 and start < stop, rows
            firsts = self._ends - [part.shape[0] for part in self._parts]
            pieces = [
                np.asarray(part[max(start - first, 0) : max(stop - first, 0)], dtype=np.float32)
                for part, first, end in zip(self._parts, firsts, self._ends, strict=True)
                if start < end and stop > first
            ]
            return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        which = np.searchsorted(self._ends, rows, side="right")
        gathered = np.empty((len(rows), self.shape[1]), np.float32)
        for number, part in enumerate(self._parts):
            chosen = which == number
            gathered[chosen] = part[np.asarray(rows)[chosen] - (self._ends[number] - part.shape[0])]
        return gathered


class Mapped:
    """Rows to which a function of rows (float32 [n, D] -> float32 [n, E]) is applied when they are read."""

    def __init__(self, rows: Rows, function: Callable[[np.ndarray], np.ndarray], dim: int) -> None:
        self._rows, self._function = rows, function
        self.shape = (rows.shape[0], dim)

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        return self._function(np.asarray(self._rows[rows], dtype=np.float32))
