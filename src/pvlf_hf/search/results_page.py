"""Writes the results of a search as one HTML file: images, scores and ids, nothing fetched from elsewhere.

Example:
    ```python
    Path("result.html").write_text(search_page(gallery.search("dress.jpg", "without sleeves")), encoding="utf-8")
    ```
"""

from base64 import b64encode
from html import escape
from io import BytesIO

from PIL import Image

from .query import Explanation
from .result import SearchResult

THUMBNAIL = 256
"""Pixels of an image's longer side (our choice): a page of fifty stays below a megabyte."""

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2328; background: #fff; margin: 2rem auto; max-width: 75rem;
       padding: 0 1rem }
.query { display: flex; flex-wrap: wrap; gap: 1rem; align-items: center; border-top: 1px solid #e4e7eb;
         padding: 1rem 0 }
.query p { margin: 0 } .text { font-size: 1.3rem } .why { color: #6e7781 } .why b { color: #1f2328; font-weight: 400 }
ol { display: grid; grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)); gap: 1rem; padding: 0;
     list-style: none }
img { max-width: 10rem; max-height: 10rem; border-radius: 6px }
li img { display: block; width: 100%; height: 10rem; object-fit: contain }
li span { display: block; overflow-wrap: anywhere } .score { color: #6e7781 }
"""


def search_page(result: SearchResult, title: str = "Composed image retrieval") -> str:
    """Write the session of a result, one section per search, as a page that needs no other file.

    An image that cannot be opened is shown as a blank with its id.

    Args:
        result: result of [`Gallery.search`]; with `explain`, the page also shows weights and attention of the model.
        title: heading.
    """
    sections = "\n".join(map(_section, result.session))
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n{sections}\n</body>\n</html>\n"
    )


def _section(result: SearchResult) -> str:
    query = result.query
    images = "".join(_image(image, "reference") for image in result.gallery.references(query))
    text = f'<p class="text" dir="auto">{escape(query.text)}</p>' if query.text else ""
    why = "".join(map(_why, result.why))
    items = "\n".join(
        f"<li>{_image(result.gallery.preview(image_id), image_id)}"
        f'<span class="score">{rank}. {score:.4f}</span><span dir="auto">{escape(image_id)}</span></li>'
        for rank, (image_id, score) in enumerate(zip(result.ids, result.scores, strict=True), 1)
    )
    return f'<div class="query">{images}<div>{text}{why}</div></div>\n<ol>\n{items}\n</ol>'


def _why(why: Explanation) -> str:
    """Write the weights of eq. 13, and the tokens, shaded by the attention that the prompts pay to them."""
    image, fused, text = why.weights
    attention = why.words()
    most = max(attention)
    shaded = " ".join(
        f'<b style="background: rgb(26 156 75 / {0.6 * share / most:.2f})">{escape(token)}</b>'
        for token, share in zip(why.tokens, attention, strict=True)
    )
    weights = f"image {image:.2f}, composition {fused:.2f}, text {text:.2f}"
    return f'<p class="why">{weights}</p><p class="why">{shaded}</p>'


def _image(image: Image.Image, name: str) -> str:
    small, file = image.copy(), BytesIO()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    small.save(file, "JPEG", quality=85)
    return f'<img src="data:image/jpeg;base64,{b64encode(file.getvalue()).decode()}" alt="{escape(name)}">'


__all__ = ["search_page"]
