"""The rig that the engine is tested on: disks made by rule, stores and an index that fail on command."""
