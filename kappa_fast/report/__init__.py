"""What people see of a ranking: the table, the page, the plot."""
