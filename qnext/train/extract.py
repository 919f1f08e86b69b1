"""From files of documentation to blocks of text: HTML, XML help pages, plain text, pod, man, JSON.

Every extractor takes a path and yields lists of ``(kind, text)`` blocks, one list per document;
kind is heading, term, prose, item or code. ``corpus.compose`` decides what of it is kept.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lxml import etree, html

Block = tuple[str, str]

_SKIP_TAGS_TEXT = (
    "script style nav header footer table form button select noscript svg math head aside "
    "info iframe template label option dialog indexterm"
)
_SKIP_TAGS = frozenset(_SKIP_TAGS_TEXT.split())
_SKIP_CLASSES_TEXT = (
    "sidebar sphinxsidebar toc toctree-wrapper contents related footer header headerlink navheader "
    "navfooter navigation nav menu breadcrumb breadcrumbs clearer admonition-todo viewcode-link "
    "linenos copyright top outoflang tocset tocview navsettop navsetbottom versionbox up "
    "nav_header nav_footer indexterm index genindextable"
)
_SKIP_CLASSES = frozenset(_SKIP_CLASSES_TEXT.split())
_SKIP_IDS_TEXT = "footer header sidebar toc nav navigation searchbox menu path"
_SKIP_IDS = frozenset(_SKIP_IDS_TEXT.split())
_BLOCK_TAGS_TEXT = (
    "p div section article main li dd dt blockquote ul ol dl td tr center body note item steps page"
    " list terms listitem para figure figcaption details summary hr fieldset address"
)
_BLOCK_TAGS = frozenset(_BLOCK_TAGS_TEXT.split())
_HEADINGS = frozenset(("h1", "h2", "h3", "h4", "h5", "h6", "title"))
_CODE = frozenset(("pre", "code-block", "screen", "programlisting"))


def read_text(path: Path) -> str:
    """A file as text, gunzipped if need be, UTF-8 or else Latin-1."""
    data = path.read_bytes()
    if path.suffix in (".gz", ".dz"):
        data = gzip.decompress(data)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode("latin-1")


class _Walker:
    """Collects blocks from an element tree; blocks that are mostly link text are dropped."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.pieces: list[str] = []
        self.linked = 0
        self.kinds = ["prose"]

    def flush(self) -> None:
        text = " ".join("".join(self.pieces).split())
        if text and self.linked <= 0.6 * len(text):
            self.blocks.append((self.kinds[-1], text))
        self.pieces, self.linked = [], 0

    def walk(self, element: Any) -> None:
        tag = element.tag
        if not isinstance(tag, str):
            return
        tag = tag.rpartition("}")[2].lower()
        classes = set((element.get("class") or "").lower().split())
        if tag in _SKIP_TAGS or classes & _SKIP_CLASSES or element.get("id") in _SKIP_IDS:
            return
        if tag == "br":
            self.pieces.append(" ")
        elif tag in _HEADINGS or ("title" in classes and tag in ("p", "div")):
            self.flush()
            self.blocks.append(("heading", "".join(element.itertext()).replace("¶", "")))
        elif tag in _CODE:
            self.flush()
            self.blocks.append(("code", "".join(element.itertext())))
        elif tag in _BLOCK_TAGS:
            self.flush()
            kind = {"li": "item", "dt": "term", "item": "item"}.get(tag)
            self.kinds.append(kind or ("prose" if tag == "dd" else self.kinds[-1]))
            self.children(element)
            self.flush()
            self.kinds.pop()
            if tag in ("li", "ul", "ol", "dd"):
                return
        else:
            before = sum(map(len, self.pieces))
            self.children(element)
            if tag == "a":
                self.linked += max(0, sum(map(len, self.pieces)) - before)

    def children(self, element: Any) -> None:
        self.pieces.append(element.text or "")
        for child in element:
            self.walk(child)
            self.pieces.append(child.tail or "")


def _walked(root: Any) -> list[Block]:
    walker = _Walker()
    walker.walk(root)
    walker.flush()
    return walker.blocks


def from_html(path: Path) -> Iterator[list[Block]]:
    """The main content of a page (or its body) without tables and navigation."""
    data = path.read_bytes()
    if path.suffix == ".gz":
        data = gzip.decompress(data)
    try:
        root = html.document_fromstring(data, parser=html.HTMLParser(encoding=_charset(data)))
    except etree.ParserError:
        return
    for query in (
        "//main",
        "//div[@class='content mainContent']",
        "//*[@role='main']",
        "//div[@class='maincolumn']",
        "//body",
    ):
        found = root.xpath(query)
        if found:
            yield _walked(found[0])
            return


def _charset(data: bytes) -> str:
    try:
        data.decode()
    except UnicodeDecodeError:
        return "iso-8859-1"
    return "utf-8"


def from_xml(path: Path) -> Iterator[list[Block]]:
    """A Mallard or DocBook help page."""
    parser = etree.XMLParser(resolve_entities=False, no_network=True, recover=True)
    root = etree.fromstring(path.read_bytes(), parser)
    if root is not None:
        yield _walked(root)


def from_text(path: Path) -> Iterator[list[Block]]:
    """Plain text: paragraphs between blank lines, hard-wrapped lines joined, indented ones code."""
    yield text_blocks(read_text(path))


def text_blocks(text: str) -> list[Block]:
    """Blocks of a plain text; a very long line (a whole speech) is cut at sentence ends."""
    blocks: list[Block] = []
    for chunk in re.split(r"\n[ \t]*\n", text.replace("\r\n", "\n")):
        lines = [line for line in chunk.expandtabs(8).split("\n") if line.strip(" -=*~_#")]
        if not lines:
            continue
        indent = min(len(line) - len(line.lstrip()) for line in lines)
        joined = " ".join(line.strip() for line in lines)
        bullet = re.match(r"\s*(?:[-*+•]|\(?\d{1,2}[.)])\s+", lines[0])
        if len(joined) > 2500:
            blocks += [("prose", part) for part in _paragraphs(joined)]
        elif bullet:
            blocks.append(("item", joined[bullet.end() - indent :]))
        elif len(lines) == 1 and len(joined) < 70 and joined[-1] not in ".,;:":
            blocks.append(("heading", joined))
        elif indent >= 4 and not joined.endswith((".", ":", "?", "!")):
            blocks.append(("code", "\n".join(line[indent:] for line in lines)))
        else:
            blocks.append(("prose", joined))
    return blocks


def _paragraphs(text: str) -> Iterator[str]:
    part: list[str] = []
    for sentence in re.split(r"(?<=[.?!][\"'”) ])\s*(?=[A-Z\"“])|(?<=[.?!])\s+(?=[A-Z\"“])", text):
        part.append(sentence.strip())
        if sum(map(len, part)) > 700:
            yield " ".join(part)
            part = []
    if part:
        yield " ".join(part)


def from_preformatted(path: Path) -> Iterator[list[Block]]:
    """A page whose text is one ``pre`` (Vim's help): plain text without its tags and link bars."""
    root = html.fromstring(path.read_bytes(), parser=html.HTMLParser(encoding="utf-8"))
    text = "\n\n".join(pre.text_content() for pre in root.iter("pre"))
    text = re.sub(r"\*[\w:.<>()'-]+\*|^[ =~-]{20,}$", "", text, flags=re.M)
    text = re.sub(r"\|([\w:.<>()'-]+)\|", r"\1", text)
    yield text_blocks(re.sub(r"\n(?=[ \t]{2,3}[A-Z][a-z])", "\n\n", text))


def from_json_text(path: Path) -> Iterator[list[Block]]:
    """A JSON object with ``text`` and perhaps ``title``, as the books and speeches come."""
    page = json.loads(path.read_text(encoding="utf-8"))
    title = " ".join(str(page[k]) for k in ("year", "name", "title") if page.get(k))
    yield [("heading", title), *text_blocks(page["text"])]


def from_factbook(path: Path) -> Iterator[list[Block]]:
    """One country of the World Factbook: long fields as paragraphs, short ones as items."""
    page = json.loads(path.read_text(encoding="utf-8"))
    names = page.get("Government", {}).get("Country name", {})
    country = names.get("conventional short form", {}).get("text", "")
    if country in ("", "none"):
        country = names.get("conventional long form", {}).get("text", "The country")
    blocks: list[Block] = []
    for section, fields in page.items():
        blocks.append(("heading", f"{country}: {section}"))
        for name, value in fields.items():
            facts = "; ".join(_facts(value, ""))
            facts = re.sub(r"<[^>]+>", " ", facts)
            if len(facts) > 200:
                blocks += [("term", name), ("prose", facts)]
            else:
                blocks.append(("item", f"{name} of {country}: {facts}"))
    yield blocks


def _facts(value: Any, label: str) -> Iterator[str]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _facts(inner, "" if name == "text" else name)
    elif value:
        yield f"{label}: {value}" if label else str(value)


def from_dictionary(path: Path) -> Iterator[list[Block]]:
    """A dictd dictionary: one paragraph per entry, forty entries a document."""
    blocks: list[Block] = []
    for entry in re.split(r"\n(?=\S)", read_text(path)):
        text = re.sub(
            r"\\[^\\\n]*\\|\[[^\[\]\n]*(?:Webster|WordNet|PJC|Cf\.)[^\[\]]*\]", " ", entry
        )
        text = " ".join(re.sub(r"[{}]", "", text).split())
        text = re.sub(r"\s+([,.;])", r"\1", text)
        blocks += [("prose", part) for part in (_paragraphs(text) if len(text) > 2500 else [text])]
        if len(blocks) >= 40:
            yield blocks
            blocks = []
    yield blocks


def from_pod(path: Path) -> Iterator[list[Block]]:
    """Perl's plain old documentation."""
    blocks: list[Block] = []
    skipping = False
    for chunk in re.split(r"\n\s*\n", read_text(path)):
        command = re.match(r"\s*=(\w+)\s*", chunk)
        if command:
            name, rest = command[1], chunk[command.end() :]
            skipping = name in ("begin", "for") or (skipping and name != "end")
            if name.startswith("head"):
                blocks.append(("heading", _pod_inline(rest)))
            elif name == "item" and len(rest) > 2:
                blocks.append(("term", _pod_inline(rest)))
        elif not skipping:
            kind = "code" if chunk[:1] in " \t" or chunk.startswith("\n ") else "prose"
            blocks.append((kind, chunk if kind == "code" else _pod_inline(chunk)))
    yield blocks


def _pod_inline(text: str) -> str:
    text = re.sub(r"[XZ]<[^<>]*>", "", text)
    text = re.sub(r"([A-Z])<<+\s+(.*?)\s+>>+", r"\2", text, flags=re.S)
    for _ in range(3):
        text = re.sub(r"L<([^<>|]*)\|[^<>]*>", r"\1", text)
        text = re.sub(r"\b[BCFILS]<([^<>]*)>", r"\1", text)
    return re.sub(r"E<(\w+)>", lambda m: {"lt": "<", "gt": ">"}.get(m[1], ""), text)


_ROFF_CHARS = {"aq": "'", "dq": '"', "lq": "“", "rq": "”", "em": "—", "en": "\u2013", "bu": "•"}


def _roff_inline(text: str) -> str:
    text = re.sub(r"\\f(?:[A-Z]|\([A-Z]{2}|\[[A-Z]*\])|\\s[-+]?\d+|\\[&|^/,%:c]", "", text)
    text = re.sub(r"\\\((\w\w)|\\\[(\w+)\]", lambda m: _ROFF_CHARS.get(m[1] or m[2], ""), text)
    return (
        re.sub(r"\\\*\(?\w+", "", text.replace("\\-", "-")).replace("\\e", "\\").replace("\\", "")
    )


def from_man(path: Path) -> Iterator[list[Block]]:
    """A manual page in the man macros; tables are left out, examples are code."""
    blocks: list[Block] = []
    lines: list[str] = []
    kind, next_term, table = "prose", False, False

    def flush(as_kind: str) -> None:
        if lines:
            blocks.append((as_kind, ("\n" if as_kind == "code" else " ").join(lines)))
            lines.clear()

    for raw in read_text(path).split("\n"):
        line = re.sub(r'\\"\s.*$', "", raw)
        macro = re.match(r"[.']\s*([A-Za-z]{1,3})\b\s*(.*)", line)
        if not macro:
            if not table and not line.startswith((".", "'")):
                lines.append(_roff_inline(line))
        else:
            name, rest = macro[1], macro[2]
            words = [a or b for a, b in re.findall(r'"([^"]*)"|(\S+)', rest)]
            if name == "TH" and len(words) > 1:
                blocks.append(("heading", f"{words[0]}({words[1]})"))
            elif name in ("SH", "SS"):
                flush(kind)
                blocks.append(("heading", _roff_inline(" ".join(words)).capitalize()))
            elif name in ("PP", "P", "LP", "TP", "IP", "HP", "TQ", "RS", "RE", "sp", "br"):
                flush(kind)
                next_term = name == "TP"
                if name == "IP" and words and len(words[0]) > 3:
                    blocks.append(("term", _roff_inline(words[0])))
                continue
            elif name in ("nf", "EX", "fi", "EE"):
                flush(kind)
                kind = "code" if name in ("nf", "EX") else "prose"
            elif name in ("TS", "TE"):
                table = name == "TS"
            elif name in ("B", "I", "SM"):
                lines.append(_roff_inline(" ".join(words)))
            elif name in ("BR", "RB", "BI", "IB", "IR", "RI"):
                lines.append(_roff_inline("".join(words)))
        if next_term and lines:
            flush("term")
            next_term = False
    flush(kind)
    yield blocks


EXTRACTORS: dict[str, Callable[[Path], Iterator[list[Block]]]] = {
    "html": from_html,
    "xml": from_xml,
    "text": from_text,
    "preformatted": from_preformatted,
    "json": from_json_text,
    "factbook": from_factbook,
    "dictionary": from_dictionary,
    "pod": from_pod,
    "man": from_man,
}
