import errno
import multiprocessing
import os
import signal

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from data_handlers import files


class TestWrites:
    def test_every_kind_reads_back(self, tmp_path):
        frame = pd.DataFrame({"a": [1.0, np.nan]})
        files.write_text(tmp_path / "new" / "t", "é\n")
        files.write_json(tmp_path / "j", {"b": 1}, indent=1)
        files.write_parquet(tmp_path / "f", frame)
        files.write_parquet(tmp_path / "p", pa.table({"a": [1]}))
        files.write_bytes(tmp_path / "w", files.torch_bytes({"w": torch.ones(2)}))
        assert (tmp_path / "new" / "t").read_bytes() == b"\xc3\xa9\n"
        assert (tmp_path / "j").read_text() == '{\n "b": 1\n}'
        pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "f"), frame)
        assert pd.read_parquet(tmp_path / "p")["a"].tolist() == [1]
        assert torch.load(tmp_path / "w", weights_only=True)["w"].tolist() == [1, 1]

    def test_a_failed_write_leaves_the_old_file_and_nothing_else(self, tmp_path):
        files.write_text(tmp_path / "f", "old")
        with pytest.raises(KeyError), files.replacing(tmp_path / "f") as temporary:
            temporary.write_text("half")
            raise KeyError("x")
        assert (tmp_path / "f").read_text() == "old"
        assert [p.name for p in tmp_path.iterdir()] == ["f"]

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux only")
    def test_a_full_disk_is_one_line_that_names_the_file(self, tmp_path):
        with pytest.raises(ValueError, match=r"result\.json .*disk is full"):
            with files.replacing(tmp_path / "result.json") as temporary:
                temporary.write_text("part")
                with open("/dev/full", "w") as full:
                    full.write("x")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
    def test_a_read_only_folder_says_what_to_do(self, tmp_path, monkeypatch, number):
        def refuse(*_):
            raise OSError(number, "no")

        monkeypatch.setattr(os, "replace", refuse)
        with pytest.raises(ValueError, match=r"cannot be written.*name a"):
            files.write_text(tmp_path / "f", "x")

    def test_a_folder_that_is_a_file_says_so(self, tmp_path):
        (tmp_path / "f").write_text("x")
        with pytest.raises(ValueError, match=r"cannot be written.*name another"):
            files.write_text(tmp_path / "f" / "g", "x")

    def test_other_system_errors_pass(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            with files.replacing(tmp_path / "f"):
                open(tmp_path / "absent").close()


def _hold(file, pipe):
    with files.locked(file, "busy"):
        pipe.send(1)
        signal.pause()


class TestLocks:
    def test_a_second_process_is_refused_and_a_dead_holder_is_not_met(self, tmp_path):
        file = tmp_path / "below" / "lock"
        ours, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("fork")
        holder = context.Process(target=_hold, args=(file, theirs))
        holder.start()
        assert ours.poll(30)
        with pytest.raises(files.BusyError, match="a is being built by another"):
            with files.locked(file, "a is being built"):
                pass
        holder.kill()
        holder.join()
        with files.locked(file, "a is being built"):
            assert file.exists()
        assert not file.exists()

    def test_a_store_has_one_lock_whatever_its_name(self, tmp_path):
        (tmp_path / "s").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "s")
        with files.store_lock(tmp_path / "s"):
            with pytest.raises(files.BusyError, match="being written"):
                with files.store_lock(tmp_path / "link"):
                    pass


class TestFingerprint:
    def test_content_type_and_order_count(self, tmp_path):
        a = np.arange(6.0)
        (tmp_path / "f").write_text("x")
        seen = [
            files.fingerprint(*parts)
            for parts in (
                ["x"],
                [b"x"],
                [tmp_path / "f"],
                ["x", "x"],
                ["xx"],
                [a],
                [a.astype(np.float32)],
                [a.reshape(2, 3)],
                [pd.Series(a)],
                [pd.Series(a, name="a")],
                [{"a": 1}],
            )
        ]
        assert len(set(seen)) == len(seen)
        assert files.fingerprint({"a": 1, "b": 2}) == files.fingerprint(
            {"b": 2, "a": 1}
        )
        assert files.fingerprint(a[::2]) == files.fingerprint(a[::2].copy())
        assert all(len(text) == 32 for text in seen)
