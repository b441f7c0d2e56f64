"""A user's captions: every dialect of table and JSON is read as it is meant, or refused by the line that is wrong."""

import json
import unicodedata

import pytest

from mvdream_fast.core.errors import InputFileError
from mvdream_fast.rendering.caption_files import read_captions
from mvdream_fast.rendering.catalogue import read_folder

MESHES = ["chair.glb", "sub/Red Car.obj", "dog.stl"]
WORDS = {"chair.glb": "a tall, thin chair", "sub/Red Car.obj": 'a "red" car', "dog.stl": "a dog; asleep"}


def captions(folder, name, content, meshes=MESHES):
    """What is read from one caption file, and what is said of it."""
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    said = []
    return read_captions(folder, meshes, said.append), said


TABLES = {
    "comma": 'chair.glb,"a tall, thin chair"\nsub/Red Car.obj,"a ""red"" car"\ndog.stl,a dog; asleep\n',
    "semicolon": 'chair.glb;a tall, thin chair\nsub/Red Car.obj;"a ""red"" car"\ndog.stl;"a dog; asleep"\n',
    "tab": 'chair.glb\ta tall, thin chair\nsub/Red Car.obj\ta "red" car\ndog.stl\ta dog; asleep\n',
    "bar": 'chair.glb|a tall, thin chair\nsub/Red Car.obj|a "red" car\ndog.stl|a dog; asleep\n',
    "excel": 'sep=;\nchair.glb;a tall, thin chair\nsub/Red Car.obj;"a ""red"" car"\ndog.stl;"a dog; asleep"\n',
    "space": 'chair.glb, "a tall, thin chair"\nsub/Red Car.obj, a "red" car\ndog.stl, a dog; asleep\n',
    "quoted": '"chair.glb","a tall, thin chair"\n"sub/Red Car.obj","a ""red"" car"\n"dog.stl","a dog; asleep"\n',
    "reverse": '"a tall, thin chair",chair.glb\n"a ""red"" car",sub/Red Car.obj\na dog; asleep,dog.stl\n',
    "header": 'file,caption\nchair.glb,"a tall, thin chair"\nsub/Red Car.obj,"a ""red"" car"\ndog.stl,a dog; asleep\n',
    "columns": 'Licence;Text;N;File Name\nCC0;a tall, thin chair;1;chair.glb\n;a "red" car;2;sub/Red Car.obj\n'
    ';"a dog; asleep";;dog.stl\n',
    "returns": 'chair.glb;a tall, thin chair\rsub/Red Car.obj;a "red" car\rdog.stl;"a dog; asleep"\r',
    "windows": 'path\tprompt\r\n.\\chair.glb\ta tall, thin chair\r\nsub\\Red Car.obj\ta "red" car\r\n\r\n'
    "dog.stl\ta dog; asleep",
    "cases": 'CHAIR.GLB;a tall, thin chair\nSUB/red car.OBJ;a "red" car\nDog;"a dog; asleep"\n',
    "names": 'chair;a tall, thin chair\nred car;a "red" car\ndog;"a dog; asleep"\n',
    "bare": 'name;description\nchair;a tall, thin chair\nRed Car.obj;a "red" car\ndog;"a dog; asleep"\n',
    "trailing": 'chair.glb;a tall, thin chair;;\nsub/Red Car.obj;a "red" car;;\ndog.stl;"a dog; asleep";;\n',
}


@pytest.mark.parametrize("name", ["captions.csv", "Captions.TSV"])
@pytest.mark.parametrize("table", TABLES)
def test_tables(tmp_path, name, table):
    assert captions(tmp_path, name, TABLES[table]) == (WORDS, [])


@pytest.mark.parametrize("file", ["file", "FileName", "file_name", "path", "name", "id"])
@pytest.mark.parametrize("caption", ["caption", "Text", "description", "prompt"])
def test_the_columns_names(tmp_path, file, caption):
    text = f"n,{caption},{file}\n1,a dog,dog.stl\n"
    assert captions(tmp_path, "captions.csv", text, ["dog.stl"]) == ({"dog.stl": "a dog"}, [])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["captions.csv", "captions.json"])
def test_encodings(tmp_path, encoding, name):
    text = "datei;text\nmöbel.stl;ein grüner Stuhl\n" if name.endswith("csv") else '{"möbel.stl": "ein grüner Stuhl"}'
    found, _ = captions(tmp_path, name, text.encode(encoding), ["möbel.stl"])
    assert found == {"möbel.stl": "ein grüner Stuhl"}
    with pytest.raises(InputFileError, match=f"{name}: line 1 is not UTF-8"):
        captions(tmp_path, name, "ö;ü".encode("latin-1"))


def test_a_line_break_in_a_caption_and_line_numbers_after_it(tmp_path):
    text = 'chair.glb,"a chair,\nred"\nnowhere.glb,a\n'
    assert captions(tmp_path, "captions.csv", text)[0] == {"chair.glb": "a chair,\nred"}
    with pytest.raises(InputFileError, match=r"captions.csv, line 4: it has 3 cells, not 2; put quotes around a cap"):
        captions(tmp_path, "captions.csv", text + "dog.stl,a dog, asleep\n")


JSON = {
    "object": json.dumps(WORDS, indent=1),
    "records": json.dumps([{"id": 1, "file": k, "caption": v} for k, v in WORDS.items()]),
    "other names": json.dumps([{"Prompt": v, "File_Name": k} for k, v in WORDS.items()]),
    "pairs": json.dumps([[k, v] for k, v in WORDS.items()]),
    "nested": json.dumps({k: {"text": v, "licence": "CC0"} for k, v in WORDS.items()}),
    "small objects": json.dumps([{k: v} for k, v in WORDS.items()]),
    "lines": "\n".join(json.dumps({"path": k, "text": v}) for k, v in WORDS.items()),
    "lines of pairs": "\r\n".join(json.dumps([k, v]) for k, v in WORDS.items()) + "\r\n\r\n",
}


@pytest.mark.parametrize("name", ["captions.json", "captions.jsonl"])
@pytest.mark.parametrize("text", JSON)
def test_json(tmp_path, name, text):
    assert captions(tmp_path, name, JSON[text]) == (WORDS, [])


@pytest.mark.parametrize("text", ['{"file": "dog.stl", "caption": "a dog"}', '["dog.stl", "a dog"]'])
def test_one_line_of_json_is_one_caption(tmp_path, text):
    assert captions(tmp_path, "captions.jsonl", text, ["dog.stl"])[0] == {"dog.stl": "a dog"}


def test_a_line_separator_in_a_json_line_is_a_letter(tmp_path):
    lines = '{"file": "dog.stl", "text": "a\u2028dog"}\n{"file": "chair.glb", "text": "a\x85chair"}\n'
    found, _ = captions(tmp_path, "captions.jsonl", lines)
    assert found == {"dog.stl": "a\u2028dog", "chair.glb": "a\x85chair"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("captions.csv", "a.glb,x\nb.glb,y\n", "2 of 2 captions name no file of .*: 'a.glb', 'b.glb'; a line is FILE"),
        ("captions.csv", "file,caption\n../../etc/passwd,x\n", "1 of 1 captions name no file"),
        ("captions.csv", "chair.glb,a red, shiny chair\n", r"line 1: it has 3 cells, not 2; put quotes .*','"),
        ("captions.csv", 'chair.glb,"a chair\ndog.stl,a dog\n', "unreadable captions in .*line 1: unexpected end"),
        ("captions.csv", "", "unreadable captions in .*it is empty"),
        ("captions.csv", "chair.glb,one\nCHAIR,two\n", "line 2: chair.glb has another caption in captions.csv, line 1"),
        ("captions.json", '{"chair.glb": "one", "chair.glb": "one"}', "the key 'chair.glb' comes twice"),
        ("captions.json", '{"chair.glb": ["one", "two"]}', r"item 1: the caption of 'chair.glb' must be text, got \["),
        ("captions.json", '[{"file": "chair.glb", "titel": "x"}]', "2 of 2 captions name no file of .*'file', 'titel'"),
        ("captions.json", '{"x.glb": "one"}', "1 of 1 captions name no file of .*: 'x.glb'"),
        ("captions.json", "[1, 2]", "unreadable captions in .*item 1 is 1, no file and caption"),
        ("captions.json", '"text"', "unreadable captions in .*it is 'text'"),
        ("captions.json", "{", "is not JSON"),
        ("captions.json", "[" * 100_000, "is not JSON"),
        ("captions.jsonl", '["chair.glb", "x"]\n{"file"\n', "captions.jsonl, line 2 is not JSON"),
    ],
)
def test_what_is_refused(tmp_path, name, text, message):
    with pytest.raises(InputFileError, match=message):
        captions(tmp_path, name, text)


def test_what_names_nothing_and_what_has_no_caption_is_said(tmp_path):
    found, said = captions(tmp_path, "captions.csv", "chair.glb,a chair\nx,1\ny,2\nz,3\nw,4\ndog.stl,\n")
    assert found == {"chair.glb": "a chair"}
    assert said == [
        f"captions.csv: 4 of 6 captions name no file of {tmp_path}: 'x', 'y', 'z', ...",
        "2 of 3 meshes have no caption and go by their file's name: 'sub/Red Car.obj', 'dog.stl'",
    ]


def test_no_caption_file_is_nothing_to_talk_about(tmp_path):
    said = []
    assert read_captions(tmp_path, MESHES, said.append) == {}
    assert said == []


def test_the_same_caption_twice_is_no_contradiction(tmp_path):
    (tmp_path / "captions.json").write_text('{"chair": "a chair"}')
    assert captions(tmp_path, "captions.csv", "chair.glb,a chair\nCHAIR.GLB,a chair\n", ["chair.glb"])[0] == {
        "chair.glb": "a chair"
    }
    (tmp_path / "captions.json").write_text('{"chair": "a throne"}')
    with pytest.raises(
        InputFileError, match=r"captions.json, item 1: chair.glb has another caption in captions.csv, l"
    ):
        captions(tmp_path, "captions.csv", "chair.glb,a chair\n", ["chair.glb"])


def test_a_name_of_several_files_wants_its_folder(tmp_path):
    meshes = ["a/chair.glb", "b/chair.glb", "b/dog.stl"]
    with pytest.raises(InputFileError, match=r"line 1: 'chair' names 2 files, 'a/chair.glb', 'b/chair.glb'; write the"):
        captions(tmp_path, "captions.csv", "chair,a chair\n", meshes)
    found, _ = captions(tmp_path, "captions.csv", "b/chair,a chair\na/dog.stl,not this one\n", meshes)
    assert found == {"b/chair.glb": "a chair"}
    # The whole path comes first; one thing in two formats is one thing.
    found, _ = captions(
        tmp_path, "captions.csv", "chair.glb,a chair\ndog,a dog\n", ["chair.glb", "b/chair.glb", "dog.stl", "dog.obj"]
    )
    assert found == {"chair.glb": "a chair", "dog.stl": "a dog", "dog.obj": "a dog"}
    found, _ = captions(tmp_path, "captions.csv", "Dog.stl,big\ndog.stl,small\n", ["Dog.stl", "dog.stl"])
    assert found == {"Dog.stl": "big", "dog.stl": "small"}


def test_paths_from_elsewhere_and_accents_of_a_mac(tmp_path):
    mac = unicodedata.normalize("NFD", "möbel.stl")
    text = f"{tmp_path}/dog.stl,a dog\n{tmp_path.name}/chair.glb,a chair\nmöbel.stl,a desk\n"
    found, said = captions(tmp_path, "captions.csv", text, ["dog.stl", "chair.glb", mac])
    assert (found, said) == ({"dog.stl": "a dog", "chair.glb": "a chair", mac: "a desk"}, [])


def test_a_caption_that_is_a_mesh_s_name(tmp_path):
    """Both columns name meshes; that with their endings is the files'."""
    assert captions(tmp_path, "captions.csv", "chair,chair.glb\n", ["chair.glb"])[0] == {"chair.glb": "chair"}


def test_a_caption_that_is_too_long_is_cut_with_a_word(tmp_path, capsys):
    for name in ("dog.stl", "cat.stl"):
        (tmp_path / name).touch()
    (tmp_path / "captions.csv").write_text(f"dog.stl,{'x' * 301}\ncat.stl,{'y' * 300}\n")
    assert [e.caption for e in read_folder(tmp_path)] == ["y" * 300, "x" * 300]
    assert capsys.readouterr().out == "1 captions are cut to 300 characters, the first that of dog.stl\n"


def test_a_folder_says_what_of_its_captions_is_lost(tmp_path, capsys):
    for name in ("socket.stl", "dog.stl", "._box.stl", "__MACOSX/dog.stl", "parts/hood_01.stl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "captions.csv").write_text("dog.stl;a dog, asleep\ncat.stl;a cat\n")
    entries = {e.id: e for e in read_folder(tmp_path)}
    assert set(entries) == {"socket-stl", "dog-stl", "parts-hood-01-stl"}
    assert entries["dog-stl"].caption == "a dog, asleep"
    assert [entries[k].noun for k in ("socket-stl", "parts-hood-01-stl")] == ["socket", "hood"]
    assert capsys.readouterr().out.splitlines() == [
        f"captions.csv: 1 of 2 captions name no file of {tmp_path}: 'cat.stl'",
        "2 of 3 meshes have no caption and go by their file's name: 'parts/hood_01.stl', 'socket.stl'",
    ]
