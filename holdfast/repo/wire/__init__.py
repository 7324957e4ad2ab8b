"""Repositories on other hosts: one protocol over one stream of bytes (docs/PROTOCOL.md).

`frames` and `messages` are the protocol, pure; `near` asks and `far` answers. `remote_store`, `remote_index` and
`remote_place` are what the engine sees of it: the same Protocols that a repository on this machine implements.
"""
