"""Where the processes of a run meet, and how a failure of their exchange is told."""

import datetime
import os
import re
import socket
import time

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from core.environment import Failure
from core.place import Place, whole_number

NAME_TIMEOUT = 20.0  # seconds until a name that nobody knows is a mistake: it may be about to be told to the network


def open_store(here: Place, timeout: datetime.timedelta) -> dist.Store:
    """The store at MASTER_ADDR and MASTER_PORT: torchrun's, or else one that process 0 holds.

    Raises `ValueError` for an address that cannot be one, `Failure` if nobody answers there within `timeout`.
    """
    host, port = os.environ.get("MASTER_ADDR", ""), whole_number("MASTER_PORT", least=1, most=65535)
    _check_name(host)
    try:
        store, *_ = next(rendezvous("env://", here.rank, here.world, timeout=timeout))
    except dist.DistError as error:
        if "EADDRINUSE" in str(error):
            raise ValueError(f"MASTER_PORT {port} cannot be used (Address already in use): give another") from None
        seconds = round(timeout.total_seconds())
        raise Failure(
            f"process {here.rank} of {here.world} did not meet the others at MASTER_ADDR {host}, MASTER_PORT {port} "
            f"within {seconds} s ({one_line(error)})"
        ) from None
    store.set_timeout(timeout)
    return store


def _check_name(host: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9._:%-]{1,255}", host):
        raise ValueError(f"the environment's MASTER_ADDR is {host[:60]!r}, it takes the name or address of a machine")
    deadline = time.monotonic() + NAME_TIMEOUT
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except (OSError, UnicodeError) as error:
            if time.monotonic() > deadline:
                reason = getattr(error, "strerror", None) or error
                raise ValueError(f"the environment's MASTER_ADDR {host} names no machine ({reason})") from None
        time.sleep(1.0)


def is_lost_exchange(error: BaseException) -> bool:
    """Whether the exchange between processes failed: another one has ended, hangs, or cannot be reached."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


def one_line(error: BaseException) -> str:
    """An error of torch.distributed without its stack and the place in its source."""
    text = str(error).partition("\nException raised from")[0].partition(" Original exception:")[0]
    return re.sub(r"^\[[^\]]*\] *", "", " ".join(text.split()))[:300]
