"""Labels with holes, metadata of other shapes, and Arrow's many types of bytes."""

import io
import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from dis_ssm.data.open import open_dataset
from dis_ssm.data.sources.base import MAX_HOLES
from dis_ssm.metrics.readers import open_images
from dis_ssm.metrics.statistics import StoredStatistics

SIZE = 8


def png(value):
    buffer = io.BytesIO()
    Image.new("L", (SIZE, SIZE), value).save(buffer, "png")
    return buffer.getvalue()


def levels(dataset):
    return dataset.batch(range(len(dataset)))[0][:, 0, 0, 0].tolist()


# --- labels -----------------------------------------------------------------------------------


def write_labels(folder, kind, labels, split=None):
    """Image k is of the grey level k."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "parquet":
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet

        table = pa.table({"image": [png(k) for k in range(len(labels))], "label": labels})
        pyarrow.parquet.write_table(table, folder / f"{split or 'train'}.parquet")
    elif kind == "arrow":
        datasets = pytest.importorskip("datasets")
        columns = {"image": [png(k) for k in range(len(labels))], "label": labels}
        types = datasets.Features(image=datasets.Value("binary"), label=datasets.Value("int64"))
        datasets.Dataset.from_dict(columns, types).save_to_disk(folder)
    else:
        names = [f"{k}.png" for k in range(len(labels))]
        table = {"labels": [[name, label] for name, label in zip(names, labels, strict=True)]}
        files = {name: png(k) for k, name in enumerate(names)}
        files["dataset.json"] = json.dumps(table).encode()
        if kind == "zip":
            with zipfile.ZipFile(folder / "x.zip", "w") as archive:
                for name, content in files.items():
                    archive.writestr(name, content)
            return folder / "x.zip"
        for name, content in files.items():
            (folder / name).write_bytes(content)
    return folder


KINDS = ["parquet", "arrow", "folder", "zip"]


@pytest.mark.parametrize("kind", KINDS)
def test_labels_with_a_billion_holes_are_refused_and_can_be_mapped(tmp_path, kind):
    path = write_labels(tmp_path / "x", kind, [7, 10**9, 7])
    message = r"label 1000000000 makes 1,000,000,001 classes, 999,999,999 of them .*data\.relabel"
    with pytest.raises(ValueError, match=message):
        open_dataset(path, image_size=SIZE)
    dataset = open_dataset(path, image_size=SIZE, relabel=True)
    assert dataset.class_names == ("7", "1000000000")
    assert dataset.labels.tolist() == [0, 1, 0] and levels(dataset) == [0, 1, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_missing_classes_are_no_holes(tmp_path, kind):
    dataset = open_dataset(write_labels(tmp_path / "x", kind, [0, 3, 999]), image_size=SIZE)
    assert dataset.num_classes == 1000 and dataset.labels.tolist() == [0, 3, 999]
    holes = MAX_HOLES + 1
    path = write_labels(tmp_path / "y", kind, [0, holes])
    assert open_dataset(path, image_size=SIZE).num_classes == holes + 1  # 1, ... without an image
    path = write_labels(tmp_path / "z", kind, [0, holes + 1])
    with pytest.raises(ValueError, match=f"label {holes + 1} makes 1,003 classes, 1,001 of them"):
        open_dataset(path, image_size=SIZE)
    half = [2 * k for k in range(MAX_HOLES + 2)]
    many = open_dataset(write_labels(tmp_path / "h", kind, half), image_size=SIZE)
    assert many.num_classes == half[-1] + 1


def test_both_splits_are_mapped_alike(tmp_path):
    write_labels(tmp_path, "parquet", [50, 10**6])
    write_labels(tmp_path, "parquet", [10**6, 10**7], "test")
    names = ("50", "1000000", "10000000")
    for split, labels in (("train", [0, 1]), ("heldout", [1, 2])):
        dataset = open_dataset(tmp_path, split, SIZE, relabel=True)
        assert dataset.class_names == names and dataset.labels.tolist() == labels
    for split in ("train", "heldout"):
        with pytest.raises(ValueError, match="label 10000000 makes"):
            open_dataset(tmp_path, split, SIZE)


def test_names_that_are_stated_are_kept_when_mapped(tmp_path):
    datasets = pytest.importorskip("datasets")
    types = datasets.Features(
        image=datasets.Value("binary"), label=datasets.ClassLabel(names=list("abcdef"))
    )
    columns = {"image": [png(k) for k in range(3)], "label": [4, 1, 4]}
    datasets.Dataset.from_dict(columns, types).save_to_disk(tmp_path / "x")
    plain = open_dataset(tmp_path / "x", image_size=SIZE)
    assert plain.class_names == tuple("abcdef") and plain.labels.tolist() == [4, 1, 4]
    mapped = open_dataset(tmp_path / "x", image_size=SIZE, relabel=True)
    assert mapped.class_names == ("b", "e") and mapped.labels.tolist() == [1, 0, 1]


@pytest.mark.parametrize("relabel", [False, True])
def test_negative_labels_are_refused(tmp_path, relabel):
    write_labels(tmp_path, "parquet", [0, -1])
    with pytest.raises(ValueError, match="label -1"):
        open_dataset(tmp_path, image_size=SIZE, relabel=relabel)


def test_folders_are_as_they_were_when_mapped(tmp_path):
    for k, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(png(k))
    dataset = open_dataset(tmp_path, image_size=SIZE, relabel=True)
    assert dataset.class_names == ("a", "b") and dataset.labels.tolist() == [0, 1]


WRONG_TABLES = [
    "[]", "0", "null", "{}", '{"labels": 3}', '{"labels": {"0.png": 1}}', '{"labels": [0]}',
    '{"labels": [["0.png"]]}', '{"labels": [["0.png", 0, 0]]}', '{"labels": [[["0.png"], 0]]}',
    '{"labels": [["0.png", true]]}', '{"labels": [["0.png", 1e400]]}',
    '{"labels": [["0.png", "0"]]}',
    '{"labels": [["0.png", 1000000000000000000000]]}', '{"labels": [["0.png", 0], ["0.png", 1]]}',
    "[" * 10_000, '{"labels":' * 10_000, "\xff", '{"labels": [["0.png", 0]', "",
]  # fmt: skip


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
@pytest.mark.parametrize("text", WRONG_TABLES, ids=lambda t: t[:30])
def test_a_label_table_of_any_other_shape_is_named(tmp_path, text, packed):
    (tmp_path / "0.png").write_bytes(png(0))
    (tmp_path / "dataset.json").write_bytes(text.encode("latin-1"))
    source = tmp_path
    if packed:
        source = tmp_path / "x.zip"
        with zipfile.ZipFile(source, "w") as archive:
            for name in ("0.png", "dataset.json"):
                archive.write(tmp_path / name, name)
    with pytest.raises(ValueError, match=r"dataset\.json"):
        open_dataset(source, image_size=SIZE)


# --- Arrow and Parquet ------------------------------------------------------------------------


def image_arrays():
    """The same two encoded images in every type that holds bytes, and nothing in a third row."""
    pa = pytest.importorskip("pyarrow")
    raws = [png(1), png(2), None]
    arrays = {str(t): pa.array(raws, t) for t in (pa.binary(), pa.large_binary(), pa.binary_view())}
    texts = ((pa.string(), pa.binary()), (pa.large_string(), pa.large_binary()))
    for text, bare in (*texts, (pa.string_view(), pa.binary_view())):
        buffers = pa.array(raws, bare).buffers()
        arrays[str(text)] = pa.Array.from_buffers(text, 3, buffers)
    size = len(raws[0])
    assert len(raws[1]) == size
    arrays["fixed_size_binary"] = pa.array(raws, pa.binary(size))
    arrays["dictionary"] = pa.array(raws, pa.binary()).dictionary_encode()
    for inner in (pa.binary(), pa.large_binary(), pa.binary_view()):
        type_ = pa.struct({"bytes": inner, "path": pa.string()})
        rows = [{"bytes": raw, "path": None} for raw in raws]
        arrays[f"struct of {inner}"] = pa.array(rows, type_)
    return arrays


TYPES = [
    "binary", "large_binary", "binary_view", "string", "large_string", "string_view",
    "fixed_size_binary", "dictionary", "struct of binary", "struct of large_binary",
    "struct of binary_view",
]  # fmt: skip


@pytest.mark.parametrize("kind", TYPES)
def test_every_arrow_type_of_bytes_is_an_image_column(tmp_path, kind):
    pa, array = pytest.importorskip("pyarrow"), image_arrays()[kind]
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.table({"image": array}), tmp_path / "a.parquet")
    dataset = open_dataset(tmp_path / "a.parquet", image_size=SIZE)
    assert levels_of(dataset, [0, 1]) == [1, 2]
    with pytest.warns(UserWarning, match="row 2: the row holds no bytes"):
        assert dataset.read([2])[2].tolist() == []


@pytest.mark.parametrize("kind", TYPES)
def test_and_in_what_datasets_saves(tmp_path, kind):
    datasets, array = pytest.importorskip("datasets"), image_arrays()[kind]
    import pyarrow as pa

    try:
        saved = datasets.Dataset(pa.table({"image": array}))
        saved.save_to_disk(tmp_path / "d")
    except (ValueError, NotImplementedError, pa.ArrowException) as error:
        pytest.skip(f"datasets does not write it: {error}")
    assert levels_of(open_dataset(tmp_path / "d", image_size=SIZE), [0, 1]) == [1, 2]


def levels_of(dataset, indices):
    return dataset.batch(indices)[0][:, 0, 0, 0].tolist()


def test_text_beside_images_is_no_image(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pa.table({"img": [png(0)], "caption": ["a dog"]}), path)
    assert levels(open_dataset(path, image_size=SIZE)) == [0]
    pyarrow.parquet.write_table(pa.table({"image": ["a/0.png"]}), path)
    with pytest.raises(ValueError, match=r"row 0: no image in a known format"):
        open_dataset(path, image_size=SIZE, max_corrupt=0).batch([0])


WRONG_METADATA = [
    '{"info": []}', "[]", "3", '{"info": 3}', '{"info": {"features": []}}',
    '{"info": {"features": "image"}}', '{"info": {"features": {"label": {"_type": "ClassLabel", '
    '"names": 3}}}}', '{"info": {"features": {"label": {"_type": "ClassLabel", "names": [1]}}}}',
    '{"info": {"features": {"label": {"_type": "ClassLabel", "names": {"0": "a"}}}}}',
    "{", "", "[" * 10_000, "\xff", '{"info":' * 10_000,
]  # fmt: skip
FINE_METADATA = [
    "{}", '{"info": {}}', '{"info": null}', '{"info": {"features": null}}',
    '{"info": {"features": {"label": 3}}}', '{"info": {"features": {"label": {"_type": []}}}}',
    '{"info": {"features": {"gone": {"_type": "ClassLabel", "names": ["a"]}}}}',
    '{"info": {"features": {"label": {"_type": "ClassLabel"}}}}',
]  # fmt: skip


def parquet_with(path, metadata):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    table = pa.table({"image": [png(0), png(1)], "label": [1, 0]})
    noted = {b"huggingface": metadata.encode("latin-1")}
    pyarrow.parquet.write_table(table.replace_schema_metadata(noted), path)
    return path


@pytest.mark.parametrize("metadata", WRONG_METADATA, ids=lambda t: t[:70])
def test_metadata_of_another_shape_is_named(tmp_path, metadata):
    path = parquet_with(tmp_path / "a.parquet", metadata)
    with pytest.raises(ValueError, match=r"a\.parquet: its metadata 'huggingface'"):
        open_dataset(path, image_size=SIZE)


@pytest.mark.parametrize("metadata", FINE_METADATA)
def test_metadata_without_class_names_gives_numbers(tmp_path, metadata):
    dataset = open_dataset(parquet_with(tmp_path / "a.parquet", metadata), image_size=SIZE)
    assert dataset.class_names == ("0", "1") and dataset.labels.tolist() == [1, 0]


def test_parquet_that_is_cut_or_altered_anywhere(tmp_path):
    whole = parquet_with(tmp_path / "a.parquet", "{}").read_bytes()
    random = np.random.default_rng(0)
    cuts = [whole[:k] for k in range(0, len(whole), 23)]
    flips = []
    for _ in range(150):
        raw = bytearray(whole)
        raw[random.integers(len(raw))] ^= 1 << random.integers(8)
        flips.append(bytes(raw))
    for raw in cuts + flips:
        (tmp_path / "a.parquet").write_bytes(raw)
        try:
            open_dataset(tmp_path / "a.parquet", image_size=SIZE, max_corrupt=0, workers=1).batch(
                [0, 1]
            )
        except ValueError as error:
            assert "a.parquet" in str(error)
        except IndexError:  # fewer rows than asked for
            pass


# --- .npz -------------------------------------------------------------------------------------


def npz_with(path, member, content, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr(f"{member}.npy", content)
    return path


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def test_channels_first_is_told_so(tmp_path):
    for channels in (1, 3):
        np.savez(tmp_path / "x.npz", np.zeros((4, channels, 16, 8), np.uint8))
        message = rf"x\.npz: arr_0 is \(n, C, H, W\), \(4, {channels}, 16, 8\): need \(n, H, W, C\)"
        with pytest.raises(ValueError, match=message):
            open_images(tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", np.zeros((4, 3, 16, 3), np.uint8))  # three rows high
    assert open_images(tmp_path / "x.npz").read(0, 4).shape == (4, 3, 3, 16)


def test_an_array_that_ends_early_anywhere(tmp_path):
    content = npy(np.zeros((2, 4, 4, 3), np.uint8))
    for cut in range(len(content)):
        path = npz_with(tmp_path / "x.npz", "arr_0", content[:cut])
        with pytest.raises(ValueError, match=r"x\.npz: arr_0 is damaged: "):
            open_images(path).read(0, 2)


def test_an_npz_that_ends_early_anywhere(tmp_path):
    path = tmp_path / "x.npz"
    mean, cov = np.zeros(2), np.eye(2)
    np.savez_compressed(path, np.zeros((2, 4, 4, 3), np.uint8), mu=mean, sigma=cov)
    whole = path.read_bytes()
    assert len(StoredStatistics.load(path).gaussians) == 1
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        for opened in (open_images, StoredStatistics.load):
            with pytest.raises(ValueError, match=r"x\.npz"):
                opened(path)


def header(text):
    text = text.encode("latin-1") + b"\n"
    return b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text


def shaped(shape, descr="'|u1'"):
    return header(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}")


@pytest.mark.parametrize(
    "content",
    [
        header(""), header("{}"), header("("), header("("*9000), header("[]"), header("{1: 2}"),
        shaped("(1, 2, 2, 'x')"), shaped("(-1, 4, 4, 3)"), shaped("3"), shaped("(1, 4, 4, 3)"),
        shaped("(10**12, 4, 4, 3)"), shaped("(1000000000000, 4, 4, 3)"),
        shaped("(1, 1000000, 1000000, 3)"), shaped("(1, 4, 4, 3)", "'|O'"),
        shaped("(0, 4, 4, 3)"), shaped("(1, 2, 2, 3)", "[('a', '|u1')]") + bytes(12),
        b"\x93NUMPY\3\0\0\0\0\0", b"\x93NUMPY\xff\xff", b"", npy(np.array([{}], dtype=object)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("member", ["arr_0", "mu"])
def test_an_array_header_that_lies(tmp_path, content, member):
    path = npz_with(tmp_path / "x.npz", member, content)
    opened = open_images if member == "arr_0" else StoredStatistics.load
    if member == "mu":
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("sigma.npy", npy(np.eye(2)))
    with pytest.raises(ValueError, match=r"x\.npz"):
        opened(path).read(0, 1)


@pytest.mark.parametrize(
    "protocol", ["[]", "3", "{", "[" * 10_000, '{"extractor": []}', '{"extractor": "lite0"}']
)
def test_a_protocol_of_another_shape(tmp_path, protocol):
    np.savez(tmp_path / "x.npz", mu=np.zeros(2), sigma=np.eye(2), protocol=np.array(protocol))
    with pytest.raises(ValueError, match=r"cannot read the statistics of .*x\.npz.*protocol"):
        StoredStatistics.load(tmp_path / "x.npz")
