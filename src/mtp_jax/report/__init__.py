"""What a run reports: logs, events, progress, tables, pictures; the door to rich and tensorboardX."""
