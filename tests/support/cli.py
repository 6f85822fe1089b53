"""The installed ``ovm``, run as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OVM = Path(sys.executable).parent / "ovm"


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def error(self) -> Any:
        return json.loads(self.err.splitlines()[-1])["error"]


@dataclass(frozen=True)
class Ovm:
    """``ovm`` over a root directory of the test's own; ``prefix`` is a command that runs it."""

    root: Path
    home: Path
    prefix: tuple[str, ...] = ()
    #: What its environment has beside the root.
    extra: Mapping[str, str] = field(default_factory=dict)

    def env(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self.home),
            "OVMS_ROOT": str(self.root),
            **self.extra,
            **(extra or {}),
        }

    def __call__(
        self,
        *arguments: object,
        timeout: float = 60,
        env: Mapping[str, str] | None = None,
        input: bytes | None = None,
    ) -> Done:
        done = subprocess.run(
            [*self.prefix, OVM, *map(str, arguments)],
            env=self.env(env),
            input=b"" if input is None else input,
            capture_output=True,
            timeout=timeout,
            check=False,
        )
        out, err = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
        assert "Traceback" not in err, err
        assert "internal error" not in err, err
        return Done(done.returncode, out, err)

    def ok(self, *arguments: object, timeout: float = 60) -> Done:
        """Runs a command that has to succeed."""
        done = self(*arguments, timeout=timeout)
        assert done.code == 0, done.err
        return done

    def popen(self, *arguments: object, **options: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*self.prefix, OVM, *map(str, arguments)], env=self.env(), **options)
