"""An HTML page as a browser would read it."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "img", "link", "br", "hr", "input"}


class Page(HTMLParser):
    """Checks that tags nest, and collects what a browser would show and fetch."""

    def __init__(self, path: Path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.text, self.tags, self.links, self.images = "", [], [], []
        self.feed(self.source)
        self.close()
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        named = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(named)
        self.links += [value for key, value in attrs if key in ("src", "href", "srcset", "action", "data")]
        assert not any(key.startswith("on") for key in named), "an event handler"

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data + " "

    def without_images(self) -> str:
        return re.sub(r"base64,[^\"]*", "", self.source)

    def sections(self) -> list[str]:
        return re.findall(r"<h2>(.*?)</h2>", self.source)
