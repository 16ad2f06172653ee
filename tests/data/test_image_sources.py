"""Images from folders, tars and image sets of `datasets`: the same images are the same samples, and what is refused."""

from __future__ import annotations

import codecs
import io
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_images import CROPS, damage, encoded, photograph, write_captions, write_classes

from megatron_ds.data.aspect_buckets import bucket_rows, make_buckets
from megatron_ds.data.image_samples import Augmentation, DecodedImages, DiffusionSamples, split_rows
from megatron_ds.data.image_source import ImageSource, open_images
from megatron_ds.data.image_transforms import Crop, UndecodableImage, load_pixels, size_of
from megatron_ds.errors import DataError


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ten images with classes, and the five with captions, as a folder, as tars and as an image set."""
    import datasets

    root = tmp_path_factory.mktemp("images")
    labelled, described = open_images(write_classes(root / "classes")), open_images(write_captions(root / "captions"))
    assert labelled.labels is not None
    (root / "class-tars").mkdir()
    for shard, rows in enumerate((range(6), range(6, 10))):
        members = [
            (f"{row:04d}.{kind}", content)
            for row in rows
            for kind, content in (("cls", str(labelled.labels[row]).encode()), ("png", labelled.content(row)))
        ]
        write_tar(root / "class-tars" / f"{shard}.tar", members)
    members = [(f"some/{row}.jpg", described.content(row)) for row in range(5)]
    members += [(f"some/{row}.txt", described.caption(row).encode()) for row in range(4)]
    write_tar(root / "caption.tar", [*members, ("some/4.json", b'{"caption": "a temple with 4 roofs", "width": 3}')])
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["china", "flower"])})
    images = [{"bytes": labelled.content(row), "path": None} for row in range(10)]
    table = datasets.Dataset.from_dict({"image": images, "label": labelled.labels.tolist()}, features=kinds)
    table.with_format("pandas", columns=["label"]).save_to_disk(str(root / "set"))
    datasets.DatasetDict({"train": table}).save_to_disk(str(root / "splits"))
    (root / "parquet").mkdir()
    table.to_parquet(str(root / "parquet" / "0.parquet"))
    return root


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def samples_of(path: Path, **augmentation: object) -> DiffusionSamples:
    source = open_images(path)
    sizes = source.sizes
    rows = source.usable_rows("skip")
    buckets = bucket_rows(rows, sizes[rows], make_buckets(32, 8, 2.0))
    images = DecodedImages(source, buckets, Augmentation(workers=2, **augmentation), 3, 3)  # type: ignore[arg-type]
    return DiffusionSamples(images, 3, 10, 0.1, block=2)


@pytest.mark.parametrize("kind", ["class-tars", "set", "parquet"])
def test_the_same_images_are_the_same_samples(
    kind: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    folder, other = (
        samples_of(root / "classes", crop="random", flip=True),
        samples_of(root / kind, crop="random", flip=True),
    )
    assert len(folder) == len(other) == 10
    for places in (np.arange(2), np.arange(14, 16), np.arange(102, 104)):
        one, two = folder.batch(places), other.batch(places)
        assert one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)
        alone = folder.batch(places[1:])  # a sample is the same whatever is read beside it
        assert all(np.array_equal(one[name][1:], alone[name]) for name in one)
    plain = samples_of(root / "classes")
    whole = [
        np.concatenate([s.batch(np.arange(p, p + 2))["images"][:, :, :8, :8] for p in range(0, 40, 2)])
        for s in (folder, plain)
    ]
    assert (
        0.6 < np.mean([not np.array_equal(one, two) for one, two in zip(*whole)]) < 1
    )  # squares that are not mirrored


def test_captions(root: Path, tmp_path: Path) -> None:
    wanted = [f"a temple with {number} roofs" for number in range(5)]
    folder = tmp_path / "listed"
    folder.mkdir()
    for number in range(5):
        shutil.copy(root / "captions" / f"{number}.png", folder)
    lines = [f'{{"file_name": "{n}.png", "text": "{text}"}}\n' for n, text in enumerate(wanted)]
    (folder / "metadata.jsonl").write_text("".join(lines))
    for source in map(open_images, (root / "captions", folder, root / "caption.tar")):
        assert source.captioned and source.labels is None
        assert [source.caption(row) for row in range(len(source))] == wanted
    (folder / "metadata.jsonl").write_text("".join(lines[:3]))
    with pytest.raises(DataError, match=r"2 of the 5 images in .* have no caption, 3.png first: write one to 3.txt"):
        open_images(folder)
    (folder / "metadata.jsonl").write_text("".join(lines) + '{"file_name": 7}')
    with pytest.raises(DataError, match=r"metadata.jsonl, line 6: KeyError 'text'"):
        open_images(folder)


def test_captions_are_listed_in_a_file_of_any_size(tmp_path: Path) -> None:
    """It is read line by line; what is read whole is bounded."""
    (tmp_path / "1.png").write_bytes(encoded(photograph("china").crop((0, 0, 8, 8))))
    with (tmp_path / "metadata.jsonl").open("wb") as lines:
        lines.writelines([b" " * (1 << 20) + b"\n"] * 257)
        lines.write(b'{"file_name": "1.png", "text": "a temple"}\r\n')
    assert open_images(tmp_path).caption(0) == "a temple"


def test_a_byte_order_mark_is_no_part_of_a_caption(tmp_path: Path) -> None:
    image, caption = encoded(photograph("china").crop((0, 0, 8, 8))), codecs.BOM_UTF8 + " Été\r\n".encode()
    (tmp_path / "1.png").write_bytes(image)
    (tmp_path / "1.txt").write_bytes(caption)
    write_tar(tmp_path / "tars.tar", [("1.png", image), ("1.txt", caption)])
    assert open_images(tmp_path / "tars.tar").caption(0) == "Été"
    assert open_images(tmp_path, "folder").caption(0) == "Été"


def test_a_folder_is_what_datasets_finds_in_it(tmp_path: Path) -> None:
    """Captions listed in subfolders, and no copies that other programs hide."""
    import datasets

    folder = tmp_path / "images"
    for place in ("a", "a/deep", "b", ".ipynb_checkpoints", "__MACOSX/a"):
        (folder / place).mkdir(parents=True)
        (folder / place / "1.png").write_bytes(encoded(photograph("china").crop((0, 0, 8, 8))))
    shutil.copy(folder / "b" / "1.png", folder / "b" / ".1.png")
    (folder / "metadata.jsonl").write_text('{"file_name": "b/1.png", "text": "b"}\n')
    (folder / "a" / "metadata.jsonl").write_text(
        '{"file_name": "1.png", "text": "a"}\n{"file_name": "deep/1.png", "text": "deep"}\n'
    )
    theirs = datasets.load_dataset(
        "imagefolder", data_dir=str(folder), split="train", cache_dir=str(tmp_path / "cache")
    )
    source = open_images(folder)
    assert [source.caption(row) for row in range(len(source))] == ["a", "deep", "b"]
    assert sorted(theirs["text"]) == ["a", "b", "deep"]
    (folder / "a" / "metadata.jsonl").rename(folder / "a" / "metadata.csv")
    with pytest.raises(DataError, match=r"a/metadata.csv is not read: write its rows to metadata.jsonl beside it"):
        open_images(folder)
    (folder / "a" / "metadata.csv").rename(folder / "a" / "metadata.jsonl")
    listed = (folder / "metadata.jsonl").read_text()
    for line, said in (
        (
            '{"file_name": "b/2.png", "text": ""}',
            "lists 1 images that are not there, 'b/2.png' first",
        ),
        (
            '{"file_name": "./b/1.png", "text": "c"}',
            "line 2: .* b/1.png has had another caption before",
        ),
    ):
        (folder / "metadata.jsonl").write_text(listed + line)
        with pytest.raises(DataError, match=said):
            open_images(folder)
    for name, target in (("a class", folder / "b"), ("x.png", folder / "nowhere")):
        (folder / name).symlink_to(target)
        with pytest.raises(DataError, match=f"{name} is a link to"):
            open_images(folder)
        (folder / name).unlink()


@pytest.mark.parametrize("kind", ["captions", "class-tars"])
def test_a_folder_may_be_called_by_a_dot(
    kind: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(root / kind, tmp_path / "x")
    wanted = open_images(root / kind).sizes
    monkeypatch.chdir(tmp_path / "x")
    assert np.array_equal(open_images(".").sizes, wanted)
    assert all(path.name.startswith("x") for path in tmp_path.iterdir()) and (tmp_path / "x.image-sizes").is_file()


def test_names_need_not_be_utf_8(tmp_path: Path) -> None:
    odd, content = os.fsdecode(b"\xff\n \xe9"), encoded(photograph("china").crop((0, 0, 8, 8)))
    (tmp_path / odd).mkdir()
    (tmp_path / odd / f"{odd}.png").write_bytes(content)
    (tmp_path / odd / f"{odd}.txt").write_text("odd")
    write_tar(tmp_path / "odd.tar", [(f"{odd}.png", content), (f"{odd}.txt", b"odd")])
    for source in map(open_images, (tmp_path / odd, tmp_path / "odd.tar")):
        assert (source.caption(0), source.content(0), source.sizes.tolist()) == ("odd", content, [[8, 8]])
        assert odd in source.name(0)


def test_a_file_is_turned_resized_cropped_and_mirrored() -> None:
    image = photograph("china").crop((0, 0, 90, 60))
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by 90 degrees
    content = encoded(image.transpose(Image.Transpose.ROTATE_90), "PNG", exif=turned)
    assert size_of(content) == (60, 90) == size_of(encoded(image))
    for format in ("JPEG", "PNG", "TIFF", "WEBP"):
        content = encoded(image, format, exif=turned)
        assert size_of(content) == (90, 60) == load_pixels(content, Crop(90, 60)).original_size
    content = encoded(image.transpose(Image.Transpose.ROTATE_90), "PNG", exif=turned)
    whole = np.asarray(image, np.float32).transpose(2, 0, 1) / 127.5 - 1
    assert np.abs(load_pixels(content, Crop(60, 90)).values - whole).max() < 1e-6
    found = load_pixels(content, Crop(60, 40, (0.0, 1.0 - 1e-9)))
    assert np.abs(found.values - whole[:, :, 50:]).max() < 1e-6
    assert found.crop_top_left == (0, 50) and found.original_size == (60, 90)
    mirrored = load_pixels(content, Crop(60, 40, (0.0, 1.0 - 1e-9), flip=True))
    assert np.array_equal(mirrored.values, found.values[:, :, ::-1]) and mirrored.crop_top_left == (0, 0)
    assert load_pixels(content, Crop(60, 40)).crop_top_left == (0, 25)
    half = np.asarray(image.resize((45, 30), Image.Resampling.LANCZOS), np.float32).transpose(2, 0, 1) / 127.5 - 1
    assert np.abs(load_pixels(content, Crop(30, 45)).values - half).max() < 1e-6
    part = load_pixels(content, Crop(30, 20, (0.0, 1.0 - 1e-9)))  # as if all had been resized, within a rounding
    assert np.abs(part.values - half[:, :, 25:]).max() < 1.5 / 127.5 and part.crop_top_left == (0, 25)
    grey = load_pixels(content, Crop(60, 90), channels=1)
    assert grey.values.shape == (1, 60, 90)
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert (load_pixels(encoded(clear), Crop(4, 4)).values == 1).all()  # what is transparent is white
    deep = Image.fromarray(np.full((4, 4), 65535, np.uint16))
    assert load_pixels(encoded(deep), Crop(4, 4), 1).values.min() > 0.98
    ramp = np.arange(0, 65536, 4096, np.uint16).reshape(4, 4)
    for levels in (encoded(Image.fromarray(ramp)), b"P5 4 4 65535\n" + ramp.astype(">u2").tobytes()):
        assert np.abs(load_pixels(levels, Crop(4, 4), 1).values[0] - (ramp / 32767.5 - 1)).max() < 1.5 / 127.5
    for range_unknown in (np.float32(ramp) / 65535, ramp.astype(np.int32)):
        with pytest.raises(UndecodableImage, match="without a known range; save 8 or 16 bits"):
            load_pixels(encoded(Image.fromarray(range_unknown), "TIFF"), Crop(4, 4))
    for bad in (b"", b"%!PS-Adobe-3.0 EPSF-3.0\n", content[: len(content) // 2]):
        with pytest.raises(UndecodableImage):
            load_pixels(bad, Crop(60, 90))


def test_an_image_that_does_not_decode_counts_nothing_or_ends_the_run(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(root / "classes", tmp_path / "classes")
    damage(tmp_path / "classes" / "china" / "1.png")
    samples = samples_of(tmp_path / "classes", on_error="skip")
    batches = [samples.batch(np.arange(place, place + 2)) for place in range(0, 20, 2)]
    counts = np.concatenate([batch["counts"] for batch in batches])
    assert counts.tolist().count(False) == 2  # once an epoch
    assert sum(not batch["images"][at].any() for batch in batches for at in range(2)) == 2
    assert len(caplog.messages) == 1 and "china/1.png cannot be decoded and counts nothing" in caplog.text
    fatal = samples_of(tmp_path / "classes", on_error="fail")
    with pytest.raises(DataError, match=r"china/1.png cannot be decoded: .*--data.on-error skip"):
        for place in range(0, 20, 2):
            fatal.batch(np.arange(place, place + 2))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
def test_a_file_that_was_cut_off_is_found_before_it_is_decoded(format: str, tmp_path: Path) -> None:
    """Its header, with the size, is whole. What stands behind an image is no damage."""
    import datasets

    whole = encoded(photograph("china").crop((0, 0, 120, 90)), format)
    files = {"a": whole, "b": whole[: len(whole) // 2], "c": whole + bytes(100), "d": whole[:-2]}
    (tmp_path / "folder").mkdir()
    for name, content in files.items():
        (tmp_path / "folder" / f"{name}.{format.lower()}").write_bytes(content)
    write_tar(tmp_path / "x.tar", [(f"{name}.png", content) for name, content in files.items()])
    images = [{"bytes": content, "path": None} for content in files.values()]
    kinds = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": images}, features=kinds).save_to_disk(str(tmp_path / "set"))
    for path in (tmp_path / "folder", tmp_path / "x.tar", tmp_path / "set"):
        source = open_images(path)
        found = [size_by_decoding(content) for content in files.values()]
        assert source.sizes.tolist() == found and found[::2] == [[90, 120]] * 2 and found[1] == [0, 0]
        with pytest.raises(DataError, match=r" of 4 images cannot be decoded: .*(b\.|: b|row 1)"):
            source.usable_rows("fail")


def size_by_decoding(content: bytes) -> list[int]:
    try:
        load_pixels(content, Crop(8, 8))
    except UndecodableImage:
        return [0, 0]
    return list(size_of(content))


def test_an_image_that_was_replaced_is_measured_anew(tmp_path: Path) -> None:
    wide = photograph("china").crop((0, 0, 60, 40))
    (tmp_path / "x").mkdir()
    for image, size in ((wide, [40, 60]), (wide.transpose(Image.Transpose.ROTATE_90), [60, 40])):
        (tmp_path / "x" / "a.bmp").write_bytes(encoded(image, "BMP"))  # of as many bytes
        assert open_images(tmp_path / "x").sizes.tolist() == [size]


def test_sizes_are_read_from_both_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").mkdir()
    wide = photograph("china").crop((0, 0, 600, 400))
    for name, format in (("a.jpg", "JPEG"), ("b.png", "PNG"), ("c.tif", "TIFF"), ("d.webp", "WEBP")):
        (tmp_path / "x" / name).write_bytes(encoded(wide, format))
    (tmp_path / "x" / "e.jpg").write_bytes(encoded(wide.crop((0, 0, 300, 200))))
    source, read = open_images(tmp_path / "x"), []
    content = source.content

    def counted(row: int) -> bytes:
        read.append(row)
        return content(row)

    monkeypatch.setattr(source, "content", counted)
    monkeypatch.setattr("megatron_ds.data.image_source.FIRST_BYTES", 4096)
    monkeypatch.setattr("megatron_ds.data.image_source._ROWS", 3)
    assert source.sizes.tolist() == [[400, 600]] * 4 + [[200, 300]]
    assert sorted(read) == [2, 3]  # what has no marker at its end is decoded
    again = open_images(tmp_path / "x")
    monkeypatch.setattr(again, "ends", counted)
    assert len(again.sizes) == 5 and len(read) == 2  # the second time nothing is read


def test_a_tar_that_is_damaged_or_no_longer_the_same(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tars"
    shutil.copytree(root / "class-tars", folder)
    source = open_images(folder)
    first = folder / "0.tar"
    content = first.read_bytes()
    first.write_bytes(content[: len(content) // 4])
    with pytest.raises(DataError, match="is cut off: it ends before a member"):
        source.content(5)
    with pytest.raises(DataError, match=r"0.tar cannot be read as an uncompressed tar"):
        open_images(folder)
    first.write_bytes(content)
    again = open_images(folder)
    assert again.identity == source.identity and again.content(5) == source.content(5)
    image = again.content(0)
    write_tar(first, [("0.png", image), ("0.cls", b"1"), ("1.png", image)])
    with pytest.raises(DataError, match=r"1 of the 6 images in .* have no class, .*0.tar: 1 first"):
        open_images(folder)
    write_tar(first, [("0.png", image), ("0.cls", b"one")])
    with pytest.raises(DataError, match=r"0.tar: 0.cls cannot be read: invalid literal"):
        open_images(folder)
    write_tar(first, [("0.png", image), ("0.txt", "é".encode("latin-1"))])
    with pytest.raises(DataError, match=r"the caption of .*0.tar: 0 cannot be read: 'utf-8' codec"):
        open_images(first).caption(0)
    write_tar(first, [("0.png", image), ("0.mask.png", image), ("0.txt", b"a"), ("1.2.png", image)])
    with pytest.raises(DataError, match=r"0.tar: 1.2.png would never be seen: .* and 1 has no image"):
        open_images(first)
    for second in ("0.jpg", "0.png"):
        write_tar(first, [("0.png", image), ("0.cls", b"1"), (second, image)])
        with pytest.raises(DataError, match=rf"0.tar: {second} is a second image of 0, of which one would never be"):
            open_images(folder)


def test_a_caption_or_class_of_a_tar_whose_image_is_missing_is_counted_and_named(root: Path, tmp_path: Path) -> None:
    images = [(root / "classes" / "china" / f"{i}.png").read_bytes() for i in range(2)]
    members = [("lost.cls", b"7"), ("0.png", images[0]), ("0.cls", b"0"), ("1.cls", b"1"), ("1.png", images[1])]
    write_tar(tmp_path / "0.tar", members[1:])
    whole = open_images(tmp_path / "0.tar")
    assert len(whole.sizes) == 2
    for lost in (members[0], ("lost.txt", b"a temple")):
        write_tar(tmp_path / "0.tar", [lost, *members[1:], ("about.json", b'{"width": 3}')])
        source = open_images(tmp_path / "0.tar")
        assert [source.content(row) for row in source.usable_rows("skip")] == images
        assert source.labels is not None and source.labels[:2].tolist() == [0, 1] and source.labels.max() == 1
        assert not source.captioned
        with pytest.raises(DataError, match=r"1 of 3 images cannot be decoded: .*0.tar: lost \(no image\); remove"):
            source.usable_rows("fail")


def test_columns_of_an_image_set_that_say_nothing(root: Path, tmp_path: Path) -> None:
    import datasets

    table = datasets.load_from_disk(str(root / "set")).remove_columns("label")
    for name, values, message in (
        ("label", ["cat"] * 10, "the column label holds no class numbers"),
        ("label", [None, *range(9)], "the column label holds no class numbers"),
        ("label", [1.0, 2.5, *[3.0] * 8], r"the column label holds no class numbers \(row 1 has 2.5\)"),
        ("label", [[0, 1]] * 10, r"the column label holds no class numbers \(row 0 has \[0, 1\]\)"),
        ("text", [None, *["a"] * 9], "1 of the 10 images in .* have no text"),
    ):
        table.add_column(name, values).save_to_disk(str(tmp_path / message[:9]))
        with pytest.raises(DataError, match=message):
            open_images(tmp_path / message[:9])
        shutil.rmtree(tmp_path / message[:9])
    table.add_column("x", ["a"] * 10).remove_columns("image").save_to_disk(str(tmp_path / "none"))
    with pytest.raises(DataError, match="has 10 rows and 0 columns of images among x"):
        open_images(tmp_path / "none")
    table.add_column("text", ["a", "b"] * 5).add_column("caption", [["c"]] * 10).save_to_disk(str(tmp_path / "good"))
    source = open_images(tmp_path / "good")
    assert source.captioned and source.caption(3) == "b" and source.labels is None


def test_images_of_several_splits_are_refused(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `datasets` finds splits, which reads one alone: by words in the names of files or folders."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    tar, parquet, image = root / "class-tars" / "0.tar", root / "parquet" / "0.parquet", root / "classes" / "china"
    for number, (content, names, refused) in enumerate(
        (
            (parquet, ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet"), False),
            (parquet, ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"), True),
            (parquet, ("default/training/0.parquet", "default/dev/0.parquet"), True),
            (parquet, ("latest.parquet", "trains.parquet", ".test/0.parquet"), False),
            (tar, ("set-train-0.tar", "set-train-1.tar"), False),
            (tar, ("set-train-0.tar", "set-val-0.tar"), True),
            (image, ("train", "val"), True),
            (image, ("train", "val", "car"), False),  # classes
            (image, ("evaluation/china", "test/flower"), False),  # two words of one split
        )
    ):
        folder = tmp_path / str(number)
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(content, folder / name) if content.is_dir() else shutil.copy(content, folder / name)
        if refused:
            with pytest.raises(DataError, match=r"holds several splits, .* among them, of which all would be trained"):
                open_images(folder)
        else:
            assert len(open_images(folder)) > 0


def test_what_holds_no_images(root: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_tar(tmp_path / "text.tar", [("0.txt", b"a")])
    for path, kind, message in (
        (tmp_path / "empty", None, "holds no image file"),
        (tmp_path / "empty", "tar", "holds no .tar; compressed ones cannot be read at random"),
        (tmp_path / "empty", "dataset", "no image set of `datasets`"),
        (tmp_path / "text.tar", None, "the tars hold no image"),
        (tmp_path / "nowhere", None, "does not exist"),
        (root / "splits", None, "holds several splits; give one: .*/splits/train"),
    ):
        with pytest.raises(DataError, match=message):
            open_images(path, kind)  # type: ignore[arg-type]
    both = shutil.copytree(root / "class-tars", tmp_path / "both")
    (both / "1.tar.gz").touch()
    with pytest.raises(DataError, match=r"1.tar.gz is compressed and cannot be read at random"):
        open_images(both)
    (both / "1.tar.gz").rename(both / "1.png")
    with pytest.raises(DataError, match=r"holds tar shards and image files \(.*0.tar, .*1.png\); move one kind"):
        open_images(both)
    assert len(open_images(both, "tar")) == 10
    for name in ("a", "b"):
        (tmp_path / "empty" / f"{name}.png").write_text("no image")
    source: ImageSource = open_images(tmp_path / "empty")
    with pytest.raises(DataError, match=r"2 of 2 images cannot be decoded: .*a.png, .*b.png; remove"):
        source.usable_rows("skip")
    with pytest.raises(DataError, match=r"data.valid=10 of 10 images leaves none"):
        split_rows(np.arange(10), 10)
    train, valid = split_rows(np.arange(10), 3)
    assert valid.tolist() == [0, 3, 6] and sorted([*train, *valid]) == list(range(10)) and len(CROPS) == 5
