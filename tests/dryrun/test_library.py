"""The dry run's C++ part: compiled once, and one line that says what to do where it cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_vita.dryrun import library
from megatron_vita.errors import ConfigError


@pytest.mark.slow
def test_it_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = library.build(tmp_path)
    assert first is not None
    assert [first] == list(tmp_path.iterdir())
    monkeypatch.setenv("CXX", "/no/compiler")
    assert library.build(tmp_path) == first


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/no/compiler")
    with pytest.raises(ConfigError, match=r"found no C\+\+ compiler.*CXX=/no/compiler.*set CXX"):
        library.build(tmp_path)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"found no C\+\+ compiler\. Install one"):
        library.build(tmp_path)


def test_a_cuda_build_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/libtorch_cuda.so").touch()
    monkeypatch.setattr(library, "torch_folder", lambda: tmp_path)
    with pytest.raises(ConfigError, match=r"CUDA build and no GPU is visible.*Install PyTorch's CPU build"):
        library.build(tmp_path)
    monkeypatch.setattr("megatron_vita.device.has_accelerator", lambda: True)
    assert library.build(tmp_path) is None  # the GPU's own hooks serve


def test_a_release_whose_headers_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "hooks.cpp"
    broken.write_text("#error this PyTorch has no such hook\n")
    monkeypatch.setattr(library, "SOURCE", broken)
    with pytest.raises(ConfigError, match=r"does not compile for PyTorch .*no such hook.*Install PyTorch 2.13"):
        library.build(tmp_path / "cache")


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot be written.*XDG_CACHE_HOME"):
        library.build(tmp_path / "file")


def test_another_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library.sys, "platform", "darwin")
    with pytest.raises(ConfigError, match="works on Linux"):
        library.build()


def test_torch_must_not_be_there_before_the_library() -> None:
    import torch  # noqa: F401

    with pytest.raises(RuntimeError, match="before torch"):
        library.load(Path("unused.so"))
