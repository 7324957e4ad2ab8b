"""Licences, sshd's settings and shell timeouts, as real hosts print them (keys replaced), and whatever else might be there."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.cli.hostcheck import HostAllows
from holdfast.errors import SourceFormat
from holdfast.esxi.says.limits import License, SshdLimits, parse_licenses, parse_setting, parse_sshd_config

FREE = """[200] Sending request for installed licenses...[200] Complete, result is:
   serial: 00000-00000-00000-00000-00000
   vmodl key: esx.hypervisor.cpuPackageCoreLimited
   name: vSphere 7 Hypervisor
   total: 0
   used: 1
   unit: cpuPackage:32core
   Properties:
     [ProductName] = VMware ESX Server
     [count_disabled] = This license is unlimited
"""
TRIAL = """   serial: 00000-00000-00000-00000-00000
   vmodl key: esx.eval.entitlement.cpuCoreMin
   name: VMware ESX Server
   unit: host
   Properties:
     [expirationDate] = 2026-03-07T18:40:52Z
"""


def test_licences() -> None:
    free = License("vSphere 7 Hypervisor", "esx.hypervisor.cpuPackageCoreLimited")
    trial = License("VMware ESX Server", "esx.eval.entitlement.cpuCoreMin", "2026-03-07T18:40:52Z")
    assert parse_licenses(FREE + TRIAL) == (free, trial)
    assert free.is_free
    assert not trial.is_free
    with pytest.raises(SourceFormat):
        parse_licenses("[200] Sending request for installed licenses...")


@pytest.mark.parametrize(
    ("text", "limits"),
    [
        ("", SshdLimits(10, 10)),
        ("MaxSessions 4\nmaxstartups=20:30:60\n", SshdLimits(4, 20)),
        ("# MaxSessions 4\nMaxStartups 3 # few\nMaxStartups 9", SshdLimits(10, 3)),
        ("Match User root\n  MaxSessions 1\n", SshdLimits(10, 10)),
        ("MaxSessions many\nMaxStartups ten:1:2\nMaxStartups\n", SshdLimits(10, 10)),
    ],
)
def test_limits_of_sshd(text: str, limits: SshdLimits) -> None:
    assert parse_sshd_config(text) == limits


def test_a_setting() -> None:
    assert (
        parse_setting("   Path: /UserVars/ESXiShellTimeOut\n   Int Value: 900\n   Default Int Value: 0\n")
        == 900
    )
    with pytest.raises(SourceFormat):
        parse_setting("   Path: /UserVars/X\n   String Value: 900\n")


def test_hints() -> None:
    assert HostAllows(shell_open_s=0, shell_idle_s=0, sshd=SshdLimits()).hints() == ()
    hints = HostAllows(parse_licenses(FREE + TRIAL), None, 600, 900).hints()
    for hint, words in zip(hints, ("free", "2026-03-07", "600 s after", "900 s"), strict=True):
        assert words in hint


@given(st.text())
def test_anything_is_understood_or_refused(text: str) -> None:
    parse_sshd_config(text)
    for parse in (parse_licenses, parse_setting):
        with contextlib.suppress(SourceFormat):
            parse(f"   serial: x\n   Int Value: {text}\n{text}")
