"""Outputs of real hosts, as published (names replaced), and whatever else a host might print.

Shapes: vim-cmd of ESX 3.5 to 6.5 as quoted in the comments of Apache VCL; of ESXi 7.0 U3 and 8.0 U1 as in the tests of
esxi-mover; esxcli and vmkfstools from reports of users.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from holdfast.errors import SourceError, SourceFormat, SourceNotFound, SourceUnreadable, SourceUnsupported
from holdfast.esxi.says.answer import Answer, Fault, fault_error, fault_in, is_passing, with_sentinel
from holdfast.esxi.says.devices import parse_devices
from holdfast.esxi.says.disktool import disktool_error, parse_progress, require_success
from holdfast.esxi.says.esxcli import (
    HostVersion,
    parse_csv,
    parse_json,
    parse_keyvalue,
    parse_processes,
    parse_properties,
    parse_version,
)
from holdfast.esxi.says.machines import (
    DatastorePath,
    parse_datastore_path,
    parse_getallvms,
    parse_power_state,
    parse_registered,
    parse_summary,
)
from holdfast.esxi.says.snapshots import parse_snapshots
from holdfast.esxi.says.storage import parse_datastores, parse_filelayoutex, parse_volumes
from holdfast.esxi.says.tasks import parse_task_info, parse_tasklist
from holdfast.esxi.says.vmomi import Items, Null, Obj, Reference, Unset, parse_all, parse_object

HEADER = "Vmid   Name   File   Guest OS   Version   Annotation\n"

ALLVMS = """\
Vmid       Name                    File                        Guest OS          Version   Annotation
1      x8     [pve-esx] x8/x8.vmx   centos9_64Guest   vmx-20
10     Web (old) $5 'x'   [data store 1] Web (old) $5 'x'/web.vmx   windows9Server64Guest   vmx-19   one line
12     vm2           [ds1] vm2/vm2.vmx               vmwarePhoton64Guest      vmx-13    First line of a note that an appliance image ships with.

   A second paragraph of that note, indented.

another line
13     vm3            [ds1] vm3/vm3.vmx                 centos64Guest            vmx-08
Skipping invalid VM '4'
2      größe  VM      [ds1] a/b/größe VM.vmx       otherGuest64     vmx-21
"""

POWER_FAULT = """\
Powering off VM:
(vim.fault.InvalidPowerState) {
   dynamicType = <unset>,
   faultCause = (vmodl.MethodFault) null,
   requestedState = "poweredOff",
   existingState = "poweredOff",
   msg = "The attempted operation cannot be performed in the current state (Powered Off).",
}
"""

SNAPSHOTS = """\
Get Snapshot:
|-ROOT
--Snapshot Name        : snap1
--Snapshot Id        : 1
--Snapshot Desciption  : Shapshot #1
--Snapshot Created On  : 10/4/2026 19:0:52
--Snapshot State       : powered off
--|-CHILD
----Snapshot Name        : Corelinux: running
----Snapshot Id        : 2
----Snapshot Desciption  : two
lines |-CHILD of it
----Snapshot Created On  : 10/4/2026 19:22:55
----Snapshot State       : powered on
--|-CHILD
----Snapshot Name        :
----Snapshot Id        : 7
----Snapshot Desciption  :
----Snapshot Created On  : 10/5/2026 18:59:44
----Snapshot State       : suspended
----|-CHILD
------Snapshot Name        : deep
------Snapshot Created On  : 10/6/2026 1:2:3
------Snapshot State       : powered off
"""

SUMMARY = """\
Listsummary:

(vim.vm.Summary) {
   vm = 'vim.VirtualMachine:496',
   runtime = (vim.vm.RuntimeInfo) {
      device = (vim.vm.DeviceRuntimeInfo) [
         (vim.vm.DeviceRuntimeInfo) {
            key = 4000,
         }
      ],
      host = 'vim.HostSystem:ha-host',
      connectionState = "connected",
      powerState = "poweredOn",
      bootTime = <unset>,
      maxCpuUsage = 2294,
   },
   guest = (vim.vm.Summary.GuestSummary) null,
   config = (vim.vm.Summary.ConfigSummary) {
      name = "web1",
      template = false,
      vmPathName = "[nfs-datastore] dir/x.vmx",
      guestId = "debian12_64Guest",
      uuid = "564d890e-6865-d486-2278-80af6016e0e0",
      instanceUuid = "52 ab f5 21 86 ad f2 ff-5b ef c0 f2 3b 53 eb 3b",
      numVirtualDisks = 1,
      annotation = "a "quoted" word,
   and = "what looks like", a field
last line",
      tags = (string) [ "a", "b, c" ],
   },
   storage = (vim.vm.Summary.StorageSummary) {
      committed = ,
      uncommitted = 0
   },
   customValue = (vim.CustomFieldsManager.Value) [],
}
"""

DEVICES = """\
Devices:

(vim.vm.VirtualHardware) {
   numCPU = 2,
   device = (vim.vm.device.VirtualDevice) [
      (vim.vm.device.ParaVirtualSCSIController) {
         key = 1000,
         deviceInfo = (vim.Description) {
            label = "SCSI controller 0",
            summary = "VMware paravirtual SCSI"
         },
         busNumber = 0,
         device = (int) [
            2000,
            2001
         ],
         sharedBus = "noSharing",
      },
      (vim.vm.device.VirtualNVMEController) {
         key = 31000,
         busNumber = 1,
         sharedBus = "noSharing",
      },
      (vim.vm.device.VirtualDisk) {
         key = 2000,
         deviceInfo = (vim.Description) {
            label = "Hard disk 1",
            summary = "209,715,200 KB"
         },
         backing = (vim.vm.device.VirtualDisk.FlatVer2BackingInfo) {
            fileName = "[datastore1] web1/web1-000002.vmdk",
            datastore = 'vim.Datastore:5e0026d9-a647150e-d8a8-4cedfb76e9d5',
            diskMode = "persistent",
            thinProvisioned = true,
            uuid = "6000C294-7b3f-53be-cb4b-ee5e3d92722e",
            contentId = "7475b330dc2d48eb61aee3399ed03ee3",
            changeId = "52 ab f5 21 86 ad f2 ff-5b ef c0 f2 3b 53 eb 3b/78",
            parent = (vim.vm.device.VirtualDisk.FlatVer2BackingInfo) {
               fileName = "[datastore1] web1/web1-000001.vmdk",
               parent = (vim.vm.device.VirtualDisk.FlatVer2BackingInfo) {
                  fileName = "[datastore1] web1/web1.vmdk",
                  parent = (vim.vm.device.VirtualDisk.FlatVer2BackingInfo) null,
               },
            },
            sharing = "sharingNone",
            keyId = (vim.encryption.CryptoKeyId) null
         },
         controllerKey = 1000,
         unitNumber = 0,
         capacityInKB = 209715200,
         capacityInBytes = 214748364800,
      },
      (vim.vm.device.VirtualDisk) {
         key = 31000000,
         backing = (vim.vm.device.VirtualDisk.FlatVer2BackingInfo) {
            fileName = "[ds 2] web1/web1_1.vmdk",
            diskMode = "independent_persistent",
         },
         controllerKey = 31000,
         unitNumber = 3,
         capacityInKB = 1024,
      },
      (vim.vm.device.VirtualDisk) {
         key = 2001,
         backing = (vim.vm.device.VirtualDisk.RawDiskMappingVer1BackingInfo) {
            fileName = "[ds1] web1/web1_2.vmdk",
            compatibilityMode = "physicalMode",
            diskMode = "independent_persistent",
         },
         controllerKey = 1000,
         unitNumber = 1,
      },
   ]
}
"""

LAYOUT = """\
Get VM File Layout:

(vim.vm.FileLayoutEx) {
   file = (vim.vm.FileLayoutEx.FileInfo) [
      (vim.vm.FileLayoutEx.FileInfo) {
         key = 0,
         name = "[datastore1] D/x.vmx",
         type = "config",
         size = 3285,
         uniqueSize = 3285,
         accessible = true
      }, (vim.vm.FileLayoutEx.FileInfo) { key = 1, name = "[datastore1] D/x-flat.vmdk", type = "diskExtent", size = 3470786560, accessible = false },
   ],
   timestamp = "2026-10-04T19:00:52.187347Z"
}
"""

TASK = """\
(vim.TaskInfo) {
   key = "haTask-496-vim.VirtualMachine.createSnapshot-2843",
   task = 'vim.Task:haTask-496-vim.VirtualMachine.createSnapshot-2843',
   descriptionId = "VirtualMachine.createSnapshot",
   state = "error",
   cancelled = false,
   error = (vmodl.fault.RequestCanceled) {
      faultCause = (vmodl.MethodFault) null,
      msg = "The task was canceled by a user.",
   },
   result = <unset>,
   progress = 100,
   queueTime = "2010-06-30T08:48:44.187347Z",
}
"""


def with_commas_of_seven(text: str) -> str:
    """Release 7 ends lines with a blank behind the comma, release 8 does not."""
    return text.replace(",\n", ", \n")


def test_getallvms() -> None:
    listing = parse_getallvms(ALLVMS)
    assert [(row.id, row.name, str(row.file)) for row in listing.rows] == [
        (1, "x8", "[pve-esx] x8/x8.vmx"),
        (2, "größe  VM", "[ds1] a/b/größe VM.vmx"),
        (10, "Web (old) $5 'x'", "[data store 1] Web (old) $5 'x'/web.vmx"),
        (12, "vm2", "[ds1] vm2/vm2.vmx"),
        (13, "vm3", "[ds1] vm3/vm3.vmx"),
    ]
    assert listing.rows[3].note == "First line of a note that an appliance image ships with."
    assert (listing.rows[0].guest, listing.rows[0].hardware) == ("centos9_64Guest", "vmx-20")
    assert listing.skipped == (4,)


def test_getallvms_without_vms_and_without_a_table() -> None:
    assert parse_getallvms(HEADER).rows == ()
    with pytest.raises(SourceFormat, match=r"no table, but: Failed to login"):
        parse_getallvms("Failed to login: Connection reset by peer")


def test_an_annotation_can_not_replace_a_row() -> None:
    forged = HEADER + "1 a [ds1] a/a.vmx x vmx-20 note\n1 b [ds1] evil/b.vmx x vmx-20\n"
    assert [row.name for row in parse_getallvms(forged).rows] == ["a"]


@pytest.mark.parametrize(
    ("word", "state"), [("Powered on", "on"), ("Powered off", "off"), ("Suspended", "suspended")]
)
def test_power_state(word, state) -> None:
    assert parse_power_state(f"Retrieved runtime info\n{word}\n") == state
    with pytest.raises(SourceFormat, match="no power state"):
        parse_power_state("Retrieved runtime info\n")


@pytest.mark.parametrize("flavour", [str, with_commas_of_seven])
def test_summary(flavour: Callable[[str], str]) -> None:
    summary = parse_summary(flavour(SUMMARY))
    assert (summary.id, summary.name, summary.power, summary.disks) == (496, "web1", "on", 1)
    assert summary.file == DatastorePath("nfs-datastore", "dir/x.vmx")
    assert (summary.uuid, summary.instance_uuid) == (
        "564d890e6865d486227880af6016e0e0",
        "52abf52186adf2ff5befc0f23b53eb3b",
    )
    whole = parse_object(flavour(SUMMARY), "x")
    config, storage = whole.child("config"), whole.child("storage")
    assert config is not None
    assert storage is not None
    assert (
        config.text("annotation").replace(", \n", ",\n")
        == 'a "quoted" word,\n   and = "what looks like", a field\nlast line'
    )
    assert config.get("tags") == Items("string", ("a", "b, c"))
    assert config.flag("template") is False
    assert storage.get("committed") == Unset()
    assert storage.number("uncommitted") == 0
    assert whole.get("guest") == Null("vim.vm.Summary.GuestSummary")
    assert whole.get("vm") == Reference("vim.VirtualMachine", "496")
    assert whole.get("customValue") == Items("vim.CustomFieldsManager.Value", ())


@pytest.mark.parametrize("flavour", [str, with_commas_of_seven])
def test_devices(flavour) -> None:
    found = parse_devices(flavour(DEVICES))
    first, rdm, nvme = found.disks
    assert (first.key, first.label, first.title, first.size_bytes) == (
        2000,
        "scsi0:0",
        "Hard disk 1",
        200 << 30,
    )
    assert (str(first.file), first.backing, first.thin) == (
        "[datastore1] web1/web1-000002.vmdk",
        "FlatVer2BackingInfo",
        True,
    )
    assert [str(path) for path in first.chain] == [
        "[datastore1] web1/web1-000001.vmdk",
        "[datastore1] web1/web1.vmdk",
    ]
    assert (first.uuid, first.sharing, first.obstacle) == (
        "6000c2947b3f53becb4bee5e3d92722e",
        "sharingNone",
        "",
    )
    assert first.change_id.endswith("/78")
    assert (rdm.label, nvme.label) == ("scsi0:1", "nvme1:3")
    assert "physical mode" in rdm.obstacle
    assert "independent_persistent" in nvme.obstacle
    assert [controller.bus for controller in found.controllers] == ["scsi", "nvme"]
    assert nvme.size_bytes == 1 << 20


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('sharedBus = "noSharing",\n      },\n      (vim.vm.device.VirtualNVME', 'sharedBus = "physicalSharing",\n      },\n      (vim.vm.device.VirtualNVME', "bus is shared"),
        ('"sharingNone"', '"sharingMultiWriter"', "multi-writer"),
        ('diskMode = "persistent"', 'diskMode = "nonpersistent"', "nonpersistent"),
        ("keyId = (vim.encryption.CryptoKeyId) null", 'keyId = (vim.encryption.CryptoKeyId) { keyId = "k" }', "encrypted"),
    ],
)  # fmt: skip
def test_disks_that_can_not_be_backed_up(old, new, words) -> None:
    assert old in DEVICES
    assert words in parse_devices(DEVICES.replace(old, new)).disks[0].obstacle


def test_snapshots() -> None:
    (root,) = parse_snapshots(SNAPSHOTS)
    assert [(one.name, one.id, one.state) for one in root.walk()] == [
        ("snap1", 1, "powered off"), ("Corelinux: running", 2, "powered on"), ("", 7, "suspended"), ("deep", None, "powered off"),
    ]  # fmt: skip
    assert root.created == "10/4/2026 19:0:52"
    assert root.children[0].description == "two\nlines |-CHILD of it"
    assert [one.name for one in root.children[1].children] == ["deep"]
    assert parse_snapshots("Get Snapshot:\n") == ()
    assert parse_snapshots(
        SNAPSHOTS.replace("Get Snapshot:", "Remove Snapshot:").replace("Desciption", "Description")
    )
    with pytest.raises(SourceFormat, match="no tree"):
        parse_snapshots("Killed\n")
    with pytest.raises(SourceFormat, match="without a name"):
        parse_snapshots("Get Snapshot:\n|-ROOT\n")


def test_tasks() -> None:
    assert parse_tasklist("(ManagedObjectReference) []\n") == ()
    assert parse_tasklist(
        "(ManagedObjectReference) [\n   'vim.Task:haTask-512-vim.VirtualMachine.powerOn-2826',\n"
        "   'vim.Task:haTask-512-vim.vm.Snapshot.remove-2843'\n]\n"
    ) == ("haTask-512-vim.VirtualMachine.powerOn-2826", "haTask-512-vim.vm.Snapshot.remove-2843")
    task = parse_task_info(TASK)
    assert (task.state, task.progress, task.result) == ("error", 100, "")
    assert task.fault == Fault("RequestCanceled", "The task was canceled by a user.")
    done = TASK.replace('"error"', '"success"').replace(
        "result = <unset>", "result = 'vim.vm.Snapshot:496-snapshot-3'"
    )
    assert parse_task_info(done).result == "496-snapshot-3"
    assert fault_in(TASK) is None, "a fault inside of a task is the task's"
    gone = "(vmodl.fault.ManagedObjectNotFound) {\n   obj = 'vim.Task:haTask-1',\n   msg = \"The object has already been deleted or has not been completely created\",\n}\n"
    fault = fault_in(gone)
    assert fault is not None
    assert (fault.name, fault.about) == ("ManagedObjectNotFound", "vim.Task:haTask-1")
    with pytest.raises(SourceFormat, match="no task"):
        parse_task_info(gone)


@pytest.mark.parametrize(
    ("text", "error", "words", "hint"),
    [
        (POWER_FAULT, SourceError, r"current state \(Powered Off\)", "power state"),
        ('(vim.fault.NotFound) {\n   msg = "Unable to find a VM corresponding to "99""\n}\n', SourceNotFound, 'corresponding to "99"', "Ids"),
        ('(vim.fault.AlreadyExists) {\n   name = "51", \n   msg = "The specified key, name, or identifier \'51\' already exists."\n}', SourceError, r"already exists.*\(51\)", "invalid VM"),
        ('(vim.fault.RestrictedVersion) {\n   msg = ""\n}', SourceUnsupported, "the fault RestrictedVersion", "licence"),
        ("(vim.fault.NeverHeardOf) {\n}\n", SourceError, "the fault NeverHeardOf", ""),
        ('(vim.fault.FileLocked) {\n   msg = "Unable to access file since it is locked", \n}\n', SourceUnreadable, "locked", "snapshot"),
    ],
)  # fmt: skip
def test_faults_become_errors(text, error, words, hint) -> None:
    answer = Answer.of(f"{text}@@rc=0\n".encode(), "x")
    with pytest.raises(error, match=words) as caught:
        answer.require("removing a snapshot")
    assert "while removing a snapshot" in str(caught.value)
    assert hint in caught.value.hint
    assert type(fault_error(fault_in(text) or Fault("", ""), "x")) is error


def test_answers() -> None:
    assert with_sentinel("vim-cmd x").endswith('echo "@@rc=$?"')
    assert Answer.of(b"a\nb\n@@rc=0\n", "x") == Answer("a\nb\n", 0)
    assert Answer.of(b"@@rc=3\n", "x") == Answer("", 3)
    assert Answer.of(b"no end of line@@rc=0\n", "x").text == "no end of line\n"
    assert Answer.of(b"\xff\r\n@@rc=0\n", "x").text == "\\xff\n"
    with pytest.raises(SourceError, match=r"cut off while x: a / b"):
        Answer.of(b"a\nb\n", "x")
    with pytest.raises(SourceError, match="it said nothing"):
        Answer("", 1).require("x")
    with pytest.raises(SourceError, match=r"status 255\) while x: Failed to login") as caught:
        Answer("Failed to login: Connection reset by peer\n", 255).require("x")
    assert "memory" in caught.value.hint
    assert is_passing("what(): std::bad_alloc")
    assert not is_passing(POWER_FAULT)
    with pytest.raises(SourceFormat, match="16 MiB"):
        Answer.of(bytes((16 << 20) + 1), "x")


def test_files_and_datastores() -> None:
    first, second = parse_filelayoutex(LAYOUT)
    assert (str(first.file), first.kind, first.size_bytes, first.accessible) == (
        "[datastore1] D/x.vmx",
        "config",
        3285,
        True,
    )
    assert (second.kind, second.size_bytes, second.accessible) == ("diskExtent", 3470786560, False)
    (store,) = parse_datastores(
        "(vim.Datastore.Summary) [\n   (vim.Datastore.Summary) {\n      datastore = 'vim.Datastore:4bcf0efe', \n"
        '      name = "local-datastore", \n      url = "/vmfs/volumes/4bcf0efe-c426acc4", \n      capacity = , \n'
        '      freeSpace = 5242880, \n      accessible = true, \n      type = "VMFS", \n   }\n]\n'
    )
    assert (store.name, store.folder, store.capacity_bytes, store.free_bytes) == (
        "local-datastore", "/vmfs/volumes/4bcf0efe-c426acc4", None, 5242880,
    )  # fmt: skip
    with pytest.raises(SourceFormat, match="no datastores") as caught:
        parse_datastores("name     datastore1\nurl      /vmfs/volumes/x\n")
    assert "esxcli" in caught.value.hint
    volumes = parse_volumes(
        "Free,MountPoint,Mounted,Size,Type,UUID,VolumeName,\n"
        '4,"/vmfs/volumes/600d9cc6-915f",true,1000,VMFS-6,600d9cc6-915f,"DS, 1",\n0,,false,0,VMFS-5,x,,\n'
    )
    assert [(v.mount_point, v.name, v.mounted, v.free_bytes) for v in volumes] == [
        ("/vmfs/volumes/600d9cc6-915f", "DS, 1", True, 4), ("", "", False, 0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "path", ["", "ds1/x.vmx", "[] x", "[ds1] /etc/passwd", "[ds1] ../x", "[ds1] a/../../b"]
)
def test_paths_that_are_none(path) -> None:
    with pytest.raises(SourceFormat):
        parse_datastore_path(path, "x")


def test_esxcli() -> None:
    assert parse_version("VMware ESXi 8.0.1 build-21495797\nVMware ESXi 8.0 Update 1\n") == HostVersion(
        8, 0, 1, 21495797
    )
    assert str(parse_version("VMware ESXi 6.5.0 build-5969303\n")) == "6.5.0 build 5969303"
    with pytest.raises(SourceFormat, match="no version"):
        parse_version("-sh: vmware: not found")
    properties = parse_properties(
        "   Product: VMware ESXi\n   Version: 8.0.2\n   Build: Releasebuild-22380479\n   Patch: 0\n"
    )
    assert properties["Build"] == "Releasebuild-22380479"
    running = parse_processes(
        "ubuntuc1\n   World ID: 527611\n   Process ID: 0\n   VMX Cartel ID: 527610\n"
        "   UUID: 56 4d 89 0e 68 65 d4 86-22 78 80 af 60 16 e0 e0\n   Display Name: ubuntuc1\n"
        "   Config File: /vmfs/volumes/661ab9c9/ubuntuc1/ubuntuX.vmx\n\n"
        "b\n   World ID: 5\n   Display Name: b: c\n   Config File: /vmfs/volumes/x/b.vmx\n"
    )
    assert [(vm.name, vm.world, vm.config_file) for vm in running] == [
        ("ubuntuc1", 527611, "/vmfs/volumes/661ab9c9/ubuntuc1/ubuntuX.vmx"), ("b: c", 5, "/vmfs/volumes/x/b.vmx"),
    ]  # fmt: skip
    assert parse_processes("") == ()
    assert (
        parse_keyvalue("VersionGet.Build.string=Releasebuild-1\nVersionGet.Patch.string=\n")[
            "VersionGet.Patch.string"
        ]
        == ""
    )
    assert parse_json('[{"Version": "8.0.2", "Patch": 0}]') == ({"Version": "8.0.2", "Patch": "0"},)
    for text in ("{", "3", "[1]", "[" * 100_000):
        with pytest.raises(SourceFormat):
            parse_json(text)
    with pytest.raises(SourceFormat, match="no column Size"):
        parse_csv("A,B,\n1,2,\n", ("A", "Size"))
    with pytest.raises(SourceFormat, match="too short"):
        parse_csv("A,B,\n1\n", ("A", "B"))


def test_registervm() -> None:
    assert parse_registered("496\n") == 496
    assert parse_registered("\n") is None
    with pytest.raises(SourceFormat, match="no id"):
        parse_registered("what else")


def test_vmkfstools() -> None:
    clone = "Destination disk format: VMFS thin-provisioned\nCloning disk '/vmfs/volumes/ds/a/a.vmdk'...\n\rClone: 10% done.\rClone: 55% done.\r"
    assert parse_progress(clone) == 55
    assert parse_progress("") is None
    with pytest.raises(SourceError):
        require_success(clone, "clone", "x")
    require_success(clone + "Clone: 100% done.\n", "clone", "x")
    require_success("Creating disk 't.vmdk' and zeroing it out...\nCreate: 100% done.\n", "create", "x")
    require_success("Grow: 100% done.\n", "grow", "x")
    require_success("Disk chain is consistent.\n", "chain", "x")
    require_success("Disk is error free\n", "check", "x")
    require_success("", "silent", "x")


@pytest.mark.parametrize(
    ("text", "task", "error", "words"),
    [
        (
            "DiskLib_Check() failed for source disk The file specified is not a virtual disk (15).\n",
            "clone", SourceFormat, r"not a virtual disk \(15\)",
        ),
        ("Clone: 100% done.\rFailed to clone disk : No space left on device (1835017).\n", "clone", SourceError, "No space left"),
        ("Clone: 7% done.\nFailed to clone disk: Device or resource busy (1048585).", "clone", SourceUnreadable, "busy"),
        ("Create: 100% done.\n", "clone", SourceError, "while x"),
        ("", "chain", SourceError, "said nothing"),
        ("Disk chain is not consistent : The parent virtual disk has been modified since the child was created (18)", "chain", SourceFormat, r"modified.*\(18\)"),
        ("surprise\n", "silent", SourceError, "surprise"),
    ],
)  # fmt: skip
def test_vmkfstools_fails(text, task, error, words) -> None:
    with pytest.raises(error, match=words):
        require_success(text, task, "x")
    assert disktool_error(text, "x").message.count("\n") == 0


# Anything else


PARSERS: list[Callable[[str], object]] = [
    parse_getallvms, parse_power_state, parse_summary, parse_devices, parse_snapshots, parse_tasklist, parse_task_info,
    parse_filelayoutex, parse_datastores, parse_volumes, parse_version, parse_keyvalue, parse_json, parse_properties,
    parse_processes, parse_registered, parse_progress, fault_in, is_passing,
    lambda text: parse_csv(text, ("A",)), lambda text: parse_all(text, "x"), lambda text: disktool_error(text, "x"),
    lambda text: Answer.of(text.encode("utf-8", "surrogatepass"), "x").require("x"),
]  # fmt: skip
REAL = [ALLVMS, SUMMARY, DEVICES, SNAPSHOTS, TASK, LAYOUT, POWER_FAULT]


def survive(text: str) -> None:
    messages: list[str] = []
    for parser in PARSERS:
        try:
            parser(text)
        except SourceError as error:
            messages.append(error.message)
    assert all(message and "\n" not in message for message in messages)


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="(){}[]\"'=, \n<>unset.vimfaultOj09:|-Snapshot Name", max_size=400))
@example("(a) {" * 1000)
@example("(a) [" * 1000)
@example('(a) {\n b = "')
@example("(a) {\n b = 1,\n b = 2,\n}")
@example("(vim.vm.Summary) {\n vm = 'vim.VirtualMachine:" + "9" * 5000 + "',\n}")
def test_no_text_is_too_odd(text) -> None:
    survive(text)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_answers(data) -> None:
    text = data.draw(st.sampled_from(REAL))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        end = min(len(text), start + data.draw(st.integers(0, 40)))
        text = (
            text[:start]
            + data.draw(st.sampled_from(["", "\n", '"', "}", "]", "{", "(x) {", "99999999999999999999", "'"]))
            + text[end:]
        )
    survive(text)


def test_fields_that_occur_twice_are_refused() -> None:
    """Text of a user must not pass for what the host says."""
    forged = SUMMARY.replace('name = "web1"', 'name = "web1",\n      vmPathName = "[ds1] evil/x.vmx"')
    with pytest.raises(SourceFormat, match="vmPathName occurs twice"):
        parse_summary(forged)
    with contextlib.suppress(SourceFormat):
        assert isinstance(parse_object("(a) {\n b = (c) null\n}", "x"), Obj)
