"""Whether two models agree, and how good and how fast one is.

Imports `graph`, `runtime` and `files`; a checkpoint in torch comes from outside, as an object that runs like a session.
"""
