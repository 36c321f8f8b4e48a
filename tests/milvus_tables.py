"""Tables of embedded images, as stores in Milvus are filled with them."""

import pyarrow as pa


def table_of(embeds, first=0, digest="", **columns):
    """Return a batch of images `000000'".jpg`, ..., whose ids need to be quoted."""
    rows = range(first, first + len(embeds))
    flat = pa.array(embeds.numpy().reshape(-1))
    names = {"id": [f"{row:06d}'\".jpg" for row in rows], "path": pa.array([None] * len(embeds), pa.string())}
    names["digest"] = [f"{digest}{row}" for row in rows]
    return pa.table({**names, **columns, "embedding": pa.FixedSizeListArray.from_arrays(flat, embeds.shape[1])})
