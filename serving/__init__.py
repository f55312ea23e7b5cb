"""The embedding server: a published model behind HTTP."""
