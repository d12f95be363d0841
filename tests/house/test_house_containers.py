"""The containers stay as narrow as docs/CONTAINERS.md says."""

import json

import house_rules
import pytest
import yaml

PROFILE = json.loads((house_rules.ROOT / "docker" / "seccomp-host.json").read_text())
COMPOSE = yaml.safe_load((house_rules.ROOT / "docker-compose.yml").read_text())
NEVER = """
    acct add_key bpf chroot delete_module fanotify_init finit_module init_module ioperm iopl kcmp
    kexec_load keyctl mount move_mount name_to_handle_at open_by_handle_at open_tree perf_event_open
    personality pivot_root process_vm_readv process_vm_writev ptrace quotactl reboot request_key
    setns settimeofday swapon syslog umount2 unshare userfaultfd
""".split()


def allowed(profile: dict) -> list[str]:
    """Every name that a profile lets through, whatever the arguments."""
    rules = [rule for rule in profile["syscalls"] if rule["action"] == "SCMP_ACT_ALLOW"]
    return [name for rule in rules for name in rule["names"]]


def test_the_profile_refuses_what_it_does_not_name() -> None:
    assert PROFILE["defaultAction"] == "SCMP_ACT_ERRNO"
    assert set(allowed(PROFILE)) & set(NEVER) == set()


def test_the_profile_names_each_call_once() -> None:
    names = [name for name in allowed(PROFILE) if name != "socket"]
    assert sorted(names) == sorted(set(names))


def test_io_uring_is_allowed_and_is_a_group_of_its_own() -> None:
    (group,) = [rule for rule in PROFILE["syscalls"] if "io_uring_setup" in rule["names"]]
    assert group["names"] == ["io_uring_setup", "io_uring_enter", "io_uring_register"]


def test_no_new_namespace_can_be_made() -> None:
    (clone,) = [rule for rule in PROFILE["syscalls"] if rule["names"] == ["clone"]]
    (mask,) = clone["args"]
    assert (mask["op"], mask["value"], mask["valueTwo"]) == ("SCMP_CMP_MASKED_EQ", 0x7E020000, 0)
    (clone3,) = [rule for rule in PROFILE["syscalls"] if rule["names"] == ["clone3"]]
    assert (clone3["action"], clone3["errnoRet"]) == ("SCMP_ACT_ERRNO", 38)


@pytest.mark.parametrize("name", ["device", "host"])
def test_a_service_has_no_more_rights_than_it_needs(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["cap_drop"] == ["ALL"]
    assert service["network_mode"] == "none"
    assert "no-new-privileges:true" in service["security_opt"]
    assert "privileged" not in service
    assert not any("unconfined" in option for option in service["security_opt"])


def test_the_host_sees_the_window_read_only_and_no_media() -> None:
    assert COMPOSE["services"]["host"]["volumes"] == ["window:/run/csd:ro"]
    assert "seccomp:docker/seccomp-host.json" in COMPOSE["services"]["host"]["security_opt"]


def test_a_profile_with_a_forbidden_call_is_caught() -> None:
    planted = {"syscalls": [{"names": ["read", "ptrace"], "action": "SCMP_ACT_ALLOW"}]}
    assert set(allowed(planted)) & set(NEVER) == {"ptrace"}
