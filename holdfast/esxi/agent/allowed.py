# The Python of a hypervisor host may be as old as 3.5: no f-strings, no annotated variables, no list[int].
"""The commands of the host that a key which is limited to the agent may run: each word has to fit, nothing goes through a shell.

Most are allowed as they stand. Those that could harm what is not ours are looked into first, on the host itself and just
before they run: a snapshot is only removed if the host's own list says that its name is ours, all snapshots of a VM only if
there are none (that consolidates), and of the host's questions only the one whether a VM was moved or copied is answered.
"""

import re
from typing import Any, Callable, List, Optional, Tuple

from holdfast.esxi.agent.gate import SNAPSHOT_NAME, SNAPSHOT_NOTE, Gate
from holdfast.esxi.agent.naming import Refused

_MAX_WORDS = 10
_MAX_WORD = 4096
_VM = r"[0-9]{1,9}"
_LOOKS = (
    r"vmsvc/(?:get\.(?:summary|config|runtime|tasklist|filelayoutex|datastores)|device\.getdevices|snapshot\.get"
    r"|power\.getstate|message)"
)
_FIT = [
    ("vmware", "-vl"),
    ("uname", "-a"),
    ("hostname",),
    ("hostname", "-s"),
    ("df",),
    ("date", "-u"),
    ("date", "-u", r"\+%s"),
    ("python3", "-V"),
    ("busybox", "--help"),
    ("ls", "-la", "/bin", "/usr/bin"),
    ("esxcli", "system", "version", "get"),
    ("esxcli", "vm", "process", "list"),
    ("esxcli", "storage", "filesystem", "list"),
    ("esxcli", "--formatter=csv", "storage", "filesystem", "list"),
    ("vim-cmd", "vmsvc/getallvms"),
    ("vim-cmd", _LOOKS, _VM),
    ("vim-cmd", "vimsvc/task_info", r"[A-Za-z0-9][A-Za-z0-9._:-]{0,299}"),
    ("vim-cmd", r"vmsvc/power\.(?:shutdown|off|on)", _VM),
    ("vim-cmd", r"vmsvc/snapshot\.create", _VM, SNAPSHOT_NAME, re.escape(SNAPSHOT_NOTE), "[01]", "[01]"),
    # Without arguments these only print how they are used.
    ("vim-cmd", r"vmsvc/snapshot\.(?:create|remove)"),
    ("vim-cmd", "solo/registervm"),
]  # type: List[Tuple[str, ...]]
_SNAPSHOT_FIELD = re.compile(r"(-+)Snapshot (Name|Id)\s*:[ ]?(.*)")
_SNAPSHOT_NODE = re.compile(r"-*\|-(?:ROOT|CHILD)\s*")
_QUESTION = re.compile(r"Virtual machine message ([^\s:]+):")
_CHOICE = re.compile(r"\s*([0-9]+)\.\s*(.*)")
_ADAPTERS = ("lsilogic", "buslogic", "ide", "pvscsi")

Ran = Tuple[int, str]


class Allowed(object):
    """Holds commands against the rules.

    Args:
        ask: runs a command and returns its status and text.
    """

    def __init__(self, gate: Gate, ask: Callable[[List[str]], Ran]) -> None:
        self._gate = gate
        self._ask = ask

    def instead(self, words: Any) -> Optional[Ran]:
        """None if the command may run; or how it ends without having been run, as there is nothing to do for it.

        Raises:
            Refused: it may not run.
        """
        self._require_words(words)
        if any(_fits(words, row) for row in _FIT):
            return None
        head = tuple(words[:2])
        if head == ("vim-cmd", "vmsvc/snapshot.remove") and _fits(words[2:], (_VM, "[0-9]{1,9}")):
            return self._removal(words[2], words[3])
        if head == ("vim-cmd", "vmsvc/snapshot.removeall") and _fits(words[2:], (_VM,)):
            return self._consolidation(words[2])
        if head == ("vim-cmd", "vmsvc/message") and _fits(words[2:], (_VM, r"[\w.-]{1,60}", "[0-9]{1,3}")):
            return self._answer(words[2], words[3], words[4])
        if head == ("vim-cmd", "solo/registervm") and len(words) in (3, 4) and not words[-1].startswith("-"):
            self._gate.registrable(words[2])
            return None
        if head == ("ls", "-la") and len(words) == 3:
            self._gate.listable(words[2])
            return None
        if head[0] == "vmkfstools":
            self._disk(words[1:])
            return None
        raise Refused("the command '%s' is not among those that it may run" % " ".join(words)[:200])

    def _require_words(self, words: Any) -> None:
        if not isinstance(words, list) or not 0 < len(words) <= _MAX_WORDS:
            raise Refused("that is no command")
        for word in words:
            if (
                not isinstance(word, str)
                or not 0 < len(word) <= _MAX_WORD
                or re.search("[\x00-\x1f\x7f]", word)
            ):
                raise Refused("a command with a word that is empty, too long or not plain is not run")

    def _removal(self, vm: str, number: str) -> Optional[Ran]:
        status, text = self._ask(["vim-cmd", "vmsvc/snapshot.get", vm])
        if "Get Snapshot:" not in text:
            return status or 1, text  # the host's trouble: the near side knows its words
        names = [name for one, name in snapshots_in(text) if one == number]
        if not names:
            return 1, "Holdfast's agent: the VM %s has no snapshot with the id %s\n" % (vm, number)
        if len(names) > 1 or re.fullmatch(SNAPSHOT_NAME, names[0]) is None:
            raise Refused("the snapshot '%s' is none of Holdfast's" % names[0][:200])
        return None

    def _consolidation(self, vm: str) -> Optional[Ran]:
        status, text = self._ask(["vim-cmd", "vmsvc/snapshot.get", vm])
        lines = [line for line in text.splitlines() if line.strip()]
        if not lines or lines[0].strip() != "Get Snapshot:":
            return status or 1, text
        if len(lines) > 1:
            raise Refused("the VM has snapshots, which would be removed")
        return None

    def _answer(self, vm: str, message: str, choice: str) -> Optional[Ran]:
        _, text = self._ask(["vim-cmd", "vmsvc/message", vm])
        asked = _QUESTION.match(text.strip())
        if asked is None or asked.group(1) != message or "uuid.altered" not in text:
            raise Refused("the host does not ask whether the VM was moved or copied")
        choices = [_CHOICE.match(line) for line in text.splitlines()]
        labels = [one.group(2).lower() for one in choices if one is not None and one.group(1) == choice]
        if len(labels) != 1 or ("moved" not in labels[0] and "copied" not in labels[0]):
            raise Refused("the choice %s is neither 'moved' nor 'copied'" % choice)
        return None

    def _disk(self, words: List[str]) -> None:
        """Returns if that is one of the ways in which the host's tool for disks is used."""
        if len(words) == 2 and words[0] in ("-U", "-e"):
            self._gate.disk(words[1])
        elif len(words) == 3 and words[:2] == ["-x", "check"]:
            self._gate.disk(words[2])
        elif (
            len(words) == 7
            and (words[0], words[2:4], words[4]) == ("-c", ["-d", "thin"], "-a")
            and re.fullmatch("[0-9]{1,15}", words[1])
            and words[5] in _ADAPTERS
        ):
            self._gate.disk(words[6])
        else:
            raise Refused("vmkfstools may not run with '%s'" % " ".join(words)[:200])


def snapshots_in(text: str) -> List[Tuple[str, str]]:
    """The (id, name) of the snapshots in the tree that `snapshot.get` prints; an id that is there twice is not clear.

    A description may run over several lines and imitate others: of what stands between two nodes the first name and the
    first id count, and only with the dashes that belong to the node's depth.
    """
    found = []  # type: List[Tuple[str, str]]
    depth, fields = "", {}  # type: Tuple[str, Any]
    for line in [*text.splitlines(), "|-ROOT"]:
        if _SNAPSHOT_NODE.fullmatch(line):
            if "Name" in fields and "Id" in fields:
                found.append((fields["Id"], fields["Name"]))
            depth, fields = line.partition("|")[0] + "--", {}
            continue
        match = _SNAPSHOT_FIELD.fullmatch(line)
        if match is not None and match.group(1) == depth:
            fields.setdefault(match.group(2), match.group(3).strip())
    return found


def _fits(words: List[str], row: Tuple[str, ...]) -> bool:
    return len(words) == len(row) and all(re.fullmatch(part, word) for part, word in zip(row, words))
