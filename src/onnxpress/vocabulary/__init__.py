"""Which tokens a model can do without, and what has to follow where they go.

characters   the characters of scripts, by the names that Unicode gives them
tokens       a tokenizer.json as a table of tokens, and what a token needs to come about
choosing     the tokens to keep: those of texts, of scripts, as many as are wanted
rewriting    tokenizer files and configs with these tokens only, renumbered
trimming     all of it for an artifact

Ids keep their order: the n-th token that is kept has the id n. Pure logic but for the last.
Imports `artifact`, `calibration`, which reads texts, and what lies below them.
"""
