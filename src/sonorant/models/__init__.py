"""The shared speech encoder and what is built around it."""
