"""Making the transformer itself smaller: heads, width, depth, vocabulary, masks.

Files here hold the maths as pure numpy, and the few edits of a graph that structural passes share; each pass has a file
of its own in `optimizers/`. Passes speak of a graph in terms of its anatomy only.
"""
