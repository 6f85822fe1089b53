"""What strangers say (artifacts, registries, guests, programs), made fit to be shown: nothing of it drives a terminal (SEC-3)."""

from __future__ import annotations

from typing import Final

#: Characters that are enough of a stranger's words in a message.
SHOWN_MAX: Final = 1000


def printable(text: str, most: int | None = SHOWN_MAX, *, mark: str = "?") -> str:
    """*text* in one line without control characters and marks that turn the direction of writing: *mark* is in their place.

    More than *most* characters are cut.
    """
    cut = text if most is None else text[:most]
    return cut if cut.isprintable() else "".join(c if c.isprintable() else mark for c in cut)
