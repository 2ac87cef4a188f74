"""What people see of a run: progress, tables, log, exit codes."""
