"""The C++ part of the dry run (hooks.cpp): compiled once per PyTorch into a cache folder, loaded before torch."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from megatron_vita.errors import ConfigError

SOURCE = Path(__file__).with_name("hooks.cpp")
TRIED = "2.13"
"""Releases of PyTorch that the dry run was tried with."""
_FLAGS = ("-std=c++20", "-O0", "-fPIC", "-shared")


def torch_folder() -> Path:
    """Folder of the installed PyTorch, found without importing it.

    Raises:
        ConfigError: PyTorch is not installed.
    """
    found = importlib.util.find_spec("torch")
    if found is None or not found.submodule_search_locations:
        raise ConfigError("the dry run needs PyTorch, which is not installed. Install it (pip install torch).")
    return Path(next(iter(found.submodule_search_locations)))


def cache_folder() -> Path:
    """Where the compiled library is kept: megatron_vita/ below $XDG_CACHE_HOME, by default ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron_vita"


def build(folder: Path | None = None) -> Path | None:
    """Compile hooks.cpp for the installed PyTorch, unless that was done before.

    Args:
        folder: where the library is kept; by default `cache_folder()`.

    Returns:
        Path of the library; None where a GPU is visible, whose own hooks serve.

    Raises:
        ConfigError: not Linux, no C++ compiler, a CUDA build of PyTorch, a PyTorch whose headers do not fit, or a
            folder that cannot be written; each says what to do.
    """
    torch, version = torch_folder(), importlib.metadata.version("torch")
    if sys.platform != "linux":
        raise ConfigError(f"the dry run works on Linux, this is {sys.platform}. Run it in a Linux container.")
    if (torch / "lib/libtorch_cuda.so").exists():
        from megatron_vita import device

        if device.has_accelerator():
            return None
        raise ConfigError(
            f"PyTorch {version} is a CUDA build and no GPU is visible: its own CUDA hooks are in the way of the dry "
            "run's. Install PyTorch's CPU build in an environment of its own, or run on a machine with a GPU."
        )
    digest = hashlib.sha256(SOURCE.read_bytes() + " ".join(_FLAGS).encode()).hexdigest()[:12]
    folder = folder or cache_folder()
    library = folder / f"fake_cuda-torch{version}-py{sys.version_info.major}.{sys.version_info.minor}-{digest}.so"
    if not library.exists():
        _compile(torch, version, library)
    return library


def _compile(torch: Path, version: str, library: Path) -> None:
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)
    if not compiler or shutil.which(compiler) is None:
        raise ConfigError(
            f"the dry run compiles {SOURCE.name} once and found no C++ compiler"
            + (f" (CXX={compiler})" if compiler else "")
            + ". Install one (apt install g++), or set CXX to yours."
        )
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            out = Path(scratch) / library.name
            includes = [f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}"]
            command = [compiler, *_FLAGS, *includes, str(SOURCE), "-o", str(out), f"-L{torch / 'lib'}"]
            done = subprocess.run([*command, "-ltorch_cpu", "-lc10"], capture_output=True, text=True)
            if done.returncode == 0:
                os.replace(out, library)  # two processes may compile at once: either result serves
    except OSError as error:
        raise ConfigError(
            f"{library.parent}: cannot be written ({error}). Set XDG_CACHE_HOME to a folder that can."
        ) from None
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[-300:])
        raise ConfigError(
            f"the dry run was tried with PyTorch {TRIED}, and {SOURCE.name} does not compile for PyTorch {version}: "
            f"{reason.strip()}. Install PyTorch {TRIED}'s CPU build in an environment of its own."
        )


def load(library: Path | None) -> None:
    """Load the library, if one is needed, into this process, which has not imported torch yet.

    Raises:
        RuntimeError: torch was imported before: it has looked for CUDA hooks, and found none.
    """
    if "torch" in sys.modules:
        raise RuntimeError("the dry run's library must be loaded before torch")
    if library is None:
        return
    folder = torch_folder() / "lib"
    for path in (folder / "libc10.so", folder / "libtorch_cpu.so", library):
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
