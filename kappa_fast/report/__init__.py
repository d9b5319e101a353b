"""What people see of a ranking: the table."""
