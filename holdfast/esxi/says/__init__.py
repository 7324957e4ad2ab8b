"""What the commands of an ESXi host print, as values. Pure: text in, frozen dataclasses out.

`answer` splits off the exit status and finds faults; `vmomi` parses the notation of `vim-cmd`; `machines`,
`snapshots`, `tasks`, `devices`, `storage`, `esxcli` and `disktool` each know the commands of one subject.
Whatever a host prints, the outcome is a value or a `SourceError` that says what could not be understood.
"""
