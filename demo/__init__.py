"""What `make demo` shows: `run` with a VM's folder, `esxi_tour` with VMs of a host."""
