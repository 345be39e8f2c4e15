"""Partition tables as CSV; a package only so that they are installed with the tools.

Each has two equal slots and a partition with the label `vfs`, which is how MicroPython finds its
filesystem (esp32 modules/flashbdev.py; the subtype is not looked at). Since 1.26 MicroPython adds
that partition itself where a table has none; up to 1.25 it must be there. Its subtype is `fat`,
as MicroPython's own is, though what lies in it is littlefs.
"""
