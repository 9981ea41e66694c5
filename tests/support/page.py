"""What a page of HTML would make a browser do."""

from __future__ import annotations

import re
from html.parser import HTMLParser

# Attributes whose value a browser fetches, and what CSS fetches by.
_FETCHING = {"src", "srcset", "href", "xlink:href", "data", "poster", "action", "formaction", "background"}
_CSS = re.compile(r"(?:url\(|@import\s+)\s*['\"]?([^'\")\s;]+)")


class Page(HTMLParser):
    """Tags, text and addresses of a page.

    Attributes:
        tags: names, in order.
        texts: what is written between tags.
        addresses: everything that would be fetched, or followed.
    """

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.addresses: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the tag, and its addresses."""
        self.tags.append(tag)
        for name, value in attrs:
            if name in _FETCHING:
                self.addresses.append(value or "")
            self.addresses += _CSS.findall(value or "")

    def handle_data(self, data: str) -> None:
        """Note the text; styles have addresses too."""
        self.texts.append(data)
        if self.tags and self.tags[-1] == "style":
            self.addresses += _CSS.findall(data)


def addresses(page: str) -> list[str]:
    """Everything that a browser would fetch for the page, or follow from it."""
    return Page(page).addresses
