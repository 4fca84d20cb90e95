"""Images to whitened teacher tokens.

config.py    settings; imports no deep-learning library
teachers.py  the table of teachers: data only
weights.py   where a teacher's weights come from, and their fingerprint
backends.py  a teacher's row of data to a module that gives tokens
whiten.py    per-token standardisation
worker.py    one shard: read, render, forward, whiten, commit
cluster.py   many shards: in this process or on Ray (the only file that imports ray)
run.py       the stage
"""
