"""Feeds one target, under limits of memory and time: ``python -m fuzz.child TARGET [--seconds N] …`` (tests/ on the path).

Coverage-guided by atheris where it is installed, else by a mutator of our own, which knows no coverage. What it finds is
written to ``--found`` and told on stderr; the exit code is then not 0.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from fuzz.targets import Target

#: Seconds that one input may take. Machines are shared; what hangs takes for ever.
INPUT_SECONDS = 10
#: Bytes of memory that all inputs together may take beside what the program has when it has begun.
MEMORY_MAX = 512 << 20


class Hang(BaseException):
    """An input took too long."""


def limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY_MAX
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _hang(number: int, frame: object) -> NoReturn:
    raise Hang


def replay(target: Target, inputs: Iterator[bytes], found: Path) -> int:
    """Feeds *inputs*, and returns how many there were. Exits at the first finding."""
    signal.signal(signal.SIGALRM, _hang)
    count = 0
    for data in inputs:
        count += 1
        signal.alarm(INPUT_SECONDS)
        try:
            target.run(data)
        except BaseException as exc:
            if isinstance(exc, KeyboardInterrupt):
                raise
            traceback.print_exc()
            path = found / f"crash-{sha256(data).hexdigest()[:16]}"
            path.write_bytes(data)
            sys.exit(f"{'a hang' if isinstance(exc, Hang) else 'a crash'}: {path}")
        finally:
            signal.alarm(0)
    return count


_TOKENS = (
    b"\0",
    b"\xff" * 4,
    b"\xff" * 8,
    b"\x7f\xff\xff\xff",
    b'"',
    b"[",
    b"{",
    b"}",
    b"\n",
    b"\x1b[",
    b"\xe2\x80\xae",
    b"%00",
)


def mutations(seeds: list[bytes], size: int, seed: int, seconds: float) -> Iterator[bytes]:
    """Inputs without end, for some seconds: each a seed with a few changes."""
    rng, end = random.Random(seed), time.monotonic() + seconds

    def at(data: bytearray) -> int:
        return rng.randrange(len(data) + 1)

    def cut(data: bytearray) -> None:
        begin = at(data)
        del data[begin : begin + 1 + rng.randrange(64)]

    def copy(data: bytearray) -> None:
        begin, to = at(data), at(data)
        data[to:to] = data[begin : begin + 1 + rng.randrange(64)]

    def splice(data: bytearray) -> None:
        other = rng.choice(seeds)
        begin, to = rng.randrange(len(other) + 1), at(data)
        data[to : to + rng.randrange(2) * 64] = other[begin : begin + 64]

    changes: tuple[Callable[[bytearray], object], ...] = (
        lambda data: data and data.__setitem__(rng.randrange(len(data)), rng.randrange(256)),
        lambda data: data and data.__setitem__(rng.randrange(len(data)), 1 << rng.randrange(8)),
        lambda data: data.__setitem__(slice(place := at(data), place), rng.choice(_TOKENS)),
        lambda data: data.__setitem__(slice(place := at(data), place + 4), rng.randbytes(4)),
        cut,
        copy,
        splice,
    )
    while time.monotonic() < end:
        data = bytearray(rng.choice(seeds))
        for _ in range(1 + rng.randrange(6)):
            rng.choice(changes)(data)
        yield bytes(data[:size])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", help="a target, or all: each with its seeds, and no more")
    parser.add_argument("--seconds", type=int, default=0, help="how long to look for more (default: the seeds alone)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--found", type=Path, required=True, help="where inputs that are findings go")
    parser.add_argument("--corpus", type=Path, help="where inputs go that reach code which none reached before")
    parser.add_argument("--plain", action="store_true", help="with the mutator of our own")
    parser.add_argument("--inputs", nargs="+", type=Path, default=[], help="files to feed instead of the seeds")
    args = parser.parse_args()
    guided = args.seconds > 0 and not args.plain and importlib.util.find_spec("atheris") is not None
    atheris: Any = importlib.import_module("atheris") if guided else None
    with contextlib.ExitStack() as instrumented:
        if guided:
            instrumented.enter_context(atheris.instrument_imports(include=["ovms"]))
        from fuzz import targets
    from fuzz import seeds

    limit_memory()
    if args.target == "all":
        for name, target in targets.TARGETS.items():
            count = replay(target, iter([b"", *seeds.of(name, target.vectors)]), args.found)
            print(f"{name}: {count} inputs", file=sys.stderr)
        return 0
    target = targets.TARGETS[args.target]
    known = [path.read_bytes() for path in args.inputs] or [b"", *seeds.of(args.target, target.vectors)]
    count = replay(target, iter(known), args.found)
    if args.seconds and not guided:
        count += replay(target, mutations(known, target.size, args.seed, args.seconds), args.found)
    elif guided:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # libFuzzer's clock
        start = Path(tempfile.mkdtemp(prefix="ovms-seeds-"))
        for number, data in enumerate(known):
            (start / f"{number:04}").write_bytes(data)
        options = {
            "seed": args.seed,
            "max_total_time": args.seconds,
            "timeout": INPUT_SECONDS,
            "rss_limit_mb": 0,  # the limit is ours
            "max_len": target.size,
            "artifact_prefix": f"{args.found}/",
            "print_final_stats": 1,
            "verbosity": 0,
        }
        words = [f"-{key}={value}" for key, value in options.items()]
        corpora = [str(args.corpus)] if args.corpus else []
        atheris.Setup(["fuzz", *words, *corpora, str(start)], target.run)
        atheris.Fuzz()  # which ends the process
    print(f"{args.target}: {count} inputs", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
