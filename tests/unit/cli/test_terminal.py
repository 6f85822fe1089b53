"""What a guest prints must not drive the user's terminal; what the user types must reach the guest."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovms.cli.terminal import Cleaner, DetachKeys, parse_keys

ATTACKS = {
    "title": b"a\x1b]0;rm -rf /\x07b",
    "title, the other end": b"a\x1b]2;x\x1b\\b",
    "clipboard": b"a\x1b]52;c;cm0gLXJmIC8=\x07b",
    "report": b"a\x1b[6nb\x1b[21t",
    "keys": b"a\x1bP+q544e\x1b\\b",
    "clear": b"a\x1b[2J\x1b[Hb",
    "eight bits": b"a\xc2\x9b2Jb\xc2\x9d0;x\xc2\x9c",
    "within": b"a\x1b\x1b[31m[2Jb",
    "no end": b"a\x1b[" + b"0" * 5000 + b"b",
    "string without an end": b"ab\x1b]0;" + b"x" * 20_000,
    "charset": b"a\x1b(0b\x0e",
    "reset": b"a\x1bcb",
    "bell and backspace": b"a\x07\x08b",
    "text that runs the other way": "a\u202eb".encode(),
}


def clean(*pieces: bytes) -> str:
    cleaner = Cleaner()
    return "".join(cleaner.feed(piece) for piece in pieces) + cleaner.feed(b"", final=True)


@pytest.mark.spec("SEC-3")
@pytest.mark.parametrize("name", ATTACKS)
def test_nothing_gets_through_that_a_terminal_acts_on(name: str) -> None:
    text = clean(ATTACKS[name])
    assert all(c.isprintable() for c in text)
    assert text[0] == "a"
    assert "b" in text


def test_sequences_go_whole_and_text_stays() -> None:
    assert clean(b"\x1b[0;32m  OK  \x1b[0m] Started \x1b[1mnginx\x1b[0m.\r\n") == "  OK  ] Started nginx.\n"
    assert clean("Grüße\tan 東京\n".encode()) == "Grüße\tan 東京\n"
    assert clean(b"bad \xff utf-8") == "bad \ufffd utf-8"
    assert clean(b"one\r\r\ntwo\rthree") == "one\ntwo\ufffdthree"


@given(st.lists(st.sampled_from([*ATTACKS.values(), b"\r\n", b"text", "東".encode(), b"\x1b", b"\xff"])), st.randoms())
def test_pieces_make_no_difference(parts: list[bytes], random: object) -> None:
    whole = b"".join(part[:200] for part in parts)
    at, pieces = 0, []
    while at < len(whole):
        step = random.randint(1, 9)  # type: ignore[attr-defined]
        pieces.append(whole[at : at + step])
        at += step
    assert clean(*pieces) == clean(whole)
    assert all(c.isprintable() or c in "\n\t" for c in clean(*pieces))


@pytest.mark.parametrize(
    "unit", [b"\xc2\x9d", b"\x1b]", b"\x1b[", b"\x1b[0;", b"\x1b ", b"\x1bP\x1b", b"\xc2\x9b0", b"\x1b"]
)
def test_time_is_in_proportion(unit: bytes) -> None:
    def seconds(count: int) -> float:
        began = time.process_time()
        clean(*[unit * (count // 16)] * 16)
        return time.process_time() - began

    seconds(100)
    assert seconds(160_000) < max(0.3, 30 * seconds(16_000))


@pytest.mark.parametrize(
    ("text", "keys"),
    [("ctrl-p,ctrl-q", b"\x10\x11"), ("ctrl-]", b"\x1d"), ("ctrl-\\", b"\x1c"), ("a,b", b"ab"), ("~,.", b"~."),
     ("ctrl-@", b"\0"), ("", b"")],
)  # fmt: skip
def test_keys_are_written_as_docker_writes_them(text: str, keys: bytes) -> None:
    assert parse_keys(text) == keys


@pytest.mark.parametrize("text", ["ctrl-", "ctrl-P", "ctrl-1", "ab", "ctrl-p,", ",", "é", "\x1b"])
def test_what_is_no_key(text: str) -> None:
    with pytest.raises(ValueError, match="is no key"):
        parse_keys(text)


@given(
    st.lists(st.sampled_from([b"\x10", b"\x11", b"a", b"\x10\x10", b"bc"])),
    st.sampled_from([b"\x10\x11", b"aab", b"a"]),
)
def test_the_guest_gets_every_key_but_those_that_leave(typed: list[bytes], keys: bytes) -> None:
    looking, sent, left = DetachKeys(keys), b"", False
    for piece in typed:
        got, left = looking.feed(piece)
        sent += got
        if left:
            break
    whole = b"".join(typed)
    assert left == (keys in whole)
    if left:
        assert sent == whole[: whole.index(keys)]
    else:
        held = len(whole) - len(sent)
        assert whole.startswith(sent)
        assert keys.startswith(whole[len(sent) :])
        assert held < len(keys)


def test_without_keys_nobody_leaves() -> None:
    assert DetachKeys(b"").feed(b"\x10\x11") == (b"\x10\x11", False)
