"""Commands: `pvlf-hf train` and `pvlf-hf evaluate`, and the parser of their command lines.

Imports every other folder; no other folder imports it.
"""
