"""What a command works on: the root directory, the registry clients, the progress."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ovms.progress import Progress

if TYPE_CHECKING:
    from ovms.oci.connect import Connector
    from ovms.oci.layout import Layout
    from ovms.oci.registry import RegistryClient
    from ovms.runtime.client import Client
    from ovms.runtime.root import Root
    from ovms.runtime.runtime import Runtime
    from ovms.trust.guard import Guard


class Context:
    """Made once for each command; what it holds is made when it is first needed."""

    def __init__(
        self,
        root: str | None,
        progress: str,
        tls_verify: bool | None = None,
        host: str | None = None,
        *,
        looking: bool = False,
        quiet: bool = False,
    ) -> None:
        """*looking*: where there is no root yet, none is made, which is told unless *quiet*."""
        self._looking = looking
        self._quiet = quiet
        self._root = root
        self._progress = progress
        self._tls_verify = tls_verify
        self._host = host
        self._clients: dict[str, RegistryClient] = {}
        self._lock = threading.Lock()

    @cached_property
    def root(self) -> Root:
        """Where the command works: the root directory; where it only looks and there is none, an empty one for the moment."""
        root = self.named_root
        if self._looking and not root.begun():
            import shutil
            import tempfile
            import weakref

            from ovms.cli import output
            from ovms.runtime.root import Root

            if not self._quiet:
                output.say(f"{root.path} has no artifacts and no instances yet")
            nothing = tempfile.mkdtemp(prefix="ovms-nothing-")  # looked at instead; gone when we are
            weakref.finalize(self, shutil.rmtree, nothing, ignore_errors=True)
            return Root(Path(nothing))
        return root

    @cached_property
    def named_root(self) -> Root:
        """The root directory, also where there is none yet: from the command line, the environment, or the usual one."""
        from ovms.runtime.root import Root

        return Root(Path(self._root).absolute()) if self._root else Root.default(os.environ, os.geteuid())

    @cached_property
    def runtime(self) -> Runtime:
        """The runtime; what killed commands left half done is tidied up first."""
        from ovms.runtime.runtime import Runtime

        runtime = Runtime(self.root)
        runtime.instances.recover()
        if runtime.root.anything_parked():
            from ovms.runtime import warm

            warm.sweep_left(runtime.root)
        return runtime

    @cached_property
    def client(self) -> Client:
        """The server where one runs, else this process."""
        from ovms.runtime.client import choose

        socket = choose(self.named_root, self._host, os.environ)
        if socket is None:
            from ovms.cli import output
            from ovms.runtime.local import Local

            return Local(self.runtime, self.connect, lambda error: output.say(f"warning: {error.message}"))
        from ovms.runtime.remote import Remote

        return Remote(socket)

    @property
    def has_server(self) -> bool:
        """Whether there is a server to ask."""
        from ovms.runtime.client import choose

        return choose(self.named_root, self._host, os.environ) is not None

    @cached_property
    def layout(self) -> Layout:
        """The local store."""
        self.root.prepare()
        return self.root.layout()

    @cached_property
    def guard(self) -> Guard:
        """What the policies allow, over the local store."""
        from ovms.trust.files import Policies
        from ovms.trust.guard import Guard

        return Guard(self.layout, Policies.from_environment())

    @cached_property
    def progress(self) -> Progress:
        """Where long work reports."""
        from ovms.cli.progress import make

        return make(self._progress)

    @contextlib.contextmanager
    def pulling(self) -> Iterator[None]:
        """Around what may pull: whoever breaks it off learns that the next pull goes on from there."""
        # the kernel's clock of files lags behind by a tick
        began = time.time() - 0.1
        try:
            yield
        except Exception:
            raise
        except BaseException:  # Ctrl-C, SIGTERM
            from ovms.cli import output
            from ovms.cli.progress import give_up
            from ovms.oci import partial

            give_up(self.progress)
            with contextlib.suppress(OSError):
                if partial.any_since(self.layout, began):
                    output.say("what came is kept: the next pull goes on from there")
            raise

    @cached_property
    def connector(self) -> Connector:
        """What makes clients for registries, as the user's configuration and ``--tls-verify`` say."""
        from ovms.cli.progress import say_beside
        from ovms.oci.connect import Connector

        def say(text: str) -> None:
            if not self._quiet:  # stderr is for one JSON object then
                say_beside(self.progress, text)

        return Connector.from_environment(tls_verify=self._tls_verify, say=say)

    def connect(self, host: str) -> RegistryClient:
        """The command's client for a registry: it knows which mirrors it has passed over, and what it has written."""
        with self._lock:
            if host not in self._clients:
                self._clients[host] = self.connector(host)
            return self._clients[host]

    def close(self) -> None:
        """Closes the connections to registries."""
        with self._lock:
            clients = list(self._clients.values())
        for client in clients:
            client.close()
