"""When a call is sent again: where the server asks for it, and while there is time."""

from __future__ import annotations

import random
import time

import grpc

from convoynet.server.client import given

RETRIES = 3
PUSHBACK = "grpc-retry-pushback-ms"
"""The trailer in which a server says after how many milliseconds a call may be sent again, as gRPC defines it."""
_REFUSED = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)
_LONGEST_SECONDS = 30.0
"""Who is asked to wait for longer is better told so."""
_SPREAD = 0.25
"""What a wait may be longer than asked for, as a part of it: those who were refused together do not come together."""


class Attempts:
    """The attempts of one call.

    Args:
        timeout: seconds for all of them together; None for no limit.
        retries: how often the call may be sent again.
    """

    def __init__(self, timeout: float | None, retries: int) -> None:
        self._end = None if timeout is None else time.monotonic() + timeout
        self._left = retries

    def timeout(self) -> float | None:
        """Seconds that are left."""
        return None if self._end is None else max(self._end - time.monotonic(), 0)

    def wait_s(self, error: grpc.RpcError) -> float | None:
        """How long to wait before the call that failed is sent again; None if it is not to be."""
        asked_ms = _asked_ms(error) if self._left > 0 and error.code() in _REFUSED else None
        if asked_ms is None:
            return None
        wait = asked_ms / 1000 * (1 + random.uniform(0, _SPREAD))
        left = self.timeout()
        if wait > _LONGEST_SECONDS or (left is not None and wait >= left):
            return None
        self._left -= 1
        return wait


def _asked_ms(error: grpc.RpcError) -> int | None:
    """What the server says; None where it says nothing, or never: a number below 0, or no number."""
    for key, value in error.trailing_metadata() or ():
        if key == PUSHBACK:
            return int(value) if isinstance(value, str) and value.isascii() and value.isdecimal() else None
    return None


def checked(retries: object) -> int:
    """The argument of a client.

    Raises:
        ClientError: It is no number of times.
    """
    return given.whole("retries", retries, 0)
