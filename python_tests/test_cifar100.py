"""CIFAR-100's own archive: the same tasks as CIFAR-FS's zip, and its pickles, which are read and never run."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import tarfile
from pathlib import Path

import pytest
import tiny_archives as tiny
import torch

from kfo_ext.tasks import CifarFs
from kfo_ext.tasks.datasets.inert_pickle import array_of, read_pickle

SPLITS = {"train": ("wolf", "apple", "sea"), "val": ("cattle", "otter"), "test": ("bed", "fox")}
CLASSES = sorted(name for names in SPLITS.values() for name in names)
FEW = {"ways": 2, "shots": 1, "queries": 2}
# Of each class, in no order: 3 images in train, 1 in test.
PARTS = {"train": (2, 0, 3), "test": (1,)}


def members(part: str) -> dict[str, object]:
    """What a part of the archive holds: the classes mixed, as in the original."""
    drawn = [(number, label) for number in PARTS[part] for label in reversed(range(len(CLASSES)))]
    images = [tiny.pixels(1000 * label + number).flatten() for number, label in drawn]
    return {
        "filenames": [f"{CLASSES[label]}_s_{number:06}.png" for number, label in drawn],
        "batch_label": [f"{part} batch 1 of 1"],
        "fine_labels": [label for _, label in drawn],
        "coarse_labels": [0 for _ in drawn],
        "data": torch.stack(images),
    }


def parts() -> dict[str, bytes]:
    meta = {"fine_label_names": CLASSES, "coarse_label_names": ["things"]}
    return {
        "file.txt~": b"",
        "meta": tiny.python2_pickle(meta),
        "test": tiny.python2_pickle(members("test")),
        "train": tiny.python2_pickle(members("train")),
    }


def zip_files() -> tiny.Files:
    files = {f"cifar100/splits/bertinetto/{s}.txt": "\n".join(names).encode() for s, names in SPLITS.items()}
    for label, name in enumerate(CLASSES):
        for number in range(4):
            files[f"cifar100/data/{name}/{name}_s_{number:06}.png"] = tiny.png(tiny.pixels(1000 * label + number))
    return files


@pytest.fixture
def splits(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("KFO_CACHE", str(tmp_path / "cache"))
    return tiny.write_folder(tmp_path / "bertinetto", {f"{s}.txt": "\n".join(n).encode() for s, n in SPLITS.items()})


def load(root: Path, splits: Path, split: str = "train") -> CifarFs:
    return CifarFs(root, split, splits=splits, **FEW)


def written(tmp_path: Path, **changed: bytes) -> Path:
    return tiny.write_tar(tmp_path / "cifar-100-python.tar.gz", {**parts(), **changed})


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_both_archives_give_the_same_tasks(tmp_path, splits, split):
    ours = load(written(tmp_path).parent, splits, split)
    theirs = CifarFs(tiny.write_zip(tmp_path / "cifar100.zip", zip_files()), split, **FEW)
    assert ours.names == theirs.names and torch.equal(ours.images, theirs.images)
    assert torch.equal(ours.sample(4, 3).query.x, theirs.sample(4, 3).query.x)


def test_the_second_load_reads_the_cache(tmp_path, splits, monkeypatch):
    root = written(tmp_path)
    expected = load(root, splits).images
    monkeypatch.setattr("kfo_ext.tasks.datasets.cifar_fs.read_cifar100", lambda _: pytest.fail("read twice"))
    assert torch.equal(load(root, splits).images, expected)


def test_without_splits_the_classes_are_bertinettos(tmp_path, splits):
    with pytest.raises(ValueError, match=r"93 of the splits' classes have no image there: .*is it another data set"):
        CifarFs(written(tmp_path), "train", **FEW)


class Bomb:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_bomb_does_not_go_off(tmp_path, splits, protocol):
    target = tmp_path / "bombed"
    bomb = pickle.dumps({"fine_label_names": ["a"], "data": Bomb(target)}, protocol)
    for member in ("meta", "train"):
        with pytest.raises(ValueError, match=r"cifar-100-python.tar.gz: train: "):
            load(written(tmp_path, **{member: bomb}), splits)
    with pytest.raises(ValueError, match="x: expected a numpy array"):
        array_of(read_pickle(bomb, "x")["data"], "x")
    assert not target.exists()
    # It is a bomb.
    pickle.loads(bomb)
    assert target.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_are_those_that_pickle_reads(protocol):
    shared = ["again"]
    value = {
        "text": ["é", "", "x" * 300],
        "numbers": [0, -1, 255, 2**16, -(2**31), 2**70, 0.1],
        "rest": (True, False, None, (), [], {}, (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        5: [shared, shared],
        "nested": {"a": {"b": [[1], [2, [3]]]}},
    }
    # The oldest protocols write a flag and a float in ways that plain data of CIFAR-100 does not need.
    if protocol == 0:
        value["numbers"], value["rest"] = [0, -1, 255, 2**16], ((), [], {}, (1,), (1, 2))
    read = read_pickle(pickle.dumps(value, protocol), "x")
    assert read == value and read[5][0] is read[5][1]


@pytest.mark.parametrize("protocol", [3, 4])
def test_numpys_own_arrays_of_bytes(protocol):
    numpy = pytest.importorskip("numpy")
    value = numpy.arange(24, dtype=numpy.uint8).reshape(4, 6)
    made = array_of(read_pickle(pickle.dumps({"data": value}, protocol), "x")["data"], "x")
    assert made.shape == (4, 6) and made.content == value.tobytes()
    for other in (value.astype("int8"), value.astype("float32"), numpy.asfortranarray(value), "text", value.tolist()):
        with pytest.raises(ValueError, match=r"x: expected a numpy array of uint8 in C order"):
            array_of(read_pickle(pickle.dumps({"data": other}, protocol), "x")["data"], "x")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a pickle",
        b"\x80\x02}",
        b"\x80\x02.",
        b"\x80\x02K\x01K\x02.",
        b"\x80\x02]K\x01s.",
        b"\x80\x02h\x05.",
        b"\x80\x02e.",
        b"\x80\x02}](K\x01e]u.",
        b"\x80\x02}]K\x01s.",
        b"\x80\x02U\x05ab.",
        b"\x80\x02T\xff\xff\xff\x7fab.",
        b"\x80\x02K\x01b.",
        b"\x80\x02K\x01}b.",
        b"(lp0\nP1\n.",
        b"\x80\x02ccopy_reg\n_reconstructor\n)\x81.",
        b"\x80\x02\x82\x01.",
        b"(i__builtin__\nlist\n.",
        b"\x80\x02K\x01\x86.",
    ],
)
def test_programs_that_are_refused(content):
    with pytest.raises(ValueError, match="x is damaged or no pickle of plain data"):
        read_pickle(content, "x")


def test_every_cut_and_many_flips_of_a_pickle_end_in_an_error_or_a_value():
    content = tiny.python2_pickle({"fine_label_names": ["a", "b"], "data": tiny.pixels(0, 1, 3)[0]})
    for end in range(len(content)):
        with pytest.raises(ValueError, match="x is damaged"):
            read_pickle(content[:end], "x")
    for at in range(len(content)):
        for bit in range(8):
            flipped = bytearray(content)
            flipped[at] ^= 1 << bit
            try:
                array_of(read_pickle(bytes(flipped), "x")["data"], "x")
            except (ValueError, KeyError, TypeError):
                continue


def test_a_pickle_that_would_grow_without_end_takes_no_time():
    # Each tuple holds the one before twice: hashing or printing the last one would take 2^60 steps.
    doubled = b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60))
    with pytest.raises(ValueError, match="keys that are text or numbers"):
        read_pickle(b"\x80\x02}K\x01" + doubled + b"K\x02s.", "x")
    with pytest.raises(ValueError, match="x: expected a numpy array of uint8"):
        array_of(read_pickle(b"\x80\x02K\x01" + doubled + b".", "x"), "x")


def test_an_array_of_another_size_than_it_says_is_refused():
    content = tiny.python2_pickle({"data": tiny.pixels(0, 1, 3)[0]})
    shape = b"J\3\0\0\0J\3\0\0\0\x86"
    assert array_of(read_pickle(content, "x")["data"], "x").shape == (3, 3)
    with pytest.raises(ValueError, match=r"x: expected a numpy array .*9 bytes for"):
        array_of(read_pickle(content.replace(shape, b"J\4" + shape[2:]), "x")["data"], "x")


def without(table: dict[str, object], *names: str) -> bytes:
    return tiny.python2_pickle({name: value for name, value in table.items() if name not in names})


def changed(**values: object) -> bytes:
    return tiny.python2_pickle({**members("test"), **values})


@pytest.mark.parametrize(
    ("part", "content", "message"),
    [
        ("meta", without({"fine_label_names": CLASSES}, "fine_label_names"), "meta: expected names as 'fine_label_n"),
        ("meta", tiny.python2_pickle({"label_names": CLASSES}), r"found \['label_names'\]; is it CIFAR-100"),
        ("meta", pickle.dumps(["a"], 2), "meta: expected a dictionary, got list"),
        ("test", without(members("test"), "filenames"), "test: expected names as 'filenames'"),
        ("test", without(members("test"), "data"), "test: data: expected a numpy array"),
        (
            "test",
            without(members("test"), "fine_labels"),
            "test: expected 3072 bytes and a fine label for each of the 7",
        ),
        ("test", changed(fine_labels=[0]), "test: expected 3072 bytes and a fine label for each of the 7 files"),
        ("test", changed(fine_labels=[0] * 6 + [7]), "test: expected fine labels from 0 to 6, that of apple_s_000001"),
        ("test", changed(data=tiny.pixels(0)[0][:7]), r"test: expected 3072 bytes .*, got \(7, 32\) bytes"),
        ("test", b"\x80\x02}", "test is damaged or no pickle"),
    ],
)
def test_archives_of_other_things(tmp_path, splits, part, content, message):
    with pytest.raises(ValueError, match=rf"cifar-100-python.tar.gz: .*{message}"):
        load(written(tmp_path, **{part: content}), splits)


def test_a_missing_member_is_named(tmp_path, splits):
    some = {name: content for name, content in parts().items() if name != "test"}
    path = tiny.write_tar(tmp_path / "cifar-100-python.tar.gz", some)
    with pytest.raises(ValueError, match=r"tar.gz: expected the files meta, train, test, found no test"):
        load(path, splits)


@pytest.mark.parametrize("damage", [tiny.cut, tiny.emptied, tiny.foreign], ids=lambda damage: damage.__name__)
def test_a_damaged_archive_is_named(tmp_path, splits, damage):
    path = written(tmp_path)
    damage(path)
    with pytest.raises(ValueError, match=r"cifar-100-python.tar.gz is damaged or no tar archive .*; download it again"):
        load(path, splits)


def test_an_archive_of_absurd_size_is_refused(tmp_path, splits, monkeypatch):
    path = written(tmp_path)
    monkeypatch.setattr("kfo_ext.tasks.datasets.cifar100.MOST_BYTES", 1000)
    with pytest.raises(ValueError, match="more than any CIFAR-100"):
        load(path, splits)


def test_links_in_the_archive_are_no_files(tmp_path, splits):
    path = tmp_path / "cifar-100-python.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in parts().items():
            info = tarfile.TarInfo(f"cifar-100-python/{name}")
            info.size = len(content)
            if name == "meta":
                info.size, info.type, info.linkname = 0, tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(info, io.BytesIO(content))
    with pytest.raises(ValueError, match="found no meta"):
        load(path, splits)


def test_the_tiny_pickles_are_python_2s():
    """Python reads them as it reads the original's, with numpy."""
    pytest.importorskip("numpy")
    for part in ("train", "test"):
        content = tiny.python2_pickle(members(part))
        assert {op.name for op, _, _ in pickletools.genops(content)} >= {"SHORT_BINSTRING", "BINSTRING", "GLOBAL"}
        assert torch.equal(torch.as_tensor(pickle.loads(content, encoding="latin-1")["data"]), members(part)["data"])
