"""How long failures are borne: a restart is, a wrong port is not."""

from __future__ import annotations

import itertools

import pytest

from ovms.errors import RegistryError
from ovms.oci import patience
from ovms.oci.http import Broken, Refused
from ovms.oci.patience import Patience
from ovms.oci.session import Busy


class Clock:
    """Time that passes by sleeping only."""

    def __init__(self) -> None:
        self.now = 100.0
        self.told: list[str] = []

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def monotonic(self) -> float:
        return self.now

    def give_up(self, exc: RegistryError, *, worked: bool, takes: float = 0.0) -> tuple[int, float]:
        """How many tries, and how many seconds, until *exc* is raised; each try takes so long."""
        began = self.now
        found = Patience("r.example", worked=lambda: worked, tell=self.told.append)
        for number in itertools.count(1):
            self.now += takes
            try:
                found.bear(exc)
            except RegistryError:
                return number, self.now - began
        raise AssertionError


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(patience, "time", clock)
    return clock


@pytest.mark.parametrize("exc", [Refused("no"), Broken("broken"), Busy("503", None)])
def test_a_registry_that_has_answered_may_take_a_while(clock: Clock, exc: RegistryError) -> None:
    tries, seconds = clock.give_up(exc, worked=True)
    assert 30 <= seconds <= 60
    assert tries == patience.ATTEMPTS_MAX
    assert "waiting for r.example, try 5" in clock.told
    assert clock.told[-1] == ""


def test_one_that_never_answered_is_given_up_soon(clock: Clock) -> None:
    assert clock.give_up(Refused("no"), worked=False)[1] < 5
    assert clock.give_up(Broken("silence"), worked=False, takes=10)[1] < 25


def test_where_each_failure_takes_long_there_are_few(clock: Clock) -> None:
    tries, seconds = clock.give_up(Broken("stalled"), worked=True, takes=30)
    assert tries == patience.SLOW_ATTEMPTS_MAX
    assert seconds < 100


def test_what_the_registry_asks_for_is_bounded(clock: Clock) -> None:
    tries, seconds = clock.give_up(Busy("429", patience.WAIT_MAX), worked=True)
    assert tries >= 3
    assert seconds == pytest.approx((tries - 1) * patience.WAIT_MAX)
    assert clock.give_up(Busy("429", patience.WAIT_MAX + 1), worked=True) == (1, 0.0)


def test_who_may_come_back_at_once_waits_all_the_same(clock: Clock) -> None:
    tries, seconds = clock.give_up(Busy("503", 0.0), worked=True)
    assert tries == patience.ATTEMPTS_MAX
    assert seconds >= 30


def test_progress_begins_anew(clock: Clock) -> None:
    found = Patience("r.example", worked=lambda: True)
    for _ in range(3 * patience.ATTEMPTS_MAX):
        clock.now += 600
        found.progressed()
        found.bear(Broken("broken"))


def test_who_is_stopped_waits_no_longer(clock: Clock) -> None:
    found = Patience("r.example", worked=lambda: True, stopped=lambda: clock.now > 101)
    with pytest.raises(Busy):
        found.bear(Busy("429", 20))
    assert clock.now < 102
