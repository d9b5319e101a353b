"""Carrying a ranking out: waves under a memory budget, backends on devices, top=, progress."""
