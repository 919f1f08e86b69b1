"""Cleaning, dedupe, split and the whole build on tiny packages that need no network."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qnext.errors import ConfigError, TrainingError
from qnext.train import corpus
from qnext.train.corpus import (
    Source,
    build_corpus,
    clean,
    compose,
    fetch,
    is_prose,
    paragraph_key,
    read_sources,
    split_heldout,
)
from qnext.train.extract import EXTRACTORS

PROSE = "The harbour was quiet in the morning, and the boats that had come in lay by the wall."
START, COMMA, END = PROSE.partition(", and ")
OTHER = "A lock is held by one task at a time, so that the others wait until it is given back."


def sentence(n: int) -> str:
    """A paragraph of prose that differs in letters for every n."""
    word = "".join("abcdefghij"[int(d)] for d in str(n))
    return f"The {word} was kept in the {word}house by the sea, and it is said that he had {word}."


def blocks(kind: str, path: Path) -> list[tuple[str, str]]:
    return next(EXTRACTORS[kind](path))


@given(st.text())
def test_clean_is_one_line_and_idempotent(text: str) -> None:
    once = clean(text)
    assert clean(once) == once
    assert not set(once) & set("\n\t\u200b\ufeff\u00a0")


@pytest.mark.parametrize(
    "text",
    [
        "Home Next Previous Index",
        "int main(int argc, char **argv) { if (argc == 1) return (0); } /* is in the if */",
        "0x00 0x01 0x02 0x03 the 0x04 0x05 of 0x06 0x07 and 0x08 0x09 to 0x0a 0x0b",
        "Der schnelle braune Fuchs springt jeden Morgen gern über einen sehr faulen alten Hund",
    ],
)
def test_what_is_not_english_prose(text: str) -> None:
    assert not is_prose(text)
    assert is_prose(PROSE)


def test_html_keeps_text_and_drops_furniture(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(
        f"<html><head><title>x</title></head><body><nav>{OTHER}</nav><div role='main'>"
        f"<h1>Harbours<a class='headerlink'>¶</a></h1><p>{START}<em>{COMMA.rstrip()}</em>\n"
        f"{END}</p><script>var x;</script><table><tr><td>cell</td></tr></table>"
        f"<dl><dt>lock()</dt><dd><p>{OTHER}</p></dd></dl><ul><li>one <b>item</b></li></ul>"
        "<pre>x = 1\ny = 2</pre><p><a href='a'>only a link</a></p></div></body></html>"
    )
    assert [(k, clean(t)) for k, t in blocks("html", page)] == [
        ("heading", "Harbours"),
        ("prose", PROSE),
        ("term", "lock()"),
        ("prose", OTHER),
        ("item", "one item"),
        ("code", "x = 1 y = 2"),
    ]


def test_text_joins_wrapped_lines(tmp_path: Path) -> None:
    page = tmp_path / "page.txt"
    page.write_text(f"A Heading\n=========\n\n{START}{COMMA}\n{END}\n\n  - first\n    point\n")
    assert blocks("text", page) == [
        ("heading", "A Heading"),
        ("prose", PROSE),
        ("item", "first point"),
    ]


def test_pod_and_man_lose_their_markup(tmp_path: Path) -> None:
    pod = tmp_path / "a.pod"
    pod.write_text("=head1 NAME\n\nUse C<< open >> or L<the guide|perlop> B<now>.\n\n  my $x;\n")
    assert blocks("pod", pod) == [
        ("heading", "NAME"),
        ("prose", "Use open or the guide now."),
        ("code", "  my $x;\n"),
    ]
    man = tmp_path / "a.1.gz"
    page = '.TH open 2\n.SH DESCRIPTION\nCall\n.BR open (2)\nor \\fIclose\\fP.\n.\\" no\n.PP\nEnd\n'
    man.write_bytes(gzip.compress(page.encode()))
    assert blocks("man", man) == [
        ("heading", "open(2)"),
        ("heading", "Description"),
        ("prose", "Call open(2) or close."),
        ("prose", "End "),
    ]


def test_compose_drops_repeats_and_orphans() -> None:
    seen: set[bytes] = set()
    body = [("prose", sentence(n)) for n in range(8)]
    first = list(compose([("heading", "Title"), ("heading", "Part"), *body], seen))
    assert len(first) == 1
    assert first[0].startswith("Title\n\nPart\n\nThe a was")
    fresh = [("prose", sentence(n)) for n in range(8, 16)]
    again = list(compose([("heading", "Empty"), body[0], ("heading", "New"), *fresh], seen))
    assert sentence(0) not in again[0]
    assert again[0].count(sentence(9)) == 1
    assert list(compose(body, seen)) == []


def test_compose_keeps_little_code() -> None:
    code = ("code", "result = lock.acquire()")
    text = next(compose([("prose", PROSE + sentence(n)) for n in range(4)] + [code], set()))
    assert text.endswith(f"\n\n{code[1]}")
    many = [
        b for n in range(40) for b in (("prose", sentence(n)), ("code", f"call_{'x' * n}({n})"))
    ]
    text = next(compose(many, set()))
    codes = [p for p in text.split("\n\n") if p.startswith("call_")]
    assert codes
    assert sum(map(len, codes)) <= corpus.CODE_SHARE * len(text)


def test_compose_cuts_long_documents_at_paragraphs() -> None:
    many = [("prose", sentence(n)) for n in range(2000)]
    texts = list(compose(many, set()))
    assert len(texts) > 1
    assert max(map(len, texts)) < corpus.DOCUMENT_CHARS * 1.1
    assert [p for t in texts for p in t.split("\n\n")] == [t for _, t in many]


def test_split_takes_from_every_source_and_shares_nothing() -> None:
    documents = [
        corpus._Document(f"{name} {sentence(n)}", name)
        for name, count in (("big", 400), ("small", 3))
        for n in range(count)
    ]
    train, heldout = split_heldout(documents, total=3000)
    assert {d.source for d in heldout} == {"big", "small"}
    assert not {d.text for d in train} & {d.text for d in heldout}
    assert len(train) + len(heldout) == len(documents)
    assert 1500 < sum(d.size for d in heldout) < 4000
    again = split_heldout(documents[::-1], total=3000)[1]
    assert {d.text for d in again} == {d.text for d in heldout}


SOURCES = """
[[source]]
name = "books"
kind = "apt"
package = "books"
files = ["doc/*.txt"]
exclude = ["*/skip*"]
extract = "text"
licence = "CC0-1.0"

[[source]]
name = "pages"
kind = "npm"
package = "pages"
files = ["*.html"]
extract = "html"
licence = "MIT"
max_mb = 0.004
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A work folder with two packages that look downloaded and unpacked."""
    for kind, file in (("apt", "books_1_all.deb"), ("npm", "pages-1.tgz")):
        (tmp_path / "downloads" / kind).mkdir(parents=True)
        (tmp_path / "downloads" / kind / file).write_bytes(b"package")
    doc, pages = tmp_path / "unpacked/books/doc", tmp_path / "unpacked/pages"
    doc.mkdir(parents=True)
    pages.mkdir(parents=True)
    for n in range(12):
        own = [sentence(n * 10 + i) for i in range(10)]
        (doc / f"{n}.txt").write_text("\n\n".join(own))
        copied = "".join(f"<p>{p}</p>" for p in own[:2])
        more = "".join(f"<p>{sentence(5000 + n * 10 + i)}</p>" for i in range(8))
        (pages / f"{n}.html").write_text(f"<body><h1>Page</h1>{copied}{more}</body>")
    (doc / "skip.txt").write_text("\n\n".join(sentence(9000 + i) for i in range(10)))
    (tmp_path / "sources.toml").write_text(SOURCES)
    return tmp_path


def test_build_is_deduplicated_counted_and_repeatable(tree: Path) -> None:
    manifest = build_corpus(tree / "sources.toml", tree, tree / "out", jobs=1, heldout_bytes=3000)
    records = {
        split: [json.loads(line) for line in (tree / f"out/{split}.jsonl").read_text().splitlines()]
        for split in ("train", "heldout")
    }
    keys = {
        split: [
            paragraph_key(p)
            for record in group
            for p in record["text"].split("\n\n")
            if is_prose(p)
        ]
        for split, group in records.items()
    }
    assert len(records["train"]) > len(records["heldout"]) > 1
    everything = keys["train"] + keys["heldout"]
    assert len(everything) == len(set(everything))
    assert {r["source"] for r in records["heldout"]} == {"books", "pages"}
    assert not any(sentence(9000) in r["text"] for r in records["train"] + records["heldout"])
    for split, group in records.items():
        size = sum(len(r["text"].encode()) for r in group)
        assert manifest[split] == {"documents": len(group), "bytes": size}
    pages = manifest["sources"]["pages"]
    assert pages["licence"] == "MIT"
    assert pages["train"]["bytes"] + pages["heldout"]["bytes"] <= 4000
    before = {p.name: p.read_bytes() for p in (tree / "out").iterdir()}
    build_corpus(tree / "sources.toml", tree, tree / "out", jobs=1, heldout_bytes=3000)
    assert {p.name: p.read_bytes() for p in (tree / "out").iterdir()} == before


def test_prose_that_stands_in_train_leaves_the_heldout_text() -> None:
    train = [corpus._Document(f"{sentence(1)}\n\n{sentence(2)}", "a")]
    heldout = [corpus._Document(f"Title\n\n{sentence(3)}\n\n{sentence(2)}", "b")]
    assert [d.text for d in corpus.drop_shared(heldout, train)] == [f"Title\n\n{sentence(3)}"]


def test_the_command_makes_text_tokenizer_and_shards(tree: Path) -> None:
    out = tree / "all"
    corpus.main(
        f"--sources {tree}/sources.toml --work {tree} --out {out}"
        " --vocab-size 300 --jobs 1 --heldout-bytes 3000".split()
    )
    text = json.loads((out / "text/manifest.json").read_text())
    shards = json.loads((out / "shards/manifest.json").read_text())
    for split in ("train", "heldout"):
        assert shards[split]["bytes"] == text[split]["bytes"] > 0
        size = (out / f"shards/{split}.bin").stat().st_size
        assert size == 2 * shards[split]["tokens"]


def test_sources_name_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "sources.toml"
    path.write_text(SOURCES.replace('licence = "MIT"\n', ""))
    with pytest.raises(ConfigError, match=r"'pages'.*licence"):
        read_sources(path)
    path.write_text(SOURCES.replace('"html"', '"pdf"'))
    with pytest.raises(ConfigError, match="pdf"):
        read_sources(path)


def test_a_failed_download_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "bin/apt-get"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho 'Unable to locate package nothing' >&2\nexit 100\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=":")
    source = Source("x", "apt", "nothing", ("*",), "text", "MIT")
    with pytest.raises(TrainingError, match="Unable to locate package nothing"):
        fetch(source, tmp_path)


def test_the_shipped_sources_are_valid() -> None:
    path = Path(__file__).parents[2] / "recipes/qnext-small/sources.toml"
    sources = read_sources(path)
    assert len({s.name for s in sources}) == len(sources) > 20
    assert all(s.licence and s.files for s in sources)
