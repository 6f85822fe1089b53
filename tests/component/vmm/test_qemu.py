"""The real QEMU: what it can do, and whether an accelerator runs guests."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import guests

from ovms.errors import AccelUnavailable
from ovms.spec.choices import Accel
from ovms.vmm.qemu import accel, binary

PACKAGE = Path(accel.__file__).parent


@pytest.fixture
def qemu(tmp_path: Path) -> binary.QemuBinary:
    return binary.find(binary.Cache(tmp_path / "qemu.json"))


def test_what_is_found_out_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = binary.Cache(tmp_path / "qemu.json")
    first = binary.find(cache)
    assert first.default_machine == first.machines[-1]
    assert first.default_machine.startswith("pc-i440fx-")
    monkeypatch.setattr("ovms.process.run", None)
    assert binary.find(cache) == first


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"qemu": {"stamp": "x", "value": 1}}', b"\xff"])
def test_a_damaged_cache_costs_time_and_nothing_else(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "qemu.json").write_bytes(content)
    assert binary.find(binary.Cache(tmp_path / "qemu.json")).version


def test_machine_types_are_sorted_by_number() -> None:
    found = sorted(["pc-i440fx-10.0", "pc-i440fx-9.2", "pc-i440fx-2.12"], key=binary._number)
    assert found == ["pc-i440fx-2.12", "pc-i440fx-9.2", "pc-i440fx-10.0"]


def test_tcg_passes_the_probe(qemu: binary.QemuBinary) -> None:
    assert accel.probe(qemu, Accel.TCG, deadline=20) is None


def test_a_guest_that_crawls_fails_the_probe(qemu: binary.QemuBinary) -> None:
    reason = accel.probe(qemu, Accel.TCG, deadline=0.0)
    assert reason is not None
    assert "crawls" in reason


def test_a_guest_that_does_not_finish_fails_the_probe(
    qemu: binary.QemuBinary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # one that ends QEMU in the right way, but has not done its work
    source = (PACKAGE / "probe.S").read_text().replace("mov     $'D', %al", "mov     $'X', %al")
    (tmp_path / "bad.S").write_text(source)
    bad = guests.assemble(tmp_path / "bad.S", tmp_path / "bad.elf")
    monkeypatch.setattr(accel, "_command", lambda b, a, guest, said: _ORIGINAL(b, a, bad, said))
    assert accel.probe(qemu, Accel.TCG, deadline=20) is not None


_ORIGINAL = accel._command


def test_the_probe_guest_is_what_its_source_says(tmp_path: Path) -> None:
    assert (
        guests.assemble(PACKAGE / "probe.S", tmp_path / "probe.elf").read_bytes()
        == (PACKAGE / "probe.elf").read_bytes()
    )


def test_kvm_is_chosen_only_where_the_probe_passes(
    qemu: binary.QemuBinary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = tmp_path / "kvm"
    device.write_bytes(b"")
    monkeypatch.setattr(accel, "KVM_DEVICE", device)
    answers = iter([None, "it crawls"])
    monkeypatch.setattr(accel, "probe", lambda *args: next(answers))
    good, bad = binary.Cache(tmp_path / "good.json"), binary.Cache(tmp_path / "bad.json")
    for _ in range(2):  # the second time from the cache
        assert accel.choose(qemu, good, None).accel is Accel.KVM
    for _ in range(2):
        choice = accel.choose(qemu, bad, None)
        assert (choice.accel, choice.reason) == (Accel.TCG, "it crawls")
    with pytest.raises(AccelUnavailable, match="it crawls"):
        accel.choose(qemu, bad, Accel.KVM)


def test_without_a_device_the_reason_says_so(
    qemu: binary.QemuBinary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accel, "KVM_DEVICE", tmp_path / "kvm")
    choice = accel.choose(qemu, binary.Cache(tmp_path / "c.json"), None)
    assert choice.accel is Accel.TCG
    assert "there is no" in str(choice.reason)


def test_what_this_host_really_has_is_probed(qemu: binary.QemuBinary, tmp_path: Path) -> None:
    choice = accel.choose(qemu, binary.Cache(tmp_path / "c.json"), None)
    assert (choice.accel is Accel.KVM) == (choice.reason is None)
