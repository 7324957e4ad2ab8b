# What `vim-cmd`, `vmkfstools`, `esxcli` and `vmware` are on the stand-in: a messenger. It sends its name, folder and
# arguments to the host's daemon and passes on what comes back, until the exit code. It imports next to nothing,
# since each command of a session starts it anew. rootfs.py puts the first line in front.
import _socket
import posix
import sys


def main() -> int:
    connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        connection.connect("/var/run/hostd.sock")
    except OSError:
        posix.write(1, b"Failed to login: Connection refused\n")
        return 1
    parts = [
        posix.fsencode(part) if hasattr(posix, "fsencode") else part.encode("utf-8", "surrogateescape")
        for part in (sys.argv[0].rpartition("/")[2], posix.getcwd(), *sys.argv[1:])
    ]
    message = b"\0".join(parts)
    connection.sendall(len(message).to_bytes(4, "big") + message)
    pending = b""
    while True:
        while len(pending) < 5 or len(pending) < 5 + int.from_bytes(pending[1:5], "big"):
            data = connection.recv(65536)
            if not data:
                posix.write(1, b"Failed to login: Connection reset by peer\n")
                return 255
            pending += data
        kind, end = pending[0], 5 + int.from_bytes(pending[1:5], "big")
        text, pending = pending[5:end], pending[end:]
        if kind == 0:
            return int(text)
        while text:
            text = text[posix.write(kind, text) :]


try:
    posix._exit(main())
except BrokenPipeError:
    posix._exit(141)
