"""Studies: what papers say of training objectives, tested again side by side on any corpus.

`plan` says what must be run, `running` runs it and goes on where it was stopped; the step `weigh` reads the reports.
"""
