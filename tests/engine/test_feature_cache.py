"""Caches that stay within their limits, whoever uses them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from sam3lora.engine.feature_cache import ImageCache, LruCache, PreparedImage
from sam3lora.model.staged.forward import VisionFeatures


def make_image(key: str, side: int = 2) -> PreparedImage:
    return PreparedImage(key, np.zeros((side, side, 3), dtype=np.uint8), (side, side))


def make_features(num_floats: int = 25) -> VisionFeatures:
    return VisionFeatures([torch.zeros(1, num_floats, 1, 1)], [torch.zeros(1, 1000, 1, 1)])


def test_the_least_recently_used_goes_first():
    cache = LruCache(3)
    assert cache.get("a") is None
    for key in "abc":
        cache.put(key, key.upper())
    assert cache.get("a") == "A"  # from here on b is the oldest
    cache.put("d", "D")
    assert cache.list_keys() == ["c", "a", "d"]
    assert (cache.get("b"), cache.evictions, cache.size) == (None, 1, 3)


def test_sizes_count():
    cache = LruCache(10)
    cache.put("a", 1, size=4)
    cache.put("b", 2, size=4)
    cache.put("c", 3, size=7)  # takes the room of both
    assert (cache.list_keys(), cache.size, cache.evictions) == (["c"], 7, 2)
    # what fits exactly fits
    cache.put("d", 4, size=3)
    assert (cache.list_keys(), cache.size, cache.evictions) == (["c", "d"], 10, 2)


def test_a_value_in_place_of_another():
    cache = LruCache(10)
    cache.put("a", 1, size=8)
    cache.put("a", 2, size=9)
    assert (cache.get("a"), cache.size, cache.evictions) == (2, 9, 0)
    # one that is larger than the whole cache is not kept, nor what it would have replaced
    cache.put("b", 3, size=1)
    cache.put("a", 4, size=11)
    assert (cache.list_keys(), cache.size, cache.evictions) == (["b"], 1, 0)
    for _ in range(2):
        cache.remove("b")
    assert (len(cache), cache.size, cache.evictions) == (0, 0, 0)


def test_images_and_features_share_the_limit():
    cache = ImageCache(12 + 100)
    cache.keep_image(make_image("x"))
    cache.keep_features("x", None, make_features())
    assert cache.size_bytes == 112  # 2 x 2 x 3, and 25 float32; positions are everyone's
    cache.keep_image(make_image("y"))  # the image x is the oldest
    assert cache.image("x") is None
    assert cache.features("x", None) is not None
    assert (cache.size_bytes, cache.evictions) == (112, 1)


def test_features_are_of_one_image_and_one_adapter():
    cache = ImageCache(1000)
    made = make_features()
    cache.keep_features("x", "v1", made)
    assert cache.features("x", "v1") is made
    for key, version in (("x", None), ("x", "v2"), ("v1", "x"), ("y", "v1")):
        assert cache.features(key, version) is None
    assert cache.image("x") is None
    # of equal images the first stays
    first = make_image("x")
    cache.keep_image(first)
    cache.keep_image(make_image("x"))
    assert cache.image("x") is first
    assert cache.size_bytes == 112


def test_forgetting():
    cache = ImageCache(1000)
    for key in ("x", "y"):
        cache.keep_image(make_image(key))
        for version in (None, "v1"):
            cache.keep_features(key, version, make_features())
    cache.forget("x")
    assert (cache.image("x"), cache.features("x", None), cache.features("x", "v1")) == (None, None, None)
    assert cache.size_bytes == 12 + 200
    cache.drop_features()
    assert cache.image("y") is not None
    assert (cache.size_bytes, cache.evictions) == (12, 0)


@pytest.mark.parametrize("capacity", [1, 17, 100])
def test_many_threads(capacity):
    cache = LruCache(capacity)

    def use(seed: int) -> bool:
        generator = np.random.default_rng(seed)
        for key, size in generator.integers(1, 20, (500, 2)).tolist():
            cache.put(key, (key, size), size)
            found = cache.get(int(generator.integers(1, 20)))
            assert found is None or found[1] < 20
            if size == 7:
                cache.remove(key)
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(use, range(8)))
    # every byte is accounted for
    assert cache.size == sum(cache.get(key)[1] for key in cache.list_keys()) <= capacity
