"""Many small blobs: several requests under way at once, and one thread that takes the answers as they come.

A thread for each request would be simpler. But Python's threads take turns, and what one of 4 KiB needs is so little that
most of it was the taking of turns.
"""

from __future__ import annotations

import collections
import contextlib
import select
from collections.abc import Generator, Iterable
from typing import Final

from ovms.errors import OvmsError
from ovms.oci.descriptor import Descriptor
from ovms.oci.http import READ_TIMEOUT, Asked
from ovms.oci.registry import Busy, RegistryClient

#: Answers that are kept before the registry has to wait.
_READY_MAX: Final = 32


def fetch(
    client: RegistryClient, repository: str, blobs: Iterable[Descriptor], parallel: int
) -> Generator[tuple[Descriptor, bytes], None, None]:
    """Those of *blobs* that a registry simply sends, as they come, not yet checked; *parallel* are asked for at once.

    At the first that it does not simply send (a redirect, a challenge, an error, a connection that breaks) no more are asked
    for, and nothing is raised: what was not given is to be fetched in the usual way, which knows what to do about all that.
    A registry that is busy is left alone for a while, all the same.

    Raises:
        Busy: it wants to be left alone for longer than anybody waits.
    """
    left = iter(blobs)
    waiting: dict[int, tuple[Asked, Descriptor]] = {}
    answers = select.poll()

    def ask() -> bool:
        blob = next(left, None)
        if blob is None:
            return False
        try:
            asked = client.send_blob(repository, blob)
        except OvmsError:
            return False
        if asked is None:
            return False
        waiting[asked.fileno] = asked, blob
        answers.register(asked.fileno, select.POLLIN)
        return True

    ready: collections.deque[tuple[Descriptor, bytes]] = collections.deque()
    try:
        going = True
        while True:
            while going and len(waiting) < parallel:
                going = ask()
            if not waiting:
                break
            # whoever takes them writes files, which takes as long as an answer: that is for when there is none
            come = answers.poll(0 if ready else READ_TIMEOUT * 1000)
            if not come and not ready:
                return
            if not come or len(ready) == _READY_MAX:
                yield ready.popleft()
            for fileno, _ in come:
                answers.unregister(fileno)
                asked, blob = waiting.pop(fileno)
                data = None
                try:
                    data = client.receive_blob(asked, blob)
                except Busy as exc:
                    if going:
                        client.patience().bear(exc)
                except OvmsError:
                    pass
                if data is not None:
                    ready.append((blob, data))
                # the registry works on the next one meanwhile
                going = going and data is not None and ask()
        yield from ready
    finally:
        for asked, _ in waiting.values():
            with contextlib.suppress(OSError):
                asked.close()
