"""Fuzzing the wire: whatever a peer may send is a message or one documented error, and takes bounded memory.

    python -m tests.fuzz --inputs 10000000 --processes 2

`inputs` makes the inputs, from a seed; `checks` gives each to the code that it is for and judges the outcome; `running`
spreads batches over processes. The same seed gives the same inputs, whatever the processes.
"""
