"""Files in folders and zip archives, images, and the cache of decoded ones: what is read, and what is refused."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import tiny_archives as tiny
import torch
from PIL import Image

from kfo_ext.tasks import decoding, sources
from kfo_ext.tasks.cache import Plan, cached
from kfo_ext.tasks.decoding import Target, pixels_of
from kfo_ext.tasks.sources import open_source

FILES = {"top/b.txt": b"b", "top/a.txt": b"a", "top/deep/c.txt": b"c"}


@pytest.mark.parametrize("write", [tiny.write_zip, tiny.write_folder])
def test_files_are_found_wherever_they_lie(tmp_path, write):
    junk = {".DS_Store": b"", "__MACOSX/top/._a.txt": b"", "top/.hidden/d.txt": b"d"}
    with open_source(write(tmp_path / "data.zip", {**FILES, **junk})) as source:
        assert source.names == sorted(FILES)
        assert {name: source.read(name) for name in source.names} == FILES
        assert source.name == ("data" if write is tiny.write_zip else "data.zip")


@pytest.mark.parametrize("write", [tiny.write_zip, tiny.write_folder])
def test_a_digest_changes_with_a_file(tmp_path, write):
    path = write(tmp_path / "data", FILES)
    digest = open_source(path).digest
    assert open_source(path).digest == digest
    write(tmp_path / "data", {**FILES, "top/a.txt": b"other"})
    assert open_source(path).digest != digest


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "top/../../evil", "a\\..\\evil", "C:/evil"])
def test_a_path_that_leads_out_of_the_archive_is_refused(tmp_path, name):
    path = tiny.write_zip(tmp_path / "data.zip", {**FILES, name: b""})
    with pytest.raises(ValueError, match=r"data.zip holds the path '.*evil', which leads out of it"):
        open_source(path)


def test_a_file_that_is_there_twice_is_refused(tmp_path):
    path = tiny.write_zip(tmp_path / "data.zip", FILES)
    path.write_bytes(path.read_bytes().replace(b"top/b.txt", b"top/a.txt"))
    with pytest.raises(ValueError, match=r"data.zip holds top/a.txt twice"):
        open_source(path)


@pytest.mark.parametrize("write", [tiny.write_zip, tiny.write_folder])
def test_an_absurdly_large_file_is_refused(tmp_path, monkeypatch, write):
    path = write(tmp_path / "data.zip", FILES)
    if write is tiny.write_zip:
        tiny.in_directory(path, "top/a.txt", 24, (sources.MOST_BYTES + 1).to_bytes(4, "little"))
    else:
        monkeypatch.setattr(sources, "MOST_BYTES", 0)
    with pytest.raises(ValueError, match=r"data.zip: expected files of at most \d+ bytes, got top/a.txt of \d+"):
        open_source(path).read("top/a.txt")


@pytest.mark.parametrize("damage", [tiny.cut, tiny.emptied, tiny.foreign])
def test_a_file_that_is_no_archive_is_named(tmp_path, damage):
    path = tiny.write_zip(tmp_path / "data.zip", FILES)
    damage(path)
    with pytest.raises(ValueError, match=rf"data.zip is no whole zip archive .*: got {path.stat().st_size} bytes"):
        open_source(path)


@pytest.mark.parametrize(("offset", "value"), [(8, b"\x01\x00"), (10, b"\x4d\x00"), (16, b"\0\0\0\0")])
def test_an_entry_that_cannot_be_read_is_named(tmp_path, offset, value):
    # Encrypted, of an unknown method, and with another checksum.
    path = tiny.write_zip(tmp_path / "data.zip", FILES)
    tiny.in_directory(path, "top/a.txt", offset, value)
    with pytest.raises(ValueError, match=r"data.zip is damaged or packed .* \(top/a.txt: "):
        open_source(path).read("top/a.txt")


def test_a_link_that_leads_back_ends(tmp_path):
    folder = tiny.write_folder(tmp_path / "data", FILES)
    (folder / "loop").symlink_to(folder)
    with pytest.raises(ValueError, match=r"root: .* lies more than 12 folders deep"):
        open_source(folder)


def test_text_that_is_no_text(tmp_path):
    path = tiny.write_zip(tmp_path / "data.zip", {"train.csv": b"\xff\xfe\x00"})
    with pytest.raises(ValueError, match=r"data.zip: train.csv is no text in UTF-8"):
        open_source(path).read_text("train.csv")


def test_pixels_are_those_of_the_file():
    image = tiny.pixels(1)
    assert pixels_of(tiny.png(image), "a.png", Target(32, exact=True)) == bytes(image.flatten().tolist())


def test_other_sizes_are_resized_by_lanczos():
    image = tiny.pixels(2, side=50)
    picture = Image.frombytes("RGB", (50, 50), bytes(image.permute(1, 2, 0).flatten().tolist()))
    expected = picture.resize((84, 84), Image.Resampling.LANCZOS)
    planes = b"".join(plane.tobytes() for plane in expected.split())
    assert pixels_of(tiny.png(image), "a.png", Target(84)) == planes


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3), ("CMYK", 4), ("RGBA", 4), ("LA", 2)])
@pytest.mark.parametrize("wanted", [1, 3])
def test_modes_of_8_bits_become_what_is_wanted(mode, channels, wanted):
    image = tiny.pixels(3, channels)
    if mode in ("RGBA", "LA"):
        image[-1] = 255
    made = pixels_of(tiny.png(image, mode, "TIFF" if mode == "CMYK" else "PNG"), "a", Target(32, wanted))
    assert len(made) == wanted * 32 * 32
    if mode in ("RGBA", "RGB") and wanted == 3:
        assert made == bytes(image[:3].flatten().tolist())
    if mode in ("L", "LA"):
        assert made == bytes(image[:1].flatten().tolist()) * wanted


def sixteen_bits() -> bytes:
    file = io.BytesIO()
    Image.new("I;16", (32, 32), 40_000).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no whole image: Pillow knows"),
        (b"<html>404</html>", "is no whole image"),
        (tiny.png(tiny.pixels(0))[:900], "is no whole image"),
        (tiny.huge_png(), "is no whole image .*(DecompressionBomb|decompression bomb)"),
        (sixteen_bits(), "expected an image of 8 bits a channel .*, got mode I;16"),
        (tiny.png(tiny.pixels(0, 4), "RGBA"), "expected an opaque image, got transparent pixels"),
    ],
)
def test_images_that_are_refused(content, message):
    with pytest.raises(ValueError, match=f"data.zip: a.png.* {message}"):
        pixels_of(content, "data.zip: a.png", Target(32))


def test_a_large_image_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(decoding, "MOST_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"a.png: expected at most 1000 pixels, got 32 x 32"):
        pixels_of(tiny.png(tiny.pixels(0)), "a.png", Target(32))


@pytest.mark.parametrize(
    ("image", "mode", "got"),
    [(tiny.pixels(0, side=28), "RGB", "28 x 28 of mode RGB"), (tiny.pixels(0, 1), "L", "32 x 32 of mode L")],
)
def test_an_exact_target_refuses_other_images(image, mode, got):
    with pytest.raises(ValueError, match=f"a.png: expected 32 x 32 pixels of mode RGB, got {got}"):
        pixels_of(tiny.png(image, mode), "a.png", Target(32, exact=True))


def test_images_are_decoded_in_order_and_an_error_ends_it():
    images = {f"{i:03}.png": tiny.pixels(i) for i in range(150)}
    read = {name: tiny.png(image) for name, image in images.items()}
    made = decoding.decoded(read.__getitem__, list(read), Target(32), title="t", where="w")
    assert b"".join(made) == b"".join(bytes(image.flatten().tolist()) for image in images.values())
    read["100.png"] = b"broken"
    with pytest.raises(ValueError, match=r"w: 100.png is no whole image"):
        list(decoding.decoded(read.__getitem__, list(read), Target(32), title="t", where="w"))


def plan_of(images: torch.Tensor) -> Plan:
    return Plan(("a", "b"), (2, 3), (1, 4, 4), lambda: (bytes(image.flatten().tolist()) for image in images))


def test_cached_images_are_mapped_and_right(tmp_path):
    images = tiny.pixels(4, 5, 4).unsqueeze(1)
    first = cached(tmp_path / "x.images", lambda: plan_of(images))
    second = cached(tmp_path / "x.images", lambda: pytest.fail("decoded twice"))
    for made in (first, second):
        assert torch.equal(made.images, images)
        assert made.names == ("a", "b") and made.offsets.tolist() == [0, 2, 5]
    with Path("/proc/self/maps").open() as maps:
        assert any("x.images" in line for line in maps)
    assert [path.name for path in tmp_path.iterdir()] == ["x.images"]


def test_every_flipped_byte_is_seen_or_padding(tmp_path):
    images = tiny.pixels(4, 5, 4).unsqueeze(1)
    path = tmp_path / "x.images"
    cached(path, lambda: plan_of(images))
    whole = path.read_bytes()
    header = whole.index(b"\0")
    for at in [*range(0, header, 3), 4095, *range(4096, len(whole), 9)]:
        content = bytearray(whole)
        content[at] ^= 0x10
        path.write_bytes(content)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            made = cached(path, lambda: plan_of(images))
        damaged = [str(one.message) for one in caught]
        assert len(damaged) == (at != 4095) and all("x.images is damaged; building it anew" in one for one in damaged)
        assert torch.equal(made.images, images) and made.names == ("a", "b")


def test_a_file_of_the_cache_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    images = tiny.pixels(4, 5, 4).unsqueeze(1)

    def cut():
        yield bytes(images[0].flatten().tolist())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path / "x.images", lambda: plan_of(images)._replace(pixels=cut))
    assert not list(tmp_path.iterdir())

    def refuse(part, path):
        assert Path(part).stat().st_size == 4096 + images.numel() and not path.exists()
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.warns(UserWarning, match="cannot write the cache file .*no space left"):
        made = cached(tmp_path / "x.images", lambda: plan_of(images))
    assert torch.equal(made.images, images) and not list(tmp_path.iterdir())


def test_a_cache_inside_the_data_does_not_change_them(tmp_path):
    folder = tiny.write_folder(tmp_path / "data", FILES)
    digest = open_source(folder).digest
    cached(folder / "cache" / "x.images", lambda: plan_of(tiny.pixels(4, 5, 4).unsqueeze(1)))
    assert open_source(folder).digest == digest


def test_two_processes_at_once_get_whole_files(tmp_path):
    code = f"""
import torch
from kfo_ext.tasks.cache import Plan, cached
def decode():
    for i in range(400):
        yield bytes([i % 256]) * 10_000
for turn in range(5):
    made = cached(__import__('pathlib').Path({str(tmp_path)!r}, f"{{turn}}.images"),
                  lambda: Plan(("a",), (400,), (1, 100, 100), decode))
    assert torch.equal(made.images[:, 0, 0, 0], torch.arange(400).to(torch.uint8))
"""
    command = [sys.executable, "-W", "error", "-c", code]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, env=dict(os.environ)) for _ in range(2)]
    for process in processes:
        assert (process.communicate()[1], process.returncode) == (b"", 0)


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_shown_on_a_terminal_alone(capsys, monkeypatch, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    list(decoding.decoded(lambda _: tiny.png(tiny.pixels(0)), ["a"], Target(32), title="cifar_fs train", where="w"))
    shown = capsys.readouterr().err
    assert "cifar_fs train: 100%" in shown if terminal else shown == ""


def test_a_zip_of_everything_that_zipfile_writes(tmp_path):
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.mkdir("top") if hasattr(file, "mkdir") else file.writestr("top/", b"")
        file.writestr("top/a.txt", b"a" * 10_000)
    assert open_source(path).read("top/a.txt") == b"a" * 10_000
