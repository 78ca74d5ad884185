"""Command lines: flags in, exit codes out. What they do is in the layers below."""
