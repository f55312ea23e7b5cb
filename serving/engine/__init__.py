"""The models at work: queue, worker processes, reloading."""
