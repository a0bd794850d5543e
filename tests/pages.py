"""The tree of an HTML page, for tests that ask what stands in it."""

from html.parser import HTMLParser

VOID = {"meta", "link", "br"}  # those that pages here use


class Tree(HTMLParser):
    """tags: (name, attributes) in order; words: pieces of text; open: what was never closed. Raises where
    something is closed that is not open.
    """

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, tag
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag: str) -> list[dict]:
        """The attributes of each element of a name."""
        return [a for t, a in self.tags if t == tag]
