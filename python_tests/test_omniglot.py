"""Omniglot: archives and their damages, the cache, the download; and the real archives where they are."""

from __future__ import annotations

import io
import os
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from kfo_ext.tasks import Omniglot, download_omniglot
from kfo_ext.tasks.archives import Archive, image_entries, listing_of, sha256_of
from kfo_ext.tasks.cache import cache_folder
from kfo_ext.tasks.datasets import omniglot

Image = pytest.importorskip("PIL.Image", reason="decoding needs Pillow")

FAKE = {"images_background": ("Beta", 4), "images_evaluation": ("Alpha", 3)}
REPOSITORY = Path(__file__).resolve().parents[1]
REAL = Path(os.environ.get("KFO_DATA_ROOT", REPOSITORY.parent / "shared" / "data"), "omniglot")
needs_data = pytest.mark.skipif(
    not (REAL / "images_background.zip").is_file(), reason=f"no Omniglot archives in {REAL} (set KFO_DATA_ROOT)"
)


def png(row: int, column: int) -> bytes:
    """A 105x105 1-bit image, white but for a black block of 35x35."""
    image = Image.new("1", (105, 105), 1)
    image.paste(0, (35 * column, 35 * row, 35 * column + 35, 35 * row + 35))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def write_zip(path: Path, compression: int = zipfile.ZIP_STORED) -> None:
    """A fake archive; the block lies in the row of its character and, for odd drawers, in the right column."""
    alphabet, characters = FAKE[path.stem]
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr(f"{path.stem}/", b"")
        for character in reversed(range(characters)):
            for drawer in range(20):
                name = f"{path.stem}/{alphabet}/character{character + 1:02}/{character:04}_{drawer + 1:02}.png"
                file.writestr(name, png(character % 3, 2 * (drawer % 2)))


def described(path: Path) -> Archive:
    with zipfile.ZipFile(path) as file:
        return Archive(path.name, path.stat().st_size, sha256_of(path), listing_of(image_entries(file)))


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """A data root with small archives that pass for the official ones, and an empty cache of its own."""
    folder = tmp_path / "data"
    folder.mkdir()
    for stem in FAKE:
        write_zip(folder / f"{stem}.zip")
    monkeypatch.setattr(omniglot, "ARCHIVES", tuple(described(folder / f"{stem}.zip") for stem in FAKE))
    monkeypatch.setattr(omniglot, "CLASSES", {"train": 3, "validation": 2, "test": 2})
    monkeypatch.setenv("KFO_CACHE", str(tmp_path / "cache"))
    return folder


def load(root: Path, split: str = "train", **options) -> Omniglot:
    return Omniglot(root, split, ways=2, rotations=False, **options)


def cache_file(tmp_path: Path) -> Path:
    (path,) = (tmp_path / "cache").iterdir()
    return path


def test_images_are_decoded_as_ink_on_zero(root):
    family = load(root, "validation")
    images = family.images
    assert images.shape == (40, 1, 28, 28) and images.dtype == torch.uint8
    for name, drawers in zip(family.names, images.view(2, 20, 28, 28), strict=True):
        row = (int(name[-2:]) - 1) % 3
        for drawer, image in enumerate(drawers):
            blocks = image[:27, :27].unfold(0, 9, 9).unfold(1, 9, 9)[..., 3:6, 3:6].float().mean((-1, -2))
            expected = torch.zeros(3, 3)
            expected[row, 2 * (drawer % 2)] = 255
            torch.testing.assert_close(blocks, expected)


def test_splits_are_disjoint_and_do_not_follow_the_seed(root):
    names = {split: load(root, split).names for split in omniglot.CLASSES}
    together = sorted(name for split in names.values() for name in split)
    assert together == [f"Alpha/character0{i}" for i in (1, 2, 3)] + [f"Beta/character0{i}" for i in (1, 2, 3, 4)]
    assert load(root, "train", seed=9).names == names["train"]


def test_images_lie_on_the_device(root):
    here, there = load(root), load(root, device="meta")
    assert there.images.device.type == there.sample(0, 2).query.x.device.type == "meta"
    assert torch.equal(there.draw(0, 2), here.draw(0, 2))
    drawn, sampled = here.batch(here.draw(0, 2)), here.sample(0, 2)
    assert torch.equal(drawn.support.x, sampled.support.x) and torch.equal(drawn.query.x, sampled.query.x)


def test_a_repacked_archive_gives_the_same_tasks(root):
    expected = load(root).sample(0, 2).support.x
    for stem in FAKE:
        write_zip(root / f"{stem}.zip", zipfile.ZIP_DEFLATED)
    assert torch.equal(load(root).sample(0, 2).support.x, expected)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("flag_bits", 1, "is encrypted"),
        ("compress_type", 9, "method 9: "),
        # Of an old Zstandard, and of nothing.
        ("compress_type", 20, "method 20: "),
        ("compress_type", 77, "method 77: "),
    ],
)
@pytest.mark.parametrize("official", [False, True])
def test_entries_that_python_does_not_read(root, monkeypatch, field, value, reason, official):
    path = root / "images_background.zip"
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        entry = image_entries(file)[7]
    name = entry.filename.encode()
    # Flags, then the method: 24 bytes before the name in the entry's own header, 38 in the directory.
    for at, before in ((content.index(name), 24), (content.rindex(name), 38)):
        offset = at - before + (2 if field == "compress_type" else 0)
        content[offset : offset + 2] = value.to_bytes(2, "little")
    path.write_bytes(content)
    if official:
        monkeypatch.setattr(omniglot, "ARCHIVES", tuple(described(root / f"{stem}.zip") for stem in FAKE))
    with pytest.raises(
        ValueError, match=rf"images_background\.zip is damaged or another archive \({entry.filename}, packed by method "
    ) as error:
        load(root)
    assert reason in str(error.value)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_entries_whose_packed_bytes_are_damaged(root, method):
    path = root / "images_background.zip"
    write_zip(path, method)
    with zipfile.ZipFile(path) as file:
        entry = image_entries(file)[7]
    content = bytearray(path.read_bytes())
    start = entry.header_offset + 30 + len(entry.filename)
    content[start + 4 : start + 14] = b"\xff" * 10
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"images_background\.zip is damaged or another archive \({entry.filename}, packed by method "
    ):
        load(root)


def test_a_user_without_a_home(monkeypatch):
    for name in ("KFO_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(ValueError, match="KFO_CACHE: expected a folder"):
        cache_folder()


def test_a_cache_that_cannot_be_read_is_built_anew(root, tmp_path, monkeypatch):
    expected = load(root).images
    open_file = Path.open

    def refuse(path, mode="r", **options):
        if path.parent == tmp_path / "cache" and mode == "rb":
            raise PermissionError(13, "Permission denied", str(path))
        return open_file(path, mode, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.warns(UserWarning, match="cannot read the cache file .*Permission denied"):
        assert torch.equal(load(root).images, expected)


def test_the_second_load_reads_the_cache(root, monkeypatch):
    expected = load(root).sample(0, 2).support.x
    monkeypatch.delattr(omniglot, "_plan")
    assert torch.equal(load(root).sample(0, 2).support.x, expected)
    assert sorted(path.name for path in root.iterdir()) == ["images_background.zip", "images_evaluation.zip"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:-2000] + bytes([data[-2000] ^ 1]) + data[-1999:],
        lambda data: b"",
        lambda data: b"something else\n",
    ],
    ids=["truncated", "flipped bit", "empty", "foreign"],
)
def test_a_damaged_cache_is_built_anew(root, tmp_path, damage):
    expected = load(root).sample(0, 2).support.x
    path = cache_file(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    with pytest.warns(UserWarning, match=f"{path.name} is damaged; building it anew"):
        family = load(root)
    assert torch.equal(family.sample(0, 2).support.x, expected)
    assert path.read_bytes() == whole


def test_a_cache_that_cannot_be_written_only_warns(root, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.warns(UserWarning, match=f"cannot write the cache file {blocked}"):
        family = load(root, cache=blocked / "cache")
    assert family.sample(0, 1).support.x.shape == (1, 10, 1, 28, 28)


def test_where_the_cache_lies(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KFO_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "kfo_ext"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "kfo_ext"
    monkeypatch.setenv("KFO_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    assert cache_folder(tmp_path / "argument") == tmp_path / "argument"


def test_a_missing_root_says_what_belongs_there(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"root: .*nowhere is no folder; .*images_background.zip and images_eval"
    ):
        Omniglot(tmp_path / "nowhere", "train")


def test_a_missing_archive_is_named(root):
    (root / "images_evaluation.zip").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"has no images_evaluation.zip, .*download=True .*--data-root .*--download"
    ):
        load(root)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def replaced(path: Path) -> None:
    shutil.copy(path.with_name("images_evaluation.zip"), path)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 8] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut, replaced, emptied, flipped])
def test_a_damaged_archive_is_refused(root, tmp_path, damage):
    path = root / "images_background.zip"
    official = omniglot.ARCHIVES[0]
    damage(path)
    with pytest.raises(ValueError, match=r"images_background.zip is damaged or another archive") as error:
        load(root)
    got = f"got {path.stat().st_size} bytes with sha256 {sha256_of(path)}"
    assert f"expected {official.size} bytes with sha256 {official.sha256}" in str(error.value)
    assert got in str(error.value)
    assert not (tmp_path / "cache").exists()


def test_download_fetches_what_is_missing(root, tmp_path):
    target = tmp_path / "new" / "root"
    download_omniglot(target, source=root.as_uri())
    assert torch.equal(load(target).sample(0, 2).support.x, load(root).sample(0, 2).support.x)
    assert len(list(target.iterdir())) == 2
    # nothing is fetched when all is there
    download_omniglot(target, source="file:///nowhere")


def test_download_refuses_another_file(root, tmp_path):
    cut(root / "images_evaluation.zip")
    target = tmp_path / "new"
    with pytest.raises(ValueError, match=r"images_evaluation.zip: expected \d+ bytes with sha256 .*, got \d+ bytes"):
        download_omniglot(target, source=root.as_uri())
    assert [path.name for path in target.iterdir()] == ["images_background.zip"]


def test_download_without_a_network_names_url_and_target(tmp_path):
    target = tmp_path / "new"
    with pytest.raises(ConnectionError) as error:
        download_omniglot(target, source="http://127.0.0.1:9")
    assert "cannot download http://127.0.0.1:9/images_background.zip" in str(error.value)
    assert f"put it at {target / 'images_background.zip'}" in str(error.value)
    assert not list(target.iterdir())


@pytest.fixture(scope="module")
def real_cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@needs_data
def test_the_real_archives(real_cache):
    families = {split: Omniglot(REAL, split, cache=real_cache) for split in ("train", "validation", "test")}
    assert {split: len(family.names) for split, family in families.items()} == {
        "train": 1100,
        "validation": 100,
        "test": 423,
    }
    names = [name for family in families.values() for name in family.names]
    assert len(set(names)) == 1623 and len({name.split("/")[0] for name in names}) == 50
    batch = families["test"].sample(0, 16)
    assert batch.support.x.shape == batch.query.x.shape == (16, 25, 1, 28, 28)
    assert batch.support.x.min() == 0 and batch.support.x.max() == 1
    assert 0.05 < batch.support.x.mean() < 0.12
    ink = torch.cat([family.images.flatten() for family in families.values()]).float().mean() / 255
    assert abs(ink - 0.0842) < 0.001
