"""What guests print, on the user's terminal: nothing of it may drive that terminal (SEC-3) unless the user says so.

A terminal can be told to change its title, to answer as if the user typed, to write to the clipboard. So escape sequences
of a guest are left out whole, and other control characters are shown as U+FFFD. Line ends, tabs and text stay. What does
not go to a terminal is left as it is: whoever reads it may want the bytes.
"""

from __future__ import annotations

import codecs
import re
from typing import Final, TextIO

from ovms.lazy import regex

# Of bounded length, so that none has to be waited for without end; what is longer is no sequence, but text with a strange
# character before it. No string begins within another, or looking for their ends would cost the square of their number.
_CSI: Final = r"(?:\x1b\[|\x9b)[0-?]{0,64}[ -/]{0,4}"
_STRING: Final = r"(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x18\x1a\x1b\x90\x98\x9c-\x9f]{0,4096}"
_BEGUN: Final = rf"(?P<begun>(?:{_CSI}|{_STRING}\x1b?|\x1b[ -/]{{0,4}}|\r{{1,2}})\Z)"
_WHOLE: Final = (
    rf"{_CSI}[@-~]|{_STRING}(?:[\x07\x18\x1a\x9c]|\x1b\\|(?=[\x1b\x90\x98\x9d-\x9f]))"
    r"|\x1b(?:[0-OQ-WYZ\\`-~]|[ -/]{1,4}[0-~])"
    r"|(?P<end>\r{1,2}\n)|(?P<control>[^\n\t\x20-\x7e\xa0-\U0010ffff])"
)
_LAST: Final = regex(_WHOLE)
_PIECE: Final = regex(f"{_BEGUN}|{_WHOLE}")
_STRANGE: Final = "\N{REPLACEMENT CHARACTER}"


class Cleaner:
    """Takes what would drive a terminal out of a stream of bytes, whatever pieces it comes in."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._rest = ""

    def feed(self, data: bytes, *, final: bool = False) -> str:
        """The text of *data* (and of what was held back before) that may be shown."""
        text = self._rest + self._decoder.decode(data, final)
        self._rest = ""
        shown = (_LAST if final else _PIECE).sub(self._replace, text)
        # what else is no text: marks that turn the direction of writing, say
        return shown if shown.isascii() else "".join(c if c.isprintable() or c in "\n\t" else _STRANGE for c in shown)

    def _replace(self, match: re.Match[str]) -> str:
        if match.lastgroup == "begun":
            self._rest = match[0]
        return {"end": "\n", "control": _STRANGE}.get(match.lastgroup or "", "")


class Writer:
    """Writes what a guest printed to a text stream of ours."""

    def __init__(self, stream: TextIO, *, clean: bool) -> None:
        self._stream = stream
        self._cleaner = Cleaner() if clean else None

    def __call__(self, data: bytes) -> None:
        """Writes, and flushes."""
        if self._cleaner is None:
            self._stream.flush()
            self._stream.buffer.write(data)
        else:
            self._stream.write(self._cleaner.feed(data))
        self._stream.flush()

    def end(self) -> None:
        """Writes what was held back."""
        if self._cleaner is not None:
            self._stream.write(self._cleaner.feed(b"", final=True))
            self._stream.flush()


def writer(stream: TextIO, *, raw: bool) -> Writer:
    """A writer that cleans what goes to a terminal, unless *raw*."""
    return Writer(stream, clean=not raw and stream.isatty())


DETACH_KEYS: Final = "ctrl-p,ctrl-q"


def parse_keys(text: str) -> bytes:
    """A sequence of keys as Docker writes it: ``ctrl-p,ctrl-q``; ``a``; ``ctrl-]``. Nothing: there is none.

    Raises:
        ValueError: not of this form.
    """
    keys = bytearray()
    for key in text.split(",") if text else ():
        if len(key) == 1 and key.isascii() and key.isprintable():
            keys += key.encode()
        elif (match := re.fullmatch(r"ctrl-([a-z@\[\\\]^_])", key)) is not None:
            keys.append(ord(match[1].upper()) & 0x1F)
        else:
            raise ValueError(f"{key[:20]!a} is no key: write a character, or ctrl- and a to z or one of @[\\]^_")
    return bytes(keys)


class DetachKeys:
    """Looks for the keys with which the user leaves, among all that they type.

    The beginning of the sequence is held back until it is clear that it is none: then the guest gets it after all.
    """

    def __init__(self, keys: bytes) -> None:
        self._keys = keys
        self._seen = b""

    def feed(self, typed: bytes) -> tuple[bytes, bool]:
        """What of it is for the guest, and whether the user leaves."""
        if not self._keys:
            return typed, False
        text = self._seen + typed
        if (at := text.find(self._keys)) >= 0:
            return text[:at], True
        held = next(n for n in range(len(self._keys) - 1, -1, -1) if text.endswith(self._keys[:n]))
        self._seen = text[len(text) - held :]
        return text[: len(text) - held], False
