"""The road to other hosts: one command at a time over SSH, for the ESXi adapter and for remote repositories alike.

`address` tells what a user means by `root@10.0.0.5:22`; `link` says what a connection can do; `openssh` and
`paramiko_link` do it; `exchange` makes a host accept our key once, with the user's password. Knows nothing of
hypervisors, repositories, or the environment: paths and names come from the caller.
"""
