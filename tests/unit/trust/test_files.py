"""Which policy holds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support import policies
from support.policies import ACCEPT, REJECT, signed

from ovms.errors import HostError
from ovms.trust import keys
from ovms.trust.files import NONE, Policies, user_file


def held(found: Policies) -> list[str]:
    return [Path(one.policy.where).parent.name for one in found.in_force().policies]


def test_where_a_user_s_policy_is() -> None:
    assert user_file({"HOME": "/h"}) == (Path("/h/.config/ovms/policy.json"), False)
    assert user_file({"HOME": "/h", "XDG_CONFIG_HOME": "/x"}) == (Path("/x/ovms/policy.json"), False)
    assert user_file({"HOME": "/h", "XDG_CONFIG_HOME": "x"}) == (Path("/h/.config/ovms/policy.json"), False)
    assert user_file({"HOME": "/h", "OVMS_POLICY": "/p.json"}) == (Path("/p.json"), True)


def test_which_hold(tmp_path: Path) -> None:
    user, system = tmp_path / "user/policy.json", tmp_path / "system/policy.json"
    found = Policies(user, system=system)
    assert found.in_force() is NONE
    policies.write(system, policies.document(ACCEPT))
    assert held(found) == ["system"]
    policies.write(user, policies.document(REJECT))
    assert held(found) == ["user"]
    policies.write(system, policies.document(ACCEPT, enforced=True))
    assert held(found) == ["system", "user"]
    user.unlink()
    assert held(found) == ["system"]
    # a user's can't be: nobody is beside it
    policies.write(user, policies.document(ACCEPT, enforced=True))
    policies.write(system, policies.document(REJECT))
    assert held(found) == ["user"]


def test_a_policy_that_was_asked_for_has_to_be_there(tmp_path: Path) -> None:
    found = Policies(tmp_path / "none.json", needed=True, system=policies.NOWHERE)
    with pytest.raises(HostError, match="nothing is accepted, since a policy can't be used"):
        found.in_force()


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_policy_that_may_not_be_read_is_not_passed_over(tmp_path: Path) -> None:
    path = policies.write(tmp_path / "policy.json", policies.document(REJECT))
    path.chmod(0)
    with pytest.raises(HostError):
        Policies(path, system=policies.NOWHERE).in_force()


def test_a_broken_system_policy_is_not_passed_over(tmp_path: Path) -> None:
    user = policies.write(tmp_path / "user.json", policies.document(ACCEPT))
    system = tmp_path / "system.json"
    system.write_text('{"version": 1, "default": {"type": "accept"}, "enforced": "yes"}')
    found = Policies(user, system=system)
    for _ in range(2):
        with pytest.raises(HostError, match=r"\$.enforced"):
            found.in_force()


def test_a_directory_is_no_policy(tmp_path: Path) -> None:
    with pytest.raises(HostError):
        Policies(tmp_path, system=policies.NOWHERE).in_force()


def test_a_file_is_read_once_until_it_changes(tmp_path: Path) -> None:
    key = tmp_path / "a.pub"
    key.write_bytes(keys.generate().public.pem)
    value = {**policies.document(signed("a")), "signers": {"a": {"keyPath": "a.pub"}}}
    found = Policies(policies.write(tmp_path / "policy.json", value), system=policies.NOWHERE)
    first = found.in_force()
    assert found.in_force() is first
    key.write_bytes(keys.generate().public.pem + b"\n")
    second = found.in_force()
    assert second is not first
    assert second.stamp != first.stamp
    policies.write(tmp_path / "policy.json", policies.document(REJECT))
    assert found.in_force().policies[0].policy.default.requirement.kind == "reject"
