"""S3 listings: each page as ElementTree reads it, and all ranges together as sorted() orders them."""

import random
import threading
import time
from urllib.parse import quote_plus
from xml.sax.saxutils import escape

import pyarrow as pa
import pytest

from cnn_ray import storage_pages, storage_ranges
from cnn_ray.errors import StorageError, UnavailableError
from cnn_ray.records import LISTING_SCHEMA
from cnn_ray.storage_pages import ListingPage, parse_page
from cnn_ray.storage_ranges import RangeLister

ROOT = "s3://bucket/"
ODD = [
    "a b",
    "a+b",
    "100%",
    "a%20b",
    "a&b",
    "a<b>",
    "a'\"b",
    "ünï/日本",
    "\U0001f600",
    "line\nfeed\r\n",
    "\t",
    "a=b/c:d",
]
ODD += ["~*|^`", "Contents>", "<![CDATA[", "</Key>", "nul\0", "\x01", "", "p/", "p/x/"]
URL = "<EncodingType>url</EncodingType>"


def page(
    names, *, encode=quote_plus, etag="&quot;{}&quot;", extra="", tail="", head="<EncodingType>url</EncodingType>"
):
    entries = "".join(
        f"<Contents><Key>{encode(name)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
        f"<ETag>{etag.format(k)}</ETag>{extra}<Size>{k}</Size><StorageClass>STANDARD</StorageClass></Contents>"
        for k, name in enumerate(names)
    )
    xml = '<?xml version="1.0" encoding="UTF-8"?>\n<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
    return f"{xml}<Name>b</Name>{head}{entries}{tail}</ListBucketResult>".encode()


def slow_page(body, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(storage_pages, "_quick", lambda *_: None)
        return parse_page(body, ROOT, "p/")


def test_a_page_as_aws_writes_it_is_read_quickly(monkeypatch):
    monkeypatch.delattr(storage_pages, "ElementTree")
    names = [name for name in ODD if name and "\0" not in name]
    checksum = "<ChecksumAlgorithm>CRC64NVME</ChecksumAlgorithm><ChecksumType>FULL_OBJECT</ChecksumType>"
    token = "<NextContinuationToken>1/x==</NextContinuationToken>"
    read = parse_page(page(names, extra=checksum, tail=token), ROOT)
    assert read.table.schema == LISTING_SCHEMA
    read.table.validate(full=True)
    assert read.table.to_pylist() == [
        {"uri": ROOT + name, "etag": str(k), "size_bytes": k} for k, name in enumerate(names)
    ]
    assert (read.first, read.last, read.token) == (names[0], names[-1], "1/x==")


PAGES = {
    "AWS": page(ODD),
    "minio quotes": page(ODD, etag="&#34;{}-2&#34;"),
    "bare quotes": page(ODD, etag='"{}"'),
    "no quotes": page(ODD, etag="{}"),
    "entity in etag": page(["a"], etag="&quot;&lt;&quot;"),
    "not encoded": page([n for n in ODD if "\0" not in n and "\x01" not in n], encode=escape, head=""),
    "not encoded, plain names": page(["a+b", "a%20b"], encode=lambda name: name, head=""),
    "raw UTF-8 in an encoded page": page(["ü", "b"], encode=lambda name: name),
    "half a character": page(["a"], encode=lambda _: "%C3"),
    "carriage return": page(["a\rb"], encode=lambda name: name),
    "owner": page(["a", "b"], extra="<Owner><ID>x</ID></Owner>"),
    "comment": page(["a"], tail="<!-- <Contents><Key>z</Key></Contents> -->"),
    "another entry": page(["a"], tail="<Contents><Size>3</Size><Key>zz</Key></Contents>"),
    "entry with an attribute": page(["a"], tail='<Contents x="1"><Size>3</Size><Key>zz</Key></Contents>'),
    "entity in token": page(["a"], tail="<NextContinuationToken>a&amp;b</NextContinuationToken>"),
    "spaces": page(["a", "b"]).replace(b"><", b">\n  <"),
    "empty": page([]),
}


@pytest.mark.parametrize("name", PAGES)
def test_every_page_is_read_as_elementtree_reads_it(monkeypatch, name):
    quick, slow = parse_page(PAGES[name], ROOT, "p/"), slow_page(PAGES[name], monkeypatch)
    assert quick.table.to_pylist() == slow.table.to_pylist()
    assert (quick.first, quick.last, quick.token) == (slow.first, slow.last, slow.token)


def test_random_names_are_read_as_elementtree_reads_them(monkeypatch):
    draw = random.Random(1)
    for _ in range(100):
        names = ["".join(draw.choices("ab/+%&<>=\"' \n\r\té日\U0001f600", k=draw.randint(1, 9))) for _ in range(20)]
        body = page(names, encode=lambda name: quote_plus(name, safe=draw.choice(["", "/"])))
        quick = storage_pages._quick(body, ROOT)
        assert quick is not None
        assert quick[0].equals(storage_pages._slow(body, ROOT)[0])


def test_folder_markers_are_left_out():
    def kept(names, sizes_from=0):
        return [row["uri"].removeprefix(ROOT) for row in parse_page(page(names), ROOT, "p/").table.to_pylist()]

    assert kept(["x/", "p/", "y/", "z"]) == ["y/", "z"]  # sizes 0, 1, 2, 3: an object may end with a slash


@pytest.mark.parametrize("cut", [20, 200, 420, -1])
def test_half_a_page_is_asked_for_again(cut):
    with pytest.raises(UnavailableError):
        parse_page(page(["a", "b"])[:cut], ROOT)


class Server:
    """Pages of `size` names out of a sorted list, as S3 answers."""

    def __init__(self, names, size):
        self.names, self.size = sorted(names), size
        self.requests, self.busy, self.most_busy, self.delay_s = 0, 0, 0, 0.0
        self.lock = threading.Lock()

    def __call__(self, arguments):
        with self.lock:
            self.requests, self.busy = self.requests + 1, self.busy + 1
            self.most_busy = max(self.most_busy, self.busy)
        time.sleep(self.delay_s)
        after = arguments.get("ContinuationToken", arguments.get("StartAfter", ""))
        after.encode()  # no half of a surrogate pair is ever sent
        fitting = [name for name in self.names if name.startswith(arguments["Prefix"]) and name > after]
        size = arguments.get("MaxKeys", self.size)
        found = fitting[:size]
        with self.lock:
            self.busy -= 1
        return listed(found, found[-1] if len(fitting) > size else None)


def listed(names, token):
    columns = [[ROOT + name for name in names], ["e"] * len(names), [1] * len(names)]
    first, last = (names[0], names[-1]) if names else (None, None)
    return ListingPage(pa.table(columns, schema=LISTING_SCHEMA), first, last, token)


def names_of(tables):
    return [uri.removeprefix(ROOT) for table in tables for uri in table["uri"].to_pylist()]


@pytest.mark.parametrize("seed", range(60))
def test_ranges_together_are_the_sorted_listing(monkeypatch, seed):
    draw = random.Random(seed)
    monkeypatch.setattr(storage_ranges, "SPAN_PAGES", draw.randint(1, 3))
    monkeypatch.setattr(storage_ranges, "SPANS_AHEAD", draw.choice([1, 3, 32]))
    monkeypatch.setattr(storage_ranges, "PROBES", draw.choice([0, 1, 5, 64]))
    letters = draw.choice(
        ["ab/-", "0123456789", "a/\0\x01 ", "a\ud7ff\ue000\U00010000\U0010fffd\U0010ffff/", "é日a-/0"]
    )
    names = {"".join(draw.choices(letters, k=draw.randint(1, 6))) for _ in range(draw.randint(1, 400))}
    prefix = draw.choice(["", "", letters[0]])
    server = Server(names, draw.randint(1, 9))
    expected = sorted((n for n in names if n.startswith(prefix)), key=str.encode)
    assert names_of(RangeLister(server, prefix, ROOT).tables()) == expected


@pytest.mark.parametrize("form", ["d{0:03d}/{1:04d}.png", "{0:02d}{1:04d}", "deep/er/x-{0:d}-{1:d}"])
def test_long_listings_are_read_by_many_threads_and_few_more_requests(form):
    names = [form.format(a, b) for a in range(20) for b in range(500)]
    server = Server(names, 10)
    server.delay_s = 0.002
    assert names_of(RangeLister(server, "", ROOT).tables()) == sorted(names)
    assert server.most_busy >= 8
    assert server.requests < 1.5 * len(names) / 10


def test_short_listings_are_not_cut():
    server = Server([f"{k:04d}" for k in range(1600)], 100)
    assert len(names_of(RangeLister(server, "", ROOT).tables())) == 1600
    assert server.requests == 16


def test_a_listing_that_is_not_finished_leaves_no_threads_and_asks_no_more():
    server = Server([f"{k:05d}" for k in range(20_000)], 10)
    server.delay_s = 0.01
    tables = RangeLister(server, "", ROOT).tables()
    for _ in range(storage_ranges.SPAN_PAGES + 1):
        next(tables)
    before = server.requests
    tables.close()
    assert server.requests - before <= storage_ranges.THREADS
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("list")]


def test_an_error_in_a_later_range_reaches_the_caller():
    server = Server([f"{k:04d}" for k in range(2000)], 10)

    def ask(arguments):
        found = server(arguments)
        if found.first is not None and found.first > "15":
            raise UnavailableError("gone")
        return found

    with pytest.raises(UnavailableError, match="gone"):
        list(RangeLister(ask, "", ROOT).tables())


@pytest.mark.parametrize("pages", [[["a", "c", "b"]], [["a", "b"], ["a"]], [["a", "a"]]])
def test_another_order_is_refused(pages):
    answers = iter([listed(names, "t" if k < len(pages) - 1 else None) for k, names in enumerate(pages)])
    with pytest.raises(StorageError, match=r"Expected .* byte order. Received: .* Next: "):
        list(RangeLister(lambda _: next(answers), "", ROOT).tables())
