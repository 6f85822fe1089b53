"""Keys that a program has: one in a KMS, in a token, in another process. We never see the private half.

``exec:PROGRAM [ARGUMENT...]`` names it, in words as a shell has them; no shell is asked. It is run with its arguments and one
more:

==============  =======================================================================================================
``public-key``  nothing on stdin; the public key as PEM on stdout
``sign``        the message on stdin, to its end; the signature on stdout, as raw bytes: DER for ECDSA (over SHA-256; the
                hash of the curve's size is taken, too, but not by cosign), 64 bytes for Ed25519, PKCS #1 v1.5 with SHA-256 for RSA
==============  =======================================================================================================

Exit code 0 means that it did so; else the end of its stderr is shown. It has a minute for each. It gets the caller's
environment, where a KMS has its credentials, but no password of a key. What it signed is checked against the public key
before anything is done with it.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Final

from ovms import process
from ovms.errors import HostError, InputError
from ovms.trust import keys
from ovms.trust.keys import PublicKey

PREFIX: Final = "exec:"
#: Where passwords of keys are looked for, in this order.
PASSWORD_VARIABLES: Final = ("OVMS_KEY_PASSWORD", "COSIGN_PASSWORD")
#: Seconds that the program has: somebody may have to touch a token.
TIMEOUT: Final = 60.0


class ExternalKey:
    """A key that a program has. *text* is what follows ``exec:``.

    Raises:
        InputError: it names no program, or the program's answer is no public key.
        HostError: the program failed, or took too long.
    """

    def __init__(self, text: str) -> None:
        try:
            self._argv = shlex.split(text)
        except ValueError as exc:
            raise InputError(f"what follows {PREFIX} has a quote without its end, or the like ({exc})") from None
        if not self._argv or "\0" in text:
            raise InputError(f"{PREFIX} names no program", hint=f"write {PREFIX}PROGRAM, with its arguments")
        # Its arguments are shown nowhere: they may hold a PIN.
        self._what = f"the program {Path(self._argv[0]).name[:60]!a}"
        self.public: PublicKey = keys.load_public(self._run("public-key", b""), f"what {self._what} says")

    def sign(self, message: bytes) -> bytes:
        """A signature over *message*. Raises :class:`HostError` where the program makes none."""
        signature = self._run("sign", message)
        if not 0 < len(signature) <= keys.SIGNATURE_MAX:
            raise HostError(
                f"{self._what} gave {len(signature)} bytes, where a signature has 1 to {keys.SIGNATURE_MAX}",
                hint="it has to write the raw signature, and nothing else",
            )
        return signature

    def _run(self, verb: str, data: bytes) -> bytes:
        env = {name: value for name, value in os.environ.items() if name not in PASSWORD_VARIABLES}
        done = process.run(
            [*self._argv, verb], timeout=TIMEOUT, check=False, input=data, env=env, shown=f"{self._what} ({verb})"
        )
        if done.returncode != 0:
            how = process.describe_exit(done.returncode)
            raise HostError(f"{self._what} failed at {verb} ({how}): {process.tail(done.stderr)}")
        return done.stdout
