"""What rank() returns and what follows from it: entries, rankings, selections, comparisons, and their files."""
