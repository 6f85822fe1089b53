"""What registries and tools really do with OVMS artifacts: the trials behind ``spec/hacks/oci-compat.md``.

Run by hand: ``python scripts/oci_compat.py --tools DIR``. DIR holds what is to be tried of ``registry`` (distribution 3),
``docker-registry`` (2.8), ``zot``, ``oras``, ``crane``, ``cosign``, ``containerd`` and ``ctr``, and ``referrers-registry``
(go-containerregistry's, of ``tests/support``; as its makers left it). ``make setup-interop`` and ``scripts/fetch-tools.sh cosign``
bring most of them. ``skopeo`` and ``podman`` are taken from the PATH. What is missing is left out, and said so. Everything listens on loopback and ends with the script.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import http.client as http_client
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

OVM: Final = Path(sys.executable).parent / "ovm"
MANIFEST_TYPE: Final = "application/vnd.ovms.manifest.v1+json"
OCI_MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX: Final = "application/vnd.oci.image.index.v1+json"
TIMEOUT: Final = 120


@dataclass(frozen=True)
class Answer:
    """What a registry said."""

    status: int
    headers: dict[str, str]
    body: bytes


@dataclass
class Trials:
    """The tools, a scratch directory, and what was found."""

    tools: Path
    scratch: Path
    facts: list[tuple[str, str, str]] = field(default_factory=list)

    def note(self, who: str, what: str, found: str) -> None:
        found = " ".join(found.split())[:300]
        self.facts.append((who, what, found))
        print(f"{who:<22} {what:<46} {found}", flush=True)

    def find(self, name: str) -> str | None:
        own = self.tools / name
        return str(own) if own.exists() else shutil.which(name)

    def run(
        self, argv: Sequence[object], *, env: dict[str, str] | None = None, cwd: Path | None = None
    ) -> tuple[int, str]:
        """Exit code, and the last words."""
        base = {"PATH": f"{self.tools}:{os.environ['PATH']}", "HOME": str(self.scratch / "home"), "LC_ALL": "C"}
        done = subprocess.run(
            [str(a) for a in argv], env={**base, **(env or {})}, cwd=cwd or self.scratch, capture_output=True, text=True,
            timeout=TIMEOUT, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        words = (done.stdout + "\n" + done.stderr).strip().splitlines()
        errors = [line for line in words if "rror" in line] or words[-1:]
        return done.returncode, errors[0] if errors else ""


def http(method: str, url: str, body: bytes | None = None, **headers: str) -> Answer:
    request = urllib.request.Request(
        url, data=body, method=method, headers={key.replace("_", "-"): value for key, value in headers.items()}
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return Answer(answer.status, dict(answer.headers), answer.read())
    except urllib.error.HTTPError as exc:
        try:
            return Answer(exc.code, dict(exc.headers), exc.read())
        except http_client.IncompleteRead as cut:  # docker-registry announces the whole blob after a 416
            return Answer(exc.code, dict(exc.headers), cut.partial)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def serving(trials: Trials, argv: Sequence[object], port: int, env: dict[str, str] | None = None) -> Iterator[str]:
    with (trials.scratch / f"server-{port}.log").open("wb") as log:
        base = {"PATH": os.environ["PATH"], "HOME": str(trials.scratch / "home"), "OTEL_TRACES_EXPORTER": "none"}
        server = subprocess.Popen([str(a) for a in argv], env={**base, **(env or {})}, stdout=log, stderr=log)
    try:
        host = f"127.0.0.1:{port}"
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and server.poll() is None:
            with contextlib.suppress(OSError):
                http("GET", f"http://{host}/v2/")
                break
            time.sleep(0.1)
        yield host
    finally:
        server.terminate()
        try:
            server.wait(5)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


@contextlib.contextmanager
def registry(trials: Trials, name: str) -> Iterator[str | None]:
    """One of the registries, empty, on loopback; None when it is not here."""
    program = trials.find(
        {
            "distribution 3": "registry",
            "docker-registry 2.8": "docker-registry",
            "zot 2.1": "zot",
            "ggcr 0.22": "referrers-registry",
        }[name]
    )
    if program is None:
        trials.note(name, "present", "no: left out")
        yield None
        return
    port = free_port()
    if name.startswith("ggcr"):
        blobs = trials.scratch / f"registry-{port}"
        blobs.mkdir()
        argv = [program, f"-listen=127.0.0.1:{port}", f"-blobs={blobs}", "-oci-subject=false"]
        with serving(trials, argv, port) as host:
            yield host
        return
    root = trials.scratch / f"registry-{port}"
    config = trials.scratch / f"registry-{port}.conf"
    if name.startswith("zot"):
        value = {
            "distSpecVersion": "1.1.1",
            "storage": {"rootDirectory": str(root), "gc": False, "dedupe": False},
            "http": {"address": "127.0.0.1", "port": str(port)},
            "log": {"level": "error"},
        }
        config.write_text(json.dumps(value))
    else:
        config.write_text(
            f"version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {root}}}}}\n"
            f"http: {{addr: '127.0.0.1:{port}'}}\n"
        )
    with serving(trials, [program, "serve", config], port) as host:
        yield host


# --- what is tried ---------------------------------------------------------------------------------------------------


def upload(host: str, repository: str, data: bytes) -> str:
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    begun = http("POST", f"http://{host}/v2/{repository}/blobs/uploads/", b"")
    place = begun.headers["Location"]
    place = place if place.startswith("http") else f"http://{host}{place}"
    glue = "&" if "?" in place else "?"
    http("PUT", f"{place}{glue}digest={digest}", data, Content_Type="application/octet-stream")
    return digest


def put(host: str, repository: str, tag: str, value: Any, media_type: str = OCI_MANIFEST) -> Answer:
    return http(
        "PUT", f"http://{host}/v2/{repository}/manifests/{tag}", json.dumps(value).encode(), Content_Type=media_type
    )


def try_registry(trials: Trials, name: str, host: str) -> None:
    """Raw requests: what the registry takes, and what it can do."""
    empty = upload(host, "raw", b"{}")
    blob = upload(host, "raw", b"OVMS" * 4096)

    def descriptor(media_type: str, digest: str, size: int, **more: Any) -> dict[str, Any]:
        return {"mediaType": media_type, "digest": digest, "size": size, **more}

    layer = descriptor("application/vnd.oci.image.layer.v1.tar", blob, 16384, annotations={"ovms.format": "qcow2"})
    base = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "artifactType": MANIFEST_TYPE}
    forms = {
        "OVMS config": {**base, "config": descriptor(MANIFEST_TYPE, empty, 2), "layers": [layer]},
        "empty config": {
            **base,
            "config": descriptor("application/vnd.oci.empty.v1+json", empty, 2),
            "layers": [descriptor(MANIFEST_TYPE, empty, 2), layer],
        },
        "no layers": {**base, "config": descriptor(MANIFEST_TYPE, empty, 2), "layers": []},
        "unknown media types": {
            **base,
            "config": descriptor(MANIFEST_TYPE, empty, 2),
            "layers": [descriptor("application/vnd.ovms.ramsnap.v1+zstd", blob, 16384)],
        },
        "a layer that is not there": {
            **base,
            "config": descriptor(MANIFEST_TYPE, empty, 2),
            "layers": [descriptor("application/vnd.ovms.kernel.v1", "sha256:" + "0" * 64, 4)],
        },
    }
    for what, value in forms.items():
        answer = put(host, "raw", "form", value)
        trials.note(name, f"manifest: {what}", f"{answer.status} {answer.body[:160].decode(errors='replace')}")
    main = forms["OVMS config"]
    made = put(host, "raw", "main", main)
    digest = made.headers.get("Docker-Content-Digest", "")
    index = {
        "schemaVersion": 2,
        "mediaType": OCI_INDEX,
        "manifests": [
            descriptor(OCI_MANIFEST, digest, len(json.dumps(main)), platform={"os": "linux", "architecture": "amd64"})
        ],
    }
    answer = put(host, "raw", "index", index, OCI_INDEX)
    trials.note(name, "index with platform", f"{answer.status} {answer.body[:160].decode(errors='replace')}")
    subject = descriptor(OCI_MANIFEST, digest, len(json.dumps(main)))
    answer = put(host, "raw", "child", {**main, "subject": subject, "annotations": {"x": "1"}})
    trials.note(name, "subject", f"{answer.status}, OCI-Subject: {answer.headers.get('OCI-Subject', '-')}")
    dangling = {**subject, "digest": "sha256:" + "1" * 64}
    answer = put(host, "raw", "dangling", {**main, "subject": dangling})
    trials.note(
        name, "subject that does not exist", f"{answer.status}, OCI-Subject: {answer.headers.get('OCI-Subject', '-')}"
    )
    answer = http("GET", f"http://{host}/v2/raw/referrers/{digest}")
    count = len(json.loads(answer.body).get("manifests") or []) if answer.status == 200 else "-"
    trials.note(name, "GET /referrers", f"{answer.status}, manifests: {count}")
    url = f"http://{host}/v2/raw/blobs/{blob}"
    answer = http("GET", url, Range="bytes=4096-8191")
    trials.note(name, "range of a blob", f"{answer.status}, {len(answer.body)} bytes")
    answer = http("GET", url, Range="bytes=4096-")
    trials.note(name, "range without an end", f"{answer.status}, {len(answer.body)} bytes")
    answer = http("GET", url, Range="bytes=16384-32767")
    trials.note(name, "range behind the end", f"{answer.status}, {len(answer.body)} bytes")
    answer = http("POST", f"http://{host}/v2/other/blobs/uploads/?mount={blob}&from=raw", b"")
    trials.note(name, "mount from another repository", str(answer.status))
    begun = http("POST", f"http://{host}/v2/raw/blobs/uploads/", b"")
    place = begun.headers["Location"]
    place = place if place.startswith("http") else f"http://{host}{place}"
    first = http("PATCH", place, b"a" * 4096, Content_Type="application/octet-stream", Content_Range="0-4095")
    second = first.headers.get("Location", "")
    second = second if second.startswith("http") else f"http://{host}{second}"
    wrong = http("PATCH", second, b"b" * 10, Content_Type="application/octet-stream", Content_Range="9999-10008")
    trials.note(name, "chunked upload; a chunk at a wrong offset", f"{first.status}; {wrong.status}")
    for size in (1, 4, 8):
        padding = "x" * (size * (1 << 20) - len(json.dumps(main)) - 40)
        answer = put(host, "raw", f"large-{size}", {**main, "annotations": {"pad": padding}})
        trials.note(name, f"manifest of {size} MiB", str(answer.status))


def make_artifact(trials: Trials) -> dict[str, str]:
    """A small artifact in a store of ours. Returns the environment that finds it."""
    project = trials.scratch / "project"
    project.mkdir()
    kernel = bytearray(4096)
    kernel[0x1FE:0x200], kernel[0x202:0x206], kernel[0x206:0x208], kernel[0x211] = b"\x55\xaa", b"HdrS", b"\x0f\x02", 1
    (project / "vmlinuz").write_bytes(kernel)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", project / "base.qcow2", "16M"], check=True, timeout=60)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", project / "diff.qcow2", "16M"], check=True, timeout=60)
    (project / "ovms.json").write_text(
        json.dumps(
            {
                "schemaVersion": 1,
                "mediaType": MANIFEST_TYPE,
                "name": "compat",
                "version": "1",
                "kernel": {"ref": "vmlinuz", "args": "console=ttyS0"},
                "diskLayers": [{"ref": "base.qcow2", "format": "qcow2"}, {"ref": "diff.qcow2", "format": "qcow2"}],
            }
        )
    )
    env = {"OVMS_ROOT": str(trials.scratch / "root")}
    code, words = trials.run([OVM, "build", project / "ovms.json", "-t", "compat:1"], env=env)
    assert code == 0, words
    return env


def digest_of(host: str, repository: str, tag: str) -> str:
    answer = http("GET", f"http://{host}/v2/{repository}/manifests/{tag}", Accept=f"{OCI_MANIFEST}, {OCI_INDEX}")
    return "sha256:" + hashlib.sha256(answer.body).hexdigest() if answer.status == 200 else f"none ({answer.status})"


def try_tools(trials: Trials, name: str, host: str, env: dict[str, str]) -> None:
    """Each tool on an artifact that ``ovm push`` made, and ``ovm pull`` on what ``oras push`` made."""
    code, words = trials.run([OVM, "tag", "compat:1", f"{host}/vms/compat:1"], env=env)
    code, words = trials.run([OVM, "push", f"{host}/vms/compat:1"], env=env)
    trials.note("ovm", f"push to {name}", f"exit {code} {words}")
    ours = digest_of(host, "vms/compat", "1")

    def same(repository: str, tag: str) -> str:
        return (
            "same digest"
            if digest_of(host, repository, tag) == ours
            else f"other digest: {digest_of(host, repository, tag)}"
        )

    def tool(
        program: str, what: str, argv: Sequence[object], check: str | None = None, cwd: Path | None = None
    ) -> bool:
        found = trials.find(program)
        if found is None:
            trials.note(program, what, "not here: left out")
            return False
        code, words = trials.run([found, *argv], cwd=cwd)
        result = "ok" if code == 0 else f"exit {code}: {words}"
        if code == 0 and check is not None:
            result = f"ok, {same(check, '1')}"
        trials.note(f"{program} ({name})", what, result)
        return code == 0

    store = trials.scratch / "root" / "store"
    ref = f"{host}/vms/compat:1"
    plain = "--src-tls-verify=false", "--dest-tls-verify=false"
    tool("skopeo", "inspect", ["inspect", "--tls-verify=false", f"docker://{ref}"])
    tool("skopeo", "inspect --raw", ["inspect", "--raw", "--tls-verify=false", f"docker://{ref}"])
    tool(
        "skopeo",
        "copy registry → registry",
        ["copy", "-q", *plain, f"docker://{ref}", f"docker://{host}/vms/skopeo:1"],
        "vms/skopeo",
    )
    tool(
        "skopeo",
        "copy our store → registry",
        ["copy", "-q", plain[1], f"oci:{store}:compat:1", f"docker://{host}/vms/layout:1"],
        "vms/layout",
    )
    tool(
        "skopeo",
        "copy registry → OCI layout",
        ["copy", "-q", plain[0], f"docker://{ref}", f"oci:{trials.scratch}/skopeo-{name[:3]}:1"],
    )
    tool("oras", "manifest fetch", ["manifest", "fetch", "--plain-http", ref])
    out = trials.scratch / f"oras-{name[:3]}"
    if tool("oras", "pull", ["pull", "--plain-http", "-o", out, ref]):
        trials.note(f"oras ({name})", "files that pull wrote", ", ".join(sorted(p.name for p in out.iterdir())))
    tool(
        "oras",
        "copy registry → registry",
        ["copy", "--from-plain-http", "--to-plain-http", ref, f"{host}/vms/oras:1"],
        "vms/oras",
    )
    tool(
        "oras",
        "copy from our store",
        ["copy", "--from-oci-layout", "--to-plain-http", f"{store}@{ours}", f"{host}/vms/oraslayout:1"],
        "vms/oraslayout",
    )
    tool("crane", "manifest", ["manifest", "--insecure", ref])
    tool("crane", "copy", ["copy", "--insecure", ref, f"{host}/vms/crane:1"], "vms/crane")
    tool(
        "crane", "pull --format=oci", ["pull", "--insecure", "--format=oci", ref, trials.scratch / f"crane-{name[:3]}"]
    )
    single = {"OVMS_ROOT": str(trials.scratch / f"single-{name[:3]}")}
    trials.run([OVM, "pull", ref], env=single)
    layout = Path(single["OVMS_ROOT"]) / "store"
    tool("crane", "push our store, of one artifact", ["push", "--insecure", layout, f"{host}/vms/cranelayout:1"],
         "vms/cranelayout")  # fmt: skip
    tool("crane", "push our store, of several", ["push", "--insecure", store, f"{host}/vms/several:1"])
    try_more_copies(trials, name, host, tool)
    tool("crane", "validate --remote", ["validate", "--insecure", "--remote", ref])
    storage = [
        "--root",
        trials.scratch / "podman",
        "--runroot",
        trials.scratch / "podman-run",
        "--storage-driver",
        "vfs",
    ]
    policy = trials.scratch / "policy.json"
    policy.write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
    tool("podman", "pull", [*storage, "pull", "--signature-policy", policy, "--tls-verify=false", ref])
    project = trials.scratch / "project"
    files = [
        f"ovms-manifest.json:{MANIFEST_TYPE}",
        "vmlinuz:application/vnd.ovms.kernel.v1",
        "base.qcow2:application/vnd.oci.image.layer.v1.tar",
    ]
    refs = {f: "sha256:" + hashlib.sha256((project / f).read_bytes()).hexdigest() for f in ("vmlinuz", "base.qcow2")}
    (project / "ovms-manifest.json").write_text(
        json.dumps(
            {
                "schemaVersion": 1,
                "mediaType": MANIFEST_TYPE,
                "name": "attached",
                "version": "1",
                "kernel": {"ref": refs["vmlinuz"]},
                "diskLayers": [{"ref": refs["base.qcow2"], "format": "qcow2"}],
            }
        )
    )
    for what, chosen in (
        ("with media types", files),
        ("without", [f.partition(":")[0] if i else f for i, f in enumerate(files)]),
    ):
        target = f"{host}/vms/attached-{what.replace(' ', '-')}:1"
        if tool(
            "oras",
            f"push, {what}",
            ["push", "--plain-http", "--artifact-type", MANIFEST_TYPE, target, *chosen],
            cwd=project,
        ):
            code, words = trials.run([OVM, "validate", target], env=env)
            trials.note("ovm", f"validate of oras push, {what} ({name})", f"exit {code} {words}")
    for copied in ("skopeo", "oras", "crane", "layout"):
        if digest_of(host, f"vms/{copied}", "1") == ours:
            fresh = {"OVMS_ROOT": str(trials.scratch / f"root-{copied}-{name[:3]}")}
            code, words = trials.run([OVM, "pull", f"{host}/vms/{copied}:1"], env=fresh)
            trials.note("ovm", f"pull of what {copied} copied ({name})", f"exit {code} {words if code else ''}")


def try_more_copies(trials: Trials, name: str, host: str, tool: Callable[..., bool]) -> None:
    """Copies of an index, and of an artifact whose subject is in another repository, or in the same."""
    raw = http("GET", f"http://{host}/v2/vms/compat/manifests/1", Accept=OCI_MANIFEST).body
    base = {"mediaType": OCI_MANIFEST, "digest": "sha256:" + hashlib.sha256(raw).hexdigest(), "size": len(raw)}
    entry = {**base, "artifactType": MANIFEST_TYPE, "platform": {"os": "linux", "architecture": "amd64"}}
    put(host, "vms/compat", "index", {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry]}, OCI_INDEX)
    put(host, "vms/compat", "snap", {**json.loads(raw), "subject": base})
    trials.run(["crane", "copy", "--insecure", f"{host}/vms/compat:1", f"{host}/vms/alone:1"])
    put(host, "vms/alone", "snap", {**json.loads(raw), "subject": {**base, "digest": "sha256:" + "1" * 64}})
    plain = "--src-tls-verify=false", "--dest-tls-verify=false"
    copies: dict[str, list[object]] = {
        "skopeo": ["copy", "-q", "--all", *plain],
        "oras": ["copy", "--from-plain-http", "--to-plain-http"],
        "crane": ["copy", "--insecure"],
    }
    for program, argv in copies.items():
        for what, source in (
            ("an index", "compat:index"),
            ("a manifest with its subject beside it", "compat:snap"),
            ("a manifest whose subject is elsewhere", "alone:snap"),
        ):
            target = f"more-{program}-{source.replace(':', '-')}"
            ends = [f"{host}/vms/{source}", f"{host}/vms/{target}:1"]
            if program == "skopeo":
                ends = [f"docker://{end}" for end in ends]
            if tool(program, f"copy of {what}", [*argv, *ends]):
                same = digest_of(host, f"vms/{target}", "1") == digest_of(host, *_split(f"vms/{source}"))
                trials.note(f"{program} ({name})", f"… {what}", "same digest" if same else "other digest")
    note = trials.scratch / "note.txt"
    note.write_text("noted")
    attach = [
        "attach",
        "--plain-http",
        "--artifact-type=text/x-note",
        f"{host}/vms/compat:1",
        f"{note.name}:text/plain",
    ]
    tool("oras", "attach", attach)
    tool("oras", "discover", ["discover", "--plain-http", "--format=table", f"{host}/vms/compat:1"])
    found = http("GET", f"http://{host}/v2/vms/compat/referrers/{base['digest']}")
    types = [m.get("artifactType") for m in json.loads(found.body)["manifests"]] if found.status == 200 else []
    trials.note(name, "artifactType of what oras attached", ", ".join(map(str, types)) or str(found.status))


def _split(name: str) -> tuple[str, str]:
    repository, _, tag = name.partition(":")
    return repository, tag


def try_containerd(trials: Trials, name: str, host: str) -> None:
    containerd, ctr = trials.find("containerd"), trials.find("ctr")
    if containerd is None or ctr is None:
        trials.note("containerd", "present", "no: left out")
        return
    root = trials.scratch / "containerd"
    root.mkdir(exist_ok=True)
    socket_path = root / "sock"
    config = root / "config.toml"
    config.write_text(
        f'version = 2\nroot = "{root}/root"\nstate = "{root}/state"\ndisabled_plugins = ["io.containerd.grpc.v1.cri"]\n'
        f'[grpc]\naddress = "{socket_path}"\n'
    )
    with (root / "log").open("wb") as log:
        server = subprocess.Popen([containerd, "-c", str(config)], stdout=log, stderr=log)
    try:
        for _ in range(100):
            if socket_path.exists():
                break
            time.sleep(0.1)
        for what, argv in (
            ("images pull", ["images", "pull", "--plain-http", f"{host}/vms/compat:1"]),
            (
                "images pull --snapshotter native",
                ["images", "pull", "--snapshotter", "native", "--plain-http", f"{host}/vms/compat:1"],
            ),
            ("content fetch", ["content", "fetch", "--plain-http", f"{host}/vms/compat:1"]),
        ):
            code, words = trials.run([ctr, "-a", socket_path, *argv])
            trials.note(f"containerd ({name})", what, "ok" if code == 0 else f"exit {code}: {words}")
    finally:
        server.terminate()
        server.wait(20)


def try_cosign(trials: Trials, name: str, host: str) -> None:
    """Key pairs, offline; the page on signing has the commands."""
    cosign = trials.find("cosign")
    if cosign is None:
        trials.note("cosign", "present", "no: left out")
        return
    keys = trials.scratch / f"keys-{name[:3]}"
    keys.mkdir()
    env = {"COSIGN_PASSWORD": "secret"}
    trials.run([cosign, "generate-key-pair"], env=env, cwd=keys)
    digest = digest_of(host, "vms/compat", "1")
    ref = f"{host}/vms/compat@{digest}"
    offline = ["--allow-http-registry", "--allow-insecure-registry"]
    check = ["verify", "--key", keys / "cosign.pub", "--insecure-ignore-tlog", *offline]

    def verify(what: str, argv: Sequence[object], target: str) -> None:
        code, words = trials.run([cosign, *argv, target], env=env)
        trials.note(f"cosign ({name})", what, "ok" if code == 0 else f"exit {code}: {words}")

    verify("verify, unsigned", check, ref)
    sign = ["sign", "--key", keys / "cosign.key", "--use-signing-config=false", "--tlog-upload=false", "-y", *offline]
    classic = ["--new-bundle-format=false"]
    env["COSIGN_EXPERIMENTAL"] = "1"
    for what, more, again in (
        ("bundle (default)", [], []),
        ("classic", classic, classic),
        ("OCI 1.1 referrer", [*classic, "--registry-referrers-mode=oci-1-1"], [*classic, "--experimental-oci11"]),
    ):
        code, words = trials.run([cosign, *sign, *more, ref], env=env)
        trials.note(f"cosign ({name})", f"sign, {what}", "ok" if code == 0 else f"exit {code}: {words}")
        verify(f"verify, {what}", [*check, *again], ref)
    found = http("GET", f"http://{host}/v2/vms/compat/referrers/{digest}")
    if found.status != 200:
        found = http("GET", f"http://{host}/v2/vms/compat/manifests/{digest.replace(':', '-')}", Accept=OCI_INDEX)
    types = [m.get("artifactType", "?") for m in json.loads(found.body).get("manifests", [])]
    trials.note(f"cosign ({name})", "referrers", ", ".join(types) or "none")
    tags = json.loads(http("GET", f"http://{host}/v2/vms/compat/tags/list").body).get("tags")
    trials.note(f"cosign ({name})", "tags beside ours", ", ".join(t[:14] + t[71:] for t in tags if t != "1") or "none")
    other = trials.scratch / f"other-{name[:3]}"
    other.mkdir()
    trials.run([cosign, "generate-key-pair"], env=env, cwd=other)
    wrong = [*check]
    wrong[2] = other / "cosign.pub"
    verify("verify with another key", wrong, ref)


def versions(trials: Trials) -> None:
    for program, argv in (
        ("skopeo", ["--version"]),
        ("oras", ["version"]),
        ("crane", ["version"]),
        ("cosign", ["version"]),
        ("podman", ["--version"]),
        ("containerd", ["--version"]),
        ("registry", ["--version"]),
        ("docker-registry", ["--version"]),
        ("zot", ["--version"]),
    ):
        found = trials.find(program)
        if found is not None:
            done = subprocess.run([found, *argv], capture_output=True, text=True, timeout=TIMEOUT, check=False)
            words = (done.stdout + done.stderr).split()
            number = next((w for w in words if any(c.isdigit() for c in w) and "/" not in w), "?")
            trials.note(program, "version", number)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tools", type=Path, default=Path(".cache/tools"), help="where the tools are (default: .cache/tools)"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="oci-compat-") as scratch:
        trials = Trials(args.tools.absolute(), Path(scratch))
        (trials.scratch / "home").mkdir()
        versions(trials)
        env = make_artifact(trials)
        for name in ("docker-registry 2.8", "distribution 3", "zot 2.1", "ggcr 0.22"):
            with registry(trials, name) as host:
                if host is None:
                    continue
                try_registry(trials, name, host)
                try_tools(trials, name, host, env)
                try_cosign(trials, name, host)
                if name.startswith("docker"):
                    try_containerd(trials, name, host)
    return 0


if __name__ == "__main__":
    sys.exit(main())
