"""What small heads read off frozen states: what an encoder's layers hold, and which of them hold it.

`recognition` (phones, or characters and so words) and `naming` (speakers, words, emotions) are SUPERB's probes with a
learned sum over layers; `heads` are what they fit and `fitting` how.
"""
