"""A real operating system boots from a mounted restore point: BIOS, boot loader, kernel, login prompt.

    build_guest -> backup -> mount -> qemu with a throw-away overlay on by-vm/web1/latest/web1.vmdk -> "login:"

All reads of the machine, from its first sector on, come out of the repository by way of the mount. Takes four to six
minutes, most of them for installing the system and, without a usable KVM, for running it.
"""

from __future__ import annotations

import os
import selectors
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.cli.app import COMMANDS

PROGRAMS = {
    "debootstrap": "debootstrap", "qemu-system-x86_64": "qemu-system-x86", "qemu-img": "qemu-utils", "syslinux": "syslinux",
    "mcopy": "mtools", "mkfs.vfat": "dosfstools", "sfdisk": "fdisk",
}  # fmt: skip
MISSING = [package for program, package in PROGRAMS.items() if shutil.which(program) is None]
BOOT_MAX_S = 300

pytestmark = [
    pytest.mark.slow,
    pytest.mark.root,
    pytest.mark.skipif(bool(MISSING), reason=f"packages are missing ('make boot' installs them): {MISSING}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="debootstrap needs root"),
]


def holdfast(*words: object) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HOLDFAST_")}
    outcome = subprocess.run(
        [sys.executable, "-m", "holdfast", *map(str, words)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stderr
    return outcome.stdout


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder `vm` of a Debian that was just installed, and beside it its `tree`."""
    place = tmp_path_factory.mktemp("guest")
    build = Path(__file__).parent / "build_guest"
    outcome = subprocess.run(
        [build, place / "vm"],
        env={**os.environ, "TREE": str(place / "tree")},
        capture_output=True,
        text=True,
        check=False,
    )
    if "Failed getting release" in outcome.stderr or "Couldn't download" in outcome.stderr:
        pytest.skip("no mirror of Debian can be reached")
    assert outcome.returncode == 0, outcome.stderr
    (place / "vm" / "debootstrap.log").unlink()
    yield place
    shutil.rmtree(place)


@pytest.fixture(scope="module")
def repo(guest: Path) -> Path:
    holdfast("init", "-r", guest / "repo")
    holdfast("backup", "-r", guest / "repo", guest / "vm")
    return guest / "repo"


def serial_until(accelerator: str, disk: Path, wanted: str) -> str:
    """What the machine writes on its serial line up to what is wanted, or to its end."""
    machine = subprocess.Popen(
        ["qemu-system-x86_64", "-accel", accelerator, "-m", "512", "-display", "none", "-no-reboot", "-nic", "none",
         "-serial", "stdio", "-monitor", "none", "-drive", f"file={disk},format=qcow2,if=virtio"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert machine.stdout is not None
    text = ""
    deadline = time.monotonic() + BOOT_MAX_S
    with selectors.DefaultSelector() as selector, machine.stdout:
        selector.register(machine.stdout, selectors.EVENT_READ)
        try:
            # a processor whose virtualisation can not run a BIOS stops with this, and waits
            while wanted not in text and "KVM internal error" not in text:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    break
                data = os.read(machine.stdout.fileno(), 1 << 16)
                if not data:
                    break
                text += data.decode("utf-8", "replace")
        finally:
            machine.kill()
            machine.wait()
    return text


@pytest.mark.skipif("mount" not in COMMANDS, reason="holdfast mount is missing")
@pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="/dev/fuse is missing")
def test_debian_boots_from_a_mounted_disk(guest: Path, repo: Path, tmp_path: Path) -> None:
    mount, overlay = tmp_path / "mount", tmp_path / "overlay.qcow2"
    mount.mkdir()
    holdfast("mount", "-r", repo, mount)
    try:
        disk = mount / "by-vm" / "web1" / "latest" / "web1.vmdk"
        text = ""
        for accelerator in ["kvm"] * os.access("/dev/kvm", os.W_OK) + ["tcg"]:
            overlay.unlink(missing_ok=True)
            subprocess.run(
                ["qemu-img", "create", "-q", "-f", "qcow2", "-b", disk, "-F", "vmdk", overlay], check=True
            )
            started = time.monotonic()
            text = serial_until(accelerator, overlay, "web1 login:")
            if "web1 login:" in text:
                print(f"login prompt after {time.monotonic() - started:.0f} s with {accelerator}")
                break
        assert "SYSLINUX" in text or "Linux version" in text, text[-2000:]
        assert "Debian GNU/Linux" in text, text[-2000:]
        assert "web1 login:" in text, text[-2000:]
    finally:
        holdfast("umount", mount)


@pytest.mark.skipif(
    subprocess.run(
        [sys.executable, "-c", "import dissect.extfs"], check=False, capture_output=True
    ).returncode
    != 0,
    reason="the extra holdfast[files] is missing",
)
def test_files_of_a_real_system_come_out_as_they_were_installed(
    guest: Path, repo: Path, tmp_path: Path
) -> None:
    holdfast("extract", "-r", repo, "web1@latest", "p2/usr/lib", tmp_path / "lib")
    subprocess.run(
        ["diff", "-r", "--no-dereference", guest / "tree" / "usr" / "lib", tmp_path / "lib"], check=True
    )
    listing = holdfast("browse", "-r", repo, "web1@latest", "/sbin/init")
    assert "systemd" in listing  # through two links
