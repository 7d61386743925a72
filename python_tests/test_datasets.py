"""CIFAR-FS, images listed by csv files, trees of class folders: from tiny archives, whole and broken; and real ones."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import tiny_archives as tiny
import torch

from kfo_ext.tasks import FAMILIES as TABLE
from kfo_ext.tasks import CifarFs, CsvImages, Folders, ImageClasses, batches, make_family
from kfo_ext.tasks.datasets import bertinetto

DATA = Path(os.environ.get("KFO_DATA_ROOT", Path(__file__).resolve().parents[2] / "shared" / "data"))
IMAGES = 4
CLASSES = {"train": ("wolf", "apple", "sea"), "val": ("cattle", "otter"), "test": ("bed", "fox")}
FAMILIES = {"cifar_fs": CifarFs, "csv_images": CsvImages, "folders": Folders}
FILE = {"cifar_fs": "cifar100.zip", "csv_images": "grocery.zip", "folders": "birds.zip"}
FEW = {"ways": 2, "shots": 1, "queries": 2}


def image_of(name: str, number: int) -> torch.Tensor:
    return tiny.pixels(1000 * sum(map(ord, name)) + number)


def cifar_files() -> tiny.Files:
    """The files of the CIFAR-FS zip, images of a class in no order."""
    files = {f"cifar100/splits/bertinetto/{s}.txt": "\n".join(names).encode() + b"\n" for s, names in CLASSES.items()}
    for names in CLASSES.values():
        for name in names:
            for number in (2, 0, 3, 1):
                files[f"cifar100/data/{name}/{name}_s_{number:06}.png"] = tiny.png(image_of(name, number))
    return files


def csv_files() -> tiny.Files:
    files = {}
    for split, names in CLASSES.items():
        rows = [f"{name}{number}.png,{name}" for number in (2, 0, 3, 1) for name in names]
        files[f"grocery/{split}.csv"] = "\n".join(["filename,label", *rows, ""]).encode()
        for name in names:
            for number in range(IMAGES):
                files[f"grocery/images/{name}{number}.png"] = tiny.png(image_of(name, number))
    return files


def folder_files() -> tiny.Files:
    return {
        f"birds/{split}/{name}/{number}.png": tiny.png(image_of(name, number))
        for split, names in CLASSES.items()
        for name in names
        for number in range(IMAGES)
    }


WRITERS = {"cifar_fs": cifar_files, "csv_images": csv_files, "folders": folder_files}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KFO_CACHE", str(tmp_path / "cache"))


@pytest.fixture(params=FAMILIES)
def dataset(request) -> str:
    return request.param


def archive_of(dataset: str, tmp_path: Path) -> Path:
    return tiny.write_zip(tmp_path / FILE[dataset], WRITERS[dataset]())


def load(dataset: str, root: Path, split: str = "train", **options) -> ImageClasses:
    side = {} if dataset == "cifar_fs" else {"side": 32}
    return FAMILIES[dataset](root, split, **{**FEW, **side, **options})


@pytest.mark.parametrize("split", CLASSES)
def test_images_and_classes_are_those_of_the_files(dataset, tmp_path, split):
    family = load(dataset, archive_of(dataset, tmp_path), {"val": "validation"}.get(split, split))
    assert family.names == tuple(sorted(CLASSES[split]))
    expected = torch.stack([image_of(name, number) for name in family.names for number in range(IMAGES)])
    assert torch.equal(family.images, expected)
    batch = family.sample(0, 3)
    assert batch.support.x.shape == (3, 2, 3, 32, 32) and batch.query.x.shape == (3, 4, 3, 32, 32)
    drawn = family.draw(0, 3)[..., :1].flatten(1)
    torch.testing.assert_close(batch.support.x, expected[drawn].float() / 255, rtol=0, atol=0)


@pytest.mark.parametrize("workers", [1, 3])
def test_streams_do_not_depend_on_workers_or_the_cache(dataset, tmp_path, workers):
    root = archive_of(dataset, tmp_path)
    first, second = load(dataset, root, seed=5), load(dataset, root, seed=5)
    stream = batches(second, 2, workers=workers)
    for index in range(5):
        assert all(map(torch.equal, first.sample(index, 2).query, next(stream).query))
    stream.close()


@pytest.mark.parametrize("dataset", ["csv_images", "folders"])
@pytest.mark.parametrize("threads", [1, 2])
def test_an_unpacked_archive_gives_the_same(dataset, tmp_path, threads):
    torch.set_num_threads(threads)
    folder = tiny.write_folder(tmp_path / "unpacked", WRITERS[dataset]())
    a, b = load(dataset, archive_of(dataset, tmp_path)), load(dataset, folder)
    assert a.names == b.names and all(map(torch.equal, a.sample(3, 2).support, b.sample(3, 2).support))
    assert (a.name, b.name) == (FILE[dataset].removesuffix(".zip"), "unpacked")


def test_the_second_load_decodes_nothing(dataset, tmp_path, monkeypatch):
    root = archive_of(dataset, tmp_path)
    expected = load(dataset, root).images
    monkeypatch.setattr(f"kfo_ext.tasks.datasets.{dataset}.decoded", lambda *_, **__: pytest.fail("decoded twice"))
    assert torch.equal(load(dataset, root).images, expected)
    # The cache is of these bytes: other ones are decoded anew.
    tiny.added("cifar100/data/apple/new.png" if dataset == "cifar_fs" else "other.txt")(root)
    with pytest.raises(pytest.fail.Exception, match="decoded twice"):
        list(load(dataset, root).images)


def test_a_folder_of_the_archive_is_a_root(tmp_path):
    for dataset in ("cifar_fs", "csv_images"):
        folder = tmp_path / dataset
        folder.mkdir()
        assert load(dataset, archive_of(dataset, folder).parent).names == ("apple", "sea", "wolf")


def test_families_are_made_by_name(dataset, tmp_path):
    root = archive_of(dataset, tmp_path)
    family = make_family(dataset, "test", root=root, seed=2, **FEW)
    assert isinstance(family, FAMILIES[dataset])
    options = TABLE[dataset].options(root=str(root), **FEW)
    assert family.images.shape[1:] == options.input_shape and options.outputs == 2
    assert make_family(dataset, "test", root=str(root), device="meta", **FEW).sample(0, 1).query.x.is_meta


@pytest.mark.parametrize("damage", [tiny.cut, tiny.emptied, tiny.foreign, tiny.flipped], ids=lambda f: f.__name__)
def test_a_damaged_archive_is_named(dataset, tmp_path, damage):
    root = archive_of(dataset, tmp_path)
    damage(root)
    with pytest.raises(ValueError, match=rf"{FILE[dataset]} is (no whole zip archive|damaged)"):
        load(dataset, root, "train")
    assert not list((tmp_path / "cache").glob("*"))


BROKEN_IMAGES = {
    "no image": (b"<html></html>", "is no whole image"),
    "cut image": (tiny.png(tiny.pixels(0))[:500], "is no whole image"),
    "transparent": (tiny.png(tiny.pixels(0, 4), "RGBA"), "expected"),
    "too large": (tiny.huge_png(), "is no whole image"),
}


@pytest.mark.parametrize("kind", BROKEN_IMAGES)
def test_a_broken_image_is_named(dataset, tmp_path, kind):
    content, message = BROKEN_IMAGES[kind]
    files = WRITERS[dataset]()
    name = next(name for name in files if "apple" in name and name.endswith(".png"))
    root = tiny.write_zip(tmp_path / FILE[dataset], {**files, name: content})
    with pytest.raises(ValueError, match=rf"{FILE[dataset]}: {name}:? {message}"):
        load(dataset, root)


def test_an_archive_with_a_path_out_of_it_is_refused(dataset, tmp_path):
    root = archive_of(dataset, tmp_path)
    tiny.added("../evil.png")(root)
    with pytest.raises(ValueError, match=r"holds the path '../evil.png', which leads out of it"):
        load(dataset, root)


@pytest.mark.parametrize("dataset", ["csv_images", "folders"])
def test_a_side_that_no_image_is_resized_to_is_refused_at_once(dataset, tmp_path):
    with pytest.raises(ValueError, match="side: expected at most 8192 pixels, got 1000000"):
        load(dataset, archive_of(dataset, tmp_path), side=10**6)


def test_too_few_images_name_the_class(dataset, tmp_path):
    files = {name: content for name, content in WRITERS[dataset]().items() if "sea" not in name or "0" in name}
    if dataset == "csv_images":
        files["grocery/train.csv"] = b"\n".join(
            line for line in files["grocery/train.csv"].splitlines() if b"sea" not in line or b"sea0" in line
        )
    if dataset == "cifar_fs":
        files = {name: content for name, content in cifar_files().items() if "sea_s" not in name or "_000000" in name}
    root = tiny.write_zip(tmp_path / FILE[dataset], files)
    with pytest.raises(
        ValueError, match=r"expected at most 1 \(the examples of class 'sea', .* train split\), got 1 \+ 2"
    ):
        load(dataset, root)
    with pytest.raises(ValueError, match=r"ways: expected 2 to 3 \(the train split has 3 classes\), got 5"):
        load(dataset, archive_of(dataset, tmp_path), ways=5)


@pytest.mark.parametrize("kind", ["missing", "overlap", "empty"])
def test_wrong_splits_of_cifar_fs(tmp_path, kind):
    files = cifar_files()
    splits = {split: f"cifar100/splits/bertinetto/{split}.txt" for split in CLASSES}
    if kind == "missing":
        files[splits["val"]] += b"dragon\nunicorn\n"
    files[splits["test"]] += {"missing": b"", "overlap": b"wolf\n", "empty": b""}[kind]
    if kind == "empty":
        files[splits["test"]] = b"\n"
    message = {
        "missing": "2 of the splits' classes have no image there: 'dragon', 'unicorn'; is it another data set",
        "overlap": "class 'wolf' is in train and in test; few-shot splits hold different classes",
        "empty": "expected classes in each of train, validation, test, got none in test",
    }[kind]
    with pytest.raises(ValueError, match=message):
        load("cifar_fs", tiny.write_zip(tmp_path / "cifar100.zip", files))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("apple/apple_s_000001.png", tiny.png(tiny.pixels(0, side=28))), "expected 32 x 32 pixels .*, got 28 x 28"),
        (("apple/apple_s_000001.png", tiny.png(tiny.pixels(0, 1), "L")), "expected 32 x 32 pixels .* of mode L"),
        (("more/apple/apple_s_000009.png", tiny.png(tiny.pixels(0))), "two folders of images apple"),
    ],
)
def test_images_that_are_not_of_cifar_fs(tmp_path, change, message):
    name, content = change
    files = {**cifar_files(), f"cifar100/data/{name}": content}
    with pytest.raises(ValueError, match=rf"cifar100.zip.* {message}"):
        load("cifar_fs", tiny.write_zip(tmp_path / "cifar100.zip", files))


def test_splits_of_ones_own(tmp_path):
    splits = tmp_path / "splits.json"
    splits.write_text(json.dumps({"train": ["fox", "bed"], "val": ["apple"], "test": ["sea"]}))
    root = archive_of("cifar_fs", tmp_path)
    assert load("cifar_fs", root, splits=splits).names == ("bed", "fox")
    splits.write_text(json.dumps({"train": ["sea", "bed"], "val": ["apple"], "test": ["fox"]}))
    assert load("cifar_fs", root, splits=splits).names == ("bed", "sea")
    splits.write_text(json.dumps({"train": ["fox", "bed"], "val": ["apple"], "test": ["sea"]}))
    files = {f"all/{name.split('/', 2)[2]}": content for name, content in folder_files().items()}
    flat = tiny.write_zip(tmp_path / "flat.zip", files)
    assert load("folders", flat, splits=splits).names == ("bed", "fox")
    lines = tiny.write_folder(
        tmp_path / "lists", {"train.txt": b"all/fox\nbed\n", "val.txt": b"apple\n", "test.txt": b"sea\n\n"}
    )
    assert load("folders", flat, splits=lines).names == ("all/fox", "bed")
    # Some editors begin a file with a mark of its encoding.
    for file in (splits, lines / "train.txt"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
        assert load("folders", flat, splits=file if file == splits else lines).names[-1] in ("fox", "bed")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "splits.json is no JSON"),
        ('["a"]', r'splits.json: expected \{"train": '),
        ('{"train": ["fox"], "val": ["bed"]}', r'splits.json: expected \{"train": '),
        ('{"train": ["fox"], "val": ["bed"], "test": [1]}', r'splits.json: expected \{"train": '),
        ('{"train": ["fox"], "val": ["bed"], "test": []}', "got none in test"),
        ('{"train": ["fox", "fox"], "val": ["bed"], "test": ["sea"]}', "class 'fox' is twice in train"),
        ('{"train": ["fox"], "val": ["bed"], "test": ["fox"]}', "class 'fox' is in train and in test"),
        ('{"train": ["fox"], "val": ["bed"], "test": ["dragon"]}', "1 of the splits' classes have no image there"),
        ('{"train": ["fox"], "val": ["test/fox"], "test": ["sea"]}', "'fox' and 'test/fox' are the same folder"),
    ],
)
def test_wrong_files_of_splits(tmp_path, content, message):
    splits = tmp_path / "splits.json"
    splits.write_text(content)
    with pytest.raises(ValueError, match=message):
        load("folders", archive_of("folders", tmp_path), splits=splits)


def test_a_class_name_that_may_be_two_folders(tmp_path):
    files = {f"{top}/{name}/0.png": tiny.png(tiny.pixels(0)) for top in "ab" for name in ("x", "y")}
    root = tiny.write_zip(tmp_path / "data.zip", files)
    splits = tmp_path / "splits.json"
    splits.write_text(json.dumps({"train": ["x"], "val": ["a/y"], "test": ["b/y"]}))
    with pytest.raises(ValueError, match="class 'x' may be a/x or b/x: give more of the path"):
        load("folders", root, splits=splits)
    splits.write_text(json.dumps({"train": ["a/x", "b/x"], "val": ["a/y"], "test": ["b/y"]}))
    with pytest.raises(ValueError, match=r"expected at most 1 \(the examples of class 'a/x'"):
        load("folders", root, splits=splits)


def test_folders_that_share_a_class_are_refused(tmp_path):
    files = {**folder_files(), "birds/test/wolf/0.png": tiny.png(tiny.pixels(0))}
    with pytest.raises(ValueError, match="class 'wolf' is in train and in test"):
        load("folders", tiny.write_zip(tmp_path / "birds.zip", files))


@pytest.mark.parametrize("copy", ["birds/validation/otter", "small/val/otter"])
def test_a_class_in_two_folders_of_a_split_is_refused(tmp_path, copy):
    """An image may be in both: a task would be judged by what it adapted on."""
    files = {**folder_files(), f"{copy}/0.png": tiny.png(image_of("otter", 0))}
    both = r"class 'otter' of validation lies in birds/val/otter and in " + copy
    with pytest.raises(ValueError, match=both):
        load("folders", tiny.write_zip(tmp_path / "birds.zip", files))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"birds/loose.png": tiny.png(tiny.pixels(0))}, "birds holds images and lies in no folder train, val or test"),
        ({"birds/train/loose.png": tiny.png(tiny.pixels(0))}, "birds/train holds images and lies in no folder"),
    ],
)
def test_folders_with_images_outside_a_class(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        load("folders", tiny.write_zip(tmp_path / "birds.zip", {**folder_files(), **change}))


def test_gray_folders_have_one_channel(tmp_path):
    family = load("folders", archive_of("folders", tmp_path), colour="gray")
    assert family.images.shape == (12, 1, 32, 32)
    with pytest.raises(ValueError, match="colour: expected one of gray, rgb, got 'hsv'"):
        load("folders", archive_of("folders", tmp_path), colour="hsv")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("filename,label", "label,filename"), "train.csv: expected the columns filename,label, got label,filename"),
        (("apple0.png,apple", "apple0.png"), r"train.csv, line \d+: expected filename,label, got 'apple0.png'"),
        (("apple0.png,apple", "apple0.png,"), r"train.csv, line \d+: expected filename,label"),
        (("apple0.png,apple", "apple1.png,apple"), r"train.csv, line \d+: apple1.png is listed twice"),
        (("apple0.png", "apple9.png"), "lacks 1 of the 12 images of grocery/train.csv, say grocery/images/apple9.png"),
        (("apple0.png", "../../apple0.png"), "lacks 1 of the 12 images"),
        (("apple", "bed"), "class 'bed' is in train and in test"),
        (("apple0.png,apple", "bed0.png,apple"), "image bed0.png is in train and in test; remove one of them"),
        (("\nwolf2.png,wolf", ""), None),
    ],
)
def test_wrong_csv_files(tmp_path, change, message):
    files = csv_files()
    files["grocery/train.csv"] = files["grocery/train.csv"].replace(*(one.encode() for one in change))
    root = tiny.write_zip(tmp_path / "grocery.zip", files)
    if message is None:
        # Images beside the listed ones are none of the data set.
        assert load("csv_images", root).draws.sizes.tolist() == [4, 4, 3]
        return
    with pytest.raises(ValueError, match=message):
        load("csv_images", root)


def test_a_missing_csv_file_is_named(tmp_path):
    files = csv_files()
    del files["grocery/val.csv"]
    with pytest.raises(ValueError, match=r"grocery.zip has train.csv, and no grocery/val.csv"):
        load("csv_images", tiny.write_zip(tmp_path / "grocery.zip", files))
    files = {**csv_files(), "old/train.csv": b""}
    with pytest.raises(ValueError, match=r"holds several files train.csv: in grocery/, old/"):
        load("csv_images", tiny.write_zip(tmp_path / "two.zip", files))


@pytest.mark.parametrize("name", ["mini-imagenet-cache-train.pkl", "miniImageNet_train.pickle"])
@pytest.mark.parametrize("dataset", ["csv_images", "folders"])
def test_pickled_caches_are_refused(tmp_path, name, dataset):
    bomb = b"cos\nsystem\n(S'touch /tmp/kfo-bomb'\ntR."
    folder = tiny.write_folder(tmp_path / "data", {name: bomb})
    packed = tiny.write_zip(tmp_path / "data.zip", {f"data/{name}": bomb})
    for root in (folder, packed, folder / name):
        with pytest.raises(
            ValueError, match=rf"root: .*pickled cache .*{name}, and unpickling a file runs .*; expected"
        ):
            load(dataset, root)


@pytest.mark.parametrize("other", FAMILIES)
def test_a_root_of_another_data_set(dataset, other, tmp_path):
    if other == dataset or (dataset, other) == ("folders", "csv_images"):
        return
    with pytest.raises((ValueError, FileNotFoundError), match=r"root: .* has no |have no image there|no folder train"):
        load(dataset, archive_of(other, tmp_path))


def test_a_folder_without_an_archive_of_cifar_fs(tmp_path):
    archive_of("csv_images", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"root: .* has none; expected cifar100.zip of CIFAR-FS or"):
        load("cifar_fs", tmp_path)


def test_folders_of_one_folder_of_images_are_refused(tmp_path):
    with pytest.raises(ValueError, match="grocery/images holds images and lies in no folder train, val or test"):
        load("folders", archive_of("csv_images", tmp_path))


def test_a_missing_root_says_what_belongs_there(dataset, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"root: .*nowhere does not exist; expected"):
        load(dataset, tmp_path / "nowhere")


def test_several_archives_in_a_folder_are_named(tmp_path):
    for name in ("a.zip", "b.zip"):
        tiny.write_zip(tmp_path / name, csv_files())
    with pytest.raises(ValueError, match=r"root: .* holds several archives, a.zip, b.zip: name one"):
        load("csv_images", tmp_path)


def real(file: str) -> Path:
    path = DATA / file
    if not path.is_file():
        pytest.skip(f"no {path} (set KFO_DATA_ROOT)")
    return path


def test_the_real_cifar_fs(tmp_path):
    path = real("cifar_fs/cifar100.zip")
    family = CifarFs(path.parent, "validation", cache=tmp_path)
    assert family.names == tuple(bertinetto.CLASSES["validation"]) and family.images.shape == (9600, 3, 32, 32)
    assert [len(names) for names in bertinetto.CLASSES.values()] == [64, 16, 20]
    batch = family.sample(0, 16)
    assert batch.support.x.shape == (16, 25, 3, 32, 32)
    mean = family.images.double().mean((0, 2, 3)) / 255
    torch.testing.assert_close(mean, torch.tensor([0.4867, 0.4786, 0.4391], dtype=torch.float64), rtol=0, atol=1e-4)
    again = CifarFs(path, "validation", cache=tmp_path)
    assert torch.equal(again.sample(0, 16).query.x, batch.query.x)


def test_the_splits_of_the_real_cifar_fs_are_ours():
    from kfo_ext.tasks.sources import open_source

    with open_source(real("cifar_fs/cifar100.zip")) as source:
        for split, stem in (("train", "train"), ("validation", "val"), ("test", "test")):
            listed = source.read_text(f"cifar100/splits/bertinetto/{stem}.txt").split()
            assert sorted(listed) == bertinetto.CLASSES[split]


def test_the_real_grocery84(tmp_path):
    path = real("grocery84/grocery84.zip")
    sizes = {}
    for split in ("train", "validation", "test"):
        family = CsvImages(path.parent, split, cache=tmp_path)
        assert family.name == "grocery84" and family.images.shape[1:] == (3, 84, 84)
        assert family.sample(0, 4).query.x.shape == (4, 25, 3, 84, 84)
        sizes[split] = (len(family.names), len(family.images))
    assert sizes == {"train": (48, 3002), "validation": (12, 925), "test": (21, 1494)}
