"""Holdfast: a deduplicating backup engine for VMware ESXi virtual machines."""
