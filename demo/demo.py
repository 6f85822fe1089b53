"""The main job of ovms on real parts: build, push, pull, run, snapshot and restore a VM, with the commands shown.

    demo.py [--ovm PATH] [--images DIRECTORY] [--memory SIZE] [--timeout SECONDS]

Everything happens in one temporary directory (the state of ovms, a registry's storage) and on loopback ports that the
kernel chooses, so demos side by side do not meet. It is gone at the end, and so is every process, whether the demo
ends well, fails or is interrupted. The talk goes to stderr; the last line on stdout is one JSON object:

    {"build_s", "push_s", "pull_s", "boot_ms", "snapshot_ms", "restore_ms", "accel", "artifact_bytes",
     "snapshot_bytes", "ok": true}        or {"ok": false, "error": …} with exit code 1 (130, 143 when interrupted)

The times are wall times as a user sees them: boot_ms from the start of ``ovm run`` until the guest says that it is
ready, snapshot_ms with the push, restore_ms from the start of ``ovm run`` until the first page is answered.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Self

HERE: Final = Path(__file__).resolve().parent

READY: Final = "ovms-demo: ready"
COMMAND_TIMEOUT_S: Final = 180.0
BOOT_TIMEOUT_S: Final = 180.0
PAGE_TIMEOUT_S: Final = 60.0
REQUEST_TIMEOUT_S: Final = 5.0
CLOCK_TIMEOUT_S: Final = 15.0
GRACE_S: Final = 10.0


class DemoError(Exception):
    """Something went wrong; the text says what."""


class Interrupted(DemoError):
    """A signal asked the demo to end."""

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.exit_code = 128 + number


def say(text: str) -> None:
    """One line of talk."""
    with contextlib.suppress(BrokenPipeError):
        print(text, file=sys.stderr, flush=True)


class Signals:
    """Ctrl-C and its like, noticed only where the demo waits.

    An exception out of a handler could come between the start of a process and the moment when we know of it.
    """

    CAUGHT: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.number: int | None = None
        self.shielded = False
        self._wake, self._woken = os.pipe()
        os.set_blocking(self._wake, False)
        os.set_blocking(self._woken, False)

    def install(self) -> None:
        """Catches the signals from now on."""
        signal.set_wakeup_fd(self._woken, warn_on_full_buffer=False)
        for number in self.CAUGHT:
            signal.signal(number, self._caught)

    def _caught(self, number: int, _frame: object) -> None:
        if self.number is None:
            self.number = number

    def check(self) -> None:
        """Raises Interrupted when a signal has come and nothing is being cleaned up."""
        if self.number is not None and not self.shielded:
            raise Interrupted(self.number)

    def wait(self, files: list[int], seconds: float) -> list[int]:
        """Waits until one of the files can be read, or the time is over. Returns those that can.

        Raises:
            Interrupted: a signal came.
        """
        self.check()
        ready, _, _ = select.select([*files, self._wake], [], [], max(0.0, seconds))
        if self._wake in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake, 4096)
        self.check()
        return [file for file in ready if file != self._wake]

    def sleep(self, seconds: float) -> None:
        """Sleeps, unless a signal comes."""
        self.wait([], seconds)


class Child:
    """A process in a group of its own: the terminal's Ctrl-C reaches us alone, and we end what we started."""

    def __init__(self, signals: Signals, command: list[str], env: dict[str, str], log: Path | None = None) -> None:
        self._signals = signals
        self._log = None if log is None else log.open("wb")
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if self._log is None else self._log,
                stderr=self._log,
                env=env,
                process_group=0,
            )
        except OSError as exc:
            if self._log is not None:
                self._log.close()
            raise DemoError(f"cannot start {command[0]}: {exc.strerror}") from exc
        self._ended = os.pidfd_open(self.process.pid)
        self._out = b""
        if self.process.stdout is not None:
            os.set_blocking(self.process.stdout.fileno(), False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Ends the process: asks, waits, kills."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self.process.poll() is None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self.process.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(GRACE_S)
        if self._ended >= 0:
            os.close(self._ended)
            self._ended = -1
        for file in (self.process.stdout, self._log):
            if file is not None:
                file.close()

    def read(self, seconds: float) -> bool:
        """Takes what the process printed; waits for it. Returns whether the process still runs."""
        out = self.process.stdout
        files = [self._ended] if out is None else [self._ended, out.fileno()]
        ready = self._signals.wait(files, seconds)
        ended = self._ended in ready
        while out is not None:
            try:
                data = os.read(out.fileno(), 65536)
            except BlockingIOError:
                break
            self._out += data
            if not data:
                if not ended:  # it has closed its output: now only its end is waited for
                    self._signals.wait([self._ended], seconds)
                break
        return not ended

    def finish(self, seconds: float) -> tuple[int, str]:
        """Waits for the end. Returns the exit code and all that was printed.

        Not until the end of the output: a child of the process may hold that open.
        """
        deadline = time.monotonic() + seconds
        while self.read(deadline - time.monotonic()):
            if time.monotonic() >= deadline:
                raise DemoError(f"{shlex.join(map(str, self.process.args))} did not end within {seconds:.0f} s")  # type: ignore[arg-type]
        return self.process.wait(), self._out.decode("utf-8", "replace")

    def lines(self, seconds: float) -> Iterator[str]:
        """The lines that it prints, as they come; ends with the process, or when the time is over."""
        deadline = time.monotonic() + seconds
        alive = True
        while alive and time.monotonic() < deadline:
            alive = self.read(deadline - time.monotonic())
            *lines, self._out = self._out.split(b"\n")
            for line in lines:
                yield line.decode("utf-8", "replace").rstrip("\r")


class Registry:
    """Debian's docker-registry, with its storage in our directory, on a port that the kernel chooses."""

    def __init__(self, signals: Signals, program: Path, directory: Path) -> None:
        if not program.exists():
            raise DemoError(f"there is no {program}: run scripts/fetch-tools.sh")
        directory.mkdir()
        config = directory / "config.yml"
        config.write_text(
            "version: 0.1\n"
            "log: {level: info, accesslog: {disabled: true}}\n"
            f"storage: {{filesystem: {{rootdirectory: {json.dumps(str(directory / 'data'))}}}}}\n"
            'http: {addr: "127.0.0.1:0"}\n'
        )
        log = directory / "log"
        # should we be killed, it goes too
        command = ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []
        env = {name: value for name, value in os.environ.items() if not name.startswith("REGISTRY_")}
        self.child = Child(signals, [*command, str(program), "serve", str(config)], env, log)
        try:
            self.address = self._address(signals, log)
        except BaseException:
            self.child.end()
            raise

    def _address(self, signals: Signals, log: Path) -> str:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            if match := re.search(r"listening on (127\.0\.0\.1:\d+)", log.read_text("utf-8", "replace")):
                return match[1]
            if self.child.process.poll() is not None:
                break
            signals.sleep(0.02)
        raise DemoError(f"the registry did not start: {log.read_text('utf-8', 'replace').strip()[-1000:]}")


class Demo:
    """The demo's steps, and what they share."""

    def __init__(self, signals: Signals, ovm: Path, directory: Path, deadline: float) -> None:
        self.signals = signals
        self.directory = directory
        self.root = directory / "ovms"
        self.figures: dict[str, Any] = {}
        self._ovm = str(ovm)
        self._deadline = deadline
        self._env = {**os.environ, "OVMS_ROOT": str(self.root)}

    # --- tools --------------------------------------------------------------------------------------------------------

    def command(self, *arguments: str, shown: bool = True) -> Child:
        """Starts an ``ovm`` command, and shows it."""
        if shown:
            say(f"\n$ {shlex.join(['ovm', *arguments])}")
        return Child(self.signals, [self._ovm, *arguments], self._env)

    def ovm(self, *arguments: str) -> Any:
        """Runs an ``ovm`` command to its end; shows what it answers and how long it took.

        Returns what it printed, parsed where it was asked for JSON.

        Raises:
            DemoError: it failed.
        """
        start = time.monotonic()
        with self.command(*arguments) as child:
            code, out = child.finish(min(COMMAND_TIMEOUT_S, self.left()))
        if code != 0:
            raise DemoError(f"'{shlex.join(['ovm', *arguments])}' failed with exit code {code}")
        for line in out.splitlines():
            say(f"  {line}")
        say(f"  ({time.monotonic() - start:.2f} s)")
        if "--json" not in arguments:
            return out
        try:
            return json.loads(out)
        except ValueError as exc:
            raise DemoError(f"'{shlex.join(['ovm', *arguments])}' printed no JSON: {out[:200]!r}") from exc

    def left(self) -> float:
        """Seconds until the whole demo must be over."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise DemoError("the demo takes too long")
        return left

    def timed(self, name: str, unit: str, *arguments: str) -> Any:
        """Runs an ``ovm`` command, and notes its wall time under *name*, in s or ms."""
        start = time.monotonic()
        answer = self.ovm(*arguments)
        self.note(name, time.monotonic() - start, unit)
        return answer

    def note(self, name: str, seconds: float, unit: str) -> None:
        """Notes a time."""
        self.figures[name] = round(seconds, 3) if unit == "s" else round(seconds * 1000, 1)

    def run(self, name: str, memory: str, reference: str) -> tuple[dict[str, Any], int, float]:
        """Starts a VM with its port 80 forwarded from a free port. Returns the answer, that port and when we began."""
        start = time.monotonic()
        arguments = ("run", "-d", "--name", name, "-p", "80", "--memory", memory, "--json", reference)
        answer = self.ovm(*arguments)
        return answer, int(only(answer["ports"])["host_port"]), start

    def page(self, port: int) -> dict[str, Any]:
        """The page of the guest's service.

        Raises:
            DemoError: it cannot be had.
        """
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=REQUEST_TIMEOUT_S)
        try:
            connection.request("GET", "/")
            answer = connection.getresponse()
            body = answer.read()
            if answer.status != 200:
                raise DemoError(f"the guest answered {answer.status}: {body[:200]!r}")
            page: dict[str, Any] = json.loads(body)
        except (OSError, http.client.HTTPException, ValueError) as exc:
            raise DemoError(f"no page from the guest: {type(exc).__name__}: {exc}") from exc
        finally:
            connection.close()
        return page

    def first_page(self, port: int) -> dict[str, Any]:
        """The page, as soon as the guest answers."""
        deadline = time.monotonic() + min(PAGE_TIMEOUT_S, self.left())
        while True:
            try:
                return self.page(port)
            except DemoError:
                if time.monotonic() > deadline:
                    raise
                self.signals.sleep(0.005)

    def get(self, port: int) -> dict[str, Any]:
        """The page, shown as ``curl`` would."""
        say(f"\n$ curl http://127.0.0.1:{port}/")
        page = self.first_page(port)
        say(f"  {json.dumps(page)}")
        return page

    # --- steps --------------------------------------------------------------------------------------------------------

    def play(self, images: Path, registry: str, memory: str) -> None:
        """All of it."""
        artifact, snapshot = f"{registry}/demo/web:1", f"{registry}/demo/web:1-warm"
        title("Build an artifact from a kernel, an initrd and two disk layers, and push it")
        built = self.timed("build_s", "s", "build", str(images / "manifest.yaml"), "-t", artifact, "--json")
        self.figures["artifact_bytes"] = int(built["size"])
        self.timed("push_s", "s", "push", artifact, "--json")

        title("Forget it, and pull it back")
        self.ovm("rmi", artifact)
        pulled = self.timed("pull_s", "s", "pull", artifact, "--json")
        expect(pulled["digest"] == built["digest"], "what was pulled is not what was built")

        title("Boot a VM from it")
        answer, port, start = self.run("web", memory, artifact)
        expect(not answer["restored"], "the VM was not booted")
        self.figures["accel"] = answer["accel"]
        self.follow("web", start)
        before = self.get(port)
        hits = self.get(port)["hits"]
        expect(hits == before["hits"] + 1, "the guest does not count its pages")

        title("Snapshot it: memory, devices and disk, pushed as an artifact; the VM goes on")
        taken = self.timed("snapshot_ms", "ms", "snapshot", "web", "-t", snapshot, "--json")
        self.figures["snapshot_bytes"] = int(taken["size"])
        expect(self.get(port)["hits"] == hits + 1, "the VM did not go on after the snapshot")
        self.ovm("stop", "web")
        self.ovm("rm", "web")

        title("Forget all of it, pull the snapshot, and run that: restored, not booted")
        self.ovm("rmi", snapshot)
        self.ovm("rmi", artifact)
        pulled = self.ovm("pull", snapshot, "--json")
        expect(pulled["digest"] == taken["snapshot_ref"], "what was pulled is not the snapshot")
        answer, port, start = self.run("web-2", memory, snapshot)
        page = self.first_page(port)
        self.note("restore_ms", time.monotonic() - start, "ms")
        say(f"\n$ curl http://127.0.0.1:{port}/\n  {json.dumps(page)}")
        expect(answer["restored"], "the VM was booted, not restored")
        self.prove(before, hits, page)
        self.clock(port)

        title("Clean up")
        self.ovm("stop", "web-2")
        self.ovm("rm", "web-2")
        self.ovm("rmi", snapshot)
        expect(self.ovm("ps", "-a", "--json") == [], "there are instances left")

    def follow(self, name: str, start: float) -> None:
        """Reads the console until the guest says that it is ready."""
        seconds = min(BOOT_TIMEOUT_S, self.left())
        with self.command("logs", "-f", name) as child:
            for line in child.lines(seconds):
                say(f"  {printable(line)}")
                if READY in line:
                    self.note("boot_ms", time.monotonic() - start, "ms")
                    say(f"  (up {time.monotonic() - start:.2f} s after 'ovm run')")
                    return
        raise DemoError(f"the guest did not come up within {seconds:.0f} s")

    def prove(self, before: dict[str, Any], hits: int, page: dict[str, Any]) -> None:
        """The guest's memory came back: what it held nowhere else is there, and goes on."""
        expect(page["token"] == before["token"], "the guest has another token: its memory did not come back")
        expect(page["boot_id"] == before["boot_id"], "the guest's kernel was booted anew")
        expect(page["hits"] == hits + 1, f"the guest counts {page['hits']} pages, not {hits + 1}")
        say(f"\n  The same token and boot_id as before, and the count goes on from {hits}: the guest's memory is back.")

    def clock(self, port: int) -> None:
        """The guest takes the time from its RTC after the restore."""
        deadline = time.monotonic() + CLOCK_TIMEOUT_S
        while abs(self.page(port)["time"] - time.time()) > 4:
            expect(time.monotonic() < deadline, "the guest's clock stays wrong after the restore")
            self.signals.sleep(0.5)
        say("  Its clock has been set, too.")

    # --- cleaning up --------------------------------------------------------------------------------------------------

    def clean(self) -> list[str]:
        """Ends every VM of ours. Returns what could not be cleaned up."""
        problems: list[str] = []
        if self.root.exists():
            try:
                for instance in self._instances():
                    with self.command("rm", "-f", instance) as child:
                        child.finish(30)
            except (DemoError, ValueError, KeyError, TypeError) as exc:
                problems.append(f"removing instances: {exc}")
        left = self._processes()
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in left:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, number)
            deadline = time.monotonic() + 5
            while left and time.monotonic() < deadline:
                time.sleep(0.02)
                left = self._processes()
        if left:
            problems.append(f"processes {left} do not end")
        return problems

    def _instances(self) -> list[str]:
        with self.command("ps", "-a", "--json", shown=False) as child:
            code, out = child.finish(30)
        if code != 0:
            raise DemoError(f"'ovm ps' failed with exit code {code}")
        return [str(item["instance_id"]) for item in json.loads(out)]

    def _processes(self) -> list[int]:
        """What still runs with our directory on its command line or in its environment, the registry aside."""
        needle = os.fsencode(self.root)
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            with contextlib.suppress(OSError):
                if needle in (entry / "cmdline").read_bytes() or needle in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
        return found


def title(text: str) -> None:
    """A heading."""
    say(f"\n=== {text}")


def expect(condition: object, otherwise: str) -> None:
    """Raises DemoError unless the condition holds."""
    if not condition:
        raise DemoError(otherwise)


def only(items: list[dict[str, Any]]) -> dict[str, Any]:
    """The one item of the list."""
    expect(len(items) == 1, f"one port was asked for, not {len(items)}")
    return items[0]


def printable(line: str) -> str:
    """The line without what would move a terminal's cursor."""
    line = re.sub(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b.", "", line)
    return "".join(c for c in line if c.isprintable() or c == "\t")


def make_images(signals: Signals) -> Path:
    """The directory with the guest's images, made where needed."""
    with Child(signals, [sys.executable, str(HERE / "make_images.py")], dict(os.environ)) as child:
        code, out = child.finish(1200)
    lines = out.splitlines()
    if code != 0 or not lines:
        raise DemoError("the guest's images could not be made")
    return Path(lines[-1])


def find_ovm(given: str | None) -> Path:
    """The ``ovm`` beside this Python, in .venv of the repository, or in PATH."""
    places = [
        Path(sys.executable).parent / "ovm",
        HERE.parent / ".venv/bin/ovm",
        Path(shutil.which("ovm") or "/nowhere"),
    ]
    for place in [Path(given).resolve()] if given else places:
        if os.access(place, os.X_OK):
            return place
    raise DemoError(f"there is no {given or 'ovm'} here: run 'make setup'")


def demo(arguments: argparse.Namespace, signals: Signals) -> dict[str, Any]:
    """Everything, with the cleaning up. Returns the figures."""
    ovm = find_ovm(arguments.ovm)
    images = Path(arguments.images).resolve() if arguments.images else make_images(signals)
    cache = Path(os.environ.get("OVMS_CACHE") or HERE.parent / ".cache")
    started = time.monotonic()
    problems: list[str] = []
    with contextlib.ExitStack() as stack:
        directory = Path(tempfile.mkdtemp(prefix="ovms-demo-"))
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        registry = Registry(signals, cache / "tools/docker-registry", directory / "registry")
        stack.callback(registry.child.end)
        say(f"A registry listens on {registry.address}; all that follows is in {directory}")
        play = Demo(signals, ovm, directory, started + arguments.timeout)
        stack.callback(lambda: problems.extend(play.clean()))
        stack.callback(setattr, signals, "shielded", True)
        play.play(images, registry.address, arguments.memory)
    expect(not problems, "; ".join(problems))
    signals.shielded = False
    signals.check()
    say(f"\nDone in {time.monotonic() - started:.1f} s; nothing is left of it.")
    names = ("build_s", "push_s", "pull_s", "boot_ms", "snapshot_ms", "restore_ms", "accel")
    sizes = ("artifact_bytes", "snapshot_bytes")
    return {**{name: play.figures[name] for name in (*names, *sizes)}, "ok": True}


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description="Builds, pushes, pulls, runs, snapshots and restores a VM.")
    parser.add_argument("--ovm", metavar="PATH", help="the ovm to use (default: the one beside this Python)")
    parser.add_argument("--images", metavar="DIRECTORY", help="the guest (default: what make_images.py makes)")
    parser.add_argument("--memory", metavar="SIZE", default="256M", help="of the guest (default: 256M)")
    parser.add_argument("--timeout", metavar="SECONDS", type=float, default=600.0, help="for all steps (default: 600)")
    arguments = parser.parse_args()
    signals = Signals()
    signals.install()
    answer: dict[str, Any]
    try:
        answer, code = demo(arguments, signals), 0
    except Interrupted as exc:
        answer, code = {"ok": False, "error": str(exc)}, exc.exit_code
    except (DemoError, OSError, KeyError, TypeError, ValueError) as exc:
        text = str(exc) if isinstance(exc, DemoError) else f"{type(exc).__name__}: {exc}"
        answer, code = {"ok": False, "error": text}, 1
    if code:
        say(f"\ndemo: {answer['error']}")
    print(json.dumps(answer), flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
