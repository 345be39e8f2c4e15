"""Partition tables as CSV; a package only so that they are installed with the tools."""
