"""Which rule holds for what is in the store: by where it came from, whatever it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import pytest
from support import artifacts, policies
from support.policies import ACCEPT, REJECT, signed

from ovms.artifact.model import Artifact
from ovms.errors import HostError, PolicyRefused, SignatureMissing, StoreCorrupt
from ovms.oci import collector, origins
from ovms.oci.collector import Needs
from ovms.oci.descriptor import Descriptor
from ovms.oci.layout import Layout
from ovms.oci.origins import Origin, Source
from ovms.oci.reference import Reference
from ovms.oci.transport import parse_place
from ovms.spec import mediatypes, strictjson
from ovms.spec.digest import Digest, hex_of, of_bytes
from ovms.trust import keys, signing
from ovms.trust.guard import Guard
from ovms.trust.model import Format

KEY: Final = keys.generate()
HERE: Final = "registry.example/team/web"


def guard_of(layout: Layout, default: dict[str, Any], **scopes: Any) -> Guard:
    value = policies.document(
        default, {"us": KEY}, scopes={k.replace("__", "/").replace("_", "."): v for k, v in scopes.items()}
    )
    return policies.guard(layout, layout.root.parent / "policy.json", value)


def artifact(layout: Layout, name: str = "web:1", *, origin: Origin | None = None) -> Artifact:
    """One whose origin is *origin*, and nothing else (None: nobody knows)."""
    made = artifacts.small(layout, name)
    (layout.origin_dir / hex_of(made.digest)).unlink()
    if origin is not None:
        origins.add(layout, made.digest, origin)
    return made


def allows(guard: Guard, found: Artifact, **more: Any) -> bool:
    try:
        guard.allow(found.digest, "x", **more)
    except (PolicyRefused, SignatureMissing):
        return False
    return True


MADE = Origin(made=True)
PULLED = Origin(places=(HERE,))


@pytest.mark.parametrize(
    ("origin", "name", "asked", "allowed"),
    [
        # made here: whatever it is called
        (MADE, "web:1", "web:1", True),
        (MADE, f"{HERE}:1", f"{HERE}:1", True),
        # pulled: where it came from
        (PULLED, f"{HERE}:1", f"{HERE}:1", False),
        (PULLED, "web:1", "web:1", False),
        (PULLED, "good.example/web:1", "web:1", False),
        (Origin(places=("good.example/web",)), "web:1", "web:1", True),
        # by a name that another rule is for
        (Origin(places=("good.example/web",)), f"{HERE}:1", f"{HERE}:1", False),
        (Origin(places=("good.example/web",)), f"{HERE}:1", None, True),
        # from several places: one is enough
        (Origin(places=(HERE, "good.example/web")), "web:1", None, True),
        (Origin(places=(HERE, "other.example/web")), "web:1", None, False),
        (Origin(made=True, places=(HERE,)), "web:1", None, True),
        # files
        (Origin(places=("oci-archive",)), "web:1", "web:1", False),
        (Origin(places=("oci",)), "web:1", "web:1", True),
        # nobody knows: its names
        (None, "web:1", "web:1", True),
        (None, f"{HERE}:1", "web:1", False),
        (None, "good.example/x:1", None, True),
        (None, "good.example/x:1", f"{HERE}:1", False),
    ],
)
def test_which_rule_holds(layout: Layout, origin: Origin | None, name: str, asked: str | None, allowed: bool) -> None:
    guard = guard_of(layout, REJECT, local=ACCEPT, good_example=ACCEPT, oci=ACCEPT, registry_example=REJECT)
    assert allows(guard, artifact(layout, name, origin=origin), asked=asked) is allowed


def test_what_nobody_knows_and_has_no_name_falls_to_the_default(layout: Layout) -> None:
    found = artifact(layout)
    layout.remove_name("web:1")
    assert not allows(guard_of(layout, REJECT, local=ACCEPT), found)
    assert allows(guard_of(layout, ACCEPT, local=REJECT), found)


def test_of_several_names_each_counts_where_nobody_knows(layout: Layout) -> None:
    found = artifact(layout, "good.example/web:1")
    guard = guard_of(layout, ACCEPT, registry_example=REJECT)
    assert allows(guard, found)
    layout.set_name(f"{HERE}:1", found.image.descriptor())
    assert not allows(guard, found)


def test_what_was_made_from_others_needs_their_rules_too(layout: Layout) -> None:
    base = artifact(layout, f"{HERE}:1", origin=PULLED)
    middle = artifact(layout, "middle:1", origin=Origin(made=True, sources=(Source(base.digest),)))
    made = artifact(layout, "made:1", origin=Origin(made=True, sources=(Source(middle.digest),)))
    assert not allows(guard_of(layout, ACCEPT, registry_example=REJECT), made)
    assert not allows(guard_of(layout, REJECT, local=ACCEPT), made)
    assert not allows(guard_of(layout, ACCEPT, local=REJECT), made)
    assert allows(guard_of(layout, REJECT, local=ACCEPT, registry_example=ACCEPT), made)
    guard = guard_of(layout, ACCEPT, registry_example=signed("us"))
    with pytest.raises(SignatureMissing, match="from which"):
        guard.allow(made.digest, "made:1")
    signing.sign_local(layout, base.digest, HERE, KEY, Format.BUNDLE)
    guard.allow(made.digest, "made:1")
    # without the base nobody can tell who signed it; where it came from is still known
    layout.remove_name(f"{HERE}:1")
    collector.collect(layout, Needs)
    assert layout.size(base.digest) is None
    assert not allows(guard_of(layout, ACCEPT, registry_example=REJECT), made)


def test_memory_of_others_is_asked_about_where_it_is_used(layout: Layout) -> None:
    base = artifacts.with_ram(layout, f"{HERE}:1", artifacts.ram_blob())
    (layout.origin_dir / hex_of(base.digest)).unlink()
    origins.add(layout, base.digest, PULLED)
    guard = guard_of(layout, ACCEPT, registry_example={**ACCEPT, "ramSnapshots": REJECT})
    assert allows(guard, base)
    assert not allows(guard, base, ram=True)
    for source, allowed in ((Source(base.digest), True), (Source(base.digest, ram=True), False)):
        made = artifacts.with_ram(layout, f"made-{allowed}:1", artifacts.ram_blob(), disk=bytes([allowed]) * 5000)
        origins.add(layout, made.digest, Origin(made=True, sources=(source,)))
        assert allows(guard, made)
        assert allows(guard, made, ram=True) is allowed


def test_a_signature_of_an_index_stands_for_what_it_lists(layout: Layout) -> None:
    found = artifact(layout, "x:1")
    raw = strictjson.canonical(
        {"schemaVersion": 2, "mediaType": mediatypes.OCI_INDEX, "manifests": [found.image.descriptor().to_json()]}
    )
    top = layout.add_bytes(raw)
    origins.add(layout, found.digest, Origin(places=(HERE,), indexes=(top,)))
    layout.set_name(f"{HERE}:1", Descriptor(mediatypes.OCI_INDEX, top, len(raw)))
    guard = guard_of(layout, ACCEPT, registry_example=signed("us"))
    assert not allows(guard, found)
    # signed: an index that does not list it, which a record claims to
    other = layout.add_bytes(
        strictjson.canonical({"schemaVersion": 2, "mediaType": mediatypes.OCI_INDEX, "manifests": []})
    )
    origins.add(layout, found.digest, Origin(places=(HERE,), indexes=(other,)))
    _sign_index(layout, other)
    assert not allows(guard, found)
    _sign_index(layout, top)
    assert allows(guard, found)
    # also where nobody knows where it came from
    (layout.origin_dir / hex_of(found.digest)).unlink()
    layout.remove_name("x:1")
    assert allows(guard_of(layout, REJECT, registry_example=signed("us")), found)


def _sign_index(layout: Layout, digest: Any) -> None:
    signing.sign_local(layout, digest, HERE, KEY, Format.BUNDLE)


def test_answers_are_remembered_until_something_changes(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    found = artifact(layout, "web:1", origin=PULLED)
    guard = guard_of(layout, signed("us"))
    assert not allows(guard, found)
    assert not guard.quick(found.digest)
    signing.sign_local(layout, found.digest, HERE, KEY, Format.BUNDLE)
    assert allows(guard, found)
    assert guard.quick(found.digest)
    assert not guard.quick(found.digest, asked="other.example/x:1")
    with monkeypatch.context() as patched:
        patched.setattr(origins, "read", lambda *_: pytest.fail("looked up again"))
        guard.allow(found.digest, "x")
    layout.set_name("other:1", found.image.descriptor())
    assert not guard.quick(found.digest)
    assert allows(guard, found)
    policies.write(layout.root.parent / "policy.json", policies.document(REJECT))
    assert not guard.quick(found.digest)
    assert not allows(guard, found)


def test_an_answer_that_ages_is_not_remembered_for_ever(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    from ovms.trust import guard as module

    monkeypatch.setattr(module, "_FRESH", -1.0)
    found = artifact(layout, "web:1", origin=PULLED)
    guard = guard_of(layout, {**ACCEPT, "maxAge": "1h"})
    assert not allows(guard, found)  # it does not say when it was made
    guard = guard_of(layout, ACCEPT)
    assert allows(guard, found)
    assert guard.quick(found.digest)


def test_without_a_policy_nothing_is_looked_at(layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ovms.trust.files import Policies

    found = artifact(layout)
    guard = Guard(layout, Policies(tmp_path / "none.json", system=policies.NOWHERE))
    monkeypatch.setattr(origins, "read", lambda *_: pytest.fail("looked up"))
    guard.allow(found.digest, "x", asked="x", ram=True)
    assert guard.quick(found.digest, ram=True)
    assert guard.using(found.digest, "x") == []


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"version": 2}', b'{"version": 1, "made": 1}'])
def test_an_origin_that_can_t_be_read_is_none_that_is_believed(layout: Layout, data: bytes) -> None:
    found = artifact(layout, origin=MADE)
    (layout.origin_dir / hex_of(found.digest)).write_bytes(data)
    with pytest.raises(StoreCorrupt, match="does not tell where"):
        guard_of(layout, ACCEPT).allow(found.digest, "x")
    origins.add(layout, found.digest, PULLED)
    assert origins.read(layout, found.digest) == PULLED


def test_origins_are_noted_and_only_grow(layout: Layout) -> None:
    found = artifacts.small(layout, "web:1")
    assert origins.read(layout, found.digest) == MADE
    guard = guard_of(layout, ACCEPT)
    where = Reference.parse(f"{HERE}:1")
    guard.admit(found.image, found.image.descriptor(), where, None, ram=False)
    place = parse_place("oci-archive:/x.tar")
    assert place is not None
    guard.admit(found.image, found.image.descriptor(), place, None, ram=False)
    assert origins.read(layout, found.digest) == Origin(made=True, places=(HERE, "oci-archive"))


def test_what_does_not_come_is_not_noted(layout: Layout) -> None:
    found = artifact(layout)
    with pytest.raises(PolicyRefused):
        guard_of(layout, REJECT).admit(
            found.image, found.image.descriptor(), Reference.parse(f"{HERE}:1"), None, ram=False
        )
    assert origins.read(layout, found.digest) is None


def test_a_policy_that_can_t_be_read_accepts_nothing(layout: Layout) -> None:
    found = artifact(layout, origin=MADE)
    guard = guard_of(layout, ACCEPT)
    (layout.root.parent / "policy.json").write_text('{"version": 1}')
    for _ in range(2):
        with pytest.raises(HostError, match="is no policy"):
            guard.allow(found.digest, "x")
        with pytest.raises(HostError):
            guard.quick(found.digest)


def test_each_artifact_that_others_were_made_from_counts_each_time(layout: Layout) -> None:
    base = artifacts.with_ram(layout, f"{HERE}:1", artifacts.ram_blob())
    policies.came_from(layout, base.digest, HERE)
    guard = guard_of(layout, ACCEPT, registry_example={**ACCEPT, "ramSnapshots": REJECT})
    # its disk, and its memory
    made = artifacts.with_ram(layout, "made:1", artifacts.ram_blob(), disk=b"x" * 5000)
    origins.add(layout, made.digest, Origin(made=True, sources=(Source(base.digest), Source(base.digest, ram=True))))
    assert allows(guard, made)
    assert not allows(guard, made, ram=True)
    # refused in one that is allowed for another reason, and in one that is not
    guard = guard_of(layout, ACCEPT, registry_example=REJECT)
    one = artifact(
        layout, "one:1", origin=Origin(made=True, places=("good.example/x",), sources=(Source(base.digest),))
    )
    two = artifact(layout, "two:1", origin=Origin(made=True, sources=(Source(base.digest),)))
    both = artifact(layout, "both:1", origin=Origin(made=True, sources=(Source(one.digest), Source(two.digest))))
    assert allows(guard, one)
    assert not allows(guard, two)
    assert not allows(guard, both)


def test_records_that_make_no_sense_let_nothing_pass(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    found = artifact(layout, "web:1", origin=Origin(indexes=()))
    origins.add(layout, found.digest, Origin(indexes=(found.digest,)))
    assert not allows(guard_of(layout, ACCEPT, local=REJECT), found)
    origins.add(layout, found.digest, Origin(made=True, sources=(Source(found.digest),)))
    with pytest.raises(PolicyRefused, match="made from itself"):
        guard_of(layout, ACCEPT).allow(found.digest, "x")
    from ovms.trust import guard as module

    monkeypatch.setattr(module, "_SOURCES_MAX", 2)
    many = artifact(layout, "many:1", origin=Origin(made=True, sources=tuple(Source(hash_of(i)) for i in range(3))))
    with pytest.raises(PolicyRefused, match="more than 2 artifacts"):
        guard_of(layout, ACCEPT).allow(many.digest, "x")


def hash_of(number: int) -> Digest:
    return of_bytes(bytes([number]))
