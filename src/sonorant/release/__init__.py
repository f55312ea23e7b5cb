"""From a measured model to one in service: the gate, the release, the canary, and who is told."""
