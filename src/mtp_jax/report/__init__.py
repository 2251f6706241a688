"""What a run tells: log, events, progress, pictures; the door to rich and tensorboardX."""
