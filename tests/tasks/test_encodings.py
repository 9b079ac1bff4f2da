"""Text is read in the encoding that the file says; any other is refused with what converts it."""

import gzip
import shutil
import subprocess
from pathlib import Path

import pytest
from rowfiles import refused

from loralab.tasks import encodings
from loralab.tasks.read import read

TEXT = "text,label\nnaïve 影評,x\nzwölf,y\n"
ROWS = [{"text": "naïve 影評", "label": "x"}, {"text": "zwölf", "label": "y"}]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("packed", [False, True])
def test_an_encoding_with_a_mark_is_read(encoding: str, packed: bool, tmp_path: Path) -> None:
    data = TEXT.encode(encoding)
    file = tmp_path / ("a.csv.gz" if packed else "a.csv")
    file.write_bytes(gzip.compress(data) if packed else data)
    assert read(str(file)).splits["train"] == ROWS


def test_both_orders_of_bytes_are_read(tmp_path: Path) -> None:
    for mark, order in ((b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be")):
        (tmp_path / "a.csv").write_bytes(mark + TEXT.encode(order))
        assert read(str(tmp_path / "a.csv")).splits["train"] == ROWS


def test_every_kind_of_text_may_be_packed(tmp_path: Path) -> None:
    kinds = {
        ".jsonl": '{"text": "a"}\n',
        ".json": '[{"text": "a"}]',
        ".csv": "text\na\n",
        ".tsv": "text\tid\na\t1\n",
        ".txt": "a\n",
        ".ndjson": '{"text": "a"}',
    }
    for suffix, content in kinds.items():
        file = tmp_path / f"rows{suffix}.GZ"
        file.write_bytes(gzip.compress(content.encode()))
        assert read(str(file)).splits["train"] == [{"text": "a"}]


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.skipif(shutil.which("iconv") is None, reason="needs iconv")
def test_the_command_in_the_error_makes_it_readable(encoding: str, packed: bool, tmp_path: Path) -> None:
    data = "text,label\nna\xefve,x\n".encode(encoding)
    file = tmp_path / ("my rows.csv.gz" if packed else "my rows.csv")
    file.write_bytes(gzip.compress(data) if packed else data)
    error = refused(file)
    assert error.code == "unknown_encoding"
    command = str(error).rpartition(": ")[2]
    subprocess.run(["bash", "-c", command], check=True)
    (row,) = read(str(tmp_path / "my rows-utf8.csv")).splits["train"]
    assert row == {"text": "naïve", "label": "x"}


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (gzip.compress(b"text\na\n", mtime=0), "not_text"),
        (b"PK\x03\x04...", "not_text"),
        (b"PAR1....", "not_text"),
        (b"\xff\xfea", "unknown_encoding"),
        (b"\xfe\xff\xd8\x00\x00\x41", "unknown_encoding"),
        (b"\xff\xfe\0\0\xff\xff\xff\xff", "unknown_encoding"),
    ],
)
def test_what_is_no_text_is_refused(content: bytes, code: str, tmp_path: Path) -> None:
    for suffix in (".csv", ".txt", ".json", ".jsonl"):
        (tmp_path / f"a{suffix}").write_bytes(content)
        assert refused(tmp_path / f"a{suffix}").code == code


@pytest.mark.parametrize("damage", ["cut", "noise", "none"])
def test_a_damaged_archive_is_refused(damage: str, tmp_path: Path) -> None:
    data = gzip.compress(TEXT.encode() * 99)
    content = {"cut": data[:-20], "noise": data[:20] + b"noise" + data[25:], "none": b"text\na\n"}
    (tmp_path / "a.csv.gz").write_bytes(content[damage])
    assert refused(tmp_path / "a.csv.gz").code == "damaged_file"


def test_an_archive_is_not_unpacked_beyond_a_multiple_of_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encodings, "MIN_PLAIN_BYTES", 1000)
    file = tmp_path / "a.txt.gz"
    file.write_bytes(gzip.compress(b"a\n" * 490))
    assert len(read(str(file)).splits["train"]) == 490
    file.write_bytes(gzip.compress(b"a\n" * 10**6))
    assert refused(file).code == "too_large"
