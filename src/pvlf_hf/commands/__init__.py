"""Commands: what `pvlf-hf train` and `pvlf-hf evaluate` run, and how they read their command line.

Imports every other folder; no other folder imports it.
"""
