"""Commands: what the commands of `pvlf-hf` do, and how `train` and `evaluate` read their command line.

Imports every other folder; no other folder imports it.
"""
