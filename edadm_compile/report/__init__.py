"""What people look at: truth tables, summaries, progress."""
