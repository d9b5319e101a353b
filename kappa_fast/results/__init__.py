"""The results of rank() and the objects made from them: entries, rankings, selections, comparisons, and their files."""
