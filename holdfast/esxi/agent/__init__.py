"""The agent: a program that is sent to an ESXi host, runs there from memory, and reads disks where they are.

`frames`, `cuts`, `files`, `deflating` and `serve` run over there, alone: Python 3.5 with its standard library, nothing of Holdfast
but each other, nothing written to the host. For keys that are limited to the agent `gate`, `allowed`, `naming`, `ownvmx` and
`tools` go with them, which decide what such a key may do, and do it. `bundle` packs them (and the plain twin of the chunker
`aligned`) into what is sent. The near side is `holdfast.esxi.agent_link`; the protocol is docs/ESXI.md.
"""
