"""Milvus: galleries that live in a vector database; the client keeps nothing of an image.

A gallery is a collection: `connection` reaches the database, `schema` lays out the collection's fields, `store` reads
and writes it, `filters` translates conditions for the server, `nearest` ranks exactly what the index proposes,
`filling` and `bulk` write embedded images, `indexing` embeds those that a store lacks, and `gallery` searches.
"""
