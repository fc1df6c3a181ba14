"""Sources: stable keys, content digests, and a clear refusal or a tombstone for what cannot be read."""

from __future__ import annotations

import io
import json
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from teacher_cache.errors import SourceError
from teacher_cache.fingerprint import content_digest, key_digests
from teacher_cache.sources import BrokenSample, Source, open_source, source_fingerprint
from teacher_cache.sources.base import array_item, decode_image
from teacher_cache.spec import BuildSpec, TakeSpec
from teacher_cache.views.operations import PadCrop
from teacher_cache.views.philox import Words


def opened(**described: Any) -> Source:
    """A source as a configuration would open it."""
    views, teacher = {"recipe": []}, {"model": "a:b"}
    spec = BuildSpec.model_validate({"cache": "x", "source": described, "views": views, "teacher": teacher})
    return open_source(spec.source)


def pixels(seed: int, *shape: int) -> Any:
    return np.random.Generator(np.random.Philox(seed)).integers(0, 256, shape).astype(np.uint8)


def png(array: Any) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(array).save(sink, "PNG")
    return sink.getvalue()


def check_contract(source: Source) -> None:
    """What every source promises."""
    count = len(source)
    assert len(source.keys) == len(set(source.keys)) == count
    assert source.sizes.shape == (count,)
    assert source.sizes.dtype == np.int64
    if source.labels is not None:
        assert source.labels.shape == (count,)
        assert source.labels.dtype == np.int64
    for row in (0, count - 1, 0):
        item, again = source.item(row), source.item(row)
        assert item.image_CHW.dtype == torch.uint8
        assert item.image_CHW.ndim == 3
        assert item.image_CHW.is_contiguous()
        assert item.content == again.content
        assert item.image_CHW.equal(again.image_CHW)
        item.image_CHW.zero_()
        assert source.item(row).image_CHW.equal(again.image_CHW), "an item has memory of its own"


class TestDigits:
    def test_it_is_the_digits(self) -> None:
        source = opened(kind="digits")
        check_contract(source)
        assert (len(source), source.item(0).image_CHW.shape) == (1797, (1, 8, 8))
        assert source.class_names == tuple("0123456789")
        assert source.keys[:2] == ["digits/0000", "digits/0001"]
        assert source.labels is not None
        assert source.labels[:4].tolist() == [0, 1, 2, 3]
        assert int(source.item(0).image_CHW.max()) == 239
        everything = torch.stack([source.item(row).image_CHW for row in range(len(source))])
        assert (int(everything.min()), int(everything.max())) == (0, 255)

    def test_splits_part_the_whole(self) -> None:
        """Keys are those of the whole, so views are too."""
        whole, train, test = (opened(kind="digits", split=split).keys for split in ("all", "train", "test"))
        assert sorted([*train, *test]) == whole
        assert len(test) == 599


class TestFolder:
    def _write(self, root: Path) -> Path:
        for name in ("bee", "Ant", "cat"):
            (root / name / "deep").mkdir(parents=True)
        for number, place in enumerate(["bee/2.png", "bee/1.PNG", "Ant/deep/x.png", "cat/1.png"]):
            (root / place).write_bytes(png(pixels(number, 4, 5, 3)))
        (root / "bee/notes.txt").write_bytes(b"no image")
        (root / "README.png").write_bytes(png(pixels(9, 4, 5)))
        return root

    def test_keys_labels_and_names(self, tmp_path: Path) -> None:
        source = opened(kind="folder", path=str(self._write(tmp_path)))
        check_contract(source)
        assert source.class_names == ("Ant", "bee", "cat")
        assert source.keys == ["Ant/deep/x.png", "bee/1.PNG", "bee/2.png", "cat/1.png"]
        assert source.labels is not None
        assert source.labels.tolist() == [0, 1, 1, 2]
        data = (tmp_path / "bee/2.png").read_bytes()
        assert source.sizes[2] == len(data)
        assert source.item(2).content == content_digest(data)
        assert source.item(2).image_CHW.permute(1, 2, 0).numpy().tolist() == pixels(0, 4, 5, 3).tolist()

    def test_the_place_is_no_part_of_the_identity(self, tmp_path: Path) -> None:
        one, other = (opened(kind="folder", path=str(self._write(tmp_path / name))) for name in "ab")
        assert source_fingerprint(one) == source_fingerprint(other)

    def test_a_file_that_is_gone_is_no_tombstone(self, tmp_path: Path) -> None:
        """It was there when the source was opened: a tombstone would hide that."""
        source = opened(kind="folder", path=str(self._write(tmp_path)))
        (tmp_path / "cat/1.png").unlink()
        with pytest.raises(SourceError, match=r"cat/1\.png.*must be readable"):
            source.item(3)

    def test_grey_and_coloured_images_are_brought_together(self, tmp_path: Path) -> None:
        """As they are, they have other shapes; `channels` makes them one, and is part of the fingerprint."""
        (tmp_path / "a").mkdir()
        Image.new("L", (4, 4), 90).save(tmp_path / "a/grey.png")
        Image.new("RGB", (4, 4), (90, 10, 20)).save(tmp_path / "a/red.png")
        found = {n: opened(kind="folder", path=str(tmp_path), channels=n) for n in (None, 1, 3)}
        shapes = {n: [source.item(row).image_CHW.shape[0] for row in range(2)] for n, source in found.items()}
        assert shapes == {None: [1, 3], 1: [1, 1], 3: [3, 3]}
        assert (found[3].item(0).image_CHW == 90).all()
        assert len({source_fingerprint(source) for source in found.values()}) == 3

    @pytest.mark.parametrize("make", ["nothing", "file", "empty", "no class folder", "empty class"])
    def test_no_images(self, make: str, tmp_path: Path) -> None:
        root = tmp_path / "root"
        if make == "file":
            root.write_bytes(b"")
        elif make != "nothing":
            root.mkdir()
        if make == "no class folder":
            (root / "1.png").write_bytes(png(pixels(0, 4, 4)))
        if make == "empty class":
            (root / "cat").mkdir()
        with pytest.raises(SourceError, match=r"source\.path") as caught:
            opened(kind="folder", path=str(root))
        assert caught.value.exit_code == 2


class TestDecoding:
    """Bytes to uint8 [C, H, W], or the reason why not."""

    @pytest.mark.parametrize(
        ("mode", "channels"), [("L", 1), ("RGB", 3), ("RGBA", 3), ("P", 3), ("1", 3), ("LA", 3), ("CMYK", 3)]
    )
    def test_every_eight_bit_mode(self, mode: str, channels: int) -> None:
        """Greyscale stays one channel, everything else becomes RGB as PIL does it."""
        image = Image.fromarray(pixels(1, 6, 7, 3)).convert(mode)
        sink = io.BytesIO()
        image.save(sink, "TIFF" if mode == "CMYK" else "PNG")
        item = decode_image(sink.getvalue())
        assert item.image_CHW.shape == (channels, 6, 7)
        expected = np.asarray(image if mode == "L" else image.convert("RGB")).reshape(6, 7, channels)
        assert item.image_CHW.permute(1, 2, 0).numpy().tolist() == expected.tolist()

    @pytest.mark.parametrize("mode", ["I;16", "I", "F"])
    def test_deeper_images_are_broken_samples(self, mode: str) -> None:
        """More than 8 bits would be cut in silence."""
        sink = io.BytesIO()
        Image.new(mode, (4, 4), 1000).save(sink, "TIFF")
        with pytest.raises(BrokenSample, match="more than 8 bits"):
            decode_image(sink.getvalue())

    @pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
    def test_sixteen_bit_png_of_every_colour_type(self, colour: int, channels: int) -> None:
        """Pillow opens colour PNGs of 16 bits as 8-bit images and drops the lower byte."""

        def chunk(kind: bytes, data: bytes) -> bytes:
            return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

        header = struct.pack(">IIBBBBB", 2, 2, 16, colour, 0, 0, 0)
        rows = (b"\0" + struct.pack(">H", 1000) * channels * 2) * 2
        body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
        with pytest.raises(BrokenSample, match="more than 8 bits"):
            decode_image(b"\x89PNG\r\n\x1a\n" + body)

    @settings(max_examples=200)
    @given(
        form=st.sampled_from(["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM"]),
        cut=st.floats(0, 1),
        places=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=6),
    )
    def test_damage_gives_an_item_or_a_broken_sample(self, form: str, cut: float, places: Any) -> None:
        """Whatever the bytes: no other exception, always uint8 [C, H, W]."""
        sink = io.BytesIO()
        Image.fromarray(pixels(2, 9, 8, 3)).save(sink, form)
        data = bytearray(sink.getvalue())
        for place, flip in places:
            data[int(place * len(data))] ^= flip
        data = data[: int(cut * len(data))] if cut < 0.9 else data
        try:
            with warnings.catch_warnings():
                # Pillow warns of truncated TIFFs before it raises.
                warnings.simplefilter("ignore")
                item = decode_image(bytes(data))
        except BrokenSample:
            return
        assert item.image_CHW.dtype == torch.uint8
        assert item.image_CHW.shape[0] in (1, 3)

    @given(data=st.binary(max_size=60))
    def test_any_bytes(self, data: bytes) -> None:
        with pytest.raises(BrokenSample):
            decode_image(data)

    def test_shape_is_part_of_an_arrays_content(self) -> None:
        flat = pixels(3, 4, 4)
        assert array_item(flat).content != array_item(flat.reshape(2, 8)).content
        assert array_item(flat).content == array_item(flat.copy(order="F")).content
        assert array_item(flat).content != array_item(flat.T).content


class TestParquet:
    def _write(self, path: Path, paths: list[str | None], labels: Any = None, names: Any = None) -> str:
        images = [{"bytes": png(pixels(n, 4, 4)), "path": where} for n, where in enumerate(paths)]
        columns: dict[str, Any] = {"image": images, "other": list(range(len(paths)))}
        if labels is not None:
            columns["label"] = labels
        table = pa.table(columns)
        if names:
            features = {"label": {"names": names, "_type": "ClassLabel"}}
            raw = json.dumps({"info": {"features": features}})
            table = table.replace_schema_metadata({"huggingface": raw})
        pq.write_table(table, path)
        return str(path)

    def test_the_hugging_face_layout(self, tmp_path: Path) -> None:
        path = self._write(tmp_path / "train.parquet", ["a.png", "b.png", None], [1, 0, 1], ["cat", "dog"])
        source = opened(kind="parquet", path=path)
        check_contract(source)
        assert source.keys == ["a.png", "b.png", "train/2"]
        assert source.class_names == ("cat", "dog")
        assert source.labels is not None
        assert source.labels.tolist() == [1, 0, 1]
        data = png(pixels(1, 4, 4))
        assert source.sizes[1] == len(data)
        assert source.item(1).content == content_digest(data)

    def test_several_files_in_their_order(self, tmp_path: Path) -> None:
        paths = [self._write(tmp_path / f"{n}.parquet", [None, None], [n, n]) for n in (1, 0)]
        source = opened(kind="parquet", path=paths, class_names=["x", "y"])
        assert source.keys == ["1/0", "1/1", "0/0", "0/1"]
        assert source.class_names == ("x", "y")
        assert source.item(3).image_CHW.numpy().tolist() == [pixels(1, 4, 4).tolist()]

    def test_a_row_without_bytes_is_a_broken_sample(self, tmp_path: Path) -> None:
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        images = pa.array([{"bytes": None, "path": "a"}, {"bytes": b"x", "path": "b"}, None], kind)
        pq.write_table(pa.table({"image": images}), tmp_path / "t.parquet")
        source = opened(kind="parquet", path=str(tmp_path / "t.parquet"))
        assert source.keys == ["a", "b", "t/2"]
        assert source.sizes.tolist() == [0, 1, 0]
        assert source.labels is None
        for row in range(3):
            with pytest.raises(BrokenSample):
                source.item(row)

    def test_two_samples_with_one_key(self, tmp_path: Path) -> None:
        path = self._write(tmp_path / "t.parquet", ["same.png", "same.png"])
        with pytest.raises(SourceError, match=r"one key.*same\.png"):
            opened(kind="parquet", path=path)

    @pytest.mark.parametrize("labels", [[0, 1, 2], [0, -1, 1]])
    def test_labels_outside_the_class_names(self, labels: list[int], tmp_path: Path) -> None:
        path = self._write(tmp_path / "t.parquet", ["a", "b", "c"], labels, ["cat", "dog"])
        with pytest.raises(SourceError, match=r"labels must be in 0\.\.1"):
            opened(kind="parquet", path=path)

    @pytest.mark.parametrize("labels", [[0, None, 1], ["cat", "dog", "cat"], [0.5, 1.0, 0.0]])
    def test_labels_that_are_no_numbers(self, labels: list[Any], tmp_path: Path) -> None:
        """A missing label or a name is not turned into a number."""
        path = self._write(tmp_path / "t.parquet", ["a", "b", "c"], labels)
        with pytest.raises(SourceError, match="label"):
            opened(kind="parquet", path=path)

    def test_other_layouts_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "no.parquet").write_bytes(b"PAR1 not at all")
        pq.write_table(pa.table({"image": [b"x"]}), tmp_path / "plain.parquet")
        pq.write_table(pa.table({"x": [1]}), tmp_path / "none.parquet")
        for name in ("no", "plain", "none", "missing"):
            with pytest.raises(SourceError, match=r"source\.path"):
                opened(kind="parquet", path=str(tmp_path / f"{name}.parquet"))
        with_label = self._write(tmp_path / "a.parquet", ["a"], [1])
        without = self._write(tmp_path / "b.parquet", ["b"])
        with pytest.raises(SourceError, match=r"source\.path"):
            opened(kind="parquet", path=[with_label, without])


class TestNumpy:
    def _write(self, root: Path, images: Any, labels: Any = None) -> dict[str, Any]:
        np.save(root / "x.npy", images)
        described = {"kind": "numpy", "images": str(root / "x.npy")}
        if labels is not None:
            np.save(root / "y.npy", labels)
            described["labels"] = str(root / "y.npy")
        return described

    @pytest.mark.parametrize("shape", [(5, 4, 6), (5, 4, 6, 1), (5, 4, 6, 3)])
    def test_images_of_every_shape(self, shape: tuple[int, ...], tmp_path: Path) -> None:
        images = pixels(0, *shape)
        source = opened(**self._write(tmp_path, images, np.arange(5)))
        check_contract(source)
        assert list(source.keys) == [f"x/{n}" for n in range(5)] == source.keys[:]
        expected = images.reshape(5, 4, 6, -1)[2].transpose(2, 0, 1)
        assert source.item(2).image_CHW.numpy().tolist() == expected.tolist()

    @pytest.mark.parametrize(
        ("images", "labels"),
        [
            (np.zeros((3, 4, 4), np.float32), None),
            (np.zeros((3, 4), np.uint8), None),
            (np.zeros((0, 4, 4), np.uint8), None),
            (np.zeros((3, 4, 4), np.uint8), np.zeros(2, np.int64)),
            (np.zeros((3, 4, 4), np.uint8), np.array([0.5, 1.0, 2.0])),
            (np.array([{}, {}], object), None),
        ],
        ids=["float", "two dimensions", "none", "too few labels", "fractions", "pickled objects"],
    )
    def test_other_arrays_are_refused(self, images: Any, labels: Any, tmp_path: Path) -> None:
        with pytest.raises(SourceError):
            opened(**self._write(tmp_path, images, labels))

    def test_missing_files(self, tmp_path: Path) -> None:
        described = self._write(tmp_path, np.zeros((3, 4, 4), np.uint8))
        with pytest.raises(SourceError, match=r"source\.labels"):
            opened(**described, labels=str(tmp_path / "none.npy"))
        with pytest.raises(SourceError, match=r"source\.images"):
            opened(kind="numpy", images=str(tmp_path / "none.npy"))


class TestTorchvision:
    def _mnist(self, root: Path) -> Path:
        """MNIST's own files, ten images."""
        raw = root / "MNIST/raw"
        raw.mkdir(parents=True)
        for name in ("train", "t10k"):
            images = np.array([0, 0, 8, 3, 0, 0, 0, 10, 0, 0, 0, 28, 0, 0, 0, 28], np.uint8)
            (raw / f"{name}-images-idx3-ubyte").write_bytes(images.tobytes() + pixels(1, 10, 28, 28).tobytes())
            labels = np.array([0, 0, 8, 1, 0, 0, 0, 10, *range(10)], np.uint8)
            (raw / f"{name}-labels-idx1-ubyte").write_bytes(labels.tobytes())
        return root

    def test_mnist(self, tmp_path: Path) -> None:
        root = str(self._mnist(tmp_path))
        source = opened(kind="torchvision", dataset="MNIST", arguments={"root": root, "train": False})
        check_contract(source)
        assert source.keys[3] == "MNIST/train=False/3"
        assert source.labels is not None
        assert source.labels.tolist() == list(range(10))
        assert source.class_names is not None
        assert source.class_names[3] == "3 - three"
        assert source.item(4).image_CHW.numpy().tolist() == [pixels(1, 10, 28, 28)[4].tolist()]
        other = opened(kind="torchvision", dataset="MNIST", arguments={"root": root, "train": True})
        assert not set(other.keys) & set(source.keys)

    def test_colour_without_labels(self) -> None:
        arguments = {"size": 3, "image_size": [3, 6, 5], "num_classes": 4}
        source = opened(kind="torchvision", dataset="FakeData", arguments=arguments)
        check_contract(source)
        assert source.item(0).image_CHW.shape == (3, 6, 5)
        assert (source.labels, source.class_names) == (None, None)

    def test_what_does_not_open(self, tmp_path: Path) -> None:
        with pytest.raises(SourceError, match=r"not in torchvision\.datasets"):
            opened(kind="torchvision", dataset="NoSuchSet")
        with pytest.raises(SourceError, match=r"source\.arguments"):
            opened(kind="torchvision", dataset="MNIST", arguments={"root": str(tmp_path)})
        with pytest.raises(SourceError, match=r"source\.arguments"):
            opened(kind="torchvision", dataset="FakeData", arguments={"colour": "red"})


class Shuffled:
    """The same samples in another order."""

    def __init__(self, source: Source, order: list[int]) -> None:
        self._source, self._order = source, order
        self.keys = [source.keys[row] for row in order]
        self.labels = None if source.labels is None else source.labels[order]
        self.class_names, self.sizes = source.class_names, source.sizes[order]
        self.channels = source.channels
        self.item = lambda row: source.item(order[row])

    def __len__(self) -> int:
        return len(self._order)


class TestTake:
    """A seeded subset by identity."""

    def test_it_does_not_depend_on_order(self) -> None:
        from teacher_cache.sources.subset import Subset

        whole = opened(kind="digits")
        order = np.random.Generator(np.random.Philox(0)).permutation(len(whole)).tolist()
        take = TakeSpec(count=50, seed=3)
        one, other = Subset(whole, take), Subset(Shuffled(whole, order), take)
        assert set(one.keys) == set(other.keys)
        assert len(one) == 50
        assert one.keys == sorted(one.keys), "in the source's own order"

    def test_items_and_labels_go_with_the_keys(self) -> None:
        whole, part = opened(kind="digits"), opened(kind="digits", take={"count": 40, "seed": 1})
        check_contract(part)
        rows = [whole.keys.index(key) for key in part.keys]
        assert whole.labels is not None
        assert part.labels is not None
        assert part.labels.tolist() == whole.labels[rows].tolist()
        assert part.item(7).content == whole.item(rows[7]).content

    def test_counts_nest_and_seeds_differ(self) -> None:
        """A larger count contains the smaller; another seed is another subset."""
        few, more = (set(opened(kind="digits", take={"count": count}).keys) for count in (100, 200))
        assert few < more
        other = set(opened(kind="digits", take={"count": 100, "seed": 1}).keys)
        assert len(few & other) < 30
        with pytest.raises(SourceError, match=r"source\.take\.count.*1797"):
            opened(kind="digits", take={"count": 1798})

    def test_it_does_not_lean_on_the_views(self) -> None:
        """Chosen with the recipe's own seed, a subset's crops are still spread over all places."""
        part = opened(kind="digits", take={"count": 300, "seed": 5})
        words = Words(key_digests(part.keys), 0, 0, 5)
        corners = PadCrop(8, padding=2).draw(words, np.full((300, 2), 8))
        for column in (0, 1):
            counts = np.bincount(corners[:, column], minlength=5)
            assert (np.abs(counts - 60) < 30).all(), counts


def test_fingerprint_names_keys_sizes_labels_and_classes(tmp_path: Path) -> None:
    """Anything of these changes it; a pass over the pixels is not needed."""
    np.save(tmp_path / "x.npy", pixels(0, 4, 5, 5))
    np.save(tmp_path / "wide.npy", pixels(0, 4, 5, 6))
    np.save(tmp_path / "y.npy", np.array([0, 1, 0, 1]))
    np.save(tmp_path / "z.npy", np.array([0, 1, 1, 1]))
    found = {
        source_fingerprint(opened(kind="numpy", **change))
        for change in (
            {"images": str(tmp_path / "x.npy")},
            {"images": str(tmp_path / "wide.npy")},
            {"images": str(tmp_path / "x.npy"), "labels": str(tmp_path / "y.npy")},
            {"images": str(tmp_path / "x.npy"), "labels": str(tmp_path / "z.npy")},
            {"images": str(tmp_path / "x.npy"), "labels": str(tmp_path / "y.npy"), "class_names": ["a", "b"]},
            {"images": str(tmp_path / "x.npy"), "labels": str(tmp_path / "y.npy"), "class_names": ["b", "a"]},
        )
    }
    assert len(found) == 6


def test_torchvision_pictures_of_16_bits_are_broken_not_white(tmp_path: Path) -> None:
    """torchvision's own loader would cut them to 8 bits in silence; pictures of 8 bits are read as by it."""
    (tmp_path / "a").mkdir()
    Image.fromarray(np.full((4, 4), 999, np.uint16)).save(tmp_path / "a/deep.png")
    colours = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    Image.fromarray(colours).save(tmp_path / "a/plain.png")
    source = opened(kind="torchvision", dataset="ImageFolder", arguments={"root": str(tmp_path)})
    with pytest.raises(BrokenSample, match="more than 8 bits a channel"):
        source.item(0)
    assert (source.item(1).image_CHW.permute(1, 2, 0).numpy() == colours).all()
