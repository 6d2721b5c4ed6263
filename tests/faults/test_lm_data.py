"""Texts and token caches that are not as they should be."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import lm


def _text(path: Path) -> Path:
    path.write_text("all work and no play makes a dull text. " * 20, "utf-8")
    return path


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(lm.DataError, match=r"nowhere\.txt[\s\S]*No such file"):
        lm.load_corpus(path=tmp_path / "nowhere.txt", cache_dir=tmp_path)


def test_a_folder_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(lm.DataError, match="Is a directory"):
        lm.load_corpus(path=tmp_path, cache_dir=tmp_path)


def test_an_empty_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"")
    with pytest.raises(lm.DataError, match=r"a\.txt is empty"):
        lm.load_corpus(path=tmp_path / "a.txt", cache_dir=tmp_path)


def test_text_that_is_not_utf8_is_an_error_with_the_position(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("grün".encode() + b" caf\xe9 " + b"x" * 100)
    with pytest.raises(lm.DataError, match=r"a\.txt is not UTF-8[\s\S]*byte 0xe9 at position 9"):
        lm.load_corpus(path=tmp_path / "a.txt", cache_dir=tmp_path)


def test_a_text_too_short_to_split_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc", "utf-8")
    with pytest.raises(lm.DataError, match=r"val split of .* is too short"):
        lm.load_corpus(path=tmp_path / "a.txt", cache_dir=tmp_path)


@pytest.mark.parametrize("split", [(0.9, 0.1, 0.0), (0.5, 0.5, 0.5), (1.2, -0.1, -0.1)])
def test_shares_that_are_no_split_are_an_error(tmp_path: Path, split: tuple[float, float, float]) -> None:
    with pytest.raises(lm.DataError, match="split needs three positive shares"):
        lm.load_corpus(path=_text(tmp_path / "a.txt"), cache_dir=tmp_path, split=split)


def test_an_unknown_name_lists_those_that_exist(tmp_path: Path) -> None:
    with pytest.raises(lm.DataError, match=r"'shakespear'[\s\S]*topics, tinyshakespeare"):
        lm.load_corpus(name="shakespear", cache_dir=tmp_path)


def test_a_named_set_that_is_absent_says_where_to_put_it(tmp_path: Path) -> None:
    with pytest.raises(lm.DataError, match=r"no file .*tinyshakespeare\.txt[\s\S]*put https://") as caught:
        lm.load_corpus(name="tinyshakespeare", data_dir=tmp_path, cache_dir=tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_name_and_path_together_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(lm.DataError, match="a name or a path"):
        lm.load_corpus(name="topics", path=tmp_path / "a.txt", cache_dir=tmp_path)


def test_an_unknown_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(lm.DataError, match="'bpe'"):
        lm.load_corpus(path=_text(tmp_path / "a.txt"), cache_dir=tmp_path, tokenizer="bpe")


def test_more_characters_than_uint16_numbers_is_an_error(tmp_path: Path) -> None:
    text = "".join(chr(i) for i in range(0x10000, 0x21000))
    (tmp_path / "a.txt").write_text(text, "utf-8")
    with pytest.raises(lm.DataError, match="byte tokenizer"):
        lm.load_corpus(path=tmp_path / "a.txt", cache_dir=tmp_path, split=(0.98, 0.01, 0.01))


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("file", ["train.bin", "test.bin", "meta.json"])
@pytest.mark.parametrize("damage", [_flip, lambda p: p.write_bytes(b""), lambda p: os.truncate(p, 5), Path.unlink])
def test_damaged_tokens_are_made_again(
    tmp_path: Path, file: str, damage: object, caplog: pytest.LogCaptureFixture
) -> None:
    path = _text(tmp_path / "a.txt")
    expected = np.array(lm.load_corpus(path=path, cache_dir=tmp_path).test)
    (folder,) = (tmp_path / "tokens").iterdir()
    damage(folder / file)  # type: ignore[operator]
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(lm.load_corpus(path=path, cache_dir=tmp_path).test, expected)
    assert "damaged" in caplog.text or damage is Path.unlink
    caplog.clear()
    lm.load_corpus(path=path, cache_dir=tmp_path)
    assert caplog.text == ""


def test_a_cache_that_can_t_be_written_names_the_folder(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be", "utf-8")
    with pytest.raises(lm.DataError, match=r"cache[\s\S]*HETEROQ_CACHE"):
        lm.load_corpus(path=_text(tmp_path / "a.txt"), cache_dir=tmp_path / "cache")


def test_removing_the_cache_while_it_is_mapped_does_no_harm(tmp_path: Path) -> None:
    corpus = lm.load_corpus(path=_text(tmp_path / "a.txt"), cache_dir=tmp_path)
    before = corpus.batch("train", 0, 2, 8, 0).inputs
    shutil.rmtree(tmp_path / "tokens")
    assert corpus.batch("train", 0, 2, 8, 0).inputs.equal(before)
