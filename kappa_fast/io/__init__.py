"""Files and text of strangers: sizes, patterns and JSON that are safe to read; files written all at once."""
