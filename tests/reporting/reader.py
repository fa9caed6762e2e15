"""Reads a page as a browser does, for the tests of pages."""

from html.parser import HTMLParser

_VOID = {"meta", "img", "br", "link", "input", "hr"}


class Reader(HTMLParser):
    """Reads a page: its text, its elements, and whether they are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.words, self.links, self.ids, self.tags = [], [], [], [], []
        self.texts, self.rows, self.titles = {}, [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "srcset"):
                self.links.append(value)
            if name.startswith("on"):
                self.links.append(name)
            if name == "id":
                self.ids.append(value)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            return
        if "svg" in self.open and self.open[-1] == "title":
            self.titles.append(data)
        if "svg" not in self.open:
            self.words.append(data)
        for tag in set(self.open):
            self.texts[tag] = self.texts.get(tag, "") + data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    @property
    def text(self):
        return "".join(self.words).replace("\N{NO-BREAK SPACE}", " ")
