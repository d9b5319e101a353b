"""What this machine, this process and torch allow: memory, threads, signals, modes of arithmetic."""
