"""What `fit` keeps for a killed run: broken files are set aside, faults are named."""

import errno
import logging
import os
from types import SimpleNamespace

import pytest
import torch

from data_handlers import files
from qlib_ext.models.checkpoints import Checkpoints

STATE = {"weight": torch.arange(3.0), "epoch": 2}
PANEL = SimpleNamespace(fingerprint=lambda: "data")


def open_(folder, **arguments):
    model = SimpleNamespace(checkpoint_dir=None if folder is None else str(folder))
    vars(model).update(arguments)
    return Checkpoints(model, PANEL, {"train": ("2019-01-01", "2019-12-31")})


def killed(folder):
    """A run that ends by an error leaves its state; return the file."""
    with pytest.raises(KeyError), open_(folder) as kept:
        kept.save("0", STATE)
        path = kept.folder / "0.pt"
        raise KeyError("killed")
    return path


def taken(folder, take=None):
    found = []
    with open_(folder) as kept:
        return kept.load("0", take or found.append), found


def test_a_killed_run_is_gone_on_with_and_a_finished_one_is_removed(tmp_path):
    killed(tmp_path)
    loaded, (state,) = taken(tmp_path)
    assert loaded and state["epoch"] == 2
    assert torch.equal(state["weight"], STATE["weight"])
    assert taken(tmp_path) == (False, [])
    assert not any(p.is_dir() for p in tmp_path.iterdir())


class Foreign:
    """A class that a checkpoint of ours never holds."""


@pytest.mark.parametrize("fault", ["cut", "empty", "text", "pickle", "network"])
def test_a_broken_checkpoint_is_set_aside_and_not_met_again(
    tmp_path, fault, caplog, monkeypatch
):
    monkeypatch.setattr(logging.getLogger("qlib"), "propagate", True)
    path = killed(tmp_path)
    whole, take = path.read_bytes(), None
    if fault == "pickle":
        torch.save(Foreign(), path)
    elif fault == "network":  # of another width, as `load_state_dict` says

        def take(state):
            torch.nn.Linear(2, 2).load_state_dict(state)

    else:
        path.write_bytes({"cut": whole[:-20], "empty": b"", "text": b"a,b\n"}[fault])
    with pytest.raises(KeyError), open_(tmp_path) as kept:
        assert not kept.load("0", take or (lambda state: None))
        assert "set aside as 0.broken; training of this part begins anew" in caplog.text
        assert not kept.load("0", take)  # no second warning, no second file
        raise KeyError
    assert [p.name for p in path.parent.iterdir()] == ["0.broken"]
    # One record, though a logger that propagates hands it to caplog twice.
    assert len(set(map(id, caplog.records))) == 1


def test_a_full_disk_is_one_line_and_the_last_state_stays(tmp_path, monkeypatch):
    path = killed(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ValueError, match=r"0\.pt cannot be written: the disk is full"):
        with monkeypatch.context() as patch, open_(tmp_path) as kept:
            patch.setattr(files.os, "fsync", full)
            kept.save("0", {"epoch": 3})
    assert [p.name for p in path.parent.iterdir()] == ["0.pt"]
    assert taken(tmp_path)[1][0]["epoch"] == 2


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_read_only_folder_is_named_with_the_remedy(tmp_path, monkeypatch, number):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "open", refuse)
        with pytest.raises(ValueError, match=r"\.lock cannot be created: .*name a"):
            with open_(tmp_path):
                pass
    with open_(tmp_path) as kept, monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", refuse)
        with pytest.raises(ValueError, match=r"0\.pt cannot be written: .*name a"):
            kept.save("0", STATE)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="cannot be created"):
        with open_(tmp_path / "file"):
            pass


def test_equal_runs_at_a_time_have_folders_of_their_own(tmp_path):
    with open_(tmp_path) as one, open_(tmp_path) as two, open_(tmp_path, lr=1) as other:
        assert len({one.folder, two.folder, other.folder}) == 3
        two.save("0", STATE)
        assert not one.load("0", print)


def test_without_a_folder_nothing_is_kept():
    with open_(None) as kept:
        kept.save("0", STATE)
        assert not kept.load("0", print)
