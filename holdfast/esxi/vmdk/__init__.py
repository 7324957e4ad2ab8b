"""Readers and writers of the VMDK formats, against VMware's published description."""
