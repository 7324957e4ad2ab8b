"""A stand-in for an ESXi host: real sshd, real files, real redo logs; see docs/STANDIN.md.

`StandIn` runs one from a test; `python -m tests.esxi_host start` runs one by hand.
"""

from __future__ import annotations

from tests.esxi_host.standin import Disk, StandIn, StandInError, Traffic, VmState

__all__ = ["Disk", "StandIn", "StandInError", "Traffic", "VmState"]
