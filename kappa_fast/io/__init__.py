"""Safe reading of untrusted files (limits on sizes, regular expressions, JSON), and atomic writing of files."""
