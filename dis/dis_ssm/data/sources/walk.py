"""One walk over folders and zip files, for every reader: training, encoding and evaluation.

Links are followed; hidden and system files and what is no image are left out, and that is said.
"""

import os
import zipfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import features

from dis_ssm.system.reading import FileError, check_regular, check_size, parsing, read_bytes

IMAGE_SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff")
    + ((".avif",) if features.check("avif") else ())
)
LABEL_TABLE = "dataset.json"  # of StyleGAN and EDM: {"labels": [[name, label], ...]} or null
SYSTEM = frozenset({"__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini"})  # besides names with a dot
NAMED = 3  # of the names that are left out for one reason

NO_IMAGE, HIDDEN = "that are no images", "hidden or of the system"
IRREGULAR, CYCLE = "that are no regular files", "links to a folder around them"


@dataclass
class Listing:
    """What lies below a folder or in a zip file, as names with slashes, relative to it.

    `images` are sorted by the parts of their names; `folders` maps each folder ("" is the top) to
    the names of the folders in it.
    """

    root: Path
    images: list[str] = field(default_factory=list)
    folders: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    tables: set[str] = field(default_factory=set)
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def subfolders(self, name: str) -> list[str]:
        """The names of the folders directly in the folder `name`, sorted."""
        return sorted(self.folders.get(name, ()))

    def below(self, name: str) -> list[str]:
        """The images in the folder `name`, at any depth."""
        before = f"{name}/" if name else ""
        return [image for image in self.images if image.startswith(before)]

    def summary(self) -> str:
        """One line that says what is left out, and how many; "" if nothing is."""
        groups = [
            f"{len(names):,} {what} ({', '.join(names[:NAMED])}{', ...' * (len(names) > NAMED)})"
            for what, names in self.left_out.items()
        ]
        return f"{self.root}: left out {', '.join(groups)}" if groups else ""

    def sort(self) -> None:
        """Put all names into the order of their parts."""
        self.images.sort(key=parts)
        self.left_out = {what: sorted(names, key=parts) for what, names in self.left_out.items()}


def parts(name: str) -> list[str]:
    """What the slashes of a name separate."""
    return name.split("/")


def normal_name(name: str) -> str:
    """A name from an archive or a table, with slashes, as a path below its folder."""
    return "/".join(part for part in parts(name.replace("\\", "/")) if part not in ("", "."))


def is_hidden(part: str) -> bool:
    """Whether a part of a name is that of a hidden or a system's file."""
    return part in SYSTEM or (part.startswith(".") and part != "..")


def is_image(name: str) -> bool:
    """Whether a name ends as an image's."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def walk_folder(root: Path) -> Listing:
    """What lies below a folder, links followed.

    Raises:
        FileError: a folder cannot be listed, or a link is broken.
    """
    found = Listing(root)
    waiting: list[tuple[str, tuple]] = [("", ())]
    while waiting:
        name, above = waiting.pop()
        with parsing(f"cannot list {root / name}"):
            status = os.stat(root / name)
            here = (status.st_dev, status.st_ino)
            if here in above:
                found.left_out[CYCLE].append(f"{name}/")
                continue
            if name:
                outer, _, last = name.rpartition("/")
                found.folders[outer].add(last)
            before = f"{name}/" if name else ""
            with os.scandir(root / name) as entries:
                for entry in entries:
                    if _add_entry(found, before + entry.name, entry):
                        waiting.append((before + entry.name, (*above, here)))
    found.sort()
    return found


def _add_entry(found: Listing, name: str, entry: os.DirEntry) -> bool:
    """Notes what `entry` is; whether it is a folder to walk into."""
    if is_hidden(entry.name):
        found.left_out[HIDDEN].append(name)
    elif entry.is_symlink() and not os.path.exists(entry):
        raise FileError(f"{entry.path} is a link to nothing: repair or remove it")
    elif entry.is_dir():
        return True
    elif entry.name == LABEL_TABLE:
        found.tables.add(name.rpartition("/")[0])
    elif not is_image(entry.name):
        found.left_out[NO_IMAGE].append(name)
    elif not entry.is_file():
        found.left_out[IRREGULAR].append(name)
    else:
        found.images.append(name)
    return False


@dataclass
class ZipListing(Listing):
    """`infos` are zipfile's, by the names in the listing."""

    infos: dict[str, zipfile.ZipInfo] = field(default_factory=dict)


def walk_zip(path: Path) -> ZipListing:
    """The members of a zip file, less one folder around everything that counts.

    Backslashes separate as slashes do; a member's name, absolute or with "..", is only a name.
    """
    check_regular(path)
    with (
        parsing(f"{path} is not a whole zip file (get it again)"),
        zipfile.ZipFile(path) as archive,
    ):
        members = archive.infolist()
    found, infos, folders = ZipListing(path), {}, set()
    for info in members:
        name = normal_name(info.filename)
        hidden = any(map(is_hidden, parts(name)))
        if info.filename.endswith(("/", "\\")):
            folders |= set() if hidden else {name}
        elif hidden:
            found.left_out[HIDDEN].append(name)
        elif is_image(name) or parts(name)[-1] == LABEL_TABLE:
            infos[name] = info
        else:
            found.left_out[NO_IMAGE].append(name)
    around = _around([*infos, *(f"{name}/" for name in folders if name)])
    for name, info in infos.items():
        name = name.removeprefix(around)
        folder, _, last = name.rpartition("/")
        folders.add(around + folder)
        found.infos[name] = info
        if last == LABEL_TABLE:
            found.tables.add(folder)
        else:
            found.images.append(name)
    for folder in folders:
        _add_folder(found, folder.removeprefix(around) if f"{folder}/" != around else "")
    found.sort()
    return found


def _around(names: Iterable[str]) -> str:
    """The folder, with a slash, that all `names` lie in; "" if there is none."""
    tops = {name.partition("/")[0] for name in names}
    inside = all("/" in name for name in names)
    return f"{tops.pop()}/" if len(tops) == 1 and inside else ""


def _add_folder(found: Listing, folder: str) -> None:
    while folder:
        above, _, last = folder.rpartition("/")
        found.folders[above].add(last)
        folder = above


def read_table(found: Listing, folder: str) -> bytes:
    """The label table in `folder`."""
    path = found.root / folder / LABEL_TABLE
    with parsing(f"cannot read {path}"):
        if not isinstance(found, ZipListing):
            return read_bytes(path)
        info = found.infos[f"{folder}/{LABEL_TABLE}" if folder else LABEL_TABLE]
        check_size(info.file_size)
        with zipfile.ZipFile(found.root) as archive, archive.open(info) as file:
            raw = file.read(info.file_size + 1)
            check_size(len(raw), info.file_size)
            return raw
