"""What a run reports: logs, events, progress, tables, pictures."""
