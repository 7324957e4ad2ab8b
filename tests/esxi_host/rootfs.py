"""The host's root folder: what a session on the host sees, and nothing else of this machine.

`build` writes the folder (busybox applets, the commands of ESXi, an own /etc), `mount` completes it with the
system's libraries, its Python and its sshd (read-only), /dev, /proc, a small /tmp and the datastores. `mount` is only
called in a mount namespace of its own, so the machine never sees those mounts and they end with the namespace.

Faithful in: paths, PATH, the set of tools, `HOME=/`, /tmp as a small ramdisk, no /dev/shm. Not faithful: the kernel is
Linux, and `command` is a builtin of this busybox shell.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import stat
import subprocess
import sys

from tests.esxi_host.layout import PYTHON, Layout

APPLETS = [
    "[",
    "ash",
    "awk",
    "base64",
    "basename",
    "bunzip2",
    "bzip2",
    "bzcat",
    "cat",
    "chgrp",
    "chmod",
    "chown",
    "chroot",
    "cksum",
    "clear",
    "cmp",
    "cp",
    "cut",
    "date",
    "dd",
    "df",
    "diff",
    "dirname",
    "du",
    "echo",
    "egrep",
    "env",
    "expr",
    "false",
    "fdisk",
    "fgrep",
    "find",
    "getopt",
    "grep",
    "gunzip",
    "gzip",
    "head",
    "hexdump",
    "hostname",
    "id",
    "kill",
    "killall",
    "ln",
    "logger",
    "ls",
    "md5sum",
    "mkdir",
    "mkfifo",
    "mknod",
    "mktemp",
    "more",
    "mv",
    "nc",
    "nohup",
    "nslookup",
    "od",
    "passwd",
    "ping",
    "printf",
    "ps",
    "pwd",
    "readlink",
    "realpath",
    "renice",
    "reset",
    "rm",
    "rmdir",
    "sed",
    "seq",
    "setsid",
    "sh",
    "sha1sum",
    "sha256sum",
    "sha512sum",
    "sleep",
    "sort",
    "stat",
    "stty",
    "sum",
    "sync",
    "tail",
    "tar",
    "tee",
    "test",
    "time",
    "timeout",
    "touch",
    "true",
    "tty",
    "uname",
    "uniq",
    "unlzop",
    "unzip",
    "uptime",
    "usleep",
    "vi",
    "watch",
    "wc",
    "wget",
    "which",
    "whoami",
    "xargs",
    "zcat",
]
"""Nothing of rsync, zstd, split, truncate, fallocate, nproc: ESXi has none of them."""

COMMANDS = ["vim-cmd", "vmkfstools", "esxcli", "vmware", "localcli", "vsish", "vdf"]
PYTHON_LINKS = ["python", "python3"]
CLIENT_PYTHON = "/usr/libexec/standin/python"
"""The commands' interpreter has a place of its own, so that a host without Python still has its commands."""

DEVICES = ["null", "zero", "full", "random", "urandom", "tty"]
TMP_SIZE_MIB = 16

_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_REMOUNT, BIND, _MS_REC, _MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
_libc = ctypes.CDLL(None, use_errno=True)


def mount_call(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    """mount(2)."""
    texts = [text.encode() for text in (source, target, kind)]
    if _libc.mount(*texts, ctypes.c_ulong(flags), data.encode() or None) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"mount {kind or 'bind'} {source}: {os.strerror(number)}", target)


def build(layout: Layout, *, password: str, authorized: str, host_name: str) -> None:
    """The root folder is there, without its mounts. What a former run left in it stays, but for the programs."""
    root = layout.root
    for name in (
        *(
            "bin",
            "dev",
            "proc",
            "tmp",
            "vmfs/volumes",
            "usr/lib",
            "usr/bin",
            "usr/sbin",
            "usr/libexec/standin",
        ),
        *("etc/ssh/keys-root", "etc/pam.d", "etc/vmware", "var/run", "var/log", "run/sshd", "var/empty"),
    ):
        os.makedirs(os.path.join(root, name), exist_ok=True)
    for name in ("lib", "lib64", "sbin"):
        link = os.path.join(root, name)
        if not os.path.lexists(link):
            os.symlink("bin" if name == "sbin" else f"usr/{name}", link)
    os.chmod(os.path.join(root, "var/empty"), 0o755)
    _programs(root)
    _etc(root, password, authorized, host_name)


def _programs(root: str) -> None:
    binary = os.path.join(root, "bin")
    busybox = shutil.which("busybox")
    if busybox is None:
        raise RuntimeError(
            "busybox is missing: install the package busybox (tools/setup does it when run as root)"
        )
    alone = subprocess.run(
        [busybox, "sh", "-c", "truncate --help"], capture_output=True, env={"PATH": "/none"}, check=False
    )
    if alone.returncode == 0:
        raise RuntimeError(
            "this busybox runs its own applets whatever PATH says (Debian's busybox-static does), so a session would have "
            "tools that ESXi has not: install the package busybox instead"
        )
    shutil.copy(busybox, os.path.join(binary, "busybox"))
    offered = set(
        subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True).stdout.split()
    )
    for name in APPLETS:
        if name in offered:
            _link("busybox", os.path.join(binary, name))
    with open(os.path.join(os.path.dirname(__file__), "client.py"), encoding="utf-8") as file:
        text = file.read()
    program = os.path.join(root, "usr/libexec/standin/client")
    with open(program, "w", encoding="utf-8") as file:
        file.write(f"#!{CLIENT_PYTHON} -IS\n{text}")
    os.chmod(program, 0o755)
    for name in COMMANDS:
        _link("/usr/libexec/standin/client", os.path.join(binary, name))
    for name in PYTHON_LINKS:
        _link(os.path.realpath(PYTHON), os.path.join(binary, name))


def _link(target: str, link: str) -> None:
    if os.path.lexists(link):
        os.unlink(link)
    os.symlink(target, link)


def _etc(root: str, password: str, authorized: str, host_name: str) -> None:
    texts = {
        "passwd": "root:x:0:0:Administrator:/:/bin/sh\nsshd:x:74:74:sshd:/var/empty:/bin/false\n",
        "group": "root:x:0:root\nsshd:x:74:\n",
        "shadow": f"root:{hash_password(password)}:13358:0:99999:7:::\nsshd:*:13358:0:99999:7:::\n",
        "nsswitch.conf": "passwd: files\ngroup: files\nshadow: files\nhosts: files\n",
        "hosts": "127.0.0.1 localhost\n",
        "hostname": host_name + "\n",
        "profile": "export PATH=/bin:/sbin\nexport TERM=${TERM:-xterm}\n",
        "pam.d/sshd": "".join(f"{kind} required pam_permit.so\n" for kind in ("account", "session"))
        + "auth required pam_unix.so\npassword required pam_deny.so\n",
        "motd": MOTD,
        "issue": "",
        "vmware/esx.conf": f'/adv/Misc/HostName = "{host_name}"\n',
    }
    for name, text in texts.items():
        with open(os.path.join(root, "etc", name), "w", encoding="utf-8") as file:
            file.write(text)
    os.chmod(os.path.join(root, "etc/shadow"), 0o600)
    if os.path.exists("/etc/ld.so.cache"):
        shutil.copy("/etc/ld.so.cache", os.path.join(root, "etc/ld.so.cache"))
    keys = os.path.join(root, "etc/ssh/keys-root/authorized_keys")
    known = ""
    if os.path.exists(keys):
        with open(keys, encoding="utf-8") as file:
            known = file.read()
    if authorized and authorized not in known:
        with open(keys, "a", encoding="utf-8") as file:
            file.write(authorized)
    if os.path.exists(keys):
        os.chmod(keys, 0o600)


MOTD = """\
The time and date of this login have been sent to the system logs.

WARNING:
   All commands run on the ESXi shell are logged and may be included in
   support bundles. Do not provide passwords directly on the command line.
   Most tools can prompt for secrets or accept them from standard input.

VMware offers powerful and supported automated system administration tools.

The ESXi Shell can be disabled by an administrative user. See the
vSphere Security documentation for more information.
"""


def hash_password(password: str) -> str:
    """A line's worth of /etc/shadow."""
    library = ctypes.CDLL("libcrypt.so.1")
    library.crypt.restype = ctypes.c_char_p
    hashed: bytes | None = library.crypt(password.encode(), f"$6${os.urandom(6).hex()}".encode())
    if hashed is None or not hashed.startswith(b"$6$"):
        raise RuntimeError("libcrypt knows no SHA-512 passwords")
    return hashed.decode()


def mount(layout: Layout) -> None:
    """The mounts of the root folder, but for the datastores. Only in a mount namespace of its own."""
    root = layout.root
    mount_call("none", "/", "", _MS_REC | _MS_PRIVATE)
    _bind_tree(root, "/usr/lib")
    for name in ("lib", "lib64"):
        if os.path.islink(f"/{name}"):
            if os.path.isdir(f"/usr/{name}") and name != "lib":
                _bind_tree(root, f"/usr/{name}")
        elif os.path.isdir(f"/{name}"):
            os.unlink(os.path.join(root, name))
            _bind_tree(root, f"/{name}")
    sshd = shutil.which("sshd", path="/usr/sbin:/sbin:/usr/local/sbin")
    if sshd is None:
        raise RuntimeError("sshd is missing: install openssh-server (tools/setup does it when run as root)")
    python = os.path.realpath(PYTHON)
    _bind_file(root, sshd, "/usr/sbin/sshd")
    _bind_file(root, python, python)
    _bind_file(root, python, CLIENT_PYTHON)
    mount_call(
        "tmpfs", os.path.join(root, "tmp"), "tmpfs", _MS_NOSUID | _MS_NODEV, f"size={TMP_SIZE_MIB}m,mode=1777"
    )
    mount_call("proc", os.path.join(root, "proc"), "proc", _MS_NOSUID | _MS_NODEV)
    _devices(os.path.join(root, "dev"))


def _bind_tree(root: str, path: str) -> None:
    target = root + path
    os.makedirs(target, exist_ok=True)
    mount_call(path, target, "", BIND | _MS_REC)
    mount_call(path, target, "", BIND | _MS_REMOUNT | _MS_RDONLY)


def _bind_file(root: str, source: str, place: str) -> None:
    target = root + place
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if not os.path.exists(target):
        with open(target, "wb"):
            pass
    mount_call(source, target, "", BIND)
    mount_call(source, target, "", BIND | _MS_REMOUNT | _MS_RDONLY)


def _devices(folder: str) -> None:
    mount_call("tmpfs", folder, "tmpfs", _MS_NOSUID, "size=64k,mode=755")
    for name in DEVICES:
        source, target = f"/dev/{name}", os.path.join(folder, name)
        try:
            os.mknod(target, 0o666 | stat.S_IFCHR, os.stat(source).st_rdev)
            os.chmod(target, 0o666)
        except PermissionError:  # a container that may not make nodes
            with open(target, "wb"):
                pass
            mount_call(source, target, "", BIND)
    os.mkdir(os.path.join(folder, "pts"))
    mount_call("devpts", os.path.join(folder, "pts"), "devpts", 0, "newinstance,ptmxmode=0666,mode=620")
    os.symlink("pts/ptmx", os.path.join(folder, "ptmx"))
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        os.symlink(f"/proc/self/fd/{number}", os.path.join(folder, name))
    os.symlink("/proc/self/fd", os.path.join(folder, "fd"))


def fill_tmp(layout: Layout, *, full: bool) -> None:
    """The ramdisk /tmp of the host has no room for a byte, or has room again."""
    folder = os.path.join(layout.root, "tmp")
    filler = os.path.join(folder, "vmware-filler.log")
    size_bytes = TMP_SIZE_MIB << 20
    if full:
        with open(filler, "wb") as file:
            file.write(bytes(4096))  # a size of nothing would mean any size
        figures = os.statvfs(folder)
        size_bytes = (figures.f_blocks - figures.f_bfree) * figures.f_frsize
    elif os.path.exists(filler):
        os.unlink(filler)
    mount_call("tmpfs", folder, "tmpfs", _MS_REMOUNT | _MS_NOSUID | _MS_NODEV, f"size={size_bytes}")


def require_root() -> None:
    """Raises RuntimeError where a stand-in can not run."""
    if sys.platform != "linux" or os.geteuid() != 0:
        raise RuntimeError("the stand-in host needs Linux and root: it runs in namespaces of its own")
