"""The videos of benchmarks: single files, files in zip archives or folders of frames, in a folder or on the Hub."""

import os
import shutil
import zlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from zipfile import BadZipFile, ZipFile

from ..processing.prompts import PICTURE_SUFFIXES
from ..processing.video import VideoSource
from .parquet import ParquetTask, dataset_folder, fetch, imported
from .rows import Row


class VideoTask(ParquetTask):
    """A benchmark about videos, which lie beside its rows under the names that lmms-eval gives them.

    A video is a file, a member of a zip archive anywhere in the folder, or a folder of frames in the order of their names.
    Members are extracted, each at its first use, to the assets folder of the Hub's cache, and stay there.
    """

    about_videos = True

    @property
    def folder(self) -> Path:
        """The folder of the data set: the one given, or that of one commit in the Hub's cache, whose name it has."""
        if self.data_dir is not None:
            return dataset_folder(self.repo_id, self.split, self.data_dir, self.config)
        return next(folder for folder in self.row_files[0].parents if folder.parent.name == "snapshots")

    @cached_property
    def members(self) -> dict[str, Path]:
        """The archive of each file that lies in one."""
        return {name: archive for archive in sorted(self.folder.rglob("*.zip")) for name in names_in(archive)}

    def video(self, names: Sequence[str], row: Row) -> VideoSource:
        """The first of these paths below the folder that is there; archives of the Hub are fetched where none is.

        Raises FileNotFoundError with the place of the row where there is none, and ValueError for a name outside the folder.
        """
        for name in names:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ValueError(f"{row.place}: the video {name!r} is outside the folder of the data; it is not opened")
        found = self.find(names)
        if found is None and self.data_dir is None:
            self.fetch_videos(names)
            found = self.find(names)
        if found is None:
            raise FileNotFoundError(
                f"{row.place}: {self.folder} holds no {' and no '.join(names)}, and no zip file with it; fetch the videos of "
                f"{self.repo_id} again"
            )
        return found

    def find(self, names: Sequence[str]) -> VideoSource | None:
        for path in (self.folder / name for name in names):
            if path.is_dir():
                return frames_in(path)
            if path.is_file():
                return path
        return next((self.extracted(name) for name in names if name in self.members), None)

    def extracted(self, name: str) -> Path:
        assets = imported("huggingface_hub").cached_assets_path("nanovlm-v2drop", self.repo_id.replace("/", "--"), "videos")
        return extracted(self.members[name], name, Path(assets))

    def fetch_videos(self, names: Sequence[str]) -> None:
        """Fetch what holds one of these videos: by default all zip files of the data set. Raises DatasetUnavailable."""
        fetch(self.repo_id, ["*.zip"], self.folder.name)
        self.__dict__.pop("members", None)  # the archives are there now


def frames_in(folder: Path) -> list[Path]:
    """The frames of a video that is a folder of pictures, in the order of their names; ValueError where there are none."""
    frames = sorted(file for file in folder.iterdir() if file.suffix.lower() in PICTURE_SUFFIXES)
    if not frames:
        raise ValueError(f"the folder {folder} holds no picture, so it is no video; fetch the videos again")
    return list(frames)


def names_in(archive: Path) -> list[str]:
    """The files in a zip archive. Raises ValueError for what is none."""
    try:
        with ZipFile(archive) as opened:
            return [member.filename for member in opened.infolist() if not member.is_dir()]
    except (BadZipFile, NotImplementedError) as error:
        raise ValueError(f"{archive} is no complete zip file ({error}); fetch it again") from error


def extracted(archive: Path, name: str, folder: Path) -> Path:
    """A member of an archive as a file of its own in `folder`, below its checksum. Raises ValueError for damaged data."""
    try:
        with ZipFile(archive) as opened:
            member = opened.getinfo(name)
            file = folder / f"{member.CRC:08x}" / PurePosixPath(name).name
            if file.is_file() and file.stat().st_size == member.file_size:
                return file
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_name(f"{file.name}.{os.getpid()}.part")
            with opened.open(member) as source, part.open("wb") as target:
                shutil.copyfileobj(source, target)
            return part.replace(file)
    except (BadZipFile, NotImplementedError, RuntimeError, zlib.error) as error:
        raise ValueError(f"{name} cannot be read from {archive} ({error}); fetch it again") from error
