"""How long a registry's failures are borne before one of them is the user's.

One that has answered may be restarting, which takes longer than a second; one that never has is more likely a wrong name
or port, and the user wants to hear of that soon.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from ovms.errors import RegistryError
from ovms.oci.session import Busy

#: Seconds before the second try; doubled each time, up to :data:`PAUSE_MAX` times as long: 10 s.
BACKOFF: Final = 0.2
PAUSE_MAX: Final = 50.0
#: Failures in a row at a registry that has answered before: the pauses between them are 30 to 45 s.
ATTEMPTS_MAX: Final = 10
#: Where the failures themselves take long (a registry that stalls), so many are enough after so many seconds.
SLOW_ATTEMPTS_MAX: Final = 3
PATIENCE: Final = 45.0
#: At one that has not; and where it does not even say no, no new try begins after so many seconds.
FIRST_ATTEMPTS_MAX: Final = 5
FIRST_PATIENCE: Final = 15.0
#: A Retry-After that asks for more is not waited for: whoever comes back too soon is turned away again, and may be for longer.
WAIT_MAX: Final = 60.0
#: Pauses that are shorter than this are not worth a word.
_TOLD_FROM: Final = 1.0
_SLICE: Final = 0.2


class Patience:
    """The failures in a row of one piece of work."""

    def __init__(
        self,
        host: str,
        *,
        worked: Callable[[], bool],
        backoff: float = BACKOFF,
        tell: Callable[[str], None] = lambda _text: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        """*worked* says whether *host* has ever answered well. *tell* is told of a wait, and with ``""`` of its end."""
        self._host = host
        self._worked = worked
        self._backoff = backoff
        self._tell = tell
        self._stopped = stopped
        self._failures = 0
        self._began = time.monotonic()

    def progressed(self) -> None:
        """What failed brought something: the failures before it count no more."""
        self._failures = 0
        self._began = time.monotonic()

    def bear(self, exc: RegistryError) -> None:
        """Waits after a failure. Raises *exc* where another try makes no sense any more."""
        self._failures += 1
        if self._stopped() or self._enough(exc):
            raise exc
        pause = self._pause(exc)
        told = pause >= _TOLD_FROM
        if told:
            self._tell(f"waiting for {self._host}, try {self._failures + 1}")
        end = time.monotonic() + pause
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, _SLICE))
            if self._stopped():
                raise exc
        if told:
            self._tell("")

    def _enough(self, exc: RegistryError) -> bool:
        if isinstance(exc, Busy) and (exc.wait or 0.0) > WAIT_MAX:
            return True
        elapsed = time.monotonic() - self._began
        if not self._worked():
            over = elapsed >= FIRST_PATIENCE and not isinstance(exc, Busy)
            return over or self._failures >= FIRST_ATTEMPTS_MAX
        return self._failures >= (SLOW_ATTEMPTS_MAX if elapsed >= PATIENCE else ATTEMPTS_MAX)

    def _pause(self, exc: RegistryError) -> float:
        longer = min(2.0 ** (self._failures - 1), PAUSE_MAX)
        import random

        pause = self._backoff * longer * random.uniform(0.75, 1.0)  # noqa: S311 - no secret
        if isinstance(exc, Busy) and exc.wait is not None:
            # "at once" is what a date says, too, where the registry's clock is behind ours: ten tries would be gone in no time
            return max(exc.wait, pause)
        return pause
