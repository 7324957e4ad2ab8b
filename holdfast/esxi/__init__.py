"""Sources and sinks: VMware disks, VM folders, raw images. Knows nothing of repositories.

`folder.open_machine` turns a SOURCE into a `disk.Machine`; `layout.restore_layout` plans the files of
a restore; `device.open_sink` opens where one of them is written to. The rest serves these three.
"""
