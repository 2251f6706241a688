"""The decoder trunk and its futures, and what they cost."""
