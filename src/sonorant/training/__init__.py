"""From views and tasks to updates."""
