"""Compiled code on disk is found under its own name, though many write at the same time."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from numba.core.caching import IndexDataCacheFile

from flashmoe_mlx.custom_kernels import cpu, numba_cache

WRITERS, KERNELS = 8, 12


def cache_at(path) -> IndexDataCacheFile:
    return IndexDataCacheFile(str(path), "kernels", "stamp")


def test_each_kernel_is_found_under_its_own_name(tmp_path):
    """With numba's own `save` some are lost, and some are found in place of others."""
    assert cpu and IndexDataCacheFile.save is numba_cache._save

    def write(writer: int) -> None:
        cache = cache_at(tmp_path)
        for kernel in range(KERNELS):
            cache.save((writer, kernel), [writer, kernel] * 1000)

    with ThreadPoolExecutor(WRITERS) as pool:
        for done in [pool.submit(write, writer) for writer in range(WRITERS)]:
            done.result()
    for writer in range(WRITERS):
        for kernel in range(KERNELS):
            assert cache_at(tmp_path).load((writer, kernel)) == [writer, kernel] * 1000


def test_code_comes_before_the_name(tmp_path, monkeypatch):
    cache = cache_at(tmp_path)

    def killed(overloads):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cache, "_save_index", killed)
        with pytest.raises(KeyboardInterrupt):
            cache.save("one", "its code")
    assert cache_at(tmp_path).load("one") is None
    cache.save("two", "other code")
    cache.save("one", "its code")
    cache.save("two", "newer code")
    assert [cache_at(tmp_path).load(key) for key in ("one", "two")] == ["its code", "newer code"]
