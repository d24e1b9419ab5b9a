"""Rows of every format, each with its place, and what is said where there is something wrong."""

import gzip
import json
from pathlib import Path

import datasets
import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from utils.config import InputError
from utils.tables import Table, read_table

ROWS = [{"text": "one, two", "label": 1}, {"text": 'a "quoted"\nline', "label": 2}]


def write(path, rows=ROWS):
    frame = pd.DataFrame(rows)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".json", ".parquet"])
def test_all_formats_hold_the_same_rows(tmp_path, suffix):
    rows = read_table(Table(str(write(tmp_path / f"rows{suffix}"))))
    values = [{**row.values, "label": int(row.values["label"])} for row in rows]
    assert values == ROWS


@pytest.mark.parametrize("packed", [".gz", ".zst"])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".json"])
def test_compressed_files_hold_the_same_rows(tmp_path, suffix, packed):
    plain = write(tmp_path / f"rows{suffix}")
    expected = [(row.values, row.place) for row in read_table(Table(str(plain)))]
    path = tmp_path / f"rows{suffix}{packed}"
    pack = {".gz": gzip.compress, ".zst": zstandard.compress}[packed]
    path.write_bytes(pack(plain.read_bytes()))
    found = [(row.values, row.place) for row in read_table(Table(str(path)))]
    assert found == [(values, place.replace(str(plain), str(path))) for values, place in expected]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match=f"cannot read {path}: "):
        read_table(Table(str(path)))
    path.write_bytes(pack(b"text\nna\xefve\n"))
    with pytest.raises(InputError, match=rf"{suffix}{packed}, line \d: not UTF-8"):
        read_table(Table(str(path)))


def test_json_lines_by_the_name_of_json(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert [row.values for row in read_table(Table(str(path)))] == ROWS
    path.write_text('{"text": "a"}\n{"text"\n')
    with pytest.raises(InputError, match=r"rows\.json, line 2: not JSON"):
        read_table(Table(str(path)))


def test_a_folder_and_texts(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b/two.txt").write_text("second\n\nthird\r\n\n\n")
    (tmp_path / "one.txt").write_text("first")
    rows = read_table(Table(str(tmp_path), sample_by="paragraph"))
    assert [row.values["text"] for row in rows] == ["second", "third", "first"]
    assert rows[1].place == f"{tmp_path}/b/two.txt, text 2"
    rows = read_table(Table(str(tmp_path)))
    assert [row.values["text"] for row in rows] == ["second\n\nthird\n\n\n", "first"]
    write(tmp_path / "rows.csv")
    assert len(read_table(Table(str(tmp_path)))) == len(ROWS)
    assert len(read_table(Table(f"{tmp_path}/*.*"))) == len(ROWS) + 1
    with pytest.raises(InputError, match=r"sample_by is for \.txt: leave it out"):
        read_table(Table(str(tmp_path / "rows.csv"), sample_by="line"))


def test_quotes_in_tab_separated_values_are_text(tmp_path):
    path = tmp_path / "rows.tsv"
    texts = ['"so good', "plain", 'a "quoted" word', 'ends "']
    path.write_text("text\tlabel\n" + "".join(f"{text}\t{i}\n" for i, text in enumerate(texts)))
    rows = read_table(Table(str(path)))
    assert [row.values for row in rows] == [
        {"text": text, "label": str(i)} for i, text in enumerate(texts)
    ]
    assert rows[-1].place == f"{path}, line 5"


def test_a_quote_that_is_not_closed_swallows_no_rows(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('text,label\n"so good,1\nplain,0\n')
    with pytest.raises(InputError, match=r"rows\.csv, line 2: here begins no record: unexpected"):
        read_table(Table(str(path)))


def test_places(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b"}\n')
    assert [row.place for row in read_table(Table(str(path)))] == [
        f"{path}, line 1",
        f"{path}, line 3",
    ]
    path = write(tmp_path / "rows.csv")
    # the second record of the csv file ends in its fourth line
    assert [row.place for row in read_table(Table(str(path)))] == [
        f"{path}, line 2",
        f"{path}, line 4",
    ]
    path = write(tmp_path / "rows.parquet")
    assert read_table(Table(str(path)))[1].place == f"{path}, row 2"


def test_a_glob_reads_its_files_in_order(tmp_path):
    for number in (2, 0, 1):
        write(tmp_path / f"part-{number}.jsonl", [{"text": str(number)}])
    rows = read_table(Table(f"{tmp_path}/part-*.jsonl"))
    assert [row.values["text"] for row in rows] == ["0", "1", "2"]


def test_the_official_json_with_a_data_key(tmp_path):
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"version": "1.1", "data": ROWS}))
    assert [row.values for row in read_table(Table(str(path)))] == ROWS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text"\n', "{path}, line 2: not JSON: "),
        ("a.jsonl", '{"text": "a"}\n[1]\n', "{path}, line 2: not a mapping of columns: [1]"),
        ("a.jsonl", "\n", "{path} holds no rows"),
        ("a.csv", "text,label\na,1\nb\n", "{path}, line 3: fewer values than the header has"),
        ("a.csv", b"text\nfine\n\xff\n", "{path}, line 3: not UTF-8"),
        ("a.csv", 'text\nfine\n"a"b\n', "{path}, line 3: here begins no record: ',' expected"),
        ("a.csv", "text,label,text\n", "{path}: two columns are called 'text': name each"),
        ("a.tsv", "text\tlabel\ttext\n", "{path}: two columns are called 'text': name each"),
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16"), "{path}, line 1: not UTF-8"),
        ("a.json", '[{"text": "a"}]'.encode("utf-16"), "{path}, line 1: not UTF-8"),
        ("a.jsonl", "[" * 100_000, "{path}, line 1: not JSON: maximum recursion depth"),
        ("a.json", "[" * 100_000, "{path}: not JSON: maximum recursion depth"),
        ("a.csv", "text,label\na,1,2\n", "{path}, line 2: more values than the header has"),
        ("a.csv", b"text\n\xff\n", "{path}, line 2: not UTF-8: invalid start byte"),
        ("a.parquet", "PAR", "cannot read {path}: "),
        ("a.json", "{}", "{path}: expected a list of rows, or such a list under the key 'data'"),
        ("a.md", "text", "{path}: give files of one of these kinds: .csv, "),
        ("a.txt", b"\xff", "{path}, line 1: not UTF-8: invalid start byte"),
        ("a.txt", " \n", "{path} holds no rows"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as error:
        read_table(Table(str(path)))
    assert str(error.value).startswith(message.format(path=path))


def test_columns_without_a_name(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label,,\na,b,,\n")
    assert read_table(Table(str(path)))[0].values == {"text": "a", "label": "b", "": ""}


def test_a_column_twice_in_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    table = pyarrow.Table.from_arrays([pyarrow.array([1]), pyarrow.array([2])], ["a", "a"])
    pyarrow.parquet.write_table(table, path)
    with pytest.raises(InputError, match=r"a\.parquet: two columns are called 'a'"):
        read_table(Table(str(path)))


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json"])
def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    content = {".csv": "text\na\n", ".tsv": "text\na\n", ".jsonl": '{"text": "a"}\n'}
    path.write_text(content.get(suffix, '[{"text": "a"}]'), encoding="utf-8-sig")
    if suffix == ".jsonl":
        path.write_bytes(2 * path.read_bytes())  # joined by cat
    assert {row.text("text") for row in read_table(Table(str(path)))} == {"a"}


SLICES = (
    "train",
    "train[:90%]",
    "train[90%:]",
    "train[33%:66%]",
    "train[5:9]",
    "train[-10%:]",
    "train[-3:]",
    "train[:500]",
    "train[:3]+train[-10%:]",
    "train[:20%](pct1_dropremainder)",
)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_slices_are_those_of_datasets(tmp_path, suffix):
    for part in range(2):
        rows = [{"text": f"row {number}"} for number in range(67 * part, 67 * part + 67)]
        write(tmp_path / f"part-{part}.{suffix}", rows)
    files = f"{tmp_path}/part-*.{suffix}"
    builder = {"jsonl": "json"}.get(suffix, suffix)
    for split in SLICES:
        expected = datasets.load_dataset(
            builder, data_files=files, split=split, cache_dir=str(tmp_path / "cache")
        )
        rows = read_table(Table(files, split=split))
        assert [row.values["text"] for row in rows] == expected["text"], split
    # a row stays where it stood
    assert read_table(Table(files, split="train[-1:]"))[0].place.endswith(
        f"part-1.{suffix}, " + {"csv": "line 68", "jsonl": "line 67", "parquet": "row 67"}[suffix]
    )


@pytest.mark.parametrize("split", ["nonsense", "test", "train[:10%]+test", "train[a:]", "", "all"])
def test_a_split_that_files_do_not_have(tmp_path, split):
    path = write(tmp_path / "a.jsonl")
    with pytest.raises(InputError) as error:
        read_table(Table(str(path), split=split))
    assert str(error.value).startswith(
        f"{path}: split {split!r}: files have the split train alone, or a slice: train[:90%]"
    )


def test_a_slice_without_rows(tmp_path):
    with pytest.raises(InputError, match="holds no rows"):
        read_table(Table(str(write(tmp_path / "a.jsonl")), split="train[5:]"))


@pytest.mark.parametrize("name", ["name", "revision"])
def test_settings_of_the_hub_beside_files(tmp_path, name):
    path = write(tmp_path / "a.jsonl")
    with pytest.raises(InputError) as error:
        read_table(Table(str(path), **{name: "x"}))
    advice = {"name": "the name in the logs is label"}.get(name, "leave it out")
    assert str(error.value) == f"{path}: {name} is for datasets of the Hub: {advice}"


def test_a_file_comes_once_and_by_its_name(tmp_path):
    path = write(tmp_path / "a[1].jsonl")
    (tmp_path / "again.jsonl").symlink_to(path)
    (tmp_path / "loop").symlink_to(".")
    for given in (path, tmp_path / "*.jsonl", tmp_path / "**" / "*.jsonl"):
        assert len(read_table(Table(str(given)))) == len(ROWS)


def test_dots_are_in_names_or_lead_into_columns(tmp_path):
    row = {"doc.text": "literal", "doc": {"text": "inside", "only": "here"}, "a": {"b.c": {"d": 1}}}
    (found,) = read_table(Table(str(write(tmp_path / "a.jsonl", [row]))))
    assert found.get("doc.text") == "literal"
    assert found.get("doc.only") == "here"
    assert found.get("a.b.c.d") == 1
    with pytest.raises(
        InputError, match=r"no column 'doc.none'; there are: doc.text, doc.only, a$"
    ):
        found.get("doc.none")


def test_half_a_surrogate_pair_is_no_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(r'{"text": "a \ud83d", "deep": [{"a": "\udc00"}], "whole": "\ud83d\ude42"}')
    (row,) = read_table(Table(str(path)))
    assert row.text("whole") == "🙂"
    for column in ("text", "deep"):
        with pytest.raises(InputError) as error:
            row.get(column)
        assert str(error.value).startswith(f"{path}, line 1: {column} is not Unicode: ")
        str(error.value).encode()


def test_no_file(tmp_path):
    with pytest.raises(InputError, match=r"no file .*none\.csv"):
        read_table(Table(f"{tmp_path}/none.csv"))


def test_a_dataset_of_the_hub(monkeypatch):
    def load_dataset(path, name, split, revision):
        assert (path, name, split, revision) == ("glue", "sst2", "validation", "abc")
        return iter(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = read_table(Table("glue", "sst2", "validation", "abc"))
    assert [row.values for row in rows] == ROWS
    assert rows[1].place == "glue (validation), row 2"


def test_a_name_that_is_no_dataset(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("cannot reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError) as error:
        read_table(Table("no/such-dataset"))
    assert str(error.value).startswith("no/such-dataset is neither a file (.csv, ")
    assert str(error.value).endswith(
        "nor a dataset that the Hub gives: ConnectionError: cannot reach the Hub; "
        f"looked for from {Path.cwd()}"
    )


def test_columns(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": " ", "label": 3}\n')
    (row,) = read_table(Table(str(path)))
    with pytest.raises(InputError, match=r"line 1: no column 'txt'; there are: text, label$"):
        row.get("txt")
    with pytest.raises(InputError, match=r"line 1: text is empty$"):
        row.text("text")
    with pytest.raises(InputError, match=r"line 1: label must be text, not 3$"):
        row.text("label")
